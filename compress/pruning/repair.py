"""What can be mended after a cut before any training is paid for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
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
    classifies = hasattr(model, "model") and task_of(model) == "classify"
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over all batches
        norm.train()
    batches = [images[start : start + _BATCH] for start in range(0, len(images), _BATCH)]
    with torch.inference_mode():
        for batch in track([b for b in batches if len(b) > 1 or len(batches) == 1], "batch-norm statistics"):
            model((centre_cropped if classifies else letterboxed)(batch, imgsz).to(device))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


def letterboxed(images: list[Path], imgsz: int) -> torch.Tensor:
    """Read images as a detector sees them: float, RGB, [0, 1], shape (n, 3, imgsz, imgsz)."""
    import torch
    from ultralytics.data.augment import LetterBox

    box = LetterBox((imgsz, imgsz), auto=False)
    squares: list[Any] = [box(image=_read(path)) for path in images]
    arrays = [square[..., ::-1].transpose(2, 0, 1) for square in squares]
    return torch.from_numpy(np.ascontiguousarray(np.stack(arrays))).float() / 255.0


def centre_cropped(images: list[Path], imgsz: int) -> torch.Tensor:
    """Read images as a classifier sees them, scaled and cut to their middle: as `letterboxed`."""
    import torch
    from PIL import Image
    from ultralytics.data.augment import classify_transforms

    transform: Any = classify_transforms(size=imgsz)
    return torch.stack([transform(Image.fromarray(_read(path)[..., ::-1])) for path in images])


def _read(path: Path) -> np.ndarray:
    from ultralytics.utils.patches import imread

    from compress.errors import DataError

    pixels = imread(str(path))
    if pixels is None:
        raise DataError(f"{path} is not an image that can be read: mend or remove it")
    return pixels
