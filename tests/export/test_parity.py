from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress.checkpoint import load_model, save_model
from compress.data.pixels import letterbox
from compress.errors import DataError, ExportError
from export import differences, matching, parity
from export.matching import match
from export.onnx import export_onnx

SHARED = Path(__file__).parents[2].parent / "shared"
A, B = [0, 0, 10, 10], [50, 50, 60, 60]


def rows(*detections: list[float]) -> np.ndarray:
    return np.array(detections, dtype=np.float32).reshape(-1, 6)


@pytest.mark.parametrize(
    ("reference", "candidate", "pairs", "lost"),
    [
        pytest.param([[*A, 0.9, 0]], [[*A, 0.9, 0]], [(0, 0)], 0, id="the same detection"),
        pytest.param([[*A, 0.9, 0]], [[*A, 0.9, 1]], [], 2, id="another class is another detection"),
        pytest.param([[*A, 0.9, 0]], [[*B, 0.9, 0]], [], 2, id="another place is another detection"),
        pytest.param([[*A, 0.9, 0]], [], [], 1, id="lost"),
        pytest.param([], [[*A, 0.9, 0]], [], 1, id="invented"),
        pytest.param([[*A, 0.25005, 0]], [[*A, 0.24995, 0]], [(0, 0)], 0, id="moved across the threshold"),
        pytest.param([[*A, 0.24995, 0]], [], [], 0, id="below the threshold nobody misses it"),
        pytest.param(
            [[*A, 0.5, 0], [*B, 0.5, 0]],
            [[*B, 0.5, 0], [*A, 0.5, 0]],
            [(0, 1), (1, 0)],
            0,
            id="equal scores may swap places",
        ),
        pytest.param([[9, 0, 3, 5, 0.9, 0]], [[9, 0, 3, 5, 0.9, 0]], [(0, 0)], 0, id="without area, but the same"),
        pytest.param([[9, 0, 3, 5, 0.9, 0]], [[9, 0, 4, 5, 0.9, 0]], [], 2, id="without area, and elsewhere"),
        pytest.param([[*A, 0.9, 0], [*A, 0.8, 0]], [[*A, 0.9, 0]], [(0, 0)], 1, id="one partner serves one detection"),
    ],
)
def test_match(reference: list, candidate: list, pairs: list, lost: int) -> None:
    found, unmatched = match(rows(*reference), rows(*candidate))
    assert [(i, j) for i, j, _ in found] == pairs
    assert unmatched == lost


def test_match_reports_the_overlap() -> None:
    # 10 × 10 against the same box 5 px further right: 50 shared of 150 px², then moved by 2 px: 80 of 120.
    pairs, _ = match(rows([0, 0, 10, 10, 0.9, 0]), rows([5, 0, 15, 10, 0.9, 0], [2, 0, 12, 10, 0.9, 0]))
    assert pairs == [(0, 1, pytest.approx(80 / 120))]


def test_an_export_equals_its_model(detector: Path, onnx_file: Path, images: list[Path]) -> None:
    record = parity.compare(detector, onnx_file, images, 64)
    assert record["passed"]
    assert record["images"] == 3
    assert record["outputs"][0]["shape"] == [1, 7, 84]  # 4 + 3 classes; 64 + 16 + 4 anchors
    assert record["detections"]["torch"] == record["detections"]["onnxruntime"] > 0
    assert record["detections"]["min_iou"] > 0.99


def test_the_summary_names_errors_and_counts(detector: Path, onnx_file: Path, images: list[Path]) -> None:
    record = parity.compare(detector, onnx_file, images, 64)
    line = parity.summary(record)
    assert line.startswith("3 images: boxes within ")
    count = record["detections"]["torch"]
    assert line.endswith(f"{count} detections in PyTorch, {count} in onnxruntime, 0 unmatched")


@pytest.mark.parametrize(
    ("prefix", "measure"),
    [("model.22.cv2.0.2.bias", "max_box_error_px"), ("model.22.cv3.0.2.bias", "max_score_error")],
    ids=["a box bias", "a class bias"],
)
def test_a_changed_weight_fails(
    detector: Path, onnx_file: Path, images: list[Path], tmp_path: Path, prefix: str, measure: str
) -> None:
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(onnx_file)
    bias = next(weight for weight in graph.graph.initializer if weight.name == prefix)
    values = numpy_helper.to_array(bias).copy()
    values[0] += 0.1
    bias.CopyFrom(numpy_helper.from_array(values, bias.name))
    onnx.save(graph, tmp_path / "changed.onnx")

    record = parity.compare(detector, tmp_path / "changed.onnx", images, 64)
    assert not record["passed"]
    assert record["outputs"][0][measure] > 1e-3


@pytest.mark.parametrize(
    ("other", "iou"),
    [
        pytest.param([0, 0, 20, 10, 0.9, 0, 0.0], 1.0, id="the same"),
        pytest.param([10, 0, 20, 10, 0.9, 0, 0.0], 100 / 300, id="half beside it"),
        pytest.param([0, 0, 20, 10, 0.9, 0, np.pi / 2], 100 / 300, id="across: they share 10 × 10"),
        pytest.param([0, 0, 10, 20, 0.9, 0, np.pi / 2], 1.0, id="another description of the same"),
        pytest.param([0, 0, 20 / 2**0.5, 20 / 2**0.5, 0.9, 0, np.pi / 4], 150 / 250, id="a square on its corner"),
        pytest.param([90, 0, 20, 10, 0.9, 0, 0.0], 0.0, id="elsewhere"),
    ],
)
def test_overlaps_of_oriented_boxes_by_hand(other: list[float], iou: float) -> None:
    first = np.array([[0, 0, 20, 10, 0.9, 0, 0.0]])
    pairs, _ = match(first, np.array([other]), rotated=True)
    assert matching._rotated_overlap(first[0], np.array(other)) == pytest.approx(iou, abs=1e-9)
    assert bool(pairs) == (iou >= 0.5)


def test_nearly_equal_oriented_boxes_overlap_nearly_all() -> None:
    generator = np.random.default_rng(0)
    for _ in range(500):
        box = np.array([*generator.uniform(0, 640, 2), *generator.uniform(5, 200, 2), 0.9, 0, generator.uniform(-1, 2)])
        moved = box * (1 + generator.normal(0, 10 ** generator.uniform(-9, -5), 7))
        assert matching._rotated_overlap(box, moved) > 0.99


@pytest.mark.parametrize(
    ("task", "part", "kind"),
    [
        ("segment", "cv4", "mask coefficients"),
        ("segment", "proto", "mask prototypes"),
        ("pose", "cv4", "key points"),
        ("obb", "cv4", "angles"),
    ],
)
def test_every_kind_of_value_is_judged(
    task: str, part: str, kind: str, models: dict[str, Path], images: list[Path], tmp_path: Path
) -> None:
    changed: Any = load_model(models[task])
    head = changed.model[-1]
    last = head.proto.cv3.conv if part == "proto" else head.cv4[0][-1]
    last.weight.data *= 1.1
    save_model(changed, tmp_path / "changed.pt", {})
    onnx_file = export_onnx(tmp_path / "changed.pt", tmp_path / "changed.onnx", imgsz=64)
    found = parity.compare(models[task], onnx_file, images, 64)
    assert not found["passed"]
    assert any(words.startswith(f"one of the {kind} moves by") for words in parity.failures(found))
    errors = {output["name"]: output["max_value_error"] for output in found["outputs"] if "name" in output}
    assert errors[kind] == max(errors.values()) > 0.01


def test_a_class_is_another_one_only_where_it_was_clear() -> None:
    compared = differences.Classes(parity.SLACK)
    compared.add([np.array([[0.6, 0.3, 0.1]])], [np.array([[0.3, 0.6, 0.1]])])
    compared.add([np.array([[0.45, 0.4, 0.15]])], [np.array([[0.4, 0.45, 0.15]])])
    compared.add([np.array([[0.6, 0.3, 0.1]])], [np.array([[0.5, 0.4, 0.1]])])
    assert compared.record("ncnn")["classes"] == {"images": 3, "other_class": 1}


def test_a_classifier_is_judged_by_scores_classes_and_accuracy() -> None:
    content: dict[str, Any] = {
        "runtime": "ncnn",
        "images": 10,
        "tolerance": asdict(parity.TOLERANCES["fp16"]),
        "outputs": [{"shape": [1, 3], "max_score_error": 0.5, "score_rms_error": 0.01}],
        "classes": {"images": 10, "other_class": 0},
        "top1": {"torch": 0.9, "ncnn": 0.899, "difference": -0.001},
    }
    assert parity.failures(content) == []
    assert parity.summary(content) == (
        "10 images: scores within 0.5, 0 images of another class, top-1 0.8990 (-0.0010)"
    )
    content["classes"]["other_class"] = 1
    content["top1"]["difference"] = -0.01
    assert parity.failures(content) == [
        "10.0% of the images get another class, at most 2.0%",
        "top-1 changes by -0.0100, at most -0.003 to +0.003",
    ]


def record(precision: str = "fp32", runtime: str = "onnxruntime", **changes: Any) -> dict[str, Any]:
    """A parity record without any error, but for `changes`."""
    output = dict.fromkeys(("max_box_error_px", "max_score_error", "box_rms_error_px", "score_rms_error"), 0.0)
    detections = {"torch": 100, runtime: 100, "unmatched": 0, "mean_iou": 1.0}
    content = {
        "runtime": runtime,
        "tolerance": asdict(parity.tolerance_of(runtime, precision)),
        "outputs": [{name: changes.get(name, value) for name, value in output.items()}],
        "detections": {name: changes.get(name, value) for name, value in detections.items()},
        "map50_95": changes.get("map50_95"),
    }
    assert set(changes) <= {*output, *detections, "map50_95"}
    return content


@pytest.mark.parametrize(
    ("precision", "changes", "words"),
    [
        ("fp32", {}, []),
        ("fp32", {"max_box_error_px": 0.06}, ["a box moves by 0.06 px, at most 0.05"]),
        ("fp16", {"max_box_error_px": 9.0, "max_score_error": 0.08}, []),
        ("fp32", {"max_score_error": 2e-4}, ["a score moves by 0.0002, at most 0.0001"]),
        ("fp16", {"box_rms_error_px": 0.4}, ["boxes move by 0.4 px (root mean square), at most 0.3"]),
        ("fp16", {"score_rms_error": 0.03}, ["scores move by 0.03 of their size (root mean squares), at most 0.02"]),
        ("fp32", {"unmatched": 1}, []),
        ("fp32", {"unmatched": 2}, ["1.0% of the detections are unmatched, at most 0.5%"]),
        ("fp16", {"unmatched": 4}, []),
        ("fp16", {"unmatched": 5}, ["2.5% of the detections are unmatched, at most 2.0%"]),
        ("fp16", {"mean_iou": 0.98}, ["matched boxes overlap by 0.9800, at least 0.99"]),
        ("fp16", {"mean_iou": None, "torch": 0, "onnxruntime": 0}, []),
        ("fp32", {"map50_95": {"difference": 0.0011}}, ["mAP50-95 changes by +0.0011, at most -0.001 to +0.001"]),
        ("fp16", {"map50_95": {"difference": -0.0029}}, []),
        ("int8", {"map50_95": {"difference": 0.05}}, []),
        ("int8", {"map50_95": {"difference": -0.011}}, ["mAP50-95 changes by -0.0110, at most -0.01 to +1"]),
        ("fp32", {"max_box_error_px": 1.0, "unmatched": 2}, ["a box moves by", "1.0% of the detections"]),
    ],
)
def test_failures_name_what_is_outside_its_tolerance(precision: str, changes: dict[str, Any], words: list[str]) -> None:
    found = parity.failures(record(precision, **changes))
    assert len(found) == len(words)
    assert all(failure.startswith(word) for failure, word in zip(found, words, strict=True))


def test_ncnn_in_fp32_is_judged_as_a_whole_and_by_its_worst_number() -> None:
    assert parity.failures(record(runtime="ncnn", max_box_error_px=0.06, max_score_error=2e-4)) == []
    assert len(parity.failures(record(runtime="ncnn", max_box_error_px=0.3, score_rms_error=2e-4))) == 2


def test_map_is_compared_where_data_is_given(
    detector: Path, onnx_file: Path, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmark import accuracy

    scores = {detector: 0.4, onnx_file: 0.398}
    monkeypatch.setattr(accuracy, "evaluate", lambda path, data, imgsz: {"map50_95": scores[path]})
    found = parity.compare(detector, onnx_file, images, 64, data=Path("data.yaml"))
    assert found["map50_95"] == {"torch": 0.4, "onnxruntime": 0.398, "difference": pytest.approx(-0.002)}
    assert not found["passed"]
    assert parity.summary(found).endswith("0 unmatched, mAP50-95 0.3980 (-0.0020)")
    scores[onnx_file] = 0.3995
    assert parity.compare(detector, onnx_file, images, 64, data=Path("data.yaml"))["passed"]


def test_root_mean_squares_by_hand() -> None:
    tensors = differences._Tensors()
    tensors.boxes.add(np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 7.0]))
    tensors.boxes.add(np.array([0.0]), np.array([0.0]))
    tensors.scores.add(np.array([0.6, 0.8]), np.array([0.6, 0.5]))
    assert tensors.record((1, 2)) == {
        "shape": [1, 2],
        "max_box_error_px": 4.0,
        "max_score_error": pytest.approx(0.3),
        "box_rms_error_px": pytest.approx(2.0),  # √(16 / 4)
        "score_rms_error": pytest.approx(0.3),  # √(0.09 / 1)
    }


def test_an_end2end_head_that_detects_nothing_is_still_compared(
    end2end: Path, images: list[Path], tmp_path: Path
) -> None:
    for name, bias in (("a", -3.0), ("b", -2.9)):
        model: Any = load_model(end2end)
        for layers in model.model[-1].one2one_cv3:
            layers[-1].weight.data.zero_()
            layers[-1].bias.data.fill_(bias)
        save_model(model, tmp_path / f"{name}.pt", {})
    onnx_file = export_onnx(tmp_path / "b.pt", tmp_path / "b.onnx", imgsz=64)
    record = parity.compare(tmp_path / "a.pt", onnx_file, images, 64)
    assert record["detections"]["torch"] == record["detections"]["onnxruntime"] == 0
    moved = 1 / (1 + np.exp(2.9)) - 1 / (1 + np.exp(3.0))
    assert record["outputs"][0]["max_score_error"] == pytest.approx(moved, rel=0.02)
    # Which rows belong together is not known, so no box was compared, and none is said to be right.
    assert "max_box_error_px" not in record["outputs"][0]
    assert "boxes" not in parity.summary(record)
    assert not record["passed"]


def test_values_that_are_not_finite_fail(detector: Path, onnx_file: Path, images: list[Path], tmp_path: Path) -> None:
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(onnx_file)
    weight = graph.graph.initializer[0]
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(np.nan), weight.name))
    onnx.save(graph, tmp_path / "nan.onnx")
    with pytest.raises(ExportError, match=r"nan\.onnx returns .* not finite, PyTorch not: use a wider precision"):
        parity.compare(detector, tmp_path / "nan.onnx", images, 64)
    for artefact in (onnx_file, tmp_path / "nan.onnx"):
        with pytest.raises(ExportError, match="PyTorch returns values that are not finite: check the weights"):
            parity.compare(tmp_path / "nan.onnx", artefact, images, 64)


def test_what_cannot_run_is_named(detector: Path, onnx_file: Path, images: list[Path]) -> None:
    with pytest.raises(ExportError, match=r"tiny\.onnx: onnxruntime cannot run the graph: .*[Gg]ot invalid dimensions"):
        parity.compare(detector, onnx_file, images, 96)


def test_another_shape_fails(detector: Path, end2end: Path, images: list[Path], tmp_path: Path) -> None:
    onnx_file = export_onnx(end2end, tmp_path / "end2end.onnx", imgsz=64)
    with pytest.raises(ExportError, match=r"returns \[\[1, 84, 6\]\], PyTorch returns \[\[1, 7, 84\]\]"):
        parity.compare(detector, onnx_file, images, 64)


def test_images_are_required(detector: Path, onnx_file: Path) -> None:
    with pytest.raises(DataError, match="needs at least one image"):
        parity.compare(detector, onnx_file, [], 64)


def test_a_file_that_is_no_image_is_named(detector: Path, onnx_file: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("not an image")
    with pytest.raises(DataError, match=r"notes\.png is not an image that can be read"):
        parity.compare(detector, onnx_file, [tmp_path / "notes.png"], 64)


def test_letterbox_pads_with_grey_and_turns_bgr_into_rgb(tmp_path: Path) -> None:
    import cv2

    blue = np.zeros((32, 64, 3), np.uint8)
    blue[..., 0] = 255
    cv2.imwrite(str(tmp_path / "blue.png"), blue)
    square = letterbox(tmp_path / "blue.png", 64)
    assert square.shape == (1, 3, 64, 64)
    assert square.dtype == np.float32
    assert square[0, :, 32, 32].tolist() == [0.0, 0.0, 1.0]
    assert square[0, :, 0, 0] == pytest.approx([114 / 255] * 3)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared weights and images beside the repository")
@pytest.mark.parametrize("name", ["yolov8n_deq", "yolo11n_deq", "yolo26n_deq", "yolov5nu_deq"])
def test_real_detectors(name: str, tmp_path: Path) -> None:
    photos = sorted((SHARED / "data/coco128/images/val2017").glob("*.jpg"))[:3]
    model = SHARED / "weights" / f"{name}.pt"
    record = parity.compare(model, export_onnx(model, tmp_path / "real.onnx", imgsz=320), photos, 320)
    assert record["passed"]
    assert record["detections"]["torch"] >= 3
