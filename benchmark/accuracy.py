"""Accuracy: one evaluator for every runtime, so that mAP differs only where the runtime does.

Images, letterbox, suppression and metrics are those of Ultralytics' validator; only the network call is a runner's.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import numpy as np
import typer

from benchmark import freshness, prepare, runtimes, sites, store, system
from benchmark.outputs import Network
from benchmark.worker import explain, open_model
from compress import manifest, usable_cores
from compress.devices import load_device
from compress.errors import BenchmarkError, DataError, printable, run_app
from compress.tasks import LETTERS, SCORE_NAMES, map_key, validator_of

STAGE = "accuracy"
RESULT = "accuracy.json"


def evaluate(
    model: Path,
    data: Path,
    *,
    split: str = "val",
    imgsz: int = 640,
    threads: int | None = None,
    runtime: str | None = None,
    network: Network | None = None,
) -> dict[str, Any]:
    """Measure how right a model file is on a data set, as stock `YOLO(model).val(rect=False)` would.

    Every image is letterboxed to imgsz × imgsz (for a classifier scaled and cut to it) and goes through the network
    alone, whatever the runtime. Nothing is written into the data folder, and no cache is read from it.

    Args:
        model: a checkpoint (.pt, runs in PyTorch), an ONNX file (.onnx, runs in onnxruntime) or a folder
            NAME_ncnn_model (runs in ncnn).
        data: data set YAML; for a classifier the folder of its splits.
        split: train, val or test.
        imgsz: side of the square input, px.
        threads: threads of the runtime; one for each core that may be used when not given.
        runtime: that of the file, or a variant of it; the file's own when not given.
        network: what `model` is on a device; it is opened here when not given.

    Returns:
        `task`, `images` (number of images), `runtime`, `runtime_version` and `precision` (null where the file does not
        tell); `map50_95` and `map50` (shares, 0 to 1) of what the task is about: boxes, oriented boxes, masks or key
        points; `per_class` {class name: map50_95, for classes with labels}; where boxes are not what the task is about,
        their `box_map50_95` too. Of a classifier `top1` and `top5` instead.

    Raises:
        BenchmarkError: the model cannot be run, does not fit the data or imgsz, or returns values that are not finite.
        DataError: the data set has no such split, or no images or no labels in it.
    """
    import tempfile

    from compress.checkpoint import quiet
    from compress.data.dataset import class_names, images

    names = class_names(data)
    images(data, split)  # says what is missing, before anything is loaded
    network = network or _open(model, runtime, threads or usable_cores())
    facts = network.facts
    task = facts.get("task") or "detect"
    check_data(model, {**facts, "task": task}, data)
    _check_size(model, facts["input_shape"], imgsz)
    with tempfile.TemporaryDirectory() as scratch, quiet():
        validator = _validator(task, data, names, split, imgsz, facts["end2end"], Path(scratch))
        images_seen = _measure(validator, network, model)
        stats = validator.get_stats()
    found = {"task": task, "images": images_seen, "runtime": facts["runtime"]}
    found |= {"runtime_version": facts.get("version"), "precision": facts.get("precision")}
    if task == "classify":
        scores = {name: float(stats[f"metrics/accuracy_{name}"]) for name in ("top1", "top5")}
        return {**scores, **found}
    own = {"segment": "seg", "pose": "pose"}.get(task, "box")
    maps = getattr(validator.metrics, own).maps
    boxes = {} if own == "box" else {"box_map50_95": float(stats[map_key("detect")])}
    return {
        "map50_95": float(stats[map_key(task)]),
        "map50": float(stats[map_key(task, "50")]),
        **boxes,
        "per_class": {names[int(c)]: float(maps[c]) for c in validator.metrics.ap_class_index},
        **found,
    }


def _open(model: Path, runtime: str | None, threads: int) -> Network:
    own = runtimes.runner_of(model)
    try:
        runner, session = open_model(runtimes.runner(runtime) if runtime else own.__name__, str(model), threads)
    except ValueError as error:
        raise BenchmarkError(str(error)) from None
    facts = runner.describe(session)

    def infer(images: np.ndarray) -> list[np.ndarray]:
        try:
            return runner.infer(session, images)
        except Exception as error:  # whatever a runtime raises, as in a worker
            raise BenchmarkError(f"{model.name} on {runtime or facts['runtime']}: {explain(error)}") from None

    return Network({**facts, "runtime": runtime or facts["runtime"]}, infer)


def check_data(model: Path, facts: dict[str, Any], data: Path) -> None:
    """Check that a model can be scored on a data set.

    Args:
        model: for messages.
        facts: task, classes (how many; null where that is not known) and keypoints of it, as a runner tells them.
        data: data set YAML; for a classifier the folder of its splits.

    Raises:
        BenchmarkError: it cannot.
    """
    from compress.data.dataset import class_names, keypoints

    task = facts["task"]
    if task not in (*LETTERS, "classify"):
        raise BenchmarkError(f"{model.name} is of the task '{task}', whose accuracy is not measured here")
    if (task == "classify") != data.is_dir():
        wanted = "a folder with one of images for every class" if task == "classify" else "a .yaml"
        raise BenchmarkError(
            f"{model.name} is of the task '{task}', {data} is not for it: give the data set as {wanted}"
        )
    if facts["classes"] != (classes := len(class_names(data))):
        known = "an unknown number of" if facts["classes"] is None else facts["classes"]
        raise BenchmarkError(f"{model.name} predicts {known} classes, {data} has {classes}: give the data it learned")
    points = facts.get("keypoints")
    if task == "pose" and points != (known := keypoints(data)):
        raise BenchmarkError(f"{model.name} has key points {points}, {data} has {known}: give the data it learned")


def _check_size(model: Path, shape: list[int | None] | None, imgsz: int) -> None:
    if shape is not None and None not in shape[2:] and shape[2:] != [imgsz, imgsz]:
        raise BenchmarkError(
            f"{model.name} takes images of {shape[3]}×{shape[2]} px, --imgsz is {imgsz}: use --imgsz {shape[2]}"
        )


def _validator(
    task: str, data: Path, names: dict[int, str], split: str, imgsz: int, end2end: bool, scratch: Path
) -> Any:
    """Return Ultralytics' validator of a task with its data loaded and its metrics empty, but without a model."""
    import torch
    from ultralytics.data import build_dataloader

    # Not `rect`: every image gets the same square, which exported models take.
    args = {"data": str(data), "split": split, "imgsz": imgsz, "rect": False, "plots": False, "device": "cpu"}
    validator = validator_of(task)(save_dir=scratch, args=args)
    validator.training = False
    validator.device = torch.device("cpu")
    images = _images(validator.args, task, data, names, split, imgsz)
    validator.data = getattr(images, "data", None)
    validator.dataloader = build_dataloader(images, 1, workers=0, shuffle=False, pin_memory=False, device="cpu")
    validator.init_metrics(SimpleNamespace(names=names, end2end=end2end))
    return validator


def _images(settings: Any, task: str, data: Path, names: dict[int, str], split: str, imgsz: int) -> Any:
    """Return the images of a split with their labels."""
    from ultralytics.data.utils import check_det_dataset

    from compress.data.labels import FreshClasses, FreshLabels

    if task == "classify":
        return FreshClasses(data / split, settings, augment=False, prefix=split, names=names)
    content = check_det_dataset(str(data), autodownload=False, split=split)
    try:
        images = FreshLabels(
            img_path=content[split], imgsz=imgsz, augment=False, hyp=settings, rect=False, data=content, task=task
        )
    except ValueError as error:  # boxes where the task needs polygons
        raise DataError(f"{data}, split {split}: {error}") from None
    if not any(len(label["cls"]) for label in images.labels):
        raise DataError(f"{data} has no labels for its {split} images: mAP needs at least one labelled object")
    return images


def _measure(validator: Any, network: Network, model: Path) -> int:
    """Run all images through the network, collect what the validator makes of it, and return their number."""
    import torch

    from compress.progress import track

    batch_size = (network.facts["input_shape"] or [None])[0] or 1
    seen = 0
    for batch in track(validator.dataloader, f"accuracy {model.name}"):
        # One image at a time also keeps suppression, which Ultralytics stops after two seconds, far from that limit.
        images = validator.preprocess(batch)["img"].numpy()
        outputs = [output[:1] for output in network.infer(np.repeat(images, batch_size, axis=0))]
        if not all(np.isfinite(output).all() for output in outputs):
            where = batch.get("im_file", [f"image {seen}"])[0]
            raise BenchmarkError(f"{model.name} returns values that are not finite on {where}")
        tensors = [torch.from_numpy(output) for output in outputs]
        validator.update_metrics(validator.postprocess(tensors if len(tensors) > 1 else tensors[0]), batch)
        seen += 1
    return seen


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Annotated[
        list[Path],
        typer.Option("--model", "--models", help="model: .pt, .onnx, .engine or a folder NAME_ncnn_model; may repeat"),
    ],
    data: Annotated[str, typer.Option(help="data set YAML, folder of classified images, or 'shapes'")],
    output: Annotated[Path, typer.Option(help="folder for accuracy.json and the manifest")],
    more: Annotated[list[Path] | None, typer.Argument(metavar="MODEL", help="more models")] = None,
    split: Annotated[str, typer.Option(help="train, val or test")] = "val",
    runtime: Annotated[str | None, typer.Option(help="only these, as in torch,ncnn; exports a .pt for them")] = None,
    precision: Annotated[str | None, typer.Option(help="of exports: fp32 or fp16; the device's own")] = None,
    imgsz: Annotated[int | None, typer.Option(min=32, help="side of the square input, px; 640")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="threads; all of this machine's when not given")] = None,
    device: Annotated[str, typer.Option(help="a name of configs/devices, shortened or not, or a .yaml file")] = "cpu",
    host: Annotated[str | None, typer.Option(help="\\[user@]host[:port], an alias of ssh, or a serial of adb")] = None,
    python: Annotated[str | None, typer.Option(help="interpreter on the device")] = None,
    bootstrap: Annotated[bool, typer.Option("--bootstrap", help="put missing packages into a folder there")] = False,
    keep_outputs: Annotated[bool, typer.Option("--keep-outputs", help="keep what the device inferred")] = False,
) -> None:
    """Measure mAP or top-1 of model files on a data set, through one evaluator for every runtime and device."""
    target = load_device(device)
    cores = usable_cores() if target.transport == "local" else None
    wanted = prepare.request(
        target, [*model, *(more or [])], runtime=runtime, precision=precision, imgsz=imgsz, threads=threads or cores,
        data=data, split=split, host=host, python=python, keep_outputs=keep_outputs,
    )  # fmt: skip
    # Before anything is moved aside:
    sites.transport_of(wanted.device, host, python, bootstrap)
    wanted.check_outside(output)
    config = {key: value for key, value in wanted.config().items() if key != "threads"}
    parents = wanted.parents()
    used = {own for files in wanted.models.values() for own in files}
    with manifest.lock(output):
        finished = manifest.is_finished(output, STAGE, config, parents)
        if finished and target.transport == "local" and (reason := freshness.outdated_scores(output, used)):
            kept = manifest.set_aside(output)
            print(f"accuracy: {output} {reason}: it is taken anew, the old one is now {kept}")
            finished = False
        if finished:
            print(f"accuracy: finished before, unchanged: {output}")
            records = manifest.read_json(output / RESULT)
        else:
            manifest.begin(output, STAGE, config, parents)
            with prepare.open_models(wanted, output, host, python, bootstrap) as (site, files):
                scores = prepare.score(wanted, site, files, output)
            records = list(scores.values())
            manifest.write_json(output / RESULT, records)
            metrics = {name: record.get("map50_95", record.get("top1")) for name, record in scores.items()}
            metrics["processor"] = freshness.processor(system.device(), used) if target.transport == "local" else None
            manifest.finish(output, STAGE, config, parents, [RESULT], metrics)
            prepare.clean_up(output, keep_outputs)
    _print_table(records, split, wanted.imgsz)
    store.add(output / RESULT)


def _print_table(records: list[dict[str, Any]], split: str, imgsz: int) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"accuracy on the {split} split, {records[0]['images']} images at {imgsz} px")
    table.add_column("model", overflow="fold")
    table.add_column("runtime")
    shown = [key for key in SCORE_NAMES if key in records[0]]
    for key in shown:
        table.add_column(SCORE_NAMES[key], justify="right", no_wrap=True)
    for record in records:
        table.add_row(escape(printable(record["model"])), record["runtime"], *(f"{record[key]:.4f}" for key in shown))
    Console().print(table)


if __name__ == "__main__":
    run_app(app)
