"""YOLOv7 as configs/models spells it, through the exporters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from compress.checkpoint import load_model, save_model
from compress.settings import Export, ExportNcnn
from export import ncnn, onnx

NAMES = ("yolov7", "yolov7-tiny", "yolov7-w6")


@pytest.fixture(scope="session")
def make_yolov7(
    make_detector: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory, root: Path
) -> Callable[[str], Path]:
    """Writes a checkpoint with an eighth of the published channels."""

    def make(name: str) -> Path:
        yaml = tmp_path_factory.mktemp("yolov7") / f"{name}.yaml"
        text = (root / "configs" / "models" / yaml.name).read_text()
        for full, small in (("128, 256, 3", "16, 32, 3"), ("256, 512, 3", "32, 64, 3"), ("512, 1024, 3", "64, 128, 3")):
            text = text.replace(f"RepConv, [{full}", f"RepConv, [{small}")  # Ultralytics scales all rows but these
        for width in (256, 512, 1024):
            text = text.replace(f"Index, [{width},", f"Index, [{width // 8},")
        yaml.write_text(f"width_multiple: 0.125\n{text}")
        path = make_detector(yaml.with_suffix(".pt"), str(yaml), one_head=False)
        network = load_model(path)
        # W6 sees maps of one cell in images of 64 px: batch statistics of larger ones do not blow rounding up.
        images = torch.rand(4, 3, 32, 32).repeat_interleave(8, 2).repeat_interleave(8, 3)
        torch.optim.swa_utils.update_bn([images], network)
        save_model(network.eval(), path, {})
        return path

    return make


@pytest.mark.parametrize("name", NAMES)
def test_onnx_and_ncnn_equal_pytorch(
    make_yolov7: Callable[[str], Path], tmp_path: Path, images: list[Path], name: str
) -> None:
    model = make_yolov7(name)
    record = onnx.export_checked(model, tmp_path / f"{name}.onnx", images, 128, Export(parity_images=2))
    assert record["passed"]
    assert record["outputs"][0]["shape"] == [1, 4 + 3, 340 if name == "yolov7-w6" else 336]
    assert any(type(module).__name__ == "RepConv" for module in load_model(model).modules()) == (name == "yolov7")
    folder = tmp_path / f"{name}_ncnn_model"
    assert ncnn.export_checked(model, folder, images, 128, ExportNcnn(parity_images=2))["passed"]
