"""A larger model cut down to a smaller one's latency, beside the smaller one: docs/results/smaller_scale.json.

usage: python -m scripts.studies.smaller_scale --small yolov8n.yaml --large yolov8s.yaml --data shapes \
           --imgsz 160 --batch 8 --sparsify-epochs 12 --finetune-epochs 24 --seeds 0 1

The smaller model is trained for as many epochs as the larger one's sparsity training (with fading) and fine-tuning
together, from the same kind of start, without a teacher. The target is the smaller model's latency as measured in turns
with the larger one; the networks of all seeds are then measured in one interleaved run. Latency does not depend on
weights, so the table comes first: --until table on a quiet machine, --until train on any, and the rest on a quiet one.
What is finished below --work is not done again.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import nn

from benchmark import latency, variants
from benchmark.accuracy import evaluate
from benchmark.observe import Wanted
from benchmark.profile import profile
from compress import checkpoint, manifest
from compress.channels.graph import build_graph
from compress.data.dataset import class_names, resolve
from compress.finetune import finetune
from compress.prune import prune
from compress.settings import Finetune, Prune, Sparsity, Training, load_budget, training_args
from compress.sparsify import sparsify
from compress.train import Common, train


def main() -> None:
    """Do what is missing, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", required=True, help="checkpoint (.pt) or architecture (.yaml)")
    parser.add_argument("--large", required=True, help="likewise")
    parser.add_argument("--data", required=True)
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--split", default="test")
    parser.add_argument("--runtime", default="onnxruntime")
    parser.add_argument("--sparsify-epochs", type=int, default=12)
    parser.add_argument("--finetune-epochs", type=int, default=24)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--sr", type=float, default=0.001)
    parser.add_argument("--budget", type=Path, default=Path("configs/budgets/onnxruntime-cpu.yaml"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--until", choices=("table", "train", "all"), default="all", help="what is done last")
    parser.add_argument("--work", type=Path, default=Path("runs/studies/smaller_scale"))
    parser.add_argument("--output", type=Path, default=Path("docs/results/smaller_scale.json"))
    parser.add_argument("more", nargs="*", metavar="KEY=VALUE", help="Ultralytics' training arguments")
    given = parser.parse_args()
    data, more = resolve(given.data), training_args(given.more)
    wanted = Wanted(given.runtime, given.imgsz, load_budget(given.budget))
    shared = {"batch": given.batch, "args": more}
    fading = Sparsity(epochs=given.sparsify_epochs, sr=given.sr, fade=True, **shared)
    alone = Finetune(epochs=given.finetune_epochs, distill=False, **shared)
    whole = Training(epochs=given.sparsify_epochs + given.finetune_epochs, **shared)

    asked = target(given.small, given.large, len(class_names(data)), wanted, given.work)
    networks: dict[str, Path] = {}
    for seed in given.seeds if given.until != "table" else ():
        common, home = Common(imgsz=given.imgsz, seed=seed), given.work / f"seed{seed}"
        networks[f"small, seed {seed}"] = train(given.small, data, whole, common, home / "small")
        sparse = sparsify(given.large, data, fading, common, home / "sparse", asked)
        cut = prune(sparse, data, asked, given.imgsz, seed, home / "cut")
        networks[f"cut, seed {seed}"] = finetune(cut, sparse, data, alone, common, home / "tuned")
    if given.until != "all":
        return
    record = measured({name: checkpoint.load_model(path) for name, path in networks.items()}, wanted, "standard")
    ms = {cell["model"]: cell["p50_ms"] for cell in record["cells"]}
    rows = [
        {
            "model": name,
            "p50_ms": ms[name],
            "macs": macs_of(path, given.imgsz),
            "map50_95": evaluate(path, data, split=given.split, imgsz=given.imgsz)["map50_95"],
        }
        for name, path in networks.items()
    ]
    mean = {kind: fmean(row["map50_95"] for row in rows if row["model"].startswith(kind)) for kind in ("small", "cut")}
    options = {name: str(value) for name, value in vars(given).items() if name not in ("work", "output", "until")}
    for cell in record["cells"]:
        del cell["samples_ms"]
    content = {"schema": 1, "settings": options, "mean_map50_95": mean, "rows": rows, "latency": record}
    manifest.write_json(given.output, {**content, "tools": manifest.tool_versions()})
    for row in rows:
        print(row)
    print(mean)


def target(small: str, large: str, classes: int, wanted: Wanted, work: Path) -> Prune:
    """Return the cut that brings the larger architecture to the smaller one's latency; its table is made on the way."""
    scales = {name: architecture(start, classes) for name, start in (("large", large), ("small", small))}
    file, table = work / "target.json", work / "table.json"
    work.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        record = measured(scales, wanted, "standard")
        manifest.write_json(file, {"speedup": record["comparisons"][0]["speedup"], "noise": record["noise"]})
    profile(scales["large"], wanted, table)
    return Prune(
        speedup=manifest.read_json(file)["speedup"],
        importance="taylor",
        budget=wanted.budget,
        table=str(table),
        runtime=wanted.runtime,  # type: ignore[arg-type]
        threads=wanted.threads,
    )


def architecture(start: str, classes: int) -> nn.Module:
    """Return a model of so many classes and the shapes that a training from `start` gives."""
    model = checkpoint.load_model(start)
    return model if len(model.names) == classes else checkpoint.build_model(model.yaml, nc=classes)  # type: ignore[arg-type]


def measured(networks: dict[str, nn.Module], wanted: Wanted, mode: str) -> dict[str, Any]:
    """Measure networks in turns; the first one is what the others are compared with."""
    with tempfile.TemporaryDirectory() as scratch:
        files = variants.export_here(networks, wanted, Path(scratch))
        return latency.measure(files, imgsz=wanted.imgsz, threads=wanted.threads, mode=mode)


def macs_of(model: Path, imgsz: int) -> int:
    """Return the multiply-accumulates of a checkpoint for one image."""
    graph = build_graph(checkpoint.load_model(model), imgsz)
    return int(graph.macs(graph.widths))


if __name__ == "__main__":
    main()
