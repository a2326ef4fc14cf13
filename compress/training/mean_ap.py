"""mAP of a network between two stages: Ultralytics' own metrics on labelled images, quickly.

What is reported is measured by the benchmark, one image at a time and in every runtime. This is for choosing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from compress.checkpoint import task_of
from compress.errors import DataError, SettingsError
from compress.tasks import LETTERS, map_key, validator_of

if TYPE_CHECKING:
    from torch import nn

_BATCH = 16
_VAL_IMAGES = 128


def sample_images(data: Path, split: str, count: int, seed: int = 0) -> list[Path]:
    """Return `count` images of a split that `seed` chooses, or all if there are fewer, sorted.

    Raises:
        DataError: the data set has no such split.
    """
    from compress.data import dataset

    return sorted(dataset.sample_images(data, split, count, seed))


def scorer(model: nn.Module, data: Path, chosen: list[Path], imgsz: int) -> Callable[[nn.Module], float]:
    """Return what measures mAP50-95 (0 to 1) of models of one task on some labelled images.

    Every image is letterboxed to imgsz × imgsz, without augmentation. The metric is that of the task: boxes, oriented
    boxes, masks or key points. Labels are read once.

    Args:
        model: any of the models, for its task and classes.

    Raises:
        SettingsError: the task has no mAP.
        DataError: the images have no labels, or the data set has other classes than the model.
    """
    from ultralytics.cfg import get_cfg

    from compress.checkpoint import quiet
    from compress.data.dataset import class_names
    from compress.pruning.taylor import labelled

    task, names = task_of(model), class_names(data)
    if task not in LETTERS:
        raise SettingsError(f"a model of the task '{task}' has no mAP: give a detector")
    known = len(model.names)  # type: ignore[arg-type]  (Ultralytics' models have them)
    if known != len(names):
        raise DataError(f"the model knows {known} classes, {data} has {len(names)}: train it on this data first")
    with quiet():
        files, collate = labelled(task, chosen, data, get_cfg(overrides={"imgsz": imgsz}))
    if not any(len(label["cls"]) for label in files.labels):
        raise DataError(f"none of these {len(chosen)} images of {data} has a labelled object: take more images")

    def measure(network: nn.Module) -> float:
        import torch

        device = next(network.parameters()).device
        network.eval()
        with tempfile.TemporaryDirectory() as scratch, quiet(), torch.inference_mode():
            validator = _validator(task, files, names, network, imgsz, Path(scratch))
            for start in range(0, len(files), _BATCH):
                batch = collate([files[index] for index in range(start, min(start + _BATCH, len(files)))])
                batch = validator.preprocess(batch)
                validator.update_metrics(validator.postprocess(network(batch["img"].to(device))), batch)
            return float(validator.get_stats()[map_key(task)])

    return measure


def val_scorer(model: nn.Module, data: Path, imgsz: int, seed: int = 0) -> Callable[[nn.Module], float] | None:
    """Return what measures mAP50-95 on some images of the val split; None where the model has none there."""
    if task_of(model) not in LETTERS:
        return None
    try:
        return scorer(model, data, sample_images(data, "val", _VAL_IMAGES, seed), imgsz)
    except DataError:  # classes of other data, or no labels: what needs images alone still works
        return None


def _validator(task: str, files: Any, names: dict[int, str], network: nn.Module, imgsz: int, scratch: Path) -> Any:
    """Return Ultralytics' validator of a task with empty metrics."""
    args = {"imgsz": imgsz, "rect": False, "plots": False, "device": "cpu"}
    validator = validator_of(task)(save_dir=scratch, args=args)
    validator.training = False
    validator.device = next(network.parameters()).device
    validator.data = files.data
    validator.dataloader = SimpleNamespace(dataset=files)
    end2end = getattr(network, "end2end", False)
    validator.init_metrics(SimpleNamespace(names=names, end2end=end2end))
    return validator
