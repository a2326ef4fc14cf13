"""Networks of one architecture at other widths, to be measured: drawn under a budget, cut and exported."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmark import runtimes
from benchmark.transports import Adb, Local, Transport
from compress import checkpoint
from compress.errors import BudgetError
from compress.settings import Export, ExportTrt

if TYPE_CHECKING:
    from torch import nn

    from benchmark.observe import Wanted
    from compress.channels.graph import Graph
    from compress.settings import Budget

# Half of the networks have layers that are wide or narrow together, so that what reads many of them meets extremes too.
SPREAD = 0.25


def draw_widths(graph: Graph, budget: Budget, count: int, seed: int = 0) -> np.ndarray:
    """Draw widths that a budget allows, shape (count, groups): the dense ones first, then the least, then at random.

    Raises:
        BudgetError: it allows the dense ones alone.
    """
    from compress.pruning.budget import ties

    tied = ties(graph, budget)
    if all(len(tie.parts) == 1 for tie in tied):
        raise BudgetError("the budget allows no group of channels another width: loosen it")
    generator = np.random.default_rng(seed)
    drawn = np.repeat(graph.widths[None], count, axis=0)
    for row in range(1, count):
        level = generator.random() if row % 2 else None
        for tie in tied:
            place = generator.random() if level is None else level + SPREAD * generator.standard_normal()
            index = int(np.clip(place * len(tie.parts), 0, len(tie.parts) - 1))
            parts = tie.parts[-1] if row == 1 else tie.parts[index]
            for group, units in tie.units.items():
                drawn[row, group] = parts * units
    return drawn


def cut(model: nn.Module, graph: Graph, widths: np.ndarray) -> nn.Module:
    """Return the model with the first channels of each group, as many as `widths` says."""
    from compress.pruning.budget import Choice
    from compress.pruning.plan import make_plan
    from compress.pruning.surgery import apply_plan

    keep = [np.arange(group.width) < width for group, width in zip(graph.groups, widths, strict=True)]
    choice = Choice(keep, ["measured at this width"] * len(keep))
    return apply_plan(model, make_plan(graph, choice, checkpoint.structure_hash(model), "widths", "none"))


def export(model: nn.Module, name: str, wanted: Wanted, folder: Path, place: Transport) -> Path:
    """Write a model as the file that a runtime reads and return its path. Parity is not proven: nobody deploys it.

    Args:
        place: the device, which builds its engines itself.

    Raises:
        ExportError: the model cannot be exported, or there is no TensorRT to build an engine.
    """
    source, kind = folder / f"{name}.pt", runtimes.base(wanted.runtime)
    checkpoint.save_model(model, source, {})
    if kind == "torch":
        return source
    try:
        if kind == "ncnn":
            from export.ncnn import export_ncnn

            return export_ncnn(source, folder / f"{name}_ncnn_model", imgsz=wanted.imgsz, half=wanted.half)
        from export.onnx import export_onnx

        # For TensorRT in fp32: `export.trt` gives the graph its types.
        settings = Export(half=wanted.half and kind == "onnxruntime")
        graph = export_onnx(source, folder / f"{name}.onnx", imgsz=wanted.imgsz, settings=settings)
    finally:
        source.unlink()
    return graph if kind == "onnxruntime" else _build(graph, wanted, folder / name, place)


def export_here(networks: Mapping[str, nn.Module], wanted: Wanted, folder: Path) -> dict[str, dict[str, Path]]:
    """Export networks for this machine and return their files by name and runtime, as `latency.measure` takes them.

    Args:
        networks: by names that are file names too.

    Raises:
        ExportError: as `export`.
    """
    return {
        name: {wanted.runtime: export(network, name, wanted, folder, Local())} for name, network in networks.items()
    }


def _build(graph: Path, wanted: Wanted, folder: Path, place: Transport) -> Path:
    """Build the engine of an ONNX file on the device and return its path."""
    from export import trt

    assert not isinstance(place, Adb)  # no device of adb has the runtime
    precision = "fp16" if wanted.half else "fp32"
    trt.export_stage(graph, ExportTrt(precision=precision), place, folder, cache=trt.default_cache())
    graph.unlink()
    return folder / f"{graph.stem}{trt.ENGINE}"
