"""Random networks × random plans. More of them: python -m scripts.studies.properties."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scripts.studies.properties import check_network
from scripts.studies.random_networks import Recipe, recipes

NETWORKS, PLANS = 24, 5


@settings(
    max_examples=NETWORKS,
    derandomize=True,  # the same networks in every run: a change of the code fails, not the luck of the draw
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(recipes(), st.integers(0, 2**32 - 1))
def test_the_pruned_network_equals_the_masked_one(recipe: Recipe, seed: int) -> None:
    found = check_network(recipe, range(seed, seed + PLANS))
    assert found.examples + found.without_cut == PLANS
    assert found.worst_error <= 1e-4
