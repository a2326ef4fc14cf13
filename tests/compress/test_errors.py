from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from compress import errors
from compress.errors import EspalierError, run_app

ROOT = Path(__file__).parents[2]


def kinds(kind: type[EspalierError] = EspalierError) -> list[type[EspalierError]]:
    return [kind, *(inner for sub in kind.__subclasses__() for inner in kinds(sub))]


def raising(error: BaseException) -> Callable[[], None]:
    def app() -> None:
        raise error

    return app


def as_command(body: Callable[[], None]) -> typer.Typer:
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(body)
    return app


@pytest.fixture
def ends(capsys) -> Callable[[Callable[[], object]], tuple[object, str]]:
    """Run an app and return its exit code and what it wrote to standard error."""

    def run(app: Callable[[], object]) -> tuple[object, str]:
        with pytest.raises(SystemExit) as stop:
            run_app(app)
        written = capsys.readouterr()
        assert written.out == ""
        return stop.value.code, written.err

    return run


def test_all_named_errors_are_mistakes_of_the_user() -> None:
    named = {kind.__name__ for kind in kinds()}
    assert {name for name in vars(errors) if name.endswith("Error")} <= named


@pytest.mark.parametrize("kind", kinds())
def test_a_mistake_is_one_line_and_exit_code_2(ends, kind: type[EspalierError]) -> None:
    assert ends(raising(kind("model.pt is no model:\n  give\tanother\n"))) == (
        1 if kind is errors.ParityError else 2,  # no mistake: the artefact failed its proof
        "error: model.pt is no model: give another\n",
    )


def test_a_name_from_a_file_does_not_steer_the_terminal(ends) -> None:
    assert (
        ends(raising(EspalierError("it is of class evil\x1b]0;title\x07")))[1]
        == "error: it is of class evil ]0;title \n"
    )


def test_a_mistake_in_a_command_is_one_line(ends, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["compress.run"])
    assert ends(as_command(raising(EspalierError("this and that")))) == (2, "error: this and that\n")


@pytest.mark.parametrize("wrap", [lambda body: body, as_command], ids=["function", "command"])
def test_ctrl_c_says_how_to_resume(ends, monkeypatch, wrap) -> None:
    monkeypatch.setattr(sys, "argv", ["compress.run"])
    code, text = ends(wrap(raising(KeyboardInterrupt())))
    assert code == 130
    assert text.strip() == "interrupted: run the same command again to resume"


# It starts a child, says the child's id, and waits for it; what it began it ends.
BUSY = """
import subprocess, sys
from compress.errors import run_app
def app():
    child = subprocess.Popen(["sleep", "60"])
    try:
        print(child.pid, flush=True)
        child.wait()
    finally:
        child.kill()
        child.wait()
        print("undone", flush=True)
run_app(app)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=["TERM", "HUP"])
def test_what_is_asked_to_end_undoes_first_what_it_began(number: signal.Signals) -> None:
    process = subprocess.Popen([sys.executable, "-c", BUSY], stdout=-1, stderr=-1, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.send_signal(number)
    out, error = process.communicate(timeout=30)
    assert (process.returncode, out) == (128 + number, "undone\n")
    assert error.strip() == "interrupted: run the same command again to resume"
    assert not Path(f"/proc/{child}").exists()


def test_a_process_that_was_forked_is_ended_at_once() -> None:
    def app() -> None:
        read, write = os.pipe()
        if (child := os.fork()) == 0:
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            finally:
                os.write(write, b"it went through the frames of its parent")
                os._exit(0)
        os.close(write)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        assert os.read(read, 100) == b""

    run_app(app)


def test_signals_that_are_ignored_or_handled_stay_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    found = []
    try:
        run_app(lambda: found.append(signal.getsignal(signal.SIGHUP)))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert found == [signal.SIG_IGN]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize(("encoding", "shown"), [("ascii", "1 ? 2"), ("latin-1", "1 ? 2"), ("utf-8", "1 → 2")])
def test_what_a_terminal_cannot_show_ends_nothing(encoding: str, shown: str) -> None:
    program = "from compress.errors import run_app; run_app(lambda: print('1 \u2192 2'))"
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stderr.decode()) == (0, "")
    assert done.stdout.decode(encoding).strip() == shown


@pytest.mark.parametrize("code", [0, 1, 2, None])
def test_other_exit_codes_pass(ends, code: int | None) -> None:
    assert ends(raising(SystemExit(code))) == (code, "")


@pytest.mark.parametrize("wrap", [lambda body: body, as_command], ids=["function", "command"])
@pytest.mark.parametrize("error", [ZeroDivisionError("ours"), OSError("no number"), FileNotFoundError(2, "gone", "x")])
def test_a_fault_of_ours_keeps_its_traceback(monkeypatch, wrap, error: Exception) -> None:
    monkeypatch.setattr(sys, "argv", ["compress.run"])
    with pytest.raises(type(error)) as caught:
        run_app(wrap(raising(error)))
    assert caught.value is error
    assert traceback.extract_tb(caught.value.__traceback__)[-1].name == "app"


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free some space or choose another --output"),
        (errno.EDQUOT, "free some space or choose another --output"),
        (errno.EROFS, "choose another --output"),
        (errno.EACCES, "change its permissions or choose another --output"),
        (errno.EPERM, "change its permissions or choose another --output"),
        (errno.ENAMETOOLONG, "choose a shorter --output"),
    ],
)
def test_what_the_disk_refuses_is_one_line_with_a_remedy(ends, number: int, remedy: str) -> None:
    expected = f"error: {os.strerror(number)} (runs/a): {remedy}, then run the same command again\n"
    assert ends(raising(OSError(number, os.strerror(number), "runs/a"))) == (2, expected)
    assert ends(raising(OSError(number, os.strerror(number)))) == (2, expected.replace(" (runs/a)", ""))


def test_a_folder_below_a_file_is_one_line(ends, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, text = ends(lambda: (tmp_path / "file" / "stage").mkdir())
    assert (code, text) == (
        2,
        f"error: Not a directory ({tmp_path}/file/stage): choose another --output, then run the same command again\n",
    )


def test_a_package_that_is_missed_later_is_one_line(ends) -> None:
    code, text = ends(raising(ModuleNotFoundError("No module named 'pnnx'", name="pnnx")))
    assert (code, text.split(":")[:2]) == (2, ["error", f" {sys.executable} lacks pnnx"])


def test_a_module_that_no_package_of_ours_is_keeps_its_traceback() -> None:
    with pytest.raises(ModuleNotFoundError, match="elsewhere"):
        run_app(raising(ModuleNotFoundError("No module named 'elsewhere'", name="elsewhere")))


def test_the_packages_are_those_of_the_project() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8")
    listed = text[text.index("\ndependencies = [") : text.index("\n]", text.index("\ndependencies = ["))]
    names = re.findall(r'"([\w-]+)[>=]', listed)
    assert sorted(errors.PACKAGES) == sorted("yaml" if name == "pyyaml" else name for name in names)
    assert set(errors._FIRST) <= set(errors.PACKAGES)
