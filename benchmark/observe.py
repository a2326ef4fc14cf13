"""One network beside the dense one on a device: both whole, and segment by segment where the runtime tells.

onnxruntime on this machine and ncnn tell. The others (PyTorch, TensorRT, GPUs) are measured as a whole only.

Networks take turns with the dense model every few queries, so that what the device does meanwhile meets both alike, and
only their ratio counts. A device that counts instructions needs no turns, because its counts repeat.
"""

from __future__ import annotations

import json
import subprocess
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmark import freshness, programs, sites
from benchmark.layer_times import BURST, LEAD_IN, RUNTIMES, is_enough, join, ncnn_shapes, speedup
from benchmark.sites import Site
from compress.devices import Device, check_runtime, load_device
from compress.errors import BenchmarkError
from compress.settings import Budget

COUNTED = 2  # queries where instructions are counted: they repeat to 0.1 %
ATTEMPTS = 3
TIMEOUT_S = 300


@dataclass(frozen=True)
class Wanted:
    """What is measured, on what.

    Attributes:
        device: as `load_device` takes it: a name of configs/devices, or a file.
        host, python, bootstrap: how it is reached, see `sites.open_site`.
        variants: number of networks, the dense one included.
        max_interval: a network whose 95 % interval is wider than this share of its latency is measured for longer, in
            at most three processes, and then refused.
    """

    runtime: str
    imgsz: int
    budget: Budget
    device: str = "cpu"
    threads: int = 1
    host: str | None = None
    python: str | None = None
    bootstrap: bool = False
    variants: int = 64
    max_interval: float = 0.05
    seed: int = 0

    @property
    def site(self) -> Device:
        """What the device's file says."""
        return load_device(self.device)

    @property
    def unit(self) -> str:
        """In what is measured."""
        return "instructions" if self.site.counter else "ms"

    @property
    def half(self) -> bool:
        """Whether networks are exported in fp16."""
        return self.site.precision_of(self.runtime) == "fp16"


def check(wanted: Wanted) -> None:
    """Check that there is such a device and that it has such a runtime.

    Raises:
        SettingsError: there is not, or it has not.
    """
    check_runtime(wanted.site, wanted.runtime)


def reach(wanted: Wanted) -> AbstractContextManager[Site]:
    """Open the device, see `sites.open_site`."""
    return sites.open_site(wanted.site, wanted.host, wanted.python, [wanted.runtime], put_packages=wanted.bootstrap)


def machine(site: Site, runtime: str) -> str | None:
    """Return what the device says about the processor that a runtime computes on."""
    return freshness.processor(sites.snapshot(site)["device"], [runtime])


def observe(
    site: Site, dense: Path, model: Path, wanted: Wanted, known: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Measure a network until its interval is narrow enough, in a fresh process each time.

    On a machine that is never steady the rounds of all attempts together tell more than those of any; where something
    disturbed one attempt, another tells more alone. Whatever has the narrowest interval counts.

    Args:
        known: where instructions are counted, those of the dense model are kept in it.

    Returns:
        `speedup` over the dense model, its 95 % `interval`, `interval_width` as a share, `attempts`, `noisy`, and
        `record`: per round `dense` and `whole`, in the unit of `wanted`; `segments` (name, shape, cost), where the
        runtime tells; `version` and `precision`.

    Raises:
        BenchmarkError: the network cannot be measured.
        DeviceError: the device is gone.
    """
    records: list[dict[str, Any]] = []
    best: dict[str, Any] = {}
    for attempt in range(1, ATTEMPTS + 1):
        records.append(observe_once(site, dense, model, wanted, known if known is not None else {}))
        for record in (records[-1], together(records)) if len(records) > 1 else records:
            ratio, interval, width = speedup(record["dense"], record["whole"], wanted.seed)
            if not best or width < best["interval_width"]:
                best = {"speedup": ratio, "interval": interval, "interval_width": width, "record": record}
        best["attempts"] = attempt
        if best["interval_width"] <= wanted.max_interval:
            break
    return {**best, "noisy": best["interval_width"] > wanted.max_interval}


def together(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one record of several of the same two networks: all rounds, and each segment's mean.

    Args:
        records: as `observe_once` returns them.
    """
    rows = zip(*(record["segments"] for record in records), strict=True)
    return {
        **records[0],
        **{name: [value for record in records for value in record[name]] for name in ("dense", "whole")},
        "segments": [{**row[0], "cost": fmean(segment["cost"] for segment in row)} for row in rows],
    }


def observe_once(site: Site, dense: Path, model: Path, wanted: Wanted, known: dict[str, Any]) -> dict[str, Any]:
    """Measure a network once, see `observe`."""
    by_segment = site.is_here and wanted.runtime in RUNTIMES
    return _here(dense, model, wanted) if by_segment else _by_workers(site, dense, model, wanted, known)


def _by_workers(site: Site, dense: Path, model: Path, wanted: Wanted, known: dict[str, Any]) -> dict[str, Any]:
    options = {"threads": wanted.threads, "imgsz": wanted.imgsz, "seed": wanted.seed}
    counted = site.device.counter is not None

    def sample(worker: sites.Worker) -> float:
        answer, _ = worker.ask({"queries": 1 if counted else LEAD_IN + BURST})
        found = answer["instructions"] if counted else answer["samples_ms"][LEAD_IN:]
        return float(median(found))

    with sites.worker(site, wanted.runtime, model, **options) as mine:
        facts = mine.receive()[0]["facts"]
        if counted:
            whole = [sample(mine) for _ in range(COUNTED)]
            costs = _layers(mine, wanted)
            if "dense" not in known:
                with sites.worker(site, wanted.runtime, dense, **options) as other:
                    other.receive()
                    known["dense"] = [sample(other) for _ in range(COUNTED)]
            reference = list(known["dense"])
        else:
            with sites.worker(site, wanted.runtime, dense, **options) as other:
                other.receive()
                for worker in (other, mine):
                    sample(worker)  # the warm-up
                reference, whole = [], []
                while not is_enough(reference, whole, wanted.max_interval, wanted.seed):
                    reference.append(sample(other))
                    whole.append(sample(mine))
                costs = _layers(mine, wanted)
    facts = {key: facts[key] for key in ("version", "precision")}
    return {"dense": reference, "whole": whole, "segments": _segments(model, costs), **facts}


def _layers(worker: sites.Worker, wanted: Wanted) -> list[tuple[str, float]]:
    """Return name and cost of each layer, ms or instructions; nothing where the runtime does not tell."""
    if wanted.runtime != "ncnn":
        return []
    answer, _ = worker.ask({"layers": True})
    return [(row["name"], row["ms"] if "ms" in row else row["instructions"]) for row in answer["layers"]]


def _segments(model: Path, costs: list[tuple[str, float]]) -> list[dict[str, Any]]:
    if not costs:
        return []
    shapes = ncnn_shapes(model / "model.ncnn.param")
    joined = join([(name, shapes.get(name), cost) for name, cost in costs])
    return [{"name": s.name, "shape": s.shape, "cost": s.cost} for s in joined]


def _here(dense: Path, model: Path, wanted: Wanted) -> dict[str, Any]:
    """Measure in a fresh process, see `layer_times.measure`."""
    numbers = (wanted.threads, wanted.imgsz, wanted.seed, wanted.max_interval)
    command = programs.own("benchmark.layer_times", wanted.runtime, dense.resolve(), model.resolve(), *numbers)
    try:
        done = programs.run(command, TIMEOUT_S, environment=programs.own_environment(wanted.threads))
    except subprocess.TimeoutExpired:
        raise BenchmarkError(f"{model.name} was not measured in {TIMEOUT_S} s: use a smaller --imgsz") from None
    try:
        record = json.loads(done.stdout.strip().rpartition("\n")[2])
    except json.JSONDecodeError:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        reason = f"; its last line was: {said[-1]}" if said else ""
        raise BenchmarkError(
            f"{model.name} on {wanted.runtime} crashed ({programs.exit_reason(done.returncode)}){reason}"
        ) from None
    if "error" in record:
        raise BenchmarkError(f"{model.name} on {wanted.runtime}: {record['error']}")
    return record
