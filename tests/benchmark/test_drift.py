from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmark import drift, store

SHA256 = "a" * 64


def measured(folder: Path, day: int, *cells: dict[str, Any], **more: Any) -> list[int]:
    """Keep a record of that day, and return its rows. A cell is a p50 in ms, its interval is ±1 %."""
    full = [
        {"model": "m", "model_sha256": SHA256, "runtime": "ncnn", "unit": "ms", **cell}
        | {"intervals": {"p50_ms": [0.99 * cell["p50_ms"], 1.01 * cell["p50_ms"]]}}
        for cell in cells
    ]
    content = {"cells": full, "device": {"cpu": "Acme"}, "protocol": {"threads": 2, "imgsz": 64}}
    content |= {"measured_at": f"2026-11-{day:02d}T12:00:00Z", **more}
    path = folder / f"{day}.json"
    path.write_text(json.dumps(content))
    return store.add(path, folder / "s.sqlite")


def remark(folder: Path, ids: list[int]) -> str | None:
    return drift.remark(ids, folder / "s.sqlite")


def test_a_p50_that_moved_is_told_with_what_was_before(tmp_path: Path) -> None:
    assert remark(tmp_path, measured(tmp_path, 1, {"p50_ms": 10.0})) is None
    assert remark(tmp_path, measured(tmp_path, 2, {"p50_ms": 10.2})) is None  # outside the interval, within 3 %
    said = remark(tmp_path, measured(tmp_path, 3, {"p50_ms": 12.0}))
    assert said is not None
    assert said.startswith(
        "m on ncnn: 2 earlier runs of this file had a p50 of 10.00 ms to 10.20 ms, this one 12.00 ms:"
    )


def test_the_farthest_is_told(tmp_path: Path) -> None:
    other = {"model": "n", "model_sha256": "b" * 64}
    measured(tmp_path, 1, {"p50_ms": 10.0}, {"p50_ms": 20.0, **other})
    said = remark(tmp_path, measured(tmp_path, 2, {"p50_ms": 11.0}, {"p50_ms": 25.0, **other}))
    assert said is not None
    assert said.startswith("n on ncnn: an earlier run of this file had a p50 of 20.00 ms, this one 25.00 ms:")


@pytest.mark.parametrize(
    "other",
    [{"model_sha256": "b" * 64}, {"runtime": "onnxruntime"}, {"runtime_version": "2"}, {"threads": 1}, {"batch": 4}],
)
def test_other_files_and_settings_are_no_drift(tmp_path: Path, other: dict[str, Any]) -> None:
    measured(tmp_path, 1, {"p50_ms": 10.0, **other})
    assert remark(tmp_path, measured(tmp_path, 2, {"p50_ms": 12.0})) is None


def test_a_file_that_is_not_known_has_no_earlier_runs(tmp_path: Path) -> None:
    measured(tmp_path, 1, {"p50_ms": 10.0, "model_sha256": "b" * 64})
    assert remark(tmp_path, measured(tmp_path, 2, {"p50_ms": 12.0, "model_sha256": None})) is None


def test_what_was_noisy_does_not_count(tmp_path: Path) -> None:
    measured(tmp_path, 1, {"p50_ms": 10.0}, noisy=True, noise=["a compiler ran"])
    assert remark(tmp_path, measured(tmp_path, 2, {"p50_ms": 12.0})) is None
