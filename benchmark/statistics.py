"""Percentiles, their bootstrap intervals, and the speed-up between two models measured in the same rounds.

Queries of one burst share the state of the machine at that moment, and neighbouring rounds share much of it (on a
virtual machine their medians correlate by 0.3 to 0.6). So the bootstrap draws blocks of neighbouring rounds: intervals
from single queries, or from rounds as if they were independent, would be too narrow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95
PLATEAU_TOLERANCE = 0.03
PLATEAU_WINDOWS = 3
_AT_ONCE = 2**20  # samples of resamples that are sorted together: 8 MB
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
    resampled = _resampled(rounds_ms, block_draws(len(rounds_ms), seed), _statistics)
    low, high = np.percentile(resampled, _TAILS, axis=0)
    values = dict(zip(_NAMES, _statistics(_flat(rounds_ms)[None])[0].tolist(), strict=True))
    return values, {name: [float(a), float(b)] for name, a, b in zip(_NAMES, low, high, strict=True)}


def speedup(baseline_ms: Rounds, model_ms: Rounds, seed: int) -> tuple[float, Interval]:
    """Return the median, over the rounds, of p50 of the baseline divided by p50 of the model; and its 95 % interval.

    The i-th rounds of both were measured next to each other, so each ratio is free of what the machine did at that
    moment, and of a few rounds that were disturbed half way a median takes no notice. The ratio of the two p50s of
    all queries, which may come from different moments, is known half as well (docs/results.md, "How long a burst
    should be").

    Args:
        baseline_ms, model_ms: the times of each round; any unit does.

    >>> speedup([[4.0, 4.0], [8.0], [40.0]], [[2.0, 2.0], [4.0], [5.0]], seed=0)[0]
    2.0

    Raises:
        ValueError: the two were not measured in the same number of rounds.
    """
    if len(baseline_ms) != len(model_ms):
        raise ValueError(f"{len(baseline_ms)} rounds of the baseline do not pair with {len(model_ms)} of the model")
    ratios = np.array(
        [np.median(first) / np.median(second) for first, second in zip(baseline_ms, model_ms, strict=True)]
    )
    low, high = np.percentile(np.median(ratios[block_draws(len(ratios), seed)], axis=1), _TAILS)
    return float(np.median(ratios)), [float(low), float(high)]


def unpaired_speedup(baseline: Rounds, model: Rounds, seed: int) -> tuple[float, Interval]:
    """Return p50 of the baseline divided by p50 of the model, and its 95 % interval, of two separate measurements.

    The rounds of each are drawn by themselves: what the machine did meanwhile does not cancel out, and what changed it
    between the two is in no interval.

    >>> unpaired_speedup([[4.0, 4.0], [4.0]], [[2.0, 2.0]], seed=0)
    (2.0, [2.0, 2.0])
    """
    firsts = _resampled(baseline, block_draws(len(baseline), seed), _medians)
    seconds = _resampled(model, block_draws(len(model), seed + 1), _medians)
    low, high = np.percentile(firsts / seconds, _TAILS)
    return float(np.median(_flat(baseline)) / np.median(_flat(model))), [float(low), float(high)]


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


def block_draws(rounds: int, seed: int) -> np.ndarray:
    """Return the rounds of each resample, shape (RESAMPLES, rounds): blocks of neighbours, the last next to the first.

    Blocks hold about rounds^(1/3) (circular block bootstrap, Politis and Romano 1992; length after Hall, Horowitz and
    Jing 1995), so that what wanders from round to round widens the interval.
    """
    length = round(rounds ** (1 / 3))
    starts = np.random.default_rng(seed).integers(0, rounds, (RESAMPLES, -(-rounds // length), 1))
    return ((starts + np.arange(length)) % rounds).reshape(RESAMPLES, -1)[:, :rounds]


def _resampled(rounds: Rounds, draws: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Return the statistic of each resample, shape (resamples, …).

    Args:
        draws: as `block_draws` returns them.
        statistic: of samples of shape (resamples, queries), along the queries.
    """
    if len({len(samples) for samples in rounds}) > 1:
        return np.concatenate([statistic(_flat([rounds[i] for i in draw])[None]) for draw in draws])
    samples = np.asarray(rounds, dtype=np.float64)
    parts = 1 + draws.size * samples.shape[1] // _AT_ONCE
    return np.concatenate([statistic(samples[part].reshape(len(part), -1)) for part in np.array_split(draws, parts)])


def _flat(rounds: Rounds) -> np.ndarray:
    return np.concatenate([np.asarray(samples, dtype=np.float64) for samples in rounds])


def _medians(samples_ms: np.ndarray) -> np.ndarray:
    return np.median(samples_ms, axis=1)


def _statistics(samples_ms: np.ndarray) -> np.ndarray:
    return np.column_stack([*np.percentile(samples_ms, (50, 90, 99), axis=1), samples_ms.mean(axis=1)])
