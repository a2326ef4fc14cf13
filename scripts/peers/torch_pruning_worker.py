"""Prune one model with Torch-Pruning 1.6.1 as its own documentation does, and check what comes out.

`torch_pruning_coverage.py` runs this in a process of its own for each model:

    python -m scripts.peers.torch_pruning_worker yolov8n row.json

What is taken from its README ("High-level Pruners") and from its examples for YOLO and torchvision: `BasePruner` with
`GroupMagnitudeImportance(p=2)` and local pruning, the whole detection head and the final classifier among
`ignored_layers`, `requires_grad` on every parameter, an example image, and `output_transform` to hand over tensors
alone. The model itself is not modified.
"""

from __future__ import annotations

import copy
import json
import resource
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from compress.channels.capture import training_head
from compress.manifest import write_bytes_atomic
from scripts.studies import zoo

PRUNING_RATIO = 0.3
ROUND_TO = 8
CPU_LIMIT_S = 100
WALL_LIMIT_S = 3600


def main(name: str, path: Path) -> None:
    """Measure one model and write its row; what is known is written before each step that may not end."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dense = trained_like(zoo.build(name)).requires_grad_(True)
    image = torch.rand(1, 3, zoo.imgsz(name), zoo.imgsz(name))
    expected = [outputs(dense, image) for outputs in (inference_outputs, training_outputs)]
    row: dict[str, Any] = {"model": name, "prunable_params": None}

    def write() -> None:
        write_bytes_atomic(path, json.dumps(row).encode())

    for key, round_to in ((None, None), (f"round_to_{ROUND_TO}", ROUND_TO)):
        into = row if key is None else row.setdefault(key, {})
        into |= {"status": "timeout", "error": None, "params_removed": None, "oracle_error": None}
        into["started"] = {"wall": time.time(), "cpu": time.process_time()}
        write()
        with limited():
            pruned, history = attempt(dense, image, expected, round_to, into)
        del into["started"]
        write()
        with limited():
            check(dense, image, pruned, history, into, row)
        write()
        if row["status"] != "ok":
            return


@contextmanager
def limited() -> Iterator[None]:
    """End this process where the block takes more than 100 s of CPU time, or an hour on a busy machine."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (round(time.process_time()) + CPU_LIMIT_S, hard))
    signal.alarm(WALL_LIMIT_S)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_CPU, (hard, hard))


def attempt(
    dense: nn.Module, image: Tensor, expected: list[list[Tensor]], round_to: int | None, row: dict[str, Any]
) -> tuple[nn.Module, list[Any]]:
    """Prune a copy and run it: the part that is timed. Failures are recorded as they come."""
    pruned = copy.deepcopy(dense)
    wall, cpu = time.perf_counter(), time.process_time()
    step, history = "building its graph", []
    try:
        pruner = make_pruner(pruned, image, round_to)
        step = "pruning"
        pruner.step()
        history = pruner.pruning_history()
        step = "running the pruned model"
        check_shapes(expected[0], inference_outputs(pruned, image))
        step = "running the pruned model with its head in training mode"
        check_shapes(expected[1], training_outputs(pruned, image))
        row["status"] = "ok"
    except Exception as error:  # whatever the peer raises is the finding
        row |= {"status": "failed", "error": f"{step}: {first_line(error)}"}
    row |= {
        "seconds": round(time.perf_counter() - wall, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
    }
    if row["status"] == "ok":
        row["params_removed"] = round(1 - count(pruned) / count(dense), 4)
    return pruned, history


def check(
    dense: nn.Module, image: Tensor, pruned: nn.Module, history: list[Any], row: dict[str, Any], first: dict[str, Any]
) -> None:
    """Add what the graph of a fresh copy says: the prunable share of the parameters and the oracle's error."""
    numbered = copy.deepcopy(dense)
    try:
        pruner = make_pruner(numbered, image, None)
        if first["prunable_params"] is None:
            first["prunable_params"] = round(prunable_share(pruner, numbered), 4)
    except Exception:  # it failed before in the same place, which is recorded
        return
    if row["status"] != "ok":
        return
    masked = mask_removed(dense, pruned, pruner, history)
    error = largest_difference(training_outputs(masked, image), training_outputs(pruned, image))
    row["oracle_error"] = float(f"{error:.2e}")


def make_pruner(model: nn.Module, image: Tensor, round_to: int | None) -> Any:
    """Return a pruner as the README and the examples make it."""
    tp = import_module("torch_pruning")
    return tp.pruner.BasePruner(
        model,
        image,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        output_transform=leaves_of,
        global_pruning=False,
        pruning_ratio=PRUNING_RATIO,
        ignored_layers=ignored_layers(model),
        round_to=round_to,
    )


def ignored_layers(model: nn.Module) -> list[nn.Module]:
    """Return what its examples leave alone: a detector's whole head, a classifier's last layer."""
    layers: Any = getattr(model, "model", None)
    if hasattr(model, "stride") and not hasattr(layers[-1], "linear"):
        return [layers[-1]]
    return [module for module in model.modules() if isinstance(module, nn.Linear) and module.out_features == 1000]


def mask_removed(dense: nn.Module, pruned: nn.Module, pruner: Any, history: list[Any]) -> nn.Module:
    """Return the dense model with every weight set to zero that pruning has removed.

    A channel whose filter, scale and shift are zero emits what its activation makes of 0, and the columns that would
    read it are zero too. Which elements stay is asked of the peer itself: it replays its pruning on a copy whose
    weights hold the numbers of their own elements (as bit patterns, since it copies and never computes).
    """
    for parameter in pruner.model.parameters():
        numbers = torch.arange(parameter.numel(), dtype=torch.int32).view(torch.float32)
        parameter.data.copy_(numbers.reshape(parameter.shape))
    pruner.DG.load_pruning_history(history)
    kept = {name: value.detach().contiguous().view(torch.int32) for name, value in pruner.model.named_parameters()}
    masked = copy.deepcopy(dense)
    cut = dict(pruned.named_parameters())
    for name, parameter in masked.named_parameters():
        flat = parameter.detach().flatten()
        if not torch.equal(flat[kept[name].long()], cut[name]):
            raise RuntimeError(f"the replayed pruning of {name} differs from the first one")
        keep = torch.zeros_like(flat)
        keep[kept[name].flatten().long()] = 1
        parameter.data.mul_(keep.reshape(parameter.shape))
    return masked


def prunable_share(pruner: Any, model: nn.Module) -> float:
    """Return the share of parameters that some prunable channel of its graph makes or reads."""
    touched = {parameter: torch.zeros(parameter.shape, dtype=torch.bool) for parameter in model.parameters()}

    def mark(parameter: Any, dim: int, indices: list[int]) -> None:
        if isinstance(parameter, nn.Parameter):
            positions = torch.tensor([index % parameter.shape[dim] for index in indices])
            touched[parameter].index_fill_(dim, positions, True)

    for group in pruner.DG.get_all_groups(pruner.ignored_layers, pruner.root_module_types):
        for dep, indices in group:
            module, makes = dep.target.module, pruner.DG.is_out_channel_pruning_fn(dep.handler)
            if isinstance(module, nn.Parameter):
                mark(module, dep.target.pruning_dim, indices)
            elif isinstance(module, nn.MultiheadAttention):
                for parameter in module.parameters():
                    touched[parameter][:] = True
            else:
                mark(getattr(module, "weight", None), int(makes == getattr(module, "transposed", False)), indices)
                mark(getattr(module, "bias", None) if makes else None, 0, indices)
    return sum(int(mask.sum()) for mask in touched.values()) / count(model)


def inference_outputs(model: nn.Module, image: Tensor) -> list[Tensor]:
    """Run a model as it is used."""
    with torch.no_grad():
        return leaves_of(model.eval()(image))


def training_outputs(model: nn.Module, image: Tensor) -> list[Tensor]:
    """Run a detector with its head in training mode, as fine-tuning needs it: the raw maps of every branch."""
    with torch.no_grad(), training_head(model):
        return leaves_of(model(image))


def leaves_of(outputs: Any) -> list[Tensor]:
    """Return the tensors that a model returns, however nested."""
    leaves = pytree.tree_flatten_with_path(outputs)[0]
    # `feats` are the neck's maps, handed on for their spatial shape alone.
    named = [leaf for path, leaf in leaves if "feats" not in {getattr(key, "key", None) for key in path}]
    return [leaf for leaf in named if isinstance(leaf, Tensor)]


def check_shapes(dense: list[Tensor], pruned: list[Tensor]) -> None:
    """Raise an error unless the outputs have the shapes that they had before."""
    before, after = ([tuple(tensor.shape) for tensor in tensors] for tensors in (dense, pruned))
    if before != after:
        raise ValueError(f"outputs have shapes {after}, they must be {before}")


def largest_difference(expected: list[Tensor], found: list[Tensor]) -> float:
    """Return the largest difference, relative to the largest magnitude of each output."""
    scales = [tensor.abs().max().clamp(min=1e-12) for tensor in expected]
    pairs = zip(expected, found, scales, strict=True)
    return max(float((ours - theirs).abs().max() / scale) for ours, theirs, scale in pairs)


def trained_like(model: nn.Module) -> nn.Module:
    """Give every batch norm statistics, scales and shifts of its own: fresh ones hide mistakes."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            for statistic, low, high in ((module.running_mean, -0.5, 0.5), (module.running_var, 0.5, 2.0)):
                assert statistic is not None
                statistic.uniform_(low, high)
    return model


def count(model: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def first_line(error: Exception) -> str:
    """Return type and first line of an error."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
