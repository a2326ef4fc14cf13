"""History: what the store holds, two of its rows side by side, and what became worse over time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmark import drift, wording
from benchmark import store as stored
from benchmark.store import Row
from compress.errors import RunError, SettingsError, printable, run_app

TOLERANCE = 0.03
MAP_TOLERANCE = 0.005
# What makes rows one series: a deployment goes by its name and its settings. The file is not in it, nor the version of
# the runtime: that new weights, other widths or an update made it slower is worth knowing.
_SERIES = ("kind", "model", "device", "runtime", "precision", "threads", "imgsz", "batch", "unit", "metric")
# Training leaves the size of a file as it is, but for names and dates in it; other widths do not.
_SAME_SIZE = 0.01
_DATA = ("data_sha256", "split")


@dataclass(frozen=True)
class Regression:
    """The newest row of a series that is worse than the best one before it."""

    row: Row
    best: Row


def series(rows: Iterable[Row]) -> list[list[Row]]:
    """Return rows of the same name, device, runtime and settings together, each series in the order of the rows."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(getattr(row, name) for name in (*_SERIES, *_DATA)), []).append(row)
    return list(found.values())


def regressions(
    rows: Sequence[Row], tolerance: float = TOLERANCE, map_tolerance: float = MAP_TOLERANCE
) -> list[Regression]:
    """Return what became worse: the newest row of each series, where it is clearly worse than the best earlier one.

    A latency is clearly worse where its whole interval lies above the best p50 by more than `tolerance`, a share of
    it; a score where it lies below the best one by more than `map_tolerance`.

    Args:
        rows: of the store, the earliest first.
        tolerance: by which a latency may grow, as a share.
        map_tolerance: by which a score may fall.
    """
    found = []
    for *earlier, newest in series(rows):
        if not earlier:
            continue
        if newest.kind == "latency":
            best = min(earlier, key=lambda row: _or(row.p50, math.inf))
            least = newest.p50 if newest.low is None else newest.low
            worse = _or(least, 0.0) > _or(best.p50, math.inf) * (1 + tolerance)
        else:
            best = max(earlier, key=lambda row: _or(row.score, 0.0))
            worse = _or(newest.score, 1.0) < _or(best.score, 0.0) - map_tolerance
        if worse:
            found.append(Regression(newest, best))
    return found


def differences(first: Row, second: Row) -> list[tuple[str, str, str]]:
    """Return (name, first, second) of all that differs between two rows, but their places in the store."""
    rows = ((name, getattr(first, name), getattr(second, name)) for name in vars(first))
    return [
        (name, wording.known(one), wording.known(other))
        for name, one, other in rows
        if name not in ("id", "record", "cell") and one != other
    ]


def cost(row: Row) -> str:
    """Return the p50 of a latency row with its unit and interval; nothing for a score."""
    if row.p50 is None:
        return ""
    value = wording.cost(row.p50, row.unit)
    if row.unit != "ms" or row.low is None or row.high is None:
        return value
    return f"{value} ({wording.interval_ms((row.low, row.high))})"


def _or(value: float | None, other: float) -> float:
    return other if value is None else value


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, invoke_without_command=True)
Store = Annotated[Path | None, typer.Option(help=f"the store; ${stored.VARIABLE} or runs/{stored.NAME} when not given")]


@app.callback()
def main(
    context: typer.Context,
    model: Annotated[str | None, typer.Option(help="part of the model's name")] = None,
    device: Annotated[str | None, typer.Option(help="part of the device's name")] = None,
    runtime: Annotated[str | None, typer.Option(help="name of the runtime")] = None,
    since: Annotated[str | None, typer.Option(help="a date, such as 2026-11-01, or a time, UTC")] = None,
    store: Store = None,
) -> None:
    """List what was measured, the earliest first."""
    context.obj = store
    if context.invoked_subcommand is not None:
        filters = {"--model": model, "--device": device, "--runtime": runtime, "--since": since}
        if given := [name for name, value in filters.items() if value is not None]:
            raise SettingsError(f"{', '.join(given)} is of the list, not of {context.invoked_subcommand}: leave it out")
        return
    rows = stored.find(store, model=model, device=device, runtime=runtime, since=_time(since))
    if not rows:
        print("history: nothing that fits")
        return
    for place in dict.fromkeys(row.device for row in rows):
        shown = [
            [
                str(row.id),
                row.time[: len("2026-11-25T12:00")].replace("T", " "),
                row.model,
                row.runtime or "",
                ", ".join(_settings(row)),
                (cost(row) if row.score is None else f"{row.metric} {row.score:.4f}") + (" noisy" if row.noisy else ""),
            ]
            for row in rows
            if row.device == place
        ]
        _print(["id", "UTC", "model", "runtime", "settings", "p50 (95 %) or score"], shown, place or "no device noted")


@app.command()
def diff(
    context: typer.Context,
    first: Annotated[int, typer.Argument(metavar="ID", help="as the list shows it")],
    second: Annotated[int, typer.Argument(metavar="ID")],
    store: Store = None,
) -> None:
    """Show in what two rows differ."""
    store = store or context.obj
    one, other = (_row(number, store) for number in (first, second))
    if one.kind != other.kind:
        raise SettingsError(f"row {first} is of {one.kind}, row {second} of {other.kind}: name two of one kind")
    _print(["", str(first), str(second)], [list(row) for row in differences(one, other)])
    if one.p50 and other.p50 and one.unit == other.unit:
        print(f"p50 of {second} is {other.p50 / one.p50:.3f} times that of {first}")
    if one.score is not None and other.score is not None and one.metric == other.metric:
        print(f"{one.metric} of {second} is {other.score - one.score:+.4f} from that of {first}")


@app.command()
def check(
    context: typer.Context,
    latest: Annotated[bool, typer.Option("--latest", help="judge only the last latencies and the last scores")] = False,
    tolerance: Annotated[float, typer.Option(min=0, help="share by which a latency may grow")] = TOLERANCE,
    map_tolerance: Annotated[float, typer.Option(min=0, help="by which a score may fall")] = MAP_TOLERANCE,
    store: Store = None,
) -> None:
    """Exit with 1 if the newest measurement of anything is clearly worse than the best one before it."""
    rows = stored.find(store or context.obj)
    # Of each kind: one command may leave two records, latencies and scores.
    last = {kind: max(row.record for row in rows if row.kind == kind) for kind in {row.kind for row in rows}}
    judged = [g for g in series(rows) if len(g) > 1 and not (latest and g[-1].record != last[g[-1].kind])]
    found = regressions([row for group in judged for row in group], tolerance, map_tolerance)
    for item in found:
        print(printable(_complaint(item)))
    if found:
        raise typer.Exit(1)
    print(f"history: no regression in {len(judged)} series that were measured before")


@app.command()
def repeats(context: typer.Context, store: Store = None) -> None:
    """Show how far quiet runs of the same file are apart, and where one more is expected: intervals do not tell."""
    found = drift.repeats(stored.find(store or context.obj))
    if not found:
        print("history: no file was measured twice with the same settings on a quiet device")
        return
    for place in dict.fromkeys(item.last.device for item in found):
        shown = [_spread(item) for item in found if item.last.device == place]
        columns = ["model", "runtime", "settings", "runs", "p50", "spread", "next p50 (95 %)"]
        _print(columns, shown, place or "no device noted")


@app.command()
def add(
    context: typer.Context,
    record: Annotated[list[Path], typer.Argument(metavar="RECORD", help="latency.json or accuracy.json")],
    run: Annotated[str | None, typer.Option(help="goes before the names of the models, such as 'bccd'")] = None,
    store: Store = None,
) -> None:
    """Put records into the store; one that is there already stays as it is."""
    for path in record:
        ids = stored.add(path, store or context.obj, prefix="" if run is None else f"{run}/")
        print(f"history: {path} is kept as {', '.join(map(str, ids)) or 'a record without a known metric'}")


def _spread(item: drift.Repeats) -> list[str]:
    row, least, most = item.last, min(item.p50s), max(item.p50s)
    expected = drift.next_run(item.p50s)
    return [
        row.model,
        row.runtime or "",
        ", ".join(_settings(row)),
        str(len(item.p50s)),
        wording.interval_ms((least, most)),
        f"{most / least - 1:.1%}",
        f"needs {drift.FEWEST} runs" if expected is None else wording.interval_ms(expected),
    ]


def _complaint(item: Regression) -> str:
    row, best = item.row, item.best
    name = ", ".join([f"{row.model} on {row.runtime}", *_settings(row), *filter(None, [row.device])])
    doubt = "; it was noisy" if row.noisy else ""
    if row.kind == "latency":
        ratio = _or(row.p50, 0.0) / _or(best.p50, 1.0)
        change = f"p50 {cost(row)} is {ratio:.2f} times the best before, {cost(best)}"
    else:
        change = f"{row.metric} {row.score:.4f} is below the best before, {best.score:.4f}"
    versions = (
        "" if row.runtime_version == best.runtime_version else f"; {best.runtime_version} → {row.runtime_version}"
    )
    return f"regression: {name}: {change} (rows {best.id} and {row.id}{versions}{_other_model(row, best)}{doubt})"


def _other_model(row: Row, best: Row) -> str:
    """Say so where two rows of one name can be no trainings of the same model."""
    if not row.file_bytes or not best.file_bytes or abs(row.file_bytes / best.file_bytes - 1) <= _SAME_SIZE:
        return ""
    sizes = " → ".join(wording.size(item.file_bytes, "B") for item in (best, row))
    return f"; another model under this name, {sizes}: name its file otherwise if it is no successor"


def _settings(row: Row) -> list[str]:
    threads = None if row.threads is None else "1 thread" if row.threads == 1 else f"{row.threads} threads"
    batch = f"batch {row.batch}" if (row.batch or 1) != 1 else None
    data = " ".join(filter(None, (row.data, row.split))) or None
    return [part for part in (row.precision, threads, row.imgsz and f"{row.imgsz} px", batch, row.mode, data) if part]


def _row(number: int, store: Path | None) -> Row:
    rows = stored.find(store, ids=[number])
    if not rows:
        raise RunError(f"the store has no row {number}: python -m benchmark.history lists them")
    return rows[0]


def _time(text: str | None) -> datetime | None:
    try:
        return None if text is None else stored.utc(datetime.fromisoformat(text))
    except (ValueError, OverflowError):
        raise SettingsError(f"--since '{text}' is not a date: write it as 2026-11-01 or 2026-11-01T12:00") from None


def _print(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    heading = None if title is None else Text(printable(title))
    table = Table(title=heading, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in columns:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    Console().print(table)


if __name__ == "__main__":
    run_app(app)
