"""The penalty on channels that are cut together beside plain L1 on every γ: docs/results/penalty.json.

usage: python -m scripts.studies.penalty nbs=8 mosaic=0.0 --model dense.pt --data shapes --imgsz 160 --epochs 12 \
           --batch 8 --strengths 0.02

Both are trained alike, with the same λ. A channel can go where all of its γ are near zero, so beside their share stands
that of the MACs that would be left without such channels. Then the model is cut to --macs by its γ, and scored as it is
cut and with new batch-norm statistics, without any fine-tuning. Trainings below --work that are finished are kept.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmark.accuracy import evaluate
from compress import manifest
from compress.channels.graph import build_graph
from compress.checkpoint import load_model, save_model
from compress.data.dataset import resolve, sample_images
from compress.planning import plan_pruning
from compress.pruning.batch_norm import recalibrate_batch_norm
from compress.pruning.importance import batch_norm_scales, prunable_scales
from compress.pruning.surgery import apply_plan
from compress.settings import Prune, Sparsity, load_budget, training_args
from compress.sparsify import sparsify
from compress.train import Common
from compress.training import sparse
from compress.training.penalty import NEAR_ZERO, SPARSITY, GroupPenalty, widths_without
from scripts.studies import rows

STATISTICS_IMAGES = 256
KEYS = ("penalty", "strength", "seed")


class PlainL1(GroupPenalty):
    """Every γ by itself, λ·Σ|γ|, as in network slimming (Liu et al., ICCV 2017)."""

    @torch.no_grad()
    def add_gradient(self, strength: float, units: torch.Tensor | None = None) -> None:
        """Add `strength`·sign(γ) to the gradient of every prunable γ; see `GroupPenalty`."""
        assert units is None, "steering chooses units, which plain L1 knows nothing of"
        for gamma, _, weight in self.gammas:
            if gamma.grad is not None:
                gamma.grad.add_((strength * weight * gamma.sign()).to(gamma.grad.dtype))


PENALTIES = {"group": GroupPenalty, "l1": PlainL1}


def main() -> None:
    """Train what is missing, cut, score, and write the record after each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="what every training starts from")
    parser.add_argument("--data", required=True)
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--split", default="test")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.02], help="λ of the first epoch")
    parser.add_argument("--macs", type=float, default=0.5, help="that are left, as a share")
    parser.add_argument("--budget", type=Path, default=Path("configs/budgets/onnxruntime-cpu.yaml"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--work", type=Path, default=Path("runs/studies/penalty"))
    parser.add_argument("--output", type=Path, default=Path("docs/results/penalty.json"))
    parser.add_argument("more", nargs="*", metavar="KEY=VALUE", help="Ultralytics' training arguments")
    given = parser.parse_args()
    data = resolve(given.data)
    heading = {
        "model_sha256": manifest.sha256_file(given.model),
        "dense_map50_95": evaluate(given.model, data, split=given.split, imgsz=given.imgsz)["map50_95"],
        **{name: getattr(given, name) for name in ("data", "imgsz", "split", "epochs", "macs")},
        "tools": manifest.tool_versions(),
    }
    for seed in given.seeds:
        for strength in given.strengths:
            for penalty in PENALTIES:
                row = row_of(penalty, strength, seed, data, given)
                print(row, flush=True)
                rows.store(given.output, row, KEYS, heading)


def row_of(penalty: str, strength: float, seed: int, data: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Train with one penalty, look at its γ, cut, and score."""
    folder = given.work / f"{penalty}-{strength:g}-{seed}"
    settings = Sparsity(epochs=given.epochs, batch=given.batch, sr=strength, args=training_args(given.more))
    sparse.GroupPenalty = PENALTIES[penalty]  # type: ignore[misc]
    trained = sparsify(str(given.model), data, settings, Common(imgsz=given.imgsz, seed=seed), folder)
    model: Any = load_model(trained)
    graph = build_graph(model, given.imgsz)
    threshold = NEAR_ZERO * manifest.read_json(folder / SPARSITY)["start_mean"]
    gammas = np.concatenate(list(prunable_scales(graph, model).values()))
    left = widths_without(graph, batch_norm_scales(graph, model), threshold)

    wanted = Prune(macs=given.macs, importance="bn", budget=load_budget(given.budget))
    pruned = apply_plan(model, plan_pruning(model, wanted, given.imgsz, seed, data).plan)
    scores = {"as_cut": score_of(pruned, folder, data, given)}
    recalibrate_batch_norm(pruned, sample_images(data, "train", STATISTICS_IMAGES, seed), given.imgsz)
    scores["new_statistics"] = score_of(pruned, folder, data, given)
    return {
        "penalty": penalty,
        "strength": strength,
        "seed": seed,
        "near_zero": round(float((gammas < threshold).mean()), 4),
        "macs_without_channels_near_zero": round(graph.macs(left) / graph.macs(graph.widths), 4),
        "map50_95": evaluate(trained, data, split=given.split, imgsz=given.imgsz)["map50_95"],
        "map50_95_at_macs": scores,
    }


def score_of(model: Any, folder: Path, data: Path, given: argparse.Namespace) -> float:
    """Return the mAP50-95 of a model."""
    save_model(model, folder / "cut.pt", {})
    return evaluate(folder / "cut.pt", data, split=given.split, imgsz=given.imgsz)["map50_95"]


if __name__ == "__main__":
    main()
