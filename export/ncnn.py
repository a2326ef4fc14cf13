"""ncnn export: the network without the decoding of its head, equal to PyTorch on real images or not written at all."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmark import programs
from benchmark.runtimes import NCNN_SUFFIX, RUNNERS
from benchmark.transports import last_line
from compress import checkpoint, manifest
from compress.errors import ExportError, SettingsError, run_app
from compress.settings import ExportNcnn, QuantizeNcnn, check_imgsz, parse
from export import ncnn_trace, stage

STAGE = "ncnn"
PARAM, BIN, METADATA = "model.ncnn.param", "model.ncnn.bin", "metadata.yaml"  # Ultralytics' names
TIMEOUT_S = 600


def export_ncnn(model: Path, output: Path, *, imgsz: int, half: bool = False, dynamic: bool = False) -> Path:
    """Write the ncnn folder of a model, batch 1, and return its path. `export_checked` also proves parity.

    The input is `in0` (3, imgsz, imgsz), or of any size that the stride divides. The outputs are, level by level, the
    box map (4 · reg_max, h, w) and the class map (classes, h, w) as logits, of the one-to-many head, or of the
    end-to-end head of a checkpoint that was fused to it, as in `export.onnx`. Where a task has more (mask coefficients,
    key points, an angle), a third map of each level holds it, and the prototypes of masks come last. Of tasks without
    boxes they are those of the network.
    `benchmark.runners.ncnn_runner` decodes them; stock Ultralytics does not.
    `metadata.yaml` is written as JSON, which YAML readers take too, so that a device needs no YAML reader.
    The same model gives the same bytes.

    Args:
        model: the checkpoint.
        output: the folder to write, NAME_ncnn_model; it appears whole or not at all.
        imgsz: side of the square input, px, a multiple of the model's stride.
        half: store the weights in fp16, and let the device compute in fp16.
        dynamic: leave the size open; latency does not suffer.

    Raises:
        CheckpointError: `model` is of a task that cannot be exported.
        SettingsError: `imgsz` does not fit the model's stride.
        ExportError: an operation has no ncnn layer, pnnx fails, or ncnn cannot run the result.
    """
    from benchmark.runners.torch_runner import inference_network

    checkpoint.require_weights(model)
    network = inference_network(str(model))
    check_imgsz(imgsz, int(max(network.stride)))  # type: ignore[arg-type]
    traced = ncnn_trace.trace(network, model, imgsz)
    ncnn_trace.refuse_unsupported(traced, model)
    # Beside the output, so that the finished folder only has to be renamed.
    with stage.scratch(output) as scratch:
        made = scratch / "converted"
        made.mkdir()
        # Not `save`: on a full disk torch ends the process in it.
        (made / "model.pt").write_bytes(traced.save_to_buffer())
        report = _convert(made, model, half, _shapes(network, imgsz) if dynamic else ())
        outputs = _check_layers(made / PARAM, report, model, ncnn_trace.count_outputs(network))
        folder = scratch / output.name
        folder.mkdir()
        for name in (PARAM, BIN):
            (made / name).replace(folder / name)
        content = _metadata(network, model, imgsz, half, folder, outputs) | {"dynamic": dynamic}
        manifest.write_json(folder / METADATA, content)
        _run_once(folder, model, imgsz)
        stage.replace(folder, output)
    return output


def export_checked(
    model: Path, output: Path, images: list[Path], imgsz: int, settings: ExportNcnn, data: Path | None = None
) -> dict[str, Any]:
    """Export a model, compare it with PyTorch on `images`, and return the parity record (see `parity.compare`).

    Raises:
        ExportError: as `export_ncnn`, or parity fails: the folder is then kept as `NAME.rejected_ncnn_model`.
    """
    precision = "fp16" if settings.half else "fp32"
    return stage.prove(
        output,
        lambda path: export_ncnn(model, path, imgsz=imgsz, half=settings.half, dynamic=settings.dynamic is not None),
        lambda path: stage.compare_shapes(
            model, path, images, imgsz, precision=precision, dynamic=settings.dynamic, data=data
        ),
        "try --no-half" if settings.half else "use the ONNX export, and report the model",
    )


def export_stage(models: dict[str, Path], data: Path, imgsz: int, settings: ExportNcnn, output: Path) -> dict[str, Any]:
    """Export each model to `output/NAME_ncnn_model` as a stage: skipped when finished and unchanged.

    Returns:
        The content of `parity.json`: {name: parity record}.

    Raises:
        DataError: `data` has no val images.
        ExportError: as `export_checked`.
    """

    def export(name: str, model: Path, images: list[Path]) -> dict[str, Any]:
        scored = data if settings.parity_map else None
        return export_checked(model, output / f"{name}{NCNN_SUFFIX}", images, imgsz, settings, scored)

    return stage.run_stage(
        STAGE,
        models,
        data,
        {"imgsz": imgsz, **settings.model_dump(mode="json")},
        output,
        lambda: stage.export_models(models, data, settings.parity_images, output, export),
        lambda name: f"{name}{NCNN_SUFFIX}",
        lambda model: stage.check_model(model, imgsz, data if settings.parity_map else None),
    )


def _shapes(network: Any, imgsz: int) -> list[str]:
    """Return two shapes of the input for pnnx, which leaves open what differs between them.

    Without the second one the number of positions that attention is about, for one, would be a constant.
    """
    channels = network.yaml.get("channels", 3)
    other = f"{imgsz + stage.OTHER_SIZE_PX},{imgsz + 2 * stage.OTHER_SIZE_PX}"
    return [f"inputshape=[1,{channels},{imgsz},{imgsz}]", f"inputshape2=[1,{channels},{other}]"]


def _convert(folder: Path, model: Path, half: bool, shapes: Sequence[str] = ()) -> str:
    """Run pnnx on `folder/model.pt` and return what it said; its files lie in `folder` afterwards.

    Its Python wrapper ignores the exit code, so the program itself is called.

    Args:
        folder: where the trace lies.
        model: the checkpoint, for messages.
        half: store the weights in fp16.
        shapes: of the input, as pnnx takes them; none where the trace tells the only one.
    """
    import pnnx

    command = [pnnx.EXEC_PATH, "model.pt", f"fp16={int(half)}", *shapes]
    try:
        done = _run(command, folder, f"pnnx did not finish {model.name}")
    except OSError as error:
        raise ExportError(f"pnnx cannot be started ({error.strerror}): install it again, pip install pnnx") from None
    report = f"{done.stdout}\n{done.stderr}"
    if done.returncode != 0:
        raise ExportError(
            f"pnnx failed on {model.name} ({programs.exit_reason(done.returncode)}); its last line was: "
            f"{last_line(report)}; "
            "try another version of pnnx, or use the ONNX export"
        )
    missing = [name for name in (PARAM, BIN) if not (folder / name).is_file()]
    if missing:
        raise ExportError(f"pnnx wrote no {missing[0]} for {model.name}; its last line was: {last_line(report)}")
    return report


def _check_layers(param: Path, report: str, model: Path, outputs: int) -> list[str]:
    """Check that ncnn has every layer of the graph and that pnnx gave up on none; return the names of the outputs."""
    import ncnn as compiled

    ncnn: Any = compiled  # its names are in no type stub
    layers = [line.split() for line in param.read_text(encoding="utf-8").splitlines()[2:] if line.strip()]
    unknown = sorted({fields[0] for fields in layers if ncnn.layer_to_index(fields[0]) < 0})
    refused = sorted({line.strip() for line in report.splitlines() if re.search(r"not support", line)})
    if unknown or refused:
        raise ExportError(
            f"{model.name} uses what ncnn does not have ({', '.join([*unknown, *refused])}): use the ONNX export"
        )
    # type, name, number of inputs, number of outputs, their names
    blobs = {name for fields in layers for name in fields[4 + int(fields[2]) :][: int(fields[3])]}
    wanted = [f"out{i}" for i in range(outputs)]
    if not {"in0", *wanted} <= blobs or f"out{outputs}" in blobs:
        raise ExportError(f"pnnx gave {model.name} other outputs than {', '.join(wanted)}: use the ONNX export")
    return wanted


def _metadata(network: Any, model: Path, imgsz: int, half: bool, folder: Path, outputs: list[str]) -> dict[str, Any]:
    head = network.model[-1]
    entries = stage.metadata(network, model, imgsz, {"batch": 1, "half": half})
    names = entries["names"]
    return {
        **entries,
        "names": {
            str(number): name for number, name in (names.items() if isinstance(names, dict) else enumerate(names))
        },
        "precision": "fp16" if half else "fp32",
        "reg_max": int(getattr(head, "reg_max", 0)),
        "strides": [int(stride) for stride in head.stride] if hasattr(head, "one2many") else [],
        "outputs": outputs,
        "max_detections": int(getattr(head, "max_det", 0)),
        "files": file_facts(folder),
    }


def file_facts(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the size and the hash of a model's graph and weights, as its metadata lists them."""
    return {
        name: {"bytes": (folder / name).stat().st_size, "sha256": manifest.sha256_file(folder / name)}
        for name in (PARAM, BIN)
    }


def _run_once(folder: Path, model: Path, imgsz: int) -> None:
    """Infer once in another process, because a graph that ncnn cannot run may end the process that tries."""
    command = programs.own("benchmark.worker", RUNNERS["ncnn"], folder.resolve(), 1, imgsz, 0)
    done = _run(command, folder, f"ncnn did not finish {model.name}", programs.own_environment(1))
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    for answer in answers:
        if "error" in answer:
            raise ExportError(f"ncnn cannot run {model.name}: {answer['error']}")
    if done.returncode != 0:
        raise ExportError(
            f"ncnn crashed on {model.name} ({programs.exit_reason(done.returncode)}): try another version of pnnx, "
            "or use the ONNX export"
        )


def _run(
    command: list[str], folder: Path, slow: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    try:
        return programs.run(command, TIMEOUT_S, folder, environment)
    except subprocess.TimeoutExpired:
        raise ExportError(f"{slow} in {TIMEOUT_S} s: use the ONNX export") from None


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Annotated[Path, typer.Option(help="checkpoint (.pt)")],
    data: Annotated[str, typer.Option(help="data set YAML or 'shapes'; images of its val split prove parity")],
    output: Annotated[Path, typer.Option(help="folder for NAME_ncnn_model, parity.json and the manifest")],
    imgsz: Annotated[int, typer.Option(min=1, help="side of the square input, px; a multiple of the stride")] = 640,
    half: Annotated[bool, typer.Option(help="store weights in fp16, and let the device compute in fp16")] = False,
    dynamic: Annotated[str | None, typer.Option(help="size: leave the size of the image open")] = None,
    parity_map: Annotated[bool, typer.Option(help="compare the mAP on the val split too")] = False,
    parity_images: Annotated[int, typer.Option(help="real images on which ncnn must equal PyTorch")] = 16,
    bundle: Annotated[Path | None, typer.Option(help="new folder: model, C++ program, Android app")] = None,
    int8: Annotated[bool, typer.Option("--int8", help="compute in 8 bits, within --map-budget")] = False,
    method: Annotated[str, typer.Option(help="with --int8: percentile or kl")] = "percentile",
    calibration: Annotated[str | None, typer.Option(help="with --int8: as for export.quantize")] = None,
    calibration_images: Annotated[int, typer.Option(help="with --int8: training images that ranges come from")] = 32,
    map_budget: Annotated[float, typer.Option(help="with --int8: largest loss of mAP50-95 on the val split")] = 0.015,
    seed: Annotated[int, typer.Option(min=0, help="with --int8: of the choice of calibration images")] = 0,
) -> None:
    """Export a model to ncnn and prove on real images that it equals PyTorch."""
    from compress.data.dataset import resolve
    from export import deploy

    for given, name in ((half, "--half"), (dynamic, "--dynamic")):
        if given and int8:
            raise SettingsError(f"{name} and --int8 exclude each other: choose one")
    if parity_map and int8:
        raise SettingsError("--int8 always compares the mAP: leave out --parity-map")
    of_int8 = {"method": method, "calibration_images": calibration_images, "map_budget": map_budget, "seed": seed}
    quantization = parse(QuantizeNcnn, {**of_int8, "parity_images": parity_images}, "ncnn")
    asked = quantization.changed(*of_int8) or (calibration and "calibration")
    if asked and not int8:
        raise SettingsError(f"--{asked.replace('_', '-')} goes with --int8: add that, or leave it out")
    checkpoint.require_weights(model)
    if bundle:
        deploy.check_bundle(model, bundle)
        if bundle.resolve() in (output.resolve(), *output.resolve().parents):
            raise SettingsError(f"--bundle {bundle} is where --output goes: choose another --bundle")
    if int8:
        made = output / _export_int8(model, data, calibration, imgsz, quantization, output)
    else:
        content = {"half": half, "dynamic": dynamic, "parity_images": parity_images, "parity_map": parity_map}
        settings = parse(ExportNcnn, content, "ncnn")
        export_stage({model.stem: model}, resolve(data, labels=parity_map), imgsz, settings, output)
        made = output / f"{model.stem}{NCNN_SUFFIX}"
    if bundle:
        deploy.write_bundle(made, bundle)
        print(f"bundle: {bundle} (its README.md says what to type)")


def _export_int8(
    model: Path, data: str, calibration: str | None, imgsz: int, settings: QuantizeNcnn, output: Path
) -> str:
    """Run the stage of 8 bits, and return the folder's name."""
    from compress.data.dataset import resolve
    from export import int8, ncnn_int8

    yaml = resolve(data)
    source = yaml if calibration is None else resolve(calibration, labels=False)
    models, export = {model.stem: model}, ncnn_int8.export_int8
    int8.export_stage(ncnn_int8.STAGE, ncnn_int8.SUFFIX, export, models, yaml, source, imgsz, settings, output)
    return f"{model.stem}{ncnn_int8.SUFFIX}"


if __name__ == "__main__":
    run_app(app)
