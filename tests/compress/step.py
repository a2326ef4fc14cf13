"""A few steps of training with Ultralytics' own loss."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch


def losses(model: Any, classes: int, imgsz: int = 128, steps: int = 3) -> list[float]:
    """Return the loss before each step on the same two images; every weight must take part in every one.

    On smaller images a step may raise the loss, because its targets follow the predictions.
    """
    torch.manual_seed(0)
    model.args = SimpleNamespace(box=7.5, cls=0.5, dfl=1.5, epochs=1, cls_pw=0.0)
    batch = {
        "img": torch.rand(2, 3, imgsz, imgsz),
        "cls": torch.tensor([[0.0], [classes - 1.0]]),
        "bboxes": torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.4, 0.6, 0.3, 0.5]]),
        "batch_idx": torch.tensor([0.0, 1.0]),
    }
    model.train()
    weights = {name: weight for name, weight in model.named_parameters() if "dfl" not in name}
    optimizer = torch.optim.Adam(weights.values(), lr=1e-3)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(batch)[0].sum()
        loss.backward()
        for name, weight in weights.items():
            assert weight.grad is not None, name
            assert bool(torch.isfinite(weight.grad).all()), name
        optimizer.step()
        found.append(float(loss.detach()))
    return found
