from __future__ import annotations

import errno
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from compress import manifest
from compress.checkpoint import build_model, load_model, save_model
from compress.errors import CheckpointError, DataError, EspalierError, ExportError, SettingsError
from compress.settings import Export
from export import onnx as exporter
from export.stage import check_model

SETTINGS = Export(opset=17, parity_images=2)


@pytest.fixture
def run(run_command: Any) -> Any:
    return partial(run_command, exporter.app)


def metadata(path: Path) -> dict[str, str]:
    import onnx

    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


def test_metadata_is_what_ultralytics_and_the_runners_read(detector: Path, tmp_path: Path) -> None:
    found = metadata(exporter.export_onnx(detector, tmp_path / "a.onnx", imgsz=64))
    assert found["names"] == "{0: 'circle', 1: 'square', 2: 'star'}"
    assert found["imgsz"] == "[64, 64]"
    assert (found["stride"], found["task"], found["batch"], found["end2end"]) == ("32", "detect", "1", "False")
    assert found["espalier_model_sha256"] == manifest.sha256_file(detector)
    assert "espalier_plan_sha256" not in found


def test_the_plans_of_a_pruned_model_are_named(detector: Path, tmp_path: Path) -> None:
    model: Any = load_model(detector)
    plans = [{"groups": {"model.0": [0, 2]}}]
    model.espalier_plans = plans
    save_model(model, tmp_path / "pruned.pt", {})
    found = metadata(exporter.export_onnx(tmp_path / "pruned.pt", tmp_path / "a.onnx", imgsz=64))
    assert found["espalier_plan_sha256"] == manifest.sha256_json(plans)


def test_the_same_model_gives_the_same_bytes(detector: Path, tmp_path: Path) -> None:
    first = exporter.export_onnx(detector, tmp_path / "a.onnx", imgsz=64)
    second = exporter.export_onnx(detector, tmp_path / "b.onnx", imgsz=64)
    assert first.read_bytes() == second.read_bytes()


def test_opset_and_simplify_are_obeyed(detector: Path, tmp_path: Path) -> None:
    import onnx

    plain = onnx.load(
        exporter.export_onnx(detector, tmp_path / "a.onnx", imgsz=64, settings=Export(opset=13, simplify=False))
    )
    simple = onnx.load(exporter.export_onnx(detector, tmp_path / "b.onnx", imgsz=64, settings=Export(opset=13)))
    assert plain.opset_import[0].version == simple.opset_import[0].version == 13
    assert len(simple.graph.node) < len(plain.graph.node)


def test_stock_ultralytics_detects_the_same(detector: Path, images: list[Path], tmp_path: Path) -> None:
    from ultralytics import YOLO

    path = exporter.export_onnx(detector, tmp_path / "a.onnx", imgsz=64)
    arguments: dict[str, Any] = {"imgsz": 64, "rect": False, "verbose": False, "device": "cpu"}
    expected: Any = next(iter(YOLO(detector).predict(images[0], **arguments)))
    actual: Any = next(iter(YOLO(path, task="detect").predict(images[0], **arguments)))
    assert actual.names == {0: "circle", 1: "square", 2: "star"}
    assert len(actual.boxes) == len(expected.boxes) > 0
    torch.testing.assert_close(actual.boxes.data, expected.boxes.data, atol=0.05, rtol=0)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        pytest.param("two_heads", [1, 7, 84], id="two heads: one-to-many, as stock exports"),
        pytest.param("end2end", [1, 84, 6], id="fused to its end-to-end head: stays so"),
    ],
)
def test_heads(name: str, shape: list[int], images: list[Path], tmp_path: Path, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    record = exporter.export_checked(model, tmp_path / "a.onnx", images, 64, SETTINGS)
    assert record["outputs"][0]["shape"] == shape
    assert record["detections"]["torch"] > 0
    assert metadata(tmp_path / "a.onnx")["end2end"] == str(name == "end2end")


@pytest.mark.parametrize(("imgsz", "nearest"), [(330, 320), (340, 352), (1, 32), (16, 32)])
def test_imgsz_must_fit_the_stride(detector: Path, tmp_path: Path, imgsz: int, nearest: int) -> None:
    message = f"imgsz {imgsz} must be a multiple of the model's stride 32: use {nearest}$"
    with pytest.raises(SettingsError, match=message):
        exporter.export_onnx(detector, tmp_path / "a.onnx", imgsz=imgsz)
    assert list(tmp_path.iterdir()) == []


def test_models_of_other_images_than_rgb_are_refused(tmp_path: Path) -> None:
    network: Any = build_model("yolov8n.yaml", nc=3)
    network.yaml["channels"] = 1
    save_model(network, tmp_path / "grey.pt", {})
    with pytest.raises(CheckpointError, match=r"grey\.pt takes images of 1 channels: exports are proven on RGB"):
        check_model(tmp_path / "grey.pt", 64)


def test_models_of_unknown_heads_are_refused(world: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"world\.pt has a WorldDetect head: only models to detect, .* can be exported"
    ):
        exporter.export_onnx(world, tmp_path / "a.onnx", imgsz=64)


# What each task says beside boxes and scores, and the shape of its first output at 64 px.
TASKS: dict[str, tuple[list[int], list[str]]] = {
    "segment": ([1, 4 + 3 + 8, 84], ["mask coefficients", "mask prototypes"]),
    "pose": ([1, 4 + 3 + 6, 84], ["key points", "visibility"]),
    "obb": ([1, 4 + 3 + 1, 84], ["angles"]),
    "classify": ([1, 3], []),
    "semantic": ([1, 3, 64, 64], ["class logits"]),
    "depth": ([1, 1, 64, 64], ["depths"]),
}


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_exported_and_compared(
    task: str, models: dict[str, Path], images: list[Path], tmp_path: Path
) -> None:
    record = exporter.export_checked(models[task], tmp_path / "a.onnx", images, 64, SETTINGS)
    shape, kinds = TASKS[task]
    assert record["outputs"][0]["shape"] == shape
    assert [output["name"] for output in record["outputs"] if "name" in output] == kinds
    assert ("detections" in record) == (task in ("segment", "pose", "obb"))
    assert metadata(tmp_path / "a.onnx")["task"] == record["task"] == task


def test_a_pruned_model_of_another_task_is_exported(
    models: dict[str, Path], images: list[Path], tmp_path: Path
) -> None:
    from compress.planning import plan_pruning
    from compress.pruning.surgery import apply_plan
    from compress.settings import Budget, Prune

    settings = Prune(percent=0.4, importance="l1", budget=Budget(multiple_of=2, min_width=2))
    planned = plan_pruning(load_model(models["pose"]), settings, 64)
    save_model(apply_plan(planned.model, planned.plan), tmp_path / "pruned.pt", {})
    assert exporter.export_checked(tmp_path / "pruned.pt", tmp_path / "a.onnx", images, 64, SETTINGS)["passed"]
    found = metadata(tmp_path / "a.onnx")
    assert (found["kpt_shape"], found["task"]) == ("[2, 3]", "pose")
    assert planned.metrics()["params"][1] < 0.9 * planned.metrics()["params"][0]
    assert "espalier_plan_sha256" in found


def shapes(path: Path) -> list[list[int | str]]:
    """Return the shapes of the graph's input and outputs."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [list(value.shape) for value in [*session.get_inputs(), *session.get_outputs()]]


@pytest.mark.parametrize(
    ("task", "dynamic", "expected"),
    [
        ("segment", "both", [["batch", 3, "height", "width"], ["batch"], ["batch"]]),
        ("obb", "size", [[1, 3, "height", "width"], [1]]),
        ("classify", "batch", [["batch", 3, 64, 64], ["batch", 3]]),
        ("depth", "both", [["batch", 3, "height", "width"], ["batch"]]),
    ],
)
def test_open_shapes_are_proven_on_another_batch_and_size(
    task: str, dynamic: str, expected: list[Any], models: dict[str, Path], images: list[Path], tmp_path: Path
) -> None:
    settings = Export(dynamic=dynamic)  # type: ignore[arg-type]
    record = exporter.export_checked(models[task], tmp_path / "a.onnx", images, 64, settings)
    for found, first in zip(shapes(tmp_path / "a.onnx"), expected, strict=True):
        assert found[: len(first)] == first
    assert record["other"]["imgsz"] == (64 if dynamic == "batch" else (64, 128))
    assert record["other"]["batch"] == (1 if dynamic == "size" else 2)
    assert record["other"]["passed"]


def test_a_graph_that_is_wrong_at_another_size_is_rejected(
    detector: Path, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = exporter._trace

    def anchors_of_one_size(network: Any, *arguments: Any) -> Any:
        type(network.model[-1]).dynamic = property(lambda _: False, lambda *_: None)
        try:
            return honest(network, *arguments)
        finally:
            type(network.model[-1]).dynamic = False

    monkeypatch.setattr(exporter, "_trace", anchors_of_one_size)
    with pytest.raises(Exception, match=r"a\.onnx|broadcast"):
        exporter.export_checked(detector, tmp_path / "a.onnx", images, 64, Export(dynamic="size"))
    assert not (tmp_path / "a.onnx").exists()


def test_a_batch_is_exported_and_compared_as_such(models: dict[str, Path], images: list[Path], tmp_path: Path) -> None:
    record = exporter.export_checked(models["pose"], tmp_path / "a.onnx", images, 64, Export(batch=2))
    assert (record["batch"], record["images"], record["passed"]) == (2, 3, True)
    assert shapes(tmp_path / "a.onnx") == [[2, 3, 64, 64], [2, 13, 84]]
    assert metadata(tmp_path / "a.onnx")["batch"] == "2"


@pytest.mark.parametrize("task", ["detect", "segment", "classify"])
def test_fp16_is_inside_and_fp32_outside(
    task: str, detector: Path, models: dict[str, Path], images: list[Path], tmp_path: Path
) -> None:
    import onnx
    from onnx import TensorProto

    model = detector if task == "detect" else models[task]
    record = exporter.export_checked(model, tmp_path / "a.onnx", images, 64, Export(half=True))
    assert (record["precision"], record["passed"]) == ("fp16", True)
    graph = onnx.load(tmp_path / "a.onnx").graph
    weights = [tensor.data_type for tensor in graph.initializer if len(tensor.dims) == 4 and tensor.dims[0] > 1]
    assert weights.count(TensorProto.FLOAT16) == len(weights) > 5
    kinds = {value.type.tensor_type.elem_type for value in [*graph.input, *graph.output]}
    assert kinds == {TensorProto.FLOAT}
    assert metadata(tmp_path / "a.onnx")["espalier_precision"] == "fp16"
    key = "max_score_error" if task == "classify" else "max_box_error_px"
    assert record["outputs"][0][key] > 1e-4  # the weights really are rounded


def test_a_failed_parity_keeps_the_artefact_as_rejected(
    detector: Path, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other: Any = load_model(detector)
    other.model[-1].cv2[0][-1].bias.data[0] += 0.1
    save_model(other, tmp_path / "other.pt", {})
    honest = exporter.export_onnx
    monkeypatch.setattr(
        exporter, "export_onnx", lambda _, output, **rest: honest(tmp_path / "other.pt", output, **rest)
    )
    with pytest.raises(ExportError, match=r"a\.onnx does not equal PyTorch on 3 images: .* kept as a\.rejected\.onnx"):
        exporter.export_checked(detector, tmp_path / "a.onnx", images, 64, SETTINGS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.rejected.onnx", "other.pt"]

    monkeypatch.undo()
    assert exporter.export_checked(detector, tmp_path / "a.onnx", images, 64, SETTINGS)["passed"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.onnx", "other.pt"]


def test_a_failed_simplification_fails_the_export(
    detector: Path, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxsim

    monkeypatch.setattr(onnxsim, "simplify", lambda graph, check_n, **_: (graph, check_n < 1))
    with pytest.raises(ExportError, match=r"onnxsim changed what tiny\.pt computes: use --no-simplify"):
        exporter.export_checked(detector, tmp_path / "a.onnx", images, 64, SETTINGS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("tool", "message"),
    [
        ("onnxsim.simplify", r"onnxsim cannot simplify tiny\.pt \(broken graph\): try --no-simplify"),
        ("onnx.checker.check_model", r"the ONNX graph of tiny\.pt is not valid: broken graph"),
    ],
)
def test_a_tool_that_fails_is_named(
    tool: str, message: str, detector: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("broken graph")

    monkeypatch.setattr(tool, fail)
    with pytest.raises(ExportError, match=message):
        exporter.export_onnx(detector, tmp_path / "a.onnx", imgsz=64)
    assert list(tmp_path.iterdir()) == []


def test_a_stage_exports_every_model_and_is_not_repeated(
    detector: Path, end2end: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = {"dense": detector, "pruned": end2end}
    records = exporter.export_stage(models, data, 64, SETTINGS, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "dense.onnx",
        "manifest.json",
        "parity.json",
        "pruned.onnx",
    ]
    assert records == json.loads((tmp_path / "out" / "parity.json").read_text())
    assert {name: record["images"] for name, record in records.items()} == {"dense": 2, "pruned": 2}

    monkeypatch.setattr(exporter, "export_models", None)  # would fail if it were called
    assert exporter.export_stage(models, data, 64, SETTINGS, tmp_path / "out") == records


def test_the_command_exports_and_says_so(
    run: Any, detector: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--model", detector, "--data", data, "--imgsz", 64, "--output", tmp_path / "out", "--parity-images", 1)
    assert run(*arguments) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"export: {tmp_path / 'out' / 'tiny.onnx'} (1 images: boxes within ")
    assert len(out.splitlines()) == 1
    assert manifest.read_json(tmp_path / "out" / "manifest.json")["config"]["imgsz"] == 64
    assert run(*arguments) == 0
    assert capsys.readouterr().out == f"export: finished before, unchanged: {tmp_path / 'out'}\n"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--model": "missing.pt"}, "missing.pt does not exist"),
        ({"--model": "."}, ". is no checkpoint: give a .pt file"),
        ({"--model": __file__}, ".py is no checkpoint: give a .pt file"),
        ({"--imgsz": "100"}, "imgsz 100 must be a multiple of the model's stride 32: use 96"),
        ({"--opset": "12"}, "opset: Input should be greater than or equal to 13 (got 12)"),
        ({"--dynamic": "all"}, "dynamic: Input should be 'batch', 'size' or 'both' (got 'all')"),
        ({"--conf": "1.5"}, "conf: Input should be less than 1 (got 1.5)"),
        ({"--parity-images": "0"}, "parity_images: Input should be greater than or equal to 1 (got 0)"),
    ],
)
def test_mistakes_are_one_line(
    run: Any,
    changes: dict[str, str],
    message: str,
    detector: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = {"--model": detector, "--data": data, "--imgsz": "64", "--output": tmp_path / "out", **changes}
    assert run(*(word for pair in arguments.items() for word in pair)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.glob("out/*.onnx"))


def test_mistakes_leave_what_is_there(
    run: Any,
    detector: Path,
    end2end: Path,
    models: dict[str, Path],
    world: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What an earlier export left is not moved aside by one that cannot begin."""
    data = shutil.copytree(data.parent, tmp_path / "data") / data.name
    right = {"--model": detector, "--data": data, "--imgsz": "64", "--output": tmp_path / "out", "--parity-images": 1}
    assert run(*(word for pair in right.items() for word in pair)) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    other = data.with_name("other.yaml")
    other.write_text(data.read_text("utf-8").replace("names:", "names: {0: a}\nold:"), "utf-8")
    labels = data.parent / "labels" / "val"
    labels.mkdir(parents=True, exist_ok=True)
    for image in (data.parent / "images" / "val").iterdir():
        (labels / f"{image.stem}.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    for wrong, message in (
        ({"--imgsz": 100}, "imgsz 100 must be a multiple of the model's stride 32: use 96"),
        ({"--model": world}, "has a WorldDetect head"),
        ({"--data": other, "--parity-map": None}, "predicts 3 classes, "),
        ({"--model": models["semantic"], "--parity-map": None}, "'semantic', whose accuracy is not measured here"),
        ({"--model": models["pose"], "--parity-map": None}, "has None: give the data it learned"),
        ({"--model": models["classify"], "--nms": None}, "classify.pt finds no boxes: export it without --nms"),
        ({"--model": end2end, "--nms": None}, "has an end-to-end head, which repeats no box"),
    ):
        words = [word for pair in {**right, **wrong}.items() for word in pair if word is not None]
        assert run(*words) == 2
        assert message in capsys.readouterr().err
        assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert not (tmp_path / "out.1").exists()


def test_damaged_files_are_one_line(
    run: Any, detector: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cut.pt").write_bytes(detector.read_bytes()[:10_000])
    assert run("--model", tmp_path / "cut.pt", "--data", data, "--imgsz", 64, "--output", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "cut.pt" in error
    assert len(error.splitlines()) == 1


def test_data_without_images_is_an_error(detector: Path, tmp_path: Path) -> None:
    (tmp_path / "images" / "val").mkdir(parents=True)
    (tmp_path / "data.yaml").write_text("train: images/val\nval: images/val\nnames: {0: a, 1: b, 2: c}\n")
    with pytest.raises(DataError):
        exporter.export_stage({"tiny": detector}, tmp_path / "data.yaml", 64, SETTINGS, tmp_path / "out")


def test_a_full_disk_is_one_line_and_leaves_no_part(
    run: Any,
    detector: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(path: Path, content: bytes) -> None:
        if path.suffix == ".onnx":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        path.write_bytes(content)

    monkeypatch.setattr(manifest, "write_bytes_atomic", full)
    assert run("--model", detector, "--data", data, "--imgsz", 64, "--output", tmp_path / "out") == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert not list(tmp_path.glob("out/*.onnx"))


def test_a_graph_that_the_exporter_refuses_is_an_export_error(
    detector: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise torch.onnx.errors.UnsupportedOperatorError("aten::mystery", 17, None)

    monkeypatch.setattr(torch.onnx, "export", refuse)
    with pytest.raises(EspalierError, match=r"tiny\.pt cannot be exported with opset 17: .*mystery"):
        exporter.export_onnx(detector, tmp_path / "a.onnx", imgsz=64)


def test_too_little_memory_says_what_to_make_smaller(
    detector: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from export.ncnn import export_ncnn

    def zeros(*size: int) -> None:
        raise RuntimeError(f"DefaultCPUAllocator: can't allocate memory: you tried to allocate {size}")

    monkeypatch.setattr(torch, "zeros", zeros)
    for export, name in ((exporter.export_onnx, "a.onnx"), (export_ncnn, "a_ncnn_model")):
        with pytest.raises(ExportError, match=r"there is too little memory: give a smaller --imgsz or --batch$"):
            export(detector, tmp_path / name, imgsz=64)
    assert list(tmp_path.iterdir()) == []
