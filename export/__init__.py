"""Turn a checkpoint into what a device runs, and prove each artefact against PyTorch."""

import compress as _compress  # noqa: F401  (its import makes every later checkpoint load a restricted one)
