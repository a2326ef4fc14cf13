"""CIFAR-10 as a data set to classify: folders train, val and test, each with one of images for every class.

usage: python -m scripts.cifar10 --zip path/to/cifar10.zip --output datasets/cifar10

The archive is that of the CIFAR-10-images repository: train/CLASS/NNNN.jpg (5000 of each of ten classes) and
test/CLASS/NNNN.jpg (1000), 32 × 32 px. They are JPEG files, so not the pixels of the original binary files, and what is
learned from them is not to the last tenth of a percent what is learned from those. CIFAR-10 has no val split: the last
training images of each class become it, so that the test split decides nothing.
"""

from __future__ import annotations

import io
import re
import shutil
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from compress import manifest
from compress.errors import DataError, run_app
from compress.progress import track

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
COUNTS = {"train": 5000, "test": 1000}  # of each class
SIDE = 32
RECORD = "cifar10.json"

_IMAGE = re.compile(rf"(train|test)/({'|'.join(CLASSES)})/(\d{{4}})\.jpg")
_LARGEST_BYTES = 8192  # an uncompressed image of this size has 3072


def unpack(archive: Path, output: Path, val: int = 500) -> Path:
    """Write the data set to `output`, unless it is there already, and return it.

    Every member is checked: its name, its checksum, and that it decodes to 32 × 32 pixels. Nothing is written outside
    of `output`, whatever the archive says. The folder gets its name when all of it is there.

    Args:
        archive: the .zip.
        val: how many training images of each class become the val split.

    Raises:
        DataError: the archive is not CIFAR-10 as described above, or `output` holds something else.
        RunError: another process is writing it.
    """
    if not 1 <= val < COUNTS["train"]:
        raise DataError(f"val is {val}, it must be from 1 to {COUNTS['train'] - 1} images of each class")
    if not archive.is_file():
        raise DataError(f"{archive} does not exist: check the path")
    wanted = {"schema": manifest.SCHEMA, "archive_sha256": manifest.sha256_file(archive), "val_of_each_class": val}
    with manifest.lock(output):
        if (output / RECORD).is_file() and manifest.read_json(output / RECORD) == wanted:
            return output
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise DataError(f"{output} is there already and is not this data set: choose another folder")
        _write(archive, output, val, wanted)
    return output


def _write(archive: Path, output: Path, val: int, record: dict[str, Any]) -> None:
    part = output.with_name(f".{output.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of an interrupted start
    for split in ("train", "val", "test"):
        for name in CLASSES:
            (part / split / name).mkdir(parents=True)
    for split, name, number, content in _images(archive):
        place = "val" if split == "train" and number >= COUNTS["train"] - val else split
        (part / place / name / f"{number:04d}.jpg").write_bytes(content)
    manifest.write_json(part / RECORD, record)
    if output.exists():
        output.rmdir()
    part.rename(output)


def _images(archive: Path) -> Iterator[tuple[str, str, int, bytes]]:
    """Yield split, class, number and bytes of every image, after checking that all of them are there once."""
    try:
        with zipfile.ZipFile(archive) as opened:
            members = {info.filename: info for info in opened.infolist() if _IMAGE.fullmatch(info.filename)}
            known = {*members, "README.md"}
            for info in opened.infolist():
                if not info.is_dir() and info.filename not in known:
                    raise DataError(f"{archive} holds {info.filename!r}, which CIFAR-10 has not: give another archive")
            found = Counter(name.rpartition("/")[0] for name in members)
            for folder, count in ((f"{s}/{c}", n) for s, n in COUNTS.items() for c in CLASSES):
                numbers = {int(name[-8:-4]) for name in members if name.startswith(f"{folder}/")}
                if found[folder] != count or numbers != set(range(count)):
                    raise DataError(f"{archive}: {folder} has {found[folder]} images, CIFAR-10 has {count}")
            for name, info in track(list(members.items()), f"unpacking {archive.name}"):
                if info.file_size > _LARGEST_BYTES:
                    raise DataError(f"{archive}: {name} has {info.file_size} bytes, which no image of 32 × 32 px has")
                content = opened.read(info)
                _check_image(content, f"{archive}: {name}")
                split, folder, number = name[:-4].split("/")
                yield split, folder, int(number), content
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise DataError(f"{archive} cannot be unpacked: {error}") from None


def _check_image(content: bytes, where: str) -> None:
    from PIL.JpegImagePlugin import JpegImageFile  # not Image.open, which guesses, and which Ultralytics replaces

    try:
        with JpegImageFile(io.BytesIO(content)) as image:
            size, mode = image.size, image.mode
            if (size, mode) == ((SIDE, SIDE), "RGB"):  # before anything is decoded
                image.load()
    except (OSError, SyntaxError) as error:
        raise DataError(f"{where} is no JPEG image: {error}") from None
    if (size, mode) != ((SIDE, SIDE), "RGB"):
        raise DataError(f"{where} is {size[0]}×{size[1]} px, {mode}: it must be {SIDE}×{SIDE} px, RGB")


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    archive: Annotated[Path, typer.Option("--zip", help="cifar10.zip of JPEG folders")],
    output: Annotated[Path, typer.Option(help="folder of the data set")] = Path("datasets/cifar10"),
    val: Annotated[int, typer.Option(help="training images of each class that become the val split")] = 500,
) -> None:
    """Unpack CIFAR-10 as train, val and test."""
    print(f"data set: {unpack(archive, output, val)}")


if __name__ == "__main__":
    run_app(app)
