"""What is asked of a device, the model files that it needs for that, and their scores there."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmark import runtimes, sites
from benchmark.origins import origin as origin_of
from benchmark.sites import Site
from benchmark.transports import Adb, Transport
from compress import manifest
from compress.devices import Device, always_fp32
from compress.errors import BenchmarkError, SettingsError

IMGSZ = 640
EXPORTS, SCORES, OUTPUTS = "exports", "scores", "outputs"
PRECISIONS = ("fp32", "fp16")


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        device: where.
        models: name → runtime → the file that was named; a checkpoint is still to be exported where the runtime is
            not torch.
        data: data set YAML (or folder of classified images) to score on; null for none.
        host, python: as they were typed.
    """

    device: Device
    models: dict[str, dict[str, Path]]
    precision: str
    imgsz: int
    threads: int
    data: Path | None
    split: str
    host: str | None
    python: str | None = None
    batches: tuple[int, ...] = (1,)

    def config(self) -> dict[str, Any]:
        """Return what a manifest says of it."""
        exported = any(_is_exported(runtime, path) for files in self.models.values() for runtime, path in files.items())
        config = {
            "device": self.device.name,
            "host": self.host or self.device.host,
            "imgsz": self.imgsz,
            "threads": self.threads,
            "precision": self.precision if exported else None,
            "split": None if self.data is None else self.split,
        }
        if self.device.transport != "local":
            config |= {"python": self.python or self.device.python, "counter": self.device.counter}
        return config

    def parents(self) -> dict[str, str]:
        """Return the hashes of the inputs by role."""
        hashes = {
            f"{name}.{runtime}": runtimes.sha256(path)
            for name, files in self.models.items()
            for runtime, path in files.items()
        }
        return hashes if self.data_sha256 is None else {**hashes, "data": self.data_sha256}

    def check_outside(self, output: Path) -> None:
        """Check that no model lies in the folder of the results, which may be moved aside.

        Raises:
            RunError: one does.
        """
        for files in self.models.values():
            for path in files.values():
                manifest.check_outside(path, output)

    @cached_property
    def data_sha256(self) -> str | None:
        """Return the fingerprint of the data set, for which all its labels are read."""
        from compress.data.dataset import fingerprint

        return None if self.data is None else fingerprint(self.data)


def request(
    device: Device,
    paths: list[Path],
    *,
    runtime: str | None,
    precision: str | None,
    imgsz: int | None,
    threads: int | None,
    data: str | None,
    split: str | None,
    host: str | None,
    python: str | None = None,
    batches: tuple[int, ...] = (1,),
    keep_outputs: bool = False,
) -> Request:
    """Return what is asked for, with the device's own values where none are given; nothing asked for is ignored.

    Raises:
        BenchmarkError: a model is missing or does not run in the runtime, or a checkpoint is to be exported and no
            images prove the export.
        SettingsError: the precision is not known, or an option has no effect on what else is asked for.
    """
    if split is not None and data is None:
        raise SettingsError("--split is of --data, which is missing: give both or none")
    if keep_outputs and (data is None or device.transport == "local"):
        raise SettingsError("--keep-outputs keeps what another device infers of --data: leave it out")
    if precision not in (None, *PRECISIONS):
        raise SettingsError(f"--precision must be {' or '.join(PRECISIONS)}, got {precision!r}")
    models = by_name(paths, runtime, device)
    for files in models.values():
        for own, path in files.items():
            if own not in device.runtimes:
                raise BenchmarkError(
                    f"{path} needs {own}, {device.name} runs {', '.join(device.runtimes)}: give a checkpoint, which is "
                    "exported for it"
                )
            if _is_exported(own, path) and data is None:
                raise BenchmarkError(f"--data is missing: real images prove the export of {path} for {own}")
    if precision is not None:
        _check_precision(precision, models)
    yaml = None
    if data is not None:
        from compress.data.dataset import resolve

        yaml = resolve(data)
    return Request(
        device=device,
        models=models,
        precision=precision or device.precision,
        imgsz=imgsz or device.imgsz or IMGSZ,
        threads=threads or device.threads,
        data=yaml,
        split=split or "val",
        host=host,
        python=python,
        batches=batches,
    )


def _check_precision(precision: str, models: dict[str, dict[str, Path]]) -> None:
    exported = {own for files in models.values() for own, path in files.items() if _is_exported(own, path)}
    if not exported:
        raise SettingsError("--precision is of what is exported, and nothing is: leave it out, or give a checkpoint")
    if precision != "fp32" and all(map(always_fp32, exported)):
        names = ", ".join(sorted(exported))
        raise SettingsError(f"--precision {precision} has no effect: {names} computes in fp32 on a CPU")


def by_name(paths: list[Path], runtime: str | None, device: Device) -> dict[str, dict[str, Path]]:
    """Group files by model name and runtime.

    The folders are part of the name where two files of one name have one runtime, or come from different checkpoints,
    as every stage calls its model `model`. Files of one checkpoint are one model then, by the name of its first one.

    A checkpoint counts as a file of the runtimes that it will be exported for, and any other file as one of those of
    its kind: all that `runtime` names, separated by commas, or the device's own choice where it names none.

    Raises:
        BenchmarkError: a file is missing, is no model, or is one of another runtime; or a runtime is not known, or
            there is no file for it.
    """
    asked = _split(runtime)
    owned = [(path, own) for path in paths for own in _own_runtimes(path, asked, device)]
    for path, _ in owned:
        runtimes.require(path)
    if left := [name for name in asked if name not in {own for _, own in owned}]:
        raise BenchmarkError(f"no model is {runtimes.kinds(left[0])}, which {left[0]} runs: give one, or a checkpoint")
    kinds = [(runtimes.stem(path), own) for path, own in owned]
    folders, made_from = defaultdict[str, set[Path]](set), defaultdict[str, set[str | None]](set)
    for (path, _), (stem, _) in zip(owned, kinds, strict=True):
        folders[stem].add(path.parent)
    # Within one folder there is no longer name that could tell files apart, so none of them is opened for that.
    origins = [
        origin_of(path) if len(folders[stem]) > 1 else None for (path, _), (stem, _) in zip(owned, kinds, strict=True)
    ]
    for (stem, _), origin in zip(kinds, origins, strict=True):
        made_from[stem].add(origin)
    shared = {stem for stem, own in kinds if kinds.count((stem, own)) > 1 or len(made_from[stem] - {None}) > 1}
    distinct = runtimes.distinct_names([path.with_name(runtimes.stem(path)) for path, _ in owned])
    found: dict[str, dict[str, Path]] = {}
    first: dict[str, str] = {}  # by checkpoint, the name of the first file that was made from it
    for (path, own), (stem, _), longer, origin in zip(owned, kinds, distinct, origins, strict=True):
        names = [longer, str(path)]
        if stem not in shared:
            names.insert(0, stem)
        elif origin is not None:
            names.insert(0, first.setdefault(origin, longer))
        found.setdefault(next(name for name in names if own not in found.get(name, {})), {})[own] = path
    return found


def _split(runtime: str | None) -> list[str]:
    """Return the runtimes of `torch,torch-compiled`, each once; none where none is asked for.

    Raises:
        BenchmarkError: one of them is not known.
    """
    words = list(dict.fromkeys((runtime or "").replace(",", " ").split()))
    return [runtimes.known("runtime", word, runtimes.names()) for word in words or ([] if runtime is None else [""])]


def _own_runtimes(path: Path, asked: list[str], device: Device) -> list[str]:
    """Return the runtimes of a file on a device."""
    own = runtimes.runtime_of(path)
    if own == "torch":
        return asked or ["torch" if "torch" in device.runtimes else device.runtimes[0]]
    fitting = [name for name in asked if runtimes.base(name) == own]
    if own is None or (asked and not fitting):
        needed = " or ".join(dict.fromkeys(runtimes.kinds(name) for name in asked)) or runtimes.kinds()
        raise BenchmarkError(f"{path} must be {needed} to run in {' or '.join(asked) or 'a known runtime'}")
    # Where the device has only a variant of the file's runtime, the first of them.
    variants = [name for name in device.runtimes if runtimes.base(name) == own]
    return fitting or [own if own in variants or not variants else variants[0]]


@contextmanager
def open_models(
    wanted: Request, output: Path, host: str | None, python: str | None, put_packages: bool
) -> Iterator[tuple[Site, dict[str, dict[str, Path]]]]:
    """Reach the device and yield it with the files to run there; checkpoints are exported into `output/exports`.

    Raises:
        SettingsError, DeviceError: see `sites.open_site`.
        ExportError: a checkpoint cannot be exported or does not equal PyTorch.
    """
    used = sorted({runtime for files in wanted.models.values() for runtime in files})
    with sites.open_site(wanted.device, host, python, used, put_packages=put_packages) as site:
        files = {}
        for number, (name, given) in enumerate(wanted.models.items()):
            files[name] = {
                runtime: _export(wanted, runtime, path, output / EXPORTS / f"{number}-{runtime}", site.place)
                if _is_exported(runtime, path)
                else path
                for runtime, path in given.items()
            }
        yield site, files


def score(wanted: Request, site: Site, files: dict[str, dict[str, Path]], output: Path) -> dict[str, dict[str, Any]]:
    """Return the accuracy of each file on the device by NAME.RUNTIME, see `benchmark.accuracy`; nothing without data.

    Scores of an interrupted start are read, not taken again, and so are the outputs of images.

    Raises:
        BenchmarkError: see `accuracy.evaluate`.
        DeviceError: the device is gone.
    """
    from benchmark.accuracy import evaluate
    from benchmark.outputs import remote_network

    if wanted.data is None:
        return {}
    found, scores, outputs = {}, output / SCORES, output / OUTPUTS
    scores.mkdir(exist_ok=True)
    asked = [path for given in wanted.models.values() for path in given.values()]
    names = dict(zip(asked, runtimes.distinct_names(asked), strict=True))  # every stage calls its model model.pt
    options: dict[str, Any] = {"split": wanted.split, "imgsz": wanted.imgsz, "threads": wanted.threads}
    # In the record itself, which may go where the manifest does not.
    known = {"data": wanted.data.name, "data_sha256": wanted.data_sha256}
    known |= {"split": wanted.split, "imgsz": wanted.imgsz}
    for number, (name, given) in enumerate(files.items()):
        for runtime, path in given.items():
            kept = scores / f"{number}-{runtime}.json"
            model_sha256 = runtimes.sha256(path)
            # An engine may have been built anew since then.
            if not kept.is_file() or manifest.read_json(kept).get("model_sha256") != model_sha256:
                if site.is_here:
                    record = evaluate(path, wanted.data, runtime=runtime, **options)
                else:
                    with remote_network(site, runtime, path, wanted.threads, wanted.imgsz, outputs) as network:
                        record = evaluate(path, wanted.data, network=network, **options)
                facts = {"model": names[wanted.models[name][runtime]], "model_sha256": model_sha256}
                manifest.write_json(kept, {**facts, "device": wanted.device.name, **known, **record})
            found[f"{name}.{runtime}"] = manifest.read_json(kept)
    return found


def clean_up(output: Path, keep_outputs: bool) -> None:
    """Remove what only an interrupted start needs."""
    shutil.rmtree(output / SCORES, ignore_errors=True)
    if not keep_outputs:
        shutil.rmtree(output / OUTPUTS, ignore_errors=True)


def _is_exported(runtime: str, path: Path) -> bool:
    return runtimes.runtime_of(path) == "torch" != runtimes.base(runtime)


def _export(wanted: Request, runtime: str, model: Path, folder: Path, place: Transport) -> Path:
    """Export a checkpoint for a runtime and return the file or folder."""
    from compress.settings import Export, ExportNcnn, ExportTrt

    assert wanted.data is not None
    folder.parent.mkdir(exist_ok=True)
    name, kind = model.stem, runtimes.base(runtime)
    if kind == "ncnn":
        from export import ncnn

        settings = ExportNcnn(half=wanted.precision == "fp16")
        ncnn.export_stage({name: model}, wanted.data, wanted.imgsz, settings, folder)
        return folder / f"{name}{runtimes.NCNN_SUFFIX}"
    if kind == "onnxruntime":
        from export import onnx

        half = wanted.precision == "fp16" and not always_fp32(runtime)
        settings = Export(half=half, dynamic="batch" if wanted.batches != (1,) else None)
        onnx.export_stage({name: model}, wanted.data, wanted.imgsz, settings, folder)
        return folder / f"{name}.onnx"
    from export import trt

    if isinstance(place, Adb):
        raise BenchmarkError("TensorRT does not run on Android: use --runtime ncnn")
    settings = ExportTrt(precision="fp16" if wanted.precision == "fp16" else "fp32", imgsz=str(wanted.imgsz))
    trt.export_stage(model, settings, place, folder, data=wanted.data, cache=trt.default_cache())
    return folder / f"{name}{trt.ENGINE}"
