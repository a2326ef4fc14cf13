"""Outlines of what is drawn: objects that only their shape tells apart, and what distracts from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    # An outline in a disc of radius 1: polygons filled together by the even-odd rule (a hole is a polygon within).
    # A figure is the union of such parts.
    Figure = list[list[np.ndarray]]


def _polygon(corners: int, radius: float = 1.0, centre: tuple[float, float] = (0.0, 0.0)) -> np.ndarray:
    import numpy as np

    angles = np.arange(corners) * (2 * np.pi / corners)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) * radius + np.asarray(centre)


def _circle(radius: float = 1.0, centre: tuple[float, float] = (0.0, 0.0)) -> np.ndarray:
    return _polygon(64, radius, centre)


def _box(left: float, top: float, right: float, bottom: float) -> np.ndarray:
    import numpy as np

    return np.array([(left, top), (right, top), (right, bottom), (left, bottom)])


def _spiky(radii: list[float]) -> np.ndarray:
    """Return a closed outline whose corners lie at equal angles and at the given distances from the centre."""
    import numpy as np

    return _polygon(len(radii)) * np.asarray(radii)[:, None]


def _ring(rng: np.random.Generator) -> Figure:
    return [[_circle(), _circle(rng.uniform(0.45, 0.7))]]


def _triangle(rng: np.random.Generator) -> Figure:
    return [[_spiky([rng.uniform(0.8, 1.0), 1.0, 1.0])]]


def _star(rng: np.random.Generator) -> Figure:
    return [[_spiky([1.0, rng.uniform(0.38, 0.5)] * 5)]]


def _cross(rng: np.random.Generator) -> Figure:
    half = rng.uniform(0.17, 0.3)
    return [[_box(-1, -half, 1, half)], [_box(-half, -1, half, 1)]]


def _gear(rng: np.random.Generator) -> Figure:
    teeth, root = int(rng.integers(7, 11)), rng.uniform(0.68, 0.78)
    return [[_spiky([1.0, 1.0, root, root] * teeth), _circle(rng.uniform(0.22, 0.36))]]


def _key(rng: np.random.Generator) -> Figure:
    bow, half = rng.uniform(0.42, 0.5), rng.uniform(0.09, 0.13)
    left, end = bow - 1.25, 1.25
    bits = [end - 0.05 - 0.32 * number for number in range(int(rng.integers(2, 4)))]
    teeth = [[_box(x - 0.18, 0, x, half + rng.uniform(0.2, 0.35))] for x in bits]
    return [
        [_circle(bow, (left, 0)), _circle(bow * 0.55, (left, 0))],
        [_box(left + bow * 0.8, -half, end, half)],
        *teeth,
    ]


def _disc(rng: np.random.Generator) -> Figure:  # noqa: ARG001
    return [[_circle()]]


def _rectangle(rng: np.random.Generator) -> Figure:
    half = rng.uniform(0.25, 0.8)
    return [[_box(-1, -half, 1, half)]]


def _half_disc(rng: np.random.Generator) -> Figure:  # noqa: ARG001
    return [[_circle()[:33]]]


def _hexagon(rng: np.random.Generator) -> Figure:  # noqa: ARG001
    return [[_polygon(6)]]


def _angle(rng: np.random.Generator) -> Figure:
    width = rng.uniform(0.35, 0.55)
    return [[_box(-0.8, -0.8, width - 0.8, 0.8)], [_box(-0.8, 0.8 - width, 0.8, 0.8)]]


OBJECTS: dict[str, Callable[[np.random.Generator], Figure]] = {
    "ring": _ring,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "gear": _gear,
    "key": _key,
}
DISTRACTORS = (_disc, _rectangle, _half_disc, _hexagon, _angle)
