from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import ncnn
import numpy as np
import pytest
import torch

from benchmark.runners import ncnn_runner, torch_runner
from export.ncnn import export_ncnn

ROOT = Path(__file__).parents[2]


def head(nc: int, reg_max: int, end2end: bool) -> Any:
    from ultralytics.nn.modules.head import Detect

    detect = Detect(nc=nc, reg_max=reg_max, end2end=end2end, ch=(16, 16, 16)).eval()
    detect.stride = torch.tensor([8.0, 16.0, 32.0])
    detect.end2end = end2end
    return detect


def maps(nc: int, reg_max: int, scale: float = 3.0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Maps of a head for a 96 × 64 (height × width) image."""
    generator = np.random.default_rng(0)
    return [
        tuple(  # type: ignore[misc]
            generator.normal(scale=scale, size=(channels, 96 // s, 64 // s)).astype(np.float32)
            for channels in (4 * reg_max, nc)
        )
        for s in (8, 16, 32)
    ]


@pytest.mark.parametrize(("reg_max", "end2end"), [(16, False), (1, False), (1, True), (16, True)])
def test_decoding_is_that_of_ultralytics(reg_max: int, end2end: bool) -> None:
    detect, levels = head(5, reg_max, end2end), maps(5, reg_max)
    flat = [
        torch.from_numpy(np.concatenate([level[i].reshape(level[i].shape[0], -1) for level in levels], 1))
        for i in (0, 1)
    ]
    feats = [torch.zeros(1, 1, *level[0].shape[1:]) for level in levels]
    raw = {"boxes": flat[0][None], "scores": flat[1][None], "feats": feats}
    with torch.no_grad():
        expected = detect._inference(raw)
        rows = detect.postprocess(expected.permute(0, 2, 1))[0].numpy() if end2end else None
    decoded = ncnn_runner.decode(levels, *ncnn_runner.make_anchors((96, 64), (8, 16, 32)), xyxy=end2end)
    assert decoded.dtype == np.float32
    np.testing.assert_allclose(decoded, expected[0].numpy(), rtol=1e-5, atol=1e-4)
    if rows is not None:
        found = ncnn_runner.top_detections(decoded, 300)
        assert found.shape == rows.shape == (126, 6)  # 12·8 + 6·4 + 3·2 anchors, fewer than 300
        np.testing.assert_allclose(found, rows, rtol=1e-5, atol=1e-4)


def test_decoding_by_hand() -> None:
    # One cell of stride 32. Left: all mass on bin 1; top: on bin 0; right: half on bin 2, half on 3; bottom: even over
    # all four bins. So the distances are 1, 0, 2.5 and 1.5 strides from the anchor at (16, 16) px.
    no, yes = -100.0, 100.0
    boxes = np.array([no, yes, no, no, yes, no, no, no, no, no, yes, yes, 7, 7, 7, 7], np.float32).reshape(16, 1, 1)
    classes = np.array([0.0, np.log(3), -1000.0], np.float32).reshape(3, 1, 1)
    anchors, strides = ncnn_runner.make_anchors((32, 32), (32,))
    corners = ncnn_runner.decode([(boxes, classes)], anchors, strides, xyxy=True)
    assert corners[:, 0].tolist() == pytest.approx([-16, 16, 96, 64, 0.5, 0.75, 0])
    centre = ncnn_runner.decode([(boxes, classes)], anchors, strides, xyxy=False)
    assert centre[:4, 0].tolist() == pytest.approx([40, 40, 112, 48])


def test_oriented_boxes_are_turned_around_their_anchor() -> None:
    boxes, classes = np.array([1.0, 1, 3, 1]).reshape(4, 1, 1), np.zeros((1, 1, 1))  # left, top, right, bottom
    anchors, strides = ncnn_runner.make_anchors((32, 32), (32,))
    decoded = ncnn_runner.decode([(boxes, classes)], anchors, strides, False, angles=np.array([np.pi / 2]))
    # Unturned its centre lies one stride right of the anchor, at a quarter turn one stride below.
    np.testing.assert_allclose(decoded[:, 0], [16, 48, 128, 64, 0.5], atol=1e-4)


@pytest.mark.parametrize(("halved", "expected"), [(True, [40, 16, 0.5]), (False, [32, 24, 0.5])])
def test_key_points_are_distances_from_the_anchor(halved: bool, expected: list[float]) -> None:
    anchors, strides = ncnn_runner.make_anchors((16, 16), (16,))
    raw = np.array([[1.25], [0.5], [0.0]], np.float32) if halved else np.array([[1.5], [1.0], [0.0]], np.float32)
    found = ncnn_runner.decode_key_points(raw, anchors, strides, 3, halved)
    np.testing.assert_allclose(found[:, 0], expected)
    assert raw[2] == 0.0  # the input is left as it was


def test_rows_keep_what_else_an_anchor_says() -> None:
    decoded = np.array([[1, 2], [1, 2], [5, 6], [5, 6], [0.1, 0.9], [7, 8]], np.float32)
    found = ncnn_runner.top_detections(decoded, 2, classes=1)
    np.testing.assert_allclose(found, [[2, 2, 6, 6, 0.9, 0, 8], [1, 1, 5, 5, 0.1, 0, 7]])


def test_anchors_go_along_rows_level_by_level() -> None:
    anchors, strides = ncnn_runner.make_anchors((32, 64), (16, 32))
    assert anchors.T.tolist() == [
        *([x + 0.5, y + 0.5] for y in range(2) for x in range(4)),
        [0.5, 0.5],
        [1.5, 0.5],
    ]
    assert strides.tolist() == [16] * 8 + [32] * 2


def test_the_best_detections_may_share_an_anchor() -> None:
    decoded = np.zeros((6, 3), np.float32)
    decoded[:4] = [[1, 2, 3], [1, 2, 3], [5, 6, 7], [5, 6, 7]]
    decoded[4:] = [[0.1, 0.9, 0.3], [0.2, 0.8, 0.4]]
    found = ncnn_runner.top_detections(decoded, 2)
    np.testing.assert_allclose(found, [[2, 2, 6, 6, 0.9, 0], [2, 2, 6, 6, 0.8, 1]], rtol=1e-6)


def test_ncnn_returns_the_tensor_that_pytorch_returns(checkpoint: Path, ncnn_folder: Path, image: np.ndarray) -> None:
    expected = torch_runner.infer(torch_runner.load(str(checkpoint), 1), image)
    actual = ncnn_runner.infer(ncnn_runner.load(str(ncnn_folder), 1), image)
    assert [output.shape for output in expected] == [output.shape for output in actual] == [(1, 7, 84)]
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-4, atol=1e-2)


def test_a_batch_is_its_images_one_after_another(ncnn_folder: Path, image: np.ndarray) -> None:
    session = ncnn_runner.load(str(ncnn_folder), 2)
    other = 1 - image
    batch = ncnn_runner.infer(session, np.concatenate([image, other]))[0]
    assert batch.shape == (2, 7, 84)
    for single, row in zip((image, other), batch, strict=True):
        np.testing.assert_array_equal(ncnn_runner.infer(session, single)[0][0], row)


def test_the_image_is_not_changed(ncnn_folder: Path, image: np.ndarray) -> None:
    before = image.copy()
    ncnn_runner.infer(ncnn_runner.load(str(ncnn_folder), 1), image)
    np.testing.assert_array_equal(image, before)


def test_ncnn_describes_itself(ncnn_folder: Path) -> None:
    session = ncnn_runner.load(str(ncnn_folder), 2)
    assert session.net.opt.num_threads == 2
    assert ncnn_runner.describe(session) == {
        "runtime": "ncnn",
        "version": ncnn.__version__,
        "threads": 2,
        "precision": "fp32",
        "precision_executed": "fp32",
        "providers": None,
        "memory_format": None,
        "input_shape": [1, 3, 64, 64],
        "task": "detect",
        "classes": 3,
        "keypoints": None,
        "end2end": False,
    }


@pytest.mark.parametrize("rounds", [True, False])
def test_fp16_is_asked_for_and_what_is_executed_is_said(
    rounds: bool, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = ncnn_runner.load(str(export_ncnn(checkpoint, tmp_path / "half_ncnn_model", imgsz=64, half=True)), 1)
    assert session.net.opt.use_fp16_storage
    assert session.net.opt.use_fp16_arithmetic
    monkeypatch.setattr(ncnn_runner, "rounds_to_fp16", lambda: rounds)
    facts = ncnn_runner.describe(session)
    assert (facts["precision"], facts["precision_executed"]) == ("fp16", "fp16" if rounds else "fp32")


def test_an_fp32_model_is_never_computed_in_less(ncnn_folder: Path) -> None:
    options = ncnn_runner.load(str(ncnn_folder), 1).net.opt
    assert not any((options.use_fp16_packed, options.use_fp16_storage, options.use_fp16_arithmetic))
    assert not options.use_bf16_storage


def test_the_probe_sees_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    if ncnn_runner.ncnn.cpu_support_arm_asimdhp():
        assert ncnn_runner.rounds_to_fp16()
    # Every CPU can round to bf16, whose values fp16 can hold here: so the probe must say yes to it.

    def bf16(net: Any, threads: int, half: bool) -> None:
        net.opt.num_threads = threads
        net.opt.use_bf16_storage = half

    monkeypatch.setattr(ncnn_runner, "_set_options", bf16)
    assert ncnn_runner.rounds_to_fp16()
    monkeypatch.setattr(ncnn_runner, "_set_options", lambda net, threads, half: bf16(net, threads, False))
    assert not ncnn_runner.rounds_to_fp16()


def test_the_file_alone_runs_on_a_device(ncnn_folder: Path, tmp_path: Path) -> None:
    shutil.copy(ncnn_runner.__file__, tmp_path / "runner.py")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import numpy, runner\n"
        "session = runner.load(sys.argv[2], 1)\n"
        "print(runner.infer(session, numpy.zeros((1, 3, 64, 64), 'f4'))[0].shape)\n"
        "print(sorted({'torch', 'compress', 'benchmark', 'yaml'} & set(sys.modules)))\n"
    )
    command = [sys.executable, "-I", "-c", code, str(tmp_path), str(ncnn_folder)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines() == ["(1, 7, 84)", "[]"]


def test_another_image_size_is_named(ncnn_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"takes images of 64×64 px, got 96×32"):
        ncnn_runner.infer(ncnn_runner.load(str(ncnn_folder), 1), np.zeros((1, 3, 32, 96), np.float32))


def test_a_folder_that_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not a model of export\.ncnn: it has no metadata\.yaml that says"):
        ncnn_runner.load(str(tmp_path), 1)
    (tmp_path / "metadata.yaml").write_text("names: {0: person}\nstride: 32\n")  # what Ultralytics writes
    with pytest.raises(ValueError, match=r"is not a model of export\.ncnn"):
        ncnn_runner.load(str(tmp_path), 1)


@pytest.mark.parametrize("name", ["model.ncnn.bin", "model.ncnn.param"])
def test_a_cut_or_missing_file_is_named(name: str, ncnn_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(ncnn_folder, tmp_path / "cut_ncnn_model")
    size = (folder / name).stat().st_size
    (folder / name).write_bytes((folder / name).read_bytes()[:1000])
    with pytest.raises(ValueError, match=rf"{name} has 1000 bytes, it was written with {size}: copy the folder again"):
        ncnn_runner.load(str(folder), 1)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=rf"{name} has 0 bytes"):
        ncnn_runner.load(str(folder), 1)


def test_a_damaged_graph_is_named(ncnn_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(ncnn_folder, tmp_path / "damaged_ncnn_model")
    text = (folder / "model.ncnn.param").read_text()
    (folder / "model.ncnn.param").write_text("x" + text[1:])
    with pytest.raises(ValueError, match=r"model\.ncnn\.param cannot be opened by ncnn: export the model again"):
        ncnn_runner.load(str(folder), 1)


def test_an_output_that_the_graph_lacks_is_an_error(ncnn_folder: Path, tmp_path: Path, image: np.ndarray) -> None:
    folder = shutil.copytree(ncnn_folder, tmp_path / "other_ncnn_model")
    metadata = json.loads((folder / "metadata.yaml").read_text())
    metadata["outputs"][0] = "out9"
    (folder / "metadata.yaml").write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match=r"ncnn cannot compute out9"):
        ncnn_runner.infer(ncnn_runner.load(str(folder), 1), image)


def test_values_inside_the_network(ncnn_folder: Path, image: np.ndarray) -> None:
    session = ncnn_runner.load(str(ncnn_folder), 1)
    found = dict(ncnn_runner.blobs(session, image[0], ["in0", "out0", "out1"]))
    assert np.array_equal(found["in0"], image[0])
    assert [found[name].shape for name in ("out0", "out1")] == [(64, 8, 8), (3, 8, 8)]
    with pytest.raises(ValueError, match=r"ncnn cannot compute nowhere \(status -1\)"):
        list(ncnn_runner.blobs(session, image[0], ["nowhere"]))


FAULTS = """
import resource, sys
import numpy as np
from benchmark.runners import ncnn_runner

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blobs = [np.full(20 << 20, 1, np.uint8) for _ in range(3)]
    del blobs
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

ncnn_runner.load(sys.argv[1], 1)
print([faults() for _ in range(5)][-1])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="is about the memory of glibc")
def test_memory_that_an_inference_had_is_kept_for_the_next_one(ncnn_folder: Path) -> None:
    """Without `keep_memory` glibc gives these 60 MB back, and getting them again takes about 1000 page faults."""
    command = [sys.executable, "-c", FAULTS, str(ncnn_folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 50
