"""What a student learns from a teacher beside Ultralytics' own feature distillation: terms of the loss, torch only.

`Distillation` takes the place of the `loss` of Ultralytics' DistillationModel. That model has the teacher, the hooks
that catch features, and projectors from the student's channels to the teacher's, which the optimizer, the average of
weights, checkpoints and DDP know already; so a pruned student needs no further adapter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

DISTIL = "distil.json"  # what a training reads beside Ultralytics' arguments, in the stage's folder
POSITIVE = 0.1  # an anchor is a positive of the teacher where its best class has this probability


def channel_wise(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return how far the places that the student's channels look at are from those of the teacher's.

    τ²/C · Σ over channels of KL(softmax(teacher/τ) ‖ softmax(student/τ)), softmax over the positions of one channel
    (CWD: Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction", ICCV 2021), mean over the batch.

    Args:
        student: features, shape (batch, channels, height, width).
        teacher: features of the same shape.
        temperature: τ.
    """
    expected = functional.log_softmax(teacher.float().flatten(2) / temperature, dim=2)
    found = functional.log_softmax(student.float().flatten(2) / temperature, dim=2)
    divergence = (expected.exp() * (expected - found)).sum(dim=2)
    return temperature**2 * divergence.mean()


def box_distribution(
    student: torch.Tensor, teacher: torch.Tensor, scores: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Return how far the student's distributions of box sides are from the teacher's, where the teacher finds objects.

    τ² · KL(softmax(teacher/τ) ‖ softmax(student/τ)), softmax over the bins of one side of one anchor's box (LD: Zheng
    et al., "Localization Distillation for Dense Object Detection", CVPR 2022), mean over the four sides and the
    teacher's positive anchors, weighted by its scores; zero where it has none.

    Args:
        student: box logits, shape (batch, 4 · bins, anchors).
        teacher: box logits of the same shape.
        scores: the teacher's class logits, shape (batch, classes, anchors).
        temperature: τ.
    """
    best = scores.float().sigmoid().amax(dim=1)
    weight = best * (best >= POSITIVE)
    batch, _, anchors = teacher.shape
    expected = functional.log_softmax(teacher.float().view(batch, 4, -1, anchors) / temperature, dim=2)
    found = functional.log_softmax(student.float().view(batch, 4, -1, anchors) / temperature, dim=2)
    divergence = (expected.exp() * (expected - found)).sum(dim=2).mean(dim=1)
    return temperature**2 * (divergence * weight).sum() / weight.sum().clamp(min=1e-9)


class Distillation:
    """The loss of a DistillationModel with further terms, which can be switched off.

    Attributes:
        active: whether the student learns from the teacher at all; without, the teacher is not even asked.
    """

    def __init__(self, model: Any, terms: dict[str, float]) -> None:
        """Make the loss of `model`.

        Args:
            terms: weights `cwd` and `ld`, and their `cwd_temperature` and `ld_temperature`.
        """
        self.model, self.terms, self.active = model, terms, True

    def __call__(self, batch: dict[str, Any], preds: Any = None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss, shape (terms,), times the batch size as Ultralytics has it; and its items, detached."""
        model, images = self.model, batch["img"]
        nothing = torch.zeros(1, device=images.device)
        if not self.active:
            loss, items = model.student_model.loss(batch, model.student_model(images) if preds is None else preds)
            return loss, items | dict.fromkeys(("dis_loss", *self._names()), nothing)
        loss, items = type(model).loss(model, batch, preds)
        for name in self._names():
            term = nothing
            if model.training:
                term = self.terms[name.removesuffix("_loss")] * getattr(self, f"_{name}")().view(1)
            items[name] = term.detach()
            loss = torch.cat([loss, term * images.shape[0]])
        return loss, items

    def _names(self) -> list[str]:
        return [f"{name}_loss" for name in ("cwd", "ld") if self.terms[name] > 0.0]

    def _cwd_loss(self) -> torch.Tensor:
        """Return the sum over the feature levels that the head reads, the student projected to the teacher."""
        model, total = self.model, torch.zeros(())
        for level, projector in enumerate(model.projector):
            teacher = model.decouple_outputs(model._teacher_feats[level])
            student = projector(model.decouple_outputs(model._student_feats[level]))
            total = total.to(student.device) + channel_wise(student, teacher, self.terms["cwd_temperature"])
        return total

    def _ld_loss(self) -> torch.Tensor:
        """Return the mean over the branches of the student's head; one without a partner learns from the teacher's."""
        model = self.model
        head = len(model.projector)
        student, teacher = model._student_feats[head], model._teacher_feats[head]
        branches = [branch for branch in ("one2many", "one2one") if branch in student] or ["one2many"]
        losses = []
        for branch in branches:
            mine, example = model.decouple_outputs(student, branch), model.decouple_outputs(teacher, branch)
            temperature = self.terms["ld_temperature"]
            losses.append(box_distribution(mine["boxes"], example["boxes"], example["scores"], temperature))
        return torch.stack(losses).mean()
