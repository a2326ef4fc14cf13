"""Does what was measured on this machine still speak of it? Its files do not tell: they are the same as before."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmark import runtimes, system
from compress import manifest


def outdated_record(record: dict[str, Any], stage: Path, gpu: str | None = None) -> str | None:
    """Return why a latency record of this machine no longer speaks of it; null where it does.

    Args:
        stage: the folder of the finished stage that holds it.
        gpu: as for `outdated`.
    """
    tools = manifest.read_json(stage / manifest.MANIFEST).get("tools", {})
    return outdated(record["device"]["cpu"], tools, [cell["runtime"] for cell in record["cells"]], gpu)


def outdated(cpu: str | None, tools: Mapping[str, str], measured: Iterable[str], gpu: str | None = None) -> str | None:
    """Return why a measurement of this machine no longer speaks of it; null where it does.

    Args:
        cpu: on which it was measured, as `system.device` says.
        tools: versions that were installed then, see `manifest.tool_versions`.
        measured: runtimes, or variants of them.
        gpu: on which it was measured; null where none was, or none is known.
    """
    here = system.device()
    for before, now in ((cpu, here["cpu"]), (gpu or here["gpu"], here["gpu"])):
        if before != now:
            return f"was measured on {before}, this is {now}"
    installed = manifest.tool_versions()
    for name in sorted({runtimes.base(runtime) for runtime in measured}):
        before, now = tools.get(name), installed.get(name)
        if before and before != now:
            return f"was measured in {name} {before}, {now} is installed"
    return None
