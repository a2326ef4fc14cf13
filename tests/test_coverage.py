"""docs/coverage.md: a sample of its rows is measured anew, and all of them keep what the page promises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scripts.studies import coverage, zoo

SAMPLE = ("yolov10n", "yolo12n", "yolo26n-seg", "shufflenet_v2_x1_0", "timm/lcnet_100")
ROOT = Path(__file__).parents[1]
# Of the parameters of detectors, this share must be prunable; the others are what can be had.
LEAST = {"yolov3": 0.9, "yolov5": 0.9, "yolov6": 0.9, "yolov8": 0.9, "yolov9": 0.9, "yolov10": 0.8, "yolo": 0.8}


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return json.loads((ROOT / coverage.RESULT).read_text())["rows"]


@pytest.mark.parametrize("name", SAMPLE)
def test_a_row_of_the_sample(name: str, rows: list[dict[str, Any]]) -> None:
    recorded = next(row for row in rows if row["model"] == name)
    row = coverage.row(name)
    for key in ("groups", "params", "frozen"):
        assert row[key] == recorded[key]
    assert row["prunable_params"] == pytest.approx(recorded["prunable_params"], abs=1e-6)
    assert max(row["oracle"]) <= 1e-4
    assert row["params_left"] < 0.5  # 60 % of the channels are gone
    assert row["round_trip"] == 0.0
    assert row["onnx"] <= 1e-4
    assert row["trained"]


def test_the_record_has_every_model_and_all_pass(rows: list[dict[str, Any]]) -> None:
    assert [row["model"] for row in rows] == zoo.names()
    for row in rows:
        assert len(row["oracle"]) == 3
        assert max(row["oracle"]) <= 1e-4, row["model"]
        assert row["onnx"] <= 1e-3, row["model"]
        assert row["round_trip"] <= 1e-6, row["model"]
        assert row["trained"], row["model"]


def test_detectors_can_be_pruned_nearly_everywhere(rows: list[dict[str, Any]]) -> None:
    share = {row["model"]: row["prunable_params"] for row in rows}
    for name in (*zoo.DETECT, *zoo.SCALED):
        least = next(value for family, value in LEAST.items() if name.startswith(family))
        assert share[name] >= least, name


def test_the_page_is_made_of_the_record(rows: list[dict[str, Any]]) -> None:
    peer = json.loads((ROOT / coverage.PEER).read_text())["rows"]
    text = (ROOT / coverage.PAGE).read_text(encoding="utf-8")
    assert text.endswith(coverage.page(rows, peer))


def test_a_model_that_cannot_be_measured_is_a_row_that_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> Any:
        raise ValueError(f"{name} is odd\nat length")

    monkeypatch.setattr(zoo, "build", fail)
    row = coverage.measure("yolov8n")
    assert row == {"model": "yolov8n", "error": "ValueError: yolov8n is odd"}
    assert "| yolov8n | | | | | ValueError: yolov8n is odd |" in coverage.page([row], [])
