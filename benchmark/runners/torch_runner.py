"""PyTorch on the CPU: the network that every exported artefact must equal.

One of the self-contained runners: `load`, `infer` and `describe` are plain functions. It opens model files through
`compress.checkpoint`, because no checkpoint is ever unpickled without the restricted loader.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from compress.checkpoint import load_detector


@dataclass(frozen=True)
class Session:
    """A network ready to infer."""

    network: nn.Module
    threads: int


def load(path: str, threads: int) -> Session:
    """Open a checkpoint for inference with `threads` threads (a setting of the whole process in PyTorch).

    Raises:
        CheckpointError: the file is not a detection model.
    """
    torch.set_num_threads(threads)
    network = inference_network(path)
    if _channels_last():
        network = network.to(memory_format=torch.channels_last)
    return Session(network, threads)


def infer(session: Session, images: np.ndarray) -> list[np.ndarray]:
    """Run the network.

    Args:
        session: what `load` returned.
        images: (n, 3, height, width) float32 in [0, 1], RGB.

    Returns:
        One array: (n, 4 + classes, anchors), boxes as centre x, centre y, width, height in px; for an end-to-end
        head (n, detections, 6), rows of x1, y1, x2, y2, score, class.
    """
    with torch.inference_mode():
        tensor = torch.from_numpy(np.ascontiguousarray(images))
        if _channels_last():
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        return [session.network(tensor).numpy()]


def describe(session: Session) -> dict[str, Any]:
    """Return what a benchmark record says about the runtime; null where it does not apply."""
    head: Any = session.network.model[-1]  # type: ignore[index]
    return {
        "runtime": "torch",
        "version": torch.__version__,
        "threads": session.threads,
        "precision": "fp32",
        "providers": None,
        "memory_format": "channels_last" if _channels_last() else "contiguous",
        "input_shape": None,
        "classes": int(head.nc),
        "end2end": bool(head.end2end),
    }


def inference_network(path: str) -> nn.Module:
    """Return the network as it is deployed: BatchNorm fused, one head, decoded predictions as the only output.

    A model with both a one-to-many and an end-to-end head keeps the one-to-many head, as stock Ultralytics 8.4.190
    does unless `nms=False` is asked for; a checkpoint that was fused to its end-to-end head stays end-to-end.

    Raises:
        CheckpointError: the file is not a detection model.
    """
    network: Any = load_detector(path)
    head = network.model[-1]
    if head.cv2 is not None:
        head.end2end = False
    with torch.no_grad():
        network.fuse(verbose=False)
    head.export = True
    return network.eval().requires_grad_(False)


def _channels_last() -> bool:
    """Tell whether convolutions run faster in channels-last memory, where stock Ultralytics uses it too."""
    return platform.machine() in ("AMD64", "x86_64") and torch.backends.mkldnn.is_available()
