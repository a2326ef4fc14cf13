"""The parts of a sweep's pipelines that can run anywhere: shared trainings, the cut, and the rest.

Trainings that several pipelines have in common are done once, in `shared/`; a pipeline's own folder holds links to
their results, so that each is a run like any other. Cuts are scored before fine-tuning is paid for.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress import checkpoint, manifest
from compress.settings import AUTO, Prune, Run

CUT = "cut.json"
_CUT_IMAGES = 256


@dataclass(frozen=True)
class Job:
    """A pipeline of a sweep, whose runs lie in `folder`; `command` is that of the sweep."""

    settings: Run
    folder: Path
    command: str

    @property
    def run(self) -> Path:
        """The pipeline's own folder."""
        return self.folder / self.settings.name

    @property
    def dense(self) -> Path:
        """Folder of the training of the dense model, named by all that shapes it."""
        return self.folder / "shared" / f"train-{manifest.sha256_json(self._dense())[:12]}"

    @property
    def sparse(self) -> Path:
        """Folder of the sparsity training."""
        settings = self.settings.sparsify
        cut_counts = settings.fade or (settings.sr == AUTO and settings.share is None)
        content = [self._dense(), settings.model_dump(mode="json")]
        if cut_counts:
            content.append(self.settings.prune.without_repairs().model_dump(mode="json"))
        elif settings.sr == AUTO:
            content.append(self.settings.prune.budget.model_dump(mode="json"))
        if settings.fade and self.settings.prune.sensitivity:
            content.append(manifest.input_hashes({"sensitivity": Path(self.settings.prune.sensitivity)}))
        return self.folder / "shared" / f"sparsify-{manifest.sha256_json(content)[:12]}"

    def _dense(self) -> Any:
        names = {"model", "data", "imgsz", "device", "workers", "seed", "train"}
        return self.settings.model_dump(mode="json", include=names)


def train_dense(job: Job) -> None:
    """Train the dense model of a pipeline, for all that share it."""
    from compress.data.dataset import resolve
    from compress.train import train

    train(job.settings.model, resolve(job.settings.data), job.settings.train, _common(job), job.dense)


def train_sparse(job: Job) -> None:
    """Train with sparsity, for all pipelines that share it."""
    from compress.data.dataset import resolve
    from compress.sparsify import sparsify

    settings = job.settings
    start = str(job.dense / "model.pt") if settings.sparsify.from_trained else settings.model
    sparsify(start, resolve(settings.data), settings.sparsify, _common(job), job.sparse, settings.prune)


def cut(job: Job) -> dict[str, Any]:
    """Cut the model of a pipeline; return what is left.

    Returns:
        `macs`, `map50_95` (val split, before fine-tuning), and `kind` and `costs` as `Cut` has them.
    """
    from compress.data.dataset import resolve
    from compress.prune import prune
    from compress.training.mean_ap import sample_images, scorer

    settings, data = job.settings, resolve(job.settings.data)
    with manifest.lock(job.run):
        link_stage(job.dense, job.run / "01_train")
        link_stage(job.sparse, job.run / "02_sparsify")
        sparse, folder = job.run / "02_sparsify" / "model.pt", job.run / "03_prune"
        pruned = prune(sparse, data, settings.prune, settings.imgsz, settings.seed, folder)
        metrics = manifest.read_json(folder / manifest.MANIFEST)["metrics"]
        identity, record = manifest.sha256_file(pruned), job.run / CUT
        known = manifest.read_json(record) if record.exists() else {}
        if known.get("model_sha256") != identity:
            model = checkpoint.load_model(pruned)
            chosen = sample_images(data, "val", _CUT_IMAGES, settings.seed)
            score = scorer(model, data, chosen, settings.imgsz)(model)
            known = {"model_sha256": identity, "macs": metrics["macs"][1], "map50_95": score, "images": len(chosen)}
            manifest.write_json(record, known)
    kind, costs = costs_of(settings.prune, metrics)
    return {**known, "kind": kind, "costs": costs}


def costs_of(settings: Prune, metrics: dict[str, Any]) -> tuple[str, dict[str, float]]:
    """Return the kind of cost that a target limits, and what a pruned model costs, by kind; see `Cut`."""
    costs = {"MACs": metrics["macs"][1], "parameters": metrics["params"][1]}
    if not settings.by_latency:
        return "MACs" if settings.params is None else "parameters", costs
    from compress.latency.plan import place

    found, (device, runtime, threads) = metrics["latency"], place(settings)
    kind = f"{found['unit']} on {device.name} in {runtime}, threads: {threads}"
    measured = [entry["measured"] for entry in found.get("measured", ()) if entry["used"]]
    return kind, {**costs, kind: measured[0] if measured else found["predicted"]}


def finish(job: Job) -> dict[str, Any]:
    """Run a pipeline to its end; what was done before is found finished. Return its summary."""
    from compress.run import run

    return run(job.settings, job.command, job.folder)


def link_stage(source: Path, target: Path) -> None:
    """Make a finished stage appear in another folder too, whole or not at all; another one there is moved aside."""
    found = source / manifest.MANIFEST
    if (target / manifest.MANIFEST).exists() and (target / manifest.MANIFEST).read_bytes() == found.read_bytes():
        return
    making = target.with_name(f".{target.name}.link")
    shutil.rmtree(making, ignore_errors=True)
    for name in [*manifest.read_json(found)["files"], manifest.MANIFEST]:
        place = making / name
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source / name, place)
        except OSError:  # a file system without hard links
            shutil.copy2(source / name, place)
    if target.exists():
        manifest.set_aside(target)
    making.rename(target)


def _common(job: Job) -> Any:
    from compress.train import Common

    settings = job.settings
    return Common(imgsz=settings.imgsz, device=settings.device, workers=settings.workers, seed=settings.seed)
