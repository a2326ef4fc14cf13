"""The profilers of the runtimes: onnxruntime's on a small model, the others with answers that are known."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from benchmark import worker
from benchmark.runners import ncnn_layers, onnxruntime_layers, onnxruntime_runner, tensorrt_layers, torch_runner


def test_onnxruntime_profiles_the_nodes_that_it_runs(onnx_file: Path, image: np.ndarray) -> None:
    session = onnxruntime_runner.load(str(onnx_file), 1)
    rows = onnxruntime_layers.layers(onnxruntime_runner, session, str(onnx_file), image, None)
    convolutions = [row for row in rows if row["type"] in ("Conv", "FusedConv")]
    nodes = onnx.load(onnx_file).graph.node
    assert len(convolutions) == sum(node.op_type == "Conv" for node in nodes)
    assert all(row["ms"] > 0 for row in convolutions)
    assert len({row["name"] for row in rows}) == len(rows)


def test_onnxruntime_leaves_no_file_behind(
    onnx_file: Path, image: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    session = onnxruntime_runner.load(str(onnx_file), 1)
    assert onnxruntime_layers.layers(onnxruntime_runner, session, str(onnx_file), image, None)
    assert list(tmp_path.iterdir()) == []


def test_a_node_costs_the_median_of_its_runs_without_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime_layers, "WARM_UP", 1)
    monkeypatch.setattr(onnxruntime_layers, "REPEATS", 3)

    def node(name: str, duration_us: int) -> dict[str, Any]:
        return {"cat": "Node", "name": f"{name}_kernel_time", "dur": duration_us, "args": {"op_name": "Conv"}}

    events: list[dict[str, Any]] = [{"cat": "Session", "name": "model_run", "dur": 1}]
    for once, twice in ((900, 900), (1000, 10), (3000, 20), (2000, 30)):
        events += [node("once", once), node("twice", twice), node("twice", twice)]  # of a loop
    events += [node("seldom", 5), {"cat": "Node", "name": "once_fence_before", "dur": 7, "args": {}}]
    monkeypatch.setattr(onnxruntime_layers, "profile", lambda *_: events)
    assert onnxruntime_layers.layers(None, None, "", np.zeros(0), None) == [
        {"name": "once", "type": "Conv", "ms": 2.0},
        {"name": "twice", "type": "Conv", "ms": 0.04},
        {"name": "seldom", "type": "Conv", "ms": 0.0},
    ]


def test_tensorrt_reports_to_a_profiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_layers, "WARM_UP", 1)
    monkeypatch.setattr(tensorrt_layers, "REPEATS", 3)

    class IProfiler:
        def __init__(self) -> None:
            self.ready = True  # TensorRT refuses one whose base was not made

    session = SimpleNamespace(trt=SimpleNamespace(IProfiler=IProfiler), context=SimpleNamespace(profiler=None))
    times = iter((9.0, 1.0, 3.0, 2.0))

    def infer(opened: Any, images: Any) -> None:
        assert (opened, images, opened.context.profiler.ready) == (session, "images", True)
        ms = next(times)
        opened.context.profiler.report_layer_time("conv + silu", ms)
        opened.context.profiler.report_layer_time("concat", ms / 10)

    rows = tensorrt_layers.layers(SimpleNamespace(infer=infer), session, "", "images", None)
    assert rows == [
        {"name": "conv + silu", "type": "", "ms": 2.0},
        {"name": "concat", "type": "", "ms": 0.2},
    ]


def test_ncnn_says_what_is_counted(monkeypatch: pytest.MonkeyPatch, image: np.ndarray) -> None:
    marks: list[Any] = []

    def layer_costs(net: Any, folder: str, pixels: np.ndarray, mark: Any, repeats: int = 1) -> list[dict[str, Any]]:
        assert (net, folder, pixels.shape) == ("net", "m_ncnn_model", (3, 64, 64))
        marks.append(repeats)
        return [{"name": "conv", "type": "Convolution", "cost": 1_500_000}]

    monkeypatch.setattr(ncnn_layers, "layer_costs", layer_costs)
    session = SimpleNamespace(net="net", gpu=None)
    row = {"name": "conv", "type": "Convolution"}
    assert ncnn_layers.layers(None, session, "m_ncnn_model", image, None) == [{**row, "ms": 1.5}]
    assert ncnn_layers.layers(None, session, "m_ncnn_model", image, "counter") == [{**row, "instructions": 1_500_000}]
    assert marks == [ncnn_layers.REPEATS, 1]
    assert ncnn_layers.layers(None, SimpleNamespace(gpu="Mali"), "m_ncnn_model", image, None) == []


def test_a_runtime_without_a_profiler_has_no_layers(image: np.ndarray) -> None:
    assert worker._layers(torch_runner, None, "m.pt", image) == {"layers": None, "left_out": None}
