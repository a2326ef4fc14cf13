"""ONNX export: simplified, checked, and equal to PyTorch on real images or not written at all."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from compress import checkpoint, manifest
from compress.errors import ExportError, run_app
from compress.settings import Export, check_imgsz, parse
from export import stage

STAGE = "export"


def export_onnx(model: Path, output: Path, *, imgsz: int, settings: Export | None = None) -> Path:
    """Write the ONNX graph of a model and return its path. `export_checked` also proves parity.

    The input is `images` (batch, 3, imgsz, imgsz). The outputs are those of `torch_runner.infer`: `output0`, of a
    segmenter also `output1`; with `nms` those of `suppression.Suppressed`. The same model gives the same bytes. Stock
    `YOLO(output)` opens it (where the batch alone is dynamic, it must be told `rect=False`).

    Args:
        model: the checkpoint.
        output: the file to write; it appears whole or not at all.
        imgsz: side of the square input, px, a multiple of the model's stride; where the size is dynamic, of the
            example that is traced.
        settings: opset, simplify, batch, dynamic, half, nms and its limits; what is about parity is not read.

    Raises:
        CheckpointError: `model` is of a task that cannot be exported.
        SettingsError: `imgsz` does not fit the model's stride.
        ExportError: the model has nothing to suppress, or the graph cannot be exported, checked,
            simplified or converted.
    """
    import onnx

    from benchmark.runners.torch_runner import inference_network

    checkpoint.require_weights(model)
    wanted = settings or Export()
    network = inference_network(str(model))
    check_imgsz(imgsz, int(max(network.stride)))  # type: ignore[arg-type]
    graph = _trace(network, model, imgsz, wanted)
    try:
        onnx.checker.check_model(graph, full_check=True)
    except Exception as error:  # checker and shape inference raise exceptions without a common base
        raise ExportError(f"the ONNX graph of {model.name} is not valid: {error}") from None
    if wanted.simplify:
        graph = _simplify(graph, model, imgsz, wanted)
    suppression = {"conf": wanted.conf, "iou": wanted.iou, "max_det": wanted.max_det} if wanted.nms else {}
    args = {
        "batch": wanted.batch,
        "dynamic": wanted.dynamic in ("size", "both"),
        "opset": wanted.opset,
        "simplify": wanted.simplify,
        "nms": wanted.nms or None,
        **suppression,
    }
    entries = {
        **stage.metadata(network, model, imgsz, args, wanted.batch),
        "espalier_precision": "fp16" if wanted.half else "fp32",
    }
    for key, value in entries.items():
        graph.metadata_props.add(key=key, value=str(value))
    manifest.write_bytes_atomic(output, graph.SerializeToString(deterministic=True))
    return output


def export_checked(
    model: Path, output: Path, images: list[Path], imgsz: int, settings: Export, data: Path | None = None
) -> dict[str, Any]:
    """Export a model, compare it with PyTorch on `images`, and return the parity record (see `parity.compare`).

    A graph with a dynamic batch or size is proven on another one too, whose record is `other`. One with suppression is
    proven in two steps: its raw outputs against PyTorch, and `suppression`: the boxes against those of Ultralytics'
    own suppression on the same raw outputs, because where two boxes are as good rounding alone says which one stays.

    Raises:
        ExportError: as `export_onnx`, or parity fails: the artefact is then kept as `NAME.rejected.onnx`.
    """
    precision = "fp16" if settings.half else "fp32"

    def export(path: Path, wanted: Export) -> Path:
        return export_onnx(model, path, imgsz=imgsz, settings=wanted)

    def compare(reference: Path, path: Path, precision: str, data: Path | None = None) -> dict[str, Any]:
        return stage.compare_shapes(
            reference,
            path,
            images,
            imgsz,
            batch=settings.batch,
            dynamic=settings.dynamic,
            precision=precision,
            data=data,
        )

    def check(path: Path) -> dict[str, Any]:
        if not settings.nms:
            return compare(model, path, precision, data)
        with stage.scratch(output) as scratch:
            raw = export(scratch / path.name, settings.model_copy(update={"nms": False}))
            record = compare(model, raw, precision, data)
            if not record["passed"]:
                return record
            suppression = compare(raw, path, "fp32")
        return {**record, "suppression": suppression} if suppression["passed"] else suppression

    remedy = "try without --half" if settings.half else "try --no-simplify or another --opset"
    return stage.prove(output, lambda path: export(path, settings), check, remedy)


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

    def check(model: Path) -> None:
        network = stage.check_model(model, imgsz, data if settings.parity_map else None)
        if settings.nms:
            require_boxes(network, model)

    return stage.run_stage(
        STAGE,
        models,
        data,
        {"imgsz": imgsz, **settings.model_dump(mode="json")},
        output,
        lambda: export_models(models, data, imgsz, settings, output),
        lambda name: f"{name}.onnx",
        check,
    )


def _trace(network: Any, model: Path, imgsz: int, settings: Export) -> Any:
    import io
    import warnings

    import onnx
    import torch

    from export.layout import rearrange

    rearrange(network)
    network.model[-1].dynamic = settings.dynamic in ("size", "both")  # anchors of any size, or traced constants
    traced = _in_half(network) if settings.half else network
    if settings.nms:
        traced = _with_suppression(traced, network, model, settings)
    stream: Any = io.BytesIO()
    with torch.no_grad(), warnings.catch_warnings():
        # Traced constants (anchors at a fixed imgsz) are meant, and so is the exporter that needs no onnxscript.
        warnings.simplefilter("ignore")
        try:
            images = torch.zeros(settings.batch, network.yaml.get("channels", 3), imgsz, imgsz)
            outputs = traced(images)  # caches the anchors, which the trace then holds as constants
            names = ["output0", "output1"] if isinstance(outputs, tuple) else ["output0"]
            torch.onnx.export(
                traced,
                (images,),
                stream,
                dynamo=False,
                opset_version=settings.opset,
                input_names=["images"],
                output_names=names,
                dynamic_axes=_dynamic_axes(network, settings),
            )
        except (RuntimeError, ValueError) as error:  # torch.onnx.OnnxExporterError is a RuntimeError
            reason = stage.torch_reason(error)
            raise ExportError(f"{model.name} cannot be exported with opset {settings.opset}: {reason}") from None
    return onnx.load_model_from_string(stream.getvalue())


def _with_suppression(traced: Any, network: Any, model: Path, settings: Export) -> Any:
    from compress.checkpoint import task_of
    from export.suppression import Suppressed

    require_boxes(network, model)
    nc, rotated = network.model[-1].nc, task_of(network) == "obb"
    return Suppressed(traced, nc, rotated, settings.conf, settings.iou, settings.max_det)


def require_boxes(network: Any, model: Path) -> None:
    """Check that there are boxes to suppress: a head that was fused to its end-to-end branch has lost its `cv2`."""
    head = network.model[-1]
    if not hasattr(head, "end2end"):
        raise ExportError(f"{model.name} finds no boxes: export it without --nms")
    if getattr(head, "cv2", None) is None:
        raise ExportError(f"{model.name} has an end-to-end head, which repeats no box: export it without --nms")


def _dynamic_axes(network: Any, settings: Export) -> dict[str, dict[int, str]]:
    """Return the names of the open dimensions of input and outputs; nothing for a static graph."""
    from compress.checkpoint import task_of

    task = task_of(network)
    axes: dict[str, dict[int, str]] = {"images": {2: "height", 3: "width"}, "output0": {}}
    if task in ("semantic", "depth"):
        axes["output0"] = {2: "map_height", 3: "map_width"}
    elif task != "classify" and not settings.nms and not network.model[-1].end2end:
        axes["output0"] = {2: "anchors"}
    if task == "segment":
        axes["output1"] = {2: "mask_height", 3: "mask_width"}
    sizes, batch = settings.dynamic in ("size", "both"), settings.dynamic in ("batch", "both")
    return {name: ({0: "batch"} if batch else {}) | (open_ if sizes else {}) for name, open_ in axes.items()}


def _in_half(network: Any) -> Any:
    """Return the network with weights and computation in fp16, and inputs and outputs in fp32.

    Boxes are decoded (and suppressed) in fp32: fp16 holds 11 bits, which beyond 512 px is half a pixel.
    """
    import torch

    class Half(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, images: torch.Tensor) -> Any:
            outputs = self.network(images.half())
            return tuple(output.float() for output in outputs) if isinstance(outputs, tuple) else outputs.float()

    head = network.half().model[-1]
    if hasattr(head, "forward_head"):
        honest = head.forward_head

        def in_full(features: Any, **branch: Any) -> dict[str, Any]:
            found = honest(features, **branch)
            return {name: value if name == "feats" else value.float() for name, value in found.items()}

        head.forward_head = in_full
        head.dfl.float()
        head.stride = head.stride.float()
    return Half()


def _simplify(graph: Any, model: Path, imgsz: int, settings: Export) -> Any:
    import contextlib
    import io

    import onnxsim

    channels = graph.graph.input[0].type.tensor_type.shape.dim[1].dim_value
    # What it checks itself on; without this it refuses open dimensions.
    example = {"images": [settings.batch, channels, imgsz, imgsz]} if settings.dynamic else None
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            simplified, equal = onnxsim.simplify(graph, check_n=1, test_input_shapes=example)
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
    batch: Annotated[int, typer.Option(help="images at once")] = 1,
    dynamic: Annotated[str | None, typer.Option(help="batch, size or both: what is left open")] = None,
    half: Annotated[bool, typer.Option("--half", help="fp16 inside, fp32 at inputs and outputs")] = False,
    nms: Annotated[bool, typer.Option("--nms", help="suppress overlapping boxes inside the graph")] = False,
    conf: Annotated[float, typer.Option(help="least score of a detection, with --nms")] = 0.25,
    iou: Annotated[float, typer.Option(help="boxes that overlap by more are one, with --nms")] = 0.7,
    max_det: Annotated[int, typer.Option(help="detections per image at most, with --nms")] = 300,
    parity_map: Annotated[bool, typer.Option(help="compare the mAP on the val split too")] = False,
    parity_images: Annotated[int, typer.Option(help="real images on which ONNX must equal PyTorch")] = 16,
) -> None:
    """Export a model to ONNX and prove on real images that it equals PyTorch."""
    from compress.data.dataset import resolve

    content = {
        "opset": opset,
        "simplify": simplify,
        "batch": batch,
        "dynamic": dynamic,
        "half": half,
        "nms": nms,
        "conf": conf,
        "iou": iou,
        "max_det": max_det,
        "parity_images": parity_images,
        "parity_map": parity_map,
    }
    settings = parse(Export, content, "export")
    checkpoint.require_weights(model)
    export_stage({model.stem: model}, resolve(data, labels=parity_map), imgsz, settings, output)


if __name__ == "__main__":
    run_app(app)
