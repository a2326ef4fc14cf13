"""How long should a burst be where two models take turns? docs/results/turns.json.

usage: python -m scripts.studies.turns --runtime onnxruntime --models dense.onnx pruned.onnx --imgsz 320

The same seconds are given to each length of a burst, several times over. For each: the speed-up and its 95 % interval,
as the ratio of the two medians over all bursts, and as the median of the ratios of neighbouring bursts. One thread, CPU
time.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmark import statistics, system
from benchmark.layer_times import burst_ms
from compress import manifest

LENGTHS = ((2, 16), (2, 8), (2, 4), (2, 2), (1, 2), (1, 1))  # queries that do not count, queries that do


def take_turns(queries: list[Callable[[], object]], lead_in: int, counted: int, seconds: float) -> dict[str, Any]:
    """Let two models take turns and return what each estimate makes of it."""
    rounds, end = [], time.monotonic() + seconds
    while time.monotonic() < end or len(rounds) < 2:
        rounds.append([burst_ms(query, time.thread_time_ns, lead_in, counted) for query in queries])
    first, second = np.array(rounds).T
    of_medians, wide = ratio_of_medians(first, second)
    of_pairs, narrow = statistics.speedup([[value] for value in first], [[value] for value in second], seed=0)
    return {
        "lead_in": lead_in,
        "counted": counted,
        "rounds": len(rounds),
        "p50_ms": [round(float(np.median(values)), 4) for values in (first, second)],
        "correlation": round(float(np.corrcoef(np.log(first), np.log(second))[0, 1]), 3),
        "ratio_of_medians": {"speedup": round(of_medians, 4), "interval": [round(value, 4) for value in wide]},
        "median_of_ratios": {"speedup": round(of_pairs, 4), "interval": [round(value, 4) for value in narrow]},
    }


def ratio_of_medians(first: np.ndarray, second: np.ndarray) -> tuple[float, list[float]]:
    """Return the median of the first over that of the second, and its 95 % interval; pairs are drawn together."""
    draws = statistics.block_draws(len(first), seed=0)
    low, high = np.percentile(np.median(first[draws], axis=1) / np.median(second[draws], axis=1), (2.5, 97.5))
    return float(np.median(first) / np.median(second)), [float(low), float(high)]


def main() -> None:
    """Measure, say each row, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runtime", choices=("onnxruntime", "ncnn"), default="onnxruntime")
    parser.add_argument("--models", nargs=2, type=Path, required=True, help="as the runtime takes them")
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each length, each time")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("docs/results/turns.json"))
    given = parser.parse_args()
    runner = importlib.import_module(f"benchmark.runners.{given.runtime}_runner")
    image = np.random.default_rng(0).random((1, 3, given.imgsz, given.imgsz), dtype=np.float32)
    sessions = [runner.load(str(path), 1) for path in given.models]
    queries = [lambda session=session: runner.infer(session, image) for session in sessions]
    rows = []
    for _ in range(given.repeats):
        for lead_in, counted in LENGTHS:
            rows.append(take_turns(queries, lead_in, counted, given.seconds))
            print({name: value for name, value in rows[-1].items() if name != "p50_ms"}, flush=True)
    manifest.write_json(given.output, {"runtime": given.runtime, "machine": system.device(), "rows": rows})


if __name__ == "__main__":
    main()
