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

    from compress.data.dataset import class_names

    checkpoint.require_weights(teacher)
    example: Any = checkpoint.load_model(teacher)
    # Their own classes are those of the data set, unless a training made them all one.
    known, wanted = list(example.names.values()), list(class_names(data).values())
    if not knows(example, data) and known != list(student.names.values()):
        raise SettingsError(
            f"the teacher {teacher} knows {classes(known)}, {data} has {classes(wanted)}: "
            "train the teacher on this data set first"
        )
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


def knows(model: Any, data: Path) -> bool:
    """Tell whether a model's classes are those of a data set, by name; in a model they may have numbers only."""
    from compress.data.dataset import class_names

    wanted = list(class_names(data).values())
    return list(model.names.values()) in (wanted, [str(index) for index in range(len(wanted))])


def classes(names: list[str]) -> str:
    """Return how many classes there are, and the first of them."""
    few = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return f"{len(names)} classes ({few})"
