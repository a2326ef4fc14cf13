"""Strangers' blocks: what can be pruned is, what cannot is frozen with a reason, and all around it is pruned."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compress.channels.graph import build_graph
from compress.checkpoint import structure_hash
from compress.pruning.budget import Target, choose
from compress.pruning.importance import importance
from compress.pruning.oracle import oracle_error
from compress.pruning.plan import make_plan
from compress.pruning.surgery import apply_plan
from compress.settings import Budget
from recipes import RECIPES, Recipe
from topologies import calibrated

AROUND = {"before.conv", "after.conv", "side.conv"}


@pytest.mark.parametrize("kind", RECIPES, ids=lambda kind: kind.__name__)
def test_a_recipe(kind: type[nn.Module]) -> None:
    prunable, reason = RECIPES[kind]
    torch.manual_seed(0)
    model = calibrated(Recipe(kind), 16)
    graph = build_graph(model, 16)
    assert {group.name for group in graph.groups if group.width > 1 and not group.frozen} == prunable | AROUND
    reasons = [why for why in graph.frozen().values() if not why.endswith("output of the model")]
    assert bool(reasons) == bool(reason)
    assert reason is None or any(reason in why for why in reasons)
    for seed in range(2):
        scores = importance(graph, model, "random", seed)
        choice = choose(graph, scores, Target("percent", 0.4), Budget(multiple_of=1, min_width=1, max_removed=0.9))
        pruned = apply_plan(model, make_plan(graph, choice, structure_hash(model), "test", "random"))
        assert oracle_error(graph, pruned, choice.keep, torch.rand(1, 3, 16, 16)) < 1e-5
        assert sum(p.numel() for p in pruned.parameters()) < 0.8 * sum(p.numel() for p in model.parameters())
