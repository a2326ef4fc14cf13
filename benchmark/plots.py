"""Score against cost: what a plot shows, its Pareto front, and the plot as an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmark.axes import Axis, cost_axis, score_axis, tick_text

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
_LONGEST_NAME = 36
_LEGEND_SIGNS = 96  # that fit beside each other in the picture
_X_TITLES = {
    "ms": ("p50 latency, ms", "left is faster"),
    "instructions": ("instructions of one query", "left is cheaper"),
}


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
    """Return the axis of costs and that of scores."""
    ends = [end for point in panel.points for end in point.interval or ()]
    return cost_axis([point.cost for point in panel.points], ends), score_axis([point.score for point in panel.points])


def colours(points: Sequence[Point]) -> dict[str, str]:
    """Return the colour of each series; where there are more than colours, those on the front have one of their own.

    The others are grey: two series of one colour would say that they belong together.
    """
    series = list(dict.fromkeys(point.series for point in points))
    if len(series) <= len(COLOURS):
        chosen = series
    else:
        best = sorted((point for point in points if point.on_front), key=lambda point: point.cost)
        chosen = list(dict.fromkeys(point.series for point in best))[: len(COLOURS)]
    return dict.fromkeys(series, NEUTRAL) | dict(zip(chosen, COLOURS, strict=False))


def shape(runtime: str) -> tuple[str, str]:
    """Return the shape of a runtime's marks: its name, and matplotlib's sign."""
    return _SHAPES.get(runtime, _OTHER_SHAPE)


def legend(points: Sequence[Point]) -> list[tuple[str, tuple[str, str], str]]:
    """Return (name, shape, colour) of each entry: the runtimes, then the series if there are several."""
    entries = [(name, shape(name), NEUTRAL) for name in dict.fromkeys(point.runtime for point in points)]
    own = colours(points)
    if len(own) > 1:
        coloured = {name: colour for name, colour in own.items() if colour != NEUTRAL}
        entries += [(name, (SWATCH, ""), colour) for name, colour in coloured.items()]
        if others := len(own) - len(coloured):
            entries.append((f"{others} others", (SWATCH, ""), NEUTRAL))
    return [(_shortened(name), kind, colour) for name, kind, colour in entries]


def pairs(points: Sequence[Point]) -> list[list[Point]]:
    """Return the points of each series and runtime that has several, to be joined by a line."""
    keys = dict.fromkeys((point.series, point.runtime) for point in points)
    joined = [[point for point in points if (point.series, point.runtime) == key] for key in keys]
    return [group for group in joined if len(group) > 1 and any(point.is_baseline for point in group)]


def x_title(panel: Panel) -> str:
    """Return what the axis of costs shows, with its unit."""
    name, better = _X_TITLES[panel.unit]
    return f"{name}{', logarithmic' if axes(panel)[0].logarithmic else ''} ({better})"


def caption(panel: Panel) -> str:
    """Return how to read a plot."""
    points = panel.points
    what = {"ms": "latency", "instructions": "instructions"}[panel.unit]
    parts = [f"{panel.metric} against {what}."]
    if any(point.is_baseline for point in points):
        parts.append("Hollow marks are dense, filled ones pruned.")
    own = colours(points)
    kind = "runs" if pairs(points) else "models"
    if NEUTRAL in own.values():
        parts.append(f"Of {len(own)} {kind} some on the front have a colour of their own; the table has all.")
    elif len(own) > 1:
        parts.append(f"Colours tell the {kind} apart.")
    parts.append("The green line is the Pareto front: nothing is both cheaper and more accurate than what lies on it.")
    if any(point.interval for point in points):
        parts.append("Horizontal bars are 95 % intervals of the median.")
    return " ".join(parts)


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
    own_colours = colours(points)
    corners = stairs(points, across, up)
    plot.plot(*zip(*corners, strict=True), color="#5cc690", linewidth=2.5, alpha=0.6, label="Pareto front")
    for group in pairs(points):
        line = ([point.cost for point in group], [point.score for point in group])
        plot.plot(*line, color=own_colours[group[0].series], linestyle=":", linewidth=1.2)
    for point in points:
        own = own_colours[point.series]
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
    if across.logarithmic:
        plot.set_xscale("log")
        plot.minorticks_off()
    plot.set(xlim=(across.low, across.high), ylim=(up.low, up.high), xlabel=x_title(panel), ylabel=panel.metric)
    plot.set_xticks(across.ticks, [tick_text(value, across) for value in across.ticks])
    plot.set_yticks(up.ticks, [tick_text(value, up) for value in up.ticks])
    hint = "Hollow: dense, filled: pruned." if any(point.is_baseline for point in points) else ""
    title = "\n".join(filter(None, (panel.title, hint)))
    plot.set_title(_plain(title), loc="left", fontsize=9)
    plot.grid(color="#dde3df", linewidth=0.8)
    plot.set_axisbelow(True)
    plot.spines[["top", "right"]].set_visible(False)
    handles: list[Artist] = [*plot.get_lines()[:1]]
    for name, (kind, sign), own in legend(points):
        if kind == SWATCH:
            handles.append(Patch(color=own, label=_plain(name)))
        else:
            handles.append(Line2D([], [], color=own, linestyle="", marker=sign, label=_plain(name)))
    longest = max(len(str(handle.get_label())) for handle in handles)
    beside = max(1, min(4, len(handles), _LEGEND_SIGNS // (longest + 8)))
    figure.legend(handles=handles, frameon=False, fontsize=9, loc="outside lower center", ncols=beside)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a name may hold signs that the font lacks
        figure.savefig(path, dpi=150, metadata={"Software": None})


def _shortened(name: str) -> str:
    """Return a name as it fits into a legend: names differ at either end, so that the middle is left out."""
    half = _LONGEST_NAME // 2
    return name if len(name) <= _LONGEST_NAME else f"{name[: half - 1]}…{name[-half:]}"


def _plain(name: str) -> str:
    """Return a name in which a "$" is not mathematics, and which matplotlib does not hide."""
    return name.replace("$", r"\$").lstrip("_")
