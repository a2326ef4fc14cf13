"""Where the jobs of a sweep run: here, one after another, or on the machines of a Ray cluster.

On a cluster every machine must see the same folder under the same path, and have Espalier installed. A job asks for
all CPUs of the smallest machine: latencies are measured in it, and two at once would disturb each other.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from compress.errors import EspalierError, SettingsError
from compress.sweeps.jobs import Job

Work = Callable[[Job], Any]


class Spread(Protocol):
    """Does a piece of work for several jobs, and returns for each its result, or the error that stopped it."""

    def __call__(self, work: Work, jobs: Sequence[Job]) -> list[Any]:
        """Return the results in the order of the jobs."""
        ...


def here(work: Work, jobs: Sequence[Job]) -> list[Any]:
    """Do the work in this process, one job after another."""
    return [attempt(work, job) for job in jobs]


def on_ray(address: str) -> Spread:
    """Connect to a Ray cluster; `auto` finds the one that this machine belongs to.

    Raises:
        SettingsError: Ray is not installed, or there is no such cluster.
    """
    try:
        import ray  # type: ignore[import-not-found]  (an option)
    except ImportError:
        raise SettingsError("--ray needs the package ray: pip install ray, or leave --ray out to run here") from None
    try:
        ray.init(address=address, ignore_reinit_error=True, log_to_driver=True)
    except (ConnectionError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SettingsError(f"no Ray cluster at '{address}' ({reason}): start one with ray start --head") from None
    sizes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    cpus = min((size for size in sizes if size > 0), default=1)

    def spread(work: Work, jobs: Sequence[Job]) -> list[Any]:
        place, waiting = os.getcwd(), []  # noqa: PTH109 (a string, for another machine)
        for job in jobs:
            gpus = 0 if job.settings.device == "cpu" else len(job.settings.device.split(","))
            remote: Any = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(attempt_in)
            waiting.append(remote.remote(place, work, job))
        return list(ray.get(waiting))

    return spread


def attempt(work: Work, job: Job) -> Any:
    """Return what the work returns, or the error of the user's that it met."""
    try:
        return work(job)
    except EspalierError as error:
        return error


def attempt_in(folder: str, work: Work, job: Job) -> Any:
    """Work in the folder that relative paths are meant from."""
    os.chdir(folder)
    return attempt(work, job)
