"""Local search for the solver: single steps until a limit holds, then exchanges of one and two widths."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from compress.latency.solver import Goal, Problem

SEARCH_STEPS = 60
REACH = 6  # how many widths up or down one exchange moves a tie


def repair(problem: Problem, levels: np.ndarray, goal: Goal, limit: float) -> np.ndarray | None:
    """Take the single steps that cost least per gain until the limit, and one of memory, hold; None where none do."""
    levels = levels.copy()
    for _ in range(2 * sum(p.size for p in problem.parts)):
        loss, cost, excess = problem.lost(levels), float(problem.cost(levels)), problem.excess_memory(levels)
        over = (cost if goal == "loss" else loss) > limit
        if not over and excess == 0:
            return levels
        step = 1 if goal == "loss" or not over else -1
        rows = [i for i in range(levels.size) if 0 <= levels[i] + step < problem.parts[i].size]
        if not rows:
            return None
        moved = np.repeat(levels[None], len(rows), axis=0)
        moved[np.arange(len(rows)), rows] += step
        losses = np.array([problem.loss[i][levels[i] + step] - problem.loss[i][levels[i]] for i in rows])
        costs = np.asarray(problem.cost(moved)) - cost
        pays, gains = (losses, -costs) if goal == "loss" else (costs, -losses)
        if not over:  # memory alone is too large
            pays = losses
            gains = np.array([excess - problem.excess_memory(row) for row in moved])
            if not (gains > 0).any():  # the peak is several layers wide
                gains = np.ones(len(rows))
        levels = moved[int(np.argmin(np.where(gains > 0, pays / np.maximum(gains, 1e-15), np.inf)))]
    return None


def search(problem: Problem, levels: np.ndarray, goal: Goal, limit: float) -> np.ndarray:
    """Change one or two ties at a time while that lowers the goal and keeps the limit."""
    for _ in range(SEARCH_STEPS):
        better = _best_exchange(problem, levels, goal, limit)
        if better is None:
            break
        levels = better
    return levels


def _best_exchange(problem: Problem, levels: np.ndarray, goal: Goal, limit: float) -> np.ndarray | None:
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
        kept = (new_cost if goal == "loss" else new_loss) <= limit and problem.excess_memory(candidate) == 0
        if kept and (new_loss < loss if goal == "loss" else new_cost < cost):
            return candidate
    return None
