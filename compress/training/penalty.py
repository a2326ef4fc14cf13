"""The penalty of sparsity training on γ, and what TensorBoard shows of it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from compress.channels.slots import FIXED
from compress.errors import EspalierError
from compress.latency.table import evaluate, load_table
from compress.manifest import read_json, write_json
from compress.pruning.budget import round_up
from compress.pruning.importance import batch_norm_scales, prunable_scales
from compress.tasks import LETTERS

if TYPE_CHECKING:
    from compress.channels.graph import Graph

SPARSITY = "sparsity.json"  # what a training reads beside Ultralytics' arguments, in the stage's folder
NEAR_ZERO = 0.05  # |γ| below this share of the mean |γ| at the start counts as near zero


class GroupPenalty:
    """The gradient of Σ over units of ‖γ of the unit‖₂, for the γ that are trained.

    Raises:
        EspalierError: no batch norm has a channel that may be pruned, or Ultralytics' `freeze` holds all of them.
    """

    def __init__(self, graph: Graph, model: nn.Module) -> None:
        parameters = dict(model.named_parameters())
        offsets = np.cumsum([0, *graph.widths.tolist()])
        prunable = np.array([not group.frozen for group in graph.groups] + [False])  # the last entry is FIXED's
        self.device = device = next(model.parameters()).device
        names = batch_norm_scales(graph, model)
        self.units, self.groups = int(offsets[-1]), np.repeat(np.arange(graph.widths.size), graph.widths)
        self.saliency, self.watched = torch.zeros(self.units, device=device), False
        self.gammas: list[tuple[nn.Parameter, torch.Tensor, torch.Tensor]] = []
        for axis in graph.axes:
            # A frozen γ has no gradient: the loss would seem to miss its channel least of all, and it never shrinks.
            if axis.tensor in names and parameters[axis.tensor].requires_grad:
                unit = np.where(axis.group == FIXED, 0, offsets[axis.group] + axis.unit)
                weight = torch.from_numpy(prunable[axis.group]).to(device, torch.float32)
                self.gammas.append((parameters[axis.tensor], torch.from_numpy(unit).to(device), weight))
        if not any(bool(weight.any()) for _, _, weight in self.gammas):
            raise EspalierError(
                "the model has no batch norm whose channels may be pruned and that is not frozen, so sparsity training "
                "has nothing to press: leave it out (sparsify.epochs=0), and prune by another importance than bn"
            )

    @torch.no_grad()
    def add_gradient(self, strength: float, units: torch.Tensor | None = None) -> None:
        """Add `strength`·γ/‖γ of its unit‖ to the gradient of every prunable γ; nothing where γ is zero.

        Args:
            strength: λ.
            units: boolean, shape (units,): the ones that are pulled; all of them when not given.
        """
        if strength == 0.0:
            return
        norm = self._norms().clamp_(min=1e-12)
        for gamma, unit, weight in self.gammas:
            if gamma.grad is not None:
                pulled = weight if units is None else weight * units[unit]
                gamma.grad.add_((strength * pulled * gamma / norm[unit]).to(gamma.grad.dtype))

    @torch.no_grad()
    def watch(self) -> None:
        """Add up what the gradients of a step say of each unit: how the loss would change without it, squared.

        To first order, see Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019.
        """
        change = torch.zeros_like(self.saliency)
        for gamma, unit, weight in self.gammas:
            if gamma.grad is not None:
                change.index_add_(0, unit, (gamma * gamma.grad).float() * weight)
        self.saliency += change.square()
        self.watched = True

    @torch.no_grad()
    def least(self, share: float, most: np.ndarray) -> torch.Tensor:
        """Return the units that the loss misses least as watched, boolean, shape (units,), with a share of all γ.

        A unit of many layers has a γ in each of them.

        Args:
            most: units that each group may lose, shape (groups,). A layer that the loss hardly misses would else be
                chosen as a whole, a cut would have to leave a part of it, and take channels elsewhere that are alive.
        """
        count = torch.zeros(self.units, dtype=torch.long, device=self.device)
        for _, unit, weight in self.gammas:
            count.index_add_(0, unit, (weight > 0).long())
        known = count.nonzero().flatten()
        order = known[self.saliency[known].argsort()]
        group = self.groups[order.cpu().numpy()]
        order = order[torch.from_numpy(_places(group) < most[group]).to(self.device)]
        chosen = torch.zeros(self.units, dtype=torch.bool, device=self.device)
        chosen[order[count[order].cumsum(0) - count[order] / 2 < share * count.sum()]] = True
        return chosen

    def _norms(self) -> torch.Tensor:
        """Return ‖γ‖₂ of every unit, shape (units,)."""
        square = torch.zeros(self.units, device=self.device)
        for gamma, unit, weight in self.gammas:
            square.index_add_(0, unit, gamma.detach().float().square() * weight)
        return square.sqrt()

    def values(self, units: torch.Tensor | None = None) -> np.ndarray:
        """Return |γ| of the prunable channels that are trained, where `units` are given of theirs."""
        kept = [
            gamma.detach().abs()[(weight > 0) if units is None else (weight > 0) & units[unit]]
            for gamma, unit, weight in self.gammas
        ]
        return torch.cat(kept).double().cpu().numpy()


def _places(groups: np.ndarray) -> np.ndarray:
    """Return for each entry how many of the same group come before it.

    >>> _places(np.array([3, 3, 1, 3])).tolist()
    [0, 1, 0, 2]
    """
    together = np.argsort(groups, kind="stable")
    first = np.searchsorted(groups[together], groups[together])
    places = np.empty_like(groups)
    places[together] = np.arange(groups.size) - first
    return places


class GammaLog:
    """γ of the prunable channels, watched in TensorBoard, and what a cut of those near zero would leave of a cost."""

    def __init__(self, graph: Graph, folder: Path, model: nn.Module) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tensorboard's own imports
            from torch.utils.tensorboard import SummaryWriter

        self.graph = graph
        self.writer = SummaryWriter(str(folder / "tensorboard"))
        settings = read_json(folder / SPARSITY)
        if "start_mean" not in settings:
            settings["start_mean"] = float(np.concatenate(list(prunable_scales(graph, model).values())).mean())
            write_json(folder / SPARSITY, settings)
        self.threshold = NEAR_ZERO * settings["start_mean"]
        self.near_zero = 0.0
        self.table = load_table(Path(settings["table"])) if settings.get("table") else None
        self.latency = evaluate(self.table, graph) if self.table else None

    def write(self, model: nn.Module, epoch: int, strength: float, metrics: dict[str, Any]) -> None:
        """Write one epoch."""
        gammas = prunable_scales(self.graph, model)
        every = np.concatenate(list(gammas.values()))
        self.near_zero = float((every < self.threshold).mean())
        self.writer.add_histogram("gamma/all", every, epoch)
        for name, values in gammas.items():
            self.writer.add_histogram(f"gamma/{name.removesuffix('.weight')}", values, epoch)
        self.writer.add_scalar("sparsity/near_zero_share", self.near_zero, epoch)
        left = widths_without(self.graph, batch_norm_scales(self.graph, model), self.threshold)
        share = self.graph.macs(left) / self.graph.macs(self.graph.widths)
        self.writer.add_scalar("sparsity/macs_if_pruned", share, epoch)
        if self.table and self.latency:
            allowed = round_up(self.graph, left, self.table.budget)
            share = self.latency(allowed) / self.latency(self.graph.widths)
            self.writer.add_scalar("sparsity/latency_if_pruned", share, epoch)
        self.writer.add_scalar("sparsity/mean_gamma", float(every.mean()), epoch)
        self.writer.add_scalar("sparsity/lambda", strength, epoch)
        for key, value in metrics.items():
            if key.startswith("metrics/"):
                self.writer.add_scalar(key.removesuffix(f"({LETTERS['detect']})"), float(value), epoch)
        self.writer.flush()


def widths_without(graph: Graph, gammas: dict[str, np.ndarray], threshold: float) -> np.ndarray:
    """Return the width of each group without the units whose γ are all below a threshold, shape (groups,).

    A group keeps at least one unit, and those that no batch norm makes.

    Args:
        gammas: |γ| by name, as `batch_norm_scales` returns them.
    """
    largest = [np.full(group.width, -1.0) for group in graph.groups]
    for axis in graph.axes:
        if axis.tensor in gammas:
            for index in np.unique(axis.group[axis.group != FIXED]).tolist():
                mine = axis.group == index
                np.maximum.at(largest[index], axis.unit[mine], gammas[axis.tensor][mine])
    kept = [int(((values < 0) | (values >= threshold)).sum()) for values in largest]
    return np.array([g.width if g.frozen else max(n, 1) for g, n in zip(graph.groups, kept, strict=True)])
