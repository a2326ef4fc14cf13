from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compress.channels.graph import Graph, build_graph
from compress.checkpoint import build_model
from compress.data.dataset import class_names
from compress.errors import DataError, SettingsError
from compress.planning import plan_pruning
from compress.pruning import taylor
from compress.settings import Prune
from topologies import Chain, Residual, randomised

BATCHES = 3


class WithLoss(torch.nn.Module):
    """A network whose loss is a weighted sum of its outputs, so that gradients can be had independently."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x)

    def loss(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, None]:
        return (self(batch["img"]) * batch["weight"]).sum(), None


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    made = [
        {"img": torch.rand(2, 3, 16, 16, generator=generator), "weight": torch.randn(1, generator=generator)}
        for _ in range(BATCHES)
    ]
    monkeypatch.setattr(taylor, "_batches", lambda *_: made)
    return made


def scores(model: torch.nn.Module) -> tuple[Graph, list[np.ndarray]]:
    graph = build_graph(model, 16)
    return graph, taylor.taylor_scores(graph, model, Path("data.yaml"), 16)


def gate_gradients(model: Any, norms: list[str], batches: list[dict[str, torch.Tensor]]) -> np.ndarray:
    """Mean |∂L/∂gate| over batches of a gate on the outputs of these batch norms, by autograd on the gate itself."""
    total = 0.0
    for batch in batches:
        gate = torch.ones(model.get_submodule(norms[0]).num_features, requires_grad=True)
        handles = [
            model.get_submodule(name).register_forward_hook(lambda _, __, out, gate=gate: out * gate[:, None, None])
            for name in norms
        ]
        model.loss(batch)[0].backward()
        for handle in handles:
            handle.remove()
        total = total + gate.grad.abs().numpy()  # type: ignore[union-attr]
    return np.asarray(total) / len(batches)


def test_a_score_is_the_gradient_of_a_gate_after_batch_norm(batches: list[dict[str, torch.Tensor]]) -> None:
    model = WithLoss(randomised(Chain()))
    graph, found = scores(model)
    assert graph.groups[0].name == "network.a.conv"
    np.testing.assert_allclose(found[0], gate_gradients(model, ["network.a.bn"], batches), rtol=1e-4)


def test_layers_that_share_a_channel_are_summed_before_the_absolute_value(
    batches: list[dict[str, torch.Tensor]],
) -> None:
    model = WithLoss(randomised(Residual()))
    graph, found = scores(model)
    index = next(i for i, group in enumerate(graph.groups) if len(group.layers) > 2)
    norms = [layer for layer in graph.groups[index].layers if layer.endswith(".bn")]
    assert len(norms) >= 2
    np.testing.assert_allclose(found[index], gate_gradients(model, norms, batches), rtol=1e-4)


def test_a_channel_that_is_zero_costs_nothing(batches: list[dict[str, torch.Tensor]]) -> None:
    model = randomised(Chain())
    norm: Any = model.get_submodule("a.bn")
    norm.weight.data[2] = norm.bias.data[2] = 0.0
    _, found = scores(WithLoss(model))
    assert found[0][2] == 0.0
    assert (np.delete(found[0], 2) > 0.0).all()


def test_a_frozen_average_of_a_model_can_be_scored(batches: list[dict[str, torch.Tensor]]) -> None:
    model = WithLoss(randomised(Chain()))
    _, expected = scores(model)
    model.requires_grad_(False)
    _, found = scores(model)
    np.testing.assert_array_equal(found[0], expected[0])


def test_a_detector_is_scored_on_its_labels_and_stays_as_it_is(tiny_data: Path) -> None:
    torch.manual_seed(0)
    model: Any = randomised(build_model("yolov8n.yaml", nc=len(class_names(tiny_data))))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = set(vars(model))
    planned = plan_pruning(model, Prune(macs=0.6, importance="taylor"), 64, data=tiny_data)
    assert planned.metrics()["macs"][1] <= 0.6 * planned.metrics()["macs"][0]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert set(vars(model)) == attributes
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_detector_of_other_classes_is_refused(tiny_data: Path) -> None:
    model = build_model("yolov8n.yaml", nc=1)
    with pytest.raises(DataError, match=r"knows 1 classes, .* train it on this data first"):
        plan_pruning(model, Prune(macs=0.6, importance="taylor"), 64, data=tiny_data)


def test_taylor_without_data_is_refused() -> None:
    with pytest.raises(SettingsError, match="give --data"):
        plan_pruning(randomised(Chain()), Prune(macs=0.6, importance="taylor"), 16)
