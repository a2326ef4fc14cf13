"""One pass over an exported program: what the rules of `rules.py` see of it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from compress.channels.slots import Ledger, fixed, in_dim
from compress.channels.ultralytics_modules import EQUAL_SPLITS, FREE_SPLITS
from compress.errors import GraphError

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.fx import Node


class Walk:
    """One pass over an exported program: what the rules see of it."""

    def __init__(self, program: ExportedProgram, aliases: dict[str, str]) -> None:
        """Begin a walk; `aliases` gives the first name of every weight that has several."""
        self.ledger = Ledger()
        self.results: dict[str, Any] = {}
        signature = program.graph_signature
        names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        # A buffer that is not in the state dict cannot be cut: it counts as a constant.
        self._tensors = {node: aliases.get(name, name) for node, name in names.items() if name in program.state_dict}

    def slots(self, node: Any) -> Any:
        """Return the description of a node's result (see `slots`)."""
        if node.name not in self.results:
            self.results[node.name] = self._slots_of_weight(node)
        return self.results[node.name]

    def _slots_of_weight(self, node: Any) -> Any:
        """Describe a weight that is used as a feature map is: one of a single dimension makes channels of its own.

        What they meet binds them, such as the channels that a learned scale multiplies. Any other is read as a whole.
        """
        shape = self.shape(node)
        wide = [dim for dim, size in enumerate(shape) if size > 1]
        if len(wide) != 1:
            self.ledger.keep_whole(self._tensors[node.name], shape)
            return fixed(len(shape))
        slots = self.ledger.new(shape[wide[0]])
        self.ledger.use(self._tensors[node.name], wide[0], slots)
        return in_dim(slots, len(shape), wide[0])

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
        if described is None and self.is_weight(node):
            self.ledger.keep_whole(self.tensor_name(node), self.shape(node))
        for slots in described if isinstance(described, list) else [described]:
            if slots is not None:
                self.ledger.freeze(slots, reason)

    def fixed_like(self, node: Node) -> Any:
        """Return the description of a result without removable channels."""
        described = [fixed(len(shape)) for shape in self.shapes(node)]
        return described if isinstance(node.meta.get("val"), (list, tuple)) else described[0]

    def place(self, node: Node) -> str:
        """Return the module that runs a node, such as `model.10.m.0.attn`."""
        return next((name for name, _ in reversed(modules_of(node)) if name), "the model")

    def known_class(self, node: Node) -> str | None:
        """Return the name of Ultralytics' class that runs a node, or None where a stranger's does."""
        kinds = [kind for _, kind in modules_of(node)]
        package, _, name = kinds[-1].rpartition(".") if kinds else ("", "", "")
        return name if package.startswith("ultralytics.") else None

    def parts_of_splits(self, node: Node) -> str | None:
        """Return what the parts of the module that runs a node may be, `equal` or `free`, or None if they are fixed."""
        known = self.known_class(node)
        return "equal" if known in EQUAL_SPLITS else "free" if known in FREE_SPLITS else None


def modules_of(node: Any) -> list[tuple[str, str]]:
    """Return name and full class name of the modules that run a node, outermost first."""
    return [  # a model that runs a slice of its layers has that slice in their names
        (
            re.sub(r"slice\([^)]*\)\.", "", name),
            kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}",
        )
        for name, kind in (node.meta.get("nn_module_stack") or {}).values()
    ]


def operation_name(node: Any) -> str:
    """Return the name of a node's operation: `conv2d` for `aten.conv2d.default`."""
    target = node.target
    return str(getattr(target, "_opname", None) or getattr(target, "__name__", target))
