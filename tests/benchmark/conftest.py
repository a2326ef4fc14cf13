"""A detector whose files every runtime can open, and an image for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained detector of three classes, whose batch statistics keep its activations alive."""
    import torch

    from compress.checkpoint import build_model, save_model

    torch.manual_seed(0)
    model = build_model("yolov8n.yaml", nc=3)
    torch.optim.swa_utils.update_bn([torch.rand(8, 3, 64, 64)], model)
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.pt"
    save_model(model.eval(), path, {})
    return path


@pytest.fixture(scope="session")
def onnx_file(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The detector as an ONNX file, at 64 px."""
    from export.onnx import export_onnx

    return export_onnx(checkpoint, tmp_path_factory.mktemp("onnx") / "tiny.onnx", imgsz=64)


@pytest.fixture(scope="session")
def ncnn_folder(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The detector as an ncnn folder, at 64 px."""
    from export.ncnn import export_ncnn

    return export_ncnn(checkpoint, tmp_path_factory.mktemp("ncnn") / "tiny_ncnn_model", imgsz=64)


@pytest.fixture
def image() -> np.ndarray:
    """Noise, as a batch of one image of 64 px."""
    return np.random.default_rng(0).random((1, 3, 64, 64), dtype=np.float32)
