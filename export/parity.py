"""Parity: an exported artefact must compute what the PyTorch model computes, on real images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from compress.errors import DataError, ExportError

BOX_TOLERANCE_PX = 0.05
SCORE_TOLERANCE = 1e-4
CONFIDENCE = 0.25
_MATCH_IOU = 0.5


def compare(model: Path, artefact: Path, images: list[Path], imgsz: int) -> dict[str, Any]:
    """Run the same letterboxed images through PyTorch and through the artefact, and compare what comes out.

    Two comparisons, because either alone can hide a fault: the raw tensors, and the detections that a user would see.
    The rows of an end-to-end head are sorted by score, so that equal scores may swap places: there all scores and the
    detections stand for the tensors.

    Args:
        model: the checkpoint.
        artefact: the ONNX file made from it.
        images: image files, at least one.
        imgsz: side of the square input, px.

    Returns:
        `images`, `imgsz`, `tolerance` {box_px, score}, `outputs` (per network output: shape, max_box_error_px,
        max_score_error, max_relative_error), `detections` {torch, onnxruntime, unmatched, min_iou} above a score of
        0.25, and `passed`. `min_iou` is null without detections.

    Raises:
        DataError: no images, or a file that is not an image.
        ExportError: the artefact's output has another shape, or is not finite.
    """
    from benchmark.runners import onnxruntime_runner, torch_runner

    if not images:
        raise DataError(f"parity of {artefact.name} needs at least one image: give --data with a val split")
    reference = torch_runner.load(str(model), threads=1)
    candidate = onnxruntime_runner.load(str(artefact), threads=1)
    end2end = torch_runner.describe(reference)["end2end"]

    boxes = scores = relative = 0.0
    shape: tuple[int, ...] = ()
    found, unmatched, ious = [0, 0], 0, []
    for path in images:
        image = letterbox(path, imgsz)
        expected = torch_runner.infer(reference, image)[0]
        actual = _single_output(onnxruntime_runner.infer(candidate, image), expected, artefact)
        shape = expected.shape
        detections = [_detections(output, end2end) for output in (expected, actual)]
        pairs, lost = match(*detections)
        found = [count + int((rows[:, 4] >= CONFIDENCE).sum()) for count, rows in zip(found, detections, strict=True)]
        unmatched += lost
        ious += [iou for _, _, iou in pairs]
        if end2end:
            # Sorted scores compare by position even where rows swap, and even where nothing is detected.
            scores = max(scores, float(np.abs(actual[..., 4] - expected[..., 4]).max()))
            expected = detections[0][[i for i, _, _ in pairs]].T[None]
            actual = detections[1][[j for _, j, _ in pairs]].T[None]
        difference = np.abs(actual - expected)
        boxes = max(boxes, float(difference[:, :4].max(initial=0.0)))
        scores = max(scores, float(difference[:, 4:].max(initial=0.0)))
        relative = max(relative, float(difference.max(initial=0.0) / max(np.abs(expected).max(initial=0.0), 1e-12)))
    return {
        "images": len(images),
        "imgsz": imgsz,
        "tolerance": {"box_px": BOX_TOLERANCE_PX, "score": SCORE_TOLERANCE},
        "outputs": [
            {
                "shape": list(shape),
                "max_box_error_px": boxes,
                "max_score_error": scores,
                "max_relative_error": relative,
            }
        ],
        "detections": {
            "torch": found[0],
            "onnxruntime": found[1],
            "unmatched": unmatched,
            "min_iou": min(ious, default=None),
        },
        "passed": boxes <= BOX_TOLERANCE_PX and scores <= SCORE_TOLERANCE and unmatched == 0,
    }


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
    output, detections = parity["outputs"][0], parity["detections"]
    return (
        f"{parity['images']} images: boxes within {output['max_box_error_px']:.2g} px (at most {BOX_TOLERANCE_PX}), "
        f"scores within {output['max_score_error']:.2g} (at most {SCORE_TOLERANCE:g}), "
        f"{detections['torch']} detections in PyTorch, {detections['onnxruntime']} in onnxruntime, "
        f"{detections['unmatched']} unmatched"
    )


def _single_output(outputs: list[np.ndarray], expected: np.ndarray, artefact: Path) -> np.ndarray:
    shapes = [list(output.shape) for output in outputs]
    if shapes != [list(expected.shape)]:
        raise ExportError(f"{artefact.name} returns {shapes}, PyTorch returns {[list(expected.shape)]}")
    if not np.isfinite(outputs[0]).all():
        raise ExportError(f"{artefact.name} returns values that are not finite: check the weights")
    return outputs[0]


def _detections(output: np.ndarray, end2end: bool) -> np.ndarray:
    import torch
    from ultralytics.utils.nms import non_max_suppression

    # A copy, because suppression rewrites the boxes in place.
    tensor = torch.from_numpy(output.copy())
    kept: Any = non_max_suppression(tensor, CONFIDENCE - SCORE_TOLERANCE, 0.7, end2end=end2end)
    return kept[0].numpy()


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Return the IoU of two boxes; boxes without area, as untrained heads predict them, overlap if they coincide."""
    if np.abs(a[:4] - b[:4]).max() <= BOX_TOLERANCE_PX and not (a[:2] < a[2:4]).all():
        return 1.0
    corner = np.minimum(a[2:4], b[2:4]) - np.maximum(a[:2], b[:2])
    intersection = float(np.prod(np.clip(corner, 0, None)))
    union = float(np.prod(a[2:4] - a[:2]) + np.prod(b[2:4] - b[:2])) - intersection
    return intersection / union if union > 0 else 0.0
