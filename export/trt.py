"""TensorRT export: an engine built on the machine that will run it, with a sidecar that says what it is."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from compress import checkpoint, manifest
from compress.errors import ExportError, ParityError, SettingsError, run_app
from compress.settings import ExportTrt, parse
from export import stage, trt_builder, trt_target, trtexec
from export.trt_onnx import (
    TOLERANCE,
    check_precision,
    check_static,
    checkpoint_imgsz,
    load_onnx,
    make_onnx,
    profiles_of,
)
from export.trt_sidecar import sidecar, summary
from export.trt_target import Local, Target

STAGE = "trt"
ENGINE, SIDECAR, LAYERS, LOG, SCRIPT = ".engine", ".engine.json", ".layers.json", ".build.log", ".trtexec.sh"
# What an engine depends on beside its ONNX file; a change of any makes it stale.
_IDENTITY = ("flavour", "version", "gpu", "compute_capability", "l4t", "jetpack")
_OLDEST, _COMPATIBLE_SINCE, _BF16_SINCE, _DLA_QDQ_SINCE = (8, 5), (8, 6), (10,), (10,)


def export_stage(
    model: Path,
    settings: ExportTrt,
    target: Target,
    output: Path,
    *,
    data: Path | None = None,
    calibration: Path | None = None,
    cache: Path | None = None,
    name: str | None = None,
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
        name: NAME; the model file's own when not given.

    Returns:
        The sidecar: hashes, facts of the target, settings, profiles, inputs, outputs, layers by precision, parity.

    Raises:
        CheckpointError: `model` is not a detection model.
        DataError: `data` has no images.
        ExportError: the ONNX file is not one or does not fit the settings, parity fails, the target cannot be reached
            or lacks TensorRT, memory or space, or the build fails.
    """
    name = name or model.stem
    if model.suffix == ".onnx" and output.resolve() in model.resolve().parents:
        raise ExportError(f"{model} lies in --output, where what is built of it goes: choose another --output")
    parents = _parents(model, data, calibration)
    facts = probe(target, settings.flavour)
    check_support(settings, facts)
    config = {**settings.model_dump(mode="json"), "name": name, **{key: facts[key] for key in _IDENTITY}}
    engine, onnx = output / f"{name}{ENGINE}", output / f"{name}.onnx"
    with manifest.lock(output):
        if manifest.is_finished(output, STAGE, config, parents):
            print(f"{STAGE}: finished before, unchanged: {output}")
            return manifest.read_json(engine.with_suffix(SIDECAR))
        _check_fits(model, settings, facts, data)
        for change in _changes(output, config, parents):
            print(f"{STAGE}: {engine.name} is stale, it is built again: {change}")
        manifest.begin(output, STAGE, config, parents)
        parity = make_onnx(model, onnx, settings, facts["strongly_typed"], data, calibration)
        more = {"model_sha256": parents["model"], "parity": parity, "engine_parity": None}
        prove = _prover(model, settings, target, facts, data)
        record = build(onnx, engine, settings, target, facts, cache=cache, more=more, prove=prove)
        files = [engine, onnx, *(engine.with_suffix(ending) for ending in (SIDECAR, LAYERS, LOG))]
        manifest.finish(output, STAGE, config, parents, [path.name for path in files], record)
    print(f"{STAGE}: {engine} ({summary(record)})")
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
    if settings.dla is not None and settings.precision == "int8" and numbers < _DLA_QDQ_SINCE:
        raise ExportError(f"TensorRT {version} runs no Q/DQ nodes on a DLA: use --precision fp16, or leave out --dla")
    if settings.precision == "bf16" and numbers < _BF16_SINCE:
        raise ExportError(f"TensorRT {version} has no bf16, 10.0 has: use --precision fp16")


def build(
    onnx: Path,
    output: Path,
    settings: ExportTrt,
    target: Target,
    facts: dict[str, Any],
    *,
    cache: Path | None = None,
    more: dict[str, Any] | None = None,
    prove: Callable[[Path], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Build an engine from an ONNX file in the target's types, with layer report, log and sidecar.

    Engine and sidecar get their names last: of a build that fails only the log is left.

    Args:
        onnx: the ONNX file, see `trt_onnx.make_onnx`.
        output: the engine's path, NAME.engine.
        settings: precision, shapes, compatibility …
        target: where it is built.
        facts: what `probe` returned.
        cache: folder of timing caches.
        more: further entries of the sidecar.
        prove: compares the engine with PyTorch and returns a parity record; null where it cannot run.

    Returns:
        The sidecar.

    Raises:
        ExportError: the shapes do not fit, the build fails, or the engine does not equal PyTorch: it is then kept as
            NAME.rejected.engine.
    """
    graph = load_onnx(onnx)
    request = make_request(onnx.name, graph, settings, facts)
    timing = _timing_cache(cache, facts)
    with _job(output) as job:
        shutil.copyfile(onnx, job / request["onnx"])
        if timing is not None and timing.is_file():
            shutil.copyfile(timing, job / request["timing_cache"])
        manifest.write_json(job / trt_builder.REQUEST, request)
        print(
            f"{STAGE}: building {output.name} on {target.name} ({facts['flavour']} {facts['version']}, "
            f"{settings.precision}); a small device takes minutes",
            flush=True,
        )
        result = trt_target.run(target, job)
        if timing is not None and (job / request["timing_cache"]).is_file():
            timing.parent.mkdir(parents=True, exist_ok=True)
            manifest.write_bytes_atomic(timing, (job / request["timing_cache"]).read_bytes())
        built, engine = result["built"], job / request["engine"]
        hashes = {"onnx_sha256": manifest.sha256_file(onnx), "engine_sha256": manifest.sha256_file(engine)}
        record = {**sidecar(graph, settings, request, result["facts"], built, hashes), **(more or {})}
        manifest.write_json(job / f"{engine.name}.json", record)
        if prove is not None:
            record["engine_parity"] = _prove_engine(engine, output, prove)
        manifest.write_json(output.with_suffix(LAYERS), built["layers"])
        engine.replace(output)
    manifest.write_json(output.with_suffix(SIDECAR), record)
    return record


def make_request(onnx: str, graph: Any, settings: ExportTrt, facts: dict[str, Any]) -> dict[str, Any]:
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
    _parents(model, data, calibration)
    _check_fits(model, settings, facts, data)
    onnx = output / f"{model.stem}.onnx"
    if model.resolve() == onnx.resolve():
        raise ExportError(f"{model} lies in --output, where its copy in the target's types goes: choose another")
    path = onnx.with_suffix(SCRIPT)
    if onnx.exists() and not path.exists():
        raise ExportError(f"{onnx} is there, and no earlier --script wrote it: choose another --output")
    output.mkdir(parents=True, exist_ok=True)
    make_onnx(model, onnx, settings, facts["strongly_typed"], data, calibration)
    request = make_request(onnx.name, load_onnx(onnx), settings, facts)
    own = {"onnx": onnx.name, "engine": f"{model.stem}{ENGINE}"}
    if request["timing_cache"] is not None:
        own["timing_cache"] = f"{model.stem}.timing.cache"
    manifest.write_bytes_atomic(path, trtexec.script(facts["flavour"], facts["version"], {**request, **own}).encode())
    path.chmod(0o755)
    print(f"{STAGE}: {path} (for {facts['flavour']} {facts['version']}; nothing was built)")
    return path


def default_cache() -> Path:
    """Return where timing caches are kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "espalier" / "tensorrt"


def _parents(model: Path, data: Path | None, calibration: Path | None) -> dict[str, str]:
    from compress.data.dataset import fingerprint

    if model.suffix not in (".pt", ".onnx"):
        raise ExportError(f"{model} must be a checkpoint (.pt) or an ONNX file (.onnx)")
    if model.suffix == ".pt":
        checkpoint.require_weights(model)
        if data is None:
            raise ExportError(f"--data is missing: real images prove the ONNX file of {model.name} before it is built")
    elif not model.is_file():
        raise ExportError(f"{model} does not exist: check the path")
    parents = manifest.input_hashes({"model": model})
    given = {"data": data, "calibration": calibration}
    return parents | {role: fingerprint(path) for role, path in given.items() if path is not None}


def _check_fits(model: Path, settings: ExportTrt, facts: dict[str, Any], data: Path | None) -> None:
    """Meet what does not fit the model before anything is exported, or earlier work moved aside."""
    if model.suffix == ".onnx":
        graph = load_onnx(model)
        check_precision(model, graph, settings)
        make_request(model.name, graph, settings, facts)
        return
    check_static(settings)
    is_scored = settings.precision == "int8"  # by the search for the layers that stay in float
    stage.check_model(model, checkpoint_imgsz(settings), data if is_scored else None, detector=is_scored)


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


@contextmanager
def _job(output: Path) -> Iterator[Path]:
    """Yield a job folder beside the engine; its log is kept, whatever happens."""
    for left in output.parent.glob(".job.*"):  # by a start that was killed
        stage.remove(left)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".job.") as folder:
        job = Path(folder)
        try:
            yield job
        finally:
            if (job / trt_builder.LOG).is_file():
                (job / trt_builder.LOG).replace(output.with_suffix(LOG))


def _prover(
    model: Path, settings: ExportTrt, target: Target, facts: dict[str, Any], data: Path | None
) -> Callable[[Path], dict[str, Any]] | None:
    """Return what compares an engine with PyTorch; null where there is no PyTorch model, or no GPU on this machine."""
    if model.suffix != ".pt" or data is None or not isinstance(target, Local) or facts["gpu"] is None:
        return None
    from compress.data.dataset import images
    from export import parity

    chosen, imgsz = images(data, "val")[: settings.parity_images], checkpoint_imgsz(settings)
    return lambda engine: parity.compare(model, engine, chosen, imgsz, precision=TOLERANCE[settings.precision])


def _prove_engine(engine: Path, output: Path, prove: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    from export import parity

    record = prove(engine)
    if not record["passed"]:
        rejected = output.with_suffix(f".rejected{ENGINE}")
        engine.replace(rejected)
        raise ParityError(
            f"{output.name} does not equal PyTorch on {parity.summary(record)}: {', '.join(parity.failures(record))}; "
            f"kept as {rejected.name}: use a wider --precision"
        )
    return record


def _timing_cache(cache: Path | None, facts: dict[str, Any]) -> Path | None:
    """Return the timing cache of a version and a GPU, which no other may use."""
    if cache is None or facts["flavour"] != "tensorrt":
        return None
    key = f"{facts['version']}_{facts['gpu']}_{facts['compute_capability']}"
    return cache / f"{re.sub(r'[^A-Za-z0-9.]+', '-', key)}.timing"


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Annotated[Path, typer.Option(help="checkpoint (.pt) or ONNX file (.onnx)")],
    output: Annotated[Path, typer.Option(help=f"folder for NAME{ENGINE}, its sidecar, layers, log and ONNX file")],
    data: Annotated[str | None, typer.Option(help="data set YAML or 'shapes'; proves a checkpoint's ONNX file")] = None,
    calibration: Annotated[
        str | None, typer.Option(help="data set whose train split calibrates int8; --data's")
    ] = None,
    target: Annotated[str, typer.Option(help="local, or ssh://\\[user@]host[:port]")] = "local",
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
    from compress.data.dataset import resolve

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
    if calibration is not None and precision != "int8":
        raise SettingsError(f"--calibration goes with --precision int8, precision is {precision}")
    asked = {"--data": data, "--calibration": calibration, "--opset": settings.changed("opset")}
    asked["--parity-images"] = settings.changed("parity_images")
    if model.suffix == ".onnx" and (option := next((name for name, value in asked.items() if value), None)):
        raise SettingsError(f"{option} goes with a checkpoint, {model.name} is built as it is: leave it out")
    if trt_version is not None and not script:
        raise ExportError("--trt-version goes with --script: an engine is built by the version that the target has")
    if trt_version is not None and (target != "local" or python is not None):
        raise SettingsError("--trt-version stands for asking the target: leave out --target and --python")
    if cache is not None and script:
        raise SettingsError("--cache goes with a build, a script keeps its cache beside the engine: leave it out")
    # Only the search for the layers of 8 bits scores anything.
    yaml = None if data is None else resolve(data, labels=precision == "int8")
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
