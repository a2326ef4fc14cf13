"""Does what was measured on this machine still speak of it? Its files do not tell: they are the same as before."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from benchmark import runtimes, system
from compress import manifest


def outdated(cpu: str | None, tools: Mapping[str, str], measured: Iterable[str]) -> str | None:
    """Return why a measurement of this machine no longer speaks of it; null where it does.

    Args:
        cpu: on which it was measured, as `system.device` says.
        tools: versions that were installed then, see `manifest.tool_versions`.
        measured: runtimes, or variants of them.
    """
    here = system.device()["cpu"]
    if cpu != here:
        return f"was measured on {cpu}, this is {here}"
    installed = manifest.tool_versions()
    for name in sorted({runtimes.base(runtime) for runtime in measured}):
        before, now = tools.get(name), installed.get(name)
        if before and before != now:
            return f"was measured in {name} {before}, {now} is installed"
    return None
