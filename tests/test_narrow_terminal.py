"""Tables in a terminal of 80 columns: long names are folded, and every number stays whole."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from benchmark import report
from benchmark.pages import Number, Table
from compress import sweep
from compress.latency import front

LONG = "yolov8n-sparse-taylor-round-3-of-3-with-a-very-long-name/model_best_of_all_seeds"


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def words(out: str) -> list[str]:
    assert max(map(len, out.splitlines())) <= 80
    return out.split()


def test_a_report(capsys: pytest.CaptureFixture[str]) -> None:
    row = [LONG, "onnxruntime", "1234.56 ms", "mAP50-95 0.6018", Number("1.85×", 1.85)]
    report._print(Table(["model", "runtime", "p50", "score", "speed-up"], [row]))
    out = capsys.readouterr().out
    assert {"1234.56", "0.6018", "1.85×"} <= set(words(out))
    assert "1234.56 ms" in out
    assert "…" not in out


def test_a_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    summary: dict[str, Any] = {"pruned": {"map50_95": 0.5901, "latency_ms": {"onnxruntime": {"p50": 123.45}}}}
    cut = {"macs": 12_345_000_000, "map50_95": 0.4321}
    sweep.print_table([{"name": LONG, "cut": cut, "summary": summary, "front": True}])
    out = capsys.readouterr().out
    assert {"12345", "0.4321", "0.5901", "123.45", "(onnxruntime)"} <= set(words(out))
    assert "…" not in out


def test_a_front(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"latency": 123.456e6, "speedup": 10.5, "kept": 1.0, "gap": 0.01234, "macs": 0.5e9}
    fit = SimpleNamespace(median_error=0.0123, p95_error=0.0345)
    table: Any = SimpleNamespace(unit="instructions", dense=250e6, fit=fit)
    front._print([row], table, 1e9)
    out = capsys.readouterr().out
    assert "123.5 M instructions" in out
    assert {"10.50×", "100.00%", "1.23%", "50.0%"} <= set(words(out))
