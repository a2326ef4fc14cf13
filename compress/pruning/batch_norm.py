"""Batch-norm statistics of weights that have changed: estimated anew on images, and kept where they are better."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def recalibrate_batch_norm(model: nn.Module, images: list[Path], imgsz: int) -> None:
    """Estimate the statistics of every batch norm anew on training images, in place.

    After a cut the inputs of each layer have another mean and variance than those the dense model stored. Running
    averages over all given images are taken (Li et al., "EagleEye", ECCV 2020, adaptive batch normalization).

    Args:
        images: image files, a few hundred of the training split; a last batch of a single image is left out.
        imgsz: side of the square that they are letterboxed into, for a classifier cut to.
    """
    import torch
    from torch.nn.modules.batchnorm import _BatchNorm

    from compress.pruning.batches import BATCH, batches

    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over all batches
        norm.train()
    alone = len(images) % BATCH == 1 and len(images) > 1
    used = images[:-1] if alone else images
    with torch.inference_mode():
        for batch in batches(model, used, imgsz, "batch-norm statistics"):
            model(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


def repair_batch_norm(
    model: nn.Module, images: list[Path], imgsz: int, score: Callable[[nn.Module], float] | None
) -> dict[str, float] | None:
    """Estimate batch-norm statistics anew, as `recalibrate_batch_norm`, and keep whichever make the better model.

    Where γ shrank fast those of a training lag behind; where they did not, those are better, as they saw every image
    in many forms.

    Args:
        score: measures a model on images that no statistics are of; the new ones are kept without.

    Returns:
        The score with the statistics that the model had (`before`) and with new ones (`after`).
    """
    if score is None:
        recalibrate_batch_norm(model, images, imgsz)
        return None
    known, before = {name: buffer.clone() for name, buffer in model.named_buffers()}, score(model)
    recalibrate_batch_norm(model, images, imgsz)
    after = score(model)
    if before > after:
        for name, buffer in model.named_buffers():
            buffer.copy_(known[name])
    return {"before": round(before, 5), "after": round(after, 5)}


def kept(repaired: dict[str, float]) -> str:
    """Say what `repair_batch_norm` has done.

    >>> kept({"before": 0.601, "after": 0.581})
    'batch-norm statistics: val mAP50-95 0.601 as they were, 0.581 estimated anew; kept as they were'
    """
    which = "as they were" if repaired["before"] > repaired["after"] else "the new ones"
    scores = f"{repaired['before']:.3f} as they were, {repaired['after']:.3f} estimated anew"
    return f"batch-norm statistics: val mAP50-95 {scores}; kept {which}"
