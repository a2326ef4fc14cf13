"""Espalier beside its peers: mAP after equal fine-tuning, at equal measured latency: docs/results/peers.json and .png.

usage: python -m scripts.peers.equal_latency --model yolov5nu.pt --data bccd.yaml --imgsz 320 --seeds 0 1 2 \
           --speedup 1.8 --runtimes onnxruntime ncnn --dense-epochs 20 --epochs 16 nbs=16

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
import hashlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
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
from compress.data.dataset import resolve, sample_images
from compress.errors import BenchmarkError, BudgetError, RunError, SettingsError, run_app
from compress.finetune import finetune
from compress.pruning.repair import recalibrate_batch_norm
from compress.settings import Budget, Finetune, Sparsity, Training, load_budget, training_args
from compress.sparsify import sparsify
from compress.train import MODEL, Common, train
from scripts.peers import outcome
from scripts.peers.search import nearest, next_amount
from scripts.peers.ways import OURS, WAYS, Case, asked

TOLERANCE = 0.02  # of the speed-up
MAX_POINTS = 10  # networks that a search may measure
ATTEMPTS = 3  # at a measurement that other work disturbs
REPAIR_IMAGES = 256
SCORES = ("map50_95", "map50")


@dataclass(frozen=True)
class Study:
    """What shapes the results, and where they lie."""

    model: str
    data: Path
    imgsz: int
    split: str
    speedup: float
    budget: Budget
    dense_epochs: int
    epochs: int
    sparsify_epochs: int
    sr: float
    batch: int
    args: dict[str, Any]
    variants: int
    accept_noise: bool
    work: Path

    def settings(self) -> dict[str, Any]:
        """Return what must not change between two starts below one folder."""
        names = ("model", "imgsz", "split", "speedup", "dense_epochs", "epochs", "sparsify_epochs", "sr", "batch")
        content = {name: getattr(self, name) for name in names} | {"args": self.args, "variants": self.variants}
        return content | {"data": self.data.name, "budget": self.budget.model_dump(mode="json", exclude={"source"})}

    def common(self, seed: int) -> Common:
        """Return what all trainings of a seed share."""
        return Common(imgsz=self.imgsz, seed=seed)

    def wanted(self, runtime: str) -> Wanted:
        """Return what a latency table is made of, and how networks are exported."""
        wanted = Wanted(runtime, self.imgsz, self.budget, variants=self.variants)
        return replace(wanted, max_interval=100.0) if self.accept_noise else wanted

    def dense(self, seed: int) -> Path:
        """Return the dense start of a seed, trained where it is not there yet."""
        folder = self.work / "dense" / f"seed{seed}"
        if (folder / manifest.MANIFEST).exists():
            return folder / MODEL
        settings = Training(epochs=self.dense_epochs, batch=self.batch, args=self.args)
        return train(self.model, self.data, settings, self.common(seed), folder)

    def case(self, way: str, runtime: str, seed: int) -> Case:
        """Return what a way cuts."""
        table = self.work / "tables" / f"{runtime}.json"
        case = Case(self.dense(seed), self.data, self.imgsz, seed, runtime, self.budget, table)
        if way != OURS or not self.sparsify_epochs:
            return case
        folder = self.work / "sparsify" / f"seed{seed}-{runtime}"
        if not (folder / manifest.MANIFEST).exists():
            settings = Sparsity(epochs=self.sparsify_epochs, batch=self.batch, sr=self.sr, fade=True, args=self.args)
            sparsify(str(case.start), self.data, settings, self.common(seed), folder, asked(case, self.speedup))
        return replace(case, start=folder / MODEL)

    def cut_folder(self, way: str, runtime: str, seed: int) -> Path:
        """Return where a cut and the way to it lie."""
        return self.work / "cuts" / f"seed{seed}" / runtime / way


@dataclass(frozen=True)
class Wish:
    """Which of all networks a start is about."""

    seeds: list[int]
    ways: list[str]
    runtimes: list[str]

    def cells(self) -> Iterator[tuple[str, str, int]]:
        """Yield (way, runtime, seed), a seed with all its ways before the next."""
        for seed in self.seeds:
            for runtime in self.runtimes:
                for way in self.ways:
                    yield way, runtime, seed


def make_dense(study: Study, wish: Wish) -> None:
    """Train the dense start of each seed and score it."""
    for number, seed in enumerate(wish.seeds, 1):
        model = study.dense(seed)
        found = scored(study, model, study.work / "dense" / f"seed{seed}.score.json")
        say(number, len(wish.seeds), f"dense, seed {seed}: mAP50-95 {found['map50_95']:.4f}")


def make_tables(study: Study, wish: Wish) -> None:
    """Measure a latency table for each runtime; it depends on the shapes of the dense model only."""
    dense = checkpoint.load_model(study.dense(wish.seeds[0]))
    for number, runtime in enumerate(wish.runtimes, 1):
        table, _ = profile(dense, study.wanted(runtime), study.work / "tables" / f"{runtime}.json")
        say(number, len(wish.runtimes), f"table, {runtime}: dense {table.dense:.2f} {table.unit}")


def make_sparse(study: Study, wish: Wish) -> None:
    """Train Espalier's sparsity stages, if it has any."""
    cells = [(runtime, seed) for way, runtime, seed in wish.cells() if way == OURS and study.sparsify_epochs]
    for number, (runtime, seed) in enumerate(cells, 1):
        study.case(OURS, runtime, seed)
        say(number, len(cells), f"sparsify, seed {seed}, {runtime}")


def make_cuts(study: Study, wish: Wish) -> None:
    """Cut in every way, until the measured speed-up is the target or no amount is nearer."""
    cells = list(wish.cells())
    for number, (way, runtime, seed) in enumerate(cells, 1):
        found = cut(study, way, runtime, seed)
        words = f"{found['speedup']:.3f}× at {found['amount']:g}, {len(found['points'])} measured"
        say(number, len(cells), f"cut, seed {seed}, {runtime}, {WAYS[way].label}: {words}")


def cut(study: Study, way: str, runtime: str, seed: int) -> dict[str, Any]:
    """Return the record of a cut, `cut.json` beside its checkpoint; every measured network on the way there is kept.

    Raises:
        BudgetError: Espalier cannot reach the target under the budget.
        BenchmarkError: the machine is too busy to measure.
    """
    folder = study.cut_folder(way, runtime, seed)
    record, course = folder / "cut.json", folder / "points.json"
    if record.exists():
        return manifest.read_json(record)
    folder.mkdir(parents=True, exist_ok=True)
    case, points = study.case(way, runtime, seed), manifest.read_json(course) if course.exists() else []
    knob, elsewhere = WAYS[way].knob, amount_elsewhere(study, way, runtime, seed)
    while len(points) < MAX_POINTS:
        known = {point["amount"]: point["speedup"] for point in points}
        amount = next_amount(knob, known, study.speedup, TOLERANCE)
        if elsewhere is not None and not points and knob.first is not None:
            amount = elsewhere
        if amount is None or (elsewhere in known and WAYS[way].seedless):
            break
        path = folder / f"{amount:.4f}.pt"
        try:
            if not path.exists():
                WAYS[way].cut(case, amount, path)
        except BudgetError:
            if not points:
                raise
            break  # more than the budget has: what was measured is as near as it comes
        points.append({"amount": amount, "file": path.name, **measured(study, runtime, path, case.start)})
        manifest.write_json(course, points)
        print(f"  {way} at {amount:g}: {points[-1]['speedup']:.3f}× (target {study.speedup:g}×)", flush=True)
    amount = nearest({point["amount"]: point["speedup"] for point in points}, study.speedup)
    chosen = next(point for point in points if point["amount"] == amount)
    model = checkpoint.load_model(folder / chosen["file"])
    recalibrate_batch_norm(model, sample_images(study.data, "train", REPAIR_IMAGES, seed), study.imgsz)
    checkpoint.save_model(model, folder / MODEL, checkpoint.load_training_args(folder / chosen["file"]))
    graph = build_graph(model, study.imgsz)
    size = {"macs": int(graph.macs(graph.widths)), "params": sum(value.numel() for value in model.parameters())}
    content = {"way": way, "runtime": runtime, "seed": seed, **chosen, **size, "points": points}
    manifest.write_json(record, content)
    for point in points:
        (folder / point["file"]).unlink(missing_ok=True)
    return content


def amount_elsewhere(study: Study, way: str, runtime: str, seed: int) -> float | None:
    """Return the amount that met the target with another seed, where a search best begins."""
    seeds = sorted((study.work / "cuts").glob(f"seed*/{runtime}/{way}/cut.json"))
    found = [manifest.read_json(path) for path in seeds if path.parts[-4] != f"seed{seed}"]
    return found[0]["amount"] if found else None


def measured(study: Study, runtime: str, path: Path, dense: Path) -> dict[str, Any]:
    """Return the speed-up of a network, measured in turns with the dense one; networks of one shape are measured once.

    Raises:
        BenchmarkError: other work disturbs every attempt.
    """
    model = checkpoint.load_model(path)
    structure = checkpoint.structure_hash(model)
    folder = study.work / "latencies" / runtime
    file = folder / f"{structure}.json"
    folder.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        wanted = study.wanted(runtime)
        with tempfile.TemporaryDirectory() as scratch:
            files = {
                name: {runtime: variants.export(network, name, wanted, Path(scratch))}
                for name, network in (("dense", checkpoint.load_model(dense)), ("cut", model))
            }
            record = quietly_measured(study, files, "quick")
        cells, comparison = {cell["model"]: cell for cell in record["cells"]}, record["comparisons"][0]
        content = {
            "structure": structure,
            **{key: comparison[key] for key in ("speedup", "interval")},
            "ms": cells["cut"]["p50_ms"],
            "dense_ms": cells["dense"]["p50_ms"],
            "noise": record["noise"],
        }
        manifest.write_json(file, content)
    return manifest.read_json(file)


def quietly_measured(study: Study, files: dict[str, dict[str, Path]], mode: str) -> dict[str, Any]:
    """Measure until nothing disturbs it, see `benchmark.latency.measure`; samples are left out.

    Raises:
        BenchmarkError: other work disturbs every attempt.
    """
    doubts: list[str] = []
    for _ in range(ATTEMPTS):
        record = latency.measure(files, imgsz=study.imgsz, threads=1, mode=mode)
        for cell in record["cells"]:
            del cell["samples_ms"]
        if study.accept_noise or not record["noisy"]:
            return record
        doubts = record["noise"]
    raise BenchmarkError(f"the measurement is noisy ({doubts[0]}): run the same command on a quiet machine")


def fine_tune(study: Study, wish: Wish) -> None:
    """Fine-tune and score every network that is cut; one that two runtimes share is trained once."""
    cells = list(wish.cells())
    for number, (way, runtime, seed) in enumerate(cells, 1):
        name = f"seed {seed}, {runtime}, {WAYS[way].label}"
        start = study.cut_folder(way, runtime, seed) / MODEL
        if not (start.parent / "cut.json").exists():
            say(number, len(cells), f"finetune, {name}: not cut yet")
            continue
        folder = tuned_folder(study, way, runtime, seed)
        epochs = study.epochs - (study.sparsify_epochs if way == OURS else 0)
        settings = Finetune(epochs=epochs, batch=study.batch, distill=False, args=study.args)
        model = finetune(start, None, study.data, settings, study.common(seed), folder)
        found = scored(study, model, folder.with_name(f"{folder.name}.score.json"))
        say(number, len(cells), f"finetune, {name}: mAP50-95 {found['map50_95']:.4f}")


def tuned_folder(study: Study, way: str, runtime: str, seed: int) -> Path:
    """Return where a network is fine-tuned: the same for networks of the same weights."""
    digest = weights_hash(checkpoint.load_model(study.cut_folder(way, runtime, seed) / MODEL))
    return study.work / "finetune" / f"seed{seed}" / f"{way}-{digest[:12]}"


def weights_hash(model: nn.Module) -> str:
    """Return a hash of a model's weights, by their names."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def scored(study: Study, model: Path, file: Path) -> dict[str, Any]:
    """Return the scores of a checkpoint, kept in a file."""
    key = {"model_sha256": manifest.sha256_file(model), "split": study.split}
    if file.exists() and key.items() <= manifest.read_json(file).items():
        return manifest.read_json(file)
    found = evaluate(model, study.data, split=study.split, imgsz=study.imgsz)
    manifest.write_json(file, key | {name: found[name] for name in (*SCORES, "images", "per_class")})
    return manifest.read_json(file)


def measure_together(study: Study, wish: Wish) -> None:
    """Measure all fine-tuned networks of a runtime and the dense one in one interleaved run."""
    for number, runtime in enumerate(wish.runtimes, 1):
        tuned = {}
        for way, _, seed in Wish(wish.seeds, wish.ways, [runtime]).cells():
            model = tuned_model(study, way, runtime, seed)
            if model is not None:
                network = checkpoint.load_model(model)
                tuned.setdefault(checkpoint.structure_hash(network), network)
        file = measured_file(study, runtime)
        known = manifest.read_json(file)["networks"] if file.exists() else {}
        if tuned and not tuned.keys() <= known.keys():
            file.parent.mkdir(parents=True, exist_ok=True)
            manifest.write_json(file, _measure_together(study, runtime, tuned, study.dense(wish.seeds[0])))
        say(number, len(wish.runtimes), f"measure, {runtime}: {len(tuned)} networks")


def _measure_together(study: Study, runtime: str, tuned: dict[str, nn.Module], dense: Path) -> dict[str, Any]:
    wanted = study.wanted(runtime)
    with tempfile.TemporaryDirectory() as scratch:
        named = {"dense": checkpoint.load_model(dense), **{key[:16]: network for key, network in tuned.items()}}
        files = {
            name: {runtime: variants.export(network, name, wanted, Path(scratch))} for name, network in named.items()
        }
        record = quietly_measured(study, files, "standard")
    cells = {cell["model"]: cell for cell in record["cells"]}
    found = {comparison["model"]: comparison for comparison in record["comparisons"]}
    networks = {
        key: {"ms": cells[key[:16]]["p50_ms"], **{name: found[key[:16]][name] for name in ("speedup", "interval")}}
        for key in tuned
    }
    return {"dense_ms": cells["dense"]["p50_ms"], "networks": networks, "record": record}


def measured_file(study: Study, runtime: str) -> Path:
    """Return where the last measurement of a runtime lies."""
    return study.work / "measured" / f"{runtime}.json"


def tuned_model(study: Study, way: str, runtime: str, seed: int) -> Path | None:
    """Return the fine-tuned network of a cut, or None where there is none yet."""
    if not (study.cut_folder(way, runtime, seed) / "cut.json").exists():
        return None
    folder = tuned_folder(study, way, runtime, seed)
    scores = folder.with_name(f"{folder.name}.score.json")
    return folder / MODEL if scores.exists() else None


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
        "tools": manifest.tool_versions() | {name: number for way in wish.ways for name, number in _needs(way)},
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
    outcome.plot(rows, lines, mean, labels, output.with_suffix(".png"))
    print(outcome.table(lines, labels))
    print(f"report: {output}, {len(rows)} of {len(list(wish.cells()))} networks")


def row_of(study: Study, way: str, runtime: str, seed: int) -> dict[str, Any] | None:
    """Return all that is known of one fine-tuned network; its latency is the last one that was measured."""
    model = tuned_model(study, way, runtime, seed)
    if model is None:
        return None
    found = manifest.read_json(study.cut_folder(way, runtime, seed) / "cut.json")
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


def _needs(way: str) -> list[tuple[str, str]]:
    needs = WAYS[way].needs
    return [needs] if needs else []


def check(study: Study, wish: Wish) -> None:
    """Meet the mistakes before anything is trained.

    Raises:
        SettingsError: the folder holds a study of other settings, a peer is missing, or no epochs are left.
    """
    if study.sparsify_epochs >= study.epochs:
        raise SettingsError(f"--sparsify-epochs {study.sparsify_epochs} must leave some of --epochs {study.epochs}")
    for name, wanted in {need for way in wish.ways for need in _needs(way)}:
        try:
            found = version(name)
        except PackageNotFoundError:
            found = "none"
        if found != wanted:
            raise SettingsError(f"{name} {wanted} is needed, found {found}: pip install --no-deps {name}=={wanted}")
    file, settings = study.work / "settings.json", study.settings()
    if file.exists():
        known = manifest.read_json(file)
        changed = [name for name in settings if known.get(name) != settings[name]]
        if changed:
            raise SettingsError(
                f"{study.work} holds a study with another {', '.join(changed)}: choose another --work, or delete it"
            )
    else:
        study.work.mkdir(parents=True, exist_ok=True)
        manifest.write_json(file, settings)


def say(number: int, total: int, text: str) -> None:
    """Print how far a part has come."""
    print(f"[{number}/{total}] {text}", flush=True)


PARTS = {
    "dense": make_dense,
    "table": make_tables,
    "sparsify": make_sparse,
    "cut": make_cuts,
    "finetune": fine_tune,
    "measure": measure_together,
}


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


if __name__ == "__main__":
    run_app(main)
