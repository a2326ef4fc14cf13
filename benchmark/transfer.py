"""Files on a device: private folders, copies there and back, and free space."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmark import transports
from benchmark.transports import Adb, Local, Ssh, Transport
from compress.errors import DeviceError

_FOLDER = re.compile(r"/[\w./-]+")
_PREFIX = "espalier."
# Not every `find` can do all of that; then nothing is removed.
_SWEEP = (
    f'find "${{TMPDIR:-/tmp}}/" -maxdepth 1 -type d -user "$(id -u)" -name "{_PREFIX}????????" -mtime +6 '
    "-exec rm -rf {} +"
)
_MAKE_FOLDER = f"umask 077 && mktemp -d -t {_PREFIX}XXXXXXXX && {{ {_SWEEP}; true; }} > /dev/null 2>&1"
_ADB_FOLDER = "/data/local/tmp"  # what adb's shell may write and run


@contextmanager
def job_folder(place: Transport) -> Iterator[str]:
    """Make a private folder there, yield its path, and remove it, whatever happens.

    Raises:
        DeviceError: the device cannot be reached, or has no place for it.
    """
    folder = make_folder(place)
    try:
        yield folder
    finally:
        remove_folder(place, folder)


def make_folder(place: Transport, parent: str | None = None) -> str:
    """Make a private folder there and return its path, which is plain: it may be part of a command.

    What a killed run has left in the same place, older than a week, is removed on the way.

    Args:
        place: where.
        parent: a plain path, made if it is not there; where temporary folders lie when not given.
    """
    if isinstance(place, Local):
        return tempfile.mkdtemp(prefix=_PREFIX, dir=parent)
    if parent is None and isinstance(place, Adb):
        parent = _ADB_FOLDER
    script = _MAKE_FOLDER if parent is None else f"mkdir -p {parent} && export TMPDIR={parent} && {_MAKE_FOLDER}"
    done = transports.call(transports.there(place, script), None, place)
    if done.returncode != 0:
        raise DeviceError(transports.explain(place, done.stderr, done.returncode, "make a folder"))
    folder = transports.last_line(done.stdout)  # a login shell may greet first
    if not _FOLDER.fullmatch(folder):
        raise DeviceError(f"{place.name} made the folder {folder!r}, whose name is not plain: set TMPDIR there")
    return folder


def remove_folder(place: Transport, folder: str) -> None:
    """Remove a folder that `make_folder` made; what goes wrong is not told, what came before matters more."""
    if isinstance(place, Local):
        shutil.rmtree(folder, ignore_errors=True)
        return
    with suppress(DeviceError):
        transports.call(
            transports.there(place, transports.script(["rm", "-rf", "--", folder])), transports.CLEAN_UP_S, place
        )


def home_folder(place: Transport) -> str:
    """Return the folder there in which things may stay."""
    if isinstance(place, Local):
        return str(Path.home())
    if isinstance(place, Adb):
        return _ADB_FOLDER
    done = transports.call(transports.there(place, 'printf "%s\\n" "$HOME"'), None, place)
    folder = transports.last_line(done.stdout)
    if done.returncode != 0 or not _FOLDER.fullmatch(folder):
        raise DeviceError(f"{place.name} has the home folder {folder!r}, whose name is not plain: use another account")
    return folder


def push(place: Transport, sources: list[Path], folder: str) -> None:
    """Copy files and folders into a folder there; they keep their names.

    Raises:
        DeviceError: the device cannot be reached, or has no space left.
    """
    if isinstance(place, Local):
        for source in sources:
            (shutil.copytree if source.is_dir() else shutil.copy2)(source, Path(folder) / source.name)
        return
    names = [str(source.resolve()) for source in sources]  # absolute: no option, and no host before a colon
    if isinstance(place, Adb):
        _copy(place, [*transports.adb_words(place), "push", *names, f"{folder}/"])
    else:
        recursive = ["-r"] if any(source.is_dir() for source in sources) else []
        _copy(place, [*_scp(place), *recursive, "--", *names, _remote(place, f"{folder}/")])


def pull(place: Transport, folder: str, names: list[str], output: Path) -> None:
    """Copy files of a folder there into a folder here; names that are not there are left out.

    Args:
        names: plain names of files.

    Raises:
        DeviceError: the device cannot be reached.
    """
    found = sorted(set(names) & set(transports.run(place, ["ls", folder], purpose="list a folder").stdout.split()))
    if not found:
        return
    if isinstance(place, Local):
        for name in found:
            shutil.copy2(Path(folder) / name, output / name)
    elif isinstance(place, Adb):
        for name in found:
            _copy(place, [*transports.adb_words(place), "pull", f"{folder}/{name}", str(output.resolve() / name)])
    else:
        sources = [_remote(place, f"{folder}/{name}") for name in found]
        _copy(place, [*_scp(place), "--", *sources, str(output.resolve())])


def free_bytes(place: Transport, folder: str) -> int | None:
    """Return the free space where a folder lies; null where no df speaks POSIX: then copying tells."""
    lines = transports.run(place, ["df", "-Pk", folder], purpose="ask for free space").stdout.splitlines()
    fields = lines[-1].split() if lines else []
    return int(fields[3]) << 10 if len(fields) >= 4 and fields[3].isdigit() else None


def require_room(place: Transport, folder: str, needed_bytes: int) -> None:
    """Check that there is space for so many bytes.

    Raises:
        DeviceError: there is not.
    """
    free, needed = free_bytes(place, folder), (needed_bytes >> 20) + 1
    if free is not None and free >> 20 < needed:
        raise DeviceError(
            f"{place.name} has {free >> 20} MiB free in {folder}, {needed} are needed: free some space there"
        )


def _scp(place: Ssh) -> list[str]:
    return ["scp", "-q", *transports.ssh_words(place, "-P")]


def _remote(place: Ssh, path: str) -> str:
    user, at, host = place.destination.rpartition("@")
    return f"{user}{at}[{host}]:{path}" if ":" in host else f"{place.destination}:{path}"


def _copy(place: Transport, command: list[str]) -> None:
    done = transports.call(command, None, place)
    if done.returncode != 0:
        raise DeviceError(transports.explain(place, done.stderr or done.stdout, done.returncode, "copy files"))
