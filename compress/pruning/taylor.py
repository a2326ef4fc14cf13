"""What the loss would miss: first-order importance of channels, on labelled training images."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.channels.slots import FIXED
from compress.errors import DataError

if TYPE_CHECKING:
    from torch import nn

    from compress.channels.graph import Graph

_BATCH = 16


def taylor_scores(
    graph: Graph, model: nn.Module, data: Path, imgsz: int, images: int = 256, seed: int = 0
) -> list[np.ndarray]:
    """Estimate by how much the loss changes when a unit is removed, arrays of shape (width,) per group.

    The score is the mean over batches of |Σ (γ·∂L/∂γ + β·∂L/∂β)|, summed over the batch norms that share the unit
    before the absolute value is taken: coupled channels go together (Molchanov et al., "Importance Estimation for
    Neural Network Pruning", CVPR 2019, gates after batch norm). Where no batch norm makes a unit, the filters and
    biases that make it take its place. Scores of different groups compare, because all are changes of one loss.

    Args:
        data: data set YAML; its training images are used without augmentation.
        imgsz: side of the square input, px.
        images: how many training images at most.
        seed: chooses them.

    Raises:
        DataError: the data set has no training images, or other classes than the model.
    """
    import torch

    model = copy.deepcopy(model).eval()  # the loss leaves its traces in a model
    model.requires_grad_(True)  # an averaged model asks for no gradients
    parameters = dict(model.named_parameters())
    sources = _sources(graph, model, parameters)
    total = [np.zeros(group.width) for group in graph.groups]
    count = 0
    for batch in _batches(model, data, imgsz, images, seed):
        count += 1
        model.zero_grad(set_to_none=True)
        with torch.enable_grad():
            loss: Any = model.loss(batch)  # type: ignore[operator]  (a detection model has one)
            loss[0].sum().backward()
        change = [np.zeros(group.width) for group in graph.groups]
        for name, dim, index, mine, unit in sources:
            parameter = parameters[name]
            if parameter.grad is not None:
                gain = (parameter.detach() * parameter.grad).double().movedim(dim, 0).reshape(parameter.shape[dim], -1)
                np.add.at(change[index], unit, gain.sum(1).cpu().numpy()[mine])
        for sums, values in zip(total, change, strict=True):
            sums += np.abs(values)
    return [sums / max(count, 1) for sums in total]


def _sources(
    graph: Graph, model: nn.Module, parameters: dict[str, Any]
) -> list[tuple[str, int, int, np.ndarray, np.ndarray]]:
    """Return (parameter, dimension, group, positions, units) of all that makes the units: batch norms where they do."""
    from torch.nn.modules.batchnorm import _BatchNorm

    modules = dict(model.named_modules())
    found: dict[bool, list[tuple[str, int, int, np.ndarray, np.ndarray]]] = {True: [], False: []}
    for axis in graph.axes:
        if axis.tensor in parameters and not axis.reads:
            is_norm = isinstance(modules[axis.tensor.rpartition(".")[0]], _BatchNorm)
            for index in np.unique(axis.group[axis.group != FIXED]).tolist():
                mine = np.flatnonzero(axis.group == index)
                found[is_norm].append((axis.tensor, axis.dim, index, mine, axis.unit[mine]))
    normed = {index for _, _, index, _, _ in found[True]}
    return found[True] + [source for source in found[False] if source[2] not in normed]


def _batches(model: nn.Module, data: Path, imgsz: int, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yield batches of training images with their labels, as Ultralytics' loss takes them: one is in memory at a time.

    256 images of 640 px would be 1.3 GB.
    """
    from ultralytics.cfg import get_cfg

    from compress.checkpoint import quiet, task_of
    from compress.data.dataset import class_names, sample_images
    from compress.progress import track

    classes, known = len(class_names(data)), len(model.names)  # type: ignore[arg-type]  (Ultralytics' models have them)
    if classes != known:
        raise DataError(f"the model knows {known} classes, {data} has {classes}: train it on this data first")
    settings: Any = get_cfg(overrides={"imgsz": imgsz})
    with quiet():
        files, collate = labelled(task_of(model), sample_images(data, "train", count, seed), data, settings)
    model.args = settings  # type: ignore[assignment]  (the weights of the loss terms)
    model.criterion = None  # type: ignore[assignment]  (made anew, on the model's device)
    device = next(model.parameters()).device
    for start in track(range(0, len(files), _BATCH), "importance"):
        items = [files[index] for index in range(start, min(start + _BATCH, len(files)))]
        batch = {key: value.to(device) if hasattr(value, "to") else value for key, value in collate(items).items()}
        if not batch["img"].is_floating_point():
            batch["img"] = batch["img"].float() / 255.0
        yield batch


def labelled(task: str, chosen: list[Path], data: Path, settings: Any) -> tuple[Any, Any]:
    """Return these images with their labels, without augmentation, and what makes a batch of several."""
    from torch.utils.data import default_collate
    from ultralytics.data.utils import check_det_dataset

    from compress.data.dataset import class_names
    from compress.data.labels import FreshClasses, FreshLabels

    if task == "classify":
        folders = FreshClasses(data / "train", settings, augment=False, prefix="train", names=class_names(data))
        wanted = set(map(str, chosen))
        folders.samples = [sample for sample in folders.samples if str(sample[0]) in wanted]
        return folders, default_collate
    with tempfile.TemporaryDirectory() as folder:
        listed = Path(folder) / "chosen.txt"
        listed.write_text("\n".join(map(str, chosen)), encoding="utf-8")
        files = FreshLabels(
            img_path=str(listed),
            imgsz=settings.imgsz,
            augment=False,
            hyp=settings,
            rect=False,
            data=check_det_dataset(str(data), autodownload=False),
            task=task,
        )
    return files, FreshLabels.collate_fn
