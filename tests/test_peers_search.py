"""The search for an amount of pruning by its measured speed-up."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from scripts.peers.search import Knob, nearest, next_amount

RATIO = Knob(0.0, 0.95, 0.35)
SPEEDUP = Knob(1.0, 8.0, None)


def search(knob: Knob, speedup: Callable[[float], float], target: float, most: int = 10) -> dict[float, float]:
    points: dict[float, float] = {}
    while len(points) < most and (amount := next_amount(knob, points, target, 0.02)) is not None:
        points[amount] = speedup(amount)
    return points


def test_a_smooth_speedup_is_met_in_a_few_steps() -> None:
    points = search(RATIO, lambda ratio: 1 / (1 - ratio) ** 1.5, 1.8)
    assert next(iter(points)) == 0.35
    assert points[nearest(points, 1.8)] == pytest.approx(1.8, rel=0.02)
    assert len(points) <= 4


def test_what_is_asked_for_in_speedups_begins_at_the_target_and_asks_for_more_where_less_came() -> None:
    assert next_amount(SPEEDUP, {}, 1.8, 0.02) == 1.8
    assert next_amount(SPEEDUP, {1.8: 1.7}, 1.8, 0.02) == pytest.approx(1 + 0.8 * 0.8 / 0.7, abs=1e-4)
    assert next_amount(SPEEDUP, {1.8: 1.79}, 1.8, 0.02) is None


def test_an_amount_that_is_too_fast_is_followed_by_a_smaller_one() -> None:
    assert next_amount(RATIO, {0.5: 2.6}, 1.8, 0.02) == 0.25  # 0.8 of 1.6 above the dense model, of 0.5
    assert next_amount(RATIO, {0.5: 2.6, 0.25: 1.4}, 1.8, 0.02) == pytest.approx(0.25 + 0.25 / 3, abs=1e-4)


def test_the_bracket_lies_below_the_least_amount_that_is_fast_enough() -> None:
    """At 0.6 a block is torn and the network slow again: the search stays below 0.5."""
    amount = next_amount(RATIO, {0.3: 1.3, 0.5: 2.3, 0.6: 1.5}, 1.8, 0.02)
    assert amount == pytest.approx(0.4)


def test_steps_that_no_amount_meets_end_the_search() -> None:
    points = search(RATIO, lambda ratio: 1.5 if ratio < 0.4 else 2.2, 1.8, most=40)
    assert next_amount(RATIO, points, 1.8, 0.02) is None
    assert points[nearest(points, 1.8)] == 1.5
    assert min(a for a, s in points.items() if s == 2.2) == pytest.approx(0.4, abs=0.95 * 0.003)


def test_a_target_out_of_reach_ends_at_the_largest_amount() -> None:
    points = search(RATIO, lambda ratio: 1 + ratio / 2, 1.8)
    assert max(points) == 0.95
    assert nearest(points, 1.8) == 0.95
    assert len(points) < 8


def test_a_network_that_became_slower_is_followed_by_the_middle_of_what_is_left() -> None:
    assert next_amount(RATIO, {0.35: 0.9}, 1.8, 0.02) == 0.65
