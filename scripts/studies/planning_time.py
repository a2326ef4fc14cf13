"""Time graph, plan, surgery and oracle over the scales of two families: docs/results/planning_time.json and .png.

usage: python scripts/studies/planning_time.py [--output docs/results/planning_time.json]

One thread. Each model is planned at 640 px down to half of its MACs; the time of building the model is not counted.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import torch

from compress import manifest
from compress.checkpoint import build_model
from compress.planning import plan_pruning
from compress.pruning.oracle import check_oracle
from compress.pruning.surgery import apply_plan
from compress.settings import Prune

FAMILIES = ("yolov8", "yolo12")
IMGSZ = 640


def measure(name: str) -> dict[str, Any]:
    """Return the seconds of each part for one model."""
    model = build_model(f"{name}.yaml")
    start = time.perf_counter()
    planned = plan_pruning(model, Prune(macs=0.5, importance="l1"), IMGSZ)
    chosen = time.perf_counter()
    pruned = apply_plan(planned.model, planned.plan)
    cut = time.perf_counter()
    error = check_oracle(planned.graph, pruned, planned.choice.keep)
    proven = time.perf_counter()
    return {
        "model": name,
        "nodes": len(planned.graph.program.graph.nodes),
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "graph_and_plan_s": round(chosen - start, 2),
        "surgery_s": round(cut - chosen, 2),
        "oracle_s": round(proven - cut, 2),
        "oracle_error": error,
    }


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw seconds over the size of the exported graph."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), dpi=150)
    for family in FAMILIES:
        mine = [row for row in rows if row["model"].startswith(family)]
        nodes = [row["nodes"] for row in mine]
        seconds = [row["graph_and_plan_s"] + row["surgery_s"] for row in mine]
        axes.plot(nodes, seconds, "o", label=family)
        for row, x, y in zip(mine, nodes, seconds, strict=True):
            axes.annotate(row["model"].removeprefix(family), (x, y), textcoords="offset points", xytext=(5, 4))
    axes.set(xlabel="operations in the exported graph", ylabel="graph + plan + surgery, s", ylim=0, xlim=0)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """Run all and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/results/planning_time.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    measure("yolov8n")  # imports and caches
    rows = []
    for family in FAMILIES:
        for scale in "nsmlx":
            rows.append(measure(f"{family}{scale}"))
            print(rows[-1], flush=True)
    load = os.getloadavg()[0]
    record = {"imgsz": IMGSZ, "threads": 1, "load": load, "tools": manifest.tool_versions(), "rows": rows}
    manifest.write_json(given.output, record)
    plot(rows, given.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
