"""Images and outputs as bytes, between the machine that scores and the device that infers.

A frame is a JSON line that says how many bytes follow it. On a device this needs numpy and Python 3.8.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

_COMPRESSION = 1  # the fastest level: a device has better things to do


def pack_image(image: np.ndarray) -> tuple[dict[str, Any], bytes]:
    """Return a request for the outputs on one image, and the bytes behind it.

    Args:
        image: (1, 3, height, width) float32 in [0, 1]. Where its values are those of 8-bit pixels, as they are unless
            somebody has changed them, a quarter of the bytes is sent.
    """
    pixels = np.rint(image * 255).clip(0, 255).astype(np.uint8)
    sent = pixels if np.array_equal(_scaled(pixels), image) else np.ascontiguousarray(image, np.float32)
    payload = zlib.compress(sent.tobytes(), _COMPRESSION)
    return {"infer": {"shape": list(sent.shape), "dtype": sent.dtype.name}, "bytes": len(payload)}, payload


def unpack_image(facts: dict[str, Any], payload: bytes) -> np.ndarray:
    """Return the image that `pack_image` was given, bit by bit."""
    values = np.frombuffer(zlib.decompress(payload), facts["dtype"]).reshape(facts["shape"])
    return _scaled(values) if values.dtype == np.uint8 else values


def pack_outputs(outputs: list[np.ndarray]) -> tuple[dict[str, Any], bytes]:
    """Return what a JSON line says of the outputs, and their compressed bytes."""
    arrays = [np.ascontiguousarray(output, np.float32) for output in outputs]
    payload = zlib.compress(b"".join(array.tobytes() for array in arrays), _COMPRESSION)
    return {"arrays": [list(array.shape) for array in arrays], "bytes": len(payload)}, payload


def unpack_outputs(content: dict[str, Any], payload: bytes) -> list[np.ndarray]:
    """Return the outputs that `pack_outputs` was given, as float32.

    Raises:
        ValueError: the bytes are damaged.
    """
    try:
        values = np.frombuffer(zlib.decompress(payload), np.float32)
    except zlib.error as error:
        raise ValueError(f"outputs are damaged: {error}") from None
    sizes = [int(np.prod(shape)) for shape in content["arrays"]]
    if sum(sizes) != len(values):
        raise ValueError(f"outputs are damaged: {len(values)} values instead of {sum(sizes)}")
    ends = np.cumsum(sizes)
    return [
        values[end - size : end].reshape(shape).copy()
        for size, end, shape in zip(sizes, ends, content["arrays"])  # noqa: B905
    ]


def _scaled(pixels: np.ndarray) -> np.ndarray:
    return pixels.astype(np.float32) / np.float32(255)
