"""Where engines are built: here, and over ssh against a fake that runs commands locally, and a real sshd."""

from __future__ import annotations

import json
import os
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from compress.errors import ExportError, SettingsError
from export import trt_builder, trt_target
from export.trt_target import Local, Ssh, parse_target

# Stands for the machine at the other end: a shell in a folder, and copies from and to it.
FAKE_SSH = """\
    #!/usr/bin/env python3
    import os, subprocess, sys
    arguments = sys.argv[1:]
    with open(os.environ["FAKE_LOG"], "a") as log:
        log.write("ssh " + " ".join(arguments) + "\\n")
    at = arguments.index("--")
    assert len(arguments) == at + 3, arguments
    command = arguments[at + 2]
    for name, answer in ANSWERS.items():
        if name in command:
            sys.stderr.write(answer[1] + "\\n")
            sys.exit(answer[0])
    environment = {**os.environ, "TMPDIR": os.environ["FAKE_HOST"]}
    sys.exit(subprocess.run(["sh", "-c", command], env=environment).returncode)
"""
FAKE_SCP = """\
    #!/usr/bin/env python3
    import os, shutil, sys
    arguments = sys.argv[1:]
    with open(os.environ["FAKE_LOG"], "a") as log:
        log.write("scp " + " ".join(arguments) + "\\n")
    *sources, place = arguments[arguments.index("--") + 1 :]
    if os.environ.get("FAKE_SCP_FAILS"):
        sys.stderr.write(os.environ["FAKE_SCP_FAILS"] + "\\n")
        sys.exit(1)
    for source in sources:
        shutil.copy(source.split(":")[-1], place.split(":")[-1])
"""
FAKE_BUILDER = """\
    import json, pathlib, sys
    request = json.loads(pathlib.Path(sys.argv[1]).read_text())
    pathlib.Path("build.log").write_text("building\\n")
    if request["action"] == "build":
        content = pathlib.Path(request["onnx"]).read_bytes()
        pathlib.Path(request["engine"]).write_bytes(b"engine of " + content)
        cache = pathlib.Path(request["timing_cache"])
        cache.write_bytes(cache.read_bytes() + b"+" if cache.exists() else b"new")
    pathlib.Path("result.json").write_text(json.dumps({"facts": {"python": sys.executable}}))
"""


def script(path: Path, text: str) -> Path:
    path.write_text(textwrap.dedent(text))
    path.chmod(0o755)
    return path


@pytest.fixture
def job(tmp_path: Path) -> Path:
    folder = tmp_path / "job"
    folder.mkdir()
    request = {"action": "build", "onnx": "model.onnx", "engine": "model.engine", "timing_cache": "timing.cache"}
    (folder / trt_builder.REQUEST).write_text(json.dumps(request))
    (folder / "model.onnx").write_bytes(b"onnx")
    (folder / "timing.cache").write_bytes(b"old")
    return folder


def use_builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(trt_target, "_BUILDER", script(tmp_path / "trt_builder.py", text))


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A fake ssh and scp on the PATH; returns how to let a command of it fail, and its log."""
    programs, place, log = tmp_path / "bin", tmp_path / "host", tmp_path / "log"
    programs.mkdir()
    place.mkdir()
    monkeypatch.setenv("PATH", f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_LOG", str(log))
    monkeypatch.setenv("FAKE_HOST", str(place))
    script(programs / "scp", FAKE_SCP)

    def answer(**answers: tuple[int, str]) -> Path:
        script(programs / "ssh", FAKE_SSH.replace("ANSWERS", repr(answers)))
        return log

    answer()
    use_builder(tmp_path, monkeypatch, FAKE_BUILDER)
    return answer


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("local", Local()),
        ("ssh://jetson", Ssh("jetson")),
        ("ssh://nvidia@192.168.1.7:2222", Ssh("nvidia@192.168.1.7", 2222)),
        ("ssh://me.too@orin-nano.lan", Ssh("me.too@orin-nano.lan")),
        ("ssh://[fe80::1]:22", Ssh("fe80::1", 22)),
    ],
)
def test_targets_are_read(text: str, target: trt_target.Target) -> None:
    assert parse_target(text) == target


@pytest.mark.parametrize(
    "text",
    [
        "jetson",
        "ssh://",
        "ssh://-oProxyCommand=touch",
        "ssh://-l@host",
        "ssh://host;touch x",
        "ssh://host name",
        "ssh://host:0",
        "ssh://host:70000",
        "ssh://host/path",
        "ssh://$(x)@host",
        "ssh://host\n",
    ],
)
def test_what_could_be_an_option_or_a_command_is_no_target(text: str) -> None:
    with pytest.raises(SettingsError, match=r"--target must be local or ssh://"):
        parse_target(text)


@pytest.mark.parametrize("python", ["python3; rm x", "-c", "$(x)", "a b", ""])
def test_an_interpreter_is_a_plain_name(python: str) -> None:
    with pytest.raises(SettingsError, match="--python must be a name or path"):
        parse_target("ssh://jetson", python)


def test_a_relative_interpreter_is_found_from_the_job_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_target("local", "venv/bin/python") == Local(str(tmp_path / "venv/bin/python"))
    assert parse_target("local", "python3") == Local("python3")
    assert parse_target("ssh://jetson", "venv/bin/python") == Ssh("jetson", None, "venv/bin/python")


def test_a_build_over_ssh_pushes_builds_fetches_and_leaves_nothing(host: Any, job: Path, tmp_path: Path) -> None:
    log = host()
    result = trt_target.run(Ssh("me@jetson", 2222), job)
    assert "python" in result["facts"]
    assert (job / "model.engine").read_bytes() == b"engine of onnx"
    assert (job / "timing.cache").read_bytes() == b"old+"
    assert (job / "build.log").read_text() == "building\n"
    assert list((tmp_path / "host").iterdir()) == []
    calls = log.read_text().splitlines()
    assert all(" -- " in call and "BatchMode=yes" in call for call in calls)
    assert all(("-p 2222" if call.startswith("ssh ") else "-P 2222") in call for call in calls)
    assert all("me@jetson" in call for call in calls)


def test_a_probe_sends_no_model(host: Any, tmp_path: Path) -> None:
    folder = tmp_path / "probe"
    folder.mkdir()
    (folder / trt_builder.REQUEST).write_text(json.dumps({"action": "probe", "flavour": "auto"}))
    assert "facts" in trt_target.run(Ssh("jetson"), folder)
    assert ".onnx" not in host().read_text()


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (
            {"mktemp": (255, "ssh: connect to host jetson port 22: Connection refused")},
            r"jetson cannot be reached over ssh \(ssh: connect to host jetson port 22: Connection refused\): check "
            "host, port and keys with: ssh jetson true",
        ),
        ({"mktemp": (1, "mktemp: failed: No space left on device")}, "jetson has no space left: free some space there"),
        (
            {"trt_builder": (127, "sh: 1: python3: not found")},
            "jetson has no python3: install Python 3.8 or newer there",
        ),
        ({"trt_builder": (137, "Killed")}, "killed on jetson, most likely for want of memory: lower --workspace"),
        ({"trt_builder": (139, "Segmentation fault")}, r"crashed on jetson \(signal 11\)"),
        ({"trt_builder": (1, "RuntimeError: odd")}, "the builder failed on jetson: RuntimeError: odd"),
        ({"trt_builder": (255, "client_loop: send disconnect: Broken pipe")}, "cannot be reached over ssh"),
    ],
)
def test_what_goes_wrong_over_there_is_one_line(
    answers: dict[str, tuple[int, str]], message: str, host: Any, job: Path, tmp_path: Path
) -> None:
    host(**answers)
    with pytest.raises(ExportError, match=message) as caught:
        trt_target.run(Ssh("jetson"), job)
    assert "\n" not in str(caught.value)
    assert not (job / "model.engine").exists()
    assert list((tmp_path / "host").iterdir()) == []


def test_a_full_target_is_met_before_anything_is_sent(
    host: Any, job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    df = "#!/bin/sh\necho 'Filesystem 1024-blocks Used Available Capacity Mounted'\necho '/dev/x 100 95 5 95% /tmp'\n"
    script(tmp_path / "bin" / "df", df)
    with pytest.raises(ExportError, match=r"jetson has 0 MiB free in .*, 1 are needed: free some space there"):
        trt_target.run(Ssh("jetson"), job)
    assert "scp" not in host().read_text()


def test_a_copy_that_fails_is_named(host: Any, job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_SCP_FAILS", "scp: write remote: Failure")
    with pytest.raises(ExportError, match=r"jetson could not copy files \(scp: write remote: Failure\)"):
        trt_target.run(Ssh("jetson"), job)
    monkeypatch.setenv("FAKE_SCP_FAILS", "scp: model.onnx: No space left on device")
    with pytest.raises(ExportError, match="jetson has no space left"):
        trt_target.run(Ssh("jetson"), job)


def test_without_ssh_the_package_is_named(job: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ExportError, match=r"ssh cannot be started .*: install OpenSSH's client"):
        trt_target.run(Ssh("jetson"), job)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n",
            "was killed on this machine, most likely for want",
        ),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGABRT)\n", r"crashed on this machine \(signal 6\)"),
        ("raise RuntimeError('odd')\n", "the builder failed on this machine: RuntimeError: odd"),
        ("raise OSError(28, 'No space left on device')\n", "this machine has no space left"),
    ],
)
def test_a_builder_that_dies_here_is_one_line(
    text: str, message: str, job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_builder(tmp_path, monkeypatch, text)
    (job / trt_builder.RESULT).write_text(json.dumps({"facts": "of an earlier request"}))
    with pytest.raises(ExportError, match=message):
        trt_target.run(Local(), job)


def test_an_interpreter_that_is_not_there_is_named(job: Path) -> None:
    with pytest.raises(ExportError, match=r"/nowhere/python cannot be started .*: check --python"):
        trt_target.run(Local("/nowhere/python"), job)


@pytest.mark.parametrize("kind", ["missing", "gpu", "parse", "shape", "unsupported", "memory", "disk", "build"])
def test_every_failure_of_the_builder_has_a_remedy(
    kind: str, job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failure = json.dumps({"failure": {"kind": kind, "message": "the reason"}})
    use_builder(tmp_path, monkeypatch, f"open('result.json', 'w').write({failure!r})\n")
    with pytest.raises(ExportError, match=r"on this machine \(the reason\): \w+"):
        trt_target.run(Local(), job)


def test_the_failures_that_have_a_remedy_are_those_of_the_builder() -> None:
    import ast

    tree = ast.parse(Path(trt_builder.__file__).read_text(encoding="utf-8"))
    raised = {
        node.args[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and getattr(node.func, "id", "") == "BuildError"
        and isinstance(node.args[0], ast.Constant)
    }
    assert raised == {"missing", "gpu", "parse", "shape", "unsupported", "build"}
    assert set(trt_target._REMEDIES) == raised | {"memory", "disk"}


def test_a_real_sshd_is_spoken_to_as_the_fake_one(
    sshd: Any, job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_builder(tmp_path, monkeypatch, FAKE_BUILDER)
    result = trt_target.run(parse_target(f"ssh://{sshd.host}", sys.executable), job)
    assert result["facts"]["python"] == sys.executable
    assert (job / "model.engine").read_bytes() == b"engine of onnx"
    assert (job / "timing.cache").read_bytes() == b"old+"
    assert list(sshd.tmp.iterdir()) == []
