"""Widths that keep the most importance under a measured latency, with a proof of how good they are.

The loss of a choice is that of `budget.choose` with MACs: over all groups, the sum of -log of the share of importance
that a group keeps. Latency is paid and saved at producers and at consumers, so it is a sum over pairs of widths.
Lagrangian relaxation (Everett, "Generalized Lagrange multiplier method", 1963) turns the limit into a price per
millisecond; at each price the best widths are found exactly (see `pairwise`), and the prices give a lower bound that
no plan can beat. Between the prices a local search exchanges widths of one and two ties.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from compress import pairwise
from compress.budget import Tie, log_share_lost, ties
from compress.latency_table import BLOCKS, TERMS, Latency

if TYPE_CHECKING:
    from compress.graph import Graph
    from compress.settings import Budget

MAX_PRICES = 40
SEARCH_STEPS = 60
REACH = 6  # how many widths up or down one exchange moves a tie
_TOLERANCE = 1e-9


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

    def widths(self, levels: np.ndarray) -> np.ndarray:
        """Return the widths of all groups at levels of shape (…, ties)."""
        parts = np.stack([self.parts[i][levels[..., i]] for i in range(len(self.parts))], axis=-1)
        return self.base + parts @ self.units

    def cost(self, levels: np.ndarray) -> np.ndarray | float:
        """Return the latency at levels of shape (…, ties), in the table's unit."""
        return self.latency(self.widths(levels))

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


def build_problem(graph: Graph, budget: Budget, scores: list[np.ndarray], latency: Latency) -> Problem:
    """Collect what the solver needs.

    Args:
        scores: importance per group, arrays of shape (width,).
    """
    every = ties(graph, budget)
    tied = [tie for tie in every if len(tie.parts) > 1]
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
    unary, pairs, constant = _as_pairs(latency, base, units, parts)
    order = pairwise.elimination_order([p.size for p in parts], pairs)
    return Problem(tied, base, units, parts, loss, latency, unary, pairs, constant, order)


def least_loss(problem: Problem, limit: float) -> Solution | None:
    """Return the widths of the least loss whose cost is at most `limit`; None where there are none."""
    return _solve(problem, "loss", limit)


def least_cost(problem: Problem, loss: float) -> Solution | None:
    """Return the widths of the least cost that lose at most `loss`."""
    return _solve(problem, "cost", loss)


def cheapest(problem: Problem) -> np.ndarray:
    """Return the levels of the least cost that can be reached, shape (ties,)."""
    levels = pairwise.minimise(problem.unary, problem.pairs, problem.order).assignment
    # What pairs leave out, a local search sees.
    return _search(problem, levels, "cost", np.inf)


def front(problem: Problem, count: int) -> list[Solution]:
    """Return `count` solutions from the dense model to the cheapest, their costs in equal ratios."""
    dense, least = (float(problem.cost(x)) for x in (np.zeros(len(problem.parts), np.int64), cheapest(problem)))
    limits = np.geomspace(dense, least, count) * (1 + _TOLERANCE)
    found = [least_loss(problem, float(limit)) for limit in limits]
    return [solution for solution in found if solution is not None]


def _solve(problem: Problem, goal: Literal["loss", "cost"], limit: float) -> Solution | None:
    """Minimise loss or cost while the other one stays within a limit."""
    scale = float(problem.cost(np.zeros(len(problem.parts), np.int64)))

    def measure(levels: np.ndarray) -> tuple[float, float]:
        return problem.lost(levels), float(problem.cost(levels)) / scale

    limit = limit if goal == "cost" else limit / scale
    dense, least = np.zeros(len(problem.parts), dtype=np.int64), cheapest(problem)
    within, beyond = (dense, least) if goal == "cost" else (least, dense)
    side = 0 if goal == "cost" else 1
    if measure(within)[side] > limit * (1 + _TOLERANCE):
        return None
    if measure(beyond)[side] <= limit * (1 + _TOLERANCE):
        return _solution(problem, beyond, problem.lost(beyond) if goal == "loss" else float(problem.cost(beyond)), goal)
    bound, candidates = -np.inf, [within]
    for _ in range(MAX_PRICES):
        (loss_a, cost_a), (loss_b, cost_b) = measure(within), measure(beyond)
        if abs(cost_a - cost_b) < _TOLERANCE:
            break
        price = max((loss_b - loss_a) / (cost_a - cost_b), 1e-12)
        found = _at_price(problem, price / scale)
        least_sum = found.bound + price * problem.constant / scale
        bound = max(bound, least_sum - price * limit if goal == "loss" else (least_sum - limit) / price)
        here = measure(found.assignment)
        if here[0] + price * here[1] >= loss_a + price * cost_a - _TOLERANCE:
            break  # the line through both is the lower hull
        if here[side] <= limit:
            within = found.assignment
        else:
            beyond = found.assignment
        candidates.append(within)
    unscaled = bound if goal == "loss" else bound * scale
    real_limit = limit * scale if goal == "loss" else limit
    starts = [within, _repair(problem, beyond, goal, real_limit)]
    best = min(
        (_search(problem, start, goal, real_limit) for start in starts if start is not None),
        key=lambda levels: problem.lost(levels) if goal == "loss" else float(problem.cost(levels)),
    )
    return _solution(problem, best, unscaled, goal)


def _solution(problem: Problem, levels: np.ndarray, bound: float, goal: str) -> Solution:
    loss, cost = problem.lost(levels), float(problem.cost(levels))
    value = loss if goal == "loss" else cost
    gap = max((value - bound) / value, 0.0) if value > 0 else 0.0
    return Solution(problem.widths(levels).round().astype(np.int64), cost, loss, bound, gap)


def _at_price(problem: Problem, price: float) -> pairwise.Minimum:
    """Minimise loss + price · cost (without its constant)."""
    unary = [loss + price * cost for loss, cost in zip(problem.loss, problem.unary, strict=True)]
    pairs = {key: price * table for key, table in problem.pairs.items()}
    return pairwise.minimise(unary, pairs, problem.order)


def _repair(problem: Problem, levels: np.ndarray, goal: str, limit: float) -> np.ndarray | None:
    """Take the single steps that cost least per gain until the limit holds."""
    levels = levels.copy()
    for _ in range(sum(p.size for p in problem.parts)):
        loss, cost = problem.lost(levels), float(problem.cost(levels))
        if (cost if goal == "loss" else loss) <= limit:
            return levels
        step = 1 if goal == "loss" else -1
        rows = [i for i in range(levels.size) if 0 <= levels[i] + step < problem.parts[i].size]
        if not rows:
            return None
        moved = np.repeat(levels[None], len(rows), axis=0)
        moved[np.arange(len(rows)), rows] += step
        losses = np.array([problem.loss[i][levels[i] + step] - problem.loss[i][levels[i]] for i in rows])
        costs = np.asarray(problem.cost(moved)) - cost
        pays, gains = (losses, -costs) if goal == "loss" else (costs, -losses)
        levels = moved[int(np.argmin(np.where(gains > 0, pays / np.maximum(gains, 1e-15), np.inf)))]
    return None


def _search(problem: Problem, levels: np.ndarray, goal: str, limit: float) -> np.ndarray:
    """Change one or two ties at a time while that lowers the goal and keeps the limit."""
    for _ in range(SEARCH_STEPS):
        better = _best_exchange(problem, levels, goal, limit)
        if better is None:
            break
        levels = better
    return levels


def _best_exchange(problem: Problem, levels: np.ndarray, goal: str, limit: float) -> np.ndarray | None:
    loss, cost = problem.lost(levels), float(problem.cost(levels))
    owner, target = [], []
    for i, parts in enumerate(problem.parts):
        near = [x for x in range(max(levels[i] - REACH, 0), min(levels[i] + REACH + 1, parts.size)) if x != levels[i]]
        owner += [i] * len(near)
        target += near
    who, where = np.array(owner), np.array(target)
    moved = np.repeat(levels[None], who.size, axis=0)
    moved[np.arange(who.size), who] = where
    d_loss = np.array([problem.loss[i][x] - problem.loss[i][levels[i]] for i, x in zip(owner, target, strict=True)])
    d_cost = np.asarray(problem.cost(moved)) - cost
    pair_loss = d_loss[:, None] + d_loss[None]
    pair_cost = d_cost[:, None] + d_cost[None]
    start = np.searchsorted(who, np.arange(len(problem.parts) + 1))
    for (i, j), table in problem.pairs.items():
        rows, columns = slice(start[i], start[i + 1]), slice(start[j], start[j + 1])
        x, y = where[rows], where[columns]
        together = (
            table[np.ix_(x, y)] - table[x, levels[j]][:, None] - table[levels[i], y][None] + table[levels[i], levels[j]]
        )
        pair_cost[rows, columns] += together
        pair_cost[columns, rows] += together.T
    alone = np.eye(who.size, dtype=bool)
    np.fill_diagonal(pair_loss, d_loss)
    np.fill_diagonal(pair_cost, d_cost)
    same = (who[:, None] == who[None]) & ~alone
    gain, after = (pair_loss, cost + pair_cost) if goal == "loss" else (pair_cost, loss + pair_loss)
    possible = (gain < -1e-9 * max(abs(loss if goal == "loss" else cost), 1e-6)) & (after <= limit) & ~same
    for index in np.argsort(np.where(possible, gain, np.inf), axis=None)[:20]:
        a, b = np.unravel_index(index, gain.shape)
        if not possible[a, b]:
            return None
        candidate = levels.copy()
        candidate[who[a]], candidate[who[b]] = where[a], where[b]
        new_loss, new_cost = problem.lost(candidate), float(problem.cost(candidate))
        kept = (new_cost if goal == "loss" else new_loss) <= limit
        if kept and (new_loss < loss if goal == "loss" else new_cost < cost):
            return candidate
    return None


def _as_pairs(
    latency: Latency, base: np.ndarray, units: np.ndarray, parts: list[np.ndarray]
) -> tuple[list[np.ndarray], dict[tuple[int, int], np.ndarray], float]:
    """Write the cost as constant + Σ unary + Σ pairs.

    A surcharge for a width that is off the blocks depends on one tie where one tie makes that width; where several
    do, it is left out, which makes the sum a lower bound.
    """
    fixed = latency.forms @ base + latency.consts  # (3, segments)
    slopes = latency.forms @ units.T  # (3, segments, ties)
    terms = {name: latency.terms[:, index] for index, name in enumerate(TERMS)}
    reads, makes = (0, 1)
    linear = (
        terms["reads"] @ slopes[0]
        + terms["makes"] @ slopes[1]
        + terms["before"] @ slopes[2]
        + terms["product"] @ (fixed[reads][:, None] * slopes[makes] + fixed[makes][:, None] * slopes[reads])
    )
    square = np.einsum("s,si,sj->ij", terms["product"], slopes[reads], slopes[makes])
    square = square + square.T
    unary = [linear[i] * p + square[i, i] / 2 * p * p for i, p in enumerate(parts)]
    pairs = {
        (i, j): square[i, j] * np.outer(parts[i], parts[j])
        for i in range(len(parts))
        for j in range(i + 1, len(parts))
        if square[i, j] > 0
    }
    constant = latency.offset + float(
        terms["constant"].sum()
        + sum(terms[name] @ fixed[k] for k, name in enumerate(("reads", "makes", "before")))
        + terms["product"] @ (fixed[reads] * fixed[makes])
    )
    for block in BLOCKS:
        for side, name in ((reads, f"in_off_{block}"), (makes, f"out_off_{block}")):
            for segment in np.flatnonzero(terms[name]):
                mine = np.flatnonzero(slopes[side, segment])
                if mine.size > 1:
                    continue
                constant += _surcharge(
                    terms[name][segment], fixed[:, segment], slopes[:, segment], side, mine, block, parts, unary, pairs
                )
    return unary, pairs, constant


def _surcharge(
    factor: float,
    fixed: np.ndarray,
    slopes: np.ndarray,
    side: int,
    mine: np.ndarray,
    block: int,
    parts: list[np.ndarray],
    unary: list[np.ndarray],
    pairs: dict[tuple[int, int], np.ndarray],
) -> float:
    """Add factor · this side · the other side where this side is off the block; return what is constant of it."""
    other = 1 - side
    if mine.size == 0:
        off = factor * fixed[side] * (fixed[side] % block != 0)
        for j in np.flatnonzero(slopes[other]):
            unary[j] = unary[j] + off * slopes[other, j] * parts[j]
        return float(off * fixed[other])
    i = int(mine[0])
    width = fixed[side] + slopes[side, i] * parts[i]
    off = factor * width * (width % block != 0)
    unary[i] = unary[i] + off * fixed[other]
    for j in np.flatnonzero(slopes[other]).tolist():
        table = np.outer(off, slopes[other, j] * parts[j])
        if j == i:
            unary[i] = unary[i] + np.diag(table)
            continue
        key, value = ((i, j), table) if i < j else ((j, i), table.T)
        pairs[key] = pairs.get(key, 0.0) + value
    return 0.0
