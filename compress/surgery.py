"""The cut: a plan applied to a model gives a new, smaller model. It ranks nothing and looks nothing up."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np

from compress.checkpoint import PLANS, plans_of, structure_hash
from compress.errors import PlanError, SurgeryError
from compress.graph import RESIZABLE_SPLITS, Graph, masked_outputs, training_head

if TYPE_CHECKING:
    from torch import Tensor, nn

    from compress.plan import Plan

ORACLE_TOLERANCE = 1e-4


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
    for owner in {name.rpartition(".")[0] for tensor in cuts for name in names[id(state[tensor])]}:
        _refresh_counts(pruned.get_submodule(owner))
    for module in pruned.modules():
        if type(module).__name__ in RESIZABLE_SPLITS:
            module.c = module.cv1.conv.out_channels // 2  # type: ignore[union-attr]
    setattr(pruned, PLANS, [*plans_of(model), plan.model_dump(mode="json")])
    return pruned


def oracle_error(graph: Graph, pruned: nn.Module, keep: list[np.ndarray], image: Tensor) -> float:
    """Return the largest relative difference between the pruned model and the dense one with its channels zeroed.

    Every removed channel is set to zero after each operation of the dense model; the pruned model must then return
    the same raw maps, of every head. Differences are relative to the largest magnitude of each output.

    Args:
        graph: of the dense model.
        image: shape (1, channels, imgsz, imgsz), at the size that the graph was made for.

    Raises:
        SurgeryError: the pruned model does not run, or returns other shapes.
    """
    import torch
    from torch.utils import _pytree as pytree

    with torch.inference_mode(), training_head(pruned):
        expected = masked_outputs(graph, image, keep)
        try:
            outputs = [value for value in pytree.tree_leaves(pruned(image)) if isinstance(value, torch.Tensor)]
        except (RuntimeError, ValueError, IndexError) as error:
            raise SurgeryError(f"the pruned model does not run: {str(error).splitlines()[0]}") from error
    worst = 0.0
    for number, (ours, reference) in enumerate(zip(outputs, expected, strict=True)):
        if ours.shape != reference.shape:
            raise SurgeryError(f"output {number} has shape {tuple(ours.shape)}, it must be {tuple(reference.shape)}")
        scale = reference.abs().max().clamp(min=1e-12)
        worst = max(worst, float((ours - reference).abs().max() / scale))
    return worst


def check_oracle(graph: Graph, pruned: nn.Module, keep: list[np.ndarray], seed: int = 0) -> float:
    """Run the oracle on noise, at the size that the graph was made for, and return its error.

    Raises:
        SurgeryError: the error is above the tolerance; such a plan must not be written.
    """
    import torch

    shape = next(
        node.meta["val"].shape
        for node in graph.program.graph.nodes
        if node.name in graph.program.graph_signature.user_inputs
    )
    device = next(pruned.parameters()).device
    image = torch.rand(tuple(shape), generator=torch.Generator().manual_seed(seed)).to(device)
    error = oracle_error(graph, pruned, keep, image)
    if not error <= ORACLE_TOLERANCE:
        raise SurgeryError(
            f"the pruned model differs from the masked dense model by {error:.1e} (limit {ORACLE_TOLERANCE:.0e}): "
            "the plan is wrong and was not written; please report this model"
        )
    return error


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


def _refresh_counts(module: nn.Module) -> None:
    """Set the channel counts that a module keeps beside its weights."""
    from torch import nn
    from torch.nn.modules.batchnorm import _NormBase
    from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

    if isinstance(module, _ConvTransposeNd):
        module.in_channels, module.out_channels = module.weight.shape[0], module.weight.shape[1] * module.groups
    elif isinstance(module, _ConvNd):
        if module.groups == module.in_channels > 1:  # depthwise: as many groups as inputs
            module.groups = module.weight.shape[0] * module.groups // module.out_channels
        module.out_channels, module.in_channels = module.weight.shape[0], module.weight.shape[1] * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, _NormBase):  # batch and instance norm
        module.num_features = module.weight.shape[0]
