"""The models of docs/coverage.md: everything that Espalier must prune as it is, by name.

YOLO names are Ultralytics' own YAMLs (`yolov8n` is its smallest scale) or files of configs/models; the others are the
networks of torchvision and timm. All are built with random weights: nothing is downloaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

CONFIGS = Path(__file__).parents[2] / "configs" / "models"
SCALES = "nsmlx"

DETECT = (
    *("yolov3-tiny", "yolov3", "yolov3-spp"),
    *("yolov5n", "yolov5n-p6", "yolov6n"),
    *("yolov8n", "yolov8n-p2", "yolov8n-p6", "yolov8n-ghost", "yolov8n-ghost-p2", "yolov8n-ghost-p6"),
    *("yolov9t", "yolov9s", "yolov9m", "yolov9c", "yolov9e"),
    *("yolov10n", "yolov10s", "yolov10m", "yolov10b", "yolov10l", "yolov10x"),
    *("yolo11n", "yolo12n", "yolo26n", "yolo26n-p2", "yolo26n-p6"),
)
TASKS = (
    *("yolov8n-seg", "yolov8n-seg-p6", "yolov8n-pose", "yolov8n-pose-p6", "yolov8n-obb", "yolov8n-cls"),
    *("yolov8n-cls-resnet50", "yolov8n-cls-resnet101", "yolov9c-seg", "yolov9e-seg"),
    *("yolo11n-seg", "yolo11n-pose", "yolo11n-obb", "yolo11n-cls"),
    *("yolo12n-seg", "yolo12n-pose", "yolo12n-obb", "yolo12n-cls"),
    *("yolo26n-seg", "yolo26n-pose", "yolo26n-obb", "yolo26n-cls", "yolo26n-sem", "yolo26n-depth"),
)
RTDETR = ("rtdetr-l", "rtdetr-x", "rtdetr-resnet50", "rtdetr-resnet101", "yolov8n-rtdetr")
SCALED = tuple(f"{family}{scale}" for family in ("yolov8", "yolo12") for scale in SCALES[1:])
TORCHVISION = (
    *("vgg11_bn", "vgg19_bn", "resnet18", "resnet50", "densenet121", "mobilenet_v2", "mobilenet_v3_small"),
    *("mobilenet_v3_large", "shufflenet_v2_x1_0", "efficientnet_v2_s", "regnet_x_400mf", "regnet_y_400mf"),
    "convnext_tiny",
)
TIMM = ("ghostnet_100", "mobileone_s0", "lcnet_100", "repvgg_a0")


def names() -> list[str]:
    """Return the names of all models."""
    own = sorted(path.stem for path in CONFIGS.glob("yolov7*.yaml"))  # those for CIFAR-10 have their own tests
    return [*DETECT, *TASKS, *RTDETR, *own, *SCALED, *TORCHVISION, *(f"timm/{name}" for name in TIMM)]


def build(name: str) -> nn.Module:
    """Return a model with random weights, in evaluation mode."""
    if name in TORCHVISION:
        import torchvision

        return torchvision.models.get_model(name, weights=None).eval()
    if name.startswith("timm/"):
        import timm

        return timm.create_model(name.removeprefix("timm/"), pretrained=False).eval()
    from compress.checkpoint import build_model

    own = CONFIGS / f"{name}.yaml"
    return build_model(str(own) if own.is_file() else f"{name}.yaml")


def imgsz(name: str) -> int:
    """Return the side of a square input that the model takes, px: small, because groups do not depend on it."""
    if name.startswith("vgg"):
        return 224  # a smaller one is pooled up to 7 × 7, which ONNX cannot
    if name in TORCHVISION or name.startswith("timm/"):
        return 64
    return 128 if "p6" in name or name.startswith("yolov7-w6") else 64
