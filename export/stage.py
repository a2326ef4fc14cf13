"""What every exporter shares: checks of its input, the proof before a name, and the folder of a stage."""

from __future__ import annotations

import glob
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compress import checkpoint, manifest
from compress.errors import CheckpointError, ParityError
from compress.settings import check_imgsz

PARITY = "parity.json"
# Beside the size that was asked for, a dynamic artefact is proven on one that is wider by this: all strides divide it.
OTHER_SIZE_PX = 64
OTHER_SIZE_IMAGES = 4


def require_detector(model: Path) -> None:
    """Check that a model finds upright boxes and nothing else.

    Raises:
        CheckpointError: it does not, or cannot be opened.
    """
    _require_detector(checkpoint.load_deployable(model), model)


def _require_detector(network: Any, model: Path) -> None:
    if (task := checkpoint.task_of(network)) != "detect":
        raise CheckpointError(f"{model} is of the task '{task}', this export is for detectors: use export.onnx or ncnn")


def check_model(model: Path, imgsz: int, scored_on: Path | None = None, *, detector: bool = False) -> Any:
    """Check that a checkpoint can be exported at an image size, px, and be scored on a data set; return its network.

    Args:
        detector: it must be one, as for `require_detector`.

    Raises:
        CheckpointError: it is missing, or of a task that cannot be exported.
        SettingsError: the size does not fit its stride.
        BenchmarkError: the data set is not for it.
    """
    checkpoint.require_weights(model)
    network: Any = checkpoint.load_deployable(model)
    if detector:
        _require_detector(network, model)
    check_imgsz(imgsz, int(max(network.stride)))
    if (channels := network.yaml.get("channels", 3)) != 3:
        raise CheckpointError(f"{model} takes images of {channels} channels: exports are proven on RGB images alone")
    if scored_on is not None:
        from benchmark.accuracy import check_data

        task = checkpoint.task_of(network)
        points = list(network.model[-1].kpt_shape) if task == "pose" else None
        check_data(model, {"task": task, "classes": len(network.names), "keypoints": points}, scored_on)
    return network


def torch_reason(error: Exception) -> str:
    """Return what torch said, or in fewer words that memory is short, and what to do."""
    text = str(error)
    return "there is too little memory: give a smaller --imgsz or --batch" if "allocate memory" in text else text


def metadata(network: Any, model: Path, imgsz: int, args: dict[str, Any], batch: int = 1) -> dict[str, Any]:
    """Return what Ultralytics' AutoBackend and our runners read about a model; no dates, so that bytes repeat.

    Args:
        network: what `torch_runner.inference_network` made of the checkpoint.
        model: the checkpoint.
        imgsz: side of the square input, px.
        args: how it was exported.
        batch: how many images it takes at once.
    """
    from ultralytics import __version__

    head = network.model[-1]
    entries = {
        "description": f"{model.stem}, exported by Espalier",
        "version": __version__,
        "license": "AGPL-3.0 (https://ultralytics.com/license)",
        "stride": int(max(network.stride)),
        "task": checkpoint.task_of(network),
        "head": type(head).__name__,
        "batch": batch,
        "imgsz": [imgsz, imgsz],
        "names": network.names,
        "args": args,
        "channels": network.yaml.get("channels", 3),
        "end2end": bool(getattr(head, "end2end", False)),
        "espalier_model_sha256": manifest.sha256_file(model),
    }
    if checkpoint.task_of(network) == "pose":
        entries["kpt_shape"] = list(head.kpt_shape)
    if plans := checkpoint.plans_of(network):
        entries["espalier_plan_sha256"] = manifest.sha256_json(plans)
    return entries


def prove(artefact: Path, make: Callable[[Path], object], check: Callable[[Path], dict[str, Any]], remedy: str) -> dict:
    """Make an artefact, check it, and only then give it its name; return the parity record.

    Args:
        artefact: the final name, of a file or of a folder.
        make: writes the artefact to the path it is given.
        check: compares that path with PyTorch and returns a parity record, see `parity.compare`.
        remedy: what to try when the check fails.

    Raises:
        ParityError: it fails: the artefact is then kept as `NAME.rejected` with its ending.
    """
    from export import parity

    unproven, rejected = _named(artefact, "unproven"), _named(artefact, "rejected")
    try:
        make(unproven)
        record = check(unproven)
        if not record["passed"]:
            replace(unproven, rejected)
            if parity.finds_nothing(record):  # the boxes of such a model are noise, which no exporter can mend
                remedy = "train or fine-tune the model first, or give --data that it was trained on"
            raise ParityError(
                f"{artefact.name} does not equal PyTorch on {parity.summary(record)}: "
                f"{', '.join(parity.failures(record))}; kept as {rejected.name}: {remedy}"
            )
        replace(unproven, artefact)
        remove(rejected)
    finally:
        remove(unproven)
    return record


def compare_shapes(
    reference: Path,
    artefact: Path,
    images: list[Path],
    imgsz: int,
    *,
    precision: str,
    dynamic: str | None,
    batch: int = 1,
    data: Path | None = None,
) -> dict[str, Any]:
    """Compare as `parity.compare`, an artefact of an open shape on another one too; the first record that fails.

    Args:
        reference: the checkpoint, or another artefact that stands for it.
        artefact: what was made from it.
        images: image files.
        imgsz: side of the square input, px.
        precision: which tolerance holds.
        dynamic: batch, size or both: what is open; null for neither.
        batch: how many images go through the artefact at once.
        data: data set, whose val split gives both mAP.

    Returns:
        The parity record; of an open shape with that of the other shape as `other`.
    """
    from export import parity

    record = parity.compare(reference, artefact, images, imgsz, precision=precision, batch=batch, data=data)
    if not dynamic or not record["passed"]:
        return record
    size = imgsz if dynamic == "batch" else (imgsz, imgsz + OTHER_SIZE_PX)
    more = batch + (dynamic != "size")
    other = parity.compare(reference, artefact, images[:OTHER_SIZE_IMAGES], size, precision=precision, batch=more)
    return {**record, "other": other} if other["passed"] else other


def export_models(
    models: dict[str, Path], data: Path, count: int, output: Path, export: Callable[..., dict[str, Any]]
) -> dict[str, Any]:
    """Export each model, write `parity.json` ({name: parity record}) and return its content.

    Parity is proven on the first images of the val split, or on all of them where there are fewer than asked for.

    Args:
        models: checkpoints by name.
        data: data set YAML.
        count: number of images.
        output: folder of `parity.json`.
        export: called with (name, checkpoint, images), returns the parity record.

    Raises:
        DataError: `data` has no val images.
        ExportError: as `export`.
    """
    from compress.data.dataset import images

    chosen = images(data, "val")[:count]
    records = {name: export(name, path, chosen) for name, path in models.items()}
    manifest.write_json(output / PARITY, records)
    return records


def run_stage(
    stage: str,
    models: dict[str, Path],
    data: Path,
    config: dict[str, Any],
    output: Path,
    export: Callable[[], dict[str, Any]],
    artefact: Callable[[str], str],
    check: Callable[[Path], None],
) -> dict[str, Any]:
    """Run an export as a stage: skipped when finished and unchanged, with a manifest written last.

    Args:
        stage: its name in the manifest.
        models: checkpoints by name.
        data: data set YAML.
        config: settings, beside the names of the models.
        output: the stage's folder.
        export: writes everything into `output` and returns the content of `parity.json`.
        artefact: the file or the folder that `export` writes for the model of a name, relative to `output`.
        check: called with each checkpoint, meets mistakes before anything is written or moved aside.

    Returns:
        The content of `parity.json`.
    """
    from compress.data.dataset import fingerprint
    from export import parity

    for path in models.values():
        checkpoint.require_weights(path)
    config = {"models": sorted(models), **config}
    parents = manifest.input_hashes(models) | {"data": fingerprint(data)}
    with manifest.lock(output):
        if manifest.is_finished(output, stage, config, parents):
            print(f"{stage}: finished before, unchanged: {output}")
            return manifest.read_json(output / PARITY)
        for path in models.values():
            check(path)
        manifest.begin(output, stage, config, parents)
        records = export()
        files = [name for model in models for name in _files(output, artefact(model))]
        manifest.finish(output, stage, config, parents, [PARITY, *files], {"parity": records})
    for name, record in records.items():
        print(f"{stage}: {output / artefact(name)} ({parity.summary(record)})")
    return records


@contextmanager
def scratch(output: Path) -> Iterator[Path]:
    """Yield a folder beside an artefact for what is on the way to it; what a killed process left there is removed."""
    prefix = f".{output.name}."
    for left in output.parent.glob(f"{glob.escape(prefix)}*"):
        if left.is_dir():  # beside them lie files of that prefix that are no scratch: a lock, the journal of a search
            remove(left)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=prefix) as folder:
        yield Path(folder)


def replace(source: Path, target: Path) -> None:
    """Give a file or a folder another name; what had that name is gone."""
    if target.is_dir():
        remove(target)
    source.replace(target)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _files(folder: Path, name: str) -> list[str]:
    """Return the file of a name, or all files of the folder of that name, relative to `folder`."""
    place = folder / name
    files = [path for path in place.rglob("*") if path.is_file()] if place.is_dir() else [place]
    return [path.relative_to(folder).as_posix() for path in files]


def _named(artefact: Path, word: str) -> Path:
    """Return the artefact's name with a word before its ending, which still tells its runtime."""
    from benchmark import runtimes

    ending = runtimes.suffix(artefact) or artefact.suffix
    return artefact.with_name(f"{artefact.name.removesuffix(ending)}.{word}{ending}")
