"""Mixed precision: which layers stay in float, as few as the mAP needs, whatever the runtime.

The answers of a search (the mAP of a candidate, the error of a layer) take long to find, so each is on disk at once and
a search that was killed goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from compress import manifest
from compress.errors import ParityError, RunError

if TYPE_CHECKING:
    import numpy as np

Answer = TypeVar("Answer")


@dataclass
class Choice:
    """Which layers stay in float, and how that was found.

    Attributes:
        float_layers: their names, the most sensitive first.
        map50_95: of the model with these layers in float.
        steps: every number of float layers that was tried, with its mAP.
        sensitivity: per layer the share of all error that it makes alone in 8 bits; empty where none had to be asked.
    """

    float_layers: list[str]
    map50_95: float
    steps: list[dict[str, Any]] = field(default_factory=list)
    sensitivity: dict[str, float] = field(default_factory=dict)


class Journal:
    """What a search has found so far, in a JSON file; answers that belong to other inputs are dropped."""

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path, self.identity = path, manifest.sha256_json(identity)
        try:
            content = manifest.read_json(path)
            kept = content["answers"] if content["identity"] == self.identity else {}
        except (RunError, KeyError, TypeError):
            kept = {}
        self.answers: dict[str, Any] = kept

    def remember(self, question: str, find: Callable[[], Answer]) -> Answer:
        """Return the answer that is on disk, or find it and write it down; it must be a JSON value."""
        if question not in self.answers:
            self.answers[question] = find()
            manifest.write_json(self.path, {"identity": self.identity, "answers": self.answers})
        return self.answers[question]

    def forget(self) -> None:
        """Remove the file: the search is over."""
        self.path.unlink(missing_ok=True)


def choose_float_layers(
    layers: list[str], score: Callable[[list[str]], float], rank: Callable[[], dict[str, float]], lowest: float
) -> Choice:
    """Return the shortest list of layers, the most sensitive first, that keeps the mAP when they stay in float.

    Nothing is ranked where all layers may be quantized. Otherwise the number of float layers is doubled until the mAP
    is there, then bisected: about 2·log₂(n) evaluations.

    Args:
        layers: all that could be quantized.
        score: gives the mAP of the model with these layers in float.
        rank: gives the sensitivity of every layer.
        lowest: the mAP that is needed.

    Raises:
        ParityError: not even with one layer in 8 bits, the least sensitive.
    """
    steps: list[dict[str, Any]] = []

    def passes(order: list[str], count: int) -> bool:
        value = score(order[:count])
        steps.append({"float_layers": count, "map50_95": value})
        needed = f"at least {lowest:.4f}" if lowest > 0 else "any"
        print(f"8 bits: {count} of {len(layers)} layers in float, mAP50-95 {value:.4f}, needed {needed}", flush=True)
        return value >= lowest

    if passes([], 0):
        return Choice([], steps[-1]["map50_95"], steps)
    found = rank()
    order = sorted(layers, key=lambda layer: -found[layer])
    most = len(layers) - 1  # a model with every layer in float is no model in 8 bits
    fails, count = 0, min(1, most)
    while not count or not passes(order, count):
        if count == most:
            best = max(step["map50_95"] for step in steps)
            raise ParityError(
                f"8 bits reach an mAP50-95 of {best:.4f}, {lowest:.4f} is needed: "
                "raise --map-budget, or use the fp32 export"
            )
        fails, count = count, min(2 * count, most)
    while count - fails > 1:
        middle = (fails + count) // 2
        if passes(order, middle):
            count = middle
        else:
            fails = middle
    reached = next(step["map50_95"] for step in steps if step["float_layers"] == count)
    return Choice(order[:count], reached, steps, found)


def sensitivity(
    dense: Path, layers: list[str], images: list[np.ndarray], alone: Callable[[str], Path], journal: Journal
) -> dict[str, float]:
    """Return for every layer its share of the error that all make, each one alone in 8 bits.

    The error of the scores and that of the boxes, weighted by their scores, count alike.

    Args:
        dense: the exported model in fp32.
        layers: all that could be quantized.
        images: arrays (1, 3, imgsz, imgsz).
        alone: writes the model with only this layer in 8 bits, and returns its path.
        journal: keeps the error of each layer.
    """
    import numpy as np

    from benchmark import runtimes
    from compress import usable_cores
    from compress.progress import track

    runner, threads = runtimes.runner_of(dense), usable_cores()

    def outputs(path: Path) -> list[np.ndarray]:
        session = runner.load(str(path), threads)
        return [runner.infer(session, image)[0] for image in images]

    reference = outputs(dense)

    def error(layer: str) -> list[float]:
        pairs = zip(reference, outputs(alone(layer)), strict=True)
        return np.mean([_error(expected, actual) for expected, actual in pairs], axis=0).tolist()

    tracked = track(layers, "sensitivity")
    errors = [journal.remember(f"error of {layer}", partial(error, layer)) for layer in tracked]
    shares = np.array(errors) / np.maximum(np.sum(errors, axis=0), 1e-12)
    return {layer: round(float(share), 6) for layer, share in zip(layers, shares.mean(axis=1), strict=True)}


def _error(expected: np.ndarray, actual: np.ndarray) -> tuple[float, float]:
    """Return the error of the scores as a share of them, and that of the boxes in px, weighted by their scores."""
    import numpy as np

    if expected.shape[-1] == 6:  # an end-to-end head: rows of x1, y1, x2, y2, score, class, best first
        expected, actual = (output[..., :5].transpose(0, 2, 1) for output in (expected, actual))
    scores = np.linalg.norm(actual[:, 4:] - expected[:, 4:]) / max(float(np.linalg.norm(expected[:, 4:])), 1e-12)
    weights = np.square(expected[:, 4:].max(axis=1))
    boxes = np.square(actual[:, :4] - expected[:, :4]).mean(axis=1)
    return float(scores), float(np.sqrt((weights * boxes).sum() / max(float(weights.sum()), 1e-12)))
