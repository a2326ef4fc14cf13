"""From a target in words to widths, and what is said where there are none."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from compress import prune
from compress.checkpoint import load_model
from compress.errors import BudgetError, SettingsError
from compress.latency import solver
from compress.latency.front import draw_front
from compress.latency.plan import choose_by_latency, find_table, limit_of
from compress.latency.table import LatencyTable, amount, evaluate, save_table
from compress.planning import plan_pruning
from compress.pruning.importance import importance
from compress.settings import Budget, Prune
from tables import BUDGET, table_of

IMGSZ = 64


@pytest.fixture(scope="module")
def table(dense: Path) -> LatencyTable:
    made, graph = table_of(load_model(dense), IMGSZ)
    return made.model_copy(update={"dense": float(evaluate(made, graph)(graph.widths))})


@pytest.fixture
def path(table: LatencyTable, tmp_path: Path) -> Path:
    save_table(table, tmp_path / "table.json")
    return tmp_path / "table.json"


def settings(**content: object) -> Prune:
    return Prune(**{"importance": "l1", "budget": BUDGET, **content})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("content", "limit"), [({"latency": "20ms"}, 20.0), ({"latency": "20.5 ms"}, 20.5), ({"speedup": "1.25x"}, None)]
)
def test_targets_are_read(content: dict, limit: float | None, table: LatencyTable) -> None:
    assert limit_of(settings(**content), table) == pytest.approx(limit or table.dense / 1.25)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"latency": "20"}, "latency"),
        ({"latency": "fast"}, "latency"),
        ({"speedup": "1x"}, "greater than 1"),
        ({"speedup": "twice"}, "speedup"),
        ({"speedup": 2.0, "macs": 0.5}, "exactly one of"),
        ({"speedup": 2.0, "keep_importance": 0.9}, "exactly one of .* got speedup, keep_importance"),
        ({"keep_importance": 1.0}, "less than 1"),
        ({"macs": 0.5, "memory": "8MB"}, "memory goes with latency, speedup or keep_importance"),
        ({"speedup": 2.0, "memory": "8 bits"}, "must be such as 8MB, got '8 bits'"),
        ({"latency": "12"}, "must be such as 12ms, or 120M for instructions, got '12'"),
        ({"latency": 12}, "must be such as 12ms, or 120M for instructions, got 12"),
    ],
)
def test_a_target_that_means_nothing_is_refused(content: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**content)


def test_instructions_and_milliseconds_are_not_mixed(table: LatencyTable) -> None:
    with pytest.raises(SettingsError, match="latency 20M is in instructions, the table of cpu is in ms"):
        limit_of(settings(latency="20M"), table)
    counted = table.model_copy(update={"unit": "instructions", "dense": 3e7})
    assert limit_of(settings(latency="20M"), counted) == 20e6


def test_a_target_above_the_dense_model_is_refused(table: LatencyTable) -> None:
    with pytest.raises(SettingsError, match="latency 99ms is not below that of the dense model"):
        limit_of(settings(latency="99ms"), table)


def test_a_missing_table_is_answered_with_the_command_that_makes_it(table: LatencyTable, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError) as caught:
        find_table(settings(speedup=2.0), IMGSZ, table.structure, "my.pt")
    assert str(caught.value).endswith(
        "make it with python -m benchmark.profile --model my.pt --device cpu --runtime onnxruntime --imgsz 64 "
        "--threads 1 --multiple-of 2 --min-width 2 --max-removed 0.75"
    )


@pytest.mark.parametrize(
    ("content", "imgsz", "message"),
    [
        ({"runtime": "ncnn"}, IMGSZ, "is of runtime onnxruntime, not ncnn"),
        (
            {"device": "rpi5"},
            IMGSZ,
            "is of device cpu, not rpi5, of runtime onnxruntime, not ncnn, of threads 1, not 4",
        ),
        ({"threads": 4}, IMGSZ, "is of threads 1, not 4"),
        ({}, 128, "is of imgsz 64, not 128"),
    ],
)
def test_a_table_of_something_else_is_refused(content: dict, imgsz: int, message: str, path: Path, table) -> None:
    with pytest.raises(SettingsError, match=message):
        find_table(settings(speedup=2.0, table=str(path), **content), imgsz, table.structure)


def test_a_table_of_another_precision_or_model_is_refused(table: LatencyTable, path: Path) -> None:
    with pytest.raises(SettingsError, match=r"is of structure [0-9a-f]{12}, not bbbbbbbbbbbb"):
        find_table(settings(speedup=2.0, table=str(path)), IMGSZ, "b" * 64)
    save_table(table.model_copy(update={"precision": "fp16"}), path)
    with pytest.raises(SettingsError, match="is of precision fp16, not fp32"):
        find_table(settings(speedup=2.0, table=str(path)), IMGSZ, table.structure)


def test_widths_meet_the_target_and_the_correction_moves_it(dense: Path, table: LatencyTable) -> None:
    model = load_model(dense)
    _, graph = table_of(model, IMGSZ)
    scores = importance(graph, model, "l1")
    latency = evaluate(table, graph)
    wanted = settings(latency=f"{0.85 * table.dense:.6f}ms")
    choice, found = choose_by_latency(graph, scores, wanted, table, Path("t.json"))
    assert found.predicted == pytest.approx(latency(choice.widths))
    assert found.target is not None
    assert found.predicted <= found.target
    assert found.bound <= found.loss
    assert 0 < found.kept < 1
    slower, corrected = choose_by_latency(graph, scores, wanted, table, Path("t.json"), correction=1.05)
    assert latency(slower.widths) * 1.05 == pytest.approx(corrected.predicted)
    assert corrected.target is not None
    assert corrected.predicted <= corrected.target
    assert latency(slower.widths) < latency(choice.widths)


def test_what_cannot_be_reached_names_the_least_and_what_stands_in_the_way(dense: Path, table: LatencyTable) -> None:
    model = load_model(dense)
    _, graph = table_of(model, IMGSZ)
    scores = [np.ones(group.width) for group in graph.groups]
    with pytest.raises(BudgetError) as caught:
        choose_by_latency(graph, scores, settings(latency="1ms"), table, Path("t.json"))
    assert "the budget cannot bring the latency down to 1.000 ms" in str(caught.value)
    assert "is reachable with multiples of 2, min_width 2, max_removed 0.75; most of it is left in model." in str(
        caught.value
    )


def test_memory_is_a_second_limit(dense: Path, table: LatencyTable) -> None:
    model = load_model(dense)
    _, graph = table_of(model, IMGSZ)
    scores = importance(graph, model, "l1")
    _, free = choose_by_latency(graph, scores, settings(speedup=1.05), table, Path("t.json"))
    most = free.memory_bytes * 0.9 / 1e6
    _, tight = choose_by_latency(graph, scores, settings(speedup=1.05, memory=f"{most:.6f}MB"), table, Path("t.json"))
    assert tight.memory_bytes <= most * 1e6
    assert tight.loss > free.loss
    with pytest.raises(BudgetError, match="need at most 1kB of memory: all at their least need"):
        choose_by_latency(graph, scores, settings(speedup=1.05, memory="1kB"), table, Path("t.json"))


def test_memory_that_rules_out_what_is_fast_enough_is_said_to_do_so(dense: Path, table: LatencyTable) -> None:
    """The narrowest widths are not the fastest ones here: they are off the blocks."""
    stairs = [s.model_copy(update={"terms": {**s.terms, "in_off_4": 1.0}}) for s in table.segments]
    steep = table.model_copy(update={"segments": tuple(stairs)})
    model = load_model(dense)
    _, graph = table_of(model, IMGSZ)
    scores, latency = importance(graph, model, "l1"), evaluate(steep, graph)
    problem = solver.build_problem(graph, BUDGET, scores, latency)
    fastest = float(problem.cost(solver.cheapest(problem)))
    narrowest = float(problem.cost(np.array([parts.size - 1 for parts in problem.parts])))
    assert fastest < narrowest
    wanted = settings(latency=f"{(fastest + narrowest) / 2:.6f}ms", memory="1kB")
    slow = steep.model_copy(update={"dense": 10 * narrowest})
    with pytest.raises(BudgetError, match="no widths within the latency need at most 1kB of memory"):
        choose_by_latency(graph, scores, wanted, slow, Path("t.json"))


def test_the_fastest_widths_keep_what_is_asked_for(dense: Path, table: LatencyTable) -> None:
    model = load_model(dense)
    _, graph = table_of(model, IMGSZ)
    scores = importance(graph, model, "l1")
    _, within = choose_by_latency(graph, scores, settings(latency=f"{0.85 * table.dense:.6f}ms"), table, Path("t.json"))
    choice, found = choose_by_latency(graph, scores, settings(keep_importance=within.kept), table, Path("t.json"))
    shares = [
        np.sort(score)[score.size - int(width) :].sum() / score.sum()
        for score, width, group in zip(scores, choice.widths, graph.groups, strict=True)
        if not group.frozen
    ]
    assert found.kept == pytest.approx(np.exp(np.mean(np.log(shares))))  # as --front and the records call it
    assert found.kept >= within.kept * (1 - 1e-9)
    assert found.predicted <= within.predicted * (1 + 1e-9)
    assert found.bound <= found.predicted < table.dense
    assert (found.target, found.keep_importance) == (None, within.kept)
    _, less = choose_by_latency(graph, scores, settings(keep_importance=within.kept - 0.1), table, Path("t.json"))
    assert less.predicted < found.predicted
    assert within.kept - 0.1 <= less.kept < found.kept


def test_importance_that_only_the_uncut_model_keeps_is_refused(dense: Path, table: LatencyTable) -> None:
    model = load_model(dense)
    _, graph = table_of(model, IMGSZ)
    scores = importance(graph, model, "l1")
    with pytest.raises(BudgetError) as caught:
        choose_by_latency(graph, scores, settings(keep_importance=0.99999), table, Path("t.json"))
    assert str(caught.value).startswith("no faster widths that the budget allows keep 100.00% of the importance, the")
    with pytest.raises(BudgetError, match="no widths that keep so much need at most 1kB of memory"):
        choose_by_latency(graph, scores, settings(keep_importance=0.5, memory="1kB"), table, Path("t.json"))


def test_a_budget_with_other_widths_is_refused(dense: Path, table: LatencyTable, path: Path) -> None:
    wanted = settings(speedup=1.2, table=str(path)).model_copy(update={"budget": Budget(multiple_of=1, min_width=1)})
    with pytest.raises(SettingsError, match="the latency table was not measured at"):
        plan_pruning(load_model(dense), wanted, IMGSZ)


def test_the_command_prints_the_prediction(dense: Path, path: Path, capsys) -> None:
    words = ["--model", dense, "--imgsz", IMGSZ, "--speedup", "1.15x", "--table", path, "--dry-run"]
    rules = ["--importance", "l1", "--multiple-of", "2"]
    (path.parent / "budget.yaml").write_text("multiple_of: 2\nmin_width: 2\n")
    prune.app([str(word) for word in [*words, *rules, "--budget", path.parent / "budget.yaml"]], standalone_mode=False)
    said = capsys.readouterr().out
    assert "predicted (1.1" in said
    assert "no widths within the target lose less than" in said


def test_the_command_finds_the_fastest_that_keep_enough(dense: Path, path: Path, capsys) -> None:
    (path.parent / "budget.yaml").write_text("multiple_of: 2\nmin_width: 2\n")
    words = ["--model", dense, "--imgsz", IMGSZ, "--keep-importance", 0.9, "--table", path, "--dry-run"]
    words += ["--importance", "l1", "--budget", path.parent / "budget.yaml"]
    prune.app([str(word) for word in words], standalone_mode=False)
    said = " ".join(capsys.readouterr().out.split())
    assert "90.00% of the importance, the fastest on cpu in onnxruntime" in said
    assert "the fastest that keeps 90.00%; memory" in said
    assert "kept: 90." in said
    assert "no widths that keep so much take less than" in said


def test_a_front_without_points_is_refused(dense: Path, path: Path) -> None:
    wanted = settings(speedup=2.0, memory="1kB", table=str(path))
    with pytest.raises(BudgetError, match="no widths that the budget allows need at most 1kB of memory"):
        draw_front(dense, wanted, IMGSZ, 0, None, 4, path.parent / "front")
    assert not (path.parent / "front").exists()


def test_the_front_is_printed_drawn_and_written(dense: Path, path: Path, table: LatencyTable, capsys) -> None:
    (path.parent / "budget.yaml").write_text("multiple_of: 2\nmin_width: 2\n")
    output = path.parent / "front"
    words = ["--model", dense, "--imgsz", IMGSZ, "--table", path, "--importance", "l1", "--front", 4]
    words += ["--budget", path.parent / "budget.yaml", "--output", output]
    prune.app([str(word) for word in words], standalone_mode=False)
    said = capsys.readouterr().out
    assert "1.00×" in said
    assert f"over the {amount(table.dense, table.unit)} that the dense model was measured at" in said
    assert f"within {table.fit.median_error:.1%} (median), {table.fit.p95_error:.1%} (95th percentile)" in said
    record = json.loads((output / "front.json").read_text())
    points = record["points"]
    assert (record["table_sha256"], len(points)) == (table.sha256, 4)
    assert [point["kept"] for point in points] == sorted((point["kept"] for point in points), reverse=True)
    assert points[0]["latency"] == pytest.approx(table.dense)
    assert (output / "front.png").read_bytes().startswith(b"\x89PNG")


def test_a_runtime_that_the_device_does_not_run_is_no_missing_table(dense: Path) -> None:
    wanted = settings(speedup=2.0, runtime="tensorrt")
    with pytest.raises(SettingsError, match="cpu does not run 'tensorrt': choose one of onnxruntime"):
        find_table(wanted, IMGSZ, "0" * 64)


def test_the_front_says_too_that_a_sensitivity_is_of_other_weights(
    dense: Path, path: Path, table: LatencyTable, capsys
) -> None:
    measured = {
        "schema_version": 1,
        "structure": table.structure,
        "model": "other.pt",
        "data": "x.yaml",
        "split": "val",
    }
    measured |= {"imgsz": IMGSZ, "images": 1, "importance": "l1", "repaired": False, "map50_95": 0.5, "ties": []}
    (path.parent / "s.json").write_text(json.dumps({**measured, "model_sha256": "0" * 64}))
    (path.parent / "budget.yaml").write_text("multiple_of: 2\nmin_width: 2\n")
    words = ["--model", dense, "--imgsz", IMGSZ, "--table", path, "--importance", "l1", "--front", 2]
    words += ["--budget", path.parent / "budget.yaml", "--sensitivity", path.parent / "s.json"]
    prune.app([str(word) for word in words], standalone_mode=False)
    assert "was measured on the weights of other.pt, not of this dense.pt" in capsys.readouterr().err
