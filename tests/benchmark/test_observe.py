"""Networks on devices that are stood in for: what is asked of their workers, and what comes of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmark import observe, sites
from benchmark.layer_times import MIN_ROUNDS
from benchmark.observe import BURST, LEAD_IN, Wanted
from compress.devices import load_device
from compress.errors import SettingsError
from compress.settings import Budget

DENSE, MODEL = Path("dense_ncnn_model"), Path("plan_ncnn_model")


@pytest.fixture
def asked(monkeypatch) -> list[tuple[str, int]]:
    """Let the dense model cost 8 and the other one 4; the first sample of a burst is dear."""
    seen: list[tuple[str, int]] = []

    class Worker:
        def __init__(self, model: Path, counted: bool) -> None:
            self.name, self.cost = model.name, 8.0 if model == DENSE else 4.0
            self.key = "instructions" if counted else "samples_ms"

        def receive(self) -> tuple[dict[str, Any], bytes]:
            return {"facts": {"version": "1.2", "precision": "fp16", "more": 0}}, b""

        def ask(self, content: dict[str, int]) -> tuple[dict[str, Any], bytes]:
            if "layers" in content:
                seen.append((self.name, 0))
                unit, scale = ("instructions", 1_000_000) if self.key == "instructions" else ("ms", 1)
                return {"layers": [{"name": "conv_0", unit: 3 * scale}, {"name": "swish", unit: scale}]}, b""
            seen.append((self.name, content["queries"]))
            return {
                self.key: [self.cost if i or content["queries"] == 1 else 99.0 for i in range(content["queries"])]
            }, b""

    @contextmanager
    def worker(site: Any, runtime: str, model: Path, **options: Any) -> Iterator[Worker]:
        assert (runtime, options) == ("ncnn", {"threads": 1, "imgsz": 64, "seed": 0})
        yield Worker(model, site.device.counter is not None)

    monkeypatch.setattr(sites, "worker", worker)
    monkeypatch.setattr(observe, "ncnn_shapes", lambda path: {"conv_0": [8, 3, 3, 3]})
    return seen


def site(name: str) -> sites.Site:
    return sites.Site(load_device(name), sites.Local(), "folder")


def wanted(device: str, **changes: Any) -> Wanted:
    return Wanted(**{"runtime": "ncnn", "imgsz": 64, "budget": Budget(), "device": device, **changes})


def test_a_device_with_a_clock_measures_both_in_turns(asked: list[tuple[str, int]]) -> None:
    found = observe.observe(site("rpi5"), DENSE, MODEL, wanted("rpi5"))
    assert (found["speedup"], found["interval"], found["noisy"], found["attempts"]) == (2.0, [2.0, 2.0], False, 1)
    assert found["record"] == {
        "dense": [8.0] * MIN_ROUNDS,
        "whole": [4.0] * MIN_ROUNDS,
        "segments": [
            {"name": "conv_0", "shape": [8, 3, 3, 3], "cost": 3.0},
            {"name": "tail", "shape": [], "cost": 1.0},
        ],
        "version": "1.2",
        "precision": "fp16",
    }
    turns = [(DENSE.name, LEAD_IN + BURST), (MODEL.name, LEAD_IN + BURST)] * (MIN_ROUNDS + 1)
    assert asked == [*turns, (MODEL.name, 0)]


def test_a_device_that_counts_counts_the_dense_model_once(asked: list[tuple[str, int]]) -> None:
    known: dict[str, Any] = {}
    for _ in range(2):
        found = observe.observe(site("arm-emulated"), DENSE, MODEL, wanted("arm-emulated"), known)
        assert found["speedup"] == 2.0
        assert found["record"]["segments"][0]["cost"] == 3e6
    assert asked.count((DENSE.name, 1)) == observe.COUNTED
    assert asked.count((MODEL.name, 1)) == 2 * observe.COUNTED


def test_the_rounds_of_all_attempts_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first is not narrow enough; with the rounds of the second it is."""
    first, second = [8.0, 9.0, 7.0, 8.0, 8.5, 7.5], [8.0, 8.1, 7.9, 8.0, 10.0, 6.5]
    attempts = iter([first, second])

    def once(*_: Any) -> dict[str, Any]:
        dense = next(attempts)
        segments = [{"name": "conv_0", "shape": [1], "cost": dense[1]}]
        return {"dense": dense, "whole": [4.0] * 6, "segments": segments, "version": "1"}

    monkeypatch.setattr(observe, "observe_once", once)
    found = observe.observe(site("rpi5"), DENSE, MODEL, wanted("rpi5", max_interval=0.04))
    assert (found["attempts"], found["noisy"], found["speedup"]) == (2, False, 2.0)
    assert found["record"]["dense"] == first + second
    assert found["record"]["segments"] == [{"name": "conv_0", "shape": [1], "cost": pytest.approx((9.0 + 8.1) / 2)}]


def test_what_stays_wide_is_noisy(monkeypatch: pytest.MonkeyPatch) -> None:
    record = {"dense": [4.0, 5.5, 7.0, 9.0, 11.0, 14.0], "whole": [4.0] * 6, "segments": [], "version": "1"}
    monkeypatch.setattr(observe, "observe_once", lambda *_: record)
    found = observe.observe(site("rpi5"), DENSE, MODEL, wanted("rpi5"))
    assert (found["attempts"], found["noisy"]) == (observe.ATTEMPTS, True)
    assert found["interval_width"] > 0.05


def test_units_and_precision_are_those_of_the_device() -> None:
    assert (wanted("arm-emulated").unit, wanted("arm-emulated").half) == ("instructions", False)
    assert (wanted("rpi5").unit, wanted("rpi5").half) == ("ms", True)
    assert wanted("rpi5", runtime="onnxruntime").half is False  # its CPU kernels compute in nothing less
    assert [wanted("cuda", runtime=runtime).half for runtime in ("tensorrt", "torch-cuda", "torch-cuda-fp16")] == [
        True,
        False,
        True,
    ]


@pytest.mark.parametrize(
    ("device", "runtime", "message"),
    [("rpi5", "tensorrt", "ncnn, onnxruntime"), ("jetson", "ncnn", "tensorrt")],
)
def test_runtimes_that_a_device_does_not_have_are_named(device: str, runtime: str, message: str) -> None:
    with pytest.raises(SettingsError, match=f"^{device}.* does not run '{runtime}': choose one of {message}$"):
        observe.check(wanted(device, runtime=runtime))
