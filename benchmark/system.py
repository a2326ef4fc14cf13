"""What is known about this machine, and what else it was doing. What cannot be read is null, never guessed.

On a device this needs Python 3.8 and nothing else.
"""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

_CPU = Path("/sys/devices/system/cpu/cpu0")
_POWERCAP = Path("/sys/class/powercap")
_NVIDIA = Path("/proc/driver/nvidia/gpus")
_CPUINFO = Path("/proc/cpuinfo")
# By Linux's names, those that decide how fast a runtime computes: a virtual machine may call two processors the same of
# which one has them.
_EXTENSIONS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx_vnni": "VNNI",
    "avx512_vnni": "VNNI",
    "amx_int8": "AMX",
    "asimdhp": "fp16",
    "asimddp": "dot products",
    "i8mm": "int8 matrices",
    "sve": "SVE",
}


def device() -> dict[str, Any]:
    """Return what does not change during a measurement.

    `cpu` with its vector extensions, `gpu` (NVIDIA's; null where no driver tells), `cores` (of the machine),
    `usable_cores` (this process may run on), `memory_bytes`, `os`, `kernel`, `container` (its kind; null where there is
    no sign of one), `virtual_machine` (true or false; null where the CPU does not tell).
    """
    return {
        "cpu": _cpu_model(),
        "gpu": _gpu_models(),
        "architecture": platform.machine() or None,
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "memory_bytes": _memory_bytes(),
        "os": _os_name(),
        "kernel": f"{platform.system()} {platform.release()}",
        "container": _container(),
        "virtual_machine": _virtual_machine(),
    }


def state() -> dict[str, Any]:
    """Return what changes during a measurement.

    `load_average` (over 1, 5, 15 min), `governor`, `frequency_mhz` and `throttle_count` of the first core,
    `temperature_c` of the hottest sensor.
    """
    frequency_khz = _number(_CPU / "cpufreq" / "scaling_cur_freq")
    throttled = _number(_CPU / "thermal_throttle" / "core_throttle_count")
    sensors = [_number(path) for path in Path("/sys/class/thermal").glob("thermal_zone*/temp")]
    return {
        "load_average": [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "governor": _text(_CPU / "cpufreq" / "scaling_governor"),
        "frequency_mhz": _cpuinfo_mhz() if frequency_khz is None else frequency_khz / 1000,
        "throttle_count": None if throttled is None else int(throttled),
        "temperature_c": max((value / 1000 for value in sensors if value is not None), default=None),
    }


def busy_s() -> float | None:
    """Return the CPU seconds that all cores together spent since boot on any work, time stolen by a host included.

    Null where the kernel does not count them.
    """
    fields = (_text(Path("/proc/stat")) or "").partition("\n")[0].split()
    if len(fields) < 9 or fields[0] != "cpu":
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def energy_uj() -> int | None:
    """Return what all processors of the machine have used since some time, in µJ (Linux' powercap, Intel's RAPL).

    Null where the machine does not tell, or only root may know. It starts again at 0 when it has run over.
    """
    domains = [path for path in sorted(_POWERCAP.glob("intel-rapl:*")) if path.name.count(":") == 1]
    # Beside the processors some machines count `psys`, the whole platform, which holds them once more.
    packages = [path for path in domains if (_text(path / "name") or "").startswith("package")]
    values = [_number(path / "energy_uj") for path in packages]
    known = [int(value) for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) else None


def peak_memory_bytes() -> int | None:
    """Return the largest resident memory that this process has had."""
    # Not getrusage first: on Linux its maximum survives exec, so that a worker would inherit that of its parent.
    if found := re.search(r"^VmHWM:\s+(\d+) kB", _text(Path("/proc/self/status")) or "", re.MULTILINE):
        return int(found[1]) * 1024
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def huge_page_bytes() -> int | None:
    """Return how much of this process's memory lies in transparent huge pages. Null where the kernel does not tell."""
    found = re.search(r"^AnonHugePages:\s+(\d+) kB", _text(Path("/proc/self/smaps_rollup")) or "", re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _cpu_model() -> str | None:
    found = re.search(r"^model name\s*:\s*(.+)$", _text(_CPUINFO) or "", re.MULTILINE)
    board = _text(Path("/proc/device-tree/model"))
    name = found[1] if found else board.rstrip("\0") if board else platform.processor() or None
    flags = _cpu_flags()
    extensions = dict.fromkeys(named for flag, named in _EXTENSIONS.items() if flag in flags)
    return f"{name} ({', '.join(extensions)})" if name and extensions else name


def _cpu_flags() -> set[str]:
    """Return what the first core can do, by Linux's names on x86 and ARM."""
    found = re.search(r"^(?:flags|Features)\s*:(.+)$", _text(_CPUINFO) or "", re.MULTILINE)
    return set(found[1].split()) if found else set()


def _gpu_models() -> str | None:
    """Return the names of the GPUs, each once: which of several CUDA calls the first is not the driver's to tell."""
    said = [_text(path) or "" for path in sorted(_NVIDIA.glob("*/information"))]
    found = [match[1] for text in said if (match := re.search(r"^Model:\s*(.+)$", text, re.MULTILINE))]
    return " and ".join(dict.fromkeys(found)) or None


def _cpuinfo_mhz() -> float | None:
    found = re.search(r"^cpu MHz\s*:\s*([\d.]+)", _text(_CPUINFO) or "", re.MULTILINE)
    return float(found[1]) if found else None


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _os_name() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError, AttributeError):  # Python before 3.10 has no such function
        return platform.platform()


def _container() -> str | None:
    for sign, kind in (("/.dockerenv", "docker"), ("/run/.containerenv", "podman")):
        if Path(sign).exists():
            return kind
    found = re.search(r"docker|kubepods|lxc|containerd|libpod", _text(Path("/proc/1/cgroup")) or "")
    return found[0] if found else os.environ.get("container")  # noqa: SIM112  (systemd's own spelling)


def _virtual_machine() -> bool | None:
    flags = _cpu_flags()
    return "hypervisor" in flags if "fpu" in flags else None  # ARM's do not tell


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def _number(path: Path) -> float | None:
    try:
        return float(_text(path) or "")
    except ValueError:
        return None
