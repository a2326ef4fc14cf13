"""What reads removed channels learns to do without them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from compress.pruning import batches, reconstruction
from compress.pruning.batches import batches_again
from compress.pruning.consumers import Consumer, find_consumers
from compress.pruning.folding import fold_removed
from compress.pruning.plan import Plan
from compress.pruning.reconstruction import _patches, reconstruct, samples, targets
from cuts import cut, noise_images
from topologies import randomised

IMGSZ = 32


class Net(nn.Module):
    """Layers in another order than they run in; b reads what loses channels, c what b makes of it."""

    def __init__(self, padding: int = 0, bias: bool = False) -> None:
        super().__init__()
        self.c, self.bn_c = nn.Conv2d(6, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.b, self.bn_b = nn.Conv2d(5, 6, 3, padding=padding, stride=2, bias=bias), nn.BatchNorm2d(6)
        self.a = nn.Conv2d(3, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn_c(self.c(functional.silu(self.bn_b(self.b(self.a(x))))))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    return noise_images(tmp_path, 20)


def prepared(model: nn.Module, removed: dict[str, list[int]]) -> tuple[Any, Plan, list[Consumer]]:
    pruned, plan = cut(model, removed, IMGSZ)
    return pruned, plan, find_consumers(model, plan, torch.rand(1, 3, IMGSZ, IMGSZ))


def outputs(*networks: nn.Module) -> list[Tensor]:
    image = torch.rand(2, 3, IMGSZ, IMGSZ, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        return [network.eval()(image) for network in networks]


def error(pruned: nn.Module, model: nn.Module, consumer: Consumer, images: list[Path]) -> float:
    pixels = batches_again(model, images, IMGSZ)
    wanted = targets(model, [consumer], pixels, len(images), 0)[consumer.name]
    return sum(float(lacking.square().sum()) for _, lacking in samples(pruned, consumer, wanted, pixels))


@pytest.mark.parametrize(("padding", "constant"), [(0, 3.0), (1, 0.0)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_combination_of_kept_channels_is_not_missed(
    images: list[Path], bias: bool, padding: int, constant: float
) -> None:
    """Zero padding does not send the constant, so it is exact with padding only without one."""
    model: Any = randomised(Net(padding, bias))
    with torch.no_grad():
        model.a.weight[1] = 0.5 * model.a.weight[0] - 2.0 * model.a.weight[3]
        model.a.bias[1] = 0.5 * model.a.bias[0] - 2.0 * model.a.bias[3] + constant
    pruned, _, consumers = prepared(model, {"a": [1]})
    assert [consumer.name for consumer in consumers] == ["b"]
    expected, without = outputs(model, pruned)
    reconstruct(pruned, model, consumers, images, IMGSZ, ridge=1e-10)
    assert (without - expected).abs().max() > 0.1
    torch.testing.assert_close(outputs(pruned)[0], expected, atol=1e-3, rtol=0)


def test_without_data_nothing_moves() -> None:
    model: Any = randomised(Net())
    pruned, _, consumers = prepared(model, {"a": [1, 2]})
    before = copy.deepcopy(pruned.state_dict())
    reconstruct(pruned, model, consumers, [], IMGSZ)
    assert all(torch.equal(value, before[name]) for name, value in pruned.state_dict().items())


@pytest.mark.parametrize("ridge", [1e-6, 1e-3, 1.0, 1e6])
def test_the_sampled_error_never_grows(images: list[Path], ridge: float) -> None:
    model: Any = randomised(Net(padding=1))
    pruned, _, consumers = prepared(model, {"a": [1, 2], "b": [0, 4]})
    assert [consumer.name for consumer in consumers] == ["b", "c"]
    before = error(pruned, model, consumers[0], images)
    reconstruct(pruned, model, consumers[:1], images, IMGSZ, ridge=ridge)
    after = error(pruned, model, consumers[0], images)
    assert after < before * (0.9 if ridge < 1 else 1.0)


def test_later_layers_see_what_earlier_ones_return_now(images: list[Path]) -> None:
    model: Any = randomised(Net())
    pruned, _, consumers = prepared(model, {"a": [1, 2], "b": [0, 4]})
    after_first, alone = copy.deepcopy(pruned), copy.deepcopy(pruned)
    reconstruct(pruned, model, consumers, images, IMGSZ)
    for consumer in consumers:
        reconstruct(after_first, model, [consumer], images, IMGSZ)
    reconstruct(alone, model, consumers[1:], images, IMGSZ)
    torch.testing.assert_close(pruned.c.weight, after_first.c.weight)
    assert (pruned.c.weight - alone.c.weight).abs().max() > 1e-3
    expected, found, late = outputs(model, pruned, alone)
    assert (found - expected).square().mean() < (late - expected).square().mean()


def test_what_folding_has_mended_is_not_mended_again(images: list[Path]) -> None:
    """A constant channel is gone without a trace: nothing lacks, in the outputs less what batch norm subtracts."""
    model: Any = randomised(Net())
    with torch.no_grad():
        model.a.weight[1] = 0.0
        model.a.bias[1] = 2.0
    pruned, _, consumers = prepared(model, {"a": [1]})
    assert error(pruned, model, consumers[0], images) > 1.0
    fold_removed(pruned, model, consumers, [torch.rand(2, 3, IMGSZ, IMGSZ)])
    assert error(pruned, model, consumers[0], images) < 1e-6
    before = copy.deepcopy(pruned.state_dict())
    reconstruct(pruned, model, consumers, images, IMGSZ)
    for name, value in pruned.state_dict().items():
        torch.testing.assert_close(value, before[name], atol=1e-5, rtol=0)


def test_weights_and_offsets_change_alone(images: list[Path]) -> None:
    model: Any = randomised(Net())
    known = copy.deepcopy(model.state_dict())
    pruned, _, consumers = prepared(model, {"a": [1]})
    before = copy.deepcopy(pruned.state_dict())
    reconstruct(pruned, model, consumers, images, IMGSZ)
    changed = {name for name, value in pruned.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"b.weight", "bn_b.running_mean"}
    assert all(torch.equal(value, known[name]) for name, value in model.state_dict().items())
    pruned.train()(torch.rand(2, 3, IMGSZ, IMGSZ)).sum().backward()  # it can be trained on


def test_the_pass_stops_at_the_layer(images: list[Path]) -> None:
    model: Any = randomised(Net())
    pruned, _, consumers = prepared(model, {"a": [1]})
    ran: list[int] = []
    pruned.c.register_forward_pre_hook(lambda *_: ran.append(1))
    pixels = batches_again(model, images, IMGSZ)
    wanted = targets(model, consumers, pixels, len(images), 0)["b"]
    sampled = list(samples(pruned, consumers[0], wanted, pixels))
    assert (len(sampled), ran) == (2, [])
    # 20 images of 15 × 15 outputs: at least 4096 positions of these, shared by the batches of 16 and of 4.
    assert [len(patches) for patches, _ in sampled] == [3277, 820]


def test_targets_that_fill_the_memory_are_taken_in_turns(images: list[Path], monkeypatch) -> None:
    model: Any = randomised(Net())
    pruned, _, consumers = prepared(model, {"a": [1, 2], "b": [0, 4]})
    passes: list[int] = []
    model.a.register_forward_pre_hook(lambda *_: passes.append(1))
    reconstruct(copy.deepcopy(pruned), model, consumers, images, IMGSZ)
    assert len(passes) == 2  # batches
    monkeypatch.setattr(reconstruction, "_TARGET_BYTES", 4096 * 4 * 4)
    reconstruct(pruned, model, consumers, images, IMGSZ)
    assert len(passes) == 2 + 4


def test_images_that_fill_the_memory_are_read_for_every_pass(images: list[Path], monkeypatch) -> None:
    held = batches_again(nn.Conv2d(3, 1, 1), images, IMGSZ)
    monkeypatch.setattr(batches, "_HELD_BYTES", 20 * 3 * IMGSZ**2 * 4 - 1)
    again = batches_again(nn.Conv2d(3, 1, 1), images, IMGSZ)
    assert isinstance(held, list)
    assert not isinstance(again, list)
    for _ in range(2):
        assert all(torch.equal(one, other) for one, other in zip(held, again, strict=True))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False),
        nn.Conv2d(3, 4, (1, 3), padding=(0, 1), bias=False),
        nn.Conv2d(3, 4, 3, padding=2, dilation=2, bias=False),
        nn.Conv2d(3, 4, 1, bias=False),
    ],
)
def test_patches_times_weights_are_outputs(layer: nn.Conv2d) -> None:
    inputs = torch.rand(2, 3, 9, 7)
    with torch.no_grad():
        output = layer(inputs)
        places = torch.arange(output[:, 0].numel())
        image, row, column = torch.unravel_index(places, output[:, 0].shape)
        found = _patches(layer, inputs, image, row, column) @ layer.weight.flatten(1).T
    torch.testing.assert_close(found, output.movedim(1, -1).flatten(0, 2))
