"""Explicit quantization of an ONNX graph: its layers, the ranges of its tensors, and the Q/DQ nodes around them.

Calibration and Q/DQ nodes are onnxruntime's. What is decided here: which nodes make a layer, and that everything behind
the last convolutions (box decoding, suppression) stays in float, because 8 bits cannot hold pixels and scores at once.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

Method = Literal["minmax", "percentile", "entropy"]
Target = Literal["onnxruntime", "tensorrt"]
_ACTIVATIONS = frozenset(("Sigmoid", "Mul", "Relu", "LeakyRelu", "HardSwish", "Clip"))
_PERCENTILE, _BINS = 99.999, 2048
# onnxruntime's default of 128 bins for 128 levels leaves entropy one range to choose from; more take it minutes.
_ENTROPY_BINS, _LEVELS = 512, 128
_SILU_TAIL = -8.0


@dataclass(frozen=True)
class Scheme:
    """What a target's integer kernels want.

    Attributes:
        carriers: operators beside layers that also pass 8-bit values on.
        symmetric: activations are int8 around 0; otherwise uint8 with a zero point, which keeps one more bit of what
            SiLU returns.
        layer_outputs: whether the output of a convolution is quantized before its activation.
    """

    carriers: tuple[str, ...]
    symmetric: bool
    layer_outputs: bool


SCHEMES: dict[Target, Scheme] = {
    # Measured on an x86 CPU with VNNI, yolov8n at 640 px: uint8 2.8 times as fast as fp32, int8 activations 0.7 times.
    "onnxruntime": Scheme(("Add", "Concat", "MaxPool", "Resize", "Split"), symmetric=False, layer_outputs=True),
    # TensorRT's parser refuses zero points that are not 0, and TensorRT fuses a convolution with its activation where
    # no Q/DQ stands between them.
    "tensorrt": Scheme(("Add",), symmetric=True, layer_outputs=False),
}


def layers_of(graph: Any) -> dict[str, list[str]]:
    """Return the layers that can be quantized: each convolution's name with the names of its own nodes.

    A layer is a convolution and the activation behind it, as far as nothing else reads between.

    Args:
        graph: an ONNX model as `export.onnx` writes it.
    """
    readers = _readers(graph)
    found = {}
    for node in graph.graph.node:
        if node.op_type == "Conv":
            found[node.name] = [node.name, *(other.name for other in _activation(node, readers))]
    return found


def carriers_of(graph: Any, scheme: Scheme) -> list[str]:
    """Return the nodes beside layers that pass 8-bit values on: not in an attention, not behind the last layers."""
    behind = behind_layers(graph)
    return [
        node.name
        for node in graph.graph.node
        if node.op_type in scheme.carriers and node.name not in behind and "/attn/" not in node.name
    ]


def calibrate(model: Path, images: list[np.ndarray] | Iterator[np.ndarray], method: Method, scheme: Scheme) -> Any:
    """Return the range of every tensor that may be quantized, on real images.

    Args:
        model: an ONNX file in fp32.
        images: arrays (1, 3, imgsz, imgsz), taken one at a time: all tensors of one image are in memory at once.
        method: minmax (the widest range), percentile (99.999 % of the values) or entropy (least KL divergence).
        scheme: whose symmetry the ranges have.
    """
    import tempfile

    from onnxruntime.quantization.calibrate import CalibrationMethod, create_calibrator

    kinds = {
        "minmax": (CalibrationMethod.MinMax, {}),
        "percentile": (CalibrationMethod.Percentile, {"percentile": _PERCENTILE, "num_bins": _BINS}),
        "entropy": (CalibrationMethod.Entropy, {"num_bins": _ENTROPY_BINS, "num_quantized_bins": _LEVELS}),
    }
    kind, options = kinds[method]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        calibrator: Any = create_calibrator(
            str(model),
            [*_ACTIVATIONS, "Conv", *scheme.carriers],
            augmented_model_path=str(Path(folder) / "augmented.onnx"),
            calibrate_method=kind,
            extra_options={**options, "symmetric": scheme.symmetric},
        )
        for image in images:
            calibrator.collect_data(_Reader(image))
        return _without_tails(calibrator.compute_data(), model)


def load(model: Path) -> Any:
    """Open an ONNX file with the shapes that the quantizer needs."""
    from onnxruntime.quantization.quant_utils import load_model_with_shape_infer

    return load_model_with_shape_infer(model)


def quantize(
    graph: Any, ranges: Any, scheme: Scheme, layers: list[str], *, carriers: bool = True, reduce_range: bool = False
) -> Any:
    """Return a copy of a graph in which these layers compute with 8 bits.

    Weights are int8 with a scale per channel. Biases stay in float: as int32, which is onnxruntime's default,
    TensorRT's parser refuses them, and onnxruntime makes them int32 itself when it loads the graph.

    Args:
        graph: what `load` returned.
        ranges: what `calibrate` returned.
        scheme: of the target.
        layers: names of layers, keys of `layers_of`.
        carriers: whether 8-bit values are passed on between the layers.
        reduce_range: weights with 7 bits, for x86 CPUs without VNNI, whose sums of 8-bit products overflow.
    """
    import copy

    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    members = layers_of(graph)
    nodes = [node for layer in layers for node in members[layer]]
    if not scheme.layer_outputs:
        nodes = list(layers)
    if carriers:
        nodes += carriers_of(graph, scheme)
    if not layers:
        return copy.deepcopy(graph)
    operators = ["Conv", *scheme.carriers, *(_ACTIVATIONS if scheme.layer_outputs else ())]
    quantizer = QDQQuantizer(
        copy.deepcopy(graph),
        True,  # per channel
        reduce_range,
        QuantType.QInt8,
        QuantType.QInt8 if scheme.symmetric else QuantType.QUInt8,
        ranges,
        nodes,
        [],
        operators,
        {
            "QuantizeBias": False,
            "ActivationSymmetric": scheme.symmetric,
            "OpTypesToExcludeOutputQuantization": [] if scheme.layer_outputs else ["Conv"],
            "DedicatedQDQPair": not scheme.layer_outputs,
        },
    )
    quantizer.quantize_model()
    quantizer.model.topological_sort()  # it appends its nodes at the end, where ONNX does not allow them
    return quantizer.model.model


def _without_tails(ranges: Any, model: Path) -> Any:
    """Cut the ranges of what SiLU reads at −8, where it returns −0.003 whatever comes: those levels have better use."""
    import onnx
    from onnxruntime.quantization.calibrate import TensorData

    graph = onnx.load(model)
    producers = {node.name: node.output[0] for node in graph.graph.node}
    for conv, members in layers_of(graph).items():
        name = producers[conv]
        low, high = ranges[name].range_value
        if len(members) == 3 and np.max(low) < _SILU_TAIL:
            ranges[name] = TensorData(lowest=np.full_like(low, _SILU_TAIL), highest=high)
    return ranges


class _Reader:
    """One image, as onnxruntime's calibrators read it."""

    def __init__(self, image: np.ndarray) -> None:
        self._left = [{"images": image}]

    def get_next(self) -> dict[str, np.ndarray] | None:
        return self._left.pop() if self._left else None


def _readers(graph: Any) -> dict[str, list[Any]]:
    readers: dict[str, list[Any]] = {}
    for node in graph.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    return readers


def _activation(conv: Any, readers: dict[str, list[Any]]) -> list[Any]:
    """Return the nodes of the activation behind a convolution: SiLU (a Sigmoid and a Mul) or a single node."""
    behind = readers.get(conv.output[0], [])
    if len(behind) == 2 and {node.op_type for node in behind} == {"Sigmoid", "Mul"}:
        sigmoid, product = sorted(behind, key=lambda node: node.op_type, reverse=True)
        return [sigmoid, product] if set(product.input) == {conv.output[0], sigmoid.output[0]} else []
    if len(behind) == 1 and behind[0].op_type in _ACTIVATIONS - {"Sigmoid", "Mul"}:
        return behind
    return []


def behind_layers(graph: Any) -> set[str]:
    """Return the names of the nodes from which no layer follows any more: the decoding of the head."""
    producers = {name: node for node in graph.graph.node for name in node.output}
    layers = {name for members in layers_of(graph).values() for name in members}
    feeds: set[str] = set()
    waiting = [node for node in graph.graph.node if node.name in layers]
    while waiting:
        node = waiting.pop()
        if node.name not in feeds:
            feeds.add(node.name)
            waiting += [producers[name] for name in node.input if name in producers]
    return {node.name for node in graph.graph.node} - feeds
