"""PyTorch: on the CPU the network that every exported artefact must equal; its variants are other ways to run that.

One of the self-contained runners: `load`, `infer` and `describe` are plain functions. It opens model files through
`compress.checkpoint`, because no checkpoint is ever unpickled without the restricted loader.

A variant is made of words: `compiled` (torch.compile), `cuda` (the first GPU), `cudagraph` (there, replayed as one CUDA
graph), `fp16` (there, weights and computation in half). No GPU was at hand when this was written: what runs there was
never measured. On a GPU what `infer` takes includes both copies between host and GPU.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from compress.checkpoint import load_deployable, task_of

_WORDS = ("compiled", "cuda", "cudagraph", "fp16")
_ON_GPU = frozenset({"cuda", "cudagraph"})
_BEFORE_CAPTURE = 3


@dataclass(frozen=True)
class Session:
    """A network ready to infer: `run` is what calls it; `graphs` are CUDA graphs by the shape of their input.

    `stride` is the largest one of its levels, px.
    """

    network: nn.Module
    threads: int
    words: frozenset[str] = frozenset()
    run: Callable[[torch.Tensor], Any] | None = None
    graphs: dict[tuple[int, ...], Any] = field(default_factory=dict)
    stride: int = 1

    @property
    def on_gpu(self) -> bool:
        """Whether it runs on the GPU."""
        return bool(self.words & _ON_GPU)


def load(path: str, threads: int, variant: str = "") -> Session:
    """Open a checkpoint for inference with `threads` threads (a setting of the whole process in PyTorch).

    Args:
        path: the checkpoint.
        threads: on the CPU.
        variant: words as in the module's docstring, joined by "-"; none for the CPU as it is.

    Raises:
        CheckpointError: the file is not a model of a task that can be exported.
        ValueError: there is no GPU that this PyTorch can use.
    """
    words = frozenset(variant.split("-")) if variant else frozenset()
    network: Any = inference_network(path) if not words & _ON_GPU else _on_gpu(path, words)
    session = Session(network, threads, words, stride=int(max(getattr(network, "stride", [1]))))
    torch.set_num_threads(threads)
    if _channels_last(session):
        session.network.to(memory_format=torch.channels_last)
    return replace(session, run=torch.compile(session.network)) if "compiled" in words else session


def infer(session: Session, images: np.ndarray) -> list[np.ndarray]:
    """Run the network.

    Args:
        session: what `load` returned.
        images: (n, 3, height, width) float32 in [0, 1], RGB, whose sides the model's stride divides.

    Returns:
        For a detector one array: (n, 4 + classes, anchors), boxes as centre x, centre y, width, height in px; for an
        end-to-end head (n, detections, 6), rows of x1, y1, x2, y2, score, class. Other tasks have more values behind
        those of each anchor or row: segment the coefficients of its mask, and a second array, the prototypes
        (n, masks, height / 4, width / 4); pose x and y in px of each key point and how likely it is to be seen; obb
        the angle of the box in radians, whose sides are then always given as centre and size. classify: (n, classes),
        probabilities, or logits where the network ends with nn.Linear;
        semantic: (n, classes, height, width), logits; depth: (n, 1, height, width), m.

    Raises:
        ValueError: the images have other sides.
    """
    rows, columns = images.shape[2:]
    if rows % session.stride or columns % session.stride:
        raise ValueError(f"takes images whose sides are multiples of {session.stride} px, got {columns}×{rows}")
    with torch.inference_mode():
        tensor = torch.from_numpy(np.ascontiguousarray(images))
        if session.on_gpu:
            tensor = tensor.to("cuda", torch.float16 if "fp16" in session.words else torch.float32)
        if _channels_last(session):
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        outputs = _replay(session, tensor) if "cudagraph" in session.words else _run(session, tensor)
    # Copying to the host waits for the GPU.
    return [output.float().cpu().numpy() for output in (outputs if isinstance(outputs, tuple) else (outputs,))]


def describe(session: Session) -> dict[str, Any]:
    """Return what a benchmark record says about the runtime; null where it does not apply."""
    head: Any = session.network.model[-1]  # type: ignore[index]
    task = task_of(session.network)
    return {
        "runtime": "-".join(["torch", *(word for word in _WORDS if word in session.words)]),
        "version": torch.__version__,
        "threads": session.threads,
        "precision": "fp16" if "fp16" in session.words else "fp32",
        "providers": [torch.cuda.get_device_name()] if session.on_gpu else None,
        "memory_format": "channels_last" if _channels_last(session) else "contiguous",
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


def _on_gpu(path: str, words: frozenset[str]) -> nn.Module:
    if not torch.cuda.is_available():
        raise ValueError(f"{path}: this PyTorch ({torch.__version__}) sees no NVIDIA GPU: use the runtime torch")
    network = inference_network(path)
    return network.to("cuda", torch.float16 if "fp16" in words else torch.float32)


def _run(session: Session, tensor: torch.Tensor) -> Any:
    # Never by its truth: what torch.compile returns has a length where the network has none.
    return (session.network if session.run is None else session.run)(tensor)


def _replay(session: Session, tensor: torch.Tensor) -> Any:
    """Run the network as one CUDA graph, which is captured at the first input of a shape."""
    shape = tuple(tensor.shape)
    if shape not in session.graphs:
        static, side = tensor.clone(), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what is allocated or chosen at first use must not be captured
            for _ in range(_BEFORE_CAPTURE):
                _run(session, static)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = _run(session, static)
        session.graphs[shape] = graph, static, outputs
    graph, static, outputs = session.graphs[shape]
    static.copy_(tensor)
    graph.replay()
    return outputs


def _channels_last(session: Session) -> bool:
    """Tell whether convolutions run faster in channels-last memory, where stock Ultralytics uses it too."""
    if session.on_gpu:
        return "fp16" in session.words  # tensor cores take it so
    return platform.machine() in ("AMD64", "x86_64") and torch.backends.mkldnn.is_available()
