"""Train, sparsify, prune and fine-tune YOLO detectors under a device's channel rules."""

import os

from compress.errors import check_packages

check_packages()


def usable_cores() -> int:
    """Return how many cores this process may run on: in a container often fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# Ultralytics reads these once, at its own import, so they are set before anything here can import it.
# Checkpoints and model YAMLs come from strangers: load weights only, build models without eval.
os.environ.setdefault("ULTRALYTICS_SAFE_LOAD", "1")
# A missing optional package is the user's decision, never a silent `pip install` in the middle of a run.
os.environ.setdefault("YOLO_AUTOINSTALL", "false")
# Ultralytics would take one thread and leave the others to data loading, which on a CPU it does in the same process.
os.environ.setdefault("OMP_NUM_THREADS", str(usable_cores()))

__version__ = "0.1.0"
