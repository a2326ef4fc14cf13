"""Slots: the bookkeeping behind the channel graph.

A *slot* is one output channel of one layer. A tensor is described by an integer array of its own rank whose entries
are slots: a dimension that carries channels has its full size, any other has size 1, and `FIXED` stands where nothing
may be removed. A (1, 64, 20, 20) feature map is described by an array of shape (1, 64, 1, 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

FIXED = -1


@dataclass(frozen=True)
class Use:
    """Dimension `dim` of the weight or buffer `tensor` is indexed by `slots`, in this order.

    `reads` tells that the layer reads these channels; otherwise it makes or carries them.
    """

    tensor: str
    dim: int
    slots: np.ndarray
    reads: bool = False


@dataclass(frozen=True)
class EqualParts:
    """Parts that must keep the same number of channels, such as the two halves of `chunk(2)`."""

    parts: tuple[np.ndarray, ...]
    where: str


@dataclass
class Ledger:
    """Everything that walking a graph has found out about its slots."""

    parent: list[int] = field(default_factory=list)
    uses: list[Use] = field(default_factory=list)
    equal_parts: list[EqualParts] = field(default_factory=list)
    frozen: dict[int, str] = field(default_factory=dict)
    positions: dict[str, int] = field(default_factory=dict)
    _rows: list[np.ndarray] = field(default_factory=list)
    _first_use: dict[tuple[str, int], np.ndarray] = field(default_factory=dict)

    def new(self, count: int) -> np.ndarray:
        """Return `count` new slots, shape (count,)."""
        first = len(self.parent)
        self.parent.extend(range(first, first + count))
        return np.arange(first, first + count)

    def find(self, slot: int) -> int:
        """Return the representative of the slots that live and die with `slot`."""
        root = slot
        while self.parent[root] != root:
            root = self.parent[root]
        while self.parent[slot] != root:
            self.parent[slot], slot = root, self.parent[slot]
        return root

    def unite(self, first: np.ndarray, second: np.ndarray, where: str) -> None:
        """Bind two arrays of one shape slot by slot; a slot that meets a fixed channel is frozen."""
        for a, b in zip(first.ravel().tolist(), second.ravel().tolist(), strict=True):
            if a == FIXED or b == FIXED:
                self.freeze(np.array([max(a, b)]), f"meets fixed channels in {where}")
            else:
                self.parent[self.find(a)] = self.find(b)

    def freeze(self, slots: np.ndarray, reason: str) -> None:
        """Forbid the removal of slots; the first reason stays."""
        for slot in np.unique(slots[slots != FIXED]).tolist():
            self.frozen.setdefault(slot, reason)

    def use(self, tensor: str, dim: int, slots: np.ndarray, *, reads: bool = False) -> None:
        """Record that a dimension of a weight is indexed by slots, shape (size of that dimension,).

        A weight that is used again, by a layer called twice or shared by two layers, binds the slots of both uses.
        """
        before = self._first_use.setdefault((tensor, dim), slots)
        if before is not slots:
            self.unite(before, slots, f"another use of {tensor}")
        self.uses.append(Use(tensor, dim, slots, reads))

    def keep_whole(self, tensor: str, shape: Sequence[int]) -> None:
        """Freeze all channels that index a weight, here or elsewhere: something reads all of it."""
        for dim, size in enumerate(shape):
            whole = np.full(size, FIXED)
            self.unite(self._first_use.setdefault((tensor, dim), whole), whole, f"another use of {tensor}")

    def multiply(self, tensor: str, positions: int) -> None:
        """Record that a weight is multiplied at so many output positions."""
        self.positions[tensor] = self.positions.get(tensor, 0) + positions

    def tie_rows(self, rows: np.ndarray, where: str) -> None:
        """Record rows that must stay equally long, shape (rows, columns); which columns stay may differ."""
        self._rows.append(rows)
        self.tie(list(rows), where)

    def join_rows(self, slots: np.ndarray) -> None:
        """Record that slots, shape (n,), follow one another in one dimension; rows of `tie_rows` may be among them.

        A module that takes columns out of each row finds them at the same places only if all rows lose the same
        columns. They must do so where rows are interleaved, as by a channel shuffle, and need not where each row is
        still in one piece, as the heads of an attention are.
        """
        order = [self.find(slot) for slot in slots.tolist() if slot != FIXED]
        for rows in self._rows:
            row_of = {
                self.find(slot): number for number, row in enumerate(rows) for slot in row.tolist() if slot != FIXED
            }
            found = [row_of[slot] for slot in order if slot in row_of]
            pieces = 1 + sum(a != b for a, b in pairwise(found))
            if found and pieces > len(set(found)):
                for row in rows[1:]:
                    self.unite(rows[0], row, "rows that are interleaved")

    def tie(self, parts: Sequence[np.ndarray], where: str) -> None:
        """Record parts that must keep the same number of channels."""
        self.equal_parts.append(EqualParts(tuple(parts), where))


def fixed(rank: int) -> np.ndarray:
    """Return the description of a tensor without removable channels, shape (1,) * rank."""
    return np.full((1,) * rank, FIXED)


def is_fixed(slots: np.ndarray) -> bool:
    """Tell whether nothing in the tensor can be removed."""
    return bool((slots == FIXED).all())


def carried(slots: np.ndarray) -> list[int]:
    """Return the dimensions that carry channels."""
    return [dim for dim, size in enumerate(slots.shape) if size > 1]


def only_in(slots: np.ndarray, dim: int) -> bool:
    """Tell whether channels live in `dim` alone."""
    return all(d == dim for d in carried(slots))


def along(slots: np.ndarray, size: int) -> np.ndarray:
    """Return the slots of a dimension of `size`, shape (size,); the tensor carries channels there alone or nowhere."""
    flat = slots.reshape(-1)
    return np.broadcast_to(flat, (size,)) if flat.size == 1 else flat


def in_dim(slots: np.ndarray, rank: int, dim: int) -> np.ndarray:
    """Return the description of a tensor of `rank` dimensions that carries `slots`, shape (n,), in `dim`."""
    shape = [1] * rank
    shape[dim] = slots.size
    return slots.reshape(shape)


def without_repeats(slots: np.ndarray) -> np.ndarray:
    """Return a description in which a dimension along which nothing differs has size 1: it carries no channels."""
    for dim in carried(slots):
        first = slots.take([0], axis=dim)
        if (slots == first).all():
            slots = first
    return slots


def reshape(slots: np.ndarray, old: Sequence[int], new: Sequence[int]) -> np.ndarray:
    """Follow slots through a reshape of a tensor from shape `old` to shape `new` (row-major, as torch does it).

    >>> reshape(np.array([[[5]], [[6]]]).reshape(1, 2, 1), (1, 2, 2), (1, 4)).tolist()
    [[5, 5, 6, 6]]
    """
    if is_fixed(slots):
        return fixed(len(new))
    expanded: list[int] = []
    shape: list[int] = []
    for old_dims, new_dims in matched_runs(old, new):
        sizes = [slots.shape[d] for d in old_dims]
        if max(sizes, default=1) == 1:  # no channels here
            expanded += sizes
            shape += [1] * len(new_dims)
        elif [old[d] for d in old_dims if old[d] > 1] == [new[d] for d in new_dims if new[d] > 1]:
            expanded += sizes  # the same dimensions, at most some of size 1 more or less
            kept = iter([slots.shape[d] for d in old_dims if old[d] > 1])
            shape += [next(kept) if new[d] > 1 else 1 for d in new_dims]
        else:
            expanded += [old[d] for d in old_dims]
            shape += [new[d] for d in new_dims]
    return np.broadcast_to(slots, expanded).reshape(shape)


def matched_runs(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Split two shapes of equal size into the shortest runs of dimensions with equal products."""
    runs: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        left = [i] if i < len(old) else []
        right = [j] if j < len(new) else []
        i, j = i + len(left), j + len(right)
        a = old[left[0]] if left else 1
        b = new[right[0]] if right else 1
        while a != b:
            if a < b:
                a *= old[i]
                left.append(i)
                i += 1
            else:
                b *= new[j]
                right.append(j)
                j += 1
        runs.append((left, right))
    return runs
