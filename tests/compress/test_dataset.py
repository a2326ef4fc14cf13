from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from compress import shapes
from compress.data.dataset import IMAGE_SUFFIXES, class_names, data_hash, fingerprint, images, label_file, resolve
from compress.errors import DataError
from compress.shapes import Shapes, generate

TEXT = "train: images/train\nval: images/val\nnames: [cat, dog]\n"
HEAD = "P5 1 1 255 "  # of an image file
TEMPLATE = Path(__file__).parents[2] / "configs" / "datasets" / "template.yaml"


@pytest.fixture
def data(tmp_path) -> Path:
    """Two training images, one validation image, each with a dog (class 1). Nothing here decodes an image."""
    folder = tmp_path / "set"
    for name in ("train/b", "train/a", "val/c"):
        for kind, suffix, content in (("images", ".jpg", HEAD + name), ("labels", ".txt", "1 0.5 0.5 0.2 0.1\n")):
            path = folder / kind / f"{name}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
    (folder / "data.yaml").write_text(TEXT)
    return folder / "data.yaml"


def names(files: list[Path], data: Path) -> list[str]:
    return [file.relative_to(data.parent).as_posix() for file in files]


def test_a_sound_set_gives_its_absolute_yaml(data, monkeypatch):
    monkeypatch.chdir(data.parent)
    assert resolve("data.yaml") == data


def test_shapes_are_generated_under_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = Shapes(train=1, val=1, test=1, imgsz=64)
    monkeypatch.setattr(shapes, "generate", lambda folder: generate(folder, small))
    assert resolve("shapes") == tmp_path / "datasets" / "shapes" / "shapes.yaml"
    yaml = resolve("datasets/shapes/shapes.yaml")
    assert class_names(yaml) == dict(enumerate(["ring", "triangle", "star", "cross", "gear", "key"]))
    assert [len(images(yaml, split)) for split in ("train", "val", "test")] == [1, 1, 1]


def test_the_template_describes_a_set_that_works(data):
    shutil.copy(TEMPLATE, data)
    assert resolve(str(data)) == data
    assert class_names(data) == {0: "first class", 1: "second class"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("train: [", "is not valid YAML", id="not YAML"),
        pytest.param("just words", "must hold a mapping", id="no mapping"),
        pytest.param("val: images/val\nnames: [cat, dog]\n", "has no 'train' split", id="no train"),
        pytest.param("train: images/train\nnames: [cat, dog]\n", "has no 'val' split", id="no val"),
        pytest.param(TEXT.replace("images/val", "''"), "has no 'val' split", id="empty val"),
        pytest.param(TEXT.replace("images/val", "None"), "has no 'val' split", id="None is null for Ultralytics"),
        pytest.param(TEXT.replace("images/val", "images/valid"), r"images/valid, which is no folder", id="no folder"),
        pytest.param(TEXT.replace("images/val", "data.yaml"), r"data.yaml, which is no folder", id="no image list"),
        pytest.param(TEXT.replace("images/val", "labels"), "'val' holds no images", id="folder without images"),
        pytest.param("train: images/train\nval: images/val\n", "has no 'names'", id="no names"),
        pytest.param(TEXT + "channels: 1\n", "has 'channels: 1', Espalier takes 3: remove it", id="grey"),
        pytest.param(TEXT + "nc: 3\n", "'nc' is 3, but there are 2 names", id="nc"),
        pytest.param(TEXT.replace("[cat, dog]", "{0: cat, 2: dog}"), r"without gaps, got \[0, 2\]", id="gap"),
        pytest.param(TEXT.replace("[cat, dog]", "{a: cat}"), r"without gaps, got \['a'\]", id="named by words"),
        pytest.param(TEXT.replace("[cat, dog]", "[cat]"), r"[ab]\.txt:1 has class 1, the .* 0 to 0", id="class"),
    ],
)
def test_a_bad_yaml_gets_one_line(data, text, message):
    data.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        resolve(str(data))
    assert "\n" not in str(caught.value)
    assert str(data.parent) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.yaml", "absent.yaml does not exist"),
        ("images", "images is not a data set: give its .yaml"),
        ("coco8", "coco8 is not a data set: give its .yaml"),
        ("export", r"export is not a data set: give its .yaml, such as .*export/data\.yaml, or for a classifier"),
    ],
)
def test_a_name_that_is_no_set_gets_one_line(data, name, message):
    for split in ("train", "val"):  # as Roboflow lays out a detector's data
        shutil.copytree(data.parent / "images" / split, data.parent / "export" / split / "images")
        shutil.copytree(data.parent / "labels" / split, data.parent / "export" / split / "labels")
    shutil.copy(data, data.parent / "export")
    with pytest.raises(DataError, match=message):
        resolve(str(data.parent / name))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        pytest.param("2 0.5 0.5 0.1 0.1", "has class 2, the data set has the classes 0 to 1", id="beyond the last"),
        pytest.param("-1 0.5 0.5 0.1 0.1", "has class -1", id="negative"),
        pytest.param("0.5 0.5 0.5 0.1 0.1", "has class 0.5", id="between two"),
        pytest.param("nan 0.5 0.5 0.1 0.1", "has class nan", id="not a number"),
        pytest.param("dog 0.5 0.5 0.1 0.1", "'dog 0.5 0.5 0.1 0.1' is not a label", id="a word"),
        pytest.param("1 0.5 0.5 0.1", "has 4 numbers", id="too short"),
        pytest.param("1 0.5 0.5 0.1 0.1 0.9", "has 6 numbers", id="box and score"),
        pytest.param("1 0.1 0.1 0.2 0.1 0.2 0.2 0.3", "has 8 numbers", id="half a point"),
        pytest.param("1 50 50 10 10", r"coordinate outside \[0, 1\]", id="pixels"),
        pytest.param("1 nan 0.5 0.1 0.1", r"coordinate outside \[0, 1\]", id="coordinate is no number"),
    ],
)
def test_a_bad_label_is_named_by_file_and_line(data, line, message):
    label = data.parent / "labels" / "val" / "c.txt"
    label.write_text(f"0 0.5 0.5 0.1 0.1\n\n{line}\n")
    with pytest.raises(DataError, match=message) as caught:
        resolve(str(data))
    assert f"{label}:3" in str(caught.value)


def test_a_file_that_ultralytics_would_drop_is_refused(data):
    label = data.parent / "labels" / "val" / "c.txt"
    label.write_text("1 0.5 0.5 0.1 0.1\n1 0.1 0.1 0.2 0.1 0.2 0.2\n")
    with pytest.raises(DataError, match=r"c\.txt mixes boxes and polygons: write one kind of label in a file"):
        resolve(str(data))


def test_what_is_no_image_is_met_before_any_training(data):
    """Ultralytics trains without it, and the first to open it would be a cut or a score, hours later."""
    image = data.parent / "images" / "val" / "c.jpg"
    image.write_text("<html>not found</html>")
    with pytest.raises(DataError, match=r"val/c\.jpg is not an image that can be read: mend or remove it"):
        resolve(str(data))
    image.unlink()
    image.with_suffix(".heic").write_text("which takes another package to open")
    assert resolve(str(data)) == data


@pytest.mark.parametrize(
    ("mode", "suffix", "kept", "readable"),
    [
        pytest.param("RGB", ".jpg", 0.8, False, id="torn JPEG"),
        pytest.param("RGB", ".png", 0.8, False, id="torn PNG"),
        pytest.param("F", ".tif", 1.0, False, id="floats, which OpenCV does not read"),
        pytest.param("CMYK", ".jpg", 1.0, True, id="CMYK"),
        pytest.param("I;16", ".png", 1.0, True, id="16 bits"),
        pytest.param("RGB", ".jpg", 1.2, True, id="bytes of a phone behind the end"),
    ],
)
def test_images_that_only_seem_sound_are_met_before_any_training(data, mode, suffix, kept, readable):
    image = data.parent / "images" / "val" / f"c{suffix}"
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    pixels = Image.fromarray(noise)
    pixels = Image.fromarray(noise[..., 0].astype({"F": "f4", "I;16": "u2"}[mode])) if mode[0] in "FI" else pixels
    (pixels.convert(mode) if mode == "CMYK" else pixels).save(image)
    content = image.read_bytes()
    size = int(kept * len(content))
    image.write_bytes(content[:size] + b"0" * (size - len(content)))
    if readable:
        assert resolve(str(data)) == data
    else:
        with pytest.raises(DataError, match=rf"val/c\{suffix} is not an image that can be read: mend or remove it"):
            resolve(str(data))


def test_label_files_are_read_once_for_all_fingerprints(data, monkeypatch):
    for label in data.parent.rglob("*.txt"):
        os.utime(label, (1e9, 1e9))
    before, read = fingerprint(data), Path.read_bytes
    opened = []
    monkeypatch.setattr(Path, "read_bytes", lambda path: opened.append(path.name) or read(path))
    assert fingerprint(data) == before
    assert opened == []
    (data.parent / "labels" / "train" / "a.txt").write_text("0 0.5 0.5 0.2 0.1\n")
    assert fingerprint(data) != before
    assert opened == ["a.txt"]


def test_another_image_that_is_not_compressed_is_another_data_set(data):
    image = data.parent / "images" / "train" / "z.bmp"
    Image.new("RGB", (8, 8), "red").save(image)
    before = fingerprint(data)
    Image.new("RGB", (8, 8), "blue").save(image)
    assert fingerprint(data) != before


def test_polygons_are_labels(data):
    (data.parent / "labels" / "val" / "c.txt").write_text("1 0.1 0.1 0.2 0.1 0.2 0.2\n")
    assert resolve(str(data)) == data


@pytest.mark.parametrize("labels", [None, "", "\n"], ids=["no file", "empty file", "blank line"])
def test_a_split_without_any_object_is_refused(data, labels):
    label = data.parent / "labels" / "val" / "c.txt"
    label.unlink()
    if labels is not None:
        label.write_text(labels)
    with pytest.raises(DataError, match=r"'val': none of its 1 images has a labelled object: .*labels/val/c\.txt"):
        resolve(str(data))


def test_an_image_without_labels_is_a_background(data):
    (data.parent / "labels" / "train" / "a.txt").unlink()
    assert resolve(str(data)) == data


def test_a_download_entry_is_never_run(data, monkeypatch):
    monkeypatch.chdir(data.parent)
    data.write_text(TEXT.replace("images/val", "images/gone") + "download: |\n  open('ran', 'w').close()\n")
    with pytest.raises(DataError, match=r"images/gone, .*its 'download:' is never run"):
        resolve(str(data))
    assert not (data.parent / "ran").exists()


def test_yaml_tags_are_not_run(data, monkeypatch):
    monkeypatch.chdir(data.parent)
    data.write_text(TEXT + "extra: !!python/object/apply:os.mkdir [ran]\n")
    with pytest.raises(DataError, match="is not valid YAML"):
        resolve(str(data))
    assert not (data.parent / "ran").exists()


def test_images_are_sorted_and_hidden_files_are_none(data):
    folder = data.parent / "images" / "train"
    (folder / "deeper").mkdir()
    for name in ("deeper/d.PNG", "._a.jpg", "notes.txt", "B.jpeg"):
        (folder / name).write_bytes(b"")
    expected = ["B.jpeg", "a.jpg", "b.jpg", "deeper/d.PNG"]
    assert names(images(data, "train"), data) == [f"images/train/{name}" for name in expected]


def test_a_split_may_be_several_folders(data):
    data.write_text(TEXT.replace("images/train", "[images/train, images/val]"))
    assert names(images(data, "train"), data) == ["images/train/a.jpg", "images/train/b.jpg", "images/val/c.jpg"]


def test_a_split_may_be_a_list(data, monkeypatch):
    monkeypatch.chdir(data.parent.parent)
    absolute = data.parent / "images" / "train" / "a.jpg"
    # ./ is relative to the list, anything else to the current folder, as Ultralytics reads it.
    (data.parent / "train.txt").write_text(f"./images/val/c.jpg\n{absolute}\nset/images/train/b.jpg\n\n./notes.md\n")
    (data.parent / "notes.md").write_text("")
    data.write_text(TEXT.replace("images/train", "train.txt"))
    assert names(images(data, "train"), data) == ["images/train/a.jpg", "images/train/b.jpg", "images/val/c.jpg"]


def test_folders_that_ultralytics_would_not_find_are_explained(data, monkeypatch, tmp_path):
    """It looks for a relative `path` from where the command runs, and forgives a ../ too many outside of lists only."""
    data.write_text(f"path: .\n{TEXT}")
    monkeypatch.chdir(data.parent)
    assert resolve("data.yaml") == data
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=rf"'path: \.' is relative to .* the command: write path: {data.parent}\)"):
        resolve(str(data))
    data.write_text(TEXT.replace("images/train", "[../images/train]"))
    with pytest.raises(DataError, match=r"in a list write images/train\)"):
        resolve(str(data))


def test_a_list_with_a_missing_image_names_it(data):
    (data.parent / "train.txt").write_text("./images/train/a.jpg\n./images/train/z.jpg\n")
    data.write_text(TEXT.replace("images/train", "train.txt"))
    with pytest.raises(DataError, match=r"train\.txt lists .*z\.jpg, which does not exist"):
        images(data, "train")


def test_an_absent_split_is_an_error(data):
    with pytest.raises(DataError, match="has no 'test' split"):
        images(data, "test")


def test_path_is_honoured_as_ultralytics_does_it(data, monkeypatch, tmp_path):
    elsewhere = tmp_path / "yaml" / "data.yaml"
    elsewhere.parent.mkdir()
    expected = [data.parent / "images" / "val" / "c.jpg"]

    elsewhere.write_text(f"path: {data.parent}\n{TEXT}")
    assert images(elsewhere, "val") == expected

    elsewhere.write_text(f"path: set\n{TEXT}")  # relative to the current folder, not to the YAML
    monkeypatch.chdir(tmp_path)
    assert images(elsewhere, "val") == expected

    monkeypatch.chdir(elsewhere.parent)
    monkeypatch.setattr("ultralytics.utils.DATASETS_DIR", tmp_path)
    assert images(elsewhere, "val") == expected

    monkeypatch.setattr("ultralytics.utils.DATASETS_DIR", tmp_path / "none")
    with pytest.raises(DataError, match=r"none/set/images/val, which is no folder"):
        images(elsewhere, "val")


def test_a_folder_one_too_far_up_is_found_beside_the_yaml(data):
    data.write_text(TEXT.replace("images/val", "../images/val"))
    assert names(images(data, "val"), data) == ["images/val/c.jpg"]


def test_class_names_may_be_a_mapping_in_any_order(data):
    for mapping in ("{1: dog, 0: 5}\nnc: 2\n", "{'1': dog, '0': 5}\nnc: '2'\n", "{1: dog, '0': 5}\nnc: 2.0\n"):
        data.write_text(TEXT.replace("[cat, dog]\n", mapping))
        assert list(class_names(data).items()) == [(0, "5"), (1, "dog")]


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("/data/images/train/a.jpg", "/data/labels/train/a.txt"),
        ("/images/set/images/a.b.png", "/images/set/labels/a.b.txt"),
        ("/data/train/a.jpg", "/data/train/a.txt"),
        ("/data/my_images/a.jpg", "/data/my_images/a.txt"),
        ("/data/train/images.jpg", "/data/train/images.txt"),
    ],
)
def test_labels_lie_where_ultralytics_looks(image, label):
    from ultralytics.data.utils import img2label_paths

    assert label_file(Path(image)) == Path(label)
    assert img2label_paths([image]) == [label]


def test_the_images_are_those_that_ultralytics_takes():
    from ultralytics.data.utils import IMG_FORMATS

    assert {suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES} == IMG_FORMATS


@pytest.mark.parametrize("digest", [lambda data: data_hash(data, "train"), fingerprint], ids=["data_hash", "fast"])
def test_a_moved_set_keeps_its_hash(data, tmp_path, digest):
    copy = tmp_path / "moved" / "copy"
    shutil.copytree(data.parent, copy)
    assert digest(copy / "data.yaml") == digest(data)


def write_image(root: Path, content: str) -> None:
    (root / "images/train/a.jpg").write_text(HEAD + content)


@pytest.mark.parametrize(
    ("change", "seen", "seen_fast"),
    [
        pytest.param(
            lambda root: (root / "images/train/a.jpg").write_text(HEAD + "TRAIN/A"), True, False, id="image bytes"
        ),
        pytest.param(
            lambda root: (root / "images/train/a.jpg").write_text(HEAD + "longer than"), True, True, id="image size"
        ),
        pytest.param(lambda root: (root / "labels/train/a.txt").write_text("0 0 0 1 1"), True, True, id="label"),
        pytest.param(
            lambda root: (path := root / "labels/train/a.txt").write_text(path.read_text().replace("1 ", "0 ", 1)),
            True,
            True,
            id="class of a label, as long as before",
        ),
        pytest.param(lambda root: (root / "labels/train/a.txt").unlink(), True, True, id="label gone"),
        pytest.param(
            lambda root: (root / "images/train/a.jpg").rename(root / "images/train/A.jpg"), True, True, id="image name"
        ),
        pytest.param(lambda root: (root / "images/val/c.jpg").write_text("x"), False, True, id="another split"),
    ],
)
def test_hashes_see_changes(data, change, seen, seen_fast):
    before, before_fast = data_hash(data, "train"), fingerprint(data)
    change(data.parent)
    assert (data_hash(data, "train") != before, fingerprint(data) != before_fast) == (seen, seen_fast)


def test_the_hash_is_that_of_names_and_bytes(data):
    import hashlib

    def sized(content: bytes) -> bytes:
        return len(content).to_bytes(8, "little") + content

    expected = [b"images/val/c.jpg", f"{HEAD}val/c".encode(), b"1 0.5 0.5 0.2 0.1\n"]
    assert data_hash(data, "val") == hashlib.sha256(b"".join(map(sized, expected))).hexdigest()


def test_a_test_split_that_is_not_on_disk_hinders_nothing(data):
    data.write_text(TEXT + "test: images/test\n")
    before = fingerprint(data)
    assert resolve(str(data)) == data
    (data.parent / "images" / "test").mkdir()
    (data.parent / "images" / "test" / "d.jpg").write_text("d")
    assert fingerprint(data) != before


def test_a_link_to_nothing_is_named_and_one_in_the_test_split_hinders_no_training(data):
    data.write_text(TEXT + "test: images/test\n")
    (data.parent / "images" / "test").mkdir()
    (data.parent / "images" / "test" / "d.jpg").symlink_to("nowhere.jpg")
    assert len(fingerprint(data)) == 64
    with pytest.raises(DataError, match=r"'test': .*d\.jpg is a folder, or a link to nothing: mend or remove it"):
        data_hash(data, "test")
    (data.parent / "images" / "val" / "d.jpg").symlink_to("nowhere.jpg")
    with pytest.raises(DataError, match=r"'val': .*d\.jpg is a folder, or a link to nothing"):
        resolve(str(data))


def test_an_image_that_is_too_large_for_pillow_is_named(data, monkeypatch):
    """As orthophotos are; Ultralytics would train without it."""
    Image.new("1", (32, 32)).save(data.parent / "images" / "val" / "d.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(DataError, match=r"val/d\.png has more pixels than Pillow opens: scale it down, or cut it into"):
        resolve(str(data))
