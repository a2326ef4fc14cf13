"""TensorRT export: an engine built on the machine that will run it, with a sidecar that says what it is."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from compress import manifest
from compress.errors import ExportError, run_app
from compress.settings import Export, ExportTrt, Quantize, parse
from export import stage, trt_builder, trt_target, trtexec
from export.trt_target import Target

STAGE = "trt"
ENGINE, SIDECAR, LAYERS, LOG, SCRIPT = ".engine", ".engine.json", ".layers.json", ".build.log", ".trtexec.sh"
# What an engine depends on beside its ONNX file; a change of any makes it stale.
_IDENTITY = ("flavour", "version", "gpu", "compute_capability", "l4t", "jetpack")
_OLDEST, _COMPATIBLE_SINCE, _BF16_SINCE, _HALF_QDQ_OPSET = (8, 5), (8, 6), (10,), 19
# TF32 has the mantissa of fp16, and bf16 has three bits fewer, which parity knows no closer tolerance for than int8's.
_TOLERANCE = {"fp32": "fp32", "tf32": "fp16", "fp16": "fp16", "bf16": "int8", "int8": "int8"}
Range = tuple[int, int, int]


def export_stage(
    model: Path,
    settings: ExportTrt,
    target: Target,
    output: Path,
    *,
    data: Path | None = None,
    calibration: Path | None = None,
    cache: Path | None = None,
) -> dict[str, Any]:
    """Build `output/NAME.engine` as a stage: skipped when finished and unchanged, built again when stale.

    Stale means that the target has another TensorRT, GPU or JetPack than the engine was built with and for, or that the
    model or a setting changed; what changed is said.

    Args:
        model: a checkpoint (.pt), or an ONNX file (.onnx) of any shape.
        settings: precision, shapes, compatibility …
        target: where it is built.
        output: the stage's folder.
        data: data set YAML; images of its val split prove the ONNX file of a checkpoint.
        calibration: data set YAML whose train split calibrates int8; `data` when not given.
        cache: folder of timing caches, one for each version and GPU.

    Returns:
        The sidecar: hashes, facts of the target, settings, profiles, inputs, outputs, layers by precision, parity.

    Raises:
        CheckpointError: `model` is not a detection model.
        DataError: `data` has no images.
        ExportError: the ONNX file is not one or does not fit the settings, parity fails, the target cannot be reached
            or lacks TensorRT, memory or space, or the build fails.
    """
    parents = _parents(model, data, calibration)
    facts = probe(target, settings.flavour)
    check_support(settings, facts)
    config = {**settings.model_dump(mode="json"), "name": model.stem, **{key: facts[key] for key in _IDENTITY}}
    sidecar = output / f"{model.stem}{SIDECAR}"
    with manifest.lock(output):
        if manifest.is_finished(output, STAGE, config, parents):
            print(f"{STAGE}: finished before, unchanged: {output}")
            return manifest.read_json(sidecar)
        for change in _changes(output, config, parents):
            print(f"{STAGE}: {model.stem}{ENGINE} is stale, it is built again: {change}")
        manifest.begin(output, STAGE, config, parents)
        onnx, parity = make_onnx(model, settings, facts, output, data, calibration)
        record = build(onnx, model.stem, settings, target, facts, output, cache, model, parity)
        endings = [ENGINE, SIDECAR, LAYERS, LOG]
        manifest.finish(output, STAGE, config, parents, [onnx.name, *(model.stem + item for item in endings)], record)
    print(f"{STAGE}: {output / (model.stem + ENGINE)} ({summary(record)})")
    return record


def probe(target: Target, flavour: str) -> dict[str, Any]:
    """Return what the target is: see `trt_builder.facts`.

    Raises:
        ExportError: it cannot be reached, or has no TensorRT.
    """
    with tempfile.TemporaryDirectory() as job:
        manifest.write_json(Path(job) / trt_builder.REQUEST, {"action": "probe", "flavour": flavour})
        return trt_target.run(target, Path(job))["facts"]


def check_support(settings: ExportTrt, facts: dict[str, Any]) -> None:
    """Check that a version of TensorRT can do what is asked for.

    Raises:
        ExportError: it cannot.
    """
    version, numbers = facts["version"], trt_builder.version_tuple(facts["version"])
    if facts["flavour"] == "tensorrt_rtx":
        if settings.version_compatible or settings.hardware_compatible:
            raise ExportError(
                "TensorRT-RTX has no such option, its engines run on every RTX GPU anyway: leave out "
                "--version-compatible and --hardware-compatible"
            )
        if settings.dla is not None:
            raise ExportError("TensorRT-RTX has no DLA: leave out --dla, or use --flavour tensorrt")
        return
    if numbers < _OLDEST:
        raise ExportError(f"TensorRT {version} is too old: 8.5 (JetPack 5.1) or newer is needed")
    if (settings.version_compatible or settings.hardware_compatible) and numbers < _COMPATIBLE_SINCE:
        raise ExportError(f"TensorRT {version} builds no compatible engines, 8.6 does: leave that option out")
    if settings.precision == "bf16" and numbers < _BF16_SINCE:
        raise ExportError(f"TensorRT {version} has no bf16, 10.0 has: use --precision fp16")


def make_onnx(
    model: Path, settings: ExportTrt, facts: dict[str, Any], output: Path, data: Path | None, calibration: Path | None
) -> tuple[Path, dict[str, Any] | None]:
    """Write `output/NAME.onnx` in the types that the target's network takes; return it with its parity record.

    A strongly typed network computes in the types of the ONNX file, so this file has them; a weakly typed one is given
    fp32, or Q/DQ nodes.

    Raises:
        ExportError: see `export_stage`.
    """
    import onnx

    path = output / f"{model.stem}.onnx"
    if model.suffix == ".onnx":
        graph, parity = load_onnx(model), None
        _check_precision(model, graph, settings)
    else:
        _check_static(settings)
        assert data is not None  # `_parents` asked for it
        graph, parity = _export(model, settings, output, data, calibration or data)
    half = settings.rest if settings.precision == "int8" else settings.precision
    if facts["strongly_typed"] and half in ("fp16", "bf16") and not _is_half(graph):
        from export.half import convert

        graph = convert(graph, half)
        parity = _prove_half(model, graph, half, settings, output, data) if parity else None
    manifest.write_bytes_atomic(path, graph.SerializeToString(deterministic=True))
    onnx.checker.check_model(str(path))
    return path, parity


def load_onnx(path: Path) -> Any:
    """Open an ONNX file.

    Raises:
        ExportError: it is missing, cut short, not ONNX, or keeps its weights in other files.
    """
    import onnx
    from google.protobuf.message import DecodeError

    if not path.is_file():
        raise ExportError(f"{path} does not exist: check the path")
    try:
        graph = onnx.load(path, load_external_data=False)
        onnx.checker.check_model(graph)
    except (DecodeError, onnx.checker.ValidationError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ExportError(f"{path} is not an ONNX file, or is damaged ({reason}): export it again") from None
    if any(item.data_location == onnx.TensorProto.EXTERNAL for item in graph.graph.initializer):
        raise ExportError(f"{path} keeps its weights in other files: save it as one file")
    return graph


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


def build(
    onnx: Path,
    name: str,
    settings: ExportTrt,
    target: Target,
    facts: dict[str, Any],
    output: Path,
    cache: Path | None,
    model: Path | None = None,
    parity: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Build `output/NAME.engine` from an ONNX file in the target's types, with layer report, log and sidecar.

    Engine and sidecar get their names last: a build that fails leaves the log.

    Returns:
        The sidecar.

    Raises:
        ExportError: the shapes do not fit, or the build fails.
    """
    graph = load_onnx(onnx)
    request = make_request(onnx.name, graph, settings, facts, name)
    timing = _timing_cache(cache, facts)
    with _job(output, name) as job:
        shutil.copyfile(onnx, job / request["onnx"])
        if timing is not None and timing.is_file():
            shutil.copyfile(timing, job / request["timing_cache"])
        manifest.write_json(job / trt_builder.REQUEST, request)
        print(
            f"{STAGE}: building {name}{ENGINE} on {target.name} ({facts['flavour']} {facts['version']}, "
            f"{settings.precision}), on a small device for minutes",
            flush=True,
        )
        result = trt_target.run(target, job)
        built = result["built"]
        record = _sidecar(job / request["engine"], onnx, graph, settings, request, {**facts, **result["facts"]}, built)
        record["model_sha256"] = manifest.sha256_file(model) if model is not None else None
        record["parity"] = parity
        if timing is not None and (job / request["timing_cache"]).is_file():
            timing.parent.mkdir(parents=True, exist_ok=True)
            manifest.write_bytes_atomic(timing, (job / request["timing_cache"]).read_bytes())
        manifest.write_json(output / f"{name}{LAYERS}", built["layers"])
        (job / request["engine"]).replace(output / f"{name}{ENGINE}")
    manifest.write_json(output / f"{name}{SIDECAR}", record)
    return record


def make_request(onnx: str, graph: Any, settings: ExportTrt, facts: dict[str, Any], name: str) -> dict[str, Any]:
    """Return what `trt_builder.py` is asked for; see its `build`.

    Raises:
        ExportError: the shapes do not fit the graph, or a DLA is to run dynamic ones.
    """
    from export import qdq

    profiles = profiles_of(onnx, graph, settings.batch, settings.imgsz)
    if settings.dla is not None and any(low != high for low, _, high in profiles.values()):
        raise ExportError("a DLA runs fixed shapes only: give --batch and --imgsz as one number each")
    return {
        "action": "build",
        "flavour": facts["flavour"],
        "onnx": "model.onnx",
        "engine": "model.engine",
        # TensorRT-RTX times nothing when it builds.
        "timing_cache": "timing.cache" if facts["flavour"] == "tensorrt" else None,
        "precision": settings.precision,
        "rest": settings.rest,
        "float_nodes": [] if facts["strongly_typed"] else sorted(qdq.behind_layers(graph)),
        "profiles": profiles,
        "workspace_mib": settings.workspace,
        "version_compatible": settings.version_compatible,
        "hardware_compatible": settings.hardware_compatible,
        "dla": settings.dla,
        "name": name,
    }


def write_script(
    model: Path,
    settings: ExportTrt,
    facts: dict[str, Any],
    output: Path,
    data: Path | None = None,
    calibration: Path | None = None,
) -> Path:
    """Write `output/NAME.onnx` and beside it the script that builds its engine with NVIDIA's tool; build nothing.

    Args:
        facts: flavour and version of the target.

    Raises:
        ExportError: as `export_stage`, as far as the ONNX file goes.
    """
    check_support(settings, facts)
    output.mkdir(parents=True, exist_ok=True)
    _parents(model, data, calibration)
    if model.resolve() == (output / f"{model.stem}.onnx").resolve():
        raise ExportError(f"{model} is in --output, where its typed copy goes: choose another --output")
    onnx, _ = make_onnx(model, settings, facts, output, data, calibration)
    request = make_request(onnx.name, load_onnx(onnx), settings, facts, model.stem)
    own = {"onnx": onnx.name, "engine": f"{model.stem}{ENGINE}"}
    if request["timing_cache"] is not None:
        own["timing_cache"] = f"{model.stem}.timing.cache"
    path = output / f"{model.stem}{SCRIPT}"
    manifest.write_bytes_atomic(path, trtexec.script(facts["flavour"], facts["version"], {**request, **own}).encode())
    path.chmod(0o755)
    print(f"{STAGE}: {path} (for {facts['flavour']} {facts['version']}; nothing was built)")
    return path


def summary(record: dict[str, Any]) -> str:
    """Say in a line what a sidecar says: version, target, precision and what the layers really compute in."""
    facts, layers = record["facts"], record["precisions"]
    named = ", ".join(f"{count} {precision}" for precision, count in layers.items()) or "not reported"
    loaded = "loaded and inspected" if record["loaded"] else "not loaded: no GPU there"
    place = facts["gpu"] or "no GPU"
    return (
        f"{facts['flavour']} {facts['version']}, {place}, {record['settings']['precision']}; layers by precision: "
        f"{named}; {loaded}"
    )


def default_cache() -> Path:
    """Return where timing caches are kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "espalier" / "tensorrt"


def _parents(model: Path, data: Path | None, calibration: Path | None) -> dict[str, str]:
    from compress.dataset import fingerprint

    if model.suffix not in (".pt", ".onnx"):
        raise ExportError(f"{model} must be a checkpoint (.pt) or an ONNX file (.onnx)")
    if model.suffix == ".pt":
        stage.require(model)
        if data is None:
            raise ExportError(f"--data is missing: real images prove the ONNX file of {model.name} before it is built")
    elif not model.is_file():
        raise ExportError(f"{model} does not exist: check the path")
    parents = manifest.input_hashes({"model": model})
    given = {"data": data, "calibration": calibration}
    return parents | {role: fingerprint(path) for role, path in given.items() if path is not None}


def _changes(output: Path, config: dict[str, Any], parents: dict[str, str]) -> list[str]:
    """Say what differs from the engine that is there."""
    path = output / manifest.MANIFEST
    if not path.is_file():
        return []
    before = manifest.read_json(path)
    changes = [
        f"{key} was {before['config'].get(key)}, now it is {value}"
        for key, value in config.items()
        if before["config"].get(key) != value
    ]
    changes += [f"{role} has changed" for role, value in parents.items() if before["parents"].get(role) != value]
    return changes or ["a file of it is missing or has changed"]


def _export(
    model: Path, settings: ExportTrt, output: Path, data: Path, calibration: Path
) -> tuple[Any, dict[str, Any]]:
    """Return the ONNX graph of a checkpoint, fp32 or with Q/DQ nodes, and the record that proves it."""
    from compress.dataset import images
    from export.onnx import export_checked
    from export.quantize import export_int8

    imgsz = parse_range(settings.imgsz or "640", "imgsz")[0]
    path = output / f"{model.stem}.onnx"
    if settings.precision == "int8":
        opset = max(settings.opset, _HALF_QDQ_OPSET) if settings.rest == "fp16" else settings.opset
        quantize = Quantize(target="tensorrt", opset=opset, parity_images=settings.parity_images)
        record = export_int8(model, path, data, calibration, imgsz, quantize)
    else:
        chosen = images(data, "val")[: settings.parity_images]
        record = export_checked(model, path, chosen, imgsz, Export(opset=settings.opset))
    return load_onnx(path), record


def _prove_half(
    model: Path, graph: Any, half: str, settings: ExportTrt, output: Path, data: Path | None
) -> dict[str, Any] | None:
    """Compare a 16-bit graph with PyTorch, as far as onnxruntime can run it on a CPU: it has no bf16 convolution."""
    from compress.dataset import images
    from export import parity

    if half == "bf16" or data is None:
        return None
    path, chosen = output / f"{model.stem}.onnx", images(data, "val")[: settings.parity_images]
    imgsz = parse_range(settings.imgsz or "640", "imgsz")[0]
    return stage.prove(
        path,
        lambda place: manifest.write_bytes_atomic(place, graph.SerializeToString(deterministic=True)),
        lambda place: parity.compare(model, place, chosen, imgsz, precision=_TOLERANCE[settings.precision]),
        "use --precision fp32 or tf32",
    )


def _check_static(settings: ExportTrt) -> None:
    ranges = [parse_range(text, name) for name, text in (("imgsz", settings.imgsz), ("batch", settings.batch)) if text]
    if any(low != high for low, _, high in ranges) or settings.batch not in (None, "1"):
        raise ExportError(
            "a checkpoint is exported for batch 1 and one image size: for others give the dynamic .onnx file of it"
        )


def _check_precision(path: Path, graph: Any, settings: ExportTrt) -> None:
    """Check that the types of an ONNX file do not contradict the precision that is asked for."""
    quantized = any(node.op_type == "QuantizeLinear" for node in graph.graph.node)
    if settings.precision == "int8":
        if not quantized:
            raise ExportError(
                f"{path.name} has no Q/DQ nodes, which int8 needs: make it with export.quantize --target tensorrt, or "
                "give the checkpoint with --data"
            )
        opset = max(item.version for item in graph.opset_import if item.domain in ("", "ai.onnx"))
        if settings.rest == "fp16" and opset < _HALF_QDQ_OPSET:
            raise ExportError(f"--rest fp16 needs opset {_HALF_QDQ_OPSET}, {path.name} has {opset}: export it again")
    elif quantized:
        raise ExportError(f"{path.name} is quantized: use --precision int8")
    elif _is_half(graph) and settings.precision in ("fp32", "tf32"):
        raise ExportError(f"{path.name} has 16-bit weights: use --precision fp16 or bf16, or give the fp32 file")


def _is_half(graph: Any) -> bool:
    import onnx

    kinds = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
    return any(item.data_type in kinds for item in graph.graph.initializer)


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


@contextmanager
def _job(output: Path, name: str) -> Iterator[Path]:
    """Yield a job folder beside the results; its log is kept, whatever happens."""
    with tempfile.TemporaryDirectory(dir=output, prefix=".job.") as folder:
        job = Path(folder)
        try:
            yield job
        finally:
            if (job / trt_builder.LOG).is_file():
                (job / trt_builder.LOG).replace(output / f"{name}{LOG}")


def _timing_cache(cache: Path | None, facts: dict[str, Any]) -> Path | None:
    """Return the timing cache of a version and a GPU, which no other may use."""
    if cache is None or facts["flavour"] != "tensorrt":
        return None
    key = f"{facts['version']}_{facts['gpu']}_{facts['compute_capability']}"
    return cache / f"{re.sub(r'[^A-Za-z0-9.]+', '-', key)}.timing"


def _sidecar(
    engine: Path,
    onnx: Path,
    graph: Any,
    settings: ExportTrt,
    request: dict[str, Any],
    facts: dict[str, Any],
    built: dict[str, Any],
) -> dict[str, Any]:
    entries = {item.key: item.value for item in graph.metadata_props}
    precisions = Counter(layer["precision"] for layer in built["layers"] if layer["precision"] is not None)
    return {
        "schema": manifest.SCHEMA,
        "engine": {"bytes": built["bytes"], "sha256": manifest.sha256_file(engine)},
        "onnx_sha256": manifest.sha256_file(onnx),
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
        "names": _literal(entries.get("names")),
        "stride": _literal(entries.get("stride")),
        "task": entries.get("task"),
        "end2end": bool(_literal(entries.get("end2end"))),
    }


def _literal(text: str | None) -> Any:
    import ast

    try:
        return ast.literal_eval(text) if text else None
    except (ValueError, SyntaxError):
        return None


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Annotated[Path, typer.Option(help="checkpoint (.pt) or ONNX file (.onnx)")],
    output: Annotated[Path, typer.Option(help=f"folder for NAME{ENGINE}, its sidecar, layers, log and ONNX file")],
    data: Annotated[str | None, typer.Option(help="data set YAML or 'shapes'; proves a checkpoint's ONNX file")] = None,
    calibration: Annotated[
        str | None, typer.Option(help="data set whose train split calibrates int8; --data's")
    ] = None,
    target: Annotated[str, typer.Option(help="local, or ssh://[user@]host[:port]")] = "local",
    python: Annotated[str | None, typer.Option(help="interpreter of the target that sees TensorRT")] = None,
    flavour: Annotated[str, typer.Option(help="tensorrt, tensorrt_rtx, or auto: what the target has")] = "auto",
    precision: Annotated[str, typer.Option(help="fp32, tf32, fp16, bf16 or int8")] = "fp16",
    rest: Annotated[str, typer.Option(help="what int8 leaves in float: fp32 or fp16")] = "fp32",
    imgsz: Annotated[str | None, typer.Option(help="px, or MIN:OPT:MAX for a dynamic ONNX file; 640 for a .pt")] = None,
    batch: Annotated[str | None, typer.Option(help="N, or MIN:OPT:MAX for a dynamic ONNX file")] = None,
    workspace: Annotated[int | None, typer.Option(help="MiB that builder and engine may use")] = None,
    version_compatible: Annotated[bool, typer.Option(help="later versions of TensorRT can load it")] = False,
    hardware_compatible: Annotated[bool, typer.Option(help="every GPU from Ampere on can load it")] = False,
    dla: Annotated[int | None, typer.Option(help="DLA core; what it cannot do falls back to the GPU")] = None,
    opset: Annotated[int, typer.Option(help="ONNX operator set for a checkpoint, 13 to 22")] = 17,
    parity_images: Annotated[int, typer.Option(help="real images on which ONNX must equal PyTorch")] = 16,
    cache: Annotated[Path | None, typer.Option(help="folder of timing caches; ~/.cache/espalier/tensorrt")] = None,
    script: Annotated[bool, typer.Option("--script", help="write the trtexec command and build nothing")] = False,
    trt_version: Annotated[str | None, typer.Option(help="with --script: the version, instead of asking")] = None,
) -> None:
    """Build a TensorRT engine on the machine that will run it, and say what each layer really computes in."""
    from compress.dataset import resolve

    content = {
        "precision": precision,
        "rest": rest,
        "flavour": flavour,
        "batch": batch,
        "imgsz": imgsz,
        "workspace": workspace,
        "version_compatible": version_compatible,
        "hardware_compatible": hardware_compatible,
        "dla": dla,
        "opset": opset,
        "parity_images": parity_images,
    }
    settings = parse(ExportTrt, content, "trt")
    place = trt_target.parse_target(target, python)
    yaml = None if data is None else resolve(data)
    source = None if calibration is None else resolve(calibration, labels=False)
    if script:
        facts = probe(place, flavour) if trt_version is None else _facts_of(flavour, trt_version)
        write_script(model, settings, facts, output, yaml, source)
        return
    where = cache or default_cache()
    export_stage(model, settings, place, output, data=yaml, calibration=source, cache=where)


def _facts_of(flavour: str, version: str) -> dict[str, Any]:
    if not re.fullmatch(r"\d+\.\d+(\.\d+){0,2}", version):
        raise ExportError(f"--trt-version must be a version such as 10.3, got {version!r}")
    name = "tensorrt" if flavour == "auto" else flavour
    return {
        "flavour": name,
        "version": version,
        "strongly_typed": trt_builder.is_strongly_typed(name, version),
        "gpu": None,
        "compute_capability": None,
    }


if __name__ == "__main__":
    run_app(app)
