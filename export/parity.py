"""Parity: an exported artefact must compute what the PyTorch model computes, on real images."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from compress.data.pixels import centre_crop, letterbox
from compress.errors import DataError, ExportError
from compress.tasks import SCORE_NAMES
from export.differences import differences_of

SLACK = 0.1  # of scores near a threshold, where a tolerance does not judge single ones
_SCORED_BY = ("map50_95", "top1")


@dataclass(frozen=True)
class Tolerance:
    """How far an artefact may be from PyTorch. What is null is recorded, but not judged.

    Attributes:
        box_px: largest error of any side of any box of the raw tensor, px.
        score: largest error of any score of the raw tensor.
        box_rms_px: root mean square error of the sides of all boxes of the raw tensor, px.
        score_rms: error of all scores of the raw tensor as a share of their size, both as root mean squares.
        unmatched: share of the detections of both sides that may have no partner; of the images of a classifier, the
            share that may get another class.
        iou: mean overlap of detections with their partners, at least this.
        map50_95: lowest and highest difference of mAP to PyTorch, or of the top-1 accuracy of a classifier.
        value: largest error of any other value (mask, key point, angle), as a share of the size of all of its kind.
        value_rms: error of all other values of a kind as a share of their size, both as root mean squares.
    """

    box_px: float | None
    score: float | None
    box_rms_px: float | None
    score_rms: float | None
    unmatched: float
    iou: float
    map50_95: tuple[float, float]
    value: float | None = None
    value_rms: float | None = None


# With less than fp32 single boxes of anchors that see nothing may move by many px, and where two boxes of one object
# have nearly the same score the other one may win, although all is as it should be: there the whole is judged, not
# its worst number. At int8 a better mAP is luck, not a fault. At fp32 every anchor is judged; still, among thousands of
# overlapping boxes, as a model of a few epochs has them, a last digit decides which of two suppresses the other
# (9 of 2507 detections, with boxes within 0.0013 px and scores within 4.5e-6).
TOLERANCES = {
    "fp32": Tolerance(0.05, 1e-4, None, None, 0.005, 0.999, (-0.001, 0.001), value=1e-3, value_rms=1e-4),
    "fp16": Tolerance(None, None, 0.3, 0.02, 0.02, 0.99, (-0.003, 0.003), value_rms=0.02),
    "int8": Tolerance(None, None, None, 0.3, 0.1, 0.9, (-0.010, 1.0), value_rms=0.3),
}
# ncnn's worst number is a few times onnxruntime's (yolo26n on 128 images: 0.056 px, without Winograd convolutions still
# 0.045 px), while its root mean squares stay as small: so there both are judged.
_NCNN_FP32 = replace(TOLERANCES["fp32"], box_px=0.25, score=1e-3, box_rms_px=0.005, score_rms=1e-4, value=5e-3)


def compare(
    model: Path,
    artefact: Path,
    images: list[Path],
    imgsz: int | tuple[int, int],
    *,
    precision: str = "fp32",
    batch: int = 1,
    data: Path | None = None,
    maps: tuple[float, float] | None = None,
    tolerance: Tolerance | None = None,
) -> dict[str, Any]:
    """Run the same letterboxed images through PyTorch and through the artefact, and compare what comes out.

    Up to three comparisons, because each alone can hide a fault: the raw tensors, the detections that a user would
    see, and the mAP where `data` or `maps` are given. The rows of an end-to-end head are sorted by score, so that
    equal scores may swap places: there all scores and the detections stand for the tensors. So do the detections of
    an artefact that suppresses by itself: they must be those of Ultralytics' suppression on PyTorch's output.

    Args:
        model: the checkpoint, or any other artefact that stands for it.
        artefact: what was made from it, for any runtime of `benchmark.runtimes`.
        images: image files, at least one.
        imgsz: side of the square input, px, or its height and width.
        precision: fp32, fp16 or int8: which tolerance holds.
        batch: how many images go through the artefact at once; the last batch is filled up from the first images.
        data: data set, whose val split gives both mAP (of a classifier: both top-1 accuracies).
        maps: mAP50-95 (top-1) of PyTorch and of the artefact, where they are known.
        tolerance: instead of the one of the precision.

    Returns:
        `task`, `runtime`, `precision`, `images`, `imgsz`, `batch`, `tolerance`, `outputs` (first boxes and scores with
        their shape and, where any were compared, their errors, then every other kind of value with its errors as shares
        of its size), `passed`, and `map50_95` (torch, the runtime, difference) or null; of a classifier `top1` instead.
        `detections` above a score of 0.25 (torch and the runtime: how many; unmatched; of the matched min_iou,
        mean_iou, max_box_error_px, max_score_error); overlaps are null without detections. Of a classifier `classes`
        instead: images, and how many of them get another class.

    Raises:
        BenchmarkError: no runtime opens the artefact.
        DataError: no images, or a file that is not an image.
        ExportError: the artefact cannot run, its output has another shape, or an output is not finite.
    """
    from benchmark import runtimes

    if not images:
        raise DataError(f"parity of {artefact.name} needs at least one image: give --data with a val split")
    origin, runner = runtimes.runner_of(model), runtimes.runner_of(artefact)
    runtime = str(runtimes.runtime_of(artefact))
    tolerance = tolerance or tolerance_of(runtime, precision)
    reference, candidate = _load(origin, model), _load(runner, artefact)
    facts = origin.describe(reference)
    suppression = runner.describe(candidate).get("suppression")
    classifies = facts["task"] == "classify"
    prepare = centre_crop if classifies else letterbox
    compared = differences_of(facts, suppression, tolerance.score or SLACK)
    for start in range(0, len(images), batch):
        places = [(start + i) % len(images) for i in range(batch)]
        pixels = np.concatenate([prepare(images[place], imgsz) for place in places])
        expected, actual = _infer(origin, reference, model, pixels), _infer(runner, candidate, artefact, pixels)
        _check_outputs(actual, expected, artefact, suppression)
        for i in range(min(batch, len(images) - start)):
            compared.add([one[i : i + 1] for one in expected], [other[i : i + 1] for other in actual])
    metric = "top1" if classifies else "map50_95"
    record = {
        "task": facts["task"],
        "runtime": runtime,
        "precision": precision,
        "images": len(images),
        "imgsz": imgsz,
        "batch": batch,
        "tolerance": {**asdict(tolerance), "map50_95": list(tolerance.map50_95)},
        **compared.record(runtime),
        metric: _map_record(runtime, maps or (data and _maps(model, artefact, data, imgsz, metric))),
    }
    record["passed"] = not failures(record)
    return record


def tolerance_of(runtime: str, precision: str) -> Tolerance:
    """Return what holds for a runtime at a precision (fp32, fp16, int8)."""
    return _NCNN_FP32 if (runtime, precision) == ("ncnn", "fp32") else TOLERANCES[precision]


_WORDS = (
    ("box_px", "max_box_error_px", "a box moves by {:.2g} px"),
    ("score", "max_score_error", "a score moves by {:.2g}"),
    ("box_rms_px", "box_rms_error_px", "boxes move by {:.2g} px (root mean square)"),
    ("score_rms", "score_rms_error", "scores move by {:.2g} of their size (root mean squares)"),
    ("value", "max_value_error", "one of the {name} moves by {:.2g} of their size"),
    ("value_rms", "value_rms_error", "{name} move by {:.2g} of their size (root mean squares)"),
)


def failures(parity: dict[str, Any]) -> list[str]:
    """Return what of a parity record is outside its tolerance, each in words; nothing where it passed."""
    tolerance = parity["tolerance"]
    found = [
        f"{words.format(output[error], name=output.get('name'))}, at most {tolerance[limit]:g}"
        for output in parity["outputs"]
        for limit, error, words in _WORDS
        if error in output and tolerance.get(limit) is not None and output[error] > tolerance[limit]
    ]
    if detections := parity.get("detections"):
        share = detections["unmatched"] / max(detections["torch"] + detections[parity["runtime"]], 1)
        if share > tolerance["unmatched"]:
            found.append(f"{share:.1%} of the detections are unmatched, at most {tolerance['unmatched']:.1%}")
        if detections["mean_iou"] is not None and detections["mean_iou"] < tolerance["iou"]:
            found.append(f"matched boxes overlap by {detections['mean_iou']:.4f}, at least {tolerance['iou']:g}")
    if classes := parity.get("classes"):
        share = classes["other_class"] / classes["images"]
        if share > tolerance["unmatched"]:
            found.append(f"{share:.1%} of the images get another class, at most {tolerance['unmatched']:.1%}")
    for metric in _SCORED_BY:
        if parity.get(metric) is not None:
            low, high = tolerance["map50_95"]
            change = parity[metric]["difference"]
            if not low <= change <= high:
                found.append(f"{SCORE_NAMES[metric]} changes by {change:+.4f}, at most {low:+g} to {high:+g}")
    return found


def summary(parity: dict[str, Any]) -> str:
    """Return a parity record as one line for a person."""
    tolerance, runtime = parity["tolerance"], parity["runtime"]
    parts = []
    for output in parity["outputs"]:
        if "max_box_error_px" in output:
            parts.append(f"boxes within {output['max_box_error_px']:.2g} px{_limit(tolerance['box_px'])}")
        if "max_score_error" in output:
            parts.append(f"scores within {output['max_score_error']:.2g}{_limit(tolerance['score'])}")
        if "max_value_error" in output:
            limit = _limit(tolerance.get("value"))
            parts.append(f"{output['name']} within {output['max_value_error']:.2g} of their size{limit}")
    if detections := parity.get("detections"):
        if not finds_nothing(parity):
            parts.append(f"{detections['torch']} detections in PyTorch, {detections[runtime]} in {runtime}")
            parts.append(f"{detections['unmatched']} unmatched")
        else:
            parts.append("no detections to match: the model finds nothing on them")
    if classes := parity.get("classes"):
        parts.append(f"{classes['other_class']} images of another class")
    parts += [
        f"{SCORE_NAMES[metric]} {found[runtime]:.4f} ({found['difference']:+.4f})"
        for metric in _SCORED_BY
        if (found := parity.get(metric)) is not None
    ]
    line = f"{parity['images']} images: {', '.join(parts)}"
    return f"{line}; with suppression: {summary(parity['suppression'])}" if "suppression" in parity else line


def finds_nothing(parity: dict[str, Any]) -> bool:
    """Tell whether there was no detection on any image, neither in PyTorch nor in the runtime."""
    detections = parity.get("detections")
    return detections is not None and not (detections["torch"] or detections[parity["runtime"]])


def _limit(value: float | None) -> str:
    return "" if value is None else f" (at most {value:g})"


def _load(runner: ModuleType, artefact: Path) -> Any:
    try:
        return runner.load(str(artefact), threads=1)
    except ValueError as error:
        raise ExportError(str(error)) from None


def _infer(runner: ModuleType, session: Any, artefact: Path, pixels: np.ndarray) -> list[np.ndarray]:
    try:
        return runner.infer(session, pixels)
    except ValueError as error:
        raise ExportError(f"{artefact.name}: {error}") from None


def _maps(model: Path, artefact: Path, data: Path, imgsz: int | tuple[int, int], metric: str) -> tuple[float, float]:
    from benchmark.accuracy import evaluate

    side = imgsz if isinstance(imgsz, int) else max(imgsz)
    first, second = (evaluate(path, data, imgsz=side)[metric] for path in (model, artefact))
    return first, second


def _map_record(runtime: str, maps: tuple[float, float] | None) -> dict[str, float] | None:
    return None if maps is None else {"torch": maps[0], runtime: maps[1], "difference": maps[1] - maps[0]}


def _check_outputs(
    outputs: list[np.ndarray], expected: list[np.ndarray], artefact: Path, suppression: dict[str, Any] | None
) -> None:
    shapes, wanted = ([list(output.shape) for output in side] for side in (outputs, expected))
    if suppression is not None and shapes:
        # Rows of box, score, class and what else there is, instead of all anchors: the parts must be there.
        wanted[0] = [wanted[0][0], *shapes[0][1:]]
    if shapes != wanted:
        raise ExportError(f"{artefact.name} returns {shapes}, PyTorch returns {wanted}")
    # No error is larger than a limit when it is no number.
    if not all(np.isfinite(output).all() for output in expected):
        raise ExportError("PyTorch returns values that are not finite: check the weights of the model")
    if not all(np.isfinite(output).all() for output in outputs):
        raise ExportError(f"{artefact.name} returns values that are not finite, PyTorch not: use a wider precision")
