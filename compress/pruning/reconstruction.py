"""Least-squares reconstruction: what reads removed channels learns to do without them, layer by layer.

After He et al., "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017, and Luo et al., "ThiNet",
ICCV 2017, without their choice of channels: that is made already.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.pruning.consumers import Consumer, add_offset, first

if TYPE_CHECKING:
    from torch import Tensor, nn

_LEAST_POSITIONS = 4096
_POSITIONS_PER_UNKNOWN = 5
_RIDGE = 1e-3


class _ReachedError(Exception):
    """The layer that is looked at has run: the rest of the forward pass is not needed."""


def reconstruct(
    pruned: nn.Module,
    dense: nn.Module,
    consumers: list[Consumer],
    images: list[Path],
    imgsz: int,
    seed: int = 0,
    ridge: float = _RIDGE,
) -> None:
    """Refit each 2-D convolution that loses inputs, in place, so that it returns what the dense model's returns.

    In order of execution: each one sees what those before it return once they are refitted. The targets are its kept
    outputs in the dense model on the same images, before batch norm, whose variance stays that of the dense model; an
    offset goes where that of `fold_removed` goes. A layer that runs more than once in a pass is left as it is, and so
    are linear ones.

    Args:
        images: of the training split.
        seed: chooses the positions that the fit is made on.
        ridge: weight of the change of the weights, relative to the mean square of the inputs.
    """
    from compress.progress import track

    fits = [consumer for consumer in consumers if consumer.calls == 1 and _is_plain(pruned, consumer)]
    for consumer in track(fits, "reconstruction"):
        fit(pruned, consumer, samples(pruned, dense, consumer, images, imgsz, seed), ridge)


def fit(pruned: nn.Module, consumer: Consumer, sampled: Iterator[tuple[Tensor, Tensor]], ridge: float) -> None:
    """Change the weights of one convolution by the ridge regression from its inputs to what its outputs lack.

    The change is drawn towards none, so it never enlarges the squared error of what was sampled.
    """
    import torch

    normal = right = None
    for patches, lacking in sampled:
        ones = torch.ones(len(patches), 1, dtype=torch.float64)
        inputs = torch.cat([patches, ones], 1) if _has_offset(pruned, consumer) else patches
        normal = inputs.T @ inputs + (0 if normal is None else normal)
        right = inputs.T @ lacking + (0 if right is None else right)
    if normal is None or right is None or not (scale := float(normal.diagonal().mean())) > 0:
        return
    normal.diagonal().add_(ridge * scale)
    change = torch.linalg.solve(normal, right)
    if not change.isfinite().all():
        return
    weight: Any = pruned.get_submodule(consumer.name).weight
    unknowns = weight[0].numel()
    with torch.no_grad():
        weight.add_(change[:unknowns].T.reshape(weight.shape).to(weight))
    if len(change) > unknowns:
        add_offset(pruned, consumer, change[unknowns])


def samples(
    pruned: nn.Module, dense: nn.Module, consumer: Consumer, images: list[Path], imgsz: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the patches that a convolution reads at random positions, and what its outputs lack there.

    Yields:
        Patches of the pruned model, float64, shape (positions, inputs · kernel), and the dense model's outputs less
        the pruned one's, shape (positions, outputs), each relative to the running mean of the batch norm that follows.
    """
    import torch

    from compress.pruning.batches import batches

    generator = torch.Generator().manual_seed(seed)
    layer: Any = pruned.get_submodule(consumer.name)
    wanted = max(_LEAST_POSITIONS, _POSITIONS_PER_UNKNOWN * layer.weight[0].numel())
    kept = torch.from_numpy(consumer.outputs)
    shift = _mean(dense, consumer)[kept] - _mean(pruned, consumer) if _shifted(pruned, consumer) else 0.0
    for batch in batches(pruned, images, imgsz):
        with torch.inference_mode():
            _, target = _through(dense, consumer.name, batch)
            inputs, output = _through(pruned, consumer.name, batch)
            places = target.shape[0] * target.shape[2] * target.shape[3]
            count = min(places, -(-wanted * len(batch) // len(images)))
            flat = torch.randperm(places, generator=generator)[:count].to(batch.device)
            image, row, column = torch.unravel_index(flat, (target.shape[0], *target.shape[2:]))
            lacking = (
                target[image, :, row, column].double().cpu()[:, kept] - output[image, :, row, column].double().cpu()
            )
            patches = _patches(layer, inputs, image, row, column).double().cpu()
        yield patches, lacking - shift


def _is_plain(pruned: nn.Module, consumer: Consumer) -> bool:
    """Tell whether `_patches` knows what a layer reads."""
    from torch import nn

    layer = pruned.get_submodule(consumer.name)
    return isinstance(layer, nn.Conv2d) and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def _has_offset(pruned: nn.Module, consumer: Consumer) -> bool:
    return pruned.get_submodule(consumer.name).bias is not None or consumer.norm is not None


def _shifted(pruned: nn.Module, consumer: Consumer) -> bool:
    """Tell whether the offset of a layer is in the batch norm that follows."""
    return pruned.get_submodule(consumer.name).bias is None and consumer.norm is not None


def _mean(model: nn.Module, consumer: Consumer) -> Tensor:
    norm: Any = model.get_submodule(consumer.norm or "")
    return norm.running_mean.double().cpu()


def _patches(layer: Any, inputs: Tensor, image: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Return what the kernel covers at some positions of the output, shape (positions, channels · kernel)."""
    import torch
    from torch.nn import functional

    high, wide = layer.padding
    padded = functional.pad(inputs, (wide, wide, high, high))
    device = inputs.device
    rows = row[:, None] * layer.stride[0] + layer.dilation[0] * torch.arange(layer.kernel_size[0], device=device)
    columns = column[:, None] * layer.stride[1] + layer.dilation[1] * torch.arange(layer.kernel_size[1], device=device)
    found = padded[image[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return found.movedim(-1, 1).flatten(1)


def _through(model: nn.Module, name: str, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Run a model up to a layer and return what that reads and returns."""
    found: list[Tensor] = []

    def stop(_module: nn.Module, given: tuple, named: dict, output: Tensor) -> None:
        found.extend((first(given, named), output))
        raise _ReachedError

    with model.get_submodule(name).register_forward_hook(stop, with_kwargs=True), suppress(_ReachedError):
        model.eval()(batch)
    return found[0], found[1]
