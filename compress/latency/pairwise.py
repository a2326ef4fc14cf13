"""Exact minima of sums over pairs of discrete variables, by eliminating one variable after another.

The cost of a network is a sum over pairs of neighbouring widths. Its channel graph is narrow: when the variables are
eliminated in a good order (Dechter, "Bucket elimination: a unifying framework for reasoning", 1999), the tables on the
way stay small. Where one would not, it is split (Dechter and Rish, "Mini-buckets", 2003): the minimum becomes a lower
bound, and the assignment a good guess.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce

import numpy as np

MAX_TABLE = 4_000_000
Pair = tuple[int, int]


@dataclass(frozen=True)
class Minimum:
    """The least value found.

    Attributes:
        bound: no assignment has a smaller sum.
        assignment: the index that each variable takes, shape (variables,).
    """

    bound: float
    assignment: np.ndarray


def elimination_order(sizes: list[int], pairs: Iterable[Pair]) -> list[int]:
    """Return an order that keeps tables small: next is the variable whose neighbours span the fewest values."""
    neighbours: list[set[int]] = [set() for _ in sizes]
    for i, j in pairs:
        neighbours[i].add(j)
        neighbours[j].add(i)
    left, order = set(range(len(sizes))), []
    while left:
        chosen = min(left, key=lambda v: (float(np.prod([float(sizes[n]) for n in neighbours[v]])), v))
        for n in neighbours[chosen]:
            neighbours[n] |= neighbours[chosen] - {n}
            neighbours[n].discard(chosen)
        left.remove(chosen)
        order.append(chosen)
    return order


def minimise(
    unary: list[np.ndarray], pairs: Mapping[Pair, np.ndarray], order: list[int], max_table: int = MAX_TABLE
) -> Minimum:
    """Minimise Σ unary[i][x_i] + Σ pairs[i, j][x_i, x_j].

    Args:
        unary: values of each variable, shapes (n_i,).
        pairs: shapes (n_i, n_j), i < j.
        order: in which variables are eliminated, see `elimination_order`.
        max_table: how many entries a table may have before it is split.

    >>> minimise([np.array([0.0, 1.0]), np.array([0.0, 0.5])], {(0, 1): np.array([[2.0, 2.0], [0.0, 2.0]])}, [0, 1])
    Minimum(bound=1.0, assignment=array([1, 0]))
    """
    sizes = [values.size for values in unary]
    waiting: list[tuple[tuple[int, ...], np.ndarray]] = [((i,), values) for i, values in enumerate(unary)]
    waiting += list(pairs.items())
    buckets, bound = [], 0.0
    for variable in order:
        mine = [factor for factor in waiting if variable in factor[0]]
        waiting = [factor for factor in waiting if variable not in factor[0]]
        buckets.append((variable, mine))
        for part in _split(mine, sizes, max_table):
            scope, table = _sum(part, sizes)
            rest = tuple(v for v in scope if v != variable)
            reduced = table.min(axis=scope.index(variable))
            if rest:
                waiting.append((rest, reduced))
            else:
                bound += float(reduced)
    assignment = np.zeros(len(sizes), dtype=np.int64)
    for variable, mine in reversed(buckets):
        total = np.zeros(sizes[variable])
        for scope, table in mine:
            total = total + table[tuple(slice(None) if v == variable else assignment[v] for v in scope)]
        assignment[variable] = int(total.argmin())
    return Minimum(bound, assignment)


def _split(
    factors: list[tuple[tuple[int, ...], np.ndarray]], sizes: list[int], max_table: int
) -> list[list[tuple[tuple[int, ...], np.ndarray]]]:
    """Put factors together, the largest first, as long as the table that they span is not too large."""
    parts: list[tuple[set[int], list[tuple[tuple[int, ...], np.ndarray]]]] = []
    for factor in sorted(factors, key=lambda f: -f[1].size):
        for scope, members in parts:
            if np.prod([float(sizes[v]) for v in scope | set(factor[0])]) <= max_table:
                scope |= set(factor[0])
                members.append(factor)
                break
        else:
            parts.append((set(factor[0]), [factor]))
    return [members for _, members in parts]


def _sum(factors: list[tuple[tuple[int, ...], np.ndarray]], sizes: list[int]) -> tuple[tuple[int, ...], np.ndarray]:
    scope = tuple(sorted({v for variables, _ in factors for v in variables}))
    shaped = [table.reshape([sizes[v] if v in variables else 1 for v in scope]) for variables, table in factors]
    return scope, np.broadcast_to(reduce(np.add, shaped), [sizes[v] for v in scope])
