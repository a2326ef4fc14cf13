from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from compress import shapes
from compress.data import scene
from compress.data.drawn import label
from compress.data.figures import OBJECTS
from compress.data.scene import draw_objects
from compress.errors import DataError
from compress.shapes import Shapes, generate

SMALL = Shapes(train=3, val=2, test=1, imgsz=64, seed=5)


def draw(seed: list[int], side: int) -> tuple[np.ndarray, list[tuple[float, ...]]]:
    """Return one picture and its labels: class, then x, y, w, h of what is visible, as shares of the side."""
    image, objects = draw_objects(seed, side)
    return image, [(class_id, *label("detect", seen)) for class_id, seen in objects]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_set_has_its_images_labels_yaml_and_marker(tmp_path):
    yaml = generate(tmp_path / "shapes", SMALL)
    assert yaml == tmp_path / "shapes" / "shapes.yaml"
    assert sorted(contents(tmp_path / "shapes")) == [
        *(f"images/{name}.jpg" for name in ("test/000000", "train/000000", "train/000001", "train/000002")),
        *(f"images/val/00000{index}.jpg" for index in range(2)),
        *(f"labels/{name}.txt" for name in ("test/000000", "train/000000", "train/000001", "train/000002")),
        *(f"labels/val/00000{index}.txt" for index in range(2)),
        "shapes.json",
        "shapes.yaml",
    ]
    assert "path:" not in yaml.read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shapes"]


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    generate(tmp_path / "a", SMALL)
    generate(tmp_path / "b", SMALL)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_another_seed_gives_other_pictures():
    first, second = draw([1, 0, 0], 64)[0], draw([2, 0, 0], 64)[0]
    assert not np.array_equal(first, second)


def test_a_picture_does_not_depend_on_how_many_others_are_made(tmp_path):
    few = contents(generate(tmp_path / "few", Shapes(train=2, val=1, test=1, imgsz=64)).parent)
    many = contents(generate(tmp_path / "many", Shapes(train=4, val=2, test=1, imgsz=64)).parent)
    pictures = {name for name in few if name.startswith(("images", "labels"))}
    assert len(pictures) == 8
    assert {name: few[name] for name in pictures} == {name: many[name] for name in pictures}


def test_splits_hold_different_pictures():
    assert not np.array_equal(draw([0, 0, 0], 64)[0], draw([0, 1, 0], 64)[0])


def rectangle(left: int, top: int, right: int, bottom: int):
    """Paint the pixels from left to right and top to bottom, the ends not included."""

    def paint(mask: np.ndarray, margin: int) -> None:
        fine = scene.OVERSAMPLING
        rows = slice((top + margin) * fine, (bottom + margin) * fine)
        mask[rows, (left + margin) * fine : (right + margin) * fine] = 255

    return paint


# The object is 40 wide and 20 high at (20, 30) of a picture of 100 pixels.
OBJECT = (2, rectangle(20, 30, 60, 50))


@pytest.mark.parametrize(
    ("things", "labels"),
    [
        pytest.param([OBJECT], [(2, 0.4, 0.4, 0.4, 0.2)], id="alone: its whole box"),
        pytest.param([OBJECT, (None, rectangle(0, 0, 40, 99))], [(2, 0.5, 0.4, 0.2, 0.2)], id="half hidden: the rest"),
        pytest.param([OBJECT, (None, rectangle(0, 0, 45, 99))], [], id="25 of 40 columns are hidden: more than 60 %"),
        pytest.param([(None, rectangle(0, 0, 99, 99)), OBJECT], [(2, 0.4, 0.4, 0.4, 0.2)], id="clutter behind it"),
        pytest.param(
            [OBJECT, (0, rectangle(50, 30, 70, 50))],
            [(2, 0.35, 0.4, 0.3, 0.2), (0, 0.6, 0.4, 0.2, 0.2)],
            id="another object hides a quarter",
        ),
        pytest.param([(1, rectangle(-10, 30, 10, 50))], [(1, 0.05, 0.4, 0.1, 0.2)], id="half of it is outside"),
        pytest.param([(1, rectangle(93, 30, 113, 50))], [], id="13 of 20 columns are outside"),
        pytest.param([OBJECT, (None, rectangle(38, 0, 42, 99))], [(2, 0.4, 0.4, 0.4, 0.2)], id="a line across it"),
    ],
)
def test_boxes_enclose_what_is_visible(monkeypatch, things, labels):
    monkeypatch.setattr(scene, "_scene", lambda rng, side: things)
    assert draw([0], 100)[1] == [pytest.approx(label) for label in labels]


def painted(name: str) -> np.ndarray:
    """Return a figure of radius 30 in the middle of 100 × 100 pixels, as drawn (True where it is)."""
    mask = np.zeros((300, 300), np.uint8)
    rng = np.random.default_rng(3)
    scene.figure_painter(rng, OBJECTS[name](rng), (50.0, 50.0, 30.0))(mask, 0)
    return mask > 0


@pytest.mark.parametrize(
    ("name", "middle_is_filled"),
    [("ring", False), ("triangle", True), ("star", True), ("cross", True), ("gear", False)],
)
def test_figures_have_their_size_and_holes(name, middle_is_filled):
    mask = painted(name)
    rows, columns = np.nonzero(mask)
    assert bool(mask[150, 150]) is middle_is_filled
    # Squeezed to three quarters at most; sheared and square-ended figures reach somewhat beyond the radius.
    reach = np.hypot(rows - 149.5, columns - 149.5).max() / 3
    assert 0.7 * 30 < reach < 1.2 * 30


def test_a_key_is_one_piece_with_one_hole():
    import cv2

    mask = painted("key").astype(np.uint8)
    _, hierarchy = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    outer = [entry for entry in hierarchy[0] if entry[3] == -1]
    assert (len(outer), len(hierarchy[0]) - len(outer)) == (1, 1)


def test_a_sample_looks_like_a_detection_problem():
    labels = [label for index in range(60) for label in draw([0, 0, index], 96)[1]]
    assert {label[0] for label in labels} == set(range(len(OBJECTS)))
    boxes = np.array([label[1:] for label in labels])
    longer = boxes[:, 2:].max(axis=1)
    assert (boxes[:, :2] - boxes[:, 2:] / 2).min() >= 0
    assert (boxes[:, :2] + boxes[:, 2:] / 2).max() <= 1
    assert (longer < 0.12).sum() >= 5
    assert (longer > 0.35).sum() >= 5
    assert 2 <= len(labels) / 60 <= 5


def test_labels_have_no_fault_for_ultralytics(tmp_path):
    from ultralytics.data.utils import verify_image_label

    folder = generate(tmp_path / "shapes", SMALL).parent
    for image in (folder / "images").rglob("*.jpg"):
        label = Path(str(image).replace("images", "labels")).with_suffix(".txt")
        result = verify_image_label((str(image), str(label), "", False, len(OBJECTS), 0, 0, False))
        assert result[2] == (64, 64)
        assert (result[-2], result[-1]) == (0, "")


def test_a_complete_set_is_kept(tmp_path, monkeypatch):
    generate(tmp_path / "shapes", SMALL)
    monkeypatch.setattr(shapes, "draw_objects", lambda *_: pytest.fail("drawn again"))
    assert generate(tmp_path / "shapes", SMALL).is_file()


def test_a_set_with_other_parameters_is_not_touched(tmp_path):
    folder = generate(tmp_path / "shapes", SMALL).parent
    before = contents(folder)
    with pytest.raises(DataError, match=r"other parameters \(.*'seed': 5.*not .*'seed': 6"):
        generate(folder, Shapes(train=3, val=2, test=1, imgsz=64, seed=6))
    assert contents(folder) == before


def test_a_folder_with_other_files_is_not_touched(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"mine")
    with pytest.raises(DataError, match="holds no data set of shapes"):
        generate(tmp_path, SMALL)
    assert contents(tmp_path) == {"photo.jpg": b"mine"}


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "shapes").mkdir()
    assert generate(tmp_path / "shapes", SMALL).is_file()


def interrupt_after(monkeypatch, pictures: int) -> list[list[int]]:
    """Let `draw` make so many pictures and then fail as Ctrl-C does; return the seeds that it was asked for."""
    asked: list[list[int]] = []

    def interrupted(seed, side):
        asked.append(seed)
        if len(asked) > pictures:
            raise KeyboardInterrupt
        return draw_objects(seed, side)

    monkeypatch.setattr(shapes, "draw_objects", interrupted)
    return asked


def test_an_interrupted_set_is_resumed(tmp_path, monkeypatch):
    whole = contents(generate(tmp_path / "whole", SMALL).parent)
    interrupt_after(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path / "shapes", SMALL)
    assert not (tmp_path / "shapes").exists()
    asked = interrupt_after(monkeypatch, 100)
    generate(tmp_path / "shapes", SMALL)
    assert asked == [[5, 0, 2], [5, 1, 0], [5, 1, 1], [5, 2, 0]]
    assert contents(tmp_path / "shapes") == whole


def test_a_half_made_set_with_other_parameters_leaves_nothing(tmp_path, monkeypatch):
    interrupt_after(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path / "shapes", SMALL)
    monkeypatch.undo()
    other = Shapes(train=1, val=1, test=1, imgsz=64, seed=6)
    assert contents(generate(tmp_path / "shapes", other).parent) == contents(generate(tmp_path / "b", other).parent)


def test_the_command_prints_where_the_set_is(tmp_path):
    folder = tmp_path / "drawn"
    options = ["--train", "1", "--val", "1", "--test", "1", "--imgsz", "64"]
    result = CliRunner().invoke(shapes.app, ["--output", str(folder), *options])
    assert (result.exit_code, result.output) == (0, f"data set: {folder / 'shapes.yaml'}\n")
    assert (folder / "images" / "train" / "000000.jpg").is_file()


def test_the_command_refuses_an_empty_split(tmp_path):
    result = CliRunner().invoke(shapes.app, ["--output", str(tmp_path / "drawn"), "--val", "0"])
    assert result.exit_code == 2
    assert not (tmp_path / "drawn").exists()
