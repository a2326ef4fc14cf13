"""What a model costs at given widths of its channel groups: MACs, parameters, or anything that grows like them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from compress.channels.slots import FIXED

if TYPE_CHECKING:
    from compress.channels.graph import Axis, Graph


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
