"""Devices: how each is reached, what runs on it, and which widths it likes, as configs/devices/*.yaml say it."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from compress.errors import SettingsError
from compress.settings import Budget, Runtime, Strict, Variant, load_yaml, parse

Command = tuple[str, ...]
_SUFFIXES = (".yaml", ".yml")


class Device(Strict):
    """A device to measure on. Commands are lists of words, which no shell reads."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    aliases: tuple[str, ...] = ()
    transport: Literal["local", "ssh", "adb"]
    host: str | None = Field(default=None, description="where --host is not given: [user@]host[:port], or adb's serial")
    ssh_config: str | None = Field(  # it may name programs to run: never a file that came with the device's
        default=None,
        pattern=r"^\w[\w-]*(/\w[\w-]*)*$",
        description="of ssh, below $ESPALIER_CACHE or ~/.cache/espalier",
    )
    setup: str | None = Field(default=None, description="the command that starts the device, for messages")
    python: str = Field(default="python3", description="interpreter there; of a local device our own runs")
    architecture: Literal["x86_64", "aarch64"] | None = None
    runtimes: tuple[Runtime | Variant, ...] = Field(min_length=1, description="in order of preference")
    precision: Literal["fp32", "fp16"] = Field(default="fp32", description="of what is exported for it")
    threads: int = Field(default=1, ge=1)
    imgsz: int | None = Field(default=None, ge=32)
    counter: Literal["instructions"] | None = Field(default=None, description="what stands for latency; null: time")
    budgets: dict[Runtime | Variant, Budget] = Field(description="the widths that each runtime likes there")
    read: tuple[Command, ...] = Field(default=(), description="show clocks, governor, temperature, throttling")
    lock: tuple[Command, ...] = Field(default=(), description="fix the clocks; run with --lock-clocks only")
    unlock: tuple[Command, ...] = Field(default=(), description="undo `lock`")
    notes: str = Field(description="what to know, and where it comes from")

    def precision_of(self, runtime: str) -> str:
        """Return what a network that is exported for one of its runtimes is stored and computed in."""
        if runtime.startswith("torch"):
            return "fp16" if runtime.endswith("-fp16") else "fp32"
        return "fp32" if always_fp32(runtime) else self.precision

    @model_validator(mode="after")
    def _fits(self) -> Device:
        if set(self.budgets) != set(self.runtimes):
            raise ValueError(f"budgets must be of the runtimes {', '.join(self.runtimes)}")
        if any(not command for command in (*self.read, *self.lock, *self.unlock)):
            raise ValueError("a command of read, lock and unlock needs at least one word")
        if self.lock and not self.unlock:
            raise ValueError("lock needs unlock, which undoes it")
        return self


def on_gpu(runtime: str) -> bool:
    """Tell whether a runtime or a variant computes on a GPU.

    >>> on_gpu("torch-cudagraph-fp16"), on_gpu("onnxruntime-tensorrt"), on_gpu("ncnn-hugepages")
    (True, True, False)
    """
    return any(word in runtime for word in ("cuda", "tensorrt", "vulkan"))


def always_fp32(runtime: str) -> bool:
    """Tell whether a runtime or a variant computes in nothing less than fp32: onnxruntime's kernels on a CPU.

    >>> always_fp32("onnxruntime-hugepages"), always_fp32("onnxruntime-cuda")
    (True, False)
    """
    return runtime.startswith("onnxruntime") and not on_gpu(runtime)


def load_device(text: str) -> Device:
    """Return the device of a name, a shortened name, an alias or a YAML file.

    A name may be shortened to any part of it that no other name has. An alias goes before a part.

    Raises:
        SettingsError: there is no such device, or several; the message lists the known ones, the closest first.
    """
    if text.endswith(_SUFFIXES):
        return _read(Path(text))
    devices = known_devices()
    if text in devices:
        return devices[text]
    matches = [device for device in devices.values() if text in device.aliases]
    matches = matches or [device for device in devices.values() if text and text in device.name]
    if len(matches) == 1:
        return matches[0]
    if matches:
        named = ", ".join(device.name for device in matches)
        raise SettingsError(f"device '{text}' may be any of {named}: name one of them")
    closest = difflib.get_close_matches(text, devices, n=len(devices), cutoff=0.0)
    raise SettingsError(f"unknown device '{text}': choose one of {', '.join(closest)}, or a .yaml file")


def check_runtime(device: Device, runtime: str) -> None:
    """Check that a device has a runtime.

    Raises:
        SettingsError: it has not.
    """
    if runtime not in device.runtimes:
        raise SettingsError(f"{device.name} does not run '{runtime}': choose one of {', '.join(device.runtimes)}")


def known_devices() -> dict[str, Device]:
    """Return the devices of configs/devices by name."""
    import configs

    paths = sorted((Path(configs.__file__).parent / "devices").glob("*.yaml"))
    return {device.name: device for device in map(_read, paths)}


def device_budget(text: str) -> Budget:
    """Return the budget of DEVICE or DEVICE:RUNTIME, see `load_device`; without a runtime, of its first.

    Raises:
        SettingsError: there is no such device, or it has no such runtime.
    """
    name, _, wanted = text.partition(":")
    device = load_device(name)
    for runtime in device.runtimes:
        if wanted in ("", runtime):
            return device.budgets[runtime]
    raise SettingsError(f"{device.name} has no runtime '{wanted}': choose one of {', '.join(device.runtimes)}")


def _read(path: Path) -> Device:
    return parse(Device, load_yaml(path), str(path))
