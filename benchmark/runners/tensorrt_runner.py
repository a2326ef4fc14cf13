"""TensorRT and TensorRT-RTX on the first NVIDIA GPU.

One of the self-contained runners: `load`, `infer` and `describe` are plain functions that need numpy and `tensorrt` or
`tensorrt_rtx` and nothing else; memory on the GPU comes from the driver's own library. A model is what `export.trt`
writes: `NAME.engine` with `NAME.engine.json`, which says what the engine was built by and for, and is checked before a
byte of the engine is loaded.

No GPU was at hand when this was written: it is tested against stand-ins for both libraries, and no latency and no
output of it was ever measured. What `infer` takes includes both copies between host and GPU.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

SIDECAR = ".json"  # behind the engine's whole name
CACHE = ".runtime_cache"  # likewise: what TensorRT-RTX compiled for this GPU
_TYPES = {"FLOAT": np.float32, "HALF": np.float16, "INT8": np.int8, "INT32": np.int32, "INT64": np.int64}
_AMPERE = (8, 0)
_SAID = {"facts", "settings", "inputs", "precisions", "names", "end2end"}
_FLAVOURS = ("tensorrt", "tensorrt_rtx")


@dataclass
class Session:
    """An engine ready to infer, its buffers on the GPU, and what its sidecar says."""

    trt: Any
    driver: Driver
    engine: Any
    context: Any
    sidecar: dict[str, Any]
    stream: int
    runtime_cache: Any = None
    cache_path: Path | None = None
    buffers: dict[str, tuple[int, int]] = field(default_factory=dict)  # name: (address, bytes)


def load(path: str, threads: int) -> Session:  # noqa: ARG001  (every runner's signature; a GPU has no such number)
    """Open an engine on the first GPU, after its sidecar has shown that it was made for this machine.

    Raises:
        ValueError: the engine has no sidecar, is damaged, was built by or for something else, or there is no TensorRT
            or no GPU.
    """
    file = Path(path)
    sidecar = read_sidecar(file)
    facts = sidecar["facts"]
    try:
        trt = importlib.import_module(facts["flavour"])
    except ImportError:
        package = "tensorrt-rtx" if facts["flavour"] == "tensorrt_rtx" else "tensorrt"
        raise ValueError(f"{path} needs {facts['flavour']}, which is not installed: pip install {package}") from None
    driver = Driver()
    here = {"flavour": facts["flavour"], "version": trt.__version__, **driver.facts()}
    if reasons := reasons_against(sidecar, here):
        raise ValueError(f"{path} does not fit this machine ({'; '.join(reasons)}): build it again with export.trt")
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    if sidecar["settings"]["version_compatible"]:
        runtime.engine_host_code_allowed = True  # such an engine carries code; its hash is the sidecar's
    engine = runtime.deserialize_cuda_engine(file.read_bytes())
    if engine is None:
        raise ValueError(f"{path} cannot be loaded by {facts['flavour']} {trt.__version__}: build it again")
    session = Session(trt, driver, engine, None, sidecar, driver.stream())
    _create_context(session, file)
    return session


def infer(session: Session, images: np.ndarray) -> list[np.ndarray]:
    """Run the engine.

    Args:
        session: what `load` returned.
        images: (n, 3, height, width) float32 in [0, 1], RGB, of a shape that the engine was built for.

    Returns:
        The engine's outputs in its order, for detectors as `torch_runner.infer` returns them.

    Raises:
        ValueError: the engine takes another shape, or fails.
    """
    engine, context, driver = session.engine, session.context, session.driver
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    is_input = {name: engine.get_tensor_mode(name) == session.trt.TensorIOMode.INPUT for name in names}
    (source,) = [name for name in names if is_input[name]]
    data = np.ascontiguousarray(images, _TYPES[engine.get_tensor_dtype(source).name])
    if not context.set_input_shape(source, data.shape):
        raise ValueError(f"takes {describe(session)['input_shape']}, got {list(data.shape)}: see the profiles it has")
    outputs = {
        name: np.empty(tuple(context.get_tensor_shape(name)), _TYPES[engine.get_tensor_dtype(name).name])
        for name in names
        if not is_input[name]
    }
    for name, array in ((source, data), *outputs.items()):
        context.set_tensor_address(name, _buffer(session, name, array.nbytes))
    driver.to_gpu(session.buffers[source][0], data, session.stream)
    if not context.execute_async_v3(session.stream):
        raise ValueError("TensorRT cannot run the engine: the GPU may be out of memory")
    for name, array in outputs.items():
        driver.to_host(array, session.buffers[name][0], session.stream)
    driver.synchronize(session.stream)
    _keep_runtime_cache(session)
    return list(outputs.values())


def describe(session: Session) -> dict[str, Any]:
    """Return what a benchmark record says about the runtime; null where the sidecar does not tell.

    `precision` is what was asked for, `precision_executed` how many layers compute in what.
    """
    sidecar = session.sidecar
    names, tensor = sidecar["names"], sidecar["inputs"][0]
    return {
        "runtime": "tensorrt",
        "version": f"{sidecar['facts']['flavour']} {session.trt.__version__}",
        "threads": None,
        "precision": sidecar["settings"]["precision"],
        "precision_executed": sidecar["precisions"],
        "providers": [sidecar["facts"]["gpu"]],
        "memory_format": None,
        "input_shape": [size if size > 0 else None for size in tensor["shape"]],
        "task": sidecar.get("task"),
        "classes": len(names) if names is not None else None,
        "keypoints": sidecar.get("keypoints"),
        "end2end": bool(sidecar["end2end"]),
        "suppression": sidecar.get("suppression"),
    }


def read_sidecar(engine: Path) -> dict[str, Any]:
    """Return what stands beside an engine, after checking that it is this engine's.

    Raises:
        ValueError: it is missing, or the engine has other bytes.
    """
    path = engine.with_name(engine.name + SIDECAR)
    try:
        sidecar = json.loads(path.read_text(encoding="utf-8"))
        size, digest = sidecar["engine_bytes"], sidecar["engine_sha256"]
        # The flavour becomes the name of a module that is imported. No `assert`: `python -O` leaves those out.
        if not _SAID.issubset(sidecar) or sidecar["facts"]["flavour"] not in _FLAVOURS:
            raise ValueError("not of export.trt")
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{engine} has no {path.name} of export.trt beside it: copy both, or build it again") from None
    content = engine.read_bytes()
    if len(content) != size or hashlib.sha256(content).hexdigest() != digest:
        raise ValueError(f"{engine} is not the file that {path.name} describes: copy both, or build it again")
    return sidecar


def reasons_against(sidecar: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """Return why an engine must not be loaded on a machine; an empty list where it may.

    An engine of TensorRT is bound to its version and its GPU unless it was built compatible: then a later version will
    do, or any GPU from Ampere on. One of TensorRT-RTX is bound to its version alone.

    Args:
        sidecar: the engine's.
        here: flavour, version, gpu and compute_capability of the machine.
    """
    built, settings = sidecar["facts"], sidecar["settings"]
    reasons = []
    if built["flavour"] != here["flavour"]:
        return [f"built by {built['flavour']}, this is {here['flavour']}"]
    may_be_later = settings["version_compatible"] and _numbers(here["version"]) > _numbers(built["version"])
    if built["version"] != here["version"] and not may_be_later:
        reasons.append(f"built by {built['flavour']} {built['version']}, this is {here['version']}")
    if built["flavour"] == "tensorrt" and built["gpu"] != here["gpu"]:
        ampere = _numbers(here["compute_capability"] or "0") >= _AMPERE
        if not (settings["hardware_compatible"] and ampere):
            reasons.append(f"built for {built['gpu']}, this is {here['gpu']}")
    return reasons


class Driver:
    """The few functions of the CUDA driver that inference needs.

    Raises:
        ValueError: there is no GPU, no driver, or no memory.
    """

    def __init__(self) -> None:
        try:
            self._cuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        except OSError:
            raise ValueError("needs an NVIDIA GPU and its driver: there is no CUDA driver on this machine") from None
        self._device = ctypes.c_int()
        context = ctypes.c_void_p()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(self._device), 0)
        # The primary context is the one that TensorRT's own calls use.
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self._device)
        self._call("cuCtxSetCurrent", context)

    def facts(self) -> dict[str, str]:
        """Return name and compute capability of the GPU."""
        name = ctypes.create_string_buffer(256)
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("cuDeviceGetName", name, len(name), self._device)
        self._call("cuDeviceGetAttribute", ctypes.byref(major), 75, self._device)
        self._call("cuDeviceGetAttribute", ctypes.byref(minor), 76, self._device)
        return {
            "gpu": name.value.decode("utf-8", "replace"),
            "compute_capability": f"{major.value}.{minor.value}",
        }

    def stream(self) -> int:
        """Return a new stream."""
        handle = ctypes.c_void_p()
        self._call("cuStreamCreate", ctypes.byref(handle), 0)
        return int(handle.value or 0)

    def allocate(self, size: int) -> int:
        """Return the address of `size` new bytes on the GPU."""
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        return int(address.value)

    def free(self, address: int) -> None:
        """Give bytes on the GPU back."""
        self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def to_gpu(self, address: int, array: np.ndarray, stream: int) -> None:
        """Copy an array to the GPU, in the order of the stream."""
        self._call(
            "cuMemcpyHtoDAsync_v2",
            ctypes.c_uint64(address),
            ctypes.c_void_p(array.ctypes.data),
            ctypes.c_size_t(array.nbytes),
            ctypes.c_void_p(stream),
        )

    def to_host(self, array: np.ndarray, address: int, stream: int) -> None:
        """Fill an array from the GPU, in the order of the stream."""
        self._call(
            "cuMemcpyDtoHAsync_v2",
            ctypes.c_void_p(array.ctypes.data),
            ctypes.c_uint64(address),
            ctypes.c_size_t(array.nbytes),
            ctypes.c_void_p(stream),
        )

    def synchronize(self, stream: int) -> None:
        """Wait until the stream has done everything."""
        self._call("cuStreamSynchronize", ctypes.c_void_p(stream))

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._cuda, name)(*arguments)
        if status != 0:
            meaning = {2: "the GPU is out of memory", 100: "there is no GPU"}.get(status, "see cuda.h")
            raise ValueError(f"CUDA's {name} failed with status {status}: {meaning}")


def _create_context(session: Session, file: Path) -> None:
    """Create the execution context; TensorRT-RTX gets back what it compiled for this GPU before."""
    engine = session.engine
    if session.sidecar["facts"]["flavour"] == "tensorrt_rtx":
        config = engine.create_runtime_config()
        session.runtime_cache = config.create_runtime_cache()
        session.cache_path = file.with_name(file.name + CACHE)
        if session.cache_path.is_file():
            session.runtime_cache.deserialize(session.cache_path.read_bytes())
        config.set_runtime_cache(session.runtime_cache)
        session.context = engine.create_execution_context(config)
    else:
        session.context = engine.create_execution_context()
    if session.context is None:
        raise ValueError(f"{file} cannot be prepared: the GPU may be out of memory")


def _keep_runtime_cache(session: Session) -> None:
    """Write, after the first inference, what TensorRT-RTX has compiled by then."""
    if session.runtime_cache is None or session.cache_path is None:
        return
    content = bytes(session.runtime_cache.serialize())
    part = session.cache_path.with_name(session.cache_path.name + ".part")
    try:
        part.write_bytes(content)
        part.replace(session.cache_path)
    except OSError:
        part.unlink(missing_ok=True)  # a folder that cannot be written costs the next start some seconds, no more
    session.cache_path = None


def _buffer(session: Session, name: str, size: int) -> int:
    address, present = session.buffers.get(name, (0, 0))
    if size > present:
        if present:
            session.driver.free(address)
        session.buffers[name] = session.driver.allocate(size), size
    return session.buffers[name][0]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())
