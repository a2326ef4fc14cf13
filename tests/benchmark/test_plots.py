from __future__ import annotations

import re

import pytest

from benchmark import charts, plots
from benchmark.axes import Axis, cost_axis, tick_text
from benchmark.plots import Panel, Point
from benchmark.records import Layer


def point(cost: float, score: float, *, on_front: bool = False, series: str = "s", dense: bool = False) -> Point:
    return Point(series, dense, "torch", cost, None, score, ("details",), on_front)


def panel(*points: Point, unit: str = "ms") -> Panel:
    return Panel("", unit, "mAP50-95", points)


@pytest.mark.parametrize(
    ("places", "best"),
    [
        ([], []),
        ([(1.0, 0.5)], [0]),
        ([(1.0, 0.3), (2.0, 0.5), (3.0, 0.4)], [0, 1]),
        ([(1.0, 0.3), (1.0, 0.5)], [1]),  # as cheap, more right
        ([(1.0, 0.5), (2.0, 0.5)], [0]),  # cheaper, as right
        ([(1.0, 0.5), (1.0, 0.5)], [0, 1]),  # neither beats the other
        ([(3.0, 0.6), (2.0, 0.5), (1.0, 0.4)], [0, 1, 2]),
    ],
)
def test_the_front_is_what_nothing_beats(places: list[tuple[float, float]], best: list[int]) -> None:
    assert plots.front(places) == best


def test_the_front_is_drawn_as_stairs_from_the_cheapest_point_to_the_edge() -> None:
    across, up = Axis(0.0, 5.0, ()), Axis(0.2, 0.8, ())
    points = [point(3.0, 0.6, on_front=True), point(2.0, 0.1), point(1.0, 0.4, on_front=True)]
    corners = [(1.0, 0.2), (1.0, 0.4), (3.0, 0.4), (3.0, 0.6), (5.0, 0.6)]
    assert plots.stairs(points, across, up) == corners


@pytest.mark.parametrize(
    ("scores", "low", "high"),
    [
        ([0.6, 0.61], 0.525, 0.685),  # small changes are not blown up
        ([0.3, 0.7], 0.18, 0.82),
        ([0.0, 0.0], 0.0, 0.08),  # there is no mAP below 0
        ([0.99, 1.0], 0.915, 1.0),
    ],
)
def test_the_axis_of_scores_stays_between_0_and_1(scores: list[float], low: float, high: float) -> None:
    _, up = plots.axes(panel(*(point(1.0, score) for score in scores)))
    assert (up.low, up.high) == (pytest.approx(low), pytest.approx(high))
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in up.ticks)
    assert len(up.ticks) >= 3


@pytest.mark.parametrize(
    ("cost", "ticks"),
    [
        (30.0, ["0", "10", "20", "30"]),
        (0.9, ["0.0", "0.5", "1.0"]),
        (0.05, ["0.00", "0.02", "0.04"]),
        (224.4e6, ["0", "100 M", "200 M"]),
        (1.5e9, ["0", "0.5 G", "1 G", "1.5 G"]),
    ],
)
def test_ticks_are_round_and_say_large_numbers_shortly(cost: float, ticks: list[str]) -> None:
    across, _ = plots.axes(panel(point(cost, 0.5)))
    assert [tick_text(value, across) for value in across.ticks] == ticks


@pytest.mark.parametrize(
    ("costs", "ticks"),
    [
        ([4.0, 39.0], ["0", "10", "20", "30", "40"]),  # less than ten times: from zero
        ([4.0, 40.0], ["5", "10", "20", "50"]),
        ([0.2, 400.0], ["1", "10", "100"]),  # more marks than a phone has room for
        ([20e6, 2e9], ["0.02 G", "0.05 G", "0.1 G", "0.2 G", "0.5 G", "1 G", "2 G"]),
    ],
)
def test_an_axis_is_logarithmic_from_ten_times_on(costs: list[float], ticks: list[str]) -> None:
    across, _ = plots.axes(panel(*(point(cost, 0.5) for cost in costs)))
    assert [tick_text(value, across) for value in across.ticks] == ticks
    assert across.logarithmic == (ticks[0] != "0")
    assert 0.0 <= across.share(costs[0]) < across.share(costs[1]) <= 1.0
    title = plots.x_title(panel(*(point(cost, 0.5) for cost in costs)))
    assert ("logarithmic" in title) == across.logarithmic


def test_equal_ratios_are_equally_far_apart_on_a_logarithmic_axis() -> None:
    axis = cost_axis([1.0, 10.0, 100.0], [0.0, 120.0])
    one, ten, hundred = (axis.share(cost) for cost in (1.0, 10.0, 100.0))
    assert ten - one == pytest.approx(hundred - ten)
    assert axis.share(0.0) == 0.0  # an interval that reaches zero ends at the edge


def test_of_many_models_those_on_the_front_have_a_colour_and_none_shares_one() -> None:
    points = [point(float(i), 0.1 * i, series=f"m{i}", on_front=i in (2, 5)) for i in range(1, 10)]
    colours = plots.colours(points)
    assert [name for name, colour in colours.items() if colour != plots.NEUTRAL] == ["m2", "m5"]
    assert colours["m2"] != colours["m5"]
    assert [name for name, _, _ in plots.legend(points)] == ["torch", "m2", "m5", "7 others"]
    assert "Of 9 models some on the front" in plots.caption(panel(*points))
    few = plots.colours(points[:6])
    assert len(set(few.values())) == 6
    assert plots.NEUTRAL not in few.values()


def test_long_names_of_a_legend_keep_both_ends() -> None:
    names = [f"{'x' * 40}_{end}" for end in ("dense", "pruned")]
    shown = [name for name, _, _ in plots.legend([point(1.0, 0.5, series=name) for name in names])][1:]
    assert [name[-6:] for name in shown] == ["_dense", "pruned"]
    assert {len(name) for name in shown} == {36}


def test_the_caption_tells_what_is_there() -> None:
    several = panel(point(1.0, 0.5, series="a"), point(2.0, 0.5, series="b"), unit="instructions")
    assert plots.caption(several).startswith("mAP50-95 against instructions. Colours tell the models apart.")
    pipeline = panel(point(2.0, 0.5, dense=True), point(1.0, 0.5))
    assert "Hollow marks are dense" in plots.caption(pipeline)
    assert "Colours" not in plots.caption(pipeline)
    assert len(plots.pairs(pipeline.points)) == 1
    assert plots.pairs(several.points) == []


def test_layers_of_one_name_are_added_and_cheap_ones_are_one_row() -> None:
    dense = [Layer("a", "Conv", 1.0), Layer("a", "Conv", 2.0), *(Layer(f"x{i}", "", 0.01) for i in range(40))]
    pruned = [Layer("a", "Conv", 1.5), Layer("new", "Conv", 0.5)]
    rows = charts.layer_rows([dense, pruned])
    assert (rows[0].name, rows[0].costs) == ("a", (3.0, 1.5))
    assert (rows[1].name, rows[1].costs) == ("new", (None, 0.5))
    assert len(rows) == 31
    assert rows[30].name == "12 others"
    assert rows[30].costs == (pytest.approx(0.12), 0.0)
    total = [sum(row.costs[index] or 0.0 for row in rows) for index in (0, 1)]
    assert total == pytest.approx([3.4, 2.0])


def test_the_sum_of_cheap_layers_has_a_number_and_no_bar() -> None:
    layers = [Layer(f"l{i}", "Conv", 1.0 if i else 2.0) for i in range(60)]
    chart = charts.bars(["a"], [layers], "ms")
    widths = re.findall(r"width:([\d.]+)%", chart.html)
    assert widths == ["100.00", *["50.00"] * 29]  # of the dearest layer, not of the thirty others together
    assert '<th scope="row">30 others</th><td class="bar"></td><td>30.000</td>' in chart.html


def test_a_layer_that_is_gone_has_a_dash_and_no_ratio() -> None:
    chart = charts.bars(["dense", "pruned"], [[Layer("<a>", "", 2e6)], [Layer("b", "", 1e6)]], "instructions")
    assert [[cell if isinstance(cell, str) else cell.text for cell in row] for row in chart.table.rows] == [
        ["<a>", "2 M", "–", "–"],
        ["b", "–", "1 M", "–"],
    ]
    assert "&lt;a&gt;" in chart.html
    assert "<a>" not in chart.html
