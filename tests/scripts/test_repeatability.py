"""scripts/studies/repeatability.py: what it makes of profiles and of repeated measurements."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compress import manifest
from scripts.studies import repeatability


def a_run(p50_ms: float, half_ms: float, twin: float, reference: float) -> dict[str, Any]:
    ratios = {
        name: {"speedup": value, "interval": [value - 0.01, value + 0.01]}
        for name, value in (("twin", twin), ("reference", reference))
    }
    return {
        "p50_ms": p50_ms,
        "interval_ms": [p50_ms - half_ms, p50_ms + half_ms],
        "ratios": ratios,
        "noise": [],
    }


def agreements(**changes: float) -> dict[str, dict[str, float]]:
    figures = {"plain_ms": 10.0, "profiled_ms": 11.0, "model_run_ms": 10.9, "kernels_ms": 9.7}
    figures |= {"ours_ms": 8.0, "loop_ms": 7.0, "decoding_ms": 0.8} | changes
    return {"onnxruntime": figures, "ncnn": figures}


def test_a_profile_is_split_into_its_runs_and_their_kernels() -> None:
    def event(name: str, ts: int, dur: int, cat: str = "Node") -> dict[str, Any]:
        return {"name": name, "ts": ts, "dur": dur, "cat": cat}

    events = [
        event("constant_kernel_time", 5, 500),  # before any run
        event("a_kernel_time", 1010, 2000),
        event("b_kernel_time", 3020, 1000),
        event("b_fence_after", 4020, 400),
        event("SequentialExecutor::Execute", 1005, 3100, "Session"),
        event("model_run", 1000, 3500, "Session"),
        event("a_kernel_time", 9010, 4000),
        event("model_run", 9000, 4200, "Session"),
    ]
    assert repeatability.profiled_runs(events) == ([3.5, 4.2], [3.0, 4.0])


def test_in_each_round_every_query_is_called_once_in_changing_order() -> None:
    called: list[str] = []
    samples = repeatability.take_turns({name: lambda n=name: called.append(n) for name in "abc"}, rounds=20)
    rounds = ["".join(called[i : i + 3]) for i in range(0, 60, 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(set(rounds)) > 1
    assert {name: len(values) for name, values in samples.items()} == {"a": 20, "b": 20, "c": 20}


def test_the_first_rounds_do_not_count() -> None:
    warm_up = [9.0] * repeatability.WARM_UP
    assert repeatability.medians({"plain_ms": [*warm_up, 1.0, 2.0, 3.0]}) == {"plain_ms": 2.0}


def test_the_verdict_tells_the_machine_s_spread_from_that_of_the_ratios() -> None:
    parts = {"run 0": a_run(10.0, 0.1, 1.0, 2.0), "run 1": a_run(10.5, 0.6, 1.005, 2.1), **agreements()}
    found = repeatability.verdict(parts)
    assert found["p50"] == {
        "values": [10.0, 10.5],
        "spread": 0.05,
        "spread_ok": False,
        "covered_share": 0.5,
        "expected_share": None,
    }
    assert found["ratio_to_twin"]["spread_ok"]
    assert found["ratio_to_twin"]["covered_share"] == 1.0
    assert found["ratio_to_reference"]["values"] == [2.0, 2.1]
    assert not found["ratio_to_reference"]["spread_ok"]
    assert found["difference"] == {"onnxruntime_model_run": -0.0091, "onnxruntime_kernels": -0.03, "ncnn_loop": -0.025}
    assert found["onnxruntime_profiler_cost"] == 0.1
    assert found["quiet"]


def test_each_run_is_expected_from_the_others() -> None:
    def share(*p50s_ms: float) -> float | None:
        return repeatability.repeated(list(p50s_ms), [[0.0, 0.0]] * len(p50s_ms))["expected_share"]

    assert share(10.0, 10.1, 10.2) is None  # two others are too few
    assert share(10.0, 10.1, 10.2, 10.1) == 1.0
    assert share(10.0, 10.1, 10.2, 12.0) == 0.75  # the last one; those before it are then expected anywhere


@pytest.mark.parametrize(
    ("figure", "value", "name"),
    [
        ("model_run_ms", 11.6, "onnxruntime_model_run"),
        ("kernels_ms", 9.4, "onnxruntime_kernels"),
        ("loop_ms", 7.7, "ncnn_loop"),
    ],
)
def test_a_difference_of_more_than_5_percent_is_none_that_is_wanted(figure: str, value: float, name: str) -> None:
    run = a_run(10.0, 0.1, 1.0, 2.0)
    found = repeatability.verdict({"run 0": run, **agreements(**{figure: value})})
    assert [other for other, ok in found["difference_ok"].items() if not ok] == [name]


def test_parts_are_kept_only_with_the_same_settings_and_form(tmp_path: Path) -> None:
    path, parts = tmp_path / "record.json", {"run 0": {"p50_ms": 1.0}}
    assert repeatability.kept_parts(path, {"imgsz": 64}) == {}
    manifest.write_json(path, {"schema": repeatability.SCHEMA, "settings": {"imgsz": 64}, "parts": parts})
    assert repeatability.kept_parts(path, {"imgsz": 64}) == parts
    assert repeatability.kept_parts(path, {"imgsz": 320}) == {}
    manifest.write_json(path, {"schema": 1, "settings": {"imgsz": 64}, "parts": parts})
    assert repeatability.kept_parts(path, {"imgsz": 64}) == {}
