"""Export detectors to every format and compare each with PyTorch on all val images: docs/results/export_parity.json.

usage: python -m scripts.studies.export_parity --data D.yaml --model M.pt … [--format "ncnn fp16" …] [--imgsz 640]

Every finished row is on disk at once; a row whose model, tools and settings are the same is not made again. Rows of
other models stay, so that several data sets can be compared one after another.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmark import runtimes, system
from benchmark.accuracy import evaluate
from compress import manifest
from compress.data.dataset import data_hash, images
from compress.settings import Quantize
from export import parity
from export.ncnn import export_ncnn
from export.onnx import export_onnx
from export.quantize import export_int8
from scripts.studies import rows

PRECISIONS = {  # by format
    "onnx fp32": "fp32",
    "ncnn fp32": "fp32",
    "ncnn fp16": "fp16",
    "onnx int8": "int8",
    "onnx int8 tensorrt": "int8",
}
KEYS = ("model", "format", "data", "imgsz")
SAME = ("model_sha256", "data_sha256", "tools")
CONTENDED = 0.1  # share of the machine that others may use before seconds mean nothing


def reference(model: Path, row: dict[str, Any], data: Path, imgsz: int) -> dict[str, Any]:
    """Return the row of the checkpoint itself, in PyTorch."""
    result = evaluate(model, data, imgsz=imgsz, threads=1)
    return {**row, "map50_95": result["map50_95"], "map50": result["map50"], "images": result["images"]}


def export(name: str, model: Path, data: Path, folder: Path, imgsz: int) -> tuple[Path, dict[str, Any]]:
    """Export a model to the format of a name; return the artefact, and what only this format has to tell."""
    if name == "onnx fp32":
        return export_onnx(model, folder / "model.onnx", imgsz=imgsz), {}
    if name.startswith("onnx int8"):
        settings = Quantize(target="tensorrt" if name.endswith("tensorrt") else "onnxruntime")
        record = export_int8(model, folder / "model.int8.onnx", data, data, imgsz, settings)
        return folder / "model.int8.onnx", {"quantization": record["quantization"], "latency": record["latency"]}
    return export_ncnn(model, folder / "model_ncnn_model", imgsz=imgsz, half=name == "ncnn fp16"), {}


def compare(model: Path, row: dict[str, Any], data: Path, imgsz: int, torch_map: float) -> dict[str, Any]:
    """Export a model to one format and return the row of what became of it."""
    precision = PRECISIONS[row["format"]]
    with tempfile.TemporaryDirectory() as folder:
        with timed() as seconds:
            artefact, extra = export(row["format"], model, data, Path(folder), imgsz)
        result = evaluate(artefact, data, imgsz=imgsz, threads=1)
        maps = (torch_map, result["map50_95"])
        record = parity.compare(model, artefact, images(data, "val"), imgsz, precision=precision, maps=maps)
        runner = runtimes.runner_of(artefact)
        facts = runner.describe(runner.load(str(artefact), 1))
        files = [artefact] if artefact.is_file() else list(artefact.iterdir())
        return {
            **row,
            "precision": precision,
            "precision_executed": facts.get("precision_executed"),
            **{name: value for name, value in record["outputs"][0].items() if name != "shape"},
            "detections": record["detections"],
            "map50_95": result["map50_95"],
            "map50": result["map50"],
            "map50_95_torch": torch_map,
            "difference": record["map50_95"]["difference"],
            "failures": parity.failures(record),
            "images": record["images"],
            "export": seconds,
            **extra,
            "bytes": sum(path.stat().st_size for path in files),
        }


@contextmanager
def timed() -> Iterator[dict[str, Any]]:
    """Yield a record that holds, after the block, its seconds, what others did meanwhile, and whether it counts."""
    record: dict[str, Any] = {}
    start, busy, own = time.monotonic(), system.busy_s(), _own_cpu_s()
    yield record
    seconds = time.monotonic() - start
    after, cores = system.busy_s(), os.cpu_count() or 1
    others = None if busy is None or after is None else max(after - busy - (_own_cpu_s() - own), 0.0) / seconds
    record["seconds"] = round(seconds, 2)
    record["others_cores"] = None if others is None else round(others, 2)
    record["contended"] = None if others is None else others > CONTENDED * cores


def _own_cpu_s() -> float:
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(item.ru_utime + item.ru_stime for item in usage)


def _store(path: Path, row: dict[str, Any]) -> None:
    rows.store(path, row, KEYS, {"device": system.device()})
    left_out = ("tools", "detections", "quantization", "model_sha256", "data_sha256")
    print({key: row[key] for key in row if key not in left_out}, flush=True)


def main() -> None:
    """Make every row that is missing, and write the record after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, nargs="+", required=True, help="checkpoints (.pt)")
    parser.add_argument("--data", type=Path, required=True, help="data set YAML; its val split is compared")
    parser.add_argument("--format", nargs="+", choices=list(PRECISIONS), default=list(PRECISIONS))
    parser.add_argument("--imgsz", type=int, default=640, help="side of the square input, px")
    parser.add_argument("--output", type=Path, default=Path("docs/results/export_parity.json"))
    arguments = parser.parse_args()
    data = arguments.data.resolve()
    shared = {
        "data": data.name,
        "imgsz": arguments.imgsz,
        "data_sha256": data_hash(data, "val"),
        "tools": manifest.tool_versions(),
    }
    for model in arguments.model:
        identity = {"model": model.stem, "model_sha256": manifest.sha256_file(model), **shared}
        row = {**identity, "format": "torch"}
        torch_row = rows.find(rows.read(arguments.output), row, (*KEYS, *SAME))
        if torch_row is None:
            torch_row = reference(model, row, data, arguments.imgsz)
            _store(arguments.output, torch_row)
        for name in arguments.format:
            row = {**identity, "format": name}
            if rows.find(rows.read(arguments.output), row, (*KEYS, *SAME)) is None:
                _store(arguments.output, compare(model, row, data, arguments.imgsz, torch_row["map50_95"]))


if __name__ == "__main__":
    main()
