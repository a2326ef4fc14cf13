"""The small detector of narrow.py, as files."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The detector's YAML."""
    from narrow import NARROW

    path = tmp_path_factory.mktemp("models") / "narrow.yaml"
    path.write_text(NARROW)
    return path


@pytest.fixture(scope="session")
def dense(narrow: Path) -> Path:
    """An untrained checkpoint of the detector, with batch norms as a trained one has them."""
    from compress.checkpoint import build_model, save_model
    from topologies import randomised

    path = narrow.with_name("dense.pt")
    save_model(randomised(build_model(str(narrow))), path, {"imgsz": 64})
    return path


@pytest.fixture(scope="session")
def pruned(dense: Path) -> Path:
    """The same detector without 40 % of its channels, chosen at random."""
    from compress.checkpoint import load_model, save_model
    from narrow import prune_at_random

    path = dense.with_name("pruned.pt")
    save_model(prune_at_random(load_model(dense))[0], path, {"imgsz": 64})
    return path
