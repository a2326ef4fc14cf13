from __future__ import annotations

import numpy as np
import pytest

from benchmark import statistics


def test_percentiles_are_those_of_all_queries() -> None:
    # 1 … 101 in two uneven rounds: linear percentiles of 101 values fall on whole numbers.
    values, _ = statistics.summarise([list(range(1, 31)), list(range(31, 102))], seed=0)
    assert values == pytest.approx({"p50_ms": 51.0, "p90_ms": 91.0, "p99_ms": 100.0, "mean_ms": 51.0})


def test_an_outlier_is_kept() -> None:
    values, _ = statistics.summarise([[1.0] * 9 + [1001.0]], seed=0)
    assert values["p50_ms"] == 1.0
    assert values["mean_ms"] == 101.0
    assert values["p99_ms"] == pytest.approx(911.0)  # 0.91 of the way from the ninth to the tenth value


def test_rounds_without_spread_have_an_interval_without_width() -> None:
    _, intervals = statistics.summarise([[2.0, 4.0]] * 5, seed=0)
    assert intervals["p50_ms"] == [3.0, 3.0]
    assert intervals["mean_ms"] == [3.0, 3.0]


def test_the_bootstrap_draws_rounds_not_queries() -> None:
    # Two rounds, each constant: of four equally likely draws one is all 1 and one all 3, more than 2.5 % each.
    # Drawn query by query from 200 queries, the mean would hardly leave 2.0 ± 0.2.
    _, intervals = statistics.summarise([[1.0] * 100, [3.0] * 100], seed=0)
    assert intervals["mean_ms"] == [1.0, 3.0]


def test_the_interval_has_the_width_that_theory_gives() -> None:
    generator = np.random.default_rng(5)
    rounds = [[value] for value in generator.normal(10.0, 1.0, 400)]
    values, intervals = statistics.summarise(rounds, seed=0)
    low, high = intervals["mean_ms"]
    assert low < values["mean_ms"] < high
    assert high - low == pytest.approx(2 * 1.96 / 20, rel=0.12)  # standard error 1/√400


@pytest.mark.parametrize(("correlation", "wider"), [(0.0, 1.0), (0.6, 1.4)])
def test_a_machine_that_wanders_widens_the_interval(correlation: float, wider: float) -> None:
    # Of rounds that correlate by 0.6 the mean has twice the standard error of independent ones (√((1+ρ)/(1-ρ))); blocks
    # of 120^(1/3) rounds see three quarters of that.
    generator = np.random.default_rng(2)
    steps, level, widths = generator.normal(0.0, (1 - correlation**2) ** 0.5, (40, 120)), 0.0, []
    for run in steps:
        rounds = []
        for step in run:
            level = correlation * level + step
            rounds.append([10.0 + level])
        low, high = statistics.summarise(rounds, seed=0)[1]["mean_ms"]
        widths.append(high - low)
    independent = 2 * 1.96 / 120**0.5
    assert np.mean(widths) / independent == pytest.approx(wider, rel=0.1)


def test_the_seed_decides_the_interval() -> None:
    rounds = np.random.default_rng(1).random((10, 4)).tolist()
    assert statistics.summarise(rounds, seed=3) == statistics.summarise(rounds, seed=3)
    assert statistics.summarise(rounds, seed=3)[1] != statistics.summarise(rounds, seed=4)[1]


def test_speedup_is_the_median_of_the_rounds_ratios() -> None:
    # Each round counts by its medians: 1.5, 2 and 4. The medians of all queries would give 12 / 5.
    baseline, model = [[6.0, 6.0, 90.0], [12.0], [20.0] * 3], [[4.0, 4.0, 4.0], [6.0], [5.0] * 3]
    assert statistics.speedup(baseline, model, seed=0)[0] == 2.0


def test_what_slows_both_down_cancels_out() -> None:
    # The machine is three times slower in some rounds; unpaired draws would give anything from 0.67 to 6.
    slow = [1.0, 3.0, 1.0, 3.0, 1.0, 3.0, 1.0, 3.0, 1.0]
    ratio, interval = statistics.speedup([[2 * s] for s in slow], [[s] for s in slow], seed=0)
    assert ratio == 2.0
    assert interval == [2.0, 2.0]


def test_speedup_needs_pairs() -> None:
    with pytest.raises(ValueError, match="2 rounds of the baseline do not pair with 1"):
        statistics.speedup([[1.0], [1.0]], [[1.0]], seed=0)


def test_rounds_know_their_ratio_better_than_separate_medians_do() -> None:
    # Pairs share what the machine does (10 %), and each has a little of its own (1 %).
    draw, covered, widths, wide = np.random.default_rng(0), 0, [], []
    for seed in range(200):
        shared, own = draw.normal(0, 0.1, 40), draw.normal(0, 0.01, (2, 40))
        baseline, model = 8.0 * np.exp(shared + own[0]), 4.0 * np.exp(shared + own[1])
        _, (low, high) = statistics.speedup([[value] for value in baseline], [[value] for value in model], seed)
        covered += low <= 2.0 <= high
        widths.append(high - low)
        if seed < 5:
            draws = statistics.block_draws(40, seed)
            of_medians = np.median(baseline[draws], axis=1) / np.median(model[draws], axis=1)
            wide.append(np.ptp(np.percentile(of_medians, (2.5, 97.5))))
    assert 0.88 <= covered / 200 <= 0.99
    # The median of 40 ratios, each known to 1.4 %: 95 % lie within ±1.96 · 1.253 · 0.0141 / √40.
    assert np.mean(widths) / 2.0 == pytest.approx(0.011, rel=0.15)
    assert np.mean(wide) > 2 * np.mean(widths)


def test_rounds_that_were_disturbed_half_way_do_not_count() -> None:
    baseline = [[8.0]] * 20 + [[80.0]] * 5
    assert statistics.speedup(baseline, [[4.0]] * 25, seed=0) == (2.0, [2.0, 2.0])


@pytest.mark.parametrize(
    ("medians", "expected"),
    [
        ([5.0, 5.0], False),  # two windows are no plateau
        ([5.0, 5.0, 5.0], True),
        ([9.0, 5.0, 5.1, 5.15], True),  # exactly 3 % apart
        ([5.0, 5.1, 5.16], False),  # each step below 3 %, the sum above it
        ([5.0, 5.0, 5.0, 6.0], False),  # it left the plateau
    ],
)
def test_plateau(medians: list[float], expected: bool) -> None:
    assert statistics.on_plateau(medians) is expected


def test_drift_compares_the_last_third_with_the_first() -> None:
    assert statistics.drift([[2.0, 2.0], [2.0], [50.0], [50.0], [3.0], [3.0]]) == 1.5
    assert statistics.drift([[2.0], [3.0]]) is None


def test_apart_the_rounds_are_drawn_apart() -> None:
    # Both were half as fast in half of their rounds: in turns that cancels out, apart it may be anything from ½ to 2.
    slow_then_fast = [[2.0]] * 10 + [[4.0]] * 10
    assert statistics.speedup(slow_then_fast, slow_then_fast, seed=0)[1] == [1.0, 1.0]
    ratio, (low, high) = statistics.unpaired_speedup(slow_then_fast, slow_then_fast, seed=0)
    assert (ratio, low, high) == (1.0, 0.5, 2.0)


def test_apart_the_numbers_of_rounds_may_differ() -> None:
    generator = np.random.default_rng(5)
    first = [[value] for value in generator.normal(20.0, 1.0, 400)]
    second = [[value] for value in generator.normal(10.0, 0.5, 100)]
    ratio, (low, high) = statistics.unpaired_speedup(first, second, seed=0)
    assert low < ratio < high
    # The relative error of a median is 1.253 σ/(µ √n): 0.3 % and 0.6 %, together 0.7 %.
    assert high - low == pytest.approx(2 * 1.96 * 2.0 * 0.007, rel=0.3)
