"""Which image size a data set needs."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from compress import advise
from compress.advise import Objects, read_objects, sentence, table
from compress.errors import DataError, run_app


def dataset(folder: Path, labels: str, more: str = "") -> Path:
    """Two images of 200 × 100 px and 100 × 200 px with the same labels."""
    for name in ("images", "labels"):
        (folder / name / "train").mkdir(parents=True)
    for name, size in (("a", (200, 100)), ("b", (100, 200))):
        Image.new("RGB", size).save(folder / "images" / "train" / f"{name}.png")
        (folder / "labels" / "train" / f"{name}.txt").write_text(labels)
    path = folder / "data.yaml"
    path.write_text(f"train: images/train\nval: images/train\nnames: [thing]\n{more}")
    return path


def test_sides_are_shares_of_the_longer_side_of_the_image(tmp_path: Path) -> None:
    found = read_objects(dataset(tmp_path, "0 0.5 0.5 0.1 0.4\n"))
    # 20 × 40 px of 200, and 10 × 80 px of 200.
    assert sorted(found.sides.tolist()) == pytest.approx([0.05, 0.1])
    assert (found.images, found.native) == (2, 200)


@pytest.mark.parametrize(
    ("labels", "more"),
    [
        ("0 0.2 0.3 0.4 0.3 0.4 0.5 0.2 0.5\n", ""),  # a polygon of 0.2 × 0.2
        ("0 0.5 0.5 0.2 0.2 0.9 0.9 0.1 0.1\n", "kpt_shape: [2, 2]\n"),  # a box, and two points
    ],
)
def test_polygons_and_key_points_have_boxes(tmp_path: Path, labels: str, more: str) -> None:
    assert read_objects(dataset(tmp_path, labels, more)).sides.tolist() == pytest.approx([0.1, 0.1])


def test_the_table_counts_small_objects_and_the_cost() -> None:
    found = Objects(np.array([0.02, 0.04, 0.08, 0.5]), 1, 640)
    rows = table(found, 160, 320)
    assert [row.imgsz for row in rows] == [160, 192, 224, 256, 288, 320]
    assert (rows[0].below, rows[0].cost) == ((0.5, 0.75), 0.25)
    assert (rows[-1].below, rows[-1].cost) == ((0.25, 0.5), 1.0)


def test_the_sentence_names_the_least_size_that_shows_the_objects() -> None:
    found = Objects(np.array([0.03] * 5 + [0.04] * 95), 1, 200)
    assert sentence(found, table(found, 160, 640)) == (
        "224 px is the least at which no more than 5% of the objects are below 8 px (5.0%); it costs 12% of 640 px, "
        "but the images have 200 px only, and what is beyond adds nothing. "
        "A sweep over imgsz near it says what that is worth in mAP."
    )
    large = Objects(np.array([0.5]), 1, 640)
    assert sentence(large, table(large, 160, 640)).startswith(
        "160 px is the least looked at, and already there no more"
    )
    tiny = Objects(np.array([0.001]), 1, 640)
    assert sentence(tiny, table(tiny, 160, 640)).startswith("Even at 640 px 100.0% of the objects are below 8 px: ")


def test_the_command_prints_both(tmp_path: Path, monkeypatch, capsys) -> None:
    data = dataset(tmp_path, "0 0.5 0.5 0.1 0.4\n")
    monkeypatch.setattr(sys, "argv", ["compress.advise", "--data", str(data), "--lowest", "96", "--highest", "192"])
    with pytest.raises(SystemExit) as stop:
        run_app(advise.app)
    out = capsys.readouterr().out
    assert stop.value.code == 0
    assert [word for word in ("2 objects in 2 images of 200 px", "160 px is the least") if word not in out] == []


@pytest.mark.parametrize(
    ("words", "message"), [(["--lowest", "100"], "--lowest 100 and --highest 640 must be multiples")]
)
def test_sizes_are_multiples_of_the_stride(
    tiny_data: Path, monkeypatch, capsys, words: list[str], message: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["compress.advise", "--data", str(tiny_data), *words])
    with pytest.raises(SystemExit) as stop:
        run_app(advise.app)
    assert (stop.value.code, message in capsys.readouterr().err) == (2, True)


def test_a_data_set_without_objects_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no image of 'train' has a labelled object"):
        read_objects(dataset(tmp_path, ""))
    with pytest.raises(DataError, match="has no objects"):
        read_objects(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [("0 0.5 0.5", r":3 has 3 numbers: write class x y w h"), ("0 0.5 0.5 0.1 wide", r":3: '0 0.5")],
)
def test_a_label_that_is_none_is_named(tmp_path: Path, line: str, message: str) -> None:
    data = dataset(tmp_path, f"0 0.5 0.5 0.1 0.4\n\n{line}\n", "test: images/train\n")
    with pytest.raises(DataError, match=rf"a\.txt{message}"):
        read_objects(data, "test")


def test_an_image_that_cannot_be_opened_is_named(tmp_path: Path, monkeypatch) -> None:
    data = dataset(tmp_path, "0 0.5 0.5 0.1 0.4\n")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    with pytest.raises(DataError, match=r"a\.png has more pixels than Pillow opens"):
        read_objects(data)
    (tmp_path / "images" / "train" / "a.png").write_text("<html>")
    with pytest.raises(DataError, match=r"a\.png is not an image that can be read"):
        read_objects(data)
