"""Which detections of two models are the same ones: each finds its best overlapping partner."""

from __future__ import annotations

import numpy as np

CONFIDENCE = 0.25
_MATCH_IOU = 0.5
_SAME_PX = 0.05


def match(
    reference: np.ndarray, candidate: np.ndarray, confidence: float = CONFIDENCE, *, rotated: bool = False
) -> tuple[list[tuple[int, int, float]], int]:
    """Pair the detections of one image, each with the best overlapping one of its class that is still free.

    Args:
        reference: (n, 6 or more) rows of x1, y1, x2, y2 in px, score, class; best first.
        candidate: (m, 6 or more), likewise.
        confidence: the least score of a detection that counts.
        rotated: rows are centre x, centre y, width, height in px, score, class, angle in radians.

    Returns:
        The pairs (row of reference, row of candidate, IoU), and how many detections of a score of at least
        `confidence` have no partner on the other side. Rows just below that score may be partners, so that a score
        that moves across the threshold by less than its tolerance is not counted as a lost detection.
    """
    overlap = _rotated_overlap if rotated else _overlap
    free = set(range(len(candidate)))
    pairs = []
    for i, row in enumerate(reference):
        overlaps = [(overlap(row, candidate[j]), j) for j in free if candidate[j, 5] == row[5]]
        iou, j = max(overlaps, default=(0.0, -1))
        if iou >= _MATCH_IOU:
            free.remove(j)
            pairs.append((i, j, iou))
    alone = [reference[i] for i in set(range(len(reference))) - {i for i, _, _ in pairs}]
    alone += [candidate[j] for j in free]
    return pairs, sum(bool(row[4] >= confidence) for row in alone)


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Return the IoU of two boxes; boxes without area, as untrained heads predict them, overlap if they coincide."""
    if np.abs(a[:4] - b[:4]).max() <= _SAME_PX and not (a[:2] < a[2:4]).all():
        return 1.0
    corner = np.minimum(a[2:4], b[2:4]) - np.maximum(a[:2], b[:2])
    intersection = float(np.prod(np.clip(corner, 0, None)))
    union = float(np.prod(a[2:4] - a[:2]) + np.prod(b[2:4] - b[:2])) - intersection
    return intersection / union if union > 0 else 0.0


def _rotated_overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Return the IoU of two boxes of centre, size and (last) angle, from the area of the polygon that they share."""
    first, second = _corners(a), _corners(b)
    if np.hypot(*(a[:2] - b[:2])) > (np.hypot(*a[2:4]) + np.hypot(*b[2:4])) / 2:
        return 0.0
    if min(*a[2:4], *b[2:4]) <= 0:  # without area, as untrained heads predict them
        return float(np.abs(first - second).max() <= _SAME_PX)
    shared = first
    for start, end in zip(second, np.roll(second, -1, axis=0), strict=True):
        shared = _clip(shared, start, end - start)
    intersection = _area(shared)
    union = float(np.prod(a[2:4]) + np.prod(b[2:4])) - intersection
    return intersection / union if union > 0 else 0.0


def _corners(box: np.ndarray) -> np.ndarray:
    """Return the corners (4, 2) of a box of centre, size and angle, in float64, one after another."""
    x, y, width, height, *_, angle = box.astype(np.float64)
    along = np.array([np.cos(angle), np.sin(angle)]) * width / 2
    across = np.array([-np.sin(angle), np.cos(angle)]) * height / 2
    return np.array([x, y]) + np.stack([-along - across, along - across, along + across, across - along])


def _clip(polygon: np.ndarray, point: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """Return the part of a convex polygon (n, 2) on the inner side of a line (Sutherland and Hodgman, 1974)."""
    sides = direction[0] * (polygon[:, 1] - point[1]) - direction[1] * (polygon[:, 0] - point[0])
    kept = []
    for corner, side, after, other in zip(
        polygon, sides, np.roll(polygon, -1, axis=0), np.roll(sides, -1), strict=True
    ):
        if side >= 0:
            kept.append(corner)
        if side * other < 0:
            kept.append(corner + (after - corner) * (side / (side - other)))
    return np.array(kept).reshape(-1, 2)


def _area(polygon: np.ndarray) -> float:
    """Return the area of a polygon (n, 2) by the shoelace formula."""
    x, y = polygon.T
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))) / 2
