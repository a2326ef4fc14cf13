"""Records of studies that grow row by row."""

from __future__ import annotations

from pathlib import Path

from compress.manifest import read_json
from scripts.studies import rows

KEYS = ("model", "imgsz")


def test_a_row_takes_the_place_of_the_older_one(tmp_path: Path) -> None:
    path = tmp_path / "new" / "record.json"
    for model, imgsz, score in (("b", 320, 1), ("a", 320, 2), ("a", 640, 3), ("a", 320, 4)):
        rows.store(path, {"model": model, "imgsz": imgsz, "score": score}, KEYS, {"limit": 5})
    assert {key: value for key, value in read_json(path).items() if key != "rows"} == {"schema": 1, "limit": 5}
    assert [(row["model"], row["imgsz"], row["score"]) for row in rows.read(path)] == [
        ("a", 320, 4),
        ("a", 640, 3),
        ("b", 320, 1),
    ]
    assert rows.find(rows.read(path), {"model": "a", "imgsz": 640}, KEYS) == {"model": "a", "imgsz": 640, "score": 3}
    assert rows.find(rows.read(path), {"model": "b", "imgsz": 640}, KEYS) is None
