from __future__ import annotations

import errno
import json
import stat
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmark.runners import ncnn_runner
from compress import manifest
from compress.checkpoint import load_model, save_model
from compress.errors import CheckpointError, ExportError, SettingsError
from compress.settings import ExportNcnn
from export import ncnn as exporter
from export import ncnn_trace

SETTINGS = ExportNcnn(parity_images=2)
FILES = ["metadata.yaml", "model.ncnn.bin", "model.ncnn.param"]


@pytest.fixture
def run(run_command: Any) -> Any:
    return partial(run_command, exporter.app)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def program(path: Path, body: str) -> Path:
    """Write a program that stands for pnnx or for Python."""
    path.write_text(f"#!{sys.executable}\nimport os, signal, sys, time\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_the_folder_holds_the_model_and_nothing_else(ncnn_model: Path) -> None:
    assert names(ncnn_model) == FILES
    assert names(ncnn_model.parent) == ["tiny_ncnn_model"]


def test_metadata_is_what_the_runner_and_a_person_need(detector: Path, ncnn_model: Path) -> None:
    import yaml

    text = (ncnn_model / "metadata.yaml").read_text()
    found = json.loads(text)
    assert yaml.safe_load(text) == found  # what Ultralytics reads
    assert found["names"] == {"0": "circle", "1": "square", "2": "star"}
    assert (found["imgsz"], found["stride"], found["strides"], found["reg_max"]) == ([64, 64], 32, [8, 16, 32], 16)
    assert (found["precision"], found["end2end"], found["task"]) == ("fp32", False, "detect")
    assert found["outputs"] == ["out0", "out1", "out2", "out3", "out4", "out5"]
    assert found["espalier_model_sha256"] == manifest.sha256_file(detector)
    assert "espalier_plan_sha256" not in found
    assert found["files"]["model.ncnn.bin"] == {
        "bytes": (ncnn_model / "model.ncnn.bin").stat().st_size,
        "sha256": manifest.sha256_file(ncnn_model / "model.ncnn.bin"),
    }


def test_the_same_model_gives_the_same_bytes(detector: Path, ncnn_model: Path, tmp_path: Path) -> None:
    (tmp_path / ".b_ncnn_model.1234" / "converted").mkdir(parents=True)  # of a start that was killed
    again = exporter.export_ncnn(detector, tmp_path / "b_ncnn_model", imgsz=64)
    assert list(tmp_path.iterdir()) == [again]
    for name in FILES:
        assert (again / name).read_bytes() == (ncnn_model / name).read_bytes()


def test_fp16_halves_the_file_and_stays_within_its_tolerance(
    detector: Path, ncnn_model: Path, images: list[Path], tmp_path: Path
) -> None:
    half = tmp_path / "half_ncnn_model"
    record = exporter.export_checked(detector, half, images, 64, ExportNcnn(half=True))
    assert (record["passed"], record["precision"]) == (True, "fp16")
    assert record["outputs"][0]["max_box_error_px"] > 1e-3  # the weights really are rounded
    full_size, half_size = ((folder / "model.ncnn.bin").stat().st_size for folder in (ncnn_model, half))
    assert half_size / full_size == pytest.approx(0.5, abs=0.02)
    assert json.loads((half / "metadata.yaml").read_text())["precision"] == "fp16"


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        pytest.param("detector", [1, 7, 84], id="DFL"),
        pytest.param("two_heads", [1, 7, 84], id="two heads: one-to-many, as stock exports"),
        pytest.param("end2end", [1, 84, 6], id="fused to its end-to-end head: stays so"),
    ],
)
def test_heads(name: str, shape: list[int], images: list[Path], tmp_path: Path, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    record = exporter.export_checked(model, tmp_path / "a_ncnn_model", images, 64, SETTINGS)
    assert record["passed"]
    assert record["outputs"][0]["shape"] == shape
    assert record["detections"]["torch"] == record["detections"]["ncnn"] > 0


@pytest.mark.parametrize("cfg", ["yolo11n.yaml", "yolov8n-ghost.yaml", "yolov8n-p2.yaml", "yolov10n.yaml"])
def test_families(cfg: str, images: list[Path], tmp_path: Path, make_detector: Callable[..., Path]) -> None:
    model = make_detector(tmp_path / "model.pt", cfg, one_head=False)
    assert exporter.export_checked(model, tmp_path / "a_ncnn_model", images, 64, SETTINGS)["passed"]


def test_yolov9e_is_fused_without_a_new_dimension() -> None:
    from ultralytics.nn.modules.block import CBFuse

    fuse = CBFuse([1, 0])
    first = (torch.zeros(1, 2, 2, 2), torch.rand(1, 2, 2, 2))
    second, last = (torch.rand(1, 2, 4, 4),), torch.rand(1, 2, 4, 4)
    expected = fuse([first, second, last])
    torch.testing.assert_close(ncnn_trace._fuse(fuse, [first, second, last]), expected)


def test_a_pruned_model_is_exported_with_its_plan(
    images: list[Path], tmp_path: Path, make_detector: Callable[..., Path]
) -> None:
    from compress.planning import plan_pruning
    from compress.pruning.surgery import apply_plan
    from compress.settings import Budget, Prune

    model = make_detector(tmp_path / "dense.pt", "yolo11n.yaml", one_head=False)
    settings = Prune(percent=0.3, importance="l1", budget=Budget(multiple_of=4))
    planned = plan_pruning(load_model(model), settings, 64)
    save_model(apply_plan(planned.model, planned.plan), tmp_path / "pruned.pt", {})
    for name in ("dense", "pruned"):
        folder = tmp_path / f"{name}_ncnn_model"
        assert exporter.export_checked(tmp_path / f"{name}.pt", folder, images, 64, SETTINGS)["passed"]
    sizes = [(tmp_path / f"{name}_ncnn_model" / "model.ncnn.bin").stat().st_size for name in ("pruned", "dense")]
    assert sizes[0] < 0.8 * sizes[1]
    assert "espalier_plan_sha256" in json.loads((tmp_path / "pruned_ncnn_model" / "metadata.yaml").read_text())


def test_imgsz_must_fit_the_stride(detector: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"imgsz 100 must be a multiple of the model's stride 32: use 96$"):
        exporter.export_ncnn(detector, tmp_path / "a_ncnn_model", imgsz=100)
    assert names(tmp_path) == []


@pytest.mark.parametrize("cfg", ["yolov8n-seg.yaml", "yolo11n.yaml"])
def test_an_open_size_is_proven_on_another_one(
    cfg: str, images: list[Path], tmp_path: Path, make_detector: Callable[..., Path]
) -> None:
    """Without its second shape pnnx makes a constant of the number of positions that attention is about."""
    model = make_detector(tmp_path / "model.pt", cfg, one_head=False)
    folder = tmp_path / "a_ncnn_model"
    record = exporter.export_checked(model, folder, images, 64, ExportNcnn(dynamic="size"))
    assert (record["passed"], record["other"]["passed"]) == (True, True)
    assert (record["imgsz"], record["other"]["imgsz"]) == (64, (64, 128))
    assert record["other"]["outputs"][0]["shape"][-1] == 2 * record["outputs"][0]["shape"][-1]
    assert record["other"]["detections"]["torch"] > 0
    session = ncnn_runner.load(str(folder), threads=1)
    assert ncnn_runner.describe(session)["input_shape"] == [1, 3, None, None]
    with pytest.raises(ValueError, match=r"takes images whose sides are multiples of 32 px, got 72×64$"):
        ncnn_runner.infer(session, np.zeros((1, 3, 64, 72), np.float32))


def test_a_fixed_size_is_fixed(ncnn_model: Path) -> None:
    session = ncnn_runner.load(str(ncnn_model), threads=1)
    with pytest.raises(ValueError, match=r"takes images of 64×64 px, got 128×64$"):
        ncnn_runner.infer(session, np.zeros((1, 3, 64, 128), np.float32))


def test_models_of_unknown_heads_are_refused(world: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"world\.pt has a WorldDetect head: only models to detect, .* can be exported"
    ):
        exporter.export_ncnn(world, tmp_path / "a_ncnn_model", imgsz=64)


@pytest.mark.parametrize("task", ["segment", "pose", "obb", "classify", "semantic", "depth"])
def test_every_task_is_exported_and_compared(
    task: str, models: dict[str, Path], images: list[Path], tmp_path: Path
) -> None:
    record = exporter.export_checked(models[task], tmp_path / "a_ncnn_model", images, 64, SETTINGS)
    assert (record["task"], record["passed"]) == (task, True)
    kinds = {"segment": 2, "pose": 2, "obb": 1}
    if task in kinds:
        assert record["detections"]["torch"] == record["detections"]["ncnn"] > 0
        assert len(record["outputs"]) == 1 + kinds[task]
    found = json.loads((tmp_path / "a_ncnn_model" / "metadata.yaml").read_text())
    assert (found["task"], len(found["outputs"])) == (task, {"segment": 10, "pose": 9, "obb": 9}.get(task, 1))


@pytest.mark.parametrize("cfg", ["yolo26n-seg.yaml", "yolo26n-pose.yaml"])
def test_end_to_end_heads_of_other_tasks(
    cfg: str, images: list[Path], tmp_path: Path, make_detector: Callable[..., Path]
) -> None:
    model = make_detector(tmp_path / "model.pt", cfg, one_head=True)
    record = exporter.export_checked(model, tmp_path / "a_ncnn_model", images[:1], 64, SETTINGS)
    assert record["outputs"][0]["shape"] == [1, 84, 6 + {"yolo26n-seg.yaml": 32}.get(cfg, 51)]
    assert record["detections"]["torch"] > 0


class Operation(torch.nn.Module):
    """One convolution and one operation."""

    def __init__(self, operation: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3)
        self.operation = operation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.operation(self.conv(x))


INDEX = torch.zeros(1, 1, 6, 6, dtype=torch.long)
OPERATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "aten::argmax": lambda x: x.argmax(1),
    "aten::argsort": lambda x: x.argsort(1),
    "aten::cdist": lambda x: torch.cdist(x, x),
    "aten::cumprod": lambda x: x.cumprod(1),
    "aten::erfinv": lambda x: x.erfinv(),
    "aten::fft_rfft": lambda x: torch.fft.rfft(x).abs(),
    "aten::gather": lambda x: x.gather(1, INDEX),
    "aten::index": lambda x: x[:, [0, 3, 2]],
    "aten::index_select": lambda x: x.index_select(1, torch.arange(3)),
    "aten::masked_fill": lambda x: x.masked_fill(x.bool(), 1.0),
    "aten::nonzero": lambda x: x.nonzero(),
    "aten::scatter": lambda x: x.scatter(1, INDEX, 1.0),
    "aten::sort": lambda x: x.sort(1)[0],
    "aten::std": lambda x: x.std(1),
    "aten::topk": lambda x: x.topk(5, 1)[0],
    "aten::var": lambda x: x.var(1),
    "aten::where": lambda x: torch.where(x.bool(), x, x * 2),
}


def trace(operation: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(Operation(operation).eval(), torch.rand(1, 3, 8, 8), check_trace=False)


def test_the_list_of_unsupported_operations_is_tested() -> None:
    assert set(OPERATIONS) == set(ncnn_trace.UNSUPPORTED)


@pytest.mark.parametrize("kind", ncnn_trace.UNSUPPORTED)
def test_unsupported_operations_are_named_before_and_after_conversion(kind: str, tmp_path: Path) -> None:
    traced = trace(OPERATIONS[kind])
    with pytest.raises(ExportError, match=rf"model\.pt uses what ncnn does not have \(.*{kind} in .*\): use the ONNX"):
        ncnn_trace.refuse_unsupported(traced, tmp_path / "model.pt")
    traced.save(tmp_path / "model.pt")
    report = exporter._convert(tmp_path, tmp_path / "model.pt", half=False)
    with pytest.raises(ExportError, match=r"model\.pt uses what ncnn does not have \(.*(torch|aten|Tensor)"):
        exporter._check_layers(tmp_path / "model.ncnn.param", report, tmp_path / "model.pt", 1)


def test_the_module_of_an_unsupported_operation_is_named(tmp_path: Path) -> None:
    import warnings

    inner = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1), Operation(OPERATIONS["aten::topk"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(inner, torch.rand(1, 3, 8, 8), check_trace=False)
    with pytest.raises(ExportError, match=r"\(aten::topk in 1\)"):
        ncnn_trace.refuse_unsupported(traced, tmp_path / "model.pt")


def test_what_pnnx_gives_up_on_is_named(tmp_path: Path) -> None:
    traced = trace(lambda x: torch.stack([x, x]).sum(0))
    ncnn_trace.refuse_unsupported(traced, tmp_path / "model.pt")
    traced.save(tmp_path / "model.pt")
    report = exporter._convert(tmp_path, tmp_path / "model.pt", half=False)
    with pytest.raises(ExportError, match="stack along batch axis 0 is not supported"):
        exporter._check_layers(tmp_path / "model.ncnn.param", report, tmp_path / "model.pt", 1)


def test_other_outputs_than_the_head_has_are_refused(tmp_path: Path) -> None:
    traced = trace(torch.relu)
    traced.save(tmp_path / "model.pt")
    report = exporter._convert(tmp_path, tmp_path / "model.pt", half=False)
    assert exporter._check_layers(tmp_path / "model.ncnn.param", report, tmp_path / "model.pt", 1) == ["out0"]
    with pytest.raises(ExportError, match=r"other outputs than out0, out1"):
        exporter._check_layers(tmp_path / "model.ncnn.param", report, tmp_path / "model.pt", 2)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", r"pnnx failed on tiny\.pt \(SIGSEGV\); .* use the ONNX export"),
        ("sys.exit('no such pass')", r"pnnx failed on tiny\.pt \(exit code 1\); its last line was: no such pass; "),
        ("print('done')", r"pnnx wrote no model\.ncnn\.param for tiny\.pt; its last line was: done"),
        ("time.sleep(60)", r"pnnx did not finish tiny\.pt in 0\.2 s"),
        (None, r"pnnx cannot be started \(No such file or directory\): install it again"),
    ],
    ids=["crash", "failure", "no file", "hang", "not installed"],
)
def test_a_pnnx_that_fails_is_one_line_and_leaves_nothing(
    body: str | None, message: str, detector: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pnnx

    tools, out = tmp_path / "tools", tmp_path / "out"
    tools.mkdir()
    out.mkdir()
    path = tools / "pnnx" if body is None else program(tools / "pnnx", body)
    monkeypatch.setattr(pnnx, "EXEC_PATH", str(path))
    if body and "sleep" in body:
        monkeypatch.setattr(exporter, "TIMEOUT_S", 0.2)
    with pytest.raises(ExportError, match=message):
        exporter.export_ncnn(detector, out / "tiny_ncnn_model", imgsz=64)
    assert names(out) == []


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", r"ncnn crashed on tiny\.pt \(SIGSEGV\): try another version of pnnx"),
        ('print(\'{"error": "no memory"}\')', r"ncnn cannot run tiny\.pt: no memory"),
        ("sys.exit(3)", r"ncnn crashed on tiny\.pt \(exit code 3\)"),
    ],
    ids=["crash", "error", "failure"],
)
def test_a_graph_that_ncnn_cannot_run_is_refused(
    body: str, message: str, detector: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python, out = program(tmp_path / "python", body), tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(ExportError, match=message):
        exporter.export_ncnn(detector, out / "tiny_ncnn_model", imgsz=64)
    assert names(out) == []


def test_a_failed_parity_keeps_the_folder_as_rejected(
    detector: Path, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other: Any = load_model(detector)
    other.model[-1].cv2[0][-1].bias.data[0] += 0.1
    save_model(other, tmp_path / "other.pt", {})
    output, honest = tmp_path / "a_ncnn_model", exporter.export_ncnn
    first = exporter.export_checked(detector, output, images, 64, SETTINGS)
    assert first["passed"]
    before = (output / "model.ncnn.bin").read_bytes()

    monkeypatch.setattr(
        exporter, "export_ncnn", lambda _, folder, **rest: honest(tmp_path / "other.pt", folder, **rest)
    )
    with pytest.raises(
        ExportError,
        match=r"a_ncnn_model does not equal PyTorch on 3 images: .*a box moves by .* kept as a\.rejected_ncnn_model: ",
    ):
        exporter.export_checked(detector, output, images, 64, SETTINGS)
    assert names(tmp_path) == ["a.rejected_ncnn_model", "a_ncnn_model", "other.pt"]
    assert names(tmp_path / "a.rejected_ncnn_model") == FILES
    assert (output / "model.ncnn.bin").read_bytes() == before  # what was proven before is still there

    monkeypatch.undo()
    assert exporter.export_checked(detector, output, images, 64, SETTINGS) == first
    assert names(tmp_path) == ["a_ncnn_model", "other.pt"]


def test_the_command_exports_and_says_so(
    run: Any, detector: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ("--model", detector, "--data", data, "--imgsz", 64, "--output", out, "--parity-images", 1)
    assert run(*arguments) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"ncnn: {out / 'tiny_ncnn_model'} (1 images: boxes within ")
    assert len(text.splitlines()) == 1
    assert names(out) == ["manifest.json", "parity.json", "tiny_ncnn_model"]
    record = manifest.read_json(out / "manifest.json")
    assert sorted(record["files"]) == ["parity.json", *(f"tiny_ncnn_model/{name}" for name in FILES)]
    assert record["config"]["half"] is False
    assert run(*arguments) == 0
    assert capsys.readouterr().out == f"ncnn: finished before, unchanged: {out}\n"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--model": "missing.pt"}, "missing.pt does not exist"),
        ({"--model": "."}, ". is no checkpoint: give a .pt file"),
        ({"--model": __file__}, ".py is no checkpoint: give a .pt file"),
        ({"--imgsz": "100"}, "imgsz 100 must be a multiple of the model's stride 32: use 96"),
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
    assert not list(tmp_path.glob("out/*_ncnn_model"))


def test_a_full_disk_is_one_line_and_leaves_no_part(
    run: Any,
    detector: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Torch itself would end the process, without an error that could be caught, when it writes its trace there."""
    honest = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if path.name == "model.pt":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return honest(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    assert run("--model", detector, "--data", data, "--imgsz", 64, "--output", tmp_path / "out") == 2
    assert "No space left on device" in capsys.readouterr().err
    assert names(tmp_path / "out") == ["started.json"]


def test_real_detectors(shared: Path, tmp_path: Path) -> None:
    photos = sorted((shared / "data/coco128/images/val2017").glob("*.jpg"))[:2]
    model = shared / "weights" / "yolo26n_deq.pt"
    record = exporter.export_checked(model, tmp_path / "real_ncnn_model", photos, 320, SETTINGS)
    assert record["detections"]["torch"] == record["detections"]["ncnn"] >= 2
    assert record["outputs"][0]["score_rms_error"] < 1e-4
