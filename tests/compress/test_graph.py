from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from compress.channels.graph import build_graph
from compress.channels.slots import FIXED, reshape
from compress.checkpoint import build_model
from compress.errors import GraphError
from topologies import ALL, Chain, ChannelShuffle, ChunkTie, Concat, Grouped, Residual, SpatialGate, SplitFixed


def groups_of(model: nn.Module) -> dict[str, tuple[int, str | None]]:
    return {group.name: (group.width, group.frozen) for group in build_graph(model.eval(), 16).groups}


def test_a_chain_has_one_group_a_layer() -> None:
    found = groups_of(Chain())
    assert found == {"a.conv": (8, None), "b.conv": (12, None), "head": (4, "output of the model")}


def test_residual_layers_share_one_group() -> None:
    group = build_graph(Residual().eval(), 16).groups[0]
    assert group.layers == ("a.conv", "a.bn", "b.conv", "b.bn", "c.conv", "c.bn")
    assert group.consumers == ("b.conv", "c.conv", "head")


def test_concatenation_keeps_the_order_of_its_inputs() -> None:
    """head reads c (10), then a (8), then b (6)."""
    graph = build_graph(Concat().eval(), 16)
    names = [group.name for group in graph.groups]
    axis = next(axis for axis in graph.axes if axis.tensor == "head.weight" and axis.dim == 1)
    runs = [names[index] for index in axis.group[[0, 10, 18]]]
    assert runs == ["c.conv", "a.conv", "b.conv"]
    assert axis.unit.tolist() == [*range(10), *range(8), *range(6)]


def test_halves_of_a_chunk_are_tied() -> None:
    graph = build_graph(ChunkTie().eval(), 16)
    halves = [group for group in graph.groups if group.name.startswith("a.conv")]
    assert [half.name for half in halves] == ["a.conv[0:8]", "a.conv[8:16]"]
    assert halves[0].tie == halves[1].tie
    assert "b.conv" in halves[1].layers  # added to the second half only


def test_an_unknown_split_is_frozen_and_named() -> None:
    found = groups_of(SplitFixed())
    assert found["a.conv"] == (12, "split into fixed sizes [8, 4] in the model")
    assert found["b.conv"] == (6, None)


def test_columns_of_a_grouped_convolution_go_together() -> None:
    """16 channels in 4 groups: column j of each group is one unit, so 4 units of 4 slots."""
    graph = build_graph(Grouped().eval(), 16)
    assert graph.groups[0].width == 4
    parts = [group for group in graph.groups if group.name.startswith("grouped")]
    assert [part.width for part in parts] == [6, 6, 6, 6]
    assert len({part.tie for part in parts}) == 1


def test_a_mean_over_channels_freezes_what_reaches_it() -> None:
    found = groups_of(SpatialGate())
    assert found["a.conv"] == (8, "mean over channels in the model")
    assert found["b.conv"] == (8, None)


def test_a_channel_shuffle_is_followed_through_reshape_and_transpose() -> None:
    graph = build_graph(ChannelShuffle().eval(), 16)
    axis = next(axis for axis in graph.axes if axis.tensor == "head.weight" and axis.dim == 1)
    maker = next(axis for axis in graph.axes if axis.tensor == "a.conv.weight" and axis.dim == 0)
    assert maker.unit.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]  # column i of both halves lives and dies together
    assert axis.unit.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(("name", "kind"), ALL.items())
def test_params_and_macs_at_full_width(name: str, kind: type[nn.Module]) -> None:
    model = kind().eval()
    graph = build_graph(model, 16)
    assert graph.params(graph.widths) == sum(p.numel() for p in model.parameters()), name
    assert graph.macs(graph.widths) > 0


@pytest.mark.parametrize("name", ["yolov10n.yaml", "yolo26n-seg.yaml", "yolov8n.yaml"])
def test_costs_are_those_of_inference(name: str) -> None:
    """What an end-to-end model has for training alone, a second head above all, costs nothing on a device."""
    model = build_model(name).eval()
    graph = build_graph(model, 64)
    head: Any = model.model[-1]  # type: ignore[index]
    head.fuse()
    assert graph.params(graph.widths) == sum(p.numel() for p in model.parameters())
    counted = 0

    def count(module: Any, inputs: Any, output: torch.Tensor) -> None:
        nonlocal counted
        maps = inputs[0] if isinstance(module, nn.ConvTranspose2d) else output
        counted += maps.shape[2] * maps.shape[3] * module.weight.numel()

    for name_of, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) and "dfl" not in name_of:  # the decoder's
            module.register_forward_hook(count)
    with torch.inference_mode():
        model(torch.zeros(1, 3, 64, 64))
    assert graph.macs(graph.widths) == counted


def test_macs_by_hand() -> None:
    """Chain at 16 px: 256 · (3·8·9 + 8·12·9 + 12·4) = 256 · 1128; halving b: 256 · (216 + 432 + 24)."""
    graph = build_graph(Chain().eval(), 16)
    assert graph.macs(graph.widths) == 256 * 1128
    halved = np.array([8, 6, 4])
    assert graph.macs(halved) == 256 * 672
    assert graph.macs.saving(graph.widths, {1: 6}) == 256 * (1128 - 672)
    assert graph.macs.saving(graph.widths, {0: 2, 1: 6}) == 256 * (1128 - (3 * 6 * 9 + 6 * 6 * 9 + 6 * 4))


def test_both_heads_of_an_end_to_end_model_are_in_the_graph() -> None:
    graph = build_graph(build_model("yolo26n.yaml", nc=3), 64)
    layers = {layer for group in graph.groups for layer in group.layers}
    assert any(".one2one_cv2." in layer for layer in layers)
    assert any(".23.cv2." in layer for layer in layers)


def test_tracing_leaves_training_flags_alone() -> None:
    model = build_model("yolov8n.yaml", nc=3).train()
    model.model[3].eval()  # type: ignore[index]
    before = [module.training for module in model.modules()]
    build_graph(model, 64)
    assert [module.training for module in model.modules()] == before


def test_an_operation_without_a_rule_freezes_and_says_so() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.b(torch.cumsum(self.a(x), 1)))

    found = groups_of(Odd())
    assert found["a"] == (8, "cumsum in the model has no rule")
    assert found["b"] == (6, None)


def test_a_model_that_cannot_be_captured_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x) if float(x.sum()) > 0 else x

    with pytest.raises(GraphError, match=r"torch\.export cannot capture Branching"):
        build_graph(Branching().eval(), 16)
    assert capfd.readouterr().err == ""  # the error is said once, by us
    assert logging.getLogger("torch").isEnabledFor(logging.ERROR)


@pytest.mark.parametrize(
    ("old", "new", "slots", "expected"),
    [
        # channels split into (heads, width)
        ((1, 4, 9), (1, 2, 2, 9), [[[0], [1], [2], [3]]], [[[[0], [1]], [[2], [3]]]]),
        # channels flattened with space: each becomes a block
        ((1, 2, 2), (1, 4), [[[0], [1]]], [[0, 0, 1, 1]]),
        # space flattened alone
        ((1, 2, 3, 3), (1, 2, 9), [[[[0]], [[1]]]], [[[0], [1]]]),
        # a dimension of size 1 more
        ((1, 2), (1, 2, 1, 1), [[0, 1]], [[[[0]], [[1]]]]),
        # nothing to follow
        ((1, 4), (2, 2), [[FIXED]], [[FIXED]]),
    ],
)
def test_reshape(old: tuple[int, ...], new: tuple[int, ...], slots: list, expected: list) -> None:
    assert reshape(np.array(slots), old, new).tolist() == expected


def test_a_strangers_output_is_kept_whatever_its_name() -> None:
    """Ultralytics' heads hand on "feats" for their shape; others hand on what will be read."""

    class Backbone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 8, 1)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"feats": self.a(x)}

    assert groups_of(Backbone()) == {"a": (8, "output of the model")}


def test_a_vector_that_layers_read_has_a_name_of_its_own() -> None:
    """Plans tell groups apart by their names."""

    class Prompted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.first, self.last = nn.Conv2d(3, 4, 1), nn.Linear(8, 6), nn.Linear(6, 4)
            self.prompt, self.halves = nn.Parameter(torch.rand(8)), nn.Parameter(torch.rand(12))
            self.b, self.c = nn.Linear(6, 4), nn.Linear(6, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            left, right = self.halves.chunk(2)
            bias = self.last(torch.relu(self.first(self.prompt.sigmoid()))) + self.b(left) * self.c(right)
            return self.a(x) + bias.reshape(1, -1, 1, 1)

    names = [group.name for group in build_graph(Prompted(), 16).groups]
    assert len(names) == len(set(names))
    assert {"prompt", "first", "halves[0:6]", "halves[6:12]"} <= set(names)
