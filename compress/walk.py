"""One pass over an exported program: what the rules of `rules.py` see of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compress.errors import GraphError
from compress.slots import Ledger, fixed

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.fx import Node

# Modules that split by a size they keep as an attribute; `surgery` sets it anew after the cut.
RESIZABLE_SPLITS = {"C2f", "C2PSA", "PSA"}


class Walk:
    """One pass over an exported program: what the rules see of it."""

    def __init__(self, program: ExportedProgram) -> None:
        self.ledger = Ledger()
        self.results: dict[str, Any] = {}
        signature = program.graph_signature
        self._tensors = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}

    def slots(self, node: Any) -> Any:
        """Return the description of a node's result (see `slots`)."""
        return self.results[node.name]

    def shape(self, node: Any) -> tuple[int, ...]:
        """Return the shape of a node's (first) result."""
        return self.shapes(node)[0]

    def shapes(self, node: Any) -> list[tuple[int, ...]]:
        """Return the shapes of all results of a node."""
        value = node.meta.get("val")
        several = value if isinstance(value, (list, tuple)) else [value]
        return [tuple(int(size) for size in getattr(item, "shape", ())) for item in several]

    def is_tensor(self, argument: Any) -> bool:
        """Tell whether an argument of a node is a tensor and not a number."""
        return hasattr(argument, "meta")

    def is_weight(self, node: Any) -> bool:
        """Tell whether a node is a parameter or buffer of the model."""
        return node.name in self._tensors

    def tensor_name(self, node: Any) -> str:
        """Return the name of the parameter or buffer that a node stands for.

        Raises:
            GraphError: the node is computed, not stored.
        """
        if node.name not in self._tensors:
            raise GraphError(f"the weight {node.name} is computed in the forward pass: such layers cannot be followed")
        return self._tensors[node.name]

    def freeze(self, node: Any, reason: str) -> None:
        """Freeze every channel of a node's result."""
        described = self.results.get(node.name)
        for slots in described if isinstance(described, list) else [described]:
            if slots is not None:
                self.ledger.freeze(slots, reason)

    def fixed_like(self, node: Node) -> Any:
        """Return the description of a result without removable channels."""
        described = [fixed(len(shape)) for shape in self.shapes(node)]
        return described if isinstance(node.meta.get("val"), (list, tuple)) else described[0]

    def place(self, node: Node) -> str:
        """Return the module that runs a node, such as `model.10.m.0.attn`."""
        return next((name for name, _ in reversed(_modules(node)) if name), "the model")

    def classes(self, node: Node) -> list[str]:
        """Return the class names of the modules that run a node, outermost first."""
        return [kind for _, kind in _modules(node)]

    def can_resize_splits(self, node: Node) -> bool:
        """Tell whether the module that runs a node keeps its split size where surgery can set it."""
        return bool(RESIZABLE_SPLITS & set(self.classes(node)[-1:]))


def _modules(node: Any) -> list[tuple[str, str]]:
    """Return name and class name of the modules that run a node, outermost first."""
    return [
        (name, (kind if isinstance(kind, str) else kind.__qualname__).rsplit(".", 1)[-1])
        for name, kind in (node.meta.get("nn_module_stack") or {}).values()
    ]


def operation_name(node: Any) -> str:
    """Return the name of a node's operation: `conv2d` for `aten.conv2d.default`."""
    target = node.target
    return str(getattr(target, "_opname", None) or getattr(target, "__name__", target))
