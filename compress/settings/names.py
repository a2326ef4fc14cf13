"""The words that settings may hold, and kinds of numbers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

Importance = Literal["bn", "l1", "l2", "fpgm", "taylor", "random"]
Runtime = Literal["torch", "onnxruntime", "ncnn", "tensorrt"]
# Other ways to run the files of a runtime, which devices name: `benchmark.runtimes.VARIANTS`.
Variant = Literal[
    "torch-compiled",
    "torch-cuda",
    "torch-cuda-fp16",
    "torch-cudagraph",
    "torch-cudagraph-fp16",
    "onnxruntime-cuda",
    "onnxruntime-tensorrt",
    "ncnn-vulkan",
    "torch-hugepages",
    "onnxruntime-hugepages",
    "ncnn-hugepages",
]
AUTO = "auto"
Share = Annotated[float, Field(gt=0.0, lt=1.0)]
LATENCY_TARGETS = ("latency", "speedup", "keep_importance")  # those that need a latency table
TARGETS = ("percent", "macs", "params", *LATENCY_TARGETS)
