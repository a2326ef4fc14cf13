"""Other ways to run a file: what the machine lacks is refused in one line, and nothing falls back to the CPU."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from benchmark import accuracy, worker
from benchmark.runners import ncnn_runner, onnxruntime_runner, torch_runner
from compress.errors import BenchmarkError

NO_GPU = not torch.cuda.is_available()


@pytest.mark.skipif(not NO_GPU, reason="this machine has an NVIDIA GPU")
@pytest.mark.parametrize("variant", ["cuda", "cuda-fp16", "cudagraph", "cudagraph-fp16"])
def test_torch_without_a_gpu_is_refused(checkpoint: Path, variant: str) -> None:
    with pytest.raises(ValueError, match=r"tiny\.pt: this PyTorch \(.*\) sees no NVIDIA GPU: use the runtime torch$"):
        worker.open_model(f"benchmark.runners.torch_runner:{variant}", str(checkpoint), 1)


@pytest.mark.skipif(not NO_GPU, reason="this machine has an NVIDIA GPU")
def test_the_evaluator_opens_the_variant_too(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="sees no NVIDIA GPU"):
        torch_runner.load(str(checkpoint), 1, "cuda")
    with pytest.raises(BenchmarkError, match="sees no NVIDIA GPU"):
        accuracy._open(checkpoint, "torch-cuda", 1)
    assert (
        accuracy._open(checkpoint, "torch", 1).facts["runtime"] == accuracy._open(checkpoint, None, 1).facts["runtime"]
    )


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_compiled_torch_computes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # One convolution in place of a whole detector, which takes minutes to compile. Like that one it has no length.
    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 4, 3)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.silu(self.conv(images))

    torch.manual_seed(0)
    network = Network().eval().requires_grad_(False)
    monkeypatch.setattr(torch_runner, "inference_network", lambda _: network)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    image = np.random.default_rng(0).random((1, 3, 8, 8), dtype=np.float32)
    session = torch_runner.load("any.pt", 1, "compiled")
    plain = torch_runner.infer(torch_runner.load("any.pt", 1), image)
    np.testing.assert_allclose(torch_runner.infer(session, image)[0], plain[0], atol=1e-5)
    assert session.run is not None
    assert hasattr(session.run, "_torchdynamo_orig_callable") or session.run is not network
    assert any(tmp_path.rglob("*.so"))  # it was compiled


def test_torch_names_the_way_it_runs(checkpoint: Path) -> None:
    session = torch_runner.load(str(checkpoint), 1)
    facts = torch_runner.describe(torch_runner.Session(session.network, 1, frozenset({"compiled"})))
    assert (facts["runtime"], facts["precision"], facts["providers"]) == ("torch-compiled", "fp32", None)


@pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="this onnxruntime has CUDA"
)
@pytest.mark.parametrize(("variant", "provider"), [("cuda", "CUDA"), ("tensorrt", "Tensorrt")])
def test_onnxruntime_without_the_provider_is_refused(variant: str, provider: str) -> None:
    with pytest.raises(ValueError, match=f"^a.onnx needs {provider}ExecutionProvider, which this onnxruntime .* inst"):
        onnxruntime_runner.load("a.onnx", 1, variant)


class FakeGraph:
    """A session of onnxruntime that starts with the first of the providers that work."""

    works = ("CUDAExecutionProvider", "CPUExecutionProvider")

    def __init__(self, path: str, options: Any, providers: list[str]) -> None:
        self.asked = providers

    def get_providers(self) -> list[str]:
        return [name for name in self.asked if name in self.works]

    def get_inputs(self) -> list[Any]:
        return [SimpleNamespace(name="images", shape=[1, 3, 64, 64], type="tensor(float)")]

    def get_modelmeta(self) -> Any:
        return SimpleNamespace(custom_metadata_map={})


def test_a_session_that_fell_back_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    every = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: every)
    monkeypatch.setattr(onnxruntime, "InferenceSession", FakeGraph)
    facts = onnxruntime_runner.describe(onnxruntime_runner.load("a.onnx", 1, "cuda"))
    assert (facts["runtime"], facts["providers"]) == ("onnxruntime-cuda", every[1:])
    with pytest.raises(ValueError, match=r"^a\.onnx needs TensorrtExecutionProvider, which cannot start here: check"):
        onnxruntime_runner.load("a.onnx", 1, "tensorrt")
    monkeypatch.setattr(FakeGraph, "works", ("CPUExecutionProvider",))
    with pytest.raises(ValueError, match=r"^a\.onnx needs CUDAExecutionProvider, which cannot start here"):
        onnxruntime_runner.load("a.onnx", 1, "cuda")


def test_ncnn_takes_a_gpu_that_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    kind, count = ncnn_runner._SOFTWARE, 0
    info = SimpleNamespace(type=lambda: kind, device_name=lambda: "llvmpipe")
    fake = SimpleNamespace(get_gpu_count=lambda: count, get_default_gpu_index=lambda: 0, get_gpu_info=lambda _: info)
    monkeypatch.setattr(ncnn_runner, "ncnn", fake)
    with pytest.raises(ValueError, match=r"^m: ncnn finds no GPU with Vulkan here"):
        ncnn_runner._vulkan_gpu("m")
    count = 1
    with pytest.raises(ValueError, match=r"^m: Vulkan is only emulated here \(llvmpipe\)"):
        ncnn_runner._vulkan_gpu("m")
    kind = 1
    assert ncnn_runner._vulkan_gpu("m") == "llvmpipe"
