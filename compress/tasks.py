"""How Ultralytics measures what each task is about."""

from __future__ import annotations

from typing import Any

# The letter of each task's own metric: boxes (also oriented ones), masks, key points. Other tasks have no mAP.
LETTERS = {"detect": "B", "obb": "B", "segment": "M", "pose": "P"}
# What models are scored by, as records name it and as people read it; what counts first.
SCORE_NAMES = {"map50_95": "mAP50-95", "map50": "mAP50", "top1": "top-1", "top5": "top-5"}


def metric_of(task: str) -> str:
    """Return by what models of a task are judged: `map50_95`, classifiers by `top1`."""
    return "top1" if task == "classify" else "map50_95"


def map_key(task: str, thresholds: str = "50-95") -> str:
    """Return the name of a task's own mAP among a validator's metrics.

    >>> map_key("segment"), map_key("detect", "50")
    ('metrics/mAP50-95(M)', 'metrics/mAP50(B)')
    """
    return f"metrics/mAP{thresholds}({LETTERS[task]})"


def validator_of(task: str) -> Any:
    """Return the class of Ultralytics that validates models of a task."""
    from ultralytics.models import yolo

    return {
        "detect": yolo.detect.DetectionValidator,
        "segment": yolo.segment.SegmentationValidator,
        "pose": yolo.pose.PoseValidator,
        "obb": yolo.obb.OBBValidator,
        "classify": yolo.classify.ClassificationValidator,
    }[task]
