from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from benchmark import store
from compress.errors import RunError

COUNTED = {"model": "a", "runtime": "ncnn", "unit": "instructions", "instructions": [200, 210, 205]}


def cell(model: str, p50_ms: float, **more: Any) -> dict[str, Any]:
    interval = [0.99 * p50_ms, 1.01 * p50_ms]
    return {"model": model, "runtime": "torch", "p50_ms": p50_ms, "intervals": {"p50_ms": interval}, **more}


def write(path: Path, content: Any, day: int = 1) -> Path:
    """Write a record that was measured on a day of November 2026."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    moment = datetime(2026, 11, day, 12, tzinfo=timezone.utc).timestamp()
    os.utime(path, (moment, moment))
    return path


def latency(path: Path, *cells: dict[str, Any], day: int = 1, **more: Any) -> Path:
    device = {"cpu": "Acme 9000", "cores": 2}
    protocol = {"threads": 1, "imgsz": 320, "batch": 1, "mode": "quick"}
    return write(path, {"cells": list(cells), "device": device, "protocol": protocol, **more}, day)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "new folder" / "100%?#.sqlite"


def test_a_latency_record_becomes_a_row_for_each_cell(tmp_path: Path, place: Path) -> None:
    path = latency(tmp_path / "l.json", cell("b", 2.0, model_sha256="s", samples_ms=[[2.0]] * 99), COUNTED, noisy=True)
    assert store.add(path, place, prefix="run/") == [1, 2]
    first, second = store.find(place)
    assert first == store.Row(
        id=1,
        record=1,
        cell=0,
        kind="latency",
        time="2026-11-01T12:00:00+00:00",
        model="run/b",
        model_sha256="s",
        device="Acme 9000, 2 cores",
        runtime="torch",
        threads=1,
        imgsz=320,
        batch=1,
        mode="quick",
        unit="ms",
        p50=2.0,
        low=1.98,
        high=2.02,
        noisy=True,
    )
    assert (second.model, second.unit, second.p50, second.cell) == ("run/a", "instructions", 205.0, 1)
    assert store.record_of(second, place) == json.loads(path.read_text())


def test_an_accuracy_record_becomes_a_row_for_each_score(tmp_path: Path, place: Path) -> None:
    entries = [{"model": "a.pt", "map50_95": 0.5, "device": {"cpu": "Acme"}}, {"model": "c.pt", "top1": 0.9}]
    path = write(tmp_path / "accuracy" / "accuracy.json", entries)
    known = {"schema": 1, "config": {"split": "test", "imgsz": 64}, "parents": {"data": "d"}}
    write(tmp_path / "accuracy" / "manifest.json", known)
    store.add(path, place)
    rows = store.find(place)
    assert [(row.kind, row.metric, row.score, row.device) for row in rows] == [
        ("accuracy", "mAP50-95", 0.5, "Acme"),
        ("accuracy", "top-1", 0.9, None),
    ]
    assert (rows[0].split, rows[0].imgsz, rows[0].data_sha256, rows[0].unit) == ("test", 64, "d", None)


def test_a_record_is_kept_once_and_measured_again_twice(tmp_path: Path, place: Path) -> None:
    path = latency(tmp_path / "l.json", cell("a", 2.0))
    assert store.add(path, place) == store.add(path, place) == [1]
    assert store.add(path, place, prefix="run/") == [2]
    latency(path, cell("a", 2.0), day=2)
    assert store.add(path, place) == [3]
    told = latency(tmp_path / "m.json", cell("a", 2.0), measured_at="2026-11-01T14:00:00+02:00")
    store.add(told, place)
    assert [(row.id, row.time[8:13]) for row in store.find(place)] == [
        (1, "01T12"),
        (2, "01T12"),
        (4, "01T12"),
        (3, "02T12"),
    ]


@pytest.mark.parametrize(
    ("conditions", "found"),
    [
        ({}, [1, 2, 3]),
        ({"model": "ALPH"}, [1, 2]),
        ({"model": "%"}, []),
        ({"model": "' OR 1=1 --"}, []),
        ({"device": "acme"}, [1, 2, 3]),
        ({"device": "rpi"}, []),
        ({"runtime": "ncnn"}, [3]),
        ({"runtime": "ncn"}, []),
        ({"since": datetime(2026, 11, 2, 12)}, [2, 3]),
        ({"since": datetime(2026, 11, 2, 12), "runtime": "torch"}, [2]),
        ({"ids": [3, 1, 9]}, [1, 3]),
        ({"ids": []}, []),
        ({"model_sha256": "s"}, [2]),
    ],
)
def test_rows_are_found_by_all_conditions(
    tmp_path: Path, place: Path, conditions: dict[str, Any], found: list[int]
) -> None:
    store.add(latency(tmp_path / "1.json", cell("alpha", 2.0)), place)
    store.add(latency(tmp_path / "2.json", cell("alpha", 2.0, model_sha256="s"), day=2), place)
    store.add(latency(tmp_path / "3.json", COUNTED, day=3), place)
    assert [row.id for row in store.find(place, **conditions)] == found


def test_where_the_store_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ESPALIER_STORE", str(tmp_path / "mine.sqlite"))
    store.add(latency(tmp_path / "l.json", cell("a", 2.0)))
    assert [row.p50 for row in store.find(tmp_path / "mine.sqlite")] == [2.0]
    monkeypatch.delenv("ESPALIER_STORE")
    assert store.default_path() == Path("runs/espalier.sqlite")


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (
            lambda path: path.write_bytes(b"not a database, but a text that is long enough\n" * 9),
            "file is not a database",
        ),
        (lambda path: _database(path, "CREATE TABLE notes (text)"), "is the database of another program"),
        (lambda path: _database(path, "PRAGMA application_id = 7"), "is the database of another program"),
        (lambda path: _database(path, "PRAGMA user_version = 1"), "is the database of another program"),
        (lambda path: _ours(path, "PRAGMA user_version = 99"), "has schema 99, this version reads up to 2"),
        (lambda path: _ours(path, "DROP TABLE rows"), "no such table: rows"),
        (lambda path: _torn(path), "cannot be used as the store"),
        (lambda path: path.mkdir(), "unable to open database file"),
    ],
)
def test_a_file_that_is_no_store_is_refused_and_left_alone(tmp_path: Path, make: Any, complaint: str) -> None:
    path, record = tmp_path / "s.sqlite", latency(tmp_path / "l.json", cell("a", 2.0))
    make(path)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(RunError, match=r"choose another with --store or \$ESPALIER_STORE") as caught:
        store.add(record, path)
    assert complaint in str(caught.value)
    with pytest.raises(RunError, match=r"s\.sqlite"):
        store.find(path)
    assert before == (path.read_bytes() if path.is_file() else None)


def _database(path: Path, *statements: str) -> None:
    with sqlite3.connect(path) as connection:
        for statement in statements:
            connection.execute(statement)
    connection.close()


def _ours(path: Path, *statements: str) -> None:
    store.add(latency(path.with_name("other.json"), cell("b", 1.0)), path)
    _database(path, *statements)


def _torn(path: Path) -> None:
    _ours(path)
    content = path.read_bytes()
    path.write_bytes(content[:4096] + b"\xff" * (len(content) - 4096))


def test_a_store_that_is_not_there_is_not_made_by_reading(place: Path) -> None:
    with pytest.raises(RunError, match="does not exist: measure something first"):
        store.find(place)
    assert not place.parent.exists()


def test_a_damaged_record_is_named(tmp_path: Path, place: Path) -> None:
    store.add(latency(tmp_path / "l.json", cell("a", 2.0)), place)
    _database(place, "UPDATE records SET content = x'00'")
    (row,) = store.find(place)
    with pytest.raises(RunError, match="is damaged, the record of row 1"):
        store.record_of(row, place)


def test_an_earlier_store_is_migrated_with_all_its_rows(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.add(latency(tmp_path / "1.json", cell("a", 2.0)), place)
    later = (*store._MIGRATIONS, ("ALTER TABLE rows ADD COLUMN place TEXT", "UPDATE rows SET place = 'here'"))
    monkeypatch.setattr(store, "_MIGRATIONS", later)
    store.add(latency(tmp_path / "2.json", cell("b", 3.0)), place)
    with sqlite3.connect(place) as connection:
        assert connection.execute("SELECT model, place FROM rows").fetchall() == [("a", "here"), ("b", None)]
        assert connection.execute("PRAGMA user_version").fetchone() == (3,)
    connection.close()


def test_a_store_of_the_first_version_is_read(tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place.parent.mkdir()
    _database(
        place, *store._MIGRATIONS[0], f"PRAGMA application_id = {store.APPLICATION_ID}", "PRAGMA user_version = 1"
    )
    _database(
        place, "INSERT INTO rows (record, cell, kind, time, model, noisy) VALUES (1, 0, 'latency', 't', 'old', 0)"
    )
    store.add(latency(tmp_path / "l.json", cell("new", 2.0, file_bytes=6_200_000)), place)
    assert {row.model: row.file_bytes for row in store.find(place)} == {"old": None, "new": 6_200_000}


def test_a_migration_that_fails_changes_nothing(tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.add(latency(tmp_path / "1.json", cell("a", 2.0)), place)
    broken = (*store._MIGRATIONS, ("ALTER TABLE rows ADD COLUMN place TEXT", "UPDATE absent SET a = 1"))
    with monkeypatch.context() as patch:
        patch.setattr(store, "_MIGRATIONS", broken)
        with pytest.raises(RunError, match="no such table: absent"):
            store.find(place)
    assert [row.model for row in store.find(place)] == ["a"]


def test_a_record_that_fails_half_way_leaves_nothing(tmp_path: Path, place: Path) -> None:
    store.add(latency(tmp_path / "1.json", cell("a", 2.0)), place)
    with pytest.raises(RunError, match="too large"):
        store.add(latency(tmp_path / "2.json", cell("b", 2.0), cell("c", 2.0, batch=2**70)), place)
    assert [row.model for row in store.find(place)] == ["a"]


def test_halves_of_characters_are_kept_out(tmp_path: Path, place: Path) -> None:
    path = tmp_path / "l.json"
    store.add(latency(path, cell("a\ud800", 2.0)), place)
    assert store.find(place)[0].model == "a?"


def test_several_processes_write_at_once(tmp_path: Path, place: Path) -> None:
    """They all find no store, one makes it, and none loses a row."""
    paths = [latency(tmp_path / f"{i}.json", cell(f"m{i}", 1.0 + i)) for i in range(12)]
    code = """
import sys
from pathlib import Path
from benchmark import store
for path in sys.argv[2:]:
    store.add(Path(path), Path(sys.argv[1]))
"""
    root = str(Path(store.__file__).parents[1])
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, place, *paths[i::3]],
            env={**os.environ, "PYTHONPATH": root},
            stderr=subprocess.PIPE,
        )
        for i in range(3)
    ]
    assert [(process.communicate(timeout=60)[1], process.returncode) for process in started] == [(b"", 0)] * 3
    assert sorted(row.model for row in store.find(place)) == sorted(f"m{i}" for i in range(12))


def test_a_store_that_another_process_makes_just_now_is_no_foreign_one(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect, seen = sqlite3.connect, []

    class Interrupted(sqlite3.Connection):
        """Just before the version is asked for, another process makes the store."""

        def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
            if "user_version" in statement and not seen:
                seen.append(statement)
                with store._open(place, "rwc"):
                    pass
            return super().execute(statement, *values)

    monkeypatch.setattr(sqlite3, "connect", lambda *words, **more: connect(*words, factory=Interrupted, **more))
    with store._open(place, "rwc") as connection:
        assert connection.execute("SELECT count(*) FROM rows").fetchone() == (0,)
    assert seen


def test_a_store_that_stays_locked_is_one_line(tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = latency(tmp_path / "l.json", cell("a", 2.0))
    store.add(path, place)
    monkeypatch.setattr(store, "BUSY_S", 0.05)
    holder = sqlite3.connect(place, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(RunError, match="is in use by another process"):
        store.add(latency(path, cell("b", 2.0), day=2), place)
    assert len(store.find(place)) == 1  # readers need not wait
    holder.close()
