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


FAST = "1.50 times as fast as fp32 on this machine (1.40–1.60)"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [FAST]),
        (
            {"interval": [0.9, 1.1], "faster": False, "speedup": 1.07},
            ["not measurably faster: 1.07 times as fast as fp32 on this machine (0.90–1.10); use fp32 here"],
        ),
        (
            {"interval": [0.7, 0.9], "faster": False, "speedup": 0.8},
            ["slower: 0.80 times as fast as fp32 on this machine (0.70–0.90); use fp32 here"],
        ),
        ({"noise": ["it throttled"]}, [FAST, "the measurement is noisy: it throttled"]),
        ({"noise": ["a", "b", "c"]}, [FAST, "the measurement is noisy: a (and 2 more signs of it)"]),
        (None, []),
    ],
    ids=["faster", "equal", "slower", "noisy", "very noisy", "not measured"],
)
def test_remarks(changes: dict[str, Any] | None, expected: list[str]) -> None:
    facts = {"float_layers": ["a"], "layers": 5, "calibration_images_in_val": 0}
    usual = {"speedup": 1.5, "interval": [1.4, 1.6], "faster": True, "noise": []}
    latency = None if changes is None else {**usual, **changes}
    record = {"quantization": facts, "latency": latency, "map50_95": {"torch": 0.4}}
    assert int8.remarks(record) == ["1 of 5 layers in float", *expected]


def test_remarks_on_a_model_whose_map_proves_nothing() -> None:
    facts = {"float_layers": [], "layers": 5, "calibration_images_in_val": 3}
    found = int8.remarks({"quantization": facts, "latency": None, "map50_95": {"torch": 0.003}})
    assert found == [
        "0 of 5 layers in float",
        "the model finds next to nothing (mAP50-95 0.0030 in PyTorch): its mAP proves nothing here",
        "3 calibration images are val images too: its mAP flatters",
    ]
