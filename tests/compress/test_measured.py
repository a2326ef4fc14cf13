"""The loop that measures a plan and plans again, with measurements that are made up."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import configs
from benchmark import observe, system, variants
from compress import manifest, prune
from compress.channels.graph import Graph
from compress.checkpoint import load_model, plans_of, save_model
from compress.errors import BudgetError, SettingsError
from compress.latency import solver
from compress.latency.measured import plan_measured
from compress.latency.table import LatencyTable, evaluate, save_table
from compress.planning import Planned, plan_pruning
from compress.pruning.plan import parse_plan
from compress.settings import Budget, LayerRule, Prune
from compress.training.fade import Fade
from tables import BUDGET, table_of

IMGSZ = 64


@pytest.fixture
def table(dense: Path, tmp_path: Path) -> LatencyTable:
    made, graph = table_of(load_model(dense), IMGSZ, machine=system.device()["cpu"])
    made = made.model_copy(update={"dense": float(evaluate(made, graph)(graph.widths))})
    save_table(made, tmp_path / "table.json")
    return made


@pytest.fixture
def wanted(table: LatencyTable, tmp_path: Path) -> Prune:
    return Prune(speedup=1.15, importance="l1", budget=BUDGET, table=str(tmp_path / "table.json"))


def measure_as(
    monkeypatch, table: LatencyTable, dense: Path, factors: list[float], version: str = "1.0", width: float = 0.02
) -> list[float]:
    """Let networks take `factors` times what the table says, one after another; return what was measured."""
    _, graph = table_of(load_model(dense), IMGSZ)
    latency = evaluate(table, graph)
    cut: list[Any] = []
    seen: list[float] = []

    def export(model: Any, name: str, settings: observe.Wanted, folder: Path, place: Any) -> Path:
        cut.append(model)
        return folder / name

    def seen_as(site: Any, reference: Path, model: Path, settings: observe.Wanted) -> dict[str, Any]:
        plan = parse_plan(plans_of(cut[-1])[-1], "model")
        kept = dict(zip([g.name for g in plan.groups], [int(m.sum()) for m in plan.masks()], strict=True))
        widths = [kept.get(group.name, group.width) for group in graph.groups]
        seen.append(float(latency(np.array(widths))) * factors[len(seen)])
        ratio = table.dense / seen[-1]
        found = {"speedup": ratio, "interval": [ratio * 0.99, ratio * 1.01], "record": {"version": version}}
        return {**found, "interval_width": width, "noisy": width > settings.max_interval}

    monkeypatch.setattr(variants, "export", export)
    monkeypatch.setattr(observe, "observe", seen_as)
    return seen


def run(dense: Path, wanted: Prune) -> tuple[Planned, list[dict[str, Any]]]:
    return plan_measured(load_model(dense), wanted, IMGSZ, 0, None, str(dense))


def test_a_prediction_that_holds_is_measured_once(table, wanted, dense: Path, monkeypatch) -> None:
    seen = measure_as(monkeypatch, table, dense, [1.02])
    planned, rounds = run(dense, wanted)
    assert planned.prediction is not None
    assert rounds == [
        {
            "correction": 1.0,
            "predicted": planned.prediction.predicted,
            "measured": pytest.approx(seen[0]),
            "interval": [pytest.approx(seen[0] / 1.01), pytest.approx(seen[0] / 0.99)],
            "used": True,
        }
    ]


def test_a_table_that_is_off_is_corrected_and_the_plan_made_anew(table, wanted, dense: Path, monkeypatch) -> None:
    measure_as(monkeypatch, table, dense, [1.06, 1.06])
    planned, rounds = run(dense, wanted)
    assert [entry["correction"] for entry in rounds] == [1.0, pytest.approx(1.06)]
    assert [entry["used"] for entry in rounds] == [False, True]
    assert planned.prediction is not None
    assert rounds[1]["measured"] == pytest.approx(planned.prediction.predicted)
    assert rounds[1]["measured"] <= table.dense / 1.15


def test_a_prediction_that_is_off_but_meets_the_target_is_measured_once(
    table, wanted, dense: Path, monkeypatch
) -> None:
    target = table.dense / 1.15
    predicted = plan_pruning(load_model(dense), wanted, IMGSZ).prediction
    assert predicted is not None
    measure_as(monkeypatch, table, dense, [1.029 * target / predicted.predicted])
    _, rounds = run(dense, wanted)
    assert len(rounds) == 1
    monkeypatch.undo()
    measure_as(monkeypatch, table, dense, [1.031 * target / predicted.predicted, 1.0])
    assert len(run(dense, wanted)[1]) == 2


def test_after_three_corrections_the_nearest_is_taken_and_said(table, wanted, dense: Path, monkeypatch, capsys) -> None:
    measure_as(monkeypatch, table, dense, [1.10, 1.15, 1.22, 1.3])
    planned, rounds = run(dense, wanted)
    target = table.dense / 1.15
    assert [entry["measured"] > 1.03 * target for entry in rounds] == [True] * 4
    nearest = min(rounds, key=lambda entry: entry["measured"])
    assert nearest["used"]
    assert planned.prediction is not None
    assert planned.prediction.predicted == nearest["predicted"]
    said = capsys.readouterr()
    assert said.out.count("prune: round") == 4
    assert (
        f"warning: the target of {target:.2f} ms is missed: the nearest of 4 measured plans takes "
        f"{nearest['measured']:.2f} ms ({nearest['measured'] / target - 1:+.1%}): ask for less" in said.err
    )


def test_a_plan_that_is_too_fast_gives_way_to_slower_widths_that_keep_more(
    table, wanted, dense: Path, monkeypatch, capsys
) -> None:
    measure_as(monkeypatch, table, dense, [0.93, 0.93])
    planned, rounds = run(dense, wanted)
    first = plan_pruning(load_model(dense), wanted, IMGSZ).prediction
    assert planned.prediction is not None
    assert first is not None
    assert [entry["used"] for entry in rounds] == [False, True]
    assert planned.prediction.kept > first.kept
    assert abs(rounds[1]["measured"] / (table.dense / 1.15) - 1) <= 0.03
    assert capsys.readouterr().err == ""


def test_a_plan_that_is_too_fast_stays_where_there_are_no_slower_widths(
    table, wanted, dense: Path, monkeypatch
) -> None:
    one = Budget(multiple_of=2, min_width=2, rules=(LayerRule(layers="*", max_removed=0.0),))
    _, graph = table_of(load_model(dense), IMGSZ)
    first = next(group for group in graph.groups if not group.frozen)
    rules = (*one.rules, LayerRule(layers=first.layers[0], multiple_of=first.width // 2, max_removed=0.5))
    only = wanted.model_copy(update={"budget": one.model_copy(update={"rules": rules}), "speedup": 1.0001})
    measure_as(monkeypatch, table, dense, [0.9])
    planned, rounds = run(dense, only)
    assert len(rounds) == 1
    assert int((planned.choice.widths != graph.widths).sum()) == 1


def test_the_fastest_that_keep_enough_are_measured_once(table, wanted, dense: Path, monkeypatch, capsys) -> None:
    seen = measure_as(monkeypatch, table, dense, [1.2])
    asked = wanted.model_copy(update={"speedup": None, "keep_importance": 0.9})
    planned, rounds = run(dense, asked)
    assert planned.prediction is not None
    assert planned.prediction.target is None
    assert [(entry["measured"], entry["used"]) for entry in rounds] == [(pytest.approx(seen[0]), True)]
    said = capsys.readouterr()
    assert "(+20.0%)\n" in said.out
    assert said.err == ""


def test_a_plan_within_the_tolerance_stands_where_the_corrected_table_allows_none(
    table, wanted, dense: Path, monkeypatch
) -> None:
    _, graph = table_of(load_model(dense), IMGSZ)
    least = solver_least(table, graph)
    tight = wanted.model_copy(update={"speedup": table.dense / (least * 1.0003)})
    measure_as(monkeypatch, table, dense, [1.0302])  # more than 3 % above what was predicted, less above the target
    planned, rounds = run(dense, tight)
    assert [entry["used"] for entry in rounds] == [True]
    assert planned.prediction is not None
    assert planned.prediction.predicted == pytest.approx(least)
    measure_as(monkeypatch, table, dense, [1.10])
    with pytest.raises(BudgetError, match="cannot bring the latency down to"):
        run(dense, tight)


def test_a_noisy_measurement_is_said(table, wanted, dense: Path, monkeypatch, capsys) -> None:
    measure_as(monkeypatch, table, dense, [1.0], width=0.2)
    run(dense, wanted)
    assert "this measurement is noisy, its 95 % interval is 20% wide" in capsys.readouterr().err


def solver_least(table: LatencyTable, graph: Graph) -> float:
    """The least latency that the budget allows."""
    scores = [np.ones(group.width) for group in graph.groups]
    problem = solver.build_problem(graph, BUDGET, scores, evaluate(table, graph))
    return float(problem.cost(solver.cheapest(problem)))


def test_a_table_of_another_machine_is_refused(table, wanted, dense: Path, tmp_path: Path) -> None:
    save_table(table.model_copy(update={"machine": "a toaster"}), tmp_path / "table.json")
    with pytest.raises(SettingsError, match="was measured on a toaster, this is"):
        run(dense, wanted)


def test_a_table_of_another_version_is_refused(table, wanted, dense: Path, monkeypatch) -> None:
    measure_as(monkeypatch, table, dense, [1.0], version="1.1")
    with pytest.raises(SettingsError, match=r"was measured in onnxruntime 1\.0, 1\.1 is installed"):
        run(dense, wanted)


def test_what_is_cut_beyond_what_faded_is_said(
    table, wanted, dense: Path, tiny_data: Path, monkeypatch, tmp_path: Path, capsys
) -> None:
    model = load_model(dense)
    plan = plan_pruning(model, wanted, IMGSZ).plan
    Fade(plan, model).apply(1.0)
    manifest.begin(tmp_path / "sparsify", "sparsify", {}, {})
    save_model(model, tmp_path / "sparsify" / "model.pt", {})
    sparse, least = tmp_path / "sparsify" / "model.pt", wanted.model_copy(update={"recalibrate_images": 0})
    for number, (fade, factors) in enumerate([(True, [1.0]), (True, [1.06, 1.06]), (False, [1.06, 1.06])]):
        manifest.finish(tmp_path / "sparsify", "sparsify", {"fade": fade}, {}, ["model.pt"], {})
        measure_as(monkeypatch, table, dense, factors)
        prune.prune(sparse, tiny_data, least, IMGSZ, 0, tmp_path / str(number))
        said = re.findall(r"prune: (\d+) of the (\d+) batch-norm channels", capsys.readouterr().out)
        if fade and factors != [1.0]:
            ((missing, cut),) = said
            assert 0 < int(missing) < int(cut)
        else:
            assert said == []


def test_a_manifest_of_another_program_says_nothing_of_fading(
    table, wanted, dense: Path, tmp_path: Path, capsys
) -> None:
    planned = plan_pruning(load_model(dense), wanted, IMGSZ)
    for content in ("[1]", '{"config": "x"}', "{"):
        (tmp_path / "manifest.json").write_text(content)
        prune._say_what_had_not_faded(tmp_path / "model.pt", planned)
    assert capsys.readouterr().out == ""


def test_a_device_of_a_file_is_reached(table, wanted, dense: Path, tmp_path: Path, monkeypatch) -> None:
    own = (Path(configs.__file__).parent / "devices" / "cpu.yaml").read_text().replace("name: cpu", "name: mine")
    (tmp_path / "mine.yaml").write_text(own)
    save_table(table.model_copy(update={"device": "mine"}), tmp_path / "table.json")
    measure_as(monkeypatch, table, dense, [1.0])
    _, rounds = run(dense, wanted.model_copy(update={"device": str(tmp_path / "mine.yaml")}))
    assert [entry["used"] for entry in rounds] == [True]


def test_the_stage_writes_what_was_predicted_and_measured(
    table, wanted, dense: Path, tiny_data: Path, monkeypatch, tmp_path: Path
) -> None:
    measure_as(monkeypatch, table, dense, [1.06, 1.06])
    prune.prune(dense, tiny_data, wanted, IMGSZ, 0, tmp_path / "out")
    latency = manifest.read_json(tmp_path / "out" / "manifest.json")["metrics"]["latency"]
    assert [entry["used"] for entry in latency["measured"]].count(True) == 1
    assert latency["target"] == pytest.approx(table.dense / 1.15)
    assert latency["bound"] <= latency["loss"]
    assert latency["table_sha256"] == table.sha256
