"""Data sets of Ultralytics' form: checked before any work is spent on them, and never executed."""

from __future__ import annotations

import glob
import hashlib
import random
import time
from functools import cache
from pathlib import Path
from typing import Any

from compress.errors import DataError, SettingsError
from compress.manifest import sha256_json
from compress.settings import load_yaml

# What Ultralytics takes for an image: each file that we count is one that it trains on.
IMAGE_SUFFIXES = frozenset(
    (".avif", ".bmp", ".dng", ".heic", ".heif", ".jp2", ".jpeg", ".jpg", ".mpo", ".png", ".tif", ".tiff", ".webp")
)
GENERATED = "shapes"
_CHECKED = 5000
_SETTLED_NS = 1_000_000_000
_UNCOMPRESSED = frozenset((".bmp", ".tif", ".tiff"))
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}  # what a torn file lacks
_END_BYTES = 1 << 16  # phones write their own data behind the end
_DEEP = ("F", "I")  # 32 bits a pixel, of which OpenCV reads few kinds
_NOT_PILLOWS = (".avif", ".heic", ".heif")  # which Ultralytics opens by another package


def resolve(data: str, *, labels: bool = True) -> Path:
    """Return the absolute path of a data set YAML that was checked; 'shapes' is generated where it is missing.

    Splits, images and labels are checked (those of up to 5000 images of each split). Nothing that the YAML holds
    is run: Ultralytics would execute a `download:` entry where images are missing, so they must be there.

    Args:
        labels: whether the labels are needed; parity, for one, only looks at images.

    Raises:
        DataError: the YAML, its images or its labels cannot be used; the message names the file and the line.
    """
    if data == GENERATED:
        from compress.shapes import generate

        return generate(Path("datasets") / GENERATED).resolve()
    path = Path(data).resolve()
    if path.is_dir():
        return _resolve_folders(path)
    if path.suffix.lower() not in (".yaml", ".yml"):
        raise DataError(f"{data} is not a data set: give its .yaml, or '{GENERATED}' for the generated one")
    classes, points = len(class_names(path)), keypoints(path)
    if (channels := _read(path).get("channels", 3)) != 3:
        raise DataError(
            f"{path} has 'channels: {channels}', Espalier takes 3: remove it, grey images are read as coloured ones"
        )
    for split in ("train", "val"):
        found = images(path, split)
        if labels:
            _check_images(found)
            _check_labels(found, classes, points, f"{path}: '{split}'")
    return path


def _resolve_folders(folder: Path) -> Path:
    """Check a data set of classified images: `train` and `val`, each with a folder of images for every class."""
    names = set(class_names(folder).values())
    for split in ("train", "val"):
        found = images(folder, split)
        _check_images(found)
        strange = {image.relative_to(folder / split).parts[0] for image in found} - names
        if strange:
            raise DataError(f"{folder / split} has the class {min(strange)}, {folder / 'train'} has none of that name")
    return folder


def images(data: Path, split: str) -> list[Path]:
    """Return the image files of a split (a folder, a text file that lists images, or several of these), sorted.

    Raises:
        DataError: the YAML has no such split, it is not on disk, or there is no image in it.
    """
    if data.is_dir():
        found = _files(data / split, str(data))
        if not found:
            raise DataError(f"{data / split} holds no images: check the path")
        return sorted(found)
    content = _read(data)
    entries = content.get(split)
    if not entries:
        raise DataError(f"{data} has no '{split}' split: add the folder of its images")
    root = _root(data, content)
    found: list[Path] = []
    listed = isinstance(entries, list)
    for entry in map(str, entries if listed else [entries]):
        place = (root / entry).resolve() if listed else _place(root, entry)
        found += _files(place, f"{data}: '{split}'", _remark(data, content, entry, listed))
    if not found:
        raise DataError(f"{data}: '{split}' holds no images ({entries} in {root}): check the path")
    return sorted(found)


def sample_images(data: Path, split: str, count: int, seed: int) -> list[Path]:
    """Return `count` images of a split that the seed draws, in the order drawn; all of them if there are fewer.

    Raises:
        DataError: as `images`.
    """
    found = images(data, split)
    return random.Random(seed).sample(found, min(count, len(found)))


def class_names(data: Path) -> dict[int, str]:
    """Return the names of the classes by their number.

    Raises:
        DataError: there are none, they are not numbered 0, 1, 2 …, or their number is not `nc`.
    """
    if data.is_dir():
        folders = sorted(path.name for path in (data / "train").glob("*") if path.is_dir())
        if not folders or set(folders) == {"images", "labels"}:  # not classes: a detector's data
            found = next((f", such as {path}" for path in sorted(data.glob("*.y*ml"))), "")
            raise DataError(
                f"{data} is not a data set: give its .yaml{found}, or for a classifier a folder whose 'train' and "
                "'val' hold a folder of images for every class"
            )
        return dict(enumerate(folders))
    content = _read(data)
    names = content.get("names")
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not names:
        raise DataError(f"{data} has no 'names': list the names of its classes")
    names = {int(key) if str(key).isdecimal() else key: name for key, name in names.items()}  # "0" is 0 to Ultralytics
    if set(names) != set(range(len(names))):
        raise DataError(f"{data}: 'names' must be numbered from 0 without gaps, got {list(names)[:5]}")
    if str(content.get("nc", len(names))) not in (str(len(names)), str(float(len(names)))):  # as Ultralytics takes it
        raise DataError(f"{data}: 'nc' is {content['nc']}, but there are {len(names)} names: make them agree")
    return {number: str(names[number]) for number in range(len(names))}


def keypoints(data: Path) -> list[int] | None:
    """Return how many key points an object has, and how many numbers each (2, or 3 with visibility), or None.

    Raises:
        DataError: `kpt_shape` is no such pair.
    """
    shape = None if data.is_dir() else _read(data).get("kpt_shape")
    if shape is None:
        return None
    if not (isinstance(shape, list) and len(shape) == 2 and all(isinstance(n, int) for n in shape)):
        raise DataError(f"{data}: 'kpt_shape' must be [key points, 2 or 3], got {shape}")
    if shape[0] < 1 or shape[1] not in (2, 3):
        raise DataError(f"{data}: 'kpt_shape' must be [key points, 2 or 3], got {shape}")
    return shape


def require_polygons(data: Path) -> None:
    """Check that the labels are polygons, of which a model learns masks or oriented boxes.

    Raises:
        DataError: a label file holds upright boxes only; the message names it.
    """
    of_boxes = keypoints(data) is not None  # what is behind the box there, Ultralytics drops for another task
    for split in ("train", "val"):
        for image in _sample(images(data, split)):
            path = label_file(image)
            text = path.read_text(encoding="utf-8-sig", errors="replace") if path.is_file() else ""
            lengths = [len(line.split()) for line in text.splitlines() if line.strip()]
            if lengths and (of_boxes or max(lengths) < 1 + 2 * 3):
                raise DataError(
                    f"{path} holds upright boxes, this model learns from polygons (class x1 y1 x2 y2 …): give a data "
                    "set with polygons, or a model to detect"
                )


def label_file(image: Path) -> Path:
    """Return where Ultralytics looks for the labels of an image: the last `images` folder read as `labels`."""
    parts = list(image.parts)
    for index in range(len(parts) - 2, -1, -1):
        if parts[index] == "images":
            parts[index] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def fingerprint(data: Path) -> str:
    """Return a hash that changes when the YAML, name or size of any image, or any label changes. Fast.

    Of images that are not compressed, which are all of one size, the bytes are read as of labels.

    A split that the YAML names and the disk lacks, as many copies of COCO lack `test`, counts as empty.
    """
    content: Any = class_names(data) if data.is_dir() else _read(data)
    root = data if data.is_dir() else _root(data, content).resolve()
    entries = []
    for split in ("train", "val", "test"):
        for image in _images_if_any(data, split):
            label = label_file(image)
            entry = [split, _name(image, root), image.stat().st_size, _hash_of(label)]
            entries.append([*entry, _hash_of(image)] if image.suffix.lower() in _UNCOMPRESSED else entry)
    return sha256_json([content, entries])


def _hash_of(file: Path) -> str | None:
    """Return the sha256 of a file, None without one: another class of a box leaves the size of a label as it was."""
    try:
        found = file.stat()
    except OSError:
        return None
    # A file that has just been written may be written again without a later time: clocks of file systems are coarse.
    hashed = _hash if time.time_ns() - found.st_mtime_ns < _SETTLED_NS else _hash_as_of
    return hashed(file, found.st_size, found.st_mtime_ns, found.st_ino)


def _hash(file: Path, *_state: int) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


_hash_as_of = cache(_hash)  # each stage of a run asks for all of them


def _images_if_any(data: Path, split: str) -> list[Path]:
    try:
        return images(data, split)
    except DataError:
        return []


def data_hash(data: Path, split: str) -> str:
    """Return the sha256 over the images of a split and their labels: names within the data set, and all bytes.

    It is the same for a copy of the data set in another place.

    Raises:
        DataError: as `images`.
    """
    root = data if data.is_dir() else _root(data, _read(data)).resolve()
    digest = hashlib.sha256()
    for image in images(data, split):
        label = label_file(image)
        for part in (_name(image, root).encode(), image.read_bytes(), label.read_bytes() if label.is_file() else b""):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
    return digest.hexdigest()


def _read(data: Path) -> dict[str, Any]:
    try:
        content = load_yaml(data)
    except SettingsError as error:
        raise DataError(" ".join(str(error).split())) from None
    # Ultralytics reads the word None as null; reading it as a folder would look at other images than it trains on.
    return {key: None if value == "None" else value for key, value in content.items()}


def _root(data: Path, content: dict[str, Any]) -> Path:
    """Return the folder that splits are relative to, as Ultralytics finds it."""
    if not content.get("path"):
        return data.parent
    root = Path(str(content["path"]))
    if root.is_absolute() or root.exists():
        return root
    from ultralytics.utils import DATASETS_DIR

    return DATASETS_DIR / root


def _name(image: Path, root: Path) -> str:
    return image.relative_to(root).as_posix() if image.is_relative_to(root) else image.name


def _place(root: Path, entry: str) -> Path:
    place = (root / entry).resolve()
    # Exports of labelling tools write ../train for a folder beside the YAML; Ultralytics forgives that.
    if not place.exists() and entry.startswith("../"):
        return (root / entry[3:]).resolve()
    return place


def _remark(data: Path, content: dict[str, Any], entry: str, listed: bool) -> str:
    """Return what may explain that a folder or list of images is not there."""
    if "download" in content:
        return " (its 'download:' is never run)"
    path = content.get("path")
    if path and ((data.parent / str(path)) / entry).exists():
        beside = (data.parent / str(path)).resolve()
        return f" ('path: {path}' is relative to the folder of the command: write path: {beside})"
    if listed and entry.startswith("../"):
        return f" (only a lone '../' is forgiven, in a list write {entry[3:]})"
    return ""


def _files(place: Path, where: str, remark: str = "") -> list[Path]:
    """Return the images of one folder or list, as Ultralytics finds them: no hidden ones, images by their suffix."""
    if place.is_dir():
        files = [place / name for name in glob.glob("**/*.*", root_dir=place, recursive=True)]  # noqa: PTH207 hides .*
    elif place.is_file() and place.suffix == ".txt":
        lines = [line.strip() for line in place.read_text(encoding="utf-8-sig", errors="replace").splitlines()]
        files = [place.parent / line[2:] if line.startswith("./") else Path(line).absolute() for line in lines if line]
    else:
        raise DataError(f"{where} names {place}, which is no folder and no .txt list: check the path{remark}")
    files = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    if missing := next((file for file in files if not file.is_file()), None):
        if place.is_file():
            raise DataError(f"{where}: {place} lists {missing}, which does not exist: check the path")
        raise DataError(f"{where}: {missing} is a folder, or a link to nothing: mend or remove it")
    return files


def _sample(files: list[Path]) -> list[Path]:
    """Return those that are checked, spread over all."""
    return files[:: -(-len(files) // _CHECKED)]


def _check_images(files: list[Path]) -> None:
    """Meet what is no image now: Ultralytics leaves it out, so that a cut or a score would be the first to stumble."""
    from PIL.Image import DecompressionBombError

    for path in _sample(files):
        try:
            readable = path.suffix.lower() in _NOT_PILLOWS or _is_readable(path)
        except DecompressionBombError as error:
            raise unreadable(path, error) from None
        except (OSError, ImportError):  # Ultralytics has `open` ask for a package where nothing knows the format
            readable = False
        if not readable:
            raise unreadable(path)


def unreadable(path: Path, error: Exception | None = None) -> DataError:
    """Return what to say of an image that cannot be opened; Ultralytics asks Pillow, and leaves out what it refuses."""
    from PIL.Image import DecompressionBombError

    if isinstance(error, DecompressionBombError):
        return DataError(f"{path} has more pixels than Pillow opens: scale it down, or cut it into tiles")
    return DataError(f"{path} is not an image that can be read: mend or remove it")


def _is_readable(path: Path) -> bool:
    """Tell whether an image can be decoded, by its head and its end; it is decoded where these leave a doubt.

    Raises:
        OSError: no head of an image.
    """
    from PIL import Image

    with Image.open(path) as image:  # reads the head of the file
        end, deep = _ENDS.get(image.format or "", b""), image.mode in _DEEP
    with path.open("rb") as stream:
        stream.seek(-min(path.stat().st_size, _END_BYTES), 2)
        whole = end in stream.read()
    if whole and not deep:
        return True
    from ultralytics.utils.patches import imread

    return imread(path) is not None


def _check_labels(files: list[Path], classes: int, points: list[int] | None, where: str) -> None:
    objects = 0
    for image in _sample(files):
        path = label_file(image)
        if path.is_file():
            lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
            lengths = set()
            for number, line in enumerate(lines, 1):
                if fields := line.split():
                    check_label(fields, classes, points, f"{path}:{number}")
                    lengths.add(len(fields))
                    objects += 1
            if points is None and min(lengths, default=5) == 5 < max(lengths, default=5):
                raise DataError(  # Ultralytics would train without this image
                    f"{path} mixes boxes and polygons: write one kind of label in a file"
                )
    if not objects:
        raise DataError(
            f"{where}: none of its {len(files)} images has a labelled object: labels belong in {label_file(files[0])} …"
        )


def check_label(fields: list[str], classes: int, points: list[int] | None, where: str) -> None:
    """Check one label: class and box, class and polygon (a detector takes the box around it), or class, box, points.

    Args:
        fields: the words of its line.
        classes: how many there are.
        points: as `keypoints` returns it.
        where: names the line in an error.

    Raises:
        DataError: it is none.
    """
    try:
        class_id, *values = (float(field) for field in fields)
    except ValueError:
        raise DataError(f"{where}: '{' '.join(fields)[:40]}' is not a label: write class x y w h") from None
    if points is not None:
        if len(values) != 4 + points[0] * points[1]:
            raise DataError(
                f"{where} has {len(fields)} numbers: 'kpt_shape' {points} needs class x y w h and "
                f"{points[0]} key points of {points[1]} numbers"
            )
        if points[1] == 3:  # without the visibilities, which are 0, 1 or 2
            values = [value for i, value in enumerate(values) if i < 4 or (i - 4) % 3 < 2]
    elif len(values) != 4 and (len(values) < 6 or len(values) % 2):
        raise DataError(f"{where} has {len(fields)} numbers: write class x y w h, or class and the points of a polygon")
    if class_id not in range(classes):
        raise DataError(f"{where} has class {fields[0]}, the data set has the classes 0 to {classes - 1}: mend 'names'")
    if not all(-0.01 <= value <= 1.01 for value in values):
        raise DataError(f"{where} has a coordinate outside [0, 1]: divide by the width and height of the image")
