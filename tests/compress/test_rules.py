"""One operation per network: what it freezes, and that what it lets pass can be cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from compress.channels.graph import build_graph
from compress.checkpoint import structure_hash
from compress.pruning.budget import Target, choose
from compress.pruning.importance import importance
from compress.pruning.oracle import oracle_error
from compress.pruning.plan import make_plan
from compress.pruning.surgery import apply_plan
from compress.settings import Budget
from topologies import Block, randomised

Forward = Callable[[Any, torch.Tensor], Any]
_TWICE = "meets fixed channels in another use of b.conv.weight"
CASES: dict[str, tuple[Forward, dict[str, Callable[[], nn.Module]], dict[str, str]]] = {}


class Net(nn.Module):
    def __init__(self, forward: Forward, modules: dict[str, Callable[[], nn.Module]]) -> None:
        super().__init__()
        self.steps = forward
        for name, make in modules.items():
            self.add_module(name, make())

    def forward(self, x: torch.Tensor) -> Any:
        return self.steps(self, x)


def case(name: str, frozen: dict[str, str] | None = None, **modules: Callable[[], nn.Module]) -> Callable:
    """Register a forward pass over modules; `frozen` names the groups that must stay, and why."""

    def register(forward: Forward) -> Forward:
        CASES[name] = forward, modules, frozen or {}
        return forward

    return register


def block(cin: int = 3, cout: int = 8, stride: int = 1) -> Callable[[], nn.Module]:
    return lambda: Block(cin, cout, stride=stride)


def conv(cin: int = 8, cout: int = 4) -> Callable[[], nn.Module]:
    return lambda: nn.Conv2d(cin, cout, 1)


case("a slice of space, as in Focus", a=block(), b=block(32), head=conv())(
    lambda m, x: m.head(m.b(torch.cat([m.a(x)[..., i::2, j::2] for i in (0, 1) for j in (0, 1)], 1)))
)
case("a slice of channels", {"a.conv": "slice of channels in the model"}, a=block(), b=block(4), head=conv())(
    lambda m, x: m.head(m.b(m.a(x)[:, :4]))
)
case("one channel", {"a.conv": "select of a channel in the model"}, a=block(), b=block(8), head=conv())(
    lambda m, x: m.head(m.b(x := m.a(x)) * x[:, 0].unsqueeze(1))
)
case("a mean without its dimensions", a=block(), b=lambda: nn.Linear(8, 6), head=lambda: nn.Linear(6, 4))(
    lambda m, x: m.head(torch.relu(m.b(m.a(x).mean((2, -1)))))
)
case("a maximum over channels", {"a.conv": "amax over channels in the model"}, a=block(), head=conv())(
    lambda m, x: m.head((x := m.a(x)) * x.amax(1, keepdim=True))
)
case("a sum of everything", {"a.conv": "sum over channels in the model"}, a=block(), head=conv())(
    lambda m, x: m.head((x := m.a(x)) * x.sum())
)
case("softmax over channels", {"a.conv": "softmax over channels in the model"}, a=block(), b=block(8), head=conv())(
    lambda m, x: m.head(m.b(m.a(x).softmax(1)))
)
case("softmax over space", a=block(), b=block(8), head=conv())(lambda m, x: m.head(m.b(m.a(x).softmax(-1))))
case(
    "a grouped transposed convolution",
    {"a.conv": "conv_transpose2d in up has no rule"},
    a=block(),
    up=lambda: nn.ConvTranspose2d(8, 8, 2, 2, groups=2),
    head=conv(),
)(lambda m, x: m.head(m.up(m.a(x))))
case("channels one after another in space", a=block(), b=block(), head=lambda: nn.Conv1d(8, 4, 1))(
    lambda m, x: m.head(torch.cat((m.a(x).flatten(2), m.b(x).flatten(2)), 2))
)
case(
    "parts that are not equal", {"a.conv": "unequal parts [3, 3, 2] in the model"}, a=block(), b=block(2), head=conv(14)
)(lambda m, x: m.head(torch.cat((*m.a(x).chunk(3, 1)[:2], m.b(m.a(x).chunk(3, 1)[2])), 1)))
case("four parts", a=block(3, 16), b=block(4, 4), head=conv(16))(
    lambda m, x: m.head(torch.cat(((p := m.a(x).chunk(4, 1))[0], p[1] * p[2], m.b(p[3]), p[1]), 1))
)
case("parts of space", a=block(), head=conv())(lambda m, x: m.head(sum(m.a(x).chunk(2, 3)) + sum(m.a(x).split(8, 3))))
case("padding of space", a=block(), head=conv())(lambda m, x: m.head(functional.pad(m.a(x), (1, 1, 1, 1))))
case("padding of channels", {"a.conv": "pad in the model has no rule"}, a=block(), head=conv(10))(
    lambda m, x: m.head(functional.pad(m.a(x), (0, 0, 0, 0, 1, 1)))
)
case("expansion over space", a=block(), b=block(8), head=conv())(
    lambda m, x: m.head(m.b(x := m.a(x)) * x.mean((2, 3), keepdim=True).expand_as(x))
)
case("channels last and back", a=block(), b=lambda: nn.Linear(8, 8), head=conv())(
    lambda m, x: m.head(m.b(m.a(x).transpose(1, 3)).transpose(-1, 1))
)
case("a permutation", a=block(), b=lambda: nn.Linear(8, 6), head=lambda: nn.Linear(6, 4))(
    lambda m, x: m.head(m.b(m.a(x).permute(0, 2, 3, 1)))
)
case(
    "a linear layer over space",
    {"a.conv": "channels outside dimension 3 reach b"},
    a=block(),
    b=lambda: nn.Linear(16, 16),
    head=conv(),
)(lambda m, x: m.head(m.b(m.a(x))))
case(
    "channels that cross space",
    {"a.conv": "add in the model has no rule", "b.conv": "add in the model has no rule"},
    a=block(3, 16),
    b=block(3, 16),
    head=conv(16),
)(lambda m, x: m.head(m.a(x) + m.b(x).mean((2, 3)).reshape(1, 1, 1, 16)))
case("numbers and constants", {"b.conv": "meets fixed channels in the model"}, a=block(), b=block(8), head=conv())(
    lambda m, x: m.head(m.b(m.a(x) * 2.0 - 1.0) * torch.linspace(0, 1, 8).reshape(1, 8, 1, 1))
)
case("a matrix product over space, channel by channel", a=block(), b=conv(8, 8), head=conv())(
    lambda m, x: m.head((x := m.a(x)) + (m.b(x) @ x.transpose(2, 3)).softmax(3))
)
case(
    "a matrix product of channels with channels",
    {"a.conv": "product of channels in the model", "b": "product of channels in the model"},
    a=block(),
    b=conv(8, 8),
    head=conv(),
)(lambda m, x: m.head((m.b(x := m.a(x)).flatten(2) @ x.flatten(2).transpose(1, 2) @ x.flatten(2)).reshape(x.shape)))
case("a maximum of two", a=block(), b=block(), head=conv())(lambda m, x: m.head(torch.maximum(m.a(x), m.b(x))))
case("a quotient", a=block(), b=block(), head=conv())(lambda m, x: m.head(m.a(x) / (m.b(x).abs() + 1.0)))
case("instance norm", a=block(), b=lambda: nn.InstanceNorm2d(8, affine=True), head=conv())(
    lambda m, x: m.head(m.b(m.a(x)))
)
case("one map read twice", a=block(), head=conv(16))(lambda m, x: m.head(torch.cat((m.a(x),) * 2, 1)))
case(
    "maps flattened side by side",
    a=block(stride=2),
    b=block(3, 4, 2),
    c=lambda: nn.Linear(768, 6),
    head=lambda: nn.Linear(6, 3),
)(lambda m, x: m.head(m.c(torch.cat((m.a(x).flatten(1), m.b(x).flatten(1)), 1))))
case("a tower for two scales", a=block(), b=block(8, stride=2), c=block(8), head=conv())(
    lambda m, x: (m.head(m.c(m.a(x))), m.head(m.c(m.b(m.a(x)))))
)
case("a nearest neighbour twice as large", a=block(), b=block(8, stride=2), head=conv(16))(
    lambda m, x: m.head(torch.cat((x := m.a(x), functional.interpolate(m.b(x), scale_factor=2)), 1))
)
case(
    "a weight that is computed",
    {"a.conv": "the model computes its weight in the forward pass"},
    a=block(),
    b=conv(8, 8),
    head=conv(),
)(lambda m, x: m.head(functional.conv2d(m.a(x), m.b.weight * 0.5)))
case("a bias that is computed", a=block(), b=conv(8, 8), head=conv())(
    lambda m, x: m.head(functional.conv2d(m.a(x), m.b.weight, m.b.bias * 0.5))
)
case("one layer at two depths", a=block(), b=block(8), c=block(8), head=conv())(
    lambda m, x: m.head(m.b(m.c(m.b(m.a(x)))))
)
case(
    "one layer that reads an image and a map",
    {"b.conv": "meets fixed channels in another use of b.conv.weight"},
    b=block(3, 3),
    head=conv(3),
)(lambda m, x: m.head(m.b(m.b(x))))
case("masks among the outputs", {"head": "gt in the model has no rule"}, a=block(), head=conv())(
    lambda m, x: (m.head(m.a(x)), m.head(m.a(x)) > 0)
)
case("a weight that is also read as a whole", {"b.conv": _TWICE, "a.conv": _TWICE}, a=block(), b=block(8), head=conv())(
    lambda m, x: m.head(m.b(m.a(x))) * m.b.conv.weight.mean()
)
case(
    "a weight that an operation without a rule reads too",
    {"b.conv": "meets fixed channels in another use of b.bn.weight"},
    a=block(),
    b=block(8),
    head=conv(),
)(lambda m, x: m.head(m.b(m.a(x))) * torch.linalg.norm(m.b.bn.weight))
case("a buffer among the outputs", a=block(), n=lambda: nn.BatchNorm2d(4), head=conv())(
    lambda m, x: (m.head(m.a(x)), m.n.running_mean)
)


class Kernel(nn.Module):
    """A depthwise kernel that no checkpoint holds, so that no cut of it could be loaded again."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kernel", torch.rand(8, 1, 3, 3), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.conv2d(x, self.get_buffer("kernel"), padding=1, groups=8)


case(
    "a kernel that is not stored",
    {"a.conv": "k computes its weight in the forward pass"},
    a=block(),
    k=Kernel,
    b=block(8),
    head=conv(),
)(lambda m, x: m.head(m.b(m.k(m.a(x)))))
case("a batch norm without scales", a=block(), n=lambda: nn.BatchNorm2d(8, affine=False), head=conv())(
    lambda m, x: m.head(m.n(m.a(x)))
)
case("one map for all channels", a=block(), gate=conv(8, 1), b=block(8), head=conv())(
    lambda m, x: m.head(m.b(y := m.a(x)) * m.gate(y).sigmoid().expand_as(y))
)
case("a convolution without a batch", a=block(), b=conv(8, 8), up=lambda: nn.ConvTranspose2d(8, 6, 2, 2), head=conv(6))(
    lambda m, x: m.head(m.up(m.b(m.a(x).squeeze(0))).unsqueeze(0))
)
case("a pool over channels", {"a.conv": "avg_pool1d over channels in the model"}, a=block(), b=block(8), head=conv())(
    lambda m, x: m.head(m.b(functional.avg_pool1d(m.a(x).flatten(2).mT, 3, 1, 1).mT.unflatten(2, (16, 16))))
)
case("a bound for each channel", {"a.conv": "clamp in the model has no rule"}, a=block(), b=conv(8, 8), head=conv())(
    lambda m, x: m.head(torch.clamp(m.a(x), max=m.b.bias.reshape(8, 1, 1)))
)
case(
    "a sum over no dimension, which is all", {"b": "sum over channels in the model"}, a=block(), b=conv(), head=conv()
)(lambda m, x: m.head(m.a(x)) + m.b(m.a(x)).sum(dim=[]))


case("another type of numbers", a=block(), b=block(8, 8), head=conv())(
    lambda m, x: m.head(m.b(m.a(x).double().float()).softmax(-1).to(x.dtype))
)
case("other names of known operations", a=block(), b=block(8, 8), c=block(16), head=conv())(
    lambda m, x: m.head(
        m.c(
            torch.concatenate(
                [torch.clip(m.a(x), 0, 6).multiply(2.0), m.b(torch.absolute(m.a(x))).swapaxes(2, 3).true_divide(3.0)], 1
            )
        )
    )
)
case("mirrored and rolled in space", a=block(), b=block(8, 8), head=conv())(
    lambda m, x: m.head(m.b(m.a(x).flip(-1)).roll(1, 2))
)
case("rolled over channels", {"a.conv": "roll in the model has no rule"}, a=block(), b=block(8, 8), head=conv())(
    lambda m, x: m.head(m.b(m.a(x).roll(1, 1)))
)
case("mirrored among channels", {"a.conv": "flip in the model has no rule"}, a=block(), b=block(8, 8), head=conv())(
    lambda m, x: m.head(m.b(m.a(x).flip((1, 2))))
)
case("an input that is changed in place", a=block(), b=block(8, 8), head=conv())(
    lambda m, x: m.head(m.b(m.a(x.sub_(0.5))))
)


def without_gradient(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.a(x)
    with torch.no_grad():
        z = m.b(y)
    return m.head(m.c(y + z))


case(
    "a part without gradients",
    {"a.conv": "wrap_with_set_grad_enabled in the model has no rule"},
    a=block(),
    b=block(8, 8),
    c=block(8, 8),
    head=conv(),
)(without_gradient)


def test_what_the_forward_pass_counts_stays_as_it_is() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = Block(3, 8), Block(8, 8), nn.Conv2d(8, 4, 1)
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return self.head(self.b(self.a(x)))

    model: Any = randomised(Counting())
    build_graph(model, 16)
    assert model.calls.tolist() == [0.0]


def test_macs_count_what_is_folded_into_the_batch() -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.rows = nn.Conv2d(3, 8, 1), nn.Conv1d(8, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.rows(self.a(x)[0].transpose(0, 1))

    assert build_graph(Rows(), 16).positions == {"a.weight": 256, "rows.weight": 256}


@pytest.mark.parametrize("name", CASES)
def test_an_operation(name: str) -> None:
    forward, modules, expected = CASES[name]
    model = randomised(Net(forward, modules))
    graph = build_graph(model, 16)
    frozen = {group: reason for group, reason in graph.frozen().items() if not reason.endswith("output of the model")}
    assert {group: reason for group, reason in frozen.items() if group in expected} == expected
    assert bool(frozen) == bool(expected)
    if all(group.frozen for group in graph.groups):
        return
    removed = 0
    for seed in range(2):
        scores = importance(graph, model, "random", seed)
        choice = choose(graph, scores, Target("percent", 0.4), Budget(multiple_of=1, min_width=1, max_removed=0.9))
        plan = make_plan(graph, choice, structure_hash(model), "test", "random")
        pruned = apply_plan(model, plan)
        assert sum(p.numel() for p in pruned.parameters()) == graph.params(choice.widths)
        assert oracle_error(graph, pruned, choice.keep, torch.rand(1, 3, 16, 16)) < 1e-5
        removed += int((graph.widths - choice.widths).sum())
    assert removed > 0


def test_two_layers_with_one_weight_stay_one() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.head = conv(3, 8)(), conv(8, 8)(), conv(8, 8)(), conv()()
            self.c.weight = self.b.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.relu(self.c(torch.relu(self.b(torch.relu(self.a(x)))))))

    model = Shared()
    graph = build_graph(model, 16)
    scores = importance(graph, model, "random", 0)
    choice = choose(graph, scores, Target("percent", 0.4), Budget(multiple_of=1, min_width=1, max_removed=0.9))
    pruned: Any = apply_plan(model, make_plan(graph, choice, structure_hash(model), "test", "random"))
    assert pruned.c.weight is pruned.b.weight
    assert pruned.b.weight.shape[0] < 8
    assert oracle_error(graph, pruned, choice.keep, torch.rand(1, 3, 16, 16)) < 1e-5
