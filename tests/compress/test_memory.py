"""Memory from shapes, counted by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from compress.channels.graph import build_graph
from compress.latency.memory import memory_of
from compress.latency.solver import Problem, build_problem, least_loss
from compress.latency.table import evaluate
from compress.pruning.importance import importance
from tables import BUDGET, table_of
from topologies import Chain, Residual, randomised

AREA = 16 * 16


def widths(graph: Any, **changes: int) -> np.ndarray:
    made = graph.widths.copy()
    for name, width in changes.items():
        made[[group.name for group in graph.groups].index(f"{name}.conv")] = width
    return made


def test_a_chain_holds_what_one_layer_reads_and_makes() -> None:
    graph = build_graph(randomised(Chain()), 16)
    memory = memory_of(graph)
    parameters = sum(p.numel() for p in Chain().parameters())
    # 3 → 8 → 12 → 4 channels: the peak is at the second convolution.
    assert memory(graph.widths) == 4 * (AREA * (8 + 12) + parameters)
    # With a narrow middle it is at the first one, or where 4 channels meet 12.
    narrow = widths(graph, a=4)
    fewer = 3 * 9 * 4 + 8 + 4 * 9 * 12 + 24 + 12 * 4 + 4
    assert memory(narrow) == 4 * (AREA * (4 + 12) + fewer)


def test_a_residual_keeps_what_it_adds_later() -> None:
    graph = build_graph(randomised(Residual()), 16)
    parameters = sum(p.numel() for p in Residual().parameters())
    # x and what b makes of it live when the sum is made: three maps of eight channels.
    assert memory_of(graph)(graph.widths) == 4 * (3 * 8 * AREA + parameters)
    assert memory_of(graph, value_bytes=2)(graph.widths) == memory_of(graph)(graph.widths) / 2


def problem(limit: float | None) -> Problem:
    model = randomised(Chain())
    table, graph = table_of(model, 16)
    scores = importance(graph, model, "random", 0)
    return build_problem(graph, BUDGET, scores, evaluate(table, graph), memory_of(graph), limit)


def test_the_solver_keeps_within_the_memory() -> None:
    free = problem(None)
    dense = np.zeros(len(free.parts), dtype=int)
    limit = 0.98 * float(free.cost(dense))
    loose = least_loss(free, limit)
    assert loose is not None
    assert free.memory is not None
    tight = 0.8 * free.memory(loose.widths)
    bound = problem(tight)
    found = least_loss(bound, limit)
    assert found is not None
    assert free.memory(found.widths) <= tight
    assert found.loss > loose.loss
    every = [np.array([i, j]) for i in range(free.parts[0].size) for j in range(free.parts[1].size)]
    fits = [x for x in every if float(free.cost(x)) <= limit and free.memory(free.widths(x)) <= tight]
    assert found.loss == pytest.approx(min(free.lost(x) for x in fits))
    assert found.bound <= found.loss


def test_a_memory_that_cannot_be_reached_has_no_solution() -> None:
    assert least_loss(problem(1000.0), 1e6) is None
