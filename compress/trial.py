"""Trial cuts: a module that does not survive the loss of channels keeps them.

The exported graph shows that a module reshapes 64 channels into 8 rows or divides by 64, not whether it counts them
anew or has the number in its code. So where a stranger's module or a reshape is at work, channels are cut on trial:
what cannot run afterwards, or computes something else than the masked dense model, is frozen, and everything around it
still is pruned.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.slots import FIXED
from compress.walk import modules_of, operation_name

if TYPE_CHECKING:
    from torch import nn

    from compress.graph import Graph

_RESHAPES = {"view", "reshape", "_unsafe_view", "unflatten", "split", "split_with_sizes", "expand", "slice", "flatten"}
# Ultralytics' own modules whose reshapes the tests have tried at many widths, so that no trial is needed for them.
_TRIED = {
    *("Detect", "v10Detect", "Segment", "Segment26", "Pose", "Pose26", "OBB", "OBB26", "Classify", "Proto", "Proto26"),
    *("C2f", "C3k2", "C2fCIB", "C2PSA", "PSA", "C2fPSA", "RepNCSPELAN4", "ELAN1", "ADown", "Attention", "AAttn"),
    *("A2C2f", "CBLinear", "CBFuse", "Focus"),
}


def freeze_what_breaks(graph: Graph, model: nn.Module) -> Graph:
    """Return the graph with those groups frozen whose channels some module cannot do without.

    Args:
        graph: of the model, as walking found it.
        model: the model, which stays as it is.
    """
    untried = _untried_modules(graph)
    suspects = {index for groups in untried.values() for index in groups if not graph.groups[index].frozen}
    while suspects:
        failed = _failing_module(graph, model, suspects)
        if failed is None and _is_equal(graph, model, suspects):
            break
        kind, name = failed or ("", "")
        reason = f"{name} does not run with fewer channels"
        guilty = untried.get(kind, set()) & suspects
        if not guilty:  # it computes something else, or breaks what comes after it: try one tie after the other
            reason = "the model computes something else with fewer channels"
            guilty = _guilty_alone(graph, model, suspects) or suspects
        graph = _freeze(graph, guilty, reason)
        suspects = {index for index in suspects if not graph.groups[index].frozen}
    return graph


def _untried_modules(graph: Graph) -> dict[str, set[int]]:
    """Return the groups that untried modules reshape, or that strangers' modules touch, by the class of the module."""
    found: dict[str, set[int]] = defaultdict(set)
    for node in graph.program.graph.nodes:
        if node.op != "call_function" or not modules_of(node):
            continue
        package, _, name = (kind := modules_of(node)[-1][1]).rpartition(".")
        library = package.startswith(("torch.nn.", "ultralytics."))
        if library and (operation_name(node) not in _RESHAPES or name in _TRIED):
            continue
        for described in (node, *node.all_input_nodes):
            groups = graph.descriptions.get(described.name, (np.array([]), None))[0]
            if (groups != FIXED).any():
                found[kind] |= set(np.unique(groups[groups != FIXED]).tolist())
    return found


def _cut_half(graph: Graph, model: nn.Module, groups: set[int]) -> tuple[nn.Module, list[np.ndarray]]:
    """Return the model without half of each group and of what is tied to it, and what it keeps."""
    from compress.budget import Choice
    from compress.checkpoint import structure_hash
    from compress.plan import make_plan
    from compress.surgery import apply_plan

    keep = _half(graph, groups)
    plan = make_plan(graph, Choice(keep, [""] * len(keep)), structure_hash(model), "trial", "random")
    return apply_plan(model, plan), keep


def _is_equal(graph: Graph, model: nn.Module, groups: set[int]) -> bool:
    """Tell whether a trial cut of these groups passes the oracle."""
    from compress.errors import SurgeryError
    from compress.oracle import ORACLE_TOLERANCE, noise, oracle_error

    pruned, keep = _cut_half(graph, model, groups)
    try:
        return oracle_error(graph, pruned, keep, noise(graph, model)) <= ORACLE_TOLERANCE
    except SurgeryError:
        return False


def _half(graph: Graph, groups: set[int]) -> list[np.ndarray]:
    """Return which units stay: about half of each group, and of each tie another share and other units.

    Channels that were mixed up, and widths that must be equal although nothing ties them, are noticed then.
    """
    generator = np.random.default_rng(0)
    ties = sorted({graph.groups[index].tie for index in groups})
    members: dict[int, list[int]] = defaultdict(list)
    for index, group in enumerate(graph.groups):
        members[group.tie].append(index)
    keep = [np.ones(group.width, dtype=bool) for group in graph.groups]
    for tie in ties:
        parts = int(np.gcd.reduce([graph.groups[index].width for index in members[tie]]))
        gone = int(generator.integers(max(parts // 4, 1), 3 * parts // 4 + 1)) if parts > 1 else 0
        for index in members[tie]:
            width = graph.groups[index].width
            removed = generator.permutation(width)[: width // parts * gone]
            keep[index][removed] = False
    return keep


def _failing_module(graph: Graph, model: nn.Module, groups: set[int]) -> tuple[str, str] | None:
    """Cut on trial and run; return the full class name and the name of the module that raises, or None."""
    import torch

    from compress.capture import training_head
    from compress.oracle import noise

    pruned, _ = _cut_half(graph, model, groups)
    running: list[nn.Module] = []

    def begin(module: nn.Module, _: Any) -> None:
        running.append(module)

    def end(*_: Any) -> None:
        running.pop()

    for module in pruned.modules():
        module.register_forward_pre_hook(begin)
        module.register_forward_hook(end)
    try:
        with torch.inference_mode(), training_head(pruned):
            pruned(noise(graph, model))
    except Exception:  # whatever a stranger's forward raises when sizes do not fit
        failed: Any = running[-1] if running else pruned
        name = next(name for name, module in pruned.named_modules() if module is failed)
        return f"{type(failed).__module__}.{type(failed).__qualname__}", name or type(failed).__name__
    return None


def _guilty_alone(graph: Graph, model: nn.Module, groups: set[int]) -> set[int]:
    """Return those groups whose trial cut, with what is tied to them and nothing else, is not equal."""
    ties: dict[int, set[int]] = defaultdict(set)
    for index in groups:
        ties[graph.groups[index].tie].add(index)
    return {index for members in ties.values() if not _is_equal(graph, model, members) for index in members}


def _freeze(graph: Graph, groups: set[int], reason: str) -> Graph:
    """Freeze groups and all that are tied to them."""
    ties = {graph.groups[index].tie for index in groups}
    return replace(
        graph,
        groups=[
            replace(group, frozen=group.frozen or (reason if index in groups else f"tied to {reason}"))
            if group.tie in ties
            else group
            for index, group in enumerate(graph.groups)
        ],
    )
