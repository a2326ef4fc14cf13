"""Espalier beside its peers: mAP after equal fine-tuning, at equal measured latency: docs/results/peers.json and .png.

usage: python -m scripts.peers.equal_latency --model yolov5nu.pt --data bccd.yaml --imgsz 320 --seeds 0 1 2 \
           --speedup 1.8 --runtimes onnxruntime ncnn --dense-epochs 20 --epochs 16

For each seed a dense start is trained. Every way cuts it to the same speed-up on each runtime, as `benchmark.latency`
measures it in turns with the dense model: Espalier is asked for it, the ratio of the others is sought until it is met.
All are repaired and fine-tuned alike, without a teacher, and scored on a split that no training has seen. At last all
networks of a runtime are measured together.

The parts are `dense`, `table`, `sparsify` (with --sparsify-epochs), `cut`, `finetune`, `measure` and `report`; `table`,
`cut` and `measure` need a quiet machine. Everything that is finished is a file below --work: run it again to go on.
Torch-Pruning is no dependency: `pip install --no-deps torch-pruning==1.6.1`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean
from typing import Any

from compress import manifest
from compress.data.dataset import resolve
from compress.errors import RunError, run_app
from compress.settings import load_budget, training_args
from scripts.peers import outcome, picture
from scripts.peers.stages import PARTS, SCORES, TOLERANCE
from scripts.peers.study import CUT, Study, Wish, check, measured_file, tuned_model
from scripts.peers.ways import OURS, WAYS


def main() -> None:
    """Run the parts that were asked for, in their order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="what the dense start is trained from")
    parser.add_argument("--data", required=True, help="data set YAML, or 'shapes'")
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--split", default="test", help="that the results are scored on")
    parser.add_argument("--speedup", type=float, default=1.8, help="dense latency over that of every cut network")
    parser.add_argument("--budget", type=Path, default=Path("configs/budgets/onnxruntime-cpu.yaml"))
    parser.add_argument("--dense-epochs", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=16, help="of every way, after the dense start")
    parser.add_argument("--sparsify-epochs", type=int, default=0, help="of these, for Espalier's sparsity stage")
    parser.add_argument("--sr", type=float, default=0.003, help="strength λ of that stage")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--ways", nargs="+", choices=list(WAYS), default=list(WAYS), metavar="WAY", help=", ".join(WAYS)
    )
    parser.add_argument("--runtimes", nargs="+", choices=["onnxruntime", "ncnn"], default=["onnxruntime", "ncnn"])
    parser.add_argument("--parts", nargs="+", choices=[*PARTS, "report"], default=[*PARTS, "report"], metavar="PART")
    parser.add_argument("--variants", type=int, default=64, help="networks of a latency table")
    parser.add_argument("--accept-noise", action="store_true", help="take what a busy machine measures: for trials")
    parser.add_argument("--work", type=Path, default=Path("runs/studies/peers"))
    parser.add_argument("--output", type=Path, default=Path("docs/results/peers.json"))
    parser.add_argument("more", nargs="*", metavar="KEY=VALUE", help="Ultralytics' training arguments, such as nbs=16")
    given = parser.parse_args()
    study = Study(
        model=given.model,
        data=resolve(given.data),
        imgsz=given.imgsz,
        split=given.split,
        speedup=given.speedup,
        budget=load_budget(given.budget),
        dense_epochs=given.dense_epochs,
        epochs=given.epochs,
        sparsify_epochs=given.sparsify_epochs,
        sr=given.sr,
        batch=given.batch,
        args=training_args(given.more),
        variants=given.variants,
        accept_noise=given.accept_noise,
        work=given.work,
    )
    wish = Wish(given.seeds, given.ways, given.runtimes)
    check(study, wish)
    with manifest.lock(study.work):
        for name, part in PARTS.items():
            if name in given.parts:
                part(study, wish)
        if "report" in given.parts:
            report(study, wish, given.output)


def report(study: Study, wish: Wish, output: Path) -> None:
    """Write the record and the plot of what is finished, and print the table."""
    rows = [row for cell in wish.cells() if (row := row_of(study, *cell)) is not None]
    if not rows:
        raise RunError(f"nothing below {study.work} is fine-tuned yet: run the other parts first")
    dense = {
        seed: manifest.read_json(file)
        for seed in wish.seeds
        if (file := study.work / "dense" / f"seed{seed}.score.json").exists()
    }
    lines = outcome.summarise(rows, OURS)
    labels = {name: way.label for name, way in WAYS.items()}
    together = {runtime: measured_file(study, runtime) for runtime in wish.runtimes}
    content = {
        "settings": study.settings() | {"model": Path(study.model).name, "tolerance": TOLERANCE},
        "tools": manifest.tool_versions() | {name: number for way in wish.ways for name, number in WAYS[way].needs},
        "dense": {
            "seeds": {seed: {name: found[name] for name in SCORES} for seed, found in dense.items()},
            "ms": {name: manifest.read_json(file)["dense_ms"] for name, file in together.items() if file.exists()},
        },
        "summary": lines,
        "rows": rows,
        "measurements": {
            name: {key: record[key] for key in ("device", "protocol", "noise")}
            for name, file in together.items()
            if file.exists()
            for record in [manifest.read_json(file)["record"]]
        },
    }
    manifest.write_json(output, content)
    mean = fmean(found["map50_95"] for found in dense.values()) if dense else None
    picture.plot(rows, lines, mean, labels, OURS, output.with_suffix(".png"))
    print(outcome.table(lines, labels))
    print(f"report: {output}, {len(rows)} of {len(list(wish.cells()))} networks")


def row_of(study: Study, way: str, runtime: str, seed: int) -> dict[str, Any] | None:
    """Return all that is known of one fine-tuned network; its latency is the last one that was measured."""
    model = tuned_model(study, way, runtime, seed)
    if model is None:
        return None
    found = manifest.read_json(study.cut_folder(way, runtime, seed) / CUT)
    scores = manifest.read_json(model.parent.with_name(f"{model.parent.name}.score.json"))
    file = measured_file(study, runtime)
    last = manifest.read_json(file)["networks"].get(found["structure"]) if file.exists() else None
    return {
        **{key: found[key] for key in ("way", "runtime", "seed", "amount", "macs", "params", "structure")},
        "cut": {key: found[key] for key in ("ms", "dense_ms", "speedup", "interval")},
        **{key: (last or found)[key] for key in ("ms", "speedup", "interval")},
        "mode": "standard" if last else "quick",
        **{key: scores[key] for key in (*SCORES, "per_class")},
        "points": [{key: point[key] for key in ("amount", "speedup")} for point in found["points"]],
    }


if __name__ == "__main__":
    run_app(main)
