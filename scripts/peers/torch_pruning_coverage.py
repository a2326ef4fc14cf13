"""Prune every model of docs/coverage.md with Torch-Pruning 1.6.1: docs/results/coverage_torch_pruning.json.

Each model has a process of its own that ends after 100 s of CPU time (or an hour of wall time, should the machine be
busy). Rows that the record already has are kept; --again measures the named models anew.

The peer is no dependency of this project. It needs nothing that is not there, so install it alone:

    pip install --no-deps torch-pruning==1.6.1 timm
    python -m scripts.peers.torch_pruning_coverage [--again] [MODEL ...]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from compress import manifest
from scripts.studies import zoo

ROOT = Path(__file__).parents[2]
OUTPUT = ROOT / "docs" / "results" / "coverage_torch_pruning.json"
VERSION = "1.6.1"
SETTINGS = {
    "pruner": "BasePruner, GroupMagnitudeImportance(p=2), global_pruning=False; head and last classifier ignored",
    "pruning_ratio": 0.3,
    "cpu_limit_s": 100,
    "wall_limit_s": 3600,
    "ok": "it runs, in inference and with its head in training mode, and its outputs have their shapes",
    "prunable_params": "share of parameters that a group of its graph makes or reads",
    "oracle_error": "largest relative difference from the dense model with every removed weight set to zero",
}
_SAFETY_S = 4 * 3600  # the process limits itself; this is for one that cannot even start


def main() -> int:
    """Measure what is missing, and write the record after every model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="names of scripts/studies/zoo.py (default: all)")
    parser.add_argument("--again", action="store_true", help="measure models that the record already has")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    given = parser.parse_args()
    everything = zoo.names()
    if unknown := set(given.models) - set(everything):
        return _refuse(f"no model of scripts/studies/zoo.py: {', '.join(sorted(unknown))}")
    if (found := _version()) != VERSION:
        return _refuse(
            f"torch-pruning {VERSION} is needed, found {found}: pip install --no-deps torch-pruning=={VERSION}"
        )
    rows = _read_rows(given.output)
    wanted = given.models or everything
    todo = [name for name in wanted if given.again or name not in rows]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # no child is left behind
    try:
        for number, name in enumerate(todo, 1):
            rows[name] = measure(name)
            _write(given.output, [rows[name] for name in everything if name in rows])
            outcome = rows[name]["error"] or f"oracle error {rows[name]['oracle_error']}"
            print(f"{number}/{len(todo)} {name}: {rows[name]['status']}, {outcome}", flush=True)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def measure(name: str) -> dict[str, Any]:
    """Run the worker for one model and return its row, whatever has become of the process."""
    with tempfile.TemporaryDirectory() as folder:
        path, log = Path(folder, "row.json"), Path(folder, "log")
        before = _children_cpu_s()
        with log.open("wb") as stream:
            ended = subprocess.run(  # noqa: S603  (this interpreter, and a name that zoo.py has)
                [sys.executable, "-m", "scripts.peers.torch_pruning_worker", name, str(path)],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1", "YOLO_OFFLINE": "true"},
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                timeout=_SAFETY_S,
                check=False,
            )
        row = json.loads(path.read_text()) if path.is_file() else {"model": name}
        cpu_s = _children_cpu_s() - before
        last_words = (log.read_text(errors="replace").strip().splitlines() or ["no message"])[-1]
    if "status" not in row:
        raise SystemExit(f"{name} cannot be built, so nothing was measured: {last_words}")
    parts: list[dict[str, Any]] = [row, *(value for value in row.values() if isinstance(value, dict))]
    for part in parts:
        if started := part.pop("started", None):
            part |= {
                "seconds": round(time.time() - started["wall"], 1),
                "cpu_seconds": round(cpu_s - started["cpu"], 1),
                **_unfinished(ended.returncode, last_words),
            }
        elif part.get("status") == "ok" and part["oracle_error"] is None:
            part["error"] = f"the check after pruning: {_unfinished(ended.returncode, last_words)['error']}"
    return row


def _unfinished(returncode: int, last_words: str) -> dict[str, Any]:
    """Say why a process ended before its pruning did."""
    if returncode == -signal.SIGXCPU:
        return {"status": "timeout", "error": f"no answer in {SETTINGS['cpu_limit_s']} s of CPU time"}
    if returncode == -signal.SIGALRM:
        return {"status": "timeout", "error": f"no answer in {SETTINGS['wall_limit_s']} s"}
    return {"status": "failed", "error": f"the process ended with {returncode}: {last_words}"}


def _children_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _version() -> str:
    try:
        return version("torch-pruning")
    except PackageNotFoundError:
        return "none"


def _refuse(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def _read_rows(path: Path) -> dict[str, dict[str, Any]]:
    record = manifest.read_json(path) if path.is_file() else {"settings": SETTINGS, "rows": []}
    if record["settings"] != SETTINGS:
        raise SystemExit(f"{path} was measured with other settings: move it away to measure anew")
    return {row["model"]: row for row in record["rows"]}


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    counts = {status: sum(row["status"] == status for row in rows) for status in ("ok", "failed", "timeout")}
    tools = manifest.tool_versions() | {"torch-pruning": VERSION, "timm": version("timm")}
    command = "python -m scripts.peers.torch_pruning_coverage"
    record = {"command": command, "settings": SETTINGS, "tools": tools, "models": len(rows), **counts, "rows": rows}
    manifest.write_json(path, record)


if __name__ == "__main__":
    raise SystemExit(main())
