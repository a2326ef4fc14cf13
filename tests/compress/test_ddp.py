"""Our trainers in two processes: gradients meet through DDP, on the CPU where no GPUs are."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from compress.manifest import write_json
from compress.settings import Finetune
from compress.training.distil import DISTIL
from compress.training.penalty import SPARSITY

# What Ultralytics does for GPUs and NCCL, for the CPU and gloo; all else is the trainers' own.
WORKER = """
import hashlib, json, sys
from pathlib import Path
import torch
import torch.distributed as dist
from torch import nn
from compress.training import planned, sparse, trainers
from ultralytics.utils import RANK
from ultralytics.utils.torch_utils import unwrap_model

name, overrides, out = sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3])

def on_cpu(self):
    dist.init_process_group("gloo")

planned.BaseTrainer._setup_ddp = on_cpu
parallel, reduce, seen = nn.parallel.DistributedDataParallel, dist.reduce, []
nn.parallel.DistributedDataParallel = lambda model, device_ids, **words: parallel(model, **words)
def average(value, dst, op):  # gloo has no average
    reduce(value, dst, dist.ReduceOp.SUM)
    value /= dist.get_world_size()
dist.reduce = average

plan, plans = sparse.plan_pruning, []
sparse.plan_pruning = lambda *given: plans.append(given) or plan(*given)

trainer = getattr(trainers, name)(overrides=overrides)
trainer.world_size = 2
trainer.final_eval = lambda: None  # asks for the current GPU
trainer.add_callback("on_train_batch_end", lambda t: seen.append({k: float(v) for k, v in t.loss_items.items()}))
trainer.train()
model = unwrap_model(trainer.model)
trained = [value for name, value in model.named_parameters() if not name.startswith("teacher_model")]
digest = hashlib.sha256(b"".join(value.detach().numpy().tobytes() for value in trained)).hexdigest()
found = {"digest": digest, "losses": seen, "lambda": getattr(trainer, "steered", None), "plans": len(plans)}
(out / f"{RANK}.json").write_text(json.dumps(found))
"""


def in_two_processes(trainer: str, overrides: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Train in two processes and return what each found."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    common["PYTHONPATH"] = str(Path(__file__).parents[2])
    arguments = {
        "device": "cpu",
        "imgsz": 64,
        "batch": 8,
        "workers": 0,
        "plots": False,
        "exist_ok": True,
        "nbs": 8,
        "save_dir": str(folder / "training"),
        "warmup_epochs": 0.0,
        "amp": False,
        **overrides,
    }
    words = [sys.executable, "-c", WORKER, trainer, json.dumps(arguments), str(folder)]
    started = [
        subprocess.Popen(
            words, env={**os.environ, **common, "RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE, text=True
        )
        for rank in ("0", "1")
    ]
    said = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], "".join(said)[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_distillation_keeps_two_processes_together(pruned: Path, dense: Path, tiny_data: Path, tmp_path: Path) -> None:
    """Two epochs of two steps, the second without the teacher: other images, the same weights in the end."""
    write_json(tmp_path / DISTIL, Finetune(epochs=2, cwd=1.0, ld=1.0, distil_off_epochs=1).terms)
    overrides = {"model": str(pruned), "data": str(tiny_data), "distill_model": str(dense), "epochs": 2}
    first, second = in_two_processes("PlanTrainer", overrides, tmp_path)
    assert first["digest"] == second["digest"]
    for found in (first, second):
        assert [loss["cwd_loss"] > 0.0 for loss in found["losses"]] == [True, True, False, False]
    assert first["losses"][0]["cwd_loss"] != second["losses"][0]["cwd_loss"]


def test_a_steered_sparsity_keeps_two_processes_together(dense: Path, tiny_data: Path, tmp_path: Path) -> None:
    """The first process finds λ, and both pull with it."""
    write_json(tmp_path / SPARSITY, {"sr": "auto", "sr_decay": 1.0, "share": 0.5})
    overrides = {"model": str(dense), "data": str(tiny_data), "epochs": 2, "optimizer": "SGD"}
    first, second = in_two_processes("SparsityTrainer", overrides, tmp_path)
    assert first["digest"] == second["digest"]
    assert first["lambda"] == second["lambda"] > 0.0


def test_what_fades_is_chosen_once_for_two_processes(dense: Path, tiny_data: Path, tmp_path: Path) -> None:
    """Two plans that differ in a channel would let the processes' weights drift apart for good."""
    fade = {"percent": 0.3, "importance": "l1", "budget": {"multiple_of": 1, "min_width": 1}}
    write_json(tmp_path / SPARSITY, {"sr": 0.0, "sr_decay": 1.0, "fade": fade})
    overrides = {"model": str(dense), "data": str(tiny_data), "epochs": 2, "optimizer": "SGD"}
    first, second = in_two_processes("SparsityTrainer", overrides, tmp_path)
    assert (first["plans"], second["plans"]) == (1, 0)
    assert first["digest"] == second["digest"]
