"""The same network in operations that the runtimes are quick at."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn


def rearrange(network: nn.Module) -> None:
    """Let modules compute the same by other operations. For tracing alone: such a network is not one to save.

    C2f blocks get one Split node instead of two Slice nodes, heads an expected distance without a softmax across
    strides.
    """
    from ultralytics.nn.modules.block import DFL, C2f

    for module in network.modules():
        if isinstance(module, C2f):
            module.forward = module.forward_split  # type: ignore[method-assign]
        elif isinstance(module, DFL):
            module.forward = partial(_distance, module)  # type: ignore[method-assign]


def expected_distance(logits: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return the mean of the distribution of each side of each box (Li et al., "Generalized Focal Loss", NeurIPS 2020).

    Ultralytics takes a softmax over an axis that is not the last one, which onnxruntime turns around twice. Reductions
    over that axis need no turning: a YOLOv8n at 320 px takes 9.4 instead of 10.2 ms (docs/results.md).

    Args:
        logits: (n, 4 · bins, anchors).
        values: (bins,), what each bin stands for, in strides.

    Returns:
        (n, 4, anchors), in strides.
    """
    bins = logits.view(logits.shape[0], 4, len(values), -1)
    likely = (bins - bins.amax(2, keepdim=True)).exp()
    return (likely * values[:, None]).sum(2) / likely.sum(2)


def _distance(module: Any, logits: torch.Tensor) -> torch.Tensor:
    return expected_distance(logits, module.conv.weight.flatten())
