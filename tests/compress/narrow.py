"""A detector of some ten thousand weights: an epoch on the tiny data set takes a fraction of a second."""

from __future__ import annotations

import numpy as np
from torch import nn

from compress.channels.graph import build_graph
from compress.checkpoint import structure_hash
from compress.pruning.budget import Target, choose
from compress.pruning.importance import importance
from compress.pruning.plan import make_plan
from compress.pruning.surgery import apply_plan
from compress.settings import Budget

# Strides 8, 16 and 32, a residual, and the six classes of the tiny data set.
NARROW = """\
nc: 6
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, C2f, [16, True]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [24, 3, 2]]
  - [-1, 1, Conv, [24, 3, 2]]
head:
  - [[3, 4, 5], 1, Detect, [nc]]
"""


def prune_at_random(model: nn.Module, share: float = 0.4, seed: int = 0) -> tuple[nn.Module, np.ndarray]:
    """Return a pruned copy of a model, and the widths of its groups."""
    graph = build_graph(model, 64)
    budget = Budget(multiple_of=2, min_width=2)
    choice = choose(graph, importance(graph, model, "random", seed), Target("percent", share), budget)
    return apply_plan(model, make_plan(graph, choice, structure_hash(model), "test", "random")), choice.widths
