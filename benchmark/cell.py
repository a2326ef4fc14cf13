"""The parent's side of `benchmark.worker`: starts one, here or on a device, asks it, and ends it whatever happens."""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import IO, Any

from benchmark import transports
from benchmark.programs import exit_reason
from benchmark.transports import Local, Transport
from compress.errors import BenchmarkError, DeviceError

SILENCE_S = 120.0
PING_S = 10.0  # how often a worker on a device is told that we are still here
_NO_COMMAND, _KILLED, _LOST = (126, 127), 137, 255

Answer = tuple[dict[str, Any], bytes]


@dataclass
class Worker:
    """A worker that was started.

    Attributes:
        name: what messages call it.
        place: where it runs.
        silence_s: how long it may write nothing.
    """

    name: str
    place: Transport
    process: subprocess.Popen[bytes]
    answers: queue.Queue[Answer | None]
    log: IO[bytes]
    silence_s: float = SILENCE_S
    lock: threading.Lock = field(default_factory=threading.Lock)

    def ask(self, content: dict[str, Any], payload: bytes = b"") -> Answer:
        """Send a request and return the answer, see `benchmark.worker`."""
        self.request(content, payload)
        return self.receive()

    def request(self, content: dict[str, Any], payload: bytes = b"") -> None:
        """Send a request, whose answer `receive` returns."""
        self.send(json.dumps(content).encode() + b"\n" + payload)

    def send(self, line: bytes) -> None:
        """Send bytes; where the worker is gone, the next `receive` says why."""
        stdin = self.process.stdin
        assert stdin is not None
        with self.lock, suppress(BrokenPipeError, ValueError):
            stdin.write(line)
            stdin.flush()

    def receive(self) -> Answer:
        """Return the worker's next answer and the bytes behind it.

        Raises:
            BenchmarkError: it reports an error, falls silent, or ends.
            DeviceError: its device is gone.
        """
        deadline = time.monotonic() + self.silence_s
        while True:
            try:
                answer = self.answers.get(timeout=min(PING_S, max(deadline - time.monotonic(), 0.01)))
                break
            except queue.Empty:
                if not transports.is_alive(self.place):
                    raise DeviceError(self._lost("it no longer answers")) from None
                if time.monotonic() < deadline:
                    continue
                raise BenchmarkError(
                    f"{self.name} wrote nothing for {self.silence_s:g} s: use a smaller --imgsz or more "
                    f"--threads{self._said()}"
                ) from None
        if answer is None:
            raise self._ended(self.process.wait())
        if "error" in answer[0]:
            raise BenchmarkError(f"{self.name}: {answer[0]['error']}")
        return answer

    def finish(self) -> dict[str, Any]:
        """End the worker's input and return what the whole cost it."""
        assert self.process.stdin is not None
        with self.lock, suppress(BrokenPipeError):
            self.process.stdin.close()
        return self.receive()[0]

    def _ended(self, code: int) -> BenchmarkError | DeviceError:
        if not isinstance(self.place, Local):
            if code < 0 or code == _LOST or not transports.is_alive(self.place):
                return DeviceError(self._lost(self._last() or "no message"))
            if code in _NO_COMMAND:
                return DeviceError(f"{self.place.name} has no {self.place.python}: name an interpreter with --python")
            code = -signal.SIGKILL if code == _KILLED else code
        return BenchmarkError(f"{self.name} crashed ({exit_reason(code)}){self._said()}")

    def _lost(self, reason: str) -> str:
        return (
            f"{self.name}: the connection to {self.place.name} was lost ({reason}): check it, then run the same "
            "command again"
        )

    def _said(self) -> str:
        return f"; its last line was: {last}" if (last := self._last()) else ""

    def _last(self) -> str | None:
        self.log.seek(0)
        lines = [line.strip() for line in self.log.read().decode(errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines else None


@contextmanager
def connect(
    name: str,
    place: Transport,
    arguments: list[str],
    environment: dict[str, str],
    folder: str | None = None,
    silence_s: float | None = None,
) -> Iterator[Worker]:
    """Start a worker, and end it whatever happens.

    Args:
        name: what messages call it.
        place: where.
        arguments: its program and arguments.
        environment: variables beside those that it has there.
        folder: where it starts.
        silence_s: how long it may write nothing; `SILENCE_S` when not given.
    """
    with tempfile.TemporaryFile() as log:
        process = transports.start(place, arguments, environment, log, folder)
        answers: queue.Queue[Answer | None] = queue.Queue()
        worker = Worker(name, place, process, answers, log, SILENCE_S if silence_s is None else silence_s)
        reader = threading.Thread(target=_read, args=(process.stdout, answers.put), daemon=True)
        reader.start()
        done = threading.Event()
        if not isinstance(place, Local):
            threading.Thread(target=_ping, args=(worker, done), daemon=True).start()
        try:
            yield worker
        finally:
            done.set()
            process.kill()
            process.wait()
            assert process.stdin is not None
            assert process.stdout is not None
            # First its input: what a killed program started itself may still hold its output.
            with worker.lock, suppress(BrokenPipeError):
                process.stdin.close()
            reader.join()
            process.stdout.close()


def _read(stream: IO[bytes], put: Callable[[Answer | None], None]) -> None:
    started = False
    for line in stream:
        # A login shell may greet first.
        if not (started := started or line.startswith(b'{"')):
            continue
        try:
            content = json.loads(line)
        except ValueError:
            break
        payload = stream.read(expected := content.get("bytes", 0))
        if len(payload) < expected:
            break  # the connection was lost in the middle of an answer
        put((content, payload))
    put(None)


def _ping(worker: Worker, done: threading.Event) -> None:
    while not done.wait(PING_S):
        worker.send(b"\n")
