"""What every test may use, and an environment in which no test leaves a trace or needs a network."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

# Ultralytics, OpenMP and torch read these once, at their own import, which no test module precedes.
_config = tempfile.TemporaryDirectory(prefix="espalier-tests-")
os.environ["YOLO_CONFIG_DIR"] = _config.name
os.environ["YOLO_OFFLINE"] = "true"
os.environ.setdefault("OMP_NUM_THREADS", "2")


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
