"""Iterative pruning: sparsify → prune → fine-tune, again and again, each round from what the last one left.

The target is approached in equal ratios: with N rounds, round i comes down to target^(i/N) of the dense model. What a
budget says about shares and widths holds for the dense model, not for each round anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import checkpoint, manifest
from compress.errors import BudgetError
from compress.finetune import finetune
from compress.planning import plan_pruning
from compress.prune import prune
from compress.sparsify import sparsify
from compress.tasks import SCORE_NAMES, metric_of

if TYPE_CHECKING:
    from compress.channels.graph import Graph
    from compress.settings import Budget, Prune, Run
    from compress.train import Common

ROUNDS = "rounds.json"


@dataclass(frozen=True)
class Round:
    """What one round led to.

    Attributes:
        number: from 1.
        model: the fine-tuned checkpoint.
        macs: of the dense model, and of this one.
        params: likewise.
        oracle_error: of this round's cut.
        score: mAP50-95, of a classifier top-1, on the val split.
        lost: what is lost of the dense model's.
    """

    number: int
    model: str
    macs: tuple[int, int]
    params: tuple[int, int]
    oracle_error: float
    score: float
    lost: float


def goals(target: float, rounds: int) -> list[float]:
    """Return the shares of the dense model that the rounds come down to.

    >>> [round(goal, 3) for goal in goals(0.512, 3)]
    [0.8, 0.64, 0.512]
    """
    return [target ** (number / rounds) for number in range(1, rounds + 1)]


def cut_of_round(cut: Prune, number: int, rounds: int, left: dict[str, float]) -> Prune | None:
    """Return how much of its own model a round cuts, or None where the blocks of the budget have brought it there.

    Args:
        number: of the round, from 1.
        left: `macs` and `params` of the round's model, as shares of the dense model's.
    """
    if cut.percent is not None:
        return cut.model_copy(update={"percent": 1.0 - (1.0 - cut.percent) ** (1.0 / rounds)})
    kind = "macs" if cut.macs is not None else "params"
    share = goals(getattr(cut, kind), rounds)[number - 1] / left[kind]
    return cut.model_copy(update={kind: share}) if share < 1.0 else None


def held_to_dense(budget: Budget, graph: Graph) -> Budget:
    """Return a budget under which no rounds together take more of a group than one cut of the dense model may."""
    from compress.pruning.budget import rule_for
    from compress.settings import LayerRule

    rules = []
    for group in graph.groups:
        rule, frozen = rule_for(group.layers, budget)
        least = max(rule.min_width, ceil(group.width * (1.0 - rule.max_removed) - 1e-9) * group.unit)
        rules.append(LayerRule(layers=group.layers[0], min_width=least, max_removed=1.0, freeze=frozen))
    return budget.model_copy(update={"rules": (*budget.rules, *rules)})


def check_schedule(model: Any, cut: Prune, rounds: int, imgsz: int) -> None:
    """Go through all rounds with channels chosen at random: which widths can be reached does not depend on which.

    Raises:
        BudgetError: a round cannot reach its share of the target.
    """
    from compress.channels.graph import build_graph
    from compress.pruning.surgery import apply_plan

    graph = build_graph(model, imgsz)
    dense = {"macs": graph.macs(graph.widths), "params": graph.params(graph.widths)}
    left = dict.fromkeys(dense, 1.0)
    wanted = cut.model_copy(update={"importance": "random", "budget": held_to_dense(cut.budget, graph)})
    for number in range(1, rounds + 1):
        now = cut_of_round(wanted, number, rounds, left)
        if now is None:
            continue
        try:
            planned = plan_pruning(model, now, imgsz)
        except BudgetError as error:
            raise BudgetError(f"round {number} of {rounds} cannot reach its target: {error}") from None
        model = apply_plan(model, planned.plan)
        metrics = planned.metrics()
        left = {kind: metrics[kind][1] / dense[kind] for kind in dense}


def run_rounds(
    start: str, dense: Path, data: Path, settings: Run, common: Common, folder: Path, score: Callable[[Path], float]
) -> Path:
    """Prune in rounds below `folder` and return the checkpoint of the best trade-off; `folder/rounds.json` tells all.

    Stops after the round that has spent `settings.map_budget`, and then keeps the smallest model within it.

    Args:
        start: the checkpoint that the first round makes sparse.
        dense: the reference, and the teacher of every round.
        score: measures the mAP50-95 of a checkpoint, of a classifier its top-1, on the val split.
    """
    from compress.channels.graph import build_graph

    reference = checkpoint.load_model(dense)
    graph, metric = build_graph(reference, settings.imgsz), metric_of(checkpoint.task_of(reference))
    before = {"macs": int(graph.macs(graph.widths)), "params": int(graph.params(graph.widths))}
    wanted = settings.prune.model_copy(update={"budget": held_to_dense(settings.prune.budget, graph)})
    best = _scored(dense, data, settings, folder / "01_score", score, metric)
    left, model, done = dict.fromkeys(before, 1.0), start, []
    for number in range(1, settings.iterations + 1):
        cut = cut_of_round(wanted, number, settings.iterations, left)
        if cut is None:
            print(f"round {number} of {settings.iterations}: the rounds before have cut that much")
            continue
        home = folder / f"round_{number}"
        sparse = sparsify(model, data, settings.sparsify, common, home / "02_sparsify", cut)
        pruned = prune(sparse, data, cut, settings.imgsz, settings.seed, home / "03_prune")
        tuned = finetune(pruned, dense, data, settings.finetune, common, home / "04_finetune")
        found = _scored(tuned, data, settings, home / "05_score", score, metric)
        metrics = manifest.read_json(home / "03_prune" / manifest.MANIFEST)["metrics"]
        macs, params = (before["macs"], metrics["macs"][1]), (before["params"], metrics["params"][1])
        done.append(Round(number, str(tuned), macs, params, metrics["oracle_error"], found, best - found))
        kept = best_trade_off(done, settings.map_budget)
        record = {"metric": metric, "kept": kept.number, "rounds": [asdict(each) for each in done]}
        manifest.write_json(folder / ROUNDS, record)
        print(
            f"round {number} of {settings.iterations}: {macs[1] / macs[0]:.1%} of the MACs kept, "
            f"val {SCORE_NAMES[metric]} {found:.3f} ({found - best:+.3f} against the dense model)"
        )
        if settings.map_budget is not None and best - found > settings.map_budget:
            why = "is kept" if kept.lost <= settings.map_budget else "lost too much too, and is kept as the best"
            print(f"the budget of {settings.map_budget:g} {SCORE_NAMES[metric]} is spent: round {kept.number} {why}")
            break
        left, model = {"macs": macs[1] / macs[0], "params": params[1] / params[0]}, str(tuned)
    return Path(best_trade_off(done, settings.map_budget).model)


def best_trade_off(done: list[Round], map_budget: float | None) -> Round:
    """Return the last round that lost no more than the budget; where none did, the one that lost least."""
    within = [each for each in done if map_budget is None or each.lost <= map_budget]
    return within[-1] if within else min(done, key=lambda each: each.lost)


def outcome(folder: Path, iterations: int) -> dict[str, Any]:
    """Return macs and params (dense, pruned) and the largest oracle error of a run, and its number of rounds."""
    if iterations == 1:
        return {**manifest.read_json(folder / "03_prune" / manifest.MANIFEST)["metrics"], "rounds": 1}
    record = manifest.read_json(folder / ROUNDS)
    until = [each for each in record["rounds"] if each["number"] <= record["kept"]]
    errors = [each["oracle_error"] for each in until]
    return {**until[-1], "oracle_error": max(errors), "rounds": len(until)}


def _scored(model: Path, data: Path, settings: Run, output: Path, score: Callable[[Path], float], metric: str) -> float:
    """Return the score of a checkpoint, measured once."""
    from compress.data.dataset import fingerprint

    config = {"imgsz": settings.imgsz, "split": "val"}
    parents = manifest.input_hashes({"model": model}) | {"data": fingerprint(data)}
    found = manifest.remembered(output, "score", config, parents, lambda: {metric: score(model)})
    return float(found[metric])
