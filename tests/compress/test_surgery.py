from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from compress.channels.graph import Graph, build_graph
from compress.checkpoint import build_model, load_model, plans_of, save_model, structure_hash
from compress.errors import PlanError, SurgeryError
from compress.pruning.budget import Choice, Target, choose
from compress.pruning.importance import importance
from compress.pruning.oracle import check_oracle, oracle_error
from compress.pruning.plan import Plan, make_plan, parse_plan
from compress.pruning.surgery import apply_plan
from compress.settings import Budget
from topologies import ALL, Chain, Residual, calibrated, randomised

ANY_WIDTH = Budget(multiple_of=1, min_width=1, max_removed=0.9)


def random_choice(graph: Graph, model: torch.nn.Module, share: float, seed: int, budget: Budget = ANY_WIDTH) -> Choice:
    return choose(graph, importance(graph, model, "random", seed), Target("percent", share), budget)


def planned(graph: Graph, model: torch.nn.Module, choice: Choice) -> Plan:
    return make_plan(graph, choice, structure_hash(model), "test", "random")


@pytest.mark.parametrize("name", ALL)
def test_pruned_model_equals_the_masked_dense_one(name: str) -> None:
    model = randomised(ALL[name]())
    graph = build_graph(model, 16)
    for seed in range(3):
        choice = random_choice(graph, model, 0.4, seed)
        pruned = apply_plan(model, planned(graph, model, choice))
        assert sum(p.numel() for p in pruned.parameters()) == graph.params(choice.widths)
        assert oracle_error(graph, pruned, choice.keep, torch.rand(1, 3, 16, 16)) < 1e-5


def test_something_is_cut_in_every_topology() -> None:
    """The oracle is true of a model that lost nothing, so this is asserted apart."""
    for name, kind in ALL.items():
        model = randomised(kind())
        graph = build_graph(model, 16)
        removed = (graph.widths - random_choice(graph, model, 0.4, 0).widths).sum()
        assert removed > 0, name


def test_the_dense_model_stays_as_it_was() -> None:
    model = randomised(Residual())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    graph = build_graph(model, 16)
    apply_plan(model, planned(graph, model, random_choice(graph, model, 0.5, 0)))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert plans_of(model) == []


def test_the_oracle_notices_a_single_wrong_channel() -> None:
    """Channel 0 is cut from the layer that makes it, channel 1 from the layer that reads it."""
    model = randomised(Chain())
    graph = build_graph(model, 16)
    keep = [np.ones(group.width, dtype=bool) for group in graph.groups]
    keep[0][0] = False
    plan = planned(graph, model, Choice(keep, [""] * len(keep)))
    wrong = apply_plan(model, plan)
    other = copy.deepcopy(model)
    keep[0][:2] = [True, False]
    right = apply_plan(other, planned(graph, other, Choice(keep, [""] * len(keep))))
    wrong.b.conv.weight = right.b.conv.weight  # type: ignore[union-attr]
    keep[0][:2] = [False, True]
    with pytest.raises(SurgeryError, match="differs from the masked dense model"):
        check_oracle(graph, wrong, keep)


def test_the_oracle_notices_a_model_that_cannot_run() -> None:
    model = randomised(Chain())
    graph = build_graph(model, 16)
    choice = random_choice(graph, model, 0.5, 0)
    broken = apply_plan(model, planned(graph, model, choice))
    broken.b.conv = copy.deepcopy(model.b.conv)  # type: ignore[union-attr]
    with pytest.raises(SurgeryError, match="does not run"):
        check_oracle(graph, broken, choice.keep)


@pytest.mark.parametrize("name", ["yolov5n", "yolov8n", "yolo11n", "yolo12n", "yolo26n"])
def test_unmodified_yolo_models(name: str) -> None:
    """Five random plans each, at 20 % to 70 % of the channels, under three kinds of budget; both heads of v26."""
    model = calibrated(build_model(f"{name}.yaml", nc=3), 64)
    graph = build_graph(model, 64)
    trained = replace(graph, training_only=frozenset())
    assert not [layer for layer, reason in graph.frozen().items() if "no rule" in reason]
    budgets = [ANY_WIDTH, Budget(), Budget(multiple_of=1, power_of_two=True), ANY_WIDTH, Budget(multiple_of=16)]
    for seed, budget in enumerate(budgets):
        choice = random_choice(graph, model, 0.2 + 0.1 * seed, seed, budget)
        pruned = apply_plan(model, planned(graph, model, choice))
        assert check_oracle(graph, pruned, choice.keep, seed) <= 1e-4
        assert sum(p.numel() for p in pruned.parameters()) == trained.params(choice.widths)


def test_head_towers_are_pruned_and_outputs_are_not() -> None:
    graph = build_graph(build_model("yolov8n.yaml", nc=3), 64)
    frozen = graph.frozen()
    assert set(frozen.values()) == {"output of the model"}
    assert len(frozen) == 2  # the box and the class maps; their three scales are one group each
    towers = [group for group in graph.groups if group.name.startswith("model.22.cv2.0.0")]
    assert towers
    assert towers[0].frozen is None


def test_a_pruned_model_can_be_pruned_again_and_saved(tmp_path) -> None:
    model = randomised(build_model("yolov8n.yaml", nc=3))
    for seed in range(2):
        graph = build_graph(model, 64)
        choice = random_choice(graph, model, 0.3, seed, Budget())
        pruned = apply_plan(model, planned(graph, model, choice))
        check_oracle(graph, pruned, choice.keep)
        model = pruned
    save_model(model, tmp_path / "twice.pt", {})
    again = load_model(tmp_path / "twice.pt")
    assert [plan["target"] for plan in plans_of(again)] == ["test", "test"]
    image = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.allclose(again(image)[0], model.half().float()(image)[0], atol=1e-3)


def test_a_plan_rebuilds_the_same_model_from_json() -> None:
    model = randomised(Residual())
    graph = build_graph(model, 16)
    plan = planned(graph, model, random_choice(graph, model, 0.5, 3))
    first = apply_plan(model, plan)
    second = apply_plan(model, parse_plan(plan.model_dump(mode="json"), "copy"))
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_a_plan_for_another_model_is_refused() -> None:
    model = randomised(Residual())
    graph = build_graph(model, 16)
    plan = planned(graph, model, random_choice(graph, model, 0.5, 0))
    with pytest.raises(PlanError, match="made for a model of structure"):
        apply_plan(randomised(Chain()), plan)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": "0-99"}, "not within its width 8"),
        ({"keep": "0-3,2"}, "named twice"),
        ({"keep": "all"}, "not a list of ranges"),
    ],
)
def test_a_plan_with_wrong_channels_is_refused(change: dict[str, str], message: str) -> None:
    model = randomised(Residual())
    graph = build_graph(model, 16)
    content = planned(graph, model, random_choice(graph, model, 0.5, 0)).model_dump(mode="json")
    content["groups"][0] |= change
    with pytest.raises(PlanError, match=message):
        apply_plan(model, parse_plan(content, "plan"))


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        ("0@0:99", "which no group has"),
        ("7@0:8", "which no group has"),
        ("rm -rf", "not of the form"),
        ("0@0:8 *1", "dimension 0 of a.conv.weight"),
    ],
)
def test_a_plan_with_wrong_axes_is_refused(axis: str, message: str) -> None:
    model = randomised(Residual())
    graph = build_graph(model, 16)
    content = planned(graph, model, random_choice(graph, model, 0.5, 0)).model_dump(mode="json")
    content["axes"]["a.conv.weight:0"] = axis
    with pytest.raises(PlanError, match=message):
        apply_plan(model, parse_plan(content, "plan"))
