"""What a device lacks is named, and can be put into a folder of its own there."""

from __future__ import annotations

import ast
import json
import os
import platform
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from benchmark import bootstrap, sites, transfer
from benchmark.transports import Local
from compress.devices import Device
from compress.errors import DeviceError
from compress.settings import parse

ROOT = Path(__file__).parents[2]
FACTS = {"python": [3, 11, 2], "machine": "aarch64", "libc": ["glibc", "2.31"]}


def board(python: str, transport: str = "ssh") -> Device:
    content = {"name": "board", "transport": transport, "python": python, "runtimes": ["ncnn"]}
    return parse(Device, {**content, "budgets": {"ncnn": {}}, "notes": "a test"}, "board")


@pytest.fixture
def bare(tmp_path: Path) -> str:
    """An interpreter that sees no packages but those of PYTHONPATH."""
    path = tmp_path / "bare-python"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    path.chmod(0o755)
    return str(path)


def wheel(folder: Path, name: str, source: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}/__init__.py", source)
        archive.writestr("../outside.py", "")


def test_missing_packages_are_named_with_both_remedies(sshd: Any, bare: str) -> None:
    with pytest.raises(DeviceError) as caught, sites.open_site(board(bare), sshd.host, None, ["ncnn"]):
        pass
    assert str(caught.value) == (
        f"loopback lacks numpy, ncnn for {bare}: give --bootstrap, which puts it into a folder of its own there, or "
        f"install it: {bare} -m pip install numpy ncnn"
    )
    assert list(sshd.tmp.iterdir()) == []


def test_packages_are_put_into_a_folder_of_their_own_once(
    adb: Path, bare: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fetched: list[str] = []

    def download(name: str, facts: dict[str, Any], output: Path) -> None:
        fetched.append(name)
        wheel(output, name, "__version__ = '1.0'\n")

    monkeypatch.setattr(bootstrap, "download", download)
    version = f"cp3{sys.version_info.minor}"
    expected = f"/data/local/tmp/espalier/packages/ncnn-{version}-{platform.machine()}"
    with sites.open_site(board(bare, "adb"), "phone-1", None, ["ncnn"], put_packages=True) as site:
        assert site.packages == expected
        assert f"bootstrap: ncnn, numpy for phone-1: {expected}" in capsys.readouterr().out
    assert fetched == ["ncnn", "numpy"]
    (folder,) = (adb / "data/local/tmp/espalier/packages").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["ncnn", "numpy", "outside.py"]  # nothing beside it

    with sites.open_site(board(bare, "adb"), "phone-1", None, ["ncnn"]) as site:
        assert site.packages == expected  # still there, and used without being asked for
    assert len(fetched) == 2


def test_two_runs_that_put_packages_at_once_do_not_meet(adb: Path, bare: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one comes while the first one still copies."""
    monkeypatch.setattr(bootstrap, "download", lambda name, facts, output: wheel(output, name, "__version__ = '1'\n"))
    push, came = transfer.push, []

    def slow(place: Any, sources: list[Path], folder: str) -> None:
        if sources[0].name.startswith("packages") and not came:
            came.append(folder)
            (sources[0] / "ncnn").rename(sources[0].parent / "ncnn")  # not copied yet
            push(place, sources, folder)
            with sites.open_site(board(bare, "adb"), "phone-1", None, ["ncnn"], put_packages=True):
                pass
            push(place, [sources[0].parent / "ncnn"], f"{folder}/{sources[0].name}")
        else:
            push(place, sources, folder)

    monkeypatch.setattr(transfer, "push", slow)
    with sites.open_site(board(bare, "adb"), "phone-1", None, ["ncnn"], put_packages=True) as site:
        assert site.packages is not None
    (folder,) = (adb / "data/local/tmp/espalier/packages").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["ncnn", "numpy", "outside.py"]


def test_a_package_of_another_architecture_says_why(
    adb: Path, bare: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def download(name: str, facts: dict[str, Any], output: Path) -> None:
        wheel(output, name, "raise ImportError('wrong ELF class')\n")

    monkeypatch.setattr(bootstrap, "download", download)
    with (
        pytest.raises(DeviceError, match=r"phone-1 lacks numpy \(ImportError: wrong ELF class\), ncnn"),
        sites.open_site(board(bare, "adb"), "phone-1", None, ["ncnn"], put_packages=True),
    ):
        pass


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            {"python": [3, 6, 9], "machine": "aarch64"},
            r"phone-1 is Python 3\.6\.9: name 3\.8 or newer with --python",
        ),
        (None, r"failed on phone-1 \(no message\): name another interpreter with --python"),
    ],
)
def test_a_python_that_does_not_do(answer: Any, message: str, adb: Path, tmp_path: Path) -> None:
    python = tmp_path / "old-python"
    python.write_text("#!/bin/sh\n" + ("" if answer is None else f"echo '{json.dumps(answer)}'\n"))
    python.chmod(0o755)
    with (
        pytest.raises(DeviceError, match=message),
        sites.open_site(board(str(python), "adb"), "phone-1", None, ["ncnn"]),
    ):
        pass


def test_the_platform_is_the_one_that_the_device_tells() -> None:
    options = bootstrap.platform_options(FACTS)
    platforms = [options[i + 1] for i, word in enumerate(options) if word == "--platform"]
    assert platforms[0] == "manylinux_2_31_aarch64"
    assert platforms[-2:] == ["manylinux_2_17_aarch64", "manylinux2014_aarch64"]
    assert options[-4:] == ["--implementation", "cp", "--python-version", "3.11"]
    with pytest.raises(DeviceError, match="wheels are made for Linux with glibc, this device has another"):
        bootstrap.platform_options({**FACTS, "libc": ["", ""]})


def test_a_wheel_that_is_not_made_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = tmp_path / "calls"
    pip = ["sh", "-c", f'echo "$@" >> {calls}; echo "ERROR: none" >&2; exit 1', "pip"]
    monkeypatch.setattr(bootstrap, "_pip", lambda: pip)
    with pytest.raises(DeviceError, match=r"^there is no wheel of numpy for Python 3\.11 on aarch64 \(ERROR: none\): "):
        bootstrap.download("numpy", FACTS, tmp_path)
    pinned, free = calls.read_text().splitlines()
    assert " numpy==" in pinned  # first the version that the exports were proven with
    assert free.endswith(" numpy")


def test_tensorrt_is_not_ours_to_put(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="tensorrt cannot be put on this machine"):
        bootstrap.put(Local(), FACTS, ["tensorrt"], str(tmp_path))


def test_what_is_pushed_runs_on_its_own(tmp_path: Path, bare: str) -> None:
    """Without compress, and without what only this project's environment has."""
    import subprocess

    sites._push_package(Local(), str(tmp_path), ["ncnn"])
    files = {str(path.relative_to(tmp_path / "benchmark")) for path in (tmp_path / "benchmark").rglob("*.py")}
    assert {"worker.py", "frames.py", "system.py", "probe.py", "runners/ncnn_runner.py"} <= files
    assert "runners/torch_runner.py" not in files
    done = subprocess.run(
        [bare, "-m", "benchmark.probe", "none"], cwd=tmp_path, capture_output=True, text=True, check=True, env={}
    )
    found = json.loads(done.stdout)
    assert found["packages"] == {"none": None}
    assert found["device"]["cores"] == os.cpu_count()


ON_DEVICES = [
    *(ROOT / "benchmark" / name for name in sites._PACKAGE),
    *(path for path in (ROOT / "benchmark" / "runners").glob("*.py") if not path.name.startswith("torch")),
]
NEWER = {"removeprefix", "removesuffix", "pairwise", "bit_count", "is_relative_to", "with_stem", "readlink", "zoneinfo"}


@pytest.mark.parametrize("path", ON_DEVICES, ids=lambda path: path.name)
def test_what_runs_on_devices_is_python_3_8(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source, feature_version=(3, 8))
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    strict = [k for k in ast.walk(tree) if isinstance(k, ast.keyword) and k.arg in ("strict", "slots", "kw_only")]
    assert used & NEWER == set()
    assert strict == []
    annotated = any(isinstance(node, (ast.AnnAssign, ast.arg)) and node.annotation for node in ast.walk(tree))
    assert "from __future__ import annotations" in source or not annotated
