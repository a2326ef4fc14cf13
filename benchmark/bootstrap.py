"""What a device lacks, put into a folder of its own there: wheels for its platform, and nothing is installed.

pip on this machine fetches the wheels, because many devices have neither pip nor a network.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmark import transfer, transports
from benchmark.transports import Adb, Transport
from compress.errors import DeviceError

PACKAGES = {"ncnn": ("numpy", "ncnn"), "onnxruntime": ("numpy", "onnxruntime")}
_OLDEST_GLIBC = 17


def folder(place: Transport, facts: dict[str, Any], wanted: Sequence[str]) -> str:
    """Return the folder there for the packages of runtimes, whether it is there or not.

    Args:
        place: how the device is reached.
        facts: what `benchmark.probe` said of it.
        wanted: runtimes.
    """
    major, minor, *_ = facts["python"]
    name = "-".join([*sorted(wanted), f"cp{major}{minor}", facts["machine"]])
    hidden = "espalier" if isinstance(place, Adb) else ".espalier"
    return f"{transfer.home_folder(place)}/{hidden}/packages/{name}"


def put(place: Transport, facts: dict[str, Any], wanted: Sequence[str], target: str) -> None:
    """Fetch numpy and runtimes for a device and put them into a folder there, which appears whole or not at all.

    Raises:
        DeviceError: there are no wheels for it, this machine has no network, or the device has no space left.
    """
    names = sorted({name for runtime in wanted for name in PACKAGES.get(runtime, ())})
    if not names:
        raise DeviceError(f"{', '.join(wanted)} cannot be put on {place.name}: install it there as its maker says")
    with tempfile.TemporaryDirectory() as scratch:
        wheels, unpacked = Path(scratch) / "wheels", Path(scratch) / "packages"
        print(f"bootstrap: {', '.join(names)} for {place.name}: {target}", flush=True)
        for name in names:
            download(name, facts, wheels)
        for wheel in sorted(wheels.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(unpacked)  # which keeps every name below the folder
        parent = target.rpartition("/")[0]
        new = transfer.make_folder(place, parent)  # of this run alone: another one may do the same just now
        try:
            transfer.require_room(place, new, sum(p.stat().st_size for p in unpacked.rglob("*") if p.is_file()))
            transfer.push(place, [unpacked], new)
            transports.run(place, ["rm", "-rf", target], purpose="make a folder")
            transports.run(place, ["mv", f"{new}/packages", target], purpose="rename a folder")
        finally:
            transfer.remove_folder(place, new)


def download(name: str, facts: dict[str, Any], output: Path) -> None:
    """Download a package's wheel for a device; the version is the one that is installed here, where there is such.

    Raises:
        DeviceError: pip finds none.
    """
    try:
        wanted = [f"{name}=={version(name)}", name]
    except PackageNotFoundError:
        wanted = [name]
    said = ""
    for requirement in wanted:
        done = subprocess.run(  # noqa: S603  (our own words and what the device's Python says of itself)
            [*_pip(), *platform_options(facts), "--dest", str(output), requirement],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode == 0:
            return
        said = done.stderr
    major, minor, *_ = facts["python"]
    raise DeviceError(
        f"there is no wheel of {name} for Python {major}.{minor} on {facts['machine']} "
        f"({transports.last_line(said)}): install it there, or name another interpreter with --python"
    )


def platform_options(facts: dict[str, Any]) -> list[str]:
    """Return pip's options for the platform that `benchmark.probe` told of.

    Raises:
        DeviceError: no wheels are made for it.
    """
    libc, release = facts["libc"]
    if libc != "glibc":
        raise DeviceError(f"wheels are made for Linux with glibc, this device has {libc or 'another'}: use --python")
    major, minor, *_ = facts["python"]
    newest = int(release.split(".")[1])
    platforms = [f"manylinux_2_{number}_{facts['machine']}" for number in range(newest, _OLDEST_GLIBC - 1, -1)]
    options = [word for name in [*platforms, f"manylinux2014_{facts['machine']}"] for word in ("--platform", name)]
    tags = [word for tag in (f"cp{major}{minor}", "abi3", "none") for word in ("--abi", tag)]
    return [*options, *tags, "--implementation", "cp", "--python-version", f"{major}.{minor}"]


def _pip() -> list[str]:
    return [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
