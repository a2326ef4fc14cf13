"""The store: one SQLite file with a row for every latency cell and every score that was ever measured here.

Several processes may write at once. A file that is damaged, foreign or of a later version is refused, never touched.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmark import records, sources
from compress import manifest
from compress.errors import RunError

VARIABLE = "ESPALIER_STORE"
NAME = "espalier.sqlite"
BUSY_S = 30.0
APPLICATION_ID = 0x4573706C  # "Espl", in the header of the file
LARGEST_RECORD_BYTES = 1 << 28
_OTHER = f"choose another with --store or ${VARIABLE}"  # benchmark.latency and accuracy have no such option
# From version n to n + 1. A store has the version that is the length of this list.
_MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        "CREATE TABLE records (id INTEGER PRIMARY KEY, sha256 TEXT NOT NULL UNIQUE, content BLOB NOT NULL)",
        """CREATE TABLE rows (
            id INTEGER PRIMARY KEY, record INTEGER NOT NULL REFERENCES records (id), cell INTEGER NOT NULL,
            kind TEXT NOT NULL, time TEXT NOT NULL, model TEXT NOT NULL, model_sha256 TEXT, device TEXT, runtime TEXT,
            runtime_version TEXT, precision TEXT, threads INTEGER, imgsz INTEGER, batch INTEGER, mode TEXT, unit TEXT,
            p50 REAL, low REAL, high REAL, metric TEXT, score REAL, data TEXT, data_sha256 TEXT, split TEXT,
            noisy INTEGER NOT NULL)""",
        "CREATE INDEX rows_by_file ON rows (model_sha256)",
        "CREATE INDEX rows_by_time ON rows (time, id)",
    ),
    ("ALTER TABLE rows ADD COLUMN file_bytes INTEGER",),
)


@dataclass(frozen=True)
class Row:
    """One latency cell (`p50` and its interval, `low` to `high`, in `unit`) or one score (`metric`, `score`).

    `cell` is its place in the record, `time` when it was measured, in UTC.
    """

    id: int
    record: int
    cell: int
    kind: str
    time: str
    model: str
    model_sha256: str | None = None
    device: str | None = None
    runtime: str | None = None
    runtime_version: str | None = None
    precision: str | None = None
    threads: int | None = None
    imgsz: int | None = None
    batch: int | None = None
    mode: str | None = None
    unit: str | None = None
    p50: float | None = None
    low: float | None = None
    high: float | None = None
    metric: str | None = None
    score: float | None = None
    data: str | None = None
    data_sha256: str | None = None
    split: str | None = None
    file_bytes: int | None = None
    noisy: bool = False


_COLUMNS = [field.name for field in fields(Row)]


def default_path() -> Path:
    """Return where the store is: $ESPALIER_STORE, or runs/espalier.sqlite."""
    return Path(os.environ.get(VARIABLE) or Path("runs") / NAME)


def add(path: Path, store: Path | None = None, *, prefix: str = "") -> list[int]:
    """Keep the record of a file and return the ids of its rows; the same file twice is kept once.

    When it was measured is `measured_at` of a latency record, else when the file was written.

    Args:
        path: `latency.json` or `accuracy.json` of a benchmark.
        store: the store; made if it is not there.
        prefix: goes before the names of its models, such as "bccd/".

    Raises:
        RunError: the file is no record, or the store is damaged, foreign, of a later version, or locked for long.
    """
    content = manifest.read_json(path)
    written = datetime.fromtimestamp(path.stat().st_mtime, timezone.utc)
    if isinstance(content, dict) and "cells" in content:
        written = _moment(content.get("measured_at"), path) or written
        found = [_of_latency(item) for item in records.measurements(content, path)]
    else:
        found = [_of_score(item) for item in sources.scores_of(path)]
    time = written.isoformat(timespec="seconds")
    identity = manifest.sha256_json([prefix, time, content])
    packed = zlib.compress(json.dumps(content, separators=(",", ":")).encode(), 9)
    with _open(store or default_path(), "rwc") as connection:
        connection.execute("BEGIN IMMEDIATE")
        known = connection.execute("SELECT id FROM records WHERE sha256 = ?", (identity,)).fetchone()
        if known is None:
            values = (identity, packed)
            record = connection.execute("INSERT INTO records (sha256, content) VALUES (?, ?)", values).lastrowid
            for cell, item in enumerate(found):
                row = {**item, "record": record, "cell": cell, "time": time, "model": prefix + item["model"]}
                names, marks = ", ".join(row), ", ".join("?" * len(row))  # our own names, no one else's
                connection.execute(f"INSERT INTO rows ({names}) VALUES ({marks})", _storable(row.values()))  # noqa: S608
        else:
            record = known[0]
        ids = [row[0] for row in connection.execute("SELECT id FROM rows WHERE record = ? ORDER BY id", (record,))]
        connection.execute("COMMIT")
    return ids


def find(
    store: Path | None = None,
    *,
    model: str | None = None,
    device: str | None = None,
    runtime: str | None = None,
    since: datetime | None = None,
    ids: Sequence[int] | None = None,
    model_sha256: str | None = None,
) -> list[Row]:
    """Return the rows that all given conditions hold for, the earliest first.

    Args:
        store: the store.
        model: part of the model's name, whatever its case.
        device: part of the device's name, whatever its case.
        runtime: the whole name of the runtime.
        since: the earliest time; UTC where it has no zone.
        ids: the rows themselves.
        model_sha256: of the model file.

    Raises:
        RunError: there is no store, or it cannot be read.
    """
    conditions: list[tuple[str, Any]] = [
        ("instr(lower(model), lower(?))", model),
        ("instr(lower(device), lower(?))", device),
        ("runtime = ?", runtime),
        ("time >= ?", None if since is None else utc(since).isoformat(timespec="seconds")),
        ("id IN (SELECT value FROM json_each(?))", None if ids is None else json.dumps(list(ids))),
        ("model_sha256 = ?", model_sha256),
    ]
    given = [(text, value) for text, value in conditions if value is not None]
    where = " AND ".join(text for text, _ in given) or "1"
    query = f"SELECT {', '.join(_COLUMNS)} FROM rows WHERE {where} ORDER BY time, id"  # noqa: S608  (our own words)
    with _open(store or default_path(), "rw") as connection:
        rows = connection.execute(query, [value for _, value in given]).fetchall()
    return [Row(*row[:-1], noisy=bool(row[-1])) for row in rows]


def record_of(row: Row, store: Path | None = None) -> Any:
    """Return the whole record that a row comes from.

    Raises:
        RunError: the store cannot be read or is damaged there.
    """
    path = store or default_path()
    with _open(path, "rw") as connection:
        found = connection.execute("SELECT content FROM records WHERE id = ?", (row.record,)).fetchone()
    try:
        return json.loads(zlib.decompressobj().decompress(found[0], LARGEST_RECORD_BYTES))
    except (zlib.error, ValueError, TypeError):
        raise RunError(f"{path} is damaged, the record of row {row.id} cannot be read: {_OTHER}") from None


@contextmanager
def _open(path: Path, mode: str) -> Iterator[sqlite3.Connection]:
    """Yield a connection to a store of our schema; what went wrong is one line, and nothing is written then."""
    if mode == "rwc":
        path.parent.mkdir(parents=True, exist_ok=True)
    elif not path.is_file():
        raise RunError(f"{path} does not exist: measure something first, or {_OTHER}")
    try:
        # Without isolation_level, transactions are ours. The rollback journal needs no shared memory, unlike WAL.
        uri = f"{path.resolve().as_uri()}?mode={mode}"
        with closing(sqlite3.connect(uri, uri=True, timeout=BUSY_S, isolation_level=None)) as connection:
            _prepare(connection, path)
            yield connection
    except (sqlite3.Error, OverflowError) as error:
        if "locked" in str(error):
            raise RunError(f"{path} is in use by another process for {BUSY_S:g} s now: try again later") from None
        raise RunError(f"{path} cannot be used as the store ({error}): {_OTHER}") from None


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    """Bring a store to our schema: make a new one, or migrate an earlier one, in one step.

    Raises:
        RunError: it is something else, or of a later version.
    """
    if _version(connection, path) == len(_MIGRATIONS):
        return
    connection.execute("BEGIN IMMEDIATE")
    for statements in _MIGRATIONS[_version(connection, path) :]:  # another process may have been here meanwhile
        for statement in statements:
            connection.execute(statement)
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {len(_MIGRATIONS)}")
    connection.execute("COMMIT")


def _version(connection: sqlite3.Connection, path: Path) -> int:
    # In one statement, which sees one state of the file: another process may be making the store just now.
    application, version, tables = connection.execute(
        "SELECT application_id, user_version, (SELECT count(*) FROM sqlite_master) "
        "FROM pragma_application_id, pragma_user_version"
    ).fetchone()
    if application != APPLICATION_ID and (application, version, tables) != (0, 0, 0):
        raise RunError(f"{path} is the database of another program: {_OTHER}")
    if version > len(_MIGRATIONS):
        raise RunError(
            f"{path} has schema {version}, this version reads up to {len(_MIGRATIONS)}: update Espalier, or {_OTHER}"
        )
    return version


def _of_latency(item: records.Measurement) -> dict[str, Any]:
    low, high = item.interval or (None, None)
    names = ("model", "model_sha256", "device", "runtime", "runtime_version", "precision", "threads", "imgsz", "batch")
    values = {name: getattr(item, name) for name in (*names, "mode", "unit", "p50", "file_bytes")}
    return {**values, "kind": "latency", "low": low, "high": high, "noisy": int(item.noisy)}


def _of_score(item: records.Score) -> dict[str, Any]:
    names = ("model", "model_sha256", "device", "runtime", "metric", "imgsz", "data", "data_sha256", "split")
    return {**{name: getattr(item, name) for name in names}, "kind": "accuracy", "score": item.value, "noisy": 0}


def _storable(values: Iterable[Any]) -> list[Any]:
    """Return values without the halves of characters that JSON may carry and a database may not."""
    return [value.encode(errors="replace").decode() if isinstance(value, str) else value for value in values]


def _moment(text: Any, path: Path) -> datetime | None:
    if text is None:
        return None
    try:
        return utc(datetime.fromisoformat(re.sub("Z$", "+00:00", text)))
    except (TypeError, ValueError):
        raise RunError(f"{path}: measured_at is not a time of ISO 8601: measure again") from None


def utc(moment: datetime) -> datetime:
    """Return a moment in UTC; one without a zone is meant so."""
    return moment.replace(tzinfo=timezone.utc) if moment.tzinfo is None else moment.astimezone(timezone.utc)
