"""How near the solver comes to its bound, and how long it takes, n to x: docs/results/solver.json.

usage: python scripts/studies/solver.py [--output docs/results/solver.json]

The tables are made up, not measured, because only their form matters here: a segment costs its multiply-accumulates,
the values that it reads and makes, and a constant. One thread; importance is L1. With --stairs a width that is no
multiple of 16 costs more, so that the bound has to leave something out.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compress import manifest
from compress.channels.graph import Graph, build_graph
from compress.checkpoint import build_model, structure_hash
from compress.latency.solver import build_problem, least_cost, least_loss
from compress.latency.table import Fit, LatencyTable, Segment, evaluate
from compress.pruning.importance import importance
from compress.settings import Budget

FAMILIES = ("yolov8", "yolo11", "yolo12")
SHARES = (0.8, 0.65, 0.5, 0.35)
IMGSZ = 640


def made_up(graph: Graph, structure: str, budget: Budget, stairs: bool) -> LatencyTable:
    """Return a table of a device that multiplies 100 GMAC/s and moves 10 GB/s."""
    segments, before = [], None
    for tensor, area in graph.positions.items():
        multiply = area * int(np.prod(graph.shapes[tensor][2:])) / 1e8
        move = area * 4 / 1e7
        terms = {"constant": 0.003, "product": multiply, "reads": move, "makes": move, "before": move / 2}
        if stairs:
            terms |= {"in_off_16": 0.4 * multiply, "out_off_16": 0.25 * multiply}
        segments.append(Segment(name=tensor, tensor=tensor, before=before, terms=terms))
        before = tensor
    return LatencyTable(
        unit="ms",
        device="made up",
        machine=None,
        runtime="made up",
        runtime_version="0",
        precision="fp32",
        threads=1,
        imgsz=IMGSZ,
        structure=structure,
        budget=budget,
        dense=1.0,
        dense_interval=(1.0, 1.0),
        scale=1.0,
        offset=0.0,
        segments=tuple(segments),
        fit=Fit(variants=0, median_error=0.0, p95_error=0.0),
    )


def measure(name: str, multiple_of: int, stairs: bool) -> list[dict[str, Any]]:
    """Return a row for each share of the dense latency."""
    model = build_model(f"{name}.yaml")
    graph = build_graph(model, IMGSZ)
    budget = Budget(multiple_of=multiple_of, min_width=multiple_of)
    latency = evaluate(made_up(graph, structure_hash(model), budget, stairs), graph)
    start = time.perf_counter()
    problem = build_problem(graph, budget, importance(graph, model, "l1"), latency)
    built = time.perf_counter() - start
    dense, rows = float(latency(graph.widths)), []
    for share in SHARES:
        row = {"model": name, "multiple_of": multiple_of, "stairs": stairs, "ties": len(problem.parts), "target": share}
        start = time.perf_counter()
        found = least_loss(problem, share * dense)
        row |= {"seconds": round(built + time.perf_counter() - start, 3)}
        if found is None:
            rows.append(row | {"reachable": False})
            continue
        start = time.perf_counter()
        back = least_cost(problem, found.loss)
        assert back is not None
        rows.append(
            row
            | {
                "latency": round(found.cost / dense, 5),
                "loss": round(found.loss, 5),
                "bound": round(found.bound, 5),
                "gap": round(found.gap, 6),
                "least_latency": round(back.cost / dense, 5),
                "least_latency_gap": round(back.gap, 6),
                "least_latency_seconds": round(time.perf_counter() - start, 3),
            }
        )
    return rows


def main() -> None:
    """Run all and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/results/solver.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for family in FAMILIES:
        for scale in "nsmlx":
            for multiple_of, stairs in ((16, False), (8, True)):
                rows += measure(f"{family}{scale}", multiple_of, stairs)
                reached = [row for row in rows if row["model"] == f"{family}{scale}" and "gap" in row]
                worst = max(row["gap"] for row in reached)
                print(f"{family}{scale}", multiple_of, f"gap {worst:.3%}", rows[-1]["seconds"], "s", flush=True)
    manifest.write_json(given.output, {"imgsz": IMGSZ, "threads": 1, "tools": manifest.tool_versions(), "rows": rows})


if __name__ == "__main__":
    main()
