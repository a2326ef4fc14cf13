"""Which pipelines a sweep is made of, and which are given up."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from compress import sweep
from compress.errors import DataError, SettingsError, run_app
from compress.settings import Prune
from compress.sweeps import spread
from compress.sweeps.jobs import Job, costs_of, link_stage
from compress.sweeps.plan import Cut, Sweep, expand, hopeless, load_sweep, on_front

PLACE = "ms on cpu in ncnn, threads: 1"
PIPELINE = {
    "name": "one",
    "model": "models/narrow.yaml",
    "data": "shapes",
    "train": {"epochs": 3},
    "sparsify": {"epochs": 2},
    "prune": {"percent": 0.3},
    "finetune": {"epochs": 1},
}


SENSITIVE = "prune.sensitivity=sens.json"


@pytest.fixture
def make(tmp_path: Path, monkeypatch) -> Any:
    """Make a sweep of a pipeline that removes 30 % of the channels."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(PIPELINE))

    def load(**content: Any) -> Sweep:
        (tmp_path / "many.yaml").write_text(yaml.safe_dump({"name": "many", "pipeline": "one.yaml", **content}))
        return load_sweep(Path("many.yaml"))

    return load


def test_every_target_meets_every_point_of_the_grid(make) -> None:
    settings = make(targets=["macs=0.5", "speedup=2x"], grid={"imgsz": [64, 96], "prune.importance": ["l1"]})
    found = expand(settings, ["finetune.epochs=7"])
    assert [(p.name, p.prune.macs, p.prune.speedup, p.imgsz, p.prune.importance) for p in found] == [
        ("macs-0.5_imgsz-64_importance-l1", 0.5, None, 64, "l1"),
        ("macs-0.5_imgsz-96_importance-l1", 0.5, None, 96, "l1"),
        ("speedup-2x_imgsz-64_importance-l1", None, 2.0, 64, "l1"),
        ("speedup-2x_imgsz-96_importance-l1", None, 2.0, 96, "l1"),
    ]
    assert {(p.prune.percent, p.finetune.epochs, p.train.epochs) for p in found} == {(None, 7, 3)}


def test_a_target_of_macs_takes_the_place_of_a_latency_on_a_device(make) -> None:
    settings = make(targets=["macs=0.5", "speedup=2x"])
    own = ["prune.percent=null", "prune.speedup=3x", "prune.device=rpi5", "prune.memory=8MB"]
    found = [(p.prune.macs, p.prune.speedup, p.prune.device, p.prune.memory) for p in expand(settings, own)]
    assert found == [(0.5, None, "cpu", None), (None, 2.0, "rpi5", "8MB")]


def test_without_targets_the_pipeline_keeps_its_own(make) -> None:
    found = expand(make(grid={"model": ["../w/yolov8n.pt", "yolov8s.pt"]}))
    assert [(p.name, p.model, p.prune.percent) for p in found] == [
        ("model-yolov8n", "../w/yolov8n.pt", 0.3),
        ("model-yolov8s", "yolov8s.pt", 0.3),
    ]


def test_files_of_one_name_are_told_apart_by_their_folders(make) -> None:
    """Every checkpoint of Espalier is called model.pt."""
    found = expand(make(grid={"model": ["runs/a/train/model.pt", "../b/model.pt"], "imgsz": [64]}))
    assert [(p.name, p.model) for p in found] == [
        ("imgsz-64_model-runs-a-train-model", "runs/a/train/model.pt"),
        ("imgsz-64_model-..-b-model", "../b/model.pt"),
    ]


def test_a_limit_draws_some_of_the_grid_in_their_order(make) -> None:
    grid = {"seed": list(range(10))}
    names = [p.seed for p in expand(make(grid=grid, limit=4, seed=1))]
    assert (len(set(names)), names) == (4, sorted(names))
    assert names != [p.seed for p in expand(make(grid=grid, limit=4, seed=2))]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"targets": ["half"]},
            "target 'half' must be one of percent, macs, params, latency, speedup, keep_importance and an amount",
        ),
        ({"grid": {"imgsz": []}}, "a setting of the grid has no values"),
        ({"grid": {"imgsz": [64, 64]}}, "two pipelines would be called imgsz-64"),
        ({"grid": {"prune.importanse": ["l1"]}}, "unknown key 'prune.importanse', did you mean 'importance'"),
        ({"grid": {"iterations": [1, 3]}}, "sweep many: iterations-3 prunes in 3 rounds, a sweep compares single cuts"),
        ({"grid": {"target": ["macs=0.5"]}}, "'target' is no setting of a pipeline: write targets:"),
        (
            {"grid": {"data": ["a/data.yaml", "b.yaml"]}},
            "its pipelines have several data sets, whose mAP do not compare",
        ),
        ({"gird": {}}, "unknown key 'gird', did you mean 'grid'"),
    ],
)
def test_a_mistake_is_named(make, content: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        expand(make(**content))


def test_only_what_is_dominated_by_far_is_given_up() -> None:
    known = {"good": (50, 0.6), "near": (50, 0.45), "far": (60, 0.3), "small": (20, 0.1)}
    cuts = [Cut(name, score, "MACs", {"MACs": macs}) for name, (macs, score) in known.items()]
    assert hopeless(cuts, 0.2) == {"far": "good"}
    assert hopeless(cuts, None) == {}


def test_a_cut_is_judged_by_what_its_target_limits() -> None:
    fast = Cut("fast", 0.3, "ms", {"MACs": 60, "ms": 5.0})  # more MACs than the others, and less time
    slow = Cut("slow", 0.6, "ms", {"MACs": 50, "ms": 6.0})
    lean = Cut("lean", 0.7, "MACs", {"MACs": 40})  # its latency is not known
    assert hopeless([fast, slow, lean], 0.2) == {}
    faster = Cut("faster", 0.5, "ms", {"MACs": 70, "ms": 4.0})
    assert hopeless([fast, slow, lean, faster], 0.2) == {"fast": "faster"}


@pytest.mark.parametrize(
    ("target", "kind", "costs"),
    [
        ({"macs": 0.5}, "MACs", {"MACs": 50, "parameters": 5}),
        ({"percent": 0.5}, "MACs", {"MACs": 50, "parameters": 5}),
        ({"params": 0.5}, "parameters", {"MACs": 50, "parameters": 5}),
        ({"speedup": 2.0, "runtime": "ncnn"}, PLACE, {"MACs": 50, "parameters": 5, PLACE: 6.1}),
    ],
)
def test_what_a_cut_costs(target: dict[str, Any], kind: str, costs: dict[str, float]) -> None:
    rounds = [{"measured": 7.5, "used": False}, {"measured": 6.1, "used": True}]
    latency = {"unit": "ms", "predicted": 6.0, "measured": rounds}
    metrics = {"macs": [100, 50], "params": [10, 5], **({"latency": latency} if "speedup" in target else {})}
    assert costs_of(Prune(**target), metrics) == (kind, costs)


def test_the_front_holds_what_no_other_beats() -> None:
    assert on_front({"a": (2.0, 0.5), "b": (2.0, 0.4), "c": (1.0, 0.3), "d": (3.0, 0.5), "e": (2.0, 0.5)}) == set("ace")


def test_the_front_is_of_latencies_that_were_measured_together() -> None:
    def row(name: str, own: float, together: float | None) -> dict[str, Any]:
        latencies = {"together": {"pruned": {"torch": 1.0, "ncnn": together}}} if together else {}
        side = {"map50_95": 0.5, "latency_ms": {"torch": {"p50": 1.0}, "ncnn": {"p50": own}}}
        return {"name": name, "summary": {"pruned": side}, **latencies}

    rows = [row("a", 2.0, 4.0), row("b", 3.0, 3.5)]
    sweep._mark_front(rows)
    assert [found["front"] for found in rows] == [False, True]
    rows = [row("a", 2.0, None), row("b", 3.0, None)]
    sweep._mark_front(rows)
    assert [found["front"] for found in rows] == [True, False]


def test_equal_trainings_share_a_folder_and_others_do_not(make) -> None:
    settings = make(targets=["macs=0.5", "macs=0.3"], grid={"sparsify.fade": [False, True], "imgsz": [64, 96]})
    jobs = [Job(p, Path("runs/many"), "") for p in expand(settings)]
    assert len(jobs) == 8
    assert len({job.dense for job in jobs}) == 2  # one for each image size
    assert len({job.sparse for job in jobs}) == 2 + 4  # what fades depends on the target
    again = [job.settings.model_copy(update={"prune": repaired(job.settings.prune)}) for job in jobs]
    assert {Job(p, Path("runs/many"), "").sparse for p in again} == {job.sparse for job in jobs}


def test_a_sparsity_training_that_fades_depends_on_what_the_sensitivity_file_says(make, tmp_path: Path) -> None:
    (tmp_path / "sens.json").write_text("{}")
    for fade in (True, False):
        (job,) = [Job(p, Path("runs/many"), "") for p in expand(make(grid={"sparsify.fade": [fade]}), [SENSITIVE])]
        before = job.sparse
        (tmp_path / "sens.json").write_text('{"again": true}')
        assert (job.sparse != before) == fade
        (tmp_path / "sens.json").write_text("{}")


def test_a_model_of_the_command_line_does_not_silence_the_grid(make) -> None:
    with pytest.raises(SettingsError, match="sweep many: --model and the grid both name one: leave one of them out"):
        expand(make(grid={"model": ["n.pt", "s.pt"]}), [], {"model": "n.pt"})


def repaired(cut: Prune) -> Prune:
    return cut.model_copy(update={"reconstruct_images": 128})


def test_a_stage_is_linked_whole_and_what_was_there_is_kept(tmp_path: Path) -> None:
    from compress import manifest

    source, target = tmp_path / "shared", tmp_path / "run" / "01_train"
    manifest.begin(source, "train", {}, {})
    (source / "model.pt").write_bytes(b"weights")
    (source / "scratch").write_bytes(b"not listed")
    manifest.finish(source, "train", {}, {}, ["model.pt"], {})
    target.parent.mkdir()
    link_stage(source, target)
    assert sorted(path.name for path in target.iterdir()) == ["manifest.json", "model.pt"]
    assert manifest.is_finished(target, "train", {}, {})
    link_stage(source, target)
    assert [path.name for path in target.parent.iterdir()] == ["01_train"]
    (target / "manifest.json").unlink()
    link_stage(source, target)
    assert sorted(path.name for path in target.parent.iterdir()) == ["01_train", "01_train.1"]


@pytest.fixture
def jobs(make) -> list[Job]:
    """Two jobs; what they are is of no matter."""
    return [Job(p, Path("runs/many"), "") for p in expand(make(grid={"device": ["cpu", "0,1"]}))]


def work(job: Job) -> str:
    """Fail on a GPU."""
    if job.settings.device != "cpu":
        raise DataError("no such GPU")
    return str(Path.cwd())


def test_an_error_of_one_job_leaves_the_others(jobs: list[Job], tmp_path: Path) -> None:
    place, error = spread.here(work, jobs)
    assert place == str(tmp_path)
    assert isinstance(error, DataError)


class StandIn(SimpleNamespace):
    """As much of Ray as a sweep uses: three machines, one without CPUs."""

    def __init__(self) -> None:
        super().__init__(addresses=[], resources=[])

    def init(self, address: str, **_: Any) -> None:
        if address == "nowhere":
            raise ConnectionError("Could not find any running Ray instance.\nMore words.")
        self.addresses.append(address)

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": cpus}} for cpus in (16.0, 8.0, 0.0)]

    def remote(self, **resources: Any) -> Any:
        self.resources.append(resources)
        return lambda function: SimpleNamespace(remote=lambda *arguments: (function, arguments))

    def get(self, waiting: list[Any]) -> list[Any]:
        return [function(*arguments) for function, arguments in waiting]


def test_ray_does_the_same(jobs: list[Job], monkeypatch, tmp_path: Path) -> None:
    ray = StandIn()
    monkeypatch.setitem(sys.modules, "ray", ray)
    place, error = spread.on_ray("auto")(work, jobs)
    assert (place, ray.addresses) == (str(tmp_path), ["auto"])
    assert isinstance(error, DataError)
    assert [(r["num_cpus"], r["num_gpus"]) for r in ray.resources] == [(8, 0), (8, 2)]


def test_ray_that_is_missing_or_not_running_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SettingsError, match="--ray needs the package ray: pip install ray"):
        spread.on_ray("auto")
    monkeypatch.setitem(sys.modules, "ray", StandIn())
    with pytest.raises(
        SettingsError, match=r"no Ray cluster at 'nowhere' \(Could not find any running Ray instance\.\)"
    ):
        spread.on_ray("nowhere")


def test_a_dry_run_names_the_pipelines(make, monkeypatch, capsys) -> None:
    make(targets=["macs=0.5", "params=0.4"])
    monkeypatch.setattr(sys, "argv", ["compress.sweep", "--config", "many.yaml", "--dry-run"])
    with pytest.raises(SystemExit) as stop:
        run_app(sweep.app)
    assert (stop.value.code, capsys.readouterr().out) == (0, "macs-0.5\nparams-0.4\n")


def test_the_example_is_a_sweep(root: Path, monkeypatch) -> None:
    monkeypatch.chdir(root)
    assert len(expand(load_sweep(Path("configs/sweeps/bccd.yaml")))) == 8
