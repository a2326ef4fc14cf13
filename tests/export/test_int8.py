from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compress.errors import DataError
from compress.settings import Quantize
from export import int8


def test_the_calibration_hash_is_of_the_bytes(images: list[Path], tmp_path: Path) -> None:
    import shutil

    copies = [Path(shutil.copy(path, tmp_path / f"copy-{path.name}")) for path in reversed(images)]
    assert int8.calibration_hash(copies) == int8.calibration_hash(images)
    copies[0].write_bytes(copies[0].read_bytes() + b" ")
    assert int8.calibration_hash(copies) != int8.calibration_hash(images)


def test_calibration_images_are_drawn_by_seed(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number:02}.png").touch()
    yaml = tmp_path / "data.yaml"
    yaml.write_text("train: images\nval: images\nnames: {0: a}\n")
    drawn = [int8.calibration_images(yaml, Quantize(calibration_images=5, seed=seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 5
    assert len(int8.calibration_images(yaml, Quantize(calibration_images=50))) == 20


def test_a_calibration_set_without_images_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    yaml = tmp_path / "data.yaml"
    yaml.write_text("train: images\nval: images\nnames: {0: a}\n")
    with pytest.raises(DataError, match=r"data\.yaml: 'train' holds no images .*: check the path$"):
        int8.calibration_images(yaml, Quantize())


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ["1 of 5 layers in float", "1.50 times as fast as fp32"]),
        ({"faster": False}, ["1 of 5 layers in float", "NOT FASTER than fp32 on this machine (1.50 times as fast as"]),
        ({"noise": ["it throttled"]}, ["1 of 5", "1.50 times", "the measurement is noisy: it throttled"]),
        (None, ["1 of 5 layers in float"]),
    ],
    ids=["faster", "slower", "noisy", "not measured"],
)
def test_remarks(changes: dict[str, Any] | None, expected: list[str]) -> None:
    facts = {"float_layers": ["a"], "layers": 5, "calibration_images_in_val": 0}
    latency = None if changes is None else {"speedup": 1.5, "faster": True, "noise": [], **changes}
    found = int8.remarks({"quantization": facts, "latency": latency})
    assert len(found) == len(expected)
    assert all(text.startswith(start) for text, start in zip(found, expected, strict=True))
