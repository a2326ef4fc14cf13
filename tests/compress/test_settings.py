from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from compress.errors import SettingsError
from compress.latency.measured import wanted_of
from compress.settings import (
    Budget,
    Export,
    Finetune,
    LayerRule,
    Prune,
    Run,
    Sparsity,
    Training,
    load_budget,
    load_run,
    parse,
    training_args,
)

ROOT = Path(__file__).parents[2]


def content(**changes: Any) -> dict[str, Any]:
    trainings = {name: {"epochs": 3} for name in ("train", "sparsify", "finetune")}
    return {"name": "a", "model": "m.pt", "data": "d.yaml", "prune": {"percent": 0.5}, **trainings, **changes}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(content()))
    return path


def refusal(kind: type, given: dict[str, Any]) -> str:
    with pytest.raises(SettingsError) as caught:
        parse(kind, given, "run.yaml")
    return str(caught.value)


def test_a_small_config_is_completed() -> None:
    run = parse(Run, content(), "run.yaml")
    assert (run.train.epochs, run.train.batch, run.imgsz, run.seed) == (3, 16, 640, 0)
    assert (run.prune.percent, run.prune.macs, run.prune.importance, run.prune.budget) == (0.5, None, "bn", Budget())
    assert run.sparsify.optimizer == "SGD"  # and "auto" for the other trainings
    assert run.finetune.optimizer == "auto"
    assert run.benchmark.runtimes == ("torch", "onnxruntime")


def test_settings_cannot_be_changed_afterwards() -> None:
    run = parse(Run, content(), "run.yaml")
    with pytest.raises(ValueError, match="frozen"):
        run.train.epochs = 4


def test_all_mistakes_come_at_once() -> None:
    wrong = content(
        name="../up",
        imgsz=16,
        bach=8,
        train={"epochs": -1, "amp": "yes"},
        prune={"percent": 1.5, "budget": {"multiple_of": 0, "rules": [{"freeze": True, "layer": "x"}]}},
    )
    del wrong["finetune"]
    text = refusal(Run, wrong)
    assert text.startswith("run.yaml: ")
    for mistake in (
        "name: String should match pattern",
        "imgsz: Input should be greater than or equal to 32 (got 16)",
        "train.epochs: Input should be greater than or equal to 0 (got -1)",
        "train.amp: Input should be a valid boolean (got 'yes')",
        "prune.percent: Input should be less than 1 (got 1.5)",
        "prune.budget.multiple_of: Input should be greater than or equal to 1 (got 0)",
        "'prune.budget.rules.0.layers' is missing",
        "unknown key 'prune.budget.rules.0.layer'",
        "'finetune' is missing",
        "unknown key 'bach'",
    ):
        assert mistake in text
    assert text.count(";") == 9
    assert "\n" not in text


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-0.1, "greater than or equal to 0 (got -0.1)"),
        (1.0, "less than 1 (got 1.0)"),
        (1.5, "less than 1 (got 1.5)"),
        (float("nan"), "a finite number"),
        (float("inf"), "a finite number"),
        ("0.5", "a valid number (got '0.5')"),
        (True, "a valid number (got True)"),
    ],
)
def test_a_ratio_lies_between_0_and_1(value: Any, message: str) -> None:
    text = refusal(Prune, {"percent": value})
    assert text.startswith("run.yaml: percent: Input should be ")
    assert message in text


@pytest.mark.parametrize("key", ["macs", "params"])
@pytest.mark.parametrize("value", [0.0, 1.0, -1.0])
def test_a_share_that_remains_is_neither_none_nor_all(key: str, value: float) -> None:
    assert refusal(Prune, {key: value}).startswith(f"run.yaml: {key}: Input should be ")


def test_nothing_may_be_removed() -> None:
    assert parse(Prune, {"percent": 0.0}, "run.yaml").percent == 0.0


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({}, "got none"),
        ({"percent": 0.5, "macs": 0.5}, "got percent, macs"),
        ({"percent": 0.5, "macs": 0.5, "params": 0.5}, "got percent, macs, params"),
    ],
)
def test_exactly_one_target(given: dict[str, float], named: str) -> None:
    text = refusal(Run, content(prune=given))
    targets = "percent, macs, params, latency, speedup, keep_importance"
    assert text == f"run.yaml: prune: exactly one of {targets} is needed, {named}"


def test_without_a_sparsity_training_what_follows_starts_from_the_trained_model() -> None:
    assert [Sparsity(epochs=epochs, start="model").from_trained for epochs in (0, 1)] == [True, False]
    assert Sparsity(epochs=1).from_trained


def test_an_engine_is_of_the_size_of_the_pipeline() -> None:
    message = "trt.imgsz is 320 and imgsz 640: leave trt.imgsz out"
    assert message in refusal(Run, content(trt={"imgsz": "320"}))


def test_a_benchmark_needs_a_runtime() -> None:
    assert "benchmark.runtimes" in refusal(Run, content(benchmark={"runtimes": []}))


def test_how_a_device_is_reached_does_not_tell_two_cuts_apart() -> None:
    asked = Prune(speedup=2.0, device="rpi5", host="pi", python="venv/bin/python", bootstrap=True)
    wanted = wanted_of(asked, 320)
    assert (wanted.host, wanted.python, wanted.bootstrap) == ("pi", "venv/bin/python", True)
    assert asked.model_dump() == Prune(speedup=2.0, device="rpi5", host="pi").model_dump()


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"macs": 0.5, "device": "rpi5"}, "device: only with latency, speedup or keep_importance"),
        (
            {"percent": 0.5, "threads": 2, "table": "t.json"},
            "threads, table: only with latency, speedup or keep_importance",
        ),
        (
            {"macs": 0.5, "device": "rpi5", "python": "venv/bin/python", "bootstrap": True},
            "python, bootstrap, device: only with latency, speedup or keep_importance",
        ),
    ],
)
def test_where_it_runs_is_asked_for_with_a_latency_only(given: dict[str, Any], named: str) -> None:
    assert named in refusal(Prune, given)
    rest = {key: value for key, value in given.items() if key not in ("macs", "percent")}
    assert parse(Prune, {**rest, "speedup": 2.0}, "run.yaml").by_latency


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"distill": False, "cwd": 1.0}, "cwd goes with distill: true"),
        ({"distill": False, "teacher": "large.pt"}, "teacher goes with distill: true"),
        ({"cwd": 1.0, "ld_temperature": 2.0}, "ld_temperature goes with ld above 0"),
        ({"distil_off_epochs": 3}, "distil_off_epochs 3 must be below epochs 3: the teacher would never be asked"),
    ],
)
def test_a_distillation_that_would_not_happen_is_refused(given: dict[str, Any], message: str) -> None:
    assert message in refusal(Finetune, {"epochs": 3, **given})


@pytest.mark.parametrize("kind", [Training, Sparsity, Finetune])
def test_what_is_a_setting_of_its_own_is_not_given_twice(kind: type[Training]) -> None:
    """The one among the other arguments would win without a word."""
    once = parse(kind, {"epochs": 3, "args": {"batch": 4, "nbs": 8}}, "stage")
    assert once.args == {"batch": 4, "nbs": 8}
    found = refusal(kind, {"epochs": 3, "batch": 8, "args": {"batch": 4}})
    assert "'batch' is a setting of its own, beside args (--batch): do not give it in both" in found


def test_a_penalty_goes_with_no_rescaling_optimizer_wherever_that_is_named() -> None:
    assert "sr goes with optimizer: SGD" in refusal(Sparsity, {"epochs": 3, "args": {"optimizer": "AdamW"}})
    assert parse(Sparsity, {"epochs": 3, "sr": 0.0, "args": {"optimizer": "AdamW"}}, "stage").sr == 0.0


def test_only_lambda_that_is_given_decays() -> None:
    assert "sr_decay goes with a number for sr" in refusal(Sparsity, {"epochs": 3, "sr": "auto", "sr_decay": 0.5})


def test_what_is_cut_does_not_depend_on_how_it_is_repaired() -> None:
    plain = Prune(macs=0.5, importance="taylor")
    repaired = Prune(macs=0.5, importance="taylor", fold=False, recalibrate_images=0, reconstruct_images=128)
    assert repaired.without_repairs() == plain
    assert plain.without_repairs() == plain != Prune(macs=0.4, importance="taylor").without_repairs()


@pytest.mark.parametrize(("given", "named"), [({"conf": 0.5}, "conf"), ({"iou": 0.5, "max_det": 3}, "iou")])
def test_suppression_is_told_something_only_where_it_is(given: dict[str, Any], named: str) -> None:
    assert parse(Export, {**given, "nms": True}, "export").changed(named) == named
    with pytest.raises(SettingsError, match=f"{named} goes with nms: without, all boxes leave the graph"):
        parse(Export, given, "export")


@pytest.mark.parametrize("key", ["percent", "macs", "params"])
def test_any_one_target(key: str) -> None:
    assert getattr(parse(Prune, {key: 0.25}, "run.yaml"), key) == 0.25


@pytest.mark.parametrize(("key", "value"), [("sr", -1e-4), ("sr_decay", 0.0), ("sr_decay", 1.1), ("start", "middle")])
def test_sparsity_out_of_range(key: str, value: Any) -> None:
    assert f"{key}: " in refusal(Sparsity, {"epochs": 3, key: value})


def test_overrides_reach_every_depth(config: Path) -> None:
    overrides = [
        "imgsz=320",
        "train.epochs=20",
        "train.args.nbs=16",
        "sparsify.sr=1e-4",
        "prune.percent=null",
        "prune.macs=0.5",
        "prune.budget.multiple_of=4",
        "prune.budget.rules=[{layers: 'model.0.*', freeze: true}]",
        "benchmark.runtimes=[onnxruntime]",
        "train.epochs=21",
    ]
    run = load_run(config, overrides)
    assert run.imgsz == 320
    assert run.train.epochs == 21  # the last one wins
    assert run.train.args == {"nbs": 16}
    assert run.sparsify.sr == 1e-4
    assert (run.prune.percent, run.prune.macs) == (None, 0.5)
    assert run.prune.budget.multiple_of == 4
    assert run.prune.budget.rules == (LayerRule(layers="model.0.*", freeze=True),)
    assert run.benchmark.runtimes == ("onnxruntime",)
    assert run.finetune.epochs == 3


@pytest.mark.parametrize(
    ("text", "device"),
    [("0", "0"), ("[0, 1]", "0,1"), ("0,1", "0,1"), ("cpu", "cpu"), ("cuda:0", "cuda:0"), ("'0'", "0"), ("-1", "-1")],
)
def test_a_device_is_written_as_ultralytics_takes_it(config: Path, text: str, device: str) -> None:
    assert load_run(config, [f"device={text}"]).device == device


@pytest.mark.parametrize("text", ["true", "[a]", "0.5"])
def test_what_is_no_device_is_refused(config: Path, text: str) -> None:
    with pytest.raises(SettingsError, match="device: Input should be a valid string"):
        load_run(config, [f"device={text}"])


def test_an_override_changes_one_place_of_an_anchored_section(config: Path) -> None:
    sections = "train: &t {epochs: 3, args: {nbs: 8}}\nsparsify: *t\nfinetune: *t\nprune: {percent: 0.5}"
    config.write_text(f"name: a\nmodel: m.pt\ndata: d.yaml\n{sections}\n")
    run = load_run(config, ["finetune.epochs=5", "finetune.args.nbs=16"])
    assert (run.finetune.epochs, run.finetune.args) == (5, {"nbs": 16})
    assert (run.train.epochs, run.train.args, run.sparsify.epochs) == (3, {"nbs": 8}, 3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epochs", "'train.epochs' must have the form key=value"),
        ("=5", "'=5' must have the form key=value"),
        ("train.epoch=5", "unknown key 'train.epoch', did you mean 'epochs'?"),
        ("trian.epochs=5", "unknown key 'trian', did you mean 'train'?"),
        ("prune.budget.rules=[{layer: a}]", "unknown key 'prune.budget.rules.0.layer', did you mean 'layers'?"),
        ("prune.percent=50", "prune.percent: Input should be less than 1 (got 50): a share is meant, such as 0.5"),
        ("name.first=5", "'name.first': 'name' is a value, not a section"),
        ("train.epochs=[", "'train.epochs=[' has a value that is not valid YAML"),
        ("name=2024-13-01", "'name=2024-13-01' has a value that is not valid YAML"),
        ("train.epochs=ten", "train.epochs: Input should be a valid integer (got 'ten')"),
        ("train.lr0=.inf", "train.lr0: Input should be a finite number"),
        ("train.args=!!python/object/apply:os.getcwd []", "has a value that is not valid YAML"),
    ],
)
def test_a_wrong_override_is_named(config: Path, override: str, message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_run(config, [override])
    assert message in str(caught.value)


def test_only_where_a_share_is_meant_one_is_proposed(config: Path) -> None:
    with pytest.raises(SettingsError, match=r"less than or equal to 22 \(got 25\)$"):
        load_run(config, ["export.opset=25"])


@pytest.mark.parametrize(
    ("text", "number"), [("1e-4", 1e-4), ("-2E3", -2000.0), (".5e1", 5.0), ("1.5e+2", 150.0), ("1.0e-4", 1e-4)]
)
def test_numbers_with_an_exponent_are_numbers(config: Path, text: str, number: float) -> None:
    assert training_args([f"lr0={text}"]) == {"lr0": number}
    config.write_text(yaml.safe_dump(content(sparsify="?")).replace("'?'", f"{{epochs: 1, args: {{x: {text}}}}}"))
    assert load_run(config, []).sparsify.args == {"x": number}


@pytest.mark.parametrize("word", ["e4", "1e", "0x1g", "1e-4x", "yolov8n.pt", "1.2.3"])
def test_words_stay_words(word: str) -> None:
    assert training_args([f"key={word}"]) == {"key": word}


def test_texts_are_taken_as_they_are(config: Path) -> None:
    """Paths may look like YAML."""
    run = load_run(config, [], {"model": "a #1.pt", "data": "[x]: {y}.yaml"})
    assert (run.model, run.data) == ("a #1.pt", "[x]: {y}.yaml")


def test_a_budget_may_be_a_file(config: Path, tmp_path: Path) -> None:
    budget = tmp_path / "budget.yaml"
    budget.write_text("multiple_of: 4\nrules:\n  - {layers: 'model.22.*', max_removed: 0.5}\n")
    expected = Budget(multiple_of=4, rules=(LayerRule(layers="model.22.*", max_removed=0.5),))
    assert load_run(config, [f"prune.budget={budget}"]).prune.budget == expected
    assert load_budget(budget) == expected


def test_a_wrong_budget_file_is_named(config: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"none\.yaml does not exist"):
        load_run(config, [f"prune.budget={tmp_path}/none.yaml"])
    budget = tmp_path / "budget.yaml"
    budget.write_text("multipleof: 4\nmin_width: 0\n")
    with pytest.raises(SettingsError, match=r"budget\.yaml: min_width: .*; unknown key 'multipleof'"):
        load_budget(budget)
    with pytest.raises(SettingsError, match=r"run\.yaml: .*unknown key 'prune\.budget\.multipleof'"):
        load_run(config, [f"prune.budget={budget}"])


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (b"name: [", "is not valid YAML"),
        (b"just words", "must hold a mapping of keys to values, it holds str"),
        (b"", "it holds NoneType"),
        (b"- a\n", "it holds list"),
        (b"name: \xff\xfe", "cannot be read"),
        (b"name: !!python/object/apply:os.getcwd []", "is not valid YAML"),
        (b"name: 2024-13-01", "is not valid YAML"),
        (b"? &a [1]\n: 2\n", "is not valid YAML"),
        (b"train: &t {epochs: 1, args: {x: *t}}", "holds what a configuration cannot"),
    ],
)
def test_a_file_that_is_no_configuration(config: Path, written: bytes, message: str) -> None:
    config.write_bytes(written)
    with pytest.raises(SettingsError) as caught:
        load_run(config, [])
    assert str(caught.value).startswith(str(config))
    assert message in str(caught.value)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"none\.yaml does not exist: check the path"):
        load_run(tmp_path / "none.yaml", [])
    with pytest.raises(SettingsError, match="cannot be read"):
        load_run(tmp_path, [])


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/pipelines/*.yaml")), ids=lambda path: path.name)
def test_every_pipeline_loads(path: Path, monkeypatch) -> None:
    from compress.training.launch import check_arguments

    monkeypatch.chdir(ROOT)
    run = load_run(path, [])
    assert run.name
    for section in (run.train, run.sparsify, run.finetune):
        check_arguments(section, path.stem)
    assert path.read_text(encoding="utf-8").startswith("# ")  # the command that runs it


def test_our_own_files_are_found_from_every_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = load_run(Path("configs/pipelines/demo.yaml"), [])
    assert (run.name, run.prune.budget.multiple_of) == ("demo", 16)  # its budget is configs/budgets/…
    (tmp_path / "configs" / "pipelines").mkdir(parents=True)
    (tmp_path / "configs" / "pipelines" / "demo.yaml").write_text("name: [")
    with pytest.raises(SettingsError, match=r"^configs/pipelines/demo\.yaml is not valid YAML"):
        load_run(Path("configs/pipelines/demo.yaml"), [])
    with pytest.raises(SettingsError, match=r"^configs/none\.yaml does not exist"):
        load_budget(Path("configs/none.yaml"))


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/budgets/*.yaml")), ids=lambda path: path.name)
def test_every_budget_loads(path: Path) -> None:
    assert load_budget(path).source  # where its rule comes from
