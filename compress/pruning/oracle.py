"""The proof of a cut: the pruned model computes what the dense one computes with the removed channels set to zero."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.channels.capture import training_head
from compress.channels.graph import Graph
from compress.channels.slots import FIXED
from compress.channels.walk import operation_name
from compress.errors import SurgeryError

if TYPE_CHECKING:
    from torch import Tensor, nn

ORACLE_TOLERANCE = 1e-4


def oracle_error(graph: Graph, pruned: nn.Module, keep: list[np.ndarray], image: Tensor) -> float:
    """Return the largest relative difference between the pruned model and the dense one with its channels zeroed.

    Every removed channel is set to zero after each operation of the dense model; the pruned model must then return
    the same raw maps, of every head. Differences are relative to the largest magnitude of each output, and infinite
    where one of the two is not finite.

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
        except Exception as error:  # whatever a stranger's forward raises
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise SurgeryError(f"the pruned model does not run: {reason[0]}") from error
    if len(outputs) != len(expected):
        raise SurgeryError(f"the pruned model returns {len(outputs)} tensors, it must be {len(expected)}")
    worst = 0.0
    for number, (ours, reference) in enumerate(zip(outputs, expected, strict=True)):
        if ours.shape != reference.shape:
            raise SurgeryError(f"output {number} has shape {tuple(ours.shape)}, it must be {tuple(reference.shape)}")
        ours, reference = ours.float(), reference.float()  # masks and indices too
        scale = reference.abs().max().clamp(min=1e-12)
        relative = float((ours - reference).abs().max() / scale)
        worst = max(worst, relative if math.isfinite(relative) else math.inf)  # max() passes over NaN
    return worst


def check_oracle(graph: Graph, pruned: nn.Module, keep: list[np.ndarray], seed: int = 0) -> float:
    """Run the oracle on noise, at the size that the graph was made for, and return its error.

    Raises:
        SurgeryError: the error is above the tolerance; such a plan must not be written.
    """
    error = oracle_error(graph, pruned, keep, noise(graph, pruned, seed))
    if not error <= ORACLE_TOLERANCE:
        raise SurgeryError(
            f"the pruned model differs from the masked dense model by {error:.1e} (limit {ORACLE_TOLERANCE:.0e}): "
            "the plan is wrong and was not written; please report this model"
        )
    return error


def noise(graph: Graph, model: nn.Module, seed: int = 0) -> Tensor:
    """Return a random image of the size that the graph was made for, on the model's device."""
    import torch

    shape = next(
        node.meta["val"].shape
        for node in graph.program.graph.nodes
        if node.name in graph.program.graph_signature.user_inputs
    )
    device = next(model.parameters()).device
    return torch.rand(tuple(shape), generator=torch.Generator().manual_seed(seed)).to(device)


def masked_outputs(graph: Graph, image: Tensor, keep: list[np.ndarray]) -> list[Tensor]:
    """Run the dense model with every removed channel set to zero wherever it appears, and return its kept outputs.

    Args:
        image: shape (1, channels, imgsz, imgsz).
        keep: per group a boolean array, shape (width,).

    Returns:
        The outputs in order, without the removed channels, as the pruned model returns them.
    """
    import torch
    from torch.fx.node import map_arg

    program = graph.program
    names = {**program.graph_signature.inputs_to_parameters, **program.graph_signature.inputs_to_buffers}
    stored = {**program.state_dict, **program.constants}
    constants = program.graph_signature.inputs_to_lifted_tensor_constants
    last_use = {source: node for node in program.graph.nodes for source in node.all_input_nodes}
    dying: dict[Any, list[Any]] = defaultdict(list)
    for source, node in last_use.items():
        dying[node].append(source)
    keep_flat, offsets = _flatten_keep(keep)
    values: dict[Any, Any] = {}

    def kept(node: Any) -> np.ndarray:
        group, unit = graph.descriptions[node.name]
        return (group == FIXED) | keep_flat[np.where(group == FIXED, 0, offsets[group] + unit)]

    for node in program.graph.nodes:
        if node.op == "placeholder":
            name = names.get(node.name) or constants.get(node.name)
            # What the forward pass changes in place, its input or a counter, is neither ours nor the next run's.
            is_weight = name is not None and node.name not in program.graph_signature.inputs_to_buffers
            given = stored[name] if name else image
            values[node] = given if is_weight else given.clone()
        elif node.op == "get_attr":  # the body of `with torch.no_grad():`, which is called further below
            values[node] = getattr(program.graph_module, node.target)
        elif node.op == "call_function":
            arguments = map_arg((node.args, node.kwargs), lambda n: values[n])
            value = node.target(*arguments[0], **arguments[1])
            if node.name in graph.descriptions and isinstance(value, torch.Tensor) and not (mask := kept(node)).all():
                # In place where the operation itself is: later readers of its input see the change in both.
                # Filled, not multiplied: what a division by a removed channel left there may not be finite.
                fill = value.masked_fill_ if operation_name(node).endswith("_") else value.masked_fill
                filled = fill(torch.from_numpy(~mask).to(value.device), 0)
                # What a view shows is mostly masked already; the view itself is kept, for what is written through it.
                value = value if torch.equal(value, filled) else filled
            values[node] = value
        else:
            return [_select(values[o], kept(o)) for o in _output_nodes(graph, node)]
        for source in dying[node]:
            if not _is_output(source):
                del values[source]
    raise AssertionError("an exported graph ends with its output")


def _flatten_keep(keep: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    offsets = np.cumsum([0, *(mask.size for mask in keep)])
    return np.concatenate([*keep, np.ones(1, dtype=bool)]), offsets


def _output_nodes(graph: Graph, output: Any) -> list[Any]:
    user = {s.arg.name for s in graph.program.graph_signature.output_specs if s.kind.name == "USER_OUTPUT"}
    return [node for node in output.args[0] if getattr(node, "name", None) in user]


def _is_output(node: Any) -> bool:
    return any(user.op == "output" for user in node.users)


def _select(value: Tensor, mask: np.ndarray) -> Tensor:
    """Drop removed channels from an output; `mask` has the output's rank, size 1 where it carries none."""
    import torch

    for dim in range(mask.ndim):
        if mask.shape[dim] > 1:
            others = tuple(d for d in range(mask.ndim) if d != dim)
            indices = np.flatnonzero(mask.all(axis=others))
            value = value.index_select(dim, torch.from_numpy(indices).to(value.device))
    return value
