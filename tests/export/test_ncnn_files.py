from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from compress.errors import ExportError
from export import ncnn_files
from export.ncnn import export_ncnn
from export.ncnn_files import Layer, Weights

PARAM, BIN = "model.ncnn.param", "model.ncnn.bin"
GRAPH = "7767517\n2 2\nInput in0 0 1 in0\nConvolution conv 1 1 in0 out0 0=1 1=1 5=1 6=2\n"


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, Path]:
    """A graph of one convolution with two weights (3, 4) and a bias (5)."""
    param, weights = tmp_path / PARAM, tmp_path / BIN
    param.write_text(GRAPH)
    weights.write_bytes(bytes(4) + np.array([3, 4, 5], "<f4").tobytes())
    return param, weights


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "fp16"])
def test_what_is_read_and_written_again_has_the_same_bytes(
    half: bool, detector: Path, ncnn_model: Path, tmp_path: Path
) -> None:
    folder = export_ncnn(detector, tmp_path / "half_ncnn_model", imgsz=64, half=True) if half else ncnn_model
    layers = ncnn_files.read(folder / PARAM, folder / BIN)
    ncnn_files.write(layers, tmp_path / PARAM, tmp_path / BIN)
    for name in (PARAM, BIN):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    kinds = {array.values.dtype for layer in layers for array in layer.weights if array.tag is not None}
    assert kinds == {np.dtype(np.float16 if half else np.float32)}


def test_a_layer_by_hand(small: tuple[Path, Path]) -> None:
    (first, conv) = ncnn_files.read(*small)
    assert (first.kind, first.outputs, first.weights) == ("Input", ["in0"], [])
    assert (conv.name, conv.inputs, conv.outputs) == ("conv", ["in0"], ["out0"])
    assert conv.parameters == {"0": "1", "1": "1", "5": "1", "6": "2"}
    assert [array.values.tolist() for array in conv.weights] == [[3, 4], [5]]
    assert (conv.integer("6"), conv.integer("7", 1)) == (2, 1)


@pytest.mark.parametrize("term", ["2", "102"], ids=["int8", "int8 with an 8-bit output"])
def test_8_bit_weights_are_padded_to_whole_words(term: str, small: tuple[Path, Path], tmp_path: Path) -> None:
    (first, conv) = ncnn_files.read(*small)
    scales = [[2.0], [3.0]] if term == "2" else [[2.0], [3.0], [4.0]]
    arrays = [Weights(np.array(scale, np.float32)) for scale in scales]
    quantized = conv.changed({"8": term}, [Weights.int8(np.array([-127, 5])), conv.weights[1], *arrays])
    param, weights = tmp_path / "q.param", tmp_path / "q.bin"
    ncnn_files.write([first, quantized], param, weights)
    assert param.read_text().splitlines()[-1].split()[4:] == ["in0", "out0", "0=1", "1=1", "5=1", "6=2", f"8={term}"]
    assert weights.read_bytes()[:8] == bytes([0x38, 0x4B, 0x0D, 0x00, 0x81, 5, 0, 0])
    again = ncnn_files.read(param, weights)[1]
    assert [array.values.tolist() for array in again.weights] == [
        [-127, 5],
        [5],
        *scales,
    ]
    assert conv.parameters.get("8") is None  # what was read is as it was


@pytest.mark.parametrize(
    ("line", "count"),
    [
        ("ConvolutionDepthWise a 1 1 in0 out0 0=4 1=1 5=1 6=4 7=2", 1 + 4 + 4),
        ("ConvolutionDepthWise a 1 1 in0 out0 0=4 1=1 5=1 6=4 7=2 8=1", 1 + 4 + 4 + 2 + 1),
        ("ConvolutionDepthWise a 1 1 in0 out0 0=4 1=1 6=4 7=2 8=2", 1 + 4 + 1 + 1),
        ("Convolution a 1 1 in0 out0 0=4 1=1 6=4 8=2", 1 + 4 + 4 + 1),
        ("Convolution a 2 1 in0 in1 out0 0=4 1=1 6=4 19=1", 0),
        ("Deconvolution a 1 1 in0 out0 0=4 1=1 5=1 6=8", 1 + 8 + 4),
        ("InnerProduct a 1 1 in0 out0 0=4 1=1 2=12", 1 + 12 + 4),
        ("InnerProduct a 1 1 in0 out0 0=4 1=1 2=12 8=2", 1 + 12 + 4 + 4 + 1),
        ("MemoryData a 0 1 out0 0=3 1=2", 6),
        ("MemoryData a 0 1 out0 0=3 1=2 21=0", 1 + 6),
        ("Swish a 1 1 in0 out0", 0),
    ],
)
def test_the_weights_that_each_layer_has(line: str, count: int, tmp_path: Path) -> None:
    inputs = "Input in1 0 1 in1\n" if "in1" in line else ""
    layers = 3 if inputs else 2
    (tmp_path / PARAM).write_text(f"7767517\n{layers} {layers}\nInput in0 0 1 in0\n{inputs}{line}\n")
    (tmp_path / BIN).write_bytes(bytes(4 * count))
    found = ncnn_files.read(tmp_path / PARAM, tmp_path / BIN)[-1].weights
    assert sum(len(array.values) + (array.tag is not None) for array in found) == count


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (GRAPH.replace("7767517", "7767518"), r"is damaged"),
        (
            GRAPH.replace("2 2\n", "3 3\n"),
            r"is damaged \(layers and blobs: \[2, 2\], announced 3 3\): export",
        ),
        (GRAPH.replace("1 1 in0 out0 ", "1 1 in0 "), r"is not a graph of ncnn: export the model again$"),
        (GRAPH.replace("6=2", "6=two"), r"the parameters of conv are damaged: export the model again$"),
        ("", r"is not a graph of ncnn"),
        (None, r"cannot be read \(No such file or directory\): export the model again$"),
    ],
    ids=["magic", "counts", "a blob less", "parameter", "empty", "missing"],
)
def test_a_damaged_graph_is_one_line(graph: str | None, message: str, small: tuple[Path, Path]) -> None:
    small[0].unlink()
    if graph is not None:
        small[0].write_text(graph)
    with pytest.raises(ExportError, match=message):
        ncnn_files.read(*small)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (bytes(4) + bytes(11), r"ends within the weights of conv: export the model again$"),
        (bytes(4) + bytes(4), r"ends within the weights of conv"),
        (bytes(2), r"ends within the weights of conv"),
        (bytes(4) + bytes(16), r"holds 4 bytes that belong to no layer of .* \(others in it: Input\): use the fp32"),
        (b"\1\2\3\4" + bytes(12), r"the weights of conv are stored in an unknown way"),
    ],
)
def test_damaged_weights_are_one_line(content: bytes, message: str, small: tuple[Path, Path]) -> None:
    small[1].write_bytes(content)
    with pytest.raises(ExportError, match=message):
        ncnn_files.read(*small)


def test_a_layer_keeps_what_is_not_changed() -> None:
    layer = Layer("Convolution", "a", ["x"], ["y"], {"0": "4", "9": "1"})
    assert layer.changed({"8": "2"}, []).parameters == {"0": "4", "9": "1", "8": "2"}
