from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

from compress.manifest import write_json
from scripts.studies import importance


def record() -> dict[str, Any]:
    rows = [
        {"importance": name, "macs_share": share, "map50_95": score}
        for name, share, score in (
            ("l1", 0.4951, 0.01),
            ("l1", 0.697, 0.2),
            ("taylor", 0.6972, 0.4),
            ("taylor", 0.4864, 0.3),
        )
    ]
    known = {"data": "$shapes.yaml", "split": "test", "imgsz": 64, "dense_map50_95": 0.6}
    return {**known, "rows": rows}


def test_the_best_importance_is_first_and_scores_stand_below_their_share() -> None:
    shares, lines = importance.ranked(record())
    assert shares == [70, 50]
    assert lines == [("taylor", [0.4, 0.3]), ("l1", [0.2, 0.01])]


def test_a_record_is_printed_and_drawn_again_without_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "importance.json"
    write_json(path, record())
    monkeypatch.setattr("sys.argv", ["importance.py", "--record", str(path)])
    importance.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| importance | at 70 % of the MACs | at 50 % of the MACs |"
    assert lines[2:5] == ["| `taylor` | 0.4000 | 0.3000 |", "| `l1` | 0.2000 | 0.0100 |", "| uncut | 0.6000 | 0.6000 |"]
    head = (tmp_path / "importance.png").read_bytes()[:24]
    assert struct.unpack(">II", head[16:24]) == (1050, 375)  # it grows with the number of importances


def test_without_a_record_the_study_says_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["importance.py", "--data", "shapes"])
    with pytest.raises(SystemExit) as caught:
        importance.main()
    assert caught.value.code == 2
    assert "--model, --budget, --output needed, or --record" in capsys.readouterr().err
