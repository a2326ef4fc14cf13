"""A detector small enough for tests that still detects something, and images for it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compress.checkpoint import build_model, save_model


def write_detector(path: Path, cfg: str | dict[str, Any], one_head: bool) -> Path:
    """Write an untrained three-class model that finds something: batch statistics keep its activations alive."""
    torch.manual_seed(0)
    model: Any = build_model(cfg, nc=3)
    model.names = {0: "circle", 1: "square", 2: "star"}
    torch.optim.swa_utils.update_bn([torch.rand(8, 3, 8, 8).repeat_interleave(8, 2).repeat_interleave(8, 3)], model)
    head = model.model[-1]
    for name in ("cv2", "cv3", "one2one_cv2", "one2one_cv3"):
        for layers in getattr(head, name, None) or []:
            torch.nn.init.normal_(layers[-1].weight, std=0.02)
            # Every side of a box about one stride away from its anchor; scores about one half.
            bins = -torch.arange(head.reg_max) if head.reg_max > 1 else torch.ones(1)
            layers[-1].bias.data = bins.repeat(4).float() if name.endswith("cv2") else torch.zeros(head.nc)
    if hasattr(head, "linear"):  # a classifier that is neither sure of a class nor undecided
        torch.nn.init.normal_(head.linear.weight, std=0.1)
    if one_head:
        head.end2end = True
        model.fuse(verbose=False)
    save_model(model.eval(), path, {})
    return path


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def make_detector() -> Callable[..., Path]:
    return write_detector


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory, architectures: dict[str, Any]) -> dict[str, Path]:
    """One very small model of each task beside detection."""
    folder = tmp_path_factory.mktemp("models")
    return {task: write_detector(folder / f"{task}.pt", cfg, one_head=False) for task, cfg in architectures.items()}


@pytest.fixture(scope="session")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_detector(tmp_path_factory.mktemp("detector") / "tiny.pt", "yolov8n.yaml", one_head=False)


@pytest.fixture(scope="session")
def two_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_detector(tmp_path_factory.mktemp("detector") / "two_heads.pt", "yolo26n.yaml", one_head=False)


@pytest.fixture(scope="session")
def end2end(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_detector(tmp_path_factory.mktemp("detector") / "end2end.pt", "yolo26n.yaml", one_head=True)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import cv2

    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    (folder / "images" / "val").mkdir(parents=True)
    for i in range(3):
        image = np.kron(generator.integers(0, 256, (8, 8, 3), np.uint8), np.ones((8, 10, 1), np.uint8))
        cv2.imwrite(str(folder / "images" / "val" / f"{i}.png"), image)
    yaml = folder / "data.yaml"
    yaml.write_text("train: images/val\nval: images/val\nnames: {0: circle, 1: square, 2: star}\n")
    return yaml


@pytest.fixture(scope="session")
def images(data: Path) -> list[Path]:
    return sorted((data.parent / "images" / "val").glob("*.png"))


@pytest.fixture(scope="session")
def ncnn_model(detector: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ncnn folder of the detector, at 64 px."""
    from export.ncnn import export_ncnn

    return export_ncnn(detector, tmp_path_factory.mktemp("ncnn") / "tiny_ncnn_model", imgsz=64)


@pytest.fixture(scope="session")
def onnx_file(detector: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The detector as an ONNX file, at 64 px."""
    from export.onnx import export_onnx

    return export_onnx(detector, tmp_path_factory.mktemp("onnx") / "tiny.onnx", imgsz=64)


@pytest.fixture(scope="session")
def bundle(ncnn_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The deploy bundle of that folder."""
    from export.deploy import write_bundle

    return write_bundle(ncnn_model, tmp_path_factory.mktemp("bundle") / "bundle")


@pytest.fixture(scope="session")
def compile_cpp() -> Callable[..., None]:
    """Call the C++ compiler; what it says is the failure of the test."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs a C++ compiler: no g++ on this machine")

    def call(*arguments: object) -> None:
        command = [compiler, "-std=c++17", "-Wall", "-Wextra", "-Werror", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    return call
