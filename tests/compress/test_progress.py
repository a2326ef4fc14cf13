from __future__ import annotations

from collections.abc import Iterable

import pytest

from compress import progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def work(items: Iterable[str], clock: list[float], seconds: float) -> list[str]:
    """Take so long for each item."""
    found = []
    for item in progress.track(items, "drawing"):
        found.append(item)
        clock[0] += seconds
    return found


@pytest.mark.parametrize(
    ("items", "seconds", "lines"),
    [
        ("abcd", 14.0, []),  # done within a minute
        ("abcd", 60.0, ["1 of 4, about 3 min left", "2 of 4, about 2 min left", "3 of 4, about 1 min left"]),
        ("abcdef", 25.0, ["3 of 6, about 1 min left"]),
        ("abc", 3600.0, ["1 of 3, about 2.0 h left", "2 of 3, about 60 min left"]),
    ],
)
def test_a_log_gets_a_line_a_minute(
    clock: list[float], capsys: pytest.CaptureFixture[str], items: str, seconds: float, lines: list[str]
) -> None:
    assert work(list(items), clock, seconds) == list(items)
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [f"drawing: {line}" for line in lines]
    assert captured.out == ""


def test_without_a_known_end_it_is_counted(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    assert work(iter("abc"), clock, 60.0) == ["a", "b", "c"]
    assert capsys.readouterr().err == "drawing: 1\ndrawing: 2\n"
