"""How wide each channel group may be, and which widths meet a target at the least loss of importance."""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal

import numpy as np

from compress.errors import BudgetError
from compress.settings import Budget

if TYPE_CHECKING:
    from compress.channels.graph import Graph, Group

TargetKind = Literal["percent", "macs", "params"]


@dataclass(frozen=True)
class Target:
    """How much to remove: `percent` of the prunable channels, or down to a share of the dense `macs` or `params`."""

    kind: TargetKind
    value: float


@dataclass(frozen=True)
class Choice:
    """Widths that meet a target.

    Attributes:
        keep: per group a boolean array, shape (width,).
        why: per group what decided its width.
    """

    keep: list[np.ndarray]
    why: list[str]

    @property
    def widths(self) -> np.ndarray:
        """Chosen width of each group, shape (groups,)."""
        return np.array([int(mask.sum()) for mask in self.keep], dtype=np.int64)


@dataclass(frozen=True)
class Tie:
    """Groups that keep the same share of their units.

    Attributes:
        units: by group, how many units one part of the share is.
        parts: how many parts may stay, descending, all of them first.
    """

    units: dict[int, int]
    parts: list[int]


def allowed_widths(width: int, budget: Budget, unit: int = 1) -> list[int]:
    """Return the widths that a group of `width` units may have, descending, the dense one first.

    Args:
        unit: channels that one unit is; rules are about channels.

    >>> allowed_widths(64, Budget(multiple_of=16, max_removed=0.5))
    [64, 48, 32]
    >>> allowed_widths(4, Budget(multiple_of=16, max_removed=0.5), unit=32)
    [4, 3, 2]
    """
    least = max(1, min(-(-budget.min_width // unit), width), int(np.ceil(width * (1.0 - budget.max_removed) - 1e-9)))
    fits = [
        w
        for w in range(least, width)
        if w * unit % budget.multiple_of == 0 and (not budget.power_of_two or w * unit & (w * unit - 1) == 0)
    ]
    return [width, *reversed(fits)]


def _group_widths(group: Group, rule: Budget) -> list[int]:
    return allowed_widths(group.width, rule, group.unit)


def rule_for(layers: tuple[str, ...], budget: Budget) -> tuple[Budget, bool]:
    """Return the rule for a group that lives in `layers`, and whether it may not be pruned; the last match wins."""
    frozen = False
    values = budget.model_dump(exclude={"rules"})
    for rule in budget.rules:
        if any(fnmatchcase(layer, rule.layers) for layer in layers):
            values |= rule.model_dump(exclude={"layers", "freeze"}, exclude_none=True)
            frozen = frozen if rule.freeze is None else rule.freeze
    return Budget(**values), frozen


def without_effect(graph: Graph, budget: Budget) -> list[str]:
    """Return the patterns of the rules that no layer of a channel group has the name of."""
    layers = [layer for group in graph.groups for layer in group.layers]
    return [rule.layers for rule in budget.rules if not any(fnmatchcase(layer, rule.layers) for layer in layers)]


def choose(graph: Graph, scores: list[np.ndarray], target: Target, budget: Budget) -> Choice:
    """Choose widths that meet a target under a budget, at the least loss of importance per gain.

    Groups step down from one allowed width to the next, always the step that loses the least importance per channel,
    MAC or parameter saved. A saving counts at producers and at consumers, so it shrinks while neighbours shrink;
    gains are therefore taken anew before a step is accepted. Rounding to allowed widths is part of each step, never
    a correction afterwards.

    With `percent` the loss of a group is the sum of what it loses, and with single-channel steps the result is the
    global threshold of network slimming. With `macs` and `params` it is -log of the share of importance that the
    group keeps: layers are run one after another, so one that has lost nearly everything costs the network more than
    its few channels say, and a wide layer can spare more channels than a narrow one.

    Args:
        scores: importance per group, arrays of shape (width,).

    Raises:
        BudgetError: the target cannot be met; the message says what can be reached and what stands in the way.
    """
    tied = [tie for tie in ties(graph, budget) if len(tie.parts) > 1]
    loss = _sum_lost if target.kind == "percent" else log_share_lost
    ascending = [np.sort(score) for score in scores]
    lost = [[sum(loss(ascending[i], part * n) for i, n in tie.units.items()) for part in tie.parts] for tie in tied]
    widths = graph.widths.copy()
    level = [0] * len(tied)
    spent, limit, saving = _resource(graph, target, widths)

    def step(index: int) -> tuple[float, dict[int, int]]:
        tie, here, below = tied[index], level[index], level[index] + 1
        removed = {group: (tie.parts[here] - tie.parts[below]) * n for group, n in tie.units.items()}
        gain = saving(widths, removed)
        return (lost[index][below] - lost[index][here]) / max(gain, 1e-12), removed

    heap = [(step(index)[0], index) for index in range(len(tied))]
    heapq.heapify(heap)
    nearest = False
    while spent(widths) > limit and heap:
        _, index = heapq.heappop(heap)
        price, removed = step(index)
        if heap and price > heap[0][0] * (1 + 1e-12):
            heapq.heappush(heap, (price, index))  # its gain shrank since it was queued
            continue
        before = spent(widths)
        if target.kind == "percent" and before - limit < limit - (before - sum(removed.values())):
            nearest = True  # this step overshoots by more than is missing; a smaller one of others may not
            continue
        for group, count in removed.items():
            widths[group] -= count
        level[index] += 1
        if level[index] + 1 < len(tied[index].parts):
            heapq.heappush(heap, (step(index)[0], index))
    # A percentage is met as nearly as the steps allow; MACs and parameters are upper limits.
    if spent(widths) > limit and not nearest:
        raise _infeasible(graph, target, widths, budget)
    return keep_best(graph, scores, widths, budget, "cheapest step")


def keep_best(graph: Graph, scores: list[np.ndarray], widths: np.ndarray, budget: Budget, why: str) -> Choice:
    """Keep the most important units of every group at given widths, shape (groups,).

    Args:
        why: what decided a width that is neither the whole nor the least.
    """
    keep = [_keep_best(score, int(width)) for score, width in zip(scores, widths, strict=True)]
    return Choice(keep, _explain(graph, widths, budget, why))


def _resource(
    graph: Graph, target: Target, widths: np.ndarray
) -> tuple[Callable[[np.ndarray], float], float, Callable[[np.ndarray, dict[int, int]], float]]:
    """Return what a target limits: its amount at given widths, the limit, and what a removal saves."""
    if target.kind == "percent":
        prunable = np.array([not group.frozen for group in graph.groups])
        total = float(widths[prunable].sum())
        return (
            lambda w: float(w[prunable].sum()),
            total * (1.0 - target.value),
            lambda _, removed: float(sum(removed.values())),
        )
    cost = graph.macs if target.kind == "macs" else graph.params
    return cost, cost(widths) * target.value, cost.saving


def _sum_lost(ascending: np.ndarray, width: int) -> float:
    """Return the importance that goes when the `width` largest of the scores stay."""
    return float(ascending[: ascending.size - width].sum())


def log_share_lost(ascending: np.ndarray, width: int) -> float:
    """Return -log of the share of importance that the `width` largest of the scores hold."""
    total = float(ascending.sum())
    kept = float(ascending[ascending.size - width :].sum())
    return float(np.log(total / kept)) if kept > 0 else 0.0


def ties(graph: Graph, budget: Budget) -> list[Tie]:
    """Return the ties of all groups, in the order of their first ones, with the widths that all their groups may have.

    A group that is tied to none is a tie of its own; one that is frozen keeps all its parts.
    """
    members: dict[int, list[int]] = defaultdict(list)
    for index, group in enumerate(graph.groups):
        members[group.tie].append(index)
    found = []
    for groups in (members[tie] for tie in members):
        most = math.gcd(*(graph.groups[index].width for index in groups))
        units = {index: graph.groups[index].width // most for index in groups}
        parts = set(range(most + 1))
        for index, n in units.items():
            group = graph.groups[index]
            rule, frozen = rule_for(group.layers, budget)
            widths = [group.width] if group.frozen or frozen else allowed_widths(group.width, rule, group.unit)
            parts &= {width // n for width in widths if width % n == 0}
        found.append(Tie(units, sorted(parts, reverse=True)))
    return found


def removable(graph: Graph, budget: Budget) -> np.ndarray:
    """Return how many units each group may lose at most, shape (groups,)."""
    found = np.zeros_like(graph.widths)
    for tie in ties(graph, budget):
        for index, units in tie.units.items():
            found[index] = graph.widths[index] - tie.parts[-1] * units
    return found


def round_up(graph: Graph, widths: np.ndarray, budget: Budget) -> np.ndarray:
    """Return the least widths which a budget allows that are nowhere below `widths`, both of shape (groups,)."""
    found = np.empty_like(widths)
    for tie in ties(graph, budget):
        enough = min(part for part in tie.parts if all(part * n >= widths[i] for i, n in tie.units.items()))
        for index, n in tie.units.items():
            found[index] = enough * n
    return found


def _keep_best(score: np.ndarray, width: int) -> np.ndarray:
    """Keep the `width` largest scores; of equal ones the first."""
    mask = np.zeros(score.size, dtype=bool)
    mask[np.argsort(-score, kind="stable")[:width]] = True
    return mask


def _explain(graph: Graph, widths: np.ndarray, budget: Budget, why: str) -> list[str]:
    reasons = []
    for group, width in zip(graph.groups, widths.tolist(), strict=True):
        rule, frozen = rule_for(group.layers, budget)
        allowed = _group_widths(group, rule)
        if group.frozen:
            reasons.append(f"frozen: {group.frozen}")
        elif frozen:
            reasons.append("frozen by a rule of the budget")
        elif len(allowed) == 1:
            reasons.append("no smaller width is allowed")
        elif width == group.width:
            reasons.append("kept whole")
        elif width == allowed[-1]:
            reasons.append("least allowed width")
        else:
            reasons.append(why)
    return reasons


def _infeasible(graph: Graph, target: Target, widths: np.ndarray, budget: Budget) -> BudgetError:
    """Say what the budget can reach at most, and which layers hold the rest."""
    if target.kind == "percent":
        prunable = np.array([not group.frozen for group in graph.groups])
        reached = 1.0 - float(widths[prunable].sum() / max(graph.widths[prunable].sum(), 1))
        return BudgetError(
            f"the budget cannot remove {target.value:.0%} of the channels: at most {reached:.1%} are reachable with "
            f"{_limits(budget)}; lower --percent or loosen the budget"
        )
    cost = graph.macs if target.kind == "macs" else graph.params
    reached = cost(widths) / cost(graph.widths)
    left = cost.per_tensor(widths)
    largest = [cost.names[i].rpartition(".")[0] for i in np.argsort(-left)[:3]]
    return BudgetError(
        f"the budget cannot bring {target.kind} down to {target.value:.1%} of the dense model's: {reached:.1%} is "
        f"reachable with {_limits(budget)}; most of it is left in {', '.join(largest)}; "
        "ask for more or loosen the budget"
    )


def _limits(budget: Budget) -> str:
    power = " powers of two," if budget.power_of_two else ""
    return f"multiples of {budget.multiple_of},{power} min_width {budget.min_width}, max_removed {budget.max_removed:g}"
