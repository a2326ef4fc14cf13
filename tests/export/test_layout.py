"""The layout that is exported computes what the trained one does."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from ultralytics.nn.modules.block import DFL

from export.layout import expected_distance
from export.onnx import export_onnx


@pytest.mark.parametrize("bins", [4, 16])
@pytest.mark.parametrize("scale", [1.0, 300.0])  # beyond 88 an exponential is no float32 any more
def test_distances_are_those_of_ultralytics(bins: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(2, 4 * bins, 21, generator=generator)
    found = expected_distance(logits, torch.arange(float(bins)))
    torch.testing.assert_close(found, DFL(bins)(logits), rtol=1e-5, atol=1e-5)


def test_distances_of_a_certain_bin_are_its_value() -> None:
    logits = torch.zeros(1, 16, 1)
    logits[0, [1, 4, 11, 14]] = 50.0
    found = expected_distance(logits, torch.tensor([0.0, 1.0, 2.0, 5.0]))
    torch.testing.assert_close(found.flatten(), torch.tensor([1.0, 0.0, 5.0, 2.0]))


def test_the_graph_of_a_detector_has_no_softmax_across_strides(detector: Path, tmp_path: Path) -> None:
    graph = onnx.load(export_onnx(detector, tmp_path / "model.onnx", imgsz=64)).graph
    operations = [node.op_type for node in graph.node]
    assert "Softmax" not in operations
    assert operations.count("ReduceMax") == 1
    assert "Slice" not in operations[: operations.index("ReduceMax")]  # of C2f
