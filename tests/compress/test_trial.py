"""What a module cannot do without is found by cutting it on trial."""

from __future__ import annotations

import torch
from torch import nn

from compress.channels import ultralytics_modules as known
from compress.channels.graph import build_graph
from compress.pruning import attributes
from topologies import Block, randomised


class Counting(nn.Module):
    """Divides by the number of channels that it finds, so that it computes something else when one is gone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / x.shape[1]


class Chopping(nn.Module):
    """Hands on 8 · 16 · 16 numbers in a shape of its own: the layer after it is the one that fails."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(1, -1, 16, 16) if x.shape[1] == 8 else x.reshape(1, 1, -1)


class Between(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.a, self.blocks, self.b, self.head = Block(3, 8), nn.Sequential(*blocks), Block(8, 8), nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.b(self.blocks(self.a(x))))


def frozen(model: nn.Module) -> dict[str, str]:
    return {name: why for name, why in build_graph(randomised(model), 16).frozen().items() if name != "head"}


def test_a_module_that_counts_its_channels_keeps_them() -> None:
    assert frozen(Between(Counting())) == {"a.conv": "the model computes something else with fewer channels"}


def test_a_module_that_breaks_the_layer_after_it_keeps_its_channels() -> None:
    found = frozen(Between(Chopping()))
    assert list(found) == ["a.conv"]
    assert "fewer channels" in found["a.conv"]


def test_strangers_modules_that_survive_are_cut() -> None:
    class Doubling(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    assert frozen(Between(Doubling(), nn.Sequential(), Doubling())) == {}  # an empty sequence hands on its input


def test_only_the_guilty_of_two_modules_is_frozen() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.counting, self.head = Block(3, 8), Block(8, 6), Counting(), nn.Conv2d(6, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.counting(self.b(self.a(x))))

    assert list(frozen(Two())) == ["b.conv"]


class Strict(nn.Module):
    """Takes 8 channels and no other number, and does nothing of its own with them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Block(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.shape[1] == 8
        return self.inner(x)


def test_a_module_that_refuses_other_widths_keeps_its_input() -> None:
    assert frozen(Between(Strict())) == {"a.conv": "blocks.0 does not run with fewer channels"}


def test_of_one_module_only_the_guilty_channels_are_frozen() -> None:
    class Once(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = Block(3, 8), Block(8, 8), Block(8, 6), Block(8, 6)
            self.head = nn.Conv2d(6, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.a(x)
            x = x + self.b(x)
            y = self.d(x * 2.0)
            return self.head(self.c(x).view(1, 6, 16, 16) * y)

    assert frozen(Once()) == {"d.conv": "Once does not run with fewer channels"}


def test_a_subclass_with_other_parts_is_cut() -> None:
    from ultralytics.nn.modules.block import C2f

    class Own(C2f):
        def __init__(self) -> None:
            super().__init__(8, 8)
            self.cv1 = nn.Conv2d(8, 2 * self.c, 1)  # type: ignore[assignment]

    assert frozen(Between(Own())) == {}


def test_writing_through_a_view_does_not_freeze() -> None:
    class Writing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.clone()
            x.view(-1).mul_(2.0)
            x[:, :, ::2].add_(1.0)
            return x

    assert frozen(Between(Writing())) == {}


def test_the_model_stays_as_it_was() -> None:
    model = Between(Counting())
    before = {name: value.clone() for name, value in randomised(model).state_dict().items()}
    build_graph(model, 16)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_known_modules_are_not_tried(monkeypatch) -> None:
    """A trial costs two runs of the model."""

    def refuse(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr("compress.channels.trial._cut_half", refuse)
    from compress.checkpoint import build_model

    build_graph(build_model("yolo26n.yaml", nc=3), 64)
    build_graph(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)).eval(), 16)


def test_modules_that_are_known_by_name_are_known_everywhere() -> None:
    from ultralytics.nn.modules import block, conv, head

    by_attribute = known.EQUAL_SPLITS | known.FREE_SPLITS | known.WHOLE_ROWS
    assert by_attribute <= known.TRIED
    assert by_attribute <= set(attributes._REFRESH)  # else a cut would leave their numbers as they were
    assert not known.EQUAL_SPLITS & known.FREE_SPLITS
    assert [name for name in known.TRIED if not any(hasattr(module, name) for module in (block, conv, head))] == []
