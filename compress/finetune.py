"""Stage 4: fine-tune the pruned model back into shape, with the dense one as its teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compress import checkpoint
from compress.errors import SettingsError, run_app
from compress.settings import Finetune, parse, training_args
from compress.train import MORE_HELP, Common, training_stage
from compress.training.teacher import check_teacher


def finetune(model: Path, teacher: Path | None, data: Path, settings: Finetune, common: Common, output: Path) -> Path:
    """Train a pruned model further and return the checkpoint, `output/model.pt`.

    The pruned shape is rebuilt from the plan that the checkpoint carries, also on resume.

    Args:
        teacher: the dense model to distil from; None, or `settings.distill` false, trains without one.
            `settings.teacher` takes its place.

    Raises:
        SettingsError: there is a teacher, and the model classifies; or the teacher does not fit, see `check_teacher`.
    """
    teacher = Path(settings.teacher) if settings.teacher else teacher
    distil = teacher is not None and settings.distill
    if distil and teacher:
        student = checkpoint.load_model(model)
        if checkpoint.task_of(student) == "classify":
            raise SettingsError(f"{model} classifies, and Ultralytics distils detectors only: leave out the teacher")
        check_teacher(student, teacher, data, settings, common.imgsz)
    return training_stage(
        "finetune",
        "PLAN_TRAINERS",
        str(model),
        data,
        settings,
        common,
        output,
        overrides={"distill_model": str(teacher), "dis": settings.dis} if distil else None,
        extra_inputs={"teacher": teacher} if distil and teacher else None,
        notes=settings.terms if distil else None,
    )


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Annotated[Path, typer.Option(help="pruned checkpoint (.pt)")],
    data: Annotated[str, typer.Option(help="data set YAML, or 'shapes' for the generated one")],
    output: Annotated[Path, typer.Option(help="folder of this stage")],
    teacher: Annotated[
        Path | None, typer.Option(help="checkpoint to distil from: the dense model, or any larger one")
    ] = None,
    more: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help=MORE_HELP)] = None,
    epochs: Annotated[int, typer.Option(min=1)] = 100,
    batch: Annotated[int, typer.Option(min=1)] = 16,
    imgsz: Annotated[int, typer.Option(min=32, help="side of the square input, px")] = 640,
    device: Annotated[str, typer.Option(help="cpu, 0, 0,1 …")] = "cpu",
    optimizer: Annotated[str, typer.Option(help="as Ultralytics names them")] = "auto",
    lr0: Annotated[float, typer.Option(help="first learning rate (ignored by optimizer=auto)")] = 0.01,
    dis: Annotated[float, typer.Option(min=0.0, help="weight of Ultralytics' feature distillation")] = 6.0,
    cwd: Annotated[float, typer.Option(min=0.0, help="weight of channel-wise distillation (CWD)")] = 0.0,
    cwd_temperature: Annotated[float, typer.Option(help="of the softmax over positions, with --cwd")] = 4.0,
    ld: Annotated[float, typer.Option(min=0.0, help="weight of distilling box distributions (LD)")] = 0.0,
    ld_temperature: Annotated[float, typer.Option(help="of the softmax over bins, with --ld")] = 10.0,
    distil_off_epochs: Annotated[int, typer.Option(min=0, help="last epochs without the teacher")] = 0,
    workers: Annotated[int, typer.Option(min=0)] = 8,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Fine-tune a pruned model; its shape comes from the plan that it carries."""
    from compress.data.dataset import resolve

    given = {"epochs": epochs, "batch": batch, "optimizer": optimizer, "lr0": lr0, "args": training_args(more or [])}
    terms = {"dis": dis, "cwd": cwd, "cwd_temperature": cwd_temperature, "ld": ld, "ld_temperature": ld_temperature}
    terms |= {"distil_off_epochs": distil_off_epochs}
    settings = parse(Finetune, given | terms, "finetune")
    if teacher is None and (asked := settings.changed(*terms)):
        raise SettingsError(f"--{asked.replace('_', '-')} goes with --teacher: there is nobody to learn from")
    for path in (model, teacher) if teacher else (model,):
        checkpoint.require(path)
    common = Common(imgsz=imgsz, device=device, workers=workers, seed=seed)
    finetune(model, teacher, resolve(data), settings, common, output)


if __name__ == "__main__":
    run_app(app)
