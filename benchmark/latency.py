"""Latency on this machine: every cell in a fresh process, checked, warmed up, then measured interleaved.

A cell is one model file on one runtime. The cells take turns in short bursts of queries, in an order that is shuffled
anew each round, so that whatever the machine does meanwhile meets all of them alike. No query of a burst is dropped
for being slow.
"""

from __future__ import annotations

import difflib
import json
import os
import queue
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Annotated, Any

import typer

from benchmark import runtimes, statistics, system
from benchmark.runtimes import RUNNERS
from compress import manifest
from compress.errors import BenchmarkError, run_app

SCHEMA = 1
STAGE = "latency"
RESULT = "latency.json"
DEVICES = ("cpu",)
SILENCE_S = 120.0
WINDOW_S = 0.1
WARM_UP_CAP_S = 10.0
MIN_BURST = 5
# Another cell has just used the caches: the first queries of a burst bring them back and are not counted.
LEAD_IN = 2
MAX_DRIFT = 0.1
MAX_OTHERS = 0.1
_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)


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


@dataclass
class _Worker:
    """The parent's side of `benchmark.worker`."""

    name: str
    process: subprocess.Popen[str]
    answers: queue.Queue[str | None]
    log: IO[str]

    def receive(self) -> dict[str, Any]:
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


@dataclass
class _Cell:
    """One model file on one runtime, and what was measured of it."""

    model: str
    runtime: str
    path: Path
    worker: _Worker
    ready: dict[str, Any]
    warm_up: dict[str, Any] = field(default_factory=dict)
    burst: int = MIN_BURST
    rounds_ms: list[list[float]] = field(default_factory=list)

    def progress(self, mode: Mode) -> float:
        """Return the share of the required queries and seconds that is measured."""
        queries = sum(map(len, self.rounds_ms))
        seconds = sum(map(sum, self.rounds_ms)) / 1000
        return min(queries / mode.min_queries, seconds / mode.min_seconds, 1.0)


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
                worker = stack.enter_context(_start(f"{path.name} on {runtime}", command, threads))
                # One after another, so that no cold start competes with the next one's.
                cells.append(_Cell(name, runtime, path, worker, worker.receive()))
        for cell in cells:
            show(f"warm up {cell.model} on {cell.runtime}", 0.0)
            _warm_up(cell, plan)
        order = []
        generator = random.Random(seed)
        while (done := min(cell.progress(plan) for cell in cells)) < 1.0:
            show("latency", done)
            order.append(generator.sample(range(len(cells)), len(cells)))
            for index in order[-1]:
                cell = cells[index]
                cell.rounds_ms.append(cell.worker.time_queries(LEAD_IN + cell.burst)[LEAD_IN:])
        costs = [cell.worker.finish() for cell in cells]
    after, elapsed_s = system.state(), time.monotonic() - started
    own_s = time.process_time() - own + sum(cost["cpu_s"] for cost in costs)
    others = _others_cores(busy, system.busy_s(), own_s, elapsed_s)
    noise = _noise(cells, before, after, others)
    return {
        "schema": SCHEMA,
        "cells": [_cell_record(cell, cost, threads, imgsz, seed) for cell, cost in zip(cells, costs, strict=True)],
        "comparisons": _compare(cells, seed),
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
        "noisy": bool(noise),
        "noise": noise,
    }


@contextmanager
def _start(name: str, command: list[str], threads: int) -> Iterator[_Worker]:
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
            yield _Worker(name, process, answers, log)
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


def _warm_up(cell: _Cell, mode: Mode) -> None:
    """Run windows of queries until their medians stay within 3 %, or until the cap; then set the length of a burst."""
    window, queries, medians = MIN_BURST, 0, []
    start = time.monotonic()
    while True:
        samples = cell.worker.time_queries(window)
        queries += window
        median_ms = sorted(samples)[len(samples) // 2]
        window = max(MIN_BURST, round(WINDOW_S * 1000 / median_ms))
        medians.append(median_ms)
        plateau = statistics.on_plateau(medians)
        seconds = time.monotonic() - start
        if plateau or (seconds >= WARM_UP_CAP_S and len(medians) >= statistics.PLATEAU_WINDOWS):
            break
    cell.warm_up = {"queries": queries, "seconds": round(seconds, 2), "plateau": plateau}
    cell.burst = max(MIN_BURST, round(mode.burst_s * 1000 / medians[-1]))


def _cell_record(cell: _Cell, cost: dict[str, Any], threads: int, imgsz: int, seed: int) -> dict[str, Any]:
    values, intervals = statistics.summarise(cell.rounds_ms, seed)
    facts = cell.ready["facts"]
    return {
        "model": cell.model,
        "runtime": cell.runtime,
        "runtime_version": facts.get("version"),
        "precision": facts.get("precision"),
        "precision_executed": facts.get("precision_executed"),
        "providers": facts.get("providers"),
        "memory_format": facts.get("memory_format"),
        "file": cell.path.name,
        "model_sha256": runtimes.sha256(cell.path),
        "threads": threads,
        "imgsz": imgsz,
        "batch": 1,
        "output_shapes": cell.ready["output_shapes"],
        **{name: round(value, 4) for name, value in values.items()},
        "intervals": {name: [round(value, 4) for value in interval] for name, interval in intervals.items()},
        "queries": sum(map(len, cell.rounds_ms)),
        "seconds": round(sum(map(sum, cell.rounds_ms)) / 1000, 2),
        "warm_up": cell.warm_up,
        "drift": None if (change := statistics.drift(cell.rounds_ms)) is None else round(change, 4),
        "load_ms": cell.ready["load_ms"],
        "cold_start_ms": cell.ready["cold_start_ms"],
        "peak_memory_bytes": cost["peak_memory_bytes"],
        "samples_ms": cell.rounds_ms,
    }


def _compare(cells: list[_Cell], seed: int) -> list[dict[str, Any]]:
    """Compare every model with the first one, on each runtime that both were measured on."""
    baselines = {cell.runtime: cell for cell in cells if cell.model == cells[0].model}
    comparisons = []
    for cell in cells:
        baseline = baselines.get(cell.runtime)
        if baseline is None or baseline is cell:
            continue
        ratio, interval = statistics.speedup(baseline.rounds_ms, cell.rounds_ms, seed)
        comparisons.append(
            {
                "runtime": cell.runtime,
                "baseline": baseline.model,
                "model": cell.model,
                "speedup": round(ratio, 4),
                "interval": [round(value, 4) for value in interval],
            }
        )
    return comparisons


def _others_cores(before_s: float | None, after_s: float | None, own_s: float, elapsed_s: float) -> float | None:
    """Return how many cores other processes kept busy on average; null where the kernel does not tell.

    Better than the load average, which still remembers the training that ran before.
    """
    if before_s is None or after_s is None or after_s == before_s:
        return None
    return round(max(after_s - before_s - own_s, 0.0) / elapsed_s, 3)


def _noise(cells: list[_Cell], before: dict[str, Any], after: dict[str, Any], others: float | None) -> list[str]:
    """Return why this measurement cannot be fully trusted."""
    reasons = []
    cores = os.cpu_count() or 1
    if others is not None and others > MAX_OTHERS * cores:
        reasons.append(f"other processes kept {others:.2f} of {cores} cores busy")
    if None not in (before["throttle_count"], after["throttle_count"]):
        events = after["throttle_count"] - before["throttle_count"]
        if events > 0:
            reasons.append(f"the CPU throttled {events} times")
    for cell in cells:
        name = f"{cell.model} on {cell.runtime}"
        if not cell.warm_up["plateau"]:
            reasons.append(f"{name} reached no plateau in {cell.warm_up['seconds']:g} s of warm-up")
        change = (statistics.drift(cell.rounds_ms) or 1.0) - 1.0
        if abs(change) > MAX_DRIFT:
            reasons.append(f"{name} changed by {change:+.0%} from its first to its last third")
    return reasons


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
    _print_table(record)


def _print_table(record: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    protocol = record["protocol"]
    ratios = {(c["model"], c["runtime"]): f"{c['speedup']:.2f}× {_span(c['interval'])}" for c in record["comparisons"]}
    title = f"latency at {protocol['imgsz']} px, threads: {protocol['threads']} ({protocol['label']})"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in ("model", "runtime"):
        table.add_column(name)
    for name in ("p50 ms (95 %)", "p90 ms", "p99 ms", "speed-up (95 %)"):
        table.add_column(name, justify="right")
    for cell in record["cells"]:
        table.add_row(
            escape(cell["model"]),
            cell["runtime"],
            f"{cell['p50_ms']:.2f} {_span(cell['intervals']['p50_ms'])}",
            f"{cell['p90_ms']:.2f}",
            f"{cell['p99_ms']:.2f}",
            ratios.get((cell["model"], cell["runtime"]), ""),
        )
    console = Console()
    console.print(table)
    for reason in record["noise"]:
        console.print(f"noisy: {reason}", markup=False)


def _span(interval: list[float]) -> str:
    return f"({interval[0]:.2f}–{interval[1]:.2f})"


if __name__ == "__main__":
    run_app(app)
