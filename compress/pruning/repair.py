"""What can be mended after a cut before any training is paid for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from compress.data.pixels import centre_crop, letterbox

if TYPE_CHECKING:
    from torch import nn

_BATCH = 16


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

    from compress.checkpoint import task_of
    from compress.progress import track

    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    device = next(model.parameters()).device
    prepare = centre_crop if hasattr(model, "model") and task_of(model) == "classify" else letterbox
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over all batches
        norm.train()
    batches = [images[start : start + _BATCH] for start in range(0, len(images), _BATCH)]
    with torch.inference_mode():
        for batch in track([b for b in batches if len(b) > 1 or len(batches) == 1], "batch-norm statistics"):
            model(torch.from_numpy(np.concatenate([prepare(path, imgsz) for path in batch])).to(device))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()
