"""Is B better than A? A verdict on two measured models, with an exit code for CI."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmark import sources, statistics, store, wording
from benchmark.records import Measurement, Score, measurements, score_of
from compress import manifest
from compress.errors import BenchmarkError, SettingsError, printable, run_app

MAP_TOLERANCE = 0.005
_HEADLINE = "onnxruntime"
# What must be the same, where both are known, for a difference to come from the models.
_COST_SETTINGS = ("device", "precision", "threads", "imgsz", "batch", "unit")
_SCORE_SETTINGS = ("metric", "data_sha256", "split", "imgsz")


@dataclass(frozen=True)
class Candidate:
    """One model on one runtime: what it costs, how right it is, or both."""

    model: str
    runtime: str
    cost: Measurement | None
    score: Score | None


@dataclass(frozen=True)
class Verdict:
    """Whether B is better than A, and by what; null is what was not measured.

    `speedup` is p50 of A over p50 of B, in `unit`; `paired` tells whether both were measured in turns. `score_change`
    is the score of B minus that of A.
    """

    better: bool
    reason: str
    runtime: str
    device: str | None
    unit: str | None
    p50: tuple[float, float] | None
    speedup: float | None
    interval: tuple[float, float] | None
    paired: bool | None
    metric: str | None
    scores: tuple[float, float] | None
    score_change: float | None
    map_tolerance: float
    remarks: tuple[str, ...]


def judge(a: Candidate, b: Candidate, map_tolerance: float = MAP_TOLERANCE, seed: int = 0) -> Verdict:
    """Judge whether B is better than A.

    Better is faster, the whole interval of the speed-up above 1, with a score that is not lower by more than
    `map_tolerance`; or a score that is higher by more than that without being slower beyond the interval. What neither
    of them knows is not judged.

    Raises:
        BenchmarkError: they were measured differently, or only one of them was.
    """
    _check_alike(a, b)
    low = high = 1.0
    speedup = interval = paired = p50 = change = values = None
    if a.cost and b.cost:
        paired = a.cost.record == b.cost.record and len(a.cost.rounds) == len(b.cost.rounds)
        compare = statistics.speedup if paired else statistics.unpaired_speedup
        speedup, (low, high) = compare(a.cost.rounds, b.cost.rounds, seed)
        interval, p50 = (low, high), (a.cost.p50, b.cost.p50)
    if a.score and b.score:
        values = (a.score.value, b.score.value)
        change = round(values[1] - values[0], 9)  # 0.605 − 0.6 is not more than 0.005
    more, fewer = ("faster", "slower") if a.cost is None or a.cost.unit == "ms" else ("cheaper", "dearer")
    speed = None if speedup is None else more if low > 1.0 else fewer if high < 1.0 else f"not measurably {more}"
    is_worse, is_right = (change or 0.0) < -map_tolerance, (change or 0.0) > map_tolerance
    accuracy = "less accurate" if is_worse else "more accurate" if is_right else "as accurate"
    better = (low > 1.0 and not is_worse) or (is_right and high >= 1.0)
    opposed = (low > 1.0 and is_worse) or (high < 1.0 and is_right)
    reason = (" but " if opposed else " and ").join(filter(None, (speed, None if change is None else accuracy)))
    return Verdict(
        better=better,
        reason=reason,
        runtime=b.runtime,
        device=b.cost.device if b.cost else None,
        unit=b.cost.unit if b.cost else None,
        p50=p50,
        speedup=speedup,
        interval=interval,
        paired=paired,
        metric=b.score.metric if b.score else None,
        scores=values,
        score_change=change,
        map_tolerance=map_tolerance,
        remarks=tuple(_remarks(a, b)),
    )


def candidates(text: str, place: Path | None = None) -> tuple[list[Candidate], str | None]:
    """Return what may be meant by FOLDER, FOLDER:MODEL or the id of a row in the store, and the model if it is told.

    Of a pipeline's run its pruned model is meant, where no other is named.

    Args:
        text: as the user gave it.
        place: the store.

    Raises:
        BenchmarkError: it is none of these, or holds no record.
    """
    path, model = Path(text), None
    if not path.exists() and text.isdecimal():
        return [_stored(int(text), place)], None
    if not path.exists() and ":" in text:
        folder, _, model = text.rpartition(":")
        path = Path(folder)
    if not path.exists():
        raise BenchmarkError(f"{text} is neither a folder nor the id of a row in the store: check it")
    source = sources.read(path)
    if source is None:
        raise BenchmarkError(f"{path} holds no latency.json and no accuracy.json: give a folder of a benchmark")
    found, used = [], set()
    for cost in (cell for record in source.records for cell in measurements(record, path)):
        score = score_of(cost, source.scores)
        used.add(id(score))
        found.append(Candidate(cost.model, cost.runtime, cost, score))
    found += [Candidate(s.model, s.runtime or "", None, s) for s in source.scores if id(s) not in used]
    return found, model or ("pruned" if source.summary else None)


def choose(a: str, b: str, runtime: str | None, place: Path | None) -> tuple[Candidate, Candidate]:
    """Return the two that A and B mean, on a runtime that both were measured on: onnxruntime, if there are several.

    Raises:
        BenchmarkError: what is meant is not clear, or no runtime is common to both.
    """
    sides = []
    for text in (a, b):
        found, model = candidates(text, place)
        models = list(dict.fromkeys(item.model for item in found))
        if model is None and len(models) > 1:
            raise BenchmarkError(f"{text} holds {', '.join(models)}: name one, such as {text}:{models[0]}")
        if model is not None and model not in models:
            raise BenchmarkError(f"{text} holds no model '{model}': name one of {', '.join(models)}")
        sides.append([item for item in found if model is None or item.model == model])
    known = [list(dict.fromkeys(item.runtime for item in side)) for side in sides]
    common = [name for name in known[0] if name in known[1] and runtime in (None, name)]
    if not common:
        wanted = "" if runtime is None else f", not both in {runtime}"
        raise BenchmarkError(
            f"runtime is {' or '.join(known[0])} of {a} and {' or '.join(known[1])} of {b}{wanted}: measure both alike"
        )
    chosen = _HEADLINE if _HEADLINE in common else common[0]
    picked = []
    for text, side in zip((a, b), sides, strict=True):
        fitting = [item for item in side if item.runtime == chosen]
        fitting = [item for item in fitting if item.cost] or fitting
        if len(fitting) > 1:
            raise BenchmarkError(
                f"{text} holds {len(fitting)} records of {fitting[0].model} in {chosen}: name a folder that holds one, "
                "or a row of the store"
            )
        picked.append(fitting[0])
    return picked[0], picked[1]


def _stored(number: int, place: Path | None) -> Candidate:
    rows = store.find(place, ids=[number])
    if not rows:
        raise BenchmarkError(f"the store has no row {number}: python -m benchmark.history lists them")
    row = rows[0]
    if row.kind == "accuracy":
        return Candidate(row.model, row.runtime or "", None, _score(row))
    cost = measurements(store.record_of(row, place), f"row {number} of the store")[row.cell]
    of_file = store.find(place, model_sha256=row.model_sha256) if row.model_sha256 else []
    scored = [_score(other) for other in reversed(of_file) if other.kind == "accuracy"]
    return Candidate(row.model, row.runtime or "", cost, score_of(cost, scored))


def _score(row: store.Row) -> Score:
    names = ("model", "model_sha256", "runtime", "data", "data_sha256", "split", "imgsz", "device")
    known = {name: getattr(row, name) for name in names}
    return Score(metric=row.metric or "", value=row.score or 0.0, **known)


def _check_alike(a: Candidate, b: Candidate) -> None:
    if a.runtime != b.runtime:
        raise BenchmarkError(f"A and B cannot be compared: runtime is {a.runtime} and {b.runtime}: measure both alike")
    different = []
    hashed = a.score and b.score and None not in (a.score.data_sha256, b.score.data_sha256)
    for what, one, other, settings in (
        ("latency", a.cost, b.cost, _COST_SETTINGS),
        # The name of the data only where its hash does not tell: copies bear other names.
        ("score", a.score, b.score, _SCORE_SETTINGS if hashed else (*_SCORE_SETTINGS, "data")),
    ):
        if (one is None) != (other is None):
            raise BenchmarkError(
                f"the {what} of {'A' if one is None else 'B'} is not known: measure it, or name a folder that has it"
            )
        different += [
            f"{name} of the {what} is {first} and {second}"
            for name in settings
            if None not in (first := getattr(one, name, None), second := getattr(other, name, None)) and first != second
        ]
    if different:
        raise BenchmarkError(f"A and B cannot be compared: {'; '.join(different)}: measure both alike")
    for name, item in (("A", a), ("B", b)):
        if item.cost and not item.cost.rounds:
            raise BenchmarkError(f"the latency of {name} was kept without its samples: measure it again")


def _remarks(a: Candidate, b: Candidate) -> list[str]:
    remarks = []
    if a.score is None:
        remarks.append("accuracy is known of neither, and not judged")
    elif b.score is not None and a.score.value == b.score.value == 0:
        remarks.append(f"{a.score.metric} is 0 for both: neither finds anything, so it says nothing")
    if not a.cost or not b.cost:
        return [*remarks, "latency is known of neither, and not judged"]
    if a.cost.runtime_version != b.cost.runtime_version:
        remarks.append(f"version of {a.runtime}: {a.cost.runtime_version} of A, {b.cost.runtime_version} of B")
    remarks += [f"{name} was noisy" for name, cost in (("A", a.cost), ("B", b.cost)) if cost.noisy]
    remarks += [
        f"{name} was measured quickly, for development"
        for name, cost in (("A", a.cost), ("B", b.cost))
        if cost.mode == "quick" and cost.unit == "ms"  # instructions are the same on every day
    ]
    return remarks


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    a: Annotated[
        str, typer.Argument(metavar="A", help="folder of a run or a benchmark, FOLDER:MODEL, or an id of the store")
    ],
    b: Annotated[str, typer.Argument(metavar="B", help="the same for what should be better")],
    runtime: Annotated[str | None, typer.Option(help="onnxruntime when not given, if both have it")] = None,
    map_tolerance: Annotated[float, typer.Option(min=0, help="loss of mAP that counts as none")] = MAP_TOLERANCE,
    json: Annotated[Path | None, typer.Option(help="write the verdict to this file")] = None,
    place: Annotated[Path | None, typer.Option("--store", help="the store of the ids")] = None,
) -> None:
    """Say whether B is better than A: faster and as accurate, or more accurate and not slower. If not, exit with 1."""
    if json is not None and json.is_dir():
        raise SettingsError(f"--json {json} is a folder: name a file")
    one, other = choose(a, b, runtime, place)
    verdict = judge(one, other, map_tolerance)
    if json is not None:
        json.parent.mkdir(parents=True, exist_ok=True)
        content = {"schema": 1, "a": _facts(a, one), "b": _facts(b, other), **asdict(verdict)}
        manifest.write_json(json, content)
    for line in _lines(a, b, one, other, verdict):
        print(printable(line))
    if not verdict.better:
        raise typer.Exit(1)


def _facts(text: str, item: Candidate) -> dict[str, Any]:
    known = item.cost or item.score
    return {"given": text, "model": item.model, "model_sha256": known.model_sha256 if known else None}


def _lines(a: str, b: str, one: Candidate, other: Candidate, verdict: Verdict) -> Sequence[str]:
    where = f"{verdict.runtime} on {verdict.device or 'an unknown device'}" if one.cost else verdict.runtime
    lines = [f"A        {a}, {one.model}", f"B        {b}, {other.model}", f"in       {where}"]
    if verdict.p50 and verdict.speedup and verdict.interval:
        how = "measured in turns, paired interval" if verdict.paired else "measured apart, unpaired interval"
        shown = [wording.cost(value, verdict.unit) for value in verdict.p50]
        ratio = f"{verdict.speedup:.3f}× (95 %: {verdict.interval[0]:.3f}–{verdict.interval[1]:.3f}; {how})"
        lines.append(f"p50      {shown[0]} → {shown[1]}, {ratio}")
    if verdict.scores:
        values = " → ".join(f"{value:.4f}" for value in verdict.scores)
        lines.append(f"{verdict.metric:<8} {values}, {wording.difference(*verdict.scores)}")
    lines += [f"note     {remark}" for remark in verdict.remarks]
    return [*lines, f"verdict  B is {'better' if verdict.better else 'not better'}: it is {verdict.reason}"]


if __name__ == "__main__":
    run_app(app)
