"""How reports write a number: units, ratios, intervals, and a dash for what is unknown."""

from __future__ import annotations

from collections.abc import Sequence

UNKNOWN = "–"


def number(value: float | None, digits: int) -> str:
    """Return a number with so many digits after the point."""
    return UNKNOWN if value is None else f"{value:.{digits}f}"


def ms(value: float | None) -> str:
    """Return milliseconds with two digits after the point, three below 1 ms, where GPUs differ in the third.

    >>> ms(12.345), ms(0.3456), ms(None)
    ('12.35', '0.346', '–')
    """
    return number(value, 2 if value is None or value >= 1.0 else 3)


def size(value: float | None, unit: str = "") -> str:
    """Return a count or a size in G, M or k of its unit, with three digits.

    >>> size(123_456), size(999_600), size(9_996_000_000_000, "B")
    ('123 k', '1 M', '9996 GB')
    """
    if value is None:
        return UNKNOWN
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * factor:  # what three digits round up to it
            scaled = value / factor
            return f"{scaled:.3g} {prefix}{unit}" if scaled < 999.5 else f"{scaled:.0f} {prefix}{unit}"
    return f"{value:g} {unit}".rstrip()


def significant(value: float) -> str:
    """Return a number in two significant digits, whole from 10 on.

    >>> significant(0.00447), significant(123.4), significant(8.1e-06)
    ('0.0045', '123', '8.1e-06')
    """
    return f"{value:.2g}" if abs(value) < 10 else f"{value:.0f}"


def ratio(value: float | None) -> str:
    """Return a ratio, such as 1.77×."""
    return UNKNOWN if value is None else f"{value:.2f}×"


def quotient(dense: float | None, pruned: float | None) -> str:
    """Return dense over pruned as a ratio."""
    return ratio(None if dense is None or not pruned else dense / pruned)


def difference(dense: float | None, pruned: float | None) -> str:
    """Return pruned minus dense, with its sign."""
    return UNKNOWN if dense is None or pruned is None else f"{pruned - dense:+.4f}".replace("-", "−")


def share(value: float | None) -> str:
    """Return a share as a percentage."""
    return UNKNOWN if value is None else f"{value:.0%}".replace("%", " %")


def interval(value: Sequence[float] | None) -> str:
    """Return the ends of an interval."""
    return UNKNOWN if value is None else f"{value[0]:.2f}–{value[1]:.2f}"


def interval_ms(value: Sequence[float] | None) -> str:
    """Return the ends of an interval of milliseconds, both with as many digits."""
    digits = 3 if value and value[0] < 1.0 else 2
    return UNKNOWN if value is None else f"{value[0]:.{digits}f}–{value[1]:.{digits}f}"


def known(value: object) -> str:
    """Return a value, or the items of a list, as text."""
    if isinstance(value, list):
        return " ".join(str(item) for item in value)
    return UNKNOWN if value is None else str(value)


def cost(value: float | None, unit: str | None) -> str:
    """Return a latency in ms, or a number of instructions, which are never called ms."""
    if value is None:
        return UNKNOWN
    return f"{ms(value)} ms" if unit == "ms" else f"{size(value)} {unit}".replace("  ", " ")
