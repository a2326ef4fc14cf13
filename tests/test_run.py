"""The whole pipeline on a tiny data set, as a user runs it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from benchmark import store
from compress import manifest, run
from compress.checkpoint import build_model, load_model, plans_of, save_model
from compress.errors import BenchmarkError, run_app
from compress.pruning.plan import parse_plan
from compress.settings import Run

ROOT = Path(__file__).parents[1]
STAGES = ["01_train", "02_sparsify", "03_prune", "04_finetune", "05_export", "06_benchmark"]
MODEL = """\
nc: 6
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, C2f, [16, True]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [24, 3, 2]]
  - [-1, 1, Conv, [24, 3, 2]]
head:
  - [[3, 4, 5], 1, Detect, [nc]]
"""
# The command as it is, with a benchmark of half a second in place of one for people.
PIPELINE = """
import runpy, sys
from benchmark import latency, turns
latency.noise = lambda *_: []  # whatever else runs meanwhile
turns.MODES["quick"] = turns.Mode(20, 0.2, 0.05, "for tests")
turns.WARM_UP_CAP_S = 0.3
sys.argv[0] = "compress.run"
runpy.run_module("compress.run", run_name="__main__")
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """A folder to work in: a model, and a pipeline of one epoch a stage."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "narrow.yaml").write_text(MODEL)
    training = {"epochs": 1, "batch": 8, "args": {"nbs": 8, "warmup_epochs": 0.0}}
    config = {
        "name": "tiny",
        "model": "narrow.yaml",
        "data": str(tiny_data),
        "imgsz": 64,
        "workers": 0,
        "train": training,
        "sparsify": {**training, "sr": 0.01},
        "prune": {"macs": 0.6, "budget": {"multiple_of": 4, "min_width": 4}},
        "finetune": training,
        "export": {"parity_images": 4},
        "benchmark": {"split": "test"},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="module")
def finished(home: Path) -> subprocess.CompletedProcess[str]:
    """The pipeline, run once."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-c", PIPELINE, "--config", "tiny.yaml", "seed=3"],
        cwd=home,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def start(monkeypatch, capfd) -> Callable[..., tuple[int, str, str]]:
    """Run the command in this process; return exit code, standard output and standard error."""

    def command(folder: Path, *words: str) -> tuple[int, str, str]:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["compress.run", "--config", "tiny.yaml", *words])
        code = 0
        capfd.readouterr()
        try:
            run_app(run.app)
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capfd.readouterr()

    return command


@pytest.fixture
def place(home: Path, tmp_path: Path) -> Path:
    """A folder with the same model and pipeline, in which nothing has run."""
    for name in ("narrow.yaml", "tiny.yaml"):
        (tmp_path / name).write_text((home / name).read_text())
    return tmp_path


def test_the_pipeline_runs_to_its_end(finished: subprocess.CompletedProcess[str], home: Path) -> None:
    assert finished.returncode == 0, finished.stderr
    assert [stage for stage in STAGES if (home / "runs" / "tiny" / stage / manifest.MANIFEST).exists()] == STAGES
    for line in (
        r"train: begins in runs/tiny/01_train \(1 epochs\)",
        r"train: runs/tiny/01_train/model\.pt \(1 epochs, val mAP50-95 0\.\d{3}\)",
        r"sparsify: runs/tiny/02_sparsify/model\.pt \(1 epochs, .*\)",
        r"prune: runs/tiny/03_prune/model\.pt \(\d\d\.\d% of the MACs kept, oracle error .*\)",
        r"finetune: runs/tiny/04_finetune/model\.pt \(1 epochs, .*\)",
        r"export: runs/tiny/05_export/dense\.onnx \(4 images: .*\)",
        r"export: runs/tiny/05_export/pruned\.onnx \(4 images: .*\)",
        r"pruned, for torch: runs/tiny/04_finetune/model\.pt",
        r"pruned, for onnxruntime: runs/tiny/05_export/pruned\.onnx",
        r"report: runs/tiny/report\.html",
    ):
        assert len(re.findall(f"(?m)^{line}$", finished.stdout)) == 1, line
    table = finished.stdout.rpartition("export: ")[2]
    assert [
        row for row in ("mAP50-95", "parameters", "MACs", "onnxruntime p50, ms", "realised") if row not in table
    ] == []


def test_the_summary_is_what_other_tools_may_rely_on(finished, home: Path) -> None:
    folder = home / "runs" / "tiny"
    summary = json.loads((folder / "summary.json").read_text())
    promised = {"dense", "pruned", "macs_speedup", "speedup", "realised", "parity"}
    ours = {"name", "imgsz", "data", "split", "speedup_interval", "oracle_error", "commands"}
    assert set(summary) == promised | ours
    runtimes = {"torch", "onnxruntime"}
    for name in ("dense", "pruned"):
        side = summary[name]
        promised = {"map50_95", "map50", "params", "macs", "file_bytes", "latency_ms"}
        assert set(side) == promised | {"map50_95_onnx", "epochs"}
        assert 0.0 <= side["map50_95"] <= side["map50"] <= 1.0
        assert side["file_bytes"] == (folder / "05_export" / f"{name}.onnx").stat().st_size
        assert set(side["latency_ms"]) == runtimes
        for latency in side["latency_ms"].values():
            assert set(latency) == {"p50", "p90"}
            assert 0.0 < latency["p50"] <= latency["p90"]
        stage = {"dense": "01_train", "pruned": "04_finetune"}[name]
        assert side["params"] == sum(p.numel() for p in load_model(folder / stage / "model.pt").parameters())
    assert (summary["dense"]["epochs"], summary["pruned"]["epochs"]) == (1, 3)
    assert 0.5 < summary["pruned"]["macs"] / summary["dense"]["macs"] <= 0.6
    assert summary["macs_speedup"] == pytest.approx(summary["dense"]["macs"] / summary["pruned"]["macs"])
    assert set(summary["speedup"]) == set(summary["realised"]) == runtimes
    for runtime in runtimes:
        assert summary["speedup"][runtime] > 0
        assert summary["realised"][runtime] == pytest.approx(summary["speedup"][runtime] / summary["macs_speedup"])
    assert {name: record["passed"] for name, record in summary["parity"].items()} == {"dense": True, "pruned": True}
    assert summary["oracle_error"] <= 1e-4
    assert (summary["name"], summary["imgsz"], summary["split"]) == ("tiny", 64, "test")
    assert summary["commands"] == ["python -m compress.run --config tiny.yaml seed=3"]


def test_the_run_record_tells_what_ran(finished, home: Path) -> None:
    record = json.loads((home / "runs" / "tiny" / "run.json").read_text())
    assert (record["schema"], record["status"]) == (1, "finished")
    assert record["command"] == "python -m compress.run --config tiny.yaml seed=3"
    assert (record["config"]["seed"], record["config"]["train"]["epochs"]) == (3, 1)
    assert record["tools"]["ultralytics"] == "8.4.190"


def test_the_report_shows_the_numbers(finished, home: Path) -> None:
    folder = home / "runs" / "tiny"
    summary = json.loads((folder / "summary.json").read_text())
    for name in ("report.md", "report.html"):
        assert f"{summary['macs_speedup']:.2f}" in (folder / name).read_text(), name


def test_the_store_knows_what_was_measured(finished, home: Path) -> None:
    rows = store.find(model="tiny/")
    assert sorted({(row.kind, row.model, row.runtime) for row in rows}) == [
        (kind, f"tiny/{model}", runtime)
        for kind in ("accuracy", "latency")
        for model in ("dense", "pruned")
        for runtime in ("onnxruntime", "torch")
    ]
    for row in rows:
        assert {other.kind for other in rows if other.model_sha256 == row.model_sha256} == {"accuracy", "latency"}
    assert {(row.data, row.split, row.imgsz) for row in rows if row.kind == "accuracy"} == {("shapes.yaml", "test", 64)}


def test_the_pruned_model_carries_its_plan_to_the_end(finished, home: Path) -> None:
    folder = home / "runs" / "tiny"
    plan = json.loads((folder / "03_prune" / "plan.json").read_text())
    assert plans_of(load_model(folder / "04_finetune" / "model.pt")) == [plan]
    assert [mask.sum() % 4 for mask in parse_plan(plan, "plan.json").masks()] == [0] * len(plan["groups"])


def test_a_second_start_finds_everything_finished(finished, home: Path, start) -> None:
    folder = home / "runs" / "tiny"
    before = {path: path.stat().st_mtime_ns for stage in STAGES for path in (folder / stage).rglob("*")}
    summary, report = (folder / "summary.json").read_bytes(), (folder / "report.md").read_bytes()
    for name in ("summary.json", "report.md"):  # made of the stages' records
        (folder / name).unlink()
    code, out, err = start(home, "seed=3")
    assert (code, err) == (0, "")
    found = re.findall(r"(?m)^(\w+): finished before, unchanged: runs/tiny/(\w+)", out)
    assert found == [(stage.partition("_")[2], stage) for stage in STAGES]
    after = {path: path.stat().st_mtime_ns for stage in STAGES for path in (folder / stage).rglob("*")}
    assert after == before
    assert (folder / "summary.json").read_bytes() == summary
    assert (folder / "report.md").read_bytes() == report
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == STAGES  # nothing moved aside


def put_latency(folder: Path, latency: dict[str, Any]) -> None:
    """Write the latency of a finished benchmark, as if it had been measured so."""
    (folder / "latency.json").write_text(json.dumps(latency))
    record = json.loads((folder / manifest.MANIFEST).read_text())
    record["files"]["latency.json"] = manifest.sha256_file(folder / "latency.json")
    (folder / manifest.MANIFEST).write_text(json.dumps(record))


def test_a_latency_of_another_machine_is_measured_again(finished, home: Path, start, monkeypatch) -> None:
    folder = home / "runs" / "tiny" / "06_benchmark"
    here = json.loads((folder / "latency.json").read_text())
    put_latency(folder, {**here, "device": {**here["device"], "cpu": "another"}})
    monkeypatch.setattr("benchmark.latency.measure", lambda *_, **__: here)
    code, out, err = start(home, "seed=3")
    assert (code, err) == (0, "")
    assert f"latency of before was measured on another, this is {here['device']['cpu']}, it is measured" in out
    assert json.loads((folder / "latency.json").read_text()) == here


def test_a_noisy_latency_is_measured_again_and_nothing_else(finished, home: Path, start, monkeypatch) -> None:
    folder = home / "runs" / "tiny" / "06_benchmark"
    quiet, scored = json.loads((folder / "latency.json").read_text()), (folder / "accuracy.json").stat().st_mtime_ns
    noisy = {**quiet, "noisy": True, "noise": ["a compiler ran"]}
    put_latency(folder, noisy)

    monkeypatch.setattr("benchmark.latency.measure", lambda *_, **__: noisy)
    code, out, err = start(home, "seed=3")
    assert (code, err) == (0, "")
    assert "benchmark: the latency of before is noisy, it is measured again: runs/tiny/06_benchmark\n" in out
    remark = "the measurement is noisy (a compiler ran): end what else runs there, and run the same command again"
    lines = out.splitlines()
    assert (lines[-4], lines[-1]) == (remark, "report: runs/tiny/report.html")

    monkeypatch.setattr("benchmark.latency.measure", lambda *_, **__: quiet)
    out = start(home, "seed=3")[1]
    assert "it is measured again" in out
    assert "the measurement is noisy" not in out
    assert "benchmark: finished before, unchanged" in start(home, "seed=3")[1]
    assert json.loads((folder / "latency.json").read_text()) == quiet
    assert (folder / "accuracy.json").stat().st_mtime_ns == scored
    assert not folder.with_name("06_benchmark.1").exists()


def test_a_dry_run_prints_the_plan_and_writes_nothing(place: Path, start, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    before = sorted(place.rglob("*"))
    code, out, err = start(place, "--dry-run")
    assert (code, err) == (0, "")
    assert "plan: macs 0.6" in out
    assert [word for word in ("group", "width", "kept", "multiple of", "why") if word not in out] == []
    assert "model.0.conv" in out
    assert "frozen: output of the model" in out
    (share,) = re.findall(r"(?m)^ +macs: [\d,]+ → [\d,]+ \((\d+\.\d)% kept\)$", out)
    assert 50.0 < float(share) <= 60.0
    assert sorted(place.rglob("*")) == before


def test_a_dry_run_of_rounds_goes_through_them(place: Path, start) -> None:
    code, out, _ = start(place, "--dry-run", "iterations=3")
    assert (code, "comes down to this in 3 rounds of equal ratios" in out) == (0, True)


def test_a_dry_run_of_a_model_that_does_not_know_the_classes_yet(place: Path, start, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    code, out, err = start(place, "--dry-run", "prune.importance=taylor", "model=yolov8n.yaml")
    assert (code, err) == (0, "")
    assert "does not know these classes yet: this plan goes by bn" in out
    assert "plan: macs 0.6" in out


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("data=none.yaml", "none.yaml does not exist"),
        ("imgsz=80", "imgsz 80 must be a multiple of the model's stride 32: use 64"),
    ],
)
def test_a_dry_run_meets_the_mistakes_of_the_run(place: Path, start, word: str, message: str) -> None:
    code, _, err = start(place, "--dry-run", word)
    assert (code, err.count("\n")) == (2, 1)
    assert message in err


# Mistakes.


class Call:
    """What pickle turns into a call when it opens the file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch ran",)


def no_weights(place: Path) -> list[str]:
    return ["--model", "none.pt"]


def corrupt_weights(place: Path) -> list[str]:
    save_model(build_model(str(place / "narrow.yaml")), place / "corrupt.pt", {})
    (place / "corrupt.pt").write_bytes((place / "corrupt.pt").read_bytes()[:20_000])
    return ["--model", "corrupt.pt"]


def evil_weights(place: Path) -> list[str]:
    torch.save({"model": Call()}, place / "evil.pt")
    return ["--model", "evil.pt"]


def no_images(place: Path) -> list[str]:
    (place / "images").mkdir()
    (place / "data.yaml").write_text("train: images\nval: images\nnames: [a]\n")
    return ["--data", "data.yaml"]


def no_test_split(place: Path) -> list[str]:
    source = Path(yaml.safe_load((place / "tiny.yaml").read_text())["data"])
    content = yaml.safe_load(source.read_text())
    root = (source.parent / content.get("path", ".")).resolve()
    (place / "data.yaml").write_text(yaml.safe_dump({**content, "path": str(root), "test": None}))
    return ["--data", "data.yaml"]


def another_version(place: Path) -> list[str]:
    (place / "runs" / "tiny").mkdir(parents=True)
    (place / "runs" / "tiny" / "run.json").write_text('{"schema": 2, "status": "finished"}')
    return []


def another_stage_version(place: Path) -> list[str]:
    (place / "runs" / "tiny" / "01_train").mkdir(parents=True)
    (place / "runs" / "tiny" / "01_train" / "manifest.json").write_text('{"schema": 2}')
    return []


def foreign_folder(place: Path) -> list[str]:
    (place / "runs" / "tiny" / "01_train").mkdir(parents=True)
    (place / "runs" / "tiny" / "01_train" / "thesis.tex").write_text("mine")
    return []


def words(*given: str) -> Callable[[Path], list[str]]:
    return lambda _: list(given)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (no_weights, "none.pt does not exist: check the path"),
        (corrupt_weights, "corrupt.pt cannot be opened: it is damaged"),
        (evil_weights, f"evil.pt is not a plain model: opening it would import {os.name}.system; refused"),
        (no_images, "data.yaml: 'train' holds no images"),
        (no_test_split, "data.yaml has no 'test' split: add the folder of its images"),
        (another_version, "runs/tiny/run.json has schema 2, this version reads schema 1: choose another folder"),
        (another_stage_version, "runs/tiny/01_train/manifest.json has schema 2, this version reads schema 1"),
        (foreign_folder, "runs/tiny/01_train is not empty and holds no stage of Espalier"),
        (words("--model", "none.yaml"), "none.yaml does not describe a model"),
        (words("--model", "none"), "none is not a model: give a .pt checkpoint or a .yaml architecture"),
        (words("--data", "none.yaml"), "none.yaml does not exist"),
        (words("--config", "none.yaml"), "none.yaml does not exist: check the path"),
        (
            words("prune.ratio=0.5", "train.epoch=3"),
            "unknown key 'train.epoch', did you mean 'epochs'?; unknown key 'prune.ratio'",
        ),
        (words("prune.macs=null", "prune.percent=1.5"), "prune.percent: Input should be less than 1 (got 1.5)"),
        (
            words("prune.percent=0.5"),
            "exactly one of percent, macs, params, latency, speedup, keep_importance is needed, got percent, macs",
        ),
        (words("prune.macs=0.01"), "the budget cannot bring macs down to 1.0%"),
        (words("prune.macs=null", "prune.percent=0.99"), "the budget cannot remove 99% of the channels: at most"),
        (words("imgsz=80"), "imgsz 80 must be a multiple of the model's stride 32: use 64"),
        (words("sparsify.args.single_cls=true"), "sparsify: single_cls makes one class of all"),
        (words("finetune.lr0=2.0"), "finetune: 'lr0=2.0' is an invalid value"),
        (words("sparsify.optimizer=Sdg"), "sparsify: no optimizer 'Sdg': choose one of auto, SGD,"),
        (words("finetune.args.nosuch=1"), "finetune: 'nosuch' is not an argument of Ultralytics' training"),
        (words("device=64"), "device=64: torch sees "),
        (words("name=../up"), "name: String should match pattern"),
    ],
)
def test_a_mistake_is_one_line_and_loses_nothing(
    place: Path, start, prepare: Callable[[Path], list[str]], message: str
) -> None:
    options = prepare(place)
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    code, _, err = start(place, *options)
    assert code == 2
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    after = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    assert before.items() <= after.items()
    written = {path.relative_to(place).as_posix() for path in after.keys() - before.keys()}
    assert not [name for name in written if name.endswith(("manifest.json", ".pt", "ran"))]
    if "runs/tiny/run.json" in written:  # only where a stage itself met the mistake
        assert "01_train" in message


def test_a_model_of_other_classes_is_checked_as_it_will_be(place: Path, start) -> None:
    """Its head changes with the classes; the budget is checked for the model that training will make."""
    save_model(build_model(str(place / "narrow.yaml"), nc=80), place / "coco.pt", {})
    code, _, err = start(place, "--model", "coco.pt", "prune.macs=0.02")
    assert code == 2
    assert "the budget cannot bring macs down to 2.0%" in err


def test_a_model_of_other_names_is_refused_before_it_is_pressed(place: Path, start) -> None:
    """It is taken as it is, and could not be the teacher of what the data set's names were given in a training."""
    model: Any = build_model(str(place / "narrow.yaml"))
    model.names = dict(enumerate(["Ring", "triangle", "star", "cross", "gear", "key"]))
    save_model(model, place / "own.pt", {"imgsz": 64})
    code, out, err = start(place, "--model", "own.pt", "train.epochs=0")
    assert (code, err.count("\n")) == (2, 1)
    assert "own.pt, the teacher, knows 6 classes (Ring, triangle, star, …), " in err
    assert "shapes.yaml has 6 classes (ring, triangle, star, …): give the data set its names in their order" in err
    assert "sparsify" not in out


def test_a_run_in_use_is_refused(place: Path, start) -> None:
    with manifest.lock(place / "runs" / "tiny"):
        code, _, err = start(place)
    assert code == 2
    assert err == f"error: {place}/runs/tiny is in use by another process: wait for it, or choose another name\n"


def test_a_full_disk_is_one_line(place: Path, start, monkeypatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    code, _, err = start(place)
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("error: No space left on device: free some space")
    assert list((place / "runs" / "tiny").iterdir()) == []


def test_paths_may_look_like_yaml(place: Path, start) -> None:
    code, _, err = start(place, "--model", "a: #1.pt")
    assert (code, err) == (2, "error: a: #1.pt does not exist: check the path\n")


def test_scores_outlive_a_measurement_that_fails(tiny_data: Path, tmp_path: Path, monkeypatch) -> None:
    scored: list[Path] = []

    def evaluate(path: Path, *_: Any, **__: Any) -> dict[str, float]:
        scored.append(path)
        return {"map50_95": 0.5}

    def measure(*_: Any, **__: Any) -> None:
        raise BenchmarkError("dense on onnxruntime crashed")

    monkeypatch.setattr("benchmark.accuracy.evaluate", evaluate)
    monkeypatch.setattr("benchmark.latency.measure", measure)
    training = {"epochs": 0}
    content = {"name": "n", "model": "m.pt", "data": "d.yaml", "prune": {"macs": 0.5}}
    settings = Run.model_validate(content | dict.fromkeys(("train", "sparsify", "finetune"), training))
    models = {"dense": tmp_path / "dense.pt", "pruned": tmp_path / "pruned.pt"}
    (tmp_path / "05_export").mkdir()
    for name, path in models.items():
        path.write_text(name)
        (tmp_path / "05_export" / f"{name}.onnx").write_text(name)
    for _ in range(2):
        with pytest.raises(BenchmarkError, match="crashed"):
            run.benchmark(models, {}, tiny_data, settings, "the command", tmp_path)
    assert len(scored) == 4
