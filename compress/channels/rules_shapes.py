"""How channels pass through operations that change the shape of a tensor, and through products of two tensors.

A reshape that splits channels into rows × columns keeps one number for the shorter of the two (heads, shuffle groups,
the factor of a pixel shuffle) and lets the other one shrink. Rows that must stay equally long are tied; columns that
leave their row, as in a channel shuffle, live and die together in all rows. Whether the module that reshapes really
computes the other number from what reaches it cannot be read from the graph: `trial.py` tries it out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from compress.channels.rules import Result, argument, freeze_all, padded, rule
from compress.channels.slots import (
    FIXED,
    along,
    carried,
    fixed,
    in_dim,
    is_fixed,
    matched_runs,
    only_in,
    reshape,
    without_repeats,
)
from compress.channels.ultralytics_modules import WHOLE_ROWS
from compress.channels.walk import operation_name

if TYPE_CHECKING:
    from torch.fx import Node

    from compress.channels.walk import Walk


@rule("cat", "concat", "concatenate")
def concatenation(walk: Walk, node: Node) -> Result:
    """Channels follow one another; across the other dimensions slot i of all inputs is one slot."""
    sources: Any = node.args[0]
    rank = len(walk.shape(node))
    dim = argument(node, 1, "dim", 0) % rank
    parts = [walk.slots(source) for source in sources]
    if all(is_fixed(part) for part in parts):
        return fixed(rank)
    if any(not only_in(part, dim) for part in parts):
        return _stack_over_space(walk, node, parts, dim)
    sizes = [walk.shape(source)[dim] for source in sources]
    return in_dim(np.concatenate([along(p, n) for p, n in zip(parts, sizes, strict=True)]), rank, dim)


@rule("stack")
def stack(walk: Walk, node: Node) -> Result:
    """A new dimension without channels; across the others slot i of all inputs is one slot."""
    sources: Any = node.args[0]
    dim = argument(node, 1, "dim", 0) % len(walk.shape(node))
    return _stack_over_space(walk, node, [np.expand_dims(walk.slots(source), dim) for source in sources], dim)


def _stack_over_space(walk: Walk, node: Node, parts: list[np.ndarray], dim: int) -> Result:
    """Concatenate along a dimension without channels, such as the anchors of three scales."""
    if any(part.shape[dim] > 1 for part in parts):
        return freeze_all(walk, node)
    shape = np.broadcast_shapes(*(part.shape for part in parts))
    whole = [np.broadcast_to(part, shape) for part in parts]
    for other in whole[1:]:
        walk.ledger.unite(whole[0], other, walk.place(node))
    return next((part for part in whole if not is_fixed(part)), whole[0])


@rule("chunk")
def chunk(walk: Walk, node: Node) -> Result:
    """Equal parts: they stay equal."""
    count = node.args[1]
    return _equal_parts(walk, node, [shape[_split_dim(walk, node)] for shape in walk.shapes(node)], tied=count)


@rule("split_with_sizes", "split")
def split(walk: Walk, node: Node) -> Result:
    """Parts of given sizes. The sizes are numbers kept by the module, so only known modules may change them."""
    dim = _split_dim(walk, node)
    sizes = [shape[dim] for shape in walk.shapes(node)]
    slots = walk.slots(node.args[0])
    if slots.shape[dim] == 1:
        return [slots] * len(sizes)
    parts = walk.parts_of_splits(node)
    if parts == "free":
        return np.split(slots, np.cumsum(sizes)[:-1], axis=dim)
    if parts == "equal" and len(set(sizes)) == 1:
        return _equal_parts(walk, node, sizes, tied=len(sizes))
    walk.freeze(node.args[0], f"split into fixed sizes {sizes} in {walk.place(node)}")
    return [fixed(len(shape)) for shape in walk.shapes(node)]


@rule("unbind")
def unbind(walk: Walk, node: Node) -> Result:
    """One result for each position of a dimension that carries no channels."""
    slots = walk.slots(node.args[0])
    dim = argument(node, 1, "dim", 0) % slots.ndim
    if slots.shape[dim] > 1:
        walk.freeze(node.args[0], f"unbind of channels in {walk.place(node)}")
        return walk.fixed_like(node)
    return [slots.squeeze(dim)] * len(walk.shapes(node))


@rule("getitem")
def getitem(walk: Walk, node: Node) -> Result:
    """One of several results."""
    several, index = walk.slots(node.args[0]), node.args[1]
    return several[index] if isinstance(several, list) and isinstance(index, int) else walk.fixed_like(node)


@rule("slice")
def slice_(walk: Walk, node: Node) -> Result:
    """A slice of space passes channels; a slice of channels has fixed ends, so it freezes them."""
    slots = walk.slots(node.args[0])
    dim = argument(node, 1, "dim", 0) % slots.ndim
    same = walk.shape(node)[dim] == walk.shape(node.args[0])[dim]
    if slots.shape[dim] == 1 or same:
        return slots
    walk.freeze(node.args[0], f"slice of channels in {walk.place(node)}")
    return fixed(slots.ndim)


@rule("select")
def select(walk: Walk, node: Node) -> Result:
    """One position of space passes channels; one channel of many has a fixed number, so it freezes them."""
    slots = walk.slots(node.args[0])
    dim = argument(node, 1, "dim", 0) % slots.ndim
    if slots.shape[dim] == 1:
        return slots.squeeze(dim)
    walk.freeze(node.args[0], f"select of a channel in {walk.place(node)}")
    return fixed(slots.ndim - 1)


@rule("view", "reshape", "flatten", "_unsafe_view", "unsqueeze", "squeeze", "unflatten")
def view(walk: Walk, node: Node) -> Result:
    """Channels keep their row-major place; see the head of this file for what a split of channels asks for."""
    slots, old, new = walk.slots(node.args[0]), walk.shape(node.args[0]), walk.shape(node)
    if is_fixed(slots):
        return fixed(len(new))
    for old_dims, new_dims in matched_runs(old, new):
        sizes, new_sizes = (
            [shape[d] for d in dims if shape[d] > 1] for shape, dims in ((old, old_dims), (new, new_dims))
        )
        carrying = [d for d in old_dims if slots.shape[d] > 1]
        if not carrying or sizes == new_sizes or len(sizes) == len(carrying) == len(new_sizes) == 1:
            continue
        if len(new_sizes) == 1:
            if len(carrying) > 1 and len(carrying) == len(sizes):
                walk.ledger.join_rows(slots.reshape(-1))
                continue
            if len(carrying) == 1:
                continue  # flattened with space
        elif len(sizes) == 1:
            wide = [d for d in new_dims if new[d] > 1]
            slots = _split_into_rows(walk, node, slots, carrying[0], {d: new[d] for d in wide})
            continue
        walk.freeze(node.args[0], f"{operation_name(node)} of channels with space in {walk.place(node)}")
        return fixed(len(new))
    return without_repeats(reshape(slots, old, new))


def _split_into_rows(walk: Walk, node: Node, slots: np.ndarray, dim: int, sizes: dict[int, int]) -> np.ndarray:
    """Bind the slots of `dim`, which becomes the dimensions of these sizes, so that only one of them shrinks."""
    rows = np.moveaxis(slots, dim, -1).reshape(-1)
    shape = list(sizes.values())
    if rows.size != np.prod(shape):  # channels of another dimension as well
        walk.freeze(node.args[0], f"{operation_name(node)} of channels in {walk.place(node)}")
        return np.full_like(slots, FIXED)
    shrinks = 0 if walk.known_class(node) in WHOLE_ROWS else _shrinking(node, sizes)
    rows = rows.reshape(int(np.prod(shape[:shrinks])), shape[shrinks], -1)
    for column in range(1, rows.shape[2]):  # what becomes one position of the shrinking dimension lives and dies as one
        walk.ledger.unite(rows[..., 0], rows[..., column], walk.place(node))
    if len(rows) > 1:
        walk.ledger.tie_rows(rows[..., 0], f"equal rows in {walk.place(node)}")
    kept = np.repeat(rows[..., :1], rows.shape[2], axis=2).reshape(-1)
    return in_dim(kept, slots.ndim, dim)


def _shrinking(node: Node, sizes: dict[int, int]) -> int:
    """Return which of several dimensions a module computes from what is left: the one it left open, or the largest."""
    asked: Any = node.args[1] if len(node.args) > 1 and isinstance(node.args[1], (list, tuple)) else ()
    dims = list(sizes)
    for place, dim in enumerate(dims):
        if dim < len(asked) and asked[dim] == -1:
            return place
    return max(range(len(dims)), key=lambda place: (sizes[dims[place]], place))


@rule("transpose", "swapaxes", "swapdims", "permute", "t", "mT", "movedim")
def permute(walk: Walk, node: Node) -> Result:
    """Dimensions change places, and channels with them."""
    slots = walk.slots(node.args[0])
    if operation_name(node) == "permute":
        order: Any = node.args[1]
        return np.transpose(slots, [d % slots.ndim for d in order])
    if operation_name(node) == "t":
        return slots.T
    if operation_name(node) == "mT":
        return np.swapaxes(slots, -1, -2)
    if operation_name(node) == "movedim":
        return np.moveaxis(slots, node.args[1], node.args[2])  # type: ignore[arg-type]
    first, second = node.args[1] % slots.ndim, node.args[2] % slots.ndim  # type: ignore[operator]
    return np.swapaxes(slots, first, second)


@rule("expand", "expand_as")
def expand(walk: Walk, node: Node) -> Result:
    """Repetition of dimensions of size 1, which carry no channels; those of a tensor that is imitated are its own."""
    slots = padded(walk.slots(node.args[0]), len(walk.shape(node)))
    imitated = walk.slots(node.args[1]) if operation_name(node) == "expand_as" else slots
    return slots if carried(slots) else imitated


@rule("pixel_shuffle")
def pixel_shuffle(walk: Walk, node: Node) -> Result:
    """The factor² channels that become one live and die together."""
    slots, block = walk.slots(node.args[0]), int(node.args[1]) ** 2  # type: ignore[arg-type]
    if not only_in(slots, slots.ndim - 3):
        return freeze_all(walk, node)
    blocks = along(slots, walk.shape(node.args[0])[-3]).reshape(-1, block)
    for column in range(1, block):
        walk.ledger.unite(blocks[:, 0], blocks[:, column], walk.place(node))
    return in_dim(blocks[:, 0], slots.ndim, slots.ndim - 3)


@rule("pixel_unshuffle")
def pixel_unshuffle(walk: Walk, node: Node) -> Result:
    """Each channel becomes factor² of them."""
    slots, block = walk.slots(node.args[0]), int(node.args[1]) ** 2  # type: ignore[arg-type]
    if not only_in(slots, slots.ndim - 3):
        return freeze_all(walk, node)
    return in_dim(np.repeat(along(slots, walk.shape(node.args[0])[-3]), block), slots.ndim, slots.ndim - 3)


@rule("channel_shuffle")
def channel_shuffle(walk: Walk, node: Node) -> Result:
    """Column i of all groups lives and dies together: so many channels of each group stay."""
    slots, groups = walk.slots(node.args[0]), int(node.args[1])  # type: ignore[arg-type]
    if not only_in(slots, 1):
        return freeze_all(walk, node)
    rows = along(slots, walk.shape(node)[1]).reshape(groups, -1)
    for row in rows[1:]:
        walk.ledger.unite(rows[0], row, walk.place(node))
    return in_dim(rows.T.reshape(-1), slots.ndim, 1)


@rule("matmul", "bmm")
def matmul(walk: Walk, node: Node) -> Result:
    """A product over pairs of channels, as of queries and keys, or over space, as of values and their weights.

    Channels that are summed over live and die in pairs, and what comes out has a channel for each row of them only
    where such a row lives and dies as one (whole heads of attention).
    """
    rank = len(walk.shape(node))
    sides: Any = node.args[:2]
    if any(len(walk.shape(side)) < 2 for side in sides):
        return freeze_all(walk, node)
    left, right = (padded(walk.slots(side), rank) for side in sides)
    if is_fixed(left) and is_fixed(right):
        return fixed(rank)
    summed = left.shape[-1] > 1 or right.shape[-2] > 1
    if (summed and (left.shape[-2] > 1 or right.shape[-1] > 1)) or (left.shape[-2] > 1 and right.shape[-1] > 1):
        for side in sides:
            walk.freeze(side, f"product of channels in {walk.place(node)}")
        return fixed(rank)
    if summed:
        return _sum_of_pairs(walk, node, left, np.swapaxes(right, -1, -2))
    if is_fixed(left) or is_fixed(right):
        return right if is_fixed(left) else left
    shape = np.broadcast_shapes(left.shape, right.shape)
    walk.ledger.unite(np.broadcast_to(left, shape), np.broadcast_to(right, shape), walk.place(node))
    return np.broadcast_to(left, shape)


def _sum_of_pairs(walk: Walk, node: Node, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Bind the slots that two sides are summed over, both in their last dimension; return a slot for each whole row."""
    shape = np.broadcast_shapes(left.shape, right.shape)
    rows = np.broadcast_to(left, shape)
    walk.ledger.unite(rows, np.broadcast_to(right, shape), f"{walk.place(node)}")
    result = np.full((*shape[:-1], 1), FIXED)
    for index in np.ndindex(*shape[:-1]):
        roots = {FIXED if slot == FIXED else walk.ledger.find(slot) for slot in rows[index].tolist()}
        if len(roots) == 1:
            result[(*index, 0)] = roots.pop()
    return fixed(result.ndim) if is_fixed(result) else result


@rule("scaled_dot_product_attention")
def scaled_dot_product_attention(walk: Walk, node: Node) -> Result:
    """Values pass. Queries and keys are frozen: their number sets the scale of the product."""
    query, key, value = node.args[:3]
    for side in (query, key):
        walk.freeze(side, f"attention scaled by its number of channels in {walk.place(node)}")
    slots = walk.slots(value)
    if slots.shape[-2] > 1:
        return freeze_all(walk, node)
    return slots


def _split_dim(walk: Walk, node: Node) -> int:
    return argument(node, 2, "dim", 0) % len(walk.shape(node.args[0]))


def _equal_parts(walk: Walk, node: Node, sizes: list[int], tied: Any) -> Result:
    slots = walk.slots(node.args[0])
    dim = _split_dim(walk, node)
    if slots.shape[dim] == 1:
        return [slots] * len(sizes)
    if len(set(sizes)) > 1 or tied != len(sizes):
        walk.freeze(node.args[0], f"unequal parts {sizes} in {walk.place(node)}")
        return [fixed(slots.ndim)] * len(sizes)
    parts = np.split(slots, len(sizes), axis=dim)
    walk.ledger.tie([part.reshape(-1) for part in parts], f"equal parts in {walk.place(node)}")
    return parts
