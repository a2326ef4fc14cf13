"""The mAP of pruned models before any fine-tuning, with and without fading: docs/results/fading.json.

usage: python scripts/studies/fading.py --dense runs/bccd/01_train/model.pt --data ../shared/data/bccd/bccd.yaml \
           --imgsz 320 --split test --runs runs/bccd_nofade runs/bccd --output docs/results/fading.json
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmark.accuracy import evaluate
from compress import manifest
from compress.data.dataset import resolve


def main() -> None:
    """Score the dense model, and each run's cut model and fine-tuned model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", type=Path, required=True)
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="folders of finished pipelines")
    parser.add_argument("--data", required=True)
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--split", default="val")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    data = resolve(given.data)

    def score(path: Path) -> dict[str, Any]:
        found = evaluate(path, data, split=given.split, imgsz=given.imgsz)
        return {key: round(found[key], 4) for key in ("map50_95", "map50")}

    rows = []
    for run in given.runs:
        sparsify, prune = (manifest.read_json(run / s / manifest.MANIFEST) for s in ("02_sparsify", "03_prune"))
        before, after = prune["metrics"]["macs"]
        row = {
            "run": run.name,
            "fade": bool(sparsify["config"].get("fade")),
            "importance": prune["config"]["importance"],
            "macs_share": round(after / before, 4),
            "pruned": score(run / "03_prune" / "model.pt"),
        }
        tuned = run / "04_finetune" / "model.pt"
        rows.append(row | ({"finetuned": score(tuned)} if tuned.exists() else {}))
        print(rows[-1], flush=True)
    record = {
        "data": Path(given.data).name,
        "split": given.split,
        "imgsz": given.imgsz,
        "dense": score(given.dense),
        "rows": rows,
        "tools": manifest.tool_versions(),
    }
    manifest.write_json(given.output, record)


if __name__ == "__main__":
    main()
