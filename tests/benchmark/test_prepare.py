"""Which runtime a file is for on a device, and what a checkpoint is exported to for it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import helper

from benchmark import prepare, sites
from benchmark.origins import KEY
from benchmark.transports import Adb, Local, Ssh
from compress.devices import Device, load_device
from compress.errors import BenchmarkError, RunError, SettingsError
from compress.settings import Export, ExportTrt


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "dense.pt", tmp_path / "pruned.pt"]
    for path in paths:
        path.write_bytes(b"weights")
    return paths


def asked(device: str, paths: list[Path], **changes: Any) -> prepare.Request:
    given: dict[str, Any] = dict.fromkeys(("runtime", "precision", "imgsz", "threads", "data", "split", "host"))
    return prepare.request(load_device(device), paths, **{**given, **changes})


@pytest.mark.parametrize(
    ("device", "runtime", "expected"),
    [
        ("cpu", None, "torch"),
        ("cpu", "ncnn", "ncnn"),
        ("cpu", "torch-compiled", "torch-compiled"),
        ("cuda", None, "tensorrt"),
        ("cuda", "torch-cudagraph", "torch-cudagraph"),
        ("cuda", "onnxruntime-cuda", "onnxruntime-cuda"),
        ("jetson", None, "tensorrt"),
        ("rpi5", None, "ncnn"),
        ("rpi5", "onnxruntime", "onnxruntime"),
    ],
)
def test_a_checkpoint_goes_to_the_first_runtime_of_its_device(
    device: str, runtime: str | None, expected: str, models: list[Path]
) -> None:
    found = prepare.by_name(models, runtime, load_device(device))
    assert found == {"dense": {expected: models[0]}, "pruned": {expected: models[1]}}


@pytest.mark.parametrize(
    ("device", "runtime", "expected"),
    [
        ("cpu", None, "onnxruntime"),
        ("cuda", None, "onnxruntime-tensorrt"),
        ("cuda", "onnxruntime-cuda", "onnxruntime-cuda"),
        ("jetson", None, "onnxruntime"),  # refused by `request`
    ],
)
def test_a_file_runs_in_the_variant_that_the_device_has(
    device: str, runtime: str | None, expected: str, tmp_path: Path
) -> None:
    (tmp_path / "a.onnx").write_bytes(b"graph")
    found = prepare.by_name([tmp_path / "a.onnx"], runtime, load_device(device))
    assert found == {"a": {expected: tmp_path / "a.onnx"}}
    with pytest.raises(BenchmarkError, match=r"a\.onnx must be a folder NAME_ncnn_model to run in ncnn-vulkan"):
        prepare.by_name([tmp_path / "a.onnx"], "ncnn-vulkan", load_device(device))


def test_several_runtimes_are_measured_side_by_side(models: list[Path], tmp_path: Path) -> None:
    cpu, graph = load_device("cpu"), tmp_path / "dense.onnx"
    graph.write_bytes(b"graph")
    found = prepare.by_name(models, "torch,torch-compiled, onnxruntime,torch", cpu)
    assert found == {
        name: dict.fromkeys(("torch", "torch-compiled", "onnxruntime"), path)
        for name, path in zip(("dense", "pruned"), models, strict=True)
    }
    found = prepare.by_name([graph], "onnxruntime,onnxruntime-cuda", load_device("cuda"))
    assert found == {"dense": {"onnxruntime": graph, "onnxruntime-cuda": graph}}


@pytest.mark.parametrize(
    ("runtime", "message"),
    [
        ("torch,tensorflow", r"unknown runtime 'tensorflow': choose one of tensorrt, "),
        (",", r"unknown runtime '': choose one of "),
        ("onnxruntime,ncnn", r"no model is a folder NAME_ncnn_model, which ncnn runs: give one, or a checkpoint"),
        ("ncnn,torch", r"a\.onnx must be a folder NAME_ncnn_model or a \.pt file to run in ncnn or torch"),
    ],
)
def test_a_runtime_without_a_file_is_no_silence(runtime: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"graph")
    with pytest.raises(BenchmarkError, match=message):
        prepare.by_name([tmp_path / "a.onnx"], runtime, load_device("cpu"))


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a/m.onnx", "b/m.onnx", "b/m.pt", "b/other.onnx")]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    found = prepare.by_name([*paths, paths[0]], None, load_device("cpu"))
    assert found == {
        "a/m": {"onnxruntime": paths[0]},
        "b/m": {"onnxruntime": paths[1], "torch": paths[2]},
        "other": {"onnxruntime": paths[3]},
        str(paths[0]): {"onnxruntime": paths[0]},
    }


def exported(path: Path, checkpoint: bytes) -> Path:
    """Write a model file that says of which checkpoint it was made."""
    sha256 = hashlib.sha256(checkpoint).hexdigest()
    if path.suffix == ".onnx":
        path.parent.mkdir(parents=True)
        graph = helper.make_graph([], "g", [], [])
        onnx_model = helper.make_model(graph)
        onnx_model.metadata_props.add(key=KEY, value=sha256)
        onnx.save(onnx_model, path)
    else:
        path.mkdir(parents=True)
        (path / "metadata.yaml").write_text(f"{KEY}: {sha256}")
    return path


def test_files_of_one_name_and_other_checkpoints_are_other_models(tmp_path: Path) -> None:
    dense = exported(tmp_path / "dense_onnx/model.onnx", b"dense")
    pruned = exported(tmp_path / "pruned_ncnn/model_ncnn_model", b"pruned")
    found = prepare.by_name([dense, pruned], None, load_device("cpu"))
    assert found == {"dense_onnx/model": {"onnxruntime": dense}, "pruned_ncnn/model": {"ncnn": pruned}}


def test_files_of_one_checkpoint_are_one_model_wherever_they_lie(tmp_path: Path) -> None:
    dense = exported(tmp_path / "dense_onnx/model.onnx", b"dense")
    also = exported(tmp_path / "dense_ncnn/model_ncnn_model", b"dense")
    pruned = exported(tmp_path / "pruned_onnx/model.onnx", b"pruned")
    checkpoint = tmp_path / "run" / "model.pt"
    checkpoint.parent.mkdir()
    checkpoint.write_bytes(b"pruned")
    found = prepare.by_name([dense, pruned, also, checkpoint], None, load_device("cpu"))
    assert found == {
        "dense_onnx/model": {"onnxruntime": dense, "ncnn": also},
        "pruned_onnx/model": {"onnxruntime": pruned, "torch": checkpoint},
    }


def test_what_is_measured_elsewhere_is_told_apart_by_how_it_is_reached(
    models: list[Path], tiny_data: Path, tmp_path: Path
) -> None:
    given = {"data": str(tiny_data), "host": "pi"}
    first = asked("rpi5", models, **given).config()
    assert (first["host"], first["python"], first["counter"]) == ("pi", "python3", None)
    assert first != asked("rpi5", models, **given, python="venv/bin/python").config()
    assert not {"python", "counter"} & set(asked("cpu", models).config())
    with pytest.raises(RunError, match=r"dense\.pt lies in the folder of its own result, .*: choose another --output"):
        asked("cpu", models).check_outside(tmp_path)


@pytest.mark.parametrize(
    ("device", "runtime", "batches", "expected"),
    [
        ("cpu", "onnxruntime", (1,), {}),
        ("cpu", "onnxruntime", (1, 4), {"dynamic": "batch"}),
        ("cuda", "onnxruntime-cuda", (1,), {"half": True}),
        ("cpu", "onnxruntime-hugepages", (1,), {}),
    ],
)
def test_what_onnxruntime_gets(
    device: str, runtime: str, batches: tuple[int, ...], expected: dict[str, Any], tiny_data: Path,
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from export import onnx

    made: list[Any] = []
    monkeypatch.setattr(onnx, "export_stage", lambda *arguments: made.append(arguments[3]))
    wanted = asked(device, models, data=str(tiny_data), runtime=runtime, batches=batches)
    prepare._export(wanted, runtime, models[0], tmp_path / "exports" / "0", Local())
    assert made == [Export(**expected)]


def test_the_device_says_what_was_not_asked(tiny_data: Path, models: list[Path]) -> None:
    wanted = asked("rpi5", models, data=str(tiny_data))
    assert (wanted.imgsz, wanted.threads, wanted.precision) == (640, 4, "fp16")
    assert wanted.config()["precision"] == "fp16"
    other = asked("cpu", models, imgsz=320, threads=2)
    assert (other.imgsz, other.threads) == (320, 2)
    assert other.config()["precision"] is None  # nothing is exported


@pytest.mark.parametrize(
    ("device", "options", "message"),
    [
        ("cpu", {"split": "test"}, "--split is of --data, which is missing"),
        ("cpu", {"precision": "fp16"}, "--precision is of what is exported, and nothing is"),
        ("cpu", {"precision": "fp16", "runtime": "onnxruntime", "data": True}, "--precision fp16 has no effect"),
        (
            "cpu",
            {"precision": "fp16", "runtime": "onnxruntime,onnxruntime-hugepages", "data": True},
            "no effect: onnxruntime, onnxruntime-hugepages computes in fp32 on a CPU",
        ),
        ("cpu", {"keep_outputs": True, "data": True}, "--keep-outputs keeps what another device infers"),
        ("rpi5", {"keep_outputs": True}, "--keep-outputs keeps what another device infers"),
    ],
)
def test_an_option_without_effect_is_refused(
    device: str, options: dict[str, Any], message: str, tiny_data: Path, models: list[Path]
) -> None:
    if "data" in options:
        options = {**options, "data": str(tiny_data)}
    with pytest.raises(SettingsError, match=message):
        asked(device, models, **options)


def test_precision_and_split_reach_what_they_are_of(tiny_data: Path, models: list[Path]) -> None:
    wanted = asked("cpu", models, runtime="onnxruntime,ncnn", precision="fp16", data=str(tiny_data), split="test")
    assert (wanted.precision, wanted.split) == ("fp16", "test")
    assert asked("cpu", models, runtime="onnxruntime", precision="fp32", data=str(tiny_data)).split == "val"


def test_a_file_that_the_device_does_not_run_is_refused(tiny_data: Path, models: list[Path], tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"graph")
    with pytest.raises(
        BenchmarkError, match=r"a\.onnx needs onnxruntime, android runs ncnn, ncnn-vulkan: give a check"
    ):
        asked("android", [tmp_path / "a.onnx"])
    with pytest.raises(BenchmarkError, match=r"--data is missing: .* export of .*dense\.pt for ncnn"):
        asked("rpi5", models)
    with pytest.raises(BenchmarkError, match="jetson-orin-nano runs tensorrt"):
        asked("jetson", models, runtime="ncnn", data=str(tiny_data))


def test_an_engine_is_built_on_the_device(
    tiny_data: Path, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from export import trt

    built: list[Any] = []
    monkeypatch.setattr(trt, "export_stage", lambda *arguments, **more: built.append((arguments, more["data"])))
    wanted, place = asked("jetson", models, data=str(tiny_data), imgsz=320), Ssh("jetson", 22, "/usr/bin/python3")
    engine = prepare._export(wanted, "tensorrt", models[0], tmp_path / "exports" / "0-tensorrt", place)
    assert engine == tmp_path / "exports" / "0-tensorrt" / "dense.engine"
    settings = ExportTrt(precision="fp16", imgsz="320")
    assert built == [((models[0], settings, place, engine.parent), wanted.data)]
    with pytest.raises(BenchmarkError, match="TensorRT does not run on Android"):
        prepare._export(wanted, "tensorrt", models[0], tmp_path / "exports" / "0-tensorrt", Adb())


def test_an_engine_goes_there_with_its_sidecar(adb: Path, tmp_path: Path) -> None:
    engine = tmp_path / "a b.engine"
    for ending in ("", ".json", ".layers.json"):
        engine.with_name(engine.name + ending).write_bytes(b"x")
    (adb / "data/local/tmp/job").mkdir()
    there = sites._push_model(Adb("phone-1"), "/data/local/tmp/job", "0", engine)
    assert there == "0/model.engine"
    names = sorted(path.name for path in (adb / "data/local/tmp/job/0").iterdir())
    assert names == ["model.engine", "model.engine.json"]


def test_the_score_of_an_interrupted_start_is_that_of_the_same_file(
    models: list[Path], tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmark import accuracy

    scored: list[Path] = []
    monkeypatch.setattr(accuracy, "evaluate", lambda path, *_, **__: scored.append(path) or {"map50_95": len(scored)})
    engine = tmp_path / "dense.engine"
    wanted = asked("cpu", models[:1], data=str(tiny_data), runtime="torch")

    def score(content: bytes) -> float:
        engine.write_bytes(content)
        return prepare.score(wanted, sites.here(), {"dense": {"torch": engine}}, tmp_path)["dense.torch"]["map50_95"]

    assert [score(b"first"), score(b"first"), score(b"built anew")] == [1, 1, 2]


def test_host_and_interpreter_are_those_of_the_device_or_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def place(name: str, host: str | None = None, python: str | None = None, put_packages: bool = False) -> Any:
        return sites.transport_of(load_device(name), host, python, put_packages)

    assert place("rpi5", "pi@10.0.0.7:2222") == Ssh("pi@10.0.0.7", 2222, "python3")
    assert place("jetson", "j", "/opt/python") == Ssh("j", None, "/opt/python")
    assert place("android") == Adb(None, "python3")
    assert place("android", "0123") == Adb("0123", "python3")
    useless_ones: list[dict[str, Any]] = [{"host": "h"}, {"python": "python3"}, {"put_packages": True}]
    for useless in useless_ones:
        with pytest.raises(SettingsError, match="cpu is this machine: leave out --host, --python and --bootstrap"):
            place("cpu", **useless)
    monkeypatch.setenv("ESPALIER_CACHE", str(tmp_path))
    with pytest.raises(Exception, match=r"ssh_config does not exist: run bash scripts/emulated_arm\.sh up"):
        place("arm-emulated")
    config = tmp_path / "emulated-arm" / "ssh_config"
    config.parent.mkdir()
    config.touch()
    python, setup = "/opt/espalier/bin/python-count", "bash scripts/emulated_arm.sh up"
    assert place("arm-emulated") == Ssh("espalier-arm", None, python, config, setup)
    assert place("arm-emulated", "other") == Ssh("other", None, python)


def test_a_runtime_of_this_machine_alone_is_refused_elsewhere() -> None:
    content = load_device("rpi5").model_dump()
    device = Device(**{**content, "runtimes": ("torch",), "budgets": {"torch": content["budgets"]["ncnn"]}})
    with (
        pytest.raises(Exception, match="torch runs on this machine only: export the model for rpi5"),
        sites.open_site(device, "host", None, ["torch"]),
    ):
        pass
