"""Named errors, and the one place that turns them into a line and an exit code."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import FrameType

# What the user's disk and paths answer; any other OSError is a fault of ours and keeps its traceback.
_REMEDIES = {
    errno.ENOSPC: "free some space or choose another --output",
    errno.EDQUOT: "free some space or choose another --output",
    errno.EROFS: "choose another --output",
    errno.EACCES: "change its permissions or choose another --output",
    errno.EPERM: "change its permissions or choose another --output",
    errno.EEXIST: "choose another --output",
    errno.EISDIR: "choose another --output",
    errno.ENOTDIR: "choose another --output",
    errno.ENAMETOOLONG: "choose a shorter --output",
}
# The packages of pyproject.toml, as they are imported, and those that a command needs before it can say anything.
PACKAGES = (
    *("filelock", "matplotlib", "ncnn", "numpy", "onnx", "onnxruntime", "onnxsim", "pnnx", "pydantic", "rich"),
    *("tensorboard", "torch", "torchvision", "typer", "ultralytics", "yaml"),
)
_FIRST = ("numpy", "pydantic", "typer", "yaml")
# What asks a process to end: `kill` or a job's time limit, and a terminal that is gone; and the exit codes of that.
_ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
_INTERRUPTED = {130, *(128 + number for number in _ENDING)}
# What our own code starts, on devices too, where there is little more than a runtime.
_PROGRAMS = {"benchmark.layer_times", "benchmark.probe", "benchmark.worker"}


class EspalierError(Exception):
    """A mistake that the user can mend. Its message is one line: what is wrong, then what to do.

    Attributes:
        exit_code: of a command that ends with it.
    """

    exit_code = 2


class SettingsError(EspalierError):
    """A configuration or a command-line value that does not fit."""


class CheckpointError(EspalierError):
    """A model file that is missing, damaged or not a model."""


class DataError(EspalierError):
    """A data set that cannot be used."""


class GraphError(EspalierError):
    """A model that cannot be traced or whose channels cannot be followed."""


class PlanError(EspalierError):
    """A plan that does not fit the model it is applied to."""


class BudgetError(EspalierError):
    """A budget that no plan can meet."""


class SurgeryError(EspalierError):
    """A pruned model that does not compute what the masked dense model computes."""


class RunError(EspalierError):
    """A run folder that cannot be used: locked, damaged, or of another version."""


class ExportError(EspalierError):
    """An artefact that could not be made."""


class ParityError(ExportError):
    """An artefact that was made and does not agree with PyTorch: what was asked for was right, the answer is no."""

    exit_code = 1


class BenchmarkError(EspalierError):
    """A measurement that could not be taken or cannot be trusted."""


class DeviceError(EspalierError):
    """A device that cannot be reached, or that lacks what is needed there."""


def check_packages() -> None:
    """End with one line when `python -m` starts a command with a Python that lacks what every command imports.

    An import from elsewhere, and what runs on devices, is let through.
    """
    # While Python looks for the module that -m names, and imports its package for that, argv begins with -m.
    if sys.argv[:1] == ["-m"] and _PROGRAMS.isdisjoint(sys.orig_argv):
        missing = [name for name in _FIRST if find_spec(name) is None]
        if missing:
            _fail(_explain_missing(missing))


def printable(text: str) -> str:
    """Return a text without control characters, which could steer a terminal or hide what is read."""
    return "".join(sign if sign.isprintable() else " " for sign in text)


def warn(message: str) -> None:
    """Say in one line on standard error what the user may not have meant; the work goes on."""
    print(f"warning: {_one_line(message)}", file=sys.stderr)


def run_app(app: Callable[[], object]) -> None:
    """Run a command-line app: a user's mistake becomes one `error:` line and its exit code, 2, never a traceback.

    Ctrl-C exits with 130, a signal that asks to end with 128 and its number, as shells say it: what was begun elsewhere
    is undone first, finished stages are on disk by then, and the next start resumes from them.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an old terminal that has no → may not end hours of work
    try:
        with _ended_in_order():
            app()
    except EspalierError as error:
        _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, SystemExit) as stop:
        # Typer turns Ctrl-C into a silent exit with code 130.
        code = stop.code if isinstance(stop, SystemExit) else 130
        if code not in _INTERRUPTED:
            raise
        print("\ninterrupted: run the same command again to resume", file=sys.stderr)
        raise SystemExit(code) from None
    except ModuleNotFoundError as error:
        if error.name not in PACKAGES:
            raise
        _fail(_explain_missing([error.name]))
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0)
        if remedy is None:
            raise
        where = f" ({error.filename})" if error.filename else ""
        _fail(f"{error.strerror}{where}: {remedy}, then run the same command again")


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """Let signals that ask this process to end raise SystemExit, once.

    By themselves they end it on the spot: folders and fixed clocks stay on a device, and children go on here. What is
    ignored (nohup) or handled by somebody else stays so.
    """
    own = os.getpid()

    def end(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)  # whoever asks twice does not want to wait
        if os.getpid() != own:  # a process that was forked from this one undoes nothing of it
            os.kill(os.getpid(), number)
        raise SystemExit(128 + number)

    is_main = threading.current_thread() is threading.main_thread()  # no other one may change a handler
    changed = [number for number in _ENDING if is_main and signal.getsignal(number) == signal.SIG_DFL]
    for number in changed:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in changed:
            signal.signal(number, signal.SIG_DFL)


def _explain_missing(names: Iterable[str]) -> str:
    return (
        f"{sys.executable} lacks {', '.join(names)}: `bash scripts/setup.sh` makes .venv with all packages, "
        "`source .venv/bin/activate` enters it"
    )


def _fail(message: str, code: int = EspalierError.exit_code) -> None:
    print(f"error: {_one_line(message)}", file=sys.stderr)
    raise SystemExit(code)


def _one_line(message: str) -> str:
    """Return a message as one line; it may quote names from strangers' files."""
    return printable(" ".join(message.split()))
