"""One cell of a benchmark in a process of its own: it opens a model, checks what comes out, and times queries.

`python -m benchmark.worker RUNNER MODEL THREADS IMGSZ SEED` says on standard output what it opened, as one JSON line;
then it answers every line `{"queries": n}` with `{"samples_ms": [...]}`, and the end of its input with what the whole
cost. `benchmark.latency` speaks the other side. Whatever goes wrong becomes a line `{"error": ...}`.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

import numpy as np

from benchmark.system import peak_memory_bytes

_CHECKS = 2


def serve(arguments: list[str], requests: TextIO, answer: Callable[[dict[str, Any]], None]) -> None:
    """Open the model and answer requests until they end.

    Raises:
        ValueError: the model does not fit the image size, or its outputs are not finite or change their shape.
    """
    runner_name, model, threads, imgsz, seed = arguments
    runner = importlib.import_module(runner_name)
    # Noise, not zeros: arithmetic on zeros and denormals takes another time than on real values.
    images = np.random.default_rng(int(seed)).random((1, 3, int(imgsz), int(imgsz)), dtype=np.float32)

    start = time.perf_counter_ns()
    session = runner.load(model, int(threads))
    loaded = time.perf_counter_ns()
    facts = runner.describe(session)
    _check_imgsz(facts, int(imgsz))
    first = time.perf_counter_ns()
    outputs = runner.infer(session, images)
    first_inference_ms = _ms(time.perf_counter_ns() - first)
    shapes = _shapes(outputs)
    for _ in range(_CHECKS):
        _check_shapes(_shapes(runner.infer(session, images)), shapes)
    load_ms = _ms(loaded - start)
    answer(
        {
            "facts": facts,
            "output_shapes": shapes,
            "load_ms": load_ms,
            "cold_start_ms": round(load_ms + first_inference_ms, 4),
        }
    )

    for line in requests:
        samples_ns = []
        for _ in range(json.loads(line)["queries"]):
            start = time.perf_counter_ns()
            outputs = runner.infer(session, images)
            samples_ns.append(time.perf_counter_ns() - start)
        _check_shapes(_shapes(outputs), shapes)
        answer({"samples_ms": [_ms(sample) for sample in samples_ns]})
    answer({"peak_memory_bytes": peak_memory_bytes(), "cpu_s": time.process_time()})


def _check_imgsz(facts: dict[str, Any], imgsz: int) -> None:
    shape = facts.get("input_shape")
    if shape and shape[2:] != [imgsz, imgsz] and None not in shape[2:]:
        raise ValueError(f"takes images of {shape[3]}×{shape[2]} px, not {imgsz}: use --imgsz {shape[2]}")
    if shape and shape[0] not in (None, 1):
        raise ValueError(f"takes {shape[0]} images at once, latency is that of one: export it with batch 1")


def _shapes(outputs: list[np.ndarray]) -> list[list[int]]:
    if not outputs or not all(np.isfinite(output).all() for output in outputs):
        raise ValueError("returns values that are not finite: check the weights")
    return [list(output.shape) for output in outputs]


def _check_shapes(shapes: list[list[int]], first: list[list[int]]) -> None:
    if shapes != first:
        raise ValueError(f"returned {shapes} after {first} for the same image: its latency means nothing")


def _ms(duration_ns: int) -> float:
    return round(duration_ns / 1e6, 4)


def main() -> None:
    """Serve on standard input and output, which no library may write to."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as channel:
        os.dup2(2, 1)

        def answer(content: dict[str, Any]) -> None:
            channel.write(json.dumps(content) + "\n")
            channel.flush()

        try:
            serve(sys.argv[1:], sys.stdin, answer)
        except (BrokenPipeError, KeyboardInterrupt):
            raise SystemExit(130) from None  # the parent is gone, or is ending us
        except Exception as error:
            # Whatever a runtime raises concerns this one model: the parent says which, in one line.
            text = " ".join(str(error).split())
            answer({"error": text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}"})
            raise SystemExit(1) from None


if __name__ == "__main__":
    main()
