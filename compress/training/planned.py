"""Ultralytics' trainer, taught to keep pruned shapes and to save what a killed training resumes from.

What is added reads everything it needs from the checkpoint and from files beside its run folder, so that it also works
where Ultralytics starts a trainer itself: on resume and under DDP.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from ultralytics.data.utils import check_cls_dataset, check_det_dataset
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.models.yolo.classify import ClassificationTrainer
from ultralytics.nn.distill_model import DistillationModel
from ultralytics.utils.torch_utils import unwrap_model

from compress.checkpoint import files_as_named, plans_of, read_architecture
from compress.data.labels import FreshClasses, fresh_labels
from compress.errors import PlanError
from compress.manifest import read_json, write_bytes_atomic
from compress.training.distil import DISTIL, Distillation

# The newest and the best checkpoint, whole even if the process is killed while it writes last.pt and best.pt.
RESUME, RESUME_BEST = "resume.pt", "resume_best.pt"


class Planned(BaseTrainer):
    """Keeps the shape of a pruned checkpoint, where Ultralytics would rebuild its YAML."""

    notes_file = DISTIL  # what a stage tells its trainer beside Ultralytics' arguments

    @files_as_named()
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

    @files_as_named()
    def train(self) -> Any:
        """Train as Ultralytics does, from the very files that were named."""
        return super().train()

    def get_dataset(self) -> dict[str, Any]:
        """Return the data set that its YAML or folder describes; nothing that a YAML says is run or downloaded."""
        if isinstance(self, ClassificationTrainer):
            return check_cls_dataset(str(self.args.data), split=self.args.split)
        data = check_det_dataset(str(self.args.data), autodownload=False, split=self.args.split)
        return data | {"names": {0: "item"}, "nc": 1} if self.args.single_cls else data

    def build_dataset(self, img_path: str, mode: str = "train", batch: int | None = None) -> Any:
        """Return the images and labels of a split, without a cache of anybody."""
        if isinstance(self, ClassificationTrainer):
            settings: Any = self.args
            split = "train" if mode == "train" else settings.split
            return FreshClasses(img_path, settings, mode == "train", split, self.data["names"])
        with fresh_labels():
            return super().build_dataset(img_path, mode, batch)

    def get_model(self, cfg: Any = None, weights: nn.Module | None = None, verbose: bool = True) -> Any:
        """Return a copy of a pruned checkpoint's own model; any other is built as Ultralytics does.

        Not even the dense shape follows from the YAML: Ultralytics keeps the width of the classification towers of
        whatever it once started from. So the module that the checkpoint carries is the only true account of it.

        Raises:
            PlanError: the data set has another number of classes than the pruned model.
        """
        if isinstance(cfg, str):
            cfg = read_architecture(cfg)
        if weights is None or not plans_of(weights):
            return super().get_model(cfg, weights, verbose)
        classes = len(weights.names)  # type: ignore[arg-type]
        if classes != self.data["nc"]:
            raise PlanError(
                f"the pruned model knows {classes} classes, the data set has {self.data['nc']}: "
                "train the dense model on this data set and prune that"
            )
        points = getattr(weights.model[-1], "kpt_shape", None)  # type: ignore[index]
        if points is not None and list(points) != list(self.data["kpt_shape"]):
            raise PlanError(
                f"the pruned model has key points {list(points)}, the data set has {self.data['kpt_shape']}: "
                "train the dense model on this data set and prune that"
            )
        model = copy.deepcopy(weights)
        model.criterion = None  # type: ignore[assignment]
        model.names = self.data["names"]
        return model

    def _setup_train(self) -> None:
        super()._setup_train()
        if self.device.type == "cpu":
            torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # see compress/__init__.py
            # Steps are faster; `load_model` undoes it for whoever opens what is saved.
            for trained in (self.model, getattr(self.ema, "ema", None)):
                if isinstance(trained, nn.Module):
                    trained.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        model, notes = unwrap_model(self.model), Path(self.save_dir).parent / DISTIL  # type: ignore[arg-type]
        if isinstance(model, DistillationModel) and notes.exists():
            terms = read_json(notes)
            self.off_from = self.epochs - terms["distil_off_epochs"]
            # Only of this model: the average of weights, which is what is saved, has been copied already.
            self.distillation = model.loss = Distillation(model, terms)  # type: ignore[method-assign]
            self.add_callback("on_train_epoch_start", Planned.ask_the_teacher)

    def ask_the_teacher(self) -> None:
        """Distil in this epoch, unless it is one of the last that do not."""
        self.distillation.active = self.epoch < self.off_from

    def _load_checkpoint_state(self, ckpt: Any) -> None:
        """Load as Ultralytics does, which copies the model for its average; the terms of a loss stay out of it."""
        model: Any = unwrap_model(self.model)  # type: ignore[arg-type]
        loss = vars(model).pop("loss", None)
        super()._load_checkpoint_state(ckpt)
        if loss is not None:
            model.loss = loss

    def save_model(self) -> Literal[True]:
        """Save as Ultralytics does, then keep whole copies to resume from."""
        saved = super().save_model()
        content = self.last.read_bytes()
        if self.best_fitness == self.fitness:
            write_bytes_atomic(self.wdir / RESUME_BEST, content)
        write_bytes_atomic(self.wdir / RESUME, content)
        return saved
