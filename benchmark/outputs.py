"""A network on a device for the evaluator: images go there, outputs come back, and each is kept until all are there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmark import runtimes, sites
from benchmark.frames import pack_image, unpack_outputs
from benchmark.sites import Site
from compress import manifest


@dataclass(frozen=True)
class Network:
    """What is evaluated.

    Attributes:
        facts: what a runner's `describe` says.
        infer: takes images (n, 3, height, width), returns what a runner's `infer` does.
    """

    facts: dict[str, Any]
    infer: Callable[[np.ndarray], list[np.ndarray]]


@contextmanager
def remote_network(site: Site, runtime: str, model: Path, threads: int, imgsz: int, outputs: Path) -> Iterator[Network]:
    """Start a worker on a device and yield the network that it opened.

    Args:
        site: the device.
        runtime: of the model.
        model: the file or folder to open there.
        threads: of the runtime.
        imgsz: side of the square input, px.
        outputs: folder in which outputs are kept by model, runtime and image: a second start sends only the images
            whose outputs are not there.

    Raises:
        BenchmarkError: the model cannot be run there.
        DeviceError: the device is gone; what it has inferred so far is kept.
    """
    with sites.worker(site, runtime, model, threads=threads, imgsz=imgsz, seed=0) as worker:
        ready, _ = worker.receive()
        facts = {"device": site.device.name, **ready["facts"]}
        key = manifest.sha256_json([runtimes.sha256(model), facts])
        folder = outputs / f"{runtimes.stem(model)}-{key[:16]}"
        folder.mkdir(parents=True, exist_ok=True)

        def infer(images: np.ndarray) -> list[np.ndarray]:
            content, payload = pack_image(images)
            digest = hashlib.sha256(json.dumps(content).encode() + payload).hexdigest()
            kept = folder / f"{digest}.bin"
            if kept.is_file() and (found := _read(kept.read_bytes())) is not None:
                return found
            answer, arrays = worker.ask(content, payload)
            manifest.write_bytes_atomic(kept, json.dumps(answer).encode() + b"\n" + arrays)
            return unpack_outputs(answer, arrays)

        yield Network(ready["facts"], infer)


def _read(content: bytes) -> list[np.ndarray] | None:
    """Return the outputs of a file; null where it is damaged."""
    line, _, payload = content.partition(b"\n")
    try:
        return unpack_outputs(json.loads(line), payload)
    except (ValueError, KeyError):
        return None
