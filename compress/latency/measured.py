"""The closed loop: a plan that a latency table made is exported and measured before any fine-tuning is paid for.

This file and `run.py` alone in this package know exporters and benchmarks. The pruned model is measured in turns with
the dense one, as the networks of the table were. Where the measurement misses the target by more than 3 %, the table is
corrected by the factor that the prediction was off, and the plan made anew, at most three times. A plan that is too
fast stays where no slower widths keep more importance.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import checkpoint
from compress.errors import BudgetError, SettingsError, warn
from compress.latency.plan import find_table, limit_of, place
from compress.latency.table import amount
from compress.planning import Planned, choose_widths, score
from compress.pruning.surgery import apply_plan

if TYPE_CHECKING:
    from torch import nn

    from benchmark.observe import Wanted
    from benchmark.sites import Site
    from compress.latency.table import LatencyTable
    from compress.settings import Prune

TOLERANCE = 0.03
MAX_REPLANS = 3
_ANEW = ", for a remote device after deleting the table and its points"  # of this machine benchmark.profile sees it


def plan_measured(
    model: nn.Module, settings: Prune, imgsz: int, seed: int, data: Path | None, source: str
) -> tuple[Planned, list[dict[str, Any]]]:
    """Plan for a latency, measure, and plan again until the measurement meets the target.

    Where a share of importance is asked for, the plan is measured once: a factor on all latencies makes no other widths
    the fastest.

    Args:
        source: how the user names the model.

    Returns:
        The plan whose measured latency is nearest to the target, of those that meet it within the tolerance if there
        are any; and per round its correction, what was predicted and what was measured, in the table's unit.

    Raises:
        SettingsError: there is no latency table that fits.
        BudgetError: no widths under the budget meet the target, or none does after the table was corrected and none
            measured before it does.
    """
    from benchmark import observe

    table, path = find_table(settings, imgsz, checkpoint.structure_hash(model), source)
    wanted = wanted_of(settings, imgsz, seed)
    target, correction = limit_of(settings, table), 1.0
    tried: list[tuple[Planned, dict[str, Any]]] = []
    with observe.reach(wanted) as site:
        check_machine(table, path, observe.machine(site, table.runtime))
        scored = score(model, settings, imgsz, seed, data)
        while len(tried) <= MAX_REPLANS:
            try:
                planned = choose_widths(scored, settings, imgsz, source, correction)
            except BudgetError:
                # What the corrected table rules out may have been measured within the tolerance before.
                if target is None or all(_is_slow(record, target) for _, record in tried):
                    raise
                break
            if target is not None and not _is_worth_measuring(planned, tried, target):
                break
            assert planned.prediction is not None
            predicted = planned.prediction.predicted
            measured, interval = measure(site, model, apply_plan(model, planned.plan), table, wanted)
            record = {"correction": correction, "predicted": predicted, "measured": measured, "interval": interval}
            tried.append((planned, record))
            print(
                f"prune: round {len(tried)}: predicted {amount(predicted, table.unit)}, "
                f"measured {amount(measured, table.unit)} ({measured / predicted - 1:+.1%})"
                + ("" if target is None else f", target {amount(target, table.unit)} ({measured / target - 1:+.1%})")
            )
            if target is None or abs(measured / target - 1) <= TOLERANCE:
                break
            correction *= measured / predicted
    best, used = tried[-1] if target is None else min(tried, key=lambda item: _miss(item[1], target))
    if target is not None and _is_slow(used, target):
        warn(
            f"the target of {amount(target, table.unit)} is missed: the nearest of {len(tried)} measured plans takes "
            f"{amount(used['measured'], table.unit)} ({used['measured'] / target - 1:+.1%}): ask for less, or give "
            "benchmark.profile more --variants and a new --output for a better table"
        )
    return best, [{**record, "used": record is used} for _, record in tried]


def wanted_of(settings: Prune, imgsz: int, seed: int = 0) -> Wanted:
    """Return what is measured, and how its device is reached, where a cut is asked for by latency.

    Raises:
        SettingsError: there is no such device, or it does not run the runtime.
    """
    from benchmark.observe import Wanted

    _, runtime, threads = place(settings)
    return Wanted(
        runtime,
        imgsz,
        settings.budget,
        settings.device,
        threads,
        settings.host,
        settings.python,
        settings.bootstrap,
        seed=seed,
    )


def _is_worth_measuring(planned: Planned, tried: list[tuple[Planned, dict[str, Any]]], target: float) -> bool:
    """Tell whether widths are a cut, new, and keep more importance than the last ones, where these were too fast."""
    if not tried:
        return True
    if not planned.plan.groups or any((planned.choice.widths == before.choice.widths).all() for before, _ in tried):
        return False
    last, record = tried[-1]
    assert planned.prediction is not None
    assert last.prediction is not None
    return _is_slow(record, target) or planned.prediction.loss < last.prediction.loss


def check_machine(table: LatencyTable, path: Path, machine: str | None) -> None:
    """Check that a table was made on the machine that is here now.

    Raises:
        SettingsError: it was not.
    """
    if table.machine != machine:
        raise SettingsError(f"{path} was measured on {table.machine}, this is {machine}: profile the model here{_ANEW}")


def measure(
    site: Site, dense: nn.Module, pruned: nn.Module, table: LatencyTable, wanted: Wanted
) -> tuple[float, list[float]]:
    """Return the latency of a pruned model and its 95 % interval, in the table's unit.

    It is the dense latency of the table over the speed-up measured now, so that a machine that is faster or slower
    today than on the day of the table changes nothing.
    """
    from benchmark import observe, variants

    with tempfile.TemporaryDirectory(prefix="espalier-") as folder:
        files = [
            variants.export(network, name, wanted, Path(folder), site.place)
            for name, network in (("dense", dense), ("pruned", pruned))
        ]
        point = observe.observe(site, files[0], files[1], wanted)
    found = point["record"]["version"]
    if found != table.runtime_version:
        raise SettingsError(
            f"the latency table was measured in {table.runtime} {table.runtime_version}, {found} is installed: "
            f"profile the model anew{_ANEW}"
        )
    if point["noisy"]:
        warn(
            f"this measurement is noisy, its 95 % interval is {point['interval_width']:.0%} wide: close what else "
            "runs, and look at what is measured after fine-tuning"
        )
    low, high = (table.dense / speedup for speedup in reversed(point["interval"]))
    return table.dense / point["speedup"], [low, high]


def _is_slow(record: dict[str, Any], target: float) -> bool:
    return record["measured"] > target * (1 + TOLERANCE)


def _miss(record: dict[str, Any], target: float) -> tuple[bool, float]:
    """Return what the best plan has least of: first of all it is not too slow, then it is near the target."""
    return _is_slow(record, target), abs(record["measured"] / target - 1)
