"""Programs in processes of their own, because what they open may crash or hang, and how such a process ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

# What the libraries below a runtime take their number of threads from.
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)


def own(module: str, *arguments: object) -> list[str]:
    """Return the words that start a module of ours in this interpreter, in `own_environment`."""
    return [sys.executable, "-m", module, *map(str, arguments)]


def own_environment(threads: int) -> dict[str, str]:
    """Return the variables with which a module of ours is found from any folder and takes so many threads."""
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    return {**dict.fromkeys(THREAD_VARIABLES, str(threads)), "PYTHONPATH": path}


def run(
    command: list[str],
    timeout_s: float | None,
    folder: str | Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command without input and return what it said.

    Args:
        command: words of ours, or checked ones; no shell reads them.
        timeout_s: how long it may take.
        folder: where it starts.
        environment: variables beside those of this process.

    Raises:
        subprocess.TimeoutExpired: it took longer, and was ended.
        OSError: it cannot be started.
    """
    return subprocess.run(  # noqa: S603  (see `command`)
        command,
        cwd=folder,
        env={**os.environ, **(environment or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=timeout_s,
        check=False,
    )


def exit_reason(code: int) -> str:
    """Return how a process ended: its exit code, or the signal that ended it.

    >>> exit_reason(3), exit_reason(-11)
    ('exit code 3', 'SIGSEGV')
    """
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    return f"{name}, perhaps out of memory" if name == "SIGKILL" else name
