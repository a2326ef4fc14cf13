"""What a cut costs in mAP, over seeds: docs/results/accuracy.json.

usage: python -m scripts.studies.accuracy nbs=16 --model yolov8n.pt --data bccd.yaml --imgsz 320 --seeds 0 1 2

For every seed: a dense model; for each share of --cut-only a model that is trained sparse for as many epochs and cut,
with new batch-norm statistics and with those that the training left; for each of --shares one that is trained, cut,
and fine-tuned with the dense model as its teacher. What is trained before the cut fades out, or with --start plain
does not; then --reconstruct-images refits what reads removed channels. At --compare the same cut is fine-tuned without
a teacher too, and with --rounds the share is approached in rounds. All start from --model and are trained for as many
epochs in all. Scores are those of --split.

Stages below --work that are finished are not trained again, so that several processes may share the seeds among them
(each with an --output of its own); the same command with all seeds then only scores and writes the record.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from benchmark.accuracy import evaluate
from compress import manifest
from compress.data.dataset import fingerprint, resolve
from compress.finetune import finetune
from compress.prune import prune
from compress.rounds import outcome, run_rounds
from compress.run import score_val
from compress.settings import Finetune, Prune, Run, Sparsity, Training, load_budget, training_args
from compress.sparsify import sparsify
from compress.train import Common, train

ROUNDS = 3
RECORDED = ("imgsz", "split", "start", "sparsify_epochs", "finetune_epochs", "sr", "reconstruct_images")


def main() -> None:
    """Train what is missing, score everything, and write the record after each seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="what every training starts from")
    parser.add_argument("--data", required=True)
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--split", default="test")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--sparsify-epochs", type=int, default=12, help="a multiple of the rounds, which are 3")
    parser.add_argument("--finetune-epochs", type=int, default=27, help="likewise")
    parser.add_argument("--sr", type=float, default=0.003, help="beside fading; 0: none, and no SGD for its sake")
    parser.add_argument("--start", choices=("fading", "plain"), default="fading", help="the training before a cut")
    parser.add_argument("--reconstruct-images", type=int, default=0, help="of the cut before a fine-tuning")
    parser.add_argument("--budget", type=Path, default=Path("configs/budgets/onnxruntime-cpu.yaml"))
    parser.add_argument("--cut-only", type=float, nargs="*", default=[0.7, 0.5], help="shares of the MACs")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.3], help="likewise, to be fine-tuned")
    parser.add_argument("--compare", type=float, default=0.5, help="the share that is also reached in other ways")
    parser.add_argument("--rounds", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path("runs/studies/accuracy"))
    parser.add_argument("--output", type=Path, default=Path("docs/results/accuracy.json"))
    parser.add_argument("more", nargs="*", metavar="KEY=VALUE", help="Ultralytics' training arguments")
    given = parser.parse_args()
    if given.sparsify_epochs % ROUNDS or given.finetune_epochs % ROUNDS:
        parser.error(f"the epochs are shared out among {ROUNDS} rounds: give multiples of {ROUNDS}")

    rows: list[dict[str, Any]] = []
    for seed in given.seeds:
        rows += rows_of(given, seed)
        record = {
            "schema": 1,
            "model": Path(given.model).name,
            "data": Path(given.data).name,
            **{name: getattr(given, name) for name in RECORDED},
            "budget": given.budget.name,
            "summary": summary(rows),
            "rows": rows,
            "tools": manifest.tool_versions(),
        }
        manifest.write_json(given.output, record)
    for line in summary(rows):
        print({name: round(value, 4) if isinstance(value, float) else value for name, value in line.items()})


def settings_of(given: argparse.Namespace, share: float, seed: int, rounds: int = 1, *, cut_only: bool = False) -> Run:
    """Return the pipeline that leaves a share of the MACs; its epochs are shared out among its rounds.

    Args:
        cut_only: spend all epochs before the cut.
    """
    more, tuned = training_args(given.more), 0 if cut_only else given.finetune_epochs
    fading = cut_only or given.start == "fading"
    sparse = given.sparsify_epochs + given.finetune_epochs - tuned
    return Run(
        name=f"{share}-{seed}",
        model=given.model,
        data=given.data,
        imgsz=given.imgsz,
        seed=seed,
        iterations=rounds,
        train=Training(epochs=given.sparsify_epochs + given.finetune_epochs, batch=given.batch, args=more),
        sparsify=Sparsity(
            epochs=sparse // rounds,
            batch=given.batch,
            optimizer="SGD" if fading and given.sr else "auto",
            sr=given.sr if fading else 0.0,
            fade=fading,
            start="model",
            args=more,
        ),
        prune=Prune(
            macs=share,
            importance="taylor",
            budget=load_budget(given.budget),
            reconstruct_images=0 if cut_only else given.reconstruct_images,
        ),
        finetune=Finetune(epochs=tuned // rounds, batch=given.batch, args=more),
    )


def rows_of(given: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    """Return one row for each model of a seed: its way, its share of the MACs, and its mAP."""
    data, common = resolve(given.data), Common(imgsz=given.imgsz, seed=seed)
    home = given.work / f"seed{seed}"
    rows: list[dict[str, Any]] = []

    def add(way: str, wanted: float, model: Path, macs: tuple[int, int] | None = None) -> None:
        left = macs[1] / macs[0] if macs else 1.0
        row = {"seed": seed, "way": way, "wanted": wanted, "macs_share": round(left, 4)}
        rows.append(row | score(model, data, given.split, given.imgsz))
        print(rows[-1], flush=True)

    dense = train(given.model, data, settings_of(given, given.compare, seed).train, common, home / "dense")
    add("dense", 1.0, dense)

    def cut(asked: Prune, sparse: Path, folder: Path) -> tuple[Path, tuple[int, int]]:
        model = prune(sparse, data, asked, given.imgsz, seed, folder)
        return model, manifest.read_json(folder / manifest.MANIFEST)["metrics"]["macs"]

    for share in given.cut_only:
        wanted, folder = settings_of(given, share, seed, cut_only=True), home / f"only{share}"
        sparse = sparsify(given.model, data, wanted.sparsify, common, folder / "sparse", wanted.prune)
        add("cut", share, *cut(wanted.prune, sparse, folder / "cut"))
        as_left = wanted.prune.model_copy(update={"recalibrate_images": 0, "fold": False})
        left = folder / "sparse" / "training" / "weights" / "last.pt"
        add("cut, statistics of the training", share, *cut(as_left, left, folder / "raw"))
    for share in given.shares:
        wanted, folder = settings_of(given, share, seed), home / f"macs{share}"
        before = folder / "sparse" if given.start == "fading" else home / "plain"  # which is the same for all shares
        sparse = sparsify(given.model, data, wanted.sparsify, common, before, wanted.prune)
        pruned, macs = cut(wanted.prune, sparse, folder / "cut")
        add("fine-tuned", share, finetune(pruned, dense, data, wanted.finetune, common, folder / "tuned"), macs)
        if share == given.compare:
            alone = wanted.finetune.model_copy(update={"distill": False})
            add("without a teacher", share, finetune(pruned, dense, data, alone, common, folder / "alone"), macs)
        if share == given.compare and given.rounds:
            rounds = settings_of(given, share, seed, ROUNDS)
            val = partial(score_val, data=data, imgsz=given.imgsz)
            last = run_rounds(given.model, dense, data, rounds, common, folder / "rounds", val)
            add("in rounds", share, last, outcome(folder / "rounds", ROUNDS)["macs"])
    return rows


def score(model: Path, data: Path, split: str, imgsz: int) -> dict[str, float]:
    """Return mAP50-95 and mAP50 of a checkpoint, measured once."""

    def find() -> dict[str, float]:
        found = evaluate(model, data, split=split, imgsz=imgsz)
        return {name: round(found[name], 5) for name in ("map50_95", "map50")}

    parents = manifest.input_hashes({"model": model}) | {"data": fingerprint(data)}
    return manifest.remembered(model.parent / f"score-{split}", "score", {"imgsz": imgsz}, parents, find)


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return for each way and share the mean over seeds, and the mean and spread of the difference to the dense model.

    Differences are taken within a seed. The spread is the sample's standard deviation, None of a single seed.
    """
    dense = {row["seed"]: row["map50_95"] for row in rows if row["way"] == "dense"}
    found = []
    for way, wanted in dict.fromkeys((row["way"], row["wanted"]) for row in rows):
        own = [row for row in rows if (row["way"], row["wanted"]) == (way, wanted)]
        lost = [row["map50_95"] - dense[row["seed"]] for row in own]
        found.append(
            {
                "way": way,
                "wanted": wanted,
                "macs_share": fmean(row["macs_share"] for row in own),
                "seeds": len(own),
                "map50_95": fmean(row["map50_95"] for row in own),
                "kept": fmean(row["map50_95"] / dense[row["seed"]] for row in own),
                "difference": fmean(lost),
                "spread": stdev(lost) if len(lost) > 1 else None,
            }
        )
    return found


if __name__ == "__main__":
    main()
