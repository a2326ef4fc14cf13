"""The script that measures a peer: what it refuses, and what it counts."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from torch import nn

from scripts.peers import torch_pruning_coverage as coverage
from scripts.peers import torch_pruning_worker as worker


class Small(nn.Module):
    """12 weights, 8 of a batch norm, 8 more and 2 biases."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(nn.functional.silu(self.bn(self.first(x))))


@pytest.mark.parametrize(
    ("installed", "arguments", "message"),
    [
        ("none", [], "torch-pruning 1.6.1 is needed, found none: pip install --no-deps torch-pruning==1.6.1"),
        ("1.5.0", [], "found 1.5.0"),
        ("1.6.1", ["yolov99n"], "no model of scripts/studies/zoo.py: yolov99n"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(
    installed: str,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(coverage, "_version", lambda: installed)
    monkeypatch.setattr(sys, "argv", ["torch_pruning_coverage", *arguments])
    assert coverage.main() == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    ("returncode", "status", "error"),
    [
        (-24, "timeout", "no answer in 100 s of CPU time"),
        (-14, "timeout", "no answer in 3600 s"),
        (-9, "failed", "the process ended with -9: last words"),
    ],
)
def test_a_process_that_ended_early_says_why(returncode: int, status: str, error: str) -> None:
    assert coverage._unfinished(returncode, "last words") == {"status": status, "error": error}


def test_other_shapes_are_an_error_that_names_both() -> None:
    with pytest.raises(ValueError, match=r"\[\(1, 2\)\], they must be \[\(1, 3\)\]"):
        worker.check_shapes([torch.zeros(1, 3)], [torch.zeros(1, 2)])


@pytest.mark.filterwarnings("ignore")  # the peer's own
def test_the_peer_is_asked_what_it_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    """30 % of 4 channels are 2 (it rounds the kept ones down): their weights are zero in the masked model."""
    pytest.importorskip("torch_pruning", reason="a peer, not a dependency: pip install --no-deps torch-pruning==1.6.1")
    monkeypatch.setattr(worker, "ignored_layers", lambda model: [model.head])
    torch.manual_seed(0)
    dense, image = worker.trained_like(Small()).eval(), torch.rand(1, 3, 4, 4)
    pruned = copy.deepcopy(dense)
    pruner = worker.make_pruner(pruned, image, None)
    assert worker.prunable_share(pruner, pruned) == 28 / 30
    pruner.step()
    history = pruner.pruning_history()
    again: Any = worker.make_pruner(copy.deepcopy(dense), image, None)
    masked: Any = worker.mask_removed(dense, pruned, again, history)
    zeroed = [name for name, value in masked.named_parameters() if (value == 0).any()]
    assert zeroed == ["first.weight", "bn.weight", "bn.bias", "head.weight"]
    assert int((masked.first.weight.flatten(1) == 0).all(1).sum()) == 2
    found, expected = (worker.inference_outputs(model, image) for model in (pruned, masked))
    assert worker.largest_difference(expected, found) < 1e-6
    assert worker.largest_difference(worker.inference_outputs(dense, image), found) > 1e-3
