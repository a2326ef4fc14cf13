"""Every task that our trainers know, on drawn data: its labels, and the four stages with the shape kept."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from compress import finetune, prune, sparsify, train
from compress.checkpoint import build_model, load_model, plans_of, save_model, structure_hash, task_of
from compress.data import drawn
from compress.data.dataset import class_names, data_hash, fingerprint, images, keypoints, resolve
from compress.errors import DataError, SettingsError
from compress.manifest import read_json
from compress.settings import Budget, Finetune, Prune, Sparsity, Training
from compress.shapes import Shapes, generate
from compress.train import Common

COMMON = Common(imgsz=64, workers=0)
TRAINING: dict[str, Any] = {"epochs": 1, "batch": 8, "args": {"nbs": 8, "warmup_epochs": 0.0}}
PRUNE = Prune(macs=0.7, importance="taylor", budget=Budget(multiple_of=2, min_width=2), recalibrate_images=8)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sets")
    tasks: tuple[drawn.Task, ...] = ("detect", "segment", "pose", "obb", "classify")
    return {task: generate(folder / task, Shapes(8, 8, 1, 64, task=task)) for task in tasks}


def mask() -> np.ndarray:
    """An object of 6 × 3 pixels, from (2, 4), in a picture of 10 pixels."""
    seen = np.zeros((10, 10), bool)
    seen[4:7, 2:8] = True
    return seen


@pytest.mark.parametrize("task", ["segment", "obb"])
def test_outline_and_corners_of_a_rectangle(task: drawn.Task) -> None:
    points = np.array(drawn.label(task, mask())).reshape(-1, 2).round(4)
    assert sorted(points.tolist()) == [[0.25, 0.45], [0.25, 0.65], [0.75, 0.45], [0.75, 0.65]]


def test_box_and_outermost_points_of_a_rectangle() -> None:
    box = pytest.approx([0.5, 0.55, 0.6, 0.3])
    assert drawn.label("detect", mask()) == box
    found = drawn.label("pose", mask())
    assert found[:4] == box
    assert found[4:] == pytest.approx([0.25, 0.45, 2, 0.25, 0.45, 2, 0.75, 0.45, 2, 0.25, 0.65, 2])


def test_a_crop_is_the_square_around_an_object() -> None:
    image = np.arange(100).reshape(10, 10)[..., None].repeat(3, 2)
    found = drawn.crop(image, mask())  # centre (5, 5.5), half of the longer side and the margin: 4.2
    assert (found[0, 0, 0], found[-1, -1, 0]) == (11, 98)


@pytest.mark.parametrize("task", ["segment", "pose", "obb", "classify"])
def test_drawn_sets_of_every_task_are_sound(task: str, sets: dict[str, Path]) -> None:
    data = sets[task]
    assert resolve(str(data)) == data.resolve()
    assert len(class_names(data)) == 6
    assert keypoints(data) == ([4, 3] if task == "pose" else None)
    assert 0 < len(images(data, "train")) <= 8


def test_a_set_of_folders_is_known_by_what_is_in_it(sets: dict[str, Path], tmp_path: Path) -> None:
    data = sets["classify"]
    copy = shutil.copytree(data, tmp_path / "copy")
    assert (data_hash(copy, "val"), fingerprint(copy)) == (data_hash(data, "val"), fingerprint(data))
    images(copy, "val")[0].unlink()
    assert data_hash(copy, "val") != data_hash(data, "val")
    assert fingerprint(copy) != fingerprint(data)
    (copy / "val" / "whale").mkdir()
    shutil.copyfile(images(copy, "train")[0], copy / "val" / "whale" / "a.jpg")
    with pytest.raises(DataError, match=r"val has the class whale, .*train has none of that name"):
        resolve(str(copy))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 0.5 0.5 0.2 0.2 0.5 0.5 2", r"has 8 numbers: 'kpt_shape' \[4, 3\] needs .* 4 key points of 3 numbers"),
        ("0 0.5 0.5 0.2 0.2" + " 0.5 1.5 2" * 4, "has a coordinate outside"),
    ],
)
def test_labels_of_key_points_are_checked(line: str, message: str, sets: dict[str, Path], tmp_path: Path) -> None:
    data = shutil.copytree(sets["pose"].parent, tmp_path / "pose") / "shapes.yaml"
    next((data.parent / "labels" / "train").glob("*.txt")).write_text(line)
    with pytest.raises(DataError, match=message):
        resolve(str(data))


@pytest.mark.parametrize("task", ["segment", "pose", "obb", "classify"])
def test_all_stages_keep_the_shape(
    task: str, sets: dict[str, Path], architectures: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    cfg = tmp_path / "tiny.yaml"
    cfg.write_text(yaml.safe_dump({**architectures[task], "nc": 6, "kpt_shape": [4, 3]}))
    data = sets[task]
    before = set(data.parent.rglob("*"))
    dense = train.train(str(cfg), data, Training(**TRAINING), COMMON, tmp_path / "train")
    settings = Sparsity(**{**TRAINING, "epochs": 2}, sr=1.0, fade=True)
    sparse = sparsify.sparsify(str(dense), data, settings, COMMON, tmp_path / "sparsify", PRUNE)
    assert (tmp_path / "sparsify" / "fade_plan.json").exists()
    cut = prune.prune(sparse, data, PRUNE, 64, 0, tmp_path / "prune")
    teacher = None if task == "classify" else dense
    tuned = finetune.finetune(cut, teacher, data, Finetune(**TRAINING), COMMON, tmp_path / "finetune")

    model = load_model(tuned)
    assert task_of(model) == task
    assert len(plans_of(model)) == 1
    assert structure_hash(model) == structure_hash(load_model(cut)) != structure_hash(load_model(dense))
    own = {"segment": "mAP50-95(M)", "pose": "mAP50-95(P)", "obb": "mAP50-95(B)", "classify": "accuracy_top1"}
    found = read_json(tmp_path / "finetune" / "manifest.json")["metrics"]
    assert 0.0 <= found[f"metrics/{own[task]}"] <= 1.0
    assert set(data.parent.rglob("*")) == before  # no caches in the user's data


def test_data_of_another_task_is_refused(
    sets: dict[str, Path], architectures: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    for task, data, message in (
        ("classify", "obb", "is a model to classify, .* is no data set for it: give a folder"),
        ("obb", "classify", "is a model to detect, .* is no data set for it: give its .yaml"),
        ("pose", "obb", "has no 'kpt_shape': a pose model needs a data set with key points"),
        ("segment", "pose", r"000000\.txt holds upright boxes, this model learns from polygons .*: give a data set"),
        ("segment", "detect", r"000000\.txt holds upright boxes, this model learns from polygons .*: give a data set"),
        ("obb", "detect", r"000000\.txt holds upright boxes, this model learns from polygons .*: give a data set"),
    ):
        cfg = tmp_path / f"{task}.yaml"
        cfg.write_text(yaml.safe_dump(architectures[task]))
        with pytest.raises(DataError, match=message):
            train.train(str(cfg), sets[data], Training(**TRAINING), COMMON, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_classifier_has_no_teacher(
    sets: dict[str, Path], architectures: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    path = tmp_path / "model.pt"
    save_model(build_model(architectures["classify"]), path, {})
    with pytest.raises(SettingsError, match="leave out the teacher"):
        finetune.finetune(path, path, sets["classify"], Finetune(**TRAINING), COMMON, tmp_path / "out")
