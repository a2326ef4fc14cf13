"""Latency tables of small models, with costs that are known by hand."""

from __future__ import annotations

from typing import Any

from torch import nn

from compress.channels.graph import Graph, build_graph
from compress.checkpoint import structure_hash
from compress.latency.table import Fit, LatencyTable, Segment
from compress.settings import Budget

BUDGET = Budget(multiple_of=2, min_width=2)


def table_of(model: nn.Module, imgsz: int, budget: Budget = BUDGET, **changes: Any) -> tuple[LatencyTable, Graph]:
    """A table in which a segment costs 1 ms, 0.01 ms per channel that it reads, and 0.001 ms per product."""
    graph = build_graph(model, imgsz)
    before = [None, *graph.positions]
    terms = {"constant": 1.0, "reads": 0.01, "product": 0.001}
    segments = tuple(
        Segment(name=f"conv_{i}", tensor=tensor, before=before[i], terms=terms)
        for i, tensor in enumerate(graph.positions)
    )
    content: dict[str, Any] = {
        "unit": "ms",
        "device": "cpu",
        "machine": "a test",
        "runtime": "onnxruntime",
        "runtime_version": "1.0",
        "precision": "fp32",
        "threads": 1,
        "imgsz": imgsz,
        "structure": structure_hash(model),
        "budget": budget,
        "dense": 1.0,
        "dense_interval": (0.9, 1.1),
        "scale": 1.0,
        "offset": 0.5,
        "segments": segments,
        "fit": Fit(variants=1, median_error=0.0, p95_error=0.0),
        **changes,
    }
    return LatencyTable(**content), graph
