"""Prove random cuts of unmodified models, and time plan and surgery: docs/results/oracle.json.

usage: python scripts/studies/oracle.py [--plans 6] [--output docs/results/oracle.json]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compress import manifest
from compress.channels.graph import build_graph
from compress.checkpoint import build_model, structure_hash
from compress.pruning.budget import Target, choose
from compress.pruning.importance import importance
from compress.pruning.oracle import oracle_error
from compress.pruning.plan import make_plan
from compress.pruning.surgery import apply_plan
from compress.settings import Budget, Prune

MODELS = ("yolov5n.yaml", "yolov8n.yaml", "yolo11n.yaml", "yolo26n.yaml")
IMGSZ = 128


def cut(name: str, seed: int) -> dict[str, Any]:
    """Cut a model with random weights at random channels to 30–70 % of its MACs, and compare with the masked one."""
    torch.manual_seed(seed)
    model = build_model(name)
    _vary_batch_norm(model)
    graph = build_graph(model, IMGSZ)
    share = float(np.random.default_rng(seed).uniform(0.3, 0.7))
    budget = Budget(multiple_of=(1, 4, 8)[seed % 3], min_width=1, max_removed=0.95)
    choice = choose(graph, importance(graph, model, "random", seed), Target("macs", share), budget)
    pruned = apply_plan(model, make_plan(graph, choice, structure_hash(model), f"macs {share:.3f}", "random"))
    return {
        "model": name,
        "seed": seed,
        "multiple_of": budget.multiple_of,
        "macs_share": round(graph.macs(choice.widths) / graph.macs(graph.widths), 4),
        "params_share": round(graph.params(choice.widths) / graph.params(graph.widths), 4),
        "error": oracle_error(graph, pruned, choice.keep, torch.rand(1, 3, IMGSZ, IMGSZ)),
    }


def _vary_batch_norm(model: torch.nn.Module) -> None:
    """Give every batch norm statistics, scales and shifts of its own: fresh ones hide mistakes."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias, -0.5, 0.5)
            for statistic, low, high in ((module.running_mean, -0.5, 0.5), (module.running_var, 0.5, 2.0)):
                assert statistic is not None
                statistic.uniform_(low, high)


def time_planning(name: str = "yolov8n.yaml", imgsz: int = 640) -> dict[str, Any]:
    """Time what `compress.prune` does without data: trace, choose, cut; seconds."""
    from compress.planning import plan_pruning

    model = build_model(name)
    start = time.perf_counter()
    planned = plan_pruning(model, Prune(macs=0.5), imgsz)
    chosen = time.perf_counter()
    apply_plan(planned.model, planned.plan)
    end = time.perf_counter()
    return {"model": name, "imgsz": imgsz, "plan_s": round(chosen - start, 2), "surgery_s": round(end - chosen, 2)}


def main() -> None:
    """Run all and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plans", type=int, default=6, help="random plans for each model")
    parser.add_argument("--output", type=Path, default=Path("docs/results/oracle.json"))
    arguments = parser.parse_args()
    rows = []
    for name in MODELS:
        for seed in range(arguments.plans):
            rows.append(cut(name, seed))
            print(rows[-1], flush=True)
    record = {
        "imgsz": IMGSZ,
        "plans": len(rows),
        "max_error": max(row["error"] for row in rows),
        "planning": time_planning(),
        "tools": manifest.tool_versions(),
        "rows": rows,
    }
    manifest.write_json(arguments.output, record)
    print({key: value for key, value in record.items() if key not in ("rows", "tools")})


if __name__ == "__main__":
    main()
