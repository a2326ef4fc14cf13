"""Whether a student can learn from a teacher, found out before any training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import checkpoint
from compress.errors import SettingsError

if TYPE_CHECKING:
    from compress.settings import Finetune


def check_teacher(student: Any, teacher: Path, data: Path, settings: Finetune, imgsz: int) -> None:
    """Check that a teacher knows the same classes at the same image size, and looks at the same places as the student.

    Args:
        student: the model that will be trained.
        teacher: a checkpoint; of any scale or family whose head reads the same strides.
        imgsz: px of the training.

    Raises:
        SettingsError: it does not; or a distillation of box distributions, and a model has none.
        CheckpointError: the teacher cannot be opened, or has no weights.
    """
    from ultralytics.nn.modules.head import Detect

    checkpoint.require_weights(teacher)
    example: Any = checkpoint.load_model(teacher)
    if list(example.names.values()) != list(student.names.values()):  # equal ones may be one class, made of all
        check_classes(example, f"the teacher {teacher}", data, "train the teacher on this data set first")
    size = checkpoint.load_training_args(teacher).get("imgsz")
    if size is not None and size != imgsz:
        raise SettingsError(
            f"the teacher {teacher} was trained at imgsz {size}, the student is at {imgsz}: "
            f"give imgsz {size}, or train the teacher at {imgsz}"
        )
    heads = [model.model[-1] for model in (student, example)]
    if not all(isinstance(head, Detect) for head in heads):
        raise SettingsError(f"{teacher} or its student has no head that Ultralytics can distil: leave out the teacher")
    mine, its = ([int(stride) for stride in model.stride] for model in (student, example))
    if mine != its:
        raise SettingsError(
            f"the teacher {teacher} predicts at strides {its}, the student at {mine}: choose a teacher with the same"
        )
    bins = [head.reg_max for head in heads]
    if settings.ld > 0.0 and (bins[0] != bins[1] or bins[0] < 2):
        raise SettingsError(
            f"ld needs equal distributions of box sides, the student has {bins[0]} bins and the teacher {bins[1]}: "
            "set finetune.ld to 0"
        )


def check_classes(model: Any, name: str, data: Path, remedy: str) -> None:
    """Check that a model's classes are those of a data set, by name; in a model they may have numbers only.

    Args:
        name, remedy: for the message.

    Raises:
        SettingsError: they are not.
    """
    from compress.data.dataset import class_names

    known, wanted = list(model.names.values()), list(class_names(data).values())
    if known not in (wanted, [str(index) for index in range(len(wanted))]):
        raise SettingsError(f"{name} knows {_classes(known)}, {data} has {_classes(wanted)}: {remedy}")


def _classes(names: list[str]) -> str:
    """Return how many classes there are, and the first of them."""
    few = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return f"{len(names)} classes ({few})"
