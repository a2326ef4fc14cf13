"""How much to prune for a measured speed-up: the next amount to try, from those that were measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

DIGITS = 4  # of an amount
NEAR = 0.05  # share of the whole range: so near to its end the search goes there
FINEST = 0.003  # share of the whole range: a narrower bracket is not searched
EDGE = 0.2  # share of a bracket that a step cuts off at least: measurements scatter, and speed-ups have steps


@dataclass(frozen=True)
class Knob:
    """An amount of pruning.

    Attributes:
        least: nothing is removed, the speed-up is 1.
        most: as far as the search may go.
        first: where it begins; None for an amount that is itself a speed-up, and begins at the target.
    """

    least: float
    most: float
    first: float | None


def nearest(points: Mapping[float, float], target: float) -> float:
    """Return the amount whose speed-up is nearest to the target.

    >>> nearest({0.2: 1.5, 0.4: 1.9}, 1.8)
    0.4
    """
    return min(points, key=lambda amount: abs(points[amount] / target - 1))


def next_amount(knob: Knob, points: Mapping[float, float], target: float, tolerance: float) -> float | None:
    """Return the amount to measure next; None where the target is met, or where no other amount is left.

    The speed-up need not grow with the amount everywhere: in blocks of 16, one channel less can cost time. The bracket
    is the least amount that is fast enough, and the largest one below it that is not.

    Args:
        points: speed-up by amount.
        tolerance: relative, of a speed-up that counts as the target.
    """
    if not points:
        return target if knob.first is None else knob.first
    if abs(points[nearest(points, target)] / target - 1) <= tolerance:
        return None
    high = min((amount for amount, speedup in points.items() if speedup >= target), default=None)
    slow = {knob.least: 1.0} | {a: s for a, s in points.items() if s < target and (high is None or a < high)}
    low = max(slow)
    if high is None:
        middle = (low + knob.most) / 2
        wanted = knob.least + (low - knob.least) * (target - 1) / (slow[low] - 1) if slow[low] > 1 else middle
        guess = min(wanted, middle) if knob.most - low > NEAR * (knob.most - knob.least) else knob.most
    elif high - low < FINEST * (knob.most - knob.least):
        return None
    else:
        share = (target - slow[low]) / (points[high] - slow[low])
        guess = low + min(max(share, EDGE), 1 - EDGE) * (high - low)
    guess = round(guess, DIGITS)
    return None if guess in points or guess <= knob.least else guess
