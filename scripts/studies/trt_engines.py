"""Build a TensorRT engine of every YOLO family in every precision: docs/results/trt_engines.json.

usage: python -m scripts.studies.trt_engines [--imgsz 640]

Models have random weights, because what is asked is whether the real parser and builder take the graphs, what each
layer then computes in, and how large the engines are. With TensorRT-RTX this needs no GPU; nothing is run, so no
latency and no accuracy comes of it. Finished rows are kept; rows of another version or image size are made again.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmark import system
from compress import manifest
from compress.checkpoint import build_model, save_model
from compress.errors import ExportError
from compress.planning import plan_pruning
from compress.pruning.surgery import apply_plan
from compress.settings import Export, ExportTrt, Prune
from export import qdq, trt, trt_onnx
from export.onnx import export_onnx
from export.trt_target import Local
from scripts.studies.export_parity import timed

FAMILIES = ("yolov5n", "yolov8n", "yolo11n", "yolo26n", "yolov10n", "yolov8n pruned")
PRECISIONS = ("fp32", "tf32", "fp16", "bf16", "int8", "int8+fp16")
OPSET = 19  # what scales in fp16 need


def write_model(family: str, path: Path, imgsz: int) -> Path:
    """Write an untrained detector with 80 classes; a pruned one has lost half of its channels at random."""
    torch.manual_seed(0)
    name = family.split()[0]
    model: Any = build_model(f"{name}.yaml", nc=80)
    if family.endswith("pruned"):
        planned = plan_pruning(model, Prune(percent=0.5, importance="random"), imgsz)
        model = apply_plan(planned.model, planned.plan)
    save_model(model.eval(), path, {"task": "detect"})
    return path


def write_quantized(dense: Path, path: Path, imgsz: int) -> Path:
    """Write the Q/DQ graph with every convolution in int8, calibrated on noise."""
    scheme = qdq.SCHEMES["tensorrt"]
    noise = np.random.default_rng(0).random((1, 3, imgsz, imgsz), dtype=np.float32)
    graph = qdq.load(dense)
    made = qdq.quantize(graph, qdq.calibrate(dense, [noise], "minmax", scheme), scheme, list(qdq.layers_of(graph)))
    manifest.write_bytes_atomic(path, made.SerializeToString())
    return path


def build(source: Path, precision: str, facts: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Build one engine, and return what the row says of it."""
    kind, _, rest = precision.partition("+")
    settings = ExportTrt.model_validate({"precision": kind, "rest": rest or "fp32"})
    onnx = folder / "model.onnx"
    with timed() as seconds:
        try:
            trt_onnx.make_onnx(source, onnx, settings, facts["strongly_typed"], None, None)
            record = trt.build(onnx, folder / "model.engine", settings, Local(), facts)
        except ExportError as error:
            return {"error": str(error)}
    return {
        "error": None,
        "inputs": record["inputs"],
        "outputs": record["outputs"],
        "network_layers": record["network_layers"],
        "layers": record["layers"],
        "layers_by_precision": record["precisions"],
        "onnx_bytes": onnx.stat().st_size,
        "engine_bytes": record["engine_bytes"],
        "loaded": record["loaded"],
        "builder_seconds": record["build_seconds"],
        "export": seconds,  # conversion, start of the builder, build; `contended` when others were busy too
    }


def main() -> None:
    """Make every row that is missing, and write the record after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--imgsz", type=int, default=640, help="side of the square input, px")
    parser.add_argument("--output", type=Path, default=Path("docs/results/trt_engines.json"))
    arguments = parser.parse_args()
    facts = trt.probe(Local(), "auto")
    target = {key: facts[key] for key in ("flavour", "version", "gpu", "compute_capability")}
    rows: list[dict[str, Any]] = []
    if arguments.output.exists():
        known = manifest.read_json(arguments.output)
        rows = known["rows"] if known["target"] == target else []
    for family in arguments.model:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            sources: dict[str, Path] = {}
            for precision in arguments.precision:
                row = {"model": family, "precision": precision, "imgsz": arguments.imgsz}
                if any(all(other[key] == value for key, value in row.items()) for other in rows):
                    continue
                if not sources:
                    model = write_model(family, folder / "model.pt", arguments.imgsz)
                    dense = export_onnx(
                        model, folder / "dense.onnx", imgsz=arguments.imgsz, settings=Export(opset=OPSET)
                    )
                    sources = {"dense": dense}
                if precision.startswith("int8") and "int8" not in sources:
                    sources["int8"] = write_quantized(sources["dense"], folder / "int8.onnx", arguments.imgsz)
                source = sources["int8" if precision.startswith("int8") else "dense"]
                rows.append({**row, **build(source, precision, facts, folder)})
                print(
                    {key: rows[-1].get(key) for key in (*row, "layers_by_precision", "engine_bytes", "error")},
                    flush=True,
                )
                content = {"schema": 1, "target": target, "device": system.device(), "tools": manifest.tool_versions()}
                manifest.write_json(arguments.output, {**content, "rows": rows})


if __name__ == "__main__":
    main()
