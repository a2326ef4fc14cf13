"""The costs of the layers of an ncnn model, with marks whose answers are known."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np
import pytest

from benchmark.runners import ncnn_layers, ncnn_runner
from export import ncnn_files


def test_every_layer_is_there_and_what_asking_costs_is_not(ncnn_folder: Path, image: np.ndarray) -> None:
    # Computing takes 10, asking for what is there takes 3.
    answers = itertools.accumulate(itertools.cycle([0, 10, 0, 3]))
    rows = ncnn_layers.layer_costs(
        ncnn_runner.load(str(ncnn_folder), 1).net, str(ncnn_folder), image[0], lambda: next(answers), repeats=2
    )
    layers = ncnn_files.read(ncnn_folder / ncnn_runner.PARAM, ncnn_folder / ncnn_runner.BIN)
    assert [(row["name"], row["type"]) for row in rows] == [(x.name, x.kind) for x in layers if x.kind != "Input"]
    assert {row["cost"] for row in rows} == {7}


def test_the_cost_is_the_median_of_the_repeats_without_the_first(ncnn_folder: Path, image: np.ndarray) -> None:
    layers = len(ncnn_files.read(ncnn_folder / ncnn_runner.PARAM, ncnn_folder / ncnn_runner.BIN)) - 1
    answers = itertools.accumulate(itertools.chain.from_iterable([0, cost, 0, 0] * layers for cost in (99, 5, 1, 4)))
    rows = ncnn_layers.layer_costs(
        ncnn_runner.load(str(ncnn_folder), 1).net, str(ncnn_folder), image[0], lambda: next(answers), repeats=3
    )
    assert {row["cost"] for row in rows} == {4}


def test_instructions_are_counted_between_pairs_of_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counter, calls = tmp_path / "count", []

    def getppid() -> int:  # as the emulator's plugin does
        calls.append(None)
        if len(calls) % 2 == 0:
            counter.write_text(f"{1000 * len(calls)}\n")
        return 1

    monkeypatch.setattr(os, "getppid", getppid)
    mark = ncnn_layers.instruction_mark(str(counter))
    assert [mark() for _ in range(4)] == [0, 2000, 0, 4000]


def test_a_network_of_another_folder_is_refused(ncnn_folder: Path, image: np.ndarray, tmp_path: Path) -> None:
    text = (ncnn_folder / ncnn_runner.PARAM).read_text().replace(" conv_0 ", " another ").splitlines()
    layer = text[3].split()
    (tmp_path / ncnn_runner.PARAM).write_text("\n".join([*text[:3], " ".join([*layer[:5], "nowhere", *layer[6:]])]))
    with pytest.raises(ValueError, match=r"^ncnn cannot compute the layer another \(status -1\)"):
        ncnn_layers.layer_costs(ncnn_runner.load(str(ncnn_folder), 1).net, str(tmp_path), image[0], lambda: 0)


@pytest.mark.parametrize("content", [None, "7767517\n2 2\nInput in0 0 1 in0\nSwish broken x 1 in0 out0\n"])
def test_a_graph_that_cannot_be_read_is_one_line(content: str | None, image: np.ndarray, tmp_path: Path) -> None:
    if content:
        (tmp_path / ncnn_runner.PARAM).write_text(content)
    with pytest.raises(ValueError, match=r"model\.ncnn\.param is not a graph of ncnn: export the model again$"):
        ncnn_layers.layer_costs(None, str(tmp_path), image[0], lambda: 0)
