from __future__ import annotations

import json
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch import nn

import original
from compress import convert, manifest
from compress.checkpoint import build_model, load_model, load_trainable, plans_of, structure_hash
from compress.conversion.foreign import read_foreign
from compress.conversion.reading import modules
from compress.conversion.translate import translate
from compress.errors import CheckpointError, EspalierError, RunError, run_app
from compress.planning import plan_pruning
from compress.pruning.oracle import check_oracle
from compress.pruning.surgery import apply_plan
from compress.settings import Prune
from original import Rows
from step import losses
from topologies import randomised

SMALL = 1 / 16  # channels of the stand-ins, as a share of the published ones
TINY: Rows = [
    [-1, 1, "Conv", [16, 6, 2, 2]],
    [-1, 1, "Conv", [16, 3, 2]],
    [-1, 2, "C3", [16]],
    *[[-1, 1, "Conv", [16, 3, 2]] for _ in range(3)],
    [[-1, -2, -3], 1, "Detect", []],
]


@pytest.fixture(scope="module")
def official(shared: Path) -> Path:
    """YOLOv5n, as its repository released it."""
    return shared / "weights" / "yolov5n.pt"


@pytest.fixture(scope="module")
def converted(official: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("converted") / "yolov5n_anchorfree.pt"
    convert.convert_file(official, path)
    return path


def stand_in(rows: Rows, width: float = 1.0, **more: Any) -> original.Model:
    torch.manual_seed(0)
    model = original.Model(rows, width=width, **more)
    randomised(model)
    return model


def tiny(tmp_path: Path, change: Callable[[original.Model], object] = lambda model: None, rows: Rows = TINY) -> Path:
    """A checkpoint of a small YOLOv5, after a change."""
    model = stand_in(rows)
    change(model)
    return original.save(model, tmp_path / "tiny.pt")


def refusal(path: Path, **more: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        convert.convert(path, **more)
    assert str(path) in str(caught.value)
    return str(caught.value)


def worst_difference(reference: original.Model, model: Any, report: dict[str, Any], image: torch.Tensor) -> float:
    """Largest relative difference of any map of backbone and neck."""
    expected = original.feature_maps(reference.model, image)
    maps: list[torch.Tensor] = []
    with torch.inference_mode():
        for layer in model.model[:-1]:
            inputs = [
                image if s == -1 and not maps else maps[s] for s in ([layer.f] if type(layer.f) is int else layer.f)
            ]
            maps.append(layer(inputs if isinstance(layer.f, list) else inputs[0]))
    last = {row["from"]: row["layer"] for row in report["layers"]}  # the last row of each layer computes its output
    worst, compared = 0.0, 0
    for index, ours in ((int(name.split()[1]), maps[layer]) for name, layer in last.items() if name != "new"):
        assert ours.shape == expected[index].shape
        worst = max(worst, float((ours - expected[index]).abs().max() / expected[index].abs().max()))
        compared += 1
    assert compared + sum("layer" in name for name in report["left_behind"]) >= len(reference.model) - 1
    return worst


# The official file.


def test_feature_maps_of_the_official_yolov5n_stay(official: Path, shared: Path) -> None:
    import cv2

    file = next(iter(sorted((shared / "data" / "coco128").rglob("*.jpg"))))
    image = cv2.resize(cv2.imread(str(file)), (320, 320))[..., ::-1].copy()  # type: ignore[arg-type]
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    model, report = convert.convert(official)
    assert worst_difference(original.load(official), model, report, pixels) < 1e-5


def test_what_is_carried_over_is_counted(converted: Path, official: Path) -> None:
    report = json.loads(converted.with_suffix(".json").read_text())
    whole, head = 1_872_157, 115_005  # what YOLOv5 prints of itself, and of its Detect
    assert report["carried_over"]["parameters"] == whole - head
    assert report["carried_over"]["tensors"] == 57 * 6  # convolutions with batch norm
    assert report["carried_over"]["share"] == pytest.approx(
        (whole - head) / (whole - head + report["new"]["parameters"])
    )
    assert report["left_behind"] == ["layer 24 (Detect): anchor head"]
    assert (report["family"], report["depth_multiple"], report["width_multiple"]) == ("YOLOv5", 0.33, 0.25)
    assert report["classes"]["79"] == "toothbrush"
    assert report["parents"] == {"model": manifest.sha256_file(official)}
    assert report["files"] == {converted.name: manifest.sha256_file(converted)}


def test_the_result_is_the_yolov5n_of_ultralytics(converted: Path) -> None:
    from ultralytics.models import YOLO

    assert structure_hash(load_trainable(converted)) == structure_hash(build_model("yolov5n.yaml"))
    results: Any = YOLO(str(converted)).predict(torch.zeros(1, 3, 64, 64), verbose=False)
    assert results[0].names[0] == "person"


def test_the_result_takes_a_step_of_training(converted: Path) -> None:
    found = losses(load_trainable(converted), 80)
    assert found[2] < found[1] < found[0]


def test_the_result_is_pruned(converted: Path) -> None:
    model = load_trainable(converted)
    planned = plan_pruning(model, Prune(percent=0.3, importance="l1"), 64)
    pruned = apply_plan(model, planned.plan)
    assert check_oracle(planned.graph, pruned, planned.choice.keep) < 1e-4
    assert planned.metrics()["params"][1] < 0.8 * planned.metrics()["params"][0]
    assert len(plans_of(pruned)) == 1


# Stand-ins of what is not at hand.

FAMILIES: dict[str, tuple[Rows, float, int]] = {  # rows, width, image size
    "yolov5s": (original.yolov5(0.33), 0.125, 64),
    "yolov5m": (original.yolov5(0.67), 0.1875, 64),
    "yolov5x": (original.yolov5(1.33), 0.0625, 64),
    "yolov5 v5.0": (original.yolov5(0.33, focus=True), 0.125, 64),
    "yolov7": (original.yolov7(), SMALL, 64),
    "yolov7 for inference": (original.yolov7("Detect"), SMALL, 64),
    "yolov7-tiny": (original.yolov7_tiny(), 0.25, 64),
    "yolov7x": (original.yolov7x(), SMALL, 64),
    "yolov7-w6": (original.yolov7_w6(), SMALL, 128),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_feature_maps_stay(tmp_path: Path, name: str) -> None:
    rows, width, imgsz = FAMILIES[name]
    reference = stand_in(rows, width, nc=5)
    model, report = convert.convert(original.save(reference, tmp_path / "model.pt"))
    image = torch.rand(1, 3, imgsz, imgsz, generator=torch.Generator().manual_seed(1))
    assert worst_difference(reference, model, report, image) < 1e-5
    assert report["family"].lower() == name.split()[0][:6]
    assert report["classes"] == {i: f"thing{i}" for i in range(5)}
    before = sum(p.numel() for layer in list(reference.model)[:-1] for p in layer.parameters())
    if name == "yolov7-w6":
        before -= sum(p.numel() for layer in list(reference.model)[118:122] for p in layer.parameters())
        assert report["left_behind"][1:] == [f"layer {i} (Conv)" for i in range(118, 122)]
    assert report["carried_over"]["parameters"] == before


def weightless(rows: Rows) -> original.Model:
    """A network of the published widths whose weights are one number each."""
    with torch.device("meta"):
        model = original.Model(rows, nc=80, backbone=51)
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                module._parameters[name] = nn.Parameter(torch.zeros([]).expand(value.shape))
        for name, value in module._buffers.items():
            if value is not None:
                module._buffers[name] = torch.zeros([]).expand(value.shape)
    return model


def plain(rows: list[list[Any]]) -> list[Any]:
    """Rows with absolute sources, and without arguments that are the default."""
    found = []
    for index, (source, repeats, kind, args) in enumerate(rows):
        sources = source if isinstance(source, list) else [source]
        usual = {"nn.MaxPool2d": [2, 2, 0], "Conv": [0, 1, 1]}.get(kind, [])
        args = [*args, *usual[len(args) :]]
        found.append(([s if s >= 0 or index == 0 else index + s for s in sources], repeats, kind, list(map(str, args))))
    return found


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("yolov7", original.yolov7()),
        ("yolov7-tiny", original.yolov7_tiny()),
        ("yolov7x", original.yolov7x()),
        ("yolov7-w6", original.yolov7_w6()),
    ],
)
def test_yolov7_becomes_what_configs_models_spells(tmp_path: Path, root: Path, name: str, rows: Rows) -> None:
    from compress.settings import load_yaml

    foreign = read_foreign(original.save(weightless(rows), tmp_path / "model.pt"))
    layers = list(modules(modules(foreign.content["model"])["model"]).values())
    translation = translate(layers, 51)
    found = [row.spelled(index) for index, row in enumerate(translation.rows)]
    yaml = load_yaml(root / "configs" / "models" / f"{name}.yaml")
    assert plain(found) == plain(yaml["backbone"] + yaml["head"])
    assert translation.activation == yaml.get("activation", "torch.nn.SiLU()")


def test_a_repeated_width_gives_a_repconv_its_identity(tmp_path: Path) -> None:
    rows = [*TINY[:-1], [-1, 1, "RepConv", [16, 3, 1]], [[3, 4, 6], 1, "Detect", []]]
    reference = stand_in(rows)
    assert reference.model[6].rbr_identity is not None
    model, report = convert.convert(original.save(reference, tmp_path / "model.pt"))
    assert worst_difference(reference, model, report, torch.rand(1, 3, 64, 64)) < 1e-5


def test_yolov7_e6_halves_maps_in_two_ways(tmp_path: Path) -> None:
    reference = stand_in([*TINY[:3], [-1, 1, "DownC", [32]], *TINY[4:]])
    model, report = convert.convert(original.save(reference, tmp_path / "model.pt"))
    assert [row["kind"] for row in report["layers"] if "DownC" in row["from"]] == [
        *("Conv", "Conv", "nn.MaxPool2d", "Conv", "Concat")
    ]
    assert worst_difference(reference, model, report, torch.rand(1, 3, 64, 64)) < 1e-5


def test_names_may_be_a_dictionary(tmp_path: Path) -> None:
    """As they are since YOLOv5 v6.2."""

    def name(model: Any) -> None:
        model.names = {0: "a", 1: "b", 2: "c"}

    assert convert.convert(tiny(tmp_path, name))[1]["classes"] == {0: "a", 1: "b", 2: "c"}


def test_another_epsilon_moves_into_gamma(tmp_path: Path) -> None:
    reference = stand_in(TINY)
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.5
    model, report = convert.convert(original.save(reference, tmp_path / "model.pt"))
    assert {m.eps for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-3}
    assert worst_difference(reference, model, report, torch.rand(1, 3, 64, 64)) < 1e-5


def test_the_old_format_gives_the_same(tmp_path: Path) -> None:
    model = stand_in(TINY)
    old, _ = convert.convert(original.save(model, tmp_path / "old.pt", legacy=True))
    new, _ = convert.convert(original.save(model, tmp_path / "new.pt"))
    state = new.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in old.state_dict().items())  # the new head too


def test_what_a_training_leaves_beside_the_model_does_no_harm(tmp_path: Path) -> None:
    import datetime

    import numpy as np

    more = {
        "best_fitness": np.array([0.5]),
        "fitness": np.float64(0.25),
        "opt": {"save_dir": tmp_path, "device": torch.device("cpu")},
        "date": datetime.datetime(2022, 2, 8),
        "ema": stand_in(TINY),
        "optimizer": torch.optim.SGD([torch.zeros(2, requires_grad=True)], 0.1).state_dict(),
    }
    other = stand_in(TINY)
    nn.init.zeros_(other.model[0].conv.weight)  # type: ignore[union-attr]
    path = tmp_path / "last.pt"
    with original.original_modules():
        torch.save({"model": other, **more}, path)
    model: Any = convert.convert(path)[0]
    assert model.model[0].conv.weight.abs().sum() > 0  # the averaged weights were taken


# What cannot be converted.


def without_bn(model: original.Model) -> None:
    del model.model[1].bn


def fused_repconv(model: original.Model) -> None:
    model.model[4].rbr_reparam = nn.Conv2d(16, 16, 3, padding=1)


def other_act(model: original.Model) -> None:
    model.model[1].act = nn.LeakyReLU(0.2)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (without_bn, "layer 1 (Conv) is fused for inference"),
        (
            other_act,
            "must have one activation, they have: torch.nn.SiLU() in layer 0 (Conv), torch.nn.LeakyReLU(0.2) in",
        ),
        (lambda m: setattr(m.model[1], "act", nn.Mish()), "layer 1 (Conv) has the activation Mish"),
        (lambda m: setattr(m.model[1], "f", 7), "layer 1 (Conv) reads 7, which is no layer before it"),
        (lambda m: setattr(m.model[1], "f", "x"), "layer 1 (Conv) reads x"),
        (lambda m: delattr(m.model[2], "cv3"), "layer 2 (C3) lacks a part that its kind has ('cv3')"),
        (lambda m: setattr(m.model[2], "m", nn.Sequential()), "layer 2 (C3) holds nothing, not Bottleneck"),
        (lambda m: setattr(m.model[2].m[0], "add", False), "layer 2 (C3) has bottlenecks with and without a shortcut"),
        (lambda m: setattr(m, "names", ["a", "b"]), "its head knows 3 classes, but it names 2: give --nc"),
        (lambda m: setattr(m.model[-1], "nc", None), "its head knows None classes"),
        (lambda m: setattr(m.model[1].conv, "stride", (1, 2)), "'stride' must be one whole number for both directions"),
        (
            lambda m: setattr(m, "stride", torch.tensor([4.0, 8.0, 16.0])),
            "strides [4.0, 8.0, 16.0], the translated layers have",
        ),
        (
            lambda m: m.model[0].conv.weight.data.fill_(float("nan")),
            "layer 0 (Conv): conv.weight holds numbers that are",
        ),
        (
            lambda m: setattr(m.model[0], "bias", nn.Parameter(torch.zeros(3))),
            "layer 0 (Conv) and Conv differ in their t",
        ),
    ],
)
def test_a_layer_that_does_not_fit_is_named(tmp_path: Path, change: Callable, text: str) -> None:
    assert text in refusal(tiny(tmp_path, change))


def test_a_wrong_shape_is_named_with_both(tmp_path: Path) -> None:
    def narrow(model: Any) -> None:
        model.model[3].conv.weight = nn.Parameter(torch.zeros(16, 8, 3, 3))

    text = refusal(tiny(tmp_path, narrow))
    assert "layer 3 (Conv): conv.weight has the shape [16, 8, 3, 3], its place has [16, 16, 3, 3]" in text


def test_a_width_between_eights_is_named(tmp_path: Path) -> None:
    def cut(model: Any) -> None:
        model.model[5].conv.weight = nn.Parameter(torch.zeros(12, 16, 3, 3))

    assert "layer 5 (Conv): conv.weight has the shape [12, 16, 3, 3], its place has [16, 16, 3, 3]" in refusal(
        tiny(tmp_path, cut)
    )


def test_an_unknown_kind_is_named_with_its_index(tmp_path: Path) -> None:
    path = tiny(tmp_path, rows=[*TINY[:2], [-1, 1, "GhostConv", []], *TINY[2:]])
    assert "layer 2 (GhostConv) is of a kind that has no rule (models.common.GhostConv)" in refusal(path)


def test_a_fused_repconv_is_refused(tmp_path: Path) -> None:
    rows = [*TINY[:4], [-1, 1, "RepConv", [16, 3, 1]], *TINY[4:]]
    assert "layer 4 (RepConv) is fused for inference" in refusal(tiny(tmp_path, fused_repconv, rows))


def test_a_space_to_depth_feeds_convolutions_only(tmp_path: Path) -> None:
    rows = [[-1, 1, "ReOrg", []], [-1, 1, "MP", []], *TINY[1:]]
    assert "layer 1 (MP) reads a ReOrg, which only a Conv can" in refusal(tiny(tmp_path, rows=rows))


def test_another_head_is_refused(tmp_path: Path) -> None:
    path = tiny(tmp_path, rows=[*TINY[:-1], [[-1, -2, -3], 1, "Segment", []]])
    assert "its last layer is Segment, not Detect, IDetect, IAuxDetect: only detectors" in refusal(path)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"model": {"weight": torch.zeros(3)}}, "holds no model, only tensors or settings"),
        ({"weight": torch.zeros(3)}, "holds no model, only nothing"),
        ([1, 2], "holds no model, only tensors or settings"),
        ({"model": nn.Conv2d(3, 3, 1)}, "holds a torch.nn.modules.conv.Conv2d, which is no model of the YOLOv5"),
    ],
)
def test_other_files_are_told_apart(tmp_path: Path, content: object, text: str) -> None:
    torch.save(content, tmp_path / "other.pt")
    assert text in refusal(tmp_path / "other.pt")


def test_an_ultralytics_checkpoint_needs_no_conversion(dense: Path) -> None:
    assert refusal(dense) == f"{dense} is an Ultralytics checkpoint already: every command opens it as it is"


def test_a_changed_byte_ends_in_a_conversion_or_in_one_line(tmp_path: Path) -> None:
    rows = [[-1, 1, "Focus", [16, 3]], *TINY[1:3], [-1, 1, "SPPCSPC", [16]], [-1, 1, "RepConv", [16, 3, 1]], *TINY[3:]]
    with zipfile.ZipFile(tiny(tmp_path, rows=rows)) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    generator = random.Random(0)
    outcomes = set()
    for _ in range(50):
        with zipfile.ZipFile(tmp_path / "changed.pt", "w") as archive:
            for name, content in files.items():
                changed = bytearray(content)
                if name.endswith("data.pkl"):
                    changed[generator.randrange(len(changed))] = generator.randrange(256)
                archive.writestr(name, bytes(changed))
        try:
            convert.convert(tmp_path / "changed.pt")
            outcomes.add("converted")
        except CheckpointError as error:
            outcomes.add("damaged" if "damaged" in str(error) else "refused")
    assert {"converted", "damaged"} <= outcomes


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "none.pt")


def test_the_loader_points_to_the_conversion(tmp_path: Path) -> None:
    path = tiny(tmp_path)
    with pytest.raises(CheckpointError, match=r"if it is of YOLOv5 or YOLOv7, `python -m compress\.convert"):
        load_model(path)


# Classes, files, and the command.


def test_another_number_of_classes_gets_new_names(tmp_path: Path) -> None:
    path = tiny(tmp_path)
    model, report = convert.convert(path, nc=2)
    assert report["classes"] == model.names == {0: "class0", 1: "class1"}
    assert convert.convert(path, nc=3)[1]["classes"][2] == "thing2"
    head: Any = model.model[-1]  # type: ignore[index]
    assert head.nc == 2


def test_no_file_of_others_is_overwritten_by_the_report(tmp_path: Path) -> None:
    path, output = tiny(tmp_path), tmp_path / "coco.pt"
    (tmp_path / "coco.json").write_text('{"annotations": []}')
    with pytest.raises(RunError, match=r"coco\.json exists, where the report goes, and is none: choose another"):
        convert.convert_file(path, output)
    assert (tmp_path / "coco.json").read_text() == '{"annotations": []}'
    (tmp_path / "coco.json").write_text('{"stage": "convert"}')  # what a crash left
    assert convert.convert_file(path, output)["stage"] == "convert"


def test_a_finished_conversion_is_not_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, output = tiny(tmp_path), tmp_path / "new" / "out.pt"
    first = convert.convert_file(path, output)
    written = output.stat().st_mtime_ns
    assert json.loads(json.dumps(first)) == convert.convert_file(path, output)
    assert "finished before, unchanged" in capsys.readouterr().out
    assert output.stat().st_mtime_ns == written
    with pytest.raises(RunError, match="exists: choose another --output"):
        convert.convert_file(path, output, nc=7)
    with pytest.raises(RunError, match="exists: choose another --output"):
        convert.convert_file(path, path)
    assert sorted(p.name for p in output.parent.iterdir()) == ["out.json", "out.pt"]


def test_a_refused_conversion_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(EspalierError):
        convert.convert_file(tiny(tmp_path, without_bn), tmp_path / "out" / "out.pt")
    assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(RunError, match=r"must end in \.pt"):
        convert.convert_file(tiny(tmp_path), tmp_path / "out" / "out.onnx")


def test_the_command_prints_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = typer.main.get_command(convert.app)
    command.main([str(tiny(tmp_path)), "--output", str(tmp_path / "out.pt")], standalone_mode=False)
    printed = capsys.readouterr().out
    assert "layer 2 (C3)" in printed
    assert "left behind: layer 6 (Detect): anchor head" in printed
    assert load_model(tmp_path / "out.pt").names == {0: "thing0", 1: "thing1", 2: "thing2"}  # type: ignore[comparison-overlap]


def test_the_model_may_be_named_as_other_commands_name_it(
    tmp_path: Path, run_command: Callable[..., int], capsys
) -> None:
    path, output = tiny(tmp_path), tmp_path / "out.pt"
    assert run_command(convert.app, "--model", path, path, "--output", output) == 2
    assert "name one model" in capsys.readouterr().err
    assert run_command(convert.app, "--model", path, "--output", output) == 0
    assert output.is_file()


def test_names_from_a_file_are_text_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"from": "layer 0 ([/b])", "layer": 0, "kind": "Conv", "tensors": 1, "parameters": 2}
    part = {"tensors": 1, "parameters": 2, "share": 0.5}
    report = {"family": "YOLOv5", "classes": {0: "a"}, "carried_over": part, "new": part, "layers": [row]}
    convert.print_report({**report, "left_behind": ["layer 1 ([/b]\x1b[2J)"]})
    printed = capsys.readouterr().out
    assert "layer 0 ([/b])" in printed
    assert "left behind: layer 1 ([/b] [2J)" in printed


def test_a_mistake_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = typer.main.get_command(convert.app)
    arguments = [str(tiny(tmp_path, without_bn)), "--output", str(tmp_path / "out.pt")]
    with pytest.raises(SystemExit) as stop:
        run_app(lambda: command.main(arguments, prog_name="convert"))
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
