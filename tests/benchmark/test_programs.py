"""Programs in processes of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmark import programs


def test_a_module_of_ours_is_found_from_any_folder(tmp_path: Path) -> None:
    done = programs.run(programs.own("benchmark.probe", "none"), 60, tmp_path, programs.own_environment(3))
    assert (done.returncode, done.stderr) == (0, "")
    assert '"packages": {"none": null}' in done.stdout


def test_variables_are_added_and_no_input_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEPT", "here")
    code = "import os, sys; print(os.environ['KEPT'], os.environ['OMP_NUM_THREADS'], repr(sys.stdin.read()))"
    done = programs.run([sys.executable, "-c", code], 60, environment=programs.own_environment(3))
    assert done.stdout.split() == ["here", "3", "''"]


def test_what_takes_too_long_is_ended() -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        programs.run([sys.executable, "-c", "import time; time.sleep(60)"], 0.2)


@pytest.mark.parametrize(
    ("code", "reason"),
    [(0, "exit code 0"), (3, "exit code 3"), (-11, "SIGSEGV"), (-9, "SIGKILL, perhaps out of memory")],
)
def test_how_a_process_ended(code: int, reason: str) -> None:
    assert programs.exit_reason(code) == reason
