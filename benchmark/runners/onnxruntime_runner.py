"""ONNX Runtime on the CPU; its variants are `cuda` and `tensorrt`, the execution providers of these names.

One of the self-contained runners: `load`, `infer` and `describe` are plain functions that need numpy and onnxruntime
and nothing else, so that this file alone can be copied to a device.

No GPU was at hand when this was written: nothing was ever measured there.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime

_ERRORS_ONLY = 3
_FLOAT32 = "tensor(float)"
_CPU, _CUDA, _TENSORRT = (f"{name}ExecutionProvider" for name in ("CPU", "CUDA", "Tensorrt"))
# What runs a node first. Nodes that it cannot run go to the next, which the record tells.
_PROVIDERS = {"": [_CPU], "cuda": [_CUDA, _CPU], "tensorrt": [_TENSORRT, _CUDA, _CPU]}


@dataclass(frozen=True)
class Session:
    """A graph ready to infer."""

    graph: onnxruntime.InferenceSession
    threads: int
    variant: str = ""


def load(path: str, threads: int, variant: str = "", profile: str | None = None) -> Session:
    """Open an ONNX file with `threads` threads on the CPU, all of them inside one operator at a time.

    Args:
        path: the file.
        threads: on the CPU.
        variant: "" for the CPU, `cuda` or `tensorrt`.
        profile: how the name of a file begins that onnxruntime's own profiler writes; null for no profile.

    Raises:
        ValueError: the file is not an ONNX model with one image input in fp32, or onnxruntime cannot use the provider
            here.
    """
    wanted = _PROVIDERS[variant]
    if wanted[0] not in onnxruntime.get_available_providers():
        raise ValueError(
            f"{path} needs {wanted[0]}, which this onnxruntime {onnxruntime.__version__} does not have: install "
            "onnxruntime-gpu instead of onnxruntime"
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = _ERRORS_ONLY
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = profile
    try:
        graph = onnxruntime.InferenceSession(path, options, providers=wanted)
    except Exception as error:  # onnxruntime's own exceptions share no base class of their own
        raise ValueError(f"{path} cannot be opened by onnxruntime: {error}") from None
    if graph.get_providers()[0] != wanted[0]:  # onnxruntime falls back to the CPU with a warning
        raise ValueError(f"{path} needs {wanted[0]}, which cannot start here: check the GPU, its driver and libraries")
    inputs = graph.get_inputs()
    if len(inputs) != 1 or len(inputs[0].shape) != 4:
        raise ValueError(f"{path} must have one input of shape (n, 3, height, width), it has {len(inputs)} input(s)")
    if inputs[0].type != _FLOAT32:
        raise ValueError(f"{path} takes images as {inputs[0].type}, not {_FLOAT32}: export it with inputs in fp32")
    return Session(graph, threads, variant)


def infer(session: Session, images: np.ndarray) -> list[np.ndarray]:
    """Run the graph.

    Args:
        session: what `load` returned.
        images: (n, 3, height, width) float32 in [0, 1], RGB, of the shape that the graph was exported with.

    Returns:
        The graph's outputs in its order, as `torch_runner.infer` returns them; of a graph with suppression in it as
        those of an end-to-end head, filled up with rows of zeros.

    Raises:
        ValueError: the graph takes another shape or type, or onnxruntime cannot run it.
    """
    name = session.graph.get_inputs()[0].name
    try:
        outputs: Any = session.graph.run(None, {name: np.ascontiguousarray(images)})
    except Exception as error:  # onnxruntime's own exceptions share no base class of their own
        raise ValueError(f"onnxruntime cannot run the graph: {error}") from None
    return list(outputs)


def describe(session: Session) -> dict[str, Any]:
    """Return what a benchmark record says about the runtime; null where the file does not tell."""
    metadata = session.graph.get_modelmeta().custom_metadata_map
    names, arguments = literal(metadata.get("names")), literal(metadata.get("args"))
    arguments = arguments if isinstance(arguments, dict) else {}
    limits = {key: arguments.get(key) for key in ("conf", "iou", "max_det")} if arguments.get("nms") else None
    return {
        "runtime": "-".join(filter(None, ("onnxruntime", session.variant))),
        "version": onnxruntime.__version__,
        "threads": session.threads,
        "precision": metadata.get("espalier_precision"),
        "providers": session.graph.get_providers(),
        "memory_format": None,
        "input_shape": [size if isinstance(size, int) else None for size in session.graph.get_inputs()[0].shape],
        "task": metadata.get("task"),
        "classes": len(names) if isinstance(names, (dict, list)) else None,
        "keypoints": literal(metadata.get("kpt_shape")),
        "end2end": bool(literal(metadata.get("end2end"))) or limits is not None,
        "suppression": limits,
    }


def literal(text: str | None) -> Any:
    """Return what an entry of a file's metadata says; null where a stranger wrote something else than a literal."""
    try:
        return ast.literal_eval(text) if text else None
    except (ValueError, SyntaxError, MemoryError, RecursionError):  # the last two of what is nested too deep
        return None
