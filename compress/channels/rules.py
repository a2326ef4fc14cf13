"""How channels pass through each ATen operation.

A rule receives the walk and a node of the exported graph and returns the description of the node's result (see
`slots`), or a list of them for an operation with several results. An operation without a rule freezes what reaches it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.channels.slots import FIXED, along, carried, fixed, in_dim, is_fixed, only_in
from compress.channels.walk import operation_name

if TYPE_CHECKING:
    from torch.fx import Node

    from compress.channels.walk import Walk

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
    """Freeze what reaches a layer whose weight is computed in the forward pass, or not stored: it cannot be cut."""
    for source in node.all_input_nodes:
        walk.freeze(source, f"{walk.place(node)} computes its weight in the forward pass")
    return walk.fixed_like(node)


@rule("conv2d", "conv1d", "conv3d")
def convolution(walk: Walk, node: Node) -> Result:
    """Input channels feed it, output channels are new; a depthwise one passes channels on."""
    data, weight = node.args[0], node.args[1]
    if not walk.is_weight(weight):
        return computed_weight(walk, node)
    groups = argument(node, 6, "groups", 1)
    out_count, in_per_group = walk.shape(weight)[:2]
    in_count = in_per_group * groups
    dim = _channel_dim(walk, data, weight)
    slots = channels(walk, node, data, dim, in_count)
    walk.ledger.multiply(walk.tensor_name(weight), math.prod(walk.shape(node)) // out_count)
    if groups == 1:
        walk.ledger.use(walk.tensor_name(weight), 1, slots, reads=True)
        out = walk.ledger.new(out_count)
    elif in_per_group == 1:
        out = np.repeat(slots, out_count // groups)
    else:
        # Each group of a grouped convolution reads its own slice, but the weight has one column index for all:
        # column j of every slice lives and dies together.
        slices = np.split(slots, groups)
        for other in slices[1:]:
            walk.ledger.unite(slices[0], other, walk.place(node))
        walk.ledger.use(walk.tensor_name(weight), 1, slices[0], reads=True)
        out = walk.ledger.new(out_count)
        walk.ledger.tie(np.split(out, groups), f"grouped convolution {walk.place(node)}")
    walk.ledger.use(walk.tensor_name(weight), 0, out)
    use_vector(walk, argument(node, 2, "bias", None), out)
    return in_dim(out, len(walk.shape(node)), dim)


@rule("conv_transpose2d", "conv_transpose1d", "conv_transpose3d")
def transposed_convolution(walk: Walk, node: Node) -> Result:
    """Like a convolution, with the weight's first two dimensions the other way round: (in, out per group)."""
    data, weight = node.args[0], node.args[1]
    if not walk.is_weight(weight):
        return computed_weight(walk, node)
    groups = argument(node, 6, "groups", 1)
    in_count, out_per_group = walk.shape(weight)[:2]
    if groups not in (1, in_count):
        return freeze_all(walk, node)
    dim = _channel_dim(walk, data, weight)
    slots = channels(walk, node, data, dim, in_count)
    walk.ledger.multiply(walk.tensor_name(weight), math.prod(walk.shape(data)) // in_count)
    walk.ledger.use(walk.tensor_name(weight), 0, slots, reads=groups == 1)
    if groups == 1:
        out = walk.ledger.new(out_per_group)
        walk.ledger.use(walk.tensor_name(weight), 1, out)
    else:
        out = np.repeat(slots, out_per_group)
    use_vector(walk, argument(node, 2, "bias", None), out)
    return in_dim(out, len(walk.shape(node)), dim)


def _channel_dim(walk: Walk, data: Any, weight: Any) -> int:
    """Return where the input of a convolution has its channels: behind the batch, or in front where there is none."""
    return len(walk.shape(data)) + 1 - len(walk.shape(weight))


@rule("linear")
def linear(walk: Walk, node: Node) -> Result:
    """Channels of the last dimension feed it, its output channels are new."""
    data, weight = node.args[0], node.args[1]
    if not walk.is_weight(weight):
        return computed_weight(walk, node)
    out_count, in_count = walk.shape(weight)
    rank = len(walk.shape(node))
    walk.ledger.multiply(walk.tensor_name(weight), math.prod(walk.shape(node)[:-1]))
    walk.ledger.use(walk.tensor_name(weight), 1, channels(walk, node, data, rank - 1, in_count), reads=True)
    out = walk.ledger.new(out_count)
    walk.ledger.use(walk.tensor_name(weight), 0, out)
    use_vector(walk, argument(node, 2, "bias", None), out)
    return in_dim(out, rank, rank - 1)


@rule("batch_norm", "instance_norm")
def batch_norm(walk: Walk, node: Node) -> Result:
    """Channels pass; scale, shift, mean and variance are indexed by them."""
    if all(vector is None for vector in node.args[1:5]):
        return freeze_all(walk, node)  # nothing is cut that tells surgery to set its number of features anew
    shape = walk.shape(node)
    slots = channels(walk, node, node.args[0], 1, shape[1])
    for vector in node.args[1:5]:
        use_vector(walk, vector, slots)
    return in_dim(slots, len(shape), 1)


@rule("group_norm")
def group_norm(walk: Walk, node: Node) -> Result:
    """The channels of one norm group share their statistics, so that they live and die together."""
    count: Any = node.args[1]
    shape = walk.shape(node)
    slots = channels(walk, node, node.args[0], 1, shape[1])
    rows = slots.reshape(count, -1)
    for column in range(1, rows.shape[1]):
        walk.ledger.unite(rows[:, 0], rows[:, column], walk.place(node))
    for vector in node.args[2:4]:
        use_vector(walk, vector, slots)
    if argument(node, 2, "weight", None) is None:
        return freeze_all(walk, node)  # as for instance norm
    return in_dim(slots, len(shape), 1)


@rule("layer_norm")
def layer_norm(walk: Walk, node: Node) -> Result:
    """Statistics over all channels change with any of them, so it freezes them; over space, channels pass."""
    slots, dims = walk.slots(node.args[0]), len(node.args[1])  # type: ignore[arg-type]
    if all(size == 1 for size in slots.shape[slots.ndim - dims :]):
        return slots
    walk.freeze(node.args[0], f"layer norm over channels in {walk.place(node)}")
    return fixed(slots.ndim)


@rule("prelu")
def prelu(walk: Walk, node: Node) -> Result:
    """Channels pass; a slope for each of them goes with them."""
    slots = walk.slots(node.args[0])
    if walk.shape(node.args[1]) != (1,):
        use_vector(walk, node.args[1], channels(walk, node, node.args[0], 1, walk.shape(node)[1]))
    return slots


@rule(
    *("silu", "silu_", "relu", "relu_", "relu6", "relu6_", "leaky_relu", "leaky_relu_", "hardswish", "hardswish_"),
    *("hardsigmoid", "hardsigmoid_", "hardtanh", "hardtanh_", "sigmoid", "sigmoid_", "tanh", "tanh_", "gelu", "mish"),
    *("mish_", "elu", "elu_", "selu", "celu", "softplus", "log_sigmoid", "hardshrink", "softsign"),
    *("clamp", "clamp_", "dropout", "dropout_", "feature_dropout", "clone", "contiguous", "detach", "detach_", "alias"),
    *("clip", "clip_", "negative", "absolute", "nan_to_num"),
    *("to", "_to_copy", "type_as", "exp", "neg", "abs", "sqrt", "rsqrt", "square", "log", "reciprocal"),
    *("sin", "cos", "erf", "expm1", "log1p", "floor", "round", "sign", "threshold", "softshrink"),
)
def same_channels(walk: Walk, node: Node) -> Result:
    """Activations: channel i of the result comes from channel i."""
    if operation_name(node).startswith(("clamp", "clip")) and len(node.all_input_nodes) > 1:
        return freeze_all(walk, node)  # bounds for each channel
    return walk.slots(node.args[0])


@rule(
    *("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d"),
    *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
    *("adaptive_max_pool1d", "adaptive_max_pool2d", "max_pool2d_with_indices"),
    *("upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_linear1d", "upsample_nearest1d"),
)
def resampling(walk: Walk, node: Node) -> Result:
    """Pooling and resizing of space: channel i of the result, or of each result, comes from channel i."""
    slots = walk.slots(node.args[0])
    space = next(int(digit) for digit in operation_name(node) if digit.isdigit())
    if any(size > 1 for size in slots.shape[slots.ndim - space :]):
        walk.freeze(node.args[0], f"{operation_name(node)} over channels in {walk.place(node)}")
        return walk.fixed_like(node)
    return [slots] * len(walk.shapes(node)) if isinstance(node.meta.get("val"), (list, tuple)) else slots


@rule("_assert_tensor_metadata")
def assertion(walk: Walk, node: Node) -> Result:
    """What torch.export notes beside `.to()` and `.float()`: nothing comes of it."""
    return walk.fixed_like(node)


@rule("flip", "roll")
def moved(walk: Walk, node: Node) -> Result:
    """Moved within space, channels pass; among channels they are frozen."""
    slots = walk.slots(node.args[0])
    dims: Any = argument(node, 1, "dims", ()) if operation_name(node) == "flip" else argument(node, 2, "dims", ())
    dims = [dims] if isinstance(dims, int) else dims or range(slots.ndim)  # without dims `roll` flattens
    return freeze_all(walk, node) if any(slots.shape[dim] > 1 for dim in dims) else slots


@rule("pad", "constant_pad_nd")
def pad(walk: Walk, node: Node) -> Result:
    """Padding of space passes channels; padding of channels freezes them."""
    slots, before, after = walk.slots(node.args[0]), walk.shape(node.args[0]), walk.shape(node)
    return freeze_all(walk, node) if any(before[d] != after[d] for d in carried(slots)) else slots


@rule(
    *("add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_", "rsub", "pow", "maximum", "minimum", "fmax", "fmin"),
    *("subtract", "subtract_", "multiply", "multiply_", "divide", "divide_", "true_divide", "true_divide_"),
)
def elementwise(walk: Walk, node: Node) -> Result:
    """Slot i of both sides is one slot; a side of size 1 is broadcast and binds nothing."""
    sides = [side for side in node.args[:2] if walk.is_tensor(side)]
    rank = len(walk.shape(node))
    if len(sides) == 1:
        return walk.slots(sides[0])
    both = [padded(walk.slots(side), rank) for side in sides]
    shapes = [_padded_shape(walk.shape(side), rank) for side in sides]
    shape = np.broadcast_shapes(*(slots.shape for slots in both))
    carrying = carried(np.empty(shape))
    for slots, real in zip(both, shapes, strict=True):
        if not is_fixed(slots) and any(slots.shape[dim] == 1 and real[dim] != 1 for dim in carrying):
            return freeze_all(walk, node)  # channels of another dimension cross here
    bound = [
        np.broadcast_to(slots, shape)
        for slots, real in zip(both, shapes, strict=True)
        if not carrying or any(real[dim] != 1 for dim in carrying)
    ]
    for other in bound[1:]:
        walk.ledger.unite(bound[0], other, walk.place(node))
    return next((slots for slots in bound if not is_fixed(slots)), bound[0])


@rule("softmax", "_softmax", "log_softmax")
def softmax(walk: Walk, node: Node) -> Result:
    """Normalised over a dimension: a channel there changes all others, so it freezes them."""
    slots = walk.slots(node.args[0])
    dim = node.args[1] % slots.ndim  # type: ignore[operator]
    if slots.shape[dim] == 1:
        return slots
    walk.freeze(node.args[0], f"softmax over channels in {walk.place(node)}")
    return fixed(slots.ndim)


@rule("mean", "sum", "amax", "amin", "var", "std", "max", "min")
def reduction(walk: Walk, node: Node) -> Result:
    """Reduced over space, channels pass; reduced over channels, they are frozen."""
    dims: Any = argument(node, 1, "dim", None)
    if walk.is_tensor(dims):  # the larger of two tensors
        return elementwise(walk, node)
    slots = walk.slots(node.args[0])
    dims = (
        range(slots.ndim)
        if dims is None or dims == []
        else [d % slots.ndim for d in ([dims] if isinstance(dims, int) else dims)]
    )
    if any(slots.shape[d] > 1 for d in dims):
        walk.freeze(node.args[0], f"{operation_name(node)} over channels in {walk.place(node)}")
        return walk.fixed_like(node)
    results = [
        slots if len(shape) == slots.ndim else slots.reshape([n for d, n in enumerate(slots.shape) if d not in dims])
        for shape in walk.shapes(node)
    ]
    return results if isinstance(node.meta.get("val"), (list, tuple)) else results[0]


def argument(node: Node, index: int, name: str, default: Any) -> Any:
    """Return an argument of an operation, given by place or by name."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def channels(walk: Walk, node: Node, source: Any, dim: int, size: int) -> np.ndarray:
    """Return the slots that a layer reads in `dim`, shape (size,); anything that reaches it otherwise is frozen."""
    slots = walk.slots(source)
    if only_in(slots, dim):
        return along(slots, size)
    walk.freeze(source, f"channels outside dimension {dim} reach {walk.place(node)}")
    return np.full(size, FIXED)


def use_vector(walk: Walk, vector: Any, slots: np.ndarray) -> None:
    """Record that a vector with an entry for each of the slots goes with them: a weight, or one that is computed."""
    if vector is None:
        return
    if walk.is_weight(vector):
        walk.ledger.use(walk.tensor_name(vector), 0, slots)
    else:
        walk.ledger.unite(slots, along(walk.slots(vector), slots.size), walk.place(vector))


def padded(slots: np.ndarray, rank: int) -> np.ndarray:
    """Return a description with dimensions of size 1 in front, up to a rank."""
    return slots.reshape((1,) * (rank - slots.ndim) + slots.shape)


def _padded_shape(shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    return (1,) * (rank - len(shape)) + shape
