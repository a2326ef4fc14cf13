"""Which pipelines a sweep is made of, and which of them are given up after the cut."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from compress.errors import SettingsError
from compress.settings import LATENCY_TARGETS, TARGETS, Run, Strict, load_run, load_yaml, parse


class Sweep(Strict):
    """A sweep, as configs/sweeps/*.yaml spell it: every target with every combination of the grid."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="its folder is runs/NAME")
    pipeline: str = Field(description="a file of configs/pipelines/, which all of them start from")
    targets: tuple[str, ...] = Field(
        default=(), description="such as macs=0.5 or speedup=2x, each in place of the pipeline's own"
    )
    grid: dict[str, tuple[Any, ...]] = Field(
        default_factory=dict, description="values by setting of the pipeline, such as imgsz: [256, 320]"
    )
    limit: int | None = Field(default=None, ge=1, description="run at most so many of the grid, drawn by `seed`")
    seed: int = 0
    early_stop: float | None = Field(
        default=0.2,
        gt=0.0,
        le=1.0,
        description="give a cut up when one of no more cost has so much more mAP50-95 before fine-tuning; null: never",
    )
    together: bool = Field(
        default=True, description="at the end, measure the latency of all that are left in one interleaved run, here"
    )


# A target that is none of latency knows of no device, whatever the pipeline's own target asks for.
_NO_DEVICE = ("prune.device=cpu", *(f"prune.{name}=null" for name in ("host", "runtime", "threads", "table", "memory")))


@dataclass(frozen=True)
class Cut:
    """A pipeline after its cut: its mAP50-95 on the val split before fine-tuning, and what the pruned model costs.

    Attributes:
        kind: of the cost that its target limits.
        costs: by kind; a latency is one of a device, runtime and number of threads.
    """

    name: str
    map50_95: float
    kind: str
    costs: dict[str, float]


def load_sweep(path: Path) -> Sweep:
    """Read a file of configs/sweeps/.

    Raises:
        SettingsError: all the mistakes at once.
    """
    return parse(Sweep, load_yaml(path), str(path))


def expand(sweep: Sweep, overrides: Sequence[str] = (), texts: dict[str, str] | None = None) -> list[Run]:
    """Return the pipelines of a sweep; what they differ in is their name.

    Args:
        overrides: `key=value` settings of all pipelines.
        texts: as `load_run` takes them.

    Raises:
        SettingsError: a combination that is no pipeline.
    """
    if "target" in sweep.grid:
        raise SettingsError(f"sweep {sweep.name}: 'target' is no setting of a pipeline: write targets: [macs=0.5]")
    if both := [key for key in texts or {} if key in sweep.grid]:
        raise SettingsError(f"sweep {sweep.name}: --{both[0]} and the grid both name one: leave one of them out")
    axes = [[(key, value) for value in values] for key, values in sweep.grid.items()]
    if sweep.targets:
        axes.insert(0, [("target", _target(text)) for text in sweep.targets])
    if any(not axis for axis in axes):
        raise SettingsError(f"sweep {sweep.name}: a setting of the grid has no values: remove it")
    points = list(itertools.product(*axes))
    if sweep.limit is not None and sweep.limit < len(points):
        points = [points[i] for i in sorted(random.Random(sweep.seed).sample(range(len(points)), sweep.limit))]
    pipelines = []
    names = [_name(point) for point in points]
    if len(set(names)) < len(names):  # every checkpoint of Espalier is called model.pt
        names = [_name(point, whole=True) for point in points]
    for point, name in zip(points, names, strict=True):
        changes = [*overrides, *(change for key, value in point for change in _changes(key, value))]
        pipelines.append(load_run(Path(sweep.pipeline), [*changes, f"name={name}"], texts))
    if rounds := next((pipeline for pipeline in pipelines if pipeline.iterations != 1), None):
        raise SettingsError(
            f"sweep {sweep.name}: {rounds.name} prunes in {rounds.iterations} rounds, a sweep compares single cuts: "
            "set iterations=1, or run it with compress.run"
        )
    if len({pipeline.data for pipeline in pipelines}) > 1:
        raise SettingsError(
            f"sweep {sweep.name}: its pipelines have several data sets, whose mAP do not compare: make a sweep of each"
        )
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise SettingsError(f"sweep {sweep.name}: two pipelines would be called {twice}: remove the repeated value")
    return pipelines


def hopeless(cuts: Sequence[Cut], margin: float | None) -> dict[str, str]:
    """Return which cuts are dominated by far, and by which one, by name.

    A cut is when another one costs no more and is better by at least `margin` mAP before any fine-tuning. The cost is
    of the kind that the cut's own target limits; another cut of which no such cost is known, as a latency is only where
    a latency is the target, leaves it alone.
    """
    if margin is None:
        return {}
    found = {}
    for cut in cuts:
        comparable = [other for other in cuts if other.costs.get(cut.kind, math.inf) <= cut.costs[cut.kind]]
        better = [other for other in comparable if other.map50_95 >= cut.map50_95 + margin]
        if better:
            found[cut.name] = max(better, key=lambda other: other.map50_95).name
    return found


def on_front(points: dict[str, tuple[float, float]]) -> set[str]:
    """Return the names of the points (cost, score) that none other beats: no dearer, no worse, and not equal."""
    return {
        name
        for name, (cost, score) in points.items()
        if not any(c <= cost and s >= score and (c, s) != (cost, score) for c, s in points.values())
    }


def _target(text: str) -> tuple[str, str]:
    name, separator, amount = text.partition("=")
    if name not in TARGETS or not separator or not amount:
        raise SettingsError(f"target '{text}' must be one of {', '.join(TARGETS)} and an amount, such as macs=0.5")
    return name, amount


def _changes(key: str, value: Any) -> list[str]:
    if key == "target":
        name, amount = value
        changes = [f"prune.{other}={amount if other == name else 'null'}" for other in TARGETS]
        return changes if name in LATENCY_TARGETS else [*changes, *_NO_DEVICE]
    return [f"{key}={json.dumps(value)}"]


def _name(point: Sequence[tuple[str, Any]], *, whole: bool = False) -> str:
    """Return a name for a folder, such as macs-0.5_importance-bn_imgsz-320; of a path its last part, or `whole`."""
    words = []
    for key, value in point:
        label, text = value if key == "target" else (key.rpartition(".")[2], value)
        text = Path(text).stem if isinstance(text, str) and "/" in text and not whole else str(text)
        words.append(f"{label}-{text.removesuffix('.pt').removesuffix('.yaml')}")
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "_".join(words)).strip("-._") or "pipeline"
