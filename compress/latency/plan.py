"""From a latency target to widths: find the table, solve, and say how good the answer is or why there is none."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.devices import check_runtime, load_device
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
        target: the latency that was asked for; None where a share of importance was.
        kept: geometric mean, over the groups that may be cut, of the share of importance that stays.
        loss: Σ -log of that share over all groups.
        bound: of the loss, which no widths within the target have less of, as far as the table is right; where a share
            of importance was asked for, of the latency.
        gap: share of the loss, or of the latency, that is above the bound.
        correction: factor on the table from measurements of earlier plans.
        table: path of the table.
        table_sha256: hash of its content.
        memory_bytes: weights, and activations at the peak, see `memory`.
    """

    unit: str
    dense: float
    target: float | None
    predicted: float
    kept: float
    loss: float
    bound: float
    gap: float
    correction: float
    table: str
    table_sha256: str
    memory_bytes: int
    keep_importance: float | None = None

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
            + (f" --python {settings.python}" if settings.python else "")
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
    """Return device, runtime and threads that are meant: the device's own where the settings name none.

    Raises:
        SettingsError: there is no such device, or it does not run the runtime.
    """
    device = load_device(settings.device)
    runtime = settings.runtime or device.runtimes[0]
    check_runtime(device, runtime)
    return device, runtime, settings.threads or device.threads


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


def limit_of(settings: Prune, table: LatencyTable) -> float | None:
    """Return the latency that is asked for, in the table's unit; None where a share of importance is.

    Raises:
        SettingsError: it is asked for in another unit, or is not below the dense latency.
    """
    if settings.keep_importance is not None:
        return None
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
    """Choose widths that keep the most importance within a latency, or the fastest that keep enough of it.

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
    target, cut_groups = limit_of(settings, table), sum(len(tie.units) for tie in problem.ties)
    if target is None:
        found, why = _fastest(problem, settings, cut_groups), "fastest that keeps enough"
    else:
        found, why = solver.least_loss(problem, target / correction), "best under the latency"
    if found is None:
        least = problem.widths(np.array([parts.size - 1 for parts in problem.parts]))
        if target is None or float(problem.cost(solver.cheapest(problem))) * correction <= target:
            raise BudgetError(
                f"no widths {'that keep so much' if target is None else 'within the latency'} need at most "
                f"{settings.memory} of memory: all at their least need {memory(least) / 1e6:.4g} MB (weights, and "
                "activations at the peak); ask for more, or a smaller imgsz"
            )
        raise _infeasible(problem, latency, target, table, correction, settings.budget)
    choice = keep_best(graph, scores, found.widths, settings.budget, why)
    prediction = Prediction(
        unit=table.unit,
        dense=table.dense,
        target=target,
        predicted=found.cost * correction,
        kept=found.kept(cut_groups),
        loss=found.loss,
        bound=found.bound * (correction if target is None else 1.0),
        gap=found.gap,
        correction=correction,
        table=str(path),
        table_sha256=table.sha256,
        memory_bytes=int(memory(found.widths)),
        keep_importance=settings.keep_importance,
    )
    return choice, prediction


def _fastest(problem: solver.Problem, settings: Prune, groups: int) -> solver.Solution | None:
    """Return the fastest widths that keep the share of importance asked for; None where memory allows none.

    Raises:
        BudgetError: only the uncut model keeps so much.
    """
    share = settings.keep_importance
    assert share is not None
    found = solver.least_cost(problem, -groups * float(np.log(share)))
    if found is not None and (found.widths == problem.widths(np.zeros(len(problem.parts), np.int64))).all():
        most = float(np.exp(-min(float(loss[1]) for loss in problem.loss) / groups))
        raise BudgetError(
            f"no faster widths that the budget allows keep {share:.2%} of the importance, the smallest cut keeps "
            f"{most:.2%}: lower keep_importance, or loosen the budget"
        )
    return found


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
