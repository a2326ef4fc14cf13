"""How far repeated latencies agree, with each other and with the runtimes' own: docs/results/repeatability.json.

usage: python scripts/studies/repeatability.py --onnx M.onnx --reference OTHER.onnx --ncnn M_ncnn_model [--imgsz 640]

Spread: every run is one `benchmark.latency`, in fresh processes, of the ONNX file, of the same file once more (the
twin) and of another network (the reference). The p50 of the file is as it was measured, with all that the machine did
from run to run. Its ratios to the other two are what the protocol's interleaving leaves of that; what is left of the
twin's is due to the processes alone. How well earlier runs tell where the next one's p50 will be is asked of each run
by leaving it out: `expected_share` are those that lie where `benchmark.drift` expects them after the others.

Agreement: queries of both sides take turns, one by one, in one process.
- onnxruntime: what its profiler says of a run, against our clock around the same run; and the sum of its kernels, which
  leaves out what the profiler does between them, against our clock around a session without a profile. What a profile
  costs stands beside.
- ncnn: a plain loop over an extractor, without this project's code around it. Ours holds the decoding of the head too,
  which is timed on its own and added to the loop.

Finished parts are kept: the same command goes on where it stopped. A noisy run says so in its row; nothing is left out.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from bisect import bisect_right
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

from benchmark import drift, latency, runtimes, system
from compress import manifest

SCHEMA = 2  # 1: no twin and no reference, and both sides of an agreement one after the other
SPREAD, AGREEMENT = 0.03, 0.05
WARM_UP = 20
TWIN, REFERENCE = "twin", "reference"


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return p50 in ms with its interval, the ratios to the other networks, and why it may be doubted, of one run."""
    files = {"model": arguments.onnx, TWIN: arguments.onnx, REFERENCE: arguments.reference}
    record = latency.measure(
        {name: {arguments.runtime: path} for name, path in files.items()},
        imgsz=arguments.imgsz,
        threads=arguments.threads,
        mode=arguments.mode,
    )
    cell = record["cells"][0]
    return {
        "p50_ms": cell["p50_ms"],
        "interval_ms": cell["intervals"]["p50_ms"],
        "queries": cell["queries"],
        "ratios": {
            row["model"]: {name: row[name] for name in ("speedup", "interval")} for row in record["comparisons"]
        },
        "noise": record["noise"],
    }


def take_turns(queries: dict[str, Callable[[], Any]], rounds: int, seed: int = 0) -> dict[str, list[float]]:
    """Return what each query took, ms per round: in a round each is called once, in an order that is shuffled anew."""
    samples: dict[str, list[float]] = {name: [] for name in queries}
    generator = random.Random(seed)
    for _ in range(rounds):
        for name in generator.sample(list(queries), len(queries)):
            start = time.perf_counter_ns()
            queries[name]()
            samples[name].append((time.perf_counter_ns() - start) / 1e6)
    return samples


def onnxruntime_agreement(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return medians, ms: of our clock without and with a profile, and of the profiled runs and their kernels."""
    import numpy as np

    from benchmark.runners import onnxruntime_runner as runner

    image = np.random.default_rng(0).random((1, 3, arguments.imgsz, arguments.imgsz), dtype=np.float32)
    with tempfile.TemporaryDirectory() as folder:
        plain = runner.load(str(arguments.onnx), arguments.threads)
        profiled = runner.load(str(arguments.onnx), arguments.threads, profile=str(Path(folder) / "profile"))
        samples = take_turns(
            {
                "plain_ms": lambda: runner.infer(plain, image),
                "profiled_ms": lambda: runner.infer(profiled, image),
            },
            WARM_UP + arguments.turns,
        )
        events = json.loads(Path(profiled.graph.end_profiling()).read_text(encoding="utf-8"))
    samples["model_run_ms"], samples["kernels_ms"] = profiled_runs(events)
    return {"turns": arguments.turns, **medians(samples)}


def profiled_runs(events: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Return of each run in a profile of onnxruntime, ms: the whole, and the sum of its kernels."""
    runs = sorted((event["ts"], event["dur"]) for event in events if event["name"] == "model_run")
    starts, kernels = [start for start, _ in runs], [0.0] * len(runs)
    for event in events:
        run_index = bisect_right(starts, event["ts"]) - 1  # below 0 is what came before the first run
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time") and run_index >= 0:
            kernels[run_index] += event["dur"] / 1000
    return [took / 1000 for _, took in runs], kernels


def ncnn_agreement(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return medians, ms: of our query, of a plain loop's, and of our decoding of what that one found."""
    import ncnn  # type: ignore[import-untyped]
    import numpy as np

    from benchmark.runners import ncnn_runner as runner

    session = runner.load(str(arguments.ncnn), arguments.threads)
    half = session.metadata["precision"] == "fp16"
    net: Any = ncnn.Net()  # type: ignore[attr-defined]
    net.opt.num_threads = arguments.threads
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = half
    net.opt.use_bf16_storage = False
    net.load_param(str(arguments.ncnn / runner.PARAM))
    net.load_model(str(arguments.ncnn / runner.BIN))
    image = np.random.default_rng(0).random((3, arguments.imgsz, arguments.imgsz), dtype=np.float32)

    def loop() -> dict[str, Any]:
        with net.create_extractor() as extractor:
            extractor.input("in0", ncnn.Mat(image))  # type: ignore[attr-defined]
            return {name: extractor.extract(name) for name in session.metadata["outputs"]}

    replay = runner.Session(Replay(loop()), arguments.threads, session.metadata)
    samples = take_turns(
        {
            "ours_ms": lambda: runner.infer(session, image[None]),
            "loop_ms": loop,
            "decoding_ms": lambda: runner.infer(replay, image[None]),
        },
        WARM_UP + arguments.turns,
    )
    return {"turns": arguments.turns, **medians(samples)}


class Replay:
    """Stands for a network whose outputs are there already."""

    def __init__(self, found: dict[str, Any]) -> None:
        self.found = found

    def create_extractor(self) -> Any:
        """Return what answers as an extractor does."""
        return nullcontext(self)

    def input(self, name: str, image: Any) -> None:
        """Take the image, and do nothing."""

    def extract(self, name: str) -> Any:
        """Return an output."""
        return self.found[name]


def medians(samples: dict[str, list[float]]) -> dict[str, float]:
    """Return the median of each, ms, without the rounds that warm up."""
    return {name: round(median(values[WARM_UP:]), 4) for name, values in samples.items()}


def verdict(parts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return what the parts say together."""
    runs = [part for name, part in parts.items() if name.startswith("run ")]
    onnxruntime, ncnn = parts["onnxruntime"], parts["ncnn"]
    against = {
        "onnxruntime_model_run": onnxruntime["model_run_ms"] / onnxruntime["profiled_ms"] - 1.0,
        "onnxruntime_kernels": onnxruntime["kernels_ms"] / onnxruntime["plain_ms"] - 1.0,
        "ncnn_loop": (ncnn["loop_ms"] + ncnn["decoding_ms"]) / ncnn["ours_ms"] - 1.0,
    }
    return {
        "p50": repeated([part["p50_ms"] for part in runs], [part["interval_ms"] for part in runs]),
        **{
            f"ratio_to_{name}": repeated(
                [part["ratios"][name]["speedup"] for part in runs],
                [part["ratios"][name]["interval"] for part in runs],
            )
            for name in (TWIN, REFERENCE)
        },
        "difference": {name: round(value, 4) for name, value in against.items()},
        "difference_ok": {name: abs(value) <= AGREEMENT for name, value in against.items()},
        "onnxruntime_profiler_cost": round(onnxruntime["profiled_ms"] / onnxruntime["plain_ms"] - 1.0, 4),
        "quiet": not any(part["noise"] for part in runs),
    }


def repeated(values: list[float], intervals: list[list[float]]) -> dict[str, Any]:
    """Return how far values of several runs are apart, and how often the interval of one holds the value of another."""
    covered = [
        low <= value <= high for i, (low, high) in enumerate(intervals) for j, value in enumerate(values) if i != j
    ]
    spread = max(values) / min(values) - 1.0
    expected = [drift.next_run(values[:i] + values[i + 1 :]) for i in range(len(values))]
    inside = [ends[0] <= value <= ends[1] for value, ends in zip(values, expected, strict=True) if ends]
    return {
        "values": values,
        "spread": round(spread, 4),
        "spread_ok": spread <= SPREAD,
        "covered_share": round(sum(covered) / len(covered), 4) if covered else None,
        "expected_share": round(sum(inside) / len(inside), 4) if inside else None,
    }


def kept_parts(path: Path, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the parts that an earlier call has finished, with the same settings and in this form of the file."""
    record = manifest.read_json(path) if path.exists() else {}
    same = record.get("schema") == SCHEMA and record.get("settings") == settings
    return record["parts"] if same else {}


def main() -> None:
    """Measure every part that is missing, and write the record after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--onnx", type=Path, required=True, help="an ONNX file")
    parser.add_argument("--reference", type=Path, required=True, help="the ONNX file of another network")
    parser.add_argument("--ncnn", type=Path, required=True, help="the first model as a folder NAME_ncnn_model")
    parser.add_argument(
        "--runtime", default="onnxruntime", help="of the repeated runs: onnxruntime, or a variant such as -hugepages"
    )
    parser.add_argument("--imgsz", type=int, default=640, help="side of the square input, px")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--mode", choices=list(latency.MODES), default="standard")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--turns", type=int, default=500, help="queries of each side of an agreement")
    parser.add_argument("--output", type=Path, default=Path("docs/results/repeatability.json"))
    arguments = parser.parse_args()
    settings = {
        "models": {name: runtimes.sha256(getattr(arguments, name)) for name in ("onnx", "reference", "ncnn")},
        **{name: getattr(arguments, name) for name in ("runtime", "imgsz", "threads", "mode", "turns")},
        "tools": manifest.tool_versions(),
    }
    parts = kept_parts(arguments.output, settings)
    wanted: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
        **{f"run {i}": run for i in range(arguments.runs)},
        "onnxruntime": onnxruntime_agreement,
        "ncnn": ncnn_agreement,
    }
    record: dict[str, Any] = {"schema": SCHEMA, "settings": settings, "device": system.device(), "parts": parts}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    for name, measure in wanted.items():
        if name not in parts:
            parts[name] = measure(arguments)
            print(name, parts[name], flush=True)
            manifest.write_json(arguments.output, record)
    record["verdict"] = verdict({name: parts[name] for name in wanted})
    manifest.write_json(arguments.output, record)
    print(json.dumps(record["verdict"], indent=2))


if __name__ == "__main__":
    main()
