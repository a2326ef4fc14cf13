"""Latency: every cell in a fresh process on the device, checked, warmed up, then measured interleaved.

A cell is one model file on one runtime; the cells take turns in short bursts of queries, see `benchmark.turns`. An
emulated device counts instructions instead, because its time says nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmark import clocks, drift, freshness, prepare, runtimes, sites, statistics, store
from benchmark.latency_record import INSTRUCTIONS, Cell, cell_record, compare, noise, others_cores, print_table, profile
from benchmark.sites import Site
from benchmark.turns import LEAD_IN, MODES, Show, count_cells, counted_protocol, kept_busy, time_cells, timed_protocol
from compress import manifest
from compress.devices import Device, load_device
from compress.errors import BenchmarkError, SettingsError, printable, run_app

SCHEMA = 1
STAGE = "latency"
RESULT, ACCURACY = "latency.json", "accuracy.json"


@dataclass(frozen=True)
class Load:
    """What a query is and how many run at once: batches to measure one after the other, and streams side by side."""

    batches: tuple[int, ...] = (1,)
    streams: int = 1


SINGLE = Load()


def measure(
    models: dict[str, dict[str, Path]],
    *,
    imgsz: int | Mapping[str, int],
    threads: int,
    mode: str,
    seed: int = 0,
    site: Site | None = None,
    lock_clocks: bool = False,
    load: Load = SINGLE,
    layers: bool = False,
) -> dict[str, Any]:
    """Measure the latency of models on a device and compare each with the first one in its runtime, at equal batch.

    Only the runtime's inference is timed: no reading, letterbox or suppression. Each query has the same noise image.

    Args:
        models: model name → runtime (torch, onnxruntime, ncnn, tensorrt, or a variant) → model file or folder.
        imgsz: side of the square input, px; or that of each model, by its name.
        threads: threads of each worker's runtime.
        mode: quick, standard or mlperf.
        seed: of the input, the order of the cells and the bootstrap.
        site: the device; this machine's CPU when not given.
        lock_clocks: fix the device's clocks meanwhile, as its file says.
        load: batches and streams; by default one image at a time.
        layers: ask the runtimes that have a profiler for the cost of each layer, after all that is timed.

    Returns:
        `cells` (per model and runtime: percentiles in ms with 95 % intervals, all samples in ms per round, memory,
        cold start; or, where `unit` is instructions, those of each query), `comparisons` (per runtime: median of the
        rounds' speed-ups over the first model there, 95 % interval), `device`, `protocol`, `noisy` and, if so, the
        reasons in `noise`; `measured_at`, when it began, UTC.

    Raises:
        BenchmarkError: an unknown mode or runtime, a file that is missing, a model that cannot be run or returns
            values that are not finite, a worker that crashes or falls silent.
        DeviceError: the device is gone, has no space left, or cannot lock its clocks.
    """
    plan = MODES[runtimes.known("mode", mode, MODES)]
    for files in models.values():
        for runtime, path in files.items():
            runtimes.known("runtime", runtime, runtimes.names())
            runtimes.require(path)
    site = site or sites.here()
    counted = site.device.counter is not None
    _check_load(site.device, load, lock_clocks)
    sizes = dict.fromkeys(models, imgsz) if isinstance(imgsz, int) else imgsz
    options: dict[str, Any] = {"threads": threads, "seed": seed}
    with ExitStack() as stack:
        if lock_clocks:
            stack.enter_context(clocks.locked(site.device, site.place))
        began = datetime.now(timezone.utc)
        log = clocks.log(site.device, site.place)
        before, started, own = sites.snapshot(site), time.monotonic(), time.process_time()
        show = stack.enter_context(_progress())
        cells = []
        for name, runtime, path, batch in _wanted(models, load):
            show(f"start {name} on {runtime}", 0.0)
            workers, ready = [], {}
            for _ in range(load.streams):
                workers.append(
                    stack.enter_context(sites.worker(site, runtime, path, batch=batch, imgsz=sizes[name], **options))
                )
                # One after another, so that no cold start competes with the next one's.
                answer, _ = workers[-1].receive()
                ready = ready or answer
            unit = INSTRUCTIONS if counted else "ms"
            cells.append(Cell(name, runtime, path, workers[0], ready, unit=unit, batch=batch, others=workers[1:]))
        order = count_cells(cells, seed, show) if counted else time_cells(cells, plan, seed, show)
        # Before the workers end: at rest a GPU lowers its clocks, draws little, and is held down by nothing.
        with kept_busy(cells[0]) if site.device.read and not counted else nullcontext():
            said = clocks.log(site.device, site.place)
        costs = [cell.finish() for cell in cells]
        elapsed_s, after = time.monotonic() - started, sites.snapshot(site)
        # In processes of their own, so that memory and load above are those of the timed queries alone.
        for cell in cells if layers else []:
            show(f"layers of {cell.name}", 1.0)
            size = sizes[cell.model]
            with sites.worker(site, cell.runtime, cell.path, batch=cell.batch, imgsz=size, **options) as worker:
                worker.receive()
                cell.profile = profile(cell, worker, LEAD_IN)
    own_s = sum(cost["cpu_s"] for cost in costs) + (time.process_time() - own if site.is_here else 0.0)
    others = others_cores(before["busy_s"], after["busy_s"], own_s, elapsed_s)
    throttling = clocks.throttling(log, said, lock_clocks)
    doubts = noise(cells, before["state"], after["state"], others, before["device"]["cores"], throttling)
    return {
        "schema": SCHEMA,
        "measured_at": began.isoformat(timespec="seconds"),
        "cells": [
            cell_record(cell, cost, threads, sizes[cell.model], seed) for cell, cost in zip(cells, costs, strict=True)
        ],
        "comparisons": compare(cells, seed),
        "device": {
            "name": site.device.name,
            **before["device"],
            # What an emulated machine shows of its processors are those of the machine that emulates it.
            **({"cpu": f"emulated {before['device']['architecture']}", "gpu": None} if counted else {}),
            "start": before["state"],
            "end": after["state"],
            "start_log": log,
            "load_log": said,
            "start_power_mw": clocks.power_mw(log),
            "load_power_mw": clocks.power_mw(said),
            "clocks_locked": lock_clocks,
            "others_cores": None if counted else others,
        },
        "protocol": {
            "device": site.device.name,
            "mode": mode,
            "label": "counted, not timed" if counted else plan.label,
            **(counted_protocol() if counted else timed_protocol(plan)),
            "rounds": len(order),
            "order": order,
            "imgsz": imgsz if isinstance(imgsz, int) else None,
            "batch": load.batches[0] if len(load.batches) == 1 else None,
            "streams": load.streams,
            "threads": threads,
            "seed": seed,
            "input": "uniform noise in [0, 1), float32 NCHW, the same for every query",
            "interval": f"{100 * statistics.LEVEL:g} %, {statistics.RESAMPLES} resamples of blocks of rounds",
            "seconds": round(elapsed_s, 1),
        },
        "noisy": bool(doubts),
        "noise": doubts,
    }


def _wanted(models: dict[str, dict[str, Path]], load: Load) -> Iterator[tuple[str, str, Path, int]]:
    """Yield model name, runtime, file and batch of each cell."""
    for name, files in models.items():
        for runtime, path in files.items():
            for batch in load.batches:
                yield name, runtime, path, batch


@contextmanager
def _progress() -> Iterator[Show]:
    """Yield a function that shows what is being done and the share that is done; silent without a terminal."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    console = Console(stderr=True)
    # Drawn between bursts only: a refreshing thread would take time from what is measured.
    with Progress(console=console, auto_refresh=False, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("latency", total=1.0)

        def show(what: str, done: float) -> None:
            bar.update(task, description=escape(printable(what)), completed=done, refresh=True)

        yield show


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    models: Annotated[
        list[Path], typer.Option("--models", "--model", help="models: .pt, .onnx, .engine or folders NAME_ncnn_model")
    ],
    output: Annotated[
        Path | None, typer.Option(help=f"folder for {RESULT} and the manifest; runs/latency/DEVICE")
    ] = None,
    more: Annotated[list[Path] | None, typer.Argument(metavar="MODEL", help="more models")] = None,
    data: Annotated[str | None, typer.Option(help="data set: score the models on the device too")] = None,
    split: Annotated[str | None, typer.Option(help="with --data: train, val or test; val")] = None,
    runtime: Annotated[str | None, typer.Option(help="only these, as in torch,ncnn; exports a .pt for them")] = None,
    precision: Annotated[str | None, typer.Option(help="of exports: fp32 or fp16; the device's own")] = None,
    imgsz: Annotated[int | None, typer.Option(min=32, help="side of the square input, px; 640")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="threads of each runtime; the device's own")] = None,
    mode: Annotated[str, typer.Option(help=", ".join(MODES))] = "quick",
    batch: Annotated[str, typer.Option(help="images of a query, or several numbers to compare: 1,2,4,8")] = "1",
    streams: Annotated[int, typer.Option(min=1, help="workers of each model that run at the same time")] = 1,
    layers: Annotated[bool, typer.Option("--layers", help="what each layer costs, by the runtime's profiler")] = False,
    device: Annotated[str, typer.Option(help="a name of configs/devices, shortened or not, or a .yaml file")] = "cpu",
    host: Annotated[str | None, typer.Option(help="\\[user@]host[:port], an alias of ssh, or a serial of adb")] = None,
    python: Annotated[str | None, typer.Option(help="interpreter on the device")] = None,
    bootstrap: Annotated[bool, typer.Option("--bootstrap", help="put missing packages into a folder there")] = False,
    lock_clocks: Annotated[bool, typer.Option("--lock-clocks", help="fix the device's clocks meanwhile")] = False,
    keep_outputs: Annotated[bool, typer.Option("--keep-outputs", help="keep what the device inferred")] = False,
    seed: Annotated[int, typer.Option(min=0, help="of the input, the order and the bootstrap")] = 0,
) -> None:
    """Measure the latency of model files side by side; in each runtime they are compared with the first one."""
    runtimes.known("mode", mode, MODES)
    load = Load(_batches(batch), streams)
    wanted = prepare.request(
        load_device(device), [*models, *(more or [])], runtime=runtime, precision=precision, imgsz=imgsz,
        threads=threads, data=data, split=split, host=host, python=python, keep_outputs=keep_outputs,
        batches=load.batches,
    )  # fmt: skip
    output = output or Path("runs") / STAGE / wanted.device.name
    # Before anything is moved aside:
    sites.transport_of(wanted.device, host, python, bootstrap)
    wanted.check_outside(output)
    _check_load(wanted.device, load, lock_clocks)
    config = {**wanted.config(), "mode": mode, "lock_clocks": lock_clocks, "seed": seed}
    # Only where they were asked for: what was measured without them stays finished.
    asked = {
        "batches": list(load.batches) if load.batches != (1,) else None,
        "streams": streams if streams != 1 else None,
        "layers": layers,
    }
    config |= {name: value for name, value in asked.items() if value}
    parents = wanted.parents()
    with manifest.lock(output):
        finished = manifest.is_finished(output, STAGE, config, parents)
        known = manifest.read_json(output / RESULT) if finished else None
        if known and (reason := _outdated(known, output, wanted.device)):
            kept = manifest.set_aside(output)
            print(f"latency: {output} {reason}: it is measured anew, the old one is now {kept}")
            known = None
        if known and not known["noisy"]:
            print(f"latency: finished before, unchanged: {output}")
            record = known
        else:
            if known:
                print(f"latency: what was measured before is noisy, it is measured again: {output}")
            else:
                manifest.begin(output, STAGE, config, parents)
            with prepare.open_models(wanted, output, host, python, bootstrap) as (site, files):
                scores = _scores(known) if known else prepare.score(wanted, site, files, output)
                record = measure(
                    files, imgsz=wanted.imgsz, threads=wanted.threads, mode=mode, seed=seed, site=site,
                    lock_clocks=lock_clocks, load=load, layers=layers,
                )  # fmt: skip
            for cell in record["cells"]:
                cell["accuracy"] = scores.get(f"{cell['model']}.{cell['runtime']}")
            written = [RESULT]
            manifest.write_json(output / RESULT, record)
            if scores:
                manifest.write_json(output / ACCURACY, list(scores.values()))
                written.append(ACCURACY)
            manifest.finish(output, STAGE, config, parents, written, _metrics(record), seed)
            prepare.clean_up(output, keep_outputs)
    print_table(record)
    if layers:
        print(_layers_remark(record, output))
    # After the table: a store that cannot be used hides nothing of what was measured.
    rows = [row for name in (RESULT, ACCURACY) if (output / name).is_file() for row in store.add(output / name)]
    if moved := drift.remark(rows):
        print(printable(moved))


def _check_load(device: Device, load: Load, lock_clocks: bool) -> None:
    """Check that a device can be measured as it is asked for."""
    if lock_clocks:
        clocks.check_lock(device)
    if device.counter and load != SINGLE:
        raise BenchmarkError(f"{device.name} counts instructions of one image: leave out --batch and --streams")


def _outdated(record: dict[str, Any], output: Path, device: Device) -> str | None:
    """Return why a record of this machine no longer speaks of it; null where it does, and for any other device."""
    if device.transport != "local":
        return None
    return freshness.outdated_record(record, output)


def _layers_remark(record: dict[str, Any], output: Path) -> str:
    """Return in a sentence where the cost of the layers is, which fills no table of a terminal."""
    silent = sorted({cell["runtime"] for cell in record["cells"] if not cell.get("layers")})
    remarks = [f"{', '.join(silent)}: does not tell what its layers cost"] if silent else []
    if any(cell.get("layers") for cell in record["cells"]):
        remarks.append(f"python -m benchmark.report {output} shows what each layer costs")
    return "layers: " + "; ".join(remarks)


def _scores(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the accuracy of each file in a record by NAME.RUNTIME, as `prepare.score` does."""
    return {f"{cell['model']}.{cell['runtime']}": cell["accuracy"] for cell in record["cells"] if cell["accuracy"]}


def _batches(text: str) -> tuple[int, ...]:
    """Return the numbers of `1,2,4`.

    Raises:
        SettingsError: the text has another form.
    """
    words = text.replace(",", " ").split()
    if not words or not all(word.isdecimal() and int(word) > 0 for word in words):
        raise SettingsError(f"--batch must be a number, or several as in 1,2,4, got {text!r}")
    return tuple(dict.fromkeys(map(int, words)))


def _metrics(record: dict[str, Any]) -> dict[str, Any]:
    metrics = {}
    for cell in record["cells"]:
        batch = f".batch{cell['batch']}" if cell["batch"] != 1 else ""
        key = "instructions" if cell["unit"] == INSTRUCTIONS else "p50_ms"
        metrics[f"{cell['model']}.{cell['runtime']}{batch}.{key}"] = cell[key]
    return metrics


if __name__ == "__main__":
    run_app(app)
