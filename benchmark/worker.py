"""One cell of a benchmark in a process of its own: it opens a model, checks what comes out, and answers requests.

`python -m benchmark.worker RUNNER MODEL THREADS IMGSZ SEED [BATCH]` says on standard output what it opened, as one JSON
line; then it answers every line of its input until that ends, and says what the whole cost. RUNNER is a module, or
MODULE:VARIANT:

- `{"queries": n}`: `{"samples_ms": [...], "energy_uj": ...}`, or `{"instructions": [...]}` where a counter is there;
- `{"layers": true}`: `{"layers": [...], "left_out": "..."}`, see `layers` of benchmark/runners; both null where the
  runtime has no profiler;
- `{"infer": {"shape": [...], "dtype": "uint8"}, "bytes": n}` and n bytes: `{"arrays": [...], "bytes": m}` and m bytes;
- an empty line says that the other side is still there.

It runs on devices too: with numpy, a runtime and Python 3.8. `benchmark.cell` speaks the other side. Whatever goes
wrong becomes a line `{"error": ...}`.
"""

from __future__ import annotations

import faulthandler
import importlib
import importlib.util
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from benchmark.frames import pack_outputs, unpack_image
from benchmark.system import energy_uj, huge_page_bytes, peak_memory_bytes

_CHECKS = 2
# How long nothing may arrive, before the other side is taken for gone; null where the end of the input tells.
WATCHDOG = "ESPALIER_WATCHDOG_S"
# A file that holds the instructions between the last two calls of getppid, where an emulator counts them.
COUNTER = "ESPALIER_INSTRUCTIONS"
# A variant of every runtime, which the environment makes: `benchmark.runtimes.HUGE_PAGES`.
_HUGE_PAGES = "hugepages"
_GRACE_S = 5.0


def serve(arguments: list[str], requests: Callable[[], Any], answer: Callable[..., None]) -> None:
    """Open the model and answer requests until they end.

    Args:
        arguments: runner, model, threads, imgsz, seed and, where it is not 1, the batch.
        requests: returns the next request and the bytes behind it; null when there are no more.
        answer: takes a content for a JSON line, and the bytes behind it.

    Raises:
        ValueError: the model does not fit the image size, or its outputs are not finite or change their shape.
    """
    runner_name, model, threads, imgsz, seed, *more = arguments
    batch = int(more[0]) if more else 1
    # Noise, not zeros: arithmetic on zeros and denormals takes another time than on real values.
    images = np.random.default_rng(int(seed)).random((batch, 3, int(imgsz), int(imgsz)), dtype=np.float32)

    start = time.perf_counter_ns()
    runner, session = open_model(runner_name, model, int(threads))
    loaded = time.perf_counter_ns()
    facts = runner.describe(session)
    _check_shape(facts, int(imgsz), batch)
    first = time.perf_counter_ns()
    outputs = runner.infer(session, images)
    first_inference_ms = _ms(time.perf_counter_ns() - first)
    shapes = _shapes(outputs)
    for _ in range(_CHECKS):
        _check_shapes(_shapes(runner.infer(session, images)), shapes)
    load_ms = _ms(loaded - start)
    if runner_name.endswith(f":{_HUGE_PAGES}"):
        facts.update(runtime=f"{facts['runtime']}-{_HUGE_PAGES}", huge_page_bytes=_huge_pages())
    answer(
        {
            "facts": facts,
            "output_shapes": shapes,
            "load_ms": load_ms,
            "cold_start_ms": round(load_ms + first_inference_ms, 4),
        }
    )

    def infer() -> list[np.ndarray]:
        return runner.infer(session, images)

    while (request := requests()) is not None:
        content, payload = request
        if "infer" in content:
            found = runner.infer(session, unpack_image(content["infer"], payload))
            answer(*pack_outputs(found))
            continue
        if "layers" in content:
            answer(_layers(runner, session, model, images))
            continue
        found, outputs = _measure(infer, content["queries"])
        _check_shapes(_shapes(outputs), shapes)
        answer(found)
    # With the compilers that torch.compile starts, which are no other work on this machine.
    answer({"peak_memory_bytes": peak_memory_bytes(), "cpu_s": sum(os.times()[:4])})


def open_model(runner: str, model: str, threads: int) -> tuple[Any, Any]:
    """Return the module of MODULE or MODULE:VARIANT, and the session in which it opened a model.

    Huge pages are nothing that a runner does: there it is the runtime itself that is opened.

    Raises:
        ValueError: the runtime is not installed, or what `load` of the runner says.
    """
    name, _, variant = runner.partition(":")
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(needs(error.name)) from None
    plain = variant in ("", _HUGE_PAGES)
    return module, module.load(model, threads) if plain else module.load(model, threads, variant)


def _huge_pages() -> int:
    found = huge_page_bytes()
    if not found:
        raise ValueError(
            "runs without huge pages here: they need Linux with glibc 2.35 or newer, and madvise or always in "
            "/sys/kernel/mm/transparent_hugepage/enabled"
        )
    return found


def needs(package: str | None) -> str:
    """Say that a package is missing, and how to get it."""
    return f"needs the package {package}, which is not installed: {sys.executable} -m pip install {package}"


def explain(error: Exception) -> str:
    """Return in a line what a runtime raised; a ValueError is one of ours, which says it in words."""
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}"


def _layers(runner: Any, session: Any, model: str, images: np.ndarray) -> dict[str, Any]:
    """Return what each layer costs, and what of a query is in none of them. The profiler lies beside the runner."""
    name = runner.__name__.replace("_runner", "_layers")
    if importlib.util.find_spec(name) is None:
        return {"layers": None, "left_out": None}
    module = importlib.import_module(name)
    rows = module.layers(runner, session, model, images, os.environ.get(COUNTER))
    return {"layers": rows, "left_out": module.LEFT_OUT}


def _measure(infer: Callable[[], Any], queries: int) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Return the samples of so many queries with the energy of all of them, and the last outputs."""
    outputs: list[np.ndarray] = []
    if counter := os.environ.get(COUNTER):
        counts: list[float] = []
        for _ in range(queries):
            os.getppid()
            outputs = infer()
            os.getppid()
            counts.append(_count(Path(counter)))
        return {"instructions": counts}, outputs
    samples_ns, before = [], energy_uj()
    for _ in range(queries):
        start = time.perf_counter_ns()
        outputs = infer()
        samples_ns.append(time.perf_counter_ns() - start)
    # A counter that ran over in between tells nothing.
    energy = None if before is None or (after := energy_uj()) is None or after < before else after - before
    return {"samples_ms": [_ms(sample) for sample in samples_ns], "energy_uj": energy}, outputs


def _count(path: Path) -> int:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        raise ValueError(f"no instructions were counted in {path}: the interpreter must be a counting one") from None


def _check_shape(facts: dict[str, Any], imgsz: int, batch: int) -> None:
    shape = facts.get("input_shape")
    if shape and shape[2:] != [imgsz, imgsz] and None not in shape[2:]:
        raise ValueError(f"takes images of {shape[3]}×{shape[2]} px, not {imgsz}: use --imgsz {shape[2]}")
    if shape and shape[0] not in (None, batch):
        only_one = facts["runtime"].startswith("ncnn")  # no export of it takes several
        asked = "latency is that of one: export it with batch 1" if batch == 1 else f"--batch {batch} was asked for"
        remedy = "" if batch == 1 else ": leave it out" if only_one else ": export it with --dynamic batch"
        raise ValueError(f"takes {shape[0]} image{'' if shape[0] == 1 else 's'} at once, {asked}{remedy}")


def _shapes(outputs: list[np.ndarray]) -> list[list[int]]:
    if not outputs or not all(np.isfinite(output).all() for output in outputs):
        raise ValueError("returns values that are not finite: check the weights")
    return [list(output.shape) for output in outputs]


def _check_shapes(shapes: list[list[int]], first: list[list[int]]) -> None:
    if shapes != first:
        raise ValueError(f"returned {shapes} after {first} for the same image: its latency means nothing")


def _ms(duration_ns: int) -> float:
    return round(duration_ns / 1e6, 4)


def _read(stream: BinaryIO, found: queue.Queue[Any], silence_s: float | None) -> None:
    """Queue the requests of a stream, and let the process end when it falls silent.

    A thread reads, and the timer is one of C's: also a runtime that hangs with Python's lock in its hands is ended.
    """
    if silence_s:
        faulthandler.dump_traceback_later(silence_s, exit=True)
    for line in stream:
        if silence_s:
            faulthandler.dump_traceback_later(silence_s, exit=True)
        if content := json.loads(line) if line.strip() else None:
            found.put((content, stream.read(content.get("bytes", 0))))
    if silence_s:
        faulthandler.dump_traceback_later(_GRACE_S, exit=True)
    found.put(None)


def main() -> None:
    """Serve on standard input and output, which no library may write to."""
    code = 0
    with os.fdopen(os.dup(1), "wb") as channel:
        os.dup2(2, 1)
        found: queue.Queue[Any] = queue.Queue()
        silence_s = float(os.environ.get(WATCHDOG) or 0)
        threading.Thread(target=_read, args=(sys.stdin.buffer, found, silence_s), daemon=True).start()

        def answer(content: dict[str, Any], payload: bytes = b"") -> None:
            channel.write(json.dumps(content).encode() + b"\n" + payload)
            channel.flush()

        try:
            serve(sys.argv[1:], found.get, answer)
        except (BrokenPipeError, KeyboardInterrupt):
            code = 130  # the parent is gone, or is ending us
        except Exception as error:
            # Whatever a runtime raises concerns this one model: the parent says which, in one line.
            answer({"error": explain(error)})
            code = 1
    sys.stderr.flush()
    os._exit(code)  # the reading thread holds the input's lock, which an orderly end would wait for


if __name__ == "__main__":
    main()
