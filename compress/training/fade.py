"""Fade out, during training, the channels that a plan will remove: the rest learns to do without them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

if TYPE_CHECKING:
    from compress.pruning.plan import Plan

START, END = 0.2, 0.8  # shares of the training between which channels fade; before and after, all that is left trains
FADED = 0.02  # share of the largest γ of a layer: a faded one is below


def remaining(progress: float) -> float:
    """Return the share of γ and β that the schedule leaves to condemned channels.

    >>> [round(remaining(progress), 2) for progress in (0.0, 0.2, 0.5, 0.8, 1.0)]
    [1.0, 1.0, 0.5, 0.0, 0.0]
    """
    return min(max((END - progress) / (END - START), 0.0), 1.0)


def condemned_by(
    plan: Plan, model: nn.Module, names: Collection[str] = ("weight", "bias")
) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
    """Yield γ and β of the batch norms that a plan cuts, each with a mask of the channels that go."""
    modules = dict(model.named_modules())
    for tensor, dim, keep in plan.axis_masks():
        layer, _, name = tensor.rpartition(".")
        if dim == 0 and name in names and isinstance(modules[layer], _BatchNorm):
            parameter = modules[layer].get_parameter(name)
            yield parameter, torch.from_numpy(~keep).to(parameter.device)


def faded(plan: Plan, model: nn.Module) -> tuple[int, int]:
    """Return how many of the γ that a plan cuts have faded before, and how many it cuts in all.

    The average of weights, which is what is saved, may lag a little behind the zero of the training.
    """
    gone = total = 0
    for gamma, condemned in condemned_by(plan, model, ("weight",)):
        size = gamma.detach().abs()
        gone += int((size[condemned] <= FADED * size.max()).sum())
        total += int(condemned.sum())
    return gone, total


class Fade:
    """Scales γ and β of condemned channels down to zero, a little at every step.

    Soft pruning with a gradual schedule (after He et al., "Asymptotic Soft Filter Pruning", IEEE Trans. Cybernetics
    2020): a channel whose γ and β are zero gives act(0), which is zero for ReLU and SiLU, so that cutting it changes
    nothing. Unlike a penalty it reaches zero in time, at any learning rate, and leaves all other channels alone.
    """

    def __init__(self, plan: Plan, model: nn.Module) -> None:
        self.parameters = list(condemned_by(plan, model))
        self.remaining = 1.0

    @torch.no_grad()
    def apply(self, progress: float) -> None:
        """Scale condemned channels to what the schedule leaves of them when `progress` of the training is done."""
        left = remaining(progress)
        ratio = left / self.remaining if self.remaining > 0.0 else 0.0
        self.remaining = left
        if ratio < 1.0:
            for parameter, condemned in self.parameters:
                parameter[condemned] *= ratio
