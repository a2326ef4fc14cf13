"""8-bit ONNX export: as few layers in float as the mAP budget allows, proven against PyTorch like every export."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from compress import checkpoint, manifest
from compress.errors import ExportError, run_app
from compress.settings import Export, Quantize, parse
from export import int8, stage

STAGE = "quantize"
SUFFIX = ".int8.onnx"


def export_int8(
    model: Path,
    output: Path,
    data: Path,
    calibration: Path,
    imgsz: int,
    settings: Quantize,
    *,
    measured: bool = True,
) -> dict[str, Any]:
    """Quantize a model, choose the layers that stay in float, prove parity and measure the latency beside fp32.

    Args:
        model: the checkpoint.
        output: the ONNX file to write; it appears whole or not at all.
        data: data set YAML, whose val split gives the mAP, and images for parity.
        calibration: data set YAML, whose train split calibrates.
        imgsz: side of the square input, px.
        settings: target, method, budget …
        measured: whether to measure the latency, where this machine is the target.

    Returns:
        As `int8.export_mixed`.

    Raises:
        DataError: a split has no images, or no labels to compute mAP from.
        ExportError: the model returns no numbers, no choice of layers meets the budget, or parity fails: the file is
            kept as `NAME.rejected.onnx`.
    """
    from compress.data.pixels import letterbox
    from compress.progress import track
    from export import qdq
    from export.onnx import export_onnx

    stage.require_detector(model)
    settings = with_range(settings)
    scheme, bits = qdq.SCHEMES[settings.target], {"reduce_range": bool(settings.reduce_range)}
    images = int8.calibration_images(calibration, settings)
    with stage.scratch(output) as scratch:
        dense = export_onnx(model, scratch / "fp32.onnx", imgsz=imgsz, settings=Export(opset=settings.opset))
        _require_finite(dense, model, letterbox(images[0], imgsz))
        graph = qdq.load(dense)
        layers = list(qdq.layers_of(graph))
        samples = (letterbox(path, imgsz) for path in track(images, "calibration"))
        ranges = qdq.calibrate(dense, samples, settings.method, scheme)
        facts = {
            "target": settings.target,
            "method": settings.method,
            "reduce_range": settings.reduce_range,
            "scheme": asdict(scheme),
        }

        def write(path: Path, in_float: list[str]) -> None:
            made = qdq.quantize(graph, ranges, scheme, [layer for layer in layers if layer not in in_float], **bits)
            _describe(made, facts, images, in_float)
            manifest.write_bytes_atomic(path, made.SerializeToString(deterministic=True))

        def write_alone(path: Path, layer: str) -> None:
            made = qdq.quantize(graph, ranges, scheme, [layer], carriers=False, **bits)
            manifest.write_bytes_atomic(path, made.SerializeToString())

        return int8.export_mixed(
            model,
            output,
            data,
            images,
            imgsz,
            settings,
            int8.Quantizer(dense, layers, write, write_alone, facts),
            measured=measured and settings.target == "onnxruntime",
        )


def with_range(settings: Quantize) -> Quantize:
    """Return the settings with as many bits of a weight as this CPU can add up, where they leave that open."""
    from export.saturation import saturates

    if settings.reduce_range is not None:
        return settings
    reduced = settings.target == "onnxruntime" and saturates()
    if reduced:
        print("quantize: weights of 7 bits, since this CPU has no VNNI and its sums of 8-bit products overflow")
    return settings.model_copy(update={"reduce_range": reduced})


def _require_finite(dense: Path, model: Path, image: np.ndarray) -> None:
    """Check what comes out before calibration, whose histograms of values that are no numbers have no range."""
    from benchmark.runners import onnxruntime_runner

    outputs = onnxruntime_runner.infer(onnxruntime_runner.load(str(dense), threads=1), image)
    if not all(np.isfinite(output).all() for output in outputs):
        raise ExportError(f"{model} returns values that are not finite: check the weights")


def _describe(graph: Any, facts: dict[str, Any], images: list[Path], float_layers: list[str]) -> None:
    """Write into the graph what it is: its precision and how it was calibrated."""
    entries = {
        "espalier_precision": "int8",
        "espalier_calibration": f"{facts['method']}, {len(images)} images",
        "espalier_calibration_sha256": int8.calibration_hash(images),
        "espalier_quantization_target": facts["target"],
        "espalier_float_layers": str(len(float_layers)),
    }
    kept = {entry.key: entry.value for entry in graph.metadata_props}
    del graph.metadata_props[:]
    for key, value in {**kept, **entries}.items():
        graph.metadata_props.add(key=key, value=value)


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
    reduce_range: Annotated[
        bool | None, typer.Option(help="weights of 7 bits; not given: where this CPU has no VNNI, and needs them")
    ] = None,
    opset: Annotated[int, typer.Option(help="ONNX operator set, 13 to 22")] = 17,
    parity_images: Annotated[int, typer.Option(help="real images that are compared with PyTorch")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="of the choice of calibration images")] = 0,
) -> None:
    """Quantize a detector to 8 bits within an mAP budget, prove it against PyTorch, and say whether it is faster."""
    from compress.data.dataset import resolve

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
    checkpoint.require_weights(model)
    yaml = resolve(data)
    source = yaml if calibration is None else resolve(calibration, labels=False)
    wanted = with_range(settings)  # which the manifest shall hold: another machine may need another one
    int8.export_stage(STAGE, SUFFIX, export_int8, {model.stem: model}, yaml, source, imgsz, wanted, output)


if __name__ == "__main__":
    run_app(app)
