"""The TorchScript of a network that pnnx turns into ncnn: up to the last convolutions of a head that finds boxes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from benchmark.transports import last_line
from compress.errors import ExportError
from export import stage

# What pnnx leaves as it is, because ncnn has no such layer; each is converted in a test that fails once it has one.
# pnnx tells of any other only after the conversion.
UNSUPPORTED = (
    "aten::argmax",
    "aten::argsort",
    "aten::cdist",
    "aten::cumprod",
    "aten::erfinv",
    "aten::fft_rfft",
    "aten::gather",
    "aten::index",
    "aten::index_select",
    "aten::masked_fill",
    "aten::nonzero",
    "aten::scatter",
    "aten::sort",
    "aten::std",
    "aten::topk",
    "aten::var",
    "aten::where",
)


def trace(network: Any, model: Path, imgsz: int) -> Any:
    """Return the TorchScript of the network, up to the last convolutions of a head that finds boxes."""
    import warnings

    import torch
    from ultralytics.nn.modules.block import CBFuse
    from ultralytics.nn.modules.conv import Index

    head = network.model[-1]
    if hasattr(head, "one2many"):
        towers = _towers(head)

        def forward_raw(features: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
            maps = [tower(x) for x, *level in zip(features, *towers, strict=True) for tower in level]
            if hasattr(head, "proto"):
                # Proto reads the finest level, Proto26 all of them.
                maps.append(head.proto(features if hasattr(head.proto, "feat_refine") else features[0]))
            return tuple(maps)

        head.forward = forward_raw
    for module in network.modules():
        if isinstance(module, CBFuse):
            fuse: Any = module
            fuse.forward = partial(_fuse, module)
        elif isinstance(module, Index) and module.index == ():
            passing: Any = module
            passing.forward = _pass_on  # the trace would hold an alias, which ncnn does not have
    with torch.no_grad(), warnings.catch_warnings():
        # pnnx reads TorchScript and nothing else, deprecated or not; parity checks the trace.
        warnings.simplefilter("ignore")
        try:
            images = torch.zeros(1, network.yaml.get("channels", 3), imgsz, imgsz)
            return torch.jit.trace(network, images, check_trace=False)
        except (RuntimeError, ValueError, TypeError) as error:
            raise ExportError(f"{model.name} cannot be traced: {last_line(stage.torch_reason(error))}") from None


def count_outputs(network: Any) -> int:
    """Return how many maps the trace of a network returns."""
    head = network.model[-1]
    return len(_towers(head)) * head.nl + hasattr(head, "proto") if hasattr(head, "one2many") else 1


def refuse_unsupported(traced: Any, model: Path) -> None:
    """Name the operations that ncnn has no layer for, and the modules that use them, before anything is converted."""
    found: dict[str, str] = {}
    for node in traced.inlined_graph.nodes():
        kind = node.kind()
        if kind in UNSUPPORTED or not kind.startswith(("aten::", "prim::")):
            found.setdefault(kind, node.scopeName().split("/")[-1].removeprefix("__module.") or "the model")
    if found:
        named = ", ".join(f"{kind} in {place}" for kind, place in sorted(found.items()))
        raise ExportError(f"{model.name} uses what ncnn does not have ({named}): use the ONNX export")


def _towers(head: Any) -> list[Any]:
    """Return what makes the maps of a head that finds boxes: boxes, classes and what else there is, per level."""
    from torch import nn

    branch = dict(head.one2one if head.end2end else head.one2many)
    branch.pop("kpts_sigma_head", None)  # serves training alone
    if points := branch.pop("kpts_head", None):
        branch["pose_head"] = [nn.Sequential(*pair) for pair in zip(branch["pose_head"], points, strict=True)]
    return list(branch.values())


def _fuse(module: Any, maps: list[Any]) -> Any:
    """Do what Ultralytics' CBFuse (YOLOv9e) does, without the new dimension that ncnn cannot sum over."""
    from torch.nn.functional import interpolate

    *others, last = maps
    resized = [interpolate(x[i], size=last.shape[2:], mode="nearest") for i, x in zip(module.idx, others, strict=True)]
    return sum(resized, start=last)


def _pass_on(x: Any) -> Any:
    return x
