from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from benchmark import accuracy
from benchmark.runners import torch_runner
from compress import manifest
from compress.checkpoint import build_model, load_model, save_model
from compress.data.dataset import fingerprint
from compress.data.pixels import letterbox
from compress.errors import BenchmarkError, DataError
from export.ncnn import export_ncnn
from export.onnx import export_onnx

SHARED = Path(__file__).parents[2].parent / "shared"
IMGSZ = 96
NAMES = "names: {0: circle, 1: square, 2: star}\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained detector that detects: batch statistics keep its activations alive."""
    torch.manual_seed(0)
    model: Any = build_model("yolov8n.yaml", nc=3)
    torch.optim.swa_utils.update_bn([torch.rand(8, 3, 12, 12).repeat_interleave(8, 2).repeat_interleave(8, 3)], model)
    head = model.model[-1]
    for boxes, classes in zip(head.cv2, head.cv3, strict=True):
        torch.nn.init.normal_(boxes[-1].weight, std=0.02)
        boxes[-1].bias.data = -torch.arange(16.0).repeat(4)  # sides about half a stride away from their anchor
        torch.nn.init.normal_(classes[-1].weight, std=0.02)
        torch.nn.init.zeros_(classes[-1].bias)
    path = tmp_path_factory.mktemp("model") / "tiny.pt"
    save_model(model.eval(), path, {})
    return path


@pytest.fixture(scope="module")
def artefact(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_onnx(model, tmp_path_factory.mktemp("artefact") / "tiny.onnx", imgsz=IMGSZ)


@pytest.fixture(scope="module")
def data(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images labelled with the model's best detections, every other one narrowed, so that mAP is neither 0 nor 1."""
    import cv2
    from ultralytics.utils.nms import non_max_suppression

    folder = tmp_path_factory.mktemp("data")
    (folder / "images" / "val").mkdir(parents=True)
    (folder / "labels" / "val").mkdir(parents=True)
    generator = np.random.default_rng(0)
    session = torch_runner.load(str(model), 1)
    for number in range(6):
        image = np.kron(generator.integers(0, 256, (12, 12, 3), np.uint8), np.ones((8, 8, 1), np.uint8))
        path = folder / "images" / "val" / f"{number}.png"
        cv2.imwrite(str(path), image)
        output = torch.from_numpy(torch_runner.infer(session, letterbox(path, IMGSZ))[0].copy())
        lines = []
        kept: Any = non_max_suppression(output, 0.001, 0.7, multi_label=True)
        inside = kept[0][((kept[0][:, :4] > 0) & (kept[0][:, :4] < IMGSZ)).all(1)]
        for i, (x1, y1, x2, y2, _, label) in enumerate(inside[:12].tolist()):
            x, y, width, height = (x1 + x2) / 2, (y1 + y2) / 2, (x2 - x1) * (1 - 0.23 * (i % 2)), y2 - y1
            lines.append(f"{label:.0f} " + " ".join(str(value / IMGSZ) for value in (x, y, width, height)))
        (folder / "labels" / "val" / f"{number}.txt").write_text("\n".join(lines) + "\n")
    yaml = folder / "data.yaml"
    yaml.write_text(f"train: images/val\nval: images/val\n{NAMES}")
    return yaml


@pytest.fixture
def run(run_command: Any) -> Any:
    return partial(run_command, accuracy.app)


def stock(model: Path, data: Path, imgsz: int, folder: Path) -> tuple[float, float]:
    from ultralytics import YOLO

    arguments = {"plots": False, "verbose": False, "device": "cpu", "project": str(folder)}
    box: Any = YOLO(model).val(data=str(data), imgsz=imgsz, rect=False, **arguments).box
    return float(box.map), float(box.map50)


def test_every_runtime_agrees_with_stock_validation(model: Path, artefact: Path, data: Path, tmp_path: Path) -> None:
    folder = export_ncnn(model, tmp_path / "tiny_ncnn_model", imgsz=IMGSZ)
    copy = shutil.copytree(data.parent, tmp_path / "data") / "data.yaml"  # stock writes a label cache beside it
    expected = stock(model, copy, IMGSZ, tmp_path)
    assert 0.1 < expected[0] < 0.95
    for path, runtime in ((model, "torch"), (artefact, "onnxruntime"), (folder, "ncnn")):
        result = accuracy.evaluate(path, data, imgsz=IMGSZ, threads=1)
        assert (result["map50_95"], result["map50"]) == pytest.approx(expected, abs=1e-3)
        assert (result["runtime"], result["images"]) == (runtime, 6)


def test_map_is_the_mean_over_classes_with_labels(model: Path, data: Path) -> None:
    result = accuracy.evaluate(model, data, imgsz=IMGSZ, threads=1)
    labels = {line.split()[0] for path in data.parent.rglob("*.txt") for line in path.read_text().splitlines()}
    names = {"0": "circle", "1": "square", "2": "star"}
    assert set(result["per_class"]) == {names[label] for label in labels}
    assert result["map50_95"] == pytest.approx(np.mean(list(result["per_class"].values())))


def test_the_data_folder_is_neither_trusted_nor_changed(model: Path, data: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(data.parent, tmp_path / "data")

    class Bomb:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "exploded",)

    # The label cache of Ultralytics is a pickle that would be opened from the data folder.
    with (copy / "labels" / "val.cache").open("wb") as stream:
        np.save(stream, np.array({"version": "1.0.3", "bomb": Bomb()}, dtype=object), allow_pickle=True)
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    accuracy.evaluate(model, copy / "data.yaml", imgsz=IMGSZ, threads=1)
    assert not (tmp_path / "exploded").exists()
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("suffix", [".pt", ".onnx"])
def test_another_number_of_classes_names_both(
    suffix: str, model: Path, artefact: Path, data: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(data.parent, tmp_path / "data") / "data.yaml"
    copy.write_text(copy.read_text().replace(NAMES, "names: {0: a, 1: b, 2: c, 3: d}\n"))
    with pytest.raises(BenchmarkError, match=rf"tiny{suffix} predicts 3 classes, .*data\.yaml has 4"):
        accuracy.evaluate(model if suffix == ".pt" else artefact, copy, imgsz=IMGSZ, threads=1)


def test_an_onnx_file_of_another_size_is_named(artefact: Path, data: Path) -> None:
    with pytest.raises(BenchmarkError, match=r"takes images of 96×96 px, --imgsz is 64: use --imgsz 96"):
        accuracy.evaluate(artefact, data, imgsz=64, threads=1)


def test_values_that_are_not_finite_are_an_error(model: Path, data: Path, tmp_path: Path) -> None:
    broken: Any = load_model(model)
    broken.model[-1].cv3[0][-1].bias.data.fill_(float("nan"))
    save_model(broken, tmp_path / "nan.pt", {})
    with pytest.raises(BenchmarkError, match=r"nan\.pt returns values that are not finite on .*0\.png"):
        accuracy.evaluate(tmp_path / "nan.pt", data, imgsz=IMGSZ, threads=1)


def test_what_a_runtime_raises_is_one_line(run: Any, model: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    assert run("--model", model, "--data", data, "--imgsz", 80, "--output", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error == "error: tiny.pt on torch: takes images whose sides are multiples of 32 px, got 80×80\n"


def test_a_split_that_is_not_there_is_an_error(model: Path, data: Path) -> None:
    with pytest.raises(DataError, match="test"):
        accuracy.evaluate(model, data, split="test", imgsz=IMGSZ, threads=1)


def test_images_without_labels_are_an_error(model: Path, data: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(data.parent, tmp_path / "data")
    shutil.rmtree(copy / "labels")
    with pytest.raises(DataError, match=r"data\.yaml has no labels for its val images"):
        accuracy.evaluate(model, copy / "data.yaml", imgsz=IMGSZ, threads=1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.pt", None, "does not exist"),
        ("model.tflite", b"flat", "must be a .pt file, an .onnx file, an .engine file or a folder NAME_ncnn_model"),
        ("broken.onnx", b"not a graph", "cannot be opened by onnxruntime"),
    ],
)
def test_mistakes_are_one_line(
    run: Any,
    name: str,
    content: bytes | None,
    message: str,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert run("--model", tmp_path / name, "--data", data, "--imgsz", IMGSZ, "--output", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_the_command_writes_a_record_and_is_not_repeated(
    run: Any,
    model: Path,
    artefact: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = ("--data", data, "--output", tmp_path / "out")
    arguments = ("--models", model, artefact, "--imgsz", IMGSZ, "--threads", 1, *place)
    assert run(*arguments) == 0
    records = json.loads((tmp_path / "out" / "accuracy.json").read_text())
    assert [(record["model"], record["runtime"]) for record in records] == [
        ("tiny.pt", "torch"),
        ("tiny.onnx", "onnxruntime"),
    ]
    assert records[0]["map50_95"] == pytest.approx(records[1]["map50_95"], abs=1e-3)
    named = ("data", "data_sha256", "split", "imgsz", "runtime_version", "precision")
    versions = (torch.__version__, onnxruntime.__version__)
    assert [tuple(record[name] for name in named) for record in records] == [
        ("data.yaml", fingerprint(data), "val", IMGSZ, version, "fp32") for version in versions
    ]
    assert f"{records[0]['map50_95']:.4f}" in capsys.readouterr().out

    monkeypatch.setattr(accuracy, "evaluate", None)  # would fail if it were called
    assert run(*arguments) == 0
    assert f"{records[0]['map50_95']:.4f}" in capsys.readouterr().out

    tools = manifest.tool_versions()
    monkeypatch.setattr(manifest, "tool_versions", lambda: {**tools, "torch": "99.0"})
    monkeypatch.setattr(accuracy, "evaluate", lambda *_, **__: records[0])
    assert run(*arguments) == 0
    said = f"was measured in torch {tools['torch']}, 99.0 is installed: it is taken anew, the old one is now"
    assert said in capsys.readouterr().out
    assert (tmp_path / "out.1" / "accuracy.json").exists()


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared weights and images beside the repository")
def test_a_real_detector_agrees_with_stock_validation(tmp_path: Path) -> None:
    for kind, suffix in (("images", ".jpg"), ("labels", ".txt")):
        (tmp_path / kind / "val").mkdir(parents=True)
        for path in sorted((SHARED / "data/coco128" / kind / "val2017").glob(f"*{suffix}"))[:8]:
            shutil.copyfile(path, tmp_path / kind / "val" / path.name)
    names = (SHARED / "data/coco128/coco128val.yaml").read_text().split("names:")[1]
    yaml = tmp_path / "data.yaml"
    yaml.write_text(f"train: images/val\nval: images/val\nnames:{names}")
    model = SHARED / "weights" / "yolo26n_deq.pt"
    result = accuracy.evaluate(model, yaml, imgsz=320, threads=1)
    assert result["map50_95"] > 0.3
    assert (result["map50_95"], result["map50"]) == pytest.approx(stock(model, yaml, 320, tmp_path), abs=1e-3)


def test_files_of_one_name_are_told_apart(
    run: Any, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [tmp_path / stage / "model.pt" for stage in ("train", "finetune")]
    for path in models:
        path.parent.mkdir()
        path.write_bytes(path.parent.name.encode())
    score = {"runtime": "torch", "images": 4, "map50_95": 0.5, "map50": 0.75}
    monkeypatch.setattr(accuracy, "evaluate", lambda *_, **__: score)
    assert run("--models", *models, "--data", data, "--imgsz", IMGSZ, "--output", tmp_path / "out") == 0
    named = ["train/model.pt", "finetune/model.pt"]
    assert [record["model"] for record in json.loads((tmp_path / "out" / "accuracy.json").read_text())] == named
    shown = capsys.readouterr().out
    assert all(name in shown for name in named)
