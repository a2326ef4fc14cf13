"""The layers of a model in the order of its forward pass, by the blocks that run them, and how the blocks connect."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.channels.slots import FIXED

if TYPE_CHECKING:
    from torch import nn

    from compress.channels.graph import Axis, Graph

_CONTAINERS = {"Sequential", "ModuleList"}

Part = tuple[int | None, int]  # a group (None: channels that were not followed) and how many of its channels


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer.

    Attributes:
        kind: what it computes, such as "3×3 /2" for a stride of 2, or "3×3 dw" for a depthwise one.
        reads, makes: its input and output channels as runs of groups, in order.
        macs, params: its share of the model's.
    """

    name: str
    kind: str
    reads: tuple[Part, ...]
    makes: tuple[Part, ...]
    macs: float
    params: float

    @property
    def widths(self) -> tuple[int, int]:
        """Number of input and of output channels."""
        return sum(count for _, count in self.reads), sum(count for _, count in self.makes)


@dataclass(frozen=True)
class Block:
    """A module that the model itself calls.

    Attributes:
        sources: indices of the blocks whose results it reads, ascending; none for the image.
    """

    name: str
    kind: str
    layers: tuple[Layer, ...]
    sources: tuple[int, ...]


def blocks(graph: Graph, model: nn.Module) -> list[Block]:
    """Return the blocks of a model in the order of its forward pass; operations of the model itself join them."""
    program = graph.program
    signature = program.graph_signature
    weights = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    order: dict[str, str] = {}  # a block's name → its class
    sources: dict[str, set[str]] = defaultdict(set)
    origins: dict[Any, set[str]] = defaultdict(set)  # a node → the blocks that its value comes from
    home: dict[str, str] = {}  # a weight → the block that uses it first
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        name, kind = _block_of(node, model)
        inputs = node.all_input_nodes
        for source in inputs:
            if source.name in weights:
                home.setdefault(weights[source.name], name)
        before = set().union(*(origins[source] for source in inputs))
        if name == "" and not any(weights.get(source.name) in graph.positions for source in inputs):
            origins[node] = before  # an addition between blocks is part of the connection
            continue
        order.setdefault(name, kind)
        sources[name] |= before - {name}
        origins[node] = {name}
    index = {name: number for number, name in enumerate(order)}
    members: dict[str, list[Layer]] = defaultdict(list)
    for layer, tensor in _layers(graph, model):
        members[home[tensor]].append(layer)
    return [
        Block(name, kind, tuple(members[name]), tuple(sorted(index[source] for source in sources[name])))
        for name, kind in order.items()
    ]


def _block_of(node: Any, model: nn.Module) -> tuple[str, str]:
    """Return name and class of the outermost module below the model that runs a node and is no mere container."""
    names = [name.partition("@")[0] for name, _ in (node.meta.get("nn_module_stack") or {}).values()]
    for name in names:
        kind = type(model.get_submodule(name)).__name__
        if name and kind not in _CONTAINERS:
            return name, kind
    return "", type(model).__name__


def _layers(graph: Graph, model: nn.Module) -> list[tuple[Layer, str]]:
    """Return every layer with the weight that it multiplies by, in the order of the forward pass."""
    axes: dict[str, list[Axis]] = defaultdict(list)
    for axis in graph.axes:
        axes[axis.tensor].append(axis)
    macs = dict(zip(graph.macs.names, graph.macs.per_tensor(graph.widths), strict=True))
    params: dict[str, int] = defaultdict(int)
    for name in graph.parameters:
        params[name.rpartition(".")[0]] += int(np.prod(graph.shapes[name]))
    all_macs, all_params = sum(macs.values()) or 1.0, sum(params.values()) or 1
    found = []
    for tensor in graph.positions:
        name = tensor.rpartition(".")[0]
        module: Any = model.get_submodule(name)
        made = {not axis.reads: _runs(axis) for axis in axes[tensor]}
        reads, makes = _whole_widths(module, graph.shapes[tensor], made)
        layer = Layer(name, _kind(module), reads, makes, macs[tensor] / all_macs, params[name] / all_params)
        found.append((layer, tensor))
    return found


def _whole_widths(
    module: Any, shape: tuple[int, ...], runs: dict[bool, tuple[Part, ...]]
) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
    """Return what a layer reads and makes, also where the weight's dimension is not that of the feature map."""
    makes = runs.get(True) or runs.get(False) or ((None, shape[0]),)
    groups = getattr(module, "groups", 1)
    if groups > 1 and shape[1] == 1:  # depthwise: what it makes is what it reads
        times = shape[0] // groups
        return tuple((group, count // times) for group, count in makes), makes
    reads = runs.get(False, ((None, shape[1]),))
    return reads * groups, makes


def _runs(axis: Axis) -> tuple[Part, ...]:
    """Return an axis as runs of one group each; channels that were not followed are None."""
    ends = np.flatnonzero(np.diff(axis.group, append=FIXED - 1)) + 1
    starts = np.concatenate([[0], ends[:-1]])
    return tuple(
        (None if axis.group[start] == FIXED else int(axis.group[start]), int(end - start))
        for start, end in zip(starts, ends, strict=True)
    )


def _kind(module: Any) -> str:
    """Return what a layer computes in a few signs."""
    size = getattr(module, "kernel_size", None)
    if not isinstance(size, tuple):
        return "linear"
    words = ["×".join(map(str, size))]
    if any(step > 1 for step in module.stride):
        words.append(f"{'×' if 'Transpose' in type(module).__name__ else '/'}{module.stride[0]}")
    if module.groups > 1:
        words.append("dw" if module.groups == module.in_channels else f"{module.groups} groups")
    return " ".join(words)
