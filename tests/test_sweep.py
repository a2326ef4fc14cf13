"""A whole sweep on a tiny data set: what is shared, what is given up, what fails, and what a second start does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmark import turns
from compress import run, sweep
from compress.errors import ExportError, RunError, SettingsError
from compress.manifest import sha256_file
from compress.sweeps import jobs as sweep_jobs
from compress.sweeps.plan import expand, load_sweep
from compress.training import mean_ap

SCORES = {"macs-0.8": 0.3, "macs-0.6": 0.6, "macs-0.5": 0.1}


@pytest.fixture
def checked() -> list[str]:
    """The names of pipelines whose settings were checked."""
    return []


@pytest.fixture
def home(tmp_path: Path, tiny_data: Path, architectures: dict[str, Any], checked: list[str], monkeypatch) -> Path:
    """A sweep of three targets. The middle one is far better after its cut than the one of more MACs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(turns.MODES, "quick", turns.Mode(20, 0.2, 0.05, "for tests"))
    monkeypatch.setattr(turns, "WARM_UP_CAP_S", 0.3)
    model = {"nc": 6, "backbone": architectures["obb"]["backbone"], "head": [[[3, 4, 5], 1, "Detect", ["nc"]]]}
    training = {"epochs": 0}
    pipeline = {
        "name": "tiny",
        "model": "narrow.yaml",
        "data": str(tiny_data),
        "imgsz": 64,
        "workers": 0,
        "train": training,
        "sparsify": training,
        "prune": {"percent": 0.3, "budget": {"multiple_of": 4, "min_width": 4}},
        "finetune": training,
        "export": {"parity_images": 2},
        "benchmark": {"runtimes": ["onnxruntime"]},
    }
    many = {"name": "many", "pipeline": "tiny.yaml", "targets": ["macs=0.8", "macs=0.6", "macs=0.5"]}
    for name, content in {"narrow": model, "tiny": pipeline, "many": many}.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))

    def scores(*_: Any) -> Any:
        current = next(name for name in SCORES if not (tmp_path / "runs/many" / name / sweep_jobs.CUT).exists())
        return lambda _: SCORES[current]

    monkeypatch.setattr(mean_ap, "scorer", scores)
    monkeypatch.setattr("benchmark.latency.noise", lambda *_: [])  # whatever else runs meanwhile
    monkeypatch.setattr(run, "check", lambda settings, _: checked.append(settings.name))
    return tmp_path


def start(**changes: Any) -> list[dict[str, Any]]:
    settings = load_sweep(Path("many.yaml")).model_copy(update=changes)
    return sweep.sweep(settings, expand(settings), "the command")


def test_a_sweep_shares_gives_up_survives_and_resumes(home: Path, checked: list[str], monkeypatch, capfd) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    whole = run.export

    def broken(models: Any, data: Any, settings: Any, folder: Path) -> Any:
        if settings.name == "macs-0.5":
            raise ExportError("no room")
        return whole(models, data, settings, folder)

    monkeypatch.setattr(run, "export", broken)
    with pytest.raises(RunError, match=r"1 of 3 pipelines failed, the first is macs-0\.5: no room; run the same"):
        start()
    folder, out = home / "runs" / "many", capfd.readouterr().out
    assert checked[:3] == list(SCORES)  # all of them before the first training
    # One training of each kind for three pipelines.
    assert sorted(path.name.partition("-")[0] for path in (folder / "shared").iterdir()) == ["sparsify", "train"]
    assert (out.count("train: runs/many/shared/"), out.count("finetune: runs/many/")) == (1, 2)
    assert (folder / "macs-0.6/01_train/model.pt").samefile(folder / "macs-0.5/01_train/model.pt")
    record = json.loads((folder / "sweep.json").read_text())
    rows = {row["name"]: row for row in record["pipelines"]}
    assert {name: row["cut"]["map50_95"] for name, row in rows.items()} == SCORES
    assert rows["macs-0.8"]["given_up"] == "macs-0.6"
    assert [name for name, row in rows.items() if "summary" in row] == ["macs-0.6"]
    assert (rows["macs-0.6"]["front"], rows["macs-0.5"]["error"], record["status"]) == (True, "no room", "finished")
    assert (folder / "report" / "report.html").exists()
    table = out.rpartition("the sweep;")[2]
    assert [word for word in ("given up: macs-0.6", "failed", "0.6000") if word not in table] == []

    # What failed goes on where it stopped; the benchmark of the other stands in for its own.
    summary, benchmark = rows["macs-0.6"]["summary"], run.benchmark

    def known(models: Any, parity: Any, data: Any, settings: Any, *rest: Any) -> dict[str, Any]:
        return summary if settings.name == "macs-0.5" else benchmark(models, parity, data, settings, *rest)

    monkeypatch.setattr(run, "benchmark", known)
    monkeypatch.setattr(run, "export", whole)
    found = {row["name"]: row for row in start()}
    out = capfd.readouterr().out
    assert out.count("finished before, unchanged: runs/many/shared/") == 2
    assert [out.count(f"{stage}: finished before, unchanged") for stage in ("prune", "finetune")] == [3 + 2, 2]
    assert out.count("benchmark: finished before, unchanged") == 1
    assert (found["macs-0.5"].get("error"), found["macs-0.5"]["summary"]) == (None, summary)

    # Both and their one dense model are measured in turns, and the front is that of these latencies.
    assert out.count("sweep: 3 models are measured in turns: runs/many/latency/quick-1t") == 1
    measured = json.loads((folder / "latency" / "quick-1t" / "latency.json").read_text())
    p50 = {cell["model"]: cell["p50_ms"] for cell in measured["cells"]}
    dense = next(name for name in p50 if name.startswith("train-"))
    rows = {row["name"]: row for row in json.loads((folder / "sweep.json").read_text())["pipelines"]}
    for name in ("macs-0.6", "macs-0.5"):
        assert rows[name]["together"] == {"dense": {"onnxruntime": p50[dense]}, "pruned": {"onnxruntime": p50[name]}}
        assert f"{p50[name]:.2f}" in out.rpartition("the sweep;")[2]
    start()
    assert "measured in turns" not in capfd.readouterr().out
    manifest, place = json.loads((folder / "latency/quick-1t/manifest.json").read_text()), folder / "latency/quick-1t"
    (place / "latency.json").write_text(json.dumps({**measured, "noisy": True}))
    manifest["files"] = {"latency.json": sha256_file(place / "latency.json")}
    (place / "manifest.json").write_text(json.dumps(manifest))
    start()
    out = capfd.readouterr().out
    assert "are measured in turns, as the measurement of before is noisy: runs/many/latency/quick-1t" in out
    assert ("held other work" in out, [path.name for path in place.parent.iterdir()]) == (False, ["quick-1t"])
    assert json.loads((place / "latency.json").read_text())["noisy"] is False
    monkeypatch.setattr(sweep, "measure_together", lambda *_: pytest.fail("it was switched off"))
    start(together=False)


def test_a_sweep_of_classifiers_is_refused_before_anything_is_trained(home: Path, tiny_data: Path) -> None:
    picture = next((tiny_data.parent / "images" / "train").iterdir())
    for split in ("train", "val"):
        (home / "classes" / split / "one").mkdir(parents=True)
        shutil.copy(picture, home / "classes" / split / "one")
    settings = load_sweep(Path("many.yaml"))
    pipelines = expand(settings, texts={"data": str(home / "classes")})
    with pytest.raises(SettingsError, match=r"macs-0\.8 classifies, and a sweep compares the mAP of detectors"):
        sweep.sweep(settings, pipelines, "the command")
    assert not (home / "runs" / "many").exists()
