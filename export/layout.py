"""The same network in operations that the runtimes are quick at."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import nn


def rearrange(network: nn.Module) -> None:
    """Let modules compute the same by other operations. For tracing alone: such a network is not one to save.

    C2f blocks get two convolutions in the place of one whose output is cut in two, heads an expected distance without a
    softmax across strides.

    Args:
        network: with batch norms fused into its convolutions.
    """
    from ultralytics.nn.modules.block import DFL, C2f

    for module in list(network.modules()):
        if isinstance(module, C2f):
            module.cv1 = Halves(module.cv1, module.c)  # type: ignore[assignment]
            module.forward = partial(_c2f, module)  # type: ignore[method-assign]
        elif isinstance(module, DFL):
            module.forward = partial(_distance, module)  # type: ignore[method-assign]


class Halves(nn.Module):
    """A convolution whose output is used in two parts, as two convolutions that each make one.

    onnxruntime keeps channels in blocks, and would have to undo them for a Split and make them anew behind it.

    Args:
        whole: Ultralytics' `Conv`, fused.
        first: channels of the first part.
    """

    def __init__(self, whole: Any, first: int) -> None:
        super().__init__()
        self.first, self.second = _part(whole.conv, slice(None, first)), _part(whole.conv, slice(first, None))
        self.act = whole.act

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what `whole` makes of (n, channels, height, width), in two parts."""
        return self.act(self.first(images)), self.act(self.second(images))


def _part(whole: nn.Conv2d, made: slice) -> nn.Conv2d:
    assert whole.bias is not None  # of the batch norm that was fused into it
    part = deepcopy(whole)
    part.weight, part.bias = nn.Parameter(whole.weight[made]), nn.Parameter(whole.bias[made])
    part.out_channels = len(part.bias)
    return part


def _c2f(block: Any, images: torch.Tensor) -> torch.Tensor:
    parts = [*block.cv1(images)]
    parts.extend(inner(parts[-1]) for inner in block.m)
    return block.cv2(torch.cat(parts, 1))


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
