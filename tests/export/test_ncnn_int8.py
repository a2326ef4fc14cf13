from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmark.runners import ncnn_runner
from compress import manifest
from compress.data.pixels import letterbox
from compress.errors import CheckpointError
from compress.settings import QuantizeNcnn
from export import ncnn as exporter
from export import ncnn_files, ncnn_int8, parity
from export.ncnn_files import Layer, Weights

FILES = ["metadata.yaml", "model.ncnn.bin", "model.ncnn.param"]


@pytest.fixture
def run(run_command: Any) -> Any:
    return partial(run_command, exporter.app)


def layer(kind: str, shape: tuple[int, ...], parameters: dict[str, str]) -> Layer:
    """A layer out of random weights of this shape, output channels first, with a bias."""
    generator = np.random.default_rng(0)
    weights = generator.normal(size=shape).astype(np.float32)
    weights *= np.float32(10.0) ** np.arange(len(weights)).reshape(-1, *[1] * (len(shape) - 1))  # channels differ
    bias = generator.normal(size=shape[0]).astype(np.float32)
    return Layer(kind, "layer", ["in0"], ["out0"], parameters, [Weights(weights.ravel(), 0), Weights(bias)])


CONVOLUTION = layer("Convolution", (3, 2, 1, 1), {"0": "3", "1": "1", "5": "1", "6": "6"})
DEPTHWISE = layer("ConvolutionDepthWise", (4, 1, 3, 3), {"0": "4", "1": "3", "4": "1", "5": "1", "6": "36", "7": "4"})
GROUPED = layer("ConvolutionDepthWise", (4, 2, 1, 1), {"0": "4", "1": "1", "5": "1", "6": "8", "7": "2"})
DENSE = layer("InnerProduct", (3, 8), {"0": "3", "1": "1", "2": "24"})


def compute(layers: list[Layer], inputs: np.ndarray, folder: Path) -> np.ndarray:
    """Let ncnn compute some layers."""
    param, weights = folder / "layer.param", folder / "layer.bin"
    ncnn_files.write([Layer("Input", "in0", [], ["in0"]), *layers], param, weights)
    net = ncnn_runner.ncnn.Net()
    assert net.load_param(str(param)) == net.load_model(str(weights)) == 0
    with net.create_extractor() as extractor:
        extractor.input("in0", ncnn_runner.ncnn.Mat(inputs).clone())
        return np.array(extractor.extract("out0")[1])


def convolve(inputs: np.ndarray, weights: np.ndarray, padding: int, groups: int) -> np.ndarray:
    import torch

    tensors = torch.from_numpy(inputs.astype(np.float64))[None], torch.from_numpy(weights.astype(np.float64))
    return torch.nn.functional.conv2d(*tensors, padding=padding, groups=groups)[0].numpy()


@pytest.mark.parametrize("made", [CONVOLUTION, DEPTHWISE, GROUPED, DENSE], ids=lambda made: f"{made.kind} {made.name}")
def test_weights_are_within_half_a_step(made: Layer) -> None:
    (quantized,) = ncnn_int8.quantize([made], {"layer": 1.0})
    values, bias, scales, own = (array.values for array in quantized.weights)
    assert (values.dtype, own.tolist()) == (np.int8, [127.0])
    assert bias.tolist() == made.weights[1].values.tolist()
    groups = made is GROUPED
    assert len(scales) == (2 if groups else made.integer("0"))
    steps = 1 / np.repeat(scales, len(values) // len(scales))
    assert np.all(np.abs(values * steps - made.weights[0].values) <= steps * 0.5001)
    assert np.abs(values.astype(int)).reshape(len(scales), -1).max(axis=1).tolist() == [127] * len(scales)
    assert quantized.parameters == {**made.parameters, "8": "1" if "Depth" in made.kind else "2"}


@pytest.mark.parametrize("made", [CONVOLUTION, DEPTHWISE, GROUPED, DENSE], ids=["1x1", "depthwise", "grouped", "dense"])
def test_ncnn_computes_in_these_integers(made: Layer, tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    groups = made.integer("7", 1)
    shape = {"InnerProduct": (8,), "Convolution": (2, 5, 5)}.get(made.kind, (4, 5, 5))
    inputs = generator.normal(size=shape).astype(np.float32)
    inputs.flat[0] = 9.0  # beyond the threshold of 2: clipped
    (quantized,) = ncnn_int8.quantize([made], {"layer": 2.0})
    values, bias, scales, own = (array.values for array in quantized.weights)
    integers = np.clip(np.rint(inputs * own), -127, 127)
    assert np.abs(integers).max() == 127
    outputs = len(bias)
    rescale = 1 / (np.repeat(scales, outputs // len(scales)) * own)
    if made.kind == "InnerProduct":
        expected = values.reshape(outputs, -1) @ integers * rescale + bias
    else:
        side = made.integer("1")
        sums = convolve(integers, values.reshape(outputs, -1, side, side), made.integer("4"), groups)
        expected = sums * rescale[:, None, None] + bias[:, None, None]
    np.testing.assert_allclose(compute([quantized], inputs, tmp_path), expected, rtol=1e-5, atol=1e-4)
    assert np.abs(compute([made], inputs, tmp_path) - expected).max() > 1e-3  # fp32 gives something else


def pair(between: list[Layer], out: str, **parameters: str) -> list[Layer]:
    """A convolution, what stands between, and another one."""
    first = layer("Convolution", (3, 2, 1, 1), {"0": "3", "1": "1", "5": "1", "6": "6", **parameters})
    second = layer("Convolution", (2, 3, 1, 1), {"0": "2", "1": "1", "5": "1", "6": "6"})
    return [
        replace(first, name="first", outputs=["a"]),
        *between,
        replace(second, name="second", inputs=[out], outputs=["out0"]),
    ]


SWISH = Layer("Swish", "silu", ["a"], ["b"])
SPLIT = Layer("Split", "split", ["a"], ["b", "c"])
THRESHOLDS = {"first": 2.0, "second": 20.0}


@pytest.mark.parametrize("relu", [False, True])
def test_what_is_chained_computes_the_same(relu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = pair([], "a", **({"9": "1"} if relu else {}))
    chained = ncnn_int8.quantize(made, THRESHOLDS)
    assert [one.parameters["8"] for one in chained] == ["102", "2"]
    assert chained[0].weights[-1].values.tolist() == chained[1].weights[-1].values.tolist() == [np.float32(127 / 20)]
    monkeypatch.setattr(ncnn_int8, "chain", lambda layers: layers)
    inputs = np.random.default_rng(1).normal(size=(2, 5, 5)).astype(np.float32)
    alone = compute(ncnn_int8.quantize(made, THRESHOLDS), inputs, tmp_path)
    np.testing.assert_allclose(compute(chained, inputs, tmp_path), alone, rtol=1e-6)
    assert len(np.unique(alone)) > 10


@pytest.mark.parametrize(
    ("layers", "names", "term"),
    [
        pytest.param(pair([], "a"), {"first", "second"}, "102", id="nothing between"),
        pytest.param(pair([SWISH], "b"), {"first", "second"}, "2", id="SiLU between"),
        pytest.param(pair([], "a"), {"first"}, "2", id="a reader in float"),
        pytest.param(pair([], "a"), {"second"}, None, id="itself in float"),
        pytest.param(pair([SPLIT], "b"), {"first", "second"}, "2", id="also an output of the network"),
        pytest.param(
            [*pair([SPLIT], "b"), replace(CONVOLUTION, name="third", inputs=["c"])],
            {"first", "second", "third"},
            "102",
            id="two readers of one scale",
        ),
    ],
)
def test_integers_are_passed_on_where_only_integers_are_read(
    layers: list[Layer], names: set[str], term: str | None
) -> None:
    found = ncnn_int8.quantize(layers, dict.fromkeys(names, 2.0))
    assert found[0].parameters.get("8") == term
    assert all(one.parameters.get("8") in (None, "2") for one in found[1:])


def test_readers_of_other_scales_get_floats() -> None:
    layers = [*pair([SPLIT], "b"), replace(CONVOLUTION, name="third", inputs=["c"])]
    assert ncnn_int8.quantize(layers, {**THRESHOLDS, "third": 3.0})[0].parameters["8"] == "2"


def test_zeros_have_a_scale(tmp_path: Path) -> None:
    zeros = [Weights(np.zeros(6, np.float32), 0), Weights(np.array([1, 2, 3], np.float32))]
    (quantized,) = ncnn_int8.quantize([CONVOLUTION.changed({}, zeros)], {"layer": 0.0})
    assert [array.values.tolist() for array in quantized.weights[2:]] == [[1, 1, 1], [1]]
    outputs = compute([quantized], np.ones((2, 3, 3), np.float32), tmp_path)
    assert outputs[:, 0, 0].tolist() == [1, 2, 3]


def test_what_has_no_threshold_stays_as_it_is() -> None:
    assert ncnn_int8.quantize([CONVOLUTION, DENSE], {}) == [CONVOLUTION, DENSE]
    assert not ncnn_int8.can_quantize(Layer("Swish", "a", ["x"], ["y"]))
    assert not ncnn_int8.can_quantize(Layer("Convolution", "a", ["x", "w"], ["y"], {"19": "1"}))
    assert not ncnn_int8.can_quantize(*ncnn_int8.quantize([CONVOLUTION], {"layer": 1.0}))  # not twice


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory, make_detector: Callable[..., Path]) -> Path:
    """YOLO11, which has depthwise convolutions and an attention too."""
    folder = tmp_path_factory.mktemp("dense")
    model = make_detector(folder / "tiny.pt", "yolo11n.yaml", one_head=False)
    return exporter.export_ncnn(model, folder / "a_ncnn_model", imgsz=64)


@pytest.fixture(scope="module")
def layers(dense: Path) -> list[Layer]:
    return ncnn_files.read(dense / exporter.PARAM, dense / exporter.BIN)


def test_ranges_are_those_of_the_inputs(dense: Path, layers: list[Layer], images: list[Path]) -> None:
    squares = [letterbox(path, 64)[0] for path in images]
    found = ncnn_int8.calibrate(dense, layers, squares, "percentile")
    assert len(found) == sum(made.kind in ncnn_int8.KINDS for made in layers) == 87
    first = next(made for made in layers if made.inputs == ["in0"])
    assert found[first.name] == pytest.approx(max(square.max() for square in squares), rel=1e-3)
    session = ncnn_runner.load(str(dense), 1)
    last = next(made for made in layers if made.outputs == ["out0"])
    largest = max(np.abs(v).max() for s in squares for _, v in ncnn_runner.blobs(session, s, last.inputs))
    assert 0.5 * largest < found[last.name] <= largest * 1.001
    kl = ncnn_int8.calibrate(dense, layers[:8], squares, "kl")
    assert set(kl) == {made.name for made in layers[:8] if made.kind == "Convolution"}
    assert all(0 < kl[name] <= found[name] * 1.001 for name in kl)


def test_a_tiny_detector_in_8_bits_is_like_the_one_in_float(
    dense: Path, layers: list[Layer], images: list[Path], tmp_path: Path
) -> None:
    squares = [letterbox(path, 64) for path in images]
    thresholds = ncnn_int8.calibrate(dense, layers, [square[0] for square in squares], "percentile")
    folder = tmp_path / "b_ncnn_model"
    ncnn_int8._write(dense, folder, layers, thresholds, {"method": "percentile"})
    sizes = [(path / exporter.BIN).stat().st_size for path in (folder, dense)]
    assert sizes[0] < 0.3 * sizes[1]
    first, second = (ncnn_runner.load(str(path), 1) for path in (dense, folder))
    facts = ncnn_runner.describe(second)
    assert (facts["precision"], facts["precision_executed"]) == ("int8", "int8")
    pairs = [(ncnn_runner.infer(first, square)[0], ncnn_runner.infer(second, square)[0]) for square in squares]
    for part in (slice(0, 4), slice(4, None)):
        expected, actual = (np.concatenate([pair[i][:, part].ravel() for pair in pairs]) for i in (0, 1))
        assert 0.9 < np.corrcoef(expected, actual)[0, 1] < 1 - 1e-7


def labels(data: Path) -> None:
    """Give each image of the data set one label."""
    folder = data.parent / "labels" / "val"
    folder.mkdir(parents=True, exist_ok=True)
    for image in (data.parent / "images" / "val").glob("*.png"):
        (folder / f"{image.stem}.txt").write_text("0 0.5 0.5 0.5 0.5\n")


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """mAP as the test wishes; no latency is measured."""
    from benchmark import accuracy
    from export import int8

    maps = {"torch": 0.400, "ncnn": 0.395}
    monkeypatch.setattr(
        accuracy, "evaluate", lambda path, data, imgsz: {"map50_95": maps["torch" if path.suffix == ".pt" else "ncnn"]}
    )
    latency = {
        "fp32_p50_ms": 5.0,
        "int8_p50_ms": 4.0,
        "speedup": 1.25,
        "interval": [1.2, 1.3],
        "faster": True,
        "noise": [],
    }
    monkeypatch.setattr(int8, "speed", lambda dense, quantized, imgsz: latency)
    # An untrained detector's weights make every anchor a detection: what 8 bits do to those is not the point here.
    loose = {**parity.TOLERANCES, "int8": parity.Tolerance(None, None, None, 1.0, 1.0, 0.0, (-0.01, 1.0))}
    monkeypatch.setattr(parity, "TOLERANCES", loose)
    return maps


def test_the_command_quantizes_and_says_what_it_did(
    run: Any, detector: Path, data: Path, tmp_path: Path, stubbed: dict[str, float], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    labels(data)
    arguments = ("--model", detector, "--data", data, "--imgsz", 64, "--output", out, "--int8")
    assert run(*arguments, "--calibration-images", 2, "--bundle", tmp_path / "bundle") == 0
    text = capsys.readouterr().out
    assert "ncnn_int8: 0 of 63 layers in float" in text
    assert "ncnn_int8: 1.25 times as fast as fp32" in text
    assert "ncnn_int8: 2 calibration images are val images too" in text  # the data set has one split for both
    folder = out / "tiny.int8_ncnn_model"
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "parity.json", folder.name]
    record = manifest.read_json(out / "parity.json")["tiny"]
    assert (record["runtime"], record["precision"], record["quantization"]["method"]) == ("ncnn", "int8", "percentile")
    assert record["map50_95"] == {"torch": 0.4, "ncnn": 0.395, "difference": pytest.approx(-0.005)}
    metadata = json.loads((folder / "metadata.yaml").read_text())
    assert metadata["quantization"] == {
        "method": "percentile",
        "calibration_images": 2,
        "calibration_sha256": record["quantization"]["calibration_sha256"],
        "float_layers": [],
    }
    assert metadata["espalier_model_sha256"] == manifest.sha256_file(detector)
    assert "precision int8\n" in (tmp_path / "bundle/model/detector.txt").read_text()
    assert run(*arguments, "--calibration-images", 2) == 0
    assert "finished before, unchanged" in capsys.readouterr().out


def test_a_search_that_was_interrupted_goes_on(
    run: Any,
    detector: Path,
    data: Path,
    tmp_path: Path,
    stubbed: dict[str, float],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from benchmark import accuracy
    from export import mixed

    labels(data)
    tried: list[str] = []
    maps = iter([0.4, 0.3])  # of the checkpoint and of all layers in 8 bits; then something stops it

    def evaluate(path: Path, data: Path, imgsz: int) -> dict[str, float]:
        tried.append(path.name)
        if (value := next(maps, None)) is None:
            raise KeyboardInterrupt
        return {"map50_95": value}

    def sensitivity(dense: Path, layers: list[str], images: object, alone: object, journal: object) -> dict[str, float]:
        return {layer: 1.0 / (1 + index) for index, layer in enumerate(layers)}

    monkeypatch.setattr(accuracy, "evaluate", evaluate)
    monkeypatch.setattr(mixed, "sensitivity", sensitivity)
    arguments = ("--model", detector, "--data", data, "--imgsz", 64, "--output", tmp_path / "out", "--int8")
    assert run(*arguments, "--calibration-images", 1) == 130
    assert tried == ["tiny.pt", "candidate_ncnn_model", "candidate_ncnn_model"]
    assert not list(tmp_path.glob("out/*_ncnn_model"))
    tried.clear()
    maps = iter([0.399])
    assert run(*arguments, "--calibration-images", 1) == 0
    assert tried == ["candidate_ncnn_model"]  # one layer in float; the two before are remembered
    assert "ncnn_int8: 1 of 63 layers in float" in capsys.readouterr().out
    layers = [
        line.split() for line in (tmp_path / "out/tiny.int8_ncnn_model/model.ncnn.param").read_text().splitlines()
    ]
    terms = ["8=2" in fields for fields in layers if fields[0] == "Convolution"]
    assert (len(terms), terms.count(False), terms[0]) == (63, 1, False)
    assert not list((tmp_path / "out").glob(".*.json"))


def test_a_budget_that_is_missed_leaves_no_folder(
    run: Any,
    detector: Path,
    data: Path,
    tmp_path: Path,
    stubbed: dict[str, float],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from export import mixed

    stubbed["ncnn"] = 0.3
    labels(data)
    monkeypatch.setattr(mixed, "sensitivity", lambda dense, layers, *rest: dict.fromkeys(layers, 0.1))
    arguments = ("--model", detector, "--data", data, "--imgsz", 64, "--output", tmp_path / "out", "--int8")
    assert run(*arguments, "--calibration-images", 1) == 1
    error = capsys.readouterr().err
    assert "8 bits reach an mAP50-95 of 0.3000, 0.3850 is needed: raise --map-budget" in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.glob("out/*_ncnn_model"))


@pytest.mark.parametrize(("option", "value"), [("--method", "kl"), ("--calibration-images", 8), ("--map-budget", 0.1)])
def test_what_goes_with_8_bits_is_not_ignored_without_them(
    run: Any, option: str, value: object, detector: Path, data: Path, tmp_path: Path, capsys: Any
) -> None:
    assert run("--model", detector, "--data", data, "--output", tmp_path / "out", option, value) == 2
    assert f"{option} goes with --int8" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--half": None}, "--half and --int8 exclude each other: choose one"),
        ({"--dynamic": "size"}, "--dynamic and --int8 exclude each other: choose one"),
        ({"--parity-map": None}, "--int8 always compares the mAP: leave out --parity-map"),
        ({"--method": "entropy"}, "method: Input should be 'percentile' or 'kl' (got 'entropy')"),
        ({"--calibration-images": "0"}, "calibration_images: Input should be greater than or equal to 1 (got 0)"),
        ({"--calibration": "empty"}, "'train' holds no images"),
    ],
)
def test_mistakes_are_one_line(
    run: Any,
    changes: dict[str, str | None],
    message: str,
    detector: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    labels(data)
    if changes.get("--calibration"):
        (tmp_path / "nothing").mkdir()
        yaml = tmp_path / "empty.yaml"
        yaml.write_text(
            f"train: nothing\nval: {data.parent / 'images/val'}\nnames: {{0: circle, 1: square, 2: star}}\n"
        )
        changes = {"--calibration": str(yaml)}
    arguments = {"--model": detector, "--data": data, "--imgsz": "64", "--output": tmp_path / "out", "--int8": None}
    words = [word for pair in {**arguments, **changes}.items() for word in pair if word is not None]
    assert run(*words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.glob("out/*_ncnn_model"))


def test_only_detectors_are_quantized(models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"pose\.pt is of the task 'pose', this export is for detectors"):
        ncnn_int8.export_int8(models["pose"], tmp_path / "a_ncnn_model", data, data, 64, QuantizeNcnn())
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_folder_is_refused(dense: Path, layers: list[Layer], tmp_path: Path) -> None:
    folder = tmp_path / "b_ncnn_model"
    thresholds = {made.name: 1.0 for made in layers if ncnn_int8.can_quantize(made)}
    ncnn_int8._write(dense, folder, layers, thresholds, {})
    content = (folder / exporter.BIN).read_bytes()
    (folder / exporter.BIN).write_bytes(content[:-4])
    with pytest.raises(ValueError, match=rf"model\.ncnn\.bin has {len(content) - 4} bytes, it was written with"):
        ncnn_runner.load(str(folder), 1)
