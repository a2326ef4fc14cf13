from __future__ import annotations

import copy
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from torch import nn

from compress.channels.graph import build_graph
from compress.pruning import taylor
from compress.pruning.importance import batch_norm_scales, importance
from compress.pruning.taylor import taylor_scores
from compress.settings import Importance
from topologies import ALL, Chain, Grouped, InPlace, Residual, Transposed, randomised


def scores_of(model: nn.Module, method: str, seed: int = 0) -> dict[str, np.ndarray]:
    graph = build_graph(model.eval(), 16)
    scores = importance(graph, model, cast("Importance", method), seed)
    return {group.name: score for group, score in zip(graph.groups, scores, strict=True)}


def set_rows(weight: torch.Tensor, rows: list[list[float]]) -> None:
    """Give filter i the values rows[i] and zeros after them."""
    weight.data.zero_()
    for filter_, values in zip(weight.data, rows, strict=True):
        filter_.view(-1)[: len(values)] = torch.tensor(values)


def test_bn_is_the_magnitude_of_gamma() -> None:
    model = Chain()
    model.a.bn.weight.data = torch.tensor([0.5, -2.0, 0.0, 1.0, -0.25, 3.0, 0.125, 1.5])
    assert scores_of(model, "bn")["a.conv"].tolist() == [0.5, 2.0, 0.0, 1.0, 0.25, 3.0, 0.125, 1.5]


def test_layers_that_share_channels_share_the_mean() -> None:
    """a + b(a) + c(a + b(a)): channel 0 has γ 1, 2 and -6, channel 1 has 0, 0 and 3."""
    model = Residual()
    for block, first, second in ((model.a, 1.0, 0.0), (model.b, 2.0, 0.0), (model.c, -6.0, 3.0)):
        block.bn.weight.data[:2] = torch.tensor([first, second])
    assert scores_of(model, "bn")["a.conv"].tolist() == [3.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_columns_of_a_grouped_convolution_share_the_mean() -> None:
    """Unit j is column j of each of four groups: channels j, j + 4, j + 8 and j + 12 of the layer before."""
    model = Grouped()
    model.a.bn.weight.data = torch.arange(16.0)
    assert scores_of(model, "bn")["a.conv"].tolist() == [6.0, 7.0, 8.0, 9.0]


def test_a_group_without_batch_norm_compares_with_the_others() -> None:
    """bn falls back on l1 there: filters of norm 1, 2, 3, 6 around their mean 3, times the mean γ of the model."""
    model = Chain()
    model.a.bn.weight.data.fill_(0.4)
    model.b.bn.weight.data.fill_(0.1)
    set_rows(model.head.weight, [[1.0], [-2.0], [1.0, -1.0, 1.0], [6.0]])
    mean_gamma = (8 * 0.4 + 12 * 0.1) / 20
    assert scores_of(model, "bn")["head"] == pytest.approx(np.array([1, 2, 3, 6]) / 3 * mean_gamma)


def test_a_model_without_batch_norm_is_scored_by_l1() -> None:
    model = InPlace()
    for name, score in scores_of(model, "bn").items():
        assert score == pytest.approx(scores_of(model, "l1")[name]), name


@pytest.mark.parametrize(("method", "norms"), [("l1", [7.0, 1.0, 0.0, 4.0]), ("l2", [5.0, 1.0, 0.0, 2.0])])
def test_filter_norms_over_their_mean(method: str, norms: list[float]) -> None:
    model = Chain()
    set_rows(model.head.weight, [[3.0, -4.0], [-1.0], [0.0], [1.0, 1.0, -1.0, 1.0]])
    assert scores_of(model, method)["head"] == pytest.approx(np.array(norms) / np.mean(norms))


def test_fpgm_lets_go_what_lies_in_the_middle() -> None:
    """Filters at (0, 0), (3, 4), (0, 4) and (6, 8): sums of distances 19, 13, 4 + 3 + √52 and 20 + √52."""
    model = Chain()
    set_rows(model.head.weight, [[0.0, 0.0], [3.0, 4.0], [0.0, 4.0], [6.0, 8.0]])
    sums = np.array([5 + 4 + 10, 5 + 3 + 5, 4 + 3 + 52**0.5, 10 + 5 + 52**0.5])
    found = scores_of(model, "fpgm")["head"]
    assert found == pytest.approx(sums / sums.mean(), abs=1e-6)
    assert found.argmin() == 1  # l2 would let the first go


def test_fpgm_of_filters_that_are_all_alike_is_nothing() -> None:
    model = Chain()
    model.a.conv.weight.data.fill_(0.5)
    assert scores_of(model, "fpgm")["a.conv"] == pytest.approx(np.zeros(8), abs=1e-6)


def test_filters_that_share_channels_share_the_mean() -> None:
    """Channel 0: norms 1, 2 and 6; all others: 0, 0 and 6; the mean over the group is 17 / 8."""
    model = Residual()
    set_rows(model.a.conv.weight, [[1.0]] + [[0.0]] * 7)
    set_rows(model.b.conv.weight, [[2.0]] + [[0.0]] * 7)
    set_rows(model.c.conv.weight, [[6.0]] * 8)
    assert scores_of(model, "l1")["a.conv"] == pytest.approx(np.array([3.0] + [2.0] * 7) / (17 / 8))


def test_dead_filters_are_worth_nothing() -> None:
    model = Chain()
    model.a.conv.weight.data.zero_()
    assert scores_of(model, "l1")["a.conv"].tolist() == [0.0] * 8


def test_a_transposed_convolution_makes_its_second_dimension() -> None:
    """Its weight is (in, out): what it reads counts for nothing, what it makes does."""
    model = Transposed()
    set_rows(model.a.conv.weight, [[1.0]] * 8)
    model.up.weight.data = torch.arange(6.0).reshape(1, 6, 1, 1).repeat(8, 1, 2, 2)
    model.up.weight.data[0] = 100.0
    found = scores_of(model, "l1")
    assert found["a.conv"].tolist() == [1.0] * 8
    norms = 400 + 28 * np.arange(6.0)
    assert found["up"] == pytest.approx(norms / norms.mean())


def test_random_is_repeatable_noise() -> None:
    model = Residual()
    first, again, other = (scores_of(model, "random", seed)["a.conv"] for seed in (3, 3, 4))
    assert first.tolist() == again.tolist() != other.tolist()
    assert len(set(first.tolist())) == 8
    assert ((first >= 0) & (first < 1)).all()


@pytest.mark.parametrize("method", ["bn", "l1", "l2", "random"])
@pytest.mark.parametrize("name", ALL)
def test_every_unit_has_a_finite_score(name: str, method: str) -> None:
    model = randomised(ALL[name]())
    graph = build_graph(model, 16)
    before = copy.deepcopy(model.state_dict())
    scores = importance(graph, model, cast("Importance", method))
    assert [score.shape for score in scores] == [(group.width,) for group in graph.groups]
    assert all(np.isfinite(score).all() and (score >= 0).all() for score in scores)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_scales_of_all_batch_norms() -> None:
    model = Chain()
    model.b.bn.weight.data.fill_(-0.5)
    found = batch_norm_scales(build_graph(model.eval(), 16), model)
    assert {name: (values.size, values.mean()) for name, values in found.items()} == {
        "a.bn.weight": (8, 1.0),
        "b.bn.weight": (12, 0.5),
    }


def test_taylor_without_batch_norm_asks_the_filters(monkeypatch) -> None:
    """For y = head(up(a(x))) with loss Σy: Σ w·∂L/∂w of a filter is what its channel gives to the loss."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.up = nn.Conv2d(3, 4, 1, bias=False), nn.ConvTranspose2d(4, 5, 1, bias=False)
            self.head = nn.Conv2d(5, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.up(self.a(x)))

        def loss(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, None]:
            return self(batch["img"]).sum(), None

    torch.manual_seed(0)
    model, image = Model().eval(), torch.rand(1, 3, 16, 16)
    monkeypatch.setattr(taylor, "_batches", lambda *_: [{"img": image}])
    graph = build_graph(model, 16)
    found = dict(zip((g.name for g in graph.groups), taylor_scores(graph, model, Path("none"), 16), strict=True))
    with torch.no_grad():
        a = model.a(image)
        up = model.up(a)
        by_up = (model.head.weight[:, :, 0, 0].sum(0) * up.sum((0, 2, 3))).abs()
        to_head = torch.einsum("io,o->i", model.up.weight[:, :, 0, 0], model.head.weight[:, :, 0, 0].sum(0))
        by_a = (to_head * a.sum((0, 2, 3))).abs()
    assert found["a"] == pytest.approx(by_a.numpy(), rel=1e-4)
    assert found["up"] == pytest.approx(by_up.numpy(), rel=1e-4)
