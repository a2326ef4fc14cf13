"""From which checkpoint a model file was made, as far as the file itself says."""

from __future__ import annotations

from pathlib import Path

from benchmark import runtimes
from compress import manifest

KEY = "espalier_model_sha256"  # which the exporters write


def origin(model: Path) -> str | None:
    """Return the sha256 of the checkpoint that a model was exported from; null where it does not say.

    Args:
        model: a file or folder that `runtimes.require` has seen; a checkpoint is its own origin.
    """
    kind = runtimes.runtime_of(model)
    if kind == "torch":
        return manifest.sha256_file(model)
    if kind == "onnxruntime":
        return _of_onnx(model)
    return _of_ncnn(model / "metadata.yaml") if kind == "ncnn" else None


def _of_onnx(model: Path) -> str | None:
    found = runtimes.read_onnx(model)
    return next((entry.value for entry in found.metadata_props if entry.key == KEY), None) if found else None


def _of_ncnn(metadata: Path) -> str | None:
    import yaml

    try:
        entries = yaml.safe_load(metadata.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    found = entries.get(KEY) if isinstance(entries, dict) else None
    return found if isinstance(found, str) else None
