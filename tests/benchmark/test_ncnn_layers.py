"""The costs of the layers of an ncnn model, with marks whose answers are known."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmark.runners import ncnn_layers, ncnn_runner
from compress.checkpoint import build_model, save_model
from export import ncnn_files
from export.ncnn import export_ncnn


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layers")
    torch.manual_seed(0)
    save_model(build_model("yolov8n.yaml", nc=3).eval(), folder / "tiny.pt", {})
    return export_ncnn(folder / "tiny.pt", folder / "tiny_ncnn_model", imgsz=64)


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).random((3, 64, 64), dtype=np.float32)


def test_every_layer_is_there_and_what_asking_costs_is_not(model: Path, image: np.ndarray) -> None:
    # Computing takes 10, asking for what is there takes 3.
    answers = itertools.accumulate(itertools.cycle([0, 10, 0, 3]))
    rows = ncnn_layers.layer_costs(
        ncnn_runner.load(str(model), 1).net, str(model), image, lambda: next(answers), repeats=2
    )
    layers = ncnn_files.read(model / ncnn_runner.PARAM, model / ncnn_runner.BIN)
    assert [(row["name"], row["type"]) for row in rows] == [(x.name, x.kind) for x in layers if x.kind != "Input"]
    assert {row["cost"] for row in rows} == {7}


def test_the_cost_is_the_median_of_the_repeats_without_the_first(model: Path, image: np.ndarray) -> None:
    layers = len(ncnn_files.read(model / ncnn_runner.PARAM, model / ncnn_runner.BIN)) - 1
    answers = itertools.accumulate(itertools.chain.from_iterable([0, cost, 0, 0] * layers for cost in (99, 5, 1, 4)))
    rows = ncnn_layers.layer_costs(
        ncnn_runner.load(str(model), 1).net, str(model), image, lambda: next(answers), repeats=3
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


def test_a_network_of_another_folder_is_refused(model: Path, image: np.ndarray, tmp_path: Path) -> None:
    text = (model / ncnn_runner.PARAM).read_text().replace(" conv_0 ", " another ").splitlines()
    layer = text[3].split()
    (tmp_path / ncnn_runner.PARAM).write_text("\n".join([*text[:3], " ".join([*layer[:5], "nowhere", *layer[6:]])]))
    with pytest.raises(ValueError, match=r"^ncnn cannot compute the layer another \(status -1\)"):
        ncnn_layers.layer_costs(ncnn_runner.load(str(model), 1).net, str(tmp_path), image, lambda: 0)


@pytest.mark.parametrize("content", [None, "7767517\n2 2\nInput in0 0 1 in0\nSwish broken x 1 in0 out0\n"])
def test_a_graph_that_cannot_be_read_is_one_line(content: str | None, image: np.ndarray, tmp_path: Path) -> None:
    if content:
        (tmp_path / ncnn_runner.PARAM).write_text(content)
    with pytest.raises(ValueError, match=r"model\.ncnn\.param is not a graph of ncnn: export the model again$"):
        ncnn_layers.layer_costs(None, str(tmp_path), image, lambda: 0)
