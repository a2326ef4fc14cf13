"""Model files: opened by a restricted loader, written as Ultralytics checkpoints that carry their plans."""

from __future__ import annotations

import copy
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import CheckpointError
from compress.manifest import sha256_json, write_bytes_atomic

if TYPE_CHECKING:
    from torch import nn

MODELS = Path(__file__).parents[1] / "configs" / "models"
PLANS = "espalier_plans"  # attribute of a pruned model: its plans, oldest first, as plain dicts

HEADS = {
    "Detect": "detect",
    "v10Detect": "detect",
    "Segment": "segment",
    "Segment26": "segment",
    "Pose": "pose",
    "Pose26": "pose",
    "OBB": "obb",
    "OBB26": "obb",
    "Classify": "classify",
    "Linear": "classify",  # nothing but pooling before it; what it returns are logits, also in inference
    "SemanticSegment": "semantic",
    "Depth": "depth",
}
TASKS = tuple(dict.fromkeys(HEADS.values()))  # that can be exported
TRAINABLE = ("detect", "segment", "pose", "obb", "classify")


def load_model(path: str | Path) -> nn.Module:
    """Open a checkpoint (.pt) or build an architecture (.yaml), in fp32 and evaluation mode.

    A checkpoint is unpickled with an allow-list of tensors and model classes; anything else in it is refused before
    it can run. The name of an official Ultralytics checkpoint that is not on disk is downloaded by Ultralytics.

    Raises:
        CheckpointError: missing, damaged, not a model, or a file that would import something else than a model.
    """
    path = Path(path)
    if path.suffix in (".yaml", ".yml"):
        return build_model(str(path))
    return _open(path)[0]


def require(path: str | Path) -> None:
    """Check that there is a file of a model, or that its name is one to download, before any slower work.

    Raises:
        CheckpointError: there is none, or it is no file of a model.
    """
    path = Path(path)
    if path.suffix in (".yaml", ".yml"):  # its name may be Ultralytics' own
        return
    if path.suffix != ".pt":
        raise CheckpointError(f"{path} is not a model: give a .pt checkpoint or a .yaml architecture")
    if not path.is_file() and (path.name != str(path) or not _is_official(path.name)):
        raise CheckpointError(f"{path} does not exist: check the path")


def require_weights(path: str | Path) -> None:
    """Check that there is a checkpoint; an official one that is not on disk is downloaded.

    Raises:
        CheckpointError: there is none, it is something else, or it cannot be downloaded.
    """
    path = Path(path)
    if path.suffix in (".yaml", ".yml"):
        raise CheckpointError(f"{path} is an architecture without weights: train it first, and give what comes out")
    if path.suffix != ".pt":
        raise CheckpointError(f"{path} is no checkpoint: give a .pt file")
    require(path)
    if not path.is_file():
        load_model(path)


def _is_official(name: str) -> bool:
    from ultralytics.utils.downloads import GITHUB_ASSETS_NAMES

    return name in GITHUB_ASSETS_NAMES


def load_trainable(path: str | Path) -> nn.Module:
    """Open what can be trained and pruned: `load_model`, and its task is one of `TRAINABLE`.

    Raises:
        CheckpointError: as `load_model`, or the model is of another task or has an unknown head.
    """
    return _load_of(path, TRAINABLE, "trained")


def load_deployable(path: str | Path) -> nn.Module:
    """Open what can be exported: `load_model`, and `task_of` knows its head.

    Raises:
        CheckpointError: as `load_model`, or the head is none of `HEADS`.
    """
    return _load_of(path, TASKS, "exported")


def _load_of(path: str | Path, tasks: tuple[str, ...], done: str) -> nn.Module:
    model = load_model(path)
    head = type(model.model[-1]).__name__  # type: ignore[index]
    if HEADS.get(head) not in tasks:
        raise CheckpointError(f"{path} has a {head} head: only models to {', '.join(tasks)} can be {done}")
    return model


def task_of(model: nn.Module) -> str:
    """Return what a model does, by its head: detect, segment, pose, obb, classify … ('detect' for any other head)."""
    return HEADS.get(type(model.model[-1]).__name__, "detect")  # type: ignore[index]


def load_training_args(path: str | Path) -> dict[str, Any]:
    """Return the Ultralytics training arguments that a checkpoint was made with (empty for a .yaml)."""
    path = Path(path)
    return {} if path.suffix in (".yaml", ".yml") else dict(_open(path)[1].get("train_args") or {})


def build_model(cfg: str | dict[str, Any], nc: int | None = None) -> nn.Module:
    """Build an untrained model of the task that its head tells, from a YAML of Ultralytics' form, with `nc` classes.

    A name that is neither on disk nor one of Ultralytics' own, such as yolov7.yaml, is looked for in configs/models.

    Raises:
        CheckpointError: the YAML is missing or does not describe a model.
    """
    from ultralytics.nn import tasks

    with quiet():
        try:
            content: Any = copy.deepcopy(cfg) if isinstance(cfg, dict) else read_architecture(cfg)
            kind = getattr(tasks, _model_class(str(content["head"][-1][2])))
            return kind(content, nc=nc, verbose=False).eval()
        except (LookupError, TypeError, ValueError, AttributeError, AssertionError, RuntimeError, OSError) as error:
            name = cfg if isinstance(cfg, str) else cfg.get("yaml_file", "the model YAML")
            reason = f"it has no {error}" if isinstance(error, KeyError) else error
            raise CheckpointError(f"{name} does not describe a model of Ultralytics' form: {reason}") from None


def read_architecture(cfg: str) -> dict[str, Any]:
    """Return the content of a model YAML: a path, one of Ultralytics' own names, or a name in configs/models.

    Raises:
        FileNotFoundError: there is none.
    """
    from ultralytics.nn.tasks import yaml_model_load

    try:
        return yaml_model_load(cfg)
    except FileNotFoundError:
        own = MODELS / cfg
        if not own.is_file():
            raise
        return yaml_model_load(str(own))


def _model_class(head: str) -> str:
    """Return Ultralytics' class of model for a head, by the name that a YAML gives it.

    >>> _model_class("Segment26")
    'SegmentationModel'
    """
    known = {
        "SemanticSegment": "SemanticSegmentationModel",
        "Segment": "SegmentationModel",
        "Pose": "PoseModel",
        "OBB": "OBBModel",
        "Depth": "DepthModel",
        "Classify": "ClassificationModel",
        "nn.Linear": "ClassificationModel",
        "RTDETRDecoder": "RTDETRDetectionModel",
        "WorldDetect": "WorldModel",
        "YOLOESegment": "YOLOESegModel",
        "YOLOEDetect": "YOLOEModel",
    }
    return next((model for start, model in known.items() if head.startswith(start)), "DetectionModel")


def plans_of(model: nn.Module) -> list[dict[str, Any]]:
    """Return the plans that shaped a model, oldest first; empty for a dense model."""
    return list(getattr(model, PLANS, []))


def structure_hash(model: nn.Module) -> str:
    """Return a hash of the names and shapes of a model's weights: what a plan must match."""
    return sha256_json({name: list(value.shape) for name, value in model.state_dict().items()})


def with_classes(model: nn.Module, classes: int) -> nn.Module:
    """Return a model as a training on a data set of so many classes makes it; a pruned one keeps its head."""
    if len(model.names) == classes or plans_of(model):  # type: ignore[arg-type]  (Ultralytics' dict of names)
        return model
    trained: Any = build_model(model.yaml, nc=classes)  # type: ignore[arg-type]  (likewise, what it was built from)
    trained.load(model, verbose=False)
    return trained


def save_model(model: nn.Module, path: Path, training_args: dict[str, Any]) -> None:
    """Write a checkpoint that stock `YOLO(path)` opens for predict, val and export. The file appears whole or not."""
    import torch
    from ultralytics import __version__

    stored = copy.deepcopy(model).half()
    for parameter in stored.parameters():
        parameter.grad = None
    checkpoint = {
        "epoch": -1,
        "best_fitness": None,
        "model": stored,
        "ema": None,
        "optimizer": None,
        # By its default arguments Ultralytics would take a model of any task for a detector.
        "train_args": {"task": task_of(model), **training_args},
        "date": datetime.now(timezone.utc).isoformat(),
        "version": __version__,
        "license": "AGPL-3.0 (https://ultralytics.com/license)",
    }
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write_bytes_atomic(path, buffer.getvalue())


@contextmanager
def quiet() -> Iterator[None]:
    """Silence Ultralytics' informational log lines; its warnings become ours to raise."""
    logger = logging.getLogger("ultralytics")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def files_as_named() -> Iterator[None]:
    """Let Ultralytics open a file that is there, and no other.

    It takes apostrophes out of a path, and yolov5nu.pt for any file named yolov5n.pt, as with the other
    sizes of YOLOv3 and v5, which it would download: other weights than those that were given.
    """
    from ultralytics.utils import downloads

    library: Any = downloads
    before = library.attempt_download_asset

    def find(file: str | Path, *args: Any, **kwargs: Any) -> str:
        return str(file) if Path(file).is_file() else before(file, *args, **kwargs)

    library.attempt_download_asset = find
    try:
        yield
    finally:
        library.attempt_download_asset = before


def read_checkpoint(path: Path | str) -> dict[str, Any]:
    """Return what a checkpoint file holds, read by the allow-list.

    Raises:
        Exception: of a dozen types, where it is damaged or holds something else.
    """
    from ultralytics.nn.tasks import torch_safe_load

    with files_as_named():
        return torch_safe_load(str(path), safe_only=True)[0]


def _open(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    require(path)
    import torch
    from ultralytics.nn.tasks import BaseModel

    if path.is_file():
        _refuse_foreign_globals(path)
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about a foreign pickle, then refuses it
        try:
            checkpoint = read_checkpoint(path)
        except Exception as error:  # damaged files surface as a dozen unrelated exception types
            if not path.is_file():
                raise CheckpointError(
                    f"{path} is not here and cannot be downloaded ({_reason(error)}): download it and give its path"
                ) from None
            raise CheckpointError(
                f"{path} cannot be opened: it is damaged, or holds other things than a model ({_reason(error)}); "
                "download or train it again"
            ) from None
    model: Any = checkpoint.get("model") if checkpoint.get("ema") is None else checkpoint["ema"]
    if not isinstance(getattr(model, "student_model", model), BaseModel):  # a distilling one has its teacher along
        raise CheckpointError(f"{path} holds no model of Ultralytics: train or convert it first")
    model = model.float().eval().to(memory_format=torch.contiguous_format)  # unlike in training
    model.pt_path = str(path)  # Ultralytics keeps it there
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return model, checkpoint


def _refuse_foreign_globals(path: Path) -> None:
    """Name what a checkpoint would import, if that is not a model class, before any of it is opened."""
    import torch

    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception:  # not a zip archive of torch: the loader says so with its own message
        return
    allowed = ("torch.", "ultralytics.", "numpy.", "pathlib.", "builtins.getattr", "torchvision.transforms.")
    foreign = [name for name in names if not name.startswith(allowed)]
    if foreign:
        remedy = "refused"
        if any(name.startswith("models.") for name in foreign):  # what YOLOv5's and YOLOv7's own repositories are
            remedy = f"if it is of YOLOv5 or YOLOv7, `python -m compress.convert {path} --output NEW.pt` reads it"
        raise CheckpointError(
            f"{path} is not a plain model: opening it would import {', '.join(sorted(foreign)[:3])}; {remedy}"
        )


def _reason(error: Exception) -> str:
    """Return the kind and the first sentence of what torch said; Ultralytics wraps it in advice of its own."""
    inner = error.__cause__ or error
    return f"{type(inner).__name__}: {str(inner).strip().partition(chr(10))[0].partition('. ')[0]}"
