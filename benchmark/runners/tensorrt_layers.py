"""What each layer of a TensorRT engine takes, by TensorRT's own profiler.

One of the files that run on a device: it needs nothing beside the runner that it is given. No GPU was at hand when this
was written: it is tested against a stand-in.
"""

from __future__ import annotations

import statistics
from typing import Any

WARM_UP, REPEATS = 5, 20
LEFT_OUT = "the copies to and from the GPU"


def layers(runner: Any, session: Any, _: str, images: Any, __: str | None) -> list[dict[str, Any]]:
    """Return name and median `ms` of each layer, in the order in which they run; TensorRT tells no type.

    Args:
        runner: the module `tensorrt_runner`.
        session: what it opened; afterwards it keeps the profiler, so nothing is to be timed any more.
        images: as for `infer`.
    """
    durations: dict[str, list[float]] = {}

    class Profiler(session.trt.IProfiler):
        """Collects what TensorRT reports after each inference."""

        def __init__(self) -> None:
            session.trt.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            """Keep the time of a layer."""
            durations.setdefault(layer_name, []).append(ms)

    # The context keeps no reference of its own.
    profiler = Profiler()
    session.context.profiler = profiler
    for _run in range(WARM_UP + REPEATS):
        runner.infer(session, images)
    return [
        {"name": name, "type": "", "ms": round(statistics.median(found[WARM_UP:]), 4)}
        for name, found in durations.items()
    ]
