"""The ways to cut a network that `equal_latency.py` compares. Each writes a checkpoint for an amount of pruning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from torch import nn

from benchmark import programs
from compress import checkpoint, manifest
from compress.channels.graph import Graph, build_graph
from compress.errors import EspalierError
from compress.prune import prune
from compress.pruning.budget import keep_best, ties
from compress.pruning.importance import importance
from compress.pruning.plan import make_plan
from compress.pruning.surgery import apply_plan
from compress.settings import Budget, Importance, Prune
from scripts.peers.search import Knob
from scripts.studies.latency_prediction import uniform

TIMEOUT_S = 3600


@dataclass(frozen=True)
class Case:
    """What is cut, and for what.

    Attributes:
        start: the checkpoint that is cut.
        table: path of the latency table, which Espalier alone reads.
    """

    start: Path
    data: Path
    imgsz: int
    seed: int
    runtime: str
    budget: Budget
    table: Path


@dataclass(frozen=True)
class Way:
    """A way to cut.

    Attributes:
        label: in tables and plots.
        knob: the amounts that `cut` takes.
        cut: writes the network that an amount leaves of a case to a path.
        needs: packages, as (name, version).
        seedless: an amount leaves the same shapes of every seed, so it is sought once.
    """

    label: str
    knob: Knob
    cut: Callable[[Case, float, Path], None]
    needs: tuple[tuple[str, str], ...] = ()
    seedless: bool = False


def asked(case: Case, speedup: float) -> Prune:
    """Return what Espalier is asked for; what repairs a cut comes later, for all ways alike."""
    return Prune(
        speedup=speedup,
        importance="taylor",
        budget=case.budget,
        runtime=case.runtime,  # type: ignore[arg-type]
        threads=1,
        table=str(case.table),
        recalibrate_images=0,
        fold=False,
    )


def espalier(case: Case, amount: float, path: Path) -> None:
    """Cut as the pipeline does: Taylor importance, latency table, solver, closed loop. The amount is a speed-up."""
    made = prune(case.start, case.data, asked(case, amount), case.imgsz, case.seed, path.with_suffix(""))
    manifest.write_bytes_atomic(path, made.read_bytes())


def uniform_l1(case: Case, amount: float, path: Path) -> None:
    """Remove one share of all layers, rounded to the budget; within a layer the filters of least L1 norm go."""
    _cut(case, lambda graph: uniform(graph, case.budget, 1 - amount), "l1", path)


def at_random(case: Case, amount: float, path: Path) -> None:
    """Take a share of all steps that the budget allows, in an order that the seed draws; so are the channels."""
    _cut(case, lambda graph: random_widths(graph, case.budget, amount, case.seed), "random", path)


def random_widths(graph: Graph, budget: Budget, share: float, seed: int) -> np.ndarray:
    """Return the widths after a share of all steps from one allowed width to the next, shape (groups,).

    The order of the steps depends on the seed alone, so a larger share takes the same steps and more.
    """
    tied = ties(graph, budget)
    steps = [index for index, tie in enumerate(tied) for _ in tie.parts[1:]]
    order = np.random.default_rng(seed).permutation(steps).astype(int)
    taken = np.bincount(order[: round(share * len(order))], minlength=len(tied))
    widths = graph.widths.copy()
    for tie, level in zip(tied, taken.tolist(), strict=True):
        for group, units in tie.units.items():
            widths[group] = tie.parts[level] * units
    return widths


def torch_pruning(case: Case, amount: float, path: Path, *, norm: int, round_to: int | None = None) -> None:
    """Cut with Torch-Pruning in a process of its own; the amount is its pruning ratio.

    Raises:
        EspalierError: the process failed.
    """
    options = {"ratio": amount, "norm": norm, "imgsz": case.imgsz, **({"round-to": round_to} if round_to else {})}
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    command = programs.own("scripts.peers.torch_pruning_cut", case.start.resolve(), path.resolve(), *words)
    done = programs.run(command, TIMEOUT_S, environment=programs.own_environment(1) | {"YOLO_OFFLINE": "true"})
    if done.returncode:
        last_words = (done.stderr.strip().splitlines() or ["no message"])[-1]
        ended = programs.exit_reason(done.returncode)
        raise EspalierError(f"Torch-Pruning at ratio {amount:g} ended with {ended}: {last_words}")


def _cut(case: Case, choose: Callable[[Graph], np.ndarray], method: Importance, path: Path) -> None:
    model, graph = _opened(case.start, case.imgsz)
    scores = importance(graph, model, method, case.seed)
    choice = keep_best(graph, scores, choose(graph), case.budget, "a width of this way")
    pruned = apply_plan(model, make_plan(graph, choice, checkpoint.structure_hash(model), path.stem, method))
    checkpoint.save_model(pruned, path, {**checkpoint.load_training_args(case.start), "imgsz": case.imgsz})


@lru_cache(maxsize=1)
def _opened(start: Path, imgsz: int) -> tuple[nn.Module, Graph]:
    """Return a checkpoint and its graph, which a search needs at every step."""
    model = checkpoint.load_model(start)
    return model, build_graph(model, imgsz)


_RATIO = Knob(0.0, 0.95, 0.35)
_PEER = (("torch-pruning", "1.6.1"),)
WAYS = {
    "espalier": Way("Espalier", Knob(1.0, 8.0, None), espalier),
    "tp_l1": Way("Torch-Pruning, L1", _RATIO, partial(torch_pruning, norm=1), _PEER),
    "tp_l1_round8": Way("Torch-Pruning, L1, round to 8", _RATIO, partial(torch_pruning, norm=1, round_to=8), _PEER),
    "tp_l2": Way("Torch-Pruning, L2", _RATIO, partial(torch_pruning, norm=2), _PEER),
    "tp_l2_round8": Way("Torch-Pruning, L2, round to 8", _RATIO, partial(torch_pruning, norm=2, round_to=8), _PEER),
    "uniform": Way("uniform width, L1", Knob(0.0, 0.75, 0.3), uniform_l1, seedless=True),
    "random": Way("random", Knob(0.0, 1.0, 0.4), at_random),
}
OURS = "espalier"
