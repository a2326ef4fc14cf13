"""Does what was measured on this machine still speak of it? Its files do not tell: they are the same as before."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmark import runtimes, system
from compress import manifest
from compress.devices import on_gpu


def outdated_record(record: dict[str, Any], stage: Path) -> str | None:
    """Return why a latency record of this machine no longer speaks of it; null where it does.

    Args:
        stage: the folder of the finished stage that holds it.
    """
    tools = manifest.read_json(stage / manifest.MANIFEST).get("tools", {})
    measured, before = [cell["runtime"] for cell in record["cells"]], record["device"]["cores"]
    if before != (now := system.device()["cores"]):
        return f"was measured on {before} cores, this machine has {now}"
    return outdated(processor(record["device"], measured), tools, measured)


def outdated_scores(stage: Path, measured: Collection[str]) -> str | None:
    """Return why scores that were taken on this machine are no longer those of it; null where they are.

    Another processor or another version of a runtime may round otherwise; sums of 8-bit products even overflow on some.

    Args:
        stage: the folder of the finished stage that holds them.
        measured: runtimes, or variants of them.
    """
    made = manifest.read_json(stage / manifest.MANIFEST)
    before = made.get("metrics", {}).get("processor")
    return None if before is None else outdated(before, made.get("tools", {}), measured)


def outdated(before: str | None, tools: Mapping[str, str], measured: Collection[str]) -> str | None:
    """Return why a measurement of this machine no longer speaks of it; null where it does.

    Args:
        before: the `processor` on which it was measured.
        tools: versions that were installed then, see `manifest.tool_versions`.
        measured: runtimes, or variants of them.
    """
    if before != (now := processor(system.device(), measured)):
        return f"was measured on {before}, this is {now}"
    installed = manifest.tool_versions()
    used = {runtimes.base(runtime) for runtime in measured}
    for name in sorted(used | ({"tensorrt_rtx"} if "tensorrt" in used else set())):
        before, now = tools.get(name), installed.get(name)
        if before and before != now:
            return f"was measured in {name} {before}, {now or 'none'} is installed"
    return None


def processor(device: Mapping[str, Any], measured: Iterable[str]) -> str | None:
    """Return what decides how fast runtimes are: the CPU, and before it the GPU where one of them computes on that.

    Args:
        device: as `system.device` describes it.
        measured: runtimes, or variants of them.

    >>> processor({"cpu": "EPYC", "gpu": "NVIDIA L4"}, ["onnxruntime-cuda"])
    'NVIDIA L4 on EPYC'
    """
    cpu, gpu = device["cpu"], device.get("gpu")
    return f"{gpu} on {cpu}" if gpu and any(map(on_gpu, measured)) else cpu
