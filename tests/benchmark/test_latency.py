from __future__ import annotations

import hashlib
import itertools
import json
import os
import platform
import signal
import sys
from datetime import datetime, timedelta
from functools import partial
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmark import freshness, latency, latency_record, prepare, records, runtimes, sites, statistics, system, turns
from benchmark.transports import Local
from compress import manifest
from compress.devices import load_device
from compress.errors import BenchmarkError

_THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_GLIBC = platform.libc_ver() >= ("glibc", "2.35") and platform.libc_ver()[0] == "glibc"
HAS_HUGE_PAGES = _GLIBC and _THP.exists() and "[madvise]" in _THP.read_text()

# A runner whose model files say how to behave. Every inference is logged, so that the order can be checked.
RUNNER = """
import os, signal, subprocess, sys, time
import numpy as np

log = os.open(os.environ["FAKE_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)

def load(path, threads):
    print("a library that writes to standard output")
    with open(path) as stream:
        behaviour = stream.read()
    if behaviour == "compile":
        subprocess.run([sys.executable, "-c", "import time\\nwhile time.process_time() < 2: pass"], check=True)
    return {"name": os.path.basename(path), "behaviour": behaviour, "threads": threads, "calls": 0}

def infer(session, images):
    behaviour = session["behaviour"]
    session["calls"] += 1
    env = os.environ["OMP_NUM_THREADS"]
    os.write(log, f"{session['name']} {os.getpid()} {session['threads']} {env} {images.std():.3f}\\n".encode())
    if behaviour == "crash":
        print("out of luck", file=sys.stderr, flush=True)
        os._exit(3)
    if behaviour == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if behaviour == "hang":
        time.sleep(60)
    if behaviour == "raise":
        raise RuntimeError("no kernel\\nfor this node")
    time.sleep(0.0002)
    late = session["calls"] > 20
    shape = (1, 7, 4) if behaviour == "grow" and late else (1, 6, 4)
    value = np.nan if behaviour == "nan" or (behaviour == "late nan" and late) else 1.0
    return [np.full(shape, value, np.float32)]

def describe(session):
    shape = {"64 px": [1, 3, 64, 64], "batch 4": [4, 3, 32, 32]}.get(session["behaviour"])
    return {"runtime": "fake", "version": "1.2.3", "precision": "fp32", "input_shape": shape}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the fake runner in place of the real ones, and a mode that takes milliseconds."""
    (tmp_path / "fake_runner.py").write_text(RUNNER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log.txt"))
    monkeypatch.setattr(runtimes, "RUNNERS", {"torch": "fake_runner", "onnxruntime": "fake_runner"})
    tiny = turns.Mode(min_queries=30, min_seconds=0.01, burst_s=0.001, label="for a test")
    monkeypatch.setitem(turns.MODES, "quick", tiny)
    monkeypatch.setattr(turns, "WINDOW_S", 0.001)
    monkeypatch.setattr(turns, "WARM_UP_CAP_S", 0.02)
    return tmp_path


def model(folder: Path, name: str, behaviour: str = "fine") -> Path:
    path = folder / name
    path.write_text(behaviour)
    return path


def both(folder: Path) -> dict[str, dict[str, Path]]:
    return {
        name: {"torch": model(folder, f"{name}.pt"), "onnxruntime": model(folder, f"{name}.onnx")}
        for name in ("dense", "pruned")
    }


def calls(folder: Path) -> list[list[str]]:
    return [line.split() for line in (folder / "log.txt").read_text().splitlines()]


def is_running(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def run(run_command: Any) -> Any:
    return partial(run_command, latency.app)


def test_every_cell_has_its_queries_in_the_same_rounds(folder: Path) -> None:
    record = latency.measure(both(folder), imgsz=32, threads=1, mode="quick")
    names = [(cell["model"], cell["runtime"]) for cell in record["cells"]]
    assert names == list(itertools.product(("dense", "pruned"), ("torch", "onnxruntime")))
    for cell in record["cells"]:
        samples = [sample for burst in cell["samples_ms"] for sample in burst]
        assert cell["queries"] == len(samples) >= 30
        assert sum(samples) >= 10.0  # min_seconds
        assert len(cell["samples_ms"]) == record["protocol"]["rounds"]
        assert cell["p50_ms"] == pytest.approx(np.median(samples), abs=1e-4)
        assert cell["intervals"]["p50_ms"][0] <= cell["p50_ms"] <= cell["intervals"]["p50_ms"][1]
        assert (cell["runtime_version"], cell["precision"], cell["threads"], cell["imgsz"]) == ("1.2.3", "fp32", 1, 32)
        assert cell["output_shapes"] == [[1, 6, 4]]
        assert cell["cold_start_ms"] >= cell["load_ms"]
    assert json.loads(json.dumps(record)) == record


def test_huge_pages_are_those_of_the_variant_alone(folder: Path) -> None:
    if not HAS_HUGE_PAGES:
        pytest.skip("this system gives no huge pages to those who ask for them alone")
    path = model(folder, "a.pt")
    files = {"torch": path, "torch-hugepages": path}
    plain, huge = latency.measure({"a": files}, imgsz=32, threads=1, mode="quick")["cells"]
    assert not plain["huge_page_bytes"]
    assert huge["huge_page_bytes"] >= 2 << 20
    assert huge["runtime"] == "torch-hugepages"


def test_huge_pages_that_did_not_come_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "HUGE_PAGES", {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"})
    if not HAS_HUGE_PAGES:
        pytest.skip("this system gives huge pages to all or to none")
    with pytest.raises(BenchmarkError, match=r"^a\.pt on torch-hugepages: runs without huge pages here: they need Lin"):
        latency.measure({"a": {"torch-hugepages": model(folder, "a.pt")}}, imgsz=32, threads=1, mode="quick")


def test_the_model_is_named_by_its_bytes(folder: Path) -> None:
    record = latency.measure({"a": {"torch": model(folder, "a.pt")}}, imgsz=32, threads=1, mode="quick")
    assert record["cells"][0]["model_sha256"] == hashlib.sha256(b"fine").hexdigest()
    assert (record["cells"][0]["file"], record["cells"][0]["file_bytes"]) == ("a.pt", len(b"fine"))


def test_cells_take_turns_in_the_order_that_the_record_tells(folder: Path) -> None:
    record = latency.measure(both(folder), imgsz=32, threads=1, mode="quick")
    order = record["protocol"]["order"]
    assert all(sorted(turn) == [0, 1, 2, 3] for turn in order)
    assert len({tuple(turn) for turn in order}) > 1
    expected = [
        record["cells"][index]["file"]
        for number, turn in enumerate(order)
        for index in turn
        for _ in range(turns.LEAD_IN + len(record["cells"][index]["samples_ms"][number]))
    ]
    assert [call[0] for call in calls(folder)][-len(expected) :] == expected


def test_the_seed_decides_the_order(folder: Path) -> None:
    first, same, other = (
        latency.measure(both(folder), imgsz=32, threads=1, mode="quick", seed=seed)["protocol"]["order"][:3]
        for seed in (1, 1, 2)
    )
    assert first == same != other


def test_every_cell_has_a_process_of_its_own_with_its_threads_pinned(folder: Path) -> None:
    latency.measure(both(folder), imgsz=32, threads=3, mode="quick")
    by_model = {name: {call[1] for call in calls(folder) if call[0] == name} for name in ("dense.pt", "pruned.onnx")}
    assert all(len(pids) == 1 for pids in by_model.values())
    assert by_model["dense.pt"] != by_model["pruned.onnx"] != {str(os.getpid())}
    assert {call[2] for call in calls(folder)} == {"3"}  # what the runner was told
    assert {call[3] for call in calls(folder)} == {"3"}  # OMP_NUM_THREADS


def test_models_of_several_image_sizes_take_turns(folder: Path) -> None:
    files = {"a": {"torch": model(folder, "a.pt")}, "b": {"torch": model(folder, "b.pt", "64 px")}}
    record = latency.measure(files, imgsz={"a": 32, "b": 64}, threads=1, mode="quick")
    assert [(cell["model"], cell["imgsz"]) for cell in record["cells"]] == [("a", 32), ("b", 64)]
    assert record["protocol"]["imgsz"] is None


def test_the_input_is_noise(folder: Path) -> None:
    latency.measure({"a": {"torch": model(folder, "a.pt")}}, imgsz=64, threads=1, mode="quick")
    (deviation,) = {float(call[4]) for call in calls(folder)}
    assert deviation == pytest.approx(1 / np.sqrt(12), abs=0.01)  # that of a uniform distribution over [0, 1)


def test_the_first_one_of_a_runtime_is_what_the_others_there_are_compared_with(folder: Path) -> None:
    models = {
        f"{name}_{kind}": {runtime: model(folder, f"{name}{ending}")}
        for kind, runtime, ending in (("onnx", "onnxruntime", ".onnx"), ("torch", "torch", ".pt"))
        for name in ("dense", "pruned")
    }
    compared = latency.measure(models, imgsz=32, threads=1, mode="quick")["comparisons"]
    assert [(row["runtime"], row["baseline"], row["model"]) for row in compared] == [
        ("onnxruntime", "dense_onnx", "pruned_onnx"),
        ("torch", "dense_torch", "pruned_torch"),
    ]


def test_models_are_compared_with_the_first_one_on_each_runtime(folder: Path) -> None:
    models = {"dense": {"onnxruntime": model(folder, "dense.onnx")}, "pruned": both(folder)["pruned"]}
    record = latency.measure(models, imgsz=32, threads=1, mode="quick")
    dense, _, pruned = record["cells"]  # pruned also ran in torch, where there is no dense cell to compare with
    (comparison,) = record["comparisons"]
    assert (comparison["runtime"], comparison["baseline"], comparison["model"]) == ("onnxruntime", "dense", "pruned")
    ratio, interval = statistics.speedup(dense["samples_ms"], pruned["samples_ms"], seed=0)
    assert comparison["speedup"] == pytest.approx(ratio, abs=1e-4)
    assert comparison["interval"] == pytest.approx(interval, abs=1e-4)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux' own count of peak memory")
def test_a_worker_does_not_inherit_the_memory_peak_of_its_parent(folder: Path) -> None:
    assert np.ones(100_000_000 // 8 * 3).nbytes == 300_000_000
    record = latency.measure({"a": {"torch": model(folder, "a.pt")}}, imgsz=32, threads=1, mode="quick")
    assert 5_000_000 < record["cells"][0]["peak_memory_bytes"] < 200_000_000


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("nan", r"^bad\.pt on torch: returns values that are not finite"),
        ("late nan", r"^bad\.pt on torch: returns values that are not finite"),
        ("grow", r"^bad\.pt on torch: returned \[\[1, 7, 4\]\] after \[\[1, 6, 4\]\]"),
        ("crash", r"^bad\.pt on torch crashed \(exit code 3\); its last line was: out of luck$"),
        ("kill", r"^bad\.pt on torch crashed \(SIGKILL, perhaps out of memory\)"),
        ("raise", r"^bad\.pt on torch: RuntimeError: no kernel for this node$"),
        ("64 px", r"^bad\.pt on torch: takes images of 64×64 px, not 32: use --imgsz 64$"),
        ("batch 4", r"^bad\.pt on torch: takes 4 images at once, latency is that of one: export it with batch 1$"),
    ],
)
def test_a_model_that_cannot_be_measured_is_named(folder: Path, behaviour: str, message: str) -> None:
    models = {"good": {"torch": model(folder, "good.pt")}, "bad": {"torch": model(folder, "bad.pt", behaviour)}}
    with pytest.raises(BenchmarkError, match=message):
        latency.measure(models, imgsz=32, threads=1, mode="quick")
    assert not any(is_running(call[1]) for call in calls(folder))


def test_a_runtime_that_is_not_installed_says_how_to_get_it(folder: Path) -> None:
    (folder / "fake_runner.py").write_text("import a_runtime_of_nobody\n")
    with pytest.raises(BenchmarkError) as caught:
        latency.measure({"a": {"torch": model(folder, "a.pt")}}, imgsz=32, threads=1, mode="quick")
    assert str(caught.value) == (
        "a.pt on torch: needs the package a_runtime_of_nobody, which is not installed: "
        f"{sys.executable} -m pip install a_runtime_of_nobody"
    )


def test_a_silent_worker_is_named_and_ended(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sites, "SILENCE_S", 4.0)
    with pytest.raises(BenchmarkError, match=r"^slow\.pt on torch wrote nothing for 4 s"):
        latency.measure({"slow": {"torch": model(folder, "slow.pt", "hang")}}, imgsz=32, threads=1, mode="quick")
    assert [is_running(call[1]) for call in calls(folder)] == [False]


def test_a_runtime_that_builds_while_it_opens_a_model_may_be_silent_for_longer(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.compile of a YOLOv8n took 240 s on two busy cores, before a cache had anything of it."""
    monkeypatch.setattr(sites, "connect", lambda *_, silence_s: silence_s)
    monkeypatch.setattr(sites, "_push_model", lambda *_: "there")
    options: dict[str, int] = {"threads": 1, "imgsz": 64, "seed": 0}
    there = sites.Site(load_device("jetson"), sites.Local(), "folder")
    for site in (sites.here(), there):
        for runtime, expected in (("torch", 120.0), ("torch-compiled", 1800.0), ("onnxruntime-tensorrt", 1800.0)):
            assert sites.worker(site, runtime, model(folder, "a.pt"), **options) == expected


def test_what_a_runtime_compiles_is_no_work_of_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[float | None] = []
    monkeypatch.setattr(latency, "others_cores", lambda before, after, own_s, elapsed_s: told.append(own_s))
    latency.measure({"a": {"torch": model(folder, "a.pt", "compile")}}, imgsz=32, threads=1, mode="quick")
    assert told[0] is not None
    assert told[0] > 2.0  # of which the compiler has used 2


# By how many lines the log of the fake runner grows within half a second, and whether a throttling is on.
GROWTH = """
import os, time
count = lambda: open(os.environ["FAKE_LOG"]).read().count("\\n") if os.path.exists(os.environ["FAKE_LOG"]) else 0
before = count()
time.sleep(0.5)
busy = count() > before
print("busy" if busy else "at rest", "throttled=0x4" if busy else "throttled=0x0")
"""


def test_clocks_are_read_while_queries_run_which_do_not_count(folder: Path) -> None:
    device = load_device("cpu").model_copy(update={"read": ((sys.executable, "-c", GROWTH),)})
    record = latency.measure(both(folder), imgsz=32, threads=1, mode="quick", site=sites.Site(device, Local()))
    (before,), (under_load,) = (record["device"][f"{when}_log"].values() for when in ("start", "load"))
    assert (before, under_load) == ("at rest throttled=0x0", "busy throttled=0x4")
    assert any("the Raspberry Pi tells of throttling now" in reason for reason in record["noise"])
    for cell in record["cells"]:
        assert cell["queries"] == sum(map(len, cell["samples_ms"]))
        assert len(cell["samples_ms"]) == record["protocol"]["rounds"]


def test_a_worker_that_crashes_under_that_load_is_named(folder: Path) -> None:
    kill = "import os, signal\nfor l in open(os.environ['FAKE_LOG']): p = int(l.split()[1])\nos.kill(p, signal.SIGKILL)"
    command = (sys.executable, "-c", f"import os\nif os.path.exists(os.environ['FAKE_LOG']): exec({kill!r})")
    device = load_device("cpu").model_copy(update={"read": (command,)})
    models = {"a": {"torch": model(folder, "a.pt")}}
    with pytest.raises(BenchmarkError, match=r"^a\.pt on torch crashed \(SIGKILL, perhaps out of memory\)"):
        latency.measure(models, imgsz=32, threads=1, mode="quick", site=sites.Site(device, Local()))


def test_ctrl_c_ends_every_worker(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: Any) -> bool:
        signal.default_int_handler(signal.SIGINT, None)  # what Ctrl-C calls, also where it is ignored in the background
        return False

    monkeypatch.setattr(statistics, "on_plateau", interrupt)
    with pytest.raises(KeyboardInterrupt):
        latency.measure(both(folder), imgsz=32, threads=1, mode="quick")
    assert len({call[1] for call in calls(folder)}) == 4
    assert not any(is_running(call[1]) for call in calls(folder))


def test_batches_are_measured_side_by_side_and_compared_at_equal_batch(folder: Path) -> None:
    record = latency.measure(both(folder), imgsz=32, threads=1, mode="quick", load=latency.Load((1, 4)))
    cells = [(cell["model"], cell["runtime"], cell["batch"]) for cell in record["cells"]]
    assert cells == list(itertools.product(("dense", "pruned"), ("torch", "onnxruntime"), (1, 4)))
    compared = [(item["runtime"], item["batch"]) for item in record["comparisons"]]
    assert compared == list(itertools.product(("torch", "onnxruntime"), (1, 4)))
    for cell in record["cells"]:
        assert cell["streams"] == 1
        samples = [sample for burst in cell["samples_ms"] for sample in burst]
        expected = 1000 * cell["batch"] * len(samples) / sum(samples)
        assert cell["images_per_second"] == pytest.approx(expected, rel=1e-3)
    assert record["protocol"]["batch"] is None


def test_streams_run_in_processes_of_their_own(folder: Path) -> None:
    models = {"dense": {"torch": model(folder, "dense.pt")}}
    record = latency.measure(models, imgsz=32, threads=1, mode="quick", load=latency.Load(streams=3))
    assert len({call[1] for call in calls(folder)}) == 3
    (cell,) = record["cells"]
    assert (cell["streams"], record["protocol"]["streams"], cell["batch"]) == (3, 3, 1)
    assert all(len(burst) % 3 == 0 for burst in cell["samples_ms"])
    total_ms = sum(sum(burst) for burst in cell["samples_ms"])
    assert cell["images_per_second"] == pytest.approx(3000 * cell["queries"] / total_ms, rel=1e-3)
    assert not any(is_running(call[1]) for call in calls(folder))


def test_a_file_of_another_batch_says_so(folder: Path) -> None:
    fixed = {"fixed": {"torch": model(folder, "fixed.pt", "batch 4")}}
    with pytest.raises(
        BenchmarkError, match=r"^fixed\.pt on torch: takes 4 images at once, --batch 2 was asked for: exp"
    ):
        latency.measure(fixed, imgsz=32, threads=1, mode="quick", load=latency.Load((2,)))
    record = latency.measure(fixed, imgsz=32, threads=1, mode="quick", load=latency.Load((4,)))
    assert record["cells"][0]["batch"] == record["protocol"]["batch"] == 4


def test_a_runtime_without_batches_promises_no_export_with_one() -> None:
    from benchmark import worker

    facts = {"runtime": "ncnn", "input_shape": [1, 3, 32, 32]}
    with pytest.raises(ValueError, match="takes 1 image at once, --batch 2 was asked for: leave it out"):
        worker._check_shape(facts, 32, 2)


def test_instructions_are_of_one_image(folder: Path) -> None:
    site = sites.Site(load_device("arm-emulated"), Local())
    one = {"dense": {"torch": model(folder, "dense.pt")}}
    with pytest.raises(BenchmarkError, match="arm-emulated counts instructions of one image: leave out --batch"):
        latency.measure(one, imgsz=32, threads=1, mode="quick", site=site, load=latency.Load((2,)))


LAYERS = """
LEFT_OUT = "all else"
def layers(runner, session, model, images, counter):
    assert counter is None and runner.describe(session)["version"] == "1.2.3"
    first = {"name": f"{session['name']} {len(images)}", "type": "Conv", "ms": 0.25}
    return [first, {"name": "b", "type": "", "ms": 0.5}]
"""


def test_layers_are_profiled_in_a_process_of_their_own_after_all_queries(folder: Path) -> None:
    models = {"dense": {"torch": model(folder, "dense.pt")}}
    plain = latency.measure(models, imgsz=32, threads=1, mode="quick", layers=True)
    assert "layers" not in plain["cells"][0]  # the runtime has no profiler
    (folder / "fake_layers.py").write_text(LAYERS)
    (folder / "log.txt").unlink()
    record = latency.measure(models, imgsz=32, threads=1, mode="quick", layers=True)
    (cell,) = record["cells"]
    assert [(layer["name"], layer["ms"]) for layer in cell["layers"]] == [("dense.pt 1", 0.25), ("b", 0.5)]
    assert cell["layers_left_out"] == "all else"
    pids = [call[1] for call in calls(folder)]
    assert len(set(pids)) == 2
    assert pids == sorted(pids, key=pids.index)
    assert [layer.cost for layer in records.measurements(record)[0].layers] == [0.25, 0.5]
    assert "layers" not in latency.measure(models, imgsz=32, threads=1, mode="quick")["cells"][0]


@pytest.mark.parametrize(("unit", "key"), [("ms", "samples_ms"), ("instructions", "instructions")])
def test_the_share_of_the_layers_is_that_of_a_query_beside_them(unit: str, key: str) -> None:
    class Profiling:
        def __init__(self, layers: Any) -> None:
            self.layers = layers

        def ask(self, content: dict[str, Any]) -> Any:
            if "layers" in content:
                return {"layers": self.layers, "left_out": "the decoding"}, b""
            assert content == {"queries": 2 + 3}
            return {key: [99.0, 99.0, 11.0, 9.0, 10.0]}, b""

    worker: Any = Profiling([{"name": "a", unit: 3.0}, {"name": "b", unit: 4.5}])
    made = latency_record.Cell("m", "ncnn", Path("m"), worker, {}, burst=3, unit=unit, rounds=[[20.0]])
    found = latency_record.profile(made, worker, lead_in=2)
    assert found == {"layers": worker.layers, "layers_share": 0.75, "layers_left_out": "the decoding"}
    for nothing in (None, []):
        worker.layers = nothing
        assert latency_record.profile(made, worker, lead_in=2) == {}


def test_energy_is_that_of_a_query_where_every_burst_tells_it() -> None:
    class Told:
        def __init__(self, *energies: float | None) -> None:
            self.energies = iter(energies)
            self.asked: list[int] = []

        def request(self, content: dict[str, int]) -> None:
            self.asked.append(content["queries"])

        def receive(self) -> Any:
            samples = [9.0, 9.0] + [1.0] * (self.asked[-1] - 2)
            return {"samples_ms": samples, "energy_uj": next(self.energies)}, b""

    def measured(*energies: float | None) -> Any:
        made = latency_record.Cell("m", "torch", Path("m"), Told(*energies), {}, others=[Told(7.0, 7.0)])  # type: ignore[arg-type,list-item]
        for _ in energies:
            assert made.query(3, lead_in=2) == [1.0] * 6
        return latency_record._energy_mj(made)

    assert measured(10_000.0, 30_000.0) == 2.0  # mJ: of ten queries in two streams
    assert measured(10_000.0, None) is None


def test_what_the_device_says_of_throttling_makes_a_record_noisy() -> None:
    assert latency_record.noise([cell([[1.0]])], state(), state(), 0.0, 2, ["the Pi is hot"]) == ["the Pi is hot"]


@pytest.mark.parametrize(("text", "expected"), [("1", (1,)), ("1,2, 8", (1, 2, 8)), ("4 4 2", (4, 2))])
def test_batches_are_numbers(text: str, expected: tuple[int, ...]) -> None:
    assert latency._batches(text) == expected


def test_wrong_names_list_the_known_ones_closest_first(folder: Path) -> None:
    good = {"torch": model(folder, "a.pt")}
    with pytest.raises(BenchmarkError, match="unknown mode 'standart': choose one of standard, "):
        latency.measure({"a": good}, imgsz=32, threads=1, mode="standart")
    with pytest.raises(BenchmarkError, match="unknown runtime 'onnx': choose one of onnxruntime, onnxruntime-cuda, "):
        latency.measure({"a": {"onnx": good["torch"]}}, imgsz=32, threads=1, mode="quick")
    with pytest.raises(BenchmarkError, match=r"gone\.pt does not exist"):
        latency.measure({"a": {"torch": folder / "gone.pt"}}, imgsz=32, threads=1, mode="quick")


def state(throttled: int | None = None) -> dict[str, Any]:
    return {**dict.fromkeys(system.state()), "throttle_count": throttled}


def cell(rounds_ms: list[list[float]], plateau: bool = True) -> Any:
    warm_up = {"plateau": plateau, "seconds": 10.0, "queries": 9}
    return latency_record.Cell("dense", "torch", Path("dense.pt"), Any, {}, warm_up, 1, rounds_ms)  # type: ignore[arg-type]


def test_reasons_to_doubt_a_measurement() -> None:
    steady, rising = cell([[1.0], [1.0], [1.09]]), cell([[1.0], [1.0], [1.2]])
    assert latency_record.noise([steady], state(), state(), None, 2) == []
    assert latency_record.noise([steady], state(4), state(4), 0.2, 2) == []
    assert latency_record.noise([steady], state(4), state(6), 0.21, 2) == [
        "other processes kept 0.21 of 2 cores busy",
        "the CPU throttled 2 times",
    ]
    assert latency_record.noise([rising], state(), state(), 0.0, None) == [
        "dense on torch changed by +20% from its first to its last third"
    ]
    assert latency_record.noise([cell([[1.0]], plateau=False)], state(), state(), 0.0, 2) == [
        "dense on torch reached no plateau in 10 s of warm-up"
    ]
    counted = latency_record.Cell("dense", "ncnn", Path("dense"), Any, {}, rounds=[[1e6], [1.002e6]])  # type: ignore[arg-type]
    counted.unit = "instructions"
    assert latency_record.noise([counted], state(4), state(6), 2.0, 2) == [
        "dense on ncnn took up to 0.20% more instructions from query to query"
    ]


@pytest.mark.parametrize(
    ("before_s", "after_s", "own_s", "expected"),
    [
        (100.0, 116.0, 12.0, 0.5),  # 16 s of work in 8 s, 12 of them our own
        (100.0, 111.0, 12.0, 0.0),  # clocks of different grain, never below nothing
        (None, 116.0, 12.0, None),
        (100.0, 100.0, 12.0, None),  # a kernel that counts nothing
    ],
)
def test_work_of_other_processes(
    before_s: float | None, after_s: float | None, own_s: float, expected: float | None
) -> None:
    assert latency_record.others_cores(before_s, after_s, own_s, elapsed_s=8.0) == expected


def test_the_device_is_described_or_null(folder: Path) -> None:
    record = latency.measure({"a": {"torch": model(folder, "a.pt")}}, imgsz=32, threads=1, mode="quick")
    device = record["device"]
    assert device["cores"] == os.cpu_count()
    assert datetime.fromisoformat(record["measured_at"]).utcoffset() == timedelta(0)
    assert set(device["start"]) == set(device["end"]) == set(system.state())
    assert record["noisy"] is bool(record["noise"])


def test_the_gpu_is_named_where_the_driver_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "_NVIDIA", tmp_path)
    assert system.device()["gpu"] is None
    for place, model_name in (("0000:01:00.0", "NVIDIA L4"), ("0000:02:00.0", "NVIDIA L4"), ("0000:03:00.0", "Other")):
        (tmp_path / place).mkdir()
        (tmp_path / place / "information").write_text(f"Model: \t\t {model_name}\nIRQ:   \t\t 54\n")
    assert system.device()["gpu"] == "NVIDIA L4 and Other"


def test_another_gpu_is_another_device() -> None:
    here = {"cpu": "EPYC", "gpu": "NVIDIA L4", "cores": 8}
    fused, plain = ({"device": here, "cells": [{"runtime": runtime}]} for runtime in ("torch-cudagraph", "torch"))
    device = load_device("cuda")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest, "read_json", lambda _: {})
        patch.setattr(system, "device", lambda: {**here, "gpu": "NVIDIA A10"})
        now = "was measured on NVIDIA L4 on EPYC, this is NVIDIA A10 on EPYC"
        assert latency._outdated(fused, Path(), device) == now
        assert latency._outdated(plain, Path(), device) is None
        patch.setattr(system, "device", lambda: here)
        assert latency._outdated(fused, Path(), device) is None


def test_command_line_takes_several_models_after_one_option(
    run: Any, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "noise", lambda *_: [])  # whatever else runs meanwhile
    files = [model(folder, name) for name in ("dense.onnx", "pruned.onnx", "pruned.pt")]
    assert run("--models", *files, "--imgsz", 32, "--output", folder / "out") == 0
    record = json.loads((folder / "out" / "latency.json").read_text())
    cells = [(cell["model"], cell["runtime"]) for cell in record["cells"]]
    assert cells == [("dense", "onnxruntime"), ("pruned", "onnxruntime"), ("pruned", "torch")]
    assert [c["model"] for c in record["comparisons"]] == ["pruned"]
    manifest = json.loads((folder / "out" / "manifest.json").read_text())
    assert manifest["stage"] == "latency"
    assert manifest["parents"]["dense.onnxruntime"] == hashlib.sha256(b"fine").hexdigest()
    assert "for a test" in capsys.readouterr().out

    assert run("--models", files[0], "--models", files[1], files[2], "--imgsz", 32, "--output", folder / "out") == 0
    assert "finished before, unchanged" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("cpu", "version", "reason"),
    [
        ("a toaster", None, "was measured on {cpu}, this is a toaster"),
        (None, "99.0", "was measured in onnxruntime {onnxruntime}, 99.0 is installed"),
    ],
)
def test_what_no_longer_speaks_of_this_machine_is_measured_anew(
    cpu: str | None, version: str | None, reason: str, run: Any, folder: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(latency, "noise", lambda *_: [])
    output, tools, device = folder / "out", manifest.tool_versions(), system.device()
    arguments = ["--models", model(folder, "a.onnx"), "--imgsz", 32, "--output", output]
    assert run(*arguments) == 0
    old = (output / "latency.json").read_bytes()
    monkeypatch.setattr(manifest, "tool_versions", lambda: {**tools, "onnxruntime": version or tools["onnxruntime"]})
    monkeypatch.setattr(system, "device", lambda: {**device, "cpu": cpu or device["cpu"]})
    capsys.readouterr()
    assert run(*arguments) == 0
    said = f"latency: {output} {reason.format(**tools, **device)}: it is measured anew, the old one is now {output}.1"
    assert said in capsys.readouterr().out
    assert (folder / "out.1" / "latency.json").read_bytes() == old
    assert run(*arguments) == 0
    assert "finished before, unchanged" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lock-clocks"], "cpu has no commands that lock clocks: leave out --lock-clocks"),
        (["--models", "out/a.onnx"], "out/a.onnx lies in the folder of its own result, out: choose another --output"),
        (["--seed", -1], "--seed"),
    ],
)
def test_a_mistake_moves_no_finished_work_aside(
    options: list[Any], message: str, run: Any, folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    arguments = ["--models", model(folder, "a.onnx"), "--imgsz", 32, "--output", "out"]
    assert run(*arguments) == 0
    model(folder / "out", "a.onnx")
    capsys.readouterr()
    assert run(*arguments, *options) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert (folder / "out" / "manifest.json").exists()
    assert not (folder / "out.1").exists()


def test_a_machine_of_other_cores_is_another_machine() -> None:
    record = {"device": {**system.device(), "cores": 999}, "cells": [{"runtime": "torch"}]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest, "read_json", lambda _: {})
        expected = f"was measured on 999 cores, this machine has {os.cpu_count()}"
        assert latency._outdated(record, Path(), load_device("cpu")) == expected


def test_another_version_of_tensorrt_or_of_onnxruntimes_other_package_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"onnxruntime-gpu": "1.19.0", "tensorrt_rtx": "1.2"}

    def version(name: str) -> str:
        if name in installed:
            return installed[name]
        raise PackageNotFoundError

    monkeypatch.setattr(manifest, "version", version)
    before, cpu = manifest.tool_versions(), system.device()["cpu"]
    installed |= {"onnxruntime-gpu": "1.23.0", "tensorrt_rtx": "1.3"}
    for runtime, text in (("onnxruntime", "onnxruntime 1.19.0, 1.23.0"), ("tensorrt", "tensorrt_rtx 1.2, 1.3")):
        assert freshness.outdated(cpu, before, [runtime]) == f"was measured in {text} is installed"


def test_a_store_that_cannot_be_used_hides_no_table(run: Any, folder: Path, capsys: Any, monkeypatch: Any) -> None:
    (folder / "store").write_text("no database")
    monkeypatch.setenv("ESPALIER_STORE", str(folder / "store"))
    assert run("--models", model(folder, "a.onnx"), "--imgsz", 32, "--output", folder / "out") == 2
    said = capsys.readouterr()
    assert "p50 ms (95 %)" in said.out
    assert "choose another with --store or $ESPALIER_STORE" in said.err


def test_the_name_of_a_file_does_not_steer_the_terminal(run: Any, folder: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(latency, "noise", lambda cells, *_: [f"{cells[0].name} was slow"])
    files = [model(folder, "evil\x1b]0;title\x07.onnx"), model(folder, "b.onnx")]
    assert run("--models", *files, "--imgsz", 32, "--output", folder / "out") == 0
    said = capsys.readouterr().out
    assert "evil ]0;title  on onnxruntime was slow" in said
    assert not {"\x1b", "\x07"} & set(said)


def test_what_is_noisy_is_measured_again(
    run: Any, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter((["a compiler ran", "[red]it is hot"], []))
    monkeypatch.setattr(latency, "noise", lambda *_: next(found))
    arguments = ["--models", model(folder, "a.onnx"), "--imgsz", 32, "--output", folder / "out"]
    assert run(*arguments) == 0
    remark = "the measurement is noisy (a compiler ran; [red]it is hot): end what else runs there, and run the same "
    assert f"{remark}command again" in capsys.readouterr().out.replace("\n", " ")
    record = json.loads((folder / "out" / "latency.json").read_text())
    record["cells"][0]["accuracy"] = {"model": "a.onnx", "map50_95": 0.5}
    (folder / "out" / "latency.json").write_text(json.dumps(record))
    path = folder / "out" / "manifest.json"
    content = json.loads(path.read_text())
    content["files"]["latency.json"] = hashlib.sha256((folder / "out" / "latency.json").read_bytes()).hexdigest()
    path.write_text(json.dumps(content))

    assert run(*arguments) == 0
    assert "what was measured before is noisy, it is measured again" in capsys.readouterr().out
    record = json.loads((folder / "out" / "latency.json").read_text())
    assert (record["noisy"], record["cells"][0]["accuracy"]) == (
        False,
        {"model": "a.onnx", "map50_95": 0.5},
    )  # scored once
    assert run(*arguments) == 0
    assert "finished before, unchanged" in capsys.readouterr().out
    assert not (folder / "out.1").exists()


def test_command_line_sweeps_batches_and_tells_them_apart(
    run: Any, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "fake_layers.py").write_text(LAYERS)
    arguments = ["--models", model(folder, "a.onnx"), "--imgsz", 32, "--output", folder / "out", "--streams", 2]
    assert run(*arguments, "--batch", "1,2", "--layers") == 0
    record = json.loads((folder / "out" / "latency.json").read_text())
    assert [(c["batch"], c["streams"], c["layers"][0]["name"]) for c in record["cells"]] == [
        (1, 2, "a.onnx 1"),
        (2, 2, "a.onnx 2"),
    ]
    manifest = json.loads((folder / "out" / "manifest.json").read_text())
    assert {key: manifest["config"][key] for key in ("batches", "streams", "layers")} == {
        "batches": [1, 2],
        "streams": 2,
        "layers": True,
    }
    assert list(manifest["metrics"]) == ["a.onnxruntime.p50_ms", "a.onnxruntime.batch2.p50_ms"]
    shown = capsys.readouterr().out
    assert "streams: 2" in shown
    assert "images/s" in shown
    assert f"layers: python -m benchmark.report {folder / 'out'} shows what each layer costs" in shown


def test_models_of_one_name_keep_their_folders(run: Any, folder: Path) -> None:
    for run_name in ("a", "b"):
        (folder / run_name).mkdir()
    first, second = model(folder, "a/best.onnx"), model(folder, "b/best.onnx")
    assert run("--models", first, second, "--imgsz", 32, "--output", folder / "out") == 0
    record = json.loads((folder / "out" / "latency.json").read_text())
    assert [cell["model"] for cell in record["cells"]] == ["a/best", "b/best"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.onnx", "--device", "cpp"], "unknown device 'cpp': choose one of cpu"),
        (["a.onnx", "--batch", "1,0"], "--batch must be a number, or several as in 1,2,4, got '1,0'"),
        (["a.onnx", "--mode", "quik"], "unknown mode 'quik': choose one of quick, "),
        (["a.onnx", "--runtime", "torch"], "a.onnx must be a .pt file to run in torch"),
        (["a.txt"], "a.txt must be a .pt file, an .onnx file, an .engine file or a folder NAME_ncnn_model"),
        (["b.onnx"], "b.onnx does not exist"),
    ],
)
def test_command_line_mistakes_are_one_line(
    run: Any, folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    for name in ("a.onnx", "a.txt"):
        model(folder, name)
    path, *options = arguments
    assert run("--models", folder / path, *options, "--output", folder / "out") == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_the_files_of_a_model_share_its_name(folder: Path) -> None:
    (folder / "a_ncnn_model").mkdir()
    named = prepare.by_name([model(folder, "a.onnx"), folder / "a_ncnn_model"], None, load_device("cpu"))
    assert named == {"a": {"onnxruntime": folder / "a.onnx", "ncnn": folder / "a_ncnn_model"}}


def test_real_models_on_every_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from compress.checkpoint import build_model, save_model
    from export.ncnn import export_ncnn
    from export.onnx import export_onnx

    save_model(build_model("yolov8n.yaml", nc=3), tmp_path / "tiny.pt", {})
    folder = export_ncnn(tmp_path / "tiny.pt", tmp_path / "tiny_ncnn_model", imgsz=64)
    files = {
        "torch": tmp_path / "tiny.pt",
        "onnxruntime": export_onnx(tmp_path / "tiny.pt", tmp_path / "tiny.onnx", imgsz=64),
        "ncnn": folder,
    }
    monkeypatch.setitem(turns.MODES, "quick", turns.Mode(10, 0.05, 0.01, "for a test"))
    record = latency.measure({"tiny": files}, imgsz=64, threads=1, mode="quick")
    for cell in record["cells"]:
        assert cell["output_shapes"] == [[1, 7, 84]]  # 4 sides + 3 classes; 8² + 4² + 2² anchors
        assert cell["runtime_version"]
        assert cell["precision"] == "fp32"
    assert [cell["precision_executed"] for cell in record["cells"]] == [None, None, "fp32"]
    assert record["cells"][2]["model_sha256"] == runtimes.sha256(folder)
