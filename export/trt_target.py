"""Where an engine is built: on this machine, or on another one over ssh. Both run `trt_builder.py` in a job folder.

A job folder holds `request.json` and the files that it names; afterwards it also holds the result, the log and what was
built. Nothing that a user typed is part of a shell command.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

from benchmark import transfer, transports
from benchmark.transports import Local, Ssh, last_line
from compress import manifest
from compress.errors import DeviceError, ExportError, SettingsError
from export import trt_builder

_BUILDER = Path(trt_builder.__file__)
_SCHEME = "ssh://"
_NO_COMMAND, _KILLED = (126, 127), (-9, 137)
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


Target = Local | Ssh


def parse_target(text: str, python: str | None = None) -> Target:
    """Return the target of `local` or `ssh://[user@]host[:port]`.

    Raises:
        SettingsError: the text has another form.
    """
    if python is not None:
        transports.check_python(python)
    if text == "local":
        # Beside the job's files a relative path would mean another place.
        return Local() if python is None else Local(str(Path(python).absolute()) if "/" in python else python)
    form = f"--target must be local or {_SCHEME}[user@]host[:port], got {text!r}"
    if not text.startswith(_SCHEME):
        raise SettingsError(form)
    try:
        destination, port = transports.parse_host(text[len(_SCHEME) :])
    except SettingsError:
        raise SettingsError(form) from None
    return Ssh(destination, port, python or "python3")


def run(target: Target, job: Path) -> dict[str, Any]:
    """Do what `job/request.json` says at the target, and return the result; the files that it made lie in `job`.

    Raises:
        ExportError: the target cannot be reached, lacks TensorRT, memory or space, or the build fails.
    """
    shutil.copyfile(_BUILDER, job / _BUILDER.name)
    # What an earlier request left must not be taken for the answer to this one.
    (job / trt_builder.RESULT).unlink(missing_ok=True)
    try:
        done = _run_here(target, job) if isinstance(target, Local) else _run_there(target, job)
    except DeviceError as error:
        raise ExportError(str(error)) from None
    if not (job / trt_builder.RESULT).is_file():
        raise ExportError(_explain_exit(target, done))
    result = manifest.read_json(job / trt_builder.RESULT)
    if "failure" in result:
        raise ExportError(_explain_failure(target, result["failure"]))
    return result


def _run_here(target: Local, job: Path) -> subprocess.CompletedProcess[str]:
    return transports.run(target, [target.python, _BUILDER.name, trt_builder.REQUEST], folder=str(job))


def _run_there(target: Ssh, job: Path) -> subprocess.CompletedProcess[str]:
    request = manifest.read_json(job / trt_builder.REQUEST)
    names = {request.get(key) for key in ("onnx", "timing_cache")} - {None}
    sent = [path for path in map(job.joinpath, sorted(names)) if path.is_file()]
    sent += [job / trt_builder.REQUEST, job / _BUILDER.name]
    with transfer.job_folder(target) as folder:
        transfer.require_room(target, folder, _ROOM * sum(path.stat().st_size for path in sent))
        transfer.push(target, sent, folder)
        done = transports.run(target, [target.python, _BUILDER.name, trt_builder.REQUEST], folder=folder)
        made = {trt_builder.RESULT, trt_builder.LOG, request.get("engine"), request.get("timing_cache")}
        transfer.pull(target, folder, sorted(made - {None}), job)
        return done


def _explain_exit(target: Target, done: subprocess.CompletedProcess[str]) -> str:
    code, last = done.returncode, last_line(done.stderr)
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
