"""How well a table of instructions predicts networks it has not seen: docs/results/instruction_prediction.json.

usage: bash scripts/emulated_arm.sh up
       python -m scripts.studies.instruction_prediction --model yolov8n.pt --imgsz 320

The table is that of `benchmark.profile --device arm-emulated`; then random plans are exported to ncnn and their
instructions counted on the device. Table and counts are kept below --work: an interrupted study goes on.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmark import observe, variants
from benchmark.observe import Wanted
from benchmark.profile import profile
from compress import manifest
from compress.channels.graph import build_graph
from compress.checkpoint import load_model
from compress.devices import load_device
from compress.latency.table import evaluate

SEED = 100  # tables are drawn with seed 0


def main() -> None:
    """Measure what is missing, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--device", default="arm-emulated")
    parser.add_argument("--runtime", default="ncnn")
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--variants", type=int, default=64, help="networks of the table")
    parser.add_argument("--plans", type=int, default=30, help="random plans")
    parser.add_argument("--work", type=Path, default=Path("runs/studies/instruction_prediction"))
    parser.add_argument("--output", type=Path, default=Path("docs/results/instruction_prediction.json"))
    given = parser.parse_args()
    model, budget = load_model(given.model), load_device(given.device).budgets[given.runtime]
    wanted = Wanted(given.runtime, given.imgsz, budget, given.device, variants=given.variants)
    graph = build_graph(model, given.imgsz)
    given.work.mkdir(parents=True, exist_ok=True)
    table, _ = profile(model, wanted, given.work / "table.json")
    predict = evaluate(table, graph)

    file = given.work / f"plans-{table.sha256[:16]}.jsonl"
    rows: list[dict[str, Any]] = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    plans = variants.draw_widths(graph, budget, given.plans + 2, SEED)[2:]
    known: dict[str, Any] = {}
    with observe.reach(wanted) as site, tempfile.TemporaryDirectory() as scratch:
        dense = variants.export(model, "dense", wanted, Path(scratch), site.place)
        for number, widths in enumerate(plans[len(rows) :], len(rows)):
            made = variants.export(
                variants.cut(model, graph, widths), f"plan{number}", wanted, Path(scratch), site.place
            )
            record = observe.observe_once(site, dense, made, wanted, known)["whole"]
            measured, predicted = float(np.median(record)), float(predict(widths))
            row = {
                "macs_share": round(graph.macs(widths) / graph.macs(graph.widths), 4),
                "predicted": round(predicted),
                "measured": round(measured),
                "error": round(predicted / measured - 1, 5),
            }
            rows.append(row)
            with file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")
            print(number, row, flush=True)

    errors = np.abs([row["error"] for row in rows])
    record = {
        "schema": 1,
        "model": given.model.name,
        "device": given.device,
        "runtime": given.runtime,
        "imgsz": given.imgsz,
        "budget": budget.model_dump(mode="json"),
        "table": {"dense": table.dense, "fit": table.fit.model_dump(), "sha256": table.sha256},
        "median": round(float(np.median(errors)), 5),
        "p95": round(float(np.percentile(errors, 95)), 5),
        "rows": rows,
        "tools": manifest.tool_versions(),
    }
    manifest.write_json(given.output, record)
    print(f"median {record['median']:.2%}, 95th percentile {record['p95']:.2%} of {len(rows)} plans")


if __name__ == "__main__":
    main()
