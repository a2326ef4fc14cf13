"""Trial cuts: a module that does not survive the loss of channels keeps them.

The exported graph shows that a module reshapes 64 channels into 8 rows or divides by 64, not whether it counts them
anew or has the number in its code. So where a stranger's module or a reshape is at work, channels are cut on trial:
what cannot run afterwards, or computes something else than the masked dense model, is frozen, and everything around it
still is pruned.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from compress.channels.slots import FIXED
from compress.channels.ultralytics_modules import TRIED
from compress.channels.walk import modules_of, operation_name

if TYPE_CHECKING:
    from torch import nn

    from compress.channels.graph import Graph

_RESHAPES = {"view", "reshape", "_unsafe_view", "unflatten", "split", "split_with_sizes", "expand", "slice", "flatten"}


def freeze_what_breaks(graph: Graph, model: nn.Module) -> Graph:
    """Return the graph with those groups frozen whose channels some module cannot do without.

    Args:
        graph: of the model, as walking found it.
        model: the model, which stays as it is.
    """
    touched, suspects = _untried(graph)
    while suspects := {index for index in suspects if not graph.groups[index].frozen}:
        if _is_equal(graph, model, suspects):
            break
        kind, name = _failing_module(graph, model, suspects) or ("", "")
        guilty = touched[kind] & suspects
        # Modules of one class are taken to be alike; what one of a kind cannot spare is looked for.
        if sum(_kind_of(module) == kind for module in model.modules()) < 2 or not guilty:
            guilty = _guilty(graph, model, guilty) or _guilty(graph, model, suspects)
        blamed = name and (touched[kind] or not _is_library(kind))  # not the layer that comes after
        what = f"{name} does not run" if blamed else "the model computes something else"
        graph = _freeze(graph, guilty, f"{what} with fewer channels")
    return graph


def _untried(graph: Graph) -> tuple[dict[str, set[int]], set[int]]:
    """Return the groups that untried modules touch, by the class of the module, and all that may break.

    A module is untried that a stranger wrote, or that reshapes. A stranger's may also refuse what its parts would take.
    """
    touched: dict[str, set[int]] = defaultdict(set)
    suspects: set[int] = set()
    for node in graph.program.graph.nodes:
        if node.op != "call_function" or not (kinds := [kind for _, kind in modules_of(node)]):
            continue
        groups = [graph.descriptions[n.name][0] for n in (node, *node.all_input_nodes) if n.name in graph.descriptions]
        found = {index for described in groups for index in np.unique(described[described != FIXED]).tolist()}
        reshapes = operation_name(node) in _RESHAPES and kinds[-1].rpartition(".")[2] not in TRIED
        if reshapes or not _is_library(kinds[-1]):
            touched[kinds[-1]] |= found
        if reshapes or not all(map(_is_library, kinds)):
            suspects |= found
    return touched, suspects


def _is_library(kind: str) -> bool:
    return kind.startswith(("torch.nn.", "ultralytics."))


def _kind_of(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _cut_half(graph: Graph, model: nn.Module, groups: set[int]) -> tuple[nn.Module, list[np.ndarray]]:
    """Return the model without half of each group and of what is tied to it, and what it keeps."""
    from compress.checkpoint import structure_hash
    from compress.pruning.budget import Choice
    from compress.pruning.plan import make_plan
    from compress.pruning.surgery import apply_plan

    keep = _half(graph, groups)
    plan = make_plan(graph, Choice(keep, [""] * len(keep)), structure_hash(model), "trial", "random")
    return apply_plan(model, plan), keep


def _is_equal(graph: Graph, model: nn.Module, groups: set[int]) -> bool:
    """Tell whether a trial cut of these groups passes the oracle."""
    from compress.errors import PlanError, SurgeryError
    from compress.pruning.oracle import ORACLE_TOLERANCE, noise, oracle_error

    try:
        pruned, keep = _cut_half(graph, model, groups)
        return oracle_error(graph, pruned, keep, noise(graph, model)) <= ORACLE_TOLERANCE
    except (PlanError, SurgeryError):
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

    from compress.channels.capture import training_head
    from compress.pruning.oracle import noise

    running: list[tuple[str, str]] = []

    def end(*_: object) -> None:  # a hook that returns something replaces the result
        running.pop()

    try:
        pruned, _ = _cut_half(graph, model, groups)
        for name, module in pruned.named_modules():
            found = _kind_of(module), name or type(module).__name__
            module.register_forward_pre_hook(lambda *_, found=found: running.append(found))
            module.register_forward_hook(end)
        with torch.inference_mode(), training_head(pruned):
            pruned(noise(graph, model))
    except Exception:  # whatever a stranger's forward raises when sizes do not fit
        return running[-1] if running else None
    return None


def _guilty(graph: Graph, model: nn.Module, groups: set[int]) -> set[int]:
    """Return the ties of these groups without which the trial cut passes, found by halving."""
    if not groups or _is_equal(graph, model, groups):
        return set()
    ties = sorted({graph.groups[index].tie for index in groups})
    if len(ties) == 1:
        return groups
    first = {index for index in groups if graph.groups[index].tie in ties[: len(ties) // 2]}
    return _guilty(graph, model, first) | _guilty(graph, model, groups - first) or groups


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
