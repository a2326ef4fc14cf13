"""Images as batches that a network takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from compress.data.pixels import centre_crop, letterbox

if TYPE_CHECKING:
    from torch import Tensor, nn

BATCH = 16
_HELD_BYTES = 1e9


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


def batches_again(model: nn.Module, images: list[Path], imgsz: int) -> Iterable[Tensor]:
    """Return the same batches for many passes: they stay in memory, or where there are too many are read each time."""
    again = _Again(model, images, imgsz)
    return list(again) if len(images) * 3 * imgsz**2 * 4 <= _HELD_BYTES else again


@dataclass(frozen=True)
class _Again:
    model: nn.Module
    images: list[Path]
    imgsz: int

    def __iter__(self) -> Iterator[Tensor]:
        return batches(self.model, self.images, self.imgsz)
