"""Rounds of pruning: their schedule, what ends them, and how they go on after an interruption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compress import rounds
from compress.channels.graph import build_graph
from compress.checkpoint import load_model, plans_of
from compress.errors import BudgetError, SettingsError
from compress.manifest import MANIFEST, read_json
from compress.pruning.budget import rule_for
from compress.rounds import (
    ROUNDS,
    Round,
    best_trade_off,
    check_schedule,
    cut_of_round,
    goals,
    held_to_dense,
    outcome,
    run_rounds,
)
from compress.settings import Budget, LayerRule, Prune, Run, parse
from compress.train import Common

TRAINING = {"epochs": 1, "batch": 8, "args": {"nbs": 8, "warmup_epochs": 0.0}}
FINE = {"multiple_of": 1, "min_width": 2}
ALL = {"macs": 1.0, "params": 1.0}


def settings_of(data: Path, **changes: Any) -> Run:
    content = {"name": "tiny", "model": "x.yaml", "data": str(data), "imgsz": 64, "workers": 0, "iterations": 2}
    content |= {"train": TRAINING, "sparsify": {**TRAINING, "sr": 0.01}, "finetune": TRAINING}
    return parse(Run, content | {"prune": {"macs": 0.5, "budget": FINE}} | changes, "test")


# The schedule.


def test_rounds_approach_the_target_in_equal_ratios() -> None:
    assert goals(0.512, 3) == pytest.approx([0.8, 0.64, 0.512])
    assert goals(0.5, 1) == [0.5]


def test_a_round_cuts_what_the_last_one_left_over() -> None:
    """Down to 0.64 from a model that blocks brought to 0.7 and not 0.8: 0.64 / 0.7 of it; from 0.6: nothing."""
    cut = Prune(macs=0.512)
    assert cut_of_round(cut, 1, 3, ALL).macs == pytest.approx(0.8)  # type: ignore[union-attr]
    assert cut_of_round(cut, 2, 3, {"macs": 0.7, "params": 0.1}).macs == pytest.approx(0.64 / 0.7)  # type: ignore[union-attr]
    assert cut_of_round(cut, 2, 3, {"macs": 0.6, "params": 0.9}) is None
    assert cut_of_round(Prune(params=0.25), 2, 2, {"macs": 0.1, "params": 0.5}).params == 0.5  # type: ignore[union-attr]
    channels = [cut_of_round(Prune(percent=0.75), number, 2, ALL).percent for number in (1, 2)]  # type: ignore[union-attr]
    assert channels == [0.5, 0.5]


def test_shares_and_widths_are_those_of_the_dense_model(dense: Path) -> None:
    model = load_model(dense)
    graph = build_graph(model, 64)
    layer = "model.1.conv"
    (group,) = [group for group in graph.groups if layer in group.layers]
    frozen = LayerRule(layers="model.3.*", freeze=True)
    budget = held_to_dense(Budget(multiple_of=2, min_width=2, max_removed=0.6, rules=(frozen,)), graph)
    rule, _ = rule_for(group.layers, budget)
    assert group.width == 16
    assert (rule.multiple_of, rule.min_width, rule.max_removed) == (2, 7, 1.0)  # 16 · 0.4 = 6.4
    assert [each.name for each in graph.groups if rule_for(each.layers, budget)[1]] == ["model.3.conv"]


def test_a_schedule_that_cannot_reach_its_target_is_refused(dense: Path) -> None:
    cut = Prune(macs=0.2, budget=Budget(multiple_of=4, min_width=4, max_removed=0.5))
    with pytest.raises(BudgetError, match=r"round \d of 3 cannot reach its target: the budget cannot bring macs down"):
        check_schedule(load_model(dense), cut, 3, 64)
    check_schedule(load_model(dense), cut.model_copy(update={"macs": 0.6}), 3, 64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"iterations": 1, "map_budget": 0.1}, "map_budget ends rounds of pruning: set iterations above 1"),
        ({"prune": {"speedup": 2.0}}, "iterations need a target of percent, macs or params"),
        ({"prune": {"macs": 0.5, "sensitivity": "s.json"}}, "prune.sensitivity is of the dense model"),
        ({"iterations": 0}, "iterations: Input should be greater than or equal to 1"),
    ],
)
def test_settings_that_make_no_rounds(tiny_data: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        settings_of(tiny_data, **changes)


# What is kept.


def made(number: int, loss: float) -> Round:
    return Round(number, f"{number}.pt", (100, 90 - number), (10, 9), number / 10, 0.5 - loss, loss)


def test_the_smallest_model_within_the_budget_is_kept() -> None:
    done = [made(1, 0.01), made(2, 0.03), made(3, 0.02), made(4, 0.2)]
    assert best_trade_off(done, 0.025).number == 3
    assert best_trade_off(done, None).number == 4
    assert best_trade_off(done, 0.001).number == 1  # none is within it, and this one lost least


# The rounds.


def test_two_rounds_run_to_the_target_and_are_found_again(
    dense: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    settings, common = settings_of(tiny_data), Common(imgsz=64, workers=0)
    asked: list[Path] = []

    def score(model: Path) -> float:
        asked.append(model)
        return 0.5

    def killed(*_: object) -> Path:
        raise KeyboardInterrupt

    given = (str(dense), dense, tiny_data, settings, common, tmp_path, score)
    with monkeypatch.context() as patch:
        whole, count = rounds.prune, iter([False, True])
        patch.setattr(rounds, "prune", lambda *words: killed() if next(count) else whole(*words))
        with pytest.raises(KeyboardInterrupt):
            run_rounds(*given)
    capsys.readouterr()
    kept = run_rounds(*given)
    said = capsys.readouterr().out
    for stage in ("sparsify", "prune", "finetune"):
        assert f"{stage}: finished before, unchanged: {tmp_path / 'round_1'}" in said
    assert f"sparsify: finished before, unchanged: {tmp_path / 'round_2'}" in said
    assert kept == tmp_path / "round_2" / "04_finetune" / "model.pt"
    assert [path.parent.parent.name for path in asked[1:]] == ["round_1", "round_2"]  # each of them once
    assert len(plans_of(load_model(kept))) == 2
    record = read_json(tmp_path / ROUNDS)
    shares = [each["macs"][1] / each["macs"][0] for each in record["rounds"]]
    assert shares[0] == pytest.approx(0.5**0.5, abs=0.03)
    assert 0.47 < shares[1] <= 0.5
    graph = build_graph(load_model(kept), 64)
    assert record["rounds"][1]["macs"][1] == graph.macs(graph.widths)
    found = outcome(tmp_path, 2)
    assert (found["macs"], found["rounds"]) == (record["rounds"][1]["macs"], 2)
    second = read_json(tmp_path / "round_2" / "03_prune" / MANIFEST)
    first = read_json(tmp_path / "round_1" / "04_finetune" / MANIFEST)
    assert second["metrics"]["macs"][0] == record["rounds"][0]["macs"][1]
    assert read_json(tmp_path / "round_2" / "02_sparsify" / MANIFEST)["parents"]["model"] == first["files"]["model.pt"]


def test_the_rounds_end_when_the_map_budget_is_spent(
    dense: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Five rounds; the dense model scores 0.60, then 0.59 and 0.52: the second spends 0.05, and the first is kept."""
    monkeypatch.setattr(rounds, "sparsify", lambda model, *_: Path(model))
    monkeypatch.setattr(rounds, "finetune", lambda model, *_: model)
    scores = iter([0.60, 0.59, 0.52])
    settings = settings_of(tiny_data, iterations=5, map_budget=0.05)
    common = Common(imgsz=64, workers=0)
    kept = run_rounds(str(dense), dense, tiny_data, settings, common, tmp_path, lambda _: next(scores))
    assert kept.parent.parent.name == "round_1"
    record = read_json(tmp_path / ROUNDS)
    assert record["kept"] == 1
    assert [each["lost"] for each in record["rounds"]] == pytest.approx([0.01, 0.08])
    assert outcome(tmp_path, 5)["rounds"] == 1
    assert "the budget of 0.05 mAP50-95 is spent: round 1 is kept" in capsys.readouterr().out
    assert not (tmp_path / "round_3").exists()
