"""The parent's side of `benchmark.worker`: it starts one, asks it, and ends it whatever happens."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from compress.errors import BenchmarkError

SILENCE_S = 120.0
_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)


@dataclass
class Worker:
    """The parent's side of `benchmark.worker`."""

    name: str
    process: subprocess.Popen[str]
    answers: queue.Queue[str | None]
    log: IO[str]

    def receive(self) -> dict[str, Any]:
        """Return the worker's next answer.

        Raises:
            BenchmarkError: it reports an error, falls silent, or ends.
        """
        try:
            line = self.answers.get(timeout=SILENCE_S)
        except queue.Empty:
            raise BenchmarkError(
                f"{self.name} wrote nothing for {SILENCE_S:g} s: use a smaller --imgsz or more --threads{self._said()}"
            ) from None
        if line is None:
            raise BenchmarkError(f"{self.name} crashed ({_exit_reason(self.process.wait())}){self._said()}")
        answer = json.loads(line)
        if "error" in answer:
            raise BenchmarkError(f"{self.name}: {answer['error']}")
        return answer

    def time_queries(self, queries: int) -> list[float]:
        """Return the latencies of a burst of queries, ms."""
        stdin = self.process.stdin
        assert stdin is not None
        with suppress(BrokenPipeError):  # `receive` says why the worker is gone
            stdin.write(json.dumps({"queries": queries}) + "\n")
            stdin.flush()
        return self.receive()["samples_ms"]

    def finish(self) -> dict[str, Any]:
        """End the worker's input and return what the whole cost it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.receive()

    def _said(self) -> str:
        self.log.seek(0)
        lines = [line.strip() for line in self.log if line.strip()]
        return f"; its last line was: {lines[-1]}" if lines else ""


@contextmanager
def start(name: str, command: list[str], threads: int) -> Iterator[Worker]:
    """Start a worker, and end it whatever happens."""
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, **dict.fromkeys(_THREAD_VARIABLES, str(threads)), "PYTHONPATH": path}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(  # noqa: S603  (our own module in our own interpreter)
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            encoding="utf-8",
        )
        answers: queue.Queue[str | None] = queue.Queue()
        reader = threading.Thread(target=_read_lines, args=(process.stdout, answers), daemon=True)
        reader.start()
        try:
            yield Worker(name, process, answers, log)
        finally:
            process.kill()
            process.wait()
            reader.join()
            for stream in (process.stdin, process.stdout):
                with suppress(BrokenPipeError):
                    stream.close()  # type: ignore[union-attr]


def _read_lines(stream: IO[str], answers: queue.Queue[str | None]) -> None:
    for line in stream:
        answers.put(line)
    answers.put(None)


def _exit_reason(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    return f"{name}, perhaps out of memory" if name == "SIGKILL" else name
