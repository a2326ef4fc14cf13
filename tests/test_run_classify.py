"""The whole pipeline for a classifier: judged by top-1, in one cut and in rounds."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmark import turns
from compress import run
from compress.errors import run_app
from compress.shapes import Shapes, generate

MODEL = """\
nc: 6
activation: torch.nn.ReLU()
backbone:
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [32, 3, 2]]
head:
  - [-1, 1, nn.AdaptiveAvgPool2d, [1]]
  - [-1, 1, nn.Flatten, []]
  - [-1, 1, nn.Linear, [32, nc]]
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to work in: a data set, a model, and a pipeline of one epoch a stage."""
    folder = tmp_path_factory.mktemp("home")
    data = generate(folder / "crops", Shapes(train=16, val=8, test=8, imgsz=96, task="classify"))
    (folder / "narrow.yaml").write_text(MODEL)
    training = {"epochs": 1, "batch": 8, "args": {"nbs": 8, "warmup_epochs": 0.0}}
    config = {
        "name": "classifier",
        "model": "narrow.yaml",
        "data": str(data),
        "imgsz": 32,
        "workers": 0,
        "train": training,
        "sparsify": {**training, "sr": 0.01, "start": "model"},
        "prune": {"percent": 0.5, "budget": {"multiple_of": 1, "min_width": 2}},
        "finetune": {**training, "distill": False},
        "export": {"parity_images": 2},
        "benchmark": {"split": "test"},
    }
    (folder / "classifier.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture
def start(home: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> Callable[..., tuple[int, str, str]]:
    """Run the command in this process with a benchmark of half a second; return exit code, output and error."""
    monkeypatch.chdir(home)
    monkeypatch.setenv("ESPALIER_STORE", str(home / "store.sqlite"))  # test_run.py has pipelines of the same name
    monkeypatch.setitem(turns.MODES, "quick", turns.Mode(20, 0.2, 0.05, "for tests"))
    monkeypatch.setattr(turns, "WARM_UP_CAP_S", 0.3)

    def command(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["compress.run", "--config", "classifier.yaml", *words])
        code = 0
        capfd.readouterr()
        try:
            run_app(run.app)
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capfd.readouterr()

    return command


def test_a_classifier_runs_to_its_end(start, home: Path) -> None:
    code, out, err = start()
    assert code == 0, err
    summary: dict[str, Any] = json.loads((home / "runs" / "classifier" / "summary.json").read_text())
    for side in (summary["dense"], summary["pruned"]):
        assert 0.0 <= side["top1"] <= side["top5"] <= 1.0
        assert side["top1_onnx"] == side["top1"]
        assert not [key for key in side if key.startswith("map")]
    assert (summary["dense"]["epochs"], summary["pruned"]["epochs"]) == (1, 2)  # sparsified from nothing, as the paper
    assert summary["pruned"]["params"] < 0.6 * summary["dense"]["params"]
    assert "top-1" in out
    text = (home / "runs" / "classifier" / "report.md").read_text()
    assert "accuracy on the test split of crops, 32 px." in text
    assert "| top-5 |" in text
    assert "mAP" not in text


def test_rounds_of_a_classifier_are_judged_by_top_1(start, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for rest in ("export", "benchmark"):
        monkeypatch.setattr(run, rest, lambda *_: {})
    code, out, err = start("name=rounds", "iterations=2", "map_budget=1.0")
    assert code == 0, err
    record = json.loads((home / "runs" / "rounds" / "rounds.json").read_text())
    assert (record["metric"], record["kept"]) == ("top1", 2)
    assert re.search(r"round 2 of 2: \d+\.\d% of the MACs kept, ", out)
    assert f"val top-1 {record['rounds'][1]['score']:.3f}" in out
    from compress.checkpoint import load_model

    found: Any = load_model(record["rounds"][1]["model"])
    assert sum(module.num_features for module in found.modules() if hasattr(module, "num_features")) == 32  # of 64


def test_a_teacher_is_refused_before_anything_is_trained(start, home: Path) -> None:
    code, _, err = start("name=taught", "finetune.distill=true")
    assert code == 2
    assert "a classifier has no teacher, Ultralytics distils detectors only: set finetune.distill=false" in err
    assert not (home / "runs" / "taught" / "01_train").exists()


def test_runs_of_both_kinds_stand_side_by_side() -> None:
    from benchmark.sections import overview

    common = {"macs_speedup": 2.0, "speedup": {"torch": 1.5}, "realised": {"torch": 0.75}}
    found = overview(
        [
            {"name": "a", "dense": {"top1": 0.9}, "pruned": {"top1": 0.8}, **common},
            {"name": "b", "dense": {"map50_95": 0.5}, "pruned": {"map50_95": 0.4}, **common},
        ]
    )
    assert found.columns[1:3] == ["dense accuracy", "pruned accuracy"]
    assert [row[1:3] for row in found.rows] == [["0.900", "0.800"], ["0.500", "0.400"]]
