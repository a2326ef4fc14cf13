"""How long a network and each of its segments take, in a process of its own, beside the dense model.

`python -m benchmark.layer_times RUNTIME DENSE MODEL THREADS IMGSZ SEED INTERVAL` writes one JSON line: medians per
round of both networks, and of the segments of MODEL. A segment is what the runtime computes after one convolution up to
and including the next one. The two take turns every few queries, so that what the machine does meanwhile meets both
alike, until their ratio is known twice as well as INTERVAL asks for (width of its 95 % interval, as a share).

With one thread the clock is the CPU time of that thread, which others on the machine do not lengthen by taking turns;
with more it is the wall clock.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from benchmark import statistics

# The other network has just used the caches: the first queries of a burst bring them back and are not counted. With one
# only, small networks seemed slower on one machine than `benchmark.latency` finds them.
LEAD_IN = 2
# What slows a virtual machine down comes and goes fast: bursts of two, each beside one of the other network, share it,
# longer ones do less (docs/results.md, "How long a burst should be").
BURST = 2
WARM_UP = 3
MIN_ROUNDS, MAX_ROUNDS = 20, 60
# onnxruntime fuses these into the convolution that feeds them, which then bears their name.
_FUSED = {"Relu", "LeakyRelu", "Clip", "Sigmoid", "Tanh", "HardSigmoid", "Add"}


class Segment(NamedTuple):
    """One segment: the name of its convolution in the model's file, the shape of its weight, and its median time."""

    name: str
    shape: list[int]
    cost: float


TAIL = "tail"  # what follows the last convolution


def measure(
    runtime: str, dense: str, model: str, threads: int, imgsz: int, seed: int, max_interval: float
) -> dict[str, Any]:
    """Return what the module says.

    Raises:
        ValueError: a model cannot be opened, or the runtime has no times of layers.
    """
    image = np.random.default_rng(seed).random((1, 3, imgsz, imgsz), dtype=np.float32)
    clock = time.thread_time_ns if threads == 1 else time.perf_counter_ns
    kind = _KINDS[runtime]
    reference, network = kind(dense, threads, image, clock), kind(model, threads, image, clock)
    for query in (reference.run, network.run):
        for _ in range(WARM_UP):
            query()
    record: dict[str, list[float]] = {"dense": [], "whole": []}
    while not is_enough(record["dense"], record["whole"], max_interval, seed):
        for name, query in (("dense", reference.run), ("whole", network.run)):
            record[name].append(burst_ms(query, clock))
        network.burst_by_layer()
    segments = [{"name": s.name, "shape": s.shape, "cost": round(s.cost, 6)} for s in network.segments()]
    return {**record, "segments": segments, "version": reference.version, "precision": reference.precision}


def is_enough(dense: list[float], whole: list[float], max_interval: float, seed: int) -> bool:
    """Tell whether the rounds so far, one value of each network for each, tell the ratio of the two well enough.

    Half of the interval that is asked for: what narrows slowly would else stop on the first lucky draw.

    >>> is_enough([8.0] * 19, [4.0] * 19, 0.05, 0), is_enough([8.0] * 20, [4.0] * 20, 0.05, 0)
    (False, True)
    """
    if not MIN_ROUNDS <= len(dense) < MAX_ROUNDS:
        return len(dense) >= MAX_ROUNDS
    return speedup(dense, whole, seed)[2] <= max_interval / 2


def speedup(dense: list[float], whole: list[float], seed: int) -> tuple[float, statistics.Interval, float]:
    """Return the speed-up over the dense model, its 95 % interval, and the width of that as a share.

    Args:
        dense, whole: one value of each network for each round.

    >>> speedup([8.0, 8.0], [4.0, 4.0], seed=0)
    (2.0, [2.0, 2.0], 0.0)
    """
    ratio, interval = statistics.speedup([[ms] for ms in dense], [[ms] for ms in whole], seed)
    return ratio, interval, (interval[1] - interval[0]) / ratio


def burst_ms(
    query: Callable[[], object], clock: Callable[[], int], lead_in: int = LEAD_IN, counted: int = BURST
) -> float:
    """Return the median time of the queries of a burst that count, in ms.

    Args:
        clock: ns of the time that counts.
        lead_in: queries before them that do not.
    """
    samples = []
    for _ in range(lead_in + counted):
        start = clock()
        query()
        samples.append((clock() - start) / 1e6)
    return round(median(samples[lead_in:]), 5)


class _Network:
    """A model in a runtime, whole and layer by layer."""

    version: str
    precision: str

    def __init__(self, path: str, threads: int, image: np.ndarray, clock: Callable[[], int]) -> None:
        import importlib

        self.runner = importlib.import_module(f"benchmark.runners.{self.runtime}_runner")
        self.path, self.threads, self.image, self.clock = path, threads, image, clock
        self.session = self.runner.load(path, threads)
        facts = self.runner.describe(self.session)
        self.version, self.precision = facts["version"], facts["precision"]

    runtime = ""

    def run(self) -> None:
        self.runner.infer(self.session, self.image)

    def burst_by_layer(self) -> None:
        """Run a burst of queries, layer by layer."""
        raise NotImplementedError

    def segments(self) -> list[Segment]:
        """Return what all bursts have found."""
        raise NotImplementedError


class _Onnxruntime(_Network):
    runtime = "onnxruntime"
    _profiled: Any = None

    def burst_by_layer(self) -> None:
        if self._profiled is None:
            self._profiled = self._open_profiled()
        for _ in range(LEAD_IN + BURST):
            self.runner.infer(self._profiled, self.image)

    def _open_profiled(self) -> Any:
        self._scratch = tempfile.TemporaryDirectory()
        return self.runner.load(self.path, self.threads, profile=str(Path(self._scratch.name) / "profile"))

    def segments(self) -> list[Segment]:
        from benchmark.runners.onnxruntime_layers import durations_us, end_profile

        events = end_profile(self._profiled)
        self._scratch.cleanup()
        shapes = _onnx_shapes(self.path)
        layers = []
        for (name, kind), values_us in durations_us(events).items():
            known = shapes.get(name.removesuffix("_nchwc")) if "Conv" in kind else None
            counted = [value for i, value in enumerate(values_us) if i % (LEAD_IN + BURST) >= LEAD_IN]
            layers.append((*(known or ("", None)), median(counted) / 1000))
        return join(layers)


def _onnx_shapes(path: str) -> dict[str, tuple[str, list[int]]]:
    """Return name and weight shape of each convolution, by all the names that onnxruntime may give it."""
    import onnx

    graph = onnx.load(path).graph
    weights = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    consumers: dict[str, list[Any]] = {}
    for node in graph.node:
        for tensor in node.input:
            consumers.setdefault(tensor, []).append(node)
    found = {}
    convolutions = {n.name: weights[n.input[1]] for n in graph.node if n.op_type == "Conv" and n.input[1] in weights}
    for node in graph.node:
        if node.name in convolutions:
            entry = whole(node.name, convolutions)
            names = [node.name, node.output[0]]
            for follower in consumers.get(node.output[0], []):
                if follower.op_type in _FUSED:
                    names += [follower.name, follower.output[0]]
            for name in names:
                found.setdefault(name, entry)
    return found


def whole(name: str, convolutions: dict[str, list[int]]) -> tuple[str, list[int]]:
    """Return name and weight shape of the model's convolution, of which `export.layout` may have written two halves.

    >>> whole("/cv1/second/Conv", {"/cv1/first/Conv": [16, 8, 1, 1], "/cv1/second/Conv": [32, 8, 1, 1]})
    ('/cv1/Conv', [48, 8, 1, 1])
    """
    stem = name.removesuffix("/first/Conv").removesuffix("/second/Conv")
    halves = [convolutions.get(f"{stem}/{half}/Conv") for half in ("first", "second")]
    if stem == name or None in halves:
        return name, convolutions[name]
    first, second = halves
    return f"{stem}/Conv", [first[0] + second[0], *first[1:]]  # type: ignore[index]


class _Ncnn(_Network):
    runtime = "ncnn"

    def __init__(self, path: str, threads: int, image: np.ndarray, clock: Callable[[], int]) -> None:
        super().__init__(path, threads, image, clock)
        self._bursts: list[list[dict[str, Any]]] = []

    def burst_by_layer(self) -> None:
        from benchmark.runners.ncnn_layers import layer_costs

        self._bursts.append(layer_costs(self.session.net, self.path, self.image[0], self.clock, BURST))

    def segments(self) -> list[Segment]:
        shapes = ncnn_shapes(Path(self.path) / self.runner.PARAM)
        rows = zip(*self._bursts, strict=True)
        return join([(r[0]["name"], shapes.get(r[0]["name"]), median(x["cost"] for x in r) / 1e6) for r in rows])


def ncnn_shapes(param: Path) -> dict[str, list[int]]:
    """Return the weight shape of each convolution by its name."""
    found = {}
    for line in param.read_text(encoding="utf-8").splitlines()[2:]:
        kind, name, inputs, outputs, *rest = line.split()
        if kind in ("Convolution", "ConvolutionDepthWise"):
            settings = dict(word.split("=") for word in rest[int(inputs) + int(outputs) :])
            made, width, size = (int(settings[key]) for key in ("0", "1", "6"))
            height = int(settings.get("11", width))
            found[name] = [made, size // (made * width * height), height, width]
    return found


def join(layers: list[tuple[str, list[int] | None, float]]) -> list[Segment]:
    """Add layers up to the convolution that follows them, and what bears the same name."""
    segments: dict[str, Segment] = {}
    waiting = 0.0
    for name, shape, cost in [*layers, (TAIL, [], 0.0)]:
        waiting += cost
        if shape is not None:
            before = segments[name].cost if name in segments else 0.0
            segments[name] = Segment(name, shape, before + waiting)
            waiting = 0.0
    return list(segments.values())


_KINDS: dict[str, type[_Network]] = {"onnxruntime": _Onnxruntime, "ncnn": _Ncnn}
RUNTIMES = tuple(_KINDS)


def main() -> None:
    """Measure and write the record; a fault of the model becomes a line `{"error": …}`."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as channel:
        os.dup2(2, 1)  # no library writes into the record
        runtime, dense, model, threads, imgsz, seed, interval = sys.argv[1:]
        try:
            record = measure(runtime, dense, model, int(threads), int(imgsz), int(seed), float(interval))
        except Exception as error:
            record = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        channel.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
