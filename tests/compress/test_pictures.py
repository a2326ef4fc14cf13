"""Where things are drawn in the pictures of the stages: every value in its column, no label over another."""

from __future__ import annotations

import pytest

from compress.inspection.sensitivities import cells, places
from compress.latency.front import legible
from compress.latency.table import amount
from compress.pruning.sensitivity_file import SCHEMA, Sensitivity, Tie


@pytest.mark.parametrize(
    ("removed", "columns"),
    [
        ((0.5,), (1,)),  # two units: only a half can go, which is not the last column
        ((1 / 3, 2 / 3), (0, 2)),
        ((0.25, 0.5, 0.75), (0, 1, 2)),
        ((0.25, 0.75), (0, 2)),
        ((0.6, 0.7), (1, 2)),  # both nearest to the last one: each has a column of its own, in their order
    ],
)
def test_a_share_is_drawn_in_the_column_that_is_nearest(removed: tuple[float, ...], columns: tuple[int, ...]) -> None:
    assert places(removed, (0.25, 0.5, 0.75)) == columns


def test_the_cells_of_a_measurement_tell_share_and_loss() -> None:
    ties = (
        Tie(groups=("a",), removed=(0.25, 0.5, 0.75), map50_95=(0.6, 0.45, 0.0)),
        Tie(groups=("b", "c"), removed=(0.5,), map50_95=(0.3,)),
    )
    found = Sensitivity(
        schema_version=SCHEMA,
        structure="0" * 64,
        model="m.pt",
        data="d.yaml",
        split="val",
        imgsz=64,
        images=4,
        importance="l1",
        repaired=False,
        map50_95=0.6,
        ties=ties,
    )
    columns, (first, second) = cells(found)
    assert columns == (0.25, 0.5, 0.75)
    assert first == {0: (0.25, 0.0), 1: (0.5, pytest.approx(0.25)), 2: (0.75, 1.0)}
    assert second == {1: (0.5, pytest.approx(0.5))}


def test_labels_of_a_front_do_not_cover_each_other() -> None:
    apart = [(100.0 * i, 50.0 * i) for i in range(5)]
    assert legible(apart) == [0, 1, 2, 3, 4]
    flat = [(20.0 * i, 0.0) for i in range(10)]  # 60 px are needed, and both ends have theirs
    assert legible(flat) == [0, 4, 9]
    steep = [(0.0, 20.0 * i) for i in range(4)]  # one above the other there is room
    assert legible(steep) == [0, 1, 2, 3]
    assert legible([(1.0, 1.0)]) == [0]


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (9.7, "ms", "9.700 ms"),  # as many digits as its neighbours in a column
        (9.021, "ms", "9.021 ms"),
        (0.34567, "ms", "0.3457 ms"),
        (1234.4, "ms", "1234 ms"),
        (119e6, "instructions", "119.0 M instructions"),
    ],
)
def test_costs_are_written_with_equally_many_digits(value: float, unit: str, text: str) -> None:
    assert amount(value, unit) == text
