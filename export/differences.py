"""By what the outputs of two models differ over many images: boxes and scores, other values, detections, classes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from export.matching import CONFIDENCE, match


class Differences(Protocol):
    """What is added up image by image."""

    def add(self, expected: list[np.ndarray], actual: list[np.ndarray]) -> None:
        """Compare the outputs for one image, as a runner's `infer` returns them."""

    def record(self, runtime: str) -> dict[str, Any]:
        """Return what a parity record says of all images, see `parity.compare`."""
        ...


def differences_of(facts: dict[str, Any], suppression: dict[str, Any] | None, slack: float) -> Differences:
    """Return what compares the outputs of a task.

    Args:
        facts: what the runner of the reference says of it.
        suppression: limits of the suppression inside the artefact; null where there is none.
        slack: how far a score may move, and so how far below a threshold a partner may be.
    """
    if facts["task"] == "classify":
        return Classes(slack)
    if facts["task"] in ("semantic", "depth"):
        return Maps(facts["task"])
    return Detections(facts, suppression, slack)


@dataclass
class _Values:
    """What values of one kind differ by in all images."""

    max_error: float = 0.0
    error_squares: float = 0.0
    reference_squares: float = 0.0
    count: int = 0

    def add(self, expected: np.ndarray, actual: np.ndarray) -> None:
        error = np.abs(actual - expected)
        self.max_error = max(self.max_error, float(error.max(initial=0.0)))
        self.error_squares += _sum_of_squares(error)
        self.reference_squares += _sum_of_squares(expected)
        self.count += error.size

    def record(self, name: str) -> dict[str, Any]:
        size = max(self.reference_squares / max(self.count, 1), 1e-24) ** 0.5
        return {
            "name": name,
            "max_error": self.max_error,
            "max_value_error": self.max_error / size,
            "value_rms_error": (self.error_squares / max(self.count, 1)) ** 0.5 / size,
        }


@dataclass
class _Tensors:
    """What the boxes and scores in the raw tensors of all images differ by."""

    boxes: _Values = field(default_factory=_Values)
    scores: _Values = field(default_factory=_Values)

    def record(self, shape: tuple[int, ...]) -> dict[str, Any]:
        boxes, scores = self.boxes, self.scores
        found: dict[str, Any] = {"shape": list(shape)}
        # Of rows that are only compared where they match there may be none: that is no error of 0.
        if boxes.count:
            found["max_box_error_px"] = boxes.max_error
            found["box_rms_error_px"] = (boxes.error_squares / boxes.count) ** 0.5
        if scores.count:
            found["max_score_error"] = scores.max_error
            found["score_rms_error"] = (scores.error_squares / max(scores.reference_squares, 1e-12)) ** 0.5
        return found


@dataclass
class _Matches:
    """What the detections of all images differ by."""

    confidence: float = CONFIDENCE
    rotated: bool = False
    found: tuple[int, int] = (0, 0)
    unmatched: int = 0
    ious: list[float] = field(default_factory=list)
    max_box_error_px: float = 0.0
    max_score_error: float = 0.0

    def add(self, expected: np.ndarray, actual: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Match the (n, 6 or more) detections of one image and return the rows of both that belong together."""
        pairs, lost = match(expected, actual, self.confidence, rotated=self.rotated)
        first, second = (int((rows[:, 4] >= self.confidence).sum()) for rows in (expected, actual))
        self.found = (self.found[0] + first, self.found[1] + second)
        self.unmatched += lost
        self.ious += [iou for _, _, iou in pairs]
        sides = expected[[i for i, _, _ in pairs]], actual[[j for _, j, _ in pairs]]
        error = np.abs(sides[1] - sides[0])
        self.max_box_error_px = max(self.max_box_error_px, float(error[:, :4].max(initial=0.0)))
        self.max_score_error = max(self.max_score_error, float(error[:, 4].max(initial=0.0)))
        return sides

    def record(self, runtime: str) -> dict[str, Any]:
        return {
            "torch": self.found[0],
            runtime: self.found[1],
            "unmatched": self.unmatched,
            "min_iou": min(self.ious, default=None),
            "mean_iou": float(np.mean(self.ious)) if self.ious else None,
            "max_box_error_px": self.max_box_error_px,
            "max_score_error": self.max_score_error,
        }


class Detections:
    """Compares the outputs of a model that finds boxes, whatever else it says about each."""

    def __init__(self, facts: dict[str, Any], suppression: dict[str, Any] | None, slack: float) -> None:
        # Rows just below the threshold may be partners.
        confidence = CONFIDENCE if suppression is None else suppression["conf"] + slack
        self.facts, self.suppression = facts, suppression
        self.lowest = CONFIDENCE - slack if suppression is None else max(suppression["conf"] - slack, 0.0)
        self.tensors, self.matches = _Tensors(), _Matches(confidence, rotated=facts["task"] == "obb")
        self.others: dict[str, _Values] = {}
        self.shape: tuple[int, ...] = ()

    def add(self, expected: list[np.ndarray], actual: list[np.ndarray]) -> None:
        """Compare the outputs for one image."""
        self.shape = actual[0].shape
        rows = self.matches.add(self._rows(expected[0]), self._rows(actual[0], suppressed=self.suppression is not None))
        if self.facts["end2end"] or self.suppression:
            first, second = rows
            if self.suppression is None:
                # Sorted scores compare by position even where rows swap, and even where nothing is detected.
                self.tensors.scores.add(expected[0][..., 4], actual[0][..., 4])
            else:
                self.tensors.scores.add(first[:, 4], second[:, 4])
            self.tensors.boxes.add(first[:, :4], second[:, :4])
            extras = first[:, 6:].T, second[:, 6:].T
        else:
            first, second = expected[0][0], actual[0][0]
            behind = 4 + self.facts["classes"]
            self.tensors.scores.add(first[4:behind], second[4:behind])
            self.tensors.boxes.add(first[:4], second[:4])
            extras = first[behind:], second[behind:]
        for name, wanted in self._kinds(len(extras[0])).items():
            self.others.setdefault(name, _Values()).add(extras[0][wanted], extras[1][wanted])
        for one, other in zip(expected[1:], actual[1:], strict=True):
            self.others.setdefault("mask prototypes", _Values()).add(one, other)

    def record(self, runtime: str) -> dict[str, Any]:
        """Return what they differ by."""
        others = [values.record(name) for name, values in self.others.items()]
        return {
            "outputs": [self.tensors.record(self.shape), *others],
            "detections": self.matches.record(runtime),
        }

    def _rows(self, output: np.ndarray, suppressed: bool = False) -> np.ndarray:
        """Return the detections of one image, best first."""
        import torch
        import torchvision  # noqa: F401  (where it is loaded, Ultralytics suppresses with it: fast, and as ONNX does)
        from ultralytics.utils.nms import non_max_suppression

        wanted = self.suppression or {"iou": 0.7, "max_det": 300}
        kept: Any = non_max_suppression(
            torch.from_numpy(output.copy()),  # a copy, because suppression rewrites the boxes in place
            0.0 if suppressed else self.lowest,
            wanted["iou"],
            nc=self.facts["classes"],
            max_det=wanted["max_det"],
            rotated=self.facts["task"] == "obb",
            end2end=self.facts["end2end"] or suppressed,
        )
        return kept[0].numpy()

    def _kinds(self, channels: int) -> dict[str, Any]:
        """Return what the channels behind boxes and scores hold: names with the rows of each."""
        if self.facts["task"] == "segment":
            return {"mask coefficients": slice(None)}
        if self.facts["task"] == "obb":
            return {"angles": slice(None)}
        if self.facts["task"] == "pose":
            seen = np.arange(channels) % self.facts["keypoints"][1] == 2
            return {"key points": ~seen, **({"visibility": seen} if seen.any() else {})}
        return {}


class Classes:
    """Compares the probabilities of a classifier, and which class is the likeliest."""

    def __init__(self, slack: float) -> None:
        self.tensors, self.slack = _Tensors(), slack
        self.images = self.other_class = 0
        self.shape: tuple[int, ...] = ()

    def add(self, expected: list[np.ndarray], actual: list[np.ndarray]) -> None:
        """Compare the outputs for one image."""
        first, second = expected[0][0], actual[0][0]
        self.shape = actual[0].shape
        self.tensors.scores.add(first, second)
        self.images += 1
        # Where two classes are as likely, either may win.
        self.other_class += bool(first.max() - first[second.argmax()] > 2 * self.slack)

    def record(self, runtime: str) -> dict[str, Any]:  # noqa: ARG002
        """Return what they differ by."""
        output = self.tensors.record(self.shape)
        scores = {name: output[name] for name in ("shape", "max_score_error", "score_rms_error")}
        return {"outputs": [scores], "classes": {"images": self.images, "other_class": self.other_class}}


class Maps:
    """Compares outputs that say something of every pixel."""

    def __init__(self, task: str) -> None:
        self.name, self.values = {"semantic": "class logits", "depth": "depths"}[task], _Values()
        self.shape: tuple[int, ...] = ()

    def add(self, expected: list[np.ndarray], actual: list[np.ndarray]) -> None:
        """Compare the outputs for one image."""
        self.shape = actual[0].shape
        self.values.add(expected[0], actual[0])

    def record(self, runtime: str) -> dict[str, Any]:  # noqa: ARG002
        """Return what they differ by."""
        return {"outputs": [{"shape": list(self.shape), **self.values.record(self.name)}]}


def _sum_of_squares(values: np.ndarray) -> float:
    return float(np.square(values, dtype=np.float64).sum())
