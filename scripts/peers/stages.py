"""The parts of a comparison with the peers. What is finished is a file, and is not done again."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from benchmark import latency, variants
from benchmark.accuracy import evaluate
from benchmark.profile import profile
from compress import checkpoint, manifest
from compress.channels.graph import build_graph
from compress.data.dataset import sample_images
from compress.errors import BenchmarkError, BudgetError
from compress.finetune import finetune
from compress.pruning.batch_norm import recalibrate_batch_norm
from compress.settings import Finetune
from compress.train import MODEL
from scripts.peers.search import nearest, next_amount
from scripts.peers.study import CUT, Study, Wish, measured_file, tuned_folder, tuned_model
from scripts.peers.ways import OURS, WAYS

TOLERANCE = 0.02  # of the speed-up
MAX_POINTS = 10  # networks that a search may measure
ATTEMPTS = 3  # at a measurement that other work disturbs
REPAIR_IMAGES = 256
SCORES = ("map50_95", "map50")


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


def fine_tune(study: Study, wish: Wish) -> None:
    """Fine-tune and score every network that is cut; one that two runtimes share is trained once."""
    cells = list(wish.cells())
    for number, (way, runtime, seed) in enumerate(cells, 1):
        name = f"seed {seed}, {runtime}, {WAYS[way].label}"
        start = study.cut_folder(way, runtime, seed) / MODEL
        if not (start.parent / CUT).exists():
            say(number, len(cells), f"finetune, {name}: not cut yet")
            continue
        folder = tuned_folder(study, way, runtime, seed)
        epochs = study.epochs - (study.sparsify_epochs if way == OURS else 0)
        settings = Finetune(epochs=epochs, batch=study.batch, distill=False, args=study.args)
        model = finetune(start, None, study.data, settings, study.common(seed), folder)
        found = scored(study, model, folder.with_name(f"{folder.name}.score.json"))
        say(number, len(cells), f"finetune, {name}: mAP50-95 {found['map50_95']:.4f}")


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
            manifest.write_json(file, interleaved(study, runtime, tuned, study.dense(wish.seeds[0])))
        say(number, len(wish.runtimes), f"measure, {runtime}: {len(tuned)} networks")


def cut(study: Study, way: str, runtime: str, seed: int) -> dict[str, Any]:
    """Return the record of a cut, `cut.json` beside its checkpoint; every measured network on the way there is kept.

    Raises:
        BudgetError: Espalier cannot reach the target under the budget.
        BenchmarkError: the machine is too busy to measure.
    """
    folder = study.cut_folder(way, runtime, seed)
    record, course = folder / CUT, folder / "points.json"
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
            networks = {"dense": checkpoint.load_model(dense), "cut": model}
            files = variants.export_here(networks, wanted, Path(scratch))
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


def interleaved(study: Study, runtime: str, tuned: dict[str, nn.Module], dense: Path) -> dict[str, Any]:
    """Measure networks, by their structure, in turns with the dense one."""
    wanted = study.wanted(runtime)
    with tempfile.TemporaryDirectory() as scratch:
        named = {"dense": checkpoint.load_model(dense), **{key[:16]: network for key, network in tuned.items()}}
        files = variants.export_here(named, wanted, Path(scratch))
        record = quietly_measured(study, files, "standard")
    cells = {cell["model"]: cell for cell in record["cells"]}
    found = {comparison["model"]: comparison for comparison in record["comparisons"]}
    networks = {
        key: {"ms": cells[key[:16]]["p50_ms"], **{name: found[key[:16]][name] for name in ("speedup", "interval")}}
        for key in tuned
    }
    return {"dense_ms": cells["dense"]["p50_ms"], "networks": networks, "record": record}


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


def scored(study: Study, model: Path, file: Path) -> dict[str, Any]:
    """Return the scores of a checkpoint, kept in a file."""
    key = {"model_sha256": manifest.sha256_file(model), "split": study.split}
    if file.exists() and key.items() <= manifest.read_json(file).items():
        return manifest.read_json(file)
    found = evaluate(model, study.data, split=study.split, imgsz=study.imgsz)
    manifest.write_json(file, key | {name: found[name] for name in (*SCORES, "images", "per_class")})
    return manifest.read_json(file)


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
