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
from dataclasses import dataclass
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
        requests: bytes to send; null ends its input.
        answers: what it said; null where its output has ended.
        silence_s: how long it may write nothing.
    """

    name: str
    place: Transport
    process: subprocess.Popen[bytes]
    requests: queue.Queue[bytes | None]
    answers: queue.Queue[Answer | None]
    log: IO[bytes]
    silence_s: float = SILENCE_S

    def ask(self, content: dict[str, Any], payload: bytes = b"") -> Answer:
        """Send a request and return the answer, see `benchmark.worker`."""
        self.request(content, payload)
        return self.receive()

    def request(self, content: dict[str, Any], payload: bytes = b"") -> None:
        """Send a request, whose answer `receive` returns; where the worker is gone, that says why."""
        self.requests.put(json.dumps(content).encode() + b"\n" + payload)

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
        self.requests.put(None)
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
    silence_s: float = SILENCE_S,
) -> Iterator[Worker]:
    """Start a worker, and end it whatever happens.

    Args:
        name: what messages call it.
        place: where.
        arguments: its program and arguments.
        environment: variables beside those that it has there.
        folder: where it starts.
        silence_s: how long it may write nothing.
    """
    with tempfile.TemporaryFile() as log:
        process = transports.start(place, arguments, environment, log, folder)
        requests: queue.Queue[bytes | None] = queue.Queue()
        answers: queue.Queue[Answer | None] = queue.Queue()
        worker = Worker(name, place, process, requests, answers, log, silence_s)
        # Neither way blocks: what sends to a device that has vanished may wait for ever, and nothing may ever come.
        ping_s = None if isinstance(place, Local) else PING_S
        writer = threading.Thread(target=_write, args=(process.stdin, requests, ping_s), daemon=True)
        reader = threading.Thread(target=_read, args=(process.stdout, answers.put), daemon=True)
        writer.start()
        reader.start()
        try:
            yield worker
        finally:
            process.kill()
            process.wait()
            # First its input: what a killed program started itself may still hold its output.
            requests.put(None)
            writer.join()
            reader.join()
            assert process.stdout is not None
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


def _write(stream: IO[bytes], requests: queue.Queue[bytes | None], ping_s: float | None) -> None:
    """Write requests until null comes or nobody reads them any more; when there are none, say that we are still here.

    Args:
        stream: closed in the end.
        requests: bytes.
        ping_s: how often to say it; null for never.
    """
    with suppress(BrokenPipeError), stream:
        while True:
            try:
                line = requests.get(timeout=ping_s)
            except queue.Empty:
                line = b"\n"
            if line is None:
                return
            stream.write(line)
            stream.flush()
