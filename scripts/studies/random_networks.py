"""Random small networks made of every operation that `compress.channels.rules` knows, and some that it does not.

A network is a recipe: steps that each read tensors made before and make new ones. Hypothesis draws recipes and, when
one fails, shrinks it to the few steps that matter:

    Recipe(
        steps=(Step("Conv", (3, 4, 1, "silu"), (0,)), Step("Chunk", (2,), (1,))),
        heads=(Step("ConvHead", (2,), (2,)), Step("ConvHead", (2,), (3,))),
    )

reads: tensor 0 is the image, a convolution of it is tensor 1, its halves are tensors 2 and 3, each has its own head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import strategies as st
from torch import Tensor, nn
from ultralytics.nn.modules import C2f as _C2f

from compress.channels.graph import Graph
from compress.errors import BudgetError
from compress.pruning.budget import Choice, Target, choose
from compress.settings import Budget

IMGSZ = 8
_CHANNELS = (2, 4, 6, 8, 12)
_MAX_CHANNELS = 24  # what concatenation and depth multipliers may grow to
_ACTIVATIONS = ("silu", "relu", "relu6", "leaky_relu", "hardswish", "gelu", "mish", "elu", "tanh")


@dataclass(frozen=True)
class Step:
    """An operation of `OPERATIONS`, the arguments of its module, and the tensors that it reads."""

    kind: str
    arguments: tuple[Any, ...]
    sources: tuple[int, ...]


@dataclass(frozen=True)
class Recipe:
    """A network: steps in order, and the heads whose results it returns."""

    steps: tuple[Step, ...]
    heads: tuple[Step, ...]


class Network(nn.Module):
    """The network of a recipe, with random weights and batch norms as a trained one has them, in evaluation mode."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.recipe = recipe
        self.steps, self.heads = nn.ModuleList(), nn.ModuleList()
        for step in recipe.steps:
            self.steps.append(build(step, self.steps))
        for step in recipe.heads:
            self.heads.append(build(step, self.steps))
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.5, 0.5)
                module.running_mean = torch.empty(module.num_features).uniform_(-0.3, 0.3)
                module.running_var = torch.empty(module.num_features).uniform_(0.5, 2.0)
        self.eval()

    def forward(self, image: Tensor) -> list[Tensor]:
        """Return the result of every head."""
        tensors = [image]
        for step, module in zip(self.recipe.steps, self.steps, strict=True):
            tensors.extend(run(step, module, self.steps, tensors))
        pairs = zip(self.recipe.heads, self.heads, strict=True)
        return [run(step, module, self.steps, tensors)[0] for step, module in pairs]


Modules = Sequence[nn.Module] | nn.ModuleList


def build(step: Step, before: Modules) -> nn.Module:
    """Return a step's own module, given those of the steps before it."""
    if step.kind == "Tied":  # another layer with the same weight
        module = Conv(*step.arguments[1:])
        module.conv.weight = before[step.arguments[0]].conv.weight  # type: ignore[union-attr]
        return module
    return OPERATIONS[step.kind].make(*step.arguments)


def run(step: Step, module: nn.Module, modules: Modules, tensors: list[Tensor]) -> list[Tensor]:
    """Return what a step makes of the tensors before it."""
    if step.kind == "Again":  # the very layer of an earlier step, called once more
        module = modules[step.arguments[0]]
    made = module(*(tensors[source] for source in step.sources))
    return [made] if isinstance(made, Tensor) else list(made)


# ------------------------------------------------------------------------------------------------------------ layers


class Function(nn.Module):
    """A module without weights."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: Tensor) -> Any:
        """Apply the function."""
        return self.function(*tensors)


class Conv(nn.Module):
    """Convolution, batch norm, activation."""

    def __init__(self, cin: int, cout: int, kernel: int = 1, act: str = "silu", stride: int = 1, groups: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn, self.act = nn.BatchNorm2d(cout), act

    def forward(self, x: Tensor) -> Tensor:
        """Shapes (1, cin, s, s) to (1, cout, s, s)."""
        return getattr(F, self.act)(self.bn(self.conv(x)))


class Plain(nn.Module):
    """A convolution with a bias and nothing behind it, of one to three dimensions."""

    def __init__(self, cin: int, cout: int, dims: int) -> None:
        super().__init__()
        self.dims = dims
        self.conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](cin, cout, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes (1, cin, s, s) to (1, cout, s, s)."""
        n, _, h, w = x.shape
        if self.dims == 1:
            return self.conv(x.flatten(2)).view(n, self.conv.weight.shape[0], h, w)
        return self.conv(x.unsqueeze(2)).squeeze(2) if self.dims == 3 else self.conv(x)


class Transposed(nn.Module):
    """A transposed convolution, which may double the size."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(cin, cout, stride, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes (1, cin, s, s) to (1, cout, stride·s, stride·s)."""
        return torch.relu(self.conv(x))


class Tokens(nn.Module):
    """Linear layers over the channels of every position, as in an MLP of a transformer."""

    def __init__(self, cin: int, cout: int, permuted: bool) -> None:
        super().__init__()
        self.permuted, self.first, self.second = permuted, nn.Linear(cin, 6), nn.Linear(6, cout)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes (1, cin, s, s) to (1, cout, s, s)."""
        if self.permuted:
            return self.second(F.gelu(self.first(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)
        y = self.second(F.gelu(self.first(x.flatten(2).transpose(1, 2))))
        return y.transpose(1, 2).reshape(1, self.second.weight.shape[0], *x.shape[2:])


class Scale(nn.Module):
    """A learned factor, or summand, per channel."""

    def __init__(self, channels: int, add: bool) -> None:
        super().__init__()
        self.add, self.scale = add, nn.Parameter(torch.rand(channels, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape."""
        return x + self.scale if self.add else x * self.scale


class Gate(nn.Module):
    """Squeeze and excite."""

    def __init__(self, channels: int, middle: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, middle, 1), nn.Conv2d(middle, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape."""
        return x * self.up(torch.relu(self.down(F.adaptive_avg_pool2d(x, 1)))).sigmoid()


class Attention(nn.Module):
    """One head of self-attention over positions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Conv2d(channels, channels, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape."""
        q, k, v = (layer(x).flatten(2) for layer in (self.q, self.k, self.v))
        return (v @ (q.transpose(1, 2) @ k).softmax(-1).transpose(1, 2)).view(x.shape)


class C2f(_C2f):
    """Ultralytics' block in the form that splits by a size which it keeps beside its weights."""

    forward = _C2f.forward_split


class Computed(nn.Module):
    """A convolution whose weight is made in the forward pass."""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.weight, self.factor = (
            nn.Parameter(torch.randn(cout, cin, 1, 1) / cin),
            nn.Parameter(torch.rand(cout, 1, 1, 1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Shapes (1, cin, s, s) to (1, cout, s, s)."""
        return F.conv2d(x, self.weight * self.factor)


class Fixed(nn.Module):
    """A view by a number of channels that is kept as an attribute."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape."""
        return x.flatten(2).softmax(-1).view(1, self.channels, *x.shape[2:])


class Anchors(nn.Module):
    """Maps of several sizes, one after another over their positions, then one layer that reads all."""

    def __init__(self, *channels: int) -> None:
        super().__init__()
        self.levels, self.head = nn.ModuleList(Conv(c, 6) for c in channels), nn.Conv1d(6, 2, 1)

    def forward(self, *maps: Tensor) -> Tensor:
        """Return shape (1, 2, positions)."""
        return self.head(torch.cat([level(x).flatten(2) for level, x in zip(self.levels, maps, strict=True)], 2))


class LinearHead(nn.Module):
    """Flatten, then linear: each channel becomes a block of features."""

    def __init__(self, channels: int, pooled: int) -> None:
        super().__init__()
        self.pooled, self.linear = pooled, nn.Linear(channels * pooled**2, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return shape (1, 3)."""
        return self.linear(F.adaptive_avg_pool2d(x, self.pooled).flatten(1))


def shuffle(x: Tensor, groups: int) -> Tensor:
    """Interleave groups of channels, as ShuffleNet does."""
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


# ------------------------------------------------------------------------------------------------------- operations


Shape = tuple[int, ...]


@dataclass(frozen=True)
class Operation:
    """How to make an operation's module, and which arguments fit the shapes that it reads.

    Attributes:
        arguments: from the shapes of the sources, or None where the operation does not fit them.
        fits: for an operation of several tensors, whether another tensor may stand beside the first.
        most: how many tensors it reads at most.
        fresh: whether it writes into a new tensor, so that a later step may work in place there.
    """

    make: Callable[..., nn.Module]
    arguments: Callable[[list[Shape]], st.SearchStrategy[tuple[Any, ...]] | None] = lambda _: st.just(())
    fits: Callable[[Shape, Shape], bool] | None = None
    most: int = 1
    fresh: bool = True


def _new_channels(*more: st.SearchStrategy[Any]) -> Callable[[list[Shape]], st.SearchStrategy[tuple[Any, ...]]]:
    # As many as before is drawn more often: only such layers can be added to what they read, or called again.
    return lambda shapes: st.tuples(
        st.just(shapes[0][1]), st.sampled_from((max(2, shapes[0][1]), *_CHANNELS, max(2, shapes[0][1]))), *more
    )


def _grouped(shapes: list[Shape]) -> st.SearchStrategy[tuple[Any, ...]] | None:
    channels = shapes[0][1]
    groups = [g for g in (2, 3, 4) if channels % g == 0 and channels > g]
    if not groups:
        return None
    return st.sampled_from(groups).flatmap(
        lambda g: st.tuples(
            st.just(channels), st.sampled_from([c for c in _CHANNELS if c % g == 0]), st.just(3), st.just("relu"),
            st.just(1), st.just(g),
        )
    )  # fmt: skip


def _depthwise(shapes: list[Shape]) -> st.SearchStrategy[tuple[Any, ...]] | None:
    channels = shapes[0][1]
    factors = [f for f in (1, 2) if 1 < channels * f <= _MAX_CHANNELS and channels > 1]
    return st.sampled_from(factors).map(lambda f: (channels, channels * f, 3, "silu", 1, channels)) if factors else None


def _divisor(*allowed: int) -> Callable[[list[Shape]], st.SearchStrategy[tuple[Any, ...]] | None]:
    def arguments(shapes: list[Shape]) -> st.SearchStrategy[tuple[Any, ...]] | None:
        found = [n for n in allowed if shapes[0][1] % n == 0]
        return st.sampled_from(found).map(lambda n: (n,)) if found else None

    return arguments


def _size(test: Callable[[int], bool], *arguments: Any) -> Callable[[list[Shape]], Any]:
    return lambda shapes: st.just(arguments) if test(shapes[0][2]) else None


def _split(shapes: list[Shape]) -> st.SearchStrategy[tuple[Any, ...]] | None:
    channels = shapes[0][1]
    return st.integers(1, channels - 1).map(lambda n: (n, channels - n)) if channels > 1 else None


def _channels(*more: Any) -> Callable[[list[Shape]], st.SearchStrategy[tuple[Any, ...]]]:
    return lambda shapes: st.just((shapes[0][1], *more))


def _same_or_gate(first: Shape, second: Shape) -> bool:
    return first[1] == second[1] and second[2] in (first[2], 1)


def _joinable(first: Shape, second: Shape) -> bool:
    return first[2] == second[2] and second[1] <= _MAX_CHANNELS // 2


def _plain(function: Callable[..., Any], **options: Any) -> Operation:
    return Operation(lambda *_: Function(function), **options)


def _binary(function: Callable[[Tensor, Tensor], Tensor], fits: Any = _same_or_gate) -> Operation:
    return _plain(function, fits=fits, most=2)


def _in_place(name: str) -> Callable[[Tensor], Tensor]:
    return lambda x: getattr(F, name)(x * 2, inplace=True)


def _tokens_attend(x: Tensor) -> Tensor:
    tokens = x.flatten(2).transpose(1, 2).unsqueeze(1)
    return F.scaled_dot_product_attention(tokens, tokens, tokens)[:, 0].transpose(1, 2).reshape(x.shape) * 1


_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    **{name: getattr(F, name) for name in (*_ACTIVATIONS, "hardsigmoid", "hardtanh", "softplus")},
    "sigmoid": torch.sigmoid,
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "clamp_": lambda x: (x * 2).clamp_(-0.5, 0.5),
    "clone": lambda x: x.clone(),
    "to": lambda x: x.to(torch.float64).to(torch.float32),
    "contiguous": lambda x: x.contiguous(memory_format=torch.channels_last).contiguous(),
    "detach": lambda x: x.detach() * 2,
    "dropout": lambda x: F.dropout(x, 0.5, training=False) + 1,
    "exp": lambda x: torch.exp(-torch.abs(x)),
    "sqrt": lambda x: torch.sqrt(torch.abs(x)) - 0.5,
    "rsqrt": lambda x: torch.rsqrt(torch.abs(x) + 1),
    "pow": lambda x: x.tanh().pow(2),
    "neg": lambda x: 1 - (-x),
    "max_pool": lambda x: F.max_pool2d(x, 3, 1, 1),
    **{name: getattr(F, name) for name in ("selu", "celu", "hardshrink", "logsigmoid", "softsign")},
    "square": lambda x: x.tanh().square(),
    "log": lambda x: torch.log(torch.exp(-torch.abs(x))),
    "std": lambda x: x * x.std((2, 3), keepdim=True, correction=0),
    "var": lambda x: x + x.var((2, 3), keepdim=True, correction=0),
    "type_as": lambda x: x.type_as(x) * 2,
    "expand_as": lambda x: x.mean((2, 3), keepdim=True).expand_as(x) * 1,
    "select": lambda x: x[:, :, 0].unsqueeze(2) + x,
    "stack": lambda x: torch.stack((x, x.relu()), 2).sum(2),
    "unbind": lambda x: torch.stack(x.unbind(3), 3) * 2,
    "movedim": lambda x: x.movedim(1, -1).sigmoid().movedim(-1, 1) * 1,
    "unflatten": lambda x: x.unflatten(0, (1, 1)).flatten(0, 1) * 2,
    "max": lambda x: x.flatten(2).max(2)[0].view(1, -1, 1, 1) * 1,
    "min": lambda x: x.flatten(2).min(2)[0].view(1, -1, 1, 1) * 1,
    "log_softmax": lambda x: x.flatten(2).log_softmax(-1).view(x.shape),
    "max_pool1d": lambda x: F.max_pool1d(x.flatten(2), 3, 1, 1).view(x.shape) * 1,
    "avg_pool1d": lambda x: F.avg_pool1d(x.flatten(2), 3, 1, 1).view(x.shape) * 1,
    "max_pool3d": lambda x: F.max_pool3d(x.unsqueeze(2), (1, 3, 3), 1, (0, 1, 1)).squeeze(2) * 1,
    "avg_pool3d": lambda x: F.avg_pool3d(F.pad(x, (1, 1, 1, 1)).unsqueeze(2), (1, 3, 3), 1).squeeze(2) * 1,
    "adaptive_avg_pool1d": lambda x: F.adaptive_avg_pool1d(x.flatten(2), 1).unsqueeze(-1) * 1,
    "adaptive_avg_pool3d": lambda x: F.adaptive_avg_pool3d(x.unsqueeze(2), 1).squeeze(2) * 1,
    "attention": _tokens_attend,
    **{f"{name}_": _in_place(name) for name in ("elu", "hardswish", "hardtanh", "leaky_relu", "mish", "relu6")},
    "tanh_": lambda x: (x * 2).tanh_(),
    "sigmoid_": lambda x: (x * 2).sigmoid_(),
    "mul_": lambda x: (x * 2).mul_(x),
    "sub_": lambda x: (x * 2).sub_(x),
    "avg_pool": lambda x: F.avg_pool2d(x, 3, 1, 1),
    "pad": lambda x: F.pad(x, (1, 1, 1, 1))[:, :, 1:-1, 1:-1] * 2,
    "softmax": lambda x: x.flatten(2).softmax(-1).view(x.shape),
    "channel_softmax": lambda x: x.softmax(1),
    "channel_gate": lambda x: x * x.mean(1, keepdim=True).sigmoid(),
    "channel_norm": lambda x: F.layer_norm(x, x.shape[1:]),
    "cumulated": lambda x: x.cumsum(2) / 8,
    "mean": lambda x: x.mean((2, 3), keepdim=True),
    "sum": lambda x: x.sum(3, keepdim=True).mean(2, keepdim=True) / 8,
    "amax": lambda x: x.amax((2, 3)).unsqueeze(-1).unsqueeze(-1),
    "amin": lambda x: x.amin((2, 3)).view(1, -1, 1, 1),
    "adaptive_max": lambda x: F.adaptive_max_pool2d(x, 1),
}

OPERATIONS: dict[str, Operation] = {
    "Conv": Operation(Conv, _new_channels(st.sampled_from([1, 3]), st.sampled_from(_ACTIVATIONS))),
    "Plain": Operation(Plain, _new_channels(st.sampled_from([1, 2, 3]))),
    "Grouped": Operation(Conv, _grouped),
    "Depthwise": Operation(Conv, _depthwise),
    "Down": Operation(
        Conv,
        lambda s: st.sampled_from(_CHANNELS).map(lambda c: (s[0][1], c, 3, "silu", 2)) if s[0][2] > 1 else None,
    ),
    "Transposed": Operation(
        Transposed,
        lambda s: st.tuples(
            st.just(s[0][1]), st.sampled_from(_CHANNELS), st.sampled_from([1, 2]) if s[0][2] < IMGSZ else st.just(1)
        ),
    ),
    "Tokens": Operation(Tokens, _new_channels(st.booleans()), fresh=False),
    "Scale": Operation(Scale, lambda s: st.tuples(st.just(s[0][1]), st.booleans())),
    "Gate": Operation(Gate, lambda s: st.tuples(st.just(s[0][1]), st.sampled_from([2, 4]))),
    "Fixed": Operation(Fixed, _channels(), fresh=False),
    "Attention": Operation(Attention, _channels(), fresh=False),
    "C2f": Operation(C2f, _new_channels(st.just(1), st.booleans())),
    "Computed": Operation(Computed, _new_channels()),
    "InstanceNorm": Operation(
        lambda c: nn.InstanceNorm2d(c, affine=True), lambda s: st.just((s[0][1],)) if s[0][2] > 1 else None
    ),
    "GroupNorm": Operation(  # which has nothing to normalise where a group has one value
        lambda c: nn.GroupNorm(2, c),
        lambda s: st.just((s[0][1],)) if s[0][1] % 2 == 0 and (s[0][1] > 2 or s[0][2] > 1) else None,
    ),
    "Add": _binary(torch.add),
    "Sub": _binary(torch.sub),
    "Mul": _binary(lambda x, y: x * y),
    "Div": _binary(lambda x, y: x / (y.abs() + 1)),
    "Maximum": _binary(torch.maximum),
    "Minimum": _binary(torch.minimum),
    "AddInPlace": _binary(lambda x, y: (x * 1).add_(y)),
    "Cat": _plain(lambda *tensors: torch.cat(tensors, 1), fits=_joinable, most=3),
    "Chunk": Operation(lambda n: Function(lambda x: x.chunk(n, 1)), _divisor(2, 3, 4), fresh=False),
    "Split": Operation(lambda *sizes: Function(lambda x: x.split(sizes, 1)), _split, fresh=False),
    "Slice": Operation(
        lambda n: Function(lambda x: x[:, :n]),
        lambda s: st.integers(1, s[0][1] - 1).map(lambda n: (n,)) if s[0][1] > 1 else None,
        fresh=False,
    ),
    "Shuffle": Operation(lambda n: Function(lambda x: shuffle(x, n)), _divisor(2, 3, 4), fresh=False),
    "Unshuffle": _plain(
        lambda x: F.pixel_unshuffle(x, 2),
        arguments=lambda s: st.just(()) if s[0][2] > 1 and s[0][1] * 4 <= _MAX_CHANNELS else None,
        fresh=False,
    ),
    "PixelShuffle": _plain(
        lambda x: F.pixel_shuffle(x, 2),
        arguments=lambda s: st.just(()) if s[0][2] < IMGSZ and s[0][1] % 4 == 0 else None,
        fresh=False,
    ),
    "MaxPool": _plain(lambda x: F.max_pool2d(x, 2), arguments=_size(lambda s: s > 1)),
    "Nearest": _plain(lambda x: F.interpolate(x, scale_factor=2), arguments=_size(lambda s: s < IMGSZ)),
    "Bilinear": _plain(
        lambda x: F.interpolate(x, size=IMGSZ, mode="bilinear"), arguments=_size(lambda s: s < IMGSZ)
    ),
    "Expand": _plain(
        lambda x: x.expand(-1, -1, IMGSZ, IMGSZ), arguments=_size(lambda s: s == 1), fresh=False
    ),
    "Relu_": _plain(lambda x: x.relu_()),
    "Silu_": _plain(lambda x: F.silu(x, inplace=True)),
    "Again": Operation(nn.Identity),  # see `run`
    "Tied": Operation(Conv),  # see `build`
    **{name: _plain(function) for name, function in _UNARY.items()},
}  # fmt: skip
IN_PLACE = ("Relu_", "Silu_")
HEADS: dict[str, Operation] = {
    "ConvHead": Operation(lambda c: nn.Conv2d(c, 2, 1), _channels()),
    "LinearHead": Operation(LinearHead, lambda s: st.tuples(st.just(s[0][1]), st.sampled_from([1, 2]))),
    "Raw": _plain(lambda x: x * 1),
    "Anchors": Operation(Anchors),
}
OPERATIONS |= HEADS
# What makes structure is drawn more often than what only passes channels on, or freezes them.
_STRUCTURE = (
    *("Conv", "Plain", "Grouped", "Depthwise", "Transposed", "Tokens", "Scale", "Gate", "C2f", "Add", "Mul", "Cat"),
    *("Chunk", "Shuffle", "Again", "Tied"),
)
_KINDS = tuple(kind for kind in (*OPERATIONS, *_STRUCTURE * 3) if kind not in HEADS)


# --------------------------------------------------------------------------------------------------------- strategies


@st.composite
def recipes(draw: st.DrawFn, most_steps: int = 8) -> Recipe:
    """Draw a network. What no step reads has a head, so that nothing is dead."""
    builder = _Builder()
    builder.add(Step("Conv", (3, draw(st.sampled_from(_CHANNELS)), 1, "silu"), (0,)))
    for _ in range(draw(st.integers(0, most_steps - 1))):
        step = _draw_step(draw, builder)
        if step is not None:
            builder.add(step)
    leaves = [number for number in range(1, len(builder.tensors)) if number not in builder.read]
    heads = []
    if len(leaves) > 1 and draw(st.booleans()):
        heads.append(Step("Anchors", tuple(builder.shape(n)[1] for n in leaves), tuple(leaves)))
    else:
        for leaf in leaves:
            kind = draw(st.sampled_from(["ConvHead", "LinearHead", "ConvHead", "Raw"]))
            arguments = HEADS[kind].arguments([builder.shape(leaf)])
            assert arguments is not None
            heads.append(Step(kind, draw(arguments), (leaf,)))
    return Recipe(tuple(builder.steps), tuple(heads))


class _Builder:
    """A recipe in the making, run as it grows: so every tensor's shape is known."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.modules: list[nn.Module] = []
        self.tensors: list[Tensor] = [torch.zeros(1, 3, IMGSZ, IMGSZ)]
        self.fresh: set[int] = set()
        self.read: set[int] = set()

    def shape(self, number: int) -> Shape:
        return tuple(self.tensors[number].shape)

    def add(self, step: Step) -> None:
        module = build(step, self.modules).eval()
        with torch.no_grad():
            made = run(step, module, self.modules, self.tensors)
        if OPERATIONS[step.kind].fresh:
            self.fresh.add(len(self.tensors))
        self.steps.append(step)
        self.modules.append(module)
        self.tensors.extend(made)
        self.read.update(step.sources)


def _draw_step(draw: st.DrawFn, builder: _Builder) -> Step | None:
    kind = draw(st.sampled_from(_KINDS))
    operation = OPERATIONS[kind]
    # Counted from the newest, which makes deep networks rather than broad ones.
    first = len(builder.tensors) - 1 - draw(st.integers(0, min(3, len(builder.tensors) - 2)))
    shape = builder.shape(first)
    if kind in IN_PLACE and first not in builder.fresh:
        return None
    if kind in ("Again", "Tied"):
        return _draw_reuse(draw, builder, kind)
    sources = [first]
    if operation.fits is not None:
        others = [n for n in range(1, len(builder.tensors)) if operation.fits(shape, builder.shape(n))]
        if not others or (kind == "Cat" and shape[1] > _MAX_CHANNELS // 2):
            return None
        sources += draw(st.lists(st.sampled_from(others), min_size=1, max_size=operation.most - 1))
        if sum(builder.shape(n)[1] for n in sources) > 2 * _MAX_CHANNELS:
            return None
    arguments = operation.arguments([builder.shape(n) for n in sources])
    return None if arguments is None else Step(kind, draw(arguments), tuple(sources))


def _draw_reuse(draw: st.DrawFn, builder: _Builder, kind: str) -> Step | None:
    """Draw an earlier layer, and a tensor that it can read."""
    fitting = [
        (number, source)
        for number, step in enumerate(builder.steps)
        for source in range(1, len(builder.tensors))
        if step.kind in ("Conv", "Grouped", "Depthwise") and step.arguments[0] == builder.shape(source)[1]
    ]
    if not fitting:
        return None
    number, source = draw(st.sampled_from(fitting))
    return Step(kind, (number,) if kind == "Again" else (number, *builder.steps[number].arguments), (source,))


def random_choice(graph: Graph, seed: int) -> Choice:
    """Choose random channels under a random target and a random budget; a milder one where that cannot be met."""
    generator = np.random.default_rng(seed)
    scores = [generator.random(group.width) for group in graph.groups]
    budget = Budget(
        multiple_of=int(generator.choice([1, 1, 2, 4])),
        min_width=int(generator.integers(1, 3)),
        max_removed=float(generator.uniform(0.3, 0.95)),
        power_of_two=bool(generator.random() < 0.15),
    )
    kind = ("percent", "macs", "params")[int(generator.integers(3))]
    removed = float(generator.uniform(0.1, 0.7))
    while True:
        try:
            return choose(graph, scores, Target(kind, removed if kind == "percent" else 1 - removed), budget)
        except BudgetError:
            removed = removed / 2 if removed > 0.01 else 0.0
