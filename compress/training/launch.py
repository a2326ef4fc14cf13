"""One training from start to end, or on from where it was interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from ultralytics.cfg import get_cfg
from ultralytics.utils import DEFAULT_CFG_DICT

from compress.checkpoint import load_model
from compress.errors import CheckpointError, EspalierError, SettingsError
from compress.manifest import write_bytes_atomic, write_json
from compress.settings import Training
from compress.training.planned import RESUME, RESUME_BEST, Planned

TRAINING = "training"  # Ultralytics' own folder inside a stage's
_OURS = {"model", "data", "mode", "task", "project", "name", "save_dir", "resume", "exist_ok", "pretrained", "cfg"}
_OURS |= {"epochs", "time"}  # a stage has its own setting for its length, by which it knows whether it is finished


def run_training(
    trainer: type[Planned],
    model: Path | str,
    data: Path,
    settings: Training,
    folder: Path,
    *,
    resumable: bool,
    overrides: dict[str, Any],
    notes: dict[str, Any] | None = None,
) -> tuple[Path, Path]:
    """Train to the end, resuming where an interrupted run stopped, and return its (best, last) checkpoints.

    Args:
        folder: the stage's folder; Ultralytics writes below `folder/training`.
        resumable: an interrupted start of this very training may lie in `folder`.
        overrides: further Ultralytics arguments (imgsz, device, seed …); `settings.args` has the last word.
        notes: what the trainer reads beside Ultralytics' arguments: λ and fading, or the terms of a distillation.

    Raises:
        SettingsError: an argument that Ultralytics does not know, or that Espalier sets itself.
        EspalierError: the training failed.
    """
    check_arguments(settings.args)
    weights = folder / TRAINING / "weights"
    best, last = weights / "best.pt", weights / "last.pt"
    resume, resume_best = weights / RESUME, weights / RESUME_BEST
    arguments: dict[str, Any] = {
        "model": str(model),
        "data": str(data),
        "save_dir": str(folder / TRAINING),
        "plots": False,
        "patience": 0,  # equal epochs for all that is compared; 0 means never stop early
        "exist_ok": True,
        **settings.model_dump(include=set(Training.model_fields) - {"args"}),
        **overrides,
        **settings.args,
    }
    if resumable and resume.exists():
        if _is_complete(resume, settings.epochs):
            return (resume_best if resume_best.exists() else resume), resume
        if resume_best.exists():
            write_bytes_atomic(best, resume_best.read_bytes())
        arguments |= {"resume": str(resume), "model": str(resume)}
    elif notes:
        write_json(folder / trainer.notes_file, notes)
    try:
        trainer(overrides=arguments).train()
    except EspalierError:
        raise
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise EspalierError(f"training stopped: {reason}; what was saved is in {folder}") from error
    return (best if best.exists() else last), last


def check_arguments(arguments: dict[str, Any]) -> None:
    """Check further Ultralytics arguments of a training: their names and the types of their values.

    Raises:
        SettingsError: an argument that Ultralytics does not know or refuses, or that Espalier sets itself.
    """
    for name in arguments:
        if name in _OURS:
            raise SettingsError(f"args: '{name}' is set by Espalier itself: remove it")
        if name not in DEFAULT_CFG_DICT:
            raise SettingsError(f"args: '{name}' is not an argument of Ultralytics' training")
    try:
        get_cfg(overrides=arguments)
    except (TypeError, ValueError) as error:
        raise SettingsError(f"args: {str(error).splitlines()[0]}") from None


def _is_complete(checkpoint: Path, epochs: int) -> bool:
    """Tell whether a checkpoint is that of the last epoch."""
    from ultralytics.nn.tasks import torch_safe_load

    try:
        epoch = torch_safe_load(str(checkpoint), safe_only=True)[0].get("epoch", -1)
    except Exception as error:
        raise CheckpointError(f"{checkpoint} cannot be opened to resume from: delete its folder ({error})") from None
    return epoch + 1 >= epochs


def trained_model(checkpoint: Path) -> nn.Module:
    """Open what a training left, without the teacher if it distilled."""
    model = load_model(checkpoint)
    return getattr(model, "student_model", model)
