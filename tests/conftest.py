"""What every test may use, and an environment in which no test leaves a trace or needs a network."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

# Ultralytics, OpenMP and torch read these once, at their own import, which no test module precedes.
_config = tempfile.TemporaryDirectory(prefix="espalier-tests-")
os.environ["ESPALIER_STORE"] = f"{_config.name}/espalier.sqlite"
os.environ["YOLO_CONFIG_DIR"] = _config.name
os.environ["YOLO_OFFLINE"] = "true"
os.environ.setdefault("OMP_NUM_THREADS", "2")


class Sshd(NamedTuple):
    """A server: the alias of its host, its port, where temporary folders lie there, and its process."""

    host: str
    port: int
    tmp: Path
    pid: int


# Strides 8, 16 and 32: enough for the heads of every task.
BACKBONE: list[Any] = [
    [-1, 1, "Conv", [8, 3, 2]],
    [-1, 1, "Conv", [16, 3, 2]],
    [-1, 1, "C2f", [16, True]],
    [-1, 1, "Conv", [16, 3, 2]],
    [-1, 1, "Conv", [24, 3, 2]],
    [-1, 1, "Conv", [24, 3, 2]],
]
HEADS: dict[str, Any] = {
    "segment": [[3, 4, 5], 1, "Segment", ["nc", 8, 16]],
    "pose": [[3, 4, 5], 1, "Pose", ["nc", "kpt_shape"]],
    "obb": [[3, 4, 5], 1, "OBB", ["nc", 1]],
    "classify": [-1, 1, "Classify", ["nc"]],
    "semantic": [[3, 4], 1, "SemanticSegment", ["nc"]],
    "depth": [[3, 4, 5], 1, "Depth", [16]],
}


@pytest.fixture(scope="session")
def architectures() -> dict[str, dict[str, Any]]:
    """Very small models of each task beside detection, of three classes, as Ultralytics' YAMLs say it."""
    common = {"nc": 3, "kpt_shape": [2, 3], "backbone": BACKBONE}
    return {task: {**common, "head": [head]} for task, head in HEADS.items()}


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a model that Ultralytics has and that we neither train nor export."""
    from compress.checkpoint import build_model, save_model

    path = tmp_path_factory.mktemp("world") / "world.pt"
    head = [[3, 4, 5], 1, "WorldDetect", ["nc", 512, False]]
    save_model(build_model({"nc": 80, "backbone": BACKBONE, "head": [head]}), path, {})
    return path


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return Path(__file__).parents[1]


@pytest.fixture(scope="session")
def shared(root: Path) -> Path:
    """The folder of real data sets and weights beside the repository."""
    folder = root.parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs real data and weights: no folder 'shared' beside the repository")
    return folder


@pytest.fixture(scope="session")
def run_command() -> Callable[..., int]:
    """Run a command's app with words, as `python -m` does, and return its exit code."""
    import typer

    from compress.errors import run_app

    def run(app: typer.Typer, *words: object) -> int:
        command = typer.main.get_command(app)
        try:
            run_app(lambda: command.main([str(word) for word in words], prog_name="command"))
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    return run


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The YAML of a generated data set of 16, 8 and 8 images of 96 × 96 pixels."""
    from compress.shapes import Shapes, generate

    return generate(tmp_path_factory.mktemp("tiny") / "shapes", Shapes(train=16, val=8, test=8, imgsz=96))


@pytest.fixture(scope="session")
def sshd_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Sshd]]:
    """A real sshd on the loopback with keys of its own, and the client's configuration for it."""
    folder = tmp_path_factory.mktemp("sshd")
    (folder / "tmp").mkdir()
    server = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")
    if server is None or not shutil.which("ssh-keygen"):
        pytest.skip("needs sshd (Debian, Ubuntu: openssh-server)")
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\n"
        "PasswordAuthentication no\nUsePAM no\nStrictModes no\nPermitRootLogin yes\nPidFile none\n"
        f"Subsystem sftp internal-sftp\nSetEnv TMPDIR={folder}/tmp HOME={folder}\n"
    )
    client = folder / "ssh_config"
    client.write_text(
        f"Host loopback\n HostName 127.0.0.1\n Port {port}\n User {getpass.getuser()}\n"
        f"Host *\n IdentityFile {folder}/user\n IdentitiesOnly yes\n UserKnownHostsFile {folder}/known\n"
        " StrictHostKeyChecking accept-new\n"
    )
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([server, "-D", "-e", "-f", str(folder / "sshd_config")], stderr=log)
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            if process.poll() is not None:
                pytest.skip(f"sshd does not start here: {(folder / 'log').read_text()}")
            time.sleep(0.05)
        yield client, Sshd("loopback", port, folder / "tmp", process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=10)


@pytest.fixture
def sshd(sshd_server: tuple[Path, Sshd], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sshd:
    """A real sshd, and an ssh and scp that know its host by an alias."""
    client, server = sshd_server
    programs = tmp_path / "ssh-bin"
    programs.mkdir()
    for name in ("ssh", "scp"):
        script(programs / name, f'#!/bin/sh\nexec {shutil.which(name)} -F {client} "$@"\n')
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return server


# adb's own contract, of a phone that is a folder: device paths below /data lie in it.
ADB = """\
    #!{python}
    import os, shutil, subprocess, sys, time
    root, log, arguments = {root!r}, {log!r}, sys.argv[1:]
    with open(log, "a") as stream:
        stream.write(repr(arguments) + "\\n")
    serial = arguments[1] if arguments[0] == "-s" else None
    action, *rest = arguments[2:] if serial else arguments
    if os.path.exists(root + ".gone") or serial not in (None, "phone-1"):
        sys.exit("adb: device '%s' not found" % serial)
    if os.path.exists(root + ".lost") and action != "get-state":
        time.sleep(120)
    def there(path):
        return root + path if path.startswith("/data/") else path
    if action == "get-state":
        print("device")
    elif action == "push":
        *sources, place = rest
        for source in sources:
            copy = shutil.copytree if os.path.isdir(source) else shutil.copy2
            copy(source, os.path.join(there(place), os.path.basename(source)))
    elif action == "pull":
        shutil.copy2(there(rest[0]), rest[1])
    elif action == "shell":
        words = rest[1:] if rest[0] == "-T" else rest
        script = " ".join(words).replace("/data/local/tmp", root + "/data/local/tmp")
        done = subprocess.run(["sh", "-c", script], stdout=subprocess.PIPE if "mktemp" in script else None)
        if done.stdout:
            sys.stdout.write(done.stdout.decode().replace(root, ""))
        sys.exit(done.returncode)
    else:
        sys.exit("adb: unknown command " + action)
"""


@pytest.fixture
def adb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that is the phone `phone-1`, and `adb.log` beside it, which tells the calls.

    `phone.gone` there unplugs it, `phone.lost` takes it out of reach without a word.
    """
    phone, programs = tmp_path / "phone", tmp_path / "adb-bin"
    (phone / "data" / "local" / "tmp").mkdir(parents=True)
    programs.mkdir()
    script(programs / "adb", ADB.format(python=sys.executable, root=str(phone), log=str(tmp_path / "adb.log")))
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return phone


def script(path: Path, text: str) -> Path:
    """Write a program."""
    path.write_text(textwrap.dedent(text))
    path.chmod(0o755)
    return path
