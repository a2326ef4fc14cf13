"""Least-squares reconstruction: what reads removed channels learns to do without them, layer by layer.

After He et al., "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017, and Luo et al., "ThiNet",
ICCV 2017, without their choice of channels: that is made already.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.pruning.consumers import Consumer, add_offset, first

if TYPE_CHECKING:
    from torch import Tensor, nn

    Target = tuple[Sequence[Tensor], Tensor]  # positions: image, row, column; there the outputs, (positions, outputs)

_LEAST_POSITIONS = 4096
_POSITIONS_PER_UNKNOWN = 5
_TARGET_BYTES = 256e6
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
    from compress.pruning.batches import batches_again

    pixels = batches_again(pruned, images, imgsz)
    fits = [consumer for consumer in consumers if consumer.calls == 1 and _is_plain(pruned, consumer)]
    known: dict[str, list[Target]] = {}
    for index, consumer in enumerate(track(fits, "reconstruction")):
        if consumer.name not in known:
            known = targets(dense, _held_at_once(pruned, fits[index:]), pixels, len(images), seed)
        fit(pruned, consumer, samples(pruned, consumer, known[consumer.name], pixels), ridge)


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


def targets(
    dense: nn.Module, consumers: list[Consumer], pixels: Iterable[Tensor], images: int, seed: int
) -> dict[str, list[Target]]:
    """Return by layer, for each batch of images, what the dense model's kept outputs are at random positions.

    Args:
        pixels: the batches, shape (up to BATCH, 3, imgsz, imgsz).
        images: how many there are in all of them.
    """
    import torch

    found: dict[str, list[Target]] = {consumer.name: [] for consumer in consumers}

    def hook(consumer: Consumer) -> None:
        generator = torch.Generator().manual_seed(seed)  # its own, so that the positions do not depend on the others
        kept = torch.from_numpy(consumer.outputs)
        mean = _running_mean(dense, consumer)

        def sample(layer: Any, _given: tuple, output: Tensor) -> None:
            grid = (output.shape[0], *output.shape[2:])
            count = -(-_positions(consumer, layer) * output.shape[0] // images)
            flat = torch.randperm(math.prod(grid), generator=generator)[:count].to(output.device)
            places = torch.unravel_index(flat, grid)
            found[consumer.name].append((places, (_at(output, places) - mean)[:, kept]))

        stack.enter_context(dense.get_submodule(consumer.name).register_forward_hook(sample))

    with ExitStack() as stack, torch.inference_mode():
        for consumer in consumers:
            hook(consumer)
        for batch in pixels:
            dense.eval()(batch)
    return found


def samples(
    pruned: nn.Module, consumer: Consumer, wanted: list[Target], pixels: Iterable[Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the patches that a convolution of the pruned model reads where there are targets, and what lacks there.

    Yields:
        Patches, float64, shape (positions, inputs · kernel), and the targets less the outputs, float64, shape
        (positions, outputs).
    """
    import torch

    layer, mean = pruned.get_submodule(consumer.name), _running_mean(pruned, consumer)
    for batch, (places, target) in zip(pixels, wanted, strict=True):
        with torch.inference_mode():
            inputs, output = _through(pruned, consumer.name, batch)
            pair = _patches(layer, inputs, *places).cpu().double(), target.double() - (_at(output, places) - mean)
        yield pair


def _positions(consumer: Consumer, layer: Any) -> int:
    """Return how many positions a layer is fitted on: well above the number of unknowns of an output."""
    return max(_LEAST_POSITIONS, _POSITIONS_PER_UNKNOWN * int(consumer.inputs.sum()) * layer.weight[0, 0].numel())


def _held_at_once(pruned: nn.Module, consumers: list[Consumer]) -> list[Consumer]:
    """Return the first consumers, as many as have targets that fit into memory together; one at least."""
    sizes = [_positions(c, pruned.get_submodule(c.name)) * int(c.outputs.sum()) * 4 for c in consumers]
    return consumers[: max(1, int((np.cumsum(sizes) <= _TARGET_BYTES).sum()))]


def _at(output: Tensor, places: Sequence[Tensor]) -> Tensor:
    image, row, column = places
    return output[image, :, row, column].float().cpu()


def _is_plain(pruned: nn.Module, consumer: Consumer) -> bool:
    """Tell whether `_patches` knows what a layer reads."""
    from torch import nn

    layer = pruned.get_submodule(consumer.name)
    return isinstance(layer, nn.Conv2d) and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def _has_offset(pruned: nn.Module, consumer: Consumer) -> bool:
    return pruned.get_submodule(consumer.name).bias is not None or consumer.norm is not None


def _running_mean(model: nn.Module, consumer: Consumer) -> Tensor | float:
    """Return what is subtracted from a layer's outputs where that is the place of its offset."""
    if consumer.norm is None or model.get_submodule(consumer.name).bias is not None:
        return 0.0
    mean: Any = model.get_submodule(consumer.norm).running_mean
    return mean.cpu()


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
