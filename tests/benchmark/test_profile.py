"""Latency tables from measurements: whole and by layer, resumed, refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import configs
from benchmark import layer_times, observe, profile, sites, system, variants
from benchmark.observe import Wanted
from benchmark.profile import points_path
from benchmark.transports import Local
from compress import manifest
from compress.channels.graph import build_graph
from compress.checkpoint import build_model, save_model
from compress.errors import BenchmarkError, BudgetError, SettingsError
from compress.latency.table import evaluate, load_table
from compress.settings import Budget

IMGSZ = 64
BUDGET = Budget(multiple_of=4, min_width=4)
MODEL = {
    "nc": 3,
    "backbone": [
        [-1, 1, "Conv", [8, 3, 2]],
        [-1, 1, "Conv", [16, 3, 2]],
        [-1, 1, "C2f", [16, True]],
        [-1, 1, "Conv", [16, 3, 2]],
        [-1, 1, "DWConv", [16, 3, 2]],
        [-1, 1, "Conv", [24, 3, 2]],
    ],
    "head": [[[3, 4, 5], 1, "Detect", ["nc"]]],
}


@pytest.fixture(scope="module")
def model() -> Any:
    return build_model(MODEL)


def wanted(**changes: Any) -> Wanted:
    return Wanted(**{"runtime": "onnxruntime", "imgsz": IMGSZ, "budget": BUDGET, "variants": 14, **changes})


@pytest.fixture
def stand_in(monkeypatch) -> list[str]:
    """Instead of exporters and runtimes: a network costs 1 ms and 1 ms per 1000 weights; whole networks only."""
    seen: list[str] = []

    def export(network: Any, name: str, settings: Wanted, folder: Path, place: Any) -> Path:
        path = folder / f"{name}.onnx"
        path.write_text(str(1 + sum(p.numel() for p in network.parameters() if p.ndim == 4) / 1000))
        return path

    def observe_once(site: Any, dense: Path, made: Path, settings: Wanted, known: dict[str, Any]) -> dict[str, Any]:
        seen.append(made.stem)
        values = {"dense": [float(dense.read_text())] * 4, "whole": [float(made.read_text())] * 4}
        return {**values, "segments": [], "version": "1.0", "precision": "fp32"}

    monkeypatch.setattr(variants, "export", export)
    monkeypatch.setattr(observe, "observe_once", observe_once)
    return seen


@pytest.mark.parametrize("runtime", layer_times.RUNTIMES)
def test_a_network_is_measured_whole_and_by_layer(runtime: str, model: Any, tmp_path: Path) -> None:
    path = variants.export(model, "dense", wanted(runtime=runtime), tmp_path, Local())
    assert [p.name for p in tmp_path.iterdir()] == [path.name]  # the checkpoint on the way is gone
    found = layer_times.measure(runtime, str(path), str(path), 1, IMGSZ, 0, 1e9)
    rounds = (len(found["dense"]), len(found["whole"]))
    assert (*rounds, found["precision"]) == (layer_times.MIN_ROUNDS, layer_times.MIN_ROUNDS, "fp32")
    convolutions = [value for name, value in model.state_dict().items() if value.ndim == 4 and "dfl" not in name]
    shapes = [segment["shape"] for segment in found["segments"]]
    assert shapes[0] == [8, 3, 3, 3]
    assert [16, 1, 3, 3] in shapes  # depthwise
    # All of the model's convolutions; onnxruntime also has that of the decoder.
    assert sorted(shape for shape in shapes if shape and shape != [1, 16, 1, 1]) == sorted(
        list(value.shape) for value in convolutions
    )
    assert found["segments"][-1]["name"] == "tail"
    assert all(segment["cost"] > 0 for segment in found["segments"][:-1])


def test_rounds_go_on_until_the_ratio_is_known_but_not_for_ever() -> None:
    steady, wavering = [4.0] * layer_times.MAX_ROUNDS, [4.0 + count for count in range(layer_times.MAX_ROUNDS)]
    rounds = range(layer_times.MAX_ROUNDS + 1)
    for other, wanted_rounds in ((steady, layer_times.MIN_ROUNDS), (wavering, layer_times.MAX_ROUNDS)):
        done = [layer_times.is_enough(steady[:count], other[:count], 0.05, 0) for count in rounds]
        assert done.index(True) == wanted_rounds
    alike = [layer_times.is_enough(steady[:count], wavering[:count], 10.0, 0) for count in rounds]
    assert alike.index(True) == layer_times.MIN_ROUNDS  # a wider interval is soon reached


def test_layers_are_added_up_to_the_convolution_behind_them() -> None:
    layers = [("a", [8, 3, 3, 3], 1.0), ("", None, 0.5), ("b", [4, 8, 1, 1], 3.0), ("", None, 0.25)]
    assert layer_times.join(layers) == [
        ("a", [8, 3, 3, 3], 1.0),
        ("b", [4, 8, 1, 1], 3.5),
        ("tail", [], 0.25),
    ]


def test_halves_count_as_the_convolution_that_they_were() -> None:
    weights = {"/cv1/first/Conv": [16, 8, 1, 1], "/cv1/second/Conv": [32, 8, 1, 1], "/odd/first/Conv": [4, 4, 1, 1]}
    first, second, odd = (layer_times.whole(name, weights) for name in weights)
    assert first == second == ("/cv1/Conv", [48, 8, 1, 1])
    assert odd == ("/odd/first/Conv", [4, 4, 1, 1])
    layers = [(*second, 2.0), ("", None, 0.5), ("b", [4, 8, 1, 1], 3.0), (*first, 1.0)]
    assert layer_times.join(layers) == [
        ("/cv1/Conv", [48, 8, 1, 1], 3.0),
        ("b", [4, 8, 1, 1], 3.5),
        ("tail", [], 0.0),
    ]


def test_a_process_of_its_own_measures_and_says_what_is_wrong(model: Any, tmp_path: Path) -> None:
    path = variants.export(model, "dense", wanted(), tmp_path, Local())
    site = sites.here()
    record = observe.observe_once(site, path, path, wanted(), {})
    assert layer_times.MIN_ROUNDS <= len(record["whole"]) <= layer_times.MAX_ROUNDS
    (tmp_path / "broken.onnx").write_text("no graph")
    with pytest.raises(BenchmarkError, match=r"broken\.onnx on onnxruntime: ValueError: .* cannot be opened"):
        observe.observe_once(site, path, tmp_path / "broken.onnx", wanted(), {})


def test_pytorch_is_measured_whole(model: Any, tmp_path: Path) -> None:
    import torch

    settings = wanted(runtime="torch")
    path = variants.export(model, "dense", settings, tmp_path, Local())
    assert path == tmp_path / "dense.pt"
    record = observe.observe_once(sites.here(), path, path, settings, {})
    assert layer_times.MIN_ROUNDS <= len(record["dense"]) == len(record["whole"]) <= layer_times.MAX_ROUNDS
    assert all(cost > 0 for cost in (*record["dense"], *record["whole"]))
    assert (record["segments"], record["precision"], record["version"]) == ([], "fp32", torch.__version__)


@pytest.mark.parametrize(("runtime", "stored"), [("onnxruntime-cuda", 10), ("onnxruntime", 1)])
def test_networks_for_onnxruntime_are_stored_in_what_they_compute_in(
    runtime: str, stored: int, model: Any, tmp_path: Path
) -> None:
    import onnx

    path = variants.export(model, "dense", wanted(device="cuda", runtime=runtime), tmp_path, Local())
    types = {item.data_type for item in onnx.load(path).graph.initializer if len(item.dims) == 4}
    assert types == {stored}  # TensorProto.FLOAT16, and FLOAT


def test_a_worker_tells_what_each_layer_costs(model: Any, tmp_path: Path) -> None:
    path = variants.export(model, "dense", wanted(runtime="ncnn"), tmp_path, Local())
    with sites.worker(sites.here(), "ncnn", path, threads=1, imgsz=IMGSZ, seed=0) as worker:
        worker.receive()
        answer, _ = worker.ask({"layers": True})
    shapes = layer_times.ncnn_shapes(path / "model.ncnn.param")
    assert set(shapes) < {row["name"] for row in answer["layers"]}
    assert all(row["ms"] > 0 for row in answer["layers"] if row["name"] in shapes)
    assert [16, 1, 3, 3] in shapes.values()


def test_a_table_predicts_what_was_measured(model: Any, stand_in: list[str], tmp_path: Path) -> None:
    table, path = profile.profile(model, wanted(variants=40), tmp_path / "table.json")
    assert path == tmp_path / "table.json"
    assert load_table(path) == table
    assert (table.unit, table.fit.variants, table.runtime_version) == ("ms", 40, "1.0")
    weights = sum(p.numel() for p in model.parameters() if p.ndim == 4)
    assert table.dense == pytest.approx(1 + weights / 1000, rel=1e-4)
    graph = build_graph(model, IMGSZ)
    assert evaluate(table, graph)(graph.widths) == pytest.approx(table.dense, rel=0.02)
    assert len(stand_in) == 40
    profile.profile(model, wanted(variants=40), path)  # finished: nothing is measured
    assert len(stand_in) == 40


def test_an_interrupted_run_goes_on(model: Any, stand_in: list[str], tmp_path: Path, monkeypatch, capsys) -> None:
    path = tmp_path / "table.json"
    honest = observe.observe_once

    def killed(site: Any, dense: Path, made: Path, *rest: Any) -> dict[str, Any]:
        if made.stem == "variant5":
            raise KeyboardInterrupt
        return honest(site, dense, made, *rest)

    monkeypatch.setattr(observe, "observe_once", killed)
    with pytest.raises(KeyboardInterrupt):
        profile.profile(model, wanted(), path)
    with points_path(path).open("a") as stream:
        stream.write('{"index": 5, "wid')  # what kill -9 leaves
    monkeypatch.setattr(observe, "observe_once", honest)
    table, _ = profile.profile(model, wanted(), path)
    assert "goes on after 5 of 14 networks" in capsys.readouterr().out
    assert stand_in == [f"variant{index}" for index in range(14)]
    assert table.fit.variants == 14
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")) == [
        "table.json",
        "table.points.jsonl",
    ]


def test_points_of_other_settings_are_not_mixed(model: Any, stand_in: list[str], tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    profile.profile(model, wanted(), path)
    path.unlink()
    with pytest.raises(SettingsError, match="holds points of other settings: choose another --output, or delete it"):
        profile.profile(model, wanted(seed=1), path)


@pytest.mark.parametrize(
    ("now", "reason"),
    [
        ({"cpu": "a toaster"}, "was measured on .*, this is a toaster"),
        ({"version": "99.0"}, r"was measured in onnxruntime .*, 99\.0 is installed"),
    ],
)
def test_a_table_that_no_longer_speaks_of_this_machine_is_measured_anew(
    now: dict[str, str], reason: str, model: Any, stand_in: list[str], tmp_path: Path, monkeypatch, capsys
) -> None:
    """`compress.prune` refuses such a table and asks for a new one."""
    path = tmp_path / "table.json"
    old, _ = profile.profile(model, wanted(), path)
    tools, device = manifest.tool_versions(), system.device()
    changed = {"onnxruntime": now.get("version", tools["onnxruntime"])}
    monkeypatch.setattr(manifest, "tool_versions", lambda: tools | changed)
    monkeypatch.setattr(system, "device", lambda: {**device, "cpu": now.get("cpu", device["cpu"])})
    table, _ = profile.profile(model, wanted(), path)
    assert len(stand_in) == 2 * 14
    assert table.machine == now.get("cpu", old.machine)
    assert load_table(tmp_path / "table.json.1") == old
    assert points_path(path).with_name("table.points.jsonl.1").exists()
    assert re.search(reason, capsys.readouterr().out)
    profile.profile(model, wanted(), path)
    assert len(stand_in) == 2 * 14


def test_a_finished_table_says_what_it_was_measured_with(
    model: Any, stand_in: list[str], tmp_path: Path, capsys
) -> None:
    profile.profile(model, wanted(), tmp_path / "table.json")
    profile.profile(model, wanted(variants=20), tmp_path / "table.json")
    assert "finished before (with variants 14, not 20: for those choose another --output)" in capsys.readouterr().out
    old = {"wanted": {"host": "pi", "python": "python3", "variants": 14}}
    said = profile._otherwise(old, wanted(device="rpi5", host="other", python=None))
    assert said == " (with host pi, not other: for those choose another --output)"


def test_a_table_of_something_else_is_not_overwritten(model: Any, stand_in: list[str], tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    profile.profile(model, wanted(), path)
    with pytest.raises(SettingsError, match="is of runtime onnxruntime, not ncnn: choose another --output"):
        profile.profile(model, wanted(runtime="ncnn"), path)


def test_a_device_of_a_file_is_measured_under_its_own_name(model: Any, stand_in: list[str], tmp_path: Path) -> None:
    own = (Path(configs.__file__).parent / "devices" / "cpu.yaml").read_text().replace("name: cpu", "name: mine")
    (tmp_path / "devices.yaml").write_text(own)
    asked = wanted(device=str(tmp_path / "devices.yaml"))
    table, path = profile.profile(model, asked, tmp_path / "table.json")
    assert (table.device, len(stand_in)) == ("mine", 14)
    assert json.loads(points_path(path).read_text().partition("\n")[0])["wanted"]["device"] == "mine"
    profile.profile(model, asked, path)
    assert len(stand_in) == 14


def test_networks_are_deleted_once_they_are_measured(
    model: Any, stand_in: list[str], tmp_path: Path, monkeypatch
) -> None:
    honest, there = observe.observe_once, []

    def look(site: Any, dense: Path, made: Path, *rest: Any) -> dict[str, Any]:
        there.append(sorted(file.stem for file in made.parent.iterdir()))
        return honest(site, dense, made, *rest)

    monkeypatch.setattr(observe, "observe_once", look)
    profile.profile(model, wanted(), tmp_path / "table.json")
    assert there == [["dense", f"variant{index}"] for index in range(14)]


def test_a_budget_without_a_choice_is_refused_before_anything_is_measured(
    model: Any, stand_in: list[str], tmp_path: Path
) -> None:
    with pytest.raises(BudgetError, match="allows no group of channels another width"):
        profile.profile(model, wanted(budget=Budget(max_removed=0.0)), tmp_path / "table.json")
    assert stand_in == []


def test_one_noisy_network_of_the_fewest_says_what_to_do(
    model: Any, stand_in: list[str], tmp_path: Path, monkeypatch
) -> None:
    honest = observe.observe_once

    def noisy(site: Any, dense: Path, made: Path, *rest: Any) -> dict[str, Any]:
        record = honest(site, dense, made, *rest)
        return {**record, "whole": [1.0, 2.0, 5.0, 9.0]} if made.stem == "variant3" else record

    monkeypatch.setattr(observe, "observe_once", noisy)
    with pytest.raises(BenchmarkError, match=r"1 of 12 networks are noisy .* run the same command again"):
        profile.profile(model, wanted(variants=12), tmp_path / "table.json")
    table, _ = profile.profile(model, wanted(variants=14), tmp_path / "more.json")
    assert table.fit.variants == 13


def test_noise_is_measured_again_and_then_refused(model: Any, stand_in: list[str], tmp_path: Path, monkeypatch) -> None:
    honest = observe.observe_once

    def noisy(site: Any, dense: Path, made: Path, *rest: Any) -> dict[str, Any]:
        record = honest(site, dense, made, *rest)
        half = len(record["whole"]) // 2
        return {**record, "whole": record["whole"][:half] + [2 * value for value in record["whole"][half:]]}

    monkeypatch.setattr(observe, "observe_once", noisy)
    with pytest.raises(BenchmarkError, match="14 of 14 networks are noisy"):
        profile.profile(model, wanted(), tmp_path / "table.json")
    assert stand_in.count("variant3") == observe.ATTEMPTS
    points = [json.loads(line) for line in points_path(tmp_path / "table.json").read_text().splitlines()[1:]]
    assert {point["noisy"] for point in points} == {True}
    measured = len(stand_in)
    table, _ = profile.profile(model, wanted(max_interval=1.0), tmp_path / "table.json")  # all are good enough then
    assert (table.fit.variants, len(stand_in)) == (14, measured)
    (tmp_path / "table.json").unlink()
    monkeypatch.setattr(observe, "observe_once", honest)  # a quiet day: all of them are measured anew
    table, _ = profile.profile(model, wanted(), tmp_path / "table.json")
    assert (table.fit.variants, len(stand_in)) == (14, measured + 14)


def test_a_quiet_second_attempt_is_taken(model: Any, stand_in: list[str], tmp_path: Path, monkeypatch) -> None:
    honest, calls = observe.observe_once, []

    def once_noisy(site: Any, dense: Path, made: Path, *rest: Any) -> dict[str, Any]:
        calls.append(made.stem)
        record = honest(site, dense, made, *rest)
        return record if calls.count(made.stem) > 1 else {**record, "whole": [1.0, 2.0, 5.0, 9.0]}

    monkeypatch.setattr(observe, "observe_once", once_noisy)
    table, path = profile.profile(model, wanted(), tmp_path / "table.json")
    points = [json.loads(line) for line in points_path(path).read_text().splitlines()[1:]]
    assert {point["attempts"] for point in points} == {2}
    assert table.fit.variants == 14


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "toaster"}, "unknown device 'toaster'"),
        (
            {"runtime": "tensorrt"},
            "cpu does not run 'tensorrt': choose one of onnxruntime, ncnn, torch, torch-compiled",
        ),
        ({"device": "jetson"}, "jetson-orin-nano does not run 'onnxruntime': choose one of tensorrt"),
    ],
)
def test_what_the_device_does_not_run_is_refused(changes: dict, message: str, model: Any, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=message):
        profile.profile(model, wanted(**changes), tmp_path / "table.json")


def test_the_command_says_how_good_the_table_is(
    model: Any, stand_in: list[str], tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    save_model(model, tmp_path / "model.pt", {})
    words = ["--model", "model.pt", "--imgsz", "64", "--multiple-of", "4", "--min-width", "4", "--variants", "14"]
    profile.app(words, standalone_mode=False)
    said = capsys.readouterr().out
    assert "profile: runs/tables/cpu-onnxruntime-1t-64px-" in said
    assert "(14 networks, dense" in said
    assert len(list((tmp_path / "runs" / "tables").glob("*.json"))) == 1
