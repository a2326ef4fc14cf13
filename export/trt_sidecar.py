"""What stands beside a TensorRT engine: by what it was built, for what, and what its layers compute in."""

from __future__ import annotations

from collections import Counter
from typing import Any

from compress import manifest
from compress.settings import ExportTrt


def sidecar(
    graph: Any,
    settings: ExportTrt,
    request: dict[str, Any],
    facts: dict[str, Any],
    built: dict[str, Any],
    hashes: dict[str, str],
) -> dict[str, Any]:
    """Return what stands beside an engine; `benchmark.runners.tensorrt_runner` checks it before it loads the engine.

    Args:
        graph: the ONNX model.
        settings: what was asked for.
        request: what the builder was asked for.
        facts: of the machine that built it.
        built: what the builder returned.
        hashes: sha256 of the engine and of the ONNX file.
    """
    from benchmark.runners.onnxruntime_runner import literal

    entries = {item.key: item.value for item in graph.metadata_props}
    arguments = literal(entries.get("args"))
    arguments = arguments if isinstance(arguments, dict) else {}
    suppression = {key: arguments.get(key) for key in ("conf", "iou", "max_det")} if arguments.get("nms") else None
    precisions = Counter(layer["precision"] for layer in built["layers"] if layer["precision"] is not None)
    return {
        "schema": manifest.SCHEMA,
        "engine_bytes": built["bytes"],
        **hashes,
        "calibration_sha256": entries.get("espalier_calibration_sha256"),
        "facts": {key: value for key, value in facts.items() if key != "free_bytes"},
        "settings": settings.model_dump(mode="json"),
        "profiles": request["profiles"],
        "inputs": built["inputs"],
        "outputs": built["outputs"],
        "network_layers": built["network_layers"],
        "layers": len(built["layers"]),
        "precisions": dict(precisions.most_common()),
        "loaded": built["loaded"],
        "build_seconds": built["seconds"],
        "names": _names(literal(entries.get("names"))),
        "stride": literal(entries.get("stride")),
        "task": entries.get("task"),
        "keypoints": literal(entries.get("kpt_shape")),
        "end2end": bool(literal(entries.get("end2end"))) or suppression is not None,
        "suppression": suppression,
    }


def _names(found: Any) -> dict[str, str] | None:
    """Return class names by number, as JSON keeps them."""
    if isinstance(found, (list, tuple)):
        found = dict(enumerate(found))
    return {str(number): str(name) for number, name in found.items()} if isinstance(found, dict) else None


def summary(record: dict[str, Any]) -> str:
    """Say in a line what a sidecar says: version, target, precision and what the layers really compute in."""
    facts, layers = record["facts"], record["precisions"]
    named = ", ".join(f"{count} {precision}" for precision, count in layers.items()) or "not reported"
    place = facts["gpu"] or "no GPU"
    loaded = "loaded and inspected" if record["loaded"] else f"not loaded there ({place})"
    return (
        f"{facts['flavour']} {facts['version']}, {place}, {record['settings']['precision']}; layers by precision: "
        f"{named}; {loaded}"
    )
