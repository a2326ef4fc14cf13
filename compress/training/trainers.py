"""A trainer of each task, with pruned shapes and with sparsity. What they add lies in `Planned` and `Sparse`."""

from __future__ import annotations

from ultralytics.models.yolo.classify import ClassificationTrainer
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.models.yolo.obb import OBBTrainer
from ultralytics.models.yolo.pose import PoseTrainer
from ultralytics.models.yolo.segment import SegmentationTrainer

from compress.training.planned import Planned
from compress.training.sparse import Sparse


class PlanTrainer(Planned, DetectionTrainer):
    """Trains detectors."""


class SparsityTrainer(Sparse, DetectionTrainer):
    """Trains detectors with sparsity."""


class SegmentationPlanTrainer(Planned, SegmentationTrainer):
    """Trains instance segmentation."""


class SegmentationSparsityTrainer(Sparse, SegmentationTrainer):
    """Trains instance segmentation with sparsity."""


class PosePlanTrainer(Planned, PoseTrainer):
    """Trains pose estimation."""


class PoseSparsityTrainer(Sparse, PoseTrainer):
    """Trains pose estimation with sparsity."""


class OBBPlanTrainer(Planned, OBBTrainer):
    """Trains detectors of oriented boxes."""


class OBBSparsityTrainer(Sparse, OBBTrainer):
    """Trains detectors of oriented boxes with sparsity."""


class ClassificationPlanTrainer(Planned, ClassificationTrainer):
    """Trains classifiers."""


class ClassificationSparsityTrainer(Sparse, ClassificationTrainer):
    """Trains classifiers with sparsity."""


PLAN_TRAINERS: dict[str, type[Planned]] = {
    "detect": PlanTrainer,
    "segment": SegmentationPlanTrainer,
    "pose": PosePlanTrainer,
    "obb": OBBPlanTrainer,
    "classify": ClassificationPlanTrainer,
}
SPARSITY_TRAINERS: dict[str, type[Sparse]] = {
    "detect": SparsityTrainer,
    "segment": SegmentationSparsityTrainer,
    "pose": PoseSparsityTrainer,
    "obb": OBBSparsityTrainer,
    "classify": ClassificationSparsityTrainer,
}
