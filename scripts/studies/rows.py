"""The record of a study that grows row by row: a row takes the place of the older one of the same thing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compress import manifest

Row = Mapping[str, Any]


def read(path: Path) -> list[Any]:
    """Return the rows of a record; none where it is not there yet."""
    return manifest.read_json(path)["rows"] if path.exists() else []


def find(rows: Sequence[Any], row: Row, keys: Sequence[str]) -> Any | None:
    """Return the row that is equal to another one in all keys; None where there is none."""
    return next((other for other in rows if _same(other, row, keys)), None)


def store(path: Path, row: Row, keys: Sequence[str], heading: Row) -> None:
    """Write a record with a row in the place of that of the same keys; rows are in the order of their keys.

    Args:
        path: of the record, which may not be there yet.
        row: the new one.
        keys: in which a row is the same.
        heading: what the record says beside its rows.
    """
    rows = [row, *(other for other in read(path) if not _same(other, row, keys))]
    rows.sort(key=lambda other: [str(other[key]) for key in keys])
    path.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_json(path, {"schema": 1, **heading, "rows": rows})


def _same(one: Row, other: Row, keys: Sequence[str]) -> bool:
    return all(one[key] == other[key] for key in keys)
