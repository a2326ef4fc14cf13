"""What a comparison with the peers is about: its settings, its networks, and where each part of it lies."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import nn

from benchmark.observe import Wanted
from compress import checkpoint, manifest
from compress.errors import SettingsError
from compress.settings import Budget, Sparsity, Training
from compress.sparsify import sparsify
from compress.train import MODEL, Common, train
from scripts.peers.ways import OURS, WAYS, Case, asked

CUT = "cut.json"


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


def check(study: Study, wish: Wish) -> None:
    """Meet the mistakes before anything is trained.

    Raises:
        SettingsError: the folder holds a study of other settings, a peer is missing, or no epochs are left.
    """
    if study.sparsify_epochs >= study.epochs:
        raise SettingsError(f"--sparsify-epochs {study.sparsify_epochs} must leave some of --epochs {study.epochs}")
    for name, wanted in {need for way in wish.ways for need in WAYS[way].needs}:
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


def tuned_folder(study: Study, way: str, runtime: str, seed: int) -> Path:
    """Return where a network is fine-tuned: the same for networks of the same weights."""
    digest = weights_hash(checkpoint.load_model(study.cut_folder(way, runtime, seed) / MODEL))
    return study.work / "finetune" / f"seed{seed}" / f"{way}-{digest[:12]}"


def tuned_model(study: Study, way: str, runtime: str, seed: int) -> Path | None:
    """Return the fine-tuned network of a cut, or None where there is none yet."""
    if not (study.cut_folder(way, runtime, seed) / CUT).exists():
        return None
    folder = tuned_folder(study, way, runtime, seed)
    scores = folder.with_name(f"{folder.name}.score.json")
    return folder / MODEL if scores.exists() else None


def weights_hash(model: nn.Module) -> str:
    """Return a hash of a model's weights, by their names."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def measured_file(study: Study, runtime: str) -> Path:
    """Return where the last measurement of a runtime lies."""
    return study.work / "measured" / f"{runtime}.json"
