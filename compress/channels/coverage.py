"""How much of a model pruning can reach."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from compress.channels.graph import Cost, Graph


def prunable_share(graph: Graph, cost: Cost, frozen: Sequence[str | None] | None = None) -> float:
    """Return the share of `graph.macs` or `graph.params` that lies in prunable groups, between 0 and 1.

    A weight, one number of a tensor, counts when a channel of a prunable group indexes at least one of its dimensions:
    it is what would be gone if all these channels were. For a 1×1 convolution from 3 fixed to 8 prunable channels that
    is all of it; for one from 8 prunable and 4 frozen channels to 5 fixed ones, 2/3.

    Args:
        frozen: per group why it is frozen, where more than the model's own reasons count, such as a budget's rules.
    """
    reasons = [group.frozen for group in graph.groups] if frozen is None else frozen
    kept = np.array([reason is not None for reason in reasons], dtype=bool)
    whole = cost(graph.widths)
    return 1.0 - cost(np.where(kept, graph.widths, 0)) / whole if whole else 0.0


def group_shares(graph: Graph, cost: Cost) -> list[float]:
    """Return, per group, the share of the cost that would be gone if the whole group were.

    What a layer makes counts at the layer and at all that read it, so a weight between two groups counts for both.
    """
    whole = cost(graph.widths)
    return [
        cost.saving(graph.widths, {index: group.width}) / whole if whole else 0.0
        for index, group in enumerate(graph.groups)
    ]
