"""What every 8-bit export shares: calibration images, the search within an mAP budget, the proof, and the speed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from compress import manifest
from compress.data.dataset import data_hash, sample_images
from compress.data.dataset import images as images_of
from compress.settings import Quantization
from export import mixed, stage

RANKING_IMAGES = 8
MEANINGLESS_MAP = 0.02  # of PyTorch's own: a loss of some points cannot be seen below it


@dataclass(frozen=True)
class Quantizer:
    """An exported model, and how a runtime's 8-bit version of it is written.

    Attributes:
        dense: the export in fp32.
        layers: names of the layers that can be quantized.
        write: writes to a path the model with these layers in float and all others in 8 bits.
        write_alone: writes to a path the model with only this layer in 8 bits.
        facts: how it was calibrated, for the record.
    """

    dense: Path
    layers: list[str]
    write: Callable[[Path, list[str]], object]
    write_alone: Callable[[Path, str], object]
    facts: dict[str, Any]


def export_mixed(
    model: Path,
    output: Path,
    data: Path,
    images: list[Path],
    imgsz: int,
    settings: Quantization,
    quantizer: Quantizer,
    *,
    measured: bool = True,
) -> dict[str, Any]:
    """Choose the layers that stay in float, write the model, prove it, and measure its latency beside fp32.

    What the search has found lies beside `output`'s folder until it is over, so that a second start goes on from there,
    also one with another budget, for which the folder itself is moved aside.

    Args:
        model: the checkpoint.
        output: the file or folder to write; it appears whole or not at all.
        data: data set YAML, whose val split gives the mAP, and images for parity.
        images: what calibrated.
        imgsz: side of the square input, px.
        settings: mAP budget, images for parity.
        quantizer: of the runtime.
        measured: whether this machine is the target, whose latency counts.

    Returns:
        The parity record (see `parity.compare`) with two more keys: `quantization` (calibration and its hash, layers,
        those in float, how they were found) and `latency` (fp32 and int8 on this machine; null for another target).

    Raises:
        DataError: the val split has no images, or no labels to compute mAP from.
        ParityError: no choice of layers meets the budget, or parity fails: the model is kept as `NAME.rejected`.
    """
    from benchmark import runtimes
    from benchmark.accuracy import evaluate
    from compress.data.pixels import letterbox
    from export import parity

    val = images_of(data, "val")
    # A name that the search writes again and again, of an ending that tells its runtime.
    candidate = quantizer.dense.with_name(f"candidate{runtimes.suffix(output)}")
    facts = {
        **quantizer.facts,
        "calibration_images": len(images),
        "calibration_sha256": calibration_hash(images),
        "calibration_images_in_val": len({path.resolve() for path in images} & {path.resolve() for path in val}),
    }
    identity = {
        "model": manifest.sha256_file(model),
        "dense": runtimes.sha256(quantizer.dense),
        "data": data_hash(data, "val"),
        "imgsz": imgsz,
        "tools": manifest.tool_versions(),
        **facts,
    }
    folder = output.parent.resolve()
    journal = mixed.Journal(folder.with_name(f".{folder.name}.{output.name}.search.json"), identity)

    def score(in_float: list[str]) -> float:
        def find() -> float:
            quantizer.write(candidate, in_float)
            return evaluate(candidate, data, imgsz=imgsz)["map50_95"]

        return journal.remember(f"mAP50-95 with {sorted(in_float)} in float", find)

    def alone(layer: str) -> Path:
        quantizer.write_alone(candidate, layer)
        return candidate

    def rank() -> dict[str, float]:
        samples = [letterbox(path, imgsz) for path in images[:RANKING_IMAGES]]
        return mixed.sensitivity(quantizer.dense, quantizer.layers, samples, alone, journal)

    torch_map = journal.remember("mAP50-95 in PyTorch", lambda: evaluate(model, data, imgsz=imgsz)["map50_95"])
    choice = mixed.choose_float_layers(quantizer.layers, score, rank, torch_map - settings.map_budget)
    record = stage.prove(
        output,
        lambda path: quantizer.write(path, choice.float_layers),
        lambda path: parity.compare(
            model,
            path,
            val[: settings.parity_images],
            imgsz,
            precision="int8",
            maps=(torch_map, choice.map50_95),
            tolerance=replace(parity.TOLERANCES["int8"], map50_95=(-settings.map_budget, 1.0)),
        ),
        "try another --method, more --calibration-images or a smaller --map-budget",
    )
    record["quantization"] = {**facts, "layers": len(quantizer.layers), **asdict(choice)}
    record["latency"] = speed(quantizer.dense, output, imgsz) if measured else None
    journal.forget()
    return record


def calibration_images(data: Path, settings: Quantization) -> list[Path]:
    """Return training images, drawn by the seed.

    Raises:
        DataError: the data set has no train split, or no images in it.
    """
    return sample_images(data, "train", settings.calibration_images, settings.seed)


def calibration_hash(images: list[Path]) -> str:
    """Return a hash of what the images hold, whatever they are called and wherever they lie."""
    return manifest.sha256_json(sorted(manifest.sha256_file(path) for path in images))


def speed(dense: Path, quantized: Path, imgsz: int, mode: str = "quick") -> dict[str, Any]:
    """Measure both models in turns, one thread, and return p50 and the speed-up with its interval."""
    from benchmark import runtimes
    from benchmark.latency import measure

    files = {name: {str(runtimes.runtime_of(path)): path} for name, path in (("fp32", dense), ("int8", quantized))}
    record = measure(files, imgsz=imgsz, threads=1, mode=mode)
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


def export_stage(
    name: str,
    suffix: str,
    export: Callable[..., dict[str, Any]],
    models: dict[str, Path],
    data: Path,
    calibration: Path,
    imgsz: int,
    settings: Quantization,
    output: Path,
) -> dict[str, Any]:
    """Quantize each model to `output/NAME` + suffix as a stage (skipped when finished and unchanged); say what counts.

    Args:
        name: of the stage.
        suffix: ending of each artefact.
        export: `export_int8` of a runtime.
        models: checkpoints by name.
        data: data set YAML, whose val split gives the mAP, and images for parity.
        calibration: data set YAML, whose train split calibrates.
        imgsz: side of the square input, px.
        settings: of that runtime.
        output: the stage's folder.

    Returns:
        The content of `parity.json`: {name: record of `export`}.
    """
    from compress.data.dataset import fingerprint

    def export_one(model: str, path: Path, _: list[Path]) -> dict[str, Any]:
        return export(path, output / f"{model}{suffix}", data, calibration, imgsz, settings)

    def check(model: Path) -> None:
        stage.check_model(model, imgsz, data, detector=True)

    config = {"imgsz": imgsz, "calibration": fingerprint(calibration), **settings.model_dump(mode="json")}
    records = stage.run_stage(
        name,
        models,
        data,
        config,
        output,
        lambda: stage.export_models(models, data, settings.parity_images, output, export_one),
        lambda model: f"{model}{suffix}",
        check,
    )
    for record in records.values():
        for remark in remarks(record):
            print(f"{name}: {remark}")
    return records


def remarks(record: dict[str, Any]) -> list[str]:
    """Return what a person should know beside the parity: float layers, speed, and doubts."""
    facts, latency = record["quantization"], record["latency"]
    found = [f"{len(facts['float_layers'])} of {facts['layers']} layers in float"]
    if latency is not None:
        low, high = latency["interval"]
        times = f"{latency['speedup']:.2f} times as fast as fp32 on this machine ({low:.2f}–{high:.2f})"
        doubt = "slower: " if high < 1.0 else "not measurably faster: "
        found.append(times if latency["faster"] else f"{doubt}{times}; use fp32 here")
        if noise := latency["noise"]:
            more = f" (and {len(noise) - 1} more signs of it)" if len(noise) > 1 else ""
            found.append(f"the measurement is noisy: {noise[0]}{more}")
    if (known := record["map50_95"]["torch"]) <= MEANINGLESS_MAP:
        found.append(f"the model finds next to nothing (mAP50-95 {known:.4f} in PyTorch): its mAP proves nothing here")
    if facts["calibration_images_in_val"]:
        found.append(f"{facts['calibration_images_in_val']} calibration images are val images too: its mAP flatters")
    return found
