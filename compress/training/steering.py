"""λ that steers itself: the penalty is set each epoch so that the wanted share of γ is near zero in time.

For a fifth of the training the gradients are watched; then those units are pulled that the loss misses least, as many
as shall go, and the others are left alone, as in Zhuang et al., "Neuron-level Structured Pruning using Polarization
Regularizer", NeurIPS 2020. Under a constant pull λ a γ that the loss does not care for falls by λ · Σ lr / (1 -
momentum). So the largest of the pulled γ are watched: what they have still to fall, over what the remaining learning
rates can pull, is the λ of the next epoch, corrected by how well the last epochs' pull was followed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from compress.manifest import read_json, write_json

STEERING = "steering.json"  # the course so far, in the stage's folder
WATCH = 0.2  # share of the training before anything is pulled
END = 0.8  # share of the training at which the wanted share shall be there; afterwards the rest recovers
MOST_CHANGE = 2.0  # of λ from one epoch to the next
LEAST_RESPONSE = 0.1  # of the pull: below it γ do not shrink
LARGEST = 0.95  # quantile of the pulled γ by which they are judged: a few that hold out shall not double λ for all
TOLERATED_DROP = 0.1  # of the best mAP so far; beyond it λ is halved
_SMOOTHING = 0.5


@dataclass(frozen=True)
class Epoch:
    """What one epoch of sparsity training left.

    Attributes:
        strength: λ of the epoch.
        pull: Σ over its steps of lr / (1 - momentum): by how much λ = 1 alone would have moved a γ.
        quantile: |γ| of the largest of the pulled ones.
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
        quantile: |γ| of the largest of those that are pulled from now on.
        threshold: |γ| that counts as near zero.
        pull: of all the epochs until `END`.

    >>> first_strength(quantile=1.0, threshold=0.1, pull=90.0)
    0.01
    """
    return max(quantile - threshold, 0.0) / pull if pull > 0 else 0.0


def next_strength(start: float, history: Sequence[Epoch], threshold: float, pull: float) -> float:
    """Return λ for the epoch after `history`.

    Args:
        start: |γ| of the largest of the pulled ones, before they were.
        history: of the epochs with a pull so far, at least one.
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
        threshold: |γ| that counts as near zero; a resumed training keeps its own.

    Attributes:
        units: that are pulled; None until they are chosen.
    """

    def __init__(self, folder: Path, threshold: float) -> None:
        self.path, self.threshold, self.history = folder / STEERING, threshold, list[Epoch]()
        self.start, self.units = 0.0, None
        if self.path.exists():
            known = read_json(self.path)
            self.start, self.threshold, self.units = known["start"], known["threshold"], known["units"]
            self.history = [Epoch(**epoch) for epoch in known["epochs"]]

    def choose(self, units: list[int], gammas: np.ndarray) -> None:
        """Decide what is pulled.

        Args:
            units: of the penalty.
            gammas: theirs, |γ|.
        """
        self.units, self.start = units, _largest(gammas)
        self._write()

    def strength(self, number: int, pulls: Sequence[float]) -> float:
        """Return λ of an epoch; what a killed training left of it and of later ones is forgotten.

        Args:
            number: of the epoch, from 0 at the first one with a pull.
            pulls: what λ = 1 will move in each epoch with a pull.
        """
        del self.history[number:]
        end = round(len(pulls) * (END - WATCH) / (1 - WATCH))
        left = sum(pulls[number : end if number < end else None])
        if not self.history:
            return first_strength(self.start, self.threshold, left)
        return next_strength(self.start, self.history, self.threshold, left)

    def record(
        self, strength: float, pull: float, gammas: np.ndarray, pulled: np.ndarray, fitness: float, left: int
    ) -> str | None:
        """Write down what an epoch left, and return what a person should know.

        Args:
            gammas, pulled: |γ| of all prunable channels, and of the pulled ones.
            left: epochs until `END`.
        """
        share = float((gammas < self.threshold).mean())
        self.history.append(Epoch(strength, pull, _largest(pulled), share, fitness))
        self._write()
        return warning(self.start, self.history, self.threshold, left)

    def _write(self) -> None:
        course = {"start": self.start, "threshold": self.threshold, "units": self.units}
        write_json(self.path, {**course, "epochs": [asdict(epoch) for epoch in self.history]})

    @staticmethod
    def pulled(share: float) -> float:
        """Return which share of the γ is pulled for a share of them to be near zero: those that may hold out, too.

        >>> Steering.pulled(0.475)
        0.5
        """
        return min(share / LARGEST, 1.0)

    @staticmethod
    def watched(epochs: int) -> int:
        """Return how many epochs pass before anything is pulled; at least one, as there is nothing to go by else."""
        return max(1, round(WATCH * epochs))

    @staticmethod
    def end(epochs: int) -> int:
        """Return how many epochs there are until `END`."""
        return max(1, round(END * epochs))


def _largest(gammas: np.ndarray) -> float:
    return float(np.quantile(gammas, LARGEST, method="higher")) if gammas.size else 0.0
