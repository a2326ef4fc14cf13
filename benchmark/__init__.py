"""Measure latency and accuracy of models on the device that will run them."""

import compress as _compress  # noqa: F401  (its import makes every later checkpoint load a restricted one)
