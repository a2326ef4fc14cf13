"""What can be mended without any training, after a cut or after sparsity: it is tried, and the best is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.pruning.batch_norm import recalibrate_batch_norm
from compress.pruning.batches import batches
from compress.pruning.consumers import find_consumers
from compress.pruning.folding import fold_removed
from compress.pruning.reconstruction import reconstruct

if TYPE_CHECKING:
    from torch import Tensor, nn

    from compress.pruning.plan import Plan

AS_TRAINED = "as_trained"
AS_CUT = "as_cut"
FOLDED = "folded"
STATISTICS = "statistics"
RECONSTRUCTED = "reconstructed"
BOTH = "reconstructed_statistics"
_WORDS = {
    AS_TRAINED: "as trained",
    AS_CUT: "as cut",
    FOLDED: "with removed channels folded",
    STATISTICS: "with new batch-norm statistics",
    RECONSTRUCTED: "reconstructed",
    BOTH: "reconstructed and with new batch-norm statistics",
}


@dataclass(frozen=True)
class Repairs:
    """Training images of each repair; those of a repair that is switched off are none.

    Attributes:
        fold: for the means of removed channels (`fold_removed`).
        statistics: for batch norm (`recalibrate_batch_norm`).
        reconstruct: for least squares (`reconstruct`).
    """

    fold: list[Path]
    statistics: list[Path]
    reconstruct: list[Path]


@dataclass(frozen=True)
class Outcome:
    """The score of each candidate, and which one was kept."""

    scores: dict[str, float]
    kept: str

    def metrics(self) -> dict[str, Any]:
        """Return what a manifest says of it."""
        return {"repair_map50_95": {name: round(score, 5) for name, score in self.scores.items()}, "repair": self.kept}

    def __str__(self) -> str:
        """Say it in one line.

        >>> print(Outcome({"as_cut": 0.412, "folded": 0.4551}, "folded"))
        val mAP50-95 0.412 as cut, 0.455 with removed channels folded; kept: with removed channels folded
        """
        scores = ", ".join(f"{score:.3f} {_WORDS[name]}" for name, score in self.scores.items())
        return f"val mAP50-95 {scores}; kept: {_WORDS[self.kept]}"


def repair(
    pruned: nn.Module,
    dense: nn.Module,
    plan: Plan,
    repairs: Repairs,
    imgsz: int,
    score: Callable[[nn.Module], float] | None,
    seed: int = 0,
) -> Outcome | None:
    """Try each repair that has images, and leave the model as the candidate that scores best, the later one of equals.

    Without a score nothing can be compared: batch-norm statistics are estimated anew, and that is all.

    Args:
        score: measures a model on images that no repair has seen.
    """
    if score is None:
        if repairs.statistics:
            recalibrate_batch_norm(pruned, repairs.statistics, imgsz)
        return None
    if not (repairs.fold or repairs.statistics or repairs.reconstruct):
        return None
    return keep_best(pruned, candidates(pruned, dense, plan, repairs, imgsz, seed), score)


def repair_statistics(
    model: nn.Module, images: list[Path], imgsz: int, score: Callable[[nn.Module], float] | None
) -> Outcome | None:
    """Try new batch-norm statistics, and leave the model with those that score best; without a score with new ones.

    Where γ shrank fast those of a training lag behind; where they did not, those are better, as they saw every image
    in many forms.

    Args:
        images: of the training split.
        score: measures a model on images that no statistics are of.
    """
    if score is None:
        recalibrate_batch_norm(model, images, imgsz)
        return None

    def tried() -> Iterator[str]:
        yield AS_TRAINED
        recalibrate_batch_norm(model, images, imgsz)
        yield STATISTICS

    return keep_best(model, tried(), score)


def keep_best(model: nn.Module, tried: Iterable[str], score: Callable[[nn.Module], float]) -> Outcome:
    """Leave a model as the candidate that scores best, the later one of equals.

    Args:
        tried: turns the model, in place, into one candidate after the other, and yields their names.
    """
    scores: dict[str, float] = {}
    kept, best = "", {}
    for name in tried:
        scores[name] = score(model)
        if not kept or scores[name] >= scores[kept]:
            kept, best = name, _state(model)
    _restore(model, best)
    return Outcome(scores, kept)


def candidates(
    pruned: nn.Module, dense: nn.Module, plan: Plan, repairs: Repairs, imgsz: int, seed: int = 0
) -> Iterator[str]:
    """Turn the cut model, in place, into one candidate after the other, and yield their names.

    As it is cut; folded; with new statistics, which take in themselves what a batch norm can fold; reconstructed on top
    of folded; that with new statistics.
    """
    yield AS_CUT
    as_cut = _state(pruned)
    one = next(batches(dense, (repairs.fold or repairs.reconstruct)[:1], imgsz), None)
    consumers = [] if one is None else find_consumers(dense, plan, one)
    if repairs.fold:
        fold_removed(pruned, dense, consumers, batches(dense, repairs.fold, imgsz, "means of removed channels"))
        yield FOLDED
    start = _state(pruned)
    if repairs.statistics:
        _restore(pruned, as_cut)
        recalibrate_batch_norm(pruned, repairs.statistics, imgsz)
        yield STATISTICS
    if repairs.reconstruct:
        _restore(pruned, start)
        reconstruct(pruned, dense, consumers, repairs.reconstruct, imgsz, seed)
        yield RECONSTRUCTED
        if repairs.statistics:
            recalibrate_batch_norm(pruned, repairs.statistics, imgsz)
            yield BOTH


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def _restore(model: nn.Module, state: dict[str, Tensor]) -> None:
    import torch

    with torch.no_grad():
        for name, value in model.state_dict().items():
            value.copy_(state[name])
