"""Model files and their runtimes: which runner opens which file, and what stands for its bytes."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Collection, Sequence
from pathlib import Path, PurePath
from types import ModuleType
from typing import Any

from compress import manifest
from compress.errors import BenchmarkError

RUNNERS = {
    "torch": "benchmark.runners.torch_runner",
    "onnxruntime": "benchmark.runners.onnxruntime_runner",
    "ncnn": "benchmark.runners.ncnn_runner",
    "tensorrt": "benchmark.runners.tensorrt_runner",
}
# Ways to run the same files that a runtime's runner knows by the rest of the name; what the machine lacks is refused.
VARIANTS = {
    "torch-compiled": "torch",
    "torch-cuda": "torch",
    "torch-cuda-fp16": "torch",
    "torch-cudagraph": "torch",
    "torch-cudagraph-fp16": "torch",
    "onnxruntime-cuda": "onnxruntime",
    "onnxruntime-tensorrt": "onnxruntime",
    "ncnn-vulkan": "ncnn",
    "torch-hugepages": "torch",
    "onnxruntime-hugepages": "onnxruntime",
    "ncnn-hugepages": "ncnn",
}
# Of these a worker may say nothing for minutes: the first inference compiles, or an engine is built.
BUILT_WHEN_OPENED = ("torch-compiled", "onnxruntime-tensorrt")
# With it glibc asks Linux for pages of 2 MB. It is read when a process starts, so no runner can ask for it.
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
MODULES = {"onnxruntime": "onnxruntime", "ncnn": "ncnn", "tensorrt": "tensorrt"}  # what a device must import
NCNN_SUFFIX = "_ncnn_model"  # Ultralytics' ending of such a folder
SUFFIXES = {".pt": "torch", ".onnx": "onnxruntime", NCNN_SUFFIX: "ncnn", ".engine": "tensorrt"}
KINDS = {
    "torch": "a .pt file",
    "onnxruntime": "an .onnx file",
    "tensorrt": "an .engine file",
    "ncnn": f"a folder NAME{NCNN_SUFFIX}",
}


def names() -> list[str]:
    """Return all runtimes and their variants."""
    return [*RUNNERS, *(name for name, runtime in VARIANTS.items() if runtime in RUNNERS)]


def base(runtime: str) -> str:
    """Return the runtime whose files a runtime or a variant takes: `torch-cuda` takes those of torch."""
    return VARIANTS.get(runtime, runtime)


def runner(runtime: str) -> str:
    """Return what `benchmark.worker` takes for a runtime or a variant: MODULE, or MODULE:VARIANT.

    >>> runner("torch-cuda-fp16")
    'benchmark.runners.torch_runner:cuda-fp16'
    """
    module, variant = RUNNERS[base(runtime)], runtime[len(base(runtime)) + 1 :]
    return f"{module}:{variant}" if variant else module


def environment(runtime: str) -> dict[str, str]:
    """Return the variables that a process must be started with for a runtime or a variant."""
    return HUGE_PAGES if runtime.endswith("-hugepages") else {}


def suffix(model: Path) -> str | None:
    """Return the ending that tells a model's runtime: of the file, or of the folder's whole name."""
    return next((ending for ending in SUFFIXES if model.name.endswith(ending)), None)


def runtime_of(model: Path) -> str | None:
    """Return the runtime of a model by its name, or None where no runtime takes it."""
    ending = suffix(model)
    return None if ending is None else SUFFIXES[ending]


def stem(model: Path) -> str:
    """Return the name of a model, the same for all its files: `yolov8n.onnx` and `yolov8n_ncnn_model` are yolov8n."""
    ending = suffix(model)
    return model.name[: -len(ending)] if ending else model.stem


def distinct_names(paths: Sequence[PurePath]) -> list[str]:
    """Return the end of each path, as short as it can be without looking like another one's.

    >>> distinct_names([Path("runs/a/model.pt"), Path("runs/b/model.pt"), Path("runs/b/model.onnx")])
    ['a/model.pt', 'b/model.pt', 'model.onnx']
    """
    different = set(paths)

    def name(path: PurePath) -> str:
        for length in range(1, len(path.parts)):
            end = path.parts[-length:]
            if not any(other != path and other.parts[-length:] == end for other in different):
                return PurePath(*end).as_posix()
        return path.as_posix()

    return [name(path) for path in paths]


def require(model: Path) -> None:
    """Check that a model is on disk.

    Raises:
        BenchmarkError: it is not, or it is a file where a folder is meant or the other way round, or an ONNX file whose
            weights lie in other files: neither its hash nor a copy of it would hold them.
    """
    if not model.exists():
        raise BenchmarkError(f"{model} does not exist: check the path")
    is_folder = runtime_of(model) == "ncnn"
    if model.is_dir() != is_folder:
        raise BenchmarkError(f"{model} is {'a file' if is_folder else 'a folder'}: check the path")
    if runtime_of(model) == "onnxruntime" and _has_external_weights(model):
        raise BenchmarkError(
            f"{model} keeps its weights in other files: save it as one with onnx.save(onnx.load(path), path)"
        )


def _has_external_weights(model: Path) -> bool:
    import onnx

    found = read_onnx(model)
    external = onnx.TensorProto.EXTERNAL
    return found is not None and any(tensor.data_location == external for tensor in found.graph.initializer)


def read_onnx(model: Path) -> Any | None:
    """Return an ONNX file as it is, without weights in other files; null where it is none, as its runtime will say."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        return onnx.load(model, load_external_data=False)
    except (DecodeError, UnicodeDecodeError):
        return None


def known(kind: str, value: str, choices: Collection[str]) -> str:
    """Return a value that is among the choices.

    Raises:
        BenchmarkError: it is not; the message lists the choices, the closest first.
    """
    if value not in choices:
        closest = difflib.get_close_matches(value, choices, n=len(choices), cutoff=0.0)
        raise BenchmarkError(f"unknown {kind} '{value}': choose one of {', '.join(closest)}")
    return value


def runner_of(model: Path) -> ModuleType:
    """Return the runner module that opens a model.

    Raises:
        BenchmarkError: the model is missing, or no runtime takes it, or that is not installed.
    """
    require(model)
    runtime = runtime_of(model)
    if runtime is None:
        raise BenchmarkError(f"{model} must be {kinds()}")
    try:
        return importlib.import_module(RUNNERS[runtime])
    except ModuleNotFoundError as error:
        from benchmark.worker import needs

        raise BenchmarkError(f"{model} {needs(error.name)}") from None


def kinds(runtime: str | None = None) -> str:
    """Say what a model of a runtime, or of any, looks like on disk."""
    wanted = [text for name, text in KINDS.items() if runtime is None or base(runtime) == name]
    return " or ".join([", ".join(wanted[:-1]), wanted[-1]] if len(wanted) > 1 else wanted)


def size_bytes(model: Path) -> int:
    """Return the size of a model's file, of a folder that of all its files."""
    files = [path for path in model.rglob("*") if path.is_file()] if model.is_dir() else [model]
    return sum(path.stat().st_size for path in files)


def sha256(model: Path) -> str:
    """Return what stands for a model's bytes: the sha256 of a file, for a folder that of all its files."""
    if not model.is_dir():
        return manifest.sha256_file(model)
    files = sorted(path for path in model.rglob("*") if path.is_file())
    return manifest.sha256_json({path.relative_to(model).as_posix(): manifest.sha256_file(path) for path in files})
