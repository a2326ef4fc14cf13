"""The channel graph: which channels of a model live and die together, and what each of them costs.

A model is captured once with `torch.export` and walked in order; the rules of `rules.py` say how channels pass each
operation. Slots that are bound together form a unit; units that the same layers use in the same way form a *channel
group*, whose width can be chosen. Groups may be tied: they keep the same share of their channels.
"""

from __future__ import annotations

import copy
import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from compress.channels import rules_shapes  # noqa: F401  (its rules join those of `rules`)
from compress.channels.capture import capture, training_head
from compress.channels.cost import Cost
from compress.channels.rules import RULES, freeze_all
from compress.channels.slots import FIXED, Ledger
from compress.channels.trial import freeze_what_breaks
from compress.channels.walk import Walk, modules_of, operation_name

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram

# Outputs that a head hands on for their spatial shape only: its loss reads no channel of them.
_SHAPE_ONLY_OUTPUTS = {"feats"}


@dataclass(frozen=True)
class Group:
    """Channels with one width to choose.

    Attributes:
        name: the layer that makes them first, with its range of channels if it makes others too.
        width: number of units, each one channel or several that live and die together, such as a head of attention.
        unit: channels that one unit is, at least, in the layers of the group.
        layers: the layers that make or carry these channels; all lose the same ones.
        consumers: the layers that read them.
        frozen: why no channel may be removed, or None.
        tie: groups with the same number keep the same share of their width.
    """

    name: str
    width: int
    unit: int
    layers: tuple[str, ...]
    consumers: tuple[str, ...]
    frozen: str | None
    tie: int


@dataclass(frozen=True)
class Axis:
    """A dimension of a weight or buffer: at each position a group (or FIXED) and a unit of that group.

    `reads` tells that these are the channels that a layer reads, not those that it makes or carries.
    """

    tensor: str
    dim: int
    group: np.ndarray
    unit: np.ndarray
    reads: bool = False


@dataclass(frozen=True)
class Graph:
    """The channel graph of one model at one input size.

    Attributes:
        groups: the channel groups, in the order of the forward pass.
        axes: every dimension of every weight or buffer that channels index.
        positions: output positions per weight, to turn its size into MACs.
        shapes: shapes of all weights and buffers.
        parameters: names of those that are parameters.
        training_only: names of those that inference does without: they cost nothing on a device.
        program: the exported program, for the oracle.
        descriptions: what walking found for each node of the program, as (group, unit) arrays.
    """

    groups: list[Group]
    axes: list[Axis]
    positions: dict[str, int]
    shapes: dict[str, tuple[int, ...]]
    parameters: frozenset[str]
    training_only: frozenset[str]
    program: ExportedProgram
    descriptions: dict[str, tuple[np.ndarray, np.ndarray]] = field(repr=False)

    @cached_property
    def widths(self) -> np.ndarray:
        """Width of each group before any cut, shape (groups,)."""
        return np.array([group.width for group in self.groups], dtype=np.int64)

    @cached_property
    def macs(self) -> Cost:
        """Multiply-accumulates of the convolutions and linear layers, for one image in inference."""
        used = {name: float(count) for name, count in self.positions.items() if name not in self.training_only}
        return Cost.build(self, used)

    @cached_property
    def params(self) -> Cost:
        """Number of parameters that inference needs."""
        return Cost.build(self, dict.fromkeys(sorted(self.parameters - self.training_only), 1.0))

    def frozen(self) -> dict[str, str]:
        """Return the reason of every frozen group, by its name."""
        return {group.name: group.frozen for group in self.groups if group.frozen}


def build_graph(model: nn.Module, imgsz: int, channels: int = 3) -> Graph:
    """Trace a model and return its channel graph. The model itself is not changed.

    Args:
        model: any module that takes an image batch of shape (1, channels, imgsz, imgsz).

    Raises:
        GraphError: torch.export cannot capture the model.
    """
    program = capture(model, imgsz, channels)
    aliases = _aliases(model)
    walk = Walk(program, aliases)
    for node in program.graph.nodes:
        if node.op == "placeholder" and not walk.is_weight(node):
            walk.results[node.name] = walk.fixed_like(node)
        elif node.op == "call_function":
            walk.results[node.name] = RULES.get(operation_name(node), freeze_all)(walk, node)
    _tie_attention(walk, program)
    _freeze_outputs(walk, program, _SHAPE_ONLY_OUTPUTS if _has_detection_head(model) else set())
    shapes = {name: tuple(t.shape) for name, t in program.state_dict.items()}
    graph = _collect(walk, program, shapes, aliases, _training_only(model))
    return freeze_what_breaks(graph, model)


def _aliases(model: nn.Module) -> dict[str, str]:
    """Return the first name of every weight, by each of its names."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(value), name) for name, value in model.state_dict(keep_vars=True).items()}


def _tie_attention(walk: Walk, program: ExportedProgram) -> None:
    """Tie what enters Ultralytics' Attention to its values: it reshapes those by the width of its input."""
    inputs: dict[str, np.ndarray] = {}
    for node in program.graph.nodes:
        if node.op == "call_function" and operation_name(node) == "conv2d":
            (layer, _), *outer = reversed(modules_of(node))
            for name, kind in outer:
                if kind == "ultralytics.nn.modules.block.Attention":
                    if layer == f"{name}.qkv.conv":
                        inputs[name] = walk.slots(node.args[0])
                    elif layer == f"{name}.proj.conv":
                        parts = [inputs[name].reshape(-1), walk.slots(node.args[0]).reshape(-1)]
                        walk.ledger.tie(parts, f"input and values of {name}")


def _has_detection_head(model: nn.Module) -> bool:
    """Tell whether the names among the outputs are those of Ultralytics."""
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    return any(kind.__module__ == "ultralytics.nn.modules.head" for kind in kinds)


def _training_only(model: nn.Module) -> frozenset[str]:
    """Return the weights that Ultralytics' head drops for inference, such as the second head of v10 and 26."""
    head = training_head(model).head
    if head is None or not _has_detection_head(model) or not hasattr(head, "fuse"):
        return frozenset()
    deployed = copy.deepcopy(head)
    deployed.fuse()
    prefix = next(name for name, module in model.named_modules() if module is head)
    return frozenset(f"{prefix}.{name}" for name in head.state_dict().keys() - deployed.state_dict().keys())


def _freeze_outputs(walk: Walk, program: ExportedProgram, shape_only: set[str]) -> None:
    from torch.utils import _pytree as pytree

    nodes = {node.name: node for node in program.graph.nodes}
    outputs = [spec.arg for spec in program.graph_signature.output_specs if spec.kind.name == "USER_OUTPUT"]
    assert program.call_spec.out_spec is not None
    tree = pytree.tree_unflatten(outputs, program.call_spec.out_spec)
    for path, output in pytree.tree_flatten_with_path(tree)[0]:
        keys = {getattr(key, "key", None) for key in path}
        node = nodes.get(getattr(output, "name", None))  # None for a constant
        if node and not keys & shape_only:
            walk.ledger.freeze(walk.slots(node), "output of the model")


def _collect(
    walk: Walk,
    program: ExportedProgram,
    shapes: dict[str, tuple[int, ...]],
    aliases: dict[str, str],
    training_only: frozenset[str],
) -> Graph:
    """Turn slots into units, units into groups, and rewrite all arrays in terms of (group, unit)."""
    ledger = walk.ledger
    roots = np.array([ledger.find(slot) for slot in range(len(ledger.parent))], dtype=np.int64)
    reasons: dict[int, str] = {}
    for slot, reason in ledger.frozen.items():
        reasons.setdefault(int(roots[slot]), reason)

    # Units belong to one group when the same dimensions of the same weights, and the same parts, hold them.
    signature: dict[int, list[object]] = defaultdict(list)
    for number, use in enumerate(ledger.uses):
        for root in np.unique(roots[use.slots[use.slots != FIXED]]).tolist():
            signature[root].append(number)
    for number, equal in enumerate(ledger.equal_parts):
        for index, part in enumerate(equal.parts):
            for root in np.unique(roots[part[part != FIXED]]).tolist():
                signature[root].append((number, index))
    members: dict[object, list[int]] = defaultdict(list)
    for root in np.unique(roots).tolist():
        members[(reasons.get(root), *signature[root])].append(root)

    group_of = np.full(len(roots) + 1, FIXED)
    unit_of = np.full(len(roots) + 1, 0)
    frozen: list[str | None] = []
    for index, (key, units) in enumerate(members.items()):
        group_of[units] = index
        unit_of[units] = range(len(units))
        frozen.append(key[0])  # type: ignore[index]
    group_of[:-1] = group_of[roots]
    unit_of[:-1] = unit_of[roots]

    ties = _ties(ledger, group_of, frozen)
    axes = [Axis(use.tensor, use.dim, group_of[use.slots], unit_of[use.slots], use.reads) for use in ledger.uses]
    groups = _name_groups(axes, [len(units) for units in members.values()], frozen, ties, shapes)
    descriptions = {
        name: (group_of[slots], unit_of[slots]) for name, slots in walk.results.items() if isinstance(slots, np.ndarray)
    }
    names = program.graph_signature.inputs_to_parameters.values()
    parameters = frozenset(aliases.get(name, name) for name in names)
    return Graph(
        groups, _unique(axes), dict(ledger.positions), shapes, parameters, training_only, program, descriptions
    )


def _ties(ledger: Ledger, group_of: np.ndarray, frozen: list[str | None]) -> list[int]:
    """Number the groups so that those with one number keep the same share of their channels.

    Parts that must stay equally long are matched group by group where they are alike; where they are not, as two
    heads of 64 channels and the 128 that they become, all their groups keep one share.
    """
    parent = list(range(len(frozen)))

    def find(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    for equal in ledger.equal_parts:
        counts = [Counter(group_of[part].tolist()) for part in equal.parts]
        same_anyway = {index for index in counts[0] if all(count[index] == counts[0][index] for count in counts)}
        rest = [{index: n for index, n in count.items() if index not in same_anyway} for count in counts]
        members = {index for count in rest for index in count}
        if FIXED in members:
            for index in members - {FIXED}:
                frozen[index] = frozen[index] or f"meets fixed channels where parts must stay equal: {equal.where}"
        alike = all(list(count.values()) == list(rest[0].values()) for count in rest)
        columns = list(zip(*rest, strict=True)) if alike else [tuple(members)]
        for column in columns:
            for index in column[1:]:
                if FIXED not in (index, column[0]):
                    parent[find(index)] = find(column[0])
    ties = [find(index) for index in range(len(frozen))]
    reasons = {ties[index]: reason for index, reason in reversed(list(enumerate(frozen))) if reason}
    for index, tie in enumerate(ties):
        if tie in reasons:
            frozen[index] = frozen[index] or f"tied to {reasons[tie]}"
    return ties


def _name_groups(
    axes: list[Axis],
    widths: list[int],
    frozen: list[str | None],
    ties: list[int],
    shapes: dict[str, tuple[int, ...]],
) -> list[Group]:
    makers: dict[int, dict[str, None]] = defaultdict(dict)
    consumers: dict[int, dict[str, None]] = defaultdict(dict)
    names: dict[int, str] = {}
    vectors: dict[int, str] = {}  # for groups that no layer makes
    units = [0] * len(widths)
    for axis in axes:
        layer, _, weight = axis.tensor.rpartition(".")
        layer = layer if weight in ("weight", "bias", "running_mean", "running_var") and layer else axis.tensor
        for index in np.unique(axis.group[axis.group != FIXED]).tolist():
            mine = np.flatnonzero(axis.group == index)
            units[index] = math.gcd(units[index], *np.unique(axis.unit[mine], return_counts=True)[1].tolist())
            (consumers if axis.reads else makers)[index][layer] = None
            if not axis.reads:
                whole = mine.size == axis.group.size
                found = layer if whole else f"{layer}[{mine[0]}:{mine[-1] + 1}]"
                (names if len(shapes[axis.tensor]) > 1 else vectors).setdefault(index, found)
    return [
        Group(
            name=names.get(index) or vectors.get(index) or next(iter(consumers[index]), f"group {index}"),
            width=width,
            unit=max(units[index], 1),
            layers=tuple(makers[index]),
            consumers=tuple(consumers[index]),
            frozen=frozen[index],
            tie=ties[index],
        )
        for index, width in enumerate(widths)
    ]


def _unique(axes: list[Axis]) -> list[Axis]:
    """Drop repeated records of one dimension: a layer that is called twice is cut once.

    The slots of all calls are bound to each other, so that they differ at most where one is FIXED and the other frozen.
    """
    return list({(axis.tensor, axis.dim): axis for axis in axes}.values())
