"""Drawn pictures: objects that only their shape tells apart, on cluttered and textured grounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from compress.data.figures import DISTRACTORS, OBJECTS
from compress.data.light import background, blend, photograph

if TYPE_CHECKING:
    import numpy as np

    from compress.data.figures import Figure

    # Draws a thing at 255 into a fine mask that shows `margin` pixels (the second argument) more on every side.
    Painter = Callable[[np.ndarray, int], None]

OVERSAMPLING = 3  # masks are this much finer than pixels, for smooth edges and boxes to a third of a pixel
_SCALE = (0.08, 0.45)  # diameter of a figure as a share of the image side
_HIDDEN = 0.6  # an object of which more is covered or outside of the picture is not labelled


def draw_objects(seed: list[int], side: int) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """Return one picture (side × side × 3, uint8, BGR), and per object its class and the mask of what is seen of it.

    Masks are `OVERSAMPLING` times finer. Every picture is made from its own seed, so that picture k is the same however
    many others are made.
    """
    import cv2
    import numpy as np

    rng = np.random.default_rng(seed)
    image = background(rng, side)
    margin = side // 3
    fine = (side + 2 * margin) * OVERSAMPLING
    window = slice(margin * OVERSAMPLING, (margin + side) * OVERSAMPLING)
    owner = np.zeros((fine, fine), np.uint8)  # which object is seen at a place, 0 for none
    objects: list[tuple[int, int, int]] = []  # number in owner, class, area with nothing in front
    light = rng.uniform(0, 2 * np.pi)
    for class_id, paint in _scene(rng, side):
        mask = np.zeros((fine, fine), np.uint8)
        paint(mask, margin)
        number = 0
        if class_id is not None:
            number = len(objects) + 1
            objects.append((number, class_id, cv2.countNonZero(mask)))
        owner[mask > 0] = number
        cover = cv2.resize(mask[window, window], (side, side), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
        image = blend(rng, image, cover, light)
    seen = owner[window, window]
    visible = [(class_id, seen == number, area) for number, class_id, area in objects]
    kept = [(class_id, mask) for class_id, mask, area in visible if mask.sum() >= (1 - _HIDDEN) * area]
    return photograph(rng, image), kept


def _scene(rng: np.random.Generator, side: int) -> list[tuple[int | None, Painter]]:
    """Return what is in the picture, from back to front: the class, or None for clutter, and how to draw it."""
    kinds: list[int | None] = [int(kind) for kind in rng.integers(0, len(OBJECTS), int(rng.integers(1, 7)))]
    kinds += [None] * int(rng.integers(0, 4))
    rng.shuffle(kinds)
    things: list[tuple[int | None, Painter]] = []
    placed: list[tuple[float, float, float]] = []
    figures = list(OBJECTS.values())
    for kind in kinds:
        place = _place(rng, side, placed)
        if place is None:
            continue
        placed.append(place)
        make = DISTRACTORS[int(rng.integers(0, len(DISTRACTORS)))] if kind is None else figures[kind]
        things.append((kind, figure_painter(rng, make(rng), place)))
    for _ in range(int(rng.integers(0, 4))):
        things.insert(int(rng.integers(0, len(things) + 1)), (None, _line_painter(rng, side)))
    return things


def _place(
    rng: np.random.Generator, side: int, placed: list[tuple[float, float, float]]
) -> tuple[float, float, float] | None:
    """Return x, y and radius in pixels that leave the centres of other things free; None where there is no room."""
    import numpy as np

    radius = rng.uniform(*_SCALE) * side / 2
    for _ in range(20):
        x, y = (float(value) for value in rng.uniform(0.03 * side, 0.97 * side, 2))
        if all(np.hypot(x - other[0], y - other[1]) > 0.8 * max(radius, other[2]) for other in placed):
            return x, y, radius
    return None


def figure_painter(rng: np.random.Generator, figure: Figure, place: tuple[float, float, float]) -> Painter:
    """Return a painter of a figure at x, y with a radius, in pixels, turned and seen somewhat from the side."""
    import cv2
    import numpy as np

    x, y, radius = place
    turn = rng.uniform(0, 2 * np.pi)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    # Seen somewhat from the side: squeezed and sheared.
    tilt = np.array([[1.0, rng.uniform(-0.15, 0.15)], [0.0, rng.uniform(0.75, 1.0)]])
    if rng.random() < 0.5:
        tilt[1] *= -1
    matrix = rotation @ tilt * radius

    def paint(mask: np.ndarray, margin: int) -> None:
        # cv2 counts from the middle of the first pixel, in 1/16 of a pixel (shift=4).
        centre = np.array([x + margin, y + margin])
        for part in figure:
            outlines = [((outline @ matrix.T + centre) * OVERSAMPLING - 0.5) * 16 for outline in part]
            cv2.fillPoly(mask, [np.rint(outline).astype(np.int32) for outline in outlines], 255, shift=4)

    return paint


def _line_painter(rng: np.random.Generator, side: int) -> Painter:
    """Return a painter of a thin crooked line from one place of the picture to another."""
    import cv2
    import numpy as np

    ends = rng.uniform(-0.1 * side, 1.1 * side, (2, 2))
    bend = rng.normal(0, 0.04 * side, (5, 2)) * np.array([0, 1, 1, 1, 0])[:, None]
    points = ends[0] + np.linspace(0, 1, 5)[:, None] * (ends[1] - ends[0]) + bend
    width = rng.uniform(0.004, 0.016) * side

    def paint(mask: np.ndarray, margin: int) -> None:
        fine = np.rint((points + margin) * OVERSAMPLING).astype(np.int32)
        cv2.polylines(mask, [fine], isClosed=False, color=255, thickness=max(1, round(width * OVERSAMPLING)))

    return paint
