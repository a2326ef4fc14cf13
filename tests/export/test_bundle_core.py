"""The C++ core of the deploy bundle: what it computes beside Python, without ncnn."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmark.runners import ncnn_runner
from export import deploy

CPP = deploy.TEMPLATES / "cpp"
DRIVER = Path(__file__).with_name("bundle") / "core.cpp"
EXIF = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0"  # a directory of one entry: orientation 6
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@pytest.fixture(scope="module")
def core(compile_cpp: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., bytes]:
    """Call the core of the bundle: words and stdin in, stdout out. Any wrong access to memory is an error."""
    program = tmp_path_factory.mktemp("core") / "core"
    sources = [CPP / f"{name}.cpp" for name in ("head", "image", "image_file", "letterbox", "model_files", "report")]
    own = ["-D_GLIBCXX_ASSERTIONS", "-DNCNN_SIMPLEOCV=1", "-I", DRIVER.with_name("stubs"), "-I", CPP]
    compile_cpp(*SANITIZE, "-ffp-contract=off", *own, DRIVER, *sources, "-o", program)

    def call(*words: object, stdin: bytes = b"") -> bytes:
        done = subprocess.run([program, *map(str, words)], input=stdin, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout

    return call


@pytest.mark.parametrize(
    ("width", "height", "input_width", "input_height"),
    [
        pytest.param(90, 60, 64, 64, id="smaller"),
        pytest.param(60, 91, 64, 64, id="odd padding"),
        pytest.param(20, 31, 96, 96, id="larger"),
        pytest.param(128, 128, 64, 64, id="half: OpenCV takes another way there"),
        pytest.param(64, 64, 64, 64, id="as it is"),
        pytest.param(1, 300, 64, 64, id="thin: one pixel stays"),
        pytest.param(1, 1, 32, 32, id="a single pixel"),
        pytest.param(101, 37, 96, 64, id="wide input"),
    ],
)
@pytest.mark.parametrize("pixel_bytes", [3, 4])
def test_letterbox_equals_ultralytics_in_every_bit(
    core: Callable[..., bytes], width: int, height: int, input_width: int, input_height: int, pixel_bytes: int
) -> None:
    from ultralytics.data.augment import LetterBox

    image = np.random.default_rng(0).integers(0, 256, (height, width, pixel_bytes), np.uint8)
    square: Any = LetterBox((input_height, input_width), auto=False)(image=np.ascontiguousarray(image[..., :3]))
    expected = square.transpose(2, 0, 1).astype(np.float32) / 255
    found = core("letterbox", width, height, pixel_bytes, input_width, input_height, stdin=image.tobytes())
    np.testing.assert_array_equal(np.frombuffer(found, np.float32).reshape(expected.shape), expected)


def random_head(classes: int, reg_max: int, imgsz: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return maps of a head of three levels whose boxes overlap, with a few hundred scores above 0.25."""
    generator = np.random.default_rng(0)
    sides = [imgsz // stride for stride in (8, 16, 32)]
    spread = 1.0 if reg_max == 1 else 2.0
    return [
        (
            generator.normal(2.0 if reg_max == 1 else 0.0, spread, (4 * reg_max, side, side)).astype(np.float32),
            generator.normal(-3.0, 1.5, (classes, side, side)).astype(np.float32),
        )
        for side in sides
    ]


def in_python(
    levels: list[tuple[np.ndarray, np.ndarray]], imgsz: int, shape: tuple[int, int], end2end: bool, most: int
) -> np.ndarray:
    """Return (n, 6) detections of the runner, suppressed and moved to an image (height, width) by Ultralytics."""
    from ultralytics.utils.nms import non_max_suppression
    from ultralytics.utils.ops import scale_boxes

    anchors, strides = ncnn_runner.make_anchors((imgsz, imgsz), (8, 16, 32))
    output = ncnn_runner.decode(levels, anchors, strides, xyxy=end2end)
    output = ncnn_runner.top_detections(output, most) if end2end else output
    kept: Any = non_max_suppression(torch.from_numpy(output[None]), 0.25, 0.7, max_det=most, end2end=end2end)
    kept[0][:, :4] = scale_boxes((imgsz, imgsz), kept[0][:, :4], shape)
    return kept[0].numpy()


@pytest.mark.parametrize("reg_max", [16, 1])
@pytest.mark.parametrize("end2end", [False, True])
@pytest.mark.parametrize(
    ("most", "imgsz"),
    [(300, 160), pytest.param(40, 160, id="more than are wanted"), pytest.param(300, 96, id="fewer anchors than that")],
)
def test_the_head_is_decoded_as_in_python(
    core: Callable[..., bytes], reg_max: int, end2end: bool, most: int, imgsz: int
) -> None:
    levels = random_head(5, reg_max, imgsz)
    expected = in_python(levels, imgsz, (480, 641), end2end, most)
    stdin = b"".join(values.tobytes() for level in levels for values in level)
    words = (5, reg_max, int(end2end), 0.25, 0.7, most, 641, 480, imgsz, 8, 16, 32)
    found = np.frombuffer(core("decode", *words, stdin=stdin), np.float32).reshape(-1, 6)
    assert len(expected) > 30  # something was decoded …
    assert len(found) == len(expected)
    np.testing.assert_allclose(found[:, 4], expected[:, 4], atol=1e-6)
    np.testing.assert_array_equal(found[:, 5], expected[:, 5])
    np.testing.assert_allclose(found[:, :4], expected[:, :4], atol=2e-3)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("kind", [0, 1], ids=["boxes", "scores"])
def test_maps_that_are_not_finite_are_no_empty_image(core: Callable[..., bytes], kind: int, value: float) -> None:
    levels = random_head(5, 16, 96)
    levels[2][kind][:, 1, 1] = value
    stdin = b"".join(values.tobytes() for level in levels for values in level)
    assert core("decode", 5, 16, 0, 0.25, 0.7, 300, 96, 96, 96, 8, 16, 32, stdin=stdin) == b"not finite"


def test_suppression_removes_of_a_class_alone(core: Callable[..., bytes]) -> None:
    """Four anchors of one level; sides in strides of 8 px; the first two boxes are 0,0–12,12 and 0,0–12,13."""
    x, y = np.array([0.5, 1.5, 0.5, 1.5]), np.array([0.5, 0.5, 1.5, 1.5])
    boxes = np.array([[0, 0, 12, 12], [0, 0, 12, 13], [0, 0, 12, 12], [4, 4, 16, 16]]) / 8
    distances = np.stack([x - boxes[:, 0], y - boxes[:, 1], boxes[:, 2] - x, boxes[:, 3] - y])
    logits = np.array([[2.0, 1.0, -9.0, -2.0], [-9.0, -9.0, 0.0, -9.0]])  # the last is below 0.25
    stdin = np.concatenate([distances, logits]).astype(np.float32).tobytes()
    found = core("decode", 2, 1, 0, 0.25, 0.7, 300, 16, 16, 16, 8, stdin=stdin)
    rows = np.frombuffer(found, np.float32).reshape(-1, 6)
    np.testing.assert_allclose(rows, [[0, 0, 12, 12, 0.880797, 0], [0, 0, 12, 12, 0.5, 1]], atol=1e-5)


@pytest.mark.parametrize("orientation", range(10))
def test_orientations_of_exif(core: Callable[..., bytes], orientation: int) -> None:
    from PIL import Image, ImageOps

    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 3), np.uint8)
    image = Image.fromarray(pixels)
    image.getexif()[0x0112] = orientation
    expected = np.asarray(ImageOps.exif_transpose(image))
    assert core("upright", 3, 2, orientation, stdin=pixels.tobytes()) == expected.tobytes()


def segment(marker: int, content: bytes) -> bytes:
    return bytes((0xFF, marker)) + (len(content) + 2).to_bytes(2, "big") + content


@pytest.mark.parametrize(
    ("content", "size"),
    [
        pytest.param(segment(0xE1, EXIF) + b"\xff\xd9", "2 3", id="turned"),
        pytest.param(segment(0xE0, b"JFIF\0") + segment(0xE1, EXIF) + b"\xff\xd9", "2 3", id="behind another segment"),
        pytest.param(b"\xff\xff" + segment(0xE1, EXIF) + b"\xff\xd9", "2 3", id="behind bytes that fill"),
        pytest.param(segment(0xDA, b"12345678") + segment(0xE1, EXIF), "3 2", id="not behind the pixels"),
        pytest.param(segment(0xE1, b"Exif\0\0"), "3 2", id="nothing in it, at the end of the file"),
        pytest.param(segment(0xE1, EXIF[:20])[:-8], "3 2", id="cut off"),
        pytest.param(segment(0xE1, EXIF.replace(b"\x08\0\0\0", b"\xff\xff\xff\xff")), "3 2", id="a directory nowhere"),
        pytest.param(segment(0xE1, EXIF[:-4] + b"\xff\xff\0\0"), "3 2", id="an orientation that is none"),
        pytest.param(b"\xff" * 30, "3 2", id="nothing but bytes that fill"),
        pytest.param(b"\xff\xe1\0\0" + EXIF, "3 2", id="a segment without a length"),
    ],
)
def test_the_orientation_is_found_in_any_jpeg_file(
    core: Callable[..., bytes], content: bytes, size: str, tmp_path: Path
) -> None:
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8" + content)
    assert core("images", tmp_path).decode() == f"{tmp_path}/a.jpg {size}\n"


def chunk(kind: bytes, content: bytes) -> bytes:
    return len(content).to_bytes(4, "big") + kind + content + b"\0\0\0\0"


@pytest.mark.parametrize(
    ("content", "size"),
    [
        pytest.param(chunk(b"IHDR", b"\0" * 13) + chunk(b"eXIf", EXIF[6:]), "2 3", id="turned"),
        pytest.param(chunk(b"IDAT", b"eXIf") + chunk(b"IEND", b""), "3 2", id="none"),
        pytest.param(chunk(b"eXIf", b""), "3 2", id="nothing in it, at the end of the file"),
        pytest.param(b"II\xff\xffeXIf" + EXIF[6:], "3 2", id="longer than the file"),
        pytest.param(chunk(b"eXIf", EXIF[6:])[:-5], "3 2", id="cut off"),
    ],
)
def test_the_orientation_is_found_in_any_png_file(
    core: Callable[..., bytes], content: bytes, size: str, tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    assert core("images", tmp_path).decode() == f"{tmp_path}/a.png {size}\n"


def test_images_are_found_by_their_endings(core: Callable[..., bytes], tmp_path: Path) -> None:
    for name in ("b.PNG", "a é.jpg", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "z.jpg").symlink_to(tmp_path / "gone")
    assert core("images", tmp_path).decode() == f"{tmp_path}/a é.jpg 3 2\n{tmp_path}/b.PNG 3 2\n"
    assert core("images", tmp_path / "z.jpg").decode() == f"{tmp_path}/z.jpg does not exist: check the path"
    nothing = f"{tmp_path}/folder.jpg has no images (.jpg, .jpeg, .png, .bmp)"
    assert core("images", tmp_path / "folder.jpg").decode() == nothing


def test_the_report_is_json_whatever_the_names(core: Callable[..., bytes]) -> None:
    name = 'a "b"\\\n\x01 é \U0001f600 '.encode() + b"\xff\xc0\xaf\xed\xa0\x80"
    report = json.loads(core("report", 7, *range(1, 11), stdin=name))
    assert report["images"][0]["file"] == 'a "b"\\\n\x01 é \U0001f600 ' + 6 * "�"
    assert report["images"][0]["detections"][0]["box"] == [1, 2, 3, 4]
    latency = report["latency_ms"]
    assert latency["samples"] == 10
    expected = np.percentile(np.arange(1, 11), [50, 90, 99])
    np.testing.assert_allclose([latency["preprocess"][key] for key in ("p50", "p90", "p99")], expected, atol=1e-4)
    np.testing.assert_allclose([latency["total"][key] for key in ("p50", "p90", "p99")], expected + 1.5, atol=1e-4)
    assert latency["preprocess"]["mean"] == 5.5


def test_the_program_reads_what_was_written(core: Callable[..., bytes], bundle: Path) -> None:
    assert core("model", bundle / "model") == b""


@pytest.mark.parametrize(
    ("name", "pattern", "replacement", "message"),
    [
        ("detector.txt", "format 1", "format 2", "has format 2, this program reads 1: "),
        ("detector.txt", "classes 3", "", 'has no usable "classes": write the bundle again'),
        ("detector.txt", "classes 3", "classes three", 'has no usable "classes"'),
        ("detector.txt", "classes 3", "classes 99999999999999999999", 'has no usable "classes"'),
        ("detector.txt", "strides 8 16 32", "strides 8 16 33", 'has no usable "strides"'),
        ("detector.txt", "strides 8 16 32", "strides 8 0 32", 'has no usable "strides"'),
        ("detector.txt", "strides 8 16 32", "strides 8 16", 'has no usable "outputs"'),
        ("detector.txt", "confidence 0.25", "confidence nan", 'has no usable "confidence"'),
        ("detector.txt", "precision fp32", "precision fp8", 'has no usable "precision"'),
        ("detector.txt", "(?s).*", "", 'has no usable "format"'),
        ("labels.txt", "circle\n", "", "has 2 names for 3 classes: "),
        ("model.ncnn.param", "(?s)$", "x", " bytes, it was written with "),
        ("model.ncnn.param", None, "", "is missing: copy the model folder again"),
        ("labels.txt", None, "", "is missing: copy the model folder again"),
        ("detector.txt", None, "", "is not a model folder: it has no detector.txt"),
    ],
)
def test_damaged_model_folders_are_one_line(
    core: Callable[..., bytes],
    bundle: Path,
    tmp_path: Path,
    name: str,
    pattern: str | None,
    replacement: str,
    message: str,
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(bundle / "model", folder)
    if pattern is None:
        (folder / name).unlink()
    else:
        text = (folder / name).read_text()
        changed = re.sub(pattern, replacement, text, count=1)
        assert changed != text
        (folder / name).write_text(changed)
    answer = core("model", folder).decode()
    assert message in answer
    assert "\n" not in answer
