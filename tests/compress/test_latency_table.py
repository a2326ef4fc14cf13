"""Reading, checking and evaluating latency tables."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from compress.errors import BudgetError, SettingsError
from compress.latency.table import (
    Segment,
    check_fits,
    check_widths,
    default_path,
    evaluate,
    load_table,
    save_table,
)
from compress.settings import Budget
from tables import BUDGET, table_of
from topologies import Chain, Concat, randomised


def test_a_chain_costs_what_its_terms_say() -> None:
    table, graph = table_of(randomised(Chain()), 16)
    latency = evaluate(table, graph)
    # 3 → 8 → 12 → 4 channels: three constants, reads 3 + 8 + 12, products 24 + 96 + 48, and the offset.
    assert latency(graph.widths) == pytest.approx(3 + 0.23 + 0.168 + 0.5)
    narrow = graph.widths.copy()
    narrow[[group.name for group in graph.groups].index("a.conv")] = 4
    assert latency(narrow) == pytest.approx(3 + 0.19 + (12 + 48 + 48) / 1000 + 0.5)
    assert np.asarray(latency(np.stack([graph.widths, narrow]))).tolist() == pytest.approx(
        [latency(graph.widths), latency(narrow)]
    )


def test_a_concatenation_is_read_as_the_sum_of_its_parts() -> None:
    table, graph = table_of(randomised(Concat()), 16)
    head = evaluate(table, graph).per_segment(graph.widths)[-1]
    assert head == pytest.approx(1 + 0.24 + 0.096)


def test_widths_off_the_blocks_cost_more_and_others_do_not() -> None:
    model = randomised(Chain())
    base, graph = table_of(model, 16)
    stairs = tuple(
        Segment(name=s.name, tensor=s.tensor, before=s.before, terms={"product": 1.0, "out_off_8": 0.5})
        for s in base.segments
    )
    table, _ = table_of(model, 16, segments=stairs, offset=0.0)
    per_segment = evaluate(table, graph).per_segment(graph.widths)
    assert per_segment.tolist() == pytest.approx([24, 96 * 1.5, 48 * 1.5])  # 8 is on the block, 12 and 4 are off


def test_scale_and_offset_are_those_of_the_whole_network() -> None:
    model = randomised(Chain())
    plain, graph = table_of(model, 16)
    scaled, _ = table_of(model, 16, scale=2.0, offset=0.25)
    assert evaluate(scaled, graph)(graph.widths) == pytest.approx(
        2 * (evaluate(plain, graph)(graph.widths) - 0.5) + 0.25
    )


def test_a_table_survives_the_disk(tmp_path: Path) -> None:
    table, _ = table_of(randomised(Chain()), 16)
    save_table(table, tmp_path / "folder" / "table.json")
    assert load_table(tmp_path / "folder" / "table.json") == table


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dense": 2.0}, "was changed after it was measured"),
        ({"schema_version": 9}, "is no latency table of schema 1 (it has 9)"),
        ({"colour": "red"}, "unknown key 'colour'"),
        ({"threads": 0}, "threads: Input should be greater than or equal to 1"),
        ({"segments": [{"name": "a", "tensor": None, "before": None, "terms": {"reads": -1.0}}]}, "below zero"),
        ({"segments": [{"name": "a", "tensor": None, "before": None, "terms": {"luck": 1.0}}]}, "unknown"),
    ],
)
def test_a_damaged_table_is_refused_by_name(change: dict, message: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    save_table(table_of(randomised(Chain()), 16)[0], path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(SettingsError) as caught:
        load_table(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_a_file_that_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "table.json").write_text("{")
    with pytest.raises(SettingsError, match="is not a latency table"):
        load_table(tmp_path / "table.json")


def test_what_is_no_table_is_not_to_be_deleted_first(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"\x80 somebody's weights")
    with pytest.raises(SettingsError, match=r"is not a latency table .*: name another file, or"):
        load_table(tmp_path / "model.pt")
    with pytest.raises(SettingsError, match="is a folder: name a file"):
        load_table(tmp_path)


def test_a_table_of_something_else_names_all_that_differs(tmp_path: Path) -> None:
    table, _ = table_of(randomised(Chain()), 16)
    check_fits(table, {"device": "cpu", "runtime": "onnxruntime", "threads": None}, tmp_path)
    with pytest.raises(
        SettingsError, match="is of device cpu, not rpi5, of runtime onnxruntime, not ncnn, of threads 1"
    ):
        check_fits(table, {"device": "rpi5", "runtime": "ncnn", "threads": 4}, tmp_path)


def test_a_weight_that_the_model_lacks_is_named() -> None:
    table, _ = table_of(randomised(Chain()), 16)
    _, other = table_of(randomised(Concat()), 16)
    with pytest.raises(BudgetError, match=r"b\.conv\.weight|c\.conv\.weight|which the model does not have"):
        evaluate(table_of(randomised(Concat()), 16)[0], table_of(randomised(Chain()), 16)[1])
    assert evaluate(table, other)(other.widths) > 0  # a, b and head are in both


def test_widths_that_were_not_measured_are_refused() -> None:
    table, graph = table_of(randomised(Chain()), 16)
    check_widths(graph, table, BUDGET)
    check_widths(graph, table, Budget(multiple_of=4, min_width=4))  # fewer widths are fine
    with pytest.raises(
        SettingsError, match=r"was not measured at 3, 5, 7 channels of a\.conv, which the budget allows"
    ):
        check_widths(graph, table, Budget(multiple_of=1, min_width=2))


def test_the_default_path_tells_devices_and_budgets_apart() -> None:
    paths = {
        default_path(device, runtime, threads, 320, "a" * 64, budget)
        for device in ("cpu", "rpi5")
        for runtime in ("onnxruntime", "ncnn")
        for threads in (1, 2)
        for budget in (Budget(), Budget(multiple_of=16))
    }
    assert len(paths) == 16
    assert default_path("cpu", "ncnn", 1, 320, "a" * 64, Budget()) == default_path(
        "cpu", "ncnn", 1, 320, "a" * 64, Budget(source="a paper")
    )
