"""Widths that keep the most importance under a measured latency, with a proof of how good they are.

The loss of a choice is that of `budget.choose` with MACs: over all groups, the sum of -log of the share of importance
that a group keeps. Latency is paid and saved at producers and at consumers, so it is a sum over pairs of widths.
Lagrangian relaxation (Everett, "Generalized Lagrange multiplier method", 1963) turns the limit into a price per
millisecond; at each price the best widths are found exactly (see `pairwise`), and the prices give a lower bound that
no plan can beat. Between the prices a local search exchanges widths of one and two ties, and where the bound is still
far, branch and bound splits the widths of a tie.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from compress.errors import BudgetError
from compress.latency import pairwise
from compress.latency.exchange import repair, search
from compress.latency.pairs import as_pairs
from compress.latency.table import Latency
from compress.pruning.budget import Tie, log_share_lost, ties

if TYPE_CHECKING:
    from compress.channels.graph import Graph
    from compress.latency.memory import Memory
    from compress.settings import Budget

MAX_PRICES = 40
MAX_NODES = 60
GOOD_GAP = 0.005  # no branching below
_TOLERANCE = 1e-9
Goal = Literal["loss", "cost"]


@dataclass(frozen=True)
class Problem:
    """What may be chosen, what it loses and what it costs.

    Attributes:
        ties: those with more than one width.
        base: widths of all groups where every tie is at 0 parts, shape (groups,).
        units: channels of each group per part of each tie, shape (ties, groups).
        parts: how many parts each level of a tie has, descending.
        loss: loss of each level of each tie.
        latency: the cost of any widths.
        memory, memory_limit: a second limit, in bytes, that every solution keeps; the bounds do not know of it.
        unary, pairs: a lower bound of it, and mostly the cost itself, as a sum over pairs of ties; without `constant`.
    """

    ties: list[Tie]
    base: np.ndarray
    units: np.ndarray
    parts: list[np.ndarray]
    loss: list[np.ndarray]
    latency: Latency
    unary: list[np.ndarray]
    pairs: dict[tuple[int, int], np.ndarray]
    constant: float
    order: list[int]
    memory: Memory | None = None
    memory_limit: float | None = None

    def excess_memory(self, levels: np.ndarray) -> float:
        """Return the bytes above the limit at levels of shape (ties,); 0 without one."""
        if self.memory is None or self.memory_limit is None:
            return 0.0
        return max(self.memory(self.widths(levels)) - self.memory_limit, 0.0)

    def widths(self, levels: np.ndarray) -> np.ndarray:
        """Return the widths of all groups at levels of shape (…, ties)."""
        parts = np.stack([self.parts[i][levels[..., i]] for i in range(len(self.parts))], axis=-1)
        return self.base + parts @ self.units

    def cost(self, levels: np.ndarray) -> np.ndarray | float:
        """Return the latency at levels of shape (…, ties), in the table's unit."""
        return self.latency(self.widths(levels))

    def pair_cost(self, levels: np.ndarray) -> float:
        """Return the sum over pairs and the constant at levels of shape (ties,), which is never above the cost."""
        alone = sum(float(values[level]) for values, level in zip(self.unary, levels, strict=True))
        return self.constant + alone + sum(float(table[levels[i], levels[j]]) for (i, j), table in self.pairs.items())

    def lost(self, levels: np.ndarray) -> float:
        """Return the loss at levels of shape (ties,)."""
        return float(sum(self.loss[i][level] for i, level in enumerate(levels)))


@dataclass(frozen=True)
class Solution:
    """A choice of widths.

    Attributes:
        widths: of all groups, shape (groups,).
        cost: predicted, in the table's unit.
        loss: Σ -log of the share of importance that a group keeps.
        bound: of what was minimised (loss or cost): no choice within the limit has less.
        gap: how far above the bound, as a share of the value.
    """

    widths: np.ndarray
    cost: float
    loss: float
    bound: float
    gap: float

    def kept(self, groups: int) -> float:
        """Return the share of importance that is kept: the geometric mean over the groups that may be cut."""
        return float(np.exp(-self.loss / max(groups, 1)))


def build_problem(
    graph: Graph,
    budget: Budget,
    scores: list[np.ndarray],
    latency: Latency,
    memory: Memory | None = None,
    memory_limit: float | None = None,
) -> Problem:
    """Collect what the solver needs.

    Args:
        scores: importance per group, arrays of shape (width,).
        memory: of the model, where there is a limit.
        memory_limit: bytes.

    Raises:
        BudgetError: no width can be chosen.
    """
    every = ties(graph, budget)
    tied = [tie for tie in every if len(tie.parts) > 1]
    if not tied:
        raise BudgetError("the budget allows no group of channels another width: loosen it")
    base = graph.widths.astype(np.float64)
    units = np.zeros((len(tied), len(graph.groups)))
    for row, tie in enumerate(tied):
        for group, n in tie.units.items():
            units[row, group], base[group] = n, 0.0
    ascending = [np.sort(score) for score in scores]
    loss = [
        np.array([sum(log_share_lost(ascending[i], p * n) for i, n in t.units.items()) for p in t.parts]) for t in tied
    ]
    parts = [np.array(tie.parts, dtype=np.float64) for tie in tied]
    unary, pairs, constant = as_pairs(latency, base, units, parts)
    order = pairwise.elimination_order([p.size for p in parts], pairs)
    return Problem(tied, base, units, parts, loss, latency, unary, pairs, constant, order, memory, memory_limit)


def least_loss(problem: Problem, limit: float) -> Solution | None:
    """Return the widths of the least loss whose cost is at most `limit`; None where there are none."""
    return _solve(problem, "loss", limit)


def least_cost(problem: Problem, loss: float) -> Solution | None:
    """Return the widths of the least cost that lose at most `loss`."""
    return _solve(problem, "cost", loss)


def cheapest(problem: Problem) -> np.ndarray:
    """Return the levels of the least cost that can be reached, shape (ties,)."""
    levels = _minimise(problem, _all_levels(problem), 0.0, 1.0).assignment
    # What pairs leave out, a local search sees.
    return search(problem, levels, "cost", np.inf)


def front(problem: Problem, count: int) -> list[Solution]:
    """Return `count` solutions from the dense model to the cheapest, their costs in equal ratios."""
    dense, least = (float(problem.cost(x)) for x in (np.zeros(len(problem.parts), np.int64), cheapest(problem)))
    limits = np.geomspace(dense, least, count) * (1 + _TOLERANCE)
    found = [least_loss(problem, float(limit)) for limit in limits]
    return [solution for solution in found if solution is not None]


def _solve(problem: Problem, goal: Goal, limit: float) -> Solution | None:
    """Minimise loss or cost while the other one stays within a limit: by price, then by branch and bound."""
    limit *= 1 + _TOLERANCE

    def value(levels: np.ndarray) -> float:
        return problem.lost(levels) if goal == "loss" else float(problem.cost(levels))

    def other(levels: np.ndarray) -> float:
        return float(problem.cost(levels)) if goal == "loss" else problem.lost(levels)

    safe = cheapest(problem) if goal == "loss" else np.zeros(len(problem.parts), dtype=np.int64)
    if problem.excess_memory(safe) > 0:
        small = repair(problem, safe, goal, limit)
        if small is None:
            return None
        safe = small
    if other(safe) > limit:
        return None
    root = _price(problem, _all_levels(problem), goal, limit)
    assert root is not None
    starts = [safe, *(repair(problem, levels, goal, limit) for levels in (root.within, root.beyond))]
    found = [search(problem, start, goal, limit) for start in starts if start is not None and other(start) <= limit]
    best = min(found, key=value)
    open_nodes, bound, count = [(root.bound, 0, root)], root.bound, 1
    while open_nodes:
        bound = min(open_nodes[0][0], value(best))
        if value(best) - bound <= GOOD_GAP * value(best) or count >= MAX_NODES:
            break
        _, _, node = heapq.heappop(open_nodes)
        for allowed in _branch(problem, node):
            child = _price(problem, allowed, goal, limit)
            if child is None or child.bound >= value(best):
                continue
            count += 1
            heapq.heappush(open_nodes, (max(child.bound, node.bound), count, child))
            start = repair(problem, child.within, goal, limit)
            if start is not None:
                best = min(best, search(problem, start, goal, limit), key=value)
    else:
        bound = value(best)  # every other choice was ruled out
    return _solution(problem, best, bound, goal)


@dataclass(frozen=True)
class _Node:
    """Choices among the levels that are `allowed`, their lower bound, and the two sides of the limit."""

    allowed: list[np.ndarray]
    bound: float
    within: np.ndarray
    beyond: np.ndarray


def _price(problem: Problem, allowed: list[np.ndarray], goal: Goal, limit: float) -> _Node | None:
    """Find the price at which the limit is met, among the levels that are allowed; None where none meets it."""
    dense = np.array([levels[0] for levels in allowed])
    least = _minimise(problem, allowed, 0.0, 1.0).assignment
    within, beyond = (dense, least) if goal == "cost" else (least, dense)

    def measure(levels: np.ndarray) -> tuple[float, float]:
        return problem.lost(levels), problem.pair_cost(levels)

    side = 0 if goal == "cost" else 1
    if measure(within)[side] > limit:
        return None
    if measure(beyond)[side] <= limit:
        return _Node(allowed, measure(beyond)[1 - side], beyond, beyond)
    bound = measure(beyond)[1 - side]
    for _ in range(MAX_PRICES):
        (loss_a, cost_a), (loss_b, cost_b) = measure(within), measure(beyond)
        price = max((loss_b - loss_a) / (cost_a - cost_b), 1e-12 / abs(cost_a - cost_b))
        found = _minimise(problem, allowed, 1.0, price)
        least_sum = found.bound + price * problem.constant
        bound = max(bound, least_sum - price * limit if goal == "loss" else (least_sum - limit) / price)
        loss, cost = measure(found.assignment)
        if loss + price * cost >= loss_a + price * cost_a - _TOLERANCE * (loss_a + price * cost_a):
            break  # the line through both is the lower hull
        if (loss, cost)[side] <= limit:
            within = found.assignment
        else:
            beyond = found.assignment
    return _Node(allowed, bound, within, beyond)


def _branch(problem: Problem, node: _Node) -> list[list[np.ndarray]]:
    """Split the levels of the tie in which both sides of the limit differ most.

    Where both are one choice, which keeps the limit only as far as pairs and without memory, the tie of most levels.
    """
    apart = [
        abs(float(problem.loss[i][a] - problem.loss[i][b])) if a != b else -1.0
        for i, (a, b) in enumerate(zip(node.within, node.beyond, strict=True))
    ]
    chosen = int(np.argmax(apart))
    middle = (node.within[chosen] + node.beyond[chosen]) / 2
    if apart[chosen] < 0:
        chosen = int(np.argmax([levels.size for levels in node.allowed]))
        middle = float(node.allowed[chosen].mean())
    levels = node.allowed[chosen]
    if levels.size == 1:
        return []
    return [
        [*node.allowed[:chosen], part, *node.allowed[chosen + 1 :]]
        for part in (levels[levels <= middle], levels[levels > middle])
    ]


def _all_levels(problem: Problem) -> list[np.ndarray]:
    return [np.arange(parts.size) for parts in problem.parts]


def _minimise(problem: Problem, allowed: list[np.ndarray], loss: float, cost: float) -> pairwise.Minimum:
    """Minimise loss · what is lost + cost · the sum over pairs (without its constant) among the levels allowed."""
    unary = [
        loss * lost[levels] + cost * costs[levels]
        for lost, costs, levels in zip(problem.loss, problem.unary, allowed, strict=True)
    ]
    pairs = {(i, j): cost * table[np.ix_(allowed[i], allowed[j])] for (i, j), table in problem.pairs.items()}
    found = pairwise.minimise(unary, pairs, problem.order)
    levels = [chosen[index] for chosen, index in zip(allowed, found.assignment, strict=True)]
    return pairwise.Minimum(found.bound, np.array(levels, dtype=np.int64))


def _solution(problem: Problem, levels: np.ndarray, bound: float, goal: str) -> Solution:
    loss, cost = problem.lost(levels), float(problem.cost(levels))
    value = loss if goal == "loss" else cost
    gap = max((value - bound) / value, 0.0) if value > 0 else 0.0
    return Solution(problem.widths(levels).round().astype(np.int64), cost, loss, bound, gap)
