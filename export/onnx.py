"""ONNX export: static shapes, simplified, checked, and equal to PyTorch on real images or not written at all."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from compress import manifest
from compress.errors import ExportError, run_app
from compress.settings import Export, parse
from export import stage

STAGE = "export"


def export_onnx(model: Path, output: Path, *, imgsz: int, opset: int = 17, simplify: bool = True) -> Path:
    """Write the ONNX graph of a detection model, batch 1, and return its path. `export_checked` also proves parity.

    The input is `images` (1, 3, imgsz, imgsz); the output is `output0` (1, 4 + classes, anchors), or
    (1, detections, 6) for an end-to-end head. The same model gives the same bytes. Stock `YOLO(output)` opens it.

    Args:
        model: the checkpoint.
        output: the file to write; it appears whole or not at all.
        imgsz: side of the square input, px, a multiple of the model's stride.
        opset: ONNX operator set.
        simplify: fold constants and fuse nodes with onnxsim.

    Raises:
        CheckpointError: `model` is not a detection model.
        ExportError: `imgsz` does not fit, or the graph cannot be exported, checked or simplified.
    """
    import onnx

    from benchmark.runners.torch_runner import inference_network

    stage.require(model)
    network = inference_network(str(model))
    stage.check_imgsz(imgsz, int(max(network.stride)))  # type: ignore[arg-type]
    graph = _trace(network, model, imgsz, opset)
    try:
        onnx.checker.check_model(graph, full_check=True)
    except Exception as error:  # checker and shape inference raise exceptions without a common base
        raise ExportError(f"the ONNX graph of {model.name} is not valid: {error}") from None
    if simplify:
        graph = _simplify(graph, model)
    args = {"batch": 1, "dynamic": False, "opset": opset, "simplify": simplify, "nms": None}
    entries = {**stage.metadata(network, model, imgsz, args), "espalier_precision": "fp32"}
    for key, value in entries.items():
        graph.metadata_props.add(key=key, value=str(value))
    manifest.write_bytes_atomic(output, graph.SerializeToString(deterministic=True))
    return output


def export_checked(
    model: Path, output: Path, images: list[Path], imgsz: int, settings: Export, data: Path | None = None
) -> dict[str, Any]:
    """Export a model, compare it with PyTorch on `images`, and return the parity record (see `parity.compare`).

    Raises:
        ExportError: as `export_onnx`, or parity fails: the artefact is then kept as `NAME.rejected.onnx`.
    """
    from export import parity

    return stage.prove(
        output,
        lambda path: export_onnx(model, path, imgsz=imgsz, opset=settings.opset, simplify=settings.simplify),
        lambda path: parity.compare(model, path, images, imgsz, data=data),
        "try --no-simplify or another --opset",
    )


def export_models(models: dict[str, Path], data: Path, imgsz: int, settings: Export, output: Path) -> dict[str, Any]:
    """Export each model to `output/NAME.onnx`, write `parity.json` ({name: parity record}) and return its content.

    Raises:
        DataError: `data` has no val images.
        ExportError: as `export_checked`.
    """

    def export(name: str, model: Path, images: list[Path]) -> dict[str, Any]:
        scored = data if settings.parity_map else None
        return export_checked(model, output / f"{name}.onnx", images, imgsz, settings, scored)

    return stage.export_models(models, data, settings.parity_images, output, export)


def export_stage(models: dict[str, Path], data: Path, imgsz: int, settings: Export, output: Path) -> dict[str, Any]:
    """Run `export_models` as a stage: skipped when finished and unchanged, with a manifest written last.

    Returns:
        The content of `parity.json`.
    """
    return stage.run_stage(
        STAGE,
        models,
        data,
        {"imgsz": imgsz, **settings.model_dump(mode="json")},
        output,
        lambda: export_models(models, data, imgsz, settings, output),
        lambda name: f"{name}.onnx",
    )


def _trace(network: Any, model: Path, imgsz: int, opset: int) -> Any:
    import io
    import warnings

    import onnx
    import torch
    from ultralytics.nn.modules.block import C2f

    for module in network.modules():
        if isinstance(module, C2f):
            module.forward = module.forward_split  # one Split node instead of two Slice nodes per block
    images = torch.zeros(1, network.yaml.get("channels", 3), imgsz, imgsz)
    stream: Any = io.BytesIO()
    with torch.no_grad(), warnings.catch_warnings():
        # Traced constants (anchors at a fixed imgsz) are meant, and so is the exporter that needs no onnxscript.
        warnings.simplefilter("ignore")
        network(images)  # caches the anchors, which the trace then holds as constants
        try:
            torch.onnx.export(
                network,
                (images,),
                stream,
                dynamo=False,
                opset_version=opset,
                input_names=["images"],
                output_names=["output0"],
            )
        except (RuntimeError, ValueError) as error:  # torch.onnx.OnnxExporterError is a RuntimeError
            raise ExportError(f"{model.name} cannot be exported with opset {opset}: {error}") from None
    return onnx.load_model_from_string(stream.getvalue())


def _simplify(graph: Any, model: Path) -> Any:
    import contextlib
    import io

    import onnxsim

    with contextlib.redirect_stdout(io.StringIO()):
        try:
            simplified, equal = onnxsim.simplify(graph, check_n=1)
        except Exception as error:  # a native library: its failures have no common base
            raise ExportError(f"onnxsim cannot simplify {model.name} ({error}): try --no-simplify") from None
    if not equal:
        raise ExportError(f"onnxsim changed what {model.name} computes: use --no-simplify")
    return simplified


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Annotated[Path, typer.Option(help="checkpoint (.pt)")],
    data: Annotated[str, typer.Option(help="data set YAML or 'shapes'; images of its val split prove parity")],
    output: Annotated[Path, typer.Option(help="folder for the ONNX file, parity.json and the manifest")],
    imgsz: Annotated[int, typer.Option(min=1, help="side of the square input, px; a multiple of the stride")] = 640,
    opset: Annotated[int, typer.Option(help="ONNX operator set, 13 to 22")] = 17,
    simplify: Annotated[bool, typer.Option(help="simplify the graph with onnxsim")] = True,
    parity_map: Annotated[bool, typer.Option(help="compare the mAP on the val split too")] = False,
    parity_images: Annotated[int, typer.Option(help="real images on which ONNX must equal PyTorch")] = 16,
) -> None:
    """Export a detector to ONNX and prove on real images that it equals PyTorch."""
    from compress.dataset import resolve

    content = {"opset": opset, "simplify": simplify, "parity_images": parity_images, "parity_map": parity_map}
    settings = parse(Export, content, "export")
    stage.require(model)
    export_stage({model.stem: model}, resolve(data, labels=parity_map), imgsz, settings, output)


if __name__ == "__main__":
    run_app(app)
