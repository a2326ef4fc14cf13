"""16-bit graphs: which part is in 16 bits, and that it still computes the same."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from compress.errors import ExportError
from export import qdq
from export.half import convert, rounded, to_bfloat16

IMGSZ = 64


@pytest.fixture(scope="module")
def graph(onnx_file: Path) -> Any:
    return onnx.load(onnx_file)


def small(nodes: list[Any], weights: dict[str, np.ndarray], outputs: list[str], opset: int = 17) -> Any:
    made = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2, 4, 4])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2, 4, 4]) for name in outputs],
        [numpy_helper.from_array(values, name) for name, values in weights.items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def conv(source: str, target: str) -> Any:
    return helper.make_node("Conv", [source, "w"], [target], name=f"conv/{target}")


def run(model: Any, image: np.ndarray, name: str = "images") -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {name: image})[0])


WEIGHT = {"w": np.full((2, 2, 1, 1), 0.5, np.float32)}


def test_a_detector_in_fp16_returns_nearly_the_same_in_fp32(graph: Any) -> None:
    blocks = np.random.default_rng(0).random((1, 3, 8, 8), dtype=np.float32)
    image = np.kron(blocks, np.ones((1, 1, IMGSZ // 8, IMGSZ // 8), np.float32))
    expected, actual = run(graph, image), run(convert(graph, "fp16"), image)
    assert actual.dtype == np.float32
    error = np.abs(actual - expected)
    assert 0 < np.sqrt(np.square(error[:, :4]).mean()) < 0.5  # px; parity holds trained weights to 0.3
    assert error[:, 4:].max() < 0.02


@pytest.mark.parametrize(("precision", "kind"), [("fp16", TensorProto.FLOAT16), ("bf16", TensorProto.BFLOAT16)])
def test_weights_of_all_convolutions_are_narrow(graph: Any, precision: Any, kind: int) -> None:
    made = convert(graph, precision)
    kinds = {item.name: item.data_type for item in made.graph.initializer}
    layers = qdq.layers_of(graph)
    found = {node.name: kinds[node.input[1]] for node in made.graph.node if node.op_type == "Conv"}
    assert found == dict.fromkeys(layers, kind)
    assert [item.type.tensor_type.elem_type for item in (*made.graph.input, *made.graph.output)] == [1, 1]
    size, before = len(made.SerializeToString()), len(graph.SerializeToString())
    assert size < 0.6 * before
    assert {node.op_type for node in graph.graph.node}.isdisjoint({"Cast"})  # the graph itself stays as it was


def test_an_output_straight_from_a_convolution_stays_fp32_under_its_name() -> None:
    model = small([conv("x", "y"), conv("y", "z")], WEIGHT, ["y", "z"])
    made = convert(model, "fp16")
    names = [(node.op_type, node.input[0], node.output[0]) for node in made.graph.node]
    assert names == [
        ("Cast", "x", "x_fp16"),
        ("Conv", "x_fp16", "y_fp16"),
        ("Cast", "y_fp16", "y"),
        ("Conv", "y_fp16", "z_fp16"),
        ("Cast", "z_fp16", "z"),
    ]


def test_what_follows_the_last_convolution_is_fp32() -> None:
    model = small(
        [conv("x", "y"), helper.make_node("Mul", ["y", "s"], ["z"], name="decode")],
        {**WEIGHT, "s": np.array([8.0], np.float32)},
        ["z"],
    )
    made = convert(model, "bf16")
    assert [node.op_type for node in made.graph.node] == ["Cast", "Conv", "Cast", "Mul"]
    assert {item.name: item.data_type for item in made.graph.initializer} == {
        "w_bf16": TensorProto.BFLOAT16,
        "s": TensorProto.FLOAT,
    }


def test_scales_of_a_resize_and_arithmetic_on_shapes_stay_fp32() -> None:
    nodes = [
        conv("x", "y"),
        helper.make_node("Shape", ["y"], ["shape"], name="shape"),
        helper.make_node("Cast", ["shape"], ["float"], name="float", to=TensorProto.FLOAT),
        helper.make_node("Div", ["float", "float"], ["ones"], name="ones"),
        helper.make_node("Resize", ["y", "", "ones"], ["big"], name="resize", mode="nearest"),
        conv("big", "z"),
    ]
    made = convert(small(nodes, WEIGHT, ["z"]), "fp16")
    by_name = {node.name: node for node in made.graph.node}
    assert list(by_name["resize"].input) == ["y", "", "ones"]
    assert by_name["float"].attribute[0].i == TensorProto.FLOAT
    onnx.checker.check_model(made, full_check=True)
    image = np.arange(32, dtype=np.float32).reshape(1, 2, 4, 4)
    np.testing.assert_array_equal(run(made, image, "x"), run(small(nodes, WEIGHT, ["z"]), image, "x"))


def test_a_constant_node_becomes_a_narrow_weight() -> None:
    value = numpy_helper.from_array(np.array([2.0], np.float32))
    nodes = [
        helper.make_node("Constant", [], ["two"], name="two", value=value),
        helper.make_node("Mul", ["x", "two"], ["double"], name="double"),
        conv("double", "z"),
    ]
    made = convert(small(nodes, WEIGHT, ["z"]), "fp16")
    assert {item.name: item.data_type for item in made.graph.initializer} == dict.fromkeys(
        ("two_fp16", "w_fp16"), TensorProto.FLOAT16
    )
    image = np.ones((1, 2, 4, 4), np.float32)
    assert run(made, image, "x").tolist() == np.full((1, 2, 4, 4), 2.0).tolist()


def quantized(scale: float, opset: int) -> Any:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z0"], ["q"], name="q"),
        helper.make_node("DequantizeLinear", ["q", "s", "z0"], ["d"], name="d"),
        conv("d", "z"),
    ]
    weights = {**WEIGHT, "s": np.array(scale, np.float32), "z0": np.array(0, np.int8)}
    return small(nodes, weights, ["z"], opset)


def test_a_quantized_graph_gets_narrow_scales_that_stay_above_zero() -> None:
    made = convert(quantized(1e-9, 19), "fp16")
    scale = next(item for item in made.graph.initializer if item.name == "s_fp16")
    assert float(numpy_helper.to_array(scale)) == 2.0**-24
    kinds = {item.name: item.data_type for item in made.graph.initializer}
    assert kinds == {"s_fp16": TensorProto.FLOAT16, "w_fp16": TensorProto.FLOAT16, "z0": TensorProto.INT8}


def test_a_graph_that_rounds_stands_for_one_in_bf16() -> None:
    """1 + 2**-9 rounds to 1 as input, and so does the half of 2 + 2**-8 behind the first convolution."""
    model = small(
        [conv("x", "y"), conv("y", "z"), helper.make_node("Mul", ["z", "s"], ["d"], name="decode")],
        {
            "w": np.array([[[[1.0]], [[2.0**-9]]], [[[0.0]], [[1.0]]]], np.float32),
            "s": np.array([1 + 2.0**-9], np.float32),
        },
        ["d"],
    )
    made = rounded(convert(model, "bf16"))
    onnx.checker.check_model(made, full_check=True)
    image = np.full((1, 2, 4, 4), 1 + 2.0**-9, np.float32)
    assert run(model, image, "x")[0, 0, 0, 0] > 1.007
    # In channel 0 1 + 2**-9 becomes 1 again after each convolution; what decodes is not rounded.
    np.testing.assert_array_equal(run(made, image, "x"), np.full((1, 2, 4, 4), 1 + 2.0**-9, np.float32))


def test_a_detector_that_rounds_to_bf16_is_further_away_than_one_in_fp16(graph: Any) -> None:
    blocks = np.random.default_rng(0).random((1, 3, 8, 8), dtype=np.float32)
    image = np.kron(blocks, np.ones((1, 1, IMGSZ // 8, IMGSZ // 8), np.float32))
    expected = run(graph, image)
    errors = [
        np.abs(run(made, image)[:, 4:] - expected[:, 4:]).mean()
        for made in (convert(graph, "fp16"), rounded(convert(graph, "bf16")))
    ]
    assert 2 * errors[0] < errors[1] < 0.1


def test_what_cannot_be_narrow_is_named() -> None:
    with pytest.raises(ExportError, match="need opset 19, the graph has 17"):
        convert(quantized(0.1, 17), "fp16")
    with pytest.raises(ExportError, match="the weight w is too large for fp16"):
        convert(small([conv("x", "z")], {"w": WEIGHT["w"] * 1e6}, ["z"]), "fp16")
    with pytest.raises(ExportError, match="no convolution that could compute in bf16"):
        convert(small([helper.make_node("Relu", ["x"], ["z"], name="r")], {}, ["z"]), "bf16")
    branch = helper.make_graph(
        [helper.make_node("Relu", ["y"], ["inner"], name="r")],
        "branch",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, [1, 2, 4, 4])],
    )
    choice = helper.make_node("If", ["yes"], ["c"], name="i", then_branch=branch, else_branch=branch)
    weights = {**WEIGHT, "yes": np.array(True)}
    with pytest.raises(ExportError, match="the graph has If, inside which nothing is converted: use fp32"):
        convert(small([conv("x", "y"), choice, conv("c", "z")], weights, ["z"]), "fp16")


def test_a_graph_whose_types_contradict_each_other_is_named(graph: Any) -> None:
    odd = copy.deepcopy(graph)
    odd.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    with pytest.raises(ExportError, match=r"types or shapes .* do not fit each other \(.*\): export it again"):
        convert(odd, "fp16")


@pytest.mark.parametrize(
    ("value", "bits"),
    [
        (1.0, 0x3F80),
        (-2.0, 0xC000),
        (1.00390625, 0x3F80),  # 1 + 2**-8, half way: to the even one below
        (1.01171875, 0x3F82),  # 1 + 3 * 2**-8, half way: to the even one above
        (3.0e38, 0x7F62),
        (0.0, 0x0000),
    ],
)
def test_bfloat16_rounds_to_the_nearest_even(value: float, bits: int) -> None:
    assert to_bfloat16(np.array([value], np.float32)).tolist() == [bits]
