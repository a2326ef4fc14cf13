"""Every device file is complete, and a device is found by what people call it."""

from __future__ import annotations

from pathlib import Path

import pytest

from compress.devices import Device, device_budget, known_devices, load_device
from compress.errors import SettingsError
from compress.settings import Budget, load_budget, load_run, load_yaml, parse

ROOT = Path(__file__).parents[2]
PATHS = sorted((ROOT / "configs" / "devices").glob("*.yaml"))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_every_device_loads(path: Path) -> None:
    device = load_device(str(path))
    assert device.name == path.stem
    assert all(device.budgets[runtime].source for runtime in device.runtimes)
    assert len(device.notes) > 40


def test_the_devices_that_are_promised_are_there() -> None:
    jetsons = {f"jetson-{name}" for name in ("nano", "xavier", "orin-nano", "orin-agx", "thor")}
    assert set(known_devices()) == {"cpu", "cuda", "rpi4", "rpi5", "android", "arm-emulated", *jetsons}


def test_only_the_emulated_device_counts_instructions() -> None:
    counted = {name for name, device in known_devices().items() if device.counter}
    assert counted == {"arm-emulated"}


def test_a_runtime_computes_in_the_precision_of_its_device_where_it_can() -> None:
    cuda, pi = load_device("cuda"), load_device("rpi5")
    assert cuda.precision == pi.precision == "fp16"
    assert [cuda.precision_of(runtime) for runtime in cuda.runtimes] == [
        *["fp16"] * 3,  # tensorrt, onnxruntime-tensorrt, onnxruntime-cuda
        *("fp16", "fp32") * 2,  # torch-cudagraph-fp16, torch-cudagraph, torch-cuda-fp16, torch-cuda
    ]
    assert [pi.precision_of(runtime) for runtime in ("ncnn", "onnxruntime")] == ["fp16", "fp32"]
    assert {load_device("cpu").precision_of(runtime) for runtime in load_device("cpu").runtimes} == {"fp32"}


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("rpi5", "rpi5"),
        ("jetson", "jetson-orin-nano"),  # an alias goes before a part
        ("thor", "jetson-thor"),
        ("orin-a", "jetson-orin-agx"),
        ("emulated", "arm-emulated"),
        ("cpu", "cpu"),
    ],
)
def test_names_may_be_shortened(text: str, name: str) -> None:
    assert load_device(text).name == name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rip5", r"^unknown device 'rip5': choose one of rpi5, rpi4, .*cuda, or a \.yaml file$"),
        ("orin", r"^device 'orin' may be any of jetson-orin-agx, jetson-orin-nano: name one of them$"),
        ("", "^unknown device ''"),
        ("none.yaml", r"none\.yaml does not exist"),
    ],
)
def test_a_device_that_is_not_known(text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        load_device(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transport": "serial"}, "transport: "),
        ({"thread": 4}, "unknown key 'thread'"),
        ({"runtimes": ["ncnn", "torch"]}, "budgets must be of the runtimes ncnn, torch"),
        ({"read": [[]]}, "needs at least one word"),
        ({"read": ["vcgencmd get_throttled"]}, r"read\.0: "),  # a line for a shell is no list of words
        ({"unlock": []}, "lock needs unlock"),
        ({"ssh_config": "../../downloads/config"}, "ssh_config: String should match pattern"),
    ],
)
def test_a_wrong_device_file_says_what(changes: dict, message: str) -> None:
    content = load_yaml(ROOT / "configs" / "devices" / "rpi4.yaml")
    with pytest.raises(SettingsError, match=message):
        parse(Device, {**content, **changes}, "device")


def test_budgets_are_read_from_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rpi4").mkdir()  # a folder of that name is no budget
    monkeypatch.chdir(tmp_path)
    assert [load_budget(Path(text)).multiple_of for text in ("rpi5", "rpi5:onnxruntime", "rpi4", "cpu")] == [
        8,
        4,
        4,
        16,
    ]
    assert load_budget(ROOT / "configs/devices/arm-emulated.yaml").multiple_of == 4
    assert device_budget("jetson:tensorrt") == load_budget(Path("jetson-orin-nano"))
    with pytest.raises(SettingsError, match="rpi5 has no runtime 'onnx': choose one of ncnn, onnxruntime"):
        load_budget(Path("rpi5:onnx"))
    run = load_run(ROOT / "configs/pipelines/demo.yaml", ["prune.budget=rpi4"])
    assert run.prune.budget == device_budget("rpi4") != Budget()
