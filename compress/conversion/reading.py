"""What a stand-in of `foreign` holds: children, weights and settings, each checked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from compress.conversion.foreign import StandIn, TensorRef
from compress.errors import CheckpointError

Weights = dict[str, TensorRef]
_DEEPEST = 16  # modules within modules; YOLOv5's deepest weight is five down


def modules(module: StandIn) -> dict[str, Any]:
    """Return a module's children that are there, by name."""
    children = module.state.get("_modules")
    return {k: v for k, v in children.items() if v is not None} if isinstance(children, dict) else {}


def kind_of(module: Any) -> str:
    """Return the last part of a class's name."""
    return module.kind.rpartition(".")[2] if isinstance(module, StandIn) else type(module).__name__


def weights_of(module: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, StandIn, Weights]]:
    """Yield (dotted name, module, its own tensors) of a module and all below it.

    Raises:
        CheckpointError: modules nest without an end.
    """
    if not isinstance(module, StandIn):
        raise CheckpointError(f"'{name}' of a layer is no module but {kind_of(module)}")
    if depth > _DEEPEST:
        raise CheckpointError(f"modules of the checkpoint nest more than {_DEEPEST} deep at '{name}'")
    tensors: Weights = {}
    for group in ("_parameters", "_buffers"):
        content = module.state.get(group)
        if isinstance(content, dict):
            tensors |= {str(key): value for key, value in content.items() if isinstance(value, TensorRef)}
    yield name, module, tensors
    for child, inner in modules(module).items():
        yield from weights_of(inner, f"{name}.{child}" if name else str(child), depth + 1)


def weight_of(convolution: Any, place: str) -> TensorRef:
    """Return the weight of a convolution; `place` names the layer in an error.

    Raises:
        CheckpointError: there is none.
    """
    found = convolution.state.get("_parameters", {}).get("weight") if isinstance(convolution, StandIn) else None
    if not isinstance(found, TensorRef):
        raise CheckpointError(f"{place} has no convolution with weights")
    return found


def number_of(module: Any, name: str, kind: type, place: str) -> Any:
    """Return a setting of a module that must be of a kind.

    Raises:
        CheckpointError: it is not.
    """
    value = module.state.get(name) if isinstance(module, StandIn) else None
    if type(value) is not kind:
        raise CheckpointError(f"{place}: '{name}' must be {kind.__name__}, it is {value!r}")
    return value


def square_of(module: Any, name: str, place: str) -> int:
    """Return a setting of a module that must be one whole number, also where it is kept for both directions.

    Raises:
        CheckpointError: it is not.
    """
    value = module.state.get(name) if isinstance(module, StandIn) else None
    value = value[0] if isinstance(value, (tuple, list)) and len(set(map(str, value))) == 1 else value
    if type(value) is not int:
        raise CheckpointError(f"{place}: '{name}' must be one whole number for both directions, it is {value!r}")
    return value
