"""Layers that read channels which a cut removes, and the batch norms right behind them."""

from __future__ import annotations

from collections import Counter, defaultdict
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor, nn

    from compress.pruning.plan import Plan


@dataclass(frozen=True)
class Consumer:
    """A convolution or linear layer, of one group, that loses inputs.

    Attributes:
        name: of the module.
        inputs: which of the dense layer's inputs stay, boolean, shape (inputs,).
        outputs: which of its outputs stay, boolean, shape (outputs,).
        norm: name of the batch norm that reads its output as it is, and nothing else; None where there is none.
        calls: how often one forward pass runs it.
    """

    name: str
    inputs: np.ndarray
    outputs: np.ndarray
    norm: str | None
    calls: int


def find_consumers(dense: nn.Module, plan: Plan, image: Tensor) -> list[Consumer]:
    """Return the consumers that a forward pass of the dense model runs, in the order of their first run.

    Layers that share a weight are left out: what mends one would change the other.

    Args:
        image: shape (1, channels, imgsz, imgsz).
    """
    masks = _cut_readers(dense, plan)
    calls, norms = _watch(dense, list(masks), image)
    return [Consumer(name, *masks[name], norms.get(name), count) for name, count in calls.items()]


def _cut_readers(dense: nn.Module, plan: Plan) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return for each layer that loses inputs which of its inputs and outputs stay."""
    from torch import nn
    from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

    state = dense.state_dict(keep_vars=True)
    cuts: dict[int, dict[int, np.ndarray]] = defaultdict(dict)
    for tensor, dim, mask in plan.axis_masks():
        cuts[id(state[tensor])][dim] = mask
    shared = Counter(id(value) for value in state.values())
    found = {}
    for name, module in dense.named_modules():
        if not isinstance(module, (_ConvNd, nn.Linear)) or isinstance(module, _ConvTransposeNd):
            continue
        dims = cuts.get(id(module.weight), {})
        alone = all(shared[id(value)] == 1 for value in (module.weight, module.bias) if value is not None)
        if 1 in dims and getattr(module, "groups", 1) == 1 and alone:
            found[name] = (dims[1], dims.get(0, np.ones(module.weight.shape[0], dtype=bool)))
    return found


def _watch(dense: nn.Module, names: list[str], image: Tensor) -> tuple[dict[str, int], dict[str, str]]:
    """Return how often each layer runs, in the order in which they first do, and the batch norm that follows it."""
    import torch
    from torch.nn.modules.batchnorm import _BatchNorm

    calls: dict[str, int] = {}
    made: dict[int, tuple[str, Tensor, int]] = {}  # outputs are held, so that no other tensor gets their id
    read: dict[str, list[str | None]] = defaultdict(list)  # by batch norm: the layers whose outputs it has read

    def ran(name: str, output: Tensor) -> None:
        calls[name] = calls.get(name, 0) + 1
        made[id(output)] = name, output, output._version

    def reads(norm: str, value: Tensor) -> None:
        name, _, version = made.get(id(value), (None, None, 0))
        # An activation in place hands the same tensor on, with other values.
        read[norm].append(name if name and value._version == version else None)

    with ExitStack() as stack, torch.no_grad():  # inference mode counts no versions
        for name in names:
            hook = lambda _module, _given, output, name=name: ran(name, output)  # noqa: E731
            stack.enter_context(dense.get_submodule(name).register_forward_hook(hook))
        for norm, module in dense.named_modules():
            if isinstance(module, _BatchNorm) and module.running_mean is not None:
                hook = lambda _module, given, named, norm=norm: reads(norm, first(given, named))  # noqa: E731
                stack.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
        dense.eval()(image)
    behind: dict[str, list[str]] = defaultdict(list)
    for norm, sources in read.items():
        if len(set(sources)) == 1 and sources[0] is not None and len(sources) == calls[sources[0]]:
            behind[sources[0]].append(norm)
    return calls, {name: norms[0] for name, norms in behind.items() if len(norms) == 1}


def first(given: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """Return the input of a layer, however it was handed over."""
    return given[0] if given else next(iter(named.values()))


def add_offset(pruned: nn.Module, consumer: Consumer, offset: Tensor) -> bool:
    """Add a constant to each output of a consumer, in place: to its bias, else through the batch norm that follows.

    Args:
        offset: shape (outputs that stay,).

    Returns:
        Whether there is such a place.
    """
    import torch

    module = pruned.get_submodule(consumer.name)
    with torch.no_grad():
        if isinstance(module.bias, torch.Tensor):
            module.bias.add_(offset.to(module.bias))
        elif consumer.norm is not None:
            mean: Any = pruned.get_submodule(consumer.norm).running_mean
            mean -= offset.to(mean)
        else:
            return False
    return True
