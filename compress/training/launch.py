"""One training from start to end, or on from where it was interrupted."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from torch import cuda, nn
from ultralytics.cfg import get_cfg
from ultralytics.utils import DEFAULT_CFG_DICT

from compress.checkpoint import load_model, read_checkpoint
from compress.errors import CheckpointError, EspalierError, SettingsError
from compress.manifest import write_bytes_atomic, write_json
from compress.settings import OPTIMIZERS, Training
from compress.training.planned import RESUME, RESUME_BEST, Planned

TRAINING = "training"  # Ultralytics' own folder inside a stage's
# "time" too: a stage knows by its epochs whether it is finished.
_OURS = {"model", "data", "mode", "task", "project", "name", "save_dir", "resume", "exist_ok", "pretrained", "cfg"}
_OURS |= {"epochs", "time", "distill_model", "dis"}
# What a reason that Ultralytics or torch gives calls for.
_MEMORY = "give a smaller batch or imgsz"
_REMEDIES = {
    "NaN": "give a smaller lr0",
    "out of memory": _MEMORY,
    "can't allocate memory": _MEMORY,
    "Image Not Found": "it is there and cannot be decoded, mend or remove it",
}
_COMMON = {"imgsz", "device", "workers", "seed"}  # what the record of a stage says, and other stages go by


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
        overrides: further Ultralytics arguments (imgsz, device, seed …).
        notes: what the trainer reads beside Ultralytics' arguments: λ and fading, or the terms of a distillation.

    Raises:
        EspalierError: the training failed.
    """
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
        **_arguments(settings),
        **overrides,
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
    except subprocess.CalledProcessError as error:  # of several GPUs: each has its process, whose log says why
        raise EspalierError(
            f"training stopped: its processes on {overrides.get('device')} ended with code {error.returncode}, the "
            f"lines above say why; what was saved is in {folder}"
        ) from error
    except (RuntimeError, ValueError, TypeError, AssertionError, FileNotFoundError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the disk; Ultralytics' own have no number
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        # A process that loads images tells its whole traceback, whose last line is the reason.
        reason = lines[-1] if lines[0].startswith("Caught ") else lines[0]
        remedies = [f"{remedy}; " for word, remedy in _REMEDIES.items() if word in reason]
        raise EspalierError(f"training stopped: {reason}; {''.join(remedies)}what was saved is in {folder}") from error
    return (best if best.exists() else last), last


def check_arguments(settings: Training, stage: str) -> None:
    """Check what Ultralytics will be told of a training: names, and types and ranges of values.

    Args:
        stage: for messages.

    Raises:
        SettingsError: a value that Ultralytics refuses, an argument that it does not know, or one that Espalier sets.
    """
    for name in settings.args:
        if name in _OURS:
            raise SettingsError(f"{stage}: '{name}' is set by Espalier itself: remove it")
        if name in _COMMON:
            raise SettingsError(f"{stage}: '{name}' is not of a training alone: give it as --{name}, or {name}=")
        if name not in DEFAULT_CFG_DICT:
            raise SettingsError(f"{stage}: '{name}' is not an argument of Ultralytics' training")
    wanted = _arguments(settings) | {"epochs": max(settings.epochs, 1)}  # none: nothing is trained
    try:
        get_cfg(overrides=wanted)
    except (TypeError, ValueError) as error:
        raise SettingsError(f"{stage}: {str(error).splitlines()[0]}") from None
    if str(wanted["optimizer"]).lower() not in map(str.lower, OPTIMIZERS):
        raise SettingsError(f"{stage}: no optimizer '{wanted['optimizer']}': choose one of {', '.join(OPTIMIZERS)}")


def check_device(device: str) -> None:
    """Check that torch sees the GPUs that Ultralytics' `device` names by number.

    Args:
        device: such as cpu, 0 or 0,1.

    Raises:
        SettingsError: it does not.
    """
    numbers = [int(part) for part in device.split(",") if part.strip().isdecimal()]
    seen = cuda.device_count() if numbers else 0
    if numbers and max(numbers) >= seen:
        raise SettingsError(
            f"device={device}: torch sees {seen} CUDA device{'' if seen == 1 else 's'} here, counted from 0: give "
            "device=cpu, or install the driver and a torch with CUDA"
        )


def _arguments(settings: Training) -> dict[str, Any]:
    """Return the settings of any training by Ultralytics' names."""
    return {**settings.model_dump(include=set(Training.model_fields) - {"args"}), **settings.args}


def _is_complete(checkpoint: Path, epochs: int) -> bool:
    """Tell whether a checkpoint is that of the last epoch."""
    try:
        epoch = read_checkpoint(checkpoint).get("epoch", -1)
    except Exception as error:
        raise CheckpointError(f"{checkpoint} cannot be opened to resume from: delete its folder ({error})") from None
    return epoch + 1 >= epochs


def trained_model(checkpoint: Path) -> nn.Module:
    """Open what a training left, without the teacher if it distilled."""
    model = load_model(checkpoint)
    return getattr(model, "student_model", model)
