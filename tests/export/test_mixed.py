from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from compress.errors import ParityError
from export import mixed


def fake_search(needed: set[str], lowest: float = 0.5) -> tuple[mixed.Choice, list[int]]:
    """Search among ten layers, of which `needed` must stay in float; the sensitivity goes down from a to j."""
    layers = list("abcdefghij")
    tried = []

    def score(in_float: list[str]) -> float:
        tried.append(len(in_float))
        return 0.5 if needed <= set(in_float) else 0.4

    rank = {layer: 1.0 - index / 10 for index, layer in enumerate(layers)}
    return mixed.choose_float_layers(layers[::-1], score, lambda: rank, lowest), tried


@pytest.mark.parametrize(
    ("needed", "chosen", "tried"),
    [
        (set(), "", [0]),
        ({"a"}, "a", [0, 1]),
        ({"c"}, "abc", [0, 1, 2, 4, 3]),
        ({"b", "f"}, "abcdef", [0, 1, 2, 4, 8, 6, 5]),
        ({"i"}, "abcdefghi", [0, 1, 2, 4, 8, 9]),
    ],
)
def test_as_few_layers_as_needed_stay_in_float(needed: set[str], chosen: str, tried: list[int]) -> None:
    choice, steps = fake_search(needed)
    assert ("".join(choice.float_layers), steps) == (chosen, tried)
    assert choice.map50_95 == 0.5
    assert [step["float_layers"] for step in choice.steps] == tried
    assert bool(choice.sensitivity) == bool(needed)


def test_a_budget_that_nothing_meets_names_what_was_reached() -> None:
    with pytest.raises(
        ParityError, match=r"8 bits reach an mAP50-95 of 0\.5000, 0\.6000 is needed: raise --map-budget"
    ):
        fake_search({"a"}, lowest=0.6)


def test_every_layer_in_float_is_no_answer() -> None:
    with pytest.raises(ParityError, match=r"^8 bits reach an mAP50-95 of 0\.4000, 0\.5000 is needed"):
        fake_search({"j"})
    with pytest.raises(ParityError):
        mixed.choose_float_layers(["a"], lambda _: 0.4, lambda: {"a": 1.0}, 0.5)


def test_errors_by_hand() -> None:
    expected = np.zeros((1, 6, 2), np.float32)
    actual = expected.copy()
    expected[0, 4:] = [[0.6, 0.0], [0.0, 0.8]]  # two anchors with one class each
    actual[0, 4:] = [[0.6, 0.0], [0.0, 0.5]]
    actual[0, :4, 0] = 2.0  # every side of the first box moves by 2 px, the second stays
    scores, boxes = mixed._error(expected, actual)
    assert scores == pytest.approx(0.3)
    assert boxes == pytest.approx(math.sqrt(0.36 * 4))  # its weight is 0.6² of 0.6² + 0.8²
    rows = np.array([[[0, 0, 0, 0, 0.8, 3]]], np.float32)
    assert mixed._error(rows, rows + np.array([1, 1, 1, 1, 0, 2], np.float32)) == pytest.approx((0.0, 1.0))


def test_a_journal_answers_what_was_asked_before(tmp_path: Path) -> None:
    path = tmp_path / "search.json"
    first = mixed.Journal(path, {"model": "a"})
    assert first.remember("mAP", lambda: 0.5) == 0.5
    assert first.remember("mAP", pytest.fail) == 0.5
    assert mixed.Journal(path, {"model": "a"}).remember("mAP", pytest.fail) == 0.5  # after a kill -9
    other = mixed.Journal(path, {"model": "b"})
    assert other.remember("mAP", lambda: 0.25) == 0.25
    other.forget()
    assert not path.exists()
    other.forget()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"identity": 1}'])
def test_a_damaged_journal_is_begun_anew(content: str, tmp_path: Path) -> None:
    path = tmp_path / "search.json"
    path.write_text(content)
    journal = mixed.Journal(path, {})
    assert journal.remember("mAP", lambda: 0.5) == 0.5
    assert mixed.Journal(path, {}).remember("mAP", pytest.fail) == 0.5
