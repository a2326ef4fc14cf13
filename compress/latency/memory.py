"""How much memory a network needs at given widths: its weights, and the activations that live at the same time.

Computed from shapes: activations of batch 1 in the order of the forward pass, each alive from the operation that makes
it to the last one that reads it; batch norms and activation functions work in place, and views share their source. A
runtime needs at least about so much, and its workspace and padding on top.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from compress.channels.cost import Cost
from compress.channels.slots import FIXED
from compress.channels.walk import operation_name

if TYPE_CHECKING:
    from compress.channels.graph import Graph

# Operations whose result lies where their first input lies.
SHARED = {
    "batch_norm",
    "silu",
    "silu_",
    "relu",
    "relu_",
    "relu6",
    "leaky_relu",
    "leaky_relu_",
    "hardtanh",
    "hardtanh_",
    "hardswish",
    "hardswish_",
    "sigmoid",
    "tanh",
    "gelu",
    "mish",
    "dropout",
    "getitem",
    "chunk",
    "split",
    "split_with_sizes",
    "unbind",
    "view",
    "reshape",
    "transpose",
    "permute",
    "contiguous",
    "flatten",
    "slice",
    "select",
    "squeeze",
    "unsqueeze",
    "clone",
    "detach",
    "alias",
    "expand",
}


@dataclass(frozen=True)
class Memory:
    """Bytes at any widths of the channel groups.

    Attributes:
        forms, consts: bytes of the activations that are alive at each step, shapes (steps, groups) and (steps,).
        weights: number of parameters.
        value_bytes: of one weight or activation.
    """

    forms: np.ndarray
    consts: np.ndarray
    weights: Cost
    value_bytes: int

    def __call__(self, widths: np.ndarray) -> float:
        """Return the bytes of all weights and of the activations at the peak."""
        return float((self.forms @ widths + self.consts).max()) + self.value_bytes * self.weights(widths)


def memory_of(graph: Graph, value_bytes: int = 4) -> Memory:
    """Return the memory of a model as a function of the widths of its groups.

    Args:
        value_bytes: of one weight or activation: 4 in fp32, 2 in fp16.
    """
    nodes = [node for node in graph.program.graph.nodes if node.op == "call_function" or _is_image(graph, node)]
    place = {node.name: step for step, node in enumerate(nodes)}
    owner: dict[str, str] = {}
    last: dict[str, int] = {}
    sizes: dict[str, tuple[np.ndarray, float]] = {}
    for step, node in enumerate(nodes):
        sources = [source for source in node.all_input_nodes if source.name in place]
        shares = bool(sources) and node.op == "call_function" and operation_name(node) in SHARED
        owner[node.name] = owner[sources[0].name] if shares else node.name
        if not shares:
            sizes[node.name] = _size(graph, node)
        for source in sources:
            last[owner[source.name]] = step
    forms, consts = np.zeros((len(nodes), len(graph.groups))), np.zeros(len(nodes))
    for name, (form, const) in sizes.items():
        alive = slice(place[name], last.get(name, len(nodes) - 1) + 1)
        forms[alive] += form * value_bytes
        consts[alive] += const * value_bytes
    return Memory(forms, consts, graph.params, value_bytes)


def _is_image(graph: Graph, node: object) -> bool:
    return (
        getattr(node, "op", None) == "placeholder"
        and getattr(node, "name", "") in graph.program.graph_signature.user_inputs
    )


def _size(graph: Graph, node: object) -> tuple[np.ndarray, float]:
    """Return how many values a result has, as factors of the groups' widths and a constant."""
    count = len(graph.groups)
    shape = getattr(getattr(node, "meta", {}).get("val"), "shape", ())
    total = float(np.prod([int(size) for size in shape])) if shape else 0.0
    described = graph.descriptions.get(getattr(node, "name", ""))
    if described is None or total == 0.0:
        return np.zeros(count), total
    group = described[0]
    each = total / group.size
    used = group[group != FIXED]
    return np.bincount(used, minlength=count) / np.maximum(graph.widths, 1) * each, each * int((group == FIXED).sum())
