"""A model as a graph of ATen operations, with every branch of its head in it."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import TYPE_CHECKING, Any

from compress.errors import GraphError
from compress.settings import check_imgsz

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram


def capture(model: nn.Module, imgsz: int, channels: int = 3) -> ExportedProgram:
    """Export a model for one image, with the head in training mode so that every branch is in the graph.

    End-to-end models (v10, 26) have two heads on one neck, and only one of them runs in inference.

    Raises:
        GraphError: torch.export cannot capture the model.
        SettingsError: it cannot, and the image size does not fit the model's stride.
    """
    import torch

    device = next(model.parameters()).device
    image = torch.zeros(1, channels, imgsz, imgsz, device=device)
    with training_head(model), warnings.catch_warnings(), _quiet():
        warnings.simplefilter("ignore")  # torch.export warns about its own internals
        try:
            return torch.export.export(model, (image,), strict=False)
        except Exception as error:  # whatever a stranger's forward raises
            check_imgsz(imgsz, int(max(getattr(model, "stride", [1]))))  # else torch speaks of sizes of tensors
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise GraphError(f"torch.export cannot capture {type(model).__name__}: {reason[0]}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what torch.export logs and prints of a failure beside the exception that it raises."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


class training_head:  # noqa: N801  (reads as a statement: `with training_head(model):`)
    """Put the head, and it alone, in training mode: it then returns the raw maps of all its branches.

    What computes otherwise in training, its norms and dropouts, stays in evaluation mode.
    """

    def __init__(self, model: nn.Module) -> None:
        layers: Any = getattr(model, "model", None)
        self.model = model
        self.head = layers[-1] if hasattr(layers, "__getitem__") and hasattr(model, "stride") else None

    def __enter__(self) -> None:
        self.before = {module: module.training for module in self.model.modules()}
        self.model.eval()
        for module in self.head.modules() if self.head is not None else ():
            if "torch.nn." not in type(module).__module__:
                module.training = True

    def __exit__(self, *_: object) -> None:
        for module, training in self.before.items():
            module.training = training
