"""What modules keep beside their weights: counts and sizes that must follow when channels are cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import nn

Kept = Callable[[str], "np.ndarray | None"]  # which rows of a weight of the module stay, by its name; None: all


def refresh_attributes(module: nn.Module, kept: Kept) -> None:
    """Set the numbers of a module whose weights, or whose children's weights, have been cut.

    Args:
        module: with its new weights.
        kept: tells which rows (dimension 0) of a weight stayed, boolean, shape (rows before,).
    """
    for kind in type(module).__mro__:
        if kind.__module__.startswith(("torch.nn.", "ultralytics.")) and kind.__name__ in _REFRESH:
            try:
                _REFRESH[kind.__name__](module, kept)
            except AttributeError:  # a stranger's subclass that has other parts
                if kind is type(module):
                    raise
            return


def _convolution(module: Any, _: Kept) -> None:
    if module.groups == module.in_channels > 1:  # depthwise: as many groups as inputs
        module.groups = module.weight.shape[0] * module.groups // module.out_channels
    module.out_channels, module.in_channels = module.weight.shape[0], module.weight.shape[1] * module.groups


def _transposed_convolution(module: Any, _: Kept) -> None:
    if module.groups == module.in_channels > 1:
        module.groups = module.weight.shape[0]
    module.in_channels, module.out_channels = module.weight.shape[0], module.weight.shape[1] * module.groups


def _linear(module: Any, _: Kept) -> None:
    module.out_features, module.in_features = module.weight.shape


def _norm(module: Any, _: Kept) -> None:
    vector = module.running_mean if module.weight is None else module.weight
    if vector is not None:
        module.num_features = vector.shape[0]


def _group_norm(module: Any, _: Kept) -> None:
    each = module.num_channels // module.num_groups
    module.num_channels = module.weight.shape[0]
    module.num_groups = module.num_channels // each


def _prelu(module: Any, _: Kept) -> None:
    module.num_parameters = module.weight.shape[0]


def _halves(module: Any, _: Kept) -> None:
    """`c`: the width of either half of what `cv1` makes."""
    module.c = module.cv1.conv.weight.shape[0] // 2


def _attention(module: Any, _: Kept) -> None:
    """`scale` stays: it belongs to the products that the model was trained with."""
    module.head_dim = module.proj.conv.weight.shape[1] // module.num_heads
    module.key_dim = (module.qkv.conv.weight.shape[0] // module.num_heads - module.head_dim) // 2


def _area_attention(module: Any, _: Kept) -> None:
    """Whole heads go; the width of a head, which sets the scale, stays."""
    module.all_head_dim = module.proj.conv.weight.shape[1]
    module.num_heads = module.all_head_dim // module.head_dim


def _splits(module: Any, kept: Kept) -> None:
    """`c2s`: the sizes of the parts of what `conv` makes."""
    mask = kept("conv.weight")
    if mask is not None:
        module.c2s = [int(part.sum()) for part in np.split(mask, np.cumsum(module.c2s)[:-1])]


def _rep_conv(module: Any, _: Kept) -> None:
    if hasattr(module, "conv1"):
        module.c2, module.c1 = module.conv1.conv.weight.shape[0], module.conv1.conv.weight.shape[1] * module.g


# By the name of the class; of several in a module's ancestry, the nearest counts. What is to be known of Ultralytics'
# modules before a cut stands in `compress/channels/ultralytics_modules.py`.
_REFRESH: dict[str, Callable[[Any, Kept], None]] = {
    "_ConvNd": _convolution,
    "_ConvTransposeNd": _transposed_convolution,
    "Linear": _linear,
    "_NormBase": _norm,
    "GroupNorm": _group_norm,
    "PReLU": _prelu,
    "C2f": _halves,
    "C2PSA": _halves,
    "PSA": _halves,
    "RepNCSPELAN4": _halves,
    "Attention": _attention,
    "AAttn": _area_attention,
    "CBLinear": _splits,
    "RepConv": _rep_conv,
}
