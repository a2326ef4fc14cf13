"""Folders with records of a benchmark: a pipeline's run, or what latency and accuracy wrote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmark import records
from compress import manifest
from compress.errors import RunError

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
        known = scores_of(accuracy) if accuracy.is_file() else None
        try:
            return of_pipeline(manifest.read_json(summary), manifest.read_json(latency), known)
        except (KeyError, TypeError, AttributeError) as error:
            raise RunError(f"{summary} is damaged or incomplete ({error!r}): run the pipeline again") from None
    places = [folder, *sorted(path for path in folder.iterdir() if path.is_dir() and not _is_set_aside(path))]
    found = [manifest.read_json(place / LATENCY) for place in places if (place / LATENCY).is_file()]
    for record in found:
        records.measurements(record, folder)
    known = [score for place in places if (place / ACCURACY).is_file() for score in scores_of(place / ACCURACY)]
    parity: dict[str, Any] = {}
    for place in places:
        if (place / PARITY).is_file() and isinstance(content := manifest.read_json(place / PARITY), dict):
            parity |= content
    return Source(name, None, found, known, parity) if found or known else None


def _is_set_aside(folder: Path) -> bool:
    """Tell whether a folder is NAME.1, NAME.2 … beside NAME: what a stage kept of other work, or of outdated one."""
    return folder.suffix[1:].isdecimal() and folder.with_suffix("").is_dir()


def of_pipeline(
    summary: dict[str, Any], record: dict[str, Any], known: Sequence[records.Score] | None = None
) -> Source:
    """Return what a pipeline left.

    Args:
        summary: its `summary.json`.
        record: its `latency.json`.
        known: the scores of its `accuracy.json`; without them those of its summary, taken in torch.
    """
    if known is None:
        runtimes = dict.fromkeys(cell.runtime for cell in records.measurements(record))
        taken = {side: dict.fromkeys(runtimes, summary[side]) for side in ("dense", "pruned")}
        context = {key: summary.get(key) for key in ("data", "split", "imgsz")}
        known = records.scores(taken, "the summary of a run", **context)
    return Source(summary["name"], summary, [record], known, summary.get("parity") or {})


def scores_of(accuracy: Path, **known: Any) -> list[records.Score]:
    """Return the scores of an `accuracy.json`; the manifest beside it knows what its entries do not say.

    Args:
        accuracy: the file.
        known: what the caller knows better than the manifest: data, split, imgsz.
    """
    path, context = accuracy.with_name(manifest.MANIFEST), {}
    if path.is_file():
        stage = manifest.read_json(path)
        manifest.check_schema(stage, path)
        config, parents = (stage.get(part) or {} for part in ("config", "parents"))
        if not (isinstance(config, dict) and isinstance(parents, dict)):
            raise RunError(f"{path} is damaged, its 'config' or 'parents' is wrong: delete the folder and run again")
        context = {key: config.get(key) for key in ("split", "imgsz")} | {"data_sha256": parents.get("data")}
        if isinstance(data := config.get("data"), str):
            context["data"] = Path(data).name
    return records.scores(manifest.read_json(accuracy), accuracy, **(context | known))
