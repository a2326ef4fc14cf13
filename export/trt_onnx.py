"""The ONNX file that an engine is built from: opened, checked, in the types and shapes that the network takes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from compress import manifest
from compress.errors import ExportError, ParityError
from compress.settings import Export, ExportTrt, Quantize, check_imgsz
from export import stage

# TF32 has the mantissa of fp16, and bf16 has three bits fewer, which parity knows no closer tolerance for than int8's.
TOLERANCE = {"fp32": "fp32", "tf32": "fp16", "fp16": "fp16", "bf16": "int8", "int8": "int8"}
Range = tuple[int, int, int]


def make_onnx(
    model: Path, output: Path, settings: ExportTrt, strongly_typed: bool, data: Path | None, calibration: Path | None
) -> dict[str, Any] | None:
    """Write the ONNX file of a model in the types that the target's network takes.

    A strongly typed network computes in the types of the ONNX file, so this file has them; a weakly typed one is given
    fp32, or Q/DQ nodes.

    Args:
        model: a checkpoint, or an ONNX file of any shape.
        output: the file to write, NAME.onnx.
        settings: precision, shapes … that fit the model.
        strongly_typed: whether the target's network is.
        data: data set YAML, needed for a checkpoint.
        calibration: data set YAML for int8; `data` when not given.

    Returns:
        The parity record of what was written; null for an ONNX file that was given.

    Raises:
        ExportError: the file is not one, or parity fails.
    """
    from export.half import QDQ_OPSET, convert

    if model.suffix == ".onnx":
        graph, parity = load_onnx(model), None
    else:
        assert data is not None, "a checkpoint comes with data"
        # 16-bit scales need a later opset, which the parser of a weakly typed TensorRT does not know yet.
        half_scales = strongly_typed and settings.rest == "fp16"
        opset = max(settings.opset, QDQ_OPSET) if half_scales else settings.opset
        parity = _export(model, output, settings, opset, data, calibration or data)
        graph = load_onnx(output)
    half = settings.rest if settings.precision == "int8" else settings.precision
    if strongly_typed and half in ("fp16", "bf16") and _half_of(graph) is None:
        graph = convert(graph, half)
        parity = _prove_half(model, graph, half, settings, output, data) if parity else None
    manifest.write_bytes_atomic(output, graph.SerializeToString(deterministic=True))
    return parity


def load_onnx(path: Path) -> Any:
    """Open an ONNX file, and give every node a name of its own, because layers are told apart by theirs.

    Raises:
        ExportError: it is missing, cut short, not ONNX, or keeps its weights in other files.
    """
    import onnx
    from google.protobuf.message import DecodeError

    if not path.is_file():
        raise ExportError(f"{path} does not exist: check the path")
    try:
        graph = onnx.load(path, load_external_data=False)
        if any(item.data_location == onnx.TensorProto.EXTERNAL for item in graph.graph.initializer):
            raise ExportError(f"{path} keeps its weights in other files: save it as one file")
        onnx.checker.check_model(graph)
    except (DecodeError, UnicodeDecodeError, onnx.checker.ValidationError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ExportError(f"{path} is not an ONNX file, or is damaged ({reason}): export it again") from None
    _name_nodes(graph)
    return graph


def _name_nodes(graph: Any) -> None:
    """Name the nodes that have no name, or that of another: ONNX allows both."""
    taken = {node.name for node in graph.graph.node}
    seen = {""}
    for number, node in enumerate(graph.graph.node):
        if node.name in seen:
            node.name = f"{node.op_type}_{number}"
            while node.name in taken:
                node.name += "_"
            taken.add(node.name)
        seen.add(node.name)


def profiles_of(name: str, graph: Any, batch: str | None, imgsz: str | None) -> dict[str, list[list[int]]]:
    """Return the optimisation profile of a graph's image input, {input: [min, opt, max]}; empty for a static graph.

    Args:
        name: of the file, for messages.
        graph: an ONNX model.
        batch: N or MIN:OPT:MAX.
        imgsz: px, or MIN:OPT:MAX.

    Raises:
        ExportError: the graph has not one image input, has a dynamic shape and no range is given, or the other way
            round.
        SettingsError: the stride that the file names does not divide a size.
    """
    weights = {item.name for item in graph.graph.initializer}
    inputs = [item for item in graph.graph.input if item.name not in weights]
    dimensions = [[part.dim_value or None for part in item.type.tensor_type.shape.dim] for item in inputs]
    if len(inputs) != 1 or len(dimensions[0]) != 4 or dimensions[0][1] is None:
        raise ExportError(f"{name} must have one input (n, 3, height, width), it has {dimensions}: export it again")
    (shape,) = dimensions
    wanted = [_fit(name, "batch", shape[0], batch), (shape[1],) * 3]
    wanted += [_fit(name, "imgsz", size, imgsz) for size in shape[2:]]
    if None not in shape:
        return {}
    stride = next((item.value for item in graph.metadata_props if item.key == "stride"), "")
    for size in sorted({*wanted[2], *wanted[3]}) if stride.isdecimal() and int(stride) else ():
        check_imgsz(size, int(stride))
    return {inputs[0].name: [list(point) for point in zip(*wanted, strict=True)]}


def parse_range(text: str, option: str) -> Range:
    """Return (min, opt, max) of `N` or `MIN:OPT:MAX`.

    Raises:
        ExportError: the text is neither, or its numbers do not rise.
    """
    numbers = [int(part) for part in re.findall(r"[1-9]\d{0,5}", text)]
    if not re.fullmatch(r"[1-9]\d{0,5}(:[1-9]\d{0,5}:[1-9]\d{0,5})?", text) or sorted(numbers) != numbers:
        raise ExportError(f"--{option} must be a number or MIN:OPT:MAX in rising order, got {text!r}")
    low, best, high = numbers if len(numbers) == 3 else numbers * 3
    return low, best, high


def _export(
    model: Path, output: Path, settings: ExportTrt, opset: int, data: Path, calibration: Path
) -> dict[str, Any]:
    """Write the ONNX file of a checkpoint, fp32 or with Q/DQ nodes, and return the record that proves it."""
    from compress.data.dataset import images
    from export.onnx import export_checked
    from export.quantize import export_int8

    imgsz = checkpoint_imgsz(settings)
    if settings.precision == "int8":
        quantize = Quantize(target="tensorrt", opset=opset, parity_images=settings.parity_images)
        try:
            return export_int8(model, output, data, calibration, imgsz, quantize)
        except ParityError as error:
            more = "export.quantize --target tensorrt has these options, and makes an ONNX file to give instead"
            raise ParityError(f"{error} ({more})") from None
    chosen = images(data, "val")[: settings.parity_images]
    return export_checked(model, output, chosen, imgsz, Export(opset=opset))


def _prove_half(
    model: Path, graph: Any, half: str, settings: ExportTrt, output: Path, data: Path | None
) -> dict[str, Any] | None:
    """Compare a 16-bit graph with PyTorch; onnxruntime has no bf16 convolution, so there one that rounds to bf16."""
    import tempfile

    from compress.data.dataset import images
    from export import parity
    from export.half import rounded

    if data is None:
        return None
    chosen, precision = images(data, "val")[: settings.parity_images], TOLERANCE[settings.precision]

    def check(path: Path) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as scratch:
            if half == "bf16":
                path = Path(scratch) / output.name
                manifest.write_bytes_atomic(path, rounded(graph).SerializeToString())
            return parity.compare(model, path, chosen, checkpoint_imgsz(settings), precision=precision)

    return stage.prove(
        output,
        lambda path: manifest.write_bytes_atomic(path, graph.SerializeToString(deterministic=True)),
        check,
        "use --precision fp32 or tf32",
    )


def checkpoint_imgsz(settings: ExportTrt) -> int:
    """Return the side of the square input that a checkpoint is exported for, px."""
    return parse_range(settings.imgsz or "640", "imgsz")[0]


def check_static(settings: ExportTrt) -> None:
    """Check that the shapes are those that a checkpoint is exported for.

    Raises:
        ExportError: they are not.
    """
    low, _, high = parse_range(settings.imgsz or "640", "imgsz")
    open_size, open_batch = low != high, parse_range(settings.batch or "1", "batch") != (1, 1, 1)
    if open_size or open_batch:
        dynamic = "both" if open_size and open_batch else "size" if open_size else "batch"
        raise ExportError(
            "a checkpoint is exported for batch 1 and one image size: for others give the .onnx file that "
            f"export.onnx --dynamic {dynamic} makes of it"
        )


def check_precision(path: Path, graph: Any, settings: ExportTrt) -> None:
    """Check that the types of an ONNX file do not contradict the precision that is asked for.

    Raises:
        ExportError: they do.
    """
    quantized = any(node.op_type == "QuantizeLinear" for node in graph.graph.node)
    if settings.precision == "int8" and not quantized:
        raise ExportError(
            f"{path.name} has no Q/DQ nodes, which int8 needs: make it with export.quantize --target tensorrt, or give "
            "the checkpoint with --data"
        )
    if settings.precision != "int8" and quantized:
        raise ExportError(f"{path.name} is quantized: use --precision int8")
    half, option = _half_of(graph), "rest" if quantized else "precision"
    if half is not None and half != getattr(settings, option):
        raise ExportError(f"{path.name} has {half} weights: use --{option} {half}, or give the fp32 file")


def _half_of(graph: Any) -> str | None:
    """Return the 16-bit type that a graph has weights of."""
    import onnx

    kinds = {item.data_type for item in graph.graph.initializer}
    if onnx.TensorProto.FLOAT16 in kinds:
        return "fp16"
    return "bf16" if onnx.TensorProto.BFLOAT16 in kinds else None


def _fit(name: str, option: str, size: int | None, text: str | None) -> Range:
    """Return the range of one dimension of the input, after checking what was asked for against the file."""
    if size is None:
        if text is None:
            raise ExportError(f"{name} has a dynamic {option}: give --{option} N or --{option} MIN:OPT:MAX")
        return parse_range(text, option)
    if text is not None and parse_range(text, option) != (size,) * 3:
        raise ExportError(
            f"{name} was exported for {option} {size}, --{option} is {text}: leave it out, or export again"
        )
    return size, size, size
