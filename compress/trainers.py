"""Ultralytics' trainers, taught to keep pruned shapes and to press batch-norm scales towards zero.

The only file that knows Ultralytics' trainers. Ours read everything they need from the checkpoint and from files beside
their run folder, so they also work where Ultralytics starts them itself: on resume and under DDP. What they add is the
same for every task, so it lies in `Planned` and `Sparse`, and each task has its two classes.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from ultralytics.cfg import get_cfg
from ultralytics.data.utils import check_cls_dataset, check_det_dataset
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.models.yolo.classify import ClassificationTrainer
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.models.yolo.obb import OBBTrainer
from ultralytics.models.yolo.pose import PoseTrainer
from ultralytics.models.yolo.segment import SegmentationTrainer
from ultralytics.nn.distill_model import DistillationModel
from ultralytics.utils import DEFAULT_CFG_DICT, LOGGER, RANK
from ultralytics.utils.torch_utils import unwrap_model

from compress.checkpoint import load_model, plans_of, read_architecture
from compress.distil import DISTIL, Distillation
from compress.errors import CheckpointError, EspalierError, PlanError, SettingsError
from compress.fade import START, Fade, remaining
from compress.graph import build_graph
from compress.labels import FreshClasses, fresh_labels
from compress.manifest import read_json, write_bytes_atomic, write_json
from compress.penalty import NEAR_ZERO, SPARSITY, GammaLog, GroupPenalty
from compress.plan import load_plan, save_plan
from compress.prune import plan_pruning
from compress.settings import AUTO, Prune, Training, parse
from compress.steering import Steering

TRAINING = "training"  # Ultralytics' own folder inside a stage's
# The newest and the best checkpoint, whole even if the process is killed while it writes last.pt and best.pt.
RESUME, RESUME_BEST = "resume.pt", "resume_best.pt"
FADE_PLAN = "fade_plan.json"
_OURS = {"model", "data", "mode", "task", "project", "name", "save_dir", "resume", "exist_ok", "pretrained", "cfg"}
_OURS |= {"epochs", "time"}  # a stage has its own setting for its length, by which it knows whether it is finished
_TRACE_IMGSZ = 64  # groups do not depend on the image size; the smallest that every stride divides is fastest
# All γ shrink a little at every step, so running statistics lag behind, and over a deep network the lags multiply:
# with Ultralytics' 0.03 the validation mAP of a good detector fell from 0.56 to 0.23 (docs/results.md).
_BATCH_NORM_MOMENTUM = 0.1
_LOST_BATCHES = 3  # so many in succession without a finite loss end a sparsity training


class Planned(BaseTrainer):
    """Keeps the shape of a pruned checkpoint, where Ultralytics would rebuild its YAML."""

    notes_file = DISTIL  # what a stage tells its trainer beside Ultralytics' arguments

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
            # A fifth less time for a step; `load_model` undoes it for whoever opens what is saved.
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


class Sparse(Planned):
    """Adds the subgradient of λ·Σ‖γ_unit‖ to the γ of prunable channels (network slimming, Liu et al., ICCV 2017).

    The γ of layers that share a channel form one group penalty, so that they vanish together; for a channel with one γ
    this is plain L1. The term is added when the optimizer steps: after AMP's unscaling and after gradient clipping.
    """

    notes_file = SPARSITY

    def _setup_train(self) -> None:
        super()._setup_train()
        settings = read_json(Path(self.save_dir).parent / SPARSITY)
        self.sr, self.sr_decay = settings["sr"], float(settings["sr_decay"])
        model: Any = unwrap_model(self.model)  # type: ignore[arg-type]  (a module from here on)
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.momentum = max(module.momentum or 0.0, _BATCH_NORM_MOMENTUM)
        graph = build_graph(model, _TRACE_IMGSZ, self.data["channels"])
        self.penalty = GroupPenalty(graph, model)
        optimizer: Any = self.optimizer
        optimizer.register_step_pre_hook(lambda *_: self.pull())
        self.lost_batches = 0
        self.add_callback("on_train_batch_end", Sparse.watch_loss)
        self.pulled, self.pulled_units = 0.0, None
        if self.sr == AUTO:
            self.share = float(settings["share"])
            self.add_callback("on_train_epoch_start", Sparse.steer)
            if RANK in (-1, 0):
                folder, gammas = Path(self.save_dir).parent, self.penalty.values()
                self.steering = Steering(folder, self.share, NEAR_ZERO, gammas)
                self.add_callback("on_fit_epoch_end", Sparse.record_course)
        if settings.get("fade"):
            self.fade: Fade | None = None
            self.add_callback("on_train_epoch_start", Sparse.choose_what_fades)
            self.add_callback("on_train_batch_end", Sparse.count_batch)
            # Right after the step, which moves faded channels a little, and before the average takes the weights over.
            optimizer.register_step_post_hook(lambda *_: self.fade_out())
        if RANK in (-1, 0):
            self.gamma_log = GammaLog(graph, Path(self.save_dir).parent, model)
            self.add_callback("on_fit_epoch_end", Sparse.log_gammas)

    def watch_loss(self) -> None:
        """Stop where the loss stays without a number; a single one of AMP's steps may be."""
        self.lost_batches = 0 if self.loss is None or self.loss.isfinite() else self.lost_batches + 1
        if self.lost_batches == _LOST_BATCHES:
            self.give_up()

    def _handle_nan_recovery(self, epoch: int) -> bool:
        """Stop where Ultralytics would start the epoch again: the same λ would only lead to the same end."""
        corrupted = self.loss is not None and not self.loss.isfinite()
        if corrupted or (self.fitness is not None and self.fitness != self.fitness):
            self.give_up()
        return super()._handle_nan_recovery(epoch)

    def give_up(self) -> None:
        """Say what led nowhere, and what is left.

        Raises:
            EspalierError: always.
        """
        good = self.wdir / RESUME
        kept = f"the last good checkpoint is {good}" if good.exists() else "nothing was trained before"
        raise EspalierError(
            f"sparsity training stopped in epoch {self.epoch + 1}: the loss is no number any more with "
            f"λ {self.current_sr():.3g} (sr {self.sr}); {kept}; start again with a smaller sr or lr0"
        )

    def pull(self) -> None:
        """Add the penalty to the gradients of this step, and count how far λ = 1 would move a γ in it."""
        group: Any = self._gamma_options()
        self.pulled += group["lr"] / (1.0 - group.get("momentum", 0.0))
        self.penalty.add_gradient(self.current_sr(), self.pulled_units)

    def steer(self) -> None:
        """Set λ of this epoch; the first process decides for all."""
        group: Any = self._gamma_options()
        schedule: Any = self.lf
        steps = len(self.train_loader) / max(self.accumulate, 1)
        full = steps * group.get("initial_lr", group["lr"]) / (1.0 - self.args.momentum)
        chosen = [0.0]
        if RANK in (-1, 0):
            chosen = [self.steering.strength(self.epoch, self.epochs, lambda epoch: full * schedule(epoch))]
        if RANK != -1 and self.world_size > 1:
            torch.distributed.broadcast_object_list(chosen, src=0)
        self.steered, self.pulled = chosen[0], 0.0
        # What stays shall not shrink: it would only cost mAP, and make running statistics lag behind.
        self.pulled_units = self.penalty.least(self.share)

    def record_course(self) -> None:
        """Write down what this epoch did to γ, and say what a person should know."""
        if self.epoch < self.epochs:  # Ultralytics calls once more after its final evaluation
            fitness = float(self.fitness or 0.0)
            said = self.steering.record(self.steered, self.pulled, self.penalty.values(), fitness, self.epochs)
            course = self.steering.history[-1]
            shares = f"{course.share:.1%} of γ near zero, {self.steering.share:.1%} wanted"
            LOGGER.info(f"sparsity: λ {course.strength:.2g}, {shares}")
            if said:
                LOGGER.warning(f"sparsity: {said}")

    def _gamma_options(self) -> dict[str, Any]:
        """Return the optimizer's options of batch-norm scales."""
        optimizer: Any = self.optimizer
        groups = optimizer.param_groups
        return next((group for group in groups if group.get("param_group") == "bn"), groups[0])

    def current_sr(self) -> float:
        """Return λ of this epoch: from `sr` it falls linearly to `sr · sr_decay`; or what was steered."""
        if self.sr == AUTO:
            return self.steered
        progress = self.epoch / max(self.epochs - 1, 1)
        return self.sr * (1.0 - (1.0 - self.sr_decay) * min(progress, 1.0))

    def choose_what_fades(self) -> None:
        """Plan the cut when it is time, by the weights as they are then; a resumed training keeps its plan."""
        self.batches = 0
        if self.fade is not None or self.epoch < START * self.epochs:
            return
        folder, model = Path(self.save_dir).parent, unwrap_model(self.model)  # type: ignore[arg-type]
        if not (folder / FADE_PLAN).exists():
            ema: Any = self.ema
            settings = parse(Prune, read_json(folder / SPARSITY)["fade"], SPARSITY)
            planned = plan_pruning(ema.ema, settings, self.args.imgsz, self.args.seed, Path(self.args.data))
            save_plan(planned.plan, folder / FADE_PLAN)
        self.fade = Fade(load_plan(folder / FADE_PLAN), model)
        self.fade.remaining = remaining(self.epoch / self.epochs)  # a resumed training has faded that far

    def fade_out(self) -> None:
        """Let the condemned channels fade to where they should be after this batch."""
        if self.fade is not None:
            self.fade.apply((self.epoch + (self.batches + 1) / len(self.train_loader)) / self.epochs)

    def count_batch(self) -> None:
        """Count the batches of an epoch."""
        self.batches += 1

    def log_gammas(self) -> None:
        """Write γ histograms, the near-zero share and the metrics of this epoch to TensorBoard."""
        if self.epoch < self.epochs:  # Ultralytics calls once more after its final evaluation
            ema: Any = self.ema
            self.gamma_log.write(ema.ema, self.epoch, self.current_sr(), dict(self.metrics or {}))


class PlanTrainer(Planned, DetectionTrainer):
    """Trains detectors."""


class SparsityTrainer(Sparse, DetectionTrainer):
    """Trains detectors with sparsity."""


class SegmentationPlanTrainer(Planned, SegmentationTrainer):
    """Trains instance segmentation."""


class SegmentationSparsityTrainer(Sparse, SegmentationTrainer):
    """Trains instance segmentation with sparsity."""


class PosePlanTrainer(Planned, PoseTrainer):
    """Trains pose estimation."""


class PoseSparsityTrainer(Sparse, PoseTrainer):
    """Trains pose estimation with sparsity."""


class OBBPlanTrainer(Planned, OBBTrainer):
    """Trains detectors of oriented boxes."""


class OBBSparsityTrainer(Sparse, OBBTrainer):
    """Trains detectors of oriented boxes with sparsity."""


class ClassificationPlanTrainer(Planned, ClassificationTrainer):
    """Trains classifiers."""


class ClassificationSparsityTrainer(Sparse, ClassificationTrainer):
    """Trains classifiers with sparsity."""


PLAN_TRAINERS: dict[str, type[Planned]] = {
    "detect": PlanTrainer,
    "segment": SegmentationPlanTrainer,
    "pose": PosePlanTrainer,
    "obb": OBBPlanTrainer,
    "classify": ClassificationPlanTrainer,
}
SPARSITY_TRAINERS: dict[str, type[Sparse]] = {
    "detect": SparsityTrainer,
    "segment": SegmentationSparsityTrainer,
    "pose": PoseSparsityTrainer,
    "obb": OBBSparsityTrainer,
    "classify": ClassificationSparsityTrainer,
}


def run_training(
    trainer: type[Planned],
    model: Path | str,
    data: Path,
    settings: Training,
    folder: Path,
    *,
    resumable: bool,
    overrides: dict[str, Any],
    notes: dict[str, Any] | None = None,
) -> tuple[Path, Path]:
    """Train to the end, resuming where an interrupted run stopped, and return its (best, last) checkpoints.

    Args:
        folder: the stage's folder; Ultralytics writes below `folder/training`.
        resumable: an interrupted start of this very training may lie in `folder`.
        overrides: further Ultralytics arguments (imgsz, device, seed …); `settings.args` has the last word.
        notes: what the trainer reads beside Ultralytics' arguments: λ and fading, or the terms of a distillation.

    Raises:
        SettingsError: an argument that Ultralytics does not know, or that Espalier sets itself.
        EspalierError: the training failed.
    """
    check_arguments(settings.args)
    weights = folder / TRAINING / "weights"
    best, last = weights / "best.pt", weights / "last.pt"
    resume, resume_best = weights / RESUME, weights / RESUME_BEST
    arguments: dict[str, Any] = {
        "model": str(model),
        "data": str(data),
        "save_dir": str(folder / TRAINING),
        "plots": False,
        "patience": 0,  # equal epochs for all that is compared; 0 means never stop early
        "exist_ok": True,
        **settings.model_dump(include=set(Training.model_fields) - {"args"}),
        **overrides,
        **settings.args,
    }
    if resumable and resume.exists():
        if _is_complete(resume, settings.epochs):
            return (resume_best if resume_best.exists() else resume), resume
        if resume_best.exists():
            write_bytes_atomic(best, resume_best.read_bytes())
        arguments |= {"resume": str(resume), "model": str(resume)}
    elif notes:
        write_json(folder / trainer.notes_file, notes)
    try:
        trainer(overrides=arguments).train()
    except EspalierError:
        raise
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise EspalierError(f"training stopped: {reason}; what was saved is in {folder}") from error
    return (best if best.exists() else last), last


def check_arguments(arguments: dict[str, Any]) -> None:
    """Check further Ultralytics arguments of a training: their names and the types of their values.

    Raises:
        SettingsError: an argument that Ultralytics does not know or refuses, or that Espalier sets itself.
    """
    for name in arguments:
        if name in _OURS:
            raise SettingsError(f"args: '{name}' is set by Espalier itself: remove it")
        if name not in DEFAULT_CFG_DICT:
            raise SettingsError(f"args: '{name}' is not an argument of Ultralytics' training")
    try:
        get_cfg(overrides=arguments)
    except (TypeError, ValueError) as error:
        raise SettingsError(f"args: {str(error).splitlines()[0]}") from None


def _is_complete(checkpoint: Path, epochs: int) -> bool:
    """Tell whether a checkpoint is that of the last epoch."""
    from ultralytics.nn.tasks import torch_safe_load

    try:
        epoch = torch_safe_load(str(checkpoint), safe_only=True)[0].get("epoch", -1)
    except Exception as error:
        raise CheckpointError(f"{checkpoint} cannot be opened to resume from: delete its folder ({error})") from None
    return epoch + 1 >= epochs


def trained_model(checkpoint: Path) -> nn.Module:
    """Open what a training left, without the teacher if it distilled."""
    model = load_model(checkpoint)
    return getattr(model, "student_model", model)
