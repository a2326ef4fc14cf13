from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from compress.manifest import read_json
from compress.training.steering import Epoch, Steering, first_strength, next_strength, response, suffers, warning

EPOCHS = 25
LR = [0.13 * (1 - 0.99 * epoch / (EPOCHS - 1)) for epoch in range(EPOCHS)]  # what λ = 1 moves in each epoch


def epoch(
    quantile: float, *, strength: float = 0.1, pull: float = 1.0, share: float = 0.0, fitness: float = 0.5
) -> Epoch:
    return Epoch(strength, pull, quantile, share, fitness)


def test_the_first_strength_gets_there_if_nothing_resists() -> None:
    assert first_strength(1.0, 0.1, 90.0) == pytest.approx(0.01)
    assert first_strength(0.05, 0.1, 90.0) == 0.0  # it is there already
    assert first_strength(1.0, 0.1, 0.0) == 0.0  # nothing left to pull with


def test_what_resists_is_pulled_harder() -> None:
    """γ followed half of the pull, so that what is left needs twice what it would need otherwise."""
    history = [epoch(0.95)]
    assert response(1.0, history) == pytest.approx(0.5)
    assert next_strength(1.0, history, 0.05, pull=18.0) == pytest.approx(0.9 / (0.5 * 18))


@pytest.mark.parametrize(("quantile", "pull", "expected"), [(0.95, 1.0, 0.2), (0.06, 1000.0, 0.05)])
def test_strength_changes_by_two_at_most(quantile: float, pull: float, expected: float) -> None:
    assert next_strength(1.0, [epoch(quantile)], 0.05, pull) == pytest.approx(expected)


def test_a_falling_map_halves_the_pull() -> None:
    history = [epoch(0.9, fitness=0.5), epoch(0.8, fitness=0.44)]
    assert suffers(history)
    assert next_strength(1.0, history, 0.05, pull=1.0) == pytest.approx(0.05)
    assert not suffers([epoch(0.9, fitness=0.5), epoch(0.8, fitness=0.46)])


def test_once_there_the_pull_fades() -> None:
    assert next_strength(1.0, [epoch(0.04)], 0.05, pull=10.0) == pytest.approx(0.05)


def test_gammas_that_grow_count_as_no_response() -> None:
    """The pull is then limited by what may change in an epoch, not negative."""
    assert response(1.0, [epoch(1.2)]) == pytest.approx(-2.0)
    assert next_strength(1.0, [epoch(1.2)], 0.05, pull=1.0) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("history", "left", "expected"),
    [
        ([epoch(0.9)], 10, None),
        ([epoch(0.9), epoch(0.8, fitness=0.3)], 10, "mAP fell from 0.500 to 0.300"),
        ([epoch(0.04)], 10, "γ shrink too fast"),
        ([epoch(0.04)] * 8, 2, None),
        ([epoch(1.0)] * 3, 10, "γ do not shrink"),
        ([epoch(0.5, share=0.31)], 0, "31.0% of the γ are near zero, the wanted share is not reached"),
    ],
)
def test_warnings(history: list[Epoch], left: int, expected: str | None) -> None:
    found = warning(1.0, history, 0.05, left)
    assert found is None if expected is None else found is not None and found.startswith(expected)


@pytest.mark.parametrize("resistance", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_it_steers_a_simulated_training_to_its_share(tmp_path: Path, resistance: float, share: float) -> None:
    """γ of 1000 channels, of which the loss holds each back by up to `resistance` of the pull."""
    generator = np.random.default_rng(0)
    gammas = generator.uniform(0.5, 1.5, 1000)
    pulled = np.arange(1000) < Steering.pulled(share) * 1000
    steering = Steering(tmp_path, 0.05)
    watched, end = steering.watched(EPOCHS), steering.end(EPOCHS)
    assert (watched, end) == (5, 20)
    steering.choose(np.flatnonzero(pulled).tolist(), gammas[pulled])
    for number, pull in enumerate(LR[watched:]):
        strength = steering.strength(number, LR[watched:])
        held = 1 - resistance * generator.uniform(0.5, 1.0, 1000)
        gammas = np.maximum(gammas - strength * pull * held * pulled, 0.0)
        steering.record(strength, pull, gammas, gammas[pulled], 0.5, end - watched - number - 1)
    assert steering.history[-1].share == pytest.approx(share, abs=0.05)
    reached = next(number for number, found in enumerate(steering.history) if found.share >= share - 0.05)
    assert 0.4 * EPOCHS <= watched + reached <= 0.85 * EPOCHS


def test_a_few_that_hold_out_are_not_waited_for(tmp_path: Path) -> None:
    steering = Steering(tmp_path, 0.05)
    gammas = np.array([0.5] * 96 + [9.0] * 4)
    steering.choose(list(range(100)), gammas)
    assert steering.start == 0.5
    steering.record(0.1, 1.0, gammas, np.array([0.01] * 96 + [9.0] * 4), 0.5, 10)
    assert steering.history[-1].quantile == 0.01


def test_a_resumed_training_goes_on_as_it_would_have(tmp_path: Path) -> None:
    gammas = np.linspace(0.5, 1.5, 11)
    steering = Steering(tmp_path, 0.05)
    steering.choose([3, 1], gammas)
    wanted = []
    for number in range(4):
        wanted.append(steering.strength(number, LR))
        left = gammas - 0.1 * (number + 1)
        steering.record(wanted[-1], LR[number], left, left, 0.5, 10)
    again = Steering(tmp_path, 0.04)  # the γ of now are not those of the start
    assert (again.start, again.threshold, again.units) == (1.5, 0.05, [3, 1])
    assert again.strength(3, LR) == wanted[3]  # killed in its fourth epoch
    again.record(wanted[3], LR[3], gammas - 0.4, gammas - 0.4, 0.5, 10)
    assert len(read_json(tmp_path / "steering.json")["epochs"]) == 4


def test_something_is_watched_before_anything_is_pulled() -> None:
    assert [Steering.watched(epochs) for epochs in (1, 2, 10, 100)] == [1, 1, 2, 20]
