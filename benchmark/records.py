"""Records of latency and accuracy, checked and read as rows, one for each model and runtime.

What a report draws, a comparison judges and the store keeps are these rows. Records come from other machines and from
earlier versions, so every value is checked, and what a record does not say stays None.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from compress import manifest
from compress.errors import RunError
from compress.tasks import SCORE_NAMES

_JUDGED_BY = ("map50_95", "top1")

Unit = Literal["ms", "instructions"]


@dataclass(frozen=True)
class Score:
    """How right a model is: `value` is a share, `metric` is mAP50-95 or top-1."""

    model: str
    model_sha256: str | None
    runtime: str | None
    metric: str
    value: float
    data: str | None = None
    data_sha256: str | None = None
    split: str | None = None
    imgsz: int | None = None
    images: int | None = None
    device: str | None = None


@dataclass(frozen=True)
class Layer:
    """What one layer of a model cost, in the unit of its measurement."""

    name: str
    type: str
    cost: float


@dataclass(frozen=True)
class Measurement:
    """What one query of a model cost on one runtime: milliseconds, or instructions where an emulator counted them.

    `device` tells devices apart, see `device_key`; `device_name` is the name of a file of configs/devices.
    `rounds` holds all samples; those of one round were taken together. Measurements of one `record` whose rounds are
    as many were interleaved. `layers_share` is the share of a query that all `layers` are together.
    """

    record: str
    model: str
    model_sha256: str | None
    device: str | None
    device_name: str | None
    runtime: str
    runtime_version: str | None
    precision: str | None
    threads: int | None
    imgsz: int | None
    batch: int | None
    mode: str | None
    unit: Unit
    p50: float
    p90: float | None
    p99: float | None
    interval: tuple[float, float] | None
    queries: int | None
    cold_start_ms: float | None
    peak_memory_bytes: int | None
    file_bytes: int | None
    rounds: Sequence[Sequence[float]]
    layers: Sequence[Layer]
    noisy: bool
    layers_share: float | None = None
    layers_left_out: str | None = None
    streams: int = 1


class _Lenient(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


_Known = TypeVar("_Known", bound=_Lenient)


class _Layer(_Lenient):
    name: str
    type: str = ""
    ms: float | None = Field(default=None, ge=0)
    instructions: float | None = Field(default=None, ge=0)


class _Cell(_Lenient):
    model: str
    runtime: str
    runtime_version: str | None = None
    precision: str | None = None
    model_sha256: str | None = None
    threads: int | None = None
    imgsz: int | None = None
    batch: int | None = None
    streams: int = Field(default=1, ge=1)
    unit: Unit = "ms"
    p50_ms: float | None = Field(default=None, gt=0)
    p90_ms: float | None = None
    p99_ms: float | None = None
    intervals: dict[str, tuple[float, float]] = {}
    queries: int | None = None
    cold_start_ms: float | None = None
    peak_memory_bytes: int | None = None
    file_bytes: int | None = None
    samples_ms: list[list[float]] = []
    instructions: list[float] = []
    layers: list[_Layer] | None = None
    layers_share: float | None = None
    layers_left_out: str | None = None


class _Protocol(_Lenient):
    threads: int | None = None
    imgsz: int | None = None
    batch: int | None = None
    mode: str | None = None


class _Latency(_Lenient):
    cells: list[_Cell] = Field(min_length=1)
    device: dict[str, Any] = {}
    protocol: _Protocol = _Protocol()
    noisy: bool = False


class _Accuracy(_Lenient):
    model: str
    model_sha256: str | None = None
    runtime: str | None = None
    map50_95: float | None = Field(default=None, ge=0, le=1)
    top1: float | None = Field(default=None, ge=0, le=1)
    data: str | None = None
    data_sha256: str | None = None
    split: str | None = None
    imgsz: int | None = None
    images: int | None = None
    device: str | dict[str, Any] | None = None


def measurements(record: Any, where: object = "the record") -> list[Measurement]:
    """Return the measurements of a latency record, in its order.

    Args:
        record: content of a `latency.json`.
        where: names the record in an error.

    Raises:
        RunError: it is not a latency record.
    """
    checked = _parse(_Latency, record, where)
    identity = manifest.sha256_json(record)
    return [_measurement(cell, checked, identity, where) for cell in checked.cells]


def scores(record: Any, where: object = "the record", **known: Any) -> list[Score]:
    """Return the scores of an accuracy record; one without a metric that is known here is left out.

    Args:
        record: content of an `accuracy.json`: a list, or that of a pipeline, {model: {runtime: entry}}.
        where: names the record in an error.
        known: what the entries themselves do not say: data, data_sha256, split, imgsz.

    Raises:
        RunError: it is not an accuracy record.
    """
    if isinstance(record, dict):
        if not all(isinstance(entries, dict) for entries in record.values()):
            raise RunError(f"{where} is not an accuracy record: give the accuracy.json of a benchmark")
        record = [
            {**entry, "model": model, "runtime": runtime} if isinstance(entry, dict) else entry
            for model, entries in record.items()
            for runtime, entry in entries.items()
        ]
    if not isinstance(record, list):
        raise RunError(f"{where} is not an accuracy record: give the accuracy.json of a benchmark")
    found = []
    for item in record:
        entry = _parse(_Accuracy, {**known, **item} if isinstance(item, dict) else item, where)
        metric = next((key for key in _JUDGED_BY if getattr(entry, key) is not None), None)
        if metric is not None:
            rest = entry.model_dump(exclude={"map50_95", "top1", "device"})
            device = device_key(entry.device) if isinstance(entry.device, dict) else entry.device
            found.append(Score(metric=SCORE_NAMES[metric], value=getattr(entry, metric), device=device, **rest))
    return found


def device_key(device: dict[str, Any]) -> str | None:
    """Return what tells one device from another, and stays the same when its system is updated.

    The name "cpu" is left out: it may be any, and so is the GPU that stands idle in it.

    >>> device_key({"cpu": "AMD EPYC", "architecture": "x86_64", "cores": 2, "kernel": "Linux 6"})
    'AMD EPYC, x86_64, 2 cores'
    """
    cores, is_cpu = device.get("cores"), device.get("name") == "cpu"
    parts = [device.get(key) for key in (("cpu",) if is_cpu else ("name", "cpu", "gpu"))]
    parts.append(device.get("architecture"))
    if cores is not None:
        parts.append(f"{cores} cores" if cores != 1 else "1 core")
    return ", ".join(str(part) for part in parts if part) or None


def score_of(measured: Measurement, known: Iterable[Score]) -> Score | None:
    """Return the score of the very file that was measured; None where no score says that it is of it.

    Files are known by their sha256, and in a score of a pipeline, which has none, by model and runtime. An image size
    that both tell must be the same, because mAP depends on it, and so must the device. Of several the one of the very
    runtime is taken.
    """
    found: Score | None = None
    for score in known:
        if None not in (score.device, measured.device_name) and score.device != measured.device_name:
            continue
        if score.model_sha256 is None:
            same = (score.model, score.runtime) == (measured.model, measured.runtime)
        else:
            same = score.model_sha256 == measured.model_sha256
        if same and (None in (score.imgsz, measured.imgsz) or score.imgsz == measured.imgsz):
            if score.runtime == measured.runtime:
                return score
            found = found or score
    return found


def _measurement(cell: _Cell, record: _Latency, identity: str, where: object) -> Measurement:
    from benchmark import statistics

    protocol = record.protocol
    rounds: list[list[float]] = [samples for samples in cell.samples_ms if samples]
    p50, p90, p99, interval = cell.p50_ms, cell.p90_ms, cell.p99_ms, cell.intervals.get("p50_ms")
    if cell.unit == "instructions":
        rounds = [[count] for count in cell.instructions]
        if rounds:
            values, intervals = statistics.summarise(rounds, 0)
            p50, p90, p99, interval = *(values[f"p{n}_ms"] for n in (50, 90, 99)), intervals["p50_ms"]
    if p50 is None:
        raise RunError(f"{where}: '{cell.model}' on {cell.runtime} has no {cell.unit}: measure it again")
    return Measurement(
        record=identity,
        model=cell.model,
        model_sha256=cell.model_sha256,
        device=device_key(record.device),
        device_name=record.device.get("name"),
        # Latency under load is another thing: nowhere it may meet that of a single stream.
        runtime=cell.runtime if cell.streams == 1 else f"{cell.runtime}, {cell.streams} streams",
        runtime_version=cell.runtime_version,
        precision=cell.precision,
        threads=protocol.threads if cell.threads is None else cell.threads,
        imgsz=protocol.imgsz if cell.imgsz is None else cell.imgsz,
        batch=protocol.batch if cell.batch is None else cell.batch,
        mode=protocol.mode,
        unit=cell.unit,
        p50=p50,
        p90=p90,
        p99=p99,
        interval=None if interval is None else (interval[0], interval[1]),
        queries=cell.queries if cell.queries is not None else sum(map(len, rounds)) or None,
        cold_start_ms=cell.cold_start_ms,
        peak_memory_bytes=cell.peak_memory_bytes,
        file_bytes=cell.file_bytes,
        rounds=rounds,
        layers=_layers(cell),
        noisy=record.noisy,
        layers_share=cell.layers_share,
        layers_left_out=cell.layers_left_out,
        streams=cell.streams,
    )


def _layers(cell: _Cell) -> list[Layer]:
    """Return the layers whose cost is known in the unit of the cell."""
    costs = [(layer, getattr(layer, cell.unit)) for layer in cell.layers or []]
    return [Layer(layer.name, layer.type, cost) for layer, cost in costs if cost is not None]


def _parse(kind: type[_Known], value: Any, where: object) -> _Known:
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "content"
        raise RunError(f"{where} is not a record of a benchmark: {place}: {first['msg']}") from None
