from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmark.runners import onnxruntime_runner
from compress.data.pixels import letterbox
from compress.errors import ExportError, SettingsError
from compress.settings import Export, parse
from export import onnx as exporter
from export import parity, suppression


def test_oriented_boxes_overlap_as_ultralytics_says() -> None:
    from ultralytics.utils.metrics import batch_probiou

    generator = torch.Generator().manual_seed(0)
    boxes = torch.rand((2, 40, 5), generator=generator) * torch.tensor([30.0, 30.0, 40.0, 20.0, 3.0])
    boxes[..., 2:4] += 4
    found = suppression.probabilistic_iou(boxes)
    for image, overlaps in zip(boxes, found, strict=True):
        torch.testing.assert_close(overlaps, batch_probiou(image, image), atol=2e-4, rtol=0)
    assert 0.05 < float((found > 0.5).float().mean()) < 0.5


class Boxes(torch.nn.Module):
    """Stands for a network: its output is written into the image."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images[:, 0]


def suppress(raw: list[list[float]], classes: int, rotated: bool, tmp_path: Path, **limits: Any) -> np.ndarray:
    """Run a traced suppression in onnxruntime on anchors of (x, y, w, h, scores …) and return its rows."""
    import warnings

    import onnxruntime

    limits = {"conf": 0.25, "iou": 0.5, "max_det": 4, **limits}
    images = torch.tensor(raw).T[None, None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = suppression.Suppressed(Boxes(), classes, rotated, **limits)
        torch.onnx.export(network, (images,), tmp_path / "a.onnx", dynamo=False, opset_version=17)
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"])
    output: Any = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
    return output[0]


def test_the_best_of_overlapping_boxes_of_a_class_stays(tmp_path: Path) -> None:
    raw = [
        [10, 10, 8, 8, 0.6, 0.1],
        [10, 11, 8, 8, 0.9, 0.2],  # the same object, and better
        [10, 10, 8, 8, 0.1, 0.7],  # the same place, another class
        [40, 40, 8, 8, 0.5, 0.3],
        [60, 60, 8, 8, 0.2, 0.1],  # below conf
    ]
    rows = suppress(raw, 2, False, tmp_path)
    np.testing.assert_allclose(
        rows, [[6, 7, 14, 15, 0.9, 0], [6, 6, 14, 14, 0.7, 1], [36, 36, 44, 44, 0.5, 0], [0, 0, 0, 0, 0, 0]], atol=1e-5
    )
    assert suppress(raw, 2, False, tmp_path, max_det=1)[:, 4].tolist() == pytest.approx([0.9])


def test_oriented_boxes_keep_their_angle(tmp_path: Path) -> None:
    raw = [
        [10, 10, 20, 4, 0.6, 0.0],
        [10, 10, 20, 4, 0.9, 0.1],  # nearly the same
        [10, 10, 20, 4, 0.8, 1.57],  # across it: another object
    ]
    rows = suppress(raw, 1, True, tmp_path)
    expected = [[10, 10, 20, 4, 0.9, 0, 0.1], [10, 10, 20, 4, 0.8, 0, 1.57]]
    np.testing.assert_allclose(rows[:2], expected, atol=1e-5)
    assert not rows[2:].any()


@pytest.mark.parametrize("task", ["detect", "segment", "pose", "obb"])
def test_every_task_with_boxes_is_proven_in_two_steps(
    task: str, detector: Path, models: dict[str, Path], images: list[Path], tmp_path: Path
) -> None:
    model = detector if task == "detect" else models[task]
    settings = Export(nms=True, iou=0.3, max_det=40, dynamic="batch")
    record = exporter.export_checked(model, tmp_path / "a.onnx", images[:2], 64, settings)
    found = record["suppression"]["detections"]
    assert 0 < found["onnxruntime"] < 2 * 84
    assert found["unmatched"] == record["suppression"]["other"]["detections"]["unmatched"] == 0
    assert "; with suppression: 2 images: boxes within" in parity.summary(record)
    session = onnxruntime_runner.load(str(tmp_path / "a.onnx"), 1)
    facts = onnxruntime_runner.describe(session)
    assert (facts["end2end"], facts["suppression"]) == (True, {"conf": 0.25, "iou": 0.3, "max_det": 40})
    rows = onnxruntime_runner.infer(session, letterbox(images[0], 64))[0]
    more = {"detect": 0, "segment": 8, "pose": 6, "obb": 1}[task]
    assert rows.shape == (1, 40, 6 + more)
    assert (np.diff(rows[0, :, 4]) <= 0).all()


def test_stock_ultralytics_reads_it(detector: Path, images: list[Path], tmp_path: Path) -> None:
    from ultralytics import YOLO

    path = exporter.export_onnx(detector, tmp_path / "a.onnx", imgsz=64, settings=Export(nms=True))
    arguments: dict[str, Any] = {"imgsz": 64, "rect": False, "verbose": False, "device": "cpu", "iou": 0.7}
    expected: Any = next(iter(YOLO(detector).predict(images[0], **arguments)))
    actual: Any = next(iter(YOLO(path, task="detect").predict(images[0], **arguments)))
    assert len(actual.boxes) == len(expected.boxes) > 0
    torch.testing.assert_close(actual.boxes.data, expected.boxes.data, atol=0.05, rtol=0)


def test_another_suppression_than_ultralytics_is_rejected(
    detector: Path, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = suppression.Suppressed

    def greedy(network: Any, classes: int, rotated: bool, conf: float, iou: float, max_det: int) -> Any:
        return honest(network, classes, rotated, conf, iou / 4, max_det)

    monkeypatch.setattr(suppression, "Suppressed", greedy)
    with pytest.raises(ExportError, match=r"a\.onnx does not equal PyTorch .* detections are unmatched"):
        exporter.export_checked(detector, tmp_path / "a.onnx", images, 64, Export(nms=True, iou=0.4))
    assert [path.name for path in tmp_path.iterdir()] == ["a.rejected.onnx"]


def test_what_has_nothing_to_suppress_is_refused(end2end: Path, models: dict[str, Path], tmp_path: Path) -> None:
    for model, reason in ((end2end, "has an end-to-end head"), (models["classify"], "finds no boxes")):
        with pytest.raises(ExportError, match=rf"{model.name} {reason}.*: export it without --nms"):
            exporter.export_onnx(model, tmp_path / "a.onnx", imgsz=64, settings=Export(nms=True))


def test_map_needs_all_boxes() -> None:
    with pytest.raises(SettingsError, match="parity_map needs the boxes that nms removes"):
        parse(Export, {"nms": True, "parity_map": True}, "export")
