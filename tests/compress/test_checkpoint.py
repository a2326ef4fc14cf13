from __future__ import annotations

import copy
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

from compress import checkpoint
from compress.checkpoint import (
    build_model,
    load_deployable,
    load_model,
    load_trainable,
    load_training_args,
    plans_of,
    save_model,
    task_of,
)
from compress.errors import CheckpointError
from narrow import NARROW, prune_at_random
from topologies import randomised

IMAGE = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(IMAGE)[0]


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_model(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_a_checkpoint_opens_in_fp32_ready_to_infer_and_to_train(dense: Path) -> None:
    model = load_model(dense)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in model.parameters())
    assert not any(module.training for module in model.modules())
    assert model.pt_path == str(dense)


def test_a_yaml_is_built(narrow: Path) -> None:
    model = load_model(str(narrow))
    assert len(model.names) == 6  # type: ignore[arg-type]
    assert not model.training
    assert len(build_model(str(narrow), nc=2).names) == 2  # type: ignore[arg-type]
    assert load_training_args(narrow) == {}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("yolov8n-seg", "SegmentationModel"),
        ("yolo26n-pose", "PoseModel"),
        ("yolo11n-obb", "OBBModel"),
        ("yolov8n-cls", "ClassificationModel"),
        ("yolov8n-world", "WorldModel"),
    ],
)
def test_every_task_is_built_and_opened(tmp_path: Path, name: str, kind: str) -> None:
    save_model(build_model(f"{name}.yaml"), tmp_path / "model.pt", {})
    assert type(load_model(tmp_path / "model.pt")).__name__ == kind


def test_an_official_name_without_a_network_is_not_called_damaged(tmp_path: Path, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ultralytics.utils.downloads.attempt_download_asset", refuse)
    message = r"yolov8n\.pt is not here and cannot be downloaded \(ConnectionError: no route to host\): download it"
    with pytest.raises(CheckpointError, match=message):
        load_model("yolov8n.pt")


@pytest.mark.parametrize("name", ["yolov5n.pt", "my-yolov3-tiny.pt", "bob's.pt"])
def test_a_file_is_opened_by_its_own_name(dense: Path, tmp_path: Path, name: str) -> None:
    """Ultralytics would open yolov5nu.pt, bobs.pt …; of these names there is another model here."""
    for other in ("yolov5nu.pt", "my-yolov3-tinyu.pt", "bobs.pt"):
        shutil.copy(dense, tmp_path / other)
    model = load_model(dense)
    model.names = dict(enumerate("uvwxyz"))  # type: ignore[assignment]
    save_model(model, tmp_path / name, {"imgsz": 96})
    assert load_model(tmp_path / name).names == model.names
    assert load_training_args(tmp_path / name)["imgsz"] == 96


def test_a_pruned_model_survives_the_round_trip(tmp_path: Path, narrow: Path) -> None:
    model, _ = prune_at_random(randomised(build_model(str(narrow))))
    before = copy.deepcopy(model.state_dict())
    save_model(model, tmp_path / "pruned.pt", {"imgsz": 64, "epochs": 3})
    again = load_model(tmp_path / "pruned.pt")

    assert plans_of(again) == plans_of(model)
    assert plans_of(again)[0]["target"] == "test"
    assert checkpoint.structure_hash(again) == checkpoint.structure_hash(model)
    assert load_training_args(tmp_path / "pruned.pt") == {"imgsz": 64, "epochs": 3, "task": "detect"}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())  # still fp32
    assert torch.equal(outputs(again), outputs(copy.deepcopy(model).half().float()))  # stored in fp16
    assert [path.name for path in tmp_path.iterdir()] == ["pruned.pt"]


def test_gradients_are_not_stored(tmp_path: Path, narrow: Path) -> None:
    model = build_model(str(narrow))
    save_model(model, tmp_path / "without.pt", {})
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    save_model(model, tmp_path / "with.pt", {})
    assert (tmp_path / "with.pt").stat().st_size == (tmp_path / "without.pt").stat().st_size
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_structure_is_its_names_and_shapes(narrow: Path) -> None:
    model = build_model(str(narrow))
    other, _ = prune_at_random(model)
    assert checkpoint.structure_hash(randomised(build_model(str(narrow)))) == checkpoint.structure_hash(model)
    assert checkpoint.structure_hash(other) != checkpoint.structure_hash(model)
    assert checkpoint.structure_hash(build_model(str(narrow), nc=5)) != checkpoint.structure_hash(model)


def test_a_write_that_fails_leaves_the_old_checkpoint(tmp_path: Path, narrow: Path, monkeypatch) -> None:
    path = tmp_path / "model.pt"
    save_model(build_model(str(narrow)), path, {"epochs": 1})
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        save_model(build_model(str(narrow)), path, {"epochs": 2})
    assert load_training_args(path)["epochs"] == 1
    assert list(tmp_path.iterdir()) == [path]


# Files that are no models.


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("none.pt", "does not exist: check the path"),
        ("none.onnx", "is not a model: give a .pt checkpoint or a .yaml architecture"),
        ("none", "is not a model"),
        ("none.yaml", "does not describe a model"),
    ],
)
def test_a_missing_file_is_named(tmp_path: Path, name: str, remedy: str) -> None:
    assert remedy in refusal(tmp_path / name)


def test_a_folder_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "folder.pt").mkdir()
    assert "does not exist" in refusal(tmp_path / "folder.pt")


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: b"",
        lambda whole: whole[: len(whole) // 2],
        lambda whole: whole[:-30],
        lambda whole: whole[:3000] + b"XXXXXXXX" + whole[3008:],
        lambda whole: bytes(range(256)) * 8,
        lambda whole: b"hello",
        lambda whole: b"PK\x03\x04" + bytes(60),
    ],
    ids=["empty", "half", "end missing", "a changed part", "garbage", "text", "a broken zip"],
)
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, dense: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "damaged.pt"
    path.write_bytes(damage(dense.read_bytes()))
    assert "download or train it again" in refusal(path)


@pytest.mark.parametrize(
    "content",
    [
        {"conv.weight": torch.zeros(3), "conv.bias": torch.zeros(2)},
        {"model": {"conv.weight": torch.zeros(3)}},
        {"model": torch.zeros(3), "ema": torch.zeros(4)},
        {"model": None, "ema": None},
        {},
        {"model": nn.Linear(3, 3)},
        {"model": nn.Sequential(nn.Conv2d(3, 3, 1))},
    ],
    ids=["tensors", "state dict", "tensors as models", "nothing", "empty", "linear", "sequential"],
)
def test_a_checkpoint_without_a_detector_is_refused(tmp_path: Path, content: dict[str, Any]) -> None:
    torch.save(content, tmp_path / "other.pt")
    assert "holds no model of Ultralytics: train or convert it first" in refusal(tmp_path / "other.pt")


@pytest.mark.parametrize("content", [[torch.zeros(3)], torch.zeros(3), 3, nn.Linear(3, 3)])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "other.pt")
    assert "holds other things than a model (AttributeError" in refusal(tmp_path / "other.pt")


def test_only_tasks_that_our_trainers_know_are_trained(tmp_path: Path, dense: Path) -> None:
    assert load_trainable(dense).pt_path == str(dense)
    path = tmp_path / "depth.yaml"
    path.write_text(NARROW.replace("Detect, [nc]", "Depth, [16]"))
    with pytest.raises(CheckpointError, match=r"depth\.yaml has a Depth head: only models to .* can be trained"):
        load_trainable(path)
    assert task_of(load_deployable(path)) == "depth"
    path.write_text(NARROW.replace("[3, 4, 5], 1, Detect", "-1, 1, Classify"))
    assert task_of(load_trainable(path)) == "classify"


@pytest.mark.parametrize(
    "text",
    [
        "just words",
        "- a\n- b\n",
        "nc: [",
        "",
        "nc: 3\nbackbone: []\n",
        NARROW.replace("C2f", "NoSuchLayer"),
        NARROW.replace("[3, 4, 5]", "[3, 4, 50]"),
        NARROW.replace("C2f, [16", "C2f, [wide"),
    ],
    ids=["words", "list", "no yaml", "empty", "no head", "unknown layer", "unknown source", "unknown width"],
)
def test_a_yaml_that_is_no_model_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "model.yaml"
    path.write_text(text)
    assert "does not describe a model of Ultralytics' form" in refusal(path)


def test_a_wrong_architecture_in_memory_is_named_too() -> None:
    with pytest.raises(CheckpointError, match="the model YAML does not describe a model"):
        build_model({"nc": 3})


# Files that would run something.


class Call:
    """What pickle turns into a call when it opens the file."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def test_a_checkpoint_that_would_run_a_command_is_refused(tmp_path: Path) -> None:
    path, ran = tmp_path / "evil.pt", tmp_path / "ran"
    torch.save({"model": Call(os.system, f"touch {ran}")}, path)
    assert refusal(path) == f"{path} is not a plain model: opening it would import {os.name}.system; refused"
    assert not ran.exists()
    torch.load(path, weights_only=False)  # it is armed
    assert ran.exists()


@pytest.mark.parametrize(
    "write",
    [
        lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
        lambda content, path: path.write_bytes(pickle.dumps(content)),
        lambda content, path: path.write_bytes(pickle.dumps(content, protocol=2)),
        lambda content, path: torch.save([content], path),
        lambda content, path: torch.save({"ema": None, "train_args": content}, path),
        lambda content, path: torch.save({content["model"]: 1}, path),
    ],
    ids=["legacy format", "plain pickle", "old pickle", "in a list", "in the arguments", "as a key"],
)
def test_no_way_of_packing_it_helps(tmp_path: Path, write: Callable[[Any, Path], object]) -> None:
    path, ran = tmp_path / "evil.pt", tmp_path / "ran"
    write({"model": Call(os.mkdir, str(ran))}, path)
    refusal(path)
    assert not ran.exists()


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (torch.hub.load_state_dict_from_url, ("http://127.0.0.1:9/a.pt",)),
        (getattr, (nn.Module, "__subclasses__")),
        (eval, ("1 + 1",)),
        (__import__, ("antigravity",)),
        (shutil.rmtree, ("nothing",)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_nothing_but_models_is_called(tmp_path: Path, monkeypatch, function: Callable, arguments: tuple) -> None:
    monkeypatch.setattr("webbrowser.open", lambda *_: pytest.fail("imported"))
    torch.save({"model": Call(function, *arguments)}, tmp_path / "evil.pt")
    text = refusal(tmp_path / "evil.pt")
    assert "refused" in text or "UnpicklingError" in text


def test_the_activation_of_a_yaml_is_not_evaluated(tmp_path: Path) -> None:
    from ultralytics.utils import SAFE_LOAD

    assert SAFE_LOAD  # also where Ultralytics opens and builds models itself
    path, ran = tmp_path / "evil.yaml", tmp_path / "ran"
    path.write_text(f"activation: __import__('os').mkdir('{ran}')\n{NARROW}")
    assert "unsupported activation" in refusal(path)
    path.write_text(f"tag: !!python/object/apply:os.mkdir ['{ran}']\n{NARROW}")
    refusal(path)
    assert not ran.exists()


def test_a_quiet_time_ends() -> None:
    logger = logging.getLogger("ultralytics")
    before = logger.level

    def fail() -> None:
        with checkpoint.quiet():
            assert logger.level == logging.ERROR
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert logger.level == before


# Ultralytics without Espalier.

STOCK = """
import json, sys
from pathlib import Path
from ultralytics import YOLO

model, data, project = sys.argv[1:]
yolo = YOLO(model)
results = yolo.predict(str(Path(data).parent / "images" / "test"), imgsz=64, conf=0.0, max_det=5, verbose=False)
metrics = yolo.val(data=data, imgsz=64, plots=False, verbose=False, project=project, workers=0)
exported = yolo.export(format="onnx", imgsz=64, simplify=False, verbose=False)
found = {
    "images": len(results),
    "boxes": [len(result.boxes) for result in results],
    "classes": list(results[0].names.values()),
    "map": metrics.box.map,
    "onnx": exported,
    "espalier": sorted({"compress", "export", "benchmark"} & set(sys.modules)),
}
print("FOUND" + json.dumps(found))
"""


def test_stock_ultralytics_predicts_validates_and_exports_the_pruned_shape(
    tmp_path: Path, pruned: Path, tiny_data: Path
) -> None:
    model = shutil.copy(pruned, tmp_path / "pruned.pt")
    data = Path(shutil.copytree(tiny_data.parent, tmp_path / "data")) / tiny_data.name
    data.write_text(data.read_text().replace(str(tiny_data.parent), str(data.parent)))
    environment = {
        key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "ULTRALYTICS_SAFE_LOAD")
    }
    done = subprocess.run(
        [sys.executable, "-c", STOCK, str(model), str(data), str(tmp_path / "val")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.partition("FOUND")[2])
    assert found["espalier"] == []
    assert (found["images"], found["boxes"]) == (8, [5] * 8)
    assert len(found["classes"]) == 6
    assert 0.0 <= found["map"] < 0.5  # it was never trained

    weights = {tuple(tensor.dims) for tensor in onnx.load(found["onnx"]).graph.initializer if len(tensor.dims) == 4}
    convolutions = [m.weight for m in load_model(pruned).modules() if isinstance(m, nn.Conv2d)]
    assert {tuple(weight.shape) for weight in convolutions} - {(1, 16, 1, 1)} <= weights  # DFL's is folded
    assert (8, 3, 3, 3) not in weights  # the first layer as it was
