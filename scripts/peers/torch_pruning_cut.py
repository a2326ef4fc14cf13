"""Cut a detector with Torch-Pruning 1.6.1 to a ratio, and save what its peers are fine-tuned from too.

`equal_latency.py` runs this in a process of its own:

    python -m scripts.peers.torch_pruning_cut dense.pt cut.pt --ratio 0.4 --norm 2 --round-to 8 --imgsz 320

Its `BasePruner` ranks the channels of all layers together by group magnitude. The convolutions that make a head's
output stay, and so does the constant one that reads box distributions. The checkpoint carries a note in the place of
a plan, by which a trainer knows that its shape does not follow from its YAML.
"""

from __future__ import annotations

import argparse
import warnings
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress import checkpoint
from scripts.peers import torch_pruning_worker as worker


def main() -> None:
    """Read the options, cut, check that the result runs, and save it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--ratio", type=float, required=True, help="share of all prunable channels")
    parser.add_argument("--norm", type=int, choices=(1, 2), required=True)
    parser.add_argument("--round-to", type=int)
    parser.add_argument("--imgsz", type=int, required=True)
    given = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model = cut(checkpoint.load_model(given.dense), given.ratio, given.norm, given.round_to, given.imgsz)
    checkpoint.save_model(model, given.output, {**checkpoint.load_training_args(given.dense), "imgsz": given.imgsz})


def cut(model: nn.Module, ratio: float, norm: int, round_to: int | None, imgsz: int) -> nn.Module:
    """Prune a detector in place and return it.

    Raises:
        ValueError: the pruned model returns other shapes than the dense one.
    """
    tp = import_module("torch_pruning")
    image = torch.rand(1, 3, imgsz, imgsz)
    model.requires_grad_(True)
    outputs = (worker.inference_outputs, worker.training_outputs)
    expected = [run(model, image) for run in outputs]
    tp.pruner.BasePruner(
        model,
        image,
        importance=tp.importance.GroupMagnitudeImportance(p=norm),
        output_transform=worker.leaves_of,
        global_pruning=True,
        pruning_ratio=ratio,
        ignored_layers=outputs_of_head(model),
        round_to=round_to,
    ).step()
    for run, shapes in zip(outputs, expected, strict=True):
        worker.check_shapes(shapes, run(model, image))
    note = {"tool": "torch-pruning", "version": version("torch-pruning"), "ratio": ratio, "norm": norm}
    setattr(model, checkpoint.PLANS, [note | {"round_to": round_to}])
    return model


def outputs_of_head(model: nn.Module) -> list[nn.Module]:
    """Return the last convolution of each branch of a detection head, and what reads its box distributions."""
    layers: Any = model.model
    head = layers[-1]
    last = [branch[-1] for name in ("cv2", "cv3") for branch in getattr(head, name)]
    return [*last, head.dfl]


if __name__ == "__main__":
    main()
