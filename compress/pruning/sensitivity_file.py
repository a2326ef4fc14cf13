"""What a sensitivity measurement says, and how it takes the place of an importance between groups.

Importance ranks the channels of a group well; how much a whole group may lose compared with another one, it only
guesses. Here that was measured: the mAP without a share of the group, before any training.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from compress.errors import SettingsError, warn
from compress.settings import Strict, load_yaml, parse

if TYPE_CHECKING:
    from compress.channels.graph import Graph

SCHEMA = 1
_REMEDY = "measure it with python -m compress.sensitivity"
_LEAST = 1e-3  # share of the mAP: below, nothing is told apart
# A cut that cost no measurable mAP is not free: where mAP is silent, a little of the importance speaks.
_OWN = 0.02


class Tie(Strict):
    """The groups that were cut together, the shares of their units that were removed, and the mAP that was left."""

    groups: tuple[str, ...]
    removed: tuple[float, ...]
    map50_95: tuple[float, ...]


class Sensitivity(Strict):
    """A measurement of one model: `structure` is the hash of it, `map50_95` the mAP without any cut.

    `model_sha256` and `data_fingerprint` say which weights and images they were; older files do not.
    """

    schema_version: int
    structure: str
    model: str
    data: str
    split: str
    imgsz: int
    images: int
    importance: str
    repaired: bool
    map50_95: float
    ties: tuple[Tie, ...]
    model_sha256: str | None = None
    data_fingerprint: str | None = None


def load_sensitivity(path: Path, structure: str) -> Sensitivity:
    """Read a measurement of a model of this structure.

    Raises:
        SettingsError: it is missing, damaged, of another version, or of another model.
    """
    found = _read(path)
    if found.structure != structure:
        raise SettingsError(
            f"{path} was measured on another model (structure {found.structure[:12]}, not {structure[:12]}): {_REMEDY}"
        )
    return found


def _read(path: Path) -> Sensitivity:
    content = load_yaml(path)  # JSON is YAML
    if (version := content.get("schema_version")) != SCHEMA:
        raise SettingsError(f"{path} is no sensitivity of schema {SCHEMA} (it has {version}): {_REMEDY}")
    return parse(Sensitivity, content, str(path))


def warn_of_others(path: Path, model: Path | None, data: Path | None) -> None:
    """Say so where a measurement is of other weights or another data set; what is not given is not compared.

    Neither is a model that is no file: an architecture of Ultralytics', or a checkpoint that is yet to be downloaded.

    It is no error: after sparsity training, which moves the weights only a little, that is how it is used.
    """
    from compress.data.dataset import fingerprint
    from compress.manifest import sha256_file

    found = _read(path)
    other = []
    if model is not None and model.is_file() and found.model_sha256 not in (None, sha256_file(model)):
        other.append(f"the weights of {found.model}, not of this {model.name}")
    if data is not None and found.data_fingerprint is not None and found.data_fingerprint != fingerprint(data):
        other.append(f"{found.data} as it was then, not {data}")
    if other:
        warn(
            f"{path} was measured on {' and on '.join(other)}: fine after sparsity training of the same model, "
            "otherwise measure it anew with python -m compress.sensitivity"
        )


def rescaled(graph: Graph, scores: list[np.ndarray], measured: Sensitivity) -> list[np.ndarray]:
    """Return scores of the same order within each group, whose share that is kept is the share of mAP that was left.

    A tie that lost the share p of its units and has the mAP m left of m0 has a loss of -log(m / m0), in equal parts
    over its groups; between the measured shares the kept share of mAP runs straight. Scores can only say that each
    further unit costs at least as much as the one before; where the measurement says otherwise, the nearest such
    curve is taken. Groups that were not measured keep their scores, scaled to a sum of one as all others.

    Args:
        scores: importance per group, arrays of shape (width,).
    """
    numbers = {group.name: index for index, group in enumerate(graph.groups)}
    found = [score / max(float(score.sum()), 1e-300) for score in scores]
    for tie in measured.ties:
        left = np.maximum.accumulate(np.array(tie.map50_95)[::-1])[::-1] / measured.map50_95  # more cut, never better
        loss = -np.log(np.clip(left, _LEAST, 1.0)) / len(tie.groups)
        for name in tie.groups:
            if name in numbers:
                index = numbers[name]
                found[index] = _rescaled(found[index], np.array(tie.removed), loss)
    return found


def _rescaled(score: np.ndarray, removed: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Return scores of one group, summing to one, that keep exp(-loss) when the least ones go."""
    places = np.concatenate([[0.0], removed, [1.0]])
    kept = np.concatenate([[1.0], np.exp(-loss), [0.0]])
    width, order = score.size, np.argsort(score, kind="stable")
    steps = -np.diff(np.interp(np.arange(width + 1) / width, places, kept))
    mixed = (1 - _OWN) * _rising(steps) + _OWN * score[order]
    result = np.empty(width)
    result[order] = mixed
    return result


def _rising(values: np.ndarray) -> np.ndarray:
    """Return the nearest non-decreasing values, in least squares, with the same sum.

    >>> _rising(np.array([1.0, 3.0, 2.0, 4.0])).tolist()
    [1.0, 2.5, 2.5, 4.0]
    """
    blocks: list[tuple[float, int]] = []  # mean and length
    for value in values.tolist():
        mean, count = float(value), 1
        while blocks and blocks[-1][0] > mean:
            before, length = blocks.pop()
            mean, count = (before * length + mean * count) / (length + count), length + count
        blocks.append((mean, count))
    return np.concatenate([np.full(count, mean) for mean, count in blocks])
