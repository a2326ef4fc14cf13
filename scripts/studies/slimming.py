"""Network slimming stage by stage, beside the paper's rows: docs/results/slimming.json.

usage: python -m scripts.studies.slimming --runs runs/slimming_vgg19 --output docs/results/slimming.json

For every stage of each finished pipeline of a classifier: top-1 on the test split (one evaluator, in PyTorch on the
CPU), parameters, multiply-accumulates, and how its γ are distributed. Runs that are in the file already and not named
stay there.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from benchmark.accuracy import evaluate
from compress import checkpoint, manifest
from compress.channels.graph import build_graph
from compress.data.dataset import images, resolve
from compress.errors import run_app
from compress.pruning.importance import batch_norm_scales

# Liu et al., ICCV 2017, tables 1 and 4, CIFAR-10: error before and after in percent, and what was removed.
PAPER = {
    "vgg19-cifar-cls.yaml": {"percent": 0.7, "errors": [6.34, 6.20], "params_removed": 0.885, "flops_removed": 0.510},
    "resnet164-cifar-cls.yaml": {
        "percent": 0.4,
        "errors": [5.42, 5.08],
        "params_removed": 0.149,
        "flops_removed": 0.237,
    },
    "densenet40-cifar-cls.yaml": {
        "percent": 0.4,
        "errors": [6.11, 5.19],
        "params_removed": 0.357,
        "flops_removed": 0.284,
    },
}
PAPER_MULTIPASS = {"passes": 4, "errors": [6.34, 5.96], "params_removed": 0.956, "flops_removed": 0.772}
NEAR_ZERO = 0.05  # of the mean |γ| at the start, which is 1
QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)


def main() -> None:
    """Score every stage of the given runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="folders of finished pipelines")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    known = manifest.read_json(given.output)["runs"] if given.output.exists() else []
    rows = {row["run"]: row for row in known}
    for run in given.runs:
        rows[run.name] = describe(run)
        manifest.write_json(given.output, {"runs": list(rows.values()), "tools": manifest.tool_versions()})


def describe(run: Path) -> dict[str, Any]:
    """Return what a run did, and the rows of its stages."""
    record = manifest.read_json(run / "run.json")
    config = record["config"]
    data, imgsz = resolve(config["data"]), config["imgsz"]
    stages = [stage(run / "01_train", data, imgsz)]
    for home in rounds_of(run):
        stages += [stage(home / name, data, imgsz, stages[0]) for name in ("02_sparsify", "03_prune", "04_finetune")]
    for row in stages:
        print(run.name, row, flush=True)
    dense, last = stages[0], stages[-1]
    paper = PAPER_MULTIPASS if config.get("iterations", 1) > 1 else PAPER.get(config["model"])
    return {
        "run": run.name,
        "command": record["command"],
        "model": config["model"],
        "data": "CIFAR-10 as JPEG files",
        "images": {split: len(images(data, split)) for split in ("train", "val", "test")},
        "fraction": config["train"]["args"].get("fraction", 1.0),
        "device": config["device"],
        "settings": {name: config[name] for name in ("train", "sparsify", "prune", "finetune")},
        "stages": stages,
        "error_change_points": round(last["error_percent"] - dense["error_percent"], 2),
        "params_removed": last["params_removed"],
        "macs_removed": last["macs_removed"],
        "paper": paper,
        "tools": record["tools"],
    }


def rounds_of(run: Path) -> list[Path]:
    """Return the folders that hold what follows the training: the run itself, or its rounds in order."""
    return sorted(run.glob("round_*"), key=lambda path: int(path.name.rpartition("_")[2])) or [run]


def stage(folder: Path, data: Path, imgsz: int, dense: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return one row: what a stage's model can do on the test split, what it costs, and where its γ are.

    Args:
        folder: of the stage.
        data: the data set.
        imgsz: side of the images, px.
        dense: row of the dense model, which removals are shares of; this one when not given.
    """
    path = folder / "model.pt"
    found = evaluate(path, data, split="test", imgsz=imgsz)
    model = checkpoint.load_model(path)
    graph = build_graph(model, imgsz)
    params, macs = int(graph.params(graph.widths)), int(graph.macs(graph.widths))
    gammas = np.concatenate(list(batch_norm_scales(graph, model).values()))
    dense = dense or {"params": params, "macs": macs}
    config = manifest.read_json(folder / manifest.MANIFEST)["config"]
    place = [folder.parent.name] if folder.parent.name.startswith("round_") else []
    return {
        "stage": "/".join([*place, folder.name]),
        "epochs": config.get("epochs", 0),
        "test_images": found["images"],
        "top1": round(found["top1"], 4),
        "error_percent": round(100 * (1 - found["top1"]), 2),
        "params": params,
        "macs": macs,
        "params_removed": round(1 - params / dense["params"], 4),
        "macs_removed": round(1 - macs / dense["macs"], 4),
        "channels": int(graph.widths.sum()),
        "gamma_near_zero": round(float((gammas < NEAR_ZERO).mean()), 4),
        "gamma_quantiles": {f"{q:g}": round(float(np.quantile(gammas, q)), 4) for q in QUANTILES},
    }


if __name__ == "__main__":
    run_app(main)
