from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from compress.channels.graph import build_graph
from compress.checkpoint import build_model
from compress.errors import BudgetError
from compress.planning import plan_pruning
from compress.pruning.budget import Target, allowed_widths, choose, rule_for, without_effect
from compress.pruning.importance import importance
from compress.settings import Budget, LayerRule, Prune
from topologies import Chain, ChunkTie, Residual, randomised

ANY = Budget(multiple_of=1, min_width=1, max_removed=1.0)


@pytest.mark.parametrize(
    ("width", "budget", "expected"),
    [
        (64, Budget(multiple_of=16, max_removed=0.5), [64, 48, 32]),
        (80, Budget(multiple_of=16, min_width=48), [80, 64, 48]),
        (30, Budget(multiple_of=8, max_removed=1.0), [30, 24, 16, 8]),  # an odd dense width may stay
        (64, Budget(multiple_of=1, power_of_two=True, min_width=4, max_removed=1.0), [64, 32, 16, 8, 4]),
        (48, Budget(multiple_of=1, power_of_two=True, min_width=4, max_removed=0.7), [48, 32, 16]),
        (4, Budget(multiple_of=8), [4]),  # narrower than the least width: left alone
        (3, ANY, [3, 2, 1]),  # never 0
    ],
)
def test_allowed_widths(width: int, budget: Budget, expected: list[int]) -> None:
    assert allowed_widths(width, budget) == expected


def test_the_last_matching_rule_wins() -> None:
    rules = (LayerRule(layers="model.0.*", multiple_of=4, max_removed=0.1), LayerRule(layers="*.conv", multiple_of=2))
    rule, frozen = rule_for(("model.0.conv", "model.0.bn"), Budget(multiple_of=8, rules=rules))
    assert (rule.multiple_of, rule.max_removed, frozen) == (2, 0.1, False)


def test_percent_is_the_global_threshold_of_network_slimming() -> None:
    """Of a's 8 and b's 12 channels 40 % go: the 8 smallest of all 20 scores, wherever they are."""
    graph = build_graph(randomised(Chain()), 16)
    a = np.array([0.1, 0.2, 0.3, 0.9, 0.9, 0.9, 0.9, 0.9])
    b = np.array([0.15, 0.25, 0.35, 0.4, 0.45, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8])
    choice = choose(graph, [a, b, np.ones(4)], Target("percent", 0.4), ANY)
    assert choice.keep[0].tolist() == [False] * 3 + [True] * 5
    assert choice.keep[1].tolist() == [False] * 5 + [True] * 7
    assert choice.keep[2].all()


def test_tied_halves_keep_the_same_width() -> None:
    graph = build_graph(randomised(ChunkTie()), 16)
    scores = [np.linspace(0.01, 0.02, g.width) if g.name == "a.conv[0:8]" else np.ones(g.width) for g in graph.groups]
    choice = choose(graph, scores, Target("percent", 0.4), ANY)
    widths = {group.name: int(width) for group, width in zip(graph.groups, choice.widths, strict=True)}
    assert widths["a.conv[0:8]"] == widths["a.conv[8:16]"] < 8


@pytest.mark.parametrize("kind", ["macs", "params"])
@pytest.mark.parametrize("share", [0.8, 0.5, 0.35])
def test_targets_are_met_from_below_and_not_by_far(kind, share: float) -> None:
    model = randomised(build_model("yolov8n.yaml", nc=3))
    graph = build_graph(model, 64)
    cost = graph.macs if kind == "macs" else graph.params
    choice = choose(graph, importance(graph, model, "l1"), Target(kind, share), Budget())
    reached = cost(choice.widths) / cost(graph.widths)
    assert share - 0.03 < reached <= share
    assert all(w % 8 == 0 for g, w in zip(graph.groups, choice.widths, strict=True) if w < g.width)


def test_a_percentage_is_met_by_smaller_steps_where_the_cheapest_overshoots() -> None:
    """a may lose 4 of its 8 channels or none, b single ones of its 12: a twentieth of 20 is one of b's."""
    graph = build_graph(Chain().eval(), 16)
    scores = [np.full(8, 0.01), np.linspace(1.0, 2.0, 12), np.ones(4)]
    rules = (LayerRule(layers="a.*", multiple_of=4),)
    budget = Budget(multiple_of=1, min_width=1, max_removed=0.9, rules=rules)
    widths = {share: choose(graph, scores, Target("percent", share), budget).widths.tolist() for share in (0.05, 0.2)}
    assert widths == {0.05: [8, 11, 4], 0.2: [4, 12, 4]}


def test_a_rule_without_a_layer_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    """A forgotten .* would else prune the very layers that were meant to stay."""
    rules = (LayerRule(layers="model.22.cv2", freeze=True), LayerRule(layers="model.22.cv2.*", freeze=True))
    model = build_model("yolov8n.yaml", nc=3)
    plan_pruning(model, Prune(macs=0.5, importance="l1", budget=Budget(rules=rules)), 64)
    assert capsys.readouterr().err.count("no layer that could be cut is called 'model.22.cv2', as a rule") == 1
    assert without_effect(build_graph(model, 64), Budget(rules=rules)) == ["model.22.cv2"]


def test_every_group_keeps_what_the_budget_demands() -> None:
    model = randomised(build_model("yolov8n.yaml", nc=3))
    graph = build_graph(model, 64)
    rules = (LayerRule(layers="model.0.*", freeze=True), LayerRule(layers="model.22.*", max_removed=0.25))
    budget = Budget(multiple_of=4, min_width=8, max_removed=0.5, rules=rules)
    choice = choose(graph, importance(graph, model, "random", 1), Target("macs", 0.55), budget)
    for group, width in zip(graph.groups, choice.widths, strict=True):
        limit = 0.25 if any(layer.startswith("model.22.") for layer in group.layers) else 0.5
        assert width >= min(8, group.width)
        assert width >= group.width * (1 - limit)
    assert choice.widths[0] == 16
    assert choice.why[0] == "frozen by a rule of the budget"


@pytest.mark.parametrize(("later", "frozen"), [({"multiple_of": 16}, True), ({"freeze": False}, False)])
def test_what_a_later_rule_does_not_say_is_inherited(later: dict[str, Any], frozen: bool) -> None:
    rules = (LayerRule(layers="model.*", freeze=True, min_width=4), LayerRule(layers="model.0.*", **later))
    rule, held = rule_for(("model.0.conv",), Budget(rules=rules))
    assert (rule.min_width, rule.multiple_of, held) == (4, later.get("multiple_of", 8), frozen)


def test_the_best_channels_stay() -> None:
    graph = build_graph(randomised(Residual()), 16)
    scores = [np.arange(group.width, dtype=float) for group in graph.groups]
    choice = choose(graph, scores, Target("percent", 0.5), ANY)
    assert choice.keep[0].tolist() == [False] * 4 + [True] * 4


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            Target("macs", 0.01),
            r"cannot bring macs down to 1.0% of the dense model's: \d+.\d% is reachable .* most of it is left in",
        ),
        (Target("params", 0.01), "cannot bring params down"),
        (Target("percent", 0.99), r"at most 7\d.\d% are reachable"),
    ],
)
def test_an_infeasible_target_says_what_is_reachable(target: Target, message: str) -> None:
    model = build_model("yolov8n.yaml", nc=3)
    graph = build_graph(model, 64)
    with pytest.raises(BudgetError, match=message):
        choose(graph, importance(graph, model, "random"), target, Budget())


def test_zero_percent_removes_nothing() -> None:
    graph = build_graph(randomised(Chain()), 16)
    choice = choose(graph, [np.ones(g.width) for g in graph.groups], Target("percent", 0.0), ANY)
    assert choice.widths.tolist() == graph.widths.tolist()
