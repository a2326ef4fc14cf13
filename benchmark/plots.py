"""Cost against score: what a plot shows, its Pareto front, its axes, and the plot as an image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# Told apart by colour-blind readers, and at least 3:1 against both the light and the dark page.
COLOURS = ("#2a7fd4", "#d2691e", "#17956b", "#b85aa8", "#9a7d0a", "#6f6ae0")
NEUTRAL = "#7d8a83"
# The shape of a runtime, and matplotlib's sign for it.
_SHAPES = {
    "onnxruntime": ("circle", "o"),
    "torch": ("diamond", "D"),
    "ncnn": ("square", "s"),
    "tensorrt": ("triangle", "^"),
}
_OTHER_SHAPE = ("hexagon", "h")
SWATCH = "swatch"  # the colour of a series, whatever the shape
_MIN_SCORE_SPAN = 0.1
_LONGEST_NAME = 36
_X_TITLES = {"ms": "p50 latency, ms (left is faster)", "instructions": "instructions of one query (left is cheaper)"}
_STEPS = (1, 2, 5, 10)


@dataclass(frozen=True)
class Point:
    """One model on one runtime. `cost` is in the unit of its plot, `score` is a share; points of a series share colour.

    `details` are the lines that are shown when a reader points at it.
    """

    series: str
    is_baseline: bool
    runtime: str
    cost: float
    interval: tuple[float, float] | None
    score: float
    details: tuple[str, ...]
    on_front: bool = False


@dataclass(frozen=True)
class Panel:
    """One plot: points whose costs have one unit, ms or instructions, and were taken on one device."""

    title: str
    unit: str
    metric: str
    points: Sequence[Point]


@dataclass(frozen=True)
class Axis:
    """The limits of an axis and where its marks are."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def share(self, value: float) -> float:
        """Return how far along the axis a value lies, from 0 to 1."""
        return (value - self.low) / (self.high - self.low)


def front(places: Sequence[tuple[float, float]]) -> list[int]:
    """Return which (cost, score) no other one beats: none is as cheap and more right, or cheaper and as right.

    >>> front([(1.0, 0.3), (2.0, 0.5), (3.0, 0.4)])
    [0, 1]
    """
    return [
        index
        for index, (cost, score) in enumerate(places)
        if not any(
            other_cost <= cost and other_score >= score and (other_cost, other_score) != (cost, score)
            for other_cost, other_score in places
        )
    ]


def stairs(points: Sequence[Point], across: Axis, up: Axis) -> list[tuple[float, float]]:
    """Return the corners of the front as a staircase: below and right of it is what some point beats."""
    corners = []
    floor = up.low
    for cost, score in sorted({(point.cost, point.score) for point in points if point.on_front}):
        corners += [(cost, floor), (cost, score)]
        floor = score
    return [*corners, (across.high, floor)]


def axes(panel: Panel) -> tuple[Axis, Axis]:
    """Return the axis of costs, from zero, and that of scores, wide enough not to blow up small changes."""
    costs = [value for point in panel.points for value in (point.cost, *(point.interval or ()))]
    scores = [point.score for point in panel.points]
    span = max(max(scores) - min(scores), _MIN_SCORE_SPAN)
    middle = (max(scores) + min(scores)) / 2
    low, high = max(0.0, middle - 0.8 * span), min(1.0, middle + 0.8 * span)
    return _axis(0.0, 1.12 * max(costs)), _axis(low, high)


def tick_text(value: float, axis: Axis) -> str:
    """Return a mark's text: with as many digits as the step needs, or in k, M, G where numbers are large."""
    if axis.high >= 1e4:
        factor, prefix = next((f, p) for f, p in ((1e9, " G"), (1e6, " M"), (1e3, " k")) if axis.high >= f)
        return "0" if value == 0 else f"{value / factor:g}{prefix}"
    step = axis.ticks[1] - axis.ticks[0] if len(axis.ticks) > 1 else axis.high
    return f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def colour(points: Sequence[Point], series: str) -> str:
    """Return the colour of a series; that of many repeat, names do not."""
    return COLOURS[list(dict.fromkeys(point.series for point in points)).index(series) % len(COLOURS)]


def shape(runtime: str) -> tuple[str, str]:
    """Return the shape of a runtime's marks: its name, and matplotlib's sign."""
    return _SHAPES.get(runtime, _OTHER_SHAPE)


def legend(points: Sequence[Point]) -> list[tuple[str, tuple[str, str], str]]:
    """Return (name, shape, colour) of each entry: the runtimes, then the series if there are several."""
    entries = [(name, shape(name), NEUTRAL) for name in dict.fromkeys(point.runtime for point in points)]
    series = list(dict.fromkeys(point.series for point in points))
    if len(series) > 1:
        entries += [(name, (SWATCH, ""), colour(points, name)) for name in series]
    return [(name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…", *rest) for name, *rest in entries]  # type: ignore[misc]


def pairs(points: Sequence[Point]) -> list[list[Point]]:
    """Return the points of each series and runtime that has several, to be joined by a line."""
    keys = dict.fromkeys((point.series, point.runtime) for point in points)
    joined = [[point for point in points if (point.series, point.runtime) == key] for key in keys]
    return [group for group in joined if len(group) > 1 and any(point.is_baseline for point in group)]


def x_title(panel: Panel) -> str:
    """Return what the axis of costs shows, with its unit."""
    return _X_TITLES[panel.unit]


def caption(panel: Panel) -> str:
    """Return how to read a plot."""
    points = panel.points
    parts = ["Latency against " if panel.unit == "ms" else "Instructions against ", panel.metric, "."]
    if any(point.is_baseline for point in points):
        parts.append(" Hollow marks are dense, filled ones pruned.")
    if len({point.series for point in points}) > 1:
        parts.append(" Colours tell the models apart." if not pairs(points) else " Colours tell the runs apart.")
    parts.append(" The green line is the Pareto front: nothing is both cheaper and more accurate than what lies on it.")
    if any(point.interval for point in points):
        parts.append(" Bars are 95 % intervals of the p50.")
    return "".join(parts)


def image(panel: Panel, path: Path) -> None:
    """Write a plot as a PNG of 1080 × 660 px."""
    import warnings

    from matplotlib.artist import Artist
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    points, (across, up) = panel.points, axes(panel)
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    plot = figure.add_subplot()
    corners = stairs(points, across, up)
    plot.plot(*zip(*corners, strict=True), color="#5cc690", linewidth=2.5, alpha=0.6, label="Pareto front")
    for group in pairs(points):
        line = ([point.cost for point in group], [point.score for point in group])
        plot.plot(*line, color=colour(points, group[0].series), linestyle=":", linewidth=1.2)
    for point in points:
        own = colour(points, point.series)
        low, high = point.interval or (point.cost, point.cost)
        plot.errorbar(
            [point.cost],
            [point.score],
            xerr=[[max(0.0, point.cost - low)], [max(0.0, high - point.cost)]],
            marker=shape(point.runtime)[1],
            markersize=8,
            markeredgewidth=1.8,
            color=own,
            markerfacecolor="white" if point.is_baseline else own,
            clip_on=False,
        )
    plot.set(xlim=(across.low, across.high), ylim=(up.low, up.high), xlabel=x_title(panel), ylabel=panel.metric)
    plot.set_xticks(across.ticks, [tick_text(value, across) for value in across.ticks])
    plot.set_yticks(up.ticks, [tick_text(value, up) for value in up.ticks])
    hint = "hollow: dense, filled: pruned" if any(point.is_baseline for point in points) else ""
    plot.set_title(_plain(", ".join(filter(None, (panel.title, hint)))), loc="left", fontsize=9)
    plot.grid(color="#dde3df", linewidth=0.8)
    plot.set_axisbelow(True)
    plot.spines[["top", "right"]].set_visible(False)
    handles: list[Artist] = [*plot.get_lines()[:1]]
    for name, (kind, sign), own in legend(points):
        if kind == SWATCH:
            handles.append(Patch(color=own, label=_plain(name)))
        else:
            handles.append(Line2D([], [], color=own, linestyle="", marker=sign, label=_plain(name)))
    figure.legend(handles=handles, frameon=False, fontsize=9, loc="outside lower center", ncols=min(4, len(handles)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a name may hold signs that the font lacks
        figure.savefig(path, dpi=150, metadata={"Software": None})


def _axis(low: float, high: float) -> Axis:
    """Return an axis with about five round marks."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in _STEPS if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return Axis(low, high, tuple(round(number * step, 12) for number in range(first, last + 1)))


def _plain(name: str) -> str:
    """Return a name in which a "$" is not mathematics, and which matplotlib does not hide."""
    return name.replace("$", r"\$").lstrip("_")
