"""CIFAR-10 from its archive: what is written where, and which archives are refused."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from compress.data.dataset import class_names, images, resolve
from compress.errors import DataError
from scripts import cifar10


def jpeg(side: int = 32, mode: str = "RGB") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.zeros((side, side, 3), np.uint8)).convert(mode).save(stream, "JPEG")
    return stream.getvalue()


def members() -> dict[str, bytes]:
    found = {
        f"{split}/{name}/{number:04d}.jpg": jpeg()
        for split, count in cifar10.COUNTS.items()
        for name in cifar10.CLASSES
        for number in range(count)
    }
    return {"README.md": b"# CIFAR-10-images", **found}


@pytest.fixture
def pack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, bytes]], Path]:
    """Write an archive of four training images and two test images of each class."""
    monkeypatch.setattr(cifar10, "COUNTS", {"train": 4, "test": 2})

    def write(content: dict[str, bytes]) -> Path:
        with zipfile.ZipFile(tmp_path / "cifar10.zip", "w") as archive:
            for name, data in content.items():
                archive.writestr(name, data)
        return tmp_path / "cifar10.zip"

    return write


def test_it_becomes_a_data_set_of_three_splits(pack, tmp_path: Path) -> None:
    output = cifar10.unpack(pack(members()), tmp_path / "data", val=1)
    assert resolve(str(output)) == output.resolve()
    assert list(class_names(output).values()) == list(cifar10.CLASSES)
    assert [len(images(output, split)) for split in ("train", "val", "test")] == [30, 10, 20]
    assert sorted(path.name for path in (output / "val" / "cat").iterdir()) == ["0003.jpg"]  # the last ones
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")) == [
        "cifar10.zip",
        "data",
    ]


def test_a_second_start_changes_nothing_and_another_split_is_refused(pack, tmp_path: Path) -> None:
    archive = pack(members())
    output = cifar10.unpack(archive, tmp_path / "data", val=1)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    cifar10.unpack(archive, output, val=1)
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
    with pytest.raises(DataError, match="is there already and is not this data set"):
        cifar10.unpack(archive, output, val=2)


def with_changes(**changes: bytes | None) -> dict[str, bytes]:
    content: dict[str, bytes | None] = {**members(), **changes}
    return {name: data for name, data in content.items() if data is not None}


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("../../evil.jpg", b"", "holds '../../evil.jpg', which CIFAR-10 has not"),
        ("train/cat/0001.png", b"", "holds 'train/cat/0001.png'"),
        ("train/whale/0001.jpg", b"", "holds 'train/whale/0001.jpg'"),
        ("train/cat/0001.jpg", None, "train/cat has 3 images, CIFAR-10 has 4"),
        ("train/cat/0004.jpg", jpeg(), "train/cat has 5 images, CIFAR-10 has 4"),
        ("test/dog/0001.jpg", b"no image", "test/dog/0001.jpg is no JPEG image"),
        ("test/dog/0001.jpg", jpeg()[:400], "test/dog/0001.jpg is no JPEG image"),
        ("test/dog/0001.jpg", jpeg(33), "is 33×33 px, RGB: it must be 32×32 px, RGB"),
        ("test/dog/0001.jpg", jpeg(32, "L"), "is 32×32 px, L: it must be"),
        ("test/dog/0001.jpg", bytes(10_000), "has 10000 bytes, which no image of 32 × 32 px has"),
    ],
)
def test_another_archive_is_refused_and_leaves_no_data_set(
    pack, tmp_path: Path, name: str, data: bytes | None, message: str
) -> None:
    archive = pack(with_changes(**{name: data}))
    with pytest.raises(DataError) as caught:
        cifar10.unpack(archive, tmp_path / "data", val=1)
    assert message in str(caught.value)
    assert not (tmp_path / "data").exists()
    assert not (tmp_path.parent / "evil.jpg").exists()


def test_what_is_no_archive_is_refused(pack, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.zip does not exist"):
        cifar10.unpack(tmp_path / "none.zip", tmp_path / "data", val=1)
    archive = pack(members())
    with pytest.raises(DataError, match="val is 4, it must be from 1 to 3"):
        cifar10.unpack(archive, tmp_path / "data", val=4)
    damaged = bytearray(archive.read_bytes())
    damaged[60] ^= 1  # within the README, whose checksum is never asked; then within an image
    archive.write_bytes(bytes(damaged))
    cifar10.unpack(archive, tmp_path / "data", val=1)
    start = damaged.index(jpeg()) + len(jpeg()) // 2
    damaged[start] ^= 1
    archive.write_bytes(bytes(damaged))
    with pytest.raises(DataError, match="cannot be unpacked: Bad CRC-32"):
        cifar10.unpack(archive, tmp_path / "other", val=1)
