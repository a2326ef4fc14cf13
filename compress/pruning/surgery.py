"""The cut: a plan applied to a model gives a new, smaller model. It ranks nothing and looks nothing up."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np

from compress.checkpoint import PLANS, plans_of, structure_hash
from compress.errors import PlanError
from compress.pruning.attributes import refresh_attributes

if TYPE_CHECKING:
    from torch import Tensor, nn

    from compress.pruning.plan import Plan


def apply_plan(model: nn.Module, plan: Plan) -> nn.Module:
    """Return a pruned copy of a model; the model itself stays as it is.

    The copy carries the plan (after those that shaped it before), so that a trainer can rebuild its shape.

    Raises:
        PlanError: the plan was made for another model, or its indices do not fit.
    """
    found = structure_hash(model)
    if found != plan.structure:
        raise PlanError(f"the plan was made for a model of structure {plan.structure[:12]}, this one is {found[:12]}")
    pruned = copy.deepcopy(model)
    cuts: dict[str, dict[int, np.ndarray]] = defaultdict(dict)
    for tensor, dim, mask in plan.axis_masks():
        cuts[tensor][dim] = mask
    state = pruned.state_dict(keep_vars=True)
    names: dict[int, list[str]] = defaultdict(list)  # several layers may hold one weight, and go on to do so
    for name, value in state.items():
        names[id(value)].append(name)
    for tensor, dims in cuts.items():
        if tensor not in state:
            raise PlanError(f"the plan cuts {tensor}, which the model does not have")
        _replace(pruned, names[id(state[tensor])], _cut(tensor, state[tensor], dims))
    for owner, module in pruned.named_modules():
        refresh_attributes(module, lambda name, owner=owner: cuts.get(f"{owner}.{name}", {}).get(0))
    setattr(pruned, PLANS, [*plans_of(model), plan.model_dump(mode="json")])
    return pruned


def _cut(tensor: str, value: Tensor, dims: dict[int, np.ndarray]) -> Tensor:
    import torch

    for dim, mask in dims.items():
        if dim >= value.ndim or mask.size != value.shape[dim]:
            size = value.shape[dim] if dim < value.ndim else 0
            raise PlanError(f"the plan has {mask.size} channels for dimension {dim} of {tensor}, it has {size}")
        if not mask.any():
            raise PlanError(f"the plan leaves no channel of dimension {dim} of {tensor}")
        value = value.index_select(dim, torch.from_numpy(np.flatnonzero(mask)).to(value.device))
    return value.detach().clone()


def _replace(model: nn.Module, tensors: list[str], value: Tensor) -> None:
    """Put one value under all the names that shared one."""
    from torch import nn

    places = [(model.get_submodule(tensor.rpartition(".")[0]), tensor.rpartition(".")[2]) for tensor in tensors]
    old = getattr(*places[0])
    new = nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value
    for module, name in places:
        setattr(module, name, new)
