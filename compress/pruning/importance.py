"""How much each unit of each channel group matters: one number per unit, larger is kept longer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.channels.slots import FIXED

if TYPE_CHECKING:
    from torch import nn

    from compress.channels.graph import Graph
    from compress.settings import Importance


def importance(graph: Graph, model: nn.Module, method: Importance, seed: int = 0) -> list[np.ndarray]:
    """Score the units of every group, arrays of shape (width,), averaged over the layers that share a unit.

    Methods:
        bn: |γ| of batch norm (Liu et al., "Learning Efficient Convolutional Networks through Network Slimming",
            ICCV 2017). A group without batch norm is scored by l1, scaled to the mean |γ| of the model.
        l1, l2: norm of the filters that make the channel (Li et al., "Pruning Filters for Efficient ConvNets",
            ICLR 2017), divided by the mean over the group, since layers differ in scale.
        fpgm: sum of the distances to the other filters of the layer, divided by the mean over the group: for what lies
            nearest to the geometric median, the others can stand in (He et al., "Filter Pruning via Geometric Median
            for Deep Convolutional Neural Networks Acceleration", CVPR 2019).
        random: uniform noise from `seed`, the control that every other method has to beat.
    """
    if method == "random":
        generator = np.random.default_rng(seed)
        return [generator.random(group.width) for group in graph.groups]
    if method in _FILTERS:
        return [_relative(score) for score in _filter_scores(graph, model, _FILTERS[method])]
    gammas = _average(graph, {(name, 0): values for name, values in batch_norm_scales(graph, model).items()})
    known = [score for score in gammas if np.isfinite(score).all()]
    scale = float(np.concatenate(known).mean()) if known else 1.0
    norms = _filter_scores(graph, model, _FILTERS["l1"])
    return [
        gamma if np.isfinite(gamma).all() else _relative(norm) * scale
        for gamma, norm in zip(gammas, norms, strict=True)
    ]


def batch_norm_scales(graph: Graph, model: nn.Module) -> dict[str, np.ndarray]:
    """Return |γ| of every batch norm whose channels can be followed, by the name of γ, shape (channels,)."""
    from torch.nn.modules.batchnorm import _BatchNorm

    modules: dict[str, Any] = dict(model.named_modules())
    return {
        axis.tensor: modules[axis.tensor.rpartition(".")[0]].weight.detach().abs().double().cpu().numpy()
        for axis in graph.axes
        if axis.tensor.endswith(".weight") and isinstance(modules[axis.tensor.rpartition(".")[0]], _BatchNorm)
    }


def prunable_scales(
    graph: Graph, model: nn.Module, frozen: Sequence[str | None] | None = None
) -> dict[str, np.ndarray]:
    """Return |γ| as `batch_norm_scales`, but only of channels that may be pruned, and of batch norms that have some.

    Args:
        frozen: per group why it is frozen, where more than the model's own reasons count, such as a budget's rules.
    """
    reasons = [group.frozen for group in graph.groups] if frozen is None else frozen
    prunable = np.array([reason is None for reason in reasons] + [False])  # the last entry is that of FIXED, -1
    groups = {axis.tensor: axis.group for axis in graph.axes if axis.dim == 0}
    scales = batch_norm_scales(graph, model)
    return {name: values[mine] for name, values in scales.items() if (mine := prunable[groups[name]]).any()}


def _distances(filters: np.ndarray) -> np.ndarray:
    """Return Σ over all filters j of ‖filter i − filter j‖₂, shape (filters,)."""
    import torch

    rows = torch.from_numpy(filters)
    return torch.cdist(rows, rows).sum(dim=1).numpy()


# What a filter is worth, from the filters of its layer, shape (filters, weights of one).
_FILTERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "l1": lambda filters: np.linalg.norm(filters, ord=1, axis=1),
    "l2": lambda filters: np.linalg.norm(filters, ord=2, axis=1),
    "fpgm": _distances,
}


def _filter_scores(graph: Graph, model: nn.Module, worth: Callable[[np.ndarray], np.ndarray]) -> list[np.ndarray]:
    """Return the mean worth of the filters that make each unit; ones where no filter does."""
    state = model.state_dict()
    scores = {}
    for axis in graph.axes:
        if axis.tensor in graph.positions and not axis.reads:
            weight = state[axis.tensor].double().movedim(axis.dim, 0).flatten(1).cpu().numpy()
            scores[axis.tensor, axis.dim] = worth(weight)
    return [np.where(np.isfinite(score), score, 1.0) for score in _average(graph, scores)]


def _average(graph: Graph, values: dict[tuple[str, int], np.ndarray]) -> list[np.ndarray]:
    """Average values per (tensor, dimension) over the tensors that share a unit; NaN where no tensor has one."""
    total = [np.zeros(group.width) for group in graph.groups]
    count = [np.zeros(group.width) for group in graph.groups]
    for axis in graph.axes:
        if (axis.tensor, axis.dim) not in values:
            continue
        for index in np.unique(axis.group[axis.group != FIXED]).tolist():
            mine = axis.group == index
            np.add.at(total[index], axis.unit[mine], values[axis.tensor, axis.dim][mine])
            np.add.at(count[index], axis.unit[mine], 1)
    with np.errstate(invalid="ignore"):
        return [t / c for t, c in zip(total, count, strict=True)]


def _relative(score: np.ndarray) -> np.ndarray:
    mean = float(score.mean())
    return score / mean if mean > 0 else score
