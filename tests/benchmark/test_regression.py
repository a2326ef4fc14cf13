"""Tables learnt from networks whose costs are known."""

from __future__ import annotations

import numpy as np
import pytest

from benchmark.regression import Observation, fit, match, nonnegative_least_squares
from benchmark.variants import draw_widths
from compress.channels.graph import Graph, build_graph
from compress.checkpoint import build_model
from compress.errors import BenchmarkError
from compress.latency.table import linear_form
from compress.settings import Budget

BUDGET = Budget(multiple_of=4, min_width=4)
MODEL = {
    "nc": 3,
    "backbone": [
        [-1, 1, "Conv", [16, 3, 2]],
        [-1, 1, "Conv", [32, 3, 2]],
        [-1, 1, "C2f", [32, True]],
        [-1, 1, "Conv", [32, 3, 2]],
        [-1, 1, "Conv", [48, 3, 2]],
        [-1, 1, "Conv", [48, 3, 2]],
    ],
    "head": [[[3, 4, 5], 1, "Detect", ["nc"]]],
}


@pytest.fixture(scope="module")
def graph() -> Graph:
    return build_graph(build_model(MODEL), 64)


def cost(graph: Graph, tensor: str, widths: np.ndarray, stair: float) -> float:
    (reads, a), (makes, b) = (linear_form(graph, tensor, side) for side in (True, False))
    read, made = reads @ widths + a, makes @ widths + b
    area = graph.positions[tensor] * int(np.prod(graph.shapes[tensor][2:]))
    return float(0.1 + 2e-5 * area * read * made * (1 + stair * (made % 8 != 0)) + 1e-3 * read)


def observe(graph: Graph, count: int, by_layer: bool, stair: float = 0.0, noise: float = 0.0) -> list[Observation]:
    generator = np.random.default_rng(1)
    made = []
    for widths in draw_widths(graph, BUDGET, count):
        segments = []
        for number, tensor in enumerate(graph.positions):
            (reads, a), (makes, b) = (linear_form(graph, tensor, side) for side in (True, False))
            shape = [round(makes @ widths + b), round(reads @ widths + a), *graph.shapes[tensor][2:]]
            segments.append((f"conv_{number}", shape, cost(graph, tensor, widths, stair)))
        segments.append(("tail", [], 0.3))
        whole = (1.1 * sum(value for *_, value in segments) + 0.2) * (1 + noise * generator.standard_normal())
        made.append(Observation(widths, whole, segments if by_layer else []))
    return made


def test_a_network_without_noise_is_predicted_exactly(graph: Graph) -> None:
    model, quality = fit(graph, observe(graph, 40, by_layer=True))
    assert quality.variants == 40
    assert quality.p95_error < 1e-3
    assert (model.scale, model.offset) == (pytest.approx(1.1, rel=1e-3), pytest.approx(0.2, abs=0.02))
    tail = model.segments[-1]
    assert (tail.name, tail.tensor, tail.terms) == ("tail", None, {"constant": pytest.approx(0.3, rel=1e-3)})
    assert all(value >= 0 for segment in model.segments for value in segment.terms.values())


def test_stairs_are_learnt(graph: Graph) -> None:
    model, quality = fit(graph, observe(graph, 60, by_layer=True, stair=0.8))
    assert quality.p95_error < 0.01
    assert any("out_off_8" in segment.terms for segment in model.segments)


def test_where_a_runtime_tells_of_no_layers_the_whole_is_fitted(graph: Graph) -> None:
    model, quality = fit(graph, observe(graph, 60, by_layer=False))
    assert [segment.tensor for segment in model.segments] == list(graph.positions)
    assert quality.p95_error < 0.01


def test_noise_shows_in_the_quality(graph: Graph) -> None:
    _, quality = fit(graph, observe(graph, 40, by_layer=True, noise=0.05))
    assert 0.01 < quality.median_error < 0.08
    assert quality.median_error < quality.p95_error


def test_too_few_networks_are_refused(graph: Graph) -> None:
    with pytest.raises(BenchmarkError, match="11 measured networks are too few for a table, 12 are needed"):
        fit(graph, observe(graph, 11, by_layer=True))


def test_convolutions_are_matched_by_their_shapes_alone(graph: Graph) -> None:
    seen = observe(graph, 12, by_layer=True)
    shuffled = [*reversed([name for name, *_ in seen[0].segments])]
    shapes = [{name: shape for name, shape, _ in point.segments} for point in seen]
    found = match(graph, np.array([point.widths for point in seen]), shuffled, shapes)
    tensors = dict(zip(shuffled, found, strict=True))
    assert tensors["tail"] is None
    assert tensors["conv_1"] == "model.1.conv.weight"
    for name, tensor in tensors.items():
        if tensor is not None:
            mine = [known[name][:2] for known in shapes]
            (makes, b), (reads, a) = (linear_form(graph, tensor, side) for side in (False, True))
            assert mine == [[round(float(makes @ p.widths) + b), round(float(reads @ p.widths) + a)] for p in seen]
    assert len(set(tensors.values())) == len(tensors)  # none twice


def test_least_squares_without_negative_numbers() -> None:
    generator = np.random.default_rng(0)
    matrix = generator.random((30, 5))
    truth = np.array([0.0, 2.0, 0.0, 0.5, 1.0])
    assert nonnegative_least_squares(matrix, matrix @ truth).tolist() == pytest.approx(truth.tolist(), abs=1e-8)
    values = matrix @ np.array([1.0, -3.0, 0.5, 0.0, 1.0])
    found = nonnegative_least_squares(matrix, values)
    slope = matrix.T @ (values - matrix @ found)
    assert found.min() >= 0
    # The conditions of a minimum: no slope where a number is positive, none upwards where it is zero.
    assert np.abs(slope[found > 0]).max() < 1e-8
    assert slope[found == 0].max() < 1e-8


def test_columns_of_zeros_stay_out() -> None:
    matrix = np.array([[0.0, 1.0], [0.0, 2.0]])
    assert nonnegative_least_squares(matrix, np.array([2.0, 4.0])).tolist() == pytest.approx([0.0, 2.0])


def test_drawn_widths_are_allowed_and_reach_both_ends(graph: Graph) -> None:
    from compress.pruning.budget import ties

    drawn = draw_widths(graph, BUDGET, 30, seed=3)
    assert drawn[0].tolist() == graph.widths.tolist()
    for tie in ties(graph, BUDGET):
        for group, units in tie.units.items():
            assert set(drawn[:, group]) <= {part * units for part in tie.parts}
            assert drawn[1, group] == tie.parts[-1] * units
    assert draw_widths(graph, BUDGET, 30, seed=3).tolist() == drawn.tolist()
    assert draw_widths(graph, BUDGET, 30, seed=4).tolist() != drawn.tolist()
