"""Clocks of a device: what it says of them, and fixed ones where that was asked for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import fmean

from benchmark import transports
from benchmark.transports import Local, Transport
from compress.devices import Device
from compress.errors import DeviceError, warn

LOG_CHARACTERS = 2000
_COMMAND_S = 30.0
_FELL = 0.9  # a fixed clock that is lower than this share of what it was
# Bits of `vcgencmd get_throttled`; 16 higher the same since boot. Source: Raspberry Pi documentation, "vcgencmd".
_PI_BITS = {0: "under-voltage", 1: "a capped frequency", 2: "throttling", 3: "the soft temperature limit"}
# Bits of nvidia-smi's clocks_throttle_reasons.active that are not a choice. Source: nvml.h, nvmlClocksEventReasons.
_NVIDIA_BITS = {2: "its power cap", 3: "a hardware slowdown", 5: "heat", 6: "heat (hardware)", 7: "the power brake"}
_PI, _NVIDIA = re.compile(r"throttled=0x([0-9a-fA-F]+)"), re.compile(r"\b0x([0-9a-fA-F]{16})\b")
# tegrastats: of the whole module now/on average, mW; Orin and Thor name the rail VDD_IN, Nano POM_5V_IN.
_POWER = re.compile(r"\b(?:VDD_IN|POM_5V_IN) (\d+)(?:mW)?/")
_GPU_MHZ = re.compile(r"\bGR3D_FREQ \d+%@\[?(\d+)")


def check_lock(device: Device) -> None:
    """Check that a device's file says how its clocks are fixed.

    Raises:
        DeviceError: it does not.
    """
    if not device.lock:
        raise DeviceError(f"{device.name} has no commands that lock clocks: leave out --lock-clocks")


@contextmanager
def locked(device: Device, place: Transport) -> Iterator[None]:
    """Fix the device's clocks as its file says, and undo it afterwards.

    Raises:
        DeviceError: the device has no commands for it, or one fails.
    """
    check_lock(device)
    locked = False
    try:
        for command in device.lock:
            transports.run(place, list(command), purpose=f"run {' '.join(command)}", timeout_s=_COMMAND_S)
            locked = True
        yield
    finally:
        if locked:
            _unlock(device, place)


def _unlock(device: Device, place: Transport) -> None:
    try:
        for command in device.unlock:
            transports.run(place, list(command), purpose=f"run {' '.join(command)}", timeout_s=_COMMAND_S)
    except DeviceError as error:  # what came before matters more
        warn(f"the clocks of {device.name} may still be fixed: {error}")


def log(device: Device, place: Transport) -> dict[str, str]:
    """Return what the commands that read clocks, governor and temperature say; a command that fails says so itself."""
    found = {}
    for command in device.read:
        try:
            done = transports.run(place, list(command), timeout_s=_COMMAND_S)
        except DeviceError as error:
            if place != Local() and not transports.is_alive(place):
                raise
            found[" ".join(command)] = str(error)
            continue
        found[" ".join(command)] = (done.stdout + done.stderr).strip()[:LOG_CHARACTERS]
    return found


def throttling(before: dict[str, str], under_load: dict[str, str], fixed: bool) -> list[str]:
    """Return what two logs of `log` say of throttling: those of Raspberry Pi, nvidia-smi and tegrastats.

    Args:
        before: at the start, at rest.
        under_load: behind the last query that counts, while others run.
        fixed: whether the clocks were locked; then a Jetson's GPU clock must not fall.
    """
    text = "\n".join(under_load.values())
    reasons = []
    if found := _PI.search(text):
        bits = int(found[1], 16)
        now, since = _meanings(bits, _PI_BITS), _meanings(bits >> 16, _PI_BITS)
        if now or since:
            said = [f"{' and '.join(now)} now"] if now else []
            said += [f"{' and '.join(since)} since it was started, which a restart clears"] if since else []
            reasons.append(f"the Raspberry Pi tells of {', '.join(said)} (get_throttled 0x{bits:x})")
    if (found := _NVIDIA.search(text)) and (held := _meanings(int(found[1], 16), _NVIDIA_BITS)):
        reasons.append(f"the GPU's clocks are held down by {' and '.join(held)}")
    first, last = _mean(_GPU_MHZ, before), _mean(_GPU_MHZ, under_load)
    if fixed and first and last is not None and last < _FELL * first:
        reasons.append(f"the GPU's locked clock fell from {first:.0f} to {last:.0f} MHz")
    return reasons


def power_mw(said: dict[str, str]) -> float | None:
    """Return the mean power of a Jetson in a log of `log`, mW; null where tegrastats does not tell."""
    mean = _mean(_POWER, said)
    return None if mean is None else round(mean, 1)


def _mean(pattern: re.Pattern[str], said: dict[str, str]) -> float | None:
    values = [float(found) for text in said.values() for found in pattern.findall(text)]
    return fmean(values) if values else None


def _meanings(bits: int, names: dict[int, str]) -> list[str]:
    return [name for bit, name in names.items() if bits >> bit & 1]
