"""Elimination against trying everything out."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from compress.latency.pairwise import elimination_order, minimise

Pairs = dict[tuple[int, int], np.ndarray]


def problem(seed: int, variables: int = 6) -> tuple[list[np.ndarray], Pairs]:
    generator = np.random.default_rng(seed)
    sizes = generator.integers(1, 4, variables)
    unary = [generator.standard_normal(size) for size in sizes]
    keys = [pair for pair in itertools.combinations(range(variables), 2) if generator.random() < 0.6]
    return unary, {(i, j): generator.standard_normal((sizes[i], sizes[j])) for i, j in keys}


def value(unary: list[np.ndarray], pairs: Pairs, chosen: tuple[int, ...]) -> float:
    alone = sum(values[x] for values, x in zip(unary, chosen, strict=True))
    return float(alone + sum(table[chosen[i], chosen[j]] for (i, j), table in pairs.items()))


def best(unary: list[np.ndarray], pairs: Pairs) -> float:
    return min(value(unary, pairs, chosen) for chosen in itertools.product(*(range(u.size) for u in unary)))


@pytest.mark.parametrize("seed", range(8))
def test_the_minimum_is_exact(seed: int) -> None:
    unary, pairs = problem(seed)
    found = minimise(unary, pairs, elimination_order([u.size for u in unary], pairs))
    assert found.bound == pytest.approx(best(unary, pairs))
    assert value(unary, pairs, tuple(found.assignment)) == pytest.approx(found.bound)


@pytest.mark.parametrize("seed", range(8))
def test_split_tables_give_a_lower_bound(seed: int) -> None:
    unary, pairs = problem(seed)
    found = minimise(unary, pairs, elimination_order([u.size for u in unary], pairs), max_table=9)
    assert found.bound <= best(unary, pairs) + 1e-12
    assert value(unary, pairs, tuple(found.assignment)) >= best(unary, pairs) - 1e-12


def test_split_tables_are_seen_to_lose_something() -> None:
    # Three variables of which each pair wants to differ: two values cannot please all three.
    unary = [np.zeros(2)] * 3
    pairs = {pair: np.eye(2) for pair in itertools.combinations(range(3), 2)}
    assert minimise(unary, pairs, [0, 1, 2]).bound == 1.0
    assert minimise(unary, pairs, [0, 1, 2], max_table=4).bound == 0.0


def test_a_star_is_eliminated_from_its_ends() -> None:
    assert elimination_order([2, 5, 5, 5], [(0, 1), (0, 2), (0, 3)]) == [1, 2, 3, 0]
