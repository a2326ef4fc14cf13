"""Stage 1: train the dense model, the reference that everything after it is compared with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import Field

from compress import checkpoint, manifest
from compress.errors import DataError, run_app, warn
from compress.settings import Strict, Training, check_imgsz, parse, training_args
from compress.tasks import map_key

MODEL = "model.pt"
MORE_HELP = "any other Ultralytics training argument, such as nbs=16 or mosaic=0"


class Common(Strict):
    """What every training of a run shares: Ultralytics' names."""

    imgsz: int = 640
    device: str = "cpu"
    workers: int = 8
    seed: int = Field(default=0, ge=0)


def train(model: str, data: Path, settings: Training, common: Common, output: Path) -> Path:
    """Train a model on a data set and return its checkpoint, `output/model.pt`.

    With 0 epochs the model is taken as it is, if it knows the data set's classes.
    """
    return training_stage("train", "PLAN_TRAINERS", model, data, settings, common, output)


def training_stage(
    stage: str,
    trainer: str,
    model: str,
    data: Path,
    settings: Training,
    common: Common,
    output: Path,
    *,
    overrides: dict[str, Any] | None = None,
    extra_inputs: dict[str, Path] | None = None,
    notes: dict[str, Any] | None = None,
    shown: dict[str, Any] | None = None,
    keep_last: bool = False,
    repair: Callable[[Any], None] | None = None,
) -> Path:
    """Run one training as a stage: skipped when finished and unchanged, resumed when interrupted.

    Args:
        trainer: name of the table in `trainers` that holds the class for the model's task.
        overrides: further Ultralytics arguments.
        extra_inputs: further checkpoints that shape the result.
        notes: further settings of the trainer, which it finds in a file of the folder.
        shown: further notes that only say what TensorBoard shows; work of others is the same work.
        keep_last: keep the last epoch's weights, not those of the best validation.
        repair: what to mend of the trained model, in place, before it is saved.

    Raises:
        CheckpointError: a model that cannot be trained.
        SettingsError: an argument that Ultralytics does not know.
        RunError: the folder cannot be used.
        EspalierError: the training failed.
    """
    from compress.data.dataset import fingerprint

    if Path(model).suffix == ".pt":
        checkpoint.require_weights(model)  # an official one is on disk now, so that the next start sees the same input
    config = {**settings.model_dump(mode="json"), **common.model_dump(), "data": str(data), **(notes or {})}
    inputs = dict(extra_inputs or {})
    if Path(model).is_file():
        inputs["model"] = Path(model)
    else:
        config["model"] = model
    parents = manifest.input_hashes(inputs, output) | {"data": fingerprint(data)}
    result = output / MODEL
    with manifest.lock(output):
        if manifest.is_finished(output, stage, config, parents):
            print(f"{stage}: finished before, unchanged: {result}")
            return result
        # Mistakes are met before anything is written or moved aside.
        loaded, *_ = [checkpoint.load_trainable(path) for path in (model, *(extra_inputs or {}).values())]
        _check(stage, loaded, model, data, settings, common.imgsz)
        resumable = manifest.begin(output, stage, config, parents)
        metrics: dict[str, Any] = {"epochs": settings.epochs}
        if settings.epochs == 0:
            trained, arguments = loaded, checkpoint.load_training_args(model)
            if (size := arguments.get("imgsz", common.imgsz)) != common.imgsz:
                warn(f"{model} was trained at {size} px, and is taken as it is at {common.imgsz} px: give imgsz {size}")
        else:
            from compress.training import launch, trainers

            # Ultralytics' own log, which follows, does not say which stage it is.
            print(f"{stage}: {'goes on' if resumable else 'begins'} in {output} ({settings.epochs} epochs)")
            best, last = launch.run_training(
                getattr(trainers, trainer)[checkpoint.task_of(loaded)],
                model,
                data,
                settings,
                output,
                resumable=resumable,
                overrides={**common.model_dump(), **(overrides or {})},
                notes={**(notes or {}), **(shown or {})},
            )
            chosen = last if keep_last else best
            trained, arguments = launch.trained_model(chosen), checkpoint.load_training_args(chosen)
            metrics |= _last_metrics(chosen)
            if repair:
                repair(trained)
        checkpoint.save_model(trained, result, {**arguments, "imgsz": common.imgsz})
        manifest.finish(output, stage, config, parents, [MODEL], metrics, common.seed)
    print(f"{stage}: {result} ({settings.epochs} epochs{_score(metrics)})")
    return result


_VERBS = {"detect": "detect", "segment": "segment", "pose": "find key points", "obb": "detect", "classify": "classify"}


def _check(stage: str, loaded: Any, model: str, data: Path, settings: Training, imgsz: int) -> None:
    from compress.data.dataset import class_names, keypoints, require_polygons

    task = checkpoint.task_of(loaded)
    if (task == "classify") != data.is_dir():
        wanted = "a folder with one of images for every class" if task == "classify" else "its .yaml"
        raise DataError(f"{model} is a model to {_VERBS[task]}, {data} is no data set for it: give {wanted}")
    if task == "pose" and keypoints(data) is None:
        raise DataError(f"{data} has no 'kpt_shape': a pose model needs a data set with key points")
    if task in ("segment", "obb"):
        require_polygons(data)
    if task != "classify":
        check_imgsz(imgsz, int(max(loaded.stride)))  # Ultralytics would round it up and say so in the middle of its log
    if settings.epochs:
        from compress.training.launch import check_arguments

        check_arguments(settings, stage)
        return
    classes = class_names(data)
    if len(loaded.names) != len(classes):
        raise DataError(
            f"{model} knows {len(loaded.names)} classes, {data} has {len(classes)}: "
            "train it on this data first (train.epochs above 0)"
        )


def _last_metrics(path: Path) -> dict[str, float]:
    import math

    found = checkpoint.read_checkpoint(path).get("train_metrics") or {}
    return {k: float(v) for k, v in found.items() if isinstance(v, (int, float)) and math.isfinite(v)}


# What each task is about, by Ultralytics' names; masks and key points before their boxes.
_SCORES = {
    map_key("segment"): "mask mAP50-95",
    map_key("pose"): "pose mAP50-95",
    map_key("detect"): "mAP50-95",
    "metrics/accuracy_top1": "top-1",
}


def _score(metrics: dict[str, Any]) -> str:
    for key, name in _SCORES.items():
        if key in metrics:
            return f", val {name} {metrics[key]:.3f}"
    return ""


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Annotated[str, typer.Option(help="checkpoint (.pt) or architecture (.yaml) to start from")],
    data: Annotated[str, typer.Option(help="data set YAML, or 'shapes' for the generated one")],
    output: Annotated[Path, typer.Option(help="folder of this stage")],
    more: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help=MORE_HELP)] = None,
    epochs: Annotated[int, typer.Option(min=0)] = 100,
    batch: Annotated[int, typer.Option(min=1)] = 16,
    imgsz: Annotated[int, typer.Option(min=32, help="side of the square input, px")] = 640,
    device: Annotated[str, typer.Option(help="cpu, 0, 0,1 …")] = "cpu",
    optimizer: Annotated[str, typer.Option(help="as Ultralytics names them")] = "auto",
    lr0: Annotated[float, typer.Option(help="first learning rate (ignored by optimizer=auto)")] = 0.01,
    workers: Annotated[int, typer.Option(min=0)] = 8,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Train a dense model, the reference of everything that follows."""
    from compress.data.dataset import resolve

    given = {"epochs": epochs, "batch": batch, "optimizer": optimizer, "lr0": lr0, "args": training_args(more or [])}
    settings = parse(Training, given, "train")
    checkpoint.require(model)
    train(model, resolve(data), settings, Common(imgsz=imgsz, device=device, workers=workers, seed=seed), output)


if __name__ == "__main__":
    run_app(app)
