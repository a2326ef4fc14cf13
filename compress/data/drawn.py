"""What is written down of a drawn object: its box, outline, oriented box or outermost points, as its task needs it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np

Task = Literal["detect", "segment", "obb", "pose", "classify"]
# The outermost points of what is seen of an object: left, top, right, bottom. In a mirror left and right change places.
KEY_POINTS = ("left", "top", "right", "bottom")
POSE_YAML = f"kpt_shape: [{len(KEY_POINTS)}, 3]\nflip_idx: [2, 1, 0, 3]\n"
_OUTLINE_PRECISION = 0.005  # of the picture's side; outlines are that exact, and have no more points than it takes
_CROP_MARGIN = 0.2  # of an object's longer side, around what a classifier is to look at


def label(task: Task, seen: np.ndarray) -> list[float]:
    """Return what follows the class in a label, as shares of the picture's side.

    Args:
        task: detect: centre, width and height; segment: the points of the outline of its largest piece; obb: the four
            corners; pose: as detect, then x, y and 2 (visible) of each of `KEY_POINTS`.
        seen: (side, side), true where the object is seen; at least once.
    """
    import cv2
    import numpy as np

    side = len(seen)
    if task in ("segment", "obb"):
        # OpenCV counts from the middle of the first pixel, hence the half below.
        pieces, _ = cv2.findContours(seen.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        if task == "obb":
            points = cv2.boxPoints(cv2.minAreaRect(np.concatenate(pieces)))
        else:
            largest = max(pieces, key=cv2.contourArea)
            points = cv2.approxPolyDP(largest, _OUTLINE_PRECISION * side, closed=True)[:, 0]
            if len(points) < 3:  # a thin piece: its box has area
                points = cv2.boxPoints(cv2.minAreaRect(largest))
        return np.clip((points.reshape(-1) + 0.5) / side, 0, 1).tolist()
    left, top, right, bottom = extent(seen)
    box = [(left + right) / 2 / side, (top + bottom) / 2 / side, (right - left) / side, (bottom - top) / side]
    if task != "pose":
        return box
    rows, columns = np.nonzero(seen)
    outermost = (columns.argmin(), rows.argmin(), columns.argmax(), rows.argmax())
    return box + [value for i in outermost for value in ((columns[i] + 0.5) / side, (rows[i] + 0.5) / side, 2.0)]


def extent(seen: np.ndarray) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of what is true in a mask, the ends not included."""
    import numpy as np

    columns, rows = np.flatnonzero(seen.any(axis=0)), np.flatnonzero(seen.any(axis=1))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def crop(image: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Return the square part of a picture around an object, as far as the picture goes.

    Args:
        image: (side, side, 3).
        seen: (k · side, k · side), true where the object is seen.
    """
    fine = len(seen) / len(image)
    left, top, right, bottom = (edge / fine for edge in extent(seen))
    half = max(right - left, bottom - top) * (0.5 + _CROP_MARGIN)
    x, y = (left + right) / 2, (top + bottom) / 2
    rows = slice(max(0, round(y - half)), round(y + half))
    return image[rows, max(0, round(x - half)) : round(x + half)]
