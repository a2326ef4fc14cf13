from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
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


def test_runs_of_one_file_are_repeats(tmp_path: Path) -> None:
    measured(tmp_path, 1, {"p50_ms": 10.0}, {"p50_ms": 20.0, "threads": 1})
    measured(tmp_path, 2, {"p50_ms": 90.0}, noisy=True, noise=["a compiler ran"])
    measured(tmp_path, 3, {"p50_ms": 11.0}, {"p50_ms": 30.0, "model_sha256": "b" * 64})
    found = drift.repeats(store.find(tmp_path / "s.sqlite"))
    assert [(item.p50s, item.last.p50) for item in found] == [((10.0, 11.0), 11.0)]


def test_where_the_next_run_is_expected() -> None:
    assert drift.next_run([10.0, 11.0]) is None
    # Student's t of 2 degrees of freedom is 4.303: 4.303 · 0.1 · √(1 + 1/3) = 0.49687 in log p50.
    low, high = drift.next_run([math.exp(x) for x in (0.9, 1.0, 1.1)]) or (0.0, 0.0)
    assert math.log(low) == pytest.approx(1 - 0.49687, abs=1e-5)
    assert math.log(high) == pytest.approx(1 + 0.49687, abs=1e-5)


def test_expectations_hold_as_often_as_they_say() -> None:
    draws = np.exp(np.random.default_rng(0).normal(2.0, 0.02, (2000, 5)))
    ends = np.array([drift.next_run(list(row[:4])) for row in draws])
    inside = (ends[:, 0] <= draws[:, 4]) & (draws[:, 4] <= ends[:, 1])
    assert inside.mean() == pytest.approx(0.95, abs=0.015)


def test_only_the_newest_runs_tell_the_next() -> None:
    assert drift.next_run([99.0, *[10.0] * drift.NEWEST]) == pytest.approx((10.0, 10.0))
