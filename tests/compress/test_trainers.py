from __future__ import annotations

import copy
import os
import subprocess
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from ultralytics.models.yolo.detect import DetectionTrainer

from compress.channels.graph import Graph, build_graph
from compress.channels.slots import FIXED
from compress.checkpoint import build_model, load_model, plans_of, structure_hash
from compress.errors import CheckpointError, EspalierError, PlanError, SettingsError
from compress.latency.table import save_table
from compress.manifest import read_json, write_json
from compress.pruning.budget import removable
from compress.pruning.importance import batch_norm_scales
from compress.settings import Budget, Training
from compress.training import launch, sparse
from compress.training.launch import check_arguments, check_device, run_training
from compress.training.penalty import NEAR_ZERO, SPARSITY, GammaLog, GroupPenalty, widths_without
from compress.training.planned import RESUME, RESUME_BEST
from compress.training.sparse import FADE_PLAN
from compress.training.trainers import PlanTrainer, SparsityTrainer
from tables import table_of
from topologies import Chain, ChunkTie, Grouped, Residual, SplitFixed, randomised


def penalised(model: nn.Module, strength: float, imgsz: int = 16) -> dict[str, torch.Tensor]:
    """Return the gradient that the penalty adds to each parameter that has a gradient."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    GroupPenalty(build_graph(model.eval(), imgsz), model).add_gradient(strength)
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


# The penalty.


def test_a_channel_of_its_own_is_pulled_by_the_sign_of_gamma() -> None:
    model = Chain()
    model.a.bn.weight.data = torch.tensor([0.5, -2.0, 0.0, 1e-3, -1e-3, 3.0, -0.1, 1.0])
    found = penalised(model, 0.1)
    expected = torch.tensor([0.1, -0.1, 0.0, 0.1, -0.1, 0.1, -0.1, 0.1])
    torch.testing.assert_close(found["a.bn.weight"], expected)
    torch.testing.assert_close(found["b.bn.weight"], torch.full((12,), 0.1))
    assert all(not gradient.any() for name, gradient in found.items() if not name.endswith("bn.weight"))


def test_channels_shared_through_a_residual_are_pulled_together() -> None:
    """γ = (3, -4, 0) of one channel has norm 5: λ·γ/‖γ‖ = λ·(0.6, -0.8, 0)."""
    model = Residual()
    for block, gamma in ((model.a, 3.0), (model.b, -4.0), (model.c, 0.0)):
        block.bn.weight.data[0] = gamma
    found = penalised(model, 0.1)
    assert [found[f"{name}.bn.weight"][0].item() for name in "abc"] == pytest.approx([0.06, -0.08, 0.0])
    assert [found[f"{name}.bn.weight"][1].item() for name in "abc"] == pytest.approx([0.1 / 3**0.5] * 3)


def test_columns_of_a_grouped_convolution_are_pulled_together() -> None:
    """Channels 0, 4, 8 and 12 are one unit."""
    model = Grouped()
    model.a.bn.weight.data = torch.arange(16.0)
    found = penalised(model, 1.0)["a.bn.weight"]
    gammas = np.array([0.0, 4.0, 8.0, 12.0])
    assert found[[0, 4, 8, 12]].tolist() == pytest.approx(gammas / np.linalg.norm(gammas))


def test_frozen_channels_are_left_alone() -> None:
    model = SplitFixed()
    found = penalised(model, 0.1)
    assert not found["a.bn.weight"].any()
    assert found["b.bn.weight"].all()


def test_the_penalty_is_the_gradient_of_a_sum_of_norms(narrow: Path) -> None:
    """Against autograd, for a whole detector: Σ over units of prunable groups of ‖γ of the unit‖."""
    model = randomised(build_model(str(narrow)))
    graph = build_graph(model, 64)
    gammas = {name: p for name, p in model.named_parameters() if name.endswith("bn.weight")}
    total = torch.zeros(())
    for index, group in enumerate(graph.groups):
        if not group.frozen:
            square = torch.zeros(group.width)
            for axis in graph.axes:
                mine = np.flatnonzero((axis.group == index) & (axis.group != FIXED))
                if axis.tensor in gammas and mine.size:
                    units = torch.from_numpy(axis.unit[mine])
                    square = square.index_add(0, units, gammas[axis.tensor][torch.from_numpy(mine)].square())
            total = total + square[square > 0].sqrt().sum()
    expected = torch.autograd.grad(total, list(gammas.values()), allow_unused=True)
    found = penalised(model, 0.01, 64)
    for name, gradient in zip(gammas, expected, strict=True):
        reference = torch.zeros_like(gammas[name]) if gradient is None else gradient * 0.01
        torch.testing.assert_close(found[name], reference, msg=name)


def test_the_penalty_is_added_to_what_is_there() -> None:
    model = Chain()
    penalty = GroupPenalty(build_graph(model.eval(), 16), model)
    model.a.bn.weight.grad = torch.full((8,), 7.0)
    penalty.add_gradient(0.5)
    assert model.a.bn.weight.grad.tolist() == [7.5] * 8
    assert model.b.bn.weight.grad is None  # not trained in this step
    penalty.add_gradient(0.0)
    assert model.a.bn.weight.grad.tolist() == [7.5] * 8


def penalty_most(penalty: GroupPenalty) -> np.ndarray:
    """Any unit may go."""
    return np.bincount(penalty.groups)


def test_of_a_layer_that_the_loss_hardly_misses_a_cut_leaves_a_part() -> None:
    """Of 8 and 12 units half shall go; those of a are missed least, and 6 of them may go at most."""
    model = Chain()
    graph = build_graph(model.eval(), 16)
    penalty = GroupPenalty(graph, model)
    model.a.bn.weight.grad, model.b.bn.weight.grad = torch.full((8,), 0.01), torch.arange(1.0, 13.0)
    penalty.watch()
    most = removable(graph, Budget(multiple_of=2, min_width=2, max_removed=0.75))
    assert most.tolist() == [6, 8, 0]
    chosen = penalty.least(0.5, most)
    assert chosen[:8].sum() == 6
    assert chosen[8:20].tolist() == [True] * 4 + [False] * 8


def test_the_units_that_the_loss_misses_least_can_be_pulled_alone() -> None:
    """a, b and c share their channels: the loss misses (γ·gradient)² of each, added up before it is squared."""
    model = Residual()
    penalty = GroupPenalty(build_graph(model.eval(), 16), model)
    for block, gamma in ((model.a, 3.0), (model.b, -4.0), (model.c, 0.0)):
        block.bn.weight.data[:] = 2.0
        block.bn.weight.data[:2] = torch.tensor([gamma, 1.0])
        block.bn.weight.grad = torch.ones(8)
    penalty.watch()  # channel 0: 3 - 4 + 0, channel 1: 1 + 1 + 1, the others: 2 + 2 + 2
    assert sorted(penalty.saliency[penalty.saliency > 0].tolist()) == [1.0, 9.0, *[36.0] * 6]
    model.c.bn.weight.grad = torch.tensor([5.0, *[0.0] * 7])
    model.a.bn.weight.grad = model.b.bn.weight.grad = torch.tensor([1.0, 0.1, *[0.5] * 6])
    penalty.watch()  # channel 0: 1 more
    found = penalty.least(2 / 8, penalty_most(penalty))
    assert int(found.sum()) == 2
    assert sorted(penalty.values(found).tolist()) == [0.0, 1.0, 1.0, 1.0, 3.0, 4.0]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    penalty.add_gradient(0.1, found)
    gradient = model.a.bn.weight.grad
    assert gradient is not None
    assert gradient[:2].tolist() == pytest.approx([0.1 * 3 / 5, 0.1 / 3**0.5])
    assert int(gradient.count_nonzero()) == 2


@pytest.mark.parametrize(("lone", "expected"), [(9.0, (0, 6)), (0.1, (8, 2))])
def test_what_is_pulled_is_a_share_of_the_gammas_not_of_the_units(lone: float, expected: tuple[int, int]) -> None:
    """Eight channels have a γ in a alone, eight one in a and one in b: a half of all γ is twelve."""
    model = ChunkTie()
    penalty = GroupPenalty(build_graph(model.eval(), 16), model)
    model.a.bn.weight.grad = torch.cat((torch.full((8,), lone), torch.ones(8)))
    model.b.bn.weight.grad = torch.ones(8)
    model.a.bn.weight.data[8:], model.b.bn.weight.data[:] = 2.0, 3.0
    penalty.watch()
    found = penalty.values(penalty.least(0.5, penalty_most(penalty))).tolist()
    assert (found.count(1.0), found.count(2.0), found.count(3.0)) == (expected[0], expected[1], expected[1])


def test_what_ultralytics_freezes_is_neither_chosen_nor_counted() -> None:
    """Without a gradient the loss seems to miss it least of all, and no pull makes it shrink."""
    model = Chain()
    model.a.requires_grad_(False)
    model.a.bn.weight.data.fill_(9.0)
    penalty = GroupPenalty(build_graph(model.eval(), 16), model)
    model.b.bn.weight.grad = torch.ones(12)
    penalty.watch()
    assert penalty.values(penalty.least(0.5, penalty_most(penalty))).tolist() == [1.0] * 6
    assert penalty.values().tolist() == [1.0] * 12
    model.requires_grad_(False)
    with pytest.raises(EspalierError, match="and that is not frozen"):
        GroupPenalty(build_graph(model, 16), model)


# The trainer of the penalty, with Ultralytics' setup left out.


@pytest.fixture
def sparsity(tmp_path: Path, monkeypatch) -> Callable[..., Any]:
    """Make a SparsityTrainer of a model as it is after Ultralytics' own setup."""
    monkeypatch.setattr(DetectionTrainer, "_setup_train", lambda _: None)

    def make(model: nn.Module, sr: float | str, sr_decay: float = 1.0, epochs: int = 1, **notes: Any) -> Any:
        write_json(tmp_path / SPARSITY, {"sr": sr, "sr_decay": sr_decay, **notes})
        trainer: Any = SparsityTrainer.__new__(SparsityTrainer)
        vars(trainer).update(
            save_dir=tmp_path / "training",
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
            scaler=torch.amp.GradScaler("cpu", init_scale=1024.0),
            device=torch.device("cpu"),
            data={"channels": 3},
            callbacks={"on_fit_epoch_end": [], "on_train_epoch_start": [], "on_train_batch_end": []},
            ema=SimpleNamespace(ema=model, update=lambda _: None),
            args=SimpleNamespace(imgsz=16, seed=0, data="none.yaml"),
            train_loader=range(4),
            loss=torch.ones(()),
            metrics={"metrics/mAP50-95(B)": 0.25, "val/box_loss": 1.0, "fitness": 3.0},
            epoch=0,
            epochs=epochs,
        )
        trainer._setup_train()
        return trainer

    return make


@pytest.mark.parametrize("magnitude", [1e-3, 1e6], ids=["small gradients", "clipped gradients"])
def test_the_pull_is_added_after_unscaling_and_clipping(sparsity, magnitude: float) -> None:
    """A step of learning rate 1 moves γ by its own (clipped) gradient and by λ, whatever the scale of AMP is."""
    model: Any = Chain().requires_grad_(False)
    model.a.bn.weight.requires_grad_(True)
    trainer = sparsity(model, sr=0.125)
    loss = magnitude * model.a.bn.weight.sum()
    trainer.scaler.scale(loss).backward()
    assert model.a.bn.weight.grad[0] == pytest.approx(1024 * magnitude)  # scaled
    trainer.optimizer_step()
    own = min(magnitude, 10.0 / 8**0.5)  # Ultralytics clips the norm of all gradients to 10
    assert model.a.bn.weight.tolist() == pytest.approx([1.0 - own - 0.125] * 8, rel=1e-5)


def test_a_step_that_amp_skips_adds_nothing(sparsity) -> None:
    model = Chain()
    trainer = sparsity(model, sr=0.125)
    trainer.scaler.scale(model.a.bn.weight.sum() * float("inf")).backward()
    trainer.optimizer_step()
    assert model.a.bn.weight.tolist() == [1.0] * 8
    assert trainer.scaler.get_scale() == 512.0


def test_the_pull_decays_over_the_epochs(sparsity) -> None:
    trainer = sparsity(Chain(), sr=1.0, sr_decay=0.1, epochs=4)
    strengths = []
    for trainer.epoch in range(5):
        strengths.append(trainer.current_sr())
    assert strengths == pytest.approx([1.0, 0.7, 0.4, 0.1, 0.1])
    trainer = sparsity(Chain(), sr=1.0, sr_decay=0.1, epochs=1)
    assert trainer.current_sr() == 1.0


def test_the_rate_that_counts_is_that_of_most_gammas(sparsity) -> None:
    """MuSGD has a group of its own for the head, with three times the rate."""
    model: Any = Chain()
    trainer = sparsity(model, sr=0.1)
    head, others = list(model.a.parameters())[:1], list(model.b.parameters())
    groups = [{"params": head, "lr": 0.03, "param_group": "bn"}, {"params": others, "lr": 0.01, "param_group": "bn"}]
    trainer.optimizer = torch.optim.SGD(groups, lr=1.0)
    assert trainer._gamma_options()["lr"] == 0.01


def test_lambda_steers_itself(sparsity, tmp_path: Path) -> None:
    """Half of the γ of 1 shall be 0.05 after 6 of 8 epochs of 4 steps of lr 1: λ = 0.95 / 24, which nothing resists."""
    model: Any = Chain()
    trainer = sparsity(model, sr="auto", epochs=10, share=0.475, budget={"multiple_of": 1, "min_width": 1})
    vars(trainer).update(lf=lambda _: 1.0, accumulate=1, fitness=0.3, world_size=1)
    trainer.args.momentum = 0.0
    for trainer.epoch in range(10):
        for callback in trainer.callbacks["on_train_epoch_start"]:
            callback(trainer)
        for _ in trainer.train_loader:
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            trainer.optimizer.step()
        for callback in trainer.callbacks["on_fit_epoch_end"]:
            callback(trainer)
    course = read_json(tmp_path / "steering.json")["epochs"]
    assert [found["strength"] for found in course[:6]] == pytest.approx([0.95 / 24] * 6, rel=1e-4)
    assert [found["pull"] for found in course] == [4.0] * 8  # two epochs were watched
    assert course[4]["quantile"] == pytest.approx(1 - 0.95 * 5 / 6, rel=1e-4)
    assert (course[4]["share"], course[-1]["share"]) == (0.0, 0.5)
    assert course[-1]["strength"] < 0.95 / 24
    strengths = [event.value for event in events(tmp_path).Scalars("sparsity/lambda")]
    assert strengths[:3] == pytest.approx([0.0, 0.0, 0.95 / 24])


def test_a_training_that_is_resumed_before_it_has_chosen_watches_first(sparsity, tmp_path: Path) -> None:
    """Killed after the two epochs that watch: what they saw is gone, and one more is watched before any is pulled."""
    model: Any = Chain()
    trainer = sparsity(model, sr="auto", epochs=10, share=0.475, budget={"multiple_of": 1, "min_width": 1})
    vars(trainer).update(lf=lambda _: 1.0, accumulate=1, fitness=0.3, world_size=1)
    trainer.args.momentum = 0.0
    for trainer.epoch in (2, 3):
        for callback in trainer.callbacks["on_train_epoch_start"]:
            callback(trainer)
        assert (trainer.pulled_units is None) == (trainer.epoch == 2)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        model.a.bn.weight.grad[4:] = 1.0  # what the loss misses
        model.b.bn.weight.grad[6:] = 1.0
        trainer.optimizer.step()
        for callback in trainer.callbacks["on_fit_epoch_end"]:
            callback(trainer)
    assert read_json(tmp_path / "steering.json")["units"] == [0, 1, 2, 3, *range(8, 14)]
    assert trainer.steered == pytest.approx(0.95 / 20)  # five epochs are left of six


def test_statistics_keep_step_with_the_shrinking_scales(sparsity) -> None:
    model = Chain()
    model.a.bn.momentum, model.b.bn.momentum = 0.03, 0.5
    sparsity(model, sr=1.0)
    assert (model.a.bn.momentum, model.b.bn.momentum) == (0.1, 0.5)


def test_what_will_be_cut_fades_on_schedule(sparsity, tmp_path: Path) -> None:
    """Ten epochs of four batches: the least γ, channels 0 and 1 of a, are chosen after two and gone after eight."""
    model: Any = randomised(Chain())
    model.a.bn.weight.data[:2] = torch.tensor([0.02, 0.01])
    fade = {"percent": 0.1, "budget": {"multiple_of": 1, "min_width": 1}}
    trainer = sparsity(model, sr=0.0, epochs=10, fade=fade)
    left = []
    for trainer.epoch in range(10):
        for callback in trainer.callbacks["on_train_epoch_start"]:
            callback(trainer)
        assert (tmp_path / FADE_PLAN).exists() == (trainer.epoch >= 2)
        for _ in trainer.train_loader:
            trainer.optimizer.step()
            for callback in trainer.callbacks["on_train_batch_end"]:
                callback(trainer)
        left.append(model.a.bn.weight[0].item() / 0.02)
    assert left == pytest.approx([1, 1, *(1 - step / 6 for step in range(1, 7)), 0, 0], abs=1e-6)
    assert model.a.bn.bias[:2].tolist() == [0.0, 0.0]
    assert (model.a.bn.weight[2:] >= 0.5).all()


def test_what_will_be_cut_fades_in_a_single_epoch_too(sparsity, tmp_path: Path) -> None:
    model: Any = randomised(Chain())
    model.a.bn.weight.data[:2] = torch.tensor([0.02, 0.01])
    trainer = sparsity(model, sr=0.0, epochs=1, fade={"percent": 0.1, "budget": {"multiple_of": 1, "min_width": 1}})
    trainer.choose_what_fades()
    for _ in trainer.train_loader:
        trainer.optimizer.step()
        trainer.count_batch()
    assert model.a.bn.weight[:2].tolist() == [0.0, 0.0]


def test_a_resumed_training_keeps_what_fades(sparsity, tmp_path: Path) -> None:
    """Killed at the start of epoch 5, half way down: the plan of the first start holds, whatever γ are now."""
    model: Any = randomised(Chain())
    fade = {"percent": 0.05, "budget": {"multiple_of": 1, "min_width": 1}}
    model.a.bn.weight.data[3] = 0.01
    trainer = sparsity(model, sr=0.0, epochs=10, fade=fade)
    trainer.epoch = 2
    trainer.choose_what_fades()
    model.a.bn.weight.data[3] = 1.0
    model.a.bn.weight.data[5] = 0.01
    again = sparsity(model, sr=0.0, epochs=10, fade=fade)
    again.epoch = 5
    again.choose_what_fades()
    for _ in again.train_loader:
        again.optimizer.step()
        again.count_batch()
    assert model.a.bn.weight[3].item() == pytest.approx((1 / 3) / (1 / 2))  # from a half to a third of the schedule
    assert model.a.bn.weight[5].item() == pytest.approx(0.01)


def test_channels_near_zero_are_told_from_those_that_stay() -> None:
    """A channel of a residual goes when all its γ are near zero; of a group one channel stays."""
    model = Residual()
    for block in (model.a, model.b, model.c):
        block.bn.weight.data[:2] = torch.tensor([0.01, 0.01])
    model.c.bn.weight.data[1] = 1.0
    graph = build_graph(model.eval(), 16)
    (width,) = [group.width for group in graph.groups if not group.frozen]
    found = widths_without(graph, batch_norm_scales(graph, model), 0.05)
    assert [w for w, g in zip(found, graph.groups, strict=True) if not g.frozen] == [width - 1]
    for block in (model.a, model.b, model.c):
        block.bn.weight.data[:] = 0.0
    found = widths_without(graph, batch_norm_scales(graph, model), 0.05)
    assert [w for w, g in zip(found, graph.groups, strict=True) if not g.frozen] == [1]


# A λ that ruins the loss.


def lost(trainer: Any, *losses: float) -> None:
    for value in losses:
        trainer.loss = torch.tensor(value)
        trainer.watch_loss()


def test_a_loss_that_stays_without_a_number_ends_the_training(sparsity, tmp_path: Path) -> None:
    trainer = sparsity(Chain(), sr=8.0, sr_decay=0.5, epochs=3)
    trainer.wdir, trainer.epoch = tmp_path, 1
    nan, inf = float("nan"), float("inf")
    lost(trainer, 1.0, inf, nan, 1.0, nan, nan)  # AMP looks for its scale
    (tmp_path / RESUME).write_bytes(b"good")
    with pytest.raises(EspalierError) as caught:
        lost(trainer, nan)
    assert str(caught.value) == (
        "sparsity training stopped in epoch 2: the loss is no number any more with λ 6 (sr 8.0); "
        f"the last good checkpoint is {tmp_path / RESUME}; start again with a smaller sr or lr0"
    )


@pytest.mark.parametrize(("loss", "fitness"), [(float("nan"), 0.5), (1.0, float("nan"))])
def test_an_epoch_that_ends_without_a_number_is_not_saved(
    sparsity, tmp_path: Path, loss: float, fitness: float
) -> None:
    trainer = sparsity(Chain(), sr=8.0)
    trainer.wdir, trainer.loss, trainer.fitness = tmp_path, torch.tensor(loss), fitness
    with pytest.raises(EspalierError, match="nothing was trained before"):
        trainer._handle_nan_recovery(0)  # Ultralytics would go on, and save what is left


# What TensorBoard shows.


def events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder / "tensorboard"), size_guidance={"histograms": 0})
    reader.Reload()
    return reader


def test_tensorboard_shows_the_gammas(sparsity, tmp_path: Path) -> None:
    """At the start the mean |γ| is 1; after the first epoch 5 of 20 γ are below 0.05, then 8."""
    model = Chain()
    trainer = sparsity(model, sr=0.5, sr_decay=0.5, epochs=2)
    for trainer.epoch, dead in ((0, 5), (1, 8)):
        model.a.bn.weight.data[:dead] = 0.049
        trainer.callbacks["on_fit_epoch_end"][0](trainer)
    trainer.epoch = 2  # Ultralytics calls once more after its last evaluation
    trainer.callbacks["on_fit_epoch_end"][0](trainer)

    reader = events(tmp_path)
    assert sorted(reader.Tags()["histograms"]) == ["gamma/a.bn", "gamma/all", "gamma/b.bn"]
    assert [event.step for event in reader.Histograms("gamma/all")] == [0, 1]
    assert reader.Histograms("gamma/b.bn")[0].histogram_value.num == 12
    scalars = {tag: [event.value for event in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}
    assert scalars == {
        "sparsity/near_zero_share": pytest.approx([5 / 20, 8 / 20]),
        # Per place 216 MACs of a, 864 of b, 48 of the head, which stays; of a 3 of 8 channels, then one.
        "sparsity/macs_if_pruned": pytest.approx([(81 + 324 + 48) / 1128, (27 + 108 + 48) / 1128]),
        "sparsity/mean_gamma": pytest.approx([(15 + 5 * 0.049) / 20, (12 + 8 * 0.049) / 20]),
        "sparsity/lambda": pytest.approx([0.5, 0.25]),
        "metrics/mAP50-95": [0.25, 0.25],
    }
    assert trainer.gamma_log.near_zero == 8 / 20


def test_tensorboard_shows_the_latency_that_would_be_left(tmp_path: Path) -> None:
    """Of 8 and 12 channels 3 and 12 are left; the budget allows 4 of 8."""
    model = Chain()
    table, graph = table_of(model.eval(), 16)
    save_table(table, tmp_path / "table.json")
    write_json(tmp_path / SPARSITY, {"sr": 1.0, "table": str(tmp_path / "table.json")})
    log = GammaLog(graph, tmp_path, model)
    model.a.bn.weight.data[:5] = 0.0
    log.write(model, 0, 1.0, {})
    dense, left = (0.5 + 3.0 + 0.01 * (3 + a + 12) + 0.001 * (3 * a + 12 * a + 12 * 4) for a in (8, 4))
    assert [event.value for event in events(tmp_path).Scalars("sparsity/latency_if_pruned")] == [
        pytest.approx(left / dense)
    ]


def test_a_resumed_training_compares_with_the_first_start(tmp_path: Path) -> None:
    model = Chain()
    graph = build_graph(model.eval(), 16)
    write_json(tmp_path / SPARSITY, {"sr": 1.0})
    first = GammaLog(graph, tmp_path, model).threshold
    model.a.bn.weight.data.zero_()
    assert first == pytest.approx(0.05) == GammaLog(graph, tmp_path, model).threshold
    assert read_json(tmp_path / SPARSITY) == {"sr": 1.0, "start_mean": 1.0}


def test_frozen_channels_are_not_counted(tmp_path: Path) -> None:
    """The channels of a are frozen, and their γ are 9: only those of b make the mean."""
    model = SplitFixed()
    model.a.bn.weight.data.fill_(9.0)
    write_json(tmp_path / SPARSITY, {"sr": 1.0})
    log = GammaLog(build_graph(model.eval(), 16), tmp_path, model)
    assert log.threshold == pytest.approx(NEAR_ZERO * 1.0)
    model.b.bn.weight.data.zero_()
    log.write(model, 0, 1.0, {})
    assert log.near_zero == 1.0


def test_a_model_without_prunable_batch_norms_has_nothing_to_press() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.Conv2d(4, 2, 1)).eval()
    with pytest.raises(EspalierError, match="no batch norm whose channels may be pruned"):
        GroupPenalty(build_graph(model, 16), model)


# Shapes.


@pytest.fixture
def trainer() -> Any:
    """A PlanTrainer that has only read its data set."""
    made: Any = PlanTrainer.__new__(PlanTrainer)
    made.data = {"nc": 6, "names": dict(enumerate("abcdef")), "channels": 3}
    made.args = SimpleNamespace(cls_remap=True)
    return made


def test_a_pruned_checkpoint_keeps_its_shape(trainer: Any, pruned: Path) -> None:
    weights: Any = load_model(pruned)
    before = copy.deepcopy(weights.state_dict())
    model = trainer.get_model(weights.yaml, weights, verbose=False)
    assert structure_hash(model) == structure_hash(weights)
    assert plans_of(model) == plans_of(weights) != []
    assert model.names == dict(enumerate("abcdef"))
    with torch.no_grad():
        next(model.parameters()).zero_()
    assert all(torch.equal(value, before[name]) for name, value in weights.state_dict().items())  # it is a copy


def test_a_dense_checkpoint_is_built_as_ultralytics_does(trainer: Any, dense: Path, narrow: Path) -> None:
    weights: Any = load_model(dense)
    model = trainer.get_model(weights.yaml, weights, verbose=False)
    assert structure_hash(model) == structure_hash(build_model(str(narrow)))
    torch.testing.assert_close(model.state_dict()["model.0.conv.weight"], weights.state_dict()["model.0.conv.weight"])
    assert plans_of(trainer.get_model(str(narrow), None, verbose=False)) == []


def test_a_pruned_model_of_other_classes_is_refused(trainer: Any, pruned: Path) -> None:
    trainer.data["nc"] = 4
    with pytest.raises(PlanError, match="knows 6 classes, the data set has 4: train the dense model on this data set"):
        trainer.get_model(None, load_model(pruned))


# Data.


def test_a_download_entry_is_never_run(tmp_path: Path, trainer: Any) -> None:
    ran = tmp_path / "ran"
    (tmp_path / "train").mkdir()
    yaml = tmp_path / "data.yaml"
    yaml.write_text(f"train: train\nval: gone\nnames: [a]\ndownload: |\n  import os\n  os.mkdir({str(ran)!r})\n")
    trainer.args = SimpleNamespace(data=str(yaml), split="val", single_cls=False)
    with pytest.raises(FileNotFoundError):
        trainer.get_dataset()
    assert not ran.exists()


def test_one_class_for_all(tiny_data: Path, trainer: Any) -> None:
    trainer.args = SimpleNamespace(data=str(tiny_data), split="val", single_cls=False)
    assert trainer.get_dataset()["nc"] == 6
    trainer.args.single_cls = True
    assert (trainer.get_dataset()["nc"], trainer.get_dataset()["names"]) == (1, {0: "item"})


# Arguments and resuming, with a trainer that only notes what it was given.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"nosuch": 1}, "train: 'nosuch' is not an argument of Ultralytics' training"),
        ({"epoch": 1}, "train: 'epoch' is not"),
        ({"data": "x"}, "train: 'data' is set by Espalier itself: remove it"),
        ({"resume": True}, "train: 'resume' is set by Espalier itself"),
        ({"imgsz": 96}, "train: 'imgsz' is not of a training alone: give it as --imgsz, or imgsz="),
        ({"mosaic": "much"}, "train: 'mosaic=much' is of invalid type str"),
        ({"fraction": 1.5, "nbs": 16}, "train: 'fraction=1.5' invalid"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        check_arguments(Training(epochs=1, args=arguments), "train")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_right_arguments_pass() -> None:
    arguments = {"nbs": 16, "mosaic": 0, "degrees": 10.0, "cache": "ram", "optimizer": "sgd"}
    check_arguments(Training(epochs=1, args=arguments), "train")


@pytest.mark.parametrize(
    ("device", "seen", "refused"),
    [("cpu", 0, False), ("mps", 0, False), ("0", 0, True), ("0,1", 1, True), ("0, 1", 2, False), ("1", 2, False)],
)
def test_gpus_that_are_not_there_are_refused(
    device: str, seen: int, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: seen)
    with pytest.raises(SettingsError, match=f"^device={device}: torch sees {seen} ") if refused else nullcontext():
        check_device(device)


class Recorder:
    """Stands in for a trainer."""

    notes_file = SPARSITY

    given: dict[str, Any]
    error: Exception | None = None

    def __init__(self, overrides: dict[str, Any]) -> None:
        type(self).given = overrides

    def train(self) -> None:
        if self.error:
            raise self.error


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    def run(*, resumable: bool = False, notes: dict[str, Any] | None = None, **args: Any) -> tuple[Path, Path]:
        Recorder.given = {}
        recorder: Any = Recorder
        return run_training(
            recorder,
            Path("a.pt"),
            Path("d.yaml"),
            Training(epochs=3, args=args),
            tmp_path,
            resumable=resumable,
            overrides={"imgsz": 64, "seed": 5},
            notes=notes,
        )

    return run


def weights(folder: Path, epoch: int, **files: bytes) -> Path:
    """Write what an interrupted training left: a checkpoint of `epoch`, and other files as they are."""
    path = folder / "training" / "weights"
    path.mkdir(parents=True)
    torch.save({"epoch": epoch}, path / RESUME)
    for name, content in files.items():
        (path / f"{name}.pt").write_bytes(content)
    return path


def test_what_ultralytics_is_told(start, tmp_path: Path) -> None:
    best, last = start(nbs=16, patience=7, notes={"sr": 0.5})
    assert best == last == tmp_path / "training" / "weights" / "last.pt"
    expected = {"model": "a.pt", "data": "d.yaml", "save_dir": str(tmp_path / "training"), "epochs": 3, "batch": 16}
    assert expected.items() <= Recorder.given.items()
    # args have the last word
    assert {"seed": 5, "nbs": 16, "imgsz": 64, "patience": 7}.items() <= Recorder.given.items()
    assert not {"args", "resume"} & Recorder.given.keys()
    assert read_json(tmp_path / SPARSITY) == {"sr": 0.5}


def test_the_best_checkpoint_is_returned_where_there_is_one(start, tmp_path: Path) -> None:
    weights(tmp_path, 0, best=b"best", last=b"last")
    best, last = start()
    assert (best.name, last.name) == ("best.pt", "last.pt")


def test_a_half_done_training_is_resumed_from_whole_copies(start, tmp_path: Path) -> None:
    """The process was killed while it wrote best.pt; sparsity.json is that of the first start."""
    folder = weights(tmp_path, 1, best=b"wh", last=b"", resume_best=b"whole")
    write_json(tmp_path / SPARSITY, {"sr": 0.5, "start_mean": 2.0})
    best, _ = start(resumable=True, notes={"sr": 0.5})
    assert Recorder.given["resume"] == Recorder.given["model"] == str(folder / RESUME)
    assert best.read_bytes() == b"whole"
    assert read_json(tmp_path / SPARSITY)["start_mean"] == 2.0


def test_a_training_killed_before_its_first_checkpoint_starts_again(start, tmp_path: Path) -> None:
    start(resumable=True)
    assert Recorder.given["model"] == "a.pt"


def test_other_work_is_not_resumed(start, tmp_path: Path) -> None:
    weights(tmp_path, 1)
    start(resumable=False)
    assert Recorder.given["model"] == "a.pt"


@pytest.mark.parametrize(("files", "best"), [({"resume_best": b"whole"}, RESUME_BEST), ({}, RESUME)])
def test_a_training_killed_at_its_very_end_is_not_repeated(start, tmp_path: Path, files, best: str) -> None:
    folder = weights(tmp_path, 2, best=b"half", last=b"half", **files)
    assert start(resumable=True) == (folder / best, folder / RESUME)
    assert Recorder.given == {}


def test_a_damaged_checkpoint_to_resume_from_is_named(start, tmp_path: Path) -> None:
    folder = weights(tmp_path, 1)
    (folder / RESUME).write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"resume\.pt cannot be opened to resume from: delete its folder"):
        start(resumable=True)


@pytest.mark.parametrize(
    ("reason", "remedy"),
    [
        ("CUDA out of memory. Tried to allocate 2.00 GiB", "give a smaller batch or imgsz"),
        (
            "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory",
            "give a smaller batch or imgsz",
        ),
        ("Training failed: NaN persisted for 4 epochs", "give a smaller lr0"),
    ],
)
def test_what_a_failed_training_calls_for(start, monkeypatch, tmp_path: Path, reason: str, remedy: str) -> None:
    monkeypatch.setattr(Recorder, "error", RuntimeError(reason))
    with pytest.raises(EspalierError) as caught:
        start()
    assert str(caught.value) == f"training stopped: {reason}; {remedy}; what was saved is in {tmp_path}"


@pytest.mark.parametrize(
    "start_of_message", ["", "Caught FileNotFoundError in a worker.\nTraceback:\nFileNotFoundError: "]
)
def test_an_image_that_cannot_be_decoded_is_named(start, monkeypatch, start_of_message: str) -> None:
    """As Ultralytics raises it, here or in a process that loads images; its name means that it was not decoded."""
    monkeypatch.setattr(Recorder, "error", FileNotFoundError(f"{start_of_message}Image Not Found /d/a.bmp"))
    with pytest.raises(
        EspalierError, match=r"Image Not Found /d/a\.bmp; it is there and cannot be decoded, mend or"
    ) as caught:
        start()
    assert "\n" not in str(caught.value)
    assert "Caught" not in str(caught.value)


@pytest.mark.parametrize("kind", [RuntimeError, ValueError, TypeError, AssertionError])
def test_a_failed_training_is_one_line(start, monkeypatch, tmp_path: Path, kind: type[Exception]) -> None:
    monkeypatch.setattr(Recorder, "error", kind("no such layer\nat length"))
    with pytest.raises(EspalierError) as caught:
        start()
    assert str(caught.value) == f"training stopped: no such layer; what was saved is in {tmp_path}"
    monkeypatch.setattr(Recorder, "error", kind())
    with pytest.raises(EspalierError, match=f"training stopped: {kind.__name__};"):
        start()


def test_processes_that_fail_on_several_gpus_are_one_line(start, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Recorder, "error", subprocess.CalledProcessError(1, ["python", "-m", "torch.distributed.run"]))
    with pytest.raises(EspalierError, match=r"ended with code 1, the lines above say why; what was saved is in"):
        start()


def test_our_own_errors_and_those_of_the_disk_pass(start, monkeypatch) -> None:
    for error in (PlanError("as it is"), OSError(28, os.strerror(28))):
        monkeypatch.setattr(Recorder, "error", error)
        with pytest.raises(type(error)) as caught:
            start()
        assert caught.value is error


def test_copies_are_kept_of_the_newest_and_of_the_best(tmp_path: Path, monkeypatch) -> None:
    made: Any = PlanTrainer.__new__(PlanTrainer)
    made.wdir, made.last = tmp_path, tmp_path / "last.pt"

    def save(_: Any) -> bool:
        made.last.write_bytes(made.content)
        return True

    monkeypatch.setattr(DetectionTrainer, "save_model", save)
    for made.content, made.fitness, made.best_fitness in ((b"1", 0.1, 0.1), (b"2", 0.3, 0.3), (b"3", 0.2, 0.3)):
        assert made.save_model()
    assert ((tmp_path / RESUME).read_bytes(), (tmp_path / RESUME_BEST).read_bytes()) == (b"3", b"2")


def test_the_student_of_a_distillation_is_what_was_trained(monkeypatch) -> None:
    student, plain = nn.Linear(1, 1), nn.Linear(1, 1)
    both: Any = nn.Module()
    both.student_model = student
    monkeypatch.setattr(launch, "load_model", {Path("both"): both, Path("plain"): plain}.get)
    assert launch.trained_model(Path("both")) is student
    assert launch.trained_model(Path("plain")) is plain


def test_a_graph_is_traced_once_for_the_penalty_and_the_log(sparsity, monkeypatch) -> None:
    traced: list[Graph] = []
    build = sparse.build_graph
    monkeypatch.setattr(sparse, "build_graph", lambda *given: traced.append(build(*given)) or traced[-1])
    made = sparsity(Chain(), sr=1.0)
    assert len(traced) == 1
    assert made.gamma_log.graph is traced[0]
