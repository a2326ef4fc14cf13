"""Images as batches that a network takes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from compress.data.pixels import centre_crop, letterbox

if TYPE_CHECKING:
    from torch import Tensor, nn

BATCH = 16


def batches(model: nn.Module, images: list[Path], imgsz: int, description: str | None = None) -> Iterator[Tensor]:
    """Yield images in batches on the model's device, shape (up to BATCH, 3, imgsz, imgsz): one is in memory at a time.

    Args:
        imgsz: side of the square that they are letterboxed into, for a classifier cut to.
        description: of the progress that is shown; none is shown without.
    """
    import torch

    from compress.checkpoint import task_of
    from compress.progress import track

    device = next(model.parameters()).device
    prepare = centre_crop if hasattr(model, "model") and task_of(model) == "classify" else letterbox
    starts = range(0, len(images), BATCH)
    for start in track(starts, description) if description else starts:
        pixels = [prepare(path, imgsz) for path in images[start : start + BATCH]]
        yield torch.from_numpy(np.concatenate(pixels)).to(device)
