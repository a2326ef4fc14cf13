"""What each node of an ONNX graph takes, by onnxruntime's own profiler: the nodes that it runs, fused as it fused them.

One of the files that run on a device: it needs numpy and onnxruntime, beside the runner that it is given.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

WARM_UP, REPEATS = 5, 20
LEFT_OUT = "what onnxruntime does between the nodes"
_NODE, _KERNEL = "Node", "_kernel_time"


def layers(runner: Any, session: Any, model: str, images: np.ndarray, _: str | None) -> list[dict[str, Any]]:
    """Return name, type and median `ms` of each node, in the order in which they run.

    Args:
        runner: the module `onnxruntime_runner`.
        session: what it opened; the profile is taken of another one, so that this one stays as it is.
        model: the file that it opened.
        images: (n, 3, height, width) float32, as for `infer`.
    """
    durations = durations_us(profile(runner, session, model, images))
    runs = WARM_UP + REPEATS
    return [
        {"name": name, "type": kind, "ms": round(_per_run_us(found, runs) / 1000, 4)}
        for (name, kind), found in durations.items()
    ]


def durations_us(events: list[dict[str, Any]]) -> dict[tuple[str, str], list[int]]:
    """Return how long each node took, by name and type, in the order in which they run; one value for each time."""
    found: dict[tuple[str, str], list[int]] = {}
    for event in events:
        if event.get("cat") == _NODE and event["name"].endswith(_KERNEL):
            key = event["name"][: -len(_KERNEL)], event["args"].get("op_name", "")
            found.setdefault(key, []).append(event["dur"])
    return found


def profile(runner: Any, session: Any, model: str, images: np.ndarray) -> list[dict[str, Any]]:
    """Return the events that onnxruntime's profiler writes of `WARM_UP` and `REPEATS` runs; durations are in µs."""
    with tempfile.TemporaryDirectory() as folder:
        profiled = runner.load(model, session.threads, session.variant, str(Path(folder) / "profile"))
        for _ in range(WARM_UP + REPEATS):
            runner.infer(profiled, images)
        return end_profile(profiled)


def end_profile(profiled: Any) -> list[dict[str, Any]]:
    """Return the events of a session that was opened with a profile, and end that."""
    return json.loads(Path(profiled.graph.end_profiling()).read_text(encoding="utf-8"))


def _per_run_us(durations: list[int], runs: int) -> float:
    """Return the median over the runs; a node of a loop runs several times in each."""
    per_run = len(durations) // runs
    if per_run == 0:
        return 0.0
    sums = [sum(durations[i * per_run : (i + 1) * per_run]) for i in range(runs)]
    return statistics.median(sums[WARM_UP:])
