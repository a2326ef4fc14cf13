"""8-bit ONNX export: as few layers in float as the mAP budget allows, proven against PyTorch like every export."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress import manifest
from compress.errors import ExportError, run_app
from compress.settings import Quantize, parse
from export import stage

if TYPE_CHECKING:
    import numpy as np

STAGE = "quantize"
SUFFIX = ".int8.onnx"
RANKING_IMAGES = 8


@dataclass
class Choice:
    """Which layers stay in float, and how that was found.

    Attributes:
        float_layers: their names, the most sensitive first.
        map50_95: of the graph with these layers in float.
        steps: every number of float layers that was tried, with its mAP.
        sensitivity: per layer the share of all error that it makes alone in 8 bits; empty where none had to be asked.
    """

    float_layers: list[str]
    map50_95: float
    steps: list[dict[str, Any]] = field(default_factory=list)
    sensitivity: dict[str, float] = field(default_factory=dict)


def export_int8(
    model: Path, output: Path, data: Path, calibration: Path, imgsz: int, settings: Quantize
) -> dict[str, Any]:
    """Quantize a model, choose the layers that stay in float, prove parity and measure the latency beside fp32.

    Args:
        model: the checkpoint.
        output: the ONNX file to write; it appears whole or not at all.
        data: data set YAML, whose val split gives the mAP, and images for parity.
        calibration: data set YAML, whose train split calibrates.
        imgsz: side of the square input, px.
        settings: target, method, budget …

    Returns:
        The parity record (see `parity.compare`) with two more keys: `quantization` (calibration and its hash, layers,
        those in float, how they were found) and `latency` (fp32 and int8 on this machine; null for another target).

    Raises:
        DataError: a split has no images, or no labels to compute mAP from.
        ExportError: no choice of layers meets the budget, or parity fails: the file is kept as `NAME.rejected.onnx`.
    """
    import tempfile

    from benchmark.accuracy import evaluate
    from compress.dataset import images
    from export import parity, qdq
    from export.onnx import export_onnx

    stage.require_detector(model)
    scheme = qdq.SCHEMES[settings.target]
    val, chosen = images(data, "val"), _calibration_images(calibration, settings)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as scratch:
        dense = export_onnx(model, Path(scratch) / "fp32.onnx", imgsz=imgsz, opset=settings.opset)
        graph = qdq.load(dense)
        layers = list(qdq.layers_of(graph))
        ranges = qdq.calibrate(dense, (parity.letterbox(path, imgsz) for path in chosen), settings.method, scheme)
        facts = {
            "target": settings.target,
            "method": settings.method,
            "reduce_range": settings.reduce_range,
            "scheme": asdict(scheme),
            "calibration_images": len(chosen),
            "calibration_sha256": _hash(chosen),
            "calibration_images_in_val": len({path.resolve() for path in chosen} & {path.resolve() for path in val}),
        }

        def write(path: Path, in_float: list[str]) -> None:
            quantized = [layer for layer in layers if layer not in in_float]
            made = qdq.quantize(graph, ranges, scheme, quantized, reduce_range=settings.reduce_range)
            _describe(made, facts, in_float)
            manifest.write_bytes_atomic(path, made.SerializeToString(deterministic=True))

        def score(in_float: list[str]) -> float:
            write(Path(scratch) / "candidate.onnx", in_float)
            return evaluate(Path(scratch) / "candidate.onnx", data, imgsz=imgsz)["map50_95"]

        def alone(layer: str) -> Path:
            path = Path(scratch) / "candidate.onnx"
            made = qdq.quantize(graph, ranges, scheme, [layer], carriers=False, reduce_range=settings.reduce_range)
            manifest.write_bytes_atomic(path, made.SerializeToString())
            return path

        def rank() -> dict[str, float]:
            samples = [parity.letterbox(path, imgsz) for path in chosen[:RANKING_IMAGES]]
            return sensitivity(dense, layers, samples, alone)

        torch_map = evaluate(model, data, imgsz=imgsz)["map50_95"]
        choice = choose_float_layers(layers, score, rank, torch_map - settings.map_budget)
        tolerance = replace(parity.TOLERANCES["int8"], map50_95=(-settings.map_budget, 1.0))
        record = stage.prove(
            output,
            lambda path: write(path, choice.float_layers),
            lambda path: parity.compare(
                model,
                path,
                val[: settings.parity_images],
                imgsz,
                precision="int8",
                maps=(torch_map, choice.map50_95),
                tolerance=tolerance,
            ),
            "try another --method, more --calibration-images or a smaller --map-budget",
        )
        record["quantization"] = {**facts, "layers": len(layers), **asdict(choice)}
        record["latency"] = _latency(dense, output, imgsz) if settings.target == "onnxruntime" else None
    return record


def choose_float_layers(
    layers: list[str], score: Callable[[list[str]], float], rank: Callable[[], dict[str, float]], lowest: float
) -> Choice:
    """Return the shortest list of layers, the most sensitive first, that keeps the mAP when they stay in float.

    Nothing is ranked where all layers may be quantized. Otherwise the number of float layers is doubled until the mAP
    is there, then bisected: about 2·log₂(n) evaluations.

    Args:
        layers: all that could be quantized.
        score: gives the mAP of the graph with these layers in float.
        rank: gives the sensitivity of every layer.
        lowest: the mAP that is needed.

    Raises:
        ExportError: not even with every layer in float.
    """
    steps: list[dict[str, Any]] = []

    def passes(order: list[str], count: int) -> bool:
        value = score(order[:count])
        steps.append({"float_layers": count, "map50_95": value})
        print(
            f"quantize: {count} of {len(layers)} layers in float, mAP50-95 {value:.4f}, needed {lowest:.4f}", flush=True
        )
        return value >= lowest

    if passes([], 0):
        return Choice([], steps[-1]["map50_95"], steps)
    found = rank()
    order = sorted(layers, key=lambda layer: -found[layer])
    fails, count = 0, 1
    while not passes(order, count):
        if count == len(layers):
            best = max(step["map50_95"] for step in steps)
            raise ExportError(
                f"8 bits reach an mAP50-95 of {best:.4f}, {lowest:.4f} is needed: "
                "raise --map-budget, or use the fp32 export"
            )
        fails, count = count, min(2 * count, len(layers))
    while count - fails > 1:
        middle = (fails + count) // 2
        if passes(order, middle):
            count = middle
        else:
            fails = middle
    reached = next(step["map50_95"] for step in steps if step["float_layers"] == count)
    return Choice(order[:count], reached, steps, found)


def sensitivity(
    dense: Path, layers: list[str], images: list[np.ndarray], alone: Callable[[str], Path]
) -> dict[str, float]:
    """Return for every layer its share of the error that all make, each one alone in 8 bits.

    The error of the scores and that of the boxes, weighted by their scores, count alike.

    Args:
        dense: the ONNX file in fp32.
        layers: all that could be quantized.
        images: arrays (1, 3, imgsz, imgsz).
        alone: writes the graph with only this layer in 8 bits, and returns its path.
    """
    import os

    import numpy as np

    from benchmark.runners import onnxruntime_runner
    from compress.progress import track

    threads = os.cpu_count() or 1

    def outputs(path: Path) -> list[np.ndarray]:
        session = onnxruntime_runner.load(str(path), threads)
        return [onnxruntime_runner.infer(session, image)[0] for image in images]

    reference = outputs(dense)
    errors = []
    for layer in track(layers, "sensitivity"):
        pairs = zip(reference, outputs(alone(layer)), strict=True)
        errors.append(np.mean([_error(expected, actual) for expected, actual in pairs], axis=0))
    shares = np.array(errors) / np.maximum(np.sum(errors, axis=0), 1e-12)
    return {layer: round(float(share), 6) for layer, share in zip(layers, shares.mean(axis=1), strict=True)}


def _error(expected: np.ndarray, actual: np.ndarray) -> tuple[float, float]:
    """Return the error of the scores as a share of them, and that of the boxes in px, weighted by their scores."""
    import numpy as np

    if expected.shape[-1] == 6:  # an end-to-end head: rows of x1, y1, x2, y2, score, class, best first
        expected, actual = (output[..., :5].transpose(0, 2, 1) for output in (expected, actual))
    scores = np.linalg.norm(actual[:, 4:] - expected[:, 4:]) / max(float(np.linalg.norm(expected[:, 4:])), 1e-12)
    weights = np.square(expected[:, 4:].max(axis=1))
    boxes = np.square(actual[:, :4] - expected[:, :4]).mean(axis=1)
    return float(scores), float(np.sqrt((weights * boxes).sum() / max(float(weights.sum()), 1e-12)))


def quantize_stage(
    models: dict[str, Path], data: Path, calibration: Path, imgsz: int, settings: Quantize, output: Path
) -> dict[str, Any]:
    """Quantize each model to `output/NAME.int8.onnx` as a stage: skipped when finished and unchanged.

    Returns:
        The content of `parity.json`: {name: record of `export_int8`}.
    """
    from compress.dataset import fingerprint

    def export(name: str, model: Path, _: list[Path]) -> dict[str, Any]:
        return export_int8(model, output / f"{name}{SUFFIX}", data, calibration, imgsz, settings)

    config = {"imgsz": imgsz, "calibration": fingerprint(calibration), **settings.model_dump(mode="json")}
    return stage.run_stage(
        STAGE,
        models,
        data,
        config,
        output,
        lambda: stage.export_models(models, data, settings.parity_images, output, export),
        lambda name: f"{name}{SUFFIX}",
    )


def _calibration_images(data: Path, settings: Quantize) -> list[Path]:
    import random

    from compress.dataset import images

    found = images(data, "train")
    return random.Random(settings.seed).sample(found, min(settings.calibration_images, len(found)))


def _hash(images: list[Path]) -> str:
    """Return a hash of what the images hold, whatever they are called and wherever they lie."""
    return manifest.sha256_json(sorted(manifest.sha256_file(path) for path in images))


def _describe(graph: Any, facts: dict[str, Any], float_layers: list[str]) -> None:
    """Write into the graph what it is: its precision and how it was calibrated."""
    entries = {
        "espalier_precision": "int8",
        "espalier_calibration": f"{facts['method']}, {facts['calibration_images']} images",
        "espalier_calibration_sha256": facts["calibration_sha256"],
        "espalier_quantization_target": facts["target"],
        "espalier_float_layers": str(len(float_layers)),
    }
    kept = {entry.key: entry.value for entry in graph.metadata_props}
    del graph.metadata_props[:]
    for key, value in {**kept, **entries}.items():
        graph.metadata_props.add(key=key, value=value)


def _latency(dense: Path, quantized: Path, imgsz: int) -> dict[str, Any]:
    """Measure both files in turns, one thread, and return p50 and the speed-up with its interval."""
    from benchmark.latency import measure

    files = {"fp32": {"onnxruntime": dense}, "int8": {"onnxruntime": quantized}}
    record = measure(files, imgsz=imgsz, threads=1, mode="quick")
    (comparison,) = record["comparisons"]
    return {
        **{f"{cell['model']}_p50_ms": cell["p50_ms"] for cell in record["cells"]},
        "speedup": comparison["speedup"],
        "interval": comparison["interval"],
        "faster": comparison["interval"][0] > 1.0,
        "device": record["device"]["cpu"],
        "protocol": record["protocol"]["label"],
        "noise": record["noise"],
    }


def _remarks(record: dict[str, Any]) -> list[str]:
    """Return what a person should know beside the parity: float layers, speed, and doubts."""
    facts, latency = record["quantization"], record["latency"]
    found = [f"{len(facts['float_layers'])} of {facts['layers']} layers in float"]
    if latency is not None:
        speed = f"{latency['speedup']:.2f} times as fast as fp32"
        found.append(speed if latency["faster"] else f"NOT FASTER than fp32 on this machine ({speed}): use fp32 here")
    if facts["calibration_images_in_val"]:
        found.append(f"{facts['calibration_images_in_val']} calibration images are val images too: its mAP flatters")
    return found


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Annotated[Path, typer.Option(help="checkpoint (.pt)")],
    data: Annotated[str, typer.Option(help="data set YAML or 'shapes'; its val split gives mAP and parity")],
    output: Annotated[Path, typer.Option(help=f"folder for NAME{SUFFIX}, parity.json and the manifest")],
    calibration: Annotated[str | None, typer.Option(help="data set whose train split calibrates; --data's own")] = None,
    imgsz: Annotated[int, typer.Option(min=1, help="side of the square input, px; a multiple of the stride")] = 640,
    target: Annotated[str, typer.Option(help="onnxruntime (CPU) or tensorrt")] = "onnxruntime",
    method: Annotated[str, typer.Option(help="minmax, percentile or entropy")] = "percentile",
    calibration_images: Annotated[int, typer.Option(help="training images that the ranges are found on")] = 32,
    map_budget: Annotated[float, typer.Option(help="largest loss of mAP50-95 on the val split")] = 0.010,
    reduce_range: Annotated[bool, typer.Option(help="7-bit weights, for x86 CPUs without VNNI")] = False,
    opset: Annotated[int, typer.Option(help="ONNX operator set, 13 to 22")] = 17,
    parity_images: Annotated[int, typer.Option(help="real images that are compared with PyTorch")] = 16,
    seed: Annotated[int, typer.Option(help="of the choice of calibration images")] = 0,
) -> None:
    """Quantize a detector to 8 bits within an mAP budget, prove it against PyTorch, and say whether it is faster."""
    from compress.dataset import resolve

    content = {
        "target": target,
        "method": method,
        "calibration_images": calibration_images,
        "map_budget": map_budget,
        "reduce_range": reduce_range,
        "opset": opset,
        "parity_images": parity_images,
        "seed": seed,
    }
    settings = parse(Quantize, content, "quantize")
    stage.require(model)
    yaml = resolve(data)
    source = yaml if calibration is None else resolve(calibration, labels=False)
    records = quantize_stage({model.stem: model}, yaml, source, imgsz, settings, output)
    for record in records.values():
        for remark in _remarks(record):
            print(f"quantize: {remark}")


if __name__ == "__main__":
    run_app(app)
