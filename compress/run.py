"""The whole pipeline: train → sparsify → prune → fine-tune → export → benchmark. Reads top to bottom.

Each stage reads what the stages before it left and writes its own folder below runs/NAME. A second start skips what
is finished and unchanged and resumes what was interrupted.
"""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from compress import checkpoint, manifest, rounds
from compress.errors import SettingsError, run_app
from compress.finetune import finetune
from compress.planning import plan_pruning
from compress.prune import prune
from compress.pruning.plan_table import print_plan
from compress.settings import ExportTrt, Run, check_imgsz, load_run
from compress.sparsify import sparsify
from compress.tasks import metric_of
from compress.train import Common, train
from compress.training.teacher import check_classes, check_teacher

RECORD = "run.json"


def run(settings: Run, command: str, runs: Path = Path("runs")) -> dict[str, Any]:
    """Run a pipeline to its end and return its summary, which is also `runs/NAME/summary.json`."""
    from compress.data.dataset import resolve

    checkpoint.require(settings.model)
    folder = runs / settings.name
    with manifest.lock(folder, chosen_by="name"):
        known: dict[str, Any] = {}
        if (folder / RECORD).exists():
            known = manifest.read_json(folder / RECORD)
            manifest.check_schema(known, folder / RECORD)
        data = resolve(settings.data)
        if known.get("config") != settings.model_dump(mode="json"):
            check(settings, data)
        common = Common(imgsz=settings.imgsz, device=settings.device, workers=settings.workers, seed=settings.seed)
        _write_run(folder, settings, command, "running")

        dense = train(settings.model, data, settings.train, common, folder / "01_train")
        start = str(dense) if settings.sparsify.from_trained else settings.model
        if settings.iterations == 1:
            sparse = sparsify(start, data, settings.sparsify, common, folder / "02_sparsify", settings.prune)
            cut = prune(sparse, data, settings.prune, settings.imgsz, settings.seed, folder / "03_prune")
            pruned = finetune(cut, dense, data, settings.finetune, common, folder / "04_finetune")
        else:
            score = partial(score_val, data=data, imgsz=settings.imgsz)
            pruned = rounds.run_rounds(start, dense, data, settings, common, folder, score)

        models = {"dense": dense, "pruned": pruned}
        parity = export(models, data, settings, folder / "05_export")
        summary = benchmark(models, parity, data, settings, command, folder)
        _write_run(folder, settings, command, "finished")
    return summary


def check(settings: Run, data: Path) -> None:
    """Meet the mistakes now that would otherwise stop the run after hours of training. Nothing is written.

    Raises:
        EspalierError: a GPU that is not there, a model that cannot be opened, a split that is missing, a training
            argument, image size or budget that cannot work.
    """
    from compress.data.dataset import class_names, images
    from compress.training.launch import check_arguments, check_device

    check_device(settings.device)
    images(data, settings.benchmark.split)
    sections = {"train": settings.train, "sparsify": settings.sparsify, "finetune": settings.finetune}
    for stage, section in sections.items():
        check_arguments(section, stage)
        if section.args.get("single_cls"):
            raise SettingsError(
                f"{stage}: single_cls makes one class of all, and a pipeline scores by those of its data set: "
                "give a data set with one name"
            )
    model: Any = checkpoint.load_trainable(settings.model)
    if checkpoint.task_of(model) == "classify" and settings.finetune.distill:
        raise SettingsError(
            "a classifier has no teacher, Ultralytics distils detectors only: set finetune.distill=false"
        )
    check_imgsz(settings.imgsz, int(max(model.stride)))
    model = checkpoint.with_classes(model, len(class_names(data)))
    if "tensorrt" in settings.benchmark.runtimes:
        _check_tensorrt(settings.trt)
    if settings.export.nms:
        from export.onnx import require_boxes

        require_boxes(model, Path(settings.model))
    if settings.finetune.teacher and settings.finetune.distill:
        check_teacher(model, Path(settings.finetune.teacher), data, settings.finetune, settings.imgsz)
    elif settings.finetune.distill and settings.train.epochs == 0:
        remedy = "give the data set its names in their order, or train it on this data first (train.epochs above 0)"
        check_classes(model, f"{settings.model}, the teacher,", data, remedy)
    if settings.prune.sensitivity:
        from compress.pruning.sensitivity_file import warn_of_others

        warn_of_others(Path(settings.prune.sensitivity), None, data)  # the weights are those that will be trained
    if settings.prune.by_latency:
        tabulate(model, settings)
    # Which widths can be reached does not depend on which channels matter, unless it is their importance that is asked
    # for: that is known after training only.
    least = {"importance": "random"} | ({"keep_importance": 1e-3} if settings.prune.keep_importance else {})
    if settings.iterations == 1:
        plan_pruning(model, settings.prune.model_copy(update=least), settings.imgsz)
    else:
        rounds.check_schedule(model, settings.prune, settings.iterations, settings.imgsz)


def score_val(model: Path, data: Path, imgsz: int) -> float:
    """Return the score of a checkpoint on the val split, which decides about rounds; the test split stays unseen.

    It is the mAP50-95, of a classifier top-1.
    """
    from benchmark.accuracy import evaluate

    found = evaluate(model, data, split="val", imgsz=imgsz)
    return float(found[metric_of(found["task"])])


def tabulate(model: Any, settings: Run) -> None:
    """Make the latency table of a model's structure, where it is not there yet. Latency does not depend on weights."""
    from benchmark.profile import profile
    from compress.latency.measured import wanted_of

    cut = settings.prune
    profile(model, wanted_of(cut, settings.imgsz), Path(cut.table) if cut.table else None)


def _check_tensorrt(settings: ExportTrt) -> None:
    from export import trt, trt_onnx

    trt_onnx.check_static(settings)
    facts = trt.probe(trt.Local(), settings.flavour)
    trt.check_support(settings, facts)
    if facts["gpu"] is None:
        raise SettingsError("benchmark.runtimes names tensorrt, but this machine has no NVIDIA GPU: leave it out")


def export(models: dict[str, Path], data: Path, settings: Run, folder: Path) -> dict[str, Any]:
    """Export every model to ONNX, and to what else is measured; prove each against PyTorch on real images."""
    from export import ncnn, onnx, trt

    records = onnx.export_stage(models, data, settings.imgsz, settings.export, folder)
    if "ncnn" in settings.benchmark.runtimes:
        others = ncnn.export_stage(models, data, settings.imgsz, settings.ncnn, folder / "ncnn")
        records |= {f"{name}, ncnn": record for name, record in others.items()}
    if "tensorrt" in settings.benchmark.runtimes:
        wanted = settings.trt.model_copy(update={"imgsz": str(settings.imgsz)})
        for name, model in models.items():
            record = trt.export_stage(
                model, wanted, trt.Local(), folder / "trt" / name, data=data, cache=trt.default_cache(), name=name
            )
            records[f"{name}, tensorrt"] = record["engine_parity"]
    return records


def files_of(models: dict[str, Path], settings: Run, folder: Path) -> dict[str, dict[str, Path]]:
    """Return the files of each model that are scored, by runtime; all that are timed are among them."""
    exported, wanted = folder / "05_export", settings.benchmark.runtimes
    found = {name: {"torch": path, "onnxruntime": exported / f"{name}.onnx"} for name, path in models.items()}
    for name, files in found.items():
        if "ncnn" in wanted:
            files["ncnn"] = exported / "ncnn" / f"{name}_ncnn_model"
        if "tensorrt" in wanted:
            files["tensorrt"] = exported / "trt" / name / f"{name}.engine"
    return found


def benchmark(
    models: dict[str, Path], parity: dict[str, Any], data: Path, settings: Run, command: str, folder: Path
) -> dict[str, Any]:
    """Score and time the dense and the pruned model, and write summary, report and record."""
    from benchmark import store
    from benchmark.report import print_table, write_report

    artefacts, output = files_of(models, settings, folder), folder / "06_benchmark"
    measure(artefacts, data, settings, output)
    scores, record = manifest.read_json(output / "accuracy.json"), manifest.read_json(output / "latency.json")
    summary = summarise(settings, scores, record, parity, folder, command)
    manifest.write_json(folder / "summary.json", summary)
    write_report(summary, record, folder)
    print_table(summary, record)
    for runtime, path in artefacts["pruned"].items():
        print(f"pruned, for {runtime}: {path}")
    print(f"report: {folder / 'report.html'}")
    for name in ("latency.json", "accuracy.json"):
        store.add(output / name, prefix=f"{settings.name}/")
    return summary


def measure(artefacts: dict[str, dict[str, Path]], data: Path, settings: Run, output: Path) -> None:
    """Write accuracy.json and latency.json of all files, where they are not there, outdated or noisy."""
    from benchmark import latency, runtimes
    from compress.data.dataset import fingerprint

    wanted = settings.benchmark
    inputs = {f"{name}.{runtime}": path for name, files in artefacts.items() for runtime, path in files.items()}
    config = {**wanted.model_dump(mode="json"), "imgsz": settings.imgsz, "seed": settings.seed, "data": str(data)}
    parents = {role: runtimes.sha256(path) for role, path in inputs.items()} | {"data": fingerprint(data)}
    with manifest.lock(output):
        if manifest.is_finished(output, "benchmark", config, parents):
            reason = _doubted(output)
            if reason is None:
                print(f"benchmark: finished before, unchanged: {output}")
                return
            print(f"benchmark: the latency of before {reason}, it is measured again: {output}")
        else:
            manifest.begin(output, "benchmark", config, parents)
        if not (output / "accuracy.json").exists():  # an interrupted start may have come as far as to the timing
            scores = {name: scores_of(files, data, settings) for name, files in artefacts.items()}
            manifest.write_json(output / "accuracy.json", scores)
        timed = {name: {runtime: files[runtime] for runtime in wanted.runtimes} for name, files in artefacts.items()}
        record = latency.measure(
            timed, imgsz=settings.imgsz, threads=wanted.threads, mode=wanted.mode, seed=settings.seed
        )
        manifest.write_json(output / "latency.json", record)
        results = ["accuracy.json", "latency.json"]
        manifest.finish(output, "benchmark", config, parents, results, {}, settings.seed)


def scores_of(files: dict[str, Path], data: Path, settings: Run) -> dict[str, dict[str, Any]]:
    """Return the scores of a model's files by runtime, each with the hash of the file that was scored."""
    from benchmark import runtimes
    from benchmark.accuracy import evaluate

    split, imgsz = settings.benchmark.split, settings.imgsz
    return {
        runtime: {"model_sha256": runtimes.sha256(path), **evaluate(path, data, split=split, imgsz=imgsz)}
        for runtime, path in files.items()
    }


def _doubted(output: Path) -> str | None:
    """Return why the latency of a finished benchmark has to be measured again, or None."""
    from benchmark import freshness

    record = manifest.read_json(output / "latency.json")
    return "is noisy" if record["noisy"] else freshness.outdated_record(record, output)


def summarise(
    settings: Run, scores: dict[str, Any], record: dict[str, Any], parity: dict[str, Any], folder: Path, command: str
) -> dict[str, Any]:
    """Put dense and pruned side by side: accuracy, size, latency, and how much of the MACs cut became speed."""
    cut = rounds.outcome(folder, settings.iterations)
    before_cut = settings.train.epochs if settings.sparsify.from_trained else 0
    epochs = {
        "dense": settings.train.epochs,
        "pruned": before_cut + cut["rounds"] * (settings.sparsify.epochs + settings.finetune.epochs),
    }
    metrics = ("top1", "top5") if "top1" in scores["dense"]["torch"] else ("map50_95", "map50")
    latency: dict[str, dict[str, Any]] = {"dense": {}, "pruned": {}}
    for cell in record["cells"]:
        latency[cell["model"]][cell["runtime"]] = {"p50": cell["p50_ms"], "p90": cell["p90_ms"]}
    sides = {
        name: {
            **{metric: scores[name]["torch"][metric] for metric in metrics},
            f"{metrics[0]}_onnx": scores[name]["onnxruntime"][metrics[0]],
            "params": cut["params"][index],
            "macs": cut["macs"][index],
            "file_bytes": (folder / "05_export" / f"{name}.onnx").stat().st_size,
            "epochs": epochs[name],
            "latency_ms": latency[name],
        }
        for index, name in enumerate(("dense", "pruned"))
    }
    macs_speedup = sides["dense"]["macs"] / sides["pruned"]["macs"]
    speedup = {c["runtime"]: c["speedup"] for c in record["comparisons"]}
    return {
        "name": settings.name,
        "imgsz": settings.imgsz,
        "data": Path(settings.data).name,
        "split": settings.benchmark.split,
        **sides,
        "macs_speedup": macs_speedup,
        "speedup": speedup,
        "speedup_interval": {c["runtime"]: c["interval"] for c in record["comparisons"]},
        "realised": {runtime: value / macs_speedup for runtime, value in speedup.items()},
        "parity": parity,
        "oracle_error": cut["oracle_error"],
        "commands": [command],
    }


def dry_run(settings: Run) -> None:
    """Print the plan that the pipeline would make for its model as it is now, and stop."""
    from compress.data.dataset import GENERATED, class_names, resolve

    wanted, data = settings.prune, None
    if wanted.importance == "taylor" or settings.data != GENERATED:  # which would be written, and cannot be wrong
        data = resolve(settings.data)
    model: Any = checkpoint.load_model(settings.model)
    check_imgsz(settings.imgsz, int(max(model.stride)))
    if wanted.importance == "taylor" and data is not None and len(model.names) != len(class_names(data)):
        print("The model does not know these classes yet: this plan goes by bn, that of the run by taylor.")
        wanted = wanted.model_copy(update={"importance": "bn"})
    print_plan(plan_pruning(model, wanted, settings.imgsz, settings.seed, data, settings.model), wanted.budget)
    if settings.iterations > 1:
        rounds.check_schedule(model, settings.prune, settings.iterations, settings.imgsz)
        print(f"The run comes down to this in {settings.iterations} rounds of equal ratios, and may choose otherwise.")


def _write_run(folder: Path, settings: Run, command: str, status: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "schema": manifest.SCHEMA,
        "status": status,
        "command": command,
        "config": settings.model_dump(mode="json"),
        "tools": manifest.tool_versions(),
    }
    manifest.write_json(folder / RECORD, content)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    config: Annotated[Path, typer.Option(help="a file of configs/pipelines/")],
    overrides: Annotated[list[str] | None, typer.Argument(help="settings such as finetune.epochs=20")] = None,
    model: Annotated[str | None, typer.Option(help="overrides the config's model")] = None,
    data: Annotated[str | None, typer.Option(help="overrides the config's data")] = None,
    dry: Annotated[bool, typer.Option("--dry-run", help="print the plan for the model as it is, and stop")] = False,
) -> None:
    """Turn a detector into a smaller, faster, proven one."""
    changes = overrides or []
    given = {key: value for key, value in (("model", model), ("data", data)) if value is not None}
    settings = load_run(config, changes, given)
    if dry:
        dry_run(settings)
        return
    options = [word for key, value in given.items() for word in (f"--{key}", value)]
    run(settings, shlex.join(["python", "-m", "compress.run", "--config", str(config), *options, *changes]))


if __name__ == "__main__":
    run_app(app)
