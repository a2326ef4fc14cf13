from __future__ import annotations

import math
import platform
import re
import shutil
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from benchmark.runners import onnxruntime_runner
from compress import manifest
from compress.checkpoint import load_model, save_model
from compress.data.pixels import letterbox
from compress.errors import CheckpointError
from compress.settings import Quantize
from export import mixed, parity, qdq, saturation
from export import quantize as exporter
from export.onnx import export_onnx

ONNXRUNTIME, TENSORRT = qdq.SCHEMES["onnxruntime"], qdq.SCHEMES["tensorrt"]


@pytest.fixture
def run(run_command: Any) -> Any:
    return partial(run_command, exporter.app)


@pytest.fixture(scope="module")
def graph(onnx_file: Path) -> Any:
    return qdq.load(onnx_file)


@pytest.fixture(scope="module")
def samples(images: list[Path]) -> list[np.ndarray]:
    return [letterbox(path, 64) for path in images]


@pytest.fixture(scope="module")
def ranges(onnx_file: Path, samples: list[np.ndarray]) -> Any:
    return qdq.calibrate(onnx_file, samples, "minmax", ONNXRUNTIME)


def infer(model: Any, folder: Path, images: list[np.ndarray]) -> list[np.ndarray]:
    onnx.save(model, folder / "q.onnx")
    session = onnxruntime_runner.load(str(folder / "q.onnx"), 1)
    return [onnxruntime_runner.infer(session, image)[0] for image in images]


def kinds(model: Any) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def test_a_layer_is_a_convolution_with_its_activation(graph: Any) -> None:
    layers = qdq.layers_of(graph)
    assert len(layers) == kinds(graph)["Conv"] == 71  # 63, of which 8 in halves
    assert layers["/model.0/conv/Conv"] == ["/model.0/conv/Conv", "/model.0/act/Sigmoid", "/model.0/act/Mul"]
    last = "/model.22/cv3.0/cv3.0.2/Conv"
    assert layers[last] == [last]
    assert Counter(map(len, layers.values())) == {3: 65, 1: 6}


def test_what_decodes_the_head_or_attends_stays_in_float(graph: Any, tmp_path: Path, make_detector: Any) -> None:
    carriers = qdq.carriers_of(graph, ONNXRUNTIME)
    assert "/model.2/Concat" in carriers
    assert "/model.9/m/MaxPool" in carriers
    assert not [name for name in carriers if name.startswith("/model.22/")]
    model = make_detector(tmp_path / "eleven.pt", "yolo11n.yaml", one_head=False)
    other = qdq.load(export_onnx(model, tmp_path / "eleven.onnx", imgsz=64))
    assert not [name for name in qdq.carriers_of(other, ONNXRUNTIME) if "/attn/" in name]


def test_all_layers_compute_with_8_bits(graph: Any, ranges: Any, tmp_path: Path) -> None:
    import onnxruntime

    quantized = qdq.quantize(graph, ranges, ONNXRUNTIME, list(qdq.layers_of(graph)))
    onnx.save(quantized, tmp_path / "q.onnx")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(tmp_path / "q.onnx"), options, providers=["CPUExecutionProvider"])
    found = kinds(onnx.load(tmp_path / "optimized.onnx"))
    assert (found["QLinearConv"], found["Conv"] + found["FusedConv"]) == (71, 0)


def test_biases_stay_in_float_and_weights_have_a_scale_per_channel(graph: Any, ranges: Any) -> None:
    quantized = qdq.quantize(graph, ranges, ONNXRUNTIME, ["/model.0/conv/Conv"])
    weights = {initializer.name: onnx.numpy_helper.to_array(initializer) for initializer in quantized.graph.initializer}
    assert not [name for name, value in weights.items() if value.dtype == np.int32]
    conv = next(node for node in quantized.graph.node if node.name == "/model.0/conv/Conv")
    assert weights[conv.input[2]].dtype == np.float32
    dequantize = next(node for node in quantized.graph.node if conv.input[1] in node.output)
    integers, scales = (weights[name] for name in dequantize.input[:2])
    assert (integers.dtype, integers.shape, scales.shape) == (np.int8, (16, 3, 3, 3), (16,))
    assert np.abs(integers.astype(int)).reshape(16, -1).max(axis=1).tolist() == [127] * 16  # each channel's own scale


@pytest.mark.parametrize(
    ("scheme", "dtype"), [(ONNXRUNTIME, np.uint8), (TENSORRT, np.int8)], ids=["onnxruntime", "tensorrt"]
)
def test_activations_are_what_the_target_takes(
    scheme: qdq.Scheme, dtype: type, graph: Any, onnx_file: Path, samples: list[np.ndarray]
) -> None:
    found = qdq.calibrate(onnx_file, samples, "minmax", scheme)
    quantized = qdq.quantize(graph, found, scheme, list(qdq.layers_of(graph)))
    weights = {initializer.name: onnx.numpy_helper.to_array(initializer) for initializer in quantized.graph.initializer}
    zero_points = [weights[node.input[2]] for node in quantized.graph.node if node.op_type == "QuantizeLinear"]
    assert {zero_point.dtype.type for zero_point in zero_points} == {dtype}
    assert all(not zero_point.any() for zero_point in zero_points) == scheme.symmetric
    producers = {name: node.op_type for node in graph.graph.node for name in node.output}
    quantize = [node.input[0] for node in quantized.graph.node if node.op_type == "QuantizeLinear"]
    assert ("Conv" in {producers.get(name) for name in quantize}) == scheme.layer_outputs


def test_less_range_is_less_bits(graph: Any, ranges: Any) -> None:
    quantized = qdq.quantize(graph, ranges, ONNXRUNTIME, ["/model.0/conv/Conv"], reduce_range=True)
    values = [onnx.numpy_helper.to_array(initializer) for initializer in quantized.graph.initializer]
    assert (
        max(int(np.abs(value.astype(int)).max()) for value in values if value.dtype == np.int8 and value.ndim == 4)
        <= 64
    )


def test_a_cpu_that_adds_up_8_bits_is_told_from_one_that_does_not() -> None:
    if platform.machine() == "x86_64":
        flags = set(re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1].split())  # type: ignore[index]
        assert saturation.saturates() == (not flags & {"avx512_vnni", "avx_vnni"})
    else:
        assert not saturation.saturates()


@pytest.mark.parametrize(
    ("target", "given", "saturates", "expected"),
    [
        ("onnxruntime", None, True, True),
        ("onnxruntime", None, False, False),
        ("onnxruntime", False, True, False),
        ("tensorrt", None, True, False),
        ("tensorrt", True, False, True),
    ],
)
def test_weights_have_as_many_bits_as_the_cpu_adds_up(
    monkeypatch: Any, capsys: Any, target: Any, given: bool | None, saturates: bool, expected: bool
) -> None:
    monkeypatch.setattr(saturation, "saturates", lambda: saturates)
    assert exporter.with_range(Quantize(target=target, reduce_range=given)).reduce_range is expected
    said = expected and given is None
    assert ("this CPU has no VNNI" in capsys.readouterr().out) == said


def test_no_layers_is_the_graph_itself(graph: Any, ranges: Any) -> None:
    assert qdq.quantize(graph, ranges, ONNXRUNTIME, []) == graph
    assert kinds(graph)["QuantizeLinear"] == 0  # nor was it changed by the calls before


@pytest.fixture
def silu(tmp_path: Path) -> Path:
    """20 · x, SiLU, and 20 times that; one number per pixel."""
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("Conv", ["images", "w"], ["a"], name="Conv"),
        helper.make_node("Sigmoid", ["a"], ["s"], name="Sigmoid"),
        helper.make_node("Mul", ["a", "s"], ["b"], name="Mul"),
        helper.make_node("Conv", ["b", "w"], ["out"], name="last/Conv"),
    ]
    shape = [1, 1, 2, "width"]
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("images", "out")]
    weight = helper.make_tensor("w", TensorProto.FLOAT, [1, 1, 1, 1], [20.0])
    model = helper.make_model(
        helper.make_graph(nodes, "silu", value[:1], value[1:], [weight]),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    onnx.save(model, tmp_path / "silu.onnx")
    return tmp_path / "silu.onnx"


@pytest.mark.parametrize("method", ["minmax", "percentile"])
def test_every_method_finds_ranges_that_hold_the_image(
    method: qdq.Method, graph: Any, onnx_file: Path, samples: list[np.ndarray], tmp_path: Path
) -> None:
    found = qdq.calibrate(onnx_file, iter(samples), method, ONNXRUNTIME)
    low, high = (float(np.ravel(value)[0]) for value in found["images"].range_value)
    assert -1.001 <= low <= 0.05
    assert 0.9 <= high <= 1.001
    layers, reduced = ["/model.0/conv/Conv"], saturation.saturates()
    quantized = qdq.quantize(graph, found, ONNXRUNTIME, layers, carriers=False, reduce_range=reduced)
    (first, *_), (expected, *_) = (infer(model, tmp_path, samples) for model in (quantized, graph))
    assert 0 < np.linalg.norm(first[:, 4:] - expected[:, 4:]) / np.linalg.norm(expected[:, 4:]) < 0.3


def test_entropy_cuts_off_what_hardly_ever_comes(silu: Path) -> None:
    image = np.random.default_rng(0).normal(scale=0.01, size=(1, 1, 2, 2000)).astype(np.float32)
    image[0, 0, 0, 0] = 1.0
    ends = {
        method: float(np.ravel(qdq.calibrate(silu, [image], method, ONNXRUNTIME)["out"].range_value[1])[0])
        for method in ("minmax", "entropy")
    }
    assert ends["minmax"] == pytest.approx(400, rel=1e-3)
    assert ends["entropy"] < 200


def test_the_range_before_silu_ends_at_its_tail(silu: Path) -> None:
    image = np.array([-1, 0, 0.5, 1], np.float32).reshape(1, 1, 2, 2)
    found = qdq.calibrate(silu, [image], "minmax", ONNXRUNTIME)
    ends = {name: [float(np.ravel(value)[0]) for value in found[name].range_value] for name in ("a", "b", "out")}
    assert ends["a"] == [-8.0, 20.0]  # it goes down to −20
    assert ends["b"] == pytest.approx([-20 / (1 + math.exp(20)), 20], abs=1e-5)
    assert ends["out"] == pytest.approx([20 * ends["b"][0], 400], abs=1e-3)  # no SiLU reads it


def test_the_layer_that_hurts_most_is_the_most_sensitive(
    graph: Any, onnx_file: Path, samples: list[np.ndarray], ranges: Any, tmp_path: Path
) -> None:
    layers = ["/model.0/conv/Conv", "/model.22/cv2.0/cv2.0.2/Conv", "/model.4/cv1/second/Conv"]

    def alone(layer: str) -> Path:
        model = qdq.quantize(graph, ranges, ONNXRUNTIME, [layer], carriers=False)
        if layer == layers[2]:
            scale = next(node.input[1] for node in model.graph.node if node.op_type == "QuantizeLinear")
            for initializer in model.graph.initializer:
                if initializer.name == scale:  # a range that is far too narrow
                    values = onnx.numpy_helper.to_array(initializer) / np.float32(30)
                    initializer.CopyFrom(onnx.numpy_helper.from_array(values, scale))
        onnx.save(model, tmp_path / "alone.onnx")
        return tmp_path / "alone.onnx"

    journal = mixed.Journal(tmp_path / "search.json", {})
    found = mixed.sensitivity(onnx_file, layers, samples[:2], alone, journal)
    assert max(found, key=lambda layer: found[layer]) == layers[2]
    assert sum(found.values()) == pytest.approx(1.0, abs=1e-4)
    assert min(found.values()) > 0
    assert mixed.sensitivity(onnx_file, layers, samples[:2], pytest.fail, journal) == found  # nothing is asked twice


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """mAP as the test wishes, by the file's ending; no latency is measured."""
    from benchmark import accuracy, latency

    maps = {".pt": 0.400, ".onnx": 0.395}
    monkeypatch.setattr(accuracy, "evaluate", lambda path, data, imgsz: {"map50_95": maps[path.suffix]})
    cells = [{"model": name, "p50_ms": ms} for name, ms in (("fp32", 4.0), ("int8", 5.0))]
    record = {
        "cells": cells,
        "comparisons": [{"speedup": 0.8, "interval": [0.7, 0.9]}],
        "device": {"cpu": "a CPU"},
        "protocol": {"label": "quick"},
        "noise": [],
    }
    monkeypatch.setattr(latency, "measure", lambda models, **_: record)
    # An untrained detector's weights make every anchor a detection: what 8 bits do to those is not the point here.
    loose = {**parity.TOLERANCES, "int8": parity.Tolerance(None, None, None, 1.0, 1.0, 0.0, (-0.01, 1.0))}
    monkeypatch.setattr(parity, "TOLERANCES", loose)
    return maps


@pytest.mark.parametrize("name", ["detector", "end2end"])
def test_the_command_quantizes_and_says_what_it_did(
    run: Any,
    name: str,
    data: Path,
    tmp_path: Path,
    stubbed: dict[str, float],
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    model, out = request.getfixturevalue(name), tmp_path / "out"
    labels(data)
    arguments = ("--model", model, "--data", data, "--imgsz", 64, "--output", out, "--method", "minmax")
    assert run(*arguments, "--calibration-images", 2) == 0
    text = capsys.readouterr().out
    assert "0 of 71 layers in float" in text or name == "end2end"
    assert "quantize: slower: 0.80 times as fast as fp32 on this machine (0.70–0.90); use fp32 here" in text
    assert "2 calibration images are val images too" in text  # the data set has one split for both
    artefact = out / f"{model.stem}.int8.onnx"
    facts = onnxruntime_runner.describe(onnxruntime_runner.load(str(artefact), 1))
    assert (facts["precision"], facts["classes"], facts["end2end"]) == ("int8", 3, name == "end2end")
    record = manifest.read_json(out / "parity.json")[model.stem]
    assert record["map50_95"] == {"torch": 0.4, "onnxruntime": 0.395, "difference": pytest.approx(-0.005)}
    assert record["latency"]["faster"] is False
    assert record["quantization"]["calibration_images"] == 2
    entries = {entry.key: entry.value for entry in onnx.load(artefact).metadata_props}
    assert entries["espalier_calibration_sha256"] == record["quantization"]["calibration_sha256"]
    assert entries["espalier_model_sha256"] == manifest.sha256_file(model)
    assert {path.name for path in out.iterdir()} == {"manifest.json", "parity.json", artefact.name}


def test_a_budget_that_is_missed_leaves_no_file(
    run: Any,
    detector: Path,
    data: Path,
    tmp_path: Path,
    stubbed: dict[str, float],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stubbed[".onnx"] = 0.3
    labels(data)
    monkeypatch.setattr(mixed, "sensitivity", lambda onnx_file, layers, *rest: dict.fromkeys(layers, 0.1))
    arguments = ("--model", detector, "--data", data, "--imgsz", 64, "--output", tmp_path / "out")
    assert run(*arguments, "--method", "minmax", "--calibration-images", 1) == 1
    error = capsys.readouterr().err
    assert "8 bits reach an mAP50-95 of 0.3000, 0.3900 is needed: raise --map-budget" in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.glob("out/*.onnx"))
    stubbed.clear()  # whoever follows the advice waits for no score a second time
    assert run(*arguments, "--method", "minmax", "--calibration-images", 1, "--map-budget", 0.15) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--model": "missing.pt"}, "missing.pt does not exist"),
        ({"--method": "kl"}, "method: Input should be 'minmax', 'percentile' or 'entropy' (got 'kl')"),
        ({"--target": "npu"}, "target: Input should be 'onnxruntime' or 'tensorrt' (got 'npu')"),
        ({"--calibration-images": "0"}, "calibration_images: Input should be greater than or equal to 1 (got 0)"),
        ({"--calibration": "nowhere.yaml"}, "nowhere.yaml"),
    ],
)
def test_mistakes_are_one_line(
    run: Any,
    changes: dict[str, str],
    message: str,
    detector: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    labels(data)
    arguments = {"--model": detector, "--data": data, "--imgsz": "64", "--output": tmp_path / "out", **changes}
    assert run(*(word for pair in arguments.items() for word in pair)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy"])
def test_weights_that_are_no_numbers_are_one_line(
    method: str,
    run: Any,
    detector: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model: Any = load_model(detector)
    model.model[5].conv.weight.data[0] = math.nan
    save_model(model, tmp_path / "nan.pt", {})
    labels(data)
    arguments = ("--model", tmp_path / "nan.pt", "--data", data, "--imgsz", 64, "--output", tmp_path / "out")
    assert run(*arguments, "--method", method) == 2
    error = capsys.readouterr().err
    assert error == f"error: {tmp_path / 'nan.pt'} returns values that are not finite: check the weights\n"


def test_data_of_other_classes_is_met_before_the_work(
    run: Any, detector: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels(data)
    other = shutil.copytree(data.parent, tmp_path / "data") / data.name
    other.write_text(data.read_text("utf-8").replace("names:", "names: {0: a}\nold:"), "utf-8")
    assert run("--model", detector, "--data", other, "--imgsz", 64, "--output", tmp_path / "out") == 2
    assert f"{detector.name} predicts 3 classes, {other} has 1: give the data it learned" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def labels(data: Path) -> None:
    """Give each image of the data set one label."""
    folder = data.parent / "labels" / "val"
    folder.mkdir(parents=True, exist_ok=True)
    for image in (data.parent / "images" / "val").glob("*.png"):
        (folder / f"{image.stem}.txt").write_text("0 0.5 0.5 0.5 0.5\n")


def test_only_detectors_are_quantized(models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"segment\.pt is of the task 'segment', this export is for detectors"):
        exporter.export_int8(models["segment"], tmp_path / "a.int8.onnx", data, data, 64, Quantize())
    assert list(tmp_path.iterdir()) == []
