"""8-bit ncnn models: weights as int8 with a scale per output channel, inputs quantized with one scale per layer.

ncnn quantizes the input of such a layer, multiplies in integers and returns floats, so that whatever stands between the
layers (SiLU, concatenation, the head's decoding) computes as in fp32; where nothing does, integers are passed on.
ncnn's own calibration tools are not in its wheels; this is the same published method in Python, with a search for the
layers that must stay in float.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmark.runtimes import NCNN_SUFFIX
from compress import manifest
from compress.settings import QuantizeNcnn
from export import calibration, int8, ncnn_files, stage
from export.ncnn_files import Layer, Weights

CONVOLUTIONS = ("Convolution", "ConvolutionDepthWise")
STAGE = "ncnn_int8"
KINDS = (*CONVOLUTIONS, "InnerProduct")
SUFFIX = f".int8{NCNN_SUFFIX}"
METHODS: dict[str, Callable[[calibration.Histogram], float]] = {
    "percentile": calibration.percentile_threshold,
    "kl": calibration.kl_threshold,
}
_STEPS = 127  # of a magnitude; ncnn leaves −128 out
# What ncnn reads in a layer's int8_scale_term: a scale per group of a depthwise convolution, per channel otherwise.
_PER_GROUP, _PER_CHANNEL = "1", "2"
_INTEGER_OUTPUT = 100  # is added to it where the output stays in 8 bits


def export_int8(
    model: Path,
    output: Path,
    data: Path,
    calibration_data: Path,
    imgsz: int,
    settings: QuantizeNcnn,
    *,
    measured: bool = True,
) -> dict[str, Any]:
    """Quantize a model for ncnn, choose the layers that stay in float, prove parity and measure the latency.

    Args:
        model: the checkpoint.
        output: the folder to write, NAME_ncnn_model; it appears whole or not at all.
        data: data set YAML, whose val split gives the mAP, and images for parity.
        calibration_data: data set YAML, whose train split calibrates.
        imgsz: side of the square input, px.
        settings: method, budget …
        measured: whether to measure the latency.

    Returns:
        As `int8.export_mixed`.

    Raises:
        CheckpointError: `model` is no detector.
        DataError: a split has no images, or no labels to compute mAP from.
        ExportError: as `export.ncnn.export_ncnn`, or no choice of layers meets the budget, or parity fails.
    """
    from compress.data.pixels import letterbox
    from compress.progress import track
    from export.ncnn import BIN, PARAM, export_ncnn

    stage.require_detector(model)
    images = int8.calibration_images(calibration_data, settings)
    with stage.scratch(output) as scratch:
        dense = export_ncnn(model, scratch / f"fp32{NCNN_SUFFIX}", imgsz=imgsz)
        layers = ncnn_files.read(dense / PARAM, dense / BIN)
        names = [layer.name for layer in layers if can_quantize(layer)]
        squares = [letterbox(path, imgsz)[0] for path in track(images, "images")]
        thresholds = calibrate(dense, layers, squares, settings.method)
        facts = {"method": settings.method}

        def write(path: Path, in_float: list[str]) -> None:
            chosen = {name: thresholds[name] for name in names if name not in in_float}
            _write(dense, path, layers, chosen, {**facts, **_described(images, in_float)})

        def write_alone(path: Path, layer: str) -> None:
            _write(dense, path, layers, {layer: thresholds[layer]}, facts)

        quantizer = int8.Quantizer(dense, names, write, write_alone, facts)
        return int8.export_mixed(model, output, data, images, imgsz, settings, quantizer, measured=measured)


def can_quantize(layer: Layer) -> bool:
    """Tell whether ncnn has an 8-bit version of a layer: a convolution or inner product with its own weights."""
    return layer.kind in KINDS and bool(layer.weights) and np.issubdtype(layer.weights[0].values.dtype, np.floating)


def calibrate(folder: Path, layers: list[Layer], images: list[np.ndarray], method: str) -> dict[str, float]:
    """Return the largest magnitude of the input of each layer that 8 bits shall hold, by the layer's name.

    ncnn itself computes the inputs, twice: to find the largest magnitudes, then to fill the histograms below them.

    Args:
        folder: the model in fp32.
        layers: what `ncnn_files.read` returned for it.
        images: arrays (3, imgsz, imgsz).
        method: a key of `METHODS`.
    """
    from benchmark.runners import ncnn_runner
    from compress.progress import track

    readers = [layer for layer in layers if can_quantize(layer)]
    blobs = sorted({layer.inputs[0] for layer in readers})
    session = ncnn_runner.load(str(folder), threads=1)
    largest = dict.fromkeys(blobs, 0.0)
    for image in track(images, "largest activations"):
        for blob, values in ncnn_runner.blobs(session, image, blobs):
            largest[blob] = max(largest[blob], float(np.abs(values).max(initial=0.0)))
    histograms = {blob: calibration.Histogram(value) for blob, value in largest.items()}
    for image in track(images, "histograms"):
        for blob, values in ncnn_runner.blobs(session, image, blobs):
            histograms[blob].add(values)
    found = {blob: METHODS[method](histogram) for blob, histogram in track(list(histograms.items()), "thresholds")}
    return {layer.name: found[layer.inputs[0]] for layer in readers}


def quantize(layers: list[Layer], thresholds: dict[str, float]) -> list[Layer]:
    """Return the layers, those that have a threshold with 8-bit weights and the scales that ncnn wants.

    A scale is a number of steps per unit: 127 / threshold for the input, 127 / largest weight for each output channel.

    Args:
        layers: what `ncnn_files.read` returned.
        thresholds: largest magnitude of the input, by the layer's name.
    """
    return chain([_quantize(layer, thresholds[layer.name]) if layer.name in thresholds else layer for layer in layers])


def chain(layers: list[Layer]) -> list[Layer]:
    """Return the layers; a convolution whose output nothing reads but 8-bit convolutions passes on its integers.

    ncnn then neither returns floats nor quantizes them again, and the values are the same. SiLU ends a chain, because
    in ncnn it is a layer of its own; ReLU does not, because it is a part of the convolution.

    Args:
        layers: of which some have 8-bit weights, and none is chained yet.
    """
    readers: dict[str, list[Layer]] = {}
    for layer in layers:
        for blob in layer.inputs:
            readers.setdefault(blob, []).append(layer)
    return [_chain(layer, list(_readers(layer.outputs[0], readers))) if layer.outputs else layer for layer in layers]


def _chain(layer: Layer, readers: list[Layer | None]) -> Layer:
    if not all(reader is not None and _is_integer(reader) for reader in (layer, *readers)):
        return layer
    scales = {float(reader.weights[-1].values[0]) for reader in readers if reader is not None}
    if len(scales) != 1:
        return layer
    term = str(layer.integer(ncnn_files.INT8) + _INTEGER_OUTPUT)
    own = Weights(np.array([*scales], np.float32))
    return layer.changed({ncnn_files.INT8: term}, [*layer.weights, own])


def _is_integer(layer: Layer) -> bool:
    return layer.kind in CONVOLUTIONS and layer.integer(ncnn_files.INT8) != 0


def _readers(blob: str, readers: dict[str, list[Layer]]) -> Iterator[Layer | None]:
    """Yield what reads a blob, also behind copies of it; null where the blob is an output of the network."""
    found = readers.get(blob, [])
    if not found:
        yield None
    for reader in found:
        if reader.kind == "Split":
            for copy in reader.outputs:
                yield from _readers(copy, readers)
        else:
            yield reader


def _quantize(layer: Layer, threshold: float) -> Layer:
    weights, *bias = layer.weights
    depthwise = layer.kind == "ConvolutionDepthWise"
    rows = layer.integer(ncnn_files.GROUP, 1) if depthwise else layer.integer(ncnn_files.OUTPUTS)
    values = weights.values.astype(np.float32).reshape(rows, -1)
    largest = np.abs(values).max(axis=1)
    # A channel or an input of zeros alone: any scale holds it.
    scales = _STEPS / np.where(largest > 0, largest, _STEPS)
    integers = np.clip(np.rint(values * scales[:, None]), -_STEPS, _STEPS)
    term = _PER_GROUP if depthwise else _PER_CHANNEL
    own = [Weights(scales.astype(np.float32)), Weights(np.array([_STEPS / (threshold or _STEPS)], np.float32))]
    return layer.changed({ncnn_files.INT8: term}, [Weights.int8(integers), *bias, *own])


def _write(dense: Path, folder: Path, layers: list[Layer], thresholds: dict[str, float], facts: dict[str, Any]) -> None:
    from export.ncnn import BIN, METADATA, PARAM, file_facts

    folder.mkdir(exist_ok=True)
    ncnn_files.write(quantize(layers, thresholds), folder / PARAM, folder / BIN)
    metadata = json.loads((dense / METADATA).read_text(encoding="utf-8"))
    metadata |= {"precision": "int8", "quantization": facts, "files": file_facts(folder)}
    manifest.write_json(folder / METADATA, metadata)


def _described(images: list[Path], in_float: list[str]) -> dict[str, Any]:
    return {
        "calibration_images": len(images),
        "calibration_sha256": int8.calibration_hash(images),
        "float_layers": in_float,
    }
