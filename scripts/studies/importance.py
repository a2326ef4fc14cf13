"""What each importance keeps of the mAP when a trained detector is cut and not fine-tuned.

usage: python scripts/studies/importance.py --model runs/bccd/01_train/model.pt --data ../shared/data/bccd/bccd.yaml \
           --imgsz 320 --split test --budget configs/budgets/onnxruntime-cpu.yaml --output docs/results/importance.json
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path
from typing import Any, get_args

from benchmark.accuracy import evaluate
from compress import manifest
from compress.checkpoint import load_model, save_model
from compress.data.dataset import images, resolve
from compress.prune import plan_pruning
from compress.pruning.repair import recalibrate_batch_norm
from compress.pruning.surgery import apply_plan
from compress.settings import Importance, Prune, load_budget

SHARES = (0.7, 0.5)


def main() -> None:
    """Cut by every importance at every share of the MACs, score, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--split", default="val")
    parser.add_argument("--budget", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    data, budget = resolve(given.data), load_budget(given.budget)
    train = images(data, "train")
    sample = random.Random(0).sample(train, min(256, len(train)))

    def score(model: Any) -> float:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.pt"
            save_model(model, path, {})
            return round(evaluate(path, data, split=given.split, imgsz=given.imgsz)["map50_95"], 4)

    dense = load_model(given.model)
    rows: list[dict[str, Any]] = []
    for share in SHARES:
        for method in get_args(Importance):
            settings = Prune(macs=share, importance=method, budget=budget)
            planned = plan_pruning(dense, settings, given.imgsz, data=data)
            pruned = apply_plan(planned.model, planned.plan)
            recalibrate_batch_norm(pruned, sample, given.imgsz)
            before, after = planned.metrics()["macs"]
            rows.append({"importance": method, "macs_share": round(after / before, 4), "map50_95": score(pruned)})
            print(rows[-1], flush=True)
    record = {
        "model_sha256": manifest.sha256_file(given.model),
        "data": Path(given.data).name,
        "split": given.split,
        "imgsz": given.imgsz,
        "budget": given.budget.name,
        "dense_map50_95": score(dense),
        "rows": rows,
        "tools": manifest.tool_versions(),
    }
    manifest.write_json(given.output, record)


if __name__ == "__main__":
    main()
