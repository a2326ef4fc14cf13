"""ncnn's model files: the graph as text (param) and the weights of its layers (bin), read and written.

The format is ncnn's: `docs/developer-guide/param-and-model-file-structure.md` of its repository, and for the order of a
layer's weights the `load_model` of that layer. What is read and written again has the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from compress.errors import ExportError

MAGIC = "7767517"
# Parameters of convolutions and inner products, by ncnn's numbers.
OUTPUTS, BIAS, SIZE, GROUP, INT8 = "0", "5", "6", "7", "8"
_FROM_INPUT = "19"  # such a convolution gets its weights as a second input
_INNER_PRODUCT_BIAS, _INNER_PRODUCT_SIZE = "1", "2"
_RAW = 0
_TAGS = {0x01306B47: np.dtype("<f2"), 0x000D4B38: np.dtype("i1"), 0x0002C056: np.dtype("<f4"), _RAW: np.dtype("<f4")}
_INT8_TAG = 0x000D4B38
_ALIGNMENT = 4


@dataclass(frozen=True)
class Weights:
    """One array of a layer.

    Attributes:
        values: a vector; float32, float16 or int8.
        tag: the word before it that says how it is stored; None where ncnn expects plain float32 without one.
    """

    values: np.ndarray
    tag: int | None = None

    @staticmethod
    def int8(values: np.ndarray) -> Weights:
        """Return weights that ncnn takes as they are, without a scale of their own."""
        return Weights(values.astype(np.int8).ravel(), _INT8_TAG)


@dataclass(frozen=True)
class Layer:
    """A line of the graph, and the arrays that belong to it.

    Attributes:
        kind: ncnn's name of the operation.
        name: unique in the graph.
        inputs: names of blobs.
        outputs: names of blobs.
        parameters: by ncnn's numbers, as they are written.
        weights: in ncnn's order.
    """

    kind: str
    name: str
    inputs: list[str]
    outputs: list[str]
    parameters: dict[str, str] = field(default_factory=dict)
    weights: list[Weights] = field(default_factory=list)

    def integer(self, number: str, default: int = 0) -> int:
        """Return a parameter, or what ncnn takes where it is not written."""
        return int(self.parameters.get(number, default))

    def changed(self, parameters: dict[str, str], weights: list[Weights]) -> Layer:
        """Return a copy with more parameters, or other values of them, and with other weights."""
        return replace(self, parameters={**self.parameters, **parameters}, weights=weights)


def read(param: Path, weights: Path) -> list[Layer]:
    """Read a graph and its weights.

    Raises:
        ExportError: a file is missing, damaged or cut off, or a layer has weights that are not known here.
    """
    layers = _read_param(param)
    content = _bytes(weights)
    found, offset = [], 0
    for layer in layers:
        arrays = []
        for count, tagged in _arrays(layer, param):
            array, offset = _read_array(content, offset, count, tagged, layer, weights)
            arrays.append(array)
        found.append(replace(layer, weights=arrays))
    if offset != len(content):
        kinds = ", ".join(sorted({layer.kind for layer in layers if layer.kind not in _LAYOUTS}))
        raise ExportError(
            f"{weights} holds {len(content) - offset} bytes that belong to no layer of {param.name} that is known to "
            f"have weights (others in it: {kinds}): use the fp32 export"
        )
    return found


def write(layers: list[Layer], param: Path, weights: Path) -> None:
    """Write a graph and its weights, each file whole or not at all, as pnnx lays them out."""
    from compress import manifest

    blobs = sum(len(layer.outputs) for layer in layers)
    lines = [MAGIC, f"{len(layers)} {blobs}"]
    for layer in layers:
        fields = [f"{layer.kind:<24} {layer.name:<24} {len(layer.inputs)} {len(layer.outputs)}"]
        fields += [*layer.inputs, *layer.outputs, *(f"{key}={value}" for key, value in layer.parameters.items())]
        lines.append(" ".join(fields))
    manifest.write_bytes_atomic(param, "".join(f"{line}\n" for line in lines).encode())
    manifest.write_bytes_atomic(weights, b"".join(_bytes_of(array) for layer in layers for array in layer.weights))


def _read_param(path: Path) -> list[Layer]:
    try:
        magic, counts, *lines = _bytes(path).decode().splitlines()
        layers = [_read_line(line) for line in lines if line.strip()]
        expected = [int(word) for word in counts.split()]
    except (ValueError, IndexError):
        raise ExportError(f"{path} is not a graph of ncnn: export the model again") from None
    found = [len(layers), sum(len(layer.outputs) for layer in layers)]
    if magic != MAGIC or found != expected:
        raise ExportError(f"{path} is damaged (layers and blobs: {found}, announced {counts}): export the model again")
    return layers


def _read_line(line: str) -> Layer:
    kind, name, *words = line.split()
    inputs, outputs = int(words[0]), int(words[1])
    blobs, pairs = words[2 : 2 + inputs + outputs], words[2 + inputs + outputs :]
    if len(blobs) != inputs + outputs or any("=" in blob for blob in blobs) or any("=" not in pair for pair in pairs):
        raise ValueError(line)
    parameters = dict(pair.split("=", 1) for pair in pairs)
    return Layer(kind, name, blobs[:inputs], blobs[inputs:], parameters)


def _arrays(layer: Layer, param: Path) -> list[tuple[int, bool]]:
    """Return the arrays of a layer in ncnn's order: how many values each has, and whether a tag precedes it."""
    layout = _LAYOUTS.get(layer.kind)
    try:
        return layout(layer) if layout else []
    except ValueError:
        raise ExportError(f"{param}: the parameters of {layer.name} are damaged: export the model again") from None


def _convolution(layer: Layer) -> list[tuple[int, bool]]:
    if layer.integer(_FROM_INPUT):
        return []
    outputs, term = layer.integer(OUTPUTS), layer.integer(INT8)
    arrays = [(layer.integer(SIZE), True)] + [(outputs, False)] * bool(layer.integer(BIAS))
    if term:
        depthwise = layer.kind == "ConvolutionDepthWise"
        scales = outputs if not depthwise else layer.integer(GROUP, 1) if term % 100 == 1 else 1
        arrays += [(scales, False), (1, False)] + [(1, False)] * (term > 100)
    return arrays


def _inner_product(layer: Layer) -> list[tuple[int, bool]]:
    outputs = layer.integer(OUTPUTS)
    arrays = [(layer.integer(_INNER_PRODUCT_SIZE), True)]
    arrays += [(outputs, False)] * bool(layer.integer(_INNER_PRODUCT_BIAS))
    return arrays + ([(outputs, False), (1, False)] if layer.integer(INT8) else [])


def _memory(layer: Layer) -> list[tuple[int, bool]]:
    sides = [layer.integer(number) for number in ("0", "1", "11", "2")]
    return [(int(np.prod([side for side in sides if side])), layer.integer("21", 1) == 0)]


_LAYOUTS: dict[str, Callable[[Layer], list[tuple[int, bool]]]] = {
    "Convolution": _convolution,
    "ConvolutionDepthWise": _convolution,
    "Deconvolution": _convolution,
    "DeconvolutionDepthWise": _convolution,
    "InnerProduct": _inner_product,
    "MemoryData": _memory,
}


def _read_array(content: bytes, offset: int, count: int, tagged: bool, layer: Layer, path: Path) -> tuple[Weights, int]:
    cut = ExportError(f"{path} ends within the weights of {layer.name}: export the model again")
    if tagged and offset + 4 > len(content):
        raise cut
    tag = int.from_bytes(content[offset : offset + 4], "little") if tagged else None
    if tag is not None and tag not in _TAGS:
        raise ExportError(f"{path}: the weights of {layer.name} are stored in an unknown way: export the model again")
    start = offset + 4 * tagged
    dtype = _TAGS[_RAW if tag is None else tag]
    end = start + _aligned(count * dtype.itemsize)
    if end > len(content):
        raise cut
    return Weights(np.frombuffer(content, dtype, count, start), tag), end


def _bytes_of(array: Weights) -> bytes:
    content = array.values.tobytes()
    head = b"" if array.tag is None else array.tag.to_bytes(4, "little")
    return head + content.ljust(_aligned(len(content)), b"\0")


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ExportError(f"{path} cannot be read ({error.strerror}): export the model again") from None
