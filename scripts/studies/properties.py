"""Prove random cuts of random networks: docs/results/properties.json.

usage: python -m scripts.studies.properties [--networks 400] [--plans 5] [--seed 0]
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch import nn

from compress import manifest
from compress.channels.graph import Graph, build_graph
from compress.channels.rules import RULES
from compress.channels.walk import operation_name
from compress.checkpoint import structure_hash
from compress.pruning.budget import Choice
from compress.pruning.oracle import ORACLE_TOLERANCE, masked_outputs, oracle_error
from compress.pruning.plan import make_plan
from compress.pruning.surgery import apply_plan
from scripts.studies.random_networks import IMGSZ, Network, Recipe, random_choice, recipes


@dataclass
class Found:
    """What checking has seen: an example is a network with a plan that removes something."""

    examples: int = 0
    without_cut: int = 0
    worst_error: float = 0.0
    operations: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: Found) -> Found:
        return Found(
            self.examples + other.examples,
            self.without_cut + other.without_cut,
            max(self.worst_error, other.worst_error),
            self.operations + other.operations,
        )


def check_network(recipe: Recipe, seeds: Iterable[int]) -> Found:
    """Prune one network by a random plan for each seed, and check each pruned network.

    Raises:
        AssertionError: outputs differ from the masked network, parameters are not as many as the graph says, or the
            network itself has changed; the message names what the plan kept.
    """
    network = Network(recipe)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    graph = build_graph(network, IMGSZ)
    found = Found(operations=Counter(operations(graph)))
    for number in seeds:
        choice = random_choice(graph, number)
        if (choice.widths == graph.widths).all():
            found.without_cut += 1
            continue
        error = _check_plan(network, graph, choice, number)
        found += Found(1, 0, error)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} of the dense network has changed"
    return found


def _check_plan(network: nn.Module, graph: Graph, choice: Choice, number: int) -> float:
    kept = {group.name: mask.nonzero()[0].tolist() for group, mask in zip(graph.groups, choice.keep, strict=True)}
    pruned = apply_plan(network, make_plan(graph, choice, structure_hash(network), "random", "random"))
    image = torch.rand(1, 3, IMGSZ, IMGSZ, generator=torch.Generator().manual_seed(number))
    parameters = sum(parameter.numel() for parameter in pruned.parameters())
    promised = graph.params(choice.widths)
    assert parameters == promised, f"{parameters} parameters are left, the graph says {promised:g}; kept: {kept}"
    with torch.inference_mode():
        outputs = [*masked_outputs(graph, image.clone(), choice.keep), *pruned(image.clone())]
    # A NaN on both sides would prove nothing.
    assert all(output.isfinite().all() for output in outputs), f"outputs are not finite; kept: {kept}"
    error = oracle_error(graph, pruned, choice.keep, image)
    assert error <= ORACLE_TOLERANCE, f"outputs differ by {error:.1e}; kept: {kept}"
    return error


def operations(graph: Graph) -> set[str]:
    """Return the names of the ATen operations in a network."""
    return {operation_name(node) for node in graph.program.graph.nodes if node.op == "call_function"}


def main() -> None:
    """Check many networks and write the record; the first one that fails is shrunk and printed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=int, default=400)
    parser.add_argument("--plans", type=int, default=5, help="random plans for each network")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("docs/results/properties.json"))
    given_options = parser.parse_args()
    total, networks, start = Found(), 0, time.perf_counter()

    @seed(given_options.seed)
    @settings(
        max_examples=given_options.networks, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
    )
    @given(recipes(), st.integers(0, 2**32 - 1))
    def check_all(recipe: Recipe, number: int) -> None:
        nonlocal total, networks
        total += check_network(recipe, range(number, number + given_options.plans))
        networks += 1
        if networks % 50 == 0:
            print(f"{networks} networks, {total.examples} examples, error {total.worst_error:.1e}", flush=True)

    check_all()
    record = {
        "command": f"python -m scripts.studies.properties --networks {given_options.networks} "
        f"--plans {given_options.plans} --seed {given_options.seed}",
        "networks": networks,
        "examples": total.examples,
        "plans_that_remove_nothing": total.without_cut,
        "max_error": total.worst_error,
        "seconds": round(time.perf_counter() - start),
        "networks_per_operation": dict(total.operations.most_common()),
        "rules_not_exercised": sorted(set(RULES) - set(total.operations)),
        "tools": manifest.tool_versions(),
    }
    manifest.write_json(given_options.output, record)
    print({key: value for key, value in record.items() if key != "tools"})


if __name__ == "__main__":
    main()
