"""Cuts of chosen channels, and images for what is measured on some."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from torch import nn

from compress.channels.graph import build_graph
from compress.checkpoint import structure_hash
from compress.pruning.budget import Choice
from compress.pruning.plan import Plan, make_plan
from compress.pruning.surgery import apply_plan


def cut(model: nn.Module, removed: dict[str, list[int]], imgsz: int = 16) -> tuple[nn.Module, Plan]:
    """Return a copy of a model without some channels, by a layer that makes them, and the plan of that."""
    graph = build_graph(model.eval(), imgsz)
    keep = [np.ones(group.width, dtype=bool) for group in graph.groups]
    for layer, channels in removed.items():
        (index,) = [i for i, group in enumerate(graph.groups) if layer in group.layers and not group.frozen]
        keep[index][channels] = False
    plan = make_plan(graph, Choice(keep, [""] * len(keep)), structure_hash(model), "test", "chosen")
    return apply_plan(model, plan), plan


def noise_images(folder: Path, count: int) -> list[Path]:
    """Write images of 32 × 24 pixels, each noise of another brightness."""
    generator = np.random.default_rng(0)
    paths = [folder / f"{number:02}.png" for number in range(count)]
    for path in paths:
        cv2.imwrite(str(path), generator.integers(0, 256, (24, 32, 3), np.uint8) // generator.integers(1, 9))
    return paths
