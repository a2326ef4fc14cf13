"""The deploy bundle: a model of `export.ncnn` with the C++ program and the Android project that run it.

The program reads everything about the model at run time, so it is the same for every bundle.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from benchmark.runners import ncnn_runner
from benchmark.runners.ncnn_runner import BIN, METADATA, PARAM
from compress.errors import ExportError

TEMPLATES = Path(__file__).with_name("bundle")
CONSTANTS, LABELS = "detector.txt", "labels.txt"
FORMAT = 1  # what model_files.cpp reads
PADDING, DIVISOR = 114, 255  # Ultralytics' grey, and the largest pixel value
CONFIDENCE, IOU = 0.25, 0.7  # of Ultralytics' predictor


def check_bundle(model: Path, output: Path) -> None:
    """Check, before anything is exported, that a bundle can run a checkpoint and can get its name.

    Raises:
        CheckpointError: the checkpoint cannot be opened.
        ExportError: it is no detector of RGB images, or something has that name.
    """
    from compress.checkpoint import load_deployable, task_of

    _check_name(output)
    network: Any = load_deployable(model)
    _check_model(model.name, task_of(network), network.yaml.get("channels", 3))


def _check_name(output: Path) -> None:
    """A bundle may hold its owner's changes, so none is overwritten."""
    if output.exists() or output.is_symlink():
        raise ExportError(f"{output} exists: remove it, or choose another --bundle")
    above = next(folder for folder in output.resolve().parents if folder.exists())
    if not above.is_dir():
        raise ExportError(f"{above} is a file, no folder can lie in it: choose another --bundle")


def _check_model(name: str, task: str, channels: int) -> None:
    if task != "detect":
        raise ExportError(f"{name} is a model for {task}: a bundle can only run detectors")
    if channels != 3:
        raise ExportError(f"{name} takes images of {channels} channels: a bundle gives it 3, RGB")


def write_bundle(model: Path, output: Path) -> Path:
    """Write the deploy bundle of a model folder and return its path; it appears whole or not at all.

    `model/` holds the network, its metadata, `labels.txt` (a name a line, by class) and `detector.txt` (how to fill
    the input and decode the head: a key and its values a line); `cpp/` the program, `android/` the app, `README.md`
    what to type. The same model gives the same bytes.

    Args:
        model: a folder NAME_ncnn_model, as `export.ncnn` writes it.
        output: the folder to write.

    Raises:
        ExportError: `output` exists, or `model` is damaged, no detector, or does not take RGB images.
    """
    import tempfile

    _check_name(output)
    try:
        metadata = ncnn_runner.load(str(model), threads=1).metadata
    except ValueError as error:
        raise ExportError(str(error)) from None
    _check_model(model.name, metadata["task"], metadata["channels"])
    output.parent.mkdir(parents=True, exist_ok=True)
    # Beside the output, so that the finished folder only has to be renamed.
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as scratch:
        folder = Path(scratch) / output.name
        (folder / "model").mkdir(parents=True)
        # Not copytree, whose error no longer tells that the disk is full.
        for path in (path for path in TEMPLATES.rglob("*") if path.is_file()):
            copy = folder / path.relative_to(TEMPLATES)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        for name in (PARAM, BIN, METADATA):
            shutil.copyfile(model / name, folder / "model" / name)
        (folder / "model" / CONSTANTS).write_text(constants(metadata), encoding="utf-8", newline="\n")
        names = [" ".join(str(name).split()) for name in class_names(metadata)]
        (folder / "model" / LABELS).write_text("".join(f"{name}\n" for name in names), encoding="utf-8", newline="\n")
        folder.rename(output)
    return output


def constants(metadata: dict[str, Any]) -> str:
    """Return the content of `detector.txt`: what the program has to know of a model, sizes in px.

    Args:
        metadata: of the model folder.
    """
    height, width = metadata["imgsz"]
    entries = {
        "format": FORMAT,
        "param": (PARAM, metadata["files"][PARAM]["bytes"]),
        "bin": (BIN, metadata["files"][BIN]["bytes"]),
        "precision": metadata["precision"],
        "input_width": width,
        "input_height": height,
        "padding": PADDING,
        "divisor": DIVISOR,
        "strides": metadata["strides"],
        "outputs": metadata["outputs"],
        "classes": len(metadata["names"]),
        "reg_max": metadata["reg_max"],
        "end2end": int(metadata["end2end"]),
        "confidence": CONFIDENCE,
        "iou": IOU,
        "max_detections": metadata["max_detections"],
    }
    lines = [f"{key} {' '.join(map(str, _values(value)))}\n" for key, value in entries.items()]
    return "# Read by the program when it starts; confidence and iou may be changed.\n" + "".join(lines)


def class_names(metadata: dict[str, Any]) -> list[str]:
    """Return the names of the classes, by class."""
    names = metadata["names"]
    return [names[number] for number in sorted(names, key=int)]


def _values(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
