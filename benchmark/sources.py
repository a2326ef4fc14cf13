"""Folders with records of a benchmark: a pipeline's run, or what latency and accuracy wrote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmark import records
from compress import manifest

LATENCY = "latency.json"
ACCURACY = "accuracy.json"
SUMMARY = "summary.json"
PARITY = "parity.json"
BENCHMARK = "06_benchmark"


@dataclass(frozen=True)
class Source:
    """What a folder holds: a pipeline's summary, if it is one, latency records, and scores.

    `parity` maps the name of an export to its parity record.
    """

    name: str
    summary: dict[str, Any] | None
    records: Sequence[dict[str, Any]]
    scores: Sequence[records.Score]
    parity: dict[str, Any]


def read(folder: Path) -> Source | None:
    """Return what a run folder, a folder of records or its folders one level down hold; None where there is none.

    Raises:
        RunError: a file in it is damaged or is no record.
    """
    if not folder.is_dir():
        return None
    name = folder.resolve().name
    summary, latency, accuracy = folder / SUMMARY, folder / BENCHMARK / LATENCY, folder / BENCHMARK / ACCURACY
    if summary.is_file() and latency.is_file():
        known = manifest.read_json(accuracy) if accuracy.is_file() else None
        return of_pipeline(manifest.read_json(summary), manifest.read_json(latency), known)
    places = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
    found = [manifest.read_json(place / LATENCY) for place in places if (place / LATENCY).is_file()]
    for record in found:
        records.measurements(record, folder)
    known = [score for place in places if (place / ACCURACY).is_file() for score in _scores_in(place)]
    parity: dict[str, Any] = {}
    for place in places:
        if (place / PARITY).is_file() and isinstance(content := manifest.read_json(place / PARITY), dict):
            parity |= content
    return Source(name, None, found, known, parity) if found or known else None


def of_pipeline(summary: dict[str, Any], record: dict[str, Any], accuracy: Any = None) -> Source:
    """Return what a pipeline left: its models are known by their names.

    Args:
        summary: its `summary.json`.
        record: its `latency.json`.
        accuracy: its `accuracy.json`; without it the scores are those of the summary, taken in torch.
    """
    if accuracy is None:
        runtimes = dict.fromkeys(cell.runtime for cell in records.measurements(record))
        accuracy = {side: dict.fromkeys(runtimes, summary[side]) for side in ("dense", "pruned")}
    context = {key: summary.get(key) for key in ("data", "split", "imgsz")}
    known = records.scores(accuracy, "the accuracy of a run", **context)
    return Source(summary["name"], summary, [record], known, summary.get("parity") or {})


def _scores_in(folder: Path) -> list[records.Score]:
    """Return the scores of a folder; its manifest knows what older entries do not say."""
    known: dict[str, Any] = {}
    if (folder / manifest.MANIFEST).is_file():
        stage = manifest.read_json(folder / manifest.MANIFEST)
        manifest.check_schema(stage, folder / manifest.MANIFEST)
        config, parents = stage.get("config") or {}, stage.get("parents") or {}
        known = {"split": config.get("split"), "imgsz": config.get("imgsz"), "data_sha256": parents.get("data")}
    return records.scores(manifest.read_json(folder / ACCURACY), folder / ACCURACY, **known)
