"""Which channels of a model stay: its graph, the importance of its channels, and the widths that a target leaves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import checkpoint
from compress.errors import CheckpointError, SettingsError, warn
from compress.settings import Prune, check_imgsz

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from compress.channels.graph import Graph
    from compress.latency.plan import Prediction
    from compress.pruning.budget import Choice, Target
    from compress.pruning.plan import Plan


@dataclass(frozen=True)
class Planned:
    """A model, its channel graph, and what was chosen for it; with a latency target also what is predicted."""

    model: nn.Module
    graph: Graph
    choice: Choice
    plan: Plan
    prediction: Prediction | None = None

    def metrics(self) -> dict[str, Any]:
        """Return parameters and MACs before and after, and the number of groups."""
        before, after = self.graph.widths, self.choice.widths
        return {
            "params": [int(self.graph.params(before)), int(self.graph.params(after))],
            "macs": [int(self.graph.macs(before)), int(self.graph.macs(after))],
            "channels": [int(before.sum()), int(after.sum())],
            "groups": len(self.graph.groups),
            "groups_cut": len(self.plan.groups),
            "frozen": self.graph.frozen(),
            **({"latency": self.prediction.metrics()} if self.prediction else {}),
        }


@dataclass(frozen=True)
class Scored:
    """A model, its channel graph, and the importance of the units of each group, arrays of shape (width,)."""

    model: nn.Module
    graph: Graph
    scores: list[np.ndarray]


def plan_pruning(
    model: nn.Module, settings: Prune, imgsz: int, seed: int = 0, data: Path | None = None, source: str = "MODEL"
) -> Planned:
    """Trace a model, score its channels and choose widths; nothing is cut.

    Args:
        data: data set YAML, for importance that asks the loss.
        source: how the user names the model, for messages.

    Raises:
        SettingsError: the importance needs `data`, the image size does not fit the model's stride, or a latency target
            has no table that fits.
        GraphError: the model cannot be captured.
        BudgetError: no widths under the budget meet the target.
    """
    if settings.by_latency:
        from compress.latency.plan import find_table

        find_table(settings, imgsz, checkpoint.structure_hash(model), source)  # before the work of scoring
    return choose_widths(score(model, settings, imgsz, seed, data), settings, imgsz, source)


def score(model: nn.Module, settings: Prune, imgsz: int, seed: int = 0, data: Path | None = None) -> Scored:
    """Trace a model and score its channels, as `plan_pruning` does.

    Raises:
        CheckpointError: weights of the model are no finite numbers.
    """
    from compress.channels.graph import build_graph
    from compress.pruning.budget import without_effect
    from compress.pruning.importance import importance
    from compress.pruning.sensitivity_file import load_sensitivity, rescaled
    from compress.pruning.taylor import taylor_scores

    if (stride := getattr(model, "stride", None)) is not None:
        check_imgsz(imgsz, int(max(stride)))
    broken = next((name for name, value in model.named_parameters() if not value.isfinite().all()), None)
    if broken is not None:
        raise CheckpointError(
            f"the model's weights are not finite ({broken}): its training diverged, take an earlier one"
        )
    measured = None
    if settings.sensitivity:
        measured = load_sensitivity(Path(settings.sensitivity), checkpoint.structure_hash(model))
    graph = build_graph(model, imgsz)
    for pattern in without_effect(graph, settings.budget):
        warn(f"no layer that could be cut is called '{pattern}', as a rule of the budget is for: see compress.inspect")
    if settings.importance != "taylor":
        scores = importance(graph, model, settings.importance, seed)
    elif data is None:
        raise SettingsError("importance 'taylor' asks the loss on training images: give --data")
    else:
        scores = taylor_scores(graph, model, data, imgsz, seed=seed)
    return Scored(model, graph, rescaled(graph, scores, measured) if measured else scores)


def choose_widths(
    scored: Scored, settings: Prune, imgsz: int, source: str = "MODEL", correction: float = 1.0
) -> Planned:
    """Choose the widths of a scored model.

    Args:
        source: how the user names the model, for messages.
        correction: factor on a latency table.
    """
    from compress.pruning.budget import choose
    from compress.pruning.plan import make_plan

    model, graph, structure = scored.model, scored.graph, checkpoint.structure_hash(scored.model)
    prediction = None
    if settings.by_latency:
        from compress.latency.plan import choose_by_latency, find_table
        from compress.latency.table import amount

        table, path = find_table(settings, imgsz, structure, source)
        choice, prediction = choose_by_latency(graph, scored.scores, settings, table, path, correction)
        asked = (
            f"{settings.keep_importance:.2%} of the importance, the fastest"
            if prediction.target is None
            else amount(prediction.target, table.unit)
        )
        words = f"{asked} on {table.device} in {table.runtime}"
    else:
        target = target_of(settings)
        choice = choose(graph, scored.scores, target, settings.budget)
        words = f"{target.kind} {target.value:g}"
    return Planned(model, graph, choice, make_plan(graph, choice, structure, words, settings.importance), prediction)


def target_of(settings: Prune) -> Target:
    """Return the one target that the settings hold, where it is none of latency."""
    from compress.pruning.budget import Target

    if settings.percent is not None:
        return Target("percent", settings.percent)
    if settings.macs is not None:
        return Target("macs", settings.macs)
    assert settings.params is not None, "a latency is no target of MACs or channels"
    return Target("params", settings.params)
