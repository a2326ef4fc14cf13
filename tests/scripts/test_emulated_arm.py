"""scripts/emulated_arm.sh: what it says everywhere, and, where it is asked for, the emulated machine itself."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
COUNT = """
import sys, json
sys.path.insert(0, "/tmp")
import numpy as np
import ncnn_layers, ncnn_runner
session = ncnn_runner.load("/tmp/tiny_ncnn_model", 1)
image = np.load("/tmp/image.npy")
mark = ncnn_layers.instruction_mark("/tmp/count")
for _ in range(2):
    start = mark()
    with session.net.create_extractor() as extractor:
        extractor.input("in0", ncnn_runner.ncnn.Mat(image))
        for name in session.metadata["outputs"]:
            extractor.extract(name, ncnn_runner.ncnn.Mat())
    whole = mark() - start
layers = ncnn_layers.layer_costs(session.net, "/tmp/tiny_ncnn_model", image, mark)
print(json.dumps([whole, sum(row["cost"] for row in layers)]))
"""


def call(*words: str | Path, cache: Path, code: int = 0, **more: Any) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*map(str, words)], capture_output=True, text=True, env={**os.environ, "ESPALIER_CACHE": str(cache)}, **more
    )
    assert done.returncode == code, done.stderr
    return done


def script(*arguments: str, cache: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    return call("bash", SCRIPTS / "emulated_arm.sh", *arguments, cache=cache, code=code)


def function(text: str, cache: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run functions of the script, as it runs them."""
    variables = f'set -euo pipefail; repository={SCRIPTS.parent} here={SCRIPTS}/emulated_arm cache="{cache}"'
    sources = "; ".join(f"source {SCRIPTS}/emulated_arm/{name}.sh" for name in ("tools", "root", "server"))
    setup = f'{variables} root="$cache/root" name=espalier-arm; {sources}'
    return call("bash", "-c", f"{setup}\n{text}", cache=cache, code=code)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "say what to do: bash scripts/emulated_arm.sh up|status|down"),
        (["fly"], "say what to do: bash scripts/emulated_arm.sh up|status|down"),
        (["up", "--fast"], "up does not know '--fast': bash scripts/emulated_arm.sh --help"),
        (["status", "--purge"], "status does not know '--purge': bash scripts/emulated_arm.sh --help"),
        (["up", "--port", "22"], "--port wants a number from 1024 to 65535"),
        (["up", "--port", "70000"], "--port wants a number from 1024 to 65535"),
        (["up", "--port"], "--port wants a number from 1024 to 65535"),
    ],
)
def test_a_wrong_command_is_one_line(arguments: list[str], said: str, tmp_path: Path) -> None:
    assert script(*arguments, cache=tmp_path / "cache", code=2).stderr == f"error: {said}\n"
    assert not (tmp_path / "cache").exists()


def test_help_names_every_command(tmp_path: Path) -> None:
    said = script("--help", cache=tmp_path).stdout
    assert re.findall(r"emulated_arm\.sh (\w+)", said) == ["up", "status", "down"]
    assert "ESPALIER_CACHE" not in said.splitlines()[0]


def test_what_is_down_says_so(tmp_path: Path) -> None:
    cache = tmp_path / 'a "cache"'
    assert script("status", cache=cache, code=1).stdout == "emulated_arm: down\n"
    assert json.loads(script("status", "--json", cache=cache, code=1).stdout) == {
        "state": "down",
        "pid": None,
        "port": None,
        "host": "espalier-arm",
        "ssh_config": None,
        "counts_instructions": False,
    }
    assert script("down", "--purge", cache=cache).stdout == "emulated_arm: down\n"
    assert not cache.exists()


def test_the_number_of_another_process_is_not_taken_for_the_server(tmp_path: Path) -> None:
    (tmp_path / "emulated-arm").mkdir()
    for name, content in (("pid", os.getpid()), ("port", 2222)):
        (tmp_path / "emulated-arm" / name).write_text(f"{content}\n")
    assert script("status", cache=tmp_path, code=1).stdout == "emulated_arm: down\n"
    if os.getuid() == 0:
        script("down", cache=tmp_path)  # and this process lives
        assert [path.name for path in (tmp_path / "emulated-arm").iterdir()] == ["lock"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("echo ID=arch >release", "is made of Debian's or Ubuntu's packages, and this is arch: use a container of one"),
        (":", "is made of Debian's or Ubuntu's packages, and this is another system: use a container of one"),
        ("echo ID=debian >release; uname() { echo aarch64; }", "not needed: this machine is an ARM itself"),
        ("echo ID=ubuntu >release; uname() { echo x86_64; }; id() { echo 1000; }", "needs root: sudo bash scripts/"),
    ],
)
def test_a_machine_that_cannot_do_it_is_one_line(given: str, said: str, tmp_path: Path) -> None:
    done = function(f"cd {tmp_path}; {given}; check_machine release", tmp_path, code=2)
    assert re.fullmatch(f"error: .*{re.escape(said)}.*\n", done.stderr)


def test_the_wheels_are_those_of_the_lock_for_the_python_there(tmp_path: Path) -> None:
    lock = (SCRIPTS.parent / "requirements.lock").read_text()
    expected = [re.search(pattern, lock)[0] for pattern in (r"ncnn==[\d.]+", r"numpy==[\d.]+(?= ; .*>= '3.12')")]  # type: ignore[index]
    assert function("find_python; pinned 3.13 ncnn numpy", tmp_path).stdout.split() == expected


@pytest.mark.parametrize(
    ("distribution", "expected"),
    [
        ("debian", ["deb http://mirror.example/debian/ stable main"]),
        ("ubuntu", ["deb http://ports.ubuntu.com/ubuntu-ports/ stable main"]),
    ],
)
def test_the_packages_come_from_the_machine_s_own_sources(
    distribution: str, expected: list[str], tmp_path: Path
) -> None:
    fakes = f'.() {{ ID={distribution}; }}; apt-get() {{ echo "deb http://mirror.example/debian/ stable main"; }}'
    assert function(f"{fakes}; sources", tmp_path).stdout.splitlines() == expected


def test_a_port_that_is_taken_is_named_or_passed_over(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = function(f"free_port {port}", tmp_path, code=2).stderr
        assert said == f"error: port {port} is taken: give a free one with --port\n"
        assert int(function(f"FIRST_PORT={port}; free_port ''", tmp_path).stdout) > port


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["get-state"], "adb: device 'emulated-arm' not found\n"),
        (["-s", "phone", "shell", "true"], "adb: device 'phone' not found\n"),
        (["sideload"], "adb: unknown command sideload\n"),
    ],
)
def test_adb_knows_no_device_that_is_down(arguments: list[str], said: str, tmp_path: Path) -> None:
    assert call(SCRIPTS / "emulated_arm" / "adb", *arguments, cache=tmp_path, code=1).stderr == said
    listed = call(SCRIPTS / "emulated_arm" / "adb", "devices", cache=tmp_path).stdout
    assert listed == "List of devices attached\n\n"


def test_the_counter_compiles_without_a_warning(tmp_path: Path) -> None:
    if not shutil.which("gcc"):
        pytest.skip("needs gcc")
    options = ["-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-DPLUGIN_API=1"]
    call("gcc", *options, SCRIPTS / "emulated_arm/instructions.c", "-o", tmp_path / "plugin.so", cache=tmp_path)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The cache of an emulated machine that is up."""
    if os.environ.get("ESPALIER_EMULATED_ARM") != "1" or os.getuid() != 0:
        pytest.skip("needs root, apt and a minute: ESPALIER_EMULATED_ARM=1")
    cache = tmp_path_factory.mktemp("emulated")
    script("up", cache=cache)
    yield cache
    script("down", "--purge", cache=cache)
    assert not (cache / "emulated-arm").exists()
    assert processes(cache) == []


def processes(cache: Path) -> list[str]:
    """What runs as part of the emulated machine."""
    names = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(cache / "emulated-arm") in (process / "cmdline").read_text():
                names.append((process / "cmdline").read_text())
        except OSError:
            continue
    return names


def there(cache: Path, command: str, code: int = 0, **more: Any) -> str:
    config = cache / "emulated-arm" / "ssh_config"
    return call("ssh", "-F", config, "espalier-arm", command, cache=cache, code=code, **more).stdout


def test_it_is_an_arm_with_python_and_ncnn(machine: Path) -> None:
    assert there(machine, "uname -m; exit 3", code=3) == "aarch64\n"
    said = there(machine, "python3 -c 'import ncnn, numpy; print(ncnn.__version__, numpy.__version__)'")
    assert len(said.split()) == 2
    state = json.loads(script("status", "--json", cache=machine).stdout)
    assert (state["state"], state["counts_instructions"]) == ("up", True)
    assert "is up already" in script("up", cache=machine).stdout
    assert script("up", "--port", "1999", cache=machine, code=2).stderr.startswith("error: it is up on port")


def test_adb_reaches_the_same_machine(machine: Path, tmp_path: Path) -> None:
    adb = SCRIPTS / "emulated_arm" / "adb"
    (tmp_path / "a file: of bytes").write_bytes(bytes(range(256)))
    place = "/data/local/tmp/new folder/b"
    call(adb, "-s", "emulated-arm", "push", tmp_path / "a file: of bytes", place, cache=machine)
    call(adb, "pull", place, tmp_path / "back", cache=machine)
    assert (tmp_path / "back").read_bytes() == bytes(range(256))
    done = call(adb, "shell", "-T", "cat; uname -m >&2; exit 5", cache=machine, code=5, input="in\n")
    assert (done.stdout, done.stderr) == ("in\n", "aarch64\n")
    assert call(adb, "get-state", cache=machine).stdout == "device\n"
    assert "emulated-arm\tdevice" in call(adb, "devices", cache=machine).stdout
    assert "adb: error: " in call(adb, "pull", "/nowhere", tmp_path, cache=machine, code=1).stderr


def test_counts_repeat_and_layers_add_up(machine: Path, tmp_path: Path) -> None:
    from compress.checkpoint import build_model, save_model
    from export.ncnn import export_ncnn

    save_model(build_model("yolov8n.yaml", nc=3).eval(), tmp_path / "tiny.pt", {})
    model = export_ncnn(tmp_path / "tiny.pt", tmp_path / "tiny_ncnn_model", imgsz=64)
    np.save(tmp_path / "image.npy", np.random.default_rng(0).random((3, 64, 64), dtype=np.float32))
    runners = SCRIPTS.parent / "benchmark" / "runners"
    files = [model, tmp_path / "image.npy", runners / "ncnn_runner.py", runners / "ncnn_layers.py"]
    config = machine / "emulated-arm" / "ssh_config"
    call("scp", "-q", "-r", "-F", config, *files, "espalier-arm:/tmp/", cache=machine)
    command = "ESPALIER_INSTRUCTIONS=/tmp/count /opt/espalier/bin/python-count -"
    first, second = (json.loads(there(machine, command, input=COUNT)) for _ in range(2))
    assert first == pytest.approx(second, rel=1e-3)
    assert first[1] == pytest.approx(first[0], rel=1e-2)
    assert first[0] > 1e6


def test_what_is_started_there_ends_with_it(machine: Path) -> None:
    there(machine, "nohup sleep 98765 >/dev/null 2>&1 & echo")
    assert there(machine, "ps -e -o args").count("/bin/sleep 98765") >= 1
    script("down", cache=machine)
    assert processes(machine) == []
    assert call("ps", "-e", "-o", "args", cache=machine).stdout.count("/bin/sleep 98765") == 0
    script("up", cache=machine)  # from what is on disk
    assert there(machine, "uname -m") == "aarch64\n"
