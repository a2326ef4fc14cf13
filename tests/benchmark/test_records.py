from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmark import records, sources
from benchmark.records import Layer, Score
from compress.errors import RunError


def cell(model: str, p50_ms: float, **more: Any) -> dict[str, Any]:
    return {
        "model": model,
        "runtime": "onnxruntime",
        "model_sha256": f"sha-{model}",
        "p50_ms": p50_ms,
        "intervals": {"p50_ms": [0.9 * p50_ms, 1.1 * p50_ms]},
        **more,
    }


def latency(*cells: dict[str, Any], **more: Any) -> dict[str, Any]:
    device = {"cpu": "Acme 9000", "architecture": "x86_64", "cores": 2, "kernel": "Linux 6"}
    return {
        "cells": list(cells),
        "device": device,
        "protocol": {"threads": 1, "imgsz": 320, "batch": 1, "mode": "quick"},
        **more,
    }


def write(folder: Path, name: str, content: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(content))
    return folder


def test_a_cell_says_more_than_the_protocol() -> None:
    first, second = records.measurements(latency(cell("a", 2.0), cell("b", 3.0, threads=4, precision="fp16")))
    assert (first.threads, second.threads, first.imgsz, second.precision) == (1, 4, 320, "fp16")
    assert (first.p50, first.interval, first.unit) == (2.0, (1.8, 2.2), "ms")
    assert first.device == "Acme 9000, x86_64, 2 cores"
    assert first.record == second.record
    assert (first.p99, first.queries, first.layers) == (None, None, [])
    assert (first.layers_share, first.layers_left_out) == (None, None)


def test_latency_under_load_is_a_runtime_of_its_own() -> None:
    found = records.measurements(latency(cell("a", 1.0), cell("a", 3.0, streams=4), cell("a", 2.0, batch=2)))
    assert len({row.runtime for row in found}) == 2
    assert found[1].runtime == f"{found[0].runtime}, 4 streams"
    assert [row.batch for row in found][2] == 2


def test_instructions_are_summed_up_like_times_but_keep_their_unit() -> None:
    counted = {
        "model": "a",
        "runtime": "ncnn",
        "unit": "instructions",
        "instructions": [200, 210, 205],
        "layers": [
            {"name": "c", "type": "Conv", "instructions": 120},
            {"name": "d", "type": "Concat", "instructions": None},
            {"name": "e", "type": "Conv", "ms": 3.0},
        ],
    }
    (found,) = records.measurements(latency(counted))
    assert (found.unit, found.p50, found.queries) == ("instructions", 205, 3)
    assert found.interval == (200, 210)
    assert found.rounds == [[200], [210], [205]]
    assert found.layers == [Layer("c", "Conv", 120)]


@pytest.mark.parametrize(
    ("device", "key"),
    [
        ({"name": "rpi5", "cpu": "Cortex-A76", "architecture": "aarch64", "cores": 4}, "rpi5, Cortex-A76, aarch64, 4"),
        ({"cpu": None, "cores": 1, "os": "Debian"}, "1 core"),
        ({"os": "Debian"}, None),
        ({"name": "cpu", "cpu": "Acme", "cores": 1}, "Acme, 1 core"),
        ({"name": "cpu", "cpu": "Acme", "gpu": "NVIDIA L4", "cores": 1}, "Acme, 1 core"),
        ({"name": "cuda", "cpu": "Acme", "gpu": "NVIDIA L4", "cores": 1}, "cuda, Acme, NVIDIA L4, 1 core"),
    ],
)
def test_a_device_keeps_its_key_when_its_system_is_updated(device: dict[str, Any], key: str | None) -> None:
    found = records.device_key(device)
    assert found == (key and key.replace("64, 4", "64, 4 cores"))
    assert found == records.device_key({**device, "kernel": "Linux 7"})


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ({}, "cells: Field required"),
        ({"cells": []}, "cells: List should have at least 1 item"),
        ([1], "content: Input should be"),
        (latency(cell("a", -1.0)), "cells.0.p50_ms: Input should be greater than 0"),
        (latency(cell("a", float("nan"))), "cells.0.p50_ms: Input should be a finite number"),
        (latency({"model": "a", "runtime": "torch"}), "'a' on torch has no ms"),
        (latency(cell("a", 1.0, unit="furlongs")), "cells.0.unit: Input should be 'ms' or 'instructions'"),
    ],
)
def test_what_is_no_latency_record_is_named(record: Any, complaint: str) -> None:
    with pytest.raises(RunError, match=r"x\.json") as caught:
        records.measurements(record, "x.json")
    assert complaint in str(caught.value)


def test_scores_of_both_forms_and_of_a_classifier() -> None:
    entry = {"model": "a.pt", "model_sha256": "s", "runtime": "torch", "map50_95": 0.5, "map50": 0.7, "images": 8}
    assert records.scores([entry], imgsz=64) == [Score("a.pt", "s", "torch", "mAP50-95", 0.5, imgsz=64, images=8)]
    assert records.scores([{**entry, "imgsz": 32}], imgsz=64)[0].imgsz == 32  # an entry knows better
    pipeline = {"dense": {"torch": {"map50_95": 0.5}, "ncnn": {"map50_95": 0.4}}}
    assert [(s.model, s.runtime, s.value) for s in records.scores(pipeline)] == [
        ("dense", "torch", 0.5),
        ("dense", "ncnn", 0.4),
    ]
    assert records.scores([{"model": "c", "top1": 0.9, "top5": 1.0}])[0].metric == "top-1"
    assert records.scores([{"model": "c"}]) == []


@pytest.mark.parametrize("record", [7, {"a": 1}, [1], {"a": {"torch": 1}}, [{"model": "a", "map50_95": 2.0}]])
def test_what_is_no_accuracy_record_is_named(record: Any) -> None:
    with pytest.raises(RunError, match=r"^x\.json is not a"):
        records.scores(record, "x.json")


def test_a_score_belongs_to_a_file_and_not_to_a_name() -> None:
    (measured,) = records.measurements(latency(cell("a", 2.0)))
    other = Score("a", "another file", "onnxruntime", "mAP50-95", 0.1)
    wrong_size = Score("b", "sha-a", "onnxruntime", "mAP50-95", 0.2, imgsz=640)
    right = Score("b", "sha-a", "onnxruntime", "mAP50-95", 0.3)
    named = Score("a", None, "onnxruntime", "mAP50-95", 0.4)
    assert records.score_of(measured, [other, wrong_size]) is None
    assert records.score_of(measured, [other, wrong_size, right]) == right
    assert records.score_of(measured, [Score("a", None, "torch", "mAP50-95", 0.4), named]) == named
    compiled = Score("a", "sha-a", "onnxruntime-tensorrt", "mAP50-95", 0.25)
    assert records.score_of(measured, [compiled, right]) == right  # one file, two ways to run it
    assert records.score_of(measured, [compiled]) == compiled


def test_a_score_belongs_to_the_device_that_it_was_taken_on() -> None:
    (here,) = records.measurements(latency(cell("a", 2.0)))
    (there,) = records.measurements(latency(cell("a", 2.0), device={"name": "rpi5", "cpu": "Cortex-A76"}))
    assert (here.device_name, there.device_name, there.device) == (None, "rpi5", "rpi5, Cortex-A76")
    on_cpu = Score("a", "sha-a", "onnxruntime", "mAP50-95", 0.5, device="cpu")
    on_rpi5 = Score("a", "sha-a", "onnxruntime", "mAP50-95", 0.4, device="rpi5")
    assert records.score_of(there, [on_cpu, on_rpi5]) == on_rpi5
    assert records.score_of(there, [on_cpu]) is None
    assert records.score_of(here, [on_cpu]) == on_cpu  # an earlier record does not say where


def test_a_folder_of_records_one_level_down(tmp_path: Path) -> None:
    write(tmp_path / "latency", "latency.json", latency(cell("a", 2.0)))
    entry = {"model": "a.onnx", "model_sha256": "sha-a", "map50_95": 0.5}
    folder = write(tmp_path / "accuracy", "accuracy.json", [entry])
    write(folder, "manifest.json", {"schema": 1, "config": {"split": "test", "imgsz": 320}, "parents": {"data": "d"}})
    write(tmp_path / "onnx", "parity.json", {"a": {"passed": True}})
    found = sources.read(tmp_path)
    assert found is not None
    assert (found.name, found.summary, len(found.records)) == (tmp_path.name, None, 1)
    assert found.scores == [
        Score("a.onnx", "sha-a", None, "mAP50-95", 0.5, data_sha256="d", split="test", imgsz=320),
    ]
    assert found.parity == {"a": {"passed": True}}


def test_what_a_stage_set_aside_is_not_shown_again(tmp_path: Path) -> None:
    for name, p50_ms in (("latency", 2.0), ("latency.1", 3.0), ("yolo.11", 4.0)):
        write(tmp_path / name, "latency.json", latency(cell("a", p50_ms)))
    found = sources.read(tmp_path)
    assert found is not None
    assert [record["cells"][0]["p50_ms"] for record in found.records] == [2.0, 4.0]


def test_folders_and_files_without_a_record_are_none(tmp_path: Path) -> None:
    assert sources.read(tmp_path) is None
    (tmp_path / "file").write_text("x")
    assert sources.read(tmp_path / "file") is None
    assert sources.read(tmp_path / "nowhere") is None


def test_a_published_run_is_read(root: Path, tmp_path: Path) -> None:
    results = root / "docs" / "results"
    (tmp_path / "06_benchmark").mkdir()
    (tmp_path / "summary.json").write_text((results / "bccd.json").read_text())
    (tmp_path / "06_benchmark" / "latency.json").write_text((results / "bccd_latency.json").read_text())
    found = sources.read(tmp_path)
    assert found is not None
    assert found.name == "bccd"
    rows = [
        (m.model, m.runtime, m.p50, records.score_of(m, found.scores)) for m in records.measurements(found.records[0])
    ]
    raw, summary = (json.loads((results / name).read_text()) for name in ("bccd_latency.json", "bccd.json"))
    assert [(*row[:3], row[3].value) for row in rows if row[3]] == [
        (cell["model"], cell["runtime"], cell["p50_ms"], summary[cell["model"]]["map50_95"]) for cell in raw["cells"]
    ]
    assert len(rows) == 6
