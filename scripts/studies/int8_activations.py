"""What SiLU costs ncnn in 8 bits: docs/results/int8_activations.json.

usage: python scripts/studies/int8_activations.py --model M.pt [--imgsz 640] [--mode standard]

Measured interleaved, one thread: the model as it is, in fp32 and in 8 bits; the same graph with a ReLU inside each
convolution in the place of the SiLU behind it; and that one without integers passed on between convolutions. The
outputs of the ReLU graphs mean nothing, as nobody trained them; their latency is what a fine-tuning with ReLU could
reach. Needs a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from benchmark.latency import measure
from compress import manifest
from export import ncnn_files, ncnn_int8
from export.ncnn import BIN, METADATA, PARAM, export_ncnn, file_facts
from export.ncnn_files import Layer

ACTIVATION, RELU = "9", "1"
THRESHOLD = 8.0  # any will do: the time that integers take does not depend on what they stand for


def with_relu(layers: list[Layer]) -> list[Layer]:
    """Return the graph with a ReLU inside each convolution that a SiLU follows."""
    behind = {layer.inputs[0]: layer.outputs for layer in layers if layer.kind == "Swish"}
    found = []
    for layer in layers:
        if layer.kind == "Swish":
            continue
        if layer.outputs and layer.outputs[0] in behind:
            fused = {**layer.parameters, ACTIVATION: RELU}
            layer = replace(layer, outputs=behind[layer.outputs[0]], parameters=fused)
        found.append(layer)
    return found


def chained(layers: list[Layer]) -> list[Layer]:
    """Return the layers in 8 bits, as `export.ncnn --int8` writes them."""
    return ncnn_int8.quantize(layers, {layer.name: THRESHOLD for layer in layers if ncnn_int8.can_quantize(layer)})


def unchained(layers: list[Layer]) -> list[Layer]:
    """Return the layers in 8 bits, each quantized as if it were alone: it returns floats."""
    return [quantized for layer in layers for quantized in chained([layer])]


VARIANTS: dict[str, Callable[[list[Layer]], list[Layer]]] = {
    "SiLU fp32": lambda layers: layers,
    "SiLU int8": chained,
    "ReLU fp32": with_relu,
    "ReLU int8, floats between": lambda layers: unchained(with_relu(layers)),
    "ReLU int8": lambda layers: chained(with_relu(layers)),
}


def main() -> None:
    """Measure all variants of a model and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint (.pt)")
    parser.add_argument("--imgsz", type=int, default=640, help="side of the square input, px")
    parser.add_argument("--mode", default="standard", help="of benchmark.latency")
    parser.add_argument("--output", type=Path, default=Path("docs/results/int8_activations.json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        dense = export_ncnn(arguments.model, Path(scratch) / "dense_ncnn_model", imgsz=arguments.imgsz)
        layers = ncnn_files.read(dense / PARAM, dense / BIN)
        metadata = json.loads((dense / METADATA).read_text(encoding="utf-8"))
        folders = {}
        for name, variant in VARIANTS.items():
            folder = folders[name] = Path(scratch) / f"{len(folders)}_ncnn_model"
            folder.mkdir()
            ncnn_files.write(variant(layers), folder / PARAM, folder / BIN)
            precision = "int8" if "int8" in name else "fp32"
            manifest.write_json(folder / METADATA, {**metadata, "precision": precision, "files": file_facts(folder)})
        models = {name: {"ncnn": folder} for name, folder in folders.items()}
        record = measure(models, imgsz=arguments.imgsz, threads=1, mode=arguments.mode)
    cells = [{key: value for key, value in cell.items() if key != "samples_ms"} for cell in record["cells"]]
    manifest.write_json(arguments.output, {"model": arguments.model.stem, **record, "cells": cells})
    for cell in cells:
        print(f"{cell['model']}: {cell['p50_ms']:.2f} ms")
    for reason in record["noise"]:
        print(f"noisy: {reason}")


if __name__ == "__main__":
    main()
