"""What a group is worth in mAP: how it is measured, kept, drawn, and put in the place of an importance."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress import checkpoint, manifest
from compress.channels.graph import Graph, build_graph
from compress.errors import DataError, SettingsError, run_app
from compress.planning import plan_pruning
from compress.prune import app as prune_app
from compress.prune import prune
from compress.pruning import batch_norm
from compress.pruning.sensitivity_file import SCHEMA, Sensitivity, Tie, load_sensitivity, rescaled
from compress.sensitivity import RESULT, Wanted, app, sensitivity
from compress.settings import Prune
from compress.training import mean_ap

WANTED = Wanted(shares=(0.5, 0.25), importance="l1", images=4, repair=False, imgsz=64)


@pytest.fixture
def graph(dense: Path) -> Graph:
    """The graph of the small detector."""
    return build_graph(checkpoint.load_model(dense), 64)


@pytest.fixture
def measured(monkeypatch) -> list[int]:
    """A mAP that is the number of parameters, in place of a real one; the values in the order of their measuring."""
    values: list[int] = []

    def score(network: Any) -> float:
        values.append(sum(p.numel() for p in network.parameters()))
        return values[-1] / 1e6

    monkeypatch.setattr(mean_ap, "scorer", lambda *_: score)
    return values


def test_every_tie_is_cut_alone_at_every_share(
    dense: Path, graph: Graph, tiny_data: Path, measured: list[int], tmp_path: Path
) -> None:
    path = sensitivity(dense, tiny_data, WANTED, tmp_path / "s")
    found = load_sensitivity(path, checkpoint.structure_hash(checkpoint.load_model(dense)))
    tied = {group.tie for group in graph.groups if not group.frozen}
    assert len(found.ties) == len(tied)
    assert len(measured) == 1 + 2 * len(tied)
    whole = graph.params(graph.widths)
    assert found.map50_95 == whole / 1e6
    indices = {group.name: index for index, group in enumerate(graph.groups)}
    for tie in found.ties:
        assert len({graph.groups[indices[name]].tie for name in tie.groups}) == 1
        for removed, left in zip(tie.removed, tie.map50_95, strict=True):
            widths = graph.widths.copy()
            for name in tie.groups:
                widths[indices[name]] -= round(removed * widths[indices[name]])
            assert left == graph.params(widths) / 1e6  # of this tie alone, so much was gone
    assert {removed for tie in found.ties for removed in tie.removed} == {0.25, 0.5}
    assert (tmp_path / "s" / "sensitivity.png").read_bytes()[:4] == b"\x89PNG"


def test_what_was_measured_before_an_interruption_is_kept(
    dense: Path, tiny_data: Path, measured: list[int], tmp_path: Path, monkeypatch
) -> None:
    class StopError(Exception):
        pass

    folder, add = tmp_path / "s", manifest.write_json

    def killed(path: Path, value: Any) -> None:
        add(path, value)
        if len(measured) == 4 and path.name == "measured.json":
            raise StopError

    monkeypatch.setattr(manifest, "write_json", killed)
    with pytest.raises(StopError):
        sensitivity(dense, tiny_data, WANTED, folder)
    monkeypatch.setattr(manifest, "write_json", add)
    sensitivity(dense, tiny_data, WANTED, folder)
    ties = json.loads((folder / RESULT).read_text())["ties"]
    assert len(measured) == 1 + 2 * len(ties)
    sensitivity(dense, tiny_data, WANTED, folder)
    assert len(measured) == 1 + 2 * len(ties)
    sensitivity(dense, tiny_data, WANTED.model_copy(update={"seed": 1}), folder)
    assert len(measured) == 2 * (1 + 2 * len(ties))
    assert (tmp_path / "s.1" / RESULT).exists()


def test_a_repair_that_harms_the_uncut_model_is_left_out(
    dense: Path, tiny_data: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    scores, mended = iter([0.5, 0.2]), []
    monkeypatch.setattr(batch_norm, "recalibrate_batch_norm", lambda *_: mended.append(1))
    monkeypatch.setattr(mean_ap, "scorer", lambda *_: lambda _: next(scores, 0.1))
    found = sensitivity(dense, tiny_data, WANTED.model_copy(update={"repair": True, "shares": (0.5,)}), tmp_path / "s")
    content = json.loads(found.read_text())
    assert (content["map50_95"], content["repaired"], len(mended)) == (0.5, False, 1)
    assert "to mend it takes the uncut model from mAP50-95 0.5000 to 0.2000: " in capsys.readouterr().out


def test_every_cut_is_mended_like_the_uncut_model(dense: Path, tiny_data: Path, tmp_path: Path, monkeypatch) -> None:
    mended: list[int] = []
    monkeypatch.setattr(
        batch_norm, "recalibrate_batch_norm", lambda _, images, imgsz: mended.append(len(images) * imgsz)
    )
    monkeypatch.setattr(mean_ap, "scorer", lambda *_: lambda _: 0.5)
    found = sensitivity(dense, tiny_data, WANTED.model_copy(update={"repair": True, "shares": (0.5,)}), tmp_path / "s")
    content = json.loads(found.read_text())
    assert (content["repaired"], mended) == (True, [4 * 64] * (1 + len(content["ties"])))


def test_a_model_that_finds_nothing_has_nothing_to_lose(
    dense: Path, tiny_data: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(mean_ap, "scorer", lambda *_: lambda _: 0.0)
    with pytest.raises(DataError, match=r"dense\.pt finds nothing on 4 images of .*'val': train it first"):
        sensitivity(dense, tiny_data, WANTED, tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_without_output_the_folder_names_what_was_measured(
    dense: Path, tiny_data: Path, measured: list[int], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [
        "--model",
        str(dense),
        "--data",
        str(tiny_data),
        "--imgsz",
        "64",
        "--importance",
        "l1",
        "--images",
        "2",
    ]
    monkeypatch.setattr(sys, "argv", ["compress.sensitivity", *arguments, "--no-repair", "--shares", "0.5", "0.75"])
    for _ in range(2):
        with pytest.raises(SystemExit) as stop:
            run_app(app)
        assert stop.value.code == 0
    (folder,) = [path for path in (tmp_path / "runs" / "sensitivity").iterdir() if path.is_dir()]
    assert folder.name.startswith("dense-")
    assert len(measured) == 1 + 2 * len(json.loads((folder / RESULT).read_text())["ties"])


def say(graph: Graph, structure: str, left: dict[str, tuple[float, ...]]) -> Sensitivity:
    """A measurement of some groups at a quarter, a half and three quarters; uncut the mAP is 0.8."""
    ties = tuple(Tie(groups=(name,), removed=(0.25, 0.5, 0.75), map50_95=values) for name, values in left.items())
    return Sensitivity(
        schema_version=SCHEMA,
        structure=structure,
        model="m.pt",
        data="d.yaml",
        split="val",
        imgsz=64,
        images=4,
        importance="l1",
        repaired=True,
        map50_95=0.8,
        ties=ties,
    )


def test_the_share_of_importance_becomes_the_share_of_map(graph: Graph) -> None:
    group = next(g for g in graph.groups if g.width == 16 and not g.frozen)
    index = graph.groups.index(group)
    generator = np.random.default_rng(0)
    scores = [generator.random(g.width) for g in graph.groups]
    found = rescaled(graph, scores, say(graph, "", {group.name: (0.76, 0.6, 0.4)}))
    assert np.array_equal(np.argsort(found[index]), np.argsort(scores[index]))
    ascending = np.sort(found[index])
    kept = [ascending[count:].sum() for count in (0, 4, 8, 12)]
    assert kept == pytest.approx([1.0, 0.95, 0.75, 0.5], abs=0.02)  # up to the little that the importance says
    assert [score.sum() for score in found] == pytest.approx([1.0] * len(found))


def test_noise_makes_no_score_negative_and_no_cut_free(graph: Graph) -> None:
    group = next(g for g in graph.groups if g.width == 16 and not g.frozen)
    index = graph.groups.index(group)
    scores = [np.arange(1.0, g.width + 1) for g in graph.groups]
    found = rescaled(graph, scores, say(graph, "", {group.name: (0.82, 0.81, 0.0)}))[index]
    assert found.min() > 0.0
    assert (np.diff(found) > 0.0).all()  # where mAP is silent, the importance speaks
    assert found[:8].sum() < 0.02
    # Of 0.02 own importance, and a mAP that is gone at three quarters.
    assert np.sort(found)[12:].sum() > 0.24


def test_a_plan_spares_what_was_measured_to_be_dear(
    dense: Path, graph: Graph, tiny_data: Path, tmp_path: Path, capsys
) -> None:
    model = checkpoint.load_model(dense)
    structure, path = checkpoint.structure_hash(model), tmp_path / "s.json"
    free = [group.name for group in graph.groups if not group.frozen]
    budget = {"multiple_of": 2, "min_width": 2}
    content = {"macs": 0.5, "importance": "l1", "budget": budget}
    without = plan_pruning(model, Prune.model_validate_json(json.dumps(content)), 64).choice.widths / graph.widths
    index = int(np.argmin(without))
    dear = graph.groups[index].name
    left = {name: (0.1, 0.05, 0.01) if name == dear else (0.79, 0.78, 0.76) for name in free}
    manifest.write_json(path, say(graph, structure, left).model_dump(mode="json"))
    settings = Prune.model_validate_json(json.dumps({**content, "sensitivity": str(path)}))
    planned = plan_pruning(model, settings, 64)
    assert without[index] < 1.0
    assert planned.choice.widths[index] == graph.groups[index].width
    assert graph.macs(planned.choice.widths) <= 0.5 * graph.macs(graph.widths)
    # The content of the file is an input of the stage.
    for _ in range(2):
        prune(
            dense,
            tiny_data,
            settings.model_copy(update={"recalibrate_images": 0, "fold": False}),
            64,
            0,
            tmp_path / "p",
        )
    assert capsys.readouterr().out.count("finished before, unchanged") == 1
    parents = json.loads((tmp_path / "p" / "manifest.json").read_text())["parents"]
    assert parents["sensitivity"] == manifest.sha256_file(path)


def test_a_measurement_of_another_model_or_version_is_refused(graph: Graph, dense: Path, tmp_path: Path) -> None:
    content = say(graph, "0" * 64, {}).model_dump(mode="json")
    manifest.write_json(tmp_path / "s.json", content)
    settings = Prune(macs=0.5, sensitivity=str(tmp_path / "s.json"))
    with pytest.raises(SettingsError, match=r"s\.json was measured on another model \(structure 000000000000, not "):
        plan_pruning(checkpoint.load_model(dense), settings, 64)
    for other, found in (({**content, "schema_version": 7}, 7), ({"schema": 1, "stage": "train"}, None)):
        manifest.write_json(tmp_path / "s.json", other)
        with pytest.raises(SettingsError) as caught:
            plan_pruning(checkpoint.load_model(dense), settings, 64)
        assert str(caught.value) == (
            f"{tmp_path / 's.json'} is no sensitivity of schema 1 (it has {found}): "
            "measure it with python -m compress.sensitivity"
        )
    with pytest.raises(SettingsError, match=r"none\.json does not exist"):
        plan_pruning(checkpoint.load_model(dense), Prune(macs=0.5, sensitivity=str(tmp_path / "none.json")), 64)


def test_a_measurement_of_other_weights_or_images_is_said(
    dense: Path, tiny_data: Path, measured: list[int], tmp_path: Path, monkeypatch, capsys
) -> None:
    path = sensitivity(dense, tiny_data, WANTED, tmp_path / "s")
    found = json.loads(path.read_text())
    assert found["model_sha256"] == manifest.sha256_file(dense)
    words = ["--macs", "0.9", "--imgsz", "64", "--importance", "l1", "--multiple-of", "2", "--sensitivity", str(path)]

    def said(model: Path, data: Path) -> str:
        prune_app([*words, "--model", str(model), "--data", str(data), "--dry-run"], standalone_mode=False)
        return capsys.readouterr().err

    assert said(dense, tiny_data) == ""
    monkeypatch.setattr(checkpoint, "require", lambda path: None)
    monkeypatch.setattr(checkpoint, "load_model", lambda path, known=checkpoint.load_model: known(dense))
    assert said(Path("yolov8n.yaml"), tiny_data) == ""  # Ultralytics' own: there is no such file
    monkeypatch.undo()
    other = tmp_path / "other.pt"
    network = checkpoint.load_model(dense)
    next(network.parameters()).data.mul_(2.0)
    checkpoint.save_model(network, other, {})
    assert said(other, tiny_data) == (
        f"warning: {path} was measured on the weights of dense.pt, not of this other.pt: fine after sparsity training "
        "of the same model, otherwise measure it anew with python -m compress.sensitivity\n"
    )
    manifest.write_json(path, {**found, "data_fingerprint": "of other images"})
    assert f"was measured on {tiny_data.name} as it was then, not {tiny_data}: fine" in said(dense, tiny_data)
    del found["model_sha256"], found["data_fingerprint"]  # as older versions wrote it
    manifest.write_json(path, found)
    assert said(other, tiny_data) == ""


def test_the_quick_map_is_that_of_the_benchmark(shared: Path) -> None:
    from benchmark.accuracy import evaluate

    model, data = shared / "weights" / "yolov8n_deq.pt", shared / "data" / "coco128" / "coco128val.yaml"
    network = checkpoint.load_model(model)
    measure = mean_ap.scorer(network, data, mean_ap.sample_images(data, "val", 1000), 96)
    found = measure(network)
    assert found > 0.05
    assert found == pytest.approx(evaluate(model, data, imgsz=96, threads=1)["map50_95"], abs=1e-4)


def test_the_option_of_prune_names_the_file(graph: Graph, dense: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    manifest.write_json(tmp_path / "s.json", say(graph, "0" * 64, {}).model_dump(mode="json"))
    arguments = ["--model", str(dense), "--macs", "0.5", "--imgsz", "64", "--sensitivity", str(tmp_path / "s.json")]
    monkeypatch.setattr(sys, "argv", ["compress.prune", *arguments, "--dry-run"])
    with pytest.raises(SystemExit) as stop:
        run_app(prune_app)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 's.json'} was measured on another model")
