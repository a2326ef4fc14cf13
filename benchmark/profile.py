"""Latency tables: measure a model at widths that a budget allows, and learn what each layer costs.

Networks of the model's architecture are drawn, exported and measured in the runtime itself, each in a fresh process
and in turns with the dense model, as a whole and, where the runtime tells, segment by segment; so fusion, layout
changes and caches are those of deployment. Where only whole networks are known, what a channel costs is fitted to them,
and the table says how far such a fit is from networks that it has not seen. Every measured network is one line of a
file beside the table, and an interrupted run goes on after the last one.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from benchmark import freshness, observe, sites, statistics
from benchmark.observe import Wanted
from compress import checkpoint, manifest
from compress.devices import load_device
from compress.errors import BenchmarkError, SettingsError, run_app
from compress.settings import Budget, check_imgsz, load_budget, parse

if TYPE_CHECKING:
    from torch import nn

    from benchmark.sites import Site
    from compress.channels.graph import Graph
    from compress.latency.table import LatencyTable

MAX_REFUSED = 0.1


def profile(model: nn.Module, wanted: Wanted, output: Path | None = None) -> tuple[LatencyTable, Path]:
    """Measure a model and write its latency table; return it and its path.

    A table that is there and was made of the same model with the same settings is read, not measured again, unless
    it is of this machine with another processor or another version of the runtime: then it is kept under another name.

    Args:
        model: the dense model; its weights do not matter.
        output: path of the table; where `compress.prune` looks for it when not given.

    Raises:
        SettingsError: a device that does not run the runtime, an image size that does not fit the model's stride, or
            `output` is something else.
        BenchmarkError: a network cannot be measured, or too many of them are noisy.
        BudgetError: the budget allows no other widths.
        ExportError: a network cannot be exported; for TensorRT also where nothing builds engines on the device.
    """
    from compress.channels.graph import build_graph
    from compress.latency.table import default_path, load_table

    observe.check(wanted)
    check_imgsz(wanted.imgsz, int(max(model.stride)))  # type: ignore[arg-type]  (Ultralytics' models have it)
    # Where a rule comes from changes no width.
    wanted = replace(wanted, budget=wanted.budget.model_copy(update={"source": ""}))
    structure = checkpoint.structure_hash(model)
    path = output or default_path(
        wanted.site.name, wanted.runtime, wanted.threads, wanted.imgsz, structure, wanted.budget
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with manifest.lock(path):
        if path.exists():
            table = load_table(path)
            _check_same(table, wanted, structure, path)
            heading = _heading(points_path(path))
            reason = _outdated(table, heading, wanted)
            if reason is None:
                print(f"profile: finished before{_otherwise(heading, wanted)}: {path}")
                return table, path
            print(f"profile: {path} {reason}: it is measured anew, the old one is now {_set_aside(path)}")
        graph = build_graph(model, wanted.imgsz)
        with observe.reach(wanted) as site:
            machine = observe.machine(site, wanted.runtime)
            points = _measure(model, graph, wanted, structure, path, site, machine)
        table = _fit(graph, points, wanted, structure, machine)
        from compress.latency.table import save_table

        save_table(table, path)
    return table, path


def _check_same(table: LatencyTable, wanted: Wanted, structure: str, path: Path) -> None:
    from compress.latency.table import check_fits

    names = ("runtime", "threads", "imgsz", "budget")
    expected = {"device": wanted.site.name} | {name: getattr(wanted, name) for name in names}
    check_fits(table, expected | {"structure": structure}, path, "choose another --output")


def _outdated(table: LatencyTable, heading: dict[str, Any], wanted: Wanted) -> str | None:
    """Return why a table of this machine no longer speaks of it; None where it does, and for any other device."""
    if wanted.site.transport != "local":
        return None  # `compress.prune` finds out when it measures there
    return freshness.outdated(table.machine, heading.get("tools", {}), [wanted.runtime])


def _otherwise(heading: dict[str, Any], wanted: Wanted) -> str:
    """Say in which of the settings that do not make it another table a finished one was measured otherwise."""
    known = heading.get("wanted", {})
    names = ("variants", "max_interval", "seed", "host", "python")
    pairs = [(name, known.get(name), getattr(wanted, name)) for name in names]
    other = [f"{name} {old}, not {new}" for name, old, new in pairs if None not in (old, new) and old != new]
    return f" (with {', '.join(other)}: for those choose another --output)" if other else ""


def _set_aside(path: Path) -> Path:
    """Move a table and its points to free names; return that of the table."""
    kept = manifest.set_aside(path)
    if (points := points_path(path)).exists():
        manifest.set_aside(points)
    return kept


def _measure(
    model: nn.Module, graph: Graph, wanted: Wanted, structure: str, path: Path, site: Site, machine: str | None
) -> list[dict[str, Any]]:
    """Return all points, those of an interrupted run first; each new one is on disk before the next one begins."""
    from benchmark import variants
    from compress.progress import track
    from export.stage import remove, scratch

    widths = variants.draw_widths(graph, wanted.budget, wanted.variants, wanted.seed)
    heading = {
        "structure": structure,
        "wanted": {**asdict(wanted), "device": wanted.site.name, "budget": wanted.budget.model_dump(mode="json")},
        "tools": manifest.tool_versions(),
        "machine": machine,
    }
    file = points_path(path)
    points = _read_points(file, heading)
    left = [index for index in range(len(widths)) if index not in {point["index"] for point in points}]
    if points and left:
        print(f"profile: goes on after {len(points)} of {len(widths)} networks")
    with scratch(path) as folder:
        known: dict[str, Any] = {}
        dense = variants.export(model, "dense", wanted, folder, site.place) if left else None
        for index in track(left, f"profile {path.stem}"):
            assert dense is not None
            network = variants.cut(model, graph, widths[index])
            made = variants.export(network, f"variant{index}", wanted, folder, site.place)
            point = {
                "index": index,
                "widths": widths[index].tolist(),
                **observe.observe(site, dense, made, wanted, known),
            }
            with file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(point) + "\n")
                stream.flush()
                os.fsync(stream.fileno())
            points.append(point)
            remove(made)  # dozens of a large model would fill a disk
    return points


def points_path(table: Path) -> Path:
    """Return the file of the measured points beside a table."""
    return table.with_suffix(".points.jsonl")


def _read_points(file: Path, heading: dict[str, Any]) -> list[dict[str, Any]]:
    """Read what was measured before with the same settings, but for the limit; begin the file anew where there is none.

    Raises:
        SettingsError: the settings were others.
    """
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    found = [content for line in lines if (content := _parse_line(line)) is not None]
    heading = json.loads(json.dumps(heading))
    if found and _without_limit(found[0]) != _without_limit(heading):
        raise SettingsError(f"{file} holds points of other settings: choose another --output, or delete it")
    # A line that kill -9 cut short is dropped, and what is noisy is measured once more.
    limit = heading["wanted"]["max_interval"]
    kept = [heading, *(point for point in found[1:] if point["interval_width"] <= limit)]
    manifest.write_bytes_atomic(file, "".join(json.dumps(content) + "\n" for content in kept).encode())
    return kept[1:]


def _without_limit(heading: dict[str, Any]) -> dict[str, Any]:
    """Leave out the one setting that does not change what is measured, only what of it is kept."""
    return heading | {"wanted": {**heading.get("wanted", {}), "max_interval": None}}


def _heading(file: Path) -> dict[str, Any]:
    """Return the first line of a file of points; nothing where there is none."""
    first = file.read_text(encoding="utf-8").partition("\n")[0] if file.exists() else ""
    return _parse_line(first) or {}


def _parse_line(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def _fit(
    graph: Graph, points: list[dict[str, Any]], wanted: Wanted, structure: str, machine: str | None
) -> LatencyTable:
    """Fit a table to the points that are not noisy.

    Raises:
        BenchmarkError: too many are.
    """
    from benchmark import regression
    from compress.latency.table import LatencyTable

    usable = [point for point in points if point["interval_width"] <= wanted.max_interval]
    noisy = len(points) - len(usable)
    if noisy > MAX_REFUSED * len(points) or (noisy and len(usable) < regression.MIN_VARIANTS):
        raise BenchmarkError(
            f"{noisy} of {len(points)} networks are noisy (95 % intervals wider than "
            f"{wanted.max_interval:.0%}): close what else runs on this machine and run the same command again, which "
            "measures only these anew, or allow more with --max-interval"
        )
    dense = [float(np.median(point["record"]["dense"])) for point in usable]
    dense_cost = float(np.median(dense))
    observations = [
        regression.Observation(
            widths=np.array(point["widths"]),
            whole=dense_cost / point["speedup"],
            segments=[
                (segment["name"], segment["shape"], segment["cost"] * dense_cost / own)
                for segment in point["record"]["segments"]
            ],
        )
        for point, own in zip(usable, dense, strict=True)
    ]
    model, quality = regression.fit(graph, observations)
    _, intervals = statistics.summarise([point["record"]["dense"] for point in usable], wanted.seed)
    first = points[0]["record"]
    return LatencyTable(
        unit=wanted.unit,  # type: ignore[arg-type]
        device=wanted.site.name,
        machine=machine,
        runtime=wanted.runtime,
        runtime_version=first["version"],
        precision=first["precision"],
        threads=wanted.threads,
        imgsz=wanted.imgsz,
        structure=structure,
        budget=wanted.budget,
        dense=round(dense_cost, 5),
        dense_interval=(round(intervals["p50_ms"][0], 5), round(intervals["p50_ms"][1], 5)),
        scale=model.scale,
        offset=model.offset,
        segments=model.segments,
        fit=quality,
    )


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Annotated[Path, typer.Option(help="checkpoint (.pt), dense")],
    output: Annotated[Path | None, typer.Option(help="table (.json); not given: where compress.prune finds it")] = None,
    device: Annotated[str, typer.Option(help="a name of configs/devices, shortened or not, or a .yaml file")] = "cpu",
    host: Annotated[str | None, typer.Option(help="\\[user@]host[:port], an alias of ssh, or a serial of adb")] = None,
    python: Annotated[str | None, typer.Option(help="interpreter on the device")] = None,
    bootstrap: Annotated[bool, typer.Option("--bootstrap", help="put missing packages into a folder there")] = False,
    runtime: Annotated[str | None, typer.Option(help="one that the device has; its first one")] = None,
    imgsz: Annotated[int, typer.Option(min=32, help="side of the square input, px")] = 640,
    threads: Annotated[int | None, typer.Option(min=1, help="threads of the runtime; the device's own")] = None,
    budget: Annotated[
        Path | None, typer.Option(help="the widths to measure: a file of configs/budgets/, or a device; its own")
    ] = None,
    multiple_of: Annotated[int | None, typer.Option(min=1, help="channel counts are multiples of this")] = None,
    power_of_two: Annotated[bool, typer.Option("--power-of-two", help="channel counts are powers of two")] = False,
    min_width: Annotated[int | None, typer.Option(min=1, help="no layer becomes narrower")] = None,
    max_removed: Annotated[float | None, typer.Option(help="largest share that one group may lose")] = None,
    variants: Annotated[int, typer.Option(min=12, help="how many networks are measured")] = 64,
    max_interval: Annotated[
        float, typer.Option(min=0.001, max=1.0, help="widest interval, as a share of the latency")
    ] = 0.05,
    seed: Annotated[int, typer.Option(min=0, help="of the widths and the input")] = 0,
) -> None:
    """Measure a model at the widths of a budget and write the latency table that `compress.prune --latency` reads."""
    known = load_device(device)
    if known.transport == "local":
        sites.transport_of(known, host, python, bootstrap)  # tells what has no effect here, before a finished table
    runtime = runtime or known.runtimes[0]
    rules = load_budget(budget) if budget else known.budgets.get(runtime, Budget())  # type: ignore[call-overload]
    changes = {
        "multiple_of": multiple_of,
        "power_of_two": power_of_two or None,
        "min_width": min_width,
        "max_removed": max_removed,
    }
    content = rules.model_dump(mode="json") | {key: value for key, value in changes.items() if value is not None}
    wanted = Wanted(
        runtime=runtime,
        imgsz=imgsz,
        budget=parse(Budget, content, "budget"),
        device=device,
        threads=threads or known.threads,
        host=host,
        python=python,
        bootstrap=bootstrap,
        variants=variants,
        max_interval=max_interval,
        seed=seed,
    )
    from compress.latency.table import amount

    table, path = profile(checkpoint.load_model(model), wanted, output)
    print(
        f"profile: {path} ({table.fit.variants} networks, dense {amount(table.dense, table.unit)}; "
        f"networks that a fit has not seen: predicted within {table.fit.median_error:.1%} (median), "
        f"{table.fit.p95_error:.1%} (95th percentile))"
    )


if __name__ == "__main__":
    run_app(app)
