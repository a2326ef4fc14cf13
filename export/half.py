"""16-bit ONNX graphs for strongly typed runtimes, in which the types of the tensors decide how a layer computes.

The converter of onnxruntime knows fp16 only; TensorRT wants bf16 in the same way, so both are made here by one rule.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from compress.errors import ExportError
from export import qdq

Half = Literal["fp16", "bf16"]
QDQ_OPSET, _BF16_OPSET = 19, 22  # the first with Q/DQ nodes of 16-bit floats, and with bf16 convolutions
_QDQ = ("QuantizeLinear", "DequantizeLinear")
_LEAST_SCALE = 2.0**-24  # the least fp16 above 0
# Inputs that the ONNX specification wants as float32, whatever the type of the others.
_FLOAT_INPUTS = {"Resize": (1, 2), "Upsample": (1,)}
# Nodes whose type is written in an attribute, or whose values are coordinates.
_FLOAT_NODES = frozenset(("ConstantOfShape", "EyeLike", "NonMaxSuppression", "RandomNormal", "RandomUniform", "Range"))


def convert(graph: Any, precision: Half) -> Any:
    """Return a copy of an fp32 graph that computes in 16 bits up to its last convolutions.

    In a quantized graph that is what its int8 layers leave over. What follows them, the decoding of the head, stays in
    fp32: 16 bits cannot tell neighbouring pixels apart at 640 px (fp16 has steps of 0.5 there, bf16 of 4). So does what
    computes with shapes. Inputs and outputs stay fp32.

    Args:
        graph: an ONNX model as `export.onnx` writes it.
        precision: fp16 or bf16.

    Raises:
        ExportError: the graph is quantized with an old opset, has no convolution, has branches or loops, contradicts
            itself, or a weight does not fit into fp16.
    """
    import onnx

    opset = max(item.version for item in graph.opset_import if item.domain in ("", "ai.onnx"))
    if opset < QDQ_OPSET and any(node.op_type in _QDQ for node in graph.graph.node):
        raise ExportError(f"16-bit scales of Q/DQ nodes need opset {QDQ_OPSET}, the graph has {opset}: export it again")
    if not qdq.layers_of(graph):
        raise ExportError(f"the graph has no convolution that could compute in {precision}: use fp32")
    kind = onnx.AttributeProto.GRAPH
    if inner := {node.op_type for node in graph.graph.node for item in node.attribute if item.type == kind}:
        raise ExportError(f"the graph has {', '.join(sorted(inner))}, inside which nothing is converted: use fp32")
    made = copy.deepcopy(graph)
    half = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}[precision]
    try:
        kinds = _kinds(made)
        nodes = _with_initializers(made)
        in_float = qdq.behind_layers(made) | _of_shapes(made, nodes)
        _Casts(made, kinds, half, precision).apply(nodes, in_float)
        del made.graph.value_info[:]  # they name the types of before
        # Before that set ONNX has no bf16 convolution: TensorRT takes it all the same, shape inference does not.
        onnx.checker.check_model(made, full_check=precision == "fp16" or opset >= _BF16_OPSET)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ExportError(f"types or shapes of the graph do not fit each other ({reason}): export it again") from None
    return made


def rounded(graph: Any) -> Any:
    """Return an fp32 graph that rounds to bf16 wherever `graph` computes in it: what a CPU can run in its place.

    Args:
        graph: what `convert` returned for bf16.
    """
    import onnx
    from onnx import helper, numpy_helper

    bf16, fp32 = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT
    made = copy.deepcopy(graph)
    del made.graph.node[:], made.graph.initializer[:]
    narrow = set()
    for item in graph.graph.initializer:
        if item.data_type == bf16:
            narrow.add(item.name)
            bits = np.frombuffer(item.raw_data, "<u2").astype(np.uint32) << np.uint32(16)
            item = numpy_helper.from_array(bits.view(np.float32).reshape(item.dims), item.name)
        made.graph.initializer.append(item)
    for node in graph.graph.node:
        to = next((attribute.i for attribute in node.attribute if attribute.name == "to"), None)
        narrows = to == bf16 if node.op_type == "Cast" else bool(narrow & set(node.input))
        copied = made.graph.node.add()
        copied.CopyFrom(node)
        if not narrows:
            continue
        for position, name in enumerate(node.output):
            copied.output[position] = f"{name}/narrow" if to else f"{name}/wide"
            if not to:
                made.graph.node.append(helper.make_node("Cast", [f"{name}/wide"], [f"{name}/narrow"], to=bf16))
            made.graph.node.append(helper.make_node("Cast", [f"{name}/narrow"], [name], to=fp32))
            narrow.add(name)
    return made


class _Casts:
    """The casts between the part in 16 bits and the part in fp32, each made once."""

    def __init__(self, model: Any, kinds: dict[str, int], half: int, precision: str) -> None:
        import onnx

        self.graph = model.graph
        self.float_type = onnx.TensorProto.FLOAT
        self.half = half
        self.precision = precision
        self.floats = {name for name, kind in kinds.items() if kind == self.float_type}
        self.weights = {item.name: item for item in model.graph.initializer}
        self.scales = {node.input[1] for node in model.graph.node if node.op_type in _QDQ}
        self.halved: set[str] = set()  # tensors that a node in 16 bits returns
        self.made: dict[tuple[str, int], str] = {}
        self.ordered: list[Any] = []

    def apply(self, nodes: list[Any], in_float: set[str]) -> None:
        outputs = {item.name for item in self.graph.output}
        for node in nodes:
            halve = node.name not in in_float and node.op_type not in _FLOAT_NODES
            kept = _FLOAT_INPUTS.get(node.op_type, ())
            for position, name in enumerate(node.input):
                wanted = self.half if halve and position not in kept else self.float_type
                if name in self.floats:
                    node.input[position] = self._as(name, wanted)
            self.ordered.append(node)
            if not halve:
                continue
            self._set_cast(node)
            for position, name in enumerate(node.output):
                if name not in self.floats:
                    continue
                if name in outputs:  # the name stays that of the fp32 output
                    node.output[position] = f"{name}_{self.precision}"
                    self.ordered.append(self._cast(node.output[position], name, self.float_type))
                    self.made[name, self.half] = node.output[position]
                else:
                    self.halved.add(name)
        del self.graph.node[:]
        self.graph.node.extend(self.ordered)
        used = {name for node in self.ordered for name in node.input}
        kept_weights = [item for item in self.graph.initializer if item.name in used]
        del self.graph.initializer[:]
        self.graph.initializer.extend(kept_weights)

    def _as(self, name: str, kind: int) -> str:
        """Return the name of a float tensor in the wanted type, which is made where it is not there yet."""
        own = self.half if name in self.halved else self.float_type
        if own == kind:
            return name
        if (name, kind) not in self.made:
            label = self.precision if kind == self.half else "fp32"
            other = f"{name}_{label}"
            if name in self.weights:
                self.graph.initializer.append(_narrow(self.weights[name], other, self.precision, name in self.scales))
            else:
                self.ordered.append(self._cast(name, other, kind))
            self.made[name, kind] = other
        return self.made[name, kind]

    def _cast(self, source: str, target: str, kind: int) -> Any:
        from onnx import helper

        return helper.make_node("Cast", [source], [target], name=f"{target}/Cast", to=kind)

    def _set_cast(self, node: Any) -> None:
        """A Cast to float inside the part in 16 bits casts to 16 bits."""
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == self.float_type:
                attribute.i = self.half


def _narrow(weight: Any, name: str, precision: str, is_scale: bool) -> Any:
    """Return a weight in 16 bits; a scale stays above 0.

    Raises:
        ExportError: it is too large for fp16.
    """
    import onnx
    from onnx import helper, numpy_helper

    values = numpy_helper.to_array(weight)
    if is_scale:
        values = np.maximum(values, np.float32(_LEAST_SCALE))
    if precision == "fp16":
        if np.abs(values).max(initial=0.0) > np.finfo(np.float16).max:
            raise ExportError(f"the weight {weight.name} is too large for fp16 (65504): use bf16 or fp32")
        return numpy_helper.from_array(values.astype(np.float16), name)
    return helper.make_tensor(
        name, onnx.TensorProto.BFLOAT16, weight.dims, to_bfloat16(values).astype("<u2").tobytes(), raw=True
    )


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round finite float32 values to the nearest bfloat16, ties to even, and return its bits as uint16."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)).astype(np.uint16)


def _kinds(model: Any) -> dict[str, int]:
    """Return the element type of every tensor."""
    import onnx

    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    kinds = {item.name: item.data_type for item in model.graph.initializer}
    for item in (*inferred.value_info, *inferred.input, *inferred.output):
        kinds[item.name] = item.type.tensor_type.elem_type
    return kinds


def _with_initializers(model: Any) -> list[Any]:
    """Make initializers of the graph's Constant nodes, and return the other nodes."""
    nodes = []
    for node in model.graph.node:
        value = next((item.t for item in node.attribute if item.name == "value"), None)
        if node.op_type == "Constant" and value is not None:
            tensor = model.graph.initializer.add()
            tensor.CopyFrom(value)
            tensor.name = node.output[0]
        else:
            nodes.append(node)
    return nodes


def _of_shapes(model: Any, nodes: list[Any]) -> set[str]:
    """Return the names of the nodes that compute with nothing but shapes and constants."""
    known = {item.name for item in model.graph.initializer} | {""}
    return set(_only_from(nodes, known))


def _only_from(nodes: list[Any], known: set[str]) -> Iterator[str]:
    for node in nodes:
        if node.op_type in ("Shape", "Size") or known.issuperset(node.input):
            known.update(node.output)
            yield node.name
