"""Parity: an exported artefact must compute what the PyTorch model computes, on real images."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from compress.errors import DataError, ExportError

CONFIDENCE = 0.25
_MATCH_IOU = 0.5
_SAME_PX = 0.05


@dataclass(frozen=True)
class Tolerance:
    """How far an artefact may be from PyTorch. What is null is recorded, but not judged.

    Attributes:
        box_px: largest error of any side of any box of the raw tensor, px.
        score: largest error of any score of the raw tensor.
        box_rms_px: root mean square error of the sides of all boxes of the raw tensor, px.
        score_rms: error of all scores of the raw tensor as a share of their size, both as root mean squares.
        unmatched: share of the detections of both sides that may have no partner.
        iou: mean overlap of detections with their partners, at least this.
        map50_95: lowest and highest difference of mAP to PyTorch.
    """

    box_px: float | None
    score: float | None
    box_rms_px: float | None
    score_rms: float | None
    unmatched: float
    iou: float
    map50_95: tuple[float, float]


# With less than fp32 single boxes of anchors that see nothing may move by many px, and where two boxes of one object
# have nearly the same score the other one may win, although all is as it should be: there the whole is judged, not
# its worst number. At int8 a better mAP is luck, not a fault.
TOLERANCES = {
    "fp32": Tolerance(0.05, 1e-4, None, None, unmatched=0.0, iou=0.999, map50_95=(-0.001, 0.001)),
    "fp16": Tolerance(None, None, 0.3, 0.02, unmatched=0.02, iou=0.99, map50_95=(-0.003, 0.003)),
    "int8": Tolerance(None, None, None, 0.3, unmatched=0.1, iou=0.9, map50_95=(-0.010, 1.0)),
}
# ncnn's worst number is a few times onnxruntime's (yolo26n on 128 images: 0.056 px, without Winograd convolutions still
# 0.045 px), while its root mean squares stay as small: so there both are judged.
_NCNN_FP32 = replace(TOLERANCES["fp32"], box_px=0.25, score=1e-3, box_rms_px=0.005, score_rms=1e-4)


@dataclass
class _Tensors:
    """What the raw tensors of all images differ by."""

    max_box_error_px: float = 0.0
    max_score_error: float = 0.0
    box_squares: float = 0.0
    box_sides: int = 0
    score_squares: float = 0.0
    reference_squares: float = 0.0

    def add_boxes(self, expected: np.ndarray, actual: np.ndarray) -> None:
        error = np.abs(actual - expected)
        self.max_box_error_px = max(self.max_box_error_px, float(error.max(initial=0.0)))
        self.box_squares += _sum_of_squares(error)
        self.box_sides += error.size

    def add_scores(self, expected: np.ndarray, actual: np.ndarray) -> None:
        error = np.abs(actual - expected)
        self.max_score_error = max(self.max_score_error, float(error.max(initial=0.0)))
        self.score_squares += _sum_of_squares(error)
        self.reference_squares += _sum_of_squares(expected)

    def record(self, shape: tuple[int, ...]) -> dict[str, Any]:
        return {
            "shape": list(shape),
            "max_box_error_px": self.max_box_error_px,
            "max_score_error": self.max_score_error,
            "box_rms_error_px": (self.box_squares / max(self.box_sides, 1)) ** 0.5,
            "score_rms_error": (self.score_squares / max(self.reference_squares, 1e-12)) ** 0.5,
        }


@dataclass
class _Matches:
    """What the detections of all images differ by."""

    found: tuple[int, int] = (0, 0)
    unmatched: int = 0
    ious: list[float] = field(default_factory=list)
    max_box_error_px: float = 0.0
    max_score_error: float = 0.0

    def add(self, expected: np.ndarray, actual: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Match the (n, 6) detections of one image and return the rows of both that belong together."""
        pairs, lost = match(expected, actual)
        first, second = (int((rows[:, 4] >= CONFIDENCE).sum()) for rows in (expected, actual))
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


def compare(
    model: Path,
    artefact: Path,
    images: list[Path],
    imgsz: int,
    *,
    precision: str = "fp32",
    data: Path | None = None,
    maps: tuple[float, float] | None = None,
    tolerance: Tolerance | None = None,
) -> dict[str, Any]:
    """Run the same letterboxed images through PyTorch and through the artefact, and compare what comes out.

    Up to three comparisons, because each alone can hide a fault: the raw tensors, the detections that a user would
    see, and the mAP where `data` or `maps` are given. The rows of an end-to-end head are sorted by score, so that
    equal scores may swap places: there all scores and the detections stand for the tensors.

    Args:
        model: the checkpoint.
        artefact: what was made from it, for any runtime of `benchmark.runtimes`.
        images: image files, at least one.
        imgsz: side of the square input, px.
        precision: fp32, fp16 or int8: which tolerance holds.
        data: data set YAML, whose val split gives both mAP.
        maps: mAP50-95 of PyTorch and of the artefact, where they are known.
        tolerance: instead of the one of the precision.

    Returns:
        `runtime`, `precision`, `images`, `imgsz`, `tolerance`, `outputs` (per network output: shape and errors),
        `detections` above a score of 0.25 (torch and the runtime: how many; unmatched; of the matched min_iou,
        mean_iou, max_box_error_px, max_score_error), `map50_95` (torch, the runtime, difference) or null, and
        `passed`. Overlaps are null without detections.

    Raises:
        BenchmarkError: no runtime opens the artefact.
        DataError: no images, or a file that is not an image.
        ExportError: the artefact's output has another shape, or is not finite.
    """
    from benchmark import runtimes
    from benchmark.runners import torch_runner

    if not images:
        raise DataError(f"parity of {artefact.name} needs at least one image: give --data with a val split")
    runner = runtimes.runner_of(artefact)
    runtime = str(runtimes.runtime_of(artefact))
    tolerance = tolerance or tolerance_of(runtime, precision)
    reference = torch_runner.load(str(model), threads=1)
    candidate = _load(runner, artefact)
    end2end = torch_runner.describe(reference)["end2end"]
    # Rows just below the threshold may be partners: how far below depends on how far scores may move.
    lowest = CONFIDENCE - (tolerance.score or 0.1)

    tensors, matches = _Tensors(), _Matches()
    shape: tuple[int, ...] = ()
    for path in images:
        image = letterbox(path, imgsz)
        expected = torch_runner.infer(reference, image)[0]
        actual = _single_output(runner.infer(candidate, image), expected, artefact)
        shape = expected.shape
        rows = matches.add(*(_detections(output, end2end, lowest) for output in (expected, actual)))
        if end2end:
            # Sorted scores compare by position even where rows swap, and even where nothing is detected.
            tensors.add_scores(expected[..., 4], actual[..., 4])
            expected, actual = (side.T[None] for side in rows)
        else:
            tensors.add_scores(expected[:, 4:], actual[:, 4:])
        tensors.add_boxes(expected[:, :4], actual[:, :4])
    record = {
        "runtime": runtime,
        "precision": precision,
        "images": len(images),
        "imgsz": imgsz,
        "tolerance": {**asdict(tolerance), "map50_95": list(tolerance.map50_95)},
        "outputs": [tensors.record(shape)],
        "detections": matches.record(runtime),
        "map50_95": _map_record(runtime, maps or (data and _maps(model, artefact, data, imgsz))),
    }
    record["passed"] = not failures(record)
    return record


def tolerance_of(runtime: str, precision: str) -> Tolerance:
    """Return what holds for a runtime at a precision (fp32, fp16, int8)."""
    return _NCNN_FP32 if (runtime, precision) == ("ncnn", "fp32") else TOLERANCES[precision]


def failures(parity: dict[str, Any]) -> list[str]:
    """Return what of a parity record is outside its tolerance, each in words; nothing where it passed."""
    tolerance, output, detections = parity["tolerance"], parity["outputs"][0], parity["detections"]
    found = []
    for limit, error, words in (
        ("box_px", "max_box_error_px", "a box moves by {:.2g} px"),
        ("score", "max_score_error", "a score moves by {:.2g}"),
        ("box_rms_px", "box_rms_error_px", "boxes move by {:.2g} px (root mean square)"),
        ("score_rms", "score_rms_error", "scores move by {:.2g} of their size (root mean squares)"),
    ):
        if tolerance[limit] is not None and output[error] > tolerance[limit]:
            found.append(f"{words.format(output[error])}, at most {tolerance[limit]:g}")
    share = detections["unmatched"] / max(detections["torch"] + detections[parity["runtime"]], 1)
    if share > tolerance["unmatched"]:
        found.append(f"{share:.1%} of the detections are unmatched, at most {tolerance['unmatched']:.1%}")
    if detections["mean_iou"] is not None and detections["mean_iou"] < tolerance["iou"]:
        found.append(f"matched boxes overlap by {detections['mean_iou']:.4f}, at least {tolerance['iou']:g}")
    if parity["map50_95"] is not None:
        low, high = tolerance["map50_95"]
        if not low <= parity["map50_95"]["difference"] <= high:
            found.append(f"mAP50-95 changes by {parity['map50_95']['difference']:+.4f}, at most {low:+g} to {high:+g}")
    return found


def letterbox(path: Path, imgsz: int) -> np.ndarray:
    """Read an image as a (1, 3, imgsz, imgsz) float32 RGB array in [0, 1], padded to a square with Ultralytics' grey.

    Raises:
        DataError: the file is not an image.
    """
    from ultralytics.data.augment import LetterBox
    from ultralytics.utils.patches import imread

    image = imread(str(path)) if path.is_file() else None
    if image is None:
        raise DataError(f"{path} cannot be read as an image: remove or replace it")
    square: Any = LetterBox((imgsz, imgsz), auto=False)(image=image)
    return np.ascontiguousarray(square[..., ::-1].transpose(2, 0, 1)[None], dtype=np.float32) / 255


def match(reference: np.ndarray, candidate: np.ndarray) -> tuple[list[tuple[int, int, float]], int]:
    """Pair the detections of one image, each with the best overlapping one of its class that is still free.

    Args:
        reference: (n, 6) rows of x1, y1, x2, y2 in px, score, class; best first.
        candidate: (m, 6), likewise.

    Returns:
        The pairs (row of reference, row of candidate, IoU), and how many detections of a score of at least 0.25 have
        no partner on the other side. Rows just below that score may be partners, so that a score that moves across
        the threshold by less than its tolerance is not counted as a lost detection.
    """
    free = set(range(len(candidate)))
    pairs = []
    for i, row in enumerate(reference):
        overlaps = [(_overlap(row, candidate[j]), j) for j in free if candidate[j, 5] == row[5]]
        iou, j = max(overlaps, default=(0.0, -1))
        if iou >= _MATCH_IOU:
            free.remove(j)
            pairs.append((i, j, iou))
    alone = [reference[i] for i in set(range(len(reference))) - {i for i, _, _ in pairs}]
    alone += [candidate[j] for j in free]
    return pairs, sum(bool(row[4] >= CONFIDENCE) for row in alone)


def summary(parity: dict[str, Any]) -> str:
    """Return a parity record as one line for a person."""
    output, detections, tolerance = parity["outputs"][0], parity["detections"], parity["tolerance"]
    runtime, maps = parity["runtime"], parity["map50_95"]
    line = (
        f"{parity['images']} images: boxes within {output['max_box_error_px']:.2g} px{_limit(tolerance['box_px'])}, "
        f"scores within {output['max_score_error']:.2g}{_limit(tolerance['score'])}, "
        f"{detections['torch']} detections in PyTorch, {detections[runtime]} in {runtime}, "
        f"{detections['unmatched']} unmatched"
    )
    return line if maps is None else f"{line}, mAP50-95 {maps[runtime]:.4f} ({maps['difference']:+.4f})"


def _limit(value: float | None) -> str:
    return "" if value is None else f" (at most {value:g})"


def _load(runner: ModuleType, artefact: Path) -> Any:
    try:
        return runner.load(str(artefact), threads=1)
    except ValueError as error:
        raise ExportError(str(error)) from None


def _maps(model: Path, artefact: Path, data: Path, imgsz: int) -> tuple[float, float]:
    from benchmark.accuracy import evaluate

    first, second = (evaluate(path, data, imgsz=imgsz)["map50_95"] for path in (model, artefact))
    return first, second


def _map_record(runtime: str, maps: tuple[float, float] | None) -> dict[str, float] | None:
    return None if maps is None else {"torch": maps[0], runtime: maps[1], "difference": maps[1] - maps[0]}


def _single_output(outputs: list[np.ndarray], expected: np.ndarray, artefact: Path) -> np.ndarray:
    shapes = [list(output.shape) for output in outputs]
    if shapes != [list(expected.shape)]:
        raise ExportError(f"{artefact.name} returns {shapes}, PyTorch returns {[list(expected.shape)]}")
    if not np.isfinite(outputs[0]).all():
        raise ExportError(f"{artefact.name} returns values that are not finite: check the weights")
    return outputs[0]


def _detections(output: np.ndarray, end2end: bool, lowest: float) -> np.ndarray:
    import torch
    from ultralytics.utils.nms import non_max_suppression

    # A copy, because suppression rewrites the boxes in place.
    tensor = torch.from_numpy(output.copy())
    kept: Any = non_max_suppression(tensor, lowest, 0.7, end2end=end2end)
    return kept[0].numpy()


def _sum_of_squares(values: np.ndarray) -> float:
    return float(np.square(values, dtype=np.float64).sum())


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Return the IoU of two boxes; boxes without area, as untrained heads predict them, overlap if they coincide."""
    if np.abs(a[:4] - b[:4]).max() <= _SAME_PX and not (a[:2] < a[2:4]).all():
        return 1.0
    corner = np.minimum(a[2:4], b[2:4]) - np.maximum(a[:2], b[:2])
    intersection = float(np.prod(np.clip(corner, 0, None)))
    union = float(np.prod(a[2:4] - a[:2]) + np.prod(b[2:4] - b[:2])) - intersection
    return intersection / union if union > 0 else 0.0
