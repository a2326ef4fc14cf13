"""The axes of a plot: where they begin and end, where their marks are, and how a mark is written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_MIN_SCORE_SPAN = 0.1
_STEPS = (1, 2, 5, 10)
_MOST_TICKS = 8
# From this ratio of the dearest to the cheapest on, an axis from zero would press the cheap ones together.
_LOGARITHMIC_FROM = 10.0


@dataclass(frozen=True)
class Axis:
    """The limits of an axis and where its marks are; a logarithmic one begins above zero."""

    low: float
    high: float
    ticks: tuple[float, ...]
    logarithmic: bool = False

    def share(self, value: float) -> float:
        """Return how far along the axis a value lies, from 0 to 1; what lies below a logarithmic axis is at its start.

        >>> Axis(0.0, 4.0, ()).share(1.0), Axis(1.0, 100.0, (), True).share(10.0)
        (0.25, 0.5)
        """
        if self.logarithmic:
            return math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def cost_axis(costs: Sequence[float], ends: Sequence[float]) -> Axis:
    """Return an axis of costs: from zero, or logarithmic where the dearest is ten times the cheapest or more.

    Args:
        costs: all larger than zero.
        ends: of their intervals.
    """
    most = max([*costs, *ends])
    if max(costs) < _LOGARITHMIC_FROM * min(costs):
        return _linear(0.0, 1.12 * most)
    low, high = 0.8 * min(costs), 1.25 * most
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1,)):
        ticks = [value for power in decades for factor in factors if low <= (value := factor * 10.0**power) <= high]
        if len(ticks) <= _MOST_TICKS:
            break
    return Axis(low, high, tuple(ticks), logarithmic=True)


def score_axis(scores: Sequence[float]) -> Axis:
    """Return an axis of scores, between 0 and 1, wide enough not to blow up small changes."""
    span = max(max(scores) - min(scores), _MIN_SCORE_SPAN)
    middle = (max(scores) + min(scores)) / 2
    return _linear(max(0.0, middle - 0.8 * span), min(1.0, middle + 0.8 * span))


def tick_text(value: float, axis: Axis) -> str:
    """Return a mark's text: with as many digits as the step needs, or in k, M, G where numbers are large."""
    if axis.high >= 1e4:
        factor, prefix = next((f, p) for f, p in ((1e9, " G"), (1e6, " M"), (1e3, " k")) if axis.high >= f)
        return "0" if value == 0 else f"{value / factor:g}{prefix}"
    if axis.logarithmic:
        return f"{value:g}"
    step = axis.ticks[1] - axis.ticks[0] if len(axis.ticks) > 1 else axis.high
    return f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def _linear(low: float, high: float) -> Axis:
    """Return an axis with about five round marks."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in _STEPS if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return Axis(low, high, tuple(round(number * step, 12) for number in range(first, last + 1)))
