"""A device within reach: our files lie on it, its Python and runtime were found, and workers can be started there."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmark import bootstrap, programs, runtimes, system, transfer, transports
from benchmark.cell import SILENCE_S, Worker, connect
from benchmark.programs import THREAD_VARIABLES
from benchmark.transports import Adb, Local, Ssh, Transport
from benchmark.worker import COUNTER, WATCHDOG
from compress.devices import Device, load_device
from compress.errors import DeviceError, SettingsError

WATCHDOG_S = 60.0
COUNTING = 15  # an emulator that counts takes longer by about so much
BUILDING_S = 1800.0  # for runtimes that compile or build while they open a model, which may take minutes
_PACKAGE = ("frames.py", "probe.py", "system.py", "worker.py")
_OLDEST = (3, 8)


@dataclass(frozen=True)
class Site:
    """Where cells run.

    Attributes:
        device: what it is.
        place: how it is reached.
        folder: of our files there; null on this machine.
        packages: the folder there that `--bootstrap` filled; null where none is needed.
    """

    device: Device
    place: Transport
    folder: str | None = None
    packages: str | None = None
    numbers: Iterator[int] = field(default_factory=itertools.count, compare=False)

    @property
    def is_here(self) -> bool:
        """Whether it is this machine."""
        return self.folder is None


def here() -> Site:
    """Return this machine's CPU."""
    return Site(load_device("cpu"), Local())


def transport_of(device: Device, host: str | None, python: str | None, put_packages: bool = False) -> Transport:
    """Return how a device is reached.

    Args:
        device: what it is.
        host: `[user@]host[:port]`, an alias of ssh_config, or a serial of adb; the device's own when null.
        python: the interpreter there; the device's own when null.
        put_packages: whether `open_site` shall.

    Raises:
        SettingsError: host or interpreter is missing or not plain, or is of no use on this machine.
        DeviceError: the device must be set up first.
    """
    if device.transport == "local":
        if host is not None or python is not None or put_packages:
            raise SettingsError(f"{device.name} is this machine: leave out --host, --python and --bootstrap")
        return Local()
    interpreter, where = transports.check_python(python or device.python), host or device.host
    if device.transport == "adb":
        return Adb(None if where is None else transports.parse_serial(where), interpreter)
    if where is None:
        raise SettingsError(f"--host is missing: {device.name} is reached over ssh, as [user@]host[:port]")
    destination, port = transports.parse_host(where)
    if host is not None:
        return Ssh(destination, port, interpreter)
    return Ssh(destination, port, interpreter, _ssh_config(device), device.setup)


def _ssh_config(device: Device) -> Path | None:
    if device.ssh_config is None:
        return None
    cache = Path(os.environ.get("ESPALIER_CACHE") or Path.home() / ".cache" / "espalier")
    config = cache / device.ssh_config
    if not config.is_file():
        raise DeviceError(f"{device.name} is not set up, {config} does not exist: run {device.setup}")
    return config


@contextmanager
def open_site(
    device: Device, host: str | None, python: str | None, wanted: Sequence[str], *, put_packages: bool = False
) -> Iterator[Site]:
    """Reach a device, put our files on it, and look for Python and runtimes; clean up there afterwards.

    Args:
        device: what it is.
        host: see `transport_of`.
        python: see `transport_of`.
        wanted: runtimes that will run there.
        put_packages: put numpy and the runtimes into a folder of ours there where they are missing.

    Raises:
        SettingsError: host or interpreter is missing or not plain, or the device runs no such runtime.
        DeviceError: the device cannot be reached, is another one, or lacks Python, a package or space.
    """
    for runtime in wanted:
        if runtime not in device.runtimes:
            raise SettingsError(f"{device.name} does not run {runtime}: it runs {', '.join(device.runtimes)}")
        if runtimes.base(runtime) not in runtimes.MODULES and device.transport != "local":
            raise SettingsError(f"{runtime} runs on this machine only: export the model for {device.name}")
    place = transport_of(device, host, python, put_packages)
    if isinstance(place, Local):
        yield Site(device, place)
        return
    with transfer.job_folder(place) as folder:
        _push_package(place, folder, wanted)
        needed = sorted({runtimes.base(runtime) for runtime in wanted})
        packages, modules = None, ["numpy", *(runtimes.MODULES[runtime] for runtime in needed)]
        facts = _probe(place, folder, modules)
        _check_facts(device, place, facts)
        missing = _missing(facts["packages"])
        if missing:
            packages = bootstrap.folder(place, facts, needed)
            missing = _missing(_probe(place, folder, modules, packages)["packages"])
        if missing and put_packages:
            bootstrap.put(place, facts, needed, packages or "")
            missing = _missing(_probe(place, folder, modules, packages)["packages"])
        if missing:
            raise DeviceError(_explain_missing(place, missing))
        yield Site(device, place, folder, packages)


def worker(
    site: Site, runtime: str, model: Path, *, threads: int, imgsz: int, seed: int, batch: int = 1
) -> AbstractContextManager[Worker]:
    """Start a worker for a model file there; its first answer says what it opened, see `benchmark.worker`.

    Raises:
        DeviceError: the device cannot be reached, or has no space left.
    """
    name, runner = f"{model.name} on {runtime}", runtimes.runner(runtime)
    numbers = [str(threads), str(imgsz), str(seed), *([] if batch == 1 else [str(batch)])]
    slow = COUNTING if site.device.counter else 1
    silence_s = BUILDING_S if runtime in runtimes.BUILT_WHEN_OPENED else SILENCE_S * slow
    if site.folder is None:
        arguments = programs.own("benchmark.worker", runner, model.resolve(), *numbers)
        environment = programs.own_environment(threads) | runtimes.environment(runtime)
        return connect(name, site.place, arguments, environment, silence_s=silence_s)
    number = str(next(site.numbers))
    there = _push_model(site.place, site.folder, number, model)
    # What a runtime leaves in its temporary folder goes away with ours.
    environment = dict.fromkeys(THREAD_VARIABLES, str(threads)) | runtimes.environment(runtime)
    environment |= {WATCHDOG: f"{WATCHDOG_S * slow:g}", "TMPDIR": site.folder}
    if site.packages is not None:
        environment["PYTHONPATH"] = site.packages
    if site.device.counter:
        environment |= {COUNTER: f"{site.folder}/instructions.{number}", "OMP_WAIT_POLICY": "passive"}
    arguments = [site.place.python, "-m", "benchmark.worker", runner, there, *numbers]
    return connect(name, site.place, arguments, environment, site.folder, silence_s=silence_s)


def snapshot(site: Site) -> dict[str, Any]:
    """Return `device`, `state` and `busy_s` of the device, see `benchmark.system`.

    Raises:
        DeviceError: the device cannot be reached.
    """
    if site.folder is None:
        return {"device": system.device(), "state": system.state(), "busy_s": system.busy_s()}
    facts = _probe(site.place, site.folder, [])
    return {key: facts[key] for key in ("device", "state", "busy_s")}


def _push_package(place: Transport, folder: str, wanted: Sequence[str]) -> None:
    source = Path(__file__).parent
    with tempfile.TemporaryDirectory() as scratch:
        package = Path(scratch) / "benchmark"
        (package / "runners").mkdir(parents=True)
        for name in ("", "runners"):
            (package / name / "__init__.py").touch()  # ours imports compress, which has no business there
        for name in _PACKAGE:
            shutil.copyfile(source / name, package / name)
        for runtime in wanted:
            for path in (source / "runners").glob(f"{runtimes.base(runtime)}_*.py"):
                shutil.copyfile(path, package / "runners" / path.name)
        transfer.push(place, [package], folder)


def _push_model(place: Transport, folder: str, number: str, model: Path) -> str:
    """Copy a model there under a name of ours, and return its path relative to the folder."""
    beside = [path for path in (model.with_name(f"{model.name}{ending}") for ending in (".json",)) if path.is_file()]
    files = [path for path in model.rglob("*") if path.is_file()] if model.is_dir() else [model, *beside]
    transfer.require_room(place, folder, sum(path.stat().st_size for path in files))
    name = f"model{runtimes.suffix(model)}"
    with tempfile.TemporaryDirectory() as scratch:
        staged = Path(scratch) / number
        staged.mkdir()
        if model.is_dir():
            shutil.copytree(model, staged / name)
        else:
            shutil.copyfile(model, staged / name)
            for path in beside:
                shutil.copyfile(path, staged / f"{name}{path.suffix}")
        transfer.push(place, [staged], folder)
    return f"{number}/{name}"


def _probe(place: Transport, folder: str, modules: Sequence[str], packages: str | None = None) -> dict[str, Any]:
    """Return what `benchmark.probe` says there."""
    environment = {} if packages is None else {"PYTHONPATH": packages}
    command = [place.python, "-m", "benchmark.probe", *modules]
    done = transports.run(place, command, folder=folder, environment=environment)
    if done.returncode in (126, 127):
        raise DeviceError(
            f"{place.name} has no {place.python}: install Python 3.8 or newer there, or name one with --python"
        )
    try:
        return json.loads(transports.last_line(done.stdout))
    except ValueError:
        raise DeviceError(
            f"{place.python} failed on {place.name} ({transports.last_line(done.stderr)}): name another interpreter "
            "with --python"
        ) from None


def _check_facts(device: Device, place: Transport, facts: dict[str, Any]) -> None:
    if tuple(facts["python"]) < _OLDEST:
        version = ".".join(map(str, facts["python"]))
        raise DeviceError(f"{place.python} on {place.name} is Python {version}: name 3.8 or newer with --python")
    if device.architecture not in (None, facts["machine"]):
        raise DeviceError(
            f"{place.name} is {facts['machine']}, {device.name} is {device.architecture}: choose another --host or "
            "--device"
        )


def _missing(packages: dict[str, Any]) -> dict[str, str | None]:
    """Return the packages that cannot be imported, and why; null for those that are not there."""
    return {name: (found or {}).get("error") for name, found in packages.items() if "version" not in (found or {})}


def _explain_missing(place: Transport, missing: dict[str, str | None]) -> str:
    named = ", ".join(name if reason is None else f"{name} ({reason})" for name, reason in missing.items())
    if "tensorrt" in missing:
        return (
            f"{place.name} lacks {named} for {place.python}: on a Jetson JetPack brings it for /usr/bin/python3, and "
            "only a virtual environment with --system-site-packages sees it; name the interpreter with --python"
        )
    return (
        f"{place.name} lacks {named} for {place.python}: give --bootstrap, which puts it into a folder of its own "
        f"there, or install it: {place.python} -m pip install {' '.join(missing)}"
    )
