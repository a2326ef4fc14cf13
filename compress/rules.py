"""How channels pass through each ATen operation.

A rule receives the walk and a node of the exported graph and returns the description of the node's result (see
`slots`), or a list of them for an operation with several results. An operation without a rule freezes what reaches it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.slots import FIXED, along, carried, fixed, in_dim, is_fixed, only_in, reshape
from compress.walk import operation_name

if TYPE_CHECKING:
    from torch.fx import Node

    from compress.walk import Walk

Result = Any  # an array of slots, or a list of them
Rule = Callable[["Walk", "Node"], Result]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a function as the rule of the named ATen operations (without the `aten.` and the overload)."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def freeze_all(walk: Walk, node: Node) -> Result:
    """Freeze every channel that reaches an operation: the rule of all that have none."""
    for source in node.all_input_nodes:
        walk.freeze(source, f"{operation_name(node)} in {walk.place(node)} has no rule")
    return walk.fixed_like(node)


def computed_weight(walk: Walk, node: Node) -> Result:
    """Freeze what reaches a layer whose weight is made of others in the forward pass: nothing there could be cut."""
    for source in node.all_input_nodes:
        walk.freeze(source, f"{walk.place(node)} computes its weight in the forward pass")
    return walk.fixed_like(node)


@rule("conv2d", "conv1d", "conv3d")
def convolution(walk: Walk, node: Node) -> Result:
    """Input channels feed it, output channels are new; a depthwise one passes channels on."""
    data, weight = node.args[0], node.args[1]
    if not walk.is_weight(weight):
        return computed_weight(walk, node)
    groups = _argument(node, 6, "groups", 1)
    out_count, in_per_group = walk.shape(weight)[:2]
    in_count = in_per_group * groups
    slots = _channels(walk, node, data, 1, in_count)
    walk.ledger.multiply(walk.tensor_name(weight), math.prod(walk.shape(node)[2:]))
    if groups == 1:
        walk.ledger.use(walk.tensor_name(weight), 1, slots)
        out = walk.ledger.new(out_count)
    elif in_per_group == 1:
        out = np.repeat(slots, out_count // groups)
    else:
        # Each group of a grouped convolution reads its own slice, but the weight has one column index for all:
        # column j of every slice lives and dies together.
        slices = np.split(slots, groups)
        for other in slices[1:]:
            walk.ledger.unite(slices[0], other, walk.place(node))
        walk.ledger.use(walk.tensor_name(weight), 1, slices[0])
        out = walk.ledger.new(out_count)
        walk.ledger.tie(np.split(out, groups), f"grouped convolution {walk.place(node)}")
    walk.ledger.use(walk.tensor_name(weight), 0, out)
    _use_vector(walk, _argument(node, 2, "bias", None), out)
    return in_dim(out, len(walk.shape(node)), 1)


@rule("conv_transpose2d")
def transposed_convolution(walk: Walk, node: Node) -> Result:
    """Like a convolution, with the weight's first two dimensions the other way round: (in, out)."""
    data, weight = node.args[0], node.args[1]
    if not walk.is_weight(weight):
        return computed_weight(walk, node)
    if _argument(node, 6, "groups", 1) != 1:
        return freeze_all(walk, node)
    in_count, out_count = walk.shape(weight)[:2]
    walk.ledger.multiply(walk.tensor_name(weight), math.prod(walk.shape(data)[2:]))
    walk.ledger.use(walk.tensor_name(weight), 0, _channels(walk, node, data, 1, in_count))
    out = walk.ledger.new(out_count)
    walk.ledger.use(walk.tensor_name(weight), 1, out)
    _use_vector(walk, _argument(node, 2, "bias", None), out)
    return in_dim(out, len(walk.shape(node)), 1)


@rule("linear")
def linear(walk: Walk, node: Node) -> Result:
    """Channels of the last dimension feed it, its output channels are new."""
    data, weight = node.args[0], node.args[1]
    if not walk.is_weight(weight):
        return computed_weight(walk, node)
    out_count, in_count = walk.shape(weight)
    rank = len(walk.shape(node))
    walk.ledger.multiply(walk.tensor_name(weight), math.prod(walk.shape(node)[:-1]))
    walk.ledger.use(walk.tensor_name(weight), 1, _channels(walk, node, data, rank - 1, in_count))
    out = walk.ledger.new(out_count)
    walk.ledger.use(walk.tensor_name(weight), 0, out)
    _use_vector(walk, _argument(node, 2, "bias", None), out)
    return in_dim(out, rank, rank - 1)


@rule("batch_norm", "instance_norm")
def batch_norm(walk: Walk, node: Node) -> Result:
    """Channels pass; scale, shift, mean and variance are indexed by them."""
    if operation_name(node) == "instance_norm" and node.args[1] is None:
        return freeze_all(walk, node)  # without weights nothing tells surgery to set its number of features anew
    shape = walk.shape(node)
    slots = _channels(walk, node, node.args[0], 1, shape[1])
    for vector in node.args[1:5]:
        _use_vector(walk, vector, slots)
    return in_dim(slots, len(shape), 1)


@rule(
    *("silu", "silu_", "relu", "relu_", "relu6", "relu6_", "leaky_relu", "leaky_relu_", "hardswish", "hardswish_"),
    *("hardsigmoid", "hardtanh", "hardtanh_", "sigmoid", "sigmoid_", "tanh", "gelu", "mish", "elu", "softplus"),
    *("clamp", "clamp_", "dropout", "dropout_", "feature_dropout", "clone", "contiguous", "detach", "detach_", "alias"),
    *("to", "_to_copy", "exp", "neg", "abs", "sqrt", "rsqrt", "pow", "max_pool2d", "avg_pool2d"),
    *("adaptive_avg_pool2d", "adaptive_max_pool2d", "upsample_nearest2d", "upsample_bilinear2d"),
)
def same_channels(walk: Walk, node: Node) -> Result:
    """Activations, pooling over space, resizing: channel i of the result comes from channel i."""
    return walk.slots(node.args[0])


@rule("pad", "constant_pad_nd")
def pad(walk: Walk, node: Node) -> Result:
    """Padding of space passes channels; padding of channels freezes them."""
    slots, before, after = walk.slots(node.args[0]), walk.shape(node.args[0]), walk.shape(node)
    return freeze_all(walk, node) if any(before[d] != after[d] for d in carried(slots)) else slots


@rule("add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_", "maximum", "minimum")
def elementwise(walk: Walk, node: Node) -> Result:
    """Slot i of both sides is one slot; a side of size 1 is broadcast and binds nothing."""
    sides = [side for side in node.args[:2] if walk.is_tensor(side)]
    rank = len(walk.shape(node))
    if len(sides) == 1:
        return walk.slots(sides[0])
    first, second = (_padded(walk.slots(side), rank) for side in sides)
    if is_fixed(first) and is_fixed(second):
        return fixed(rank)
    shapes = [_padded_shape(walk.shape(side), rank) for side in sides]
    result_shape = []
    for dim in range(rank):
        carries = max(first.shape[dim], second.shape[dim])
        result_shape.append(carries)
        for slots, shape in zip((first, second), shapes, strict=True):
            if carries > 1 and slots.shape[dim] == 1 and shape[dim] != 1 and not is_fixed(slots):
                return freeze_all(walk, node)  # channels of another dimension cross here
    bound = [
        np.broadcast_to(slots, result_shape)
        for slots, shape in zip((first, second), shapes, strict=True)
        if all(shape[dim] != 1 for dim in range(rank) if result_shape[dim] > 1)
    ]
    if len(bound) == 2:
        for side, slots in zip(sides, bound, strict=True):
            if is_fixed(slots) and walk.is_weight(side):  # a learned bias or scale: cut with its channels
                dims = [d for d in range(rank) if result_shape[d] > 1]
                other = bound[1] if slots is bound[0] else bound[0]
                if len(dims) == 1:
                    own_dim = dims[0] - (rank - len(walk.shape(side)))
                    walk.ledger.use(walk.tensor_name(side), own_dim, other.reshape(-1))
                    return other
        walk.ledger.unite(bound[0], bound[1], walk.place(node))
    return bound[0] if not is_fixed(bound[0]) else bound[-1]


@rule("cat", "concat")
def concatenation(walk: Walk, node: Node) -> Result:
    """Channels follow one another; across the other dimensions slot i of all inputs is one slot."""
    sources: Any = node.args[0]
    rank = len(walk.shape(node))
    dim = _argument(node, 1, "dim", 0) % rank
    parts = [walk.slots(source) for source in sources]
    if all(is_fixed(part) for part in parts):
        return fixed(rank)
    if any(not only_in(part, dim) for part in parts):
        return _stack_over_space(walk, node, parts, dim)
    sizes = [walk.shape(source)[dim] for source in sources]
    return in_dim(np.concatenate([along(p, n) for p, n in zip(parts, sizes, strict=True)]), rank, dim)


def _stack_over_space(walk: Walk, node: Node, parts: list[np.ndarray], dim: int) -> Result:
    """Concatenate along a dimension without channels, such as the anchors of three scales."""
    if any(part.shape[dim] > 1 for part in parts):
        return freeze_all(walk, node)
    shape = np.broadcast_shapes(*(part.shape for part in parts))
    whole = [np.broadcast_to(part, shape) for part in parts]
    for other in whole[1:]:
        walk.ledger.unite(whole[0], other, walk.place(node))
    return next(part for part in whole if not is_fixed(part))


@rule("chunk")
def chunk(walk: Walk, node: Node) -> Result:
    """Equal parts: they stay equal."""
    count = node.args[1]
    return _parts(walk, node, [shape[_split_dim(walk, node)] for shape in walk.shapes(node)], tied=count)


@rule("split_with_sizes", "split")
def split(walk: Walk, node: Node) -> Result:
    """Parts of given sizes. The sizes are numbers kept by the module, so only known modules may change them."""
    sizes = [shape[_split_dim(walk, node)] for shape in walk.shapes(node)]
    slots = walk.slots(node.args[0])
    if slots.shape[_split_dim(walk, node)] > 1 and (len(set(sizes)) > 1 or not walk.can_resize_splits(node)):
        walk.freeze(node.args[0], f"split into fixed sizes {sizes} in {walk.place(node)}")
        return [fixed(len(shape)) for shape in walk.shapes(node)]
    return _parts(walk, node, sizes, tied=len(sizes))


@rule("getitem")
def getitem(walk: Walk, node: Node) -> Result:
    """One of several results."""
    several, index = walk.slots(node.args[0]), node.args[1]
    return several[index] if isinstance(several, list) and isinstance(index, int) else walk.fixed_like(node)


@rule("slice")
def slice_(walk: Walk, node: Node) -> Result:
    """A slice of space passes channels; a slice of channels has fixed ends, so it freezes them."""
    slots = walk.slots(node.args[0])
    dim = _argument(node, 1, "dim", 0) % slots.ndim
    same = walk.shape(node)[dim] == walk.shape(node.args[0])[dim]
    if slots.shape[dim] == 1 or same:
        return slots
    walk.freeze(node.args[0], f"slice of channels in {walk.place(node)}")
    return fixed(slots.ndim)


@rule("view", "reshape", "flatten", "_unsafe_view", "unsqueeze", "squeeze")
def view(walk: Walk, node: Node) -> Result:
    """Channels keep their row-major place."""
    return reshape(walk.slots(node.args[0]), walk.shape(node.args[0]), walk.shape(node))


@rule("transpose", "permute")
def permute(walk: Walk, node: Node) -> Result:
    """Dimensions change places, and channels with them."""
    slots = walk.slots(node.args[0])
    if operation_name(node) == "permute":
        order: Any = node.args[1]
        return np.transpose(slots, [d % slots.ndim for d in order])
    first, second = node.args[1] % slots.ndim, node.args[2] % slots.ndim  # type: ignore[operator]
    return np.swapaxes(slots, first, second)


@rule("expand", "expand_as")
def expand(walk: Walk, node: Node) -> Result:
    """Repetition of dimensions of size 1, which carry no channels."""
    return _padded(walk.slots(node.args[0]), len(walk.shape(node)))


@rule("softmax", "_softmax", "log_softmax")
def softmax(walk: Walk, node: Node) -> Result:
    """Normalised over a dimension: a channel there changes all others, so it freezes them."""
    slots = walk.slots(node.args[0])
    dim = node.args[1] % slots.ndim  # type: ignore[operator]
    if slots.shape[dim] == 1:
        return slots
    walk.freeze(node.args[0], f"softmax over channels in {walk.place(node)}")
    return fixed(slots.ndim)


@rule("mean", "sum", "amax", "amin")
def reduction(walk: Walk, node: Node) -> Result:
    """Reduced over space, channels pass; reduced over channels, they are frozen."""
    slots = walk.slots(node.args[0])
    dims: Any = _argument(node, 1, "dim", None)
    dims = range(slots.ndim) if dims is None else [d % slots.ndim for d in ([dims] if isinstance(dims, int) else dims)]
    if any(slots.shape[d] > 1 for d in dims):
        walk.freeze(node.args[0], f"{operation_name(node)} over channels in {walk.place(node)}")
        return walk.fixed_like(node)
    if len(walk.shape(node)) == slots.ndim:
        return slots
    return slots.reshape([size for d, size in enumerate(slots.shape) if d not in set(dims)])


@rule("matmul", "bmm")
def matmul(walk: Walk, node: Node) -> Result:
    """A product of two feature maps, as in attention: its channels are frozen."""
    for side in node.args[:2]:
        walk.freeze(side, f"attention product in {walk.place(node)}")
    return walk.fixed_like(node)


def _argument(node: Node, index: int, name: str, default: Any) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def _channels(walk: Walk, node: Node, source: Any, dim: int, size: int) -> np.ndarray:
    """Return the slots that a layer reads in `dim`, shape (size,); anything that reaches it otherwise is frozen."""
    slots = walk.slots(source)
    if only_in(slots, dim):
        return along(slots, size)
    walk.freeze(source, f"channels outside dimension {dim} reach {walk.place(node)}")
    return np.full(size, FIXED)


def _use_vector(walk: Walk, vector: Any, slots: np.ndarray) -> None:
    if vector is None:
        return
    if walk.is_weight(vector):
        walk.ledger.use(walk.tensor_name(vector), 0, slots)
    else:
        walk.ledger.freeze(slots, f"{vector.name} is computed in the forward pass")


def _split_dim(walk: Walk, node: Node) -> int:
    return _argument(node, 2, "dim", 0) % len(walk.shape(node.args[0]))


def _parts(walk: Walk, node: Node, sizes: list[int], tied: Any) -> Result:
    slots = walk.slots(node.args[0])
    dim = _split_dim(walk, node)
    if slots.shape[dim] == 1:
        return [slots] * len(sizes)
    if not only_in(slots, dim) or len(set(sizes)) > 1 or tied != len(sizes):
        walk.freeze(node.args[0], f"unequal parts {sizes} in {walk.place(node)}")
        return [fixed(slots.ndim)] * len(sizes)
    parts = np.split(slots, len(sizes), axis=dim)
    walk.ledger.tie([part.reshape(-1) for part in parts], f"equal parts in {walk.place(node)}")
    return parts


def _padded(slots: np.ndarray, rank: int) -> np.ndarray:
    return slots.reshape((1,) * (rank - slots.ndim) + slots.shape)


def _padded_shape(shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    return (1,) * (rank - len(shape)) + shape
