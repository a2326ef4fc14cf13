"""Trial cuts: a module that does not survive the loss of channels keeps them.

The exported graph shows that a module reshapes 64 channels into 8 rows, not whether it counts them anew or has the
number 64 in its code. So where modules reshape or split, channels are cut on trial: what cannot run afterwards, or
computes something else than the masked dense model, is frozen, and everything around it still is pruned.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.slots import FIXED
from compress.walk import modules_of, operation_name

if TYPE_CHECKING:
    from torch import Tensor, nn

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
    suspects = sorted({index for groups in untried.values() for index in groups if not graph.groups[index].frozen})
    while suspects:
        broken = _broken(graph, model, suspects)
        if broken is None:
            break
        kind, place = broken
        frozen = untried.get(kind, set()) & set(suspects)
        if not frozen:  # it computes something else, or breaks what comes after it: try ties one by one
            frozen = _breaking_alone(graph, model, suspects)
            if not frozen:
                frozen = set(suspects)
        graph = _freeze(graph, frozen, f"{place} does not work with fewer channels")
        suspects = [index for index in suspects if not graph.groups[index].frozen]
    return graph


def _untried_modules(graph: Graph) -> dict[str, set[int]]:
    """Return the groups that pass reshapes, by the class of the modules that reshape them."""
    found: dict[str, set[int]] = defaultdict(set)
    for node in graph.program.graph.nodes:
        if node.op != "call_function" or operation_name(node) not in _RESHAPES:
            continue
        _, kind = modules_of(node)[-1] if modules_of(node) else ("", "")
        if kind.startswith("ultralytics.") and kind.rpartition(".")[2] in _TRIED:
            continue
        for described in (node, *node.all_input_nodes):
            groups = graph.descriptions.get(described.name, (np.array([]), None))[0]
            if (groups != FIXED).any():
                found[kind] |= set(np.unique(groups[groups != FIXED]).tolist())
    return found


def _broken(graph: Graph, model: nn.Module, groups: list[int]) -> tuple[str, str] | None:
    """Cut half of each group and of what is tied to it; return class and name of what breaks, or None."""
    from compress.budget import Choice
    from compress.checkpoint import structure_hash
    from compress.errors import SurgeryError
    from compress.oracle import ORACLE_TOLERANCE, noise, oracle_error
    from compress.plan import make_plan
    from compress.surgery import apply_plan

    keep = _half(graph, groups)
    plan = make_plan(graph, Choice(keep, [""] * len(keep)), structure_hash(model), "trial", "random")
    pruned = apply_plan(model, plan)
    image = noise(graph, model)
    failed = _failing_module(pruned, image)
    if failed:
        return failed
    try:
        error = oracle_error(graph, pruned, keep, image)
    except SurgeryError:
        error = np.inf
    return None if error <= ORACLE_TOLERANCE else ("", "a module")


def _half(graph: Graph, groups: list[int]) -> list[np.ndarray]:
    """Return which units stay: half of each group, others in each, so that mixed-up channels are noticed."""
    generator = np.random.default_rng(0)
    ties = {graph.groups[index].tie for index in groups}
    members: dict[int, list[int]] = defaultdict(list)
    for index, group in enumerate(graph.groups):
        members[group.tie].append(index)
    keep = [np.ones(group.width, dtype=bool) for group in graph.groups]
    for tie in ties:
        parts = int(np.gcd.reduce([graph.groups[index].width for index in members[tie]]))
        for index in members[tie] if parts > 1 else []:
            width = graph.groups[index].width
            removed = generator.permutation(width)[: width // parts * (parts // 2)]
            keep[index][removed] = False
    return keep


def _failing_module(model: nn.Module, image: Tensor) -> tuple[str, str] | None:
    """Run a model; return the full class name and the name of the module that raises, or None."""
    import torch

    from compress.capture import training_head

    stack: list[nn.Module] = []
    names = {module: name for name, module in model.named_modules()}
    handles = [
        handle
        for module in names
        for handle in (
            module.register_forward_pre_hook(lambda module, _: stack.append(module)),
            module.register_forward_hook(lambda *_: stack.pop() and None),
        )
    ]
    try:
        with torch.inference_mode(), training_head(model):
            model(image)
    except Exception:  # whatever a stranger's forward raises when sizes do not fit
        module: Any = stack[-1] if stack else model
        return f"{type(module).__module__}.{type(module).__qualname__}", names[module] or type(model).__name__
    finally:
        for handle in handles:
            handle.remove()
    return None


def _breaking_alone(graph: Graph, model: nn.Module, groups: list[int]) -> set[int]:
    ties: dict[int, list[int]] = defaultdict(list)
    for index in groups:
        ties[graph.groups[index].tie].append(index)
    return {index for members in ties.values() if _broken(graph, model, members) for index in members}


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
