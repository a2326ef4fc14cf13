from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmark import compare, store
from benchmark.compare import Candidate
from benchmark.records import Measurement, Score, measurements
from compress.errors import BenchmarkError


def cell(model: str, rounds_ms: list[list[float]], **more: Any) -> dict[str, Any]:
    p50 = sorted(sample for samples in rounds_ms for sample in samples)[len(rounds_ms) // 2]
    base = {"model": model, "runtime": "torch", "runtime_version": "1", "precision": "fp32", "p50_ms": p50}
    return {**base, "model_sha256": f"sha-{model}", "samples_ms": rounds_ms, **more}


def latency(*cells: dict[str, Any], **more: Any) -> dict[str, Any]:
    protocol = {"threads": 1, "imgsz": 320, "batch": 1, "mode": "standard"}
    return {"cells": list(cells), "device": {"cpu": "Acme"}, "protocol": protocol, **more}


def score(value: float, **more: Any) -> Score:
    return Score("m", None, "torch", "mAP50-95", value, **more)


def candidate(p50_ms: float | None, value: float | None, **more: Any) -> Candidate:
    """A model whose rounds are all alike."""
    cost = None if p50_ms is None else measurements(latency(cell("m", [[p50_ms]] * 4, **more)))[0]
    return Candidate("m", "torch", cost, None if value is None else score(value))


def test_models_that_find_nothing_are_not_said_to_be_alike_without_a_word() -> None:
    verdict = compare.judge(candidate(2.0, 0.0), candidate(1.0, 0.0))
    assert verdict.remarks == ("mAP50-95 is 0 for both: neither finds anything, so it says nothing",)
    assert compare.judge(candidate(2.0, 0.0), candidate(1.0, 0.1)).remarks == ()


@pytest.mark.parametrize(
    ("a", "b", "better", "reason"),
    [
        ((2.0, 0.5), (1.0, 0.5), True, "faster and as accurate"),
        ((2.0, 0.5), (1.0, 0.495), True, "faster and as accurate"),
        ((2.0, 0.5), (1.0, 0.494), False, "faster but less accurate"),
        ((2.0, 0.5), (1.0, 0.6), True, "faster and more accurate"),
        ((2.0, 0.6), (2.0, 0.605), False, "not measurably faster and as accurate"),  # 0.605 − 0.6 is 0.00500…4
        ((2.0, 0.6), (2.0, 0.606), True, "not measurably faster and more accurate"),
        ((2.0, 0.5), (3.0, 0.6), False, "slower but more accurate"),
        ((2.0, 0.5), (3.0, 0.4), False, "slower and less accurate"),
        ((2.0, None), (1.0, None), True, "faster"),
        ((2.0, None), (2.0, None), False, "not measurably faster"),
        ((None, 0.5), (None, 0.6), True, "more accurate"),
        ((None, 0.5), (None, 0.5), False, "as accurate"),
    ],
)
def test_what_is_better(a: tuple[Any, Any], b: tuple[Any, Any], better: bool, reason: str) -> None:
    verdict = compare.judge(candidate(*a), candidate(*b))
    assert (verdict.better, verdict.reason) == (better, reason)
    known = [name for name in ("speedup", "score_change") if getattr(verdict, name) is not None]
    assert known == ["speedup"] * (a[0] is not None) + ["score_change"] * (a[1] is not None)
    assert len(verdict.remarks) == 2 - len(known)


def test_the_tolerance_is_the_caller_s() -> None:
    a, b = candidate(2.0, 0.5), candidate(1.0, 0.48)
    assert not compare.judge(a, b).better
    assert compare.judge(a, b, map_tolerance=0.03).better
    assert compare.judge(candidate(2.0, 0.5), candidate(2.0, 0.501), map_tolerance=0.0).better


def pair(rounds: list[list[float]]) -> list[Candidate]:
    """The dense model of these rounds, and one that was 10 % faster whatever the machine did."""
    fast = [[0.9 * sample for sample in samples] for samples in rounds]
    both = measurements(latency(cell("dense", rounds), cell("pruned", fast)))
    return [Candidate(item.model, "torch", item, None) for item in both]


def test_in_one_record_the_interval_is_paired_and_apart_it_is_not() -> None:
    rounds = [[2.0]] * 10 + [[4.0]] * 10
    dense, pruned = pair(rounds)
    together = compare.judge(dense, pruned)
    assert (together.paired, together.better) == (True, True)
    assert together.interval == pytest.approx((1 / 0.9, 1 / 0.9))
    other = pair([[2.0]] * 10 + [[4.0]] * 11)[1]
    apart = compare.judge(dense, other)
    assert (apart.paired, apart.better, apart.reason) == (False, False, "not measurably faster")
    assert apart.interval is not None
    assert apart.interval[0] < 0.6 < 2.2 < apart.interval[1]


def test_instructions_are_compared_as_such() -> None:
    counted = {"model": "m", "runtime": "ncnn", "unit": "instructions"}
    a, b = (
        Candidate("m", "ncnn", measurements(latency({**counted, "instructions": counts}))[0], None)
        for counts in ([200e6, 201e6, 200e6], [100e6, 100e6, 101e6])
    )
    verdict = compare.judge(a, b)
    assert (verdict.better, verdict.reason, verdict.unit, verdict.p50) == (True, "cheaper", "instructions", (2e8, 1e8))
    with pytest.raises(BenchmarkError, match="unit of the latency is instructions and ms"):
        compare.judge(a, replace(candidate(1.0, None), runtime="ncnn"))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"threads": 2}, "threads of the latency is 1 and 2"),
        ({"imgsz": 640}, "imgsz of the latency is 320 and 640"),
        ({"precision": "int8"}, "precision of the latency is fp32 and int8"),
        ({"threads": 2, "batch": 8}, "threads of the latency is 1 and 2; batch of the latency is 1 and 8"),
    ],
)
def test_a_difference_of_settings_is_named(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(BenchmarkError, match="measure both alike") as caught:
        compare.judge(candidate(2.0, 0.5), candidate(1.0, 0.5, **changes))
    assert complaint in str(caught.value)


def test_a_difference_of_device_runtime_or_data_is_named() -> None:
    a = candidate(2.0, 0.5)
    assert isinstance(a.cost, Measurement)
    with pytest.raises(BenchmarkError, match="device of the latency is Acme and rpi5"):
        compare.judge(a, replace(a, cost=replace(a.cost, device="rpi5")))
    with pytest.raises(BenchmarkError, match="runtime is torch and ncnn"):
        compare.judge(a, replace(a, runtime="ncnn"))
    with pytest.raises(BenchmarkError, match="split of the score is val and test"):
        compare.judge(replace(a, score=score(0.5, split="val")), replace(a, score=score(0.5, split="test")))
    with pytest.raises(BenchmarkError, match=r"data of the score is a\.yaml and b\.yaml"):
        compare.judge(replace(a, score=score(0.5, data="a.yaml")), replace(a, score=score(0.5, data="b.yaml")))
    one, other = (replace(a, score=score(0.5, data=f"{name}.yaml", data_sha256="d")) for name in "ab")
    assert compare.judge(one, other).score_change == 0.0  # the hash tells, the name does not matter
    assert compare.judge(a, replace(a, cost=replace(a.cost, device=None))).reason  # unknown is no difference


@pytest.mark.parametrize(
    ("a", "b", "complaint"),
    [
        ((1.0, 0.5), (1.0, None), "the score of B is not known"),
        ((None, 0.5), (1.0, 0.5), "the latency of A is not known"),
    ],
)
def test_what_only_one_side_knows_is_asked_for(a: tuple[Any, Any], b: tuple[Any, Any], complaint: str) -> None:
    with pytest.raises(BenchmarkError, match=complaint):
        compare.judge(candidate(*a), candidate(*b))


def test_a_record_without_samples_is_not_guessed_about() -> None:
    with pytest.raises(BenchmarkError, match="of B was kept without its samples"):
        compare.judge(candidate(2.0, 0.5), candidate(1.0, 0.5, samples_ms=[]))


# The command


@pytest.fixture
def run(run_command: Any) -> Any:
    return partial(run_command, compare.app)


def write(folder: Path, **contents: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def published(root: Path, tmp_path: Path) -> Path:
    """The run of docs/results.md, measured anew now and then: what it says is read from it, not known here."""
    results, folder = root / "docs" / "results", tmp_path / "bccd"
    (folder / "06_benchmark").mkdir(parents=True)
    (folder / "summary.json").write_text((results / "bccd.json").read_text())
    (folder / "06_benchmark" / "latency.json").write_text((results / "bccd_latency.json").read_text())
    return folder


def test_a_published_run_dense_against_pruned(
    run: Any, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "verdict.json"
    assert run(f"{published}:dense", published, "--json", path) == 0
    out = capsys.readouterr().out
    device = json.loads((published / "06_benchmark" / "latency.json").read_text())["device"]
    assert f"onnxruntime on {device['cpu']}, {device['architecture']}, {device['cores']} cores" in out
    summary = json.loads((published / "summary.json").read_text())
    before, after = (summary[name]["latency_ms"]["onnxruntime"]["p50"] for name in ("dense", "pruned"))
    low, high = summary["speedup_interval"]["onnxruntime"]
    ratio = summary["speedup"]["onnxruntime"]
    speedup = f"{ratio:.3f}× (95 %: {low:.3f}–{high:.3f}; measured in turns, paired interval)"
    assert f"{before:.2f} ms → {after:.2f} ms, {speedup}" in out
    dense, pruned = (summary[name]["map50_95"] for name in ("dense", "pruned"))
    assert f"mAP50-95 {dense:.4f} → {pruned:.4f}, {pruned - dense:+.4f}".replace("-0.", "−0.") in out
    change = "more accurate" if pruned - dense > 0.005 else "as accurate"  # one that lost more would not be published
    assert out.splitlines()[-1] == f"verdict  B is better: it is faster and {change}"
    verdict = json.loads(path.read_text())
    assert (verdict["better"], verdict["paired"], verdict["b"]["model"]) == (True, True, "pruned")
    assert verdict["interval"] == pytest.approx(summary["speedup_interval"]["onnxruntime"], abs=5e-5)
    assert run(published, f"{published}:dense", "--runtime", "torch") == 1
    assert f"torch on {device['cpu']}" in capsys.readouterr().out


def test_a_pruned_model_that_lost_accuracy(run: Any, published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = json.loads((published / "summary.json").read_text())
    summary["pruned"]["map50_95"] = summary["dense"]["map50_95"] - 0.0117
    (published / "summary.json").write_text(json.dumps(summary))
    assert run(f"{published}:dense", published) == 1
    assert "B is not better: it is faster but less accurate" in capsys.readouterr().out
    assert run(f"{published}:dense", published, "--map-tolerance", "0.012") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "verdict  B is better: it is faster and as accurate"


def test_two_folders_of_a_benchmark(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = []
    for name, p50, value in (("old", 2.0, 0.5), ("new", 1.0, 0.499)):
        entry = {"model": "m.onnx", "model_sha256": "sha-m", "runtime": "torch", "map50_95": value}
        write(tmp_path / name / "latency", latency=latency(cell("m", [[p50]] * 3)))
        write(tmp_path / name / "accuracy", accuracy=[entry])
        folders.append(tmp_path / name)
    assert run(*folders) == 0
    out = capsys.readouterr().out
    assert "2.00 ms → 1.00 ms, 2.000× (95 %: 2.000–2.000; measured apart, unpaired interval)" in out
    assert "0.5000 → 0.4990, −0.0010" in out
    assert run(*folders, "--map-tolerance", 0) == 1
    assert "B is not better: it is faster but less accurate" in capsys.readouterr().out


def test_rows_of_the_store(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "s.sqlite"
    folder = write(
        tmp_path / "r",
        latency=latency(cell("dense", [[2.0]] * 3), cell("pruned", [[1.0]] * 3)),
        accuracy=[
            {"model": f"{name}.pt", "model_sha256": f"sha-{name}", "runtime": "torch", "map50_95": value}
            for name, value in (("dense", 0.5), ("pruned", 0.6))
        ],
    )
    store.add(folder / "latency.json", place)
    store.add(folder / "accuracy.json", place)
    assert run(1, 2, "--store", place) == 0
    out = capsys.readouterr().out
    assert "paired interval" in out
    assert "0.5000 → 0.6000, +0.1000" in out
    assert run(3, 4, "--store", place) == 0
    assert "latency is known of neither" in capsys.readouterr().out
    assert run(f"{folder}:pruned", 1, "--store", place) == 1
    assert run(1, 9, "--store", place) == 2
    assert "has no row 9" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("a", "complaint"),
    [
        ("{0}/nowhere", "is neither a folder nor the id of a row"),
        ("{0}/several:c", "holds no model 'c': name one of a, b"),
        ("{0}/several", "several holds a, b: name one, such as"),
        ("{0}/empty", "empty holds no latency.json and no accuracy.json"),
        ("{0}/ncnn", "runtime is ncnn of"),
        ("{0}/twice", "holds 2 records of m in torch"),
        ("{0}/broken", "latency.json is not valid JSON"),
        ("{0}/pipeline:dense", "summary.json is damaged or incomplete (KeyError('name')): run the pipeline again"),
        ("{0}/manifest", "manifest.json is damaged, its 'config' or 'parents' is wrong"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    run: Any, tmp_path: Path, a: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    one = cell("m", [[1.0]])
    good = write(tmp_path / "good", latency=latency(one))
    write(tmp_path / "several", latency=latency(cell("a", [[1.0]]), cell("b", [[1.0]])))
    write(tmp_path / "ncnn", latency=latency({**one, "runtime": "ncnn"}))
    write(tmp_path / "twice", latency=latency(one, one))
    (write(tmp_path / "broken") / "latency.json").write_text("{")
    write(tmp_path / "empty")
    write(write(tmp_path / "pipeline", summary={}) / "06_benchmark", latency=latency(one), accuracy={})
    write(tmp_path / "manifest", latency=latency(one), accuracy=[], manifest={"schema": 1, "config": [1]})
    assert run(a.format(tmp_path), good) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1


def test_a_folder_is_no_file_for_the_verdict(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write(tmp_path / "good", latency=latency(cell("m", [[1.0]])))
    assert run(good, good, "--json", tmp_path) == 2
    assert capsys.readouterr().err == f"error: --json {tmp_path} is a folder: name a file\n"
