"""8 bits in onnxruntime and ncnn, beside fp32: docs/results/int8.json.

usage: python -m scripts.studies.int8 accuracy --data D.yaml --model M.pt … [--format onnx ncnn] [--method kl]
       python -m scripts.studies.int8 latency [--mode standard]

`accuracy` quantizes within the mAP budget, on training images, and keeps the files in --artefacts; a finished row is on
disk at once, a row whose model, data, tools and files are the same is not made again, and a search that was killed
goes on. `latency` measures, on a quiet machine, each kept file beside its fp32 version, interleaved, with one
thread, and fills in the rows; one that has its latency is not measured again unless --again says so.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmark import runtimes, system
from compress import manifest
from compress.data.dataset import data_hash
from compress.settings import Quantize, QuantizeNcnn
from export import int8, ncnn_int8, quantize
from export.ncnn import export_ncnn
from export.onnx import export_onnx
from scripts.studies import rows

KEYS = ("model", "format", "method", "data", "imgsz")
SAME = ("model_sha256", "data_sha256", "tools")
SUFFIXES = {"onnx": quantize.SUFFIX, "ncnn": ncnn_int8.SUFFIX}
METHODS = {"onnx": ("minmax", "percentile", "entropy"), "ncnn": ("percentile", "kl")}


def make_row(model: Path, identity: dict[str, Any], data: Path, artefacts: Path) -> dict[str, Any]:
    """Quantize a model for the format and by the method of a row, and return the row of what became of it."""
    name, method, imgsz = identity["format"], identity["method"], identity["imgsz"]
    artefact = artefacts / identity["artefact"]
    if name == "onnx":
        settings = Quantize(method=method)
        record = quantize.export_int8(model, artefact, data, data, imgsz, settings, measured=False)
    else:
        settings = QuantizeNcnn(method=method)
        record = ncnn_int8.export_int8(model, artefact, data, data, imgsz, settings, measured=False)
    facts, maps = record["quantization"], record["map50_95"]
    files = [artefact] if artefact.is_file() else list(artefact.iterdir())
    return {
        **identity,
        "map50_95_fp32": maps["torch"],
        "map50_95_int8": maps[record["runtime"]],
        "difference": maps["difference"],
        "map_budget": settings.map_budget,
        "layers": facts["layers"],
        "float_layers": facts["float_layers"],
        "steps": facts["steps"],
        **{key: value for key, value in facts.items() if key.startswith("calibration")},
        "bytes": sum(path.stat().st_size for path in files),
        "artefact_sha256": runtimes.sha256(artefact),
        "latency": None,
    }


def accuracy(arguments: argparse.Namespace) -> None:
    """Make every row that is missing, and write the record after each."""
    arguments.artefacts.mkdir(parents=True, exist_ok=True)
    data = arguments.data.resolve()
    shared = {
        "data": data.name,
        "imgsz": arguments.imgsz,
        "data_sha256": data_hash(data, "val"),
        "tools": manifest.tool_versions(),
    }
    for model in arguments.model:
        for name in arguments.format:
            if arguments.method not in METHODS[name]:
                raise SystemExit(f"{name} is calibrated by {' or '.join(METHODS[name])}, not by {arguments.method}")
            row = {
                "model": model_name(model),
                "model_sha256": manifest.sha256_file(model),
                "format": name,
                "method": arguments.method,
                **shared,
                "artefact": f"{model_name(model)}.{arguments.method}{SUFFIXES[name]}",
            }
            with manifest.lock(arguments.artefacts / row["artefact"]):
                old = rows.find(rows.read(arguments.output), row, (*KEYS, *SAME))
                if old is None or not is_kept(old, arguments.artefacts):
                    made = make_row(model, row, data, arguments.artefacts)
                    if old is not None and old["artefact_sha256"] == made["artefact_sha256"]:
                        made["latency"] = old["latency"]
                    store(arguments.output, made)


def latency(arguments: argparse.Namespace) -> None:
    """Measure every row that has no latency yet, and write the record after each."""
    models = {manifest.sha256_file(path): path for path in arguments.model}
    for row in rows.read(arguments.output):
        if row["latency"] is not None and not arguments.again:
            continue
        model, artefact = models.get(row["model_sha256"]), arguments.artefacts / row["artefact"]
        if model is None or not is_kept(row, arguments.artefacts):
            missing = "its checkpoint is not among --model" if model is None else f"{artefact} is not as it was"
            print(f"{row['model']} {row['format']} {row['method']}: not measured, {missing}")
            continue
        dense = arguments.artefacts / f"{row['model']}{runtimes.suffix(artefact)}"
        (export_onnx if row["format"] == "onnx" else export_ncnn)(model, dense, imgsz=row["imgsz"])
        store(arguments.output, {**row, "latency": int8.speed(dense, artefact, row["imgsz"], arguments.mode)})


def is_kept(row: dict[str, Any], artefacts: Path) -> bool:
    """Tell whether the file or folder of a row is there, and as it was."""
    artefact = artefacts / row["artefact"]
    return artefact.exists() and runtimes.sha256(artefact) == row["artefact_sha256"]


def model_name(model: Path) -> str:
    """Return the name of a checkpoint; one that a stage of compress wrote is called like the stage's folder."""
    return model.parent.name if model.stem == "model" else model.stem


def store(path: Path, row: dict[str, Any]) -> None:
    """Put a row in the place of the one of the same model, format, method and data, and print it."""
    rows.store(path, row, KEYS, {"device": system.device()})
    kept = len(row["float_layers"])
    line = f"{row['model']} {row['format']} {row['method']}: {row['map50_95_int8']:.4f} ({row['difference']:+.4f})"
    times = "" if row["latency"] is None else f", {row['latency']['speedup']:.2f}× {row['latency']['interval']}"
    print(f"{line}, {kept} of {row['layers']} layers in float{times}", flush=True)


def main() -> None:
    """Run the sub-command that the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for command in (accuracy, latency):
        inner = commands.add_parser(command.__name__, help=command.__doc__)
        inner.set_defaults(run=command)
        inner.add_argument("--model", type=Path, nargs="+", required=True, help="checkpoints (.pt)")
        inner.add_argument("--artefacts", type=Path, default=Path("runs/int8"), help="folder of the exported files")
        inner.add_argument("--output", type=Path, default=Path("docs/results/int8.json"))
        if command is accuracy:
            inner.add_argument("--data", type=Path, required=True, help="val is scored, train calibrates")
            inner.add_argument("--format", nargs="+", choices=list(SUFFIXES), default=list(SUFFIXES))
            inner.add_argument("--method", default="percentile", help="minmax, percentile, entropy; kl (ncnn)")
            inner.add_argument("--imgsz", type=int, default=640, help="side of the square input, px")
        else:
            inner.add_argument("--mode", default="standard", help="of benchmark.latency")
            inner.add_argument("--again", action="store_true", help="measure what has been measured, too")
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
