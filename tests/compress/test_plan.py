from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compress.channels.graph import Axis, Graph, build_graph
from compress.channels.slots import FIXED
from compress.checkpoint import structure_hash
from compress.errors import PlanError
from compress.pruning.budget import Choice
from compress.pruning.oracle import check_oracle
from compress.pruning.plan import (
    Plan,
    PlannedGroup,
    _format_axis,
    _format_keep,
    load_plan,
    make_plan,
    parse_plan,
    save_plan,
)
from compress.pruning.surgery import apply_plan
from topologies import ALL, Chain, ChunkTie, FlattenLinear, Residual, randomised


def keep_all(graph: Graph) -> list[np.ndarray]:
    return [np.ones(group.width, dtype=bool) for group in graph.groups]


def plan_of(graph: Graph, model: nn.Module, keep: list[np.ndarray]) -> Plan:
    return make_plan(graph, Choice(keep, ["because"] * len(keep)), structure_hash(model), "percent 0.5", "l1")


@pytest.fixture
def chain() -> tuple[nn.Module, Graph]:
    model = randomised(Chain())
    return model, build_graph(model, 16)


@pytest.fixture
def content(chain: tuple[nn.Module, Graph]) -> dict[str, Any]:
    """A plan that removes channels 1 and 6 of the 8 of a, as JSON."""
    model, graph = chain
    keep = keep_all(graph)
    keep[0][[1, 6]] = False
    return plan_of(graph, model, keep).model_dump(mode="json")


def test_a_plan_by_hand(chain: tuple[nn.Module, Graph], content: dict[str, Any]) -> None:
    """b keeps its width, so of b only the columns that read a are named; head reads b alone."""
    assert content == {
        "schema_version": 1,
        "structure": structure_hash(chain[0]),
        "target": "percent 0.5",
        "importance": "l1",
        "groups": [
            {
                "name": "a.conv",
                "layers": ["a.conv", "a.bn"],
                "width": 8,
                "keep": "0,2-5,7",
                "why": "because",
                "tied_to": [],
            }
        ],
        "axes": {
            "a.conv.weight:0": "0@0:8",
            "a.bn.weight:0": "0@0:8",
            "a.bn.bias:0": "0@0:8",
            "a.bn.running_mean:0": "0@0:8",
            "a.bn.running_var:0": "0@0:8",
            "b.conv.weight:1": "0@0:8",
        },
    }


def test_channels_that_become_blocks_are_repeated() -> None:
    """flatten makes 16 features of each channel; the plan says so in one word."""
    model = randomised(FlattenLinear())
    graph = build_graph(model, 16)
    keep = keep_all(graph)
    keep[0][3] = False
    plan = plan_of(graph, model, keep)
    assert plan.axes["b.weight:1"] == "0@0:8x16"
    masks = {f"{tensor}:{dim}": mask for tensor, dim, mask in plan.axis_masks()}
    assert np.flatnonzero(~masks["b.weight:1"]).tolist() == list(range(48, 64))


def test_a_plan_that_removes_nothing_is_empty(chain: tuple[nn.Module, Graph]) -> None:
    model, graph = chain
    plan = plan_of(graph, model, keep_all(graph))
    assert (plan.groups, plan.axes) == ((), {})
    pruned = apply_plan(model, plan)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in pruned.state_dict().items())


@pytest.mark.parametrize("name", ALL)
def test_the_file_says_what_was_chosen(tmp_path: Path, name: str) -> None:
    """Masks read back from plan.json are those of the graph's own account of each tensor."""
    model = randomised(ALL[name]())
    graph = build_graph(model, 16)
    generator = np.random.default_rng(1)
    counts = {g.tie: 1 if g.width < 3 else int(generator.integers(1, g.width)) for g in graph.groups}  # ties: one width
    keep = [generator.permutation(g.width) < (g.width if g.frozen else counts[g.tie]) for g in graph.groups]
    plan = plan_of(graph, model, keep)
    save_plan(plan, tmp_path / "plan.json")
    again = load_plan(tmp_path / "plan.json")
    assert again == plan
    masks = {(tensor, dim): mask for tensor, dim, mask in again.axis_masks()}
    for axis in graph.axes:
        cells = zip(axis.group.tolist(), axis.unit.tolist(), strict=True)
        expected = [group == FIXED or bool(keep[group][unit]) for group, unit in cells]
        assert masks.get((axis.tensor, axis.dim), np.ones(len(expected))).tolist() == expected


@settings(deadline=None, derandomize=True)
@given(st.lists(st.booleans(), min_size=1, max_size=70).filter(any))
def test_ranges_hold_any_choice(mask: list[bool]) -> None:
    group = PlannedGroup(name="g", layers=("g",), width=len(mask), keep=_format_keep(np.array(mask)), why="")
    plan = Plan(structure="", target="", importance="", groups=(group,), axes={})
    assert plan.masks()[0].tolist() == mask


@settings(deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(-1, 2), st.integers(0, 4), st.integers(1, 3)), min_size=1, max_size=20),
    st.lists(st.booleans(), min_size=15, max_size=15),
)
def test_runs_hold_any_axis(runs: list[tuple[int, int, int]], flat: list[bool]) -> None:
    """Groups 0 and 2 are cut, group 1 is not: its units are written like fixed ones."""
    cells = [(group, unit) for group, unit, repeat in runs for _ in range(repeat)]
    axis = Axis("w", 0, np.array([g for g, _ in cells]), np.array([u for _, u in cells]))
    keep = np.array(flat).reshape(3, 5)
    keep[1] = True
    keep[[0, 2], 0] = True
    groups = tuple(
        PlannedGroup(
            name="g", layers=(), width=5, keep=",".join(str(unit) for unit in np.flatnonzero(keep[group])), why=""
        )
        for group in (0, 2)
    )
    plan = Plan(structure="", target="", importance="", groups=groups, axes={"w:0": _format_axis(axis, {0: 0, 2: 1})})
    ((tensor, dim, mask),) = plan.axis_masks()
    assert (tensor, dim) == ("w", 0)
    assert mask.tolist() == [group == FIXED or bool(keep[group][unit]) for group, unit in cells]


# Plans that do not fit.


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("\xff", "is not valid JSON"),
        ("[]", r"is no plan of schema 1 \(it has None\)"),
        ("{}", r"is no plan of schema 1 \(it has None\)"),
        ('{"schema_version": 2}', r"is no plan of schema 1 \(it has 2\): make it anew with this version"),
        ('{"schema_version": 1}', "is not a plan: structure: Field required"),
    ],
)
def test_a_file_that_is_no_plan(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(PlanError, match=message) as caught:
        load_plan(path)
    assert str(caught.value).startswith(str(path))


def test_a_missing_plan_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"plan\.json does not exist: check the path"):
        load_plan(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": 1}, "extra: Extra inputs are not permitted"),
        ({"groups": [{"name": "a"}]}, "groups.0.layers: Field required"),
        ({"axes": {"a.conv.weight:0": 3}}, r"axes.a\.conv\.weight:0: Input should be a valid string"),
    ],
)
def test_a_plan_with_wrong_entries_is_refused(content: dict[str, Any], change: dict, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        parse_plan(content | change, "plan.json")


def test_a_plan_for_another_model_is_refused(content: dict[str, Any]) -> None:
    for other in (Residual(), Chain()):
        if isinstance(other, Chain):
            other.head = nn.Conv2d(12, 5, 1)
        with pytest.raises(PlanError, match=f"structure {content['structure'][:12]}, this one is [0-9a-f]{{12}}$"):
            apply_plan(randomised(other), parse_plan(content, "plan.json"))


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ("0-8", "group a.conv: channels 0-8 are not within its width 8"),
        ("8", "group a.conv: channels 8 are not within its width 8"),
        ("5-3", "channels 5-3 are not within"),
        ("0-3,3", "channels 3 are named twice"),
        ("", "'' is not a list of ranges such as 0-15,18"),  # no channel at all
        ("-1", "is not a list of ranges"),
        ("0 - 3", "is not a list of ranges"),
    ],
)
def test_channels_out_of_range_are_refused(chain, content: dict[str, Any], keep: str, message: str) -> None:
    content["groups"][0]["keep"] = keep
    with pytest.raises(PlanError, match=message):
        apply_plan(chain[0], parse_plan(content, "plan.json"))


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"weight": "0@0:8"}, "the plan's axis 'weight' must have the form tensor:dimension"),
        ({"a.conv.weight:x": "0@0:8"}, "must have the form tensor:dimension"),
        ({"a.conv.weight:0": "0@8:8"}, "reads channels 0@8:8, which no group has"),
        ({"a.conv.weight:0": "1@0:8"}, "reads channels 1@0:8, which no group has"),
        ({"a.conv.weight:0": "0@0:9"}, "reads channels 0@0:9, which no group has"),
        ({"a.conv.weight:0": "0@0-8"}, "has '0@0-8', which is not of the form"),
        ({"a.conv.weight:0": ""}, "the plan has 0 channels for dimension 0 of a.conv.weight, it has 8"),
        ({"a.conv.weight:0": "0@0:4"}, "the plan has 4 channels for dimension 0 of a.conv.weight, it has 8"),
        ({"a.conv.weight:7": "0@0:8"}, "the plan has 8 channels for dimension 7 of a.conv.weight, it has 0"),
        ({"a.conv.weight:0": "0@1:2x8"}, "the plan leaves no channel of dimension 0 of a.conv.weight"),
        ({"z.conv.weight:0": "0@0:8"}, "the plan cuts z.conv.weight, which the model does not have"),
    ],
)
def test_axes_that_do_not_fit_are_refused(chain, content: dict[str, Any], axes: dict, message: str) -> None:
    before = {name: value.clone() for name, value in chain[0].state_dict().items()}
    with pytest.raises(PlanError) as caught:
        apply_plan(chain[0], parse_plan(content | {"axes": axes}, "plan.json"))
    assert message in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in chain[0].state_dict().items())


def test_tied_groups_that_keep_unlike_shares_are_refused() -> None:
    """chunk(2) would cut what is left of two halves, 6 + 7 channels, into 7 + 6."""
    model = randomised(ChunkTie())
    graph = build_graph(model, 16)
    keep = keep_all(graph)
    first, second = (i for i, group in enumerate(graph.groups) if group.name.startswith("a.conv"))
    keep[first][[2, 5]] = False
    with pytest.raises(
        PlanError, match=r"a.conv\[0:8\] keeps 6 of 8 channels, a.conv\[8:16\], which is tied to it, all"
    ):
        apply_plan(model, plan_of(graph, model, keep))
    keep[second][0] = False
    with pytest.raises(PlanError, match=r"keeps 6 of 8 channels, a.conv\[8:16\], which is tied to it, 7 of 8: tied"):
        apply_plan(model, plan_of(graph, model, keep))
    keep[first][5] = True
    assert check_oracle(graph, apply_plan(model, plan_of(graph, model, keep)), keep) <= 1e-4


def test_a_single_channel_is_the_least_width(chain: tuple[nn.Module, Graph]) -> None:
    model, graph = chain
    keep = keep_all(graph)
    keep[0][:7] = False
    keep[1][1:] = False
    pruned = apply_plan(model, plan_of(graph, model, keep))
    shapes = {name: tuple(value.shape) for name, value in pruned.state_dict().items() if value.ndim == 4}
    assert shapes == {"a.conv.weight": (1, 3, 3, 3), "b.conv.weight": (1, 1, 3, 3), "head.weight": (4, 1, 1, 1)}
    assert check_oracle(graph, pruned, keep) <= 1e-4


def test_plan_json_is_readable(tmp_path: Path, content: dict[str, Any]) -> None:
    save_plan(parse_plan(content, "plan.json"), tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text()
    assert json.loads(text) == content
    assert '"keep": "0,2-5,7"' in text
    assert len(text.splitlines()) > 10
