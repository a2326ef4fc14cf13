"""The TensorRT runner against stand-ins for TensorRT and the CUDA driver: no GPU is needed, and nothing is measured."""

from __future__ import annotations

import ctypes
import enum
import hashlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import NonCallableMock

import numpy as np
import pytest

from benchmark import programs, runtimes
from benchmark.runners import tensorrt_runner

FACTS = {"flavour": "tensorrt", "version": "10.3.0", "gpu": "Orin", "compute_capability": "8.7"}
RTX = {"flavour": "tensorrt_rtx", "version": "1.7.1.116", "gpu": None, "compute_capability": None}
SETTINGS = {"precision": "fp16", "version_compatible": False, "hardware_compatible": False}
NAMES = json.loads((Path(__file__).parents[1] / "export" / "tensorrt_names.json").read_text())


def write_engine(folder: Path, facts: dict[str, Any] = FACTS, **changes: Any) -> Path:
    engine = folder / "m.engine"
    engine.write_bytes(b"engine")
    sidecar = {
        "engine_bytes": 6,
        "engine_sha256": hashlib.sha256(b"engine").hexdigest(),
        "facts": facts,
        "settings": SETTINGS,
        "inputs": [{"name": "images", "shape": [-1, 3, 2, 2], "dtype": "fp32"}],
        "precisions": {"fp16": 3, "fp32": 1},
        "names": {"0": "circle", "1": "square"},
        "end2end": False,
        **changes,
    }
    (folder / "m.engine.json").write_text(json.dumps(sidecar))
    return engine


class FakeCuda:
    """A CUDA driver whose GPU is this machine's memory."""

    def __init__(self, fails: str | None = None, status: int = 2) -> None:
        self.blocks: dict[int, Any] = {}
        self.calls: list[str] = []
        self.fails = fails
        self.status = status

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.calls.append(name)
            if name == self.fails:
                return self.status
            return getattr(FakeCuda, f"_{name}", lambda *_: 0)(self, *arguments)

        return call

    def _cuDeviceGetName(self, buffer: Any, *_: Any) -> int:  # noqa: N802  (CUDA's own names)
        buffer.value = b"Orin"
        return 0

    def _cuDeviceGetAttribute(self, number: Any, attribute: int, *_: Any) -> int:  # noqa: N802
        number._obj.value = {75: 8, 76: 7}[attribute]
        return 0

    def _cuMemAlloc_v2(self, address: Any, size: Any) -> int:  # noqa: N802
        block = ctypes.create_string_buffer(size.value)
        address._obj.value = ctypes.addressof(block)
        self.blocks[address._obj.value] = block
        return 0

    def _cuMemFree_v2(self, address: Any) -> int:  # noqa: N802
        del self.blocks[address.value]
        return 0

    def _cuMemcpyHtoDAsync_v2(self, target: Any, source: Any, size: Any, _: Any) -> int:  # noqa: N802
        ctypes.memmove(target.value, source.value, size.value)
        return 0

    _cuMemcpyDtoHAsync_v2 = _cuMemcpyHtoDAsync_v2  # noqa: N815


def spec(kind: str, version: str, **returns: Any) -> Any:
    """An object with the names of a class of a version, whose methods return what is given."""
    made = NonCallableMock(spec_set=NAMES[version][kind].split())
    for name, value in returns.items():
        getattr(made, name).return_value = value
    return made


class FakeTensorrt(ModuleType):
    """A TensorRT whose engine doubles its input and adds one."""

    def __init__(self, version: str) -> None:
        flavour, number = version.split()
        super().__init__(flavour)
        self.__version__ = number
        self.TensorIOMode = enum.IntEnum("TensorIOMode", ["NONE", "INPUT", "OUTPUT"], start=0)
        kind = enum.IntEnum("DataType", ["FLOAT", "HALF"], start=0)
        self.shape: tuple[int, ...] = ()
        self.addresses: dict[str, int] = {}
        self.context = spec("IExecutionContext", version)
        self.context.set_input_shape.side_effect = self._set_shape
        self.context.set_tensor_address.side_effect = self.addresses.__setitem__
        self.context.get_tensor_shape.side_effect = lambda _: self.shape
        self.context.execute_async_v3.side_effect = self._execute
        self.engine = spec("ICudaEngine", version, create_execution_context=self.context, get_tensor_dtype=kind.FLOAT)
        self.engine.num_io_tensors = 2
        self.engine.get_tensor_name.side_effect = ["images", "output0"].__getitem__
        modes = {"images": self.TensorIOMode.INPUT, "output0": self.TensorIOMode.OUTPUT}  # type: ignore[attr-defined]
        self.engine.get_tensor_mode.side_effect = modes.__getitem__
        self.runtime = spec("Runtime", version, deserialize_cuda_engine=self.engine)
        if "IRuntimeCache" in NAMES[version]:
            self.cache = spec("IRuntimeCache", version, serialize=b"compiled")
            self.config = spec("IRuntimeConfig", version, create_runtime_cache=self.cache)
            self.engine.create_runtime_config.return_value = self.config

    class Logger:
        ERROR = 1

        def __init__(self, level: int) -> None:
            self.level = level

    def Runtime(self, logger: Any) -> Any:  # noqa: N802  (TensorRT's own name)
        return self.runtime

    def _set_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape = tuple(shape)
        return shape[0] <= 2

    def _execute(self, stream: int) -> bool:
        count = int(np.prod(self.shape))
        source, target = ((ctypes.c_float * count).from_address(self.addresses[name]) for name in ("images", "output0"))
        target[:] = [2 * value + 1 for value in source]
        return True


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    driver = FakeCuda()
    monkeypatch.setattr(tensorrt_runner.ctypes, "CDLL", lambda name: driver)
    return driver


def install(monkeypatch: pytest.MonkeyPatch, version: str) -> FakeTensorrt:
    trt = FakeTensorrt(version)
    monkeypatch.setitem(sys.modules, trt.__name__, trt)
    return trt


@pytest.mark.parametrize("version", ["tensorrt 8.6.1", "tensorrt 10.3.0", "tensorrt 11.4.0.106"])
def test_what_goes_in_comes_out_of_the_engine(
    version: str, cuda: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, version)
    engine = write_engine(tmp_path, {**FACTS, "version": version.split()[1]})
    session = tensorrt_runner.load(str(engine), 1)
    for count in (1, 2, 1):
        images = np.random.default_rng(count).random((count, 3, 2, 2), dtype=np.float32)
        (output,) = tensorrt_runner.infer(session, images)
        np.testing.assert_allclose(output, 2 * images + 1, rtol=1e-6)
    assert len(cuda.blocks) == 2  # the larger batch got larger buffers, and the smaller ones were freed
    assert cuda.calls.count("cuMemAlloc_v2") == 4
    with pytest.raises(ValueError, match=r"takes \[None, 3, 2, 2\], got \[3, 3, 2, 2\]"):
        tensorrt_runner.infer(session, np.zeros((3, 3, 2, 2), np.float32))


def test_an_engine_describes_itself(cuda: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "tensorrt 10.3.0")
    assert tensorrt_runner.describe(tensorrt_runner.load(str(write_engine(tmp_path, task="segment")), 1)) == {
        "runtime": "tensorrt",
        "version": "tensorrt 10.3.0",
        "threads": None,
        "precision": "fp16",
        "precision_executed": {"fp16": 3, "fp32": 1},
        "providers": ["Orin"],
        "memory_format": None,
        "input_shape": [None, 3, 2, 2],
        "task": "segment",
        "classes": 2,
        "keypoints": None,
        "end2end": False,
        "suppression": None,
    }


def test_rtx_keeps_what_it_compiled(cuda: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trt = install(monkeypatch, "tensorrt_rtx 1.7.1.116")
    engine = write_engine(tmp_path, RTX)
    image = np.ones((1, 3, 2, 2), np.float32)
    session = tensorrt_runner.load(str(engine), 1)
    trt.cache.deserialize.assert_not_called()
    tensorrt_runner.infer(session, image)
    assert (tmp_path / "m.engine.runtime_cache").read_bytes() == b"compiled"
    tensorrt_runner.infer(tensorrt_runner.load(str(engine), 1), image)
    trt.cache.deserialize.assert_called_once_with(b"compiled")
    trt.engine.create_execution_context.assert_called_with(trt.config)
    trt.config.set_runtime_cache.assert_called_with(trt.cache)


@pytest.mark.parametrize(
    ("built", "settings", "here", "reasons"),
    [
        (FACTS, {}, FACTS, []),
        (FACTS, {}, {**FACTS, "version": "10.7.0"}, ["built by tensorrt 10.3.0, this is 10.7.0"]),
        (FACTS, {"version_compatible": True}, {**FACTS, "version": "10.7.0"}, []),
        (
            FACTS,
            {"version_compatible": True},
            {**FACTS, "version": "10.2.0"},
            ["built by tensorrt 10.3.0, this is 10.2.0"],
        ),
        (FACTS, {}, {**FACTS, "gpu": "Thor"}, ["built for Orin, this is Thor"]),
        (FACTS, {"hardware_compatible": True}, {**FACTS, "gpu": "RTX 4090", "compute_capability": "8.9"}, []),
        (
            FACTS,
            {"hardware_compatible": True},
            {**FACTS, "gpu": "T4", "compute_capability": "7.5"},
            ["built for Orin, this is T4"],
        ),
        (RTX, {}, {**RTX, "gpu": "RTX 4090", "compute_capability": "8.9"}, []),
        (RTX, {}, {**RTX, "version": "1.8.0"}, ["built by tensorrt_rtx 1.7.1.116, this is 1.8.0"]),
        (FACTS, {}, RTX, ["built by tensorrt, this is tensorrt_rtx"]),
    ],
)
def test_an_engine_fits_only_what_it_was_built_for(
    built: dict[str, Any], settings: dict[str, Any], here: dict[str, Any], reasons: list[str]
) -> None:
    sidecar = {"facts": built, "settings": {**SETTINGS, **settings}}
    assert tensorrt_runner.reasons_against(sidecar, here) == reasons


def test_a_stale_engine_is_not_loaded(cuda: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trt = install(monkeypatch, "tensorrt 11.4.0.106")
    with pytest.raises(ValueError, match=r"does not fit this machine \(built by tensorrt 10.3.0, this is 11.4.0.106\)"):
        tensorrt_runner.load(str(write_engine(tmp_path)), 1)
    trt.runtime.deserialize_cuda_engine.assert_not_called()


def test_code_inside_an_engine_runs_only_where_it_was_asked_for(
    cuda: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt = install(monkeypatch, "tensorrt 10.3.0")
    trt.runtime.engine_host_code_allowed = False
    tensorrt_runner.load(str(write_engine(tmp_path)), 1)
    assert trt.runtime.engine_host_code_allowed is False
    compatible = write_engine(tmp_path, settings={**SETTINGS, "version_compatible": True})
    tensorrt_runner.load(str(compatible), 1)
    assert trt.runtime.engine_host_code_allowed is True


def test_an_engine_without_its_own_sidecar_is_refused(tmp_path: Path) -> None:
    engine = write_engine(tmp_path)
    engine.write_bytes(b"other!")
    with pytest.raises(ValueError, match=r"m.engine is not the file that m.engine.json describes: copy both"):
        tensorrt_runner.load(str(engine), 1)
    write_engine(tmp_path, {**FACTS, "flavour": "os"})  # a module's name from a file
    with pytest.raises(ValueError, match=r"has no m.engine.json of export.trt beside it"):
        tensorrt_runner.load(str(engine), 1)
    for content in ("{", "[]", "{}"):
        (tmp_path / "m.engine.json").write_text(content)
        with pytest.raises(ValueError, match=r"has no m.engine.json of export.trt beside it"):
            tensorrt_runner.load(str(engine), 1)


def test_a_sidecar_names_no_module_to_import_where_asserts_are_left_out(tmp_path: Path) -> None:
    engine = write_engine(tmp_path, {**FACTS, "flavour": "os"})
    script = "import sys; from benchmark.runners import tensorrt_runner; tensorrt_runner.load(sys.argv[1], 1)"
    done = programs.run([sys.executable, "-O", "-c", script, str(engine)], 60, environment=programs.own_environment(1))
    assert "ValueError" in done.stderr
    assert "has no m.engine.json of export.trt beside it" in done.stderr


def test_what_a_machine_lacks_is_named(cuda: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = write_engine(tmp_path, RTX)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(ValueError, match="needs tensorrt_rtx, which is not installed: pip install tensorrt-rtx"):
        tensorrt_runner.load(str(engine), 1)
    trt = install(monkeypatch, "tensorrt_rtx 1.7.1.116")
    cuda.fails, cuda.status = "cuInit", 100
    with pytest.raises(ValueError, match="CUDA's cuInit failed with status 100: there is no GPU"):
        tensorrt_runner.load(str(engine), 1)
    cuda.fails, cuda.status = "cuMemAlloc_v2", 2
    session = tensorrt_runner.load(str(engine), 1)
    with pytest.raises(ValueError, match="the GPU is out of memory"):
        tensorrt_runner.infer(session, np.zeros((1, 3, 2, 2), np.float32))
    trt.runtime.deserialize_cuda_engine.return_value = None
    with pytest.raises(ValueError, match=r"cannot be loaded by tensorrt_rtx 1.7.1.116: build it again"):
        tensorrt_runner.load(str(engine), 1)

    def no_driver(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(tensorrt_runner.ctypes, "CDLL", no_driver)
    with pytest.raises(ValueError, match="there is no CUDA driver on this machine"):
        tensorrt_runner.load(str(engine), 1)


def test_an_engine_is_a_model_of_its_own_runtime(tmp_path: Path) -> None:
    engine = write_engine(tmp_path)
    assert runtimes.runtime_of(engine) == "tensorrt"
    assert runtimes.runner_of(engine) is tensorrt_runner
