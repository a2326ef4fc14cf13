from __future__ import annotations

import numpy as np
import pytest
import torch

from compress.channels.graph import build_graph
from compress.checkpoint import structure_hash
from compress.pruning.budget import Choice
from compress.pruning.plan import make_plan
from compress.pruning.surgery import apply_plan
from compress.training.fade import Fade, faded, remaining
from topologies import Chain, Residual, randomised


def planned(model, condemned: dict[int, list[int]]):
    """A plan that removes the given units of the given groups."""
    graph = build_graph(model, 16)
    keep = [~np.isin(np.arange(group.width), condemned.get(i, [])) for i, group in enumerate(graph.groups)]
    return make_plan(graph, Choice(keep, [""] * len(keep)), structure_hash(model), "test", "test")


def norms(model) -> dict[str, torch.Tensor]:
    return {
        name: value.detach().clone()
        for name, value in model.named_parameters()
        if isinstance(model.get_submodule(name.rpartition(".")[0]), torch.nn.BatchNorm2d)
    }


@pytest.mark.parametrize(
    ("progress", "left"), [(0.0, 1.0), (0.2, 1.0), (0.35, 0.75), (0.5, 0.5), (0.79, 1 / 60), (0.8, 0.0), (1.0, 0.0)]
)
def test_schedule(progress: float, left: float) -> None:
    assert remaining(progress) == pytest.approx(left)


def test_condemned_channels_fade_and_all_others_stay() -> None:
    model = randomised(Chain())
    fade = Fade(planned(model, {0: [1, 3]}), model)
    before = norms(model)
    for progress in (0.1, 0.3, 0.4, 0.5):  # many small steps end where the schedule says
        fade.apply(progress)
    for name, value in norms(model).items():
        expected = before[name].clone()
        if name.startswith("a.bn"):
            expected[[1, 3]] *= 0.5
        torch.testing.assert_close(value, expected)


def test_what_a_cut_removes_beyond_what_faded_is_counted() -> None:
    model = randomised(Chain())
    Fade(planned(model, {0: [1, 3]}), model).apply(1.0)
    assert faded(planned(model, {0: [1, 3]}), model) == (2, 2)
    assert faded(planned(model, {0: [0, 1, 2]}), model) == (1, 3)


def test_a_resumed_training_goes_on_where_it_was() -> None:
    model = randomised(Chain())
    plan = planned(model, {0: [0]})
    Fade(plan, model).apply(0.5)
    half = norms(model)["a.bn.weight"][0].item()
    resumed = Fade(plan, model)
    resumed.remaining = remaining(0.5)
    resumed.apply(0.65)
    assert norms(model)["a.bn.weight"][0].item() == pytest.approx(half / 2)


def test_cutting_faded_channels_changes_nothing() -> None:
    """Also where layers share them: all batch norms of a residual sum fade."""
    model = randomised(Residual())
    graph = build_graph(model, 16)
    shared = next(i for i, group in enumerate(graph.groups) if len(group.layers) > 2 and not group.frozen)
    plan = planned(model, {shared: [0, 2]})
    image = torch.rand(2, 3, 16, 16)
    Fade(plan, model).apply(1.0)
    with torch.no_grad():
        torch.testing.assert_close(apply_plan(model, plan)(image), model(image))
