"""Latency tables of engines that a stand-in for TensorRT builds: where they are built, and how well whole ones fit."""

from __future__ import annotations

import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from benchmark import observe, profile
from compress.checkpoint import build_model
from compress.errors import ExportError
from compress.latency.table import load_table
from compress.settings import Budget
from export import trt_builder, trt_target
from tensorrt_standin import StandIn

MODEL = {
    "nc": 3,
    "backbone": [[-1, 1, "Conv", [8, 3, 2]], [-1, 1, "Conv", [16, 3, 2]], [-1, 1, "Conv", [24, 3, 2]]],
    "head": [[[1, 2], 1, "Detect", ["nc"]]],
}
WANTED = observe.Wanted("tensorrt", 64, Budget(multiple_of=4, min_width=4), "cuda", variants=12)


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[trt_target.Target]:
    """Let the builder work in this process, with no TensorRT; return where it worked."""
    places: list[trt_target.Target] = []

    def run(target: trt_target.Target, job: Path) -> Any:
        places.append(target)
        return subprocess.CompletedProcess([], trt_builder.main(job / trt_builder.REQUEST), "", "")

    for name in trt_builder.FLAVOURS:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(trt_target, "_run_here", run)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return places


def test_engines_are_built_on_the_device_and_measured_whole(
    built: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt = StandIn("tensorrt 10.3.0")
    trt.__spec__ = ModuleSpec("tensorrt", None)  # PyTorch looks whether there is one
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    seen: list[str] = []

    def observe_once(site: Any, dense: Path, made: Path, wanted: Any, known: dict[str, Any]) -> dict[str, Any]:
        seen.append(made.name)
        assert made.read_bytes() == b"engine"
        assert made.with_name(f"{made.name}.json").is_file()  # without which the runner opens none
        # An engine costs what the file that it was built from weighs.
        costs = [1 + path.with_suffix(".onnx").stat().st_size / 10_000 for path in (dense, made)]
        facts = {"segments": [], "version": "10.3.0", "precision": "fp16"}
        return {"dense": [costs[0]] * 4, "whole": [costs[1]] * 4, **facts}

    monkeypatch.setattr(observe, "observe_once", observe_once)
    table, path = profile.profile(build_model(MODEL), WANTED, tmp_path / "tables" / "table.json")
    assert load_table(path) == table
    assert (table.runtime, table.precision, table.fit.variants) == ("tensorrt", "fp16", 12)
    assert table.fit.median_error < 0.05
    assert seen == [f"variant{index}.engine" for index in range(12)]
    assert {type(place) for place in built} == {trt_target.Local}
    assert trt.flags() >= {"FP16"}
    assert sorted(item.name for item in path.parent.iterdir() if item.suffix != ".lock") == [
        "table.json",
        "table.points.jsonl",
    ]


def test_without_a_builder_it_is_named(built: list[Any], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"this machine .*install it there: pip install tensorrt-rtx"):
        profile.profile(build_model(MODEL), WANTED, tmp_path / "table.json")
    assert not (tmp_path / "table.json").exists()
