"""Where an engine is built: on this machine, or on another one over ssh. Both run `trt_builder.py` in a job folder.

A job folder holds `request.json` and the files that it names; afterwards it also holds the result, the log and what was
built. Nothing that a user typed is part of a shell command.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress import manifest
from compress.errors import ExportError, SettingsError
from export import trt_builder

_BUILDER = Path(trt_builder.__file__)
_SSH = re.compile(
    r"ssh://(?:(?P<user>[A-Za-z_][\w.-]*)@)?(?P<host>[A-Za-z0-9][A-Za-z0-9._-]*|\[[0-9A-Fa-f:]+\])(?::(?P<port>\d{1,5}))?"
)
_PYTHON = re.compile(r"[A-Za-z0-9/][\w./+-]*")
_FOLDER = re.compile(r"/[\w./-]+")
# A host that is down or a connection that breaks is noticed in seconds, and no password is asked for in a pipe.
_OPTIONS = ("-o", "BatchMode=yes", "-o", "ConnectTimeout=15", "-o", "ServerAliveInterval=15")
_UNREACHABLE, _NO_COMMAND, _KILLED = 255, (126, 127), (-9, 137)
_ROOM = 4  # engine, timing cache and log, beside the ONNX file, as a multiple of what is sent
_REMEDIES = {
    "missing": (
        "install it there: pip install tensorrt-rtx (RTX GPUs, and builds without any), or tensorrt as NVIDIA's guide "
        "says; on a Jetson JetPack brings it, and only a virtual environment with --system-site-packages sees it, or "
        "name that Python with --python /usr/bin/python3"
    ),
    "gpu": "build on the machine with the GPU (--target ssh://HOST), or use --flavour tensorrt_rtx, which needs none",
    "parse": "export the ONNX file again, or try another --opset",
    "shape": "give --batch and --imgsz as MIN:OPT:MAX",
    "unsupported": "leave that option out, or use another version",
    "memory": "lower --workspace or the image size, close other programs there, or add swap",
    "disk": "free some space there",
    "build": "the build log tells more",
}


@dataclass(frozen=True)
class Local:
    """This machine.

    Attributes:
        python: the interpreter that sees TensorRT.
    """

    python: str = sys.executable

    @property
    def name(self) -> str:
        """What messages call it."""
        return "this machine"


@dataclass(frozen=True)
class Ssh:
    """Another machine; what ssh_config says of the host (user, keys, jumps) holds.

    Attributes:
        destination: HOST or USER@HOST.
        port: null for ssh's own.
        python: the interpreter there that sees TensorRT.
    """

    destination: str
    port: int | None = None
    python: str = "python3"

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.destination


Target = Local | Ssh


def parse_target(text: str, python: str | None = None) -> Target:
    """Return the target of `local` or `ssh://[user@]host[:port]`.

    Raises:
        SettingsError: the text has another form.
    """
    if python is not None and not _PYTHON.fullmatch(python):
        raise SettingsError(f"--python must be a name or path of an interpreter without spaces, got {python!r}")
    if text == "local":
        # Beside the job's files a relative path would mean another place.
        return Local() if python is None else Local(str(Path(python).absolute()) if "/" in python else python)
    match = _SSH.fullmatch(text)
    port = int(match["port"]) if match and match["port"] else None
    if match is None or (port is not None and not 0 < port < 65536):
        raise SettingsError(f"--target must be local or ssh://[user@]host[:port], got {text!r}")
    host = match["host"].strip("[]")
    return Ssh(f"{match['user']}@{host}" if match["user"] else host, port, python or "python3")


def run(target: Target, job: Path) -> dict[str, Any]:
    """Do what `job/request.json` says at the target, and return the result; the files that it made lie in `job`.

    Raises:
        ExportError: the target cannot be reached, lacks TensorRT, memory or space, or the build fails.
    """
    shutil.copyfile(_BUILDER, job / _BUILDER.name)
    # What an earlier request left must not be taken for the answer to this one.
    (job / trt_builder.RESULT).unlink(missing_ok=True)
    done = _run_here(target, job) if isinstance(target, Local) else _run_there(target, job)
    if not (job / trt_builder.RESULT).is_file():
        raise ExportError(_explain_exit(target, done))
    result = manifest.read_json(job / trt_builder.RESULT)
    if "failure" in result:
        raise ExportError(_explain_failure(target, result["failure"]))
    return result


def _run_here(target: Local, job: Path) -> subprocess.CompletedProcess[str]:
    command = [target.python, _BUILDER.name, trt_builder.REQUEST]
    try:
        return subprocess.run(  # noqa: S603  (our own script)
            command, cwd=job, capture_output=True, text=True, errors="replace", check=False
        )
    except OSError as error:
        raise ExportError(f"{target.python} cannot be started ({error.strerror}): check --python") from None


def _run_there(target: Ssh, job: Path) -> subprocess.CompletedProcess[str]:
    request = manifest.read_json(job / trt_builder.REQUEST)
    names = {request.get(key) for key in ("onnx", "timing_cache")} - {None}
    sent = [path for path in map(job.joinpath, sorted(names)) if path.is_file()]
    sent += [job / trt_builder.REQUEST, job / _BUILDER.name]
    # The last line: a login shell may greet first.
    folder = _last_line(_ssh(target, "umask 077 && mktemp -d -t espalier.XXXXXXXX", "make a folder").stdout)
    if not _FOLDER.fullmatch(folder):
        raise ExportError(f"{target.name} made the folder {folder!r}, whose name is not plain: set TMPDIR there")
    try:
        _check_room(target, folder, sum(path.stat().st_size for path in sent))
        _scp(target, [str(path.resolve()) for path in sent], _remote(target, f"{folder}/"))
        done = _ssh(target, f"cd {folder} && {target.python} {_BUILDER.name} {trt_builder.REQUEST}")
        made = {trt_builder.RESULT, trt_builder.LOG, request.get("engine"), request.get("timing_cache")}
        there = _ssh(target, f"ls {folder}", "list a folder").stdout.split()
        found = [_remote(target, f"{folder}/{name}") for name in sorted(made & set(there))]
        if found:
            _scp(target, found, str(job.resolve()))
        return done
    finally:
        _call(_ssh_command(target, f"rm -rf -- {folder}"))  # whatever it says, what came before matters more


def _check_room(target: Ssh, folder: str, size: int) -> None:
    lines = _ssh(target, f"df -Pk {folder}", "ask for free space").stdout.splitlines()
    fields = lines[-1].split() if lines else []
    if len(fields) < 4 or not fields[3].isdigit():
        return  # no df that speaks POSIX: then copying tells
    free, needed = int(fields[3]) >> 10, (_ROOM * size >> 20) + 1
    if free < needed:
        raise ExportError(f"{target.name} has {free} MiB free in {folder}, {needed} are needed: free some space there")


def _ssh(target: Ssh, command: str, purpose: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command there that is made of constants and checked names.

    Args:
        purpose: what failed, for the message; null where the caller looks at the exit code.
    """
    done = _call(_ssh_command(target, command))
    if done.returncode == _UNREACHABLE or (purpose and done.returncode != 0):
        raise ExportError(_explain_ssh(target, done, purpose))
    return done


def _ssh_command(target: Ssh, command: str) -> list[str]:
    port = [] if target.port is None else ["-p", str(target.port)]
    return ["ssh", *_OPTIONS, *port, "--", target.destination, command]


def _scp(target: Ssh, sources: list[str], place: str) -> None:
    port = [] if target.port is None else ["-P", str(target.port)]
    done = _call(["scp", "-q", *_OPTIONS, *port, "--", *sources, place])
    if done.returncode != 0:
        raise ExportError(_explain_ssh(target, done, "copy files"))


def _remote(target: Ssh, path: str) -> str:
    user, at, host = target.destination.rpartition("@")
    return f"{user}{at}[{host}]:{path}" if ":" in host else f"{target.destination}:{path}"


def _call(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(  # noqa: S603  (ssh or scp, its arguments checked and behind --)
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
        )
    except OSError as error:
        raise ExportError(
            f"{command[0]} cannot be started ({error.strerror}): install OpenSSH's client (Debian, Ubuntu: "
            "openssh-client)"
        ) from None


def _explain_ssh(target: Ssh, done: subprocess.CompletedProcess[str], purpose: str | None) -> str:
    last = _last_line(done.stderr)
    if done.returncode == _UNREACHABLE or re.search(
        r"connection (closed|refused|reset|timed out)", last, re.IGNORECASE
    ):
        port = [] if target.port is None else ["-p", str(target.port)]
        check = shlex.join(["ssh", *port, target.destination, "true"])
        return f"{target.name} cannot be reached over ssh ({last}): check host, port and keys with: {check}"
    if "No space left" in done.stderr:
        return f"{target.name} has no space left: free some space there"
    return f"{target.name} could not {purpose} ({last}): check it there"


def _explain_exit(target: Target, done: subprocess.CompletedProcess[str]) -> str:
    code, last = done.returncode, _last_line(done.stderr)
    if code in _NO_COMMAND:
        return f"{target.name} has no {target.python}: install Python 3.8 or newer there, or name one with --python"
    if code in _KILLED:
        return f"the builder was killed on {target.name}, most likely for want of memory: {_REMEDIES['memory']}"
    if "No space left" in done.stderr:
        return f"{target.name} has no space left: {_REMEDIES['disk']}"
    number = -code if code < 0 else code - 128 if code > 128 else None
    if number is not None:
        return (
            f"the builder crashed on {target.name} (signal {number}): {_REMEDIES['memory']}, or use another version of "
            "TensorRT"
        )
    return f"the builder failed on {target.name}: {last}"


def _explain_failure(target: Target, failure: dict[str, str]) -> str:
    kind, message = failure["kind"], failure["message"]
    remedy = _REMEDIES[kind]
    if kind == "missing":
        return f"TensorRT is missing on {target.name} ({message}): {remedy}"
    reasons = {
        "parse": "TensorRT cannot read the ONNX file",
        "memory": "the builder ran out of memory",
        "disk": "there is no space left",
    }
    return f"{reasons.get(kind, 'no engine was built')} on {target.name} ({message}): {remedy}"


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"
