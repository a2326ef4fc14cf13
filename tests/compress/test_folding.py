"""What a removed channel sends on average goes on being sent."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress.pruning.consumers import find_consumers
from compress.pruning.folding import fold_removed
from compress.pruning.plan import Plan
from cuts import cut
from topologies import randomised


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


class Block(nn.Module):
    """A convolution, a batch norm, an activation that lets no value through as it is."""

    def __init__(self, cin: int, cout: int, k: int = 1, groups: int = 1, bias: bool = False, norm: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, k, groups=groups, bias=bias)
        self.bn = nn.BatchNorm2d(cout) if norm else nn.Identity()
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Chain(nn.Module):
    """Two blocks and a head."""

    def __init__(self, k: int = 1, bias: bool = False, norm: bool = True) -> None:
        super().__init__()
        self.a, self.b, self.head = Block(3, 6, 3), Block(6, 5, k, bias=bias, norm=norm), nn.Conv2d(5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x)))


class Concat(nn.Module):
    """The constant channels come second in what the consumer reads."""

    def __init__(self) -> None:
        super().__init__()
        self.other, self.a, self.b, self.head = Block(3, 4, 3), Block(3, 6, 3), Block(10, 5), nn.Conv2d(5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(torch.cat([self.other(x), self.a(x)], 1)))


class Depthwise(nn.Module):
    """A channel is removed with the depthwise filter that reads it; what that made is folded behind."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.wise, self.b, self.head = Block(3, 6, 3), Block(6, 6, 3, 6), Block(6, 5), nn.Conv2d(5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.wise(self.a(x))))


class Classifier(nn.Module):
    """A linear layer reads the mean of each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = Block(3, 6, 3), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.a(x).mean((2, 3)))


def with_constants(model: nn.Module, layer: str = "a") -> Any:
    """Make channels 1 and 4 of a block the same everywhere: act(β)."""
    randomised(model)
    norm: Any = model.get_submodule(layer).bn
    with torch.no_grad():
        norm.weight[[1, 4]] = 0.0
        norm.bias[[1, 4]] = torch.tensor([1.5, -0.8])
    return model.eval()


def folded(model: nn.Module, pruned: nn.Module, plan: Plan, batches: list[Tensor]) -> Any:
    pruned = copy.deepcopy(pruned)
    fold_removed(pruned, model, find_consumers(model, plan, batches[0][:1]), batches)
    return pruned


def noise(count: int = 4) -> Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(count))


CASES = {
    "batch norm": Chain,
    "kernel": lambda: Chain(k=3),
    "bias alone": lambda: Chain(bias=True, norm=False),
    "bias before batch norm": lambda: Chain(bias=True),
    "concat": Concat,
    "depthwise": Depthwise,
    "linear": Classifier,
}


@pytest.mark.parametrize("name", CASES)
def test_a_constant_channel_is_replaced_exactly(name: str) -> None:
    model = with_constants(CASES[name]())
    pruned, plan = cut(model, {"a.conv": [1, 4]})
    mended = folded(model, pruned, plan, [noise()])
    with torch.no_grad():
        expected, without, found = (network(noise(3)) for network in (model, pruned, mended))
    assert (without - expected).abs().max() > 1e-3
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_a_consumer_that_loses_outputs_too() -> None:
    """Of b, output 3 goes as well; it is constant too, so nothing is lost."""
    model = with_constants(Chain())
    with torch.no_grad():
        model.b.bn.weight[3], model.b.bn.bias[3] = 0.0, 2.0
    pruned, plan = cut(model, {"a.conv": [1, 4], "b.conv": [3]})
    mended = folded(model, pruned, plan, [noise()])
    with torch.no_grad():
        torch.testing.assert_close(mended(noise(3)), model(noise(3)), atol=1e-5, rtol=0)


def test_the_mean_counts_every_image_alike() -> None:
    """A last batch of one weighs as one image of five; the mean of what a 1 × 1 convolution returns is then kept."""
    model: Any = randomised(Chain(k=1, bias=True, norm=False)).eval()
    pruned, plan = cut(model, {"a.conv": [0, 2]})
    batches = [noise(4), 3 * noise(1)]
    mended = folded(model, pruned, plan, batches)
    with torch.no_grad():
        expected, found = (m.b.conv(m.a(torch.cat(batches))).mean((0, 2, 3)) for m in (model, mended))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_only_offsets_change_and_the_dense_model_does_not() -> None:
    model = with_constants(Depthwise())
    before = copy.deepcopy(model.state_dict())
    pruned, plan = cut(model, {"a.conv": [1, 4]})
    mended = folded(model, pruned, plan, [noise()])
    changed = {n for n, v in mended.state_dict().items() if not torch.equal(v, pruned.state_dict()[n])}
    assert changed == {"b.bn.running_mean"}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(not value.is_inference() for value in mended.state_dict().values())


class Odd(nn.Module):
    """Consumers with no place for a constant, or whose output is not what the batch norm reads."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.a, self.bn = way, Block(3, 6, 3), nn.BatchNorm2d(6)
        self.b = nn.Conv2d(6, 6, 1, groups=2 if way == "grouped" else 1, bias=False)
        self.c = nn.Conv2d(6, 6, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.way == "in place":
            return self.bn(torch.relu_(self.b(x)))
        if self.way == "scaled":
            return self.bn(2 * self.b(x))
        if self.way == "one norm of two":
            return self.bn(self.b(x)) + self.bn(self.c(x))
        return self.bn(self.b(x)) if self.way == "grouped" else self.b(x)


@pytest.mark.parametrize("way", ["in place", "scaled", "one norm of two", "grouped", "nothing behind"])
def test_what_has_no_place_for_a_constant_is_left(way: str) -> None:
    model = with_constants(Odd(way))
    pruned, plan = cut(model, {"a.conv": [1] if way == "grouped" else [1, 4]})  # 1 and 4 have one place in their groups
    mended = folded(model, pruned, plan, [noise()])
    assert all(torch.equal(value, pruned.state_dict()[name]) for name, value in mended.state_dict().items())
    consumers = find_consumers(model, plan, noise(1))
    assert [c.name for c in consumers] == ([] if way == "grouped" else ["b", "c"] if "two" in way else ["b"])


class Shared(nn.Module):
    """One layer runs twice, another never, a third shares its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.never = nn.Conv2d(6, 5, 1)
        self.b, self.c, self.d = nn.Conv2d(6, 5, 1), nn.Conv2d(6, 5, 1), nn.Conv2d(6, 5, 1)
        self.a = Block(3, 6, 3)
        self.d.weight = self.c.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = self.c(x) + self.d(x) + self.b(x) + self.b(2 * x)
        return y + self.never(x) if self.training else y


def test_a_layer_that_shares_its_bias_is_left() -> None:
    """What mends one would change the other."""
    model = with_constants(Shared())
    model.never.bias = model.b.bias
    _, plan = cut(model, {"a.conv": [1, 4]})
    assert find_consumers(model, plan, noise(1)) == []


def test_consumers_are_those_that_run() -> None:
    model = with_constants(Shared())
    _, plan = cut(model, {"a.conv": [1, 4]})
    found = find_consumers(model, plan, noise(1))
    assert [(consumer.name, consumer.norm, consumer.calls) for consumer in found] == [("b", None, 2)]
    assert found[0].inputs.tolist() == [True, False, True, True, False, True]
    assert found[0].outputs.tolist() == [True] * 5
