"""What a latency measurement leaves behind: cells, comparisons, reasons for doubt, and the table of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from benchmark import runtimes, statistics, wording
from benchmark.cell import Worker
from compress.errors import printable
from compress.tasks import SCORE_NAMES

MAX_DRIFT = 0.1
MAX_OTHERS = 0.1
MAX_SPREAD = 0.001
INSTRUCTIONS = "instructions"


@dataclass
class Cell:
    """One model file on one runtime, and what was measured of it."""

    model: str
    runtime: str
    path: Path
    worker: Worker
    ready: dict[str, Any]
    warm_up: dict[str, Any] = field(default_factory=dict)
    burst: int = 1
    rounds: list[list[float]] = field(default_factory=list)
    unit: str = "ms"
    batch: int = 1
    others: list[Worker] = field(default_factory=list)
    energies_uj: list[float | None] = field(default_factory=list)
    profile: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"{self.model} on {self.runtime}" + (f", batch {self.batch}" if self.batch != 1 else "")

    @property
    def key(self) -> str:
        """Where a worker's answer has the cost of its queries."""
        return "instructions" if self.unit == INSTRUCTIONS else "samples_ms"

    @property
    def streams(self) -> int:
        """How many workers run it at the same time."""
        return 1 + len(self.others)

    def query(self, count: int, lead_in: int = 0) -> list[float]:
        """Return what so many queries took, in the cell's unit, one stream behind the other.

        Those of the lead-in come first in each stream and are left out.
        """
        workers = [self.worker, *self.others]
        for worker in workers:
            worker.request({"queries": lead_in + count})
        answers = [worker.receive()[0] for worker in workers]
        # The machine's energy is that of all streams.
        energy = answers[0].get("energy_uj")
        self.energies_uj.append(None if energy is None else energy / (len(workers) * (lead_in + count)))
        return [sample for answer in answers for sample in answer[self.key][lead_in:]]

    def finish(self) -> dict[str, Any]:
        """End all workers and return what they cost together."""
        costs = [worker.finish() for worker in (self.worker, *self.others)]
        peaks = [cost["peak_memory_bytes"] for cost in costs]
        return {
            "cpu_s": sum(cost["cpu_s"] for cost in costs),
            "peak_memory_bytes": None if None in peaks else sum(peaks),
        }

    def progress(self, min_queries: int, min_seconds: float) -> float:
        """Return the share of the required queries and seconds that is measured."""
        queries = sum(map(len, self.rounds))
        seconds = sum(map(sum, self.rounds)) / 1000 / self.streams
        return min(queries / min_queries, seconds / min_seconds, 1.0)


def cell_record(cell: Cell, cost: dict[str, Any], threads: int, imgsz: int, seed: int) -> dict[str, Any]:
    """Return all that was measured of a cell; one whose unit is instructions has no time in it."""
    facts = cell.ready["facts"]
    return {
        "model": cell.model,
        "runtime": cell.runtime,
        "runtime_version": facts.get("version"),
        "precision": facts.get("precision"),
        "precision_executed": facts.get("precision_executed"),
        "providers": facts.get("providers"),
        "memory_format": facts.get("memory_format"),
        "huge_page_bytes": facts.get("huge_page_bytes"),
        "file": cell.path.name,
        "file_bytes": runtimes.size_bytes(cell.path),
        "model_sha256": runtimes.sha256(cell.path),
        "threads": threads,
        "imgsz": imgsz,
        "batch": cell.batch,
        "streams": cell.streams,
        "output_shapes": cell.ready["output_shapes"],
        "unit": cell.unit,
        "queries": sum(map(len, cell.rounds)),
        **(_counted(cell) if cell.unit == INSTRUCTIONS else _timed(cell, seed)),
        "peak_memory_bytes": cost["peak_memory_bytes"],
        "accuracy": None,
        **cell.profile,
    }


def profile(cell: Cell, worker: Worker, lead_in: int) -> dict[str, Any]:
    """Return the cost of each layer, which share of a query they are together, and what is left out of them.

    The query is timed here too, just before: of one stream, in the same process and minute. The share may be above 1,
    because a profiled run is slower. Nothing where the runtime has no profiler.

    Args:
        cell: after all its queries.
        worker: another one, which runs the same model.
        lead_in: queries that do not count.
    """
    samples = worker.ask({"queries": lead_in + cell.burst})[0][cell.key][lead_in:]
    found, _ = worker.ask({"layers": True})
    if not found["layers"]:
        return {}
    total = sum(layer[cell.unit] for layer in found["layers"])
    return {
        "layers": found["layers"],
        "layers_share": round(total / median(samples), 4),
        "layers_left_out": found["left_out"],
    }


def _counted(cell: Cell) -> dict[str, Any]:
    return {"instructions": [int(count) for counts in cell.rounds for count in counts]}


def _timed(cell: Cell, seed: int) -> dict[str, Any]:
    values, intervals = statistics.summarise(cell.rounds, seed)
    return {
        **{name: round(value, 4) for name, value in values.items()},
        "intervals": {name: [round(value, 4) for value in interval] for name, interval in intervals.items()},
        "seconds": round(seconds := sum(map(sum, cell.rounds)) / 1000 / cell.streams, 2),
        # While all streams run: one that has ended its burst no longer slows the others down, for an instant.
        "images_per_second": round(cell.batch * sum(map(len, cell.rounds)) / seconds, 2),
        "energy_mj_per_query": _energy_mj(cell),
        "warm_up": cell.warm_up,
        "drift": None if (change := statistics.drift(cell.rounds)) is None else round(change, 4),
        "load_ms": cell.ready["load_ms"],
        "cold_start_ms": cell.ready["cold_start_ms"],
        "samples_ms": cell.rounds,
    }


def _energy_mj(cell: Cell) -> float | None:
    """Return the energy of a query, of the whole machine meanwhile; null where it is not known of every burst."""
    known = [value for value in cell.energies_uj if value is not None]
    return round(sum(known) / len(known) / 1000, 3) if known and len(known) == len(cell.energies_uj) else None


def compare(cells: list[Cell], seed: int) -> list[dict[str, Any]]:
    """Compare every model with the first one that was measured on the same runtime and batch."""
    baselines: dict[tuple[str, int], Cell] = {}
    comparisons = []
    for cell in cells:
        baseline = baselines.setdefault((cell.runtime, cell.batch), cell)
        if baseline is cell:
            continue
        ratio, interval = statistics.speedup(baseline.rounds, cell.rounds, seed)
        comparisons.append(
            {
                "runtime": cell.runtime,
                "baseline": baseline.model,
                "model": cell.model,
                "batch": cell.batch,
                "streams": cell.streams,
                "unit": cell.unit,
                "speedup": round(ratio, 4),
                "interval": [round(value, 4) for value in interval],
            }
        )
    return comparisons


def others_cores(before_s: float | None, after_s: float | None, own_s: float, elapsed_s: float) -> float | None:
    """Return how many cores other processes kept busy on average; null where the kernel does not tell.

    Better than the load average, which still remembers the training that ran before.
    """
    if before_s is None or after_s is None or after_s == before_s:
        return None
    return round(max(after_s - before_s - own_s, 0.0) / elapsed_s, 3)


def noise(
    cells: list[Cell],
    before: dict[str, Any],
    after: dict[str, Any],
    others: float | None,
    cores: int | None,
    throttling: list[str] | None = None,
) -> list[str]:
    """Return why this measurement cannot be fully trusted; `throttling` is what the device itself says."""
    if cells[0].unit == INSTRUCTIONS:
        return [reason for cell in cells if (reason := _spread(cell))]
    reasons = list(throttling or [])
    if others is not None and others > MAX_OTHERS * (cores or 1):
        reasons.append(f"other processes kept {others:.2f} of {cores or 1} cores busy")
    if None not in (before["throttle_count"], after["throttle_count"]):
        events = after["throttle_count"] - before["throttle_count"]
        if events > 0:
            reasons.append(f"the CPU throttled {events} times")
    for cell in cells:
        name = cell.name
        if not cell.warm_up["plateau"]:
            reasons.append(f"{name} reached no plateau in {cell.warm_up['seconds']:g} s of warm-up")
        change = (statistics.drift(cell.rounds) or 1.0) - 1.0
        if abs(change) > MAX_DRIFT:
            reasons.append(f"{name} changed by {change:+.0%} from its first to its last third")
    return reasons


def _spread(cell: Cell) -> str | None:
    counts = [count for counts in cell.rounds for count in counts]
    spread = max(counts) / min(counts) - 1.0
    if spread <= MAX_SPREAD:
        return None
    return f"{cell.model} on {cell.runtime} took up to {spread:.2%} more instructions from query to query"


def print_table(record: dict[str, Any]) -> None:
    """Print a record, a line for each cell, and why it may be doubted."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    protocol, cells = record["protocol"], record["cells"]
    ratios = {
        (c["model"], c["runtime"], c.get("batch", 1)): f"{c['speedup']:.2f}× ({wording.interval(c['interval'])})"
        for c in record["comparisons"]
    }
    counted = cells[0]["unit"] == INSTRUCTIONS
    what, better = (INSTRUCTIONS, "fewer by (95 %)") if counted else ("latency", "speed-up (95 %)")
    title = f"{what} on {protocol['device']} at {protocol['imgsz']} px, threads: {protocol['threads']}"
    if protocol.get("streams", 1) != 1:
        title += f", streams: {protocol['streams']}"
    table = Table(title=f"{title} ({protocol['label']})", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    with_batch = any(cell["batch"] != 1 for cell in cells)
    with_rate = not counted and (with_batch or protocol.get("streams", 1) != 1)
    for name in ("model", "runtime", *(["batch"] if with_batch else [])):
        table.add_column(name, overflow="fold")
    scored = [name for name in SCORE_NAMES if any(name in (cell["accuracy"] or {}) for cell in cells)]
    columns = (
        ("M instructions",) if counted else ("p50 ms (95 %)", "p90 ms", "p99 ms", *(["images/s"] if with_rate else []))
    )
    for name in (*columns, better, *(SCORE_NAMES[name] for name in scored)):
        table.add_column(name, justify="right", no_wrap=True)
    for cell in cells:
        table.add_row(
            escape(printable(cell["model"])),
            cell["runtime"],
            *([str(cell["batch"])] if with_batch else []),
            *_values(cell),
            *([f"{cell['images_per_second']:.1f}"] if with_rate else []),
            ratios.get((cell["model"], cell["runtime"], cell["batch"]), ""),
            *("" if name not in (cell["accuracy"] or {}) else f"{cell['accuracy'][name]:.4f}" for name in scored),
        )
    console = Console()
    console.print(table)
    if doubt := noise_remark(record):
        print(printable(doubt))


def noise_remark(record: dict[str, Any]) -> str | None:
    """Return in a sentence why a record is noisy and what to do, or null where it is not."""
    if not record.get("noisy"):
        return None
    reasons = "; ".join(record.get("noise") or ["no reason given"])
    return f"the measurement is noisy ({reasons}): end what else runs there, and run the same command again"


def _values(cell: dict[str, Any]) -> list[str]:
    if cell["unit"] == INSTRUCTIONS:
        return [f"{median(cell['instructions']) / 1e6:.2f}"]
    return [
        f"{wording.ms(cell['p50_ms'])} ({wording.interval_ms(cell['intervals']['p50_ms'])})",
        wording.ms(cell["p90_ms"]),
        wording.ms(cell["p99_ms"]),
    ]
