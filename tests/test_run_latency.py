"""A pipeline whose target is a latency: the table is made first, and what cannot work is said before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from benchmark import profile
from benchmark.observe import Wanted
from compress import run
from compress.channels.graph import build_graph
from compress.errors import BudgetError, SettingsError
from compress.latency.table import Fit, LatencyTable, Segment, evaluate, save_table
from compress.settings import Run, load_run

MODEL = {
    "nc": 80,
    "backbone": [
        [-1, 1, "Conv", [8, 3, 2]],
        [-1, 1, "Conv", [16, 3, 2]],
        [-1, 1, "C2f", [16, True]],
        [-1, 1, "Conv", [16, 3, 2]],
        [-1, 1, "Conv", [24, 3, 2]],
        [-1, 1, "Conv", [24, 3, 2]],
    ],
    "head": [[[3, 4, 5], 1, "Detect", ["nc"]]],
}


@pytest.fixture
def settings(tmp_path: Path, tiny_data: Path, monkeypatch) -> Any:
    """Make a pipeline's settings, with changes to its prune section."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "narrow.yaml").write_text(yaml.safe_dump(MODEL))

    def make(*overrides: str, **prune: Any) -> Run:
        content = {
            "name": "tiny",
            "model": "narrow.yaml",
            "data": str(tiny_data),
            "imgsz": 64,
            "train": {"epochs": 1},
            "sparsify": {"epochs": 1},
            "prune": {"budget": {"multiple_of": 4, "min_width": 4}, **prune},
            "finetune": {"epochs": 1},
        }
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(content))
        return load_run(tmp_path / "tiny.yaml", list(overrides))

    return make


@pytest.fixture
def profiled(monkeypatch) -> list[Any]:
    """Instead of measuring: a table in which every product of channels costs the same. Its models are listed."""
    made: list[Any] = []

    def stand_in(model: Any, wanted: Wanted, output: Path | None) -> None:
        from compress.checkpoint import structure_hash
        from compress.latency.table import default_path

        graph, structure = build_graph(model, wanted.imgsz), structure_hash(model)
        segments = tuple(Segment(name=t, tensor=t, before=None, terms={"product": 1e-3}) for t in graph.positions)
        table = LatencyTable(
            unit="ms",
            device=wanted.device,
            machine=None,
            runtime=wanted.runtime,
            runtime_version="1",
            precision="fp32",
            threads=wanted.threads,
            imgsz=wanted.imgsz,
            structure=structure,
            budget=wanted.budget,
            dense=1.0,
            dense_interval=(1.0, 1.0),
            scale=1.0,
            offset=0.0,
            segments=segments,
            fit=Fit(variants=1, median_error=0.0, p95_error=0.0),
        )
        table = table.model_copy(update={"dense": float(np.asarray(evaluate(table, graph)(graph.widths)))})
        place = (wanted.device, wanted.runtime, wanted.threads, wanted.imgsz, structure, wanted.budget)
        save_table(table, output or default_path(*place))
        made.append(model)

    monkeypatch.setattr(profile, "profile", stand_in)
    return made


def test_the_table_is_made_of_the_model_as_it_will_be_trained(settings, profiled: list[Any], tiny_data: Path) -> None:
    run.check(settings(speedup="1.2x"), tiny_data)
    assert [model.model[-1].nc for model in profiled] == [6]  # the data set's classes, not the YAML's 80
    assert len(list(Path("runs/tables").glob("cpu-onnxruntime-1t-64px-*.json"))) == 1


def test_the_table_goes_where_the_settings_say(settings, profiled: list[Any], tiny_data: Path) -> None:
    run.check(settings(speedup="1.2x", table="mine.json"), tiny_data)
    assert Path("mine.json").is_file()
    assert not Path("runs/tables").exists()


def test_what_cannot_be_reached_is_said_before_training(settings, profiled: list[Any], tiny_data: Path) -> None:
    with pytest.raises(BudgetError, match="the budget cannot bring the latency down to"):
        run.check(settings(speedup="50x"), tiny_data)


def test_importance_is_asked_for_before_it_is_known(settings, profiled: list[Any], tiny_data: Path) -> None:
    run.check(settings("sparsify.fade=false", keep_importance=0.9999), tiny_data)
    assert len(profiled) == 1
    with pytest.raises(BudgetError, match="need at most 1kB of memory"):
        run.check(settings(keep_importance=0.9, memory="1kB"), tiny_data)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sparsify.fade=true", "prune.keep_importance would cut once more: set sparsify.fade=false"),
        ("sparsify.sr=auto", "cannot tell how many channels prune.keep_importance will remove: set sparsify.share"),
    ],
)
def test_a_share_of_importance_that_the_training_changes_is_refused(settings, override: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        settings(override, "sparsify.epochs=2", keep_importance=0.9)


def test_without_a_latency_no_table_is_made(settings, profiled: list[Any], tiny_data: Path) -> None:
    run.check(settings(macs=0.7), tiny_data)
    assert profiled == []


@pytest.mark.parametrize("override", ["prune.runtime=ncnn", "benchmark.threads=2", "prune.threads=2"])
def test_a_target_that_the_benchmark_does_not_measure_is_refused(settings, override: str) -> None:
    with pytest.raises(SettingsError, match=r"which benchmark does not measure: set benchmark\.runtimes and"):
        settings(override, speedup="2x")


def test_the_pipelines_file_asks_for_a_speedup(root: Path, monkeypatch) -> None:
    monkeypatch.chdir(root)
    found = load_run(Path("configs/pipelines/bccd_latency.yaml"), [])
    assert (found.prune.speedup, found.prune.by_latency, found.prune.budget.multiple_of) == (2.0, True, 16)
