"""From a latency target to widths: find the table, solve, and say how good the answer is or why there is none."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.devices import load_device
from compress.errors import BudgetError, SettingsError
from compress.latency import solver
from compress.latency import table as latency_table
from compress.latency.memory import memory_of
from compress.pruning.budget import Choice, keep_best

if TYPE_CHECKING:
    from compress.channels.graph import Graph
    from compress.devices import Device
    from compress.latency.table import Latency, LatencyTable
    from compress.settings import Budget, Prune

UNITS = {"ms": ("ms", 1.0), "M": ("instructions", 1e6)}


@dataclass(frozen=True)
class Prediction:
    """What a table says about a plan.

    Attributes:
        unit: of dense, target and predicted.
        dense: measured, when the table was made.
        kept: geometric mean, over the groups that may be cut, of the share of importance that stays.
        loss: Σ -log of that share over all groups, which was minimised.
        bound: no widths within the target lose less, as far as the table is right.
        gap: share of the loss that is above the bound.
        correction: factor on the table from measurements of earlier plans.
        table: path of the table.
        table_sha256: hash of its content.
        memory_bytes: weights, and activations at the peak, see `memory`.
    """

    unit: str
    dense: float
    target: float
    predicted: float
    kept: float
    loss: float
    bound: float
    gap: float
    correction: float
    table: str
    table_sha256: str
    memory_bytes: int

    def metrics(self) -> dict[str, Any]:
        """Return everything as JSON holds it."""
        return asdict(self)


def find_table(settings: Prune, imgsz: int, structure: str, model: str = "MODEL") -> tuple[LatencyTable, Path]:
    """Return the latency table that the settings name or imply, and its path.

    Args:
        structure: hash of the dense model.
        model: how the user names the model, for the command that makes a missing table.

    Raises:
        SettingsError: it is missing (the message is the command that makes it), damaged, or of something else.
    """
    device, runtime, threads = place(settings)
    path = (
        Path(settings.table)
        if settings.table
        else latency_table.default_path(device.name, runtime, threads, imgsz, structure, settings.budget)
    )
    if not path.exists():
        raise SettingsError(
            f"no latency table {path}: make it with python -m benchmark.profile --model {model} "
            f"--device {settings.device} --runtime {runtime} --imgsz {imgsz} --threads {threads} "
            f"{_rules(settings.budget)}"
            + (f" --host {settings.host}" if settings.host else "")
            + (f" --output {path}" if settings.table else "")
        )
    table = latency_table.load_table(path)
    wanted = {
        "device": device.name,
        "runtime": runtime,
        "threads": threads,
        "imgsz": imgsz,
        "precision": device.precision_of(runtime),
        "structure": structure,
    }
    latency_table.check_fits(table, wanted, path)
    return table, path


def place(settings: Prune) -> tuple[Device, str, int]:
    """Return device, runtime and threads that are meant: the device's own where the settings name none."""
    device = load_device(settings.device)
    return device, settings.runtime or device.runtimes[0], settings.threads or device.threads


def memory_limit(settings: Prune) -> float | None:
    """Return the bytes that are asked for, if any.

    >>> from compress.settings import Prune
    >>> memory_limit(Prune(speedup=2.0, memory="8MB")), memory_limit(Prune(speedup=2.0, memory="1 MiB"))
    (8000000.0, 1048576.0)
    """
    if settings.memory is None:
        return None
    number = settings.memory.rstrip("kMGiB ")
    unit = settings.memory.removeprefix(number).strip()
    base = 1024.0 if "i" in unit else 1000.0
    return float(number) * base ** ("kMG".index(unit[0]) + 1)


def limit_of(settings: Prune, table: LatencyTable) -> float:
    """Return the latency that is asked for, in the table's unit.

    Raises:
        SettingsError: it is asked for in another unit, or is not below the dense latency.
    """
    if settings.speedup is not None:
        return table.dense / settings.speedup
    assert settings.latency is not None
    name = settings.latency.lstrip("0123456789. ")
    unit, factor = UNITS[name]
    if unit != table.unit:
        raise SettingsError(f"latency {settings.latency} is in {unit}, the table of {table.device} is in {table.unit}")
    limit = float(settings.latency.removesuffix(name)) * factor
    if limit >= table.dense:
        dense = latency_table.amount(table.dense, unit)
        raise SettingsError(f"latency {settings.latency} is not below that of the dense model, {dense}: ask for less")
    return limit


def choose_by_latency(
    graph: Graph, scores: list[np.ndarray], settings: Prune, table: LatencyTable, path: Path, correction: float = 1.0
) -> tuple[Choice, Prediction]:
    """Choose widths that keep the most importance within a latency.

    Args:
        scores: importance per group, arrays of shape (width,).
        correction: factor on all that the table says.

    Raises:
        SettingsError: the budget allows widths that the table was not measured at.
        BudgetError: the target cannot be reached; the message says what can be, and what stands in the way.
    """
    latency_table.check_widths(graph, table, settings.budget)
    latency = latency_table.evaluate(table, graph)
    memory, most = memory_of(graph, 2 if table.precision == "fp16" else 4), memory_limit(settings)
    problem = solver.build_problem(graph, settings.budget, scores, latency, memory, most)
    target = limit_of(settings, table)
    found = solver.least_loss(problem, target / correction)
    if found is None:
        least = problem.widths(np.array([parts.size - 1 for parts in problem.parts]))
        if most is not None and float(latency(least)) * correction <= target:
            raise BudgetError(
                f"no widths within the latency need at most {settings.memory} of memory: all at their least need "
                f"{memory(least) / 1e6:.4g} MB (weights, and activations at the peak); ask for more, or a smaller imgsz"
            )
        raise _infeasible(problem, latency, target, table, correction, settings.budget)
    choice = keep_best(graph, scores, found.widths, settings.budget, "best under the latency")
    cut_groups = sum(len(tie.units) for tie in problem.ties)
    prediction = Prediction(
        unit=table.unit,
        dense=table.dense,
        target=target,
        predicted=found.cost * correction,
        kept=found.kept(cut_groups),
        loss=found.loss,
        bound=found.bound,
        gap=found.gap,
        correction=correction,
        table=str(path),
        table_sha256=table.sha256,
        memory_bytes=int(memory(found.widths)),
    )
    return choice, prediction


def _infeasible(
    problem: solver.Problem,
    latency: Latency,
    target: float,
    table: LatencyTable,
    correction: float,
    budget: Budget,
) -> BudgetError:
    widths = problem.widths(solver.cheapest(problem))
    least = float(latency(widths)) * correction
    left = latency.per_segment(widths)
    largest = [table.segments[i].tensor or table.segments[i].name for i in np.argsort(-left)[:3]]
    names = ", ".join(name.removesuffix(".weight").removesuffix(".conv") for name in largest)
    return BudgetError(
        f"the budget cannot bring the latency down to {latency_table.amount(target, table.unit)}: "
        f"{latency_table.amount(least, table.unit)} ({table.dense / least:.2f}×) is reachable with "
        f"multiples of {budget.multiple_of}, min_width {budget.min_width}, max_removed {budget.max_removed:g}; "
        f"most of it is left in {names}; "
        "ask for more time, a smaller imgsz, or loosen the budget"
    )


def _rules(budget: Budget) -> str:
    if budget.rules:
        return "--budget FILE (that of this plan)"
    power = "--power-of-two " if budget.power_of_two else ""
    return (
        f"{power}--multiple-of {budget.multiple_of} --min-width {budget.min_width} --max-removed {budget.max_removed:g}"
    )
