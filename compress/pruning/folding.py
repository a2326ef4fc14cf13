"""Constant folding: what removed channels have sent on average goes on being sent, as a constant."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING

from compress.pruning.consumers import Consumer, add_offset, first

if TYPE_CHECKING:
    from torch import Tensor, nn


def fold_removed(pruned: nn.Module, dense: nn.Module, consumers: list[Consumer], images: Iterable[Tensor]) -> None:
    """Add to each consumer's output what its removed inputs contribute to it on average, in place.

    A removed channel is replaced by its mean over all images and places; for one whose γ is zero that is act(β), which
    it sends everywhere. The constant goes into the consumer's bias, or is taken from the running mean of the batch norm
    that follows; a consumer with neither is left as it is. Zero padding sends no constant, so it is inexact within half
    a kernel of the border.

    Args:
        pruned: the dense model, cut.
        images: batches of shape (count, channels, imgsz, imgsz).
    """
    import torch

    for consumer, mean in zip(consumers, input_means(dense, consumers, images), strict=True):
        weight = dense.get_parameter(f"{consumer.name}.weight").detach().double().cpu()
        kernels = weight.flatten(2).sum(2) if weight.ndim > 2 else weight
        gone, kept = torch.from_numpy(~consumer.inputs), torch.from_numpy(consumer.outputs)
        add_offset(pruned, consumer, (kernels[:, gone] @ mean[gone])[kept])


def input_means(dense: nn.Module, consumers: list[Consumer], images: Iterable[Tensor]) -> list[Tensor]:
    """Return the mean of each input channel of each consumer over images and places, float64, shape (inputs,)."""
    import torch

    sums = [torch.zeros(consumer.inputs.size, dtype=torch.float64) for consumer in consumers]
    counts = [0] * len(consumers)

    def hook(index: int, module: nn.Module) -> None:
        channel = -1 if isinstance(module, torch.nn.Linear) else 1 - module.weight.ndim  # type: ignore[union-attr]

        def add(_module: nn.Module, given: tuple, named: dict) -> None:
            values = first(given, named).movedim(channel, 0).flatten(1)
            sums[index] += values.sum(1, dtype=torch.float64).cpu()
            counts[index] += values.shape[1]

        stack.enter_context(module.register_forward_pre_hook(add, with_kwargs=True))

    with ExitStack() as stack, torch.inference_mode():
        for index, consumer in enumerate(consumers):
            hook(index, dense.get_submodule(consumer.name))
        dense.eval()
        for batch in images:
            dense(batch)
    return [total / max(count, 1) for total, count in zip(sums, counts, strict=True)]
