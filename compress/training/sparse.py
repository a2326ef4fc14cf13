"""Ultralytics' trainer, taught to press batch-norm scales towards zero, and to fade out what will be cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from ultralytics.utils import LOGGER, RANK
from ultralytics.utils.torch_utils import unwrap_model

from compress.channels.graph import build_graph
from compress.errors import EspalierError
from compress.manifest import read_json
from compress.planning import plan_pruning
from compress.pruning.budget import removable
from compress.pruning.plan import load_plan, save_plan
from compress.settings import AUTO, Budget, Prune, parse
from compress.training.fade import START, Fade, remaining
from compress.training.penalty import NEAR_ZERO, SPARSITY, GammaLog, GroupPenalty
from compress.training.planned import RESUME, Planned
from compress.training.steering import Steering

FADE_PLAN = "fade_plan.json"
_TRACE_IMGSZ = 64  # groups do not depend on the image size; the smallest that every stride divides is fastest
# All γ shrink a little at every step, so running statistics lag behind, and over a deep network the lags multiply:
# with Ultralytics' 0.03 the validation mAP of a good detector fell from 0.56 to 0.23 (docs/results.md).
_BATCH_NORM_MOMENTUM = 0.1
_LOST_BATCHES = 3  # so many in succession without a finite loss end a sparsity training


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
            self.most = removable(graph, parse(Budget, settings.get("budget") or {}, SPARSITY))
            self.add_callback("on_train_epoch_start", Sparse.steer)
            if RANK in (-1, 0):
                self.steering = Steering(Path(self.save_dir).parent, NEAR_ZERO * float(self.penalty.values().mean()))
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
        if self.sr == AUTO and self.pulled_units is None:
            self.penalty.watch()
        self.penalty.add_gradient(self.current_sr(), self.pulled_units)

    def steer(self) -> None:
        """Choose what is pulled when it is time, and set λ of this epoch; the first process decides for all."""
        group: Any = self._gamma_options()
        schedule: Any = self.lf
        steps = len(self.train_loader) / max(self.accumulate, 1)
        full = steps * group.get("initial_lr", group["lr"]) / (1.0 - self.args.momentum)
        decided: list[Any] = [0.0, None]
        if RANK in (-1, 0) and self.epoch >= (watched := self.steering.watched(self.epochs)):
            if self.steering.units is None and self.penalty.watched:  # a resumed training watches one epoch more
                units = self.penalty.least(self.steering.pulled(self.share), self.most)
                self.steering.choose(units.nonzero().flatten().tolist(), self.penalty.values(units))
            pulls = [full * schedule(epoch) for epoch in range(watched, self.epochs)]
            if self.steering.units is not None:
                decided = [self.steering.strength(self.epoch - watched, pulls), self.steering.units]
        if RANK != -1 and self.world_size > 1:
            torch.distributed.broadcast_object_list(decided, src=0)
        (self.steered, chosen), self.pulled = decided, 0.0
        if chosen is not None:
            # What stays shall not shrink: it would only cost mAP, and make running statistics lag behind.
            self.pulled_units = torch.zeros(self.penalty.units, dtype=torch.bool, device=self.penalty.device)
            self.pulled_units[chosen] = True

    def record_course(self) -> None:
        """Write down what this epoch did to γ, and say what a person should know."""
        # Ultralytics calls once more after its final evaluation.
        if self.epoch >= self.epochs or self.pulled_units is None:
            return
        fitness, left = float(self.fitness or 0.0), self.steering.end(self.epochs) - self.epoch - 1
        gammas, pulled = self.penalty.values(), self.penalty.values(self.pulled_units)
        said = self.steering.record(self.steered, self.pulled, gammas, pulled, fitness, left)
        share = self.steering.history[-1].share
        LOGGER.info(f"sparsity: λ {self.steered:.2g}, {share:.1%} of γ near zero, {self.share:.1%} wanted")
        if said:
            LOGGER.warning(f"sparsity: {said}")

    def _gamma_options(self) -> dict[str, Any]:
        """Return the optimizer's options of batch-norm scales."""
        optimizer: Any = self.optimizer
        groups = optimizer.param_groups
        scales = [group for group in groups if group.get("param_group") == "bn"]
        # MuSGD has two: those of the head learn three times as fast, and are few.
        return max(scales or groups[:1], key=lambda group: len(group["params"]))

    def current_sr(self) -> float:
        """Return λ of this epoch: from `sr` it falls linearly to `sr · sr_decay`; or what was steered."""
        if self.sr == AUTO:
            return self.steered
        progress = self.epoch / max(self.epochs - 1, 1)
        return self.sr * (1.0 - (1.0 - self.sr_decay) * min(progress, 1.0))

    def choose_what_fades(self) -> None:
        """Plan the cut when it is time, by the weights as they are then; a resumed training keeps its plan."""
        self.batches = 0
        if self.fade is not None or self.epoch < min(START * self.epochs, self.epochs - 1):
            return
        folder, model = Path(self.save_dir).parent, unwrap_model(self.model)  # type: ignore[arg-type]
        # One process plans for all: two plans that differ in a channel would drive their weights apart.
        if RANK in (-1, 0) and not (folder / FADE_PLAN).exists():
            ema: Any = self.ema
            settings = parse(Prune, read_json(folder / SPARSITY)["fade"], SPARSITY)
            planned = plan_pruning(ema.ema, settings, self.args.imgsz, self.args.seed, Path(self.args.data))
            save_plan(planned.plan, folder / FADE_PLAN)
        if RANK != -1 and self.world_size > 1:
            torch.distributed.barrier()
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
