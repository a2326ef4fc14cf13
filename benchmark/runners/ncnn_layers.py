"""What each layer of an ncnn model costs, in whatever unit the caller can count.

One of the files that run on a device: it needs numpy and ncnn and nothing else. The network is computed layer after
layer, as ncnn would do it in one go, and a `mark` is taken before and after each: of a clock on a real device, of an
instruction counter on an emulated one.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ncnn as _ncnn
import numpy as np

ncnn: Any = _ncnn  # a compiled module: its names are in no type stub
PARAM = "model.ncnn.param"
REPEATS = 20
LEFT_OUT = "the copies of the outputs and the decoding of the head, in numpy"
_CONVERTED, _AS_IT_IS = 0, 1  # ncnn's types of extraction


def layers(_: Any, session: Any, model: str, images: np.ndarray, counter: str | None) -> list[dict[str, Any]]:
    """Return name, type and cost of each layer: `ms`, or `instructions`. See `LEFT_OUT`.

    Args:
        _: the runner.
        session: what it opened; one on a GPU has no profile, because its layers do not end one by one.
        model: the folder that it opened.
        images: (1, 3, height, width) float32, as for `infer`.
        counter: file in which an emulator counts; null where time is taken.
    """
    if session.gpu is not None:
        return []
    if counter is not None:
        rows = layer_costs(session.net, model, images[0], instruction_mark(counter))
        return [{"name": row["name"], "type": row["type"], "instructions": int(row["cost"])} for row in rows]
    rows = layer_costs(session.net, model, images[0], time.perf_counter_ns, REPEATS)
    return [{"name": row["name"], "type": row["type"], "ms": round(row["cost"] / 1e6, 4)} for row in rows]


def layer_costs(
    net: Any, folder: str, image: np.ndarray, mark: Callable[[], int], repeats: int = 1
) -> list[dict[str, Any]]:
    """Return what each layer costs, in the order of the graph: its name, ncnn's type of it, and the median cost.

    Args:
        net: the network, opened from `folder`.
        folder: the model, as `export.ncnn` writes it.
        image: (3, height, width) float32, as for `ncnn_runner.infer`.
        mark: called before and after each layer; the difference of its two answers is the cost, in its unit:
            `time.perf_counter_ns`, or what `instruction_mark` returns.
        repeats: how many times the network is computed, after a first time that does not count.

    Raises:
        ValueError: the graph cannot be read, or ncnn cannot compute a layer.
    """
    graph = _read_graph(Path(folder) / PARAM)
    runs = [_run(net, graph, image, mark) for _ in range(1 + repeats)][1:]
    return [
        {"name": name, "type": kind, "cost": statistics.median(costs)}
        for (name, kind, _, _), costs in zip(graph, zip(*runs))  # noqa: B905  (Python 3.8 has no `strict`)
    ]


def instruction_mark(path: str) -> Callable[[], int]:
    """Return a mark for an interpreter that counts instructions between pairs of `os.getppid()`, in that file.

    It has to be called in pairs, of which the first answers 0 and the second with the instructions since the first.
    """
    counting = False

    def mark() -> int:
        nonlocal counting
        os.getppid()
        counting = not counting
        return 0 if counting else int(Path(path).read_text(encoding="ascii"))

    return mark


def _run(net: Any, layers: list[tuple[str, str, str, bool]], image: np.ndarray, mark: Callable[[], int]) -> list[int]:
    costs = []
    # A pool like ncnn's own: what is extracted from that one is copied, to outlive it.
    pool = ncnn.PoolAllocator()
    with net.create_extractor() as extractor:
        extractor.set_blob_allocator(pool)
        extractor.input("in0", ncnn.Mat(image))
        for name, _, blob, last in layers:
            status, cost = _extract(extractor, blob, _CONVERTED if last else _AS_IT_IS, mark)
            if status != 0:
                raise ValueError(f"ncnn cannot compute the layer {name} (status {status}): it may be out of memory")
            # It is there now: asking once more costs what asking costs.
            costs.append(max(0, cost - _extract(extractor, blob, _AS_IT_IS, mark)[1]))
    return costs


def _extract(extractor: Any, blob: str, kind: int, mark: Callable[[], int]) -> tuple[int, int]:
    # The form of `extract` without this argument returns a copy. Nothing keeps what this one fills for longer than the
    # call, so the next layer may work in place on it, as in one go.
    output = ncnn.Mat()
    start = mark()
    status = extractor.extract(blob, output, kind)
    return status, mark() - start


def _read_graph(path: Path) -> list[tuple[str, str, str, bool]]:
    """Return of each layer its name, type and first output, and whether no other layer takes one of its outputs."""
    try:
        rows = [line.split() for line in path.read_text(encoding="utf-8").splitlines()[2:] if line.strip()]
        split = [(row[0], row[1], row[4 : 4 + int(row[2])], row[4 + int(row[2]) :][: int(row[3])]) for row in rows]
        taken = {blob for _, _, inputs, _ in split for blob in inputs}
        return [
            (name, kind, outputs[0], not taken.intersection(outputs))
            for kind, name, _, outputs in split
            if kind != "Input"
        ]
    except (OSError, ValueError, IndexError):
        raise ValueError(f"{path} is not a graph of ncnn: export the model again") from None
