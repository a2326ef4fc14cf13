"""The rows of a report: every model on every runtime, what it costs, how right it is, and which rows are on a front.

Times of different devices or under different load, instructions beside milliseconds, and scores of different data are
never put on one plot.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

from benchmark import wording
from benchmark.pages import Number, Table
from benchmark.plots import Panel, Point, front
from benchmark.records import Measurement, Score, measurements, score_of
from benchmark.runtimes import distinct_names
from benchmark.sources import Source

BASELINE = "dense"
# Settings that have a column in the table where the rows differ in them, with its name.
_SETTINGS = {"precision": "precision", "threads": "threads", "imgsz": "px", "batch": "batch", "device": "device"}


@dataclass(frozen=True)
class Entry:
    """One model on one runtime; `name` tells it from all other models of the report."""

    run: str
    name: str
    model: str
    runtime: str
    cost: Measurement | None
    score: Score | None
    macs: float | None = None
    in_pipeline: bool = False
    on_front: bool = False


def entries(sources: Sequence[Source]) -> list[Entry]:
    """Return all that was measured; a score goes with the very file that it was taken of, in whichever folder."""
    shared = [score for source in sources for score in source.scores if score.model_sha256 is not None]
    found, used = [], set()
    for source in sources:
        for cost in (cell for record in source.records for cell in measurements(record, source.name)):
            score = score_of(cost, [*source.scores, *shared])
            used.add(id(score))
            side = (source.summary or {}).get(cost.model) or {}
            whose = (source.name, "", cost.model, cost.runtime)
            found.append(Entry(*whose, cost, score, side.get("macs"), source.summary is not None))
    for source in sources:
        if source.summary is None:  # a pipeline scores runtimes that it does not time
            rest = [score for score in source.scores if id(score) not in used]
            found += [Entry(source.name, "", score.model, score.runtime or "", None, score) for score in rest]
    names = distinct_names([PurePosixPath(entry.run) / entry.model for entry in found])
    named = [replace(entry, name=name) for entry, name in zip(found, names, strict=True)]
    best = {group[index] for group in _groups(named) for index in front([_place(named[i]) for i in group])}
    return [replace(entry, on_front=index in best) for index, entry in enumerate(named)]


def panels(rows: Sequence[Entry]) -> list[Panel]:
    """Return a plot for each device, unit, load and data set on which both cost and score are known."""
    groups = _groups(rows)
    return [_panel([rows[index] for index in group], alone=len(groups) == 1) for group in groups]


def table(rows: Sequence[Entry]) -> Table:
    """Return all rows; columns that would tell nothing are left out."""
    units = {row.cost.unit for row in rows if row.cost}
    metrics = list(dict.fromkeys(row.score.metric for row in rows if row.score))
    settings = [name for name in _SETTINGS if len({getattr(row.cost, name) for row in rows if row.cost}) > 1]
    columns = ["model", "runtime", *(_SETTINGS[name] for name in settings if name != "device"), *metrics]
    columns += ["p50 ms", "95 % interval", "p90 ms", "p99 ms"] if "ms" in units else []
    columns += ["instructions"] if "instructions" in units else []
    columns += ["queries", "cold start ms", "peak memory"] if units else []
    columns += ["Pareto"] if any(row.on_front for row in rows) else []
    columns += ["device"] if "device" in settings else []
    devices = _short_devices(rows)
    return Table(columns, [_cells(row, columns, settings, metrics, devices) for row in rows], sortable=True)


def short_table(rows: Sequence[Entry]) -> Table:
    """Return what a terminal is wide enough for."""
    lines = [
        [
            row.name,
            _runtime(row),
            wording.cost(row.cost.p50, row.cost.unit) if row.cost else wording.UNKNOWN,
            f"{row.score.metric} {row.score.value:.4f}" if row.score else wording.UNKNOWN,
            "front" if row.on_front else "",
        ]
        for row in rows
    ]
    return Table(["model", "runtime", "p50", "score", "Pareto"], lines)


def to_csv(rows: Sequence[Entry]) -> str:
    """Return all rows as CSV, numbers as they were measured, units in the names of the columns."""
    lines = [_values(row) for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]) if lines else ["run"], lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _for_sheet(value) for name, value in line.items()} for line in lines)
    return text.getvalue()


def _groups(rows: Sequence[Entry]) -> list[list[int]]:
    """Return the places of the rows that belong on one plot, for each plot."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index, row in enumerate(rows):
        if row.cost and row.score:
            data = row.score.data_sha256 or row.score.data
            load = (row.cost.batch, row.cost.streams)
            key = (row.cost.device, row.cost.unit, load, row.score.metric, data, row.score.split)
            groups.setdefault(key, []).append(index)
    return list(groups.values())


def _place(row: Entry) -> tuple[float, float]:
    assert row.cost
    assert row.score
    return row.cost.p50, round(row.score.value, 4)  # a difference that no table shows puts nothing on a front


def _panel(rows: Sequence[Entry], alone: bool) -> Panel:
    first = rows[0]
    assert first.cost
    assert first.score
    data = " ".join(filter(None, (first.score.data, first.score.split)))
    batch = f"batch {first.cost.batch}" if _batched(first) else None
    streams = f"{first.cost.streams} streams" if first.cost.streams != 1 else None
    title = "" if alone else ", ".join(filter(None, (first.cost.device, data, batch, streams)))
    return Panel(title, first.cost.unit, first.score.metric, [_point(row) for row in rows])


def _point(row: Entry) -> Point:
    cost, score = row.cost, row.score
    assert cost
    assert score
    span = f" ({wording.interval_ms(cost.interval)})" if cost.unit == "ms" and cost.interval else ""
    p90 = f", p90 {wording.cost(cost.p90, cost.unit)}" if cost.p90 is not None else ""
    settings = [cost.precision, None if cost.threads is None else f"threads: {cost.threads}", f"{cost.imgsz or '?'} px"]
    lines = [
        f"{row.name}, {_runtime(row)}",
        f"p50 {wording.cost(cost.p50, cost.unit)}{span}{p90}",
        f"{score.metric} {score.value:.4f}" + (f"; {wording.size(row.macs)} MACs" if row.macs else ""),
        ", ".join(filter(None, settings)),
    ]
    if row.on_front:
        lines.append("on the Pareto front")
    return Point(
        series=row.run if row.in_pipeline else row.name,
        is_baseline=row.in_pipeline and row.model == BASELINE,
        runtime=row.runtime,
        cost=cost.p50,
        interval=cost.interval,
        score=score.value,
        details=tuple(lines),
        on_front=row.on_front,
    )


def _batched(row: Entry) -> bool:
    return row.cost is not None and (row.cost.batch or 1) != 1


def _runtime(row: Entry) -> str:
    """Return the runtime, and the batch where it is not one image."""
    return f"{row.runtime}, batch {row.cost.batch}" if row.cost and _batched(row) else row.runtime


def _short_devices(rows: Sequence[Entry]) -> dict[str | None, str]:
    """Return what a cell calls each device: its first word group, where that tells it from all others."""
    names = {row.cost.device for row in rows if row.cost and row.cost.device}
    firsts = [name.partition(",")[0] for name in names]
    return {name: first if firsts.count(first) == 1 else name for name, first in zip(names, firsts, strict=True)}


def _cells(
    row: Entry,
    columns: Sequence[str],
    settings: Sequence[str],
    metrics: Sequence[str],
    devices: dict[str | None, str],
) -> list[str | Number]:
    cost, score = row.cost, row.score
    known: dict[str, str | Number] = {"model": row.name, "Pareto": "front" if row.on_front else ""}
    known["runtime"] = " ".join(filter(None, (row.runtime, cost.runtime_version if cost else None)))
    for name in metrics:
        known[name] = Number.of(score.value if score and score.metric == name else None, "{:.4f}")
    if cost:
        in_ms = cost.unit == "ms"
        known |= {_SETTINGS[name]: _setting(getattr(cost, name)) for name in settings}
        if "device" in settings:
            known["device"] = devices.get(cost.device, wording.UNKNOWN)
        values = {n: getattr(cost, f"p{n}") if in_ms else None for n in (50, 90, 99)}
        known |= {f"p{n} ms": Number(wording.ms(value), value) for n, value in values.items()}
        span = cost.interval if in_ms else None
        known["95 % interval"] = Number(wording.interval_ms(span), span[0] if span else None)
        known["instructions"] = Number(
            wording.UNKNOWN if in_ms else wording.size(cost.p50), None if in_ms else cost.p50
        )
        known["queries"] = Number.of(cost.queries, "{}")
        known["cold start ms"] = Number.of(cost.cold_start_ms, "{:.0f}")
        known["peak memory"] = Number(wording.size(cost.peak_memory_bytes, "B"), cost.peak_memory_bytes)
    return [known.get(name, Number(wording.UNKNOWN, None)) for name in columns]


def _setting(value: Any) -> str | Number:
    return Number(str(value), value) if isinstance(value, int) else wording.known(value)


def _values(row: Entry) -> dict[str, Any]:
    cost, score = row.cost, row.score
    low, high = (cost.interval if cost else None) or (None, None)
    unit = cost.unit if cost else None
    names = ("device", "runtime_version", "precision", "threads", "imgsz", "batch", "mode", "noisy")
    costs = {
        "p50": cost and cost.p50,
        "p50_low": low,
        "p50_high": high,
        "p90": cost and cost.p90,
        "p99": cost and cost.p99,
    }
    return {
        "run": row.run,
        "model": row.model,
        "model_sha256": (cost and cost.model_sha256) or (score and score.model_sha256),
        "runtime": row.runtime,
        **{name: getattr(cost, name, None) for name in names},
        "metric": score and score.metric,
        "score": score and score.value,
        "data": score and score.data,
        "data_sha256": score and score.data_sha256,
        "split": score and score.split,
        **{f"{name}_ms": value if unit == "ms" else None for name, value in costs.items()},
        **{f"{name}_instructions": value if unit == "instructions" else None for name, value in costs.items()},
        "queries": cost and cost.queries,
        "cold_start_ms": cost and cost.cold_start_ms,
        "peak_memory_bytes": cost and cost.peak_memory_bytes,
        "macs": row.macs,
        "on_pareto_front": row.on_front,
    }


def _for_sheet(value: Any) -> Any:
    """Return a value that a spreadsheet takes for text where it is text: one that begins like a formula is quoted."""
    if not isinstance(value, str):
        return value
    text = "".join(sign if sign.isprintable() else " " for sign in value)
    return f"'{text}" if text.lstrip().startswith(("=", "+", "-", "@")) else text
