"""The channel graph: which channels of a model live and die together, and what each of them costs.

A model is captured once with `torch.export` and walked in order; the rules of `rules.py` say how channels pass each
operation. Slots that are bound together form a unit; units that the same layers use in the same way form a *channel
group*, whose width can be chosen. Groups may be tied: they keep the same number of channels.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.errors import GraphError
from compress.rules import RULES, freeze_all, operation_name
from compress.slots import FIXED, Ledger, fixed

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.export import ExportedProgram
    from torch.fx import Node

# Modules that split by a size they keep as an attribute; `surgery` sets it anew after the cut.
RESIZABLE_SPLITS = {"C2f", "C2PSA", "PSA"}
# Modules that reshape by the width of their own input, so that it cannot change without their attributes.
RESHAPED_BY_INPUT = {"Attention", "AAttn"}
# Outputs that a head hands on for their spatial shape only: its loss reads no channel of them.
_SHAPE_ONLY_OUTPUTS = {"feats"}


@dataclass(frozen=True)
class Group:
    """Channels with one width to choose.

    Attributes:
        name: the layer that makes them first, with its range of channels if it makes others too.
        width: number of units.
        layers: the layers that make or carry these channels; all lose the same ones.
        consumers: the layers that read them.
        frozen: why no channel may be removed, or None.
        tie: groups with the same number keep the same width.
    """

    name: str
    width: int
    layers: tuple[str, ...]
    consumers: tuple[str, ...]
    frozen: str | None
    tie: int


@dataclass(frozen=True)
class Axis:
    """A dimension of a weight or buffer: at each position a group (or FIXED) and a unit of that group."""

    tensor: str
    dim: int
    group: np.ndarray
    unit: np.ndarray


@dataclass(frozen=True)
class Graph:
    """The channel graph of one model at one input size.

    Attributes:
        groups: the channel groups, in the order of the forward pass.
        axes: every dimension of every weight or buffer that channels index.
        positions: output positions per weight, to turn its size into MACs.
        shapes: shapes of all weights and buffers.
        parameters: names of those that are parameters.
        program: the exported program, for the oracle.
        descriptions: what walking found for each node of the program, as (group, unit) arrays.
    """

    groups: list[Group]
    axes: list[Axis]
    positions: dict[str, int]
    shapes: dict[str, tuple[int, ...]]
    parameters: frozenset[str]
    program: ExportedProgram
    descriptions: dict[str, tuple[np.ndarray, np.ndarray]] = field(repr=False)

    @cached_property
    def widths(self) -> np.ndarray:
        """Width of each group before any cut, shape (groups,)."""
        return np.array([group.width for group in self.groups], dtype=np.int64)

    @cached_property
    def macs(self) -> Cost:
        """Multiply-accumulates of the convolutions and linear layers, for one image."""
        return Cost.build(self, {name: float(count) for name, count in self.positions.items()})

    @cached_property
    def params(self) -> Cost:
        """Number of parameters."""
        return Cost.build(self, dict.fromkeys(self.parameters, 1.0))

    def frozen(self) -> dict[str, str]:
        """Return the reason of every frozen group, by its name."""
        return {group.name: group.frozen for group in self.groups if group.frozen}


@dataclass(frozen=True)
class Cost:
    """A quantity that is a sum of products of up to two widths: Σ factor · (a·w + c) · (b·w + d).

    Attributes:
        factor: shape (tensors,).
        first, first_const, second, second_const: the two linear forms, shapes (tensors, groups) and (tensors,).
    """

    names: list[str]
    factor: np.ndarray
    first: np.ndarray
    first_const: np.ndarray
    second: np.ndarray
    second_const: np.ndarray

    @staticmethod
    def build(graph: Graph, weights: dict[str, float]) -> Cost:
        """Collect the cost of the tensors in `weights`, each counted `weights[name]` times its number of elements."""
        by_tensor: dict[str, list[Axis]] = defaultdict(list)
        for axis in graph.axes:
            by_tensor[axis.tensor].append(axis)
        names = list(weights)
        count = len(graph.groups)
        factor = np.array([weights[name] for name in names])
        forms = np.zeros((2, len(names), count))
        consts = np.ones((2, len(names)))
        for row, name in enumerate(names):
            axes = {axis.dim: axis for axis in by_tensor[name]}
            for place, axis in enumerate(axes.values()):
                used = axis.group[axis.group != FIXED]
                forms[place, row] = np.bincount(used, minlength=count) / np.maximum(graph.widths, 1)
                consts[place, row] = int((axis.group == FIXED).sum())
            factor[row] *= np.prod([size for dim, size in enumerate(graph.shapes[name]) if dim not in axes])
        return Cost(names, factor, forms[0], consts[0], forms[1], consts[1])

    def per_tensor(self, widths: np.ndarray) -> np.ndarray:
        """Return the cost of each tensor at the given widths of all groups, shape (tensors,)."""
        return self.factor * (self.first @ widths + self.first_const) * (self.second @ widths + self.second_const)

    def __call__(self, widths: np.ndarray) -> float:
        """Return the total at the given widths of all groups, shape (groups,)."""
        return float(self.per_tensor(widths).sum())

    def saving(self, widths: np.ndarray, change: dict[int, int]) -> float:
        """Return what removing `change[group]` channels from the given widths saves."""
        columns = list(change)
        removed = np.array([change[column] for column in columns])
        first = self.first @ widths + self.first_const
        second = self.second @ widths + self.second_const
        a = self.first[:, columns] @ removed
        b = self.second[:, columns] @ removed
        return float((self.factor * (first * b + a * second - a * b)).sum())


class Walk:
    """One pass over an exported program: what the rules see of it."""

    def __init__(self, program: ExportedProgram) -> None:
        self.ledger = Ledger()
        self.results: dict[str, Any] = {}
        signature = program.graph_signature
        self._tensors = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}

    def slots(self, node: Any) -> Any:
        """Return the description of a node's result (see `slots`)."""
        return self.results[node.name]

    def shape(self, node: Any) -> tuple[int, ...]:
        """Return the shape of a node's (first) result."""
        return self.shapes(node)[0]

    def shapes(self, node: Any) -> list[tuple[int, ...]]:
        """Return the shapes of all results of a node."""
        value = node.meta.get("val")
        several = value if isinstance(value, (list, tuple)) else [value]
        return [tuple(int(size) for size in getattr(item, "shape", ())) for item in several]

    def is_tensor(self, argument: Any) -> bool:
        """Tell whether an argument of a node is a tensor and not a number."""
        return hasattr(argument, "meta")

    def is_weight(self, node: Any) -> bool:
        """Tell whether a node is a parameter or buffer of the model."""
        return node.name in self._tensors

    def tensor_name(self, node: Any) -> str:
        """Return the name of the parameter or buffer that a node stands for.

        Raises:
            GraphError: the node is computed, not stored.
        """
        if node.name not in self._tensors:
            raise GraphError(f"the weight {node.name} is computed in the forward pass: such layers cannot be followed")
        return self._tensors[node.name]

    def freeze(self, node: Any, reason: str) -> None:
        """Freeze every channel of a node's result."""
        described = self.results.get(node.name)
        for slots in described if isinstance(described, list) else [described]:
            if slots is not None:
                self.ledger.freeze(slots, reason)

    def fixed_like(self, node: Node) -> Any:
        """Return the description of a result without removable channels."""
        described = [fixed(len(shape)) for shape in self.shapes(node)]
        return described if isinstance(node.meta.get("val"), (list, tuple)) else described[0]

    def place(self, node: Node) -> str:
        """Return the module that runs a node, such as `model.10.m.0.attn`."""
        return next((name for name, _ in reversed(_modules(node)) if name), "the model")

    def classes(self, node: Node) -> list[str]:
        """Return the class names of the modules that run a node, outermost first."""
        return [kind for _, kind in _modules(node)]

    def can_resize_splits(self, node: Node) -> bool:
        """Tell whether the module that runs a node keeps its split size where surgery can set it."""
        return bool(RESIZABLE_SPLITS & set(self.classes(node)[-1:]))


def build_graph(model: nn.Module, imgsz: int, channels: int = 3) -> Graph:
    """Trace a model and return its channel graph. The model itself is not changed.

    Args:
        model: any module that takes an image batch of shape (1, channels, imgsz, imgsz).

    Raises:
        GraphError: torch.export cannot capture the model.
    """
    program = capture(model, imgsz, channels)
    walk = Walk(program)
    for node in program.graph.nodes:
        if node.op == "placeholder":
            walk.results[node.name] = walk.fixed_like(node)
        elif node.op == "call_function":
            if operation_name(node) == "conv2d" and RESHAPED_BY_INPUT & set(walk.classes(node)):
                walk.freeze(node.args[0], f"{walk.place(node)} lies in an attention of fixed width")
            walk.results[node.name] = RULES.get(operation_name(node), freeze_all)(walk, node)
    _freeze_outputs(walk, program)
    return _collect(walk, program, {name: tuple(t.shape) for name, t in program.state_dict.items()})


def capture(model: nn.Module, imgsz: int, channels: int = 3) -> ExportedProgram:
    """Export a model for one image, with the head in training mode so that every branch is in the graph.

    End-to-end models (v10, 26) have two heads on one neck, and only one of them runs in inference.

    Raises:
        GraphError: torch.export cannot capture the model.
    """
    import torch

    device = next(model.parameters()).device
    image = torch.zeros(1, channels, imgsz, imgsz, device=device)
    with training_head(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.export warns about its own internals
        try:
            return torch.export.export(model, (image,), strict=False)
        except Exception as error:  # whatever a stranger's forward raises
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise GraphError(f"torch.export cannot capture {type(model).__name__}: {reason[0]}") from error


class training_head:  # noqa: N801  (reads as a statement: `with training_head(model):`)
    """Put the detection head, and it alone, in training mode: it then returns the raw maps of all its branches."""

    def __init__(self, model: nn.Module) -> None:
        layers: Any = getattr(model, "model", None)
        self.model = model
        self.head = layers[-1] if hasattr(layers, "__getitem__") and hasattr(model, "stride") else None

    def __enter__(self) -> None:
        self.before = {module: module.training for module in self.model.modules()}
        self.model.eval()
        if self.head is not None:
            self.head.training = True  # not .train(): its batch norms keep their statistics

    def __exit__(self, *_: object) -> None:
        for module, training in self.before.items():
            module.training = training


def _modules(node: Any) -> list[tuple[str, str]]:
    """Return name and class name of the modules that run a node, outermost first."""
    return [
        (name, (kind if isinstance(kind, str) else kind.__qualname__).rsplit(".", 1)[-1])
        for name, kind in (node.meta.get("nn_module_stack") or {}).values()
    ]


def _freeze_outputs(walk: Walk, program: ExportedProgram) -> None:
    from torch.utils import _pytree as pytree

    outputs = [spec.arg for spec in program.graph_signature.output_specs if spec.kind.name == "USER_OUTPUT"]
    assert program.call_spec.out_spec is not None
    tree = pytree.tree_unflatten(outputs, program.call_spec.out_spec)
    for path, output in pytree.tree_flatten_with_path(tree)[0]:
        keys = {getattr(key, "key", None) for key in path}
        if keys & _SHAPE_ONLY_OUTPUTS or not hasattr(output, "name"):
            continue
        described = walk.results.get(output.name)
        if isinstance(described, np.ndarray):
            walk.ledger.freeze(described, "output of the model")


def _collect(walk: Walk, program: ExportedProgram, shapes: dict[str, tuple[int, ...]]) -> Graph:
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
    axes = [Axis(use.tensor, use.dim, group_of[use.slots], unit_of[use.slots]) for use in ledger.uses]
    groups = _name_groups(axes, [len(units) for units in members.values()], frozen, ties, shapes)
    descriptions = {
        name: (group_of[slots], unit_of[slots]) for name, slots in walk.results.items() if isinstance(slots, np.ndarray)
    }
    parameters = frozenset(program.graph_signature.inputs_to_parameters.values())
    return Graph(groups, _unique(axes), dict(ledger.positions), shapes, parameters, program, descriptions)


def _ties(ledger: Ledger, group_of: np.ndarray, frozen: list[str | None]) -> list[int]:
    """Bind the widths of groups in equal parts; parts of different make-up are frozen, never guessed."""
    parent = list(range(len(frozen)))

    def find(index: int) -> int:
        while parent[index] != index:
            index = parent[index]
        return index

    for equal in ledger.equal_parts:
        rows = [group_of[part] for part in equal.parts]
        runs = [row[np.flatnonzero(np.diff(row, prepend=FIXED - 1))].tolist() for row in rows]
        counts = [[int((row == index).sum()) for index in run] for row, run in zip(rows, runs, strict=True)]
        alike = all(run_counts == counts[0] for run_counts in counts) and all(len(set(r)) == len(r) for r in runs)
        for column in zip(*runs, strict=True) if alike else []:
            for index in column[1:]:
                if FIXED in (index, column[0]):
                    alike = False
                else:
                    parent[find(index)] = find(column[0])
        if not alike:
            for index in {index for run in runs for index in run if index != FIXED}:
                frozen[index] = frozen[index] or f"unlike parts must stay equal: {equal.where}"
    for index in range(len(frozen)):
        reason = frozen[index]
        if reason is not None:
            for other in range(len(frozen)):
                if find(other) == find(index):
                    frozen[other] = frozen[other] or f"tied to {reason}"
    return [find(index) for index in range(len(frozen))]


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
    for axis in axes:
        layer = axis.tensor.rpartition(".")[0]
        weight = len(shapes[axis.tensor]) > 1
        for index in np.unique(axis.group[axis.group != FIXED]).tolist():
            (consumers if weight and axis.dim == 1 else makers)[index][layer] = None
            if index not in names and weight:
                mine = np.flatnonzero(axis.group == index)
                whole = mine.size == axis.group.size
                names[index] = layer if whole else f"{layer}[{mine[0]}:{mine[-1] + 1}]"
    return [
        Group(names.get(i, f"group {i}"), width, tuple(makers[i]), tuple(consumers[i]), frozen[i], ties[i])
        for i, width in enumerate(widths)
    ]


def _unique(axes: list[Axis]) -> list[Axis]:
    """Drop repeated records of one dimension: a layer that is called twice is cut once.

    The slots of all calls are bound to each other, so that they differ at most where one is FIXED and the other frozen.
    """
    return list({(axis.tensor, axis.dim): axis for axis in axes}.values())


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
            values[node] = stored[name] if name else image
        elif node.op == "call_function":
            arguments = map_arg((node.args, node.kwargs), lambda n: values[n])
            value = node.target(*arguments[0], **arguments[1])
            if node.name in graph.descriptions and isinstance(value, torch.Tensor) and not (mask := kept(node)).all():
                # In place where the operation itself is: later readers of its input see the change in both.
                multiply = value.mul_ if operation_name(node).endswith("_") else value.mul
                value = multiply(torch.from_numpy(mask).to(value))
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
