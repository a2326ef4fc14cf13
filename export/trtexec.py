"""The `trtexec` command that builds what `trt_builder.py` would, in the options of the target's own version."""

from __future__ import annotations

import shlex
from typing import Any

from export.trt_builder import is_strongly_typed, version_tuple

_SKIP_INFERENCE_SINCE = (8, 6)
_ALWAYS_STRONGLY_TYPED_SINCE = (11,)


def script(flavour: str, version: str, request: dict[str, Any]) -> str:
    """Return a shell script that builds a request's engine with NVIDIA's command-line tool.

    Args:
        flavour: tensorrt or tensorrt_rtx.
        version: of TensorRT, such as 10.3.0.
        request: what `trt_builder.py` takes; its file names are relative to where the script is started.
    """
    words = [shlex.quote(word) for word in command(flavour, version, request)]
    lines = " \\\n    ".join(words)
    return f"#!/bin/sh\n# Built by {flavour} {version}: other versions have other options.\nset -e\n{lines}\n"


def command(flavour: str, version: str, request: dict[str, Any]) -> list[str]:
    """Return the tool and its options for a request; see `script`."""
    rtx, numbers = flavour == "tensorrt_rtx", version_tuple(version)
    options = [f"--onnx={request['onnx']}", f"--saveEngine={request['engine']}"]
    options += _precision(flavour, version, request)
    for name, shapes in request["profiles"].items():
        for option, shape in zip(("minShapes", "optShapes", "maxShapes"), shapes, strict=True):
            options.append(f"--{option}={name}:{'x'.join(str(size) for size in shape)}")
    if request["workspace_mib"] is not None:
        options.append(f"--memPoolSize=workspace:{request['workspace_mib']}")
    if request["timing_cache"] is not None:
        options.append(f"--timingCacheFile={request['timing_cache']}")
    if request["version_compatible"]:
        options.append("--versionCompatible")
    if request["hardware_compatible"]:
        options.append("--hardwareCompatibilityLevel=ampere+")
    if request["dla"] is not None:
        options += [f"--useDLACore={request['dla']}", "--allowGPUFallback"]
    options.append("--profilingVerbosity=detailed")
    options.append("--skipInference" if rtx or numbers >= _SKIP_INFERENCE_SINCE else "--buildOnly")
    return ["tensorrt_rtx" if rtx else "trtexec", *options]


def _precision(flavour: str, version: str, request: dict[str, Any]) -> list[str]:
    precision = request["precision"]
    options = [] if precision == "tf32" else ["--noTF32"]
    if is_strongly_typed(flavour, version):
        always = flavour == "tensorrt_rtx" or version_tuple(version) >= _ALWAYS_STRONGLY_TYPED_SINCE
        return options if always else [*options, "--stronglyTyped"]
    if precision in ("fp32", "tf32"):
        return options
    options.append(f"--{precision}")
    if precision == "int8" and request["rest"] == "fp16":
        options.append("--fp16")
    if names := request["float_nodes"]:
        kept = ",".join(f"{name}:fp32" for name in names)
        options += ["--precisionConstraints=prefer", f"--layerPrecisions={kept}", f"--layerOutputTypes={kept}"]
    return options
