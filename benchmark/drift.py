"""Drift: how far the p50 of a file has moved since it was measured before on the same device.

An interval tells what one run saw. Between runs a machine gets warmer, its clocks change, a virtual machine has other
neighbours; only networks that take turns in one run share all of that.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import exp, log, sqrt
from pathlib import Path
from statistics import fmean, stdev

from benchmark import store as stored
from benchmark import wording
from benchmark.store import Row

TOLERANCE = 0.03  # what repeated runs on a quiet machine may differ by
_SAME = ("model_sha256", "device", "runtime", "runtime_version", "precision", "threads", "imgsz", "batch", "unit")
# 97.5 % quantiles of Student's t with 2, 3 … degrees of freedom: those of 3, 4 … runs.
_T = (4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
FEWEST, NEWEST = 3, len(_T) + 2  # runs that an expectation is made of


@dataclass(frozen=True)
class Repeats:
    """The quiet runs of one file with the same settings on the same device.

    Attributes:
        last: the newest row.
        p50s: of all runs, ms, the earliest first.
    """

    last: Row
    p50s: tuple[float, ...]


def repeats(rows: Iterable[Row]) -> list[Repeats]:
    """Return what was measured more than once: latencies in ms of files that are known, noisy runs left out.

    Args:
        rows: of the store, the earliest first.
    """
    found: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        if row.p50 and row.unit == "ms" and row.model_sha256 is not None and not row.noisy:
            found.setdefault(_identity(row), []).append(row)
    return [Repeats(same[-1], tuple(row.p50 or 0.0 for row in same)) for same in found.values() if len(same) > 1]


def next_run(p50s: Sequence[float]) -> tuple[float, float] | None:
    """Return where the p50 of one more run is expected with 95 %, ms; null from fewer than three runs.

    The prediction interval of a normal sample, over log p50: what moves a whole run, a clock or a neighbour, does so by
    a share. Only the newest runs count.

    >>> next_run([10.0, 10.0, 10.0])
    (10.0, 10.0)
    """
    values = [log(p50) for p50 in p50s[-NEWEST:]]
    if len(values) < FEWEST:
        return None
    middle, reach = fmean(values), _T[len(values) - FEWEST] * stdev(values) * sqrt(1 + 1 / len(values))
    return round(exp(middle - reach), 6), round(exp(middle + reach), 6)


def remark(ids: Sequence[int], store: Path | None = None) -> str | None:
    """Say of the latency that moved farthest since earlier runs of the same file, how far; nothing where none has.

    A p50 has moved where it differs by more than `TOLERANCE` from an earlier one, which its interval leaves out.

    Args:
        ids: rows of the store that have just been added.
        store: the store.

    Raises:
        RunError: the store cannot be read.
    """
    worst, said = TOLERANCE, None
    for row in stored.find(store, ids=ids):
        if row.p50 is None or row.low is None or row.high is None or row.unit != "ms":
            continue
        before = [other.p50 for other in _earlier(row, store) if other.p50]
        outside = [p50 for p50 in before if not row.low <= p50 <= row.high]
        moved = max((abs(row.p50 / p50 - 1) for p50 in outside), default=0.0)
        if moved > worst:
            worst, said = moved, _say(row, before)
    return said


def _earlier(row: Row, store: Path | None) -> list[Row]:
    if row.model_sha256 is None:  # which would ask for the rows of all files
        return []
    rows = stored.find(store, model_sha256=row.model_sha256)
    same = [other for other in rows if _identity(other) == _identity(row)]
    return [other for other in same if other.record < row.record and not other.noisy]


def _identity(row: Row) -> tuple[object, ...]:
    """Return what makes two rows repeats of each other."""
    return tuple(getattr(row, name) for name in _SAME)


def _say(row: Row, before: Sequence[float]) -> str:
    least, most = (wording.cost(value, "ms") for value in (min(before), max(before)))
    span = least if len(before) == 1 else f"{least} to {most}"
    runs = "an earlier run" if len(before) == 1 else f"{len(before)} earlier runs"
    now = wording.cost(row.p50, "ms")
    return (
        f"{row.model} on {row.runtime}: {runs} of this file had a p50 of {span}, this one {now}: "
        "the machine drifts by more than intervals tell (benchmark.history repeats), "
        "compare only what is measured in one run"
    )
