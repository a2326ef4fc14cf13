"""What each repair of a cut gives back of the mAP before any fine-tuning: docs/results/repair.json.

usage: python -m scripts.studies.repair --model runs/bccd/01_train/model.pt --data ../shared/data/bccd/bccd.yaml \
           --imgsz 320 --shares 0.7 0.5 --importance taylor --images 256 --split test --output docs/results/repair.json

The model is an ordinarily trained one: after sparsity training little is left to repair. Every candidate that
`compress.prune` chooses from is scored on --split, which has no part in that choice, beside the val score by which it
is chosen, both by `compress.training.mean_ap`. "folded_statistics", new batch-norm statistics after folding, is shown
beside them and is no candidate. A share that the record has already is measured anew, the others stay.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

from torch import nn

from compress import manifest
from compress.checkpoint import load_model
from compress.data.dataset import images, resolve, sample_images
from compress.planning import Scored, choose_widths
from compress.planning import score as score_channels
from compress.pruning.batch_norm import recalibrate_batch_norm
from compress.pruning.plan import Plan
from compress.pruning.repair import FOLDED, Repairs, candidates
from compress.pruning.surgery import apply_plan
from compress.settings import Importance, Prune, load_budget
from compress.training.mean_ap import scorer, val_scorer
from scripts.studies import rows

BESIDE = "folded_statistics"
KEYS = ("importance", "wanted", "images")


def main() -> None:
    """Cut, repair and score at every share, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.7, 0.5], help="of the MACs that remain")
    parser.add_argument("--importance", choices=get_args(Importance), default="taylor")
    parser.add_argument("--images", type=int, default=256, help="of the training split, for each repair")
    parser.add_argument("--split", default="test")
    parser.add_argument("--budget", type=Path, default=Path("configs/budgets/onnxruntime-cpu.yaml"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    data, dense = resolve(given.data), load_model(given.model)
    score = scorer(dense, data, images(data, given.split), given.imgsz)
    heading = {
        "model_sha256": manifest.sha256_file(given.model),
        "data": Path(given.data).name,
        "split": given.split,
        "imgsz": given.imgsz,
        "budget": given.budget.name,
        "seed": given.seed,
        "dense_map50_95": round(score(dense), 5),
        "tools": manifest.tool_versions(),
    }
    scored = score_channels(dense, wanted(given, given.shares[0]), given.imgsz, given.seed, data)
    for share in given.shares:
        row = row_of(scored, data, share, score, given)
        print(row, flush=True)
        rows.store(given.output, row, KEYS, heading)
    print(table(manifest.read_json(given.output)))


def wanted(given: argparse.Namespace, share: float) -> Prune:
    """Return what is asked of the cut."""
    return Prune(macs=share, importance=given.importance, budget=load_budget(given.budget))


def row_of(
    scored: Scored, data: Path, share: float, score: Callable[[nn.Module], float], given: argparse.Namespace
) -> dict[str, Any]:
    """Return the mAP of every candidate at one share of the MACs, and which one the val split chooses."""
    dense, settings = scored.model, wanted(given, share)
    planned = choose_widths(scored, settings, given.imgsz)
    val = val_scorer(dense, data, given.imgsz, given.seed)
    if val is None:
        raise SystemExit(f"{given.data} has no val mAP of {given.model}")
    sample = sample_images(data, "train", given.images, given.seed)
    found: dict[str, float] = {}
    chosen_by: dict[str, float] = {}
    for name, model in _repaired(dense, planned.plan, sample, given):
        found[name] = round(score(model), 5)
        if name != BESIDE:
            chosen_by[name] = round(val(model), 5)
        print(f"  {share:g} {name}: {found[name]:.4f}, val {chosen_by.get(name)}", flush=True)
    before, after = planned.metrics()["macs"]
    return {
        "importance": given.importance,
        "wanted": share,
        "images": len(sample),
        "macs_share": round(after / before, 4),
        "map50_95": found,
        "val_map50_95": chosen_by,
        "kept": max(reversed(chosen_by), key=chosen_by.__getitem__),  # the later one of equals, as `repair` does
    }


def _repaired(
    dense: nn.Module, plan: Plan, sample: list[Path], given: argparse.Namespace
) -> Iterator[tuple[str, nn.Module]]:
    """Yield every candidate; the next one is made of it in place."""
    pruned = apply_plan(dense, plan)
    for name in candidates(pruned, dense, plan, Repairs(sample, sample, sample), given.imgsz, given.seed):
        yield name, pruned
    pruned = apply_plan(dense, plan)
    for name in candidates(pruned, dense, plan, Repairs(sample, [], []), given.imgsz, given.seed):
        if name == FOLDED:
            recalibrate_batch_norm(pruned, sample, given.imgsz)
            yield BESIDE, pruned


def table(record: dict[str, Any]) -> str:
    """Return a record as a Markdown table: a line for each candidate, a column for each share."""
    found = record["rows"]
    names = list(dict.fromkeys(name for row in found for name in row["map50_95"]))
    heading = ["", *(f"{row['macs_share']:.0%} of the MACs, {row['importance']}" for row in found)]
    lines = [
        [name, *(f"{row['map50_95'][name]:.4f}" + (" (kept)" if name == row["kept"] else "") for row in found)]
        for name in names
    ]
    lines.append(["uncut", *[f"{record['dense_map50_95']:.4f}"] * len(found)])
    return "\n".join(f"| {' | '.join(line)} |" for line in (heading, ["---", *["--:"] * len(found)], *lines))


if __name__ == "__main__":
    main()
