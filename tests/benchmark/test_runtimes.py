from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from benchmark import runtimes
from compress import manifest
from compress.devices import load_device
from compress.errors import BenchmarkError
from compress.settings import Runtime, Variant


def test_every_runtime_has_a_runner_an_ending_and_words() -> None:
    from typing import get_args

    known = set(get_args(Runtime))
    assert set(runtimes.RUNNERS) == set(runtimes.KINDS) == set(runtimes.SUFFIXES.values()) == known
    for name in runtimes.RUNNERS.values():
        runner = importlib.import_module(name)
        assert all(callable(getattr(runner, function)) for function in ("load", "infer", "describe"))


def test_every_variant_is_one_of_a_known_runtime() -> None:
    from typing import get_args

    assert set(runtimes.VARIANTS) == set(get_args(Variant))
    for name, runtime in runtimes.VARIANTS.items():
        assert runtimes.base(name) == runtime
        assert runtimes.runner(name) == f"{runtimes.RUNNERS[runtime]}:{name.removeprefix(f'{runtime}-')}"
        assert runtimes.kinds(name) == runtimes.KINDS[runtime]
    assert runtimes.runner("torch") == "benchmark.runners.torch_runner"
    assert runtimes.base("torch") == "torch"
    assert set(load_device("cuda").runtimes) <= set(runtimes.names())


@pytest.mark.parametrize(
    ("name", "runtime", "stem"),
    [
        ("yolov8n.pt", "torch", "yolov8n"),
        ("yolov8n.v2.onnx", "onnxruntime", "yolov8n.v2"),
        ("yolov8n_ncnn_model", "ncnn", "yolov8n"),
        ("yolov8n.engine", "tensorrt", "yolov8n"),
        ("yolov8n.tflite", None, "yolov8n"),
        ("ncnn_model", None, "ncnn_model"),
    ],
)
def test_a_name_tells_the_runtime(name: str, runtime: str | None, stem: str) -> None:
    assert (runtimes.runtime_of(Path("a") / name), runtimes.stem(Path("a") / name)) == (runtime, stem)


def test_a_runtime_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.onnx").touch()
    monkeypatch.setitem(runtimes.RUNNERS, "onnxruntime", "a_runtime_of_nobody")
    with pytest.raises(
        BenchmarkError, match=r"a\.onnx needs the package a_runtime_of_nobody, .* -m pip install a_runt"
    ):
        runtimes.runner_of(tmp_path / "a.onnx")


def test_a_path_that_does_not_fit_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").mkdir()
    (tmp_path / "a_ncnn_model").write_text("")
    (tmp_path / "a.tflite").write_text("")
    for name, message in (
        ("a.onnx", r"a\.onnx is a folder: check the path"),
        ("a_ncnn_model", "a_ncnn_model is a file: check the path"),
        ("b.onnx", r"b\.onnx does not exist: check the path"),
        ("a.tflite", r"a\.tflite must be a \.pt file, an \.onnx file, an \.engine file or a folder NAME_ncnn_model"),
    ):
        with pytest.raises(BenchmarkError, match=message):
            runtimes.runner_of(tmp_path / name)


def test_the_hash_of_a_folder_changes_with_each_file_and_name(tmp_path: Path) -> None:
    folder = tmp_path / "a_ncnn_model"
    folder.mkdir()
    (folder / "param").write_text("1")
    (folder / "bin").write_text("2")
    first = runtimes.sha256(folder)
    (folder / "bin").write_text("3")
    second = runtimes.sha256(folder)
    (folder / "bin").rename(folder / "weights")
    third = runtimes.sha256(folder)
    assert len({first, second, third}) == 3
    folder.rename(tmp_path / "b_ncnn_model")
    assert runtimes.sha256(tmp_path / "b_ncnn_model") == third
    assert runtimes.sha256(tmp_path / "b_ncnn_model" / "param") == manifest.sha256_file(
        tmp_path / "b_ncnn_model" / "param"
    )


def test_weights_beside_an_onnx_file_are_refused(onnx_file: Path, tmp_path: Path) -> None:
    import onnx

    far = tmp_path / "far.onnx"
    onnx.save(onnx.load(onnx_file), far, save_as_external_data=True, location="weights")
    with pytest.raises(BenchmarkError, match=r"far\.onnx keeps its weights in other files: save it as one"):
        runtimes.require(far)
    onnx.save(onnx.load(far), far)  # what the message says
    runtimes.require(far)
    assert runtimes.size_bytes(far) > 10_000_000


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["runs/a/model.pt", "other/b.pt"], ["model.pt", "b.pt"]),
        (["runs/a/model.pt", "runs/b/model.pt"], ["a/model.pt", "b/model.pt"]),
        (["a/x/m.pt", "b/x/m.pt", "b/y/m.pt"], ["a/x/m.pt", "b/x/m.pt", "y/m.pt"]),
        (["m.pt", "a/m.pt"], ["m.pt", "a/m.pt"]),  # the first has no more to tell
        (["/m.pt", "/a/m.pt"], ["/m.pt", "a/m.pt"]),
        (["a/m.pt", "a/m.pt"], ["m.pt", "m.pt"]),  # one file, one name
        ([], []),
    ],
)
def test_names_are_as_short_as_they_can_be_told_apart(paths: list[str], names: list[str]) -> None:
    assert runtimes.distinct_names([Path(path) for path in paths]) == names
