"""How cells take turns: warm-up, bursts in an order that is shuffled anew each round, and when there are enough.

Whatever the device does meanwhile so meets all cells alike. No query of a burst is dropped for being slow.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from benchmark import statistics
from benchmark.latency_record import Cell
from compress.errors import EspalierError

Show = Callable[[str, float], None]  # what is being done, and the share that is done
WINDOW_S = 0.1
WARM_UP_CAP_S = 10.0
MIN_BURST = 5
# Another cell has just used the caches: the first queries of a burst bring them back and are not counted.
LEAD_IN = 2
COUNTED = 3  # queries of a cell where instructions are counted: they repeat to 0.1 %


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


def time_cells(cells: list[Cell], plan: Mode, seed: int, show: Show) -> list[list[int]]:
    """Warm all cells up, then measure them in turns; return the order of each round."""
    for cell in cells:
        show(f"warm up {cell.name}", 0.0)
        _warm_up(cell, plan)
    order: list[list[int]] = []
    generator = random.Random(seed)
    while (done := min(cell.progress(plan.min_queries, plan.min_seconds) for cell in cells)) < 1.0:
        show("latency", done)
        order.append(generator.sample(range(len(cells)), len(cells)))
        for index in order[-1]:
            cell = cells[index]
            cell.rounds.append(cell.query(cell.burst, LEAD_IN))
    return order


def count_cells(cells: list[Cell], seed: int, show: Show) -> list[list[int]]:
    """Count the instructions of all cells in turns; return the order of each round. The checks were the warm-up."""
    generator = random.Random(seed)
    order = [generator.sample(range(len(cells)), len(cells)) for _ in range(COUNTED)]
    for number, turn in enumerate(order):
        for place, index in enumerate(turn):
            show("instructions", (number + place / len(cells)) / COUNTED)
            cells[index].rounds.append(cells[index].query(1))
    return order


@contextmanager
def kept_busy(cell: Cell) -> Iterator[None]:
    """Let a cell run queries that do not count, until the block ends: there clocks and power are read under load.

    Raises:
        BenchmarkError, DeviceError: it fails meanwhile.
    """
    done, failures = threading.Event(), []

    def run() -> None:
        try:
            while not done.is_set():
                cell.worker.ask({"queries": cell.burst})
        except EspalierError as error:
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
    thread.join()
    if failures:
        raise failures[0]


def timed_protocol(plan: Mode) -> dict[str, Any]:
    """Return what a record says of `time_cells`."""
    return {
        "min_queries": plan.min_queries,
        "min_seconds": plan.min_seconds,
        "burst_s": plan.burst_s,
        "lead_in_queries": LEAD_IN,
        "timed": "inference only, clock of the device's own processor",
    }


def counted_protocol() -> dict[str, Any]:
    """Return what a record says of `count_cells`."""
    return {"min_queries": COUNTED, "counted": "instructions of the inference, on an emulated processor"}


def _warm_up(cell: Cell, mode: Mode) -> None:
    """Run windows of queries until their medians stay within 3 %, or until the cap; then set the length of a burst."""
    window, queries, medians = MIN_BURST, 0, []
    began = time.monotonic()
    while True:
        samples = cell.query(window)
        queries += window
        median_ms = sorted(samples)[len(samples) // 2]
        window = max(MIN_BURST, round(WINDOW_S * 1000 / median_ms))
        medians.append(median_ms)
        plateau = statistics.on_plateau(medians)
        seconds = time.monotonic() - began
        if plateau or (seconds >= WARM_UP_CAP_S and len(medians) >= statistics.PLATEAU_WINDOWS):
            break
    cell.energies_uj.clear()
    cell.warm_up = {"queries": queries, "seconds": round(seconds, 2), "plateau": plateau}
    cell.burst = max(MIN_BURST, round(mode.burst_s * 1000 / medians[-1]))
