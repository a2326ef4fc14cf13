"""What each importance keeps of the mAP when a trained detector is cut and not fine-tuned: table, record and picture.

usage: python scripts/studies/importance.py --model runs/bccd/01_train/model.pt --data ../shared/data/bccd/bccd.yaml \
           --imgsz 320 --split test --budget configs/budgets/onnxruntime-cpu.yaml --output docs/results/importance.json

The picture lies beside the record. With `--record docs/results/importance.json` alone nothing is measured: that one is
printed and drawn again.
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
from compress.planning import plan_pruning
from compress.pruning.batch_norm import recalibrate_batch_norm
from compress.pruning.surgery import apply_plan
from compress.settings import Importance, Prune, load_budget

SHARES = (0.7, 0.5)
_COLOURS = ("#2a7fd4", "#d2691e", "#17956b")


def ranked(record: dict[str, Any]) -> tuple[list[int], list[tuple[str, list[float]]]]:
    """Return the kept shares of the MACs, percent, the mildest first, and of each importance the mAP at each of them.

    The importance that keeps most on the average is first.
    """
    scores: dict[str, dict[int, float]] = {}
    for row in record["rows"]:
        scores.setdefault(row["importance"], {})[_kept(row)] = row["map50_95"]
    shares = sorted({_kept(row) for row in record["rows"]}, reverse=True)
    found = [(name, [mine[share] for share in shares]) for name, mine in scores.items()]
    return shares, sorted(found, key=lambda line: -sum(line[1]))


def _kept(row: dict[str, Any]) -> int:
    """Return which share of the MACs was asked for, percent; the plan's own comes near it from below."""
    return 5 * round(20 * row["macs_share"])


def table(record: dict[str, Any]) -> str:
    """Return a record as a Markdown table."""
    shares, lines = ranked(record)
    heading = ["importance", *(f"at {share} % of the MACs" for share in shares)]
    rows = [[f"`{name}`", *(f"{value:.4f}" for value in values)] for name, values in lines]
    rows.append(["uncut", *[f"{record['dense_map50_95']:.4f}"] * len(shares)])
    ruler = ["---", *["--:"] * len(shares)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (heading, ruler, *rows))


def plot(record: dict[str, Any], path: Path) -> None:
    """Draw the mAP that is left, a bar for each importance and share, beside that of the uncut model."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shares, lines = ranked(record)
    thick = 0.8 / len(shares)
    figure = Figure(figsize=(7, 1.5 + 0.5 * len(lines)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for index, (share, colour) in enumerate(zip(shares, _COLOURS, strict=False)):
        places = [row + thick * (index - (len(shares) - 1) / 2) for row in range(len(lines))]
        bars = axes.barh(places, [values[index] for _, values in lines], thick, color=colour)
        bars.set_label(f"{share} % of the MACs kept")
        axes.bar_label(bars, fmt="%.3f", padding=3, fontsize=8)
    axes.axvline(record["dense_map50_95"], color="#1b2420", linewidth=1, linestyle="--", label="uncut")
    axes.set_yticks(range(len(lines)), [name for name, _ in lines])
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.1 * record["dense_map50_95"]), xlabel="mAP50-95 after the cut, without fine-tuning")
    axes.set_title(f"{record['data']}, {record['split']} split, {record['imgsz']} px", loc="left", fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(shares) + 1, frameon=False, fontsize=9)
    figure.savefig(path, metadata={"Software": None})


def main() -> None:
    """Measure and show, or show what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, help="of an earlier study: nothing is measured, it is drawn and printed")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data")
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--split", default="val")
    parser.add_argument("--budget", type=Path)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    if given.record is not None:
        show(manifest.read_json(given.record), given.record)
        return
    if missing := [f"--{name}" for name in ("model", "data", "budget", "output") if getattr(given, name) is None]:
        parser.error(f"{', '.join(missing)} needed, or --record")
    record = measure(given)
    manifest.write_json(given.output, record)
    show(record, given.output)


def show(record: dict[str, Any], path: Path) -> None:
    """Print the table of a record, and draw its picture beside it."""
    print(table(record))
    picture = path.with_suffix(".png")
    plot(record, picture)
    print(f"importance: {picture}")


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Cut by every importance at every share of the MACs, score, and return the record."""
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
    return {
        "model_sha256": manifest.sha256_file(given.model),
        "data": Path(given.data).name,
        "split": given.split,
        "imgsz": given.imgsz,
        "budget": given.budget.name,
        "dense_map50_95": score(dense),
        "rows": rows,
        "tools": manifest.tool_versions(),
    }


if __name__ == "__main__":
    main()
