"""Many pipelines from one file: targets × importance × image size × model, and the front that they make.

What pipelines share is trained once, hopeless cuts are given up before fine-tuning, and the rest runs to its end. A
second start goes on where the first one stopped. Like `run.py`, this file chains stages, benchmark and report.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from compress import manifest
from compress.errors import RunError, SettingsError, run_app
from compress.sweeps.jobs import Job, cut, finish, train_dense, train_sparse
from compress.sweeps.plan import Cut, Sweep, expand, hopeless, load_sweep, on_front
from compress.sweeps.spread import Spread, here, on_ray

RECORD, REPORT, TOGETHER, LATENCY = "sweep.json", "report", "latency", "latency.json"


def sweep(
    settings: Sweep, pipelines: Sequence[Any], command: str, spread: Spread = here, runs: Path = Path("runs")
) -> list[dict[str, Any]]:
    """Run the pipelines of a sweep and return a row for each, which `runs/NAME/sweep.json` holds too.

    A pipeline that fails leaves the others alone.

    Args:
        pipelines: what `expand` made of the settings.
        spread: where the work is done.

    Raises:
        RunError: a pipeline failed; what the others found is written by then.
    """
    folder = runs / settings.name
    config = [settings.model_dump(mode="json"), [pipeline.model_dump(mode="json") for pipeline in pipelines]]
    with manifest.lock(folder):
        _check(folder, pipelines, config)
        folder.mkdir(parents=True, exist_ok=True)
        jobs = [Job(pipeline, folder, f"{command}  # {pipeline.name}") for pipeline in pipelines]
        rows: dict[str, dict[str, Any]] = {job.settings.name: {"name": job.settings.name} for job in jobs}
        _write(folder, command, config, rows, "running")

        jobs = _shared(train_dense, jobs, lambda job: job.dense, spread, rows)
        jobs = _shared(train_sparse, jobs, lambda job: job.sparse, spread, rows)
        jobs = _each(cut, jobs, "cut", spread, rows)
        known = {name: row["cut"] for name, row in rows.items() if "cut" in row}
        cuts = [Cut(name, cut["map50_95"], cut["kind"], cut["costs"]) for name, cut in known.items()]
        for name, better in hopeless(cuts, settings.early_stop).items():
            rows[name]["given_up"] = better
            print(f"sweep: {name} is given up: {better} is far better with no more {known[name]['kind']}")
        _write(folder, command, config, rows, "running")
        jobs = [job for job in jobs if "given_up" not in rows[job.settings.name]]
        jobs = _each(finish, jobs, "summary", spread, rows)
        _write(folder, command, config, rows, "running")
        if settings.together and len(jobs) > 1:
            for name, latencies in measure_together(jobs, folder, settings.seed).items():
                rows[name]["together"] = latencies

        found = list(rows.values())
        _mark_front(found)
        _write(folder, command, config, rows, "finished")
        _report(folder, jobs)
        print_table(found)
    failed = [row for row in found if "error" in row]
    if failed:
        raise RunError(
            f"{len(failed)} of {len(found)} pipelines failed, the first is {failed[0]['name']}: {failed[0]['error']}; "
            "run the same command again when that is mended"
        )
    return found


def _check(folder: Path, pipelines: Sequence[Any], config: Any) -> None:
    """Meet the mistakes of all pipelines before the first is trained."""
    from compress.data.dataset import resolve
    from compress.run import check

    record, known = folder / RECORD, {}
    if record.exists():
        known = manifest.read_json(record)
        manifest.check_schema(known, record)
    if known.get("config") != config:
        for pipeline in pipelines:
            data = resolve(pipeline.data)
            if data.is_dir():
                raise SettingsError(
                    f"{pipeline.name} classifies, and a sweep compares the mAP of detectors: run it with compress.run"
                )
            check(pipeline, data)


def _shared(
    work: Callable[[Job], None], jobs: list[Job], place: Callable[[Job], Path], spread: Spread, rows: dict[str, Any]
) -> list[Job]:
    """Do what several jobs have in common once, and return the jobs for which it worked."""
    first = {place(job): job for job in reversed(jobs)}
    done = dict(zip(first, spread(work, list(first.values())), strict=True))
    return [job for job in jobs if not _failed(job, done[place(job)], rows)]


def _each(work: Callable[[Job], Any], jobs: list[Job], key: str, spread: Spread, rows: dict[str, Any]) -> list[Job]:
    """Do what every job needs, keep its result in the job's row, and return the jobs for which it worked."""
    kept = []
    for job, result in zip(jobs, spread(work, jobs), strict=True):
        if not _failed(job, result, rows):
            rows[job.settings.name][key] = result
            kept.append(job)
    return kept


def _failed(job: Job, result: Any, rows: dict[str, Any]) -> bool:
    if isinstance(result, Exception):
        rows[job.settings.name]["error"] = " ".join(str(result).split())
        print(f"sweep: {job.settings.name} failed: {rows[job.settings.name]['error']}")
    return isinstance(result, Exception)


def measure_together(jobs: Sequence[Job], folder: Path, seed: int) -> dict[str, dict[str, dict[str, float]]]:
    """Measure the files of finished pipelines, and their dense models, in turns: what one run saw, every run saw.

    The latencies of the pipelines' own benchmarks are of other hours, or of other machines of a cluster. Pipelines that
    are measured with other threads or in another mode take turns among themselves only. A second start measures again
    only what was interrupted, noisy or has changed.

    Returns:
        By name of the pipeline, for `dense` and `pruned`: p50 in ms, by runtime.
    """
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        wanted = job.settings.benchmark
        groups.setdefault(f"{wanted.mode}-{wanted.threads}t", []).append(job)
    return {
        name: found for key, group in groups.items() for name, found in _together(group, folder / TOGETHER / key, seed)
    }


def _together(jobs: Sequence[Job], folder: Path, seed: int) -> Iterator[tuple[str, dict[str, dict[str, float]]]]:
    """Measure pipelines of equal threads and mode, and yield name and latencies of each."""
    from benchmark import runtimes
    from benchmark.latency import STAGE, measure
    from compress.run import files_of

    models: dict[str, dict[str, Path]] = {}
    sizes: dict[str, int] = {}
    for job in jobs:
        sides = {"dense": job.run / "01_train" / "model.pt", "pruned": job.run / "04_finetune" / "model.pt"}
        for side, files in files_of(sides, job.settings, job.run).items():
            name = _side(job, side)
            timed = {runtime: files[runtime] for runtime in job.settings.benchmark.runtimes}
            models[name], sizes[name] = {**timed, **models.get(name, {})}, job.settings.imgsz
    wanted = jobs[0].settings.benchmark
    config = {"threads": wanted.threads, "mode": wanted.mode, "seed": seed, "imgsz": sizes}
    parents = {f"{name}.{runtime}": runtimes.sha256(file) for name, f in models.items() for runtime, file in f.items()}
    with manifest.lock(folder):
        finished = manifest.is_finished(folder, STAGE, config, parents)
        if not finished or manifest.read_json(folder / LATENCY)["noisy"]:
            again = ", as the measurement of before is noisy" if finished else ""
            print(f"sweep: {len(models)} models are measured in turns{again}: {folder}")
            if not finished:
                manifest.begin(folder, STAGE, config, parents)
            record = measure(models, imgsz=sizes, threads=wanted.threads, mode=wanted.mode, seed=seed)
            manifest.write_json(folder / LATENCY, record)
            manifest.finish(folder, STAGE, config, parents, [LATENCY], {}, seed)
    found: dict[str, dict[str, float]] = {}
    for cell in manifest.read_json(folder / LATENCY)["cells"]:
        found.setdefault(cell["model"], {})[cell["runtime"]] = cell["p50_ms"]
    for job in jobs:
        yield job.settings.name, {side: found[_side(job, side)] for side in ("dense", "pruned")}


def _side(job: Job, side: str) -> str:
    """Return what a model is called beside the others; dense ones are shared as their training is."""
    return job.settings.name if side == "pruned" else job.dense.name


def _latency(row: dict[str, Any]) -> tuple[str, float]:
    """Return the runtime that a pipeline is judged by, the first that is not PyTorch, and its p50, ms.

    It is that of the measurement of all together, where there is one.
    """
    if "together" in row:
        found = row["together"]["pruned"]
    else:
        found = {runtime: values["p50"] for runtime, values in row["summary"]["pruned"]["latency_ms"].items()}
    runtime = next((name for name in found if name != "torch"), next(iter(found)))
    return runtime, found[runtime]


def _mark_front(rows: Sequence[dict[str, Any]]) -> None:
    finished = [row for row in rows if "summary" in row]
    best = on_front({row["name"]: (_latency(row)[1], row["summary"]["pruned"]["map50_95"]) for row in finished})
    for row in finished:
        row["front"] = row["name"] in best


def _report(folder: Path, jobs: Sequence[Job]) -> None:
    """Write one report over all pipelines that came to their end."""
    from benchmark.report import write_reports
    from benchmark.sources import read

    found = [source for job in jobs if (source := read(job.run))]
    if found:
        place = folder / REPORT
        place.mkdir(parents=True, exist_ok=True)
        write_reports(found, place)
        print(f"report: {place / 'report.html'}")


def _write(folder: Path, command: str, config: Any, rows: dict[str, Any], status: str) -> None:
    content = {"schema": manifest.SCHEMA, "status": status, "command": command, "config": config}
    manifest.write_json(folder / RECORD, {**content, "pipelines": list(rows.values())})


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print a row for every pipeline; those that no other beats in latency and mAP are marked."""
    from rich.console import Console
    from rich.table import Table

    runtimes = {_latency(row)[0] for row in rows if "summary" in row}
    table = Table(title="the sweep; * is on the front of mAP and latency")
    table.add_column("pipeline", overflow="fold")
    cost = "\n".join(["p50, ms", *(f"({runtime})" for runtime in sorted(runtimes))])
    headings = ("MACs, M", "mAP50-95\nafter the cut", "mAP50-95", cost)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for row in rows:
        cells = [row["name"], *["-"] * len(headings), ""]
        if "cut" in row:
            cells[1:3] = f"{row['cut']['macs'] / 1e6:.0f}", f"{row['cut']['map50_95']:.4f}"
        if "summary" in row:
            cells[3:5] = f"{row['summary']['pruned']['map50_95']:.4f}", f"{_latency(row)[1]:.2f}"
            cells[5] = "*" if row["front"] else ""
        if "given_up" in row:
            cells[5] = f"given up: {row['given_up']}"
        if "error" in row:
            cells[5] = "failed"
        table.add_row(*cells)
    Console().print(table)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    config: Annotated[Path, typer.Option(help="a file of configs/sweeps/")],
    overrides: Annotated[list[str] | None, typer.Argument(help="settings of all, such as finetune.epochs=20")] = None,
    model: Annotated[str | None, typer.Option(help="overrides the pipeline's model")] = None,
    data: Annotated[str | None, typer.Option(help="overrides the pipeline's data")] = None,
    ray: Annotated[str | None, typer.Option(help="run on a Ray cluster: auto, or its address")] = None,
    dry: Annotated[bool, typer.Option("--dry-run", help="print the names of the pipelines, and stop")] = False,
) -> None:
    """Run many pipelines, give up the hopeless ones early, and report the front of mAP and latency."""
    settings, changes = load_sweep(config), overrides or []
    given = {key: value for key, value in (("model", model), ("data", data)) if value is not None}
    pipelines = expand(settings, changes, given)
    if dry:
        for pipeline in pipelines:
            print(pipeline.name)
        return
    options = [word for key, value in given.items() for word in (f"--{key}", value)]
    command = shlex.join(["python", "-m", "compress.sweep", "--config", str(config), *options, *changes])
    sweep(settings, pipelines, command, on_ray(ray) if ray else here)


if __name__ == "__main__":
    run_app(app)
