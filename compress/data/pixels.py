"""Images as networks see them, RGB, float32 in [0, 1]: letterboxed for a detector, for a classifier their middle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from compress.errors import DataError


def letterbox(path: Path, imgsz: int | tuple[int, int]) -> np.ndarray:
    """Read an image as a detector sees it: (1, 3, height, width), padded with Ultralytics' grey.

    Args:
        path: the image file.
        imgsz: side of the square, px, or height and width.

    Raises:
        DataError: the file is not an image.
    """
    from ultralytics.data.augment import LetterBox

    shape = (imgsz, imgsz) if isinstance(imgsz, int) else imgsz
    square: Any = LetterBox(shape, auto=False)(image=_read(path))
    return np.ascontiguousarray(square[..., ::-1].transpose(2, 0, 1)[None], dtype=np.float32) / 255


def centre_crop(path: Path, imgsz: int | tuple[int, int]) -> np.ndarray:
    """Read an image as a classifier sees it: (1, 3, height, width), its middle, scaled; arguments as of `letterbox`.

    Raises:
        DataError: the file is not an image.
    """
    from PIL import Image
    from ultralytics.data.augment import classify_transforms

    pixels: Any = classify_transforms(size=imgsz)(Image.fromarray(_read(path)[..., ::-1]))
    return pixels[None].numpy()


def _read(path: Path) -> np.ndarray:
    """Return the pixels of an image file, (height, width, 3), uint8, BGR."""
    from ultralytics.utils.patches import imread

    pixels = imread(str(path)) if path.is_file() else None
    if pixels is None:
        raise DataError(f"{path} is not an image that can be read: mend or remove it")
    return pixels
