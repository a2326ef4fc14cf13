"""The comparison with the peers: what is refused, what is measured once, what goes on, and what comes out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compress import checkpoint
from compress.channels.graph import Graph, build_graph
from compress.errors import BenchmarkError, RunError, SettingsError
from compress.settings import Budget
from scripts.peers import equal_latency, outcome, stages, ways
from scripts.peers import study as study_of
from scripts.peers.study import Study, Wish

BUDGET = Budget(multiple_of=2, min_width=2)
TINY: dict[str, Any] = {
    "nc": 6,
    "backbone": [
        [-1, 1, "Conv", [8, 3, 2]],
        [-1, 1, "Conv", [8, 3, 2]],
        [-1, 1, "Conv", [16, 3, 2]],
        [-1, 1, "Conv", [16, 3, 2]],
        [-1, 1, "Conv", [16, 3, 2]],
    ],
    "head": [[[2, 3, 4], 1, "Detect", ["nc"]]],
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dense") / "dense.pt"
    torch.manual_seed(0)
    checkpoint.save_model(checkpoint.build_model(TINY), path, {})
    return path


@pytest.fixture(scope="module")
def graph(dense: Path) -> Graph:
    return build_graph(checkpoint.load_model(dense), 64)


@pytest.fixture
def study(tmp_path: Path, tiny_data: Path, dense: Path) -> Study:
    work = tmp_path / "work"
    for seed in (0, 1):
        folder = work / "dense" / f"seed{seed}"
        folder.mkdir(parents=True)
        (folder / "model.pt").write_bytes(dense.read_bytes())
        (folder / "manifest.json").write_text("{}")
    return Study(
        model="dense.pt",
        data=tiny_data,
        imgsz=64,
        split="test",
        speedup=1.8,
        budget=BUDGET,
        dense_epochs=1,
        epochs=2,
        sparsify_epochs=0,
        sr=0.003,
        batch=4,
        args={},
        variants=12,
        accept_noise=False,
        work=work,
    )


def fake_measurement(calls: list[dict[str, Any]], noisy: int = 0) -> Any:
    """Dense 20 ms; a cut network takes the share of the dense parameters of that. The first `noisy` calls are noisy."""

    def measure(files: dict[str, dict[str, Path]], **options: Any) -> dict[str, Any]:
        calls.append({"names": list(files), **options})
        sizes = {name: float(next(iter(paths.values())).read_text()) for name, paths in files.items()}
        runtime = next(iter(files["dense"]))
        ms = {name: 20 * size / sizes["dense"] for name, size in sizes.items()}
        bad = len(calls) <= noisy
        return {
            "cells": [{"model": name, "runtime": runtime, "p50_ms": ms[name], "samples_ms": []} for name in files],
            "comparisons": [
                {"model": name, "speedup": 20 / ms[name], "interval": [20 / ms[name]] * 2}
                for name in files
                if name != "dense"
            ],
            "noisy": bad,
            "noise": ["somebody compiles"] if bad else [],
            "device": {},
            "protocol": {},
        }

    return measure


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []

    def export(model: Any, name: str, wanted: Any, folder: Path, place: Any) -> Path:
        path = folder / f"{name}.onnx"
        path.write_text(str(sum(p.numel() for p in model.parameters())))
        return path

    monkeypatch.setattr(stages.variants, "export", export)
    monkeypatch.setattr(stages.latency, "measure", fake_measurement(found))
    return found


def row(way: str, seed: int, map50_95: float, ms: float = 10.0, runtime: str = "ncnn") -> dict[str, Any]:
    content = {"runtime": runtime, "way": way, "seed": seed, "map50_95": map50_95, "ms": ms, "speedup": 1.8}
    return content | {"macs": 5e8}


def test_ahead_is_more_than_the_larger_spread() -> None:
    rows = [row("espalier", seed, value) for seed, value in enumerate((0.60, 0.61, 0.62))]
    rows += [row("uniform", seed, value) for seed, value in enumerate((0.58, 0.58, 0.58))]
    rows += [row("random", seed, value) for seed, value in enumerate((0.52, 0.60, 0.65))]
    ours, uniform, random = outcome.summarise(rows, "espalier")
    assert ours["map50_95"] == pytest.approx(0.61)
    assert ours["sd"] == pytest.approx(0.01)
    assert "margin" not in ours
    assert (uniform["margin"], uniform["spread"]) == pytest.approx((0.03, 0.01))
    assert (uniform["ahead"], uniform["seeds_ahead"]) == (True, 3)
    assert random["margin"] == pytest.approx(0.02)
    assert random["spread"] == pytest.approx(np.std([0.52, 0.60, 0.65], ddof=1))
    assert (random["ahead"], random["seeds_ahead"]) == (False, 2)


def test_one_seed_has_no_spread_and_nobody_is_ahead_of_what_is_not_there() -> None:
    rows = [row("espalier", 0, 0.6), row("uniform", 0, 0.5), row("random", 1, 0.4)]
    _, uniform, random = outcome.summarise(rows, "espalier")
    assert (uniform["sd"], uniform["spread"], uniform["ahead"]) == (None, None, False)
    assert "margin" not in random  # of another seed
    text = outcome.table([uniform, random], {"uniform": "one share", "random": "by chance"}).splitlines()
    assert text[2] == "| ncnn | one share | 10.00 | 1.80× | 500 M | 0.5000 |  | +0.1000 |  |"
    assert text[3] == "| ncnn | by chance | 10.00 | 1.80× | 500 M | 0.4000 |  |  |  |"


def test_the_table_has_a_line_for_each_way_and_says_what_is_within_the_spread() -> None:
    rows = [row("espalier", 0, 0.60), row("espalier", 1, 0.62), row("random", 0, 0.55), row("random", 1, 0.65)]
    text = outcome.table(outcome.summarise(rows, "espalier"), {"espalier": "Espalier", "random": "by chance"})
    lines = text.splitlines()
    assert lines[2] == "| ncnn | Espalier | 10.00 | 1.80× | 500 M | 0.6100 | 0.0141 |  |  |"
    assert lines[3] == "| ncnn | by chance | 10.00 | 1.80× | 500 M | 0.6000 | 0.0707 | +0.0100 (within the spread) | 0.0707 |"  # fmt: skip  # noqa: E501
    assert len({line.count("|") for line in lines}) == 1


def test_random_widths_take_more_of_the_same_steps(graph: Graph) -> None:
    none, some, more, all_ = (ways.random_widths(graph, BUDGET, share, 3) for share in (0.0, 0.4, 0.7, 1.0))
    assert (none == graph.widths).all()
    assert (some <= none).all()
    assert (more <= some).all()
    assert some.sum() > more.sum() > all_.sum()
    assert (all_ == ways.uniform(graph, BUDGET, 0.0)).all()  # the least that the budget allows
    assert (some != ways.random_widths(graph, BUDGET, 0.4, 4)).any()


def test_uniform_cuts_keep_the_filters_of_largest_norm(study: Study, tmp_path: Path) -> None:
    case = study.case("uniform", "ncnn", 0)
    ways.uniform_l1(case, 0.5, tmp_path / "cut.pt")
    before, after = (checkpoint.load_model(path).state_dict() for path in (case.start, tmp_path / "cut.pt"))
    first = before["model.0.conv.weight"]
    best = first.abs().sum((1, 2, 3)).argsort(descending=True)[:4].sort().values
    assert torch.equal(after["model.0.conv.weight"], first[best])
    assert after["model.2.conv.weight"].shape[:2] == (8, 4)


@pytest.mark.parametrize("runtime", ["onnxruntime", "ncnn"])
def test_a_cut_meets_the_target_and_is_found_again(study: Study, calls: list[Any], runtime: str) -> None:
    found = stages.cut(study, "random", runtime, 0)
    assert found["speedup"] == pytest.approx(1.8, rel=0.03)
    folder = study.cut_folder("random", runtime, 0)
    model = checkpoint.load_model(folder / "model.pt")
    assert checkpoint.structure_hash(model) == found["structure"]
    assert found["params"] == sum(p.numel() for p in model.parameters())
    assert [path.name for path in folder.glob("*.pt")] == ["model.pt"]
    before = len(calls)
    assert stages.cut(study, "random", runtime, 0) == found
    assert len(calls) == before


def test_a_search_goes_on_after_its_last_measured_network(study: Study, calls: list[Any]) -> None:
    whole = stages.cut(replace(study, work=study.work), "random", "ncnn", 0)
    assert len(whole["points"]) > 1
    folder = study.cut_folder("random", "ncnn", 0)
    (folder / "cut.json").unlink()
    points = json.loads((folder / "points.json").read_text())
    case = study.case("random", "ncnn", 0)
    for point in points[:1]:
        ways.at_random(case, point["amount"], folder / point["file"])
    (folder / "points.json").write_text(json.dumps(points[:1]))
    before = len(calls)
    assert stages.cut(study, "random", "ncnn", 0) == whole
    assert len(calls) == before  # networks of these shapes were measured before


def test_equal_shapes_are_measured_once_and_other_seeds_begin_where_one_ended(study: Study, calls: list[Any]) -> None:
    first = stages.cut(study, "uniform", "ncnn", 0)
    before = len(calls)
    second = stages.cut(study, "uniform", "ncnn", 1)
    assert len(calls) == before
    assert [point["amount"] for point in second["points"]] == [first["amount"]]
    assert second["structure"] == first["structure"]


@pytest.mark.parametrize(("noisy", "attempts"), [(2, 3), (3, None)])
def test_noise_is_measured_again_and_then_refused(
    study: Study, calls: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, noisy: int, attempts: int | None
) -> None:
    monkeypatch.setattr(stages.latency, "measure", fake_measurement(calls, noisy))
    path = tmp_path / "cut.pt"
    ways.uniform_l1(study.case("uniform", "ncnn", 0), 0.5, path)
    if attempts is None:
        with pytest.raises(BenchmarkError, match="somebody compiles"):
            stages.measured(study, "ncnn", path, study.dense(0))
        assert list((study.work / "latencies" / "ncnn").iterdir()) == []
    else:
        assert stages.measured(study, "ncnn", path, study.dense(0))["noise"] == []
        assert len(calls) == attempts


def test_cells_come_seed_by_seed() -> None:
    cells = list(Wish([0, 1], ["espalier", "random"], ["ncnn"]).cells())
    assert cells == [("espalier", "ncnn", 0), ("random", "ncnn", 0), ("espalier", "ncnn", 1), ("random", "ncnn", 1)]


def test_a_study_of_other_settings_and_a_missing_peer_are_refused(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    wish = Wish([0], ["espalier", "random"], ["ncnn"])
    study_of.check(study, wish)
    study_of.check(study, wish)
    with pytest.raises(SettingsError, match="a study with another speedup, epochs"):
        study_of.check(replace(study, speedup=2.0, epochs=9), wish)
    with pytest.raises(SettingsError, match="must leave some of --epochs 2"):
        study_of.check(replace(study, sparsify_epochs=2), wish)
    monkeypatch.setattr(study_of, "version", lambda name: "1.5.0")
    with pytest.raises(SettingsError, match=r"torch-pruning 1\.6\.1 is needed, found 1\.5\.0"):
        study_of.check(study, Wish([0], ["tp_l1"], ["ncnn"]))


def test_a_report_takes_what_is_finished_and_the_last_latency(
    study: Study, calls: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wish = Wish([0, 1], ["uniform", "random"], ["ncnn"])
    with pytest.raises(RunError, match="nothing below"):
        equal_latency.report(study, wish, tmp_path / "peers.json")
    trained = []

    def finetune(model: Path, teacher: None, data: Path, settings: Any, common: Any, output: Path) -> Path:
        trained.append((common.seed, settings.epochs, settings.distill))
        output.mkdir(parents=True, exist_ok=True)
        (output / "model.pt").write_bytes(model.read_bytes())
        return output / "model.pt"

    def evaluate(model: Path, data: Path, **options: Any) -> dict[str, Any]:
        assert options == {"split": "test", "imgsz": 64}
        return {"map50_95": 0.5, "map50": 0.7, "images": 8, "per_class": {}}

    monkeypatch.setattr(stages, "finetune", finetune)
    monkeypatch.setattr(stages, "evaluate", evaluate)
    stages.make_dense(study, wish)
    stages.make_cuts(study, Wish([0], wish.ways, wish.runtimes))
    stages.fine_tune(study, wish)
    assert trained == [(0, 2, False), (0, 2, False)]
    assert "seed 1, ncnn, random: not cut yet" in capsys.readouterr().out
    equal_latency.report(study, wish, tmp_path / "peers.json")
    record = json.loads((tmp_path / "peers.json").read_text())
    assert [(r["way"], r["seed"], r["mode"]) for r in record["rows"]] == [("uniform", 0, "quick"), ("random", 0, "quick")]  # fmt: skip  # noqa: E501
    stages.measure_together(study, wish)
    assert calls[-1]["mode"] == "standard"
    assert len(calls[-1]["names"]) == 3
    before = len(calls)
    stages.measure_together(study, wish)
    assert len(calls) == before
    equal_latency.report(study, wish, tmp_path / "peers.json")
    record = json.loads((tmp_path / "peers.json").read_text())
    assert {r["mode"] for r in record["rows"]} == {"standard"}
    assert record["dense"] == {"seeds": {seed: {"map50_95": 0.5, "map50": 0.7} for seed in "01"}, "ms": {"ncnn": 20.0}}
    assert (tmp_path / "peers.png").stat().st_size > 1000


@pytest.mark.filterwarnings("ignore")  # the peer's own
@pytest.mark.parametrize("round_to", [None, 8])
def test_torch_pruning_leaves_a_checkpoint_that_trainers_keep(dense: Path, round_to: int | None) -> None:
    pytest.importorskip("torch_pruning", reason="a peer, not a dependency: pip install --no-deps torch-pruning==1.6.1")
    from scripts.peers import torch_pruning_cut

    model: Any = torch_pruning_cut.cut(checkpoint.load_model(dense), 0.4, 2, round_to, 64)
    before = checkpoint.load_model(dense).state_dict()
    after = model.state_dict()
    changed = [name for name, value in after.items() if value.shape != before[name].shape]
    assert changed
    assert checkpoint.plans_of(model)[0]["tool"] == "torch-pruning"
    widths = [m.out_channels for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    outputs = {m.out_channels for branch in ("cv2", "cv3") for part in getattr(model.model[-1], branch) for m in part[-1:]}  # fmt: skip  # noqa: E501
    assert outputs == {64, 6}
    if round_to:
        assert all(width % 8 == 0 or width in (6, 1) for width in widths)
