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

from compress.checkpoint import load_deployable, task_of


@dataclass(frozen=True)
class Session:
    """A network ready to infer."""

    network: nn.Module
    threads: int


def load(path: str, threads: int) -> Session:
    """Open a checkpoint for inference with `threads` threads (a setting of the whole process in PyTorch).

    Raises:
        CheckpointError: the file is not a model of a task that can be exported.
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
        For a detector one array: (n, 4 + classes, anchors), boxes as centre x, centre y, width, height in px; for an
        end-to-end head (n, detections, 6), rows of x1, y1, x2, y2, score, class. Other tasks have more values behind
        those of each anchor or row: segment the coefficients of its mask, and a second array, the prototypes
        (n, masks, height / 4, width / 4); pose x and y in px of each key point and how likely it is to be seen; obb
        the angle of the box in radians, whose sides are then always given as centre and size. classify: (n, classes);
        semantic: (n, classes, height, width), logits; depth: (n, 1, height, width), m.
    """
    with torch.inference_mode():
        tensor = torch.from_numpy(np.ascontiguousarray(images))
        if _channels_last():
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        outputs = session.network(tensor)
    return [output.numpy() for output in (outputs if isinstance(outputs, tuple) else (outputs,))]


def describe(session: Session) -> dict[str, Any]:
    """Return what a benchmark record says about the runtime; null where it does not apply."""
    head: Any = session.network.model[-1]  # type: ignore[index]
    task = task_of(session.network)
    return {
        "runtime": "torch",
        "version": torch.__version__,
        "threads": session.threads,
        "precision": "fp32",
        "providers": None,
        "memory_format": "channels_last" if _channels_last() else "contiguous",
        "input_shape": None,
        "task": task,
        "classes": len(session.network.names),  # type: ignore[arg-type]
        "keypoints": list(head.kpt_shape) if task == "pose" else None,
        "end2end": bool(getattr(head, "end2end", False)),
    }


def inference_network(path: str) -> nn.Module:
    """Return the network as it is deployed: BatchNorm fused, one head, decoded predictions and nothing for training.

    A model with both a one-to-many and an end-to-end head keeps the one-to-many head, as stock Ultralytics 8.4.190
    does unless `nms=False` is asked for; a checkpoint that was fused to its end-to-end head stays end-to-end.

    Raises:
        CheckpointError: the file is not a model of a task that can be exported.
    """
    network: Any = load_deployable(path)
    head = network.model[-1]
    if getattr(head, "cv2", None) is not None:
        head.end2end = False
    with torch.no_grad():
        network.fuse(verbose=False)
    head.export = True
    return network.eval().requires_grad_(False)


def _channels_last() -> bool:
    """Tell whether convolutions run faster in channels-last memory, where stock Ultralytics uses it too."""
    return platform.machine() in ("AMD64", "x86_64") and torch.backends.mkldnn.is_available()
