"""The networks of network slimming's own tables: their size, what their pipelines remove, that they can be trained."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from compress.checkpoint import build_model, load_model, plans_of, read_architecture, structure_hash, task_of
from compress.data.pixels import centre_crop
from compress.finetune import finetune
from compress.manifest import read_json
from compress.planning import plan_pruning
from compress.prune import prune
from compress.pruning.oracle import check_oracle
from compress.pruning.surgery import apply_plan
from compress.rounds import check_schedule
from compress.settings import Finetune, Run, Sparsity, Training, load_run
from compress.shapes import Shapes, generate
from compress.sparsify import sparsify
from compress.tasks import metric_of
from compress.train import Common, train
from compress.training.launch import check_arguments
from scripts.studies.slimming import PAPER, PAPER_MULTIPASS
from topologies import randomised

PIPELINES = Path(__file__).parents[2] / "configs" / "pipelines"
NAMES = ("vgg19", "resnet164", "densenet40")


def pipeline(name: str) -> Run:
    return load_run(PIPELINES / f"slimming_{name}.yaml", [])


def parameters(model: Any) -> int:
    return sum(weight.numel() for weight in model.parameters())


# Parameters.


def test_vgg19_has_the_parameters_of_the_paper() -> None:
    widths = [3, 64, 64, 128, 128, *[256] * 4, *[512] * 8]
    convolutions = sum(9 * a * b for a, b in pairwise(widths))
    whole = parameters(build_model("vgg19-cifar-cls.yaml"))
    assert whole == convolutions + 2 * sum(widths[1:]) + 512 * 10 + 10
    assert round(whole / 1e6, 2) == 20.04


def test_resnet164_differs_from_the_paper_by_batch_norms() -> None:
    """Pre-activation has one norm before each convolution and a last one; ours has one behind each, shortcuts too."""
    convolutions, before, behind = 9 * 3 * 16, 0, 2 * 16
    for inputs, width in ((16, 16), (64, 32), (128, 64)):
        for came in (inputs, *[4 * width] * 17):
            convolutions += came * width + 9 * width * width + 4 * width * width
            before += 2 * (came + width + width)
            behind += 2 * (width + width + 4 * width)
        convolutions += inputs * 4 * width  # the shortcut of the first bottleneck
        behind += 2 * 4 * width
    before += 2 * 256
    linear = 256 * 10 + 10
    assert round((convolutions + before + linear) / 1e6, 2) == 1.70
    assert parameters(build_model("resnet164-cifar-cls.yaml")) == convolutions + behind + linear
    assert abs(behind - before) < 2000


def test_densenet40_has_the_parameters_of_the_paper_and_biases() -> None:
    channels, weights, biases, norms = 16, 9 * 3 * 16, 16, 0
    for block in range(3):
        for _ in range(12):
            weights, biases, norms = weights + 9 * channels * 12, biases + 12, norms + 2 * channels
            channels += 12
        if block < 2:
            weights, biases, norms = weights + channels * channels, biases + channels, norms + 2 * channels
    norms += 2 * channels
    theirs = weights + norms + channels * 10 + 10
    assert round(theirs / 1e6, 2) == 1.02
    assert parameters(build_model("densenet40-cifar-cls.yaml")) == theirs + biases


@pytest.mark.parametrize("name", [*NAMES, "vgg13-quarter"])
def test_they_are_classifiers_with_relu(name: str) -> None:
    model = build_model(f"{name}-cifar-cls.yaml", nc=7)
    assert (task_of(model), metric_of(task_of(model))) == ("classify", "top1")
    kinds = {type(m).__name__ for m in model.modules() if type(m).__module__ == "torch.nn.modules.activation"}
    assert kinds == {"ReLU"}
    last: Any = model.model[-1]  # type: ignore[index]
    assert last.out_features == 7


# What the pipelines remove.


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_percentage_removes_what_the_paper_removes(name: str, seed: int) -> None:
    """With γ that say nothing, so it is the structure alone that is asked; and the cut is exact."""
    settings = pipeline(name)
    model = randomised(build_model(settings.model))
    planned = plan_pruning(model, settings.prune.model_copy(update={"importance": "random"}), 32, seed)
    pruned = apply_plan(model, planned.plan)
    assert check_oracle(planned.graph, pruned, planned.choice.keep) < 1e-4
    last = len(model.model) - 1  # type: ignore[arg-type]
    assert planned.graph.frozen() == {f"model.{last}": "output of the model"}
    found = planned.metrics()
    before, after = (count - 10 for count in found["channels"])  # without the ten outputs
    assert 1 - after / before == pytest.approx(settings.prune.percent, abs=0.001)
    removed = {kind: 1 - found[kind][1] / found[kind][0] for kind in ("params", "macs")}
    assert removed["params"] >= PAPER[settings.model]["params_removed"]
    assert removed["macs"] >= PAPER[settings.model]["flops_removed"]
    assert found["params"] == [parameters(model), parameters(pruned)]


def test_four_passes_remove_what_the_paper_removes() -> None:
    settings = pipeline("vgg19_multipass")
    assert settings.iterations == PAPER_MULTIPASS["passes"]
    model = build_model(settings.model)
    check_schedule(model, settings.prune, settings.iterations, 32)
    found = plan_pruning(model, settings.prune.model_copy(update={"importance": "random"}), 32).metrics()
    assert found["channels"][1] - 10 == (found["channels"][0] - 10) / 2**settings.iterations
    assert 1 - found["params"][1] / found["params"][0] >= PAPER_MULTIPASS["params_removed"]
    assert 1 - found["macs"][1] / found["macs"][0] >= PAPER_MULTIPASS["flops_removed"]


@pytest.mark.parametrize("path", sorted(PIPELINES.glob("slimming_*.yaml")), ids=lambda path: path.stem)
def test_the_pipelines_train_as_the_paper_does(path: Path) -> None:
    settings = load_run(path, [])
    assert path.stem == settings.name
    for section in (settings.train, settings.sparsify, settings.finetune):
        check_arguments(section, path.stem)
        assert (section.optimizer, section.batch, section.args["momentum"]) == ("SGD", 64, 0.9)
        assert section.args["weight_decay"] == 1e-4
    assert settings.sparsify.sr_decay == 1.0
    assert not settings.finetune.distill
    assert settings.prune.importance == "bn"
    if "short" not in path.stem:
        assert settings.sparsify.sr == (1e-4 if "vgg" in path.stem else 1e-5)
        assert settings.train.epochs == settings.sparsify.epochs == settings.finetune.epochs == 160


# Training.


@pytest.fixture(scope="module")
def crops(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shapes = Shapes(train=16, val=8, test=4, imgsz=96, task="classify")
    return generate(tmp_path_factory.mktemp("crops") / "shapes", shapes)


def small(name: str) -> dict[str, Any]:
    """A model's YAML with fewer channels or fewer layers."""
    cfg = read_architecture(f"{name}-cifar-cls.yaml")
    if name == "vgg19":
        cfg["width_multiple"], cfg["head"][-1][3] = 1 / 16, [32, "nc"]
    elif name == "resnet164":
        for row in cfg["backbone"][1:]:
            row[3][-1] = 2
    else:
        cfg["backbone"] = cfg["backbone"][: 2 + 3 * 5]  # the stem and three layers
        cfg["head"][-1][3] = [16 + 3 * 12, "nc"]
    return cfg


@pytest.mark.parametrize("name", NAMES)
def test_they_go_through_all_stages(name: str, crops: Path, tmp_path: Path) -> None:
    from ultralytics import YOLO

    from export.onnx import export_onnx
    from export.parity import compare

    settings, common = pipeline(name), Common(imgsz=32, workers=0)
    training = {**settings.train.model_dump(), "epochs": 1, "batch": 8, "lr0": 0.01}
    cut = settings.prune.model_copy(update={"recalibrate_images": 8})
    cfg = tmp_path / "small.yaml"
    cfg.write_text(yaml.safe_dump(small(name)))
    dense = train(str(cfg), crops, Training(**training), common, tmp_path / "train")
    sparse = sparsify(str(cfg), crops, Sparsity(**training, sr=0.01), common, tmp_path / "sparsify", cut)
    pruned = prune(sparse, crops, cut, 32, 0, tmp_path / "prune")
    tuned = finetune(pruned, dense, crops, Finetune(**training, distill=False), common, tmp_path / "finetune")

    model = load_model(tuned)
    assert structure_hash(model) == structure_hash(load_model(pruned)) != structure_hash(load_model(dense))
    assert len(plans_of(model)) == 1
    before, after = read_json(tmp_path / "prune" / "manifest.json")["metrics"]["channels"]
    assert after - 6 == pytest.approx((before - 6) * (1 - (cut.percent or 0)), abs=1)
    pictures = sorted(crops.glob("val/*/*.jpg"))[:2]
    likeliest = [int(model(torch.from_numpy(centre_crop(picture, 32))).argmax()) for picture in pictures]
    stock: Any = YOLO(str(tuned)).predict(pictures, imgsz=32, device="cpu", verbose=False)
    assert [found.probs.top1 for found in stock] == likeliest
    artefact = export_onnx(tuned, tmp_path / "a.onnx", imgsz=32, settings=settings.export)
    record = compare(tuned, artefact, pictures, 32)
    assert record["passed"]
    assert record["classes"] == {"images": 2, "other_class": 0}
