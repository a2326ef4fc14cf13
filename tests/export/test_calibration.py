from __future__ import annotations

import math

import numpy as np
import pytest

from export import calibration
from export.calibration import Histogram


def histogram(counts: list[int]) -> Histogram:
    """A histogram whose bins are one unit wide."""
    made = Histogram(len(counts), len(counts))
    made.counts[:] = counts
    return made


def test_magnitudes_are_counted_without_zeros() -> None:
    found = Histogram(4.0, 4)
    found.add(np.array([[0.0, 0.5, -0.5], [-1.0, 3.9, 4.0]], np.float32))
    found.add(np.array([0.0, 9.0], np.float32))  # beyond the range: the last bin
    assert found.counts.tolist() == [2, 1, 0, 3]


@pytest.mark.parametrize(("percentile", "end"), [(50, 1), (90, 1), (90.5, 2), (99, 2), (99.5, 4), (100, 4)])
def test_percentile_by_hand(percentile: float, end: float) -> None:
    assert calibration.percentile_threshold(histogram([90, 9, 0, 1]), percentile) == end


def test_divergence_by_hand() -> None:
    # One level for the bins 1 and 3: each gets 2, so 1/4·ln(1/2) + 3/4·ln(3/2).
    expected = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert calibration._divergence(np.array([1.0, 3.0]), 2, 1) == pytest.approx(expected)
    # A bin that is empty stays empty: 2 goes to the other one alone.
    assert calibration._divergence(np.array([0.0, 2.0]), 2, 1) == pytest.approx(0)
    # Clipped after two bins: (1, 1 + 2) of 4 against (1, 1) of 2.
    assert calibration._divergence(np.array([1.0, 1.0, 2.0]), 2, 2) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("counts", "end"),
    [
        ([4, 4, 4, 0], 3),  # the shortest that loses nothing
        ([1, 1, 1, 1], 4),
        ([100, 90, 0, 1], 2),  # 3 gives a bin no share that clipping filled, 4 merges bins that are less alike
    ],
)
def test_kl_by_hand(counts: list[int], end: float) -> None:
    assert calibration.kl_threshold(histogram(counts), levels=2) == end


def test_kl_cuts_a_long_tail_and_keeps_an_even_range() -> None:
    generator = np.random.default_rng(0)
    tail = np.append(generator.exponential(1.0, 100_000), 100.0).astype(np.float32)
    even = generator.uniform(0, 1, 100_000).astype(np.float32)
    ends = []
    for values in (tail, even):
        found = Histogram(float(values.max()))
        found.add(values)
        ends.append(calibration.kl_threshold(found))
    assert 4 < ends[0] < 20
    assert ends[1] > 0.9


def test_what_was_always_zero_has_no_range() -> None:
    empty = Histogram(0.0)
    empty.add(np.zeros(4, np.float32))
    assert calibration.percentile_threshold(empty) == calibration.kl_threshold(empty) == 0.0
