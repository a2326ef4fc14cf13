"""Charts of the page, drawn as SVG and HTML without a library: score against cost, and layers side by side.

Places inside a plot are percentages of it, so that it fills any width while its letters keep their size.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from benchmark import wording
from benchmark.axes import Axis, tick_text
from benchmark.pages import Chart, Number, Table, breakable, escaped
from benchmark.plots import SWATCH, Panel, Point, axes, caption, colours, legend, pairs, shape, stairs, x_title
from benchmark.records import Layer

_SHAPES = {
    "circle": '<circle r="6"/>',
    "diamond": '<path d="M0-8 8 0 0 8-8 0Z"/>',
    "square": '<path d="M-6-6H6V6H-6Z"/>',
    "triangle": '<path d="M0-7 7 6H-7Z"/>',
    SWATCH: '<path d="M-9-3H9V3H-9Z"/>',
    "hexagon": '<path d="M-7 0-3.5-6h7L7 0 3.5 6h-7Z"/>',
}
_MOST_LAYERS = 30


def pareto(panel: Panel) -> str:
    """Return the plot as trusted HTML: every text of the panel is escaped in it."""
    across, up = axes(panel)
    points, own_colours = panel.points, colours(panel.points)
    parts = [_grid(across, up)]
    corners = stairs(points, across, up)
    for start, end in itertools.pairwise(corners):
        parts.append(_line("front", _x(across, start[0]), _y(up, start[1]), _x(across, end[0]), _y(up, end[1])))
    for group in pairs(points):
        for one, other in itertools.pairwise(group):
            places = (_x(across, one.cost), _y(up, one.score), _x(across, other.cost), _y(up, other.score))
            parts.append(_line("pair", *places, own_colours[one.series]))
    parts += [_mark(point, own_colours[point.series], across, up) for point in points]
    entries = [("Pareto front", '<path class="front" d="M-9 0H9"/>', ""), *_entries(points)]
    keys = "".join(
        f'<li><svg class="key" style="--c:{own}" aria-hidden="true"><svg x="50%" y="50%" overflow="visible">'
        f"{drawn}</svg></svg>{escaped(name)}</li>"
        for name, drawn, own in entries
    )
    title = f'<p class="note">{escaped(panel.title)}</p>' if panel.title else ""
    return (
        f'{title}<ul class="legend">{keys}</ul><p class="axis">{escaped(panel.metric)}</p>'
        f'<div class="plot"><svg role="group" aria-label="{escaped(caption(panel))}">{"".join(parts)}</svg></div>'
        f'<p class="axis across">{escaped(x_title(panel))}</p>'
    )


@dataclass(frozen=True)
class LayerRow:
    """What one layer costs in each of the models; None where a model has no such layer.

    A row that `is_sum` holds the many cheap ones: it gets no bar, beside which all others would look small.
    """

    name: str
    type: str
    costs: tuple[float | None, ...]
    is_sum: bool = False


def layer_rows(models: Sequence[Sequence[Layer]]) -> list[LayerRow]:
    """Return the layers of several models side by side, the dearest first; the many cheap ones are one row.

    Layers are the same where their names are; those of one name in one model are added.
    """
    tables = []
    for layers in models:
        costs: dict[str, float] = {}
        for layer in layers:
            costs[layer.name] = costs.get(layer.name, 0.0) + layer.cost
        tables.append(costs)
    types = {layer.name: layer.type for layers in models for layer in layers}
    rows = [LayerRow(name, kind, tuple(costs.get(name) for costs in tables)) for name, kind in types.items()]
    rows.sort(key=lambda row: -max(cost or 0.0 for cost in row.costs))
    if len(rows) <= _MOST_LAYERS + 1:
        return rows
    rest = rows[_MOST_LAYERS:]
    sums = tuple(sum(row.costs[index] or 0.0 for row in rest) for index in range(len(models)))
    return [*rows[:_MOST_LAYERS], LayerRow(f"{len(rest)} others", "", sums, is_sum=True)]


def bars(names: Sequence[str], models: Sequence[Sequence[Layer]], unit: str) -> Chart:
    """Return the layers of one or two models as bars, and for Markdown as a table.

    Args:
        names: of the models.
        models: the layers of each.
        unit: ms or instructions.
    """
    rows = layer_rows(models)
    most = max((cost or 0.0 for row in rows if not row.is_sum for cost in row.costs), default=0.0) or 1.0
    columns = ["layer", *(f"{name}, {unit}" for name in names), *(["ratio"] if len(names) == 2 else [])]
    cells = [[row.name, *(Number(_amount(cost, unit), cost) for cost in row.costs), *_ratio(row)] for row in rows]
    lines = []
    for row in rows:
        drawn = "".join(
            f'<i class="m{index}" style="width:{100 * (cost or 0.0) / most:.2f}%"></i>'
            for index, cost in enumerate(() if row.is_sum else row.costs)
        )
        values = "".join(f"<td>{_amount(cost, unit)}</td>" for cost in row.costs)
        ratio = "".join(f"<td>{number.text}</td>" for number in _ratio(row))
        kind = f" <small>{escaped(row.type)}</small>" if row.type else ""
        lines.append(
            f'<tr><th scope="row">{breakable(row.name)}{kind}</th><td class="bar">{drawn}</td>{values}{ratio}</tr>'
        )
    head = "".join(
        f'<th scope="col"><span class="s{index}" aria-hidden="true">■</span>&nbsp;{breakable(name)}<br>{unit}</th>'
        for index, name in enumerate(names)
    )
    ratio = '<th scope="col">ratio</th>' if len(names) == 2 else ""
    html = (
        '<div class="table"><table class="layers"><thead><tr><th scope="col">layer</th><th scope="col">'
        '<span class="hidden">bars</span></th>'
        f"{head}{ratio}</tr></thead>\n<tbody>\n" + "\n".join(lines) + "\n</tbody></table></div>"
    )
    return Chart(html, Table(columns, cells))


def _amount(cost: float | None, unit: str) -> str:
    return wording.number(cost, 3) if unit == "ms" else wording.size(cost)


def _ratio(row: LayerRow) -> list[Number]:
    if len(row.costs) != 2:
        return []
    first, second = row.costs
    return [Number(wording.quotient(first, second), None if first is None or not second else first / second)]


def _entries(points: Sequence[Point]) -> list[tuple[str, str, str]]:
    return [(name, _SHAPES[kind], own) for name, (kind, _), own in legend(points)]


def _grid(across: Axis, up: Axis) -> str:
    parts = []
    for value in across.ticks:
        x = _x(across, value)
        parts.append(_line("grid", x, 0, x, 100))
        parts.append(f'<text x="{x:.2f}%" y="100%" dy="20" text-anchor="middle">{tick_text(value, across)}</text>')
    for value in up.ticks:
        y = _y(up, value)
        parts.append(_line("grid", 0, y, 100, y))
        parts.append(f'<text x="0" y="{y:.2f}%" dx="-8" dy=".32em" text-anchor="end">{tick_text(value, up)}</text>')
    return "".join(parts)


def _mark(point: Point, own: str, across: Axis, up: Axis) -> str:
    x, y = _x(across, point.cost), _y(up, point.score)
    low, high = point.interval or (point.cost, point.cost)
    tip = "\n".join(escaped(line) for line in point.details)
    return (
        f'<g class="mark{" hollow" if point.is_baseline else ""}" style="--c:{own}" tabindex="0" role="img" '
        f'aria-label="{tip}">{_line("span", _x(across, low), y, _x(across, high), y)}'
        f'<svg x="{x:.2f}%" y="{y:.2f}%" overflow="visible"><circle class="reach" r="16"/>'
        f"{_SHAPES[shape(point.runtime)[0]]}</svg></g>"
    )


def _line(kind: str, x1: float, y1: float, x2: float, y2: float, own: str | None = None) -> str:
    style = f' style="--c:{own}"' if own else ""
    return f'<line class="{kind}" x1="{x1:.2f}%" y1="{y1:.2f}%" x2="{x2:.2f}%" y2="{y2:.2f}%"{style}/>'


def _x(axis: Axis, value: float) -> float:
    return 100 * axis.share(value)


def _y(axis: Axis, value: float) -> float:
    return 100 * (1 - axis.share(value))
