"""The latency–mAP plot: interactive for the page, and as an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

# Told apart by colour-blind readers, and at least 3:1 against both the light and the dark page.
_COLOURS = ("#2a7fd4", "#d2691e", "#17956b", "#b85aa8", "#9a7d0a", "#6f6ae0")
_SYMBOLS = {"onnxruntime": ("circle", "o"), "torch": ("diamond", "D")}
_OTHER_SYMBOL = ("square", "s")
_RUN_SYMBOL = ("square", "s")
_NEUTRAL = "#7d8a83"
_MIN_MAP_SPAN = 0.1
_X_TITLE = "p50 latency, ms (left is faster)"
_Y_TITLE = "mAP50-95"


@dataclass(frozen=True)
class Point:
    """One model of a run on one runtime. Latencies are in ms, map50_95 is a share."""

    run: str
    model: str
    runtime: str
    p50_ms: float
    interval_ms: tuple[float, float] | None
    map50_95: float
    details: str


def interactive(points: Sequence[Point]) -> str:
    """Return the plot as an HTML fragment with plotly's own code in it, so that it needs no network."""
    import plotly.graph_objects as go

    figure = go.Figure(layout={"template": "none"})
    for pair in _pairs(points):
        figure.add_scatter(
            x=[point.p50_ms for point in pair],
            y=[point.map50_95 for point in pair],
            mode="lines",
            line={"color": _colour(points, pair[0]), "width": 1.5, "dash": "dot"},
            hoverinfo="skip",
            showlegend=False,
        )
    for point in points:
        colour = _colour(points, point)
        low, high = point.interval_ms or (point.p50_ms, point.p50_ms)
        figure.add_scatter(
            x=[point.p50_ms],
            y=[point.map50_95],
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [high - point.p50_ms],
                "arrayminus": [point.p50_ms - low],
                "color": colour,
                "width": 0,
            },
            mode="markers",
            marker={
                "symbol": _symbol(point)[0] + ("-open" if _is_baseline(point) else ""),
                "size": 13,
                "color": colour,
                "line": {"width": 2.5, "color": colour},
            },
            hovertext=f"<b>{escape(_name(points, point))}</b><br>{escape(point.details)}",
            hoverinfo="text",
            showlegend=False,
        )
    for name, symbols, colour in _legend(points):
        marker = {"symbol": symbols[0], "size": 10, "color": colour}
        figure.add_scatter(x=[None], y=[None], mode="markers", marker=marker, name=escape(name))
    left, right, bottom, top = _limits(points)
    figure.update_layout(
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13},
        margin={"l": 58, "r": 12, "t": 8, "b": 48},
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom", "itemclick": False},
        dragmode=False,
        hovermode="closest",
        hoverlabel={"align": "left", "font": {"color": "#fff"}},
    )
    figure.update_xaxes(title={"text": _X_TITLE, "standoff": 12}, range=[left, right], fixedrange=True, zeroline=True)
    figure.update_yaxes(title=_Y_TITLE, range=[bottom, top], fixedrange=True, zeroline=False, tickformat=".2f")
    return figure.to_html(
        full_html=False,
        include_plotlyjs=True,
        div_id="latency-map",
        config={"displayModeBar": False, "responsive": True},
    )


def image(points: Sequence[Point], path: Path) -> None:
    """Write the plot as a PNG of 1080 × 660 px."""
    import warnings

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for pair in _pairs(points):
        axes.plot(
            [point.p50_ms for point in pair],
            [point.map50_95 for point in pair],
            color=_colour(points, pair[0]),
            linestyle=":",
            linewidth=1.2,
        )
    for point in points:
        colour = _colour(points, point)
        low, high = point.interval_ms or (point.p50_ms, point.p50_ms)
        axes.errorbar(
            [point.p50_ms],
            [point.map50_95],
            xerr=[[point.p50_ms - low], [high - point.p50_ms]],
            marker=_symbol(point)[1],
            markersize=8,
            markeredgewidth=1.8,
            color=colour,
            markerfacecolor="white" if _is_baseline(point) else colour,
        )
    for name, symbols, colour in _legend(points):
        # A "$" in a name is not mathematics.
        axes.plot([], [], color=colour, linestyle="", marker=symbols[1], label=name.replace("$", r"\$"))
    left, right, bottom, top = _limits(points)
    axes.set(xlim=(left, right), ylim=(bottom, top), xlabel=_X_TITLE, ylabel=_Y_TITLE)
    axes.set_title("hollow: dense, filled: pruned", loc="left", fontsize=9)
    axes.grid(color="#dde3df", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a name may hold signs that the font lacks
        figure.savefig(path, dpi=150, metadata={"Software": None})


def _pairs(points: Sequence[Point]) -> list[list[Point]]:
    """Return the points of each run and runtime, to be joined by a line."""
    keys = dict.fromkeys((point.run, point.runtime) for point in points)
    return [[point for point in points if (point.run, point.runtime) == key] for key in keys]


def _runs(points: Sequence[Point]) -> list[str]:
    return list(dict.fromkeys(point.run for point in points))


def _name(points: Sequence[Point], point: Point) -> str:
    return f"{point.run} {point.model}" if len(_runs(points)) > 1 else point.model


def _legend(points: Sequence[Point]) -> list[tuple[str, tuple[str, str], str]]:
    """Return (name, symbols of plotly and matplotlib, colour) of each entry: the runtimes, then several runs."""
    runtimes = dict.fromkeys(point.runtime for point in points)
    entries = [(runtime, _SYMBOLS.get(runtime, _OTHER_SYMBOL), _NEUTRAL) for runtime in runtimes]
    runs = _runs(points)
    if len(runs) > 1:
        entries += [(run, _RUN_SYMBOL, _COLOURS[index % len(_COLOURS)]) for index, run in enumerate(runs)]
    return entries


def _is_baseline(point: Point) -> bool:
    return point.model == "dense"


def _colour(points: Sequence[Point], point: Point) -> str:
    return _COLOURS[_runs(points).index(point.run) % len(_COLOURS)]


def _symbol(point: Point) -> tuple[str, str]:
    return _SYMBOLS.get(point.runtime, _OTHER_SYMBOL)


def _limits(points: Sequence[Point]) -> tuple[float, float, float, float]:
    """Return the limits of both axes: latency from zero, and an mAP span wide enough not to blow up small changes."""
    scores = [point.map50_95 for point in points]
    middle, span = (max(scores) + min(scores)) / 2, max(max(scores) - min(scores), _MIN_MAP_SPAN)
    right = max((point.interval_ms or (0.0, 0.0))[1] for point in points)
    return 0.0, 1.12 * max(right, *(point.p50_ms for point in points)), middle - 0.8 * span, middle + 0.8 * span
