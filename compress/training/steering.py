"""λ that steers itself: the penalty is set each epoch so that the wanted share of γ is near zero in time.

Only the least γ are pulled, as many as shall go, ranked anew each epoch; those that stay are left alone, as in Zhuang
et al., "Neuron-level Structured Pruning using Polarization Regularizer", NeurIPS 2020. Under a constant pull λ a γ that
the loss does not care for falls by λ · Σ lr / (1 - momentum). So the largest of the pulled γ is watched: what it has
still to fall, over what the remaining learning rates can pull, is the λ of the next epoch, corrected by how well the
last epochs' pull was followed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from compress.manifest import read_json, write_json

STEERING = "steering.json"  # the course so far, in the stage's folder
END = 0.8  # share of the training at which the wanted share shall be there; afterwards the rest recovers
MOST_CHANGE = 2.0  # of λ from one epoch to the next
LEAST_RESPONSE = 0.1  # of the pull: below it γ do not shrink
TOLERATED_DROP = 0.1  # of the best mAP so far; beyond it λ is halved
_SMOOTHING = 0.5


@dataclass(frozen=True)
class Epoch:
    """What one epoch of sparsity training left.

    Attributes:
        strength: λ of the epoch.
        pull: Σ over its steps of lr / (1 - momentum): by how much λ = 1 alone would have moved a γ.
        quantile: |γ| below which the wanted share of prunable γ lies.
        share: of the prunable γ that are near zero.
        fitness: validation mAP50-95 (or the task's own), between 0 and 1.
    """

    strength: float
    pull: float
    quantile: float
    share: float
    fitness: float


def first_strength(quantile: float, threshold: float, pull: float) -> float:
    """Return λ for the first epoch.

    Args:
        quantile: |γ| at the wanted quantile before the training.
        threshold: |γ| that counts as near zero.
        pull: of all the epochs until `END`.

    >>> first_strength(quantile=1.0, threshold=0.1, pull=90.0)
    0.01
    """
    return max(quantile - threshold, 0.0) / pull if pull > 0 else 0.0


def next_strength(start: float, history: Sequence[Epoch], threshold: float, pull: float) -> float:
    """Return λ for the epoch after `history`.

    Args:
        start: |γ| at the wanted quantile before the training.
        history: of all the epochs so far, at least one.
        threshold: |γ| that counts as near zero.
        pull: of the epochs that are left until `END`; of those until the last one when it is over.
    """
    last = history[-1]
    if last.quantile <= threshold:
        return last.strength / 2  # there: the pull only has to hold what it has
    wanted = (last.quantile - threshold) / (max(response(start, history), LEAST_RESPONSE) * pull) if pull > 0 else 0.0
    wanted = min(max(wanted, last.strength / MOST_CHANGE), last.strength * MOST_CHANGE)
    return min(wanted, last.strength / 2) if suffers(history) else wanted


def response(start: float, history: Sequence[Epoch]) -> float:
    """Return how far γ followed the pull, recent epochs counting more: 1 is all the way, below 0 they grew.

    >>> response(1.0, [Epoch(0.1, 2.0, 0.9, 0.0, 0.5)])
    0.5
    """
    found, before = math.nan, start
    for epoch in history:
        pulled = epoch.strength * epoch.pull
        if pulled > 0:
            now = (before - epoch.quantile) / pulled
            found = now if math.isnan(found) else _SMOOTHING * now + (1 - _SMOOTHING) * found
        before = epoch.quantile
    return 1.0 if math.isnan(found) else round(found, 12)


def suffers(history: Sequence[Epoch]) -> bool:
    """Tell whether the mAP has fallen further below its best than λ may cost."""
    best = max(epoch.fitness for epoch in history)
    return history[-1].fitness < best * (1 - TOLERATED_DROP)


def warning(start: float, history: Sequence[Epoch], threshold: float, left: int) -> str | None:
    """Return what a person should know of the course so far, or None.

    Args:
        start, history, threshold: as for `next_strength`.
        left: epochs until `END`.
    """
    last = history[-1]
    if suffers(history):
        best = max(epoch.fitness for epoch in history)
        return f"mAP fell from {best:.3f} to {last.fitness:.3f}: λ is halved; train longer or ask for a smaller share"
    if last.quantile <= threshold:
        early = left > 0.5 * (left + len(history))
        return "γ shrink too fast: the wanted share is there in less than half of the time" if early else None
    if len(history) >= 3 and response(start, history) < LEAST_RESPONSE:
        return "γ do not shrink, whatever the pull: the loss needs them; ask for a smaller share"
    if left <= 0:
        return f"{last.share:.1%} of the γ are near zero, the wanted share is not reached: train longer"
    return None


class Steering:
    """The course of one training, kept in a file, so that a resumed one goes on as it would have.

    Args:
        folder: of the stage.
        share: of the prunable γ that shall be near zero.
        near_zero: |γ| that counts as near zero, as a share of their mean at the start.
        gammas: |γ| of the prunable channels at the start.
    """

    def __init__(self, folder: Path, share: float, near_zero: float, gammas: np.ndarray) -> None:
        self.path, self.share, self.history = folder / STEERING, share, list[Epoch]()
        if self.path.exists():
            known = read_json(self.path)
            self.start, self.threshold = known["start"], known["threshold"]
            self.history = [Epoch(**epoch) for epoch in known["epochs"]]
        else:
            self.start, self.threshold = _quantile(gammas, share), near_zero * float(gammas.mean())

    def strength(self, epoch: int, epochs: int, pull: Callable[[int], float]) -> float:
        """Return λ of an epoch; what a killed training left of it and of later ones is forgotten.

        Args:
            epoch: from 0.
            epochs: of the whole training.
            pull: tells what λ = 1 will move in an epoch.
        """
        del self.history[epoch:]
        end = self.end(epochs)
        left = sum(pull(e) for e in range(epoch, end if epoch < end else epochs))
        if not self.history:
            return first_strength(self.start, self.threshold, left)
        return next_strength(self.start, self.history, self.threshold, left)

    def record(self, strength: float, pull: float, gammas: np.ndarray, fitness: float, epochs: int) -> str | None:
        """Write down what an epoch left, and return what a person should know."""
        quantile, share = _quantile(gammas, self.share), float((gammas < self.threshold).mean())
        self.history.append(Epoch(strength, pull, quantile, share, fitness))
        course = {"start": self.start, "threshold": self.threshold, "epochs": [asdict(e) for e in self.history]}
        write_json(self.path, course)
        return warning(self.start, self.history, self.threshold, self.end(epochs) - len(self.history))

    @staticmethod
    def end(epochs: int) -> int:
        """Return how many epochs there are until `END`."""
        return max(1, round(END * epochs))


def _quantile(values: np.ndarray, share: float) -> float:
    """Return the largest of the least values, a share of all; not a mean with the next one, which is not pulled."""
    return float(np.quantile(values, share, method="lower"))
