"""Percentiles, their bootstrap intervals, and the speed-up between two models measured in the same rounds.

Queries of one burst share the state of the machine at that moment, and neighbouring rounds share much of it (on a
virtual machine their medians correlate by 0.3 to 0.6). So the bootstrap draws blocks of neighbouring rounds: intervals
from single queries, or from rounds as if they were independent, would be too narrow.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95
PLATEAU_TOLERANCE = 0.03
PLATEAU_WINDOWS = 3
_NAMES: tuple[str, ...] = ("p50_ms", "p90_ms", "p99_ms", "mean_ms")
_TAILS = (50 * (1 - LEVEL), 100 - 50 * (1 - LEVEL))

Rounds = Sequence[Sequence[float]]
Interval = list[float]


def summarise(rounds_ms: Rounds, seed: int) -> tuple[dict[str, float], dict[str, Interval]]:
    """Return p50, p90, p99 and mean of all queries in ms, and the 95 % interval of each.

    Percentiles interpolate linearly between the two nearest queries.

    >>> summarise([[1.0, 2.0], [3.0, 4.0]], seed=0)[0]["p50_ms"]
    2.5
    """
    rounds = [np.asarray(samples, dtype=np.float64) for samples in rounds_ms]
    drawn = _draws(len(rounds), seed)
    resampled = np.array([_statistics(np.concatenate([rounds[i] for i in draw])) for draw in drawn])
    low, high = np.percentile(resampled, _TAILS, axis=0)
    values = dict(zip(_NAMES, _statistics(np.concatenate(rounds)).tolist(), strict=True))
    return values, {name: [float(a), float(b)] for name, a, b in zip(_NAMES, low, high, strict=True)}


def speedup(baseline_ms: Rounds, model_ms: Rounds, seed: int) -> tuple[float, Interval]:
    """Return p50 of the baseline divided by p50 of the model, and its 95 % interval from a paired bootstrap.

    The i-th rounds of both were measured next to each other: they are drawn together, so that what slowed both down
    at that moment cancels out.

    >>> speedup([[4.0, 4.0], [8.0, 8.0]], [[2.0, 2.0], [4.0, 4.0]], seed=0)
    (2.0, [2.0, 2.0])

    Raises:
        ValueError: the two were not measured in the same number of rounds.
    """
    if len(baseline_ms) != len(model_ms):
        raise ValueError(f"{len(baseline_ms)} rounds of the baseline do not pair with {len(model_ms)} of the model")
    pairs = [
        (np.asarray(baseline, dtype=np.float64), np.asarray(model, dtype=np.float64))
        for baseline, model in zip(baseline_ms, model_ms, strict=True)
    ]

    def ratio(draw: Sequence[int] | np.ndarray) -> float:
        baseline, model = (np.concatenate([pairs[i][side] for i in draw]) for side in (0, 1))
        return float(np.median(baseline) / np.median(model))

    low, high = np.percentile([ratio(draw) for draw in _draws(len(pairs), seed)], _TAILS)
    return ratio(range(len(pairs))), [float(low), float(high)]


def paired_ratio(baseline: Sequence[float], model: Sequence[float], seed: int) -> tuple[float, Interval]:
    """Return the median of baseline divided by model, pair by pair, and its 95 % interval.

    Where the two of a pair were measured within a moment, each ratio is free of what the machine did at that moment,
    and of a few pairs that were disturbed half way a median takes no notice.

    Args:
        baseline, model: one value of each for each pair.

    >>> paired_ratio([4.0, 8.0, 40.0], [2.0, 4.0, 5.0], seed=0)[0]
    2.0

    Raises:
        ValueError: they are not as many.
    """
    if len(baseline) != len(model):
        raise ValueError(f"{len(baseline)} values of the baseline do not pair with {len(model)} of the model")
    ratios = np.asarray(baseline, dtype=np.float64) / np.asarray(model, dtype=np.float64)
    low, high = np.percentile(np.median(ratios[_draws(len(ratios), seed)], axis=1), _TAILS)
    return float(np.median(ratios)), [float(low), float(high)]


def unpaired_speedup(baseline: Rounds, model: Rounds, seed: int) -> tuple[float, Interval]:
    """Return p50 of the baseline divided by p50 of the model, and its 95 % interval, of two separate measurements.

    The rounds of each are drawn by themselves: what the machine did meanwhile does not cancel out, and what changed it
    between the two is in no interval.

    >>> unpaired_speedup([[4.0, 4.0], [4.0]], [[2.0, 2.0]], seed=0)
    (2.0, [2.0, 2.0])
    """

    def medians(rounds: Rounds, seed: int) -> tuple[float, np.ndarray]:
        parts = [np.asarray(samples, dtype=np.float64) for samples in rounds]
        drawn = [np.median(np.concatenate([parts[i] for i in draw])) for draw in _draws(len(parts), seed)]
        return float(np.median(np.concatenate(parts))), np.array(drawn)

    (first, firsts), (second, seconds) = medians(baseline, seed), medians(model, seed + 1)
    low, high = np.percentile(firsts / seconds, _TAILS)
    return first / second, [float(low), float(high)]


def on_plateau(medians_ms: Sequence[float]) -> bool:
    """Tell whether the last three windows of a warm-up are within 3 % of each other.

    >>> on_plateau([9.0, 5.0, 5.1, 5.05])
    True
    """
    last = medians_ms[-PLATEAU_WINDOWS:]
    return len(last) == PLATEAU_WINDOWS and max(last) <= min(last) * (1 + PLATEAU_TOLERANCE)


def drift(rounds_ms: Rounds) -> float | None:
    """Return p50 of the last third of the rounds over p50 of the first third; null below three rounds.

    >>> drift([[2.0], [9.0], [3.0]])
    1.5
    """
    third = len(rounds_ms) // 3
    if third == 0:
        return None
    first, last = (np.concatenate([np.asarray(r) for r in part]) for part in (rounds_ms[:third], rounds_ms[-third:]))
    return float(np.median(last) / np.median(first))


def _draws(rounds: int, seed: int) -> np.ndarray:
    """Return the rounds of each resample, shape (RESAMPLES, rounds): blocks of neighbours, the last next to the first.

    Blocks hold about rounds^(1/3) (circular block bootstrap, Politis and Romano 1992; length after Hall, Horowitz and
    Jing 1995), so that what wanders from round to round widens the interval.
    """
    length = round(rounds ** (1 / 3))
    starts = np.random.default_rng(seed).integers(0, rounds, (RESAMPLES, -(-rounds // length), 1))
    return ((starts + np.arange(length)) % rounds).reshape(RESAMPLES, -1)[:, :rounds]


def _statistics(samples_ms: np.ndarray) -> np.ndarray:
    return np.append(np.percentile(samples_ms, (50, 90, 99)), samples_ms.mean())
