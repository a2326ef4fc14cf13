"""Clocks of a device: what it says of them, and fixed ones where that was asked for."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from benchmark import transports
from benchmark.transports import Local, Transport
from compress.devices import Device
from compress.errors import DeviceError

LOG_CHARACTERS = 2000
_COMMAND_S = 30.0


@contextmanager
def locked(device: Device, place: Transport) -> Iterator[None]:
    """Fix the device's clocks as its file says, and undo it afterwards.

    Raises:
        DeviceError: the device has no commands for it, or one fails.
    """
    if not device.lock:
        raise DeviceError(f"{device.name} has no commands that lock clocks: leave out --lock-clocks")
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
            transports.run(place, list(command), purpose=f"run {' '.join(command)}", timeout_s=transports.CLEAN_UP_S)
    except DeviceError as error:  # what came before matters more
        print(f"the clocks of {device.name} may still be fixed: {error}", file=sys.stderr)


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
