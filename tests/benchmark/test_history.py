from __future__ import annotations

import json
import os
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmark import history
from benchmark.store import Row

TIMED = Row(
    1, 1, 0, "latency", "t", "m", device="d", runtime="ncnn", threads=1, unit="ms", p50=10.0, low=9.9, high=10.1
)
SCORED = Row(1, 1, 0, "accuracy", "t", "m", runtime="ncnn", data_sha256="x", split="val", metric="mAP50-95", score=0.5)


def timed(number: int, p50: float, low: float | None = None, **more: Any) -> Row:
    return replace(TIMED, id=number, record=number, p50=p50, low=low or 0.99 * p50, high=1.01 * p50, **more)


def scored(number: int, score: float, **more: Any) -> Row:
    return replace(SCORED, id=number, record=number, score=score, **more)


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ([], []),
        ([timed(1, 10.0)], []),
        ([timed(1, 10.0), timed(2, 11.0)], [(2, 1)]),
        ([timed(1, 10.0), timed(2, 11.0, low=10.3)], []),  # not by more than 3 %
        ([timed(1, 10.0), timed(2, 11.0, low=10.31)], [(2, 1)]),
        ([timed(1, 11.0), timed(2, 10.0)], []),
        ([timed(1, 10.0), timed(2, 12.0), timed(3, 10.1)], []),  # only the newest is judged
        ([timed(1, 12.0), timed(2, 10.0), timed(3, 12.0)], [(3, 2)]),  # against the best, not the last
        ([timed(1, 10.0), timed(2, 11.0, runtime_version="2")], [(2, 1)]),  # an update is no excuse
        ([timed(1, 10.0), timed(2, 20.0, device="e")], []),
        ([timed(1, 10.0), timed(2, 20.0, threads=2)], []),
        ([timed(1, 10.0), timed(2, 20.0, precision="fp16")], []),
        ([timed(1, 10.0), timed(2, 2e8, unit="instructions")], []),
        ([timed(1, 10.0), timed(2, 20.0, model="n")], []),
        ([scored(1, 0.5), scored(2, 0.495)], []),
        ([scored(1, 0.5), scored(2, 0.494)], [(2, 1)]),
        ([scored(1, 0.5), scored(2, 0.1, data_sha256="y")], []),
        ([scored(1, 0.5), scored(2, 0.1, split="test")], []),
    ],
)
def test_regressions(rows: list[Row], found: list[tuple[int, int]]) -> None:
    assert [(item.row.id, item.best.id) for item in history.regressions(rows)] == found


def test_the_tolerances_are_the_callers() -> None:
    rows = [timed(1, 10.0), timed(2, 11.0), scored(3, 0.5), scored(4, 0.48)]
    assert len(history.regressions(rows)) == 2
    assert history.regressions(rows, tolerance=0.1, map_tolerance=0.021) == []


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (None, 9_000_000, False),  # a record of an earlier version
        (6_200_000, 6_201_000, False),  # trained again
        (6_200_000, 12_500_000, True),
        (12_500_000, 6_200_000, True),
    ],
)
def test_another_model_of_the_same_name_is_told(before: int | None, after: int, said: bool) -> None:
    (item,) = history.regressions([timed(1, 10.0, file_bytes=before), timed(2, 20.0, file_bytes=after)])
    assert ("; another model under this name, " in history._complaint(item)) == said


def test_costs_keep_their_units() -> None:
    assert history.cost(timed(1, 10.0)) == "10.00 ms (9.90–10.10)"
    assert history.cost(timed(1, 0.3461, 0.3443)) == "0.346 ms (0.344–0.350)"
    assert history.cost(replace(TIMED, low=None)) == "10.00 ms"
    assert history.cost(replace(TIMED, unit="instructions", p50=2.24e8)) == "224 M instructions"
    assert history.cost(SCORED) == ""


# The command


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COLUMNS", "160")
    return tmp_path / "s.sqlite"


@pytest.fixture
def run(run_command: Any) -> Any:
    return partial(run_command, history.app)


def record(path: Path, p50_ms: float, day: int, **more: Any) -> Path:
    cell = {"model": "m", "runtime": "ncnn", "p50_ms": p50_ms, "intervals": {"p50_ms": [p50_ms - 0.1, p50_ms + 0.1]}}
    content = {"cells": [{**cell, **more}], "device": {"cpu": "Acme"}, "protocol": {"threads": 2, "imgsz": 64}}
    path.write_text(json.dumps(content))
    moment = datetime(2026, 11, day, 12, tzinfo=timezone.utc).timestamp()
    os.utime(path, (moment, moment))
    return path


def test_records_are_added_listed_and_filtered(
    run: Any, tmp_path: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = record(tmp_path / "l.json", 10.0, 1)
    assert run("add", path, "--run", "bccd", "--store", place) == 0
    assert run("--store", place, "add", record(path, 9.0, 2)) == 0
    assert f"history: {path} is kept as 2" in capsys.readouterr().out
    assert run("--store", place) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "Acme"
    assert "1 2026-11-01 12:00 bccd/m ncnn 2 threads, 64 px 10.00 ms (9.90–10.10)" in lines
    assert "2 2026-11-02 12:00 m ncnn 2 threads, 64 px 9.00 ms (8.90–9.10)" in lines
    assert run("--store", place, "--since", "2026-11-02") == 0
    assert "bccd/m" not in capsys.readouterr().out
    assert run("--store", place, "--device", "rpi5") == 0
    assert capsys.readouterr().out == "history: nothing that fits\n"


def test_two_rows_side_by_side(run: Any, tmp_path: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(
        "add",
        record(tmp_path / "1.json", 10.0, 1),
        record(tmp_path / "2.json", 5.0, 1, precision="fp16"),
        "--store",
        place,
    )
    capsys.readouterr()
    assert run("diff", 1, 2, "--store", place) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "precision – fp16" in lines
    assert "p50 10.0 5.0" in lines
    assert lines[-1] == "p50 of 2 is 0.500 times that of 1"
    assert run("diff", 1, 9, "--store", place) == 2
    assert "has no row 9" in capsys.readouterr().err


def test_a_latency_is_not_compared_with_a_score(
    run: Any, tmp_path: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "accuracy.json").write_text('[{"model": "m", "top1": 0.5}]')
    run("add", record(tmp_path / "1.json", 10.0, 1), tmp_path / "accuracy.json", "--store", place)
    assert run("diff", 1, 2, "--store", place) == 2
    assert "row 1 is of latency, row 2 of accuracy" in capsys.readouterr().err


def test_a_regression_is_exit_code_1(run: Any, tmp_path: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("add", record(tmp_path / "1.json", 10.0, 1, runtime_version="1", file_bytes=4000), "--store", place)
    assert run("check", "--store", place) == 0
    assert "no regression in 0 series" in capsys.readouterr().out
    run("add", record(tmp_path / "2.json", 12.0, 2, runtime_version="2", file_bytes=5000), "--store", place)
    assert run("check", "--store", place) == 1
    out = capsys.readouterr().out
    assert "m on ncnn, 2 threads, 64 px, Acme: p50 12.00 ms (11.90–12.10) is 1.20 times the best before" in out
    other = "another model under this name, 4 kB → 5 kB: name its file otherwise if it is no successor"
    assert f"(rows 1 and 2; 1 → 2; {other})" in out
    assert run("check", "--tolerance", "0.2", "--store", place) == 0
    run("add", record(tmp_path / "3.json", 1.0, 3, threads=1), "--store", place)  # another series
    assert run("check", "--latest", "--store", place) == 0
    assert run("check", "--store", place) == 1


def test_the_latest_latencies_are_judged_beside_the_scores_of_the_same_run(
    run: Any, tmp_path: Path, place: Path
) -> None:
    for day, p50_ms in enumerate((10.0, 20.0), start=1):
        (tmp_path / "accuracy.json").write_text(f'[{{"model": "m", "top1": 0.5{day}}}]')
        run("add", record(tmp_path / f"{day}.json", p50_ms, day), tmp_path / "accuracy.json", "--store", place)
    assert run("check", "--latest", "--store", place) == 1


def test_repeats_show_the_spread_and_what_to_expect(
    run: Any, tmp_path: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for day, p50_ms in enumerate((10.0, 10.5, 10.25), start=1):
        run("add", record(tmp_path / f"{day}.json", p50_ms, day, model_sha256="a" * 64, unit="ms"), "--store", place)
    run("add", record(tmp_path / "9.json", 7.0, 9, model_sha256="b" * 64, unit="ms"), "--store", place)  # only once
    capsys.readouterr()
    assert run("repeats", "--store", place) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "m ncnn 2 threads, 64 px 3 10.00–10.50 5.0% 9.08–11.57" in lines
    assert not any("7.00" in line for line in lines)


def test_nothing_was_repeated(run: Any, tmp_path: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("add", record(tmp_path / "1.json", 10.0, 1, model_sha256="a" * 64, unit="ms"), "--store", place)
    capsys.readouterr()
    assert run("repeats", "--store", place) == 0
    assert capsys.readouterr().out.startswith("history: no file was measured twice")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--since", "yesterday"), "--since 'yesterday' is not a date"),
        (("--since", "0001-01-01T00:00+14:00"), "--since '0001-01-01T00:00+14:00' is not a date"),
        (("add", "/"), "/ is a folder: name a file"),
        (("--device", "jetson", "--since", "2026-11-01", "check"), "--device, --since is of the list, not of check"),
        (("check",), "does not exist: measure something first"),
        (("add", "nowhere.json"), "nowhere.json does not exist"),
    ],
)
def test_mistakes_are_one_line(
    run: Any, words: tuple[str, ...], complaint: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*words, "--store", place) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1
    assert not place.exists()
