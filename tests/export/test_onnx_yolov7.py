"""YOLOv7 as configs/models spells it, through ONNX."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compress.checkpoint import load_model, save_model
from compress.settings import Export
from export.onnx import export_checked


@pytest.mark.parametrize("name", ["yolov7", "yolov7-tiny", "yolov7-w6"])
def test_onnx_equals_pytorch(make_detector, tmp_path: Path, images: list[Path], root: Path, name: str) -> None:
    yaml = tmp_path / f"{name}.yaml"
    text = (root / "configs" / "models" / yaml.name).read_text()
    for full, small in (("128, 256, 3", "16, 32, 3"), ("256, 512, 3", "32, 64, 3"), ("512, 1024, 3", "64, 128, 3")):
        text = text.replace(f"RepConv, [{full}", f"RepConv, [{small}")  # Ultralytics scales all rows but these
    for width in (256, 512, 1024):
        text = text.replace(f"Index, [{width},", f"Index, [{width // 8},")
    yaml.write_text(f"width_multiple: 0.125\n{text}")
    model = make_detector(tmp_path / f"{name}.pt", str(yaml), one_head=False)
    network = load_model(model)
    # W6 sees maps of one cell in images of 64 px: batch statistics of larger ones do not blow rounding up.
    torch.optim.swa_utils.update_bn([torch.rand(4, 3, 32, 32).repeat_interleave(8, 2).repeat_interleave(8, 3)], network)
    save_model(network.eval(), model, {})
    record = export_checked(model, tmp_path / f"{name}.onnx", images, 128, Export(parity_images=2))
    assert record["passed"]
    assert record["outputs"][0]["shape"] == [1, 4 + 3, 340 if name == "yolov7-w6" else 336]
    assert any(type(module).__name__ == "RepConv" for module in network.modules()) == (name == "yolov7")
