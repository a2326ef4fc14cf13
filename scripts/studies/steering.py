"""Whether `sr: auto` brings as many γ near zero as it was asked to, and what that costs: docs/results/steering.json.

usage: python -m scripts.studies.steering nbs=16 --name bccd --model yolov8n.pt --data bccd.yaml --imgsz 320 \
           --epochs 25 --shares 0.3 0.5 --seeds 0

Each share is trained for as long as the same training without a penalty, and both are scored on the test split. Stages
below --work that are finished are not trained again; rows of other names stay in the record.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmark.accuracy import evaluate
from compress import manifest
from compress.data.dataset import resolve
from compress.settings import AUTO, Sparsity, training_args
from compress.sparsify import sparsify
from compress.train import Common
from compress.training.steering import STEERING
from scripts.studies import rows

WITHIN = 0.05  # of the share that was asked for
COST = 0.01  # mAP50-95


def main() -> None:
    """Train what is missing, and write the record after each training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="of the rows, such as the data set's")
    parser.add_argument("--model", required=True, help="what every training starts from")
    parser.add_argument("--data", required=True)
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--split", default="test")
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--work", type=Path, default=Path("runs/studies/steering"))
    parser.add_argument("--output", type=Path, default=Path("docs/results/steering.json"))
    parser.add_argument("more", nargs="*", metavar="KEY=VALUE", help="Ultralytics' training arguments")
    given = parser.parse_args()
    data, more = resolve(given.data), training_args(given.more)

    def trained(strength: Any, share: float | None, seed: int) -> tuple[Path, float]:
        folder = given.work / f"{given.name}-{seed}-{'none' if share is None else share}"
        settings = Sparsity(epochs=given.epochs, batch=given.batch, sr=strength, share=share, args=more)
        model = sparsify(given.model, data, settings, Common(imgsz=given.imgsz, seed=seed), folder)
        return folder, evaluate(model, data, split=given.split, imgsz=given.imgsz)["map50_95"]

    for seed in given.seeds:
        _, reference = trained(0.0, None, seed)
        for share in given.shares:
            folder, score = trained(AUTO, share, seed)
            course = manifest.read_json(folder / STEERING)["epochs"]
            reached = course[-1]["share"]
            row = {
                "name": given.name,
                "seed": seed,
                "share": share,
                "reached": reached,
                "share_ok": abs(reached - share) <= WITHIN,
                "map50_95_without": reference,
                "map50_95": score,
                "map_ok": reference - score <= COST,
                "epochs": given.epochs,
                "imgsz": given.imgsz,
                "split": given.split,
                "course": course,
            }
            rows.store(given.output, row, ("name", "seed", "share"), {"tools": manifest.tool_versions()})
            print(f"{given.name} {seed}: {share:.0%} wanted, {reached:.1%} reached, mAP {reference:.4f} → {score:.4f}")


if __name__ == "__main__":
    main()
