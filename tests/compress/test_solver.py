"""Widths under a latency, against trying everything out."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from compress.channels.graph import build_graph
from compress.errors import BudgetError
from compress.latency.memory import memory_of
from compress.latency.solver import Problem, build_problem, cheapest, front, least_cost, least_loss
from compress.latency.table import Segment, evaluate
from compress.pruning.importance import importance
from compress.settings import Budget
from tables import BUDGET, table_of
from topologies import Chain, ChunkTie, Concat, Residual, randomised

MODELS = {"chain": Chain, "residual": Residual, "concat": Concat, "chunk": ChunkTie}


def make(name: str, stairs: bool = False, seed: int = 0, step: float = 0.002) -> Problem:
    model = randomised(MODELS[name](), seed)
    table, graph = table_of(model, 16)
    if stairs:  # dear off the blocks of 4, where one tie makes a width and where several do
        segments = tuple(
            Segment(**{**s.model_dump(), "terms": {**s.terms, "in_off_4": step, "out_off_4": 1.5 * step}})
            for s in table.segments
        )
        table, _ = table_of(model, 16, segments=segments)
    return build_problem(graph, BUDGET, importance(graph, model, "random", seed), evaluate(table, graph))


def every(problem: Problem) -> np.ndarray:
    return np.array(list(itertools.product(*(range(parts.size) for parts in problem.parts))))


@pytest.mark.parametrize("name", MODELS)
def test_pairs_add_up_to_the_cost(name: str) -> None:
    problem = make(name)
    for levels in every(problem)[:: max(len(every(problem)) // 50, 1)]:
        alone = sum(values[x] for values, x in zip(problem.unary, levels, strict=True))
        pairs = sum(table[levels[i], levels[j]] for (i, j), table in problem.pairs.items())
        assert problem.constant + alone + pairs == pytest.approx(problem.cost(levels))


@pytest.mark.parametrize("name", MODELS)
def test_with_stairs_pairs_are_never_more_than_the_cost(name: str) -> None:
    problem = make(name, stairs=True)
    seen = []
    for levels in every(problem)[:: max(len(every(problem)) // 50, 1)]:
        alone = sum(values[x] for values, x in zip(problem.unary, levels, strict=True))
        pairs = sum(table[levels[i], levels[j]] for (i, j), table in problem.pairs.items())
        seen.append(problem.constant + alone + pairs - float(problem.cost(levels)))
    assert max(seen) < 1e-9
    # Only the concatenation has widths that several ties make.
    assert (min(seen) < -1e-9) == (name == "concat")


@pytest.mark.parametrize("stairs", [False, True], ids=["smooth", "stairs"])
@pytest.mark.parametrize("name", MODELS)
def test_no_plan_beats_the_bound_and_the_solution_is_near_it(name: str, stairs: bool) -> None:
    problem = make(name, stairs)
    levels = every(problem)
    costs = np.asarray(problem.cost(levels))
    losses = np.array([problem.lost(row) for row in levels])
    for share in (0.2, 0.5, 0.8):
        limit = costs.min() + share * (costs.max() - costs.min())
        found = least_loss(problem, float(limit))
        assert found is not None
        best = losses[costs <= limit].min()
        assert found.cost <= limit
        assert found.cost == pytest.approx(problem.latency(found.widths))
        assert found.bound <= best + 1e-9
        assert found.loss == pytest.approx(best)


@pytest.mark.parametrize("name", MODELS)
def test_the_least_cost_at_a_loss_is_found(name: str) -> None:
    problem = make(name)
    levels = every(problem)
    costs = np.asarray(problem.cost(levels))
    losses = np.array([problem.lost(row) for row in levels])
    for share in (0.2, 0.6):
        limit = share * losses.max()
        found = least_cost(problem, float(limit))
        assert found is not None
        assert found.loss <= limit + 1e-9
        assert found.bound <= costs[losses <= limit].min() + 1e-9
        assert found.cost == pytest.approx(costs[losses <= limit].min())


@pytest.mark.parametrize("seed", range(4))
def test_the_bound_holds_where_pairs_see_less_than_the_cost(seed: int) -> None:
    """A choice that keeps the limit as far as pairs see, and does not, rules no other one out."""
    problem = make("concat", stairs=True, seed=seed, step=0.02)
    levels = every(problem)
    costs = np.asarray(problem.cost(levels))
    losses = np.array([problem.lost(row) for row in levels])
    for share in (0.5, 0.7, 0.9, 0.99):
        for found, values, limited in (
            (
                least_loss(problem, costs.min() + share * np.ptp(costs)),
                losses,
                costs <= costs.min() + share * np.ptp(costs),
            ),
            (least_cost(problem, share * losses.max()), costs, losses <= share * losses.max()),
        ):
            assert found is not None
            assert found.bound <= values[limited].min() + 1e-9


def test_the_bound_holds_under_a_memory_limit() -> None:
    model = randomised(Concat(), 1)
    memory = memory_of(build_graph(model, 16))
    problem = make("concat", stairs=True, seed=1, step=0.01)
    levels = every(problem)
    needs = np.array([memory(problem.widths(row)) for row in levels])
    most = needs.min() + 0.5 * np.ptp(needs)
    costs = np.asarray(problem.cost(levels))
    losses = np.array([problem.lost(row) for row in levels])
    for share in (0.3, 0.5, 0.7):
        limit = costs.min() + share * np.ptp(costs)
        found = least_loss(replace(problem, memory=memory, memory_limit=float(most)), float(limit))
        assert found is not None
        assert found.bound <= losses[(costs <= limit) & (needs <= most)].min() + 1e-9


def test_what_cannot_be_reached_has_no_solution() -> None:
    problem = make("concat")
    least = float(np.asarray(problem.cost(every(problem))).min())
    assert problem.cost(cheapest(problem)) == pytest.approx(least)
    assert least_loss(problem, least * 0.999) is None
    found = least_loss(problem, least)
    assert found is not None
    assert found.cost == pytest.approx(least)


def test_a_budget_without_a_choice_is_refused() -> None:
    model = randomised(Chain())
    table, graph = table_of(model, 16)
    scores = [np.ones(group.width) for group in graph.groups]
    with pytest.raises(BudgetError, match="allows no group of channels another width"):
        build_problem(graph, Budget(max_removed=0.0), scores, evaluate(table, graph))


def test_a_loose_limit_keeps_everything() -> None:
    problem = make("chain")
    dense = problem.widths(np.zeros(len(problem.parts), dtype=int))
    found = least_loss(problem, 1e6)
    assert found is not None
    assert found.widths.tolist() == dense.tolist()
    assert (found.loss, found.gap, found.kept(2)) == (0.0, 0.0, 1.0)


def test_the_front_trades_latency_for_importance() -> None:
    problem = make("concat", stairs=True)
    points = front(problem, 5)
    assert len(points) == 5
    costs, losses = [p.cost for p in points], [p.loss for p in points]
    assert costs == sorted(costs, reverse=True)
    assert losses == sorted(losses)
    assert losses[0] == 0.0
    assert costs[-1] == pytest.approx(float(np.asarray(problem.cost(every(problem))).min()))
