"""The accuracy of every task, on labels that are the model's own answers, some of them changed."""

from __future__ import annotations

import importlib.metadata
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmark import accuracy
from benchmark.runners import torch_runner
from compress.checkpoint import build_model, save_model
from compress.data.pixels import centre_crop, letterbox
from compress.errors import BenchmarkError, DataError
from compress.settings import Export
from export.onnx import export_onnx

IMGSZ = 64
NAMES = "names: {0: circle, 1: square, 2: star}\n"
METRICS = {"segment": "seg", "pose": "pose", "obb": "box"}


@pytest.fixture(scope="module")
def models(architectures: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Untrained models whose batch statistics keep their activations alive, so that they find something."""
    folder, found = tmp_path_factory.mktemp("models"), {}
    for task in ("segment", "pose", "obb", "classify"):
        torch.manual_seed(0)
        model: Any = build_model(architectures[task])
        noise = torch.rand(8, 3, 8, 8).repeat_interleave(8, 2).repeat_interleave(8, 3)
        torch.optim.swa_utils.update_bn([noise], model)
        head = model.model[-1]
        for boxes, classes in zip(getattr(head, "cv2", []), getattr(head, "cv3", []), strict=True):
            torch.nn.init.normal_(boxes[-1].weight, std=0.02)
            boxes[-1].bias.data = -torch.arange(16.0).repeat(4)  # sides about half a stride away from their anchor
            torch.nn.init.normal_(classes[-1].weight, std=0.05)
            torch.nn.init.zeros_(classes[-1].bias)
        if task == "classify":
            torch.nn.init.normal_(head.linear.weight, std=0.1)
        found[task] = folder / f"{task}.pt"
        save_model(model.eval(), found[task], {})
    return found


def pictures(folder: Path, count: int = 4) -> list[Path]:
    import cv2

    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    paths = [folder / f"{number}.png" for number in range(count)]
    for path in paths:
        cells = generator.integers(0, 256, (8, 8, 3), np.uint8)
        cv2.imwrite(str(path), np.kron(cells, np.ones((IMGSZ // 8, IMGSZ // 8, 1), np.uint8)))
    return paths


def answers(model: Path, path: Path, task: str) -> list[str]:
    """Return labels from a model's best detections, every other one narrowed."""
    from ultralytics.utils.nms import non_max_suppression
    from ultralytics.utils.ops import xywhr2xyxyxyxy

    output = torch_runner.infer(torch_runner.load(str(model), 1), letterbox(path, IMGSZ))[0]
    tensor = torch.from_numpy(output.copy())
    rows: Any = non_max_suppression(tensor, 0.001, 0.5, nc=3, multi_label=True, rotated=task == "obb")[0]
    lines = []
    for i, row in enumerate(rows[:8]):
        narrow = 1 - 0.23 * (i % 2)
        if task == "obb":
            box = torch.cat([row[:2], row[2:3] * narrow, row[3:4], row[-1:]])
            values = xywhr2xyxyxyxy(box).flatten() / IMGSZ
        else:
            x1, y1, x2, y2 = row[:4].clamp(0, IMGSZ).tolist()
            x2 = x1 + (x2 - x1) * narrow
            values = torch.tensor([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1]) / IMGSZ
            if task == "segment":
                values = torch.tensor([x1, y1, x2, y1, x2, y2, x1, y2]) / IMGSZ
            elif task == "pose":
                points = row[6:].reshape(2, 3).clone()
                points[:, :2] = (points[:, :2] / IMGSZ + 0.02 * (i % 2)).clamp(0, 1)
                points[:, 2] = 1
                values = torch.cat([values, points.flatten()])
        lines.append(f"{int(row[5])} " + " ".join(f"{min(max(float(v), 0.0), 1.0):.6f}" for v in values))
    return lines


@pytest.fixture(scope="module")
def sets(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, found = tmp_path_factory.mktemp("sets"), {}
    for task in ("segment", "pose", "obb"):
        place = folder / task
        (place / "labels" / "val").mkdir(parents=True)
        for path in pictures(place / "images" / "val"):
            (place / "labels" / "val" / f"{path.stem}.txt").write_text("\n".join(answers(models[task], path, task)))
        points = "kpt_shape: [2, 3]\n" if task == "pose" else ""
        found[task] = place / "data.yaml"
        found[task].write_text(f"train: images/val\nval: images/val\n{points}{NAMES}")
    session = torch_runner.load(str(models["classify"]), 1)
    place = folder / "classify"
    for name in ("a", "b", "c"):
        for split in ("train", "val"):
            (place / split / name).mkdir(parents=True)
    for number, path in enumerate(pictures(folder / "loose", 6)):
        best = int(torch_runner.infer(session, centre_crop(path, IMGSZ))[0].argmax())
        shutil.copy(path, place / "val" / "abc"[best if number % 3 else (best + 1) % 3])  # two of six are wrong
        shutil.copy(path, place / "train" / "abc"[number % 3])
    found["classify"] = place
    return found


@pytest.mark.parametrize("task", ["segment", "pose", "obb"])
def test_every_task_agrees_with_stock_validation(
    task: str, models: dict[str, Path], sets: dict[str, Path], tmp_path: Path
) -> None:
    from ultralytics import YOLO

    copy = shutil.copytree(sets[task].parent, tmp_path / "data") / "data.yaml"  # stock writes a label cache beside it
    arguments: dict[str, Any] = {"plots": False, "verbose": False, "device": "cpu", "project": str(tmp_path)}
    stock: Any = YOLO(models[task]).val(data=str(copy), imgsz=IMGSZ, rect=False, batch=1, workers=0, **arguments)
    expected = getattr(stock, METRICS[task])
    found = accuracy.evaluate(models[task], sets[task], imgsz=IMGSZ, threads=1)
    assert (found["map50_95"], found["map50"]) == pytest.approx((expected.map, expected.map50), abs=1e-3)
    assert (found["task"], found["images"]) == (task, 4)
    assert ("box_map50_95" in found) == (task != "obb")
    if task != "segment":  # an untrained model's masks are noise
        assert found["map50"] > 0.05
    assert not list(sets[task].parent.rglob("*.cache"))


def test_a_classifier_is_right_in_four_of_six(models: dict[str, Path], sets: dict[str, Path], tmp_path: Path) -> None:
    artefact = export_onnx(models["classify"], tmp_path / "a.onnx", imgsz=IMGSZ, settings=Export(batch=2))
    for path, runtime in ((models["classify"], "torch"), (artefact, "onnxruntime")):
        found = accuracy.evaluate(path, sets["classify"], imgsz=IMGSZ, threads=1)
        about = {"task": "classify", "images": 6, "runtime": runtime, "precision": "fp32"}
        version = found.pop("runtime_version")
        assert found == {**about, "top1": pytest.approx(4 / 6), "top5": 1.0}
        assert version.startswith(importlib.metadata.version(runtime))  # torch adds what it was built for
    assert not list(sets["classify"].rglob("*.cache"))


def test_an_open_size_takes_any_image(models: dict[str, Path], sets: dict[str, Path], tmp_path: Path) -> None:
    artefact = export_onnx(models["obb"], tmp_path / "a.onnx", imgsz=128, settings=Export(dynamic="both"))
    expected = accuracy.evaluate(models["obb"], sets["obb"], imgsz=IMGSZ, threads=1)
    found = accuracy.evaluate(artefact, sets["obb"], imgsz=IMGSZ, threads=1)
    assert found["map50_95"] == pytest.approx(expected["map50_95"], abs=1e-3)


def test_data_of_another_task_is_named(models: dict[str, Path], sets: dict[str, Path]) -> None:
    with pytest.raises(BenchmarkError, match=r"pose\.pt has key points \[2, 3\], .* has None"):
        accuracy.evaluate(models["pose"], sets["obb"], imgsz=IMGSZ)
    with pytest.raises(
        BenchmarkError, match=r"classify\.pt is of the task 'classify', .* give the data set as a folder"
    ):
        accuracy.evaluate(models["classify"], sets["obb"], imgsz=IMGSZ)
    with pytest.raises(BenchmarkError, match=r"obb\.pt is of the task 'obb', .* give the data set as a \.yaml"):
        accuracy.evaluate(models["obb"], sets["classify"], imgsz=IMGSZ)


def test_masks_need_polygons(models: dict[str, Path], sets: dict[str, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(sets["segment"].parent, tmp_path / "data")
    for path in copy.rglob("*.txt"):
        path.write_text("0 0.5 0.5 0.2 0.2\n")
    with pytest.raises(
        DataError, match=r"data\.yaml, split val: Segment dataset requires equal numbers of boxes and segments"
    ):
        accuracy.evaluate(models["segment"], copy / "data.yaml", imgsz=IMGSZ)
