"""Accuracy: one evaluator for every runtime, so that mAP differs only where the runtime does.

Images, letterbox, suppression and metrics are those of Ultralytics' validator; only the network call is a runner's.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from benchmark import runtimes
from compress import manifest
from compress.errors import BenchmarkError, DataError, run_app

if TYPE_CHECKING:
    from ultralytics.models.yolo.detect import DetectionValidator

STAGE = "accuracy"
RESULT = "accuracy.json"


def evaluate(
    model: Path, data: Path, *, split: str = "val", imgsz: int = 640, threads: int | None = None
) -> dict[str, Any]:
    """Measure the mAP of a model file on a data set, as stock `YOLO(model).val(rect=False)` would.

    Every image is letterboxed to imgsz × imgsz and goes through the network alone, whatever the runtime. Nothing is
    written into the data folder, and no label cache is read from it.

    Args:
        model: a checkpoint (.pt, runs in PyTorch), an ONNX file (.onnx, runs in onnxruntime) or a folder
            NAME_ncnn_model (runs in ncnn).
        data: data set YAML.
        split: train, val or test.
        imgsz: side of the square input, px.
        threads: threads of the runtime; all of the machine's when not given.

    Returns:
        `map50_95` and `map50` (shares, 0 to 1), `per_class` {class name: map50_95, for classes with labels},
        `images` (number of images), `runtime`.

    Raises:
        BenchmarkError: the model cannot be run, does not fit the data or imgsz, or returns values that are not finite.
        DataError: the data set has no such split, or no images or no labels in it.
    """
    import tempfile

    from compress.checkpoint import quiet
    from compress.dataset import class_names, images

    names = class_names(data)
    images(data, split)  # says what is missing, before anything is loaded
    runner = runtimes.runner_of(model)
    session = _load(runner, model, threads or os.cpu_count() or 1)
    facts = runner.describe(session)
    _check_fit(model, facts, data, len(names), imgsz)
    with tempfile.TemporaryDirectory() as scratch, quiet():
        validator = _validator(data, names, split, imgsz, facts["end2end"], Path(scratch))
        _measure(validator, runner, session, model)
        stats = validator.get_stats()
    box = validator.metrics.box
    return {
        "map50_95": float(stats["metrics/mAP50-95(B)"]),
        "map50": float(stats["metrics/mAP50(B)"]),
        "per_class": {names[int(c)]: float(box.maps[c]) for c in validator.metrics.ap_class_index},
        "images": int(validator.seen or 0),
        "runtime": facts["runtime"],
    }


def _load(runner: ModuleType, model: Path, threads: int) -> Any:
    try:
        return runner.load(str(model), threads)
    except ValueError as error:
        raise BenchmarkError(str(error)) from None


def _check_fit(model: Path, facts: dict[str, Any], data: Path, classes: int, imgsz: int) -> None:
    if facts["classes"] != classes:
        known = "an unknown number of" if facts["classes"] is None else facts["classes"]
        raise BenchmarkError(f"{model.name} predicts {known} classes, {data} has {classes}: give the data it learned")
    shape = facts["input_shape"]
    if shape is not None and shape[2:] != [imgsz, imgsz]:
        raise BenchmarkError(
            f"{model.name} takes images of {shape[3]}×{shape[2]} px, --imgsz is {imgsz}: use --imgsz {shape[2]}"
        )


def _validator(
    data: Path, names: dict[int, str], split: str, imgsz: int, end2end: bool, scratch: Path
) -> DetectionValidator:
    """Return Ultralytics' validator with its data loaded and its metrics empty, but without a model."""
    import torch
    from ultralytics.data import build_dataloader
    from ultralytics.data.utils import check_det_dataset
    from ultralytics.models.yolo.detect import DetectionValidator

    from compress.labels import FreshLabels

    args = {"data": str(data), "split": split, "imgsz": imgsz, "rect": False, "plots": False, "device": "cpu"}
    validator = DetectionValidator(save_dir=scratch, args=args)
    content = check_det_dataset(str(data), autodownload=False, split=split)
    # Not `rect`: every image gets the same square, which exported models take.
    images = FreshLabels(
        img_path=content[split],
        imgsz=imgsz,
        augment=False,
        hyp=validator.args,
        rect=False,
        data=content,
        task="detect",
    )
    if not any(len(label["cls"]) for label in images.labels):
        raise DataError(f"{data} has no labels for its {split} images: mAP needs at least one labelled object")
    validator.training = False
    validator.device = torch.device("cpu")
    validator.data = content
    validator.dataloader = build_dataloader(images, 1, workers=0, shuffle=False, pin_memory=False, device="cpu")
    network: Any = SimpleNamespace(names=names, end2end=end2end)
    validator.init_metrics(network)
    return validator


def _measure(validator: DetectionValidator, runner: ModuleType, session: Any, model: Path) -> None:
    import numpy as np
    import torch

    from compress.progress import track

    loader: Any = validator.dataloader
    for batch in track(loader, f"accuracy {model.name}"):
        # One image at a time also keeps suppression, which Ultralytics stops after two seconds, far from that limit.
        images = validator.preprocess(batch)["img"].numpy()
        output = runner.infer(session, images)[0]
        if not np.isfinite(output).all():
            raise BenchmarkError(f"{model.name} returns values that are not finite on {batch['im_file'][0]}")
        validator.update_metrics(validator.postprocess(torch.from_numpy(output)), batch)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Annotated[
        list[Path],
        typer.Option("--model", "--models", help="model: .pt, .onnx, .engine or a folder NAME_ncnn_model; may repeat"),
    ],
    data: Annotated[str, typer.Option(help="data set YAML or 'shapes'")],
    output: Annotated[Path, typer.Option(help="folder for accuracy.json and the manifest")],
    more: Annotated[list[Path] | None, typer.Argument(metavar="[MODEL]...", help="more models")] = None,
    split: Annotated[str, typer.Option(help="train, val or test")] = "val",
    imgsz: Annotated[int, typer.Option(min=32, help="side of the square input, px")] = 640,
    threads: Annotated[int | None, typer.Option(min=1, help="threads; all of the machine's when not given")] = None,
) -> None:
    """Measure the mAP of model files on a data set, through one evaluator for every runtime."""
    from compress.dataset import fingerprint, resolve

    models = [*model, *(more or [])]
    for path in models:
        runtimes.runner_of(path)
    yaml = resolve(data)
    config = {"models": [path.name for path in models], "split": split, "imgsz": imgsz}
    parents = {f"model{i}": runtimes.sha256(path) for i, path in enumerate(models)}
    parents["data"] = fingerprint(yaml)
    with manifest.lock(output):
        if manifest.is_finished(output, STAGE, config, parents):
            print(f"accuracy: finished before, unchanged: {output}")
            records = manifest.read_json(output / RESULT)
        else:
            manifest.begin(output, STAGE, config, parents)
            records = [
                {
                    "model": path.name,
                    "model_sha256": parents[f"model{i}"],
                    **evaluate(path, yaml, split=split, imgsz=imgsz, threads=threads),
                }
                for i, path in enumerate(models)
            ]
            manifest.write_json(output / RESULT, records)
            metrics = {path.name: record["map50_95"] for path, record in zip(models, records, strict=True)}
            manifest.finish(output, STAGE, config, parents, [RESULT], metrics)
    _print_table(records, split, imgsz)


def _print_table(records: list[dict[str, Any]], split: str, imgsz: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"accuracy on the {split} split, {records[0]['images']} images at {imgsz} px")
    table.add_column("model")
    table.add_column("runtime")
    table.add_column("mAP50-95", justify="right")
    table.add_column("mAP50", justify="right")
    for record in records:
        table.add_row(record["model"], record["runtime"], f"{record['map50_95']:.4f}", f"{record['map50']:.4f}")
    Console().print(table)


if __name__ == "__main__":
    run_app(app)
