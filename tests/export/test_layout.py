"""The layout that is exported computes what the trained one does."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import onnx
import pytest
import torch
from ultralytics.nn.modules.block import DFL
from ultralytics.nn.modules.conv import Conv
from ultralytics.utils.torch_utils import fuse_conv_and_bn

from export.layout import Halves, expected_distance
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
    assert not {"Slice", "Split"} & set(operations[: operations.index("ReduceMax")])  # of C2f


def test_halves_are_the_two_parts_of_a_convolution() -> None:
    whole = Conv(8, 40, 3, s=2, d=2).eval()
    with torch.no_grad():
        for values in whole.bn.parameters():
            values.uniform_(0.5, 1.5)
    fused = deepcopy(whole)
    fused.conv = fuse_conv_and_bn(fused.conv, fused.bn)
    first, second = Halves(fused, 24)(images := torch.randn(2, 8, 9, 9))
    assert (first.shape[1], second.shape[1]) == (24, 16)
    torch.testing.assert_close(torch.cat([first, second], 1), whole(images))
