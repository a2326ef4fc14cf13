"""The whole way to a device and back, against a real sshd on the loopback and an adb that is a folder."""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmark import accuracy, cell, latency, runtimes, sites, transfer, transports, turns
from compress.checkpoint import build_model, save_model
from compress.data.dataset import class_names
from compress.errors import DeviceError
from compress.settings import load_yaml
from export.ncnn import export_ncnn

IMGSZ = 64
DEVICE = """\
    name: board
    transport: {transport}
    python: {python}
    runtimes: [ncnn]
    budgets: {{ncnn: {{source: none}}}}
    read: [[echo, cool]]
    lock: [[touch, {folder}/locked]]
    unlock: [[rm, {folder}/locked]]
    notes: a test
"""


@pytest.fixture(scope="module")
def checkpoint(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    torch.manual_seed(0)
    model: Any = build_model("yolov8n.yaml", nc=len(class_names(tiny_data)))
    torch.optim.swa_utils.update_bn([torch.rand(8, 3, 64, 64)], model)
    for classes in model.model[-1].cv3:
        torch.nn.init.zeros_(classes[-1].bias)
    path = tmp_path_factory.mktemp("model") / "tiny.pt"
    save_model(model.eval(), path, {})
    return path


@pytest.fixture(scope="module")
def artefact(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_ncnn(checkpoint, tmp_path_factory.mktemp("artefact") / "tiny_ncnn_model", imgsz=IMGSZ)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(turns.MODES, "quick", turns.Mode(8, 0.01, 0.005, "for a test"))
    monkeypatch.setattr(turns, "WARM_UP_CAP_S", 0.05)


def board(folder: Path, transport: str = "ssh", **changes: str) -> Path:
    """The file of a device whose Python is ours."""
    import yaml

    path = folder / "board.yaml"
    text = textwrap.dedent(DEVICE).format(transport=transport, python=sys.executable, folder=folder)
    path.write_text(yaml.safe_dump({**yaml.safe_load(text), **changes}))
    return path


def workers(folder: Path) -> list[int]:
    """Processes of workers whose files lie below a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if "\0benchmark.worker\0" in (path / "cmdline").read_text() and str(folder) in str(
                (path / "cwd").readlink()
            ):
                found.append(int(path.name))
        except OSError:
            continue
    return found


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def wait_for(condition: Any, seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return bool(found)


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize("transport", ["ssh", "adb"])
def test_latency_and_accuracy_on_a_device(
    run_command: Any,
    transport: str,
    request: Any,
    quick: None,
    artefact: Path,
    tiny_data: Path,
    tmp_path: Path,
    capsys: Any,
) -> None:
    if transport == "ssh":
        server = request.getfixturevalue("sshd")
        host, there = server.host, server.tmp
    else:
        host, there = "phone-1", request.getfixturevalue("adb") / "data/local/tmp"
    nasty = shutil.copytree(artefact, tmp_path / "-x; touch pwned $(touch pwned) 'z'_ncnn_model")
    common = ("--models", artefact, nasty, "--imgsz", IMGSZ, "--data", tiny_data)
    place = ("--device", board(tmp_path, transport), "--host", host)
    assert run_command(latency.app, *common, *place, "--lock-clocks", "--output", tmp_path / "out") == 0
    assert "mAP50-95" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "latency.json").read_text())
    assert record["device"]["name"] == record["protocol"]["device"] == "board"
    assert record["device"]["cores"] == os.cpu_count()
    assert record["device"]["start_log"] == record["device"]["load_log"] == {"echo cool": "cool"}
    assert record["device"]["clocks_locked"]
    assert not (tmp_path / "locked").exists()
    assert list(there.iterdir()) == []
    assert not any((place / "pwned").exists() for place in (Path(), Path.home(), there.parent, tmp_path))
    assert record["comparisons"][0]["baseline"] == "tiny"
    assert [c["model_sha256"] for c in record["cells"]] == [runtimes.sha256(artefact)] * 2
    assert all(sum(map(len, c["samples_ms"])) >= 8 and c["unit"] == "ms" for c in record["cells"])

    here = accuracy.evaluate(artefact, tiny_data, imgsz=IMGSZ, threads=1)
    scores = json.loads((tmp_path / "out" / "accuracy.json").read_text())
    for score, measured in zip(scores, record["cells"], strict=True):
        assert score == measured["accuracy"]
        assert {key: score[key] for key in here} == here  # bit by bit: the same values went there and came back
    assert not (tmp_path / "out" / "outputs").exists()


def test_a_checkpoint_is_exported_for_the_device(
    run_command: Any,
    sshd: Any,
    quick: None,
    checkpoint: Path,
    tiny_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    place = ("--device", board(tmp_path), "--host", sshd.host, "--imgsz", IMGSZ, "--output", tmp_path / "out")
    assert run_command(latency.app, "--models", checkpoint, *place) == 2
    assert "--data is missing: real images prove the export of" in error_of(capsys)
    assert run_command(accuracy.app, "--models", checkpoint, "--data", tiny_data, *place) == 0
    (score,) = json.loads((tmp_path / "out" / "accuracy.json").read_text())
    assert (score["model"], score["runtime"], score["device"]) == ("tiny.pt", "ncnn", "board")
    parity = json.loads((tmp_path / "out" / "exports" / "0-ncnn" / "parity.json").read_text())
    assert parity["tiny"]["passed"]


def test_a_cut_connection_resumes_with_the_images_that_are_missing(
    run_command: Any,
    sshd: Any,
    artefact: Path,
    tiny_data: Path,
    tmp_path: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent: list[int] = []
    ask = cell.Worker.ask

    def cut(worker: cell.Worker, content: dict[str, Any], payload: bytes = b"") -> Any:
        sent.append(len(payload))
        if len(sent) == 4:
            worker.process.terminate()  # the ssh that carries everything
        return ask(worker, content, payload)

    arguments = ("--models", artefact, "--data", tiny_data, "--imgsz", IMGSZ, "--output", tmp_path / "out")
    place = ("--device", board(tmp_path), "--host", sshd.host)
    monkeypatch.setattr(cell.Worker, "ask", cut)
    assert run_command(accuracy.app, *arguments, *place) == 2
    assert "tiny_ncnn_model on ncnn: the connection to loopback was lost" in error_of(capsys)
    assert wait_for(lambda: workers(sshd.tmp) == [])
    (kept,) = (tmp_path / "out" / "outputs").iterdir()
    assert len(list(kept.iterdir())) == 3
    (first, *_) = kept.iterdir()
    first.write_bytes(first.read_bytes()[:-9])  # damaged: sent again

    sent.append(0)  # nothing is cut any more
    assert run_command(accuracy.app, *arguments, *place, "--keep-outputs") == 0
    assert len(sent) == 4 + 1 + (8 - 3 + 1)
    (score,) = json.loads((tmp_path / "out" / "accuracy.json").read_text())
    here = accuracy.evaluate(artefact, tiny_data, imgsz=IMGSZ, threads=1)
    assert {key: score[key] for key in here} == here
    assert len(list(kept.iterdir())) == 8
    assert list(sshd.tmp.iterdir()) == []


def test_a_device_that_vanishes_is_an_error_and_its_worker_ends(
    run_command: Any, sshd: Any, artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(transports, "ALIVE_S", 1)
    monkeypatch.setattr(transports, "ALIVE_COUNT", 1)
    monkeypatch.setattr(transports, "CLEAN_UP_S", 1.0)
    monkeypatch.setattr(sites, "WATCHDOG_S", 3.0)
    stopped: list[int] = []

    def vanish(*_: Any) -> None:
        (pid,) = workers(sshd.tmp)
        session = parent(parent(pid))  # behind the shell in between
        os.kill(session, signal.SIGSTOP)  # the sshd of this connection
        stopped.append(session)

    monkeypatch.setattr(cell.Worker, "request", vanish)
    place = ("--device", board(tmp_path), "--host", sshd.host, "--imgsz", IMGSZ, "--output", tmp_path / "out")
    try:
        assert run_command(latency.app, "--models", artefact, *place) == 2
        assert "the connection to loopback was lost (Timeout, server 127.0.0.1 not responding.)" in error_of(capsys)
        assert wait_for(lambda: workers(sshd.tmp) == [])  # its watchdog: nobody else could have told it
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)


def test_ctrl_c_leaves_nothing_there(
    run_command: Any, sshd: Any, artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> Any:
        assert len(workers(sshd.tmp)) == 1
        raise KeyboardInterrupt

    monkeypatch.setattr(cell.Worker, "request", interrupt)
    place = ("--device", board(tmp_path), "--host", sshd.host, "--imgsz", IMGSZ, "--output", tmp_path / "out")
    assert run_command(latency.app, "--models", artefact, *place) == 130
    assert wait_for(lambda: workers(sshd.tmp) == [])
    assert list(sshd.tmp.iterdir()) == []


def test_a_job_that_is_ended_leaves_nothing_there(sshd: Any, artefact: Path, tmp_path: Path) -> None:
    words = ("--models", artefact, "--device", board(tmp_path), "--host", sshd.host, "--imgsz", IMGSZ, "--lock-clocks")
    command = [sys.executable, "-m", "benchmark.latency", *map(str, words), "--mode", "mlperf", "--output"]
    process = subprocess.Popen([*command, str(tmp_path / "out")], stderr=subprocess.PIPE, text=True)
    try:
        assert wait_for(lambda: workers(sshd.tmp), 60)
        assert (tmp_path / "locked").exists()
        process.terminate()
        said = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert (process.returncode, said.strip()) == (143, "interrupted: run the same command again to resume")
    assert not (tmp_path / "locked").exists()
    assert wait_for(lambda: workers(sshd.tmp) == [])
    assert list(sshd.tmp.iterdir()) == []


def test_a_phone_that_is_unplugged_is_an_error(
    run_command: Any, adb: Path, artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(cell, "PING_S", 0.2)

    def unplug(*_: Any) -> None:
        Path(f"{adb}.gone").touch()

    monkeypatch.setattr(cell.Worker, "request", unplug)
    place = ("--device", board(tmp_path, "adb"), "--host", "phone-1", "--imgsz", IMGSZ, "--output", tmp_path / "out")
    assert run_command(latency.app, "--models", artefact, *place) == 2
    assert "the connection to phone-1 was lost (it no longer answers)" in error_of(capsys)
    assert wait_for(lambda: workers(adb) == [])


# What counts is a file that the second of two calls of getppid writes, as the emulator does.
COUNTING = """\
    #!{python}
    import os, sys
    real, calls = os.getppid, [0]
    def getppid():
        calls[0] += 1
        if calls[0] % 2 == 0:
            with open(os.environ["ESPALIER_INSTRUCTIONS"], "w") as stream:
                stream.write("%d\\n" % (1_000_000 + calls[0]))
        return real()
    os.getppid = getppid
    import runpy
    del sys.argv[0]
    sys.argv[0:1], sys.path[0] = [], os.getcwd()
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def test_an_emulated_device_counts_instructions_and_never_milliseconds(
    run_command: Any, sshd: Any, artefact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counting = tmp_path / "python-count"
    counting.write_text(textwrap.dedent(COUNTING).format(python=sys.executable))
    counting.chmod(0o755)
    device = board(tmp_path, python=str(counting), counter="instructions")
    other = shutil.copytree(artefact, tmp_path / "other_ncnn_model")
    place = ("--device", device, "--host", sshd.host, "--imgsz", IMGSZ, "--output", tmp_path / "out")
    assert run_command(latency.app, "--models", artefact, other, *place) == 0
    assert "M instructions" in (said := capsys.readouterr().out)
    assert " ms" not in said
    record = json.loads((tmp_path / "out" / "latency.json").read_text())
    for measured in record["cells"]:
        assert (measured["unit"], measured["instructions"]) == ("instructions", [1_000_002, 1_000_004, 1_000_006])
        assert not [key for key in measured if "ms" in key.split("_") or key == "intervals"]
    assert record["comparisons"][0]["speedup"] == 1.0
    assert record["comparisons"][0]["unit"] == "instructions"
    assert record["protocol"]["label"] == "counted, not timed"
    assert record["device"]["cpu"].startswith("emulated ")
    assert not record["noisy"]


def test_without_a_counter_nothing_is_counted(
    run_command: Any, sshd: Any, artefact: Path, tmp_path: Path, capsys: Any
) -> None:
    place = ("--device", board(tmp_path, counter="instructions"), "--host", sshd.host, "--imgsz", IMGSZ)
    assert run_command(latency.app, "--models", artefact, *place, "--output", tmp_path / "out") == 2
    assert "no instructions were counted in" in error_of(capsys)


@pytest.mark.parametrize(
    ("device", "arguments", "message"),
    [
        ({}, ["--host", "-oProxyCommand=touch x"], "--host must be [user@]host[:port], got '-oProxyCommand=touch x'"),
        ({}, ["--host", "loopback;touch x"], "--host must be [user@]host[:port]"),
        ({}, [], "--host is missing: board is reached over ssh"),
        ({}, ["--python", "python3; touch x"], "--python must be a name or path of an interpreter without spaces"),
        ({}, ["--host", "loopback", "--python", "/no/python"], "loopback has no /no/python: install Python 3.8"),
        ({"architecture": "other"}, ["--host", "loopback"], "choose another --host or --device"),
        ({}, ["--host", "loopback", "--runtime", "onnxruntime"], "must be an .onnx file to run in onnxruntime"),
        ({}, ["--host", "loopback", "--imgsz", "96"], "takes images of 64×64 px, not 96: use --imgsz 64"),
        ({}, ["--precision", "fp8"], "--precision must be fp32 or fp16, got 'fp8'"),
        ({"lock": [], "unlock": []}, ["--host", "loopback", "--lock-clocks"], "board has no commands that lock clocks"),
        ({"lock": [["false"]]}, ["--host", "loopback", "--lock-clocks"], "loopback could not run false"),
    ],
)
def test_mistakes_are_one_line(
    run_command: Any,
    device: dict,
    arguments: list[str],
    message: str,
    sshd: Any,
    artefact: Path,
    tmp_path: Path,
    capsys: Any,
) -> None:
    import platform

    if device.get("architecture"):
        device = {"architecture": "aarch64" if platform.machine() != "aarch64" else "x86_64"}
    path = board(tmp_path, **device)
    options = ["--imgsz", str(IMGSZ)] if "--imgsz" not in arguments else []
    command = ("--models", artefact, "--device", path, *arguments, *options, "--output", tmp_path / "out")
    assert run_command(latency.app, *command) == 2
    assert message in error_of(capsys)
    assert not Path("x").exists()
    assert list(sshd.tmp.iterdir()) == []


def test_a_missing_host_moves_no_earlier_work_aside(
    run_command: Any, artefact: Path, tmp_path: Path, capsys: Any
) -> None:
    empty = {"schema": 1, "stage": "latency", "config": {}, "parents": {}, "files": {}}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(empty))
    command = ("--models", artefact, "--device", board(tmp_path), "--imgsz", IMGSZ, "--output", tmp_path / "out")
    assert run_command(latency.app, *command) == 2
    assert "--host is missing" in error_of(capsys)
    assert not (tmp_path / "out.1").exists()


def test_other_classes_than_the_data_has_are_an_error_before_anything_is_measured(
    run_command: Any, sshd: Any, artefact: Path, tiny_data: Path, tmp_path: Path, capsys: Any
) -> None:
    content = load_yaml(tiny_data)
    yaml = tmp_path / "data.yaml"
    yaml.write_text(json.dumps({**content, "path": str(tiny_data.parent), "names": [*"abcdefg"]}))
    place = ("--device", board(tmp_path), "--host", sshd.host, "--imgsz", IMGSZ, "--output", tmp_path / "out")
    assert run_command(latency.app, "--models", artefact, "--data", yaml, *place) == 2
    assert "data.yaml has 7: give the data it learned" in error_of(capsys)


def test_a_full_device_is_an_error(
    run_command: Any, sshd: Any, artefact: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(transfer, "free_bytes", lambda *_: 3 << 20)
    place = ("--device", board(tmp_path), "--host", sshd.host, "--imgsz", IMGSZ, "--output", tmp_path / "out")
    assert run_command(latency.app, "--models", artefact, *place) == 2
    assert "loopback has 3 MiB free in" in error_of(capsys)


def test_the_answer_to_a_shell_that_greets_is_found(tmp_path: Path) -> None:
    answers: list[Any] = []
    with (tmp_path / "said").open("wb+") as stream:
        stream.write(b'Welcome {"friend"}\n\n{"facts": {}}\n{"arrays": [[1]], "bytes": 3}\na\nb{"ok": 1}\n')
        stream.seek(0)
        cell._read(stream, answers.append)
    assert answers == [({"facts": {}}, b""), ({"arrays": [[1]], "bytes": 3}, b"a\nb"), ({"ok": 1}, b""), None]


def test_a_connection_that_is_lost_in_the_middle_of_an_answer_is_an_error_and_keeps_no_half(
    run_command: Any, sshd: Any, artefact: Path, tiny_data: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    class Cut:
        """The stream of ssh, which ends in the middle of the first outputs."""

        def __init__(self, stream: Any) -> None:
            self.stream = stream

        def __iter__(self) -> Any:
            return iter(self.stream)

        def read(self, size: int) -> bytes:
            if size:
                started[0].terminate()
            return self.stream.read(size)[: size // 2]

    read, start, started = cell._read, transports.start, []

    def remember(*words: Any) -> Any:
        started.append(start(*words))
        return started[0]

    monkeypatch.setattr(transports, "start", remember)
    monkeypatch.setattr(cell, "_read", lambda stream, put: read(Cut(stream), put))  # type: ignore[arg-type]
    place = ("--device", board(tmp_path), "--host", sshd.host, "--imgsz", IMGSZ, "--output", tmp_path / "out")
    assert run_command(accuracy.app, "--models", artefact, "--data", tiny_data, *place) == 2
    assert "tiny_ncnn_model on ncnn: the connection to loopback was lost" in error_of(capsys)
    assert list((tmp_path / "out" / "outputs").rglob("*.bin")) == []


def test_a_worker_is_told_that_we_are_here() -> None:
    requests: queue.Queue[bytes | None] = queue.Queue()
    read, write = os.pipe()
    with os.fdopen(read, "rb", buffering=0) as stream:
        writer = threading.Thread(target=cell._write, args=(os.fdopen(write, "wb"), requests, 0.01), daemon=True)
        writer.start()
        assert [stream.read(1) for _ in range(3)] == [b"\n"] * 3
        requests.put(b"request")
        requests.put(None)
        writer.join()
        assert stream.read(100).strip() == b"request"


def test_what_is_sent_to_a_phone_that_takes_nothing_waits_no_longer_than_for_an_answer(
    adb: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cell, "PING_S", 0.2)
    monkeypatch.setattr(transports, "CLEAN_UP_S", 0.5)
    monkeypatch.setattr(transports, "start", lambda *_: subprocess.Popen(["sleep", "60"], stdin=-1, stdout=-1))
    Path(f"{adb}.lost").touch()
    with (
        cell.connect("tiny on ncnn", transports.Adb("phone-1"), [], {}) as worker,
        pytest.raises(DeviceError, match=r"the connection to phone-1 was lost \(it no longer answers\): check it"),
    ):
        worker.ask({"infer": {}}, bytes(1 << 20))  # more than a pipe holds


def test_values_of_8_bits_travel_as_such_and_arrive_bit_by_bit() -> None:
    import torch

    from benchmark.frames import pack_image, unpack_image

    pixels = torch.arange(3 * 32 * 32).remainder(256).to(torch.uint8).reshape(1, 3, 32, 32)
    image = (pixels.float() / 255).numpy()  # as Ultralytics' validator does it
    content, payload = pack_image(image)
    assert content["infer"] == {"shape": [1, 3, 32, 32], "dtype": "uint8"}
    assert unpack_image(content["infer"], payload).tobytes() == image.tobytes()
    noise = np.random.default_rng(0).random((1, 3, 8, 8), dtype=np.float32)
    content, payload = pack_image(noise)
    assert content["infer"]["dtype"] == "float32"
    assert unpack_image(content["infer"], payload).tobytes() == noise.tobytes()


def test_outputs_arrive_as_they_left_and_damage_is_seen() -> None:
    from benchmark.frames import pack_outputs, unpack_outputs

    outputs = [np.arange(6, dtype=np.float32).reshape(1, 2, 3), np.ones((1, 4), np.float16)]
    content, payload = pack_outputs(outputs)
    assert content["bytes"] == len(payload)
    found = unpack_outputs(content, payload)
    assert [array.tolist() for array in found] == [outputs[0].tolist(), outputs[1].tolist()]
    with pytest.raises(ValueError, match="outputs are damaged: 10 values instead of 7"):
        unpack_outputs({"arrays": [[1, 2, 3], [1]]}, payload)
