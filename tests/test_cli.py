"""Every command answers --help at once, without the heavy libraries, and a typing mistake in a line."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from rich.text import Text

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "torchvision", "ultralytics", "onnx", "onnxruntime", "matplotlib", "tensorrt", "tensorrt_rtx")
PROGRAMS = ("worker.py", "probe.py", "layer_times.py", "trt_builder.py")  # started by our own code, not by a person
RUN = f"""
import runpy, sys
module = sys.argv[1]
sys.argv = sys.argv[1:]
try:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
finally:
    print("imported:", *sorted(set({HEAVY}) & set(sys.modules)))
"""
COMMANDS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for package in ("compress", "export", "benchmark")
    for path in (ROOT / package).glob("**/*.py")
    if 'if __name__ == "__main__"' in path.read_text(encoding="utf-8") and path.name not in PROGRAMS
)


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", RUN, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


def start_bare(module: str) -> subprocess.CompletedProcess[str]:
    """Start a module with an interpreter that sees no packages."""
    bare = [sys.executable, "-S", "-m", module]
    return subprocess.run(bare, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False, env={})


def test_all_stages_are_commands() -> None:
    stages = {"compress.run", "compress.train", "compress.sparsify", "compress.prune", "compress.finetune"}
    assert stages | {"export.onnx", "benchmark.latency", "benchmark.accuracy"} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_needs_no_heavy_library(command: str) -> None:
    done = start(command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "Usage:" in done.stdout
    assert done.stdout.splitlines()[-1].strip() == "imported:"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_shown_as_it_is_written(command: str) -> None:
    top = typer.main.get_command(importlib.import_module(command).app)
    for parameter in (parameter for one in (top, *getattr(top, "commands", {}).values()) for parameter in one.params):
        text = getattr(parameter, "help", None) or ""
        assert Text.from_markup(text).plain == text.replace("\\[", "["), "brackets are markup: write \\\\["
        assert not set("[].") & set(getattr(parameter, "metavar", None) or ""), "the usage has its own brackets"


@pytest.mark.parametrize("command", COMMANDS)
def test_unknown_option_is_named(command: str) -> None:
    done = start(command, "--no-such-option")
    assert done.returncode == 2
    assert "--no-such-option" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        "compress.train --data shapes --output {out}",
        "compress.sparsify --data shapes --output {out}",
        "compress.prune --macs 0.5 --data shapes --output {out}",
        "compress.finetune --data shapes --output {out}",
        "compress.sensitivity --data shapes --output {out}",
        "compress.run --config configs/pipelines/demo.yaml",
        "benchmark.profile",
        "export.onnx --data shapes --output {out}",
        "export.ncnn --data shapes --output {out}",
        "export.quantize --data shapes --output {out}",
        "export.trt --output {out}",
    ],
)
def test_a_model_that_is_not_there_is_said_before_any_work(words: str, tmp_path: Path) -> None:
    """Nothing is imported, so no data set was drawn, and nothing is written."""
    command, *options = words.format(out=tmp_path / "out").split()
    done = start(command, "--model", "no/such.pt", *options)
    assert (done.returncode, done.stdout.strip()) == (2, "imported:"), done.stderr
    assert "no/such.pt does not exist: check the path" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [*COMMANDS, "scripts.cifar10", "scripts.studies.properties"])
def test_a_python_without_packages_is_one_line(command: str) -> None:
    done = start_bare(command)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(
        f"error: {sys.executable} lacks numpy, pydantic, typer, yaml: `bash scripts/setup.sh`"
    )
    assert done.stderr.count("\n") == 1


def test_what_runs_on_devices_is_let_through() -> None:
    probed = start_bare("benchmark.probe")
    assert (probed.returncode, probed.stderr) == (0, "")
    assert json.loads(probed.stdout)["packages"] == {}
    assert "No module named 'numpy'" in start_bare("benchmark.worker").stderr  # the first that it needs, not typer


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no process to a core")
def test_threads_are_those_that_the_process_may_run_on() -> None:
    code = "import os; os.sched_setaffinity(0, {next(iter(os.sched_getaffinity(0)))}); import compress; "
    code += "print(os.environ['OMP_NUM_THREADS'])"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout == "1\n", done.stderr
