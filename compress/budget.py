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
    from compress.graph import Graph, Group

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
class _Tied:
    """Groups that keep the same share of their channels: the shares allowed for all, and what each step down loses."""

    channels: dict[int, int]  # by group: how many channels one part of the share is
    parts: list[int]  # how many parts may stay, descending, all of them first
    lost: list[float]  # importance lost in total at each of them


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
            frozen = rule.freeze
    return Budget(**values), frozen


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
    tied = _tied_groups(graph, scores, budget, _sum_lost if target.kind == "percent" else _log_share_lost)
    widths = graph.widths.copy()
    level = [0] * len(tied)
    spent, limit, saving = _resource(graph, target, widths)

    def step(index: int) -> tuple[float, dict[int, int]]:
        item = tied[index]
        here, below = level[index], level[index] + 1
        removed = {group: (item.parts[here] - item.parts[below]) * n for group, n in item.channels.items()}
        gain = saving(widths, removed)
        return (item.lost[below] - item.lost[here]) / max(gain, 1e-12), removed

    heap = [(step(index)[0], index) for index, item in enumerate(tied) if len(item.parts) > 1]
    heapq.heapify(heap)
    nearest = False
    while spent(widths) > limit and heap and not nearest:
        _, index = heapq.heappop(heap)
        price, removed = step(index)
        if heap and price > heap[0][0] * (1 + 1e-12):
            heapq.heappush(heap, (price, index))  # its gain shrank since it was queued
            continue
        before = spent(widths)
        if target.kind == "percent" and before - limit < limit - (before - sum(removed.values())):
            nearest = True  # the next step overshoots by more than is missing
            continue
        for group, count in removed.items():
            widths[group] -= count
        level[index] += 1
        if level[index] + 1 < len(tied[index].parts):
            heapq.heappush(heap, (step(index)[0], index))
    # A percentage is met as nearly as the steps allow; MACs and parameters are upper limits.
    if spent(widths) > limit and not nearest:
        raise _infeasible(graph, target, widths, budget)
    keep = [_keep_best(score, int(width)) for score, width in zip(scores, widths, strict=True)]
    return Choice(keep, _explain(graph, widths, budget))


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


def _log_share_lost(ascending: np.ndarray, width: int) -> float:
    """Return -log of the share of importance that the `width` largest of the scores hold."""
    total = float(ascending.sum())
    kept = float(ascending[ascending.size - width :].sum())
    return float(np.log(total / kept)) if kept > 0 else 0.0


def _tied_groups(
    graph: Graph, scores: list[np.ndarray], budget: Budget, loss: Callable[[np.ndarray, int], float]
) -> list[_Tied]:
    by_tie: dict[int, list[int]] = defaultdict(list)
    for index, group in enumerate(graph.groups):
        by_tie[group.tie].append(index)
    tied = []
    for groups in by_tie.values():
        rules = [rule_for(graph.groups[index].layers, budget) for index in groups]
        if any(graph.groups[index].frozen for index in groups) or any(frozen for _, frozen in rules):
            continue
        most = math.gcd(*(graph.groups[index].width for index in groups))
        channels = {index: graph.groups[index].width // most for index in groups}
        choices = [
            {
                width / channels[index]
                for width in allowed_widths(graph.groups[index].width, rule, graph.groups[index].unit)
            }
            for index, (rule, _) in zip(groups, rules, strict=True)
        ]
        parts = [int(part) for part in sorted(set.intersection(*choices), reverse=True) if part.is_integer()]
        ascending = {index: np.sort(scores[index]) for index in groups}
        lost = [sum(loss(ascending[index], part * n) for index, n in channels.items()) for part in parts]
        tied.append(_Tied(channels, parts, lost))
    return tied


def _keep_best(score: np.ndarray, width: int) -> np.ndarray:
    """Keep the `width` largest scores; of equal ones the first."""
    mask = np.zeros(score.size, dtype=bool)
    mask[np.argsort(-score, kind="stable")[:width]] = True
    return mask


def _explain(graph: Graph, widths: np.ndarray, budget: Budget) -> list[str]:
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
            reasons.append("cheapest step")
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
        f"the budget cannot bring {target.kind} down to {target.value:.1%}: {reached:.1%} is reachable with "
        f"{_limits(budget)}; most of it is left in {', '.join(largest)}; ask for more or loosen the budget"
    )


def _limits(budget: Budget) -> str:
    power = " powers of two," if budget.power_of_two else ""
    return f"multiples of {budget.multiple_of},{power} min_width {budget.min_width}, max_removed {budget.max_removed:g}"
