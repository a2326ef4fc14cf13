from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from compress.errors import ExportError
from export import stage
from export.parity import TOLERANCES


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".a.onnx.1234" / "inner").mkdir(parents=True)
    (tmp_path / ".a.onnx.1234" / "inner" / "half.onnx").touch()
    (tmp_path / ".a.onnx.search.json").touch()
    (tmp_path / ".b.onnx.1234").mkdir()
    with stage.scratch(tmp_path / "a.onnx") as folder:
        assert folder.is_dir()
        names = {path.name for path in tmp_path.iterdir()}
        assert names == {folder.name, ".a.onnx.search.json", ".b.onnx.1234"}
    assert {path.name for path in tmp_path.iterdir()} == {".a.onnx.search.json", ".b.onnx.1234"}


@pytest.mark.parametrize(
    ("found", "remedy"), [(0, "train or fine-tune the model first, or give --data that it"), (3, "try another opset")]
)
def test_the_remedy_fits_what_the_model_finds(tmp_path: Path, found: int, remedy: str) -> None:
    detections = {"torch": found, "onnxruntime": found, "unmatched": 0, "mean_iou": None}
    record: dict[str, Any] = {"runtime": "onnxruntime", "images": 2, "tolerance": asdict(TOLERANCES["fp32"])}
    record |= {"outputs": [{"max_box_error_px": 0.5}], "detections": detections, "passed": False}
    with pytest.raises(ExportError, match=rf"a\.onnx does not equal PyTorch on 2 images.*: {remedy}"):
        stage.prove(tmp_path / "a.onnx", lambda path: path.touch(), lambda _: record, "try another opset")
    assert [path.name for path in tmp_path.iterdir()] == ["a.rejected.onnx"]
