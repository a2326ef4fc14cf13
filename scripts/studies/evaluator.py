"""Our evaluator in PyTorch against Ultralytics' own `val` on the same checkpoints: docs/results/evaluator.json.

usage: python -m scripts.studies.evaluator --data D.yaml --model M.pt … [--imgsz 640]

Ultralytics is asked twice: with `rect=False`, which letterboxes every image to one square as exported models need it,
and as it does by default, which pads each batch of 16 images of like shape as little as it can (`rect=True`). Only the
first must agree. Every finished row is on disk at once; one whose model, data, size and tools are the same is kept.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from benchmark.accuracy import evaluate
from compress import manifest
from compress.checkpoint import quiet
from compress.data.dataset import data_hash
from scripts.studies import rows

TOLERANCE = 0.001
KEYS = ("model", "data")
SAME = (*KEYS, "model_sha256", "data_sha256", "imgsz", "tools")
# What each column asks of Ultralytics' `val`, beside the model, the data and the image size.
ASKED = {"ultralytics_square": {"rect": False, "batch": 1}, "ultralytics_default": {}}


def stock(model: Path, data: Path, imgsz: int, asked: dict[str, Any]) -> dict[str, float]:
    """Return the mAP that `YOLO(model).val` finds on the CPU."""
    import os

    os.environ["ULTRALYTICS_SAFE_LOAD"] = "1"
    from ultralytics import YOLO

    with tempfile.TemporaryDirectory() as scratch, quiet():
        metrics = YOLO(model).val(
            data=str(data), imgsz=imgsz, device="cpu", workers=0, plots=False, project=scratch, **asked
        )
    return {"map50_95": float(metrics.box.map), "map50": float(metrics.box.map50)}


def compare(model: Path, data: Path, imgsz: int) -> dict[str, Any]:
    """Return what each evaluator finds, and by how much they differ."""
    found = evaluate(model, data, imgsz=imgsz, threads=1)
    ours = {key: found[key] for key in ("map50_95", "map50")}
    theirs = {name: stock(model, data, imgsz, asked) for name, asked in ASKED.items()}
    return {
        "images": found["images"],
        "ours": ours,
        **theirs,
        "differences": {name: {key: ours[key] - value[key] for key in ours} for name, value in theirs.items()},
        "agrees": abs(ours["map50_95"] - theirs["ultralytics_square"]["map50_95"]) <= TOLERANCE,
    }


def main() -> None:
    """Make every row that is missing, and write the record after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, nargs="+", required=True, help="checkpoints (.pt) of detectors")
    parser.add_argument("--data", type=Path, required=True, help="data set YAML; its val split is scored")
    parser.add_argument("--imgsz", type=int, default=640, help="side of the square input, px")
    parser.add_argument("--output", type=Path, default=Path("docs/results/evaluator.json"))
    arguments = parser.parse_args()
    data = arguments.data.resolve()
    shared = {
        "data": data.name,
        "data_sha256": data_hash(data, "val"),
        "imgsz": arguments.imgsz,
        "tools": manifest.tool_versions(),
    }
    for model in arguments.model:
        row = {"model": model.stem, "model_sha256": manifest.sha256_file(model), **shared}
        if rows.find(rows.read(arguments.output), row, SAME):
            continue
        row.update(compare(model, data, arguments.imgsz))
        rows.store(arguments.output, row, KEYS, {"tolerance": TOLERANCE, "asked": ASKED})
        print(row["model"], row["ours"], row["differences"], "agrees" if row["agrees"] else "DIFFERS", flush=True)


if __name__ == "__main__":
    main()
