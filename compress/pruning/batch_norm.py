"""Batch-norm statistics of weights that have changed, estimated anew on images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def recalibrate_batch_norm(model: nn.Module, images: list[Path], imgsz: int) -> None:
    """Estimate the statistics of every batch norm anew on training images, in place.

    After a cut the inputs of each layer have another mean and variance than those the dense model stored. Running
    averages over all given images are taken (Li et al., "EagleEye", ECCV 2020, adaptive batch normalization).

    Args:
        images: image files, a few hundred of the training split; a last batch of a single image is left out, and one
            image alone is taken twice: maps of one pixel have no variance in it.
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
    used = images * 2 if len(images) == 1 else images[:-1] if len(images) % BATCH == 1 else images
    with torch.inference_mode():
        for batch in batches(model, used, imgsz, "batch-norm statistics"):
            model(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()
