"""The four training stages on a tiny data set, as a user runs them."""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from ultralytics.nn.tasks import DetectionModel

from compress import checkpoint, finetune, prune, sensitivity, sparsify, train
from compress.checkpoint import load_model, plans_of, structure_hash
from compress.data.dataset import label_file
from compress.errors import CheckpointError, DataError, PlanError, SurgeryError, run_app
from compress.manifest import MANIFEST, is_finished, read_json, sha256_file
from compress.planning import plan_pruning
from compress.pruning.plan import load_plan
from compress.pruning.surgery import apply_plan
from compress.settings import Budget, Finetune, LayerRule, Prune, Sparsity, Training
from compress.train import Common

ROOT = Path(__file__).parents[2]
TRAILER = b"SEFT"
COMMON = Common(imgsz=64, workers=0)
ARGS = {"nbs": 8, "warmup_epochs": 0.0}
PRUNE = Prune(
    percent=0.4, budget=Budget(multiple_of=2, min_width=2, rules=(LayerRule(layers="model.0.*", freeze=True),))
)


class Armed:
    """A pickle that makes a folder when it is opened."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def command(app: typer.Typer, *words: object) -> int:
    """Run a stage's command in this process and return its exit code."""
    before = sys.argv
    sys.argv = ["stage", *map(str, words)]
    try:
        run_app(app)
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv = before
    return 0


def epochs_in(folder: Path) -> list[int]:
    with (folder / "training" / "results.csv").open() as stream:
        return [int(row["epoch"]) for row in csv.DictReader(stream)]


@pytest.fixture(scope="module")
def data(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny data set with label caches that would make the folder `opened`, and a `download:` for `downloaded`.

    An image of each split ends as those of many phones do, which Ultralytics would write anew.
    """
    folder = tmp_path_factory.mktemp("data")
    for kind in ("images", "labels"):
        shutil.copytree(tiny_data.parent / kind, folder / kind)
    for split in ("train", "val", "test"):
        with (folder / "images" / split / "000000.jpg").open("ab") as stream:
            stream.write(TRAILER)
    for split in ("train", "val", "test"):
        with (folder / "labels" / f"{split}.cache").open("wb") as stream:
            np.save(stream, np.array(Armed(folder / "opened"), dtype=object), allow_pickle=True)
    names = [line for line in tiny_data.read_text().splitlines() if not line.startswith(("path:", "#"))]
    download = f"download: |\n  import os\n  os.mkdir({str(folder / 'downloaded')!r})\n"
    (folder / "data.yaml").write_text("\n".join(names) + "\n" + download)
    return folder / "data.yaml"


@pytest.fixture(scope="module")
def stages(data: Path, narrow: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the results of all four stages, two epochs each."""
    folder = tmp_path_factory.mktemp("stages")
    settings = {"epochs": 2, "batch": 8, "args": ARGS}
    dense = train.train(str(narrow), data, Training(**settings), COMMON, folder / "train")  # type: ignore[arg-type]
    slim = Sparsity(**settings, sr=2.0, sr_decay=0.5)  # type: ignore[arg-type]
    sparse = sparsify.sparsify(str(dense), data, slim, COMMON, folder / "sparsify")
    cut = prune.prune(sparse, data, PRUNE, 64, 0, folder / "prune")
    finetune.finetune(cut, dense, data, Finetune(**settings), COMMON, folder / "finetune")  # type: ignore[arg-type]
    return folder


def test_every_stage_is_finished_and_says_what_it_did(stages: Path) -> None:
    for name, files in (("train", {"model.pt"}), ("sparsify", {"model.pt"}), ("finetune", {"model.pt"})):
        found = read_json(stages / name / MANIFEST)
        assert (found["stage"], set(found["files"]), found["metrics"]["epochs"]) == (name, files, 2)
        assert 0.0 <= found["metrics"]["metrics/mAP50-95(B)"] <= 1.0
        assert epochs_in(stages / name) == [1, 2]
    pruned = read_json(stages / "prune" / MANIFEST)
    assert set(pruned["files"]) == {"model.pt", "plan.json"}
    assert pruned["parents"].keys() == {"model", "data"}
    assert pruned["parents"]["model"] == read_json(stages / "sparsify" / MANIFEST)["files"]["model.pt"]
    assert read_json(stages / "finetune" / MANIFEST)["parents"].keys() == {"model", "data", "teacher"}


def test_training_learns_something(stages: Path) -> None:
    before = load_model(stages / "train" / "model.pt")
    assert isinstance(before, DetectionModel)
    assert checkpoint.load_training_args(stages / "train" / "model.pt")["nbs"] == 8
    after = load_model(stages / "sparsify" / "model.pt")
    assert not torch.equal(next(before.parameters()), next(after.parameters()))


def test_tensorboard_shows_the_sparsity_training(stages: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(stages / "sparsify" / "tensorboard"), size_guidance={"histograms": 0})
    reader.Reload()
    tags = reader.Tags()
    assert {"gamma/all", "gamma/model.0.bn", "gamma/model.2.m.0.cv2.bn"} <= set(tags["histograms"])
    assert [event.step for event in reader.Histograms("gamma/all")] == [0, 1]
    scalars = {tag: [event.value for event in reader.Scalars(tag)] for tag in tags["scalars"]}
    assert scalars["sparsity/lambda"] == [2.0, 1.0]
    assert scalars["sparsity/mean_gamma"][1] < scalars["sparsity/mean_gamma"][0]
    assert all(0.0 <= share <= 1.0 for share in scalars["sparsity/near_zero_share"])
    assert all(0.0 < share <= 1.0 for share in scalars["sparsity/macs_if_pruned"])
    assert len(scalars["metrics/mAP50-95"]) == 2


def test_the_best_epoch_is_kept_but_of_sparsity_training_the_last(
    stages: Path, dense: Path, narrow: Path, data: Path, tmp_path: Path, monkeypatch
) -> None:
    best, last = stages / "train" / "model.pt", dense
    monkeypatch.setattr("compress.training.launch.run_training", lambda *_, **__: (best, last))
    for name, stage, settings, expected in (
        ("train", train.train, Training(epochs=1), best),
        ("sparsify", sparsify.sparsify, Sparsity(epochs=1), last),
    ):
        kept = load_model(stage(str(narrow), data, settings, COMMON, tmp_path / name))  # type: ignore[arg-type]
        assert torch.equal(next(kept.parameters()), next(load_model(expected).parameters())), name


def test_sparsity_training_mends_its_statistics(stages: Path) -> None:
    last: Any = load_model(stages / "sparsify" / "training" / "weights" / "last.pt")
    kept: Any = load_model(stages / "sparsify" / "model.pt")
    torch.testing.assert_close(kept.model[0].bn.weight, last.model[0].bn.weight)
    assert not torch.equal(kept.model[0].bn.running_mean, last.model[0].bn.running_mean)


def test_the_plan_beside_the_pruned_model_makes_its_shape(stages: Path) -> None:
    dense, cut = load_model(stages / "sparsify" / "model.pt"), load_model(stages / "prune" / "model.pt")
    plan = load_plan(stages / "prune" / "plan.json")
    assert plans_of(cut) == [plan.model_dump(mode="json")]
    assert structure_hash(apply_plan(dense, plan)) == structure_hash(cut)
    metrics = read_json(stages / "prune" / MANIFEST)["metrics"]
    parameters = [sum(p.numel() for p in model.parameters()) for model in (dense, cut)]
    assert metrics["params"] == parameters
    assert metrics["macs"][1] < metrics["macs"][0]
    assert metrics["channels"][1] / metrics["channels"][0] == pytest.approx(0.6, abs=0.1)
    assert metrics["oracle_error"] <= 1e-4
    assert cut.state_dict()["model.0.conv.weight"].shape[0] == 8  # frozen by a rule


def test_fine_tuning_keeps_the_pruned_shape_and_leaves_the_teacher_behind(stages: Path) -> None:
    cut, tuned = load_model(stages / "prune" / "model.pt"), load_model(stages / "finetune" / "model.pt")
    assert isinstance(tuned, DetectionModel)
    assert structure_hash(tuned) == structure_hash(cut)
    assert plans_of(tuned) == plans_of(cut)
    assert not torch.equal(next(tuned.parameters()), next(cut.parameters()))
    arguments = checkpoint.load_training_args(stages / "finetune" / "model.pt")
    assert arguments["distill_model"] == str(stages / "train" / "model.pt")
    assert (stages / "finetune" / "model.pt").stat().st_size < (stages / "train" / "model.pt").stat().st_size


def test_caches_that_came_with_the_data_stay_closed(stages: Path, data: Path) -> None:
    """Stages have trained, validated and re-estimated statistics by now; nothing was opened, run or written."""
    folder = data.parent
    assert sorted(path.name for path in folder.iterdir()) == ["data.yaml", "images", "labels"]
    assert sorted(path.name for path in (folder / "labels").iterdir() if path.is_file()) == [
        "test.cache",
        "train.cache",
        "val.cache",
    ]
    assert all((folder / "images" / split / "000000.jpg").read_bytes().endswith(TRAILER) for split in ("train", "val"))
    np.load(folder / "labels" / "train.cache", allow_pickle=True)  # they are armed
    (folder / "opened").rmdir()
    assert label_file(next((folder / "images" / "train").iterdir())).is_file()


def test_a_finished_stage_is_skipped(stages: Path, data: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("compress.training.launch.run_training", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr("compress.pruning.surgery.apply_plan", lambda *_: pytest.fail("pruned again"))
    before = {path: path.stat().st_mtime_ns for path in stages.rglob("*")}
    sparse, cut = stages / "sparsify" / "model.pt", stages / "prune" / "model.pt"
    assert prune.prune(sparse, data, PRUNE, 64, 0, stages / "prune") == cut
    settings = Finetune(epochs=2, batch=8, args=ARGS)
    finetune.finetune(cut, stages / "train" / "model.pt", data, settings, COMMON, stages / "finetune")
    assert capsys.readouterr().out == (
        f"prune: finished before, unchanged: {cut}\n"
        f"finetune: finished before, unchanged: {stages / 'finetune' / 'model.pt'}\n"
    )
    assert {path: path.stat().st_mtime_ns for path in stages.rglob("*")} == before


def test_a_table_that_is_only_shown_makes_no_other_work(stages: Path, data: Path, capsys, monkeypatch) -> None:
    """Pipelines of a sweep share a sparsity training, whether they cut to MACs or to a latency."""
    monkeypatch.setattr("compress.training.launch.run_training", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr(sparsify, "_table", lambda *_: "table.json")
    settings = Sparsity(epochs=2, batch=8, args=ARGS, sr=2.0, sr_decay=0.5)
    dense, folder = str(stages / "train" / "model.pt"), stages / "sparsify"
    sparsify.sparsify(dense, data, settings, COMMON, folder, Prune(speedup=2.0))
    assert capsys.readouterr().out == f"sparsify: finished before, unchanged: {folder / 'model.pt'}\n"


def test_a_lambda_that_ruins_the_loss_stops_the_training(dense: Path, data: Path, tmp_path: Path, capsys) -> None:
    given = {"--model": dense, "--data": data, "--output": tmp_path / "out", "--imgsz": 64, "--epochs": 2}
    given |= {"--batch": 2, "--workers": 0, "--sr": 1e37}
    assert command(sparsify.app, *(word for pair in given.items() for word in pair), "nbs=2", "warmup_epochs=0") == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: sparsity training stopped in epoch 1: the loss is no number any more with λ 1e+37")
    assert "nothing was trained before; start again with a smaller sr or lr0" in said
    assert not (tmp_path / "out" / MANIFEST).exists()
    assert not list((tmp_path / "out").rglob("*.pt"))


def test_other_settings_are_other_work(stages: Path, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "prune"
    shutil.copytree(stages / "prune", folder)
    before = (folder / "model.pt").read_bytes()
    more = PRUNE.model_copy(update={"percent": 0.2, "recalibrate_images": 0})
    prune.prune(stages / "sparsify" / "model.pt", data, more, 64, 0, folder)
    assert (tmp_path / "prune.1" / "model.pt").read_bytes() == before
    assert read_json(folder / MANIFEST)["config"]["percent"] == 0.2
    assert (
        read_json(folder / MANIFEST)["metrics"]["params"]
        > read_json(tmp_path / "prune.1" / MANIFEST)["metrics"]["params"]
    )


def test_a_stage_does_not_move_aside_what_it_reads(dense: Path, data: Path, tmp_path: Path, capsys) -> None:
    own = shutil.copytree(dense.parent, tmp_path / "own") / dense.name
    teacher = ("--teacher", own, "--output", own.parent)
    for app, words in ((train.app, ("--output", own.parent)), (prune.app, ("--macs", 0.5, "--output", own.parent))):
        assert command(app, "--model", own, "--data", data, "--imgsz", 64, *words) == 2
        assert capsys.readouterr().err == (
            f"error: {own} lies in the folder of its own result, {own.parent}: choose another --output\n"
        )
    assert command(finetune.app, "--model", dense, "--data", data, "--imgsz", 64, *teacher) == 2
    assert "lies in the folder of its own result" in capsys.readouterr().err
    assert own.is_file()


def test_what_repairs_a_cut_is_said(dense: Path, data: Path, tmp_path: Path, capsys) -> None:
    words = ("--model", dense, "--data", data, "--percent", "0.4", "--multiple-of", "2", "--imgsz", "64")
    candidates = {}
    for folder, more in {
        "all": ("--recalibrate-images", "4", "--reconstruct-images", "4"),
        "fold": ("--recalibrate-images", "0"),
        "none": ("--recalibrate-images", "0", "--no-fold"),
    }.items():
        assert command(prune.app, *words, *more, "--output", tmp_path / folder) == 0
        candidates[folder] = list(read_json(tmp_path / folder / MANIFEST)["metrics"].get("repair_map50_95", ()))
    every = ["as_cut", "folded", "statistics", "reconstructed", "reconstructed_statistics"]
    assert candidates == {"all": every, "fold": every[:2], "none": []}
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("prune: val mAP50-95")]
    assert len(said) == 2
    assert read_json(tmp_path / "fold" / MANIFEST)["metrics"]["repair"] in every[:2]
    assert "repair" not in read_json(tmp_path / "none" / MANIFEST)["metrics"]


def test_a_reconstruction_that_nothing_can_judge_is_left_out(
    dense: Path, data: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr("compress.training.mean_ap.val_scorer", lambda *_: None)
    asked = PRUNE.model_copy(update={"recalibrate_images": 0, "reconstruct_images": 4})
    made = prune.prune(dense, data, asked, 64, 0, tmp_path / "asked")
    assert capsys.readouterr().err.startswith("warning: nothing is reconstructed: ")
    plain = PRUNE.model_copy(update={"recalibrate_images": 0, "fold": False})
    other = load_model(prune.prune(dense, data, plain, 64, 0, tmp_path / "plain")).state_dict()
    assert all(torch.equal(value, other[name]) for name, value in load_model(made).state_dict().items())


def test_a_cut_at_another_image_size_is_warned_of(dense: Path, data: Path, tmp_path: Path, capsys) -> None:
    few = PRUNE.model_copy(update={"recalibrate_images": 4, "fold": False})
    prune.prune(dense, data, few, 64, 0, tmp_path / "same")
    prune.prune(dense, data, few.model_copy(update={"recalibrate_images": 0}), 96, 0, tmp_path / "kept")
    assert capsys.readouterr().err == ""
    prune.prune(dense, data, few, 96, 0, tmp_path / "other")
    said = capsys.readouterr().err
    assert said.startswith(f"warning: {dense} was trained at 64 px, and its batch norms are estimated anew at 96 px")
    assert said.count("\n") == 1


def test_other_labels_are_other_work(stages: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(data.parent, tmp_path / "data")
    mine = tmp_path / "data" / "data.yaml"
    first = prune.prune(stages / "sparsify" / "model.pt", mine, PRUNE, 64, 0, tmp_path / "prune")
    written = first.stat().st_mtime_ns
    prune.prune(stages / "sparsify" / "model.pt", mine, PRUNE, 64, 0, tmp_path / "prune")
    assert first.stat().st_mtime_ns == written
    next((tmp_path / "data" / "labels" / "train").glob("*.txt")).write_text("0 0.5 0.5 0.5 0.5\n")
    prune.prune(stages / "sparsify" / "model.pt", mine, PRUNE, 64, 0, tmp_path / "prune")
    assert (tmp_path / "prune.1" / MANIFEST).exists()


def test_faded_channels_are_gone_before_the_cut(stages: Path, data: Path, tmp_path: Path) -> None:
    settings = Sparsity(epochs=5, batch=8, args=ARGS, fade=True)
    start, output = str(stages / "train" / "model.pt"), tmp_path / "sparsify"
    model = load_model(sparsify.sparsify(start, data, settings, COMMON, output, PRUNE))
    plan = load_plan(output / "fade_plan.json")
    state, faded = model.state_dict(), 0
    for tensor, dim, keep in plan.axis_masks():
        owner, _, name = tensor.rpartition(".")
        if dim == 0 and name in ("weight", "bias") and isinstance(model.get_submodule(owner), torch.nn.BatchNorm2d):
            assert state[tensor][~keep].abs().max() < 1e-6, tensor
            assert state[tensor][keep].abs().max() > 1e-4, tensor
            faded += int((~keep).sum())
    assert faded > 0
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected, found = model(image)[0], apply_plan(model, plan)(image)[0]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_the_same_plan_comes_twice(stages: Path, data: Path, tmp_path: Path) -> None:
    prune.prune(stages / "sparsify" / "model.pt", data, PRUNE, 64, 0, tmp_path / "prune")
    assert (tmp_path / "prune" / "plan.json").read_bytes() == (stages / "prune" / "plan.json").read_bytes()


def test_a_cut_that_fails_its_proof_is_not_written(stages: Path, data: Path, tmp_path: Path, monkeypatch) -> None:
    def disproved(*_: object) -> float:
        raise SurgeryError("the pruned model differs")

    monkeypatch.setattr("compress.pruning.oracle.check_oracle", disproved)
    with pytest.raises(SurgeryError, match="differs"):
        prune.prune(stages / "sparsify" / "model.pt", data, PRUNE, 64, 0, tmp_path / "prune")
    assert not (tmp_path / "prune").exists()


@pytest.mark.parametrize("importance", ["bn", "l1", "random"])
def test_a_model_whose_training_diverged_is_named(importance: Any, dense: Path) -> None:
    model = load_model(dense)
    next(model.parameters()).data[0] = float("nan")
    with pytest.raises(
        CheckpointError, match=r"weights are not finite \(model\.0\.conv\.weight\): its training diverged"
    ):
        plan_pruning(model, Prune(percent=0.3, importance=importance), 64)


def test_without_training_the_model_is_taken_as_it_is(stages: Path, data: Path, tmp_path: Path) -> None:
    dense = stages / "train" / "model.pt"
    taken = train.train(str(dense), data, Training(epochs=0), COMMON, tmp_path / "train")
    before, after = load_model(dense), load_model(taken)
    assert all(torch.equal(value, before.state_dict()[name]) for name, value in after.state_dict().items())
    assert not (tmp_path / "train" / "training").exists()


def test_a_model_of_other_classes_cannot_be_taken_as_it_is(data: Path, narrow: Path, tmp_path: Path) -> None:
    checkpoint.save_model(checkpoint.build_model(str(narrow), nc=3), tmp_path / "three.pt", {})
    with pytest.raises(DataError, match=r"three\.pt knows 3 classes, .*data\.yaml has 6: train it on this data first"):
        train.train(str(tmp_path / "three.pt"), data, Training(epochs=0), COMMON, tmp_path / "train")
    assert not (tmp_path / "train").exists()


def test_a_pruned_model_of_other_classes_cannot_be_trained(stages: Path, data: Path, tmp_path: Path) -> None:
    yaml = tmp_path / "data.yaml"
    yaml.write_text(data.read_text().replace("train: ", f"path: {data.parent}\ntrain: ").replace("5: ", "5: a\n  6: "))
    with pytest.raises(PlanError, match="the pruned model knows 6 classes, the data set has 7"):
        train.train(str(stages / "prune" / "model.pt"), yaml, Training(epochs=1), COMMON, tmp_path / "train")


def test_an_official_name_is_the_same_input_before_and_after_its_download(
    data: Path, dense: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    def download(name: str, *_: object, **__: object) -> str:
        path = Path(name)
        return name if path.exists() else str(shutil.copy(dense, path))

    monkeypatch.setattr("ultralytics.utils.downloads.attempt_download_asset", download)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        train.train("yolov8n.pt", data, Training(epochs=0), COMMON, tmp_path / "train")
    assert "finished before, unchanged" in capsys.readouterr().out
    assert not (tmp_path / "train.1").exists()


# As commands.


def test_an_official_checkpoint_can_be_cut(data: Path, dense: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(
        "ultralytics.utils.downloads.attempt_download_asset", lambda name, **_: str(shutil.copy(dense, name))
    )
    monkeypatch.chdir(tmp_path)
    words = (
        "--data",
        data,
        "--imgsz",
        64,
        "--percent",
        0.4,
        "--multiple-of",
        2,
        "--no-fold",
        "--recalibrate-images",
        0,
    )
    assert command(prune.app, "--model", "yolov8n.pt", *words, "--output", "cut") == 0
    assert read_json(tmp_path / "cut" / MANIFEST)["parents"]["model"] == sha256_file(dense)


def test_the_plan_is_printed_and_nothing_is_written(dense: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    assert (
        command(prune.app, "--model", dense, "--macs", "0.6", "--multiple-of", "4", "--imgsz", "64", "--dry-run") == 0
    )
    text = capsys.readouterr().out
    assert "plan: macs 0.6" in text
    assert "frozen: output of the model" in text
    row = next(line for line in text.splitlines() if "model.0.conv" in line)
    assert [cell.strip() for cell in row.split("│")][1:3] == ["model.0.conv", "8"]
    shares = [
        float(line.rpartition("(")[2].removesuffix("% kept)"))
        for line in text.splitlines()
        if line.startswith("    macs")
    ]
    assert len(shares) == 1
    assert shares[0] <= 60.0
    assert list(tmp_path.iterdir()) == []


def test_widths_by_the_command_line(dense: Path, data: Path, tmp_path: Path, capsys) -> None:
    words = ("--model", dense, "--data", data, "--percent", "0.3", "--power-of-two", "--multiple-of", "1")
    rest = ("--max-removed", "0.8", "--importance", "random", "--imgsz", "64", "--output", tmp_path / "prune")
    assert command(prune.app, *words, *rest) == 0
    plan = load_plan(tmp_path / "prune" / "plan.json")
    kept = [int(mask.sum()) for mask in plan.masks()]
    assert kept
    assert all(width & (width - 1) == 0 and width >= 8 for width in kept)
    assert (plan.importance, plan.target) == ("random", "percent 0.3")
    result = re.escape(str(tmp_path / "prune" / "model.pt"))
    assert re.search(rf"prune: {result} \(\d\d\.\d% of the MACs kept, ", capsys.readouterr().out)


def test_training_by_the_command_line(narrow: Path, data: Path, tmp_path: Path, capfd) -> None:
    words = ("--model", narrow, "--data", data, "--output", tmp_path / "train", "--epochs", "1", "--batch", "16")
    assert (
        command(train.app, *words, "--imgsz", "64", "--workers", "0", "mosaic=0", "weight_decay=1e-3", "--seed", "3")
        == 0
    )
    arguments = checkpoint.load_training_args(tmp_path / "train" / "model.pt")
    assert {"mosaic": 0, "weight_decay": 1e-3, "seed": 3, "batch": 16, "imgsz": 64}.items() <= arguments.items()
    assert f"train: {tmp_path / 'train' / 'model.pt'} (1 epochs, val mAP50-95 0.0" in capfd.readouterr().out


def test_a_training_takes_the_file_that_was_named(dense: Path, data: Path, tmp_path: Path) -> None:
    """Ultralytics takes apostrophes out of paths, and another file for one of YOLOv5."""
    model = tmp_path / "bob's" / "yolov5n.pt"
    model.parent.mkdir()
    shutil.copy(dense, model)
    settings = Training(epochs=1, batch=16, lr0=1e-9, optimizer="SGD", args={"warmup_epochs": 0.0})
    trained = train.train(str(model), data, settings, COMMON, model.parent / "train")
    name = "model.0.conv.weight"
    torch.testing.assert_close(load_model(trained).state_dict()[name], load_model(dense).state_dict()[name])


def test_a_model_that_is_taken_at_another_size_is_said(dense: Path, data: Path, tmp_path: Path, capfd) -> None:
    words = ("--model", dense, "--data", data, "--epochs", "0", "--workers", "0")
    assert command(train.app, *words, "--imgsz", "96", "--output", tmp_path / "larger") == 0
    said = f"warning: {dense} was trained at 64 px, and is taken as it is at 96 px: give imgsz 64\n"
    assert capfd.readouterr().err == said
    assert command(train.app, *words, "--imgsz", "64", "--output", tmp_path / "same") == 0
    assert capfd.readouterr().err == ""


def test_the_share_that_auto_brings_near_zero_is_that_of_what_may_go(dense: Path, data: Path) -> None:
    """Outputs are frozen and have no γ: counted in, they would make the share too small."""
    cut = Prune(macs=0.5, budget=Budget(multiple_of=2, min_width=2))
    planned = plan_pruning(load_model(dense), cut.model_copy(update={"importance": "random"}), 64)
    pairs = zip(planned.graph.groups, planned.choice.widths.tolist(), strict=True)
    free = [(group.width, width) for group, width in pairs if not group.frozen]
    before, after = (sum(column) for column in zip(*free, strict=True))
    assert len(free) < len(planned.graph.groups)
    found = sparsify._share(str(dense), Sparsity(epochs=2, sr="auto"), cut, cut.budget, data, 64)
    assert found == pytest.approx(1 - after / before)


def test_what_fades_and_what_auto_presses_is_planned_for_the_head_of_these_classes(
    data: Path, tmp_path: Path, monkeypatch
) -> None:
    """A latency table is of the model as it will be trained, not of the official one of 80 classes."""
    planned = []
    monkeypatch.setattr(sparsify, "plan_pruning", lambda model, *_, **__: planned.append(model.names) or stop())
    model = tmp_path / "coco.pt"
    checkpoint.save_model(checkpoint.build_model("yolov8n.yaml"), model, {"imgsz": 64})
    with pytest.raises(PlanError, match="far enough"):
        sparsify._share(str(model), Sparsity(epochs=2, sr="auto"), Prune(macs=0.5), Budget(), data, 64)
    assert [len(names) for names in planned] == [6]


def stop() -> None:
    raise PlanError("far enough")


def test_a_model_that_is_not_trained_is_taken_as_it_is(dense: Path, data: Path, tmp_path: Path) -> None:
    """New batch-norm statistics are for γ that have just shrunk."""
    left = sparsify.sparsify(str(dense), data, Sparsity(epochs=0), COMMON, tmp_path / "out")
    before, after = load_model(dense).state_dict(), load_model(left).state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_fading_is_not_repeated_for_another_repair_of_its_cut(dense: Path, data: Path, tmp_path: Path, capfd) -> None:
    settings = Sparsity(epochs=0, fade=True)
    for cut in (PRUNE, PRUNE.model_copy(update={"reconstruct_images": 16})):
        sparsify.sparsify(str(dense), data, settings, COMMON, tmp_path / "out", cut)
    assert capfd.readouterr().out.count("sparsify: finished before, unchanged") == 1
    sparsify.sparsify(str(dense), data, settings, COMMON, tmp_path / "out", PRUNE.model_copy(update={"percent": 0.3}))
    assert "held other work (another fade)" in capfd.readouterr().out


TRAINERS = [train.app, sparsify.app, finetune.app]


@pytest.mark.parametrize("app", TRAINERS, ids=["train", "sparsify", "finetune"])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "none.pt"], "none.pt does not exist: check the path"),
        (["--model", "text.pt"], "text.pt cannot be opened"),
        (["--data", "none.yaml"], "none.yaml does not exist"),
        (["--data", "empty.yaml"], "'train' holds no images"),
        (["--imgsz", "100"], "imgsz 100 must be a multiple of the model's stride 32: use 96"),
        (["--lr0", "0"], "lr0: Input should be greater than 0 (got 0.0)"),
        (["nosuch=1"], ": 'nosuch' is not an argument of Ultralytics' training"),
        (["nosuch"], "'nosuch' must have the form key=value"),
        (["mosaic=much"], ": 'mosaic=much' is of invalid type str"),
        (["epochs=5"], ": 'epochs' is a setting of its own, beside args (--epochs): do not"),
        (["optimizer=AdamW"], ": 'optimizer' is a setting of its own, beside args (--optimizer)"),
        (["imgsz=128"], ": 'imgsz' is not of a training alone: give it as --imgsz, or imgsz="),
        (["--optimizer", "Sdg"], ": no optimizer 'Sdg': choose one of auto, SGD, MuSGD, Adam,"),
        (["--lr0", "2"], ": 'lr0=2.0' is an invalid value"),
        (["--output", "foreign"], "foreign is not empty and holds no stage of Espalier"),
        (["--output", "text.pt"], "text.pt is a file"),
    ],
    ids=lambda value: " ".join(value).replace("--", "") if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_nothing_is_begun(
    app, words: list[str], message: str, dense: Path, data: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.yaml").write_text("train: empty\nval: empty\nnames: [a]\n")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("mine")
    given = {"--model": dense, "--data": data, "--output": "out", "--imgsz": 64, "--epochs": 1}
    options = [word for pair in given.items() for word in pair]
    before = sorted(tmp_path.rglob("*"))
    assert command(app, *options, *words) == 2
    found = capsys.readouterr()
    assert found.err.startswith("error: ")
    assert message in found.err
    assert found.err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("app", "words", "message"),
    [
        (prune.app, ["--percent", "1.5"], "prune: percent: Input should be less than 1 (got 1.5)"),
        (prune.app, ["--percent", "0.99"], "the budget cannot remove 99% of the channels: at most"),
        (
            prune.app,
            ["--percent", "0.5", "--macs", "0.5"],
            "exactly one of percent, macs, params, latency, speedup, keep_importance is needed",
        ),
        (prune.app, [], "exactly one of percent, macs, params, latency, speedup, keep_importance is needed, got none"),
        (prune.app, ["--percent", "0.5", "--budget", "none.yaml"], "none.yaml does not exist"),
        (prune.app, ["--percent", "0.5", "--model", "none.pt"], "none.pt does not exist: check the path"),
        (finetune.app, ["--teacher", "none.pt"], "none.pt does not exist: check the path"),
        (finetune.app, ["--teacher", "text.pt"], "text.pt cannot be opened"),
        (
            finetune.app,
            ["--teacher", "none.pt", "--dis", "0"],
            "dis, cwd and ld are all 0: leave out the teacher (distill: false)",
        ),
        (finetune.app, ["--cwd", "1"], "--cwd goes with --teacher: there is nobody to learn from"),
        (finetune.app, ["--distil-off-epochs", "5"], "--distil-off-epochs goes with --teacher"),
        (
            finetune.app,
            ["--teacher", "none.pt", "--epochs", "5", "--distil-off-epochs", "5"],
            "distil_off_epochs 5 must be below epochs 5: the teacher would never be asked",
        ),
        (prune.app, ["--front", "4", "--latency", "5ms"], "--front draws what all latencies cost: leave out --latency"),
        (prune.app, ["--front", "4", "--dry-run"], "--front cuts nothing: leave out --dry-run"),
        (
            prune.app,
            ["--macs", "0.5", "--imgsz", "100"],
            "imgsz 100 must be a multiple of the model's stride 32: use 96",
        ),
        (prune.app, ["--macs", "0.5", "--model", "yolov8n.yaml"], "yolov8n.yaml is an architecture without weights"),
        (sensitivity.app, ["--model", "yolov8n.yaml"], "yolov8n.yaml is an architecture without weights"),
        (
            prune.app,
            ["--macs", "0.5", "--threads", "2"],
            "--threads goes with --latency, --speedup, --keep-importance or --front",
        ),
        (prune.app, ["--macs", "0.5", "--python", "python3.11"], "--python goes with --latency, --speedup, --keep-imp"),
        (prune.app, ["--macs", "0.5", "--device", "rpi5"], "the widths that rpi5 likes are --budget rpi5"),
        (sparsify.app, ["--sr", "inf"], "sr: Input should be a finite number"),
        (sparsify.app, ["--sr", "auto", "--share", "0.9"], "share 0.9 is more than the 64.5% of the channels"),
        (sparsify.app, ["--share", "0.5"], "share goes with sr: auto, sr is 0.0001"),
        (sparsify.app, ["--sr", "auto", "--fade", "0.5"], "sr: auto and fade: true each choose channels of their own"),
        (
            sparsify.app,
            ["--sr", "auto", "--share", "0.5", "--epochs", "1"],
            "sr: auto watches an epoch before it pulls",
        ),
        (sparsify.app, ["--optimizer", "AdamW"], "sr goes with optimizer: SGD; Adam and its kin, which auto may take"),
        (sparsify.app, ["--fade", "0.001"], "the budget cannot bring macs down to 0.1% of the dense model's"),
        (sparsify.app, ["--budget", "rpi5"], "--budget goes with --fade or --sr auto: without, no cut is planned here"),
    ],
)
def test_a_mistake_of_one_stage_is_one_line(
    app, words: list[str], message: str, dense: Path, data: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.pt").write_text("hello")
    assert command(app, "--model", dense, "--data", data, "--output", "out", "--imgsz", 64, *words) == 2
    found = capsys.readouterr()
    assert (found.err.count("\n"), found.err.startswith("error: ")) == (1, True)
    assert message in found.err
    assert not (tmp_path / "out").exists()


def test_pruning_needs_a_place_and_images(dense: Path, capsys) -> None:
    assert command(prune.app, "--model", dense, "--percent", "0.5") == 2
    assert capsys.readouterr().err == "error: --output and --data are needed, unless --dry-run only prints the plan\n"


# kill -9.

PAUSED = """
import os, sys
from pathlib import Path
from compress import finetune
from compress.errors import run_app
from compress.training.trainers import PlanTrainer

step = PlanTrainer.optimizer_step

def pause(trainer):
    if trainer.epoch == 2:
        Path(os.environ["REACHED"]).touch()
        sys.stdin.read()
    step(trainer)

PlanTrainer.optimizer_step = pause
run_app(finetune.app)
"""


@pytest.fixture
def killed(stages: Path, data: Path, tmp_path: Path) -> Callable[[], list[object]]:
    """Start a fine-tuning of five epochs, look at it in the middle of the third, and kill it."""
    output = tmp_path / "out"
    dense, cut = stages / "train" / "model.pt", stages / "prune" / "model.pt"
    words = ["--model", cut, "--teacher", dense, "--data", data, "--output", output, "--epochs", "5", "--batch", "8"]
    words += ["--imgsz", "64", "--workers", "0", "nbs=8", "--cwd", "1", "--distil-off-epochs", "2"]

    def start() -> list[object]:
        process = subprocess.Popen(
            [sys.executable, "-c", PAUSED, *map(str, words)],
            cwd=ROOT,
            env={**os.environ, "REACHED": str(tmp_path / "reached")},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        with process:
            while not (tmp_path / "reached").exists():
                assert process.poll() is None, process.stderr.read().decode()  # type: ignore[union-attr]
                time.sleep(0.02)
            assert command(finetune.app, *words) == 2  # the same command at once
            process.kill()
        assert process.returncode == -9
        return words

    return start


def test_a_killed_training_goes_on_where_it_was(stages: Path, killed, tmp_path: Path, capfd) -> None:
    words = killed()
    output = tmp_path / "out"
    assert capfd.readouterr().err.endswith(
        f"error: {output} is in use by another process: wait for it, or choose another --output\n"
    )
    assert not (output / MANIFEST).exists()
    assert epochs_in(output) == [1, 2]
    before = (output / "training" / "results.csv").read_text()

    assert command(finetune.app, *words) == 0
    assert epochs_in(output) == [1, 2, 3, 4, 5]
    assert (output / "training" / "results.csv").read_text().startswith(before)  # not started over
    with (output / "training" / "results.csv").open() as stream:
        assert [float(row["train/cwd_loss"]) > 0.0 for row in csv.DictReader(stream)] == [True] * 3 + [False] * 2
    config, parents = (read_json(output / MANIFEST)[key] for key in ("config", "parents"))
    assert is_finished(output, "finetune", config, parents)
    tuned = load_model(output / "model.pt")
    assert structure_hash(tuned) == structure_hash(load_model(stages / "prune" / "model.pt"))
    assert len(plans_of(tuned)) == 1
    assert [path.name for path in tmp_path.glob("out*")] == ["out"]
