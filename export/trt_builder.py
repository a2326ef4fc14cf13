"""Build a TensorRT engine from an ONNX file, on the machine that will run it.

    python3 trt_builder.py FOLDER/request.json

One self-contained script for the standard library and `tensorrt` or `tensorrt_rtx`, of Python 3.8 (JetPack 5) and
later: `export.trt` starts it in a process of its own, because a native builder may crash, here or on a device. It reads
and writes files of its folder alone, and always leaves `result.json`: {"facts": …, "built": …} or {"failure": …}.

A strongly typed network computes as the types in the ONNX file say. TensorRT before 10.12 gets a weakly typed one, in
which flags allow precisions, because JetPack 5 and 6 run DLA, and know fp16 best, with those.
"""

from __future__ import annotations

import ctypes
import errno
import importlib
import json
import os
import platform
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any, TextIO

REQUEST, RESULT, LOG = "request.json", "result.json", "build.log"
FLAVOURS = ("tensorrt", "tensorrt_rtx")
STRONGLY_TYPED_SINCE = (10, 12)
_OUT_OF_MEMORY = re.compile(r"out of memory|outofmemory|insufficient memory|bad_alloc|cudaError 2\b", re.IGNORECASE)
_L4T = re.compile(r"# R(\d+) \(release\), REVISION: ([\d.]+)")
_JETPACK = re.compile(r"^Package: nvidia-jetpack\n(?:.+\n)*?Version: (.+)$", re.MULTILINE)
_TYPES = {
    "float": "fp32",
    "fp32": "fp32",
    "tf32": "tf32",
    "half": "fp16",
    "fp16": "fp16",
    "bfloat16": "bf16",
    "bf16": "bf16",
    "int8": "int8",
    "fp8": "fp8",
    "int4": "int4",
    "fp4": "fp4",
    "int32": "int32",
    "int64": "int64",
    "uint8": "uint8",
    "bool": "bool",
}
_TYPE = re.compile(r"\b(" + "|".join(sorted(_TYPES, key=len, reverse=True)) + r")\b", re.IGNORECASE)
_DATATYPE = re.compile(r"(?:Format/)?Datatype: ([^,}\]]*)")
_NARROW_FIRST = ("fp4", "int4", "int8", "fp8", "bf16", "fp16", "tf32", "fp32")


class BuildError(Exception):
    """Why there is no engine: a kind that `export.trt` has a remedy for, and one line."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def main(path: Path) -> int:
    """Do what a request says, and leave its result beside it; return the exit code."""
    folder = path.resolve().parent
    try:
        request = json.loads(path.read_text(encoding="utf-8"))
        flavour, trt = load(request["flavour"])
        result = {"facts": facts(flavour, trt, folder)}
        if request["action"] == "build":
            result["built"] = build(trt, request, folder, result["facts"])
    except BuildError as error:
        result = {"failure": {"kind": error.kind, "message": " ".join(str(error).split())}}
    except MemoryError:
        result = {"failure": {"kind": "memory", "message": "the process ran out of memory"}}
    except OSError as error:
        kind = "disk" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "build"
        result = {"failure": {"kind": kind, "message": str(error)}}
    _write(folder / RESULT, (json.dumps(result, indent=1) + "\n").encode())
    return 1 if "failure" in result else 0


def load(flavour: str) -> tuple[str, Any]:
    """Return the flavour that is installed here, and its module.

    Args:
        flavour: tensorrt, tensorrt_rtx, or auto: the first of them that is there.

    Raises:
        BuildError: missing.
    """
    reasons = []
    for name in FLAVOURS if flavour == "auto" else (flavour,):
        try:
            return name, importlib.import_module(name)
        except ImportError as error:
            reasons.append(f"{name}: {error}")
    raise BuildError("missing", "; ".join(reasons))


def facts(flavour: str, trt: Any, folder: Path) -> dict[str, Any]:
    """Return what an engine that is built here depends on; null where this machine does not tell."""
    version = trt.__version__
    return {
        "flavour": flavour,
        "version": version,
        "strongly_typed": is_strongly_typed(flavour, version),
        "python": platform.python_version(),
        "machine": platform.machine(),
        **cuda_facts(),
        "l4t": _l4t(),
        "jetpack": _jetpack(),
        "free_bytes": shutil.disk_usage(folder).free,
    }


def is_strongly_typed(flavour: str, version: str) -> bool:
    """Tell whether the builder of a version makes a strongly typed network."""
    return flavour == "tensorrt_rtx" or version_tuple(version)[:2] >= STRONGLY_TYPED_SINCE


def version_tuple(version: str) -> tuple[int, ...]:
    """Return the numbers of a version: 10.3.0.26 is (10, 3, 0, 26)."""
    return tuple(int(number) for number in re.findall(r"\d+", version))


def cuda_facts() -> dict[str, Any]:
    """Return the driver's CUDA version and the first GPU, asked of the driver's own library."""
    found: dict[str, Any] = {"cuda": None, "gpu": None, "compute_capability": None, "gpu_memory_bytes": None}
    try:
        cuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return found
    number, device, size = ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGet(ctypes.byref(device), 0) != 0:
        return found
    if cuda.cuDriverGetVersion(ctypes.byref(number)) == 0:
        found["cuda"] = f"{number.value // 1000}.{number.value % 1000 // 10}"
    name = ctypes.create_string_buffer(256)
    if cuda.cuDeviceGetName(name, len(name), device) == 0:
        found["gpu"] = name.value.decode("utf-8", "replace")
    major, minor = ctypes.c_int(), ctypes.c_int()
    if all(
        cuda.cuDeviceGetAttribute(ctypes.byref(part), attribute, device) == 0
        for part, attribute in ((major, 75), (minor, 76))  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
    ):
        found["compute_capability"] = f"{major.value}.{minor.value}"
    if cuda.cuDeviceTotalMem_v2(ctypes.byref(size), device) == 0:
        found["gpu_memory_bytes"] = size.value
    return found


def build(trt: Any, request: dict[str, Any], folder: Path, found: dict[str, Any]) -> dict[str, Any]:
    """Build the engine of a request and return what became of it.

    Args:
        trt: the module of the flavour.
        request: onnx, engine and timing_cache (names in the folder, the cache may be null), precision, rest,
            float_nodes, profiles, workspace_mib, version_compatible, hardware_compatible, dla.
        folder: of the files.
        found: what `facts` returned.

    Raises:
        BuildError: parse, shape, unsupported, memory, disk or build.
    """
    start = time.time()
    with (folder / LOG).open("w", encoding="utf-8") as stream:
        logger = _logger(trt, stream)
        builder = _create(trt.Builder, logger, found)
        network = builder.create_network(_network_flags(trt, found))
        _parse(trt, network, logger, folder / request["onnx"])
        config = builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        if request["workspace_mib"] is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request["workspace_mib"] << 20)
        _set_precision(trt, network, config, request, found)
        _set_compatibility(trt, config, request)
        _set_profiles(builder, network, config, request["profiles"])
        _set_dla(trt, builder, config, request["dla"])
        cache = _load_timing_cache(config, folder, request["timing_cache"])
        serialized = builder.build_serialized_network(network, config)
        if serialized is None:
            raise _explain(logger, "the builder gave no reason")
        _write(folder / request["engine"], serialized)
        if cache:
            _write(folder / request["timing_cache"], config.get_timing_cache().serialize())
        text = _inspect(trt, logger, serialized, request) if found["gpu"] else None
        # An RTX engine may be meant for another GPU than this one; any other is for this one alone.
        if text is None and found["gpu"] and found["flavour"] == "tensorrt":
            raise _explain(logger, "the engine cannot be loaded where it was built")
    layers = read_layers(text or logger.layers)
    return {
        "seconds": round(time.time() - start, 3),
        "bytes": (folder / request["engine"]).stat().st_size,
        "loaded": text is not None,
        "network_layers": network.num_layers,
        "inputs": [_tensor(network.get_input(i)) for i in range(network.num_inputs)],
        "outputs": [_tensor(network.get_output(i)) for i in range(network.num_outputs)],
        "layers": layers,
    }


def read_layers(text: str) -> list[dict[str, Any]]:
    """Return the layers that an engine inspector lists, one a line, each with the precision that it computes in.

    That is the narrowest type among its inputs and constants: an int8 convolution may return floats. Null for layers
    without tensors of numbers.

    Args:
        text: of an inspector's one-line format, or what the builder logs in the same format.
    """
    layers = []
    for line in text.splitlines():
        head, found, rest = line.strip().partition(", Inputs: ")
        name, typed, kind = head.partition(", LayerType: ")
        if not (found and typed):
            continue
        before, _, after = rest.partition(", Outputs: ")
        inputs, outputs = _types(before), _types(after.partition(", Metadata: ")[0])
        layers.append(
            {
                "name": name.partition("Name: ")[2] or name,
                "type": kind,
                "inputs": inputs,
                "outputs": outputs,
                "precision": next((item for item in _NARROW_FIRST if item in inputs), None),
            }
        )
    return layers


def _types(text: str) -> list[str]:
    found = []
    for described in _DATATYPE.findall(text):
        match = _TYPE.search(described)
        found.append(_TYPES[match[1].lower()] if match else described.strip())
    return found


def _logger(trt: Any, stream: TextIO) -> Any:
    levels = trt.ILogger.Severity

    class Logger(trt.ILogger):
        """Keeps what went wrong and what the engine is made of; the rest goes to the log."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.layers = ""

        def log(self, severity: Any, msg: str) -> None:
            if msg.startswith(("Layers:", "Engine Layer Information:")):
                self.layers = msg
            if severity in (levels.ERROR, levels.INTERNAL_ERROR):
                self.errors.append(msg)
            if severity != levels.VERBOSE:
                stream.write(f"{severity.name}: {msg}\n")
                stream.flush()

    return Logger()


def _create(kind: Any, logger: Any, found: dict[str, Any]) -> Any:
    try:
        made = kind(logger)
    except (TypeError, RuntimeError) as error:  # pybind11: the factory function returned nullptr
        raise _no_builder(found, error) from None
    if made is None:
        raise _no_builder(found, "no builder")
    return made


def _no_builder(found: dict[str, Any], reason: object) -> BuildError:
    if found["gpu"] is None:
        return BuildError("gpu", f"TensorRT {found['version']} finds no NVIDIA GPU and driver")
    return BuildError("build", f"TensorRT {found['version']} cannot start: {reason}")


def _network_flags(trt: Any, found: dict[str, Any]) -> int:
    if found["strongly_typed"]:
        return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    if version_tuple(found["version"]) < (10,):
        return 1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH)
    return 0


def _parse(trt: Any, network: Any, logger: Any, path: Path) -> None:
    parser = trt.OnnxParser(network, logger)
    if parser.parse_from_file(str(path)):
        return
    reasons = [_reason(parser.get_error(i)) for i in range(min(parser.num_errors, 3))]
    raise BuildError("parse", "; ".join(reasons) or "the parser gave no reason")


def _reason(error: Any) -> str:
    if hasattr(error, "node_name"):  # since TensorRT 10
        return f"node {error.node_name()} ({error.node_operator()}): {error.desc()}"
    return f"node {error.node()}: {error.desc()}"


def _set_precision(trt: Any, network: Any, config: Any, request: dict[str, Any], found: dict[str, Any]) -> None:
    flag, precision = trt.BuilderFlag, request["precision"]
    if precision == "tf32":
        config.set_flag(flag.TF32)
    else:
        config.clear_flag(flag.TF32)
    if found["strongly_typed"] or precision in ("fp32", "tf32"):
        return
    allowed = {"fp16": ["FP16"], "bf16": ["BF16"], "int8": ["INT8"]}[precision]
    if precision == "int8" and request["rest"] == "fp16":
        allowed.append("FP16")
    for name in allowed:
        config.set_flag(_known(flag, name, found["version"]))
    # Boxes are computed in px, which 16 bits cannot hold.
    config.set_flag(flag.PREFER_PRECISION_CONSTRAINTS)
    names = set(request["float_nodes"])
    for layer in (network.get_layer(i) for i in range(network.num_layers)):
        if layer.name in names and layer.get_output(0).dtype == trt.DataType.FLOAT:
            layer.precision = trt.DataType.FLOAT
            layer.set_output_type(0, trt.DataType.FLOAT)


def _set_compatibility(trt: Any, config: Any, request: dict[str, Any]) -> None:
    if request["version_compatible"]:
        config.set_flag(_known(trt.BuilderFlag, "VERSION_COMPATIBLE", trt.__version__))
    if request["hardware_compatible"]:
        levels = _known(trt, "HardwareCompatibilityLevel", trt.__version__)
        config.hardware_compatibility_level = levels.AMPERE_PLUS


def _known(holder: Any, name: str, version: str) -> Any:
    value = getattr(holder, name, None)
    if value is None:
        raise BuildError("unsupported", f"TensorRT {version} has no {name}")
    return value


def _set_profiles(builder: Any, network: Any, config: Any, profiles: dict[str, Any]) -> None:
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    dynamic = [tensor.name for tensor in inputs if -1 in tuple(tensor.shape)]
    missing = [name for name in dynamic if name not in profiles]
    if missing:
        raise BuildError("shape", f"the input {missing[0]} has a dynamic shape and no profile")
    if not dynamic:
        return
    profile = builder.create_optimization_profile()
    for name in dynamic:
        profile.set_shape(name, *[tuple(shape) for shape in profiles[name]])
    if config.add_optimization_profile(profile) < 0:
        raise BuildError("shape", f"the profile {json.dumps(profiles)} does not fit the network")


def _set_dla(trt: Any, builder: Any, config: Any, core: int | None) -> None:
    if core is None:
        return
    if core >= builder.num_DLA_cores:
        raise BuildError("unsupported", f"this machine has {builder.num_DLA_cores} DLA cores")
    config.default_device_type = trt.DeviceType.DLA
    config.DLA_core = core
    config.set_flag(trt.BuilderFlag.GPU_FALLBACK)


def _load_timing_cache(config: Any, folder: Path, name: str | None) -> bool:
    """Tell whether there is a timing cache, filled from the file or empty where that is missing or another GPU's."""
    if name is None:
        return False
    path = folder / name
    content = path.read_bytes() if path.is_file() else b""
    for attempt in (content, b""):
        cache = config.create_timing_cache(attempt)
        if cache is not None and config.set_timing_cache(cache, False):
            return True
    return False


def _inspect(trt: Any, logger: Any, serialized: Any, request: dict[str, Any]) -> str | None:
    """Load the engine as a device would, and return its layers; null where it cannot be loaded."""
    runtime = trt.Runtime(logger)
    if request["version_compatible"]:
        runtime.engine_host_code_allowed = True  # it was built here, just now
    engine = runtime.deserialize_cuda_engine(serialized)
    if engine is None:
        return None
    return engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.ONELINE)


def _explain(logger: Any, otherwise: str) -> BuildError:
    text = logger.errors[0] if logger.errors else otherwise
    memory = any(_OUT_OF_MEMORY.search(error) for error in logger.errors)
    return BuildError("memory" if memory else "build", text)


def _tensor(tensor: Any) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "shape": [int(size) for size in tensor.shape],
        "dtype": _TYPES.get(tensor.dtype.name.lower(), tensor.dtype.name.lower()),
    }


def _l4t() -> str | None:
    """Return the Jetson's release of Linux for Tegra, such as 36.4.0."""
    try:
        match = _L4T.match(Path("/etc/nv_tegra_release").read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None
    return f"{match[1]}.{match[2]}" if match else None


def _jetpack() -> str | None:
    """Return the version of the package nvidia-jetpack."""
    try:
        match = _JETPACK.search(Path("/var/lib/dpkg/status").read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None
    return match[1] if match else None


def _write(path: Path, content: Any) -> None:
    part = path.with_name(path.name + ".part")
    with part.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    part.replace(path)


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_file():
        sys.exit(f"usage: python3 {sys.argv[0]} FOLDER/{REQUEST}")
    sys.exit(main(Path(sys.argv[1])))
