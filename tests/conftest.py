"""What every test may use, and an environment in which no test leaves a trace or needs a network."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

# Ultralytics, OpenMP and torch read these once, at their own import, which no test module precedes.
_config = tempfile.TemporaryDirectory(prefix="espalier-tests-")
os.environ["ESPALIER_STORE"] = f"{_config.name}/espalier.sqlite"
os.environ["YOLO_CONFIG_DIR"] = _config.name
os.environ["YOLO_OFFLINE"] = "true"
os.environ.setdefault("OMP_NUM_THREADS", "2")

# Strides 8, 16 and 32: enough for the heads of every task.
BACKBONE: list[Any] = [
    [-1, 1, "Conv", [8, 3, 2]],
    [-1, 1, "Conv", [16, 3, 2]],
    [-1, 1, "C2f", [16, True]],
    [-1, 1, "Conv", [16, 3, 2]],
    [-1, 1, "Conv", [24, 3, 2]],
    [-1, 1, "Conv", [24, 3, 2]],
]
HEADS: dict[str, Any] = {
    "segment": [[3, 4, 5], 1, "Segment", ["nc", 8, 16]],
    "pose": [[3, 4, 5], 1, "Pose", ["nc", "kpt_shape"]],
    "obb": [[3, 4, 5], 1, "OBB", ["nc", 1]],
    "classify": [-1, 1, "Classify", ["nc"]],
    "semantic": [[3, 4], 1, "SemanticSegment", ["nc"]],
    "depth": [[3, 4, 5], 1, "Depth", [16]],
}


@pytest.fixture(scope="session")
def architectures() -> dict[str, dict[str, Any]]:
    """Very small models of each task beside detection, of three classes, as Ultralytics' YAMLs say it."""
    common = {"nc": 3, "kpt_shape": [2, 3], "backbone": BACKBONE}
    return {task: {**common, "head": [head]} for task, head in HEADS.items()}


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a model that Ultralytics has and that we neither train nor export."""
    from compress.checkpoint import build_model, save_model

    path = tmp_path_factory.mktemp("world") / "world.pt"
    head = [[3, 4, 5], 1, "WorldDetect", ["nc", 512, False]]
    save_model(build_model({"nc": 80, "backbone": BACKBONE, "head": [head]}), path, {})
    return path


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return Path(__file__).parents[1]


@pytest.fixture(scope="session")
def shared(root: Path) -> Path:
    """The folder of real data sets and weights beside the repository."""
    folder = root.parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs real data and weights: no folder 'shared' beside the repository")
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The YAML of a generated data set of 16, 8 and 8 images of 96 × 96 pixels."""
    from compress.shapes import Shapes, generate

    return generate(tmp_path_factory.mktemp("tiny") / "shapes", Shapes(train=16, val=8, test=8, imgsz=96))
