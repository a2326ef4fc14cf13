"""What is tried after a cut, and what is kept of it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from compress.pruning.batch_norm import recalibrate_batch_norm
from compress.pruning.plan import Plan
from compress.pruning.repair import (
    AS_CUT,
    AS_TRAINED,
    BOTH,
    FOLDED,
    RECONSTRUCTED,
    STATISTICS,
    Outcome,
    Repairs,
    repair,
    repair_statistics,
)
from cuts import cut, noise_images
from topologies import randomised

ALL = [AS_CUT, FOLDED, STATISTICS, RECONSTRUCTED, BOTH]


class Net(nn.Module):
    """The head's bias takes what is folded, and no batch norm takes that back."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn_a = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.b, self.bn_b = nn.Conv2d(6, 5, 3, bias=False), nn.BatchNorm2d(5)
        self.head = nn.Conv2d(5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.bn_b(self.b(torch.relu(self.bn_a(self.a(x)))))))


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    return noise_images(tmp_path, 6)


@pytest.fixture
def dense() -> Net:
    torch.manual_seed(0)
    model = Net()
    randomised(model)
    return model


@pytest.fixture
def planned(dense: Net) -> tuple[Net, Plan]:
    pruned, plan = cut(dense, {"a": [1, 4], "b": [0]}, 32)
    assert isinstance(pruned, Net)
    return pruned, plan


class Scores:
    """Scores in turn, and the states of the models that got them."""

    def __init__(self, *values: float) -> None:
        self.values, self.states = list(values), []

    def __call__(self, model: nn.Module) -> float:
        self.states.append(copy.deepcopy(model.state_dict()))
        return self.values[len(self.states) - 1]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ((0.5, 0.4, 0.3, 0.2, 0.1), AS_CUT),
        ((0.1, 0.5, 0.4, 0.3, 0.2), FOLDED),
        ((0.1, 0.2, 0.5, 0.4, 0.3), STATISTICS),
        ((0.1, 0.3, 0.2, 0.5, 0.4), RECONSTRUCTED),
        ((0.3, 0.2, 0.1, 0.4, 0.5), BOTH),
        ((0.0, 0.0, 0.0, 0.0, 0.0), BOTH),
    ],
)
def test_the_best_candidate_is_kept(
    dense: Net, planned: tuple[Net, Plan], images: list[Path], values: tuple[float, ...], kept: str
) -> None:
    (pruned, plan), scores = planned, Scores(*values)
    found = repair(pruned, dense, plan, Repairs(images, images, images), 32, scores)
    assert found == Outcome(dict(zip(ALL, values, strict=True)), kept)
    assert found is not None
    assert found.metrics() == {"repair_map50_95": dict(zip(ALL, values, strict=True)), "repair": kept}
    assert same(pruned.state_dict(), scores.states[ALL.index(kept)])
    assert sum(same(pruned.state_dict(), state) for state in scores.states) == 1  # all five differ


def test_what_each_candidate_stands_on(dense: Net, planned: tuple[Net, Plan], images: list[Path]) -> None:
    pruned, plan = planned
    as_cut, scores = copy.deepcopy(pruned), Scores(0.1, 0.2, 0.3, 0.4, 0.5)
    repair(pruned, dense, plan, Repairs(images, images, images), 32, scores)
    states = dict(zip(ALL, scores.states, strict=True))
    assert same(as_cut.state_dict(), states[AS_CUT])

    def changed(name: str, base: str) -> set[str]:
        return {key for key, value in states[name].items() if not torch.equal(value, states[base][key])}

    new = {f"bn_{n}.{s}" for n in "ab" for s in ("running_mean", "running_var", "num_batches_tracked")}
    assert changed(FOLDED, AS_CUT) == {"bn_b.running_mean", "head.bias"}
    assert changed(STATISTICS, AS_CUT) == new
    assert changed(RECONSTRUCTED, FOLDED) == {"b.weight", "bn_b.running_mean", "head.weight", "head.bias"}
    assert changed(BOTH, RECONSTRUCTED) == new


@pytest.mark.parametrize(
    ("on", "names"),
    [
        ((1, 0, 0), [AS_CUT, FOLDED]),
        ((0, 1, 0), [AS_CUT, STATISTICS]),
        ((0, 0, 1), [AS_CUT, RECONSTRUCTED]),
        ((1, 1, 0), [AS_CUT, FOLDED, STATISTICS]),
        ((0, 1, 1), [AS_CUT, STATISTICS, RECONSTRUCTED, BOTH]),
        ((1, 0, 1), [AS_CUT, FOLDED, RECONSTRUCTED]),
    ],
)
def test_each_is_switched_alone(
    dense: Net, planned: tuple[Net, Plan], images: list[Path], on: tuple[int, ...], names: list[str]
) -> None:
    pruned, plan = planned
    repairs = Repairs(*(images if switch else [] for switch in on))
    found = repair(pruned, dense, plan, repairs, 32, Scores(0.4, 0.3, 0.2, 0.1))
    assert found is not None
    assert list(found.scores) == names


def test_nothing_on_is_nothing_scored(dense: Net, planned: tuple[Net, Plan]) -> None:
    scores = Scores()
    assert repair(planned[0], dense, planned[1], Repairs([], [], []), 32, scores) is None
    assert scores.states == []


def test_without_a_score_statistics_alone_are_new(dense: Net, planned: tuple[Net, Plan], images: list[Path]) -> None:
    pruned, plan = planned
    other = copy.deepcopy(pruned)
    recalibrate_batch_norm(other, images, 32)
    assert repair(pruned, dense, plan, Repairs(images, images, images), 32, None) is None
    assert same(pruned.state_dict(), other.state_dict())
    as_they_are = copy.deepcopy(pruned.state_dict())
    assert repair(pruned, dense, plan, Repairs(images, [], images), 32, None) is None
    assert same(pruned.state_dict(), as_they_are)


def test_repair_brings_the_cut_nearer_to_the_dense_model(
    dense: Net, planned: tuple[Net, Plan], images: list[Path]
) -> None:
    from compress.pruning.batches import batches

    pruned, plan = planned
    pixels = next(batches(dense, images, 32))

    def nearness(network: nn.Module) -> float:
        with torch.no_grad():
            return -float((network.eval()(pixels) - dense.eval()(pixels)).square().mean())

    found = repair(pruned, dense, plan, Repairs(images, [], images), 32, nearness)
    assert found is not None
    assert found.kept == RECONSTRUCTED
    assert found.scores[AS_CUT] < found.scores[FOLDED] < found.scores[RECONSTRUCTED]


@pytest.mark.parametrize(("before", "after", "kept"), [(0.6, 0.5, 0), (0.5, 0.6, 1), (0.5, 0.5, 1)])
def test_the_better_statistics_of_a_training_are_kept(
    dense: Net, images: list[Path], before: float, after: float, kept: int
) -> None:
    other, scores = copy.deepcopy(dense), Scores(before, after)
    recalibrate_batch_norm(other, images, 32)
    found = repair_statistics(dense, images, 32, scores)
    assert found == Outcome({AS_TRAINED: before, STATISTICS: after}, (AS_TRAINED, STATISTICS)[kept])
    assert same(scores.states[1], other.state_dict())
    assert not same(scores.states[0], other.state_dict())
    assert same(dense.state_dict(), scores.states[kept])


def test_statistics_of_a_training_are_new_without_a_score(dense: Net, images: list[Path]) -> None:
    other = copy.deepcopy(dense)
    recalibrate_batch_norm(other, images, 32)
    assert repair_statistics(dense, images, 32, None) is None
    assert same(dense.state_dict(), other.state_dict())
