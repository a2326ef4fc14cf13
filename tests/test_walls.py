"""Who may import whom (the walls of the house), read from the sources."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What others may know of compress; a name stands for what is below it too. devices: budgets read a device's widths, the
# benchmark how it is reached.
SHARED_BY_ALL = {
    "checkpoint",
    "manifest",
    "settings",
    "devices",
    "errors",
    "data",
    "progress",
    "tasks",
    "usable_cores",
    "pruning.batch_norm",
}
# These chain everything: the pipeline, the loop that measures a plan before it is paid for, and the report of a sweep.
CHAINS = {"compress/run.py", "compress/latency/measured.py", "compress/sweep.py"}
# A latency table is learnt from networks of many widths, which only the channel graph can cut.
PROFILERS = {"profile.py", "variants.py", "regression.py"}
TABLES = {"channels.graph", "pruning.budget", "pruning.plan", "pruning.surgery", "latency.table"}
SHARED_WITH_PROFILERS = SHARED_BY_ALL | TABLES
SOURCES = [
    path.relative_to(ROOT) for name in ("compress", "export", "benchmark") for path in ROOT.glob(f"{name}/**/*.py")
]


def imported(source: str, package: str) -> set[str]:
    """Full names of all that `source`, a module of `package`, imports, also inside functions.

    `from a import b` counts as a.b, because b may be a module.
    """
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            parts = parents[: len(parents) - node.level + 1] if node.level else []
            base = ".".join([*parts, node.module] if node.module else parts)
            names |= {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                names.add(str(node.args[0].value))
    return names


def violations(path: Path, source: str) -> set[str]:
    """Imports of the module at `path` (relative to the repository) that break a wall."""
    names = imported(source, ".".join(path.parent.parts))
    if path.parts[0] == "compress":
        return set() if path.as_posix() in CHAINS else {name for name in names if _top(name) in ("export", "benchmark")}
    if path.parts[:2] == ("benchmark", "runners"):
        runtime = path.stem.split("_")[0]  # as in ncnn_runner and ncnn_layers
        known = {*sys.stdlib_module_names, "numpy", runtime, f"{runtime}_rtx"}  # both flavours of TensorRT
        return {name for name in names if _top(name) not in known and not _is_checkpoint_of_torch(name, runtime)}
    inner = {name for name in names if name.startswith("compress.")}
    known = SHARED_WITH_PROFILERS if path.parts[0] == "benchmark" and path.name in PROFILERS else SHARED_BY_ALL
    return {name for name in inner if not any(f"{name}.".startswith(f"compress.{shared}.") for shared in known)}


def _top(name: str) -> str:
    return name.split(".")[0]


def _is_checkpoint_of_torch(name: str, runtime: str) -> bool:
    return runtime == "torch" and name.split(".")[:2] == ["compress", "checkpoint"]


def test_sources_are_found() -> None:
    assert {Path("compress/run.py"), Path("export/onnx.py"), Path("benchmark/runners/torch_runner.py")} <= set(SOURCES)


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_walls_stand(path: Path) -> None:
    assert violations(path, (ROOT / path).read_text(encoding="utf-8")) == set()


@pytest.mark.parametrize(
    ("path", "source", "broken"),
    [
        ("compress/prune.py", "import export.onnx", {"export.onnx"}),
        ("compress/prune.py", "def f():\n    from benchmark import latency", {"benchmark.latency"}),
        ("compress/prune.py", "from ..export.onnx import run", {"export.onnx.run"}),
        ("compress/prune.py", "import importlib\nimportlib.import_module('export.onnx')", {"export.onnx"}),
        ("compress/prune.py", "from exporters import benchmark", set()),
        ("compress/run.py", "import export, benchmark", set()),
        ("compress/latency/measured.py", "import export.onnx, benchmark.profile", set()),
        ("compress/sweep.py", "from benchmark.report import write_reports", set()),
        ("compress/sweeps/jobs.py", "import benchmark.report", {"benchmark.report"}),
        ("compress/latency/solver.py", "import benchmark.profile", {"benchmark.profile"}),
        (
            "benchmark/profile.py",
            "from compress.channels.graph import build_graph\nimport compress.latency.table",
            set(),
        ),
        ("benchmark/profile.py", "from compress.prune import prune", {"compress.prune.prune"}),
        ("export/onnx.py", "from compress import manifest, channels", {"compress.channels"}),
        ("export/onnx.py", "from compress.pruning import batch_norm\nfrom compress.settings import Export", set()),
        (
            "benchmark/latency.py",
            "from compress.pruning.surgery import apply_plan",
            {"compress.pruning.surgery.apply_plan"},
        ),
        ("benchmark/runners/ncnn_runner.py", "import numpy, ncnn, json", set()),
        ("benchmark/runners/ncnn_runner.py", "import torch\nimport yaml", {"torch", "yaml"}),
        ("benchmark/runners/ncnn_runner.py", "from . import torch_runner", {"benchmark.runners.torch_runner"}),
        ("benchmark/runners/ncnn_runner.py", "import compress.checkpoint", {"compress.checkpoint"}),
        ("benchmark/runners/torch_runner.py", "import torch, compress.checkpoint", set()),
        ("benchmark/runners/torch_runner.py", "import compress.manifest", {"compress.manifest"}),
    ],
)
def test_a_broken_wall_is_seen(path: str, source: str, broken: set[str]) -> None:
    assert violations(Path(path), source) == broken
