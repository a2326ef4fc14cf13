"""From measured networks to a latency table: what each segment costs per channel it reads and makes.

Least squares with coefficients that are never negative: more channels never cost less, and what the measurements do
not tell apart is not explained by two large numbers of opposite sign. Errors count relative to the whole network, so
small networks weigh as much as large ones.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from compress.errors import BenchmarkError
from compress.latency.table import TERMS, Fit, Segment, features, linear_form

if TYPE_CHECKING:
    from compress.channels.graph import Graph

FOLDS = 6
MIN_VARIANTS = 12


@dataclass(frozen=True)
class Observation:
    """One measured network.

    Attributes:
        widths: of all channel groups, shape (groups,).
        whole: cost of the network.
        segments: (name, shape of the weight, cost) of each segment in the order of the runtime; empty where a runtime
            does not tell.
    """

    widths: np.ndarray
    whole: float
    segments: list[tuple[str, list[int], float]]


@dataclass(frozen=True)
class Model:
    """A fitted table without its heading: whole = scale · Σ segments + offset."""

    segments: tuple[Segment, ...]
    scale: float
    offset: float


def fit(graph: Graph, observations: list[Observation]) -> tuple[Model, Fit]:
    """Fit a model, and say how well it predicts networks that it has not seen.

    Raises:
        BenchmarkError: there are too few observations.
    """
    if len(observations) < MIN_VARIANTS:
        raise BenchmarkError(
            f"{len(observations)} measured networks are too few for a table, {MIN_VARIANTS} are needed"
        )
    design = _design(graph, observations)
    whole = np.array([seen.whole for seen in observations])
    errors = np.zeros(whole.size)
    for fold in range(FOLDS):
        unseen = np.arange(whole.size) % FOLDS == fold
        terms, scale, offset = design.solve(~unseen, whole)
        errors[unseen] = np.abs(design.predict(terms, scale, offset)[unseen] / whole[unseen] - 1)
    terms, scale, offset = design.solve(np.ones(whole.size, dtype=bool), whole)
    quality = Fit(
        variants=whole.size,
        median_error=round(float(np.median(errors)), 5),
        p95_error=round(float(np.percentile(errors, 95)), 5),
    )
    return Model(design.as_segments(terms), scale, offset), quality


@dataclass(frozen=True)
class _Design:
    """What is regressed on what.

    Attributes:
        names, tensors, before: of the segments.
        columns: features of each segment, shape (segments, observations, terms).
        measured: cost of each segment, shape (segments, observations); null where only the whole is known.
        kinds: segments of one kind share what a product costs, where only the whole is known.
        sizes: by which the terms of a segment are larger than those of its kind, shape (segments, terms).
    """

    names: list[str]
    tensors: list[str | None]
    before: list[str | None]
    columns: np.ndarray
    measured: np.ndarray | None
    kinds: list[list[object]]
    sizes: np.ndarray

    def solve(self, seen: np.ndarray, whole: np.ndarray) -> tuple[np.ndarray, float, float]:
        """Return terms of shape (segments, terms), scale and offset from the observations that are `seen`."""
        weight = 1 / whole[seen]
        if self.measured is None:
            return (*self._solve_whole(seen, whole, weight),)
        terms = np.array(
            [
                nonnegative_least_squares(columns[seen] * weight[:, None], values[seen] * weight)
                for columns, values in zip(self.columns, self.measured, strict=True)
            ]
        )
        total = np.einsum("sot,st->o", self.columns, terms)[seen]
        matrix = np.stack([total * weight, weight], axis=1)
        (scale, offset), *_ = np.linalg.lstsq(matrix, np.ones(total.size), rcond=None)
        return terms, float(scale), float(offset)

    def _solve_whole(self, seen: np.ndarray, whole: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, float, float]:
        shared: dict[object, np.ndarray] = defaultdict(lambda: np.zeros(whole.size))
        for s, kinds in enumerate(self.kinds):
            for t, kind in enumerate(kinds):
                shared[kind] = shared[kind] + self.columns[s, :, t] * self.sizes[s, t]
        keys = list(shared)
        matrix = np.stack([shared[key] for key in keys], axis=1)
        found = nonnegative_least_squares(matrix[seen] * weight[:, None], whole[seen] * weight)
        value = dict(zip(keys, found.tolist(), strict=True))
        terms = np.array([[value[kind] for kind in kinds] for kinds in self.kinds]) * self.sizes
        return terms, 1.0, 0.0

    def predict(self, terms: np.ndarray, scale: float, offset: float) -> np.ndarray:
        """Return the cost of every observed network, shape (observations,)."""
        return scale * np.einsum("sot,st->o", self.columns, terms) + offset

    def as_segments(self, terms: np.ndarray) -> tuple[Segment, ...]:
        """Write the terms down."""
        return tuple(
            Segment(
                name=name,
                tensor=tensor,
                before=before,
                terms={TERMS[t]: float(f"{row[t]:.6g}") for t in np.flatnonzero(row).tolist()},
            )
            for name, tensor, before, row in zip(self.names, self.tensors, self.before, terms, strict=True)
        )


def _design(graph: Graph, observations: list[Observation]) -> _Design:
    widths = np.array([seen.widths for seen in observations], dtype=np.float64)
    names, measured = _common_segments(observations)
    if measured is None:
        tensors: list[str | None] = [*graph.positions]
        names = [str(tensor) for tensor in tensors]
    else:
        shapes = [{name: shape for name, shape, _ in seen.segments} for seen in observations]
        tensors = match(graph, widths, names, shapes)
    before = [None, *tensors[:-1]]
    columns = []
    for tensor, previous in zip(tensors, before, strict=True):
        sides = []
        for place, reads in ((tensor, True), (tensor, False), (previous, False)):
            form, const = linear_form(graph, place, reads)
            sides.append(widths @ form + const)
        columns.append(features(*sides))
    kinds, sizes = [], np.ones((len(tensors), len(TERMS)))
    for s, tensor in enumerate(tensors):
        area = graph.positions.get(tensor or "", 1)
        kernel = int(np.prod(graph.shapes[tensor][2:])) if tensor else 1
        one = bool(tensor) and graph.shapes[tensor][1] == 1  # type: ignore[index]
        sizes[s] = [
            1.0 if name == "constant" else area if name in ("reads", "makes", "before") else area * kernel
            for name in TERMS
        ]
        kinds.append(
            [
                name
                if name == "constant"
                else (name, area)
                if name in ("reads", "makes", "before")
                else (name, area, kernel, one)
                for name in TERMS
            ]
        )
    return _Design(names, tensors, before, np.array(columns), measured, kinds, sizes)


def _common_segments(observations: list[Observation]) -> tuple[list[str], np.ndarray | None]:
    """Return names and costs, shape (segments, observations), of the segments if all networks have the same ones."""
    names = [name for name, _, _ in observations[0].segments]
    costs = [{name: cost for name, _, cost in seen.segments} for seen in observations]
    if not names or any(set(known) != set(names) for known in costs):
        return [], None
    return names, np.array([[known[name] for known in costs] for name in names])


def match(graph: Graph, widths: np.ndarray, names: list[str], shapes: list[dict[str, list[int]]]) -> list[str | None]:
    """Tell which weight of the model each convolution of a runtime's file is, by the shapes both have at all widths.

    No names are compared, since every exporter has its own. Convolutions that always have the same shape cost the same.

    Args:
        widths: of all groups, shape (observations, groups).
        names: of the segments.
        shapes: of the weights, by name of the segment, for each observation.
    """
    left: dict[tuple[object, ...], list[str]] = defaultdict(list)
    for tensor in graph.positions:
        (makes, const), (reads, other) = (linear_form(graph, tensor, side) for side in (False, True))
        series = np.stack([widths @ makes + const, widths @ reads + other], axis=1).round().astype(int)
        kernel = tuple(graph.shapes[tensor][2:])
        left[(kernel, *map(tuple, series.tolist()))].append(tensor)
    found: list[str | None] = []
    for name in names:
        mine = [known[name] for known in shapes]
        key = (tuple(mine[0][2:]), *(tuple(shape[:2]) for shape in mine))
        found.append(left[key].pop(0) if left.get(key) else None)
    return found


def nonnegative_least_squares(matrix: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the x ≥ 0 that minimises |matrix · x - values|.

    The active-set method of Lawson and Hanson, "Solving Least Squares Problems", 1974.

    >>> nonnegative_least_squares(np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([2.0, -1.0])).tolist()
    [2.0, 0.0]
    """
    size = np.linalg.norm(matrix, axis=0)
    usable = size > 0
    scaled = matrix / np.where(usable, size, 1.0)
    x = np.zeros(matrix.shape[1])
    active = np.zeros(x.size, dtype=bool)
    for _ in range(3 * x.size):
        slope = scaled.T @ (values - scaled @ x)
        slope[active | ~usable] = 0.0
        if slope.max(initial=0.0) <= 1e-10 * np.linalg.norm(values):
            break
        active[int(slope.argmax())] = True
        while True:
            trial = np.zeros_like(x)
            trial[active], *_ = np.linalg.lstsq(scaled[:, active], values, rcond=None)
            if (trial[active] > 0).all():
                x = trial
                break
            shrinking = active & (trial <= 0)
            step = float((x[shrinking] / np.maximum(x[shrinking] - trial[shrinking], 1e-300)).min())
            x = x + step * (trial - x)
            active &= x > 1e-15
            if not active.any():
                x = np.zeros_like(x)
                break
    return x / np.where(usable, size, 1.0)
