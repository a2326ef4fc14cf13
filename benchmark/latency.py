"""Latency on this machine: every cell in a fresh process, checked, warmed up, then measured interleaved.

A cell is one model file on one runtime. The cells take turns in short bursts of queries, in an order that is shuffled
anew each round, so that whatever the machine does meanwhile meets all of them alike. No query of a burst is dropped
for being slow.
"""

from __future__ import annotations

import difflib
import random
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmark import runtimes, statistics, system
from benchmark.cell import start
from benchmark.latency_record import Cell, cell_record, compare, noise, others_cores, print_table
from benchmark.runtimes import RUNNERS
from compress import manifest
from compress.errors import BenchmarkError, run_app

SCHEMA = 1
STAGE = "latency"
RESULT = "latency.json"
DEVICES = ("cpu",)
WINDOW_S = 0.1
WARM_UP_CAP_S = 10.0
MIN_BURST = 5
# Another cell has just used the caches: the first queries of a burst bring them back and are not counted.
LEAD_IN = 2


@dataclass(frozen=True)
class Mode:
    """How long to measure: at least so many queries and so many seconds for each cell, in bursts of `burst_s`."""

    min_queries: int
    min_seconds: float
    burst_s: float
    label: str


MODES = {
    "quick": Mode(100, 2.0, 0.1, "quick, for development, not for publication"),
    "standard": Mode(512, 20.0, 0.5, "standard"),
    "mlperf": Mode(1024, 60.0, 1.0, "at least 1024 queries and 60 s"),
}


def measure(
    models: dict[str, dict[str, Path]], *, imgsz: int, threads: int, mode: str, seed: int = 0
) -> dict[str, Any]:
    """Measure the latency of models on this machine's CPU, batch 1, and compare each with the first one.

    Only the runtime's inference is timed: no reading, letterbox or suppression. Each query has the same noise image.

    Args:
        models: model name → runtime (torch, onnxruntime, ncnn) → model file or folder.
        imgsz: side of the square input, px.
        threads: threads of each worker's runtime.
        mode: quick, standard or mlperf.
        seed: of the input, the order of the cells and the bootstrap.

    Returns:
        `cells` (per model and runtime: percentiles in ms with 95 % intervals, all samples in ms per round, memory,
        cold start), `comparisons` (per runtime: speed-up of p50 over the first model, 95 % interval), `device`,
        `protocol`, `noisy` and, if so, the reasons in `noise`.

    Raises:
        BenchmarkError: an unknown mode or runtime, a file that is missing, a model that cannot be run or returns
            values that are not finite, a worker that crashes or falls silent.
    """
    plan = MODES[_known("mode", mode, MODES)]
    for files in models.values():
        for runtime, path in files.items():
            _known("runtime", runtime, RUNNERS)
            runtimes.require(path)
    started, before, busy, own = time.monotonic(), system.state(), system.busy_s(), time.process_time()
    with ExitStack() as stack:
        show = stack.enter_context(_progress())
        cells = []
        for name, files in models.items():
            for runtime, path in files.items():
                show(f"start {name} on {runtime}", 0.0)
                command = [sys.executable, "-m", "benchmark.worker", RUNNERS[runtime], str(path.resolve())]
                command += [str(threads), str(imgsz), str(seed)]
                worker = stack.enter_context(start(f"{path.name} on {runtime}", command, threads))
                # One after another, so that no cold start competes with the next one's.
                cells.append(Cell(name, runtime, path, worker, worker.receive()))
        for cell in cells:
            show(f"warm up {cell.model} on {cell.runtime}", 0.0)
            _warm_up(cell, plan)
        order = []
        generator = random.Random(seed)
        while (done := min(cell.progress(plan.min_queries, plan.min_seconds) for cell in cells)) < 1.0:
            show("latency", done)
            order.append(generator.sample(range(len(cells)), len(cells)))
            for index in order[-1]:
                cell = cells[index]
                cell.rounds_ms.append(cell.worker.time_queries(LEAD_IN + cell.burst)[LEAD_IN:])
        costs = [cell.worker.finish() for cell in cells]
    after, elapsed_s = system.state(), time.monotonic() - started
    own_s = time.process_time() - own + sum(cost["cpu_s"] for cost in costs)
    others = others_cores(busy, system.busy_s(), own_s, elapsed_s)
    doubts = noise(cells, before, after, others)
    return {
        "schema": SCHEMA,
        "cells": [cell_record(cell, cost, threads, imgsz, seed) for cell, cost in zip(cells, costs, strict=True)],
        "comparisons": compare(cells, seed),
        "device": {**system.device(), "start": before, "end": after, "others_cores": others},
        "protocol": {
            "mode": mode,
            "label": plan.label,
            "min_queries": plan.min_queries,
            "min_seconds": plan.min_seconds,
            "burst_s": plan.burst_s,
            "lead_in_queries": LEAD_IN,
            "rounds": len(order),
            "order": order,
            "imgsz": imgsz,
            "batch": 1,
            "threads": threads,
            "seed": seed,
            "input": "uniform noise in [0, 1), float32 NCHW, the same for every query",
            "timed": "inference only, host clock",
            "interval": f"{100 * statistics.LEVEL:g} %, bootstrap over rounds, {statistics.RESAMPLES} resamples",
            "seconds": round(elapsed_s, 1),
        },
        "noisy": bool(doubts),
        "noise": doubts,
    }


def _warm_up(cell: Cell, mode: Mode) -> None:
    """Run windows of queries until their medians stay within 3 %, or until the cap; then set the length of a burst."""
    window, queries, medians = MIN_BURST, 0, []
    began = time.monotonic()
    while True:
        samples = cell.worker.time_queries(window)
        queries += window
        median_ms = sorted(samples)[len(samples) // 2]
        window = max(MIN_BURST, round(WINDOW_S * 1000 / median_ms))
        medians.append(median_ms)
        plateau = statistics.on_plateau(medians)
        seconds = time.monotonic() - began
        if plateau or (seconds >= WARM_UP_CAP_S and len(medians) >= statistics.PLATEAU_WINDOWS):
            break
    cell.warm_up = {"queries": queries, "seconds": round(seconds, 2), "plateau": plateau}
    cell.burst = max(MIN_BURST, round(mode.burst_s * 1000 / medians[-1]))


@contextmanager
def _progress() -> Iterator[Any]:
    """Yield a function that shows what is being done and the share that is done; silent without a terminal."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    console = Console(stderr=True)
    # Drawn between bursts only: a refreshing thread would take time from what is measured.
    with Progress(console=console, auto_refresh=False, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("latency", total=1.0)

        def show(what: str, done: float) -> None:
            bar.update(task, description=escape(what), completed=done, refresh=True)

        yield show


def _known(kind: str, value: str, choices: Collection[str]) -> str:
    """Return a value that is among the choices.

    Raises:
        BenchmarkError: it is not; the message lists the choices, the closest first.
    """
    if value not in choices:
        closest = difflib.get_close_matches(value, choices, n=len(choices), cutoff=0.0)
        raise BenchmarkError(f"unknown {kind} '{value}': choose one of {', '.join(closest)}")
    return value


def _by_name(paths: list[Path], runtime: str | None) -> dict[str, dict[str, Path]]:
    """Group files by model name and runtime; files of one name and runtime keep their whole paths as names."""
    if runtime is not None:
        _known("runtime", runtime, RUNNERS)
    found: dict[str, dict[str, Path]] = {}
    for path in paths:
        own = runtimes.runtime_of(path)
        if own is None or runtime not in (None, own):
            raise BenchmarkError(f"{path} must be {runtimes.kinds(runtime)} to run in {runtime or 'a known runtime'}")
        runtimes.require(path)
        name = str(path) if own in found.get(runtimes.stem(path), {}) else runtimes.stem(path)
        found.setdefault(name, {})[own] = path
    return found


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    models: Annotated[
        list[Path], typer.Option("--models", "--model", help="models: .pt, .onnx, .engine or folders NAME_ncnn_model")
    ],
    output: Annotated[Path, typer.Option(help=f"folder for {RESULT} and the manifest")],
    more: Annotated[list[Path] | None, typer.Argument(metavar="MODEL", help="more models")] = None,
    runtime: Annotated[str | None, typer.Option(help="accept only files of this runtime")] = None,
    imgsz: Annotated[int, typer.Option(min=32, help="side of the square input, px")] = 640,
    threads: Annotated[int, typer.Option(min=1, help="threads of each runtime")] = 1,
    mode: Annotated[str, typer.Option(help=", ".join(MODES))] = "quick",
    device: Annotated[str, typer.Option(help=", ".join(DEVICES))] = "cpu",
    seed: Annotated[int, typer.Option(help="of the input, the order and the bootstrap")] = 0,
) -> None:
    """Measure the latency of model files side by side; the first one is what the others are compared with."""
    _known("device", device, DEVICES)
    _known("mode", mode, MODES)
    named = _by_name([*models, *(more or [])], runtime)
    parents = {f"{name}.{own}": runtimes.sha256(path) for name, files in named.items() for own, path in files.items()}
    config = {"device": device, "imgsz": imgsz, "threads": threads, "mode": mode, "seed": seed}
    with manifest.lock(output):
        if manifest.is_finished(output, STAGE, config, parents):
            print(f"latency: finished before, unchanged: {output}")
            record = manifest.read_json(output / RESULT)
        else:
            manifest.begin(output, STAGE, config, parents)
            record = measure(named, imgsz=imgsz, threads=threads, mode=mode, seed=seed)
            manifest.write_json(output / RESULT, record)
            metrics = {f"{cell['model']}.{cell['runtime']}.p50_ms": cell["p50_ms"] for cell in record["cells"]}
            manifest.finish(output, STAGE, config, parents, [RESULT], metrics, seed)
    print_table(record)


if __name__ == "__main__":
    run_app(app)
