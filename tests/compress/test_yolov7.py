from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from compress.checkpoint import build_model, load_model, read_architecture
from compress.errors import CheckpointError
from compress.planning import plan_pruning
from compress.pruning.oracle import check_oracle
from compress.pruning.surgery import apply_plan
from compress.settings import Budget, Prune
from step import losses
from topologies import randomised

NAMES = ("yolov7", "yolov7-tiny", "yolov7x", "yolov7-w6")


def narrow(name: str, width: float = 1 / 8) -> dict[str, Any]:
    """A YAML of configs/models with a share of its channels; Ultralytics scales all rows but RepConv and Index."""
    cfg = read_architecture(f"{name}.yaml")
    for _, _, kind, args in cfg["backbone"] + cfg["head"]:
        widths = {"RepConv": 2, "Index": 1}.get(kind, 0)
        args[:widths] = [int(channels * width) for channels in args[:widths]]
    return {**cfg, "width_multiple": width}


def imgsz(name: str) -> int:
    return 256 if name == "yolov7-w6" else 128


# What the original repository prints for its own networks, "fused": batch norm and the 1×1 branch of RepConv are folded
# into their convolutions, which leaves one bias for two numbers of batch norm. The heads are known to the last number:
# 3·(classes + 5) outputs per cell, and IDetect keeps its implicit knowledge, one number per input and one per output.
#   yolov7       36,905,341, COCO (WongKinYiu/yolov7 #504: 37,620,125 before fusing, of which Detect 457,725)
#   yolov7-tiny   6,219,709, COCO (output of its detect.py)
#   yolov7x      70,795,920, 3 classes, IDetect (output of detect.py for a training on three classes of VisDrone)
#   yolov7-w6    80,961,284, 4 classes, IAuxDetect with its four auxiliary convolutions (WongKinYiu/yolov7 #1691)
# The paper's table 1 has them as 36.9 M, 6.2 M, 71.3 M and 70.4 M, all with COCO's 80 classes and no auxiliary head.


def head(channels: tuple[int, ...], classes: int, implicit: bool = False) -> int:
    outputs = 3 * (classes + 5)
    return sum(c * outputs + outputs + implicit * (c + outputs) for c in channels)


PYRAMIDS = {
    "yolov7": (256, 512, 1024),
    "yolov7-tiny": (128, 256, 512),
    "yolov7x": (320, 640, 1280),
    "yolov7-w6": (256, 512, 768, 1024),
}
AUXILIARY = ((128, 320), (256, 640), (384, 960), (512, 1280))  # inputs and outputs of 3×3 convolutions
PRINTED = {
    "yolov7": 36_905_341 - head(PYRAMIDS["yolov7"], 80),
    "yolov7-tiny": 6_219_709 - head(PYRAMIDS["yolov7-tiny"], 80),
    "yolov7x": 70_795_920 - head(PYRAMIDS["yolov7x"], 3, implicit=True),
    "yolov7-w6": 80_961_284
    - head(PYRAMIDS["yolov7-w6"], 4, implicit=True)
    - head((320, 640, 960, 1280), 4)
    - sum(9 * cin * cout + cout for cin, cout in AUXILIARY),
}
PAPER_M = {"yolov7": 36.9, "yolov7-tiny": 6.2, "yolov7x": 71.3, "yolov7-w6": 70.4}


@pytest.mark.parametrize("name", NAMES)
def test_backbone_and_neck_have_the_published_parameters(name: str) -> None:
    model: Any = build_model(f"{name}.yaml")
    body = model.model[:-1]
    assert tuple(tower[0].conv.in_channels for tower in model.model[-1].cv2) == PYRAMIDS[name]
    folded = sum(module.num_features for module in body.modules() if isinstance(module, nn.BatchNorm2d))
    for module in body.modules():
        if type(module).__name__ == "RepConv":
            assert module.bn is None  # the original's has no identity, because its widths differ
            folded += module.conv2.conv.weight.numel() + module.c2  # the 1×1 branch, and its second bias
    whole = sum(weight.numel() for weight in body.parameters())
    assert name != "yolov7" or whole == 37_620_125 - 457_725
    count = whole - folded
    assert count == PRINTED[name]
    assert round((count + head(PYRAMIDS[name], 80)) / 1e6, 1) == PAPER_M[name]
    assert model.stride.tolist() == [8.0, 16.0, 32.0, 64.0][: len(PYRAMIDS[name])]


@pytest.mark.parametrize("name", NAMES)
def test_activations_are_the_published_ones(name: str) -> None:
    found = {m for m in build_model(narrow(name)).modules() if type(m).__module__ == "torch.nn.modules.activation"}
    wanted = "LeakyReLU(negative_slope=0.1)" if name == "yolov7-tiny" else "SiLU()"
    assert {str(activation) for activation in found} == {wanted}


def test_the_x_of_a_name_is_no_scale_of_another_file() -> None:
    """Ultralytics reads yolov7x as scale x of yolov7 where there is no yolov7x."""
    model: Any = build_model("yolov7x.yaml")
    assert len(model.model) == 133
    assert model.model[0].conv.out_channels == 40


def test_a_file_of_the_user_goes_before_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import yaml

    monkeypatch.chdir(tmp_path)
    Path("yolov7.yaml").write_text(yaml.safe_dump({**narrow("yolov7-tiny"), "nc": 7}))
    assert len(load_model("yolov7.yaml").names) == 7  # type: ignore[arg-type]
    assert read_architecture("yolov8n.yaml")["scale"] == "n"  # and Ultralytics' own names stay
    with pytest.raises(CheckpointError, match=r"yolov77\.yaml does not describe a model"):
        load_model("yolov77.yaml")


@pytest.mark.parametrize("name", NAMES)
def test_it_trains(name: str) -> None:
    torch.manual_seed(0)
    found = losses(build_model(narrow(name), nc=3), 3, imgsz(name))
    assert found[2] < found[0]


@pytest.mark.parametrize("name", NAMES)
def test_it_is_pruned_everywhere(name: str) -> None:
    model = randomised(build_model(narrow(name), nc=3))
    settings = Prune(percent=0.4, importance="random", budget=Budget(multiple_of=2, min_width=2))
    planned = plan_pruning(model, settings, imgsz(name) // 2)
    pruned = apply_plan(model, planned.plan)
    assert check_oracle(planned.graph, pruned, planned.choice.keep) < 1e-4
    last = f"model.{len(model.model) - 1}."  # type: ignore[arg-type]
    assert all(group.startswith(last) for group in planned.graph.frozen())  # the outputs of the head alone
    assert planned.metrics()["params"][1] < 0.6 * planned.metrics()["params"][0]


def test_a_trainer_finds_the_name() -> None:
    from compress.training.trainers import PlanTrainer

    trainer: Any = PlanTrainer.__new__(PlanTrainer)
    trainer.args = SimpleNamespace()
    trainer.data = {"nc": 2, "channels": 3, "names": {0: "a", 1: "b"}}
    model = trainer.get_model("yolov7-tiny.yaml", None, verbose=False)
    assert (model.yaml["nc"], len(model.model)) == (2, 78)
    again = trainer.get_model(model.yaml, model, verbose=False)  # as a resumed training does
    assert torch.equal(again.model[0].conv.weight, model.model[0].conv.weight)
    assert again.yaml["activation"] == "torch.nn.LeakyReLU(0.1)"
