"""How far repeated latencies agree, with each other and with the runtimes' own: docs/results/repeatability.json.

usage: python scripts/studies/repeatability.py --onnx M.onnx --ncnn M_ncnn_model [--imgsz 640] [--runs 5]

Every run is one `benchmark.latency` of the ONNX file in a process of its own. Between them stand the whole-run times of
onnxruntime's profiler, and a plain loop over an ncnn extractor, without this project's code around it, beside our
p50 of the same ncnn folder. Ours holds the decoding of the head too, which is timed on its own and added to the loop.
Finished parts are kept: the same command goes on where it stopped. A noisy run says so in its row; nothing is left out.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

from benchmark import latency, runtimes, system
from compress import manifest

SPREAD, AGREEMENT = 0.03, 0.05
LOOP_WARM_UP = 20


def run(model: Path, runtime: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return p50 in ms, its interval, and why it may be doubted, of one measurement."""
    record = latency.measure(
        {model.stem: {runtime: model}}, imgsz=arguments.imgsz, threads=arguments.threads, mode=arguments.mode
    )
    (cell,) = record["cells"]
    return {
        "p50_ms": cell["p50_ms"],
        "interval_ms": cell["intervals"]["p50_ms"],
        "queries": cell["queries"],
        "noise": record["noise"],
    }


def onnxruntime_profiler(model: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the median of `model_run`, as onnxruntime's profiler has it."""
    import numpy as np

    from benchmark.runners import onnxruntime_layers, onnxruntime_runner

    session = onnxruntime_runner.load(str(model), arguments.threads)
    image = np.random.default_rng(0).random((1, 3, arguments.imgsz, arguments.imgsz), dtype=np.float32)
    runs = onnxruntime_layers.model_run_ms(onnxruntime_runner, session, str(model), image)
    return {"p50_ms": median(runs), "runs": len(runs)}


def ncnn_loop(model: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the medians of a plain loop over the network's outputs, and of our decoding of what it found."""
    import ncnn  # type: ignore[import-untyped]
    import numpy as np

    from benchmark.runners import ncnn_runner

    metadata = json.loads((model / "metadata.yaml").read_text(encoding="utf-8"))
    net: Any = ncnn.Net()  # type: ignore[attr-defined]
    net.opt.num_threads = arguments.threads
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = metadata["precision"] == "fp16"
    net.opt.use_bf16_storage = False
    net.load_param(str(model / "model.ncnn.param"))
    net.load_model(str(model / "model.ncnn.bin"))
    image = np.random.default_rng(0).random((3, arguments.imgsz, arguments.imgsz), dtype=np.float32)
    samples, decoding = [], []
    for _ in range(LOOP_WARM_UP + arguments.loops):
        start = time.perf_counter_ns()
        with net.create_extractor() as extractor:
            extractor.input("in0", ncnn.Mat(image))  # type: ignore[attr-defined]
            found = {name: extractor.extract(name) for name in metadata["outputs"]}
        samples.append((time.perf_counter_ns() - start) / 1e6)
        replay = ncnn_runner.Session(Replay(found), arguments.threads, metadata)
        start = time.perf_counter_ns()
        ncnn_runner.infer(replay, image[None])
        decoding.append((time.perf_counter_ns() - start) / 1e6)
    network_ms, decoding_ms = median(samples[LOOP_WARM_UP:]), median(decoding[LOOP_WARM_UP:])
    parts = {"network_ms": network_ms, "decoding_ms": decoding_ms}
    return {"p50_ms": network_ms + decoding_ms, **parts, "runs": arguments.loops}


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


def verdict(parts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return what the parts say together."""
    runs = [part for name, part in parts.items() if name.startswith("run ")]
    values = [part["p50_ms"] for part in runs]
    covered = [
        low <= value <= high
        for i, (low, high) in enumerate(part["interval_ms"] for part in runs)
        for j, value in enumerate(values)
        if i != j
    ]
    spread = max(values) / min(values) - 1.0
    against = {
        "onnxruntime_profiler": parts["onnxruntime profiler"]["p50_ms"] / median(values) - 1.0,
        "ncnn_loop": parts["ncnn loop"]["p50_ms"] / parts["ncnn"]["p50_ms"] - 1.0,
    }
    return {
        "p50_spread": spread,
        "p50_spread_ok": spread <= SPREAD,
        "covered_share": sum(covered) / len(covered) if covered else None,
        "difference": against,
        "difference_ok": {name: abs(value) <= AGREEMENT for name, value in against.items()},
        "quiet": not any(part.get("noise") for part in parts.values()),
    }


def main() -> None:
    """Measure every part that is missing, and write the record after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--onnx", type=Path, required=True, help="an ONNX file")
    parser.add_argument("--ncnn", type=Path, required=True, help="the same model as a folder NAME_ncnn_model")
    parser.add_argument("--imgsz", type=int, default=640, help="side of the square input, px")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--mode", choices=list(latency.MODES), default="standard")
    parser.add_argument("--runs", type=int, default=5, help="of the ONNX file")
    parser.add_argument("--loops", type=int, default=200, help="queries of the plain ncnn loop")
    parser.add_argument("--output", type=Path, default=Path("docs/results/repeatability.json"))
    arguments = parser.parse_args()
    settings = {
        "models": {name: runtimes.sha256(getattr(arguments, name)) for name in ("onnx", "ncnn")},
        **{name: getattr(arguments, name) for name in ("imgsz", "threads", "mode", "loops")},
        "tools": manifest.tool_versions(),
    }
    kept = manifest.read_json(arguments.output) if arguments.output.exists() else {}
    parts: dict[str, dict[str, Any]] = kept["parts"] if kept.get("settings") == settings else {}
    # The comparisons stand in the middle, so that slow changes of the machine touch both sides.
    half = (arguments.runs + 1) // 2
    wanted: dict[str, Any] = {f"run {i}": lambda: run(arguments.onnx, "onnxruntime", arguments) for i in range(half)}
    wanted["onnxruntime profiler"] = lambda: onnxruntime_profiler(arguments.onnx, arguments)
    wanted["ncnn"] = lambda: run(arguments.ncnn, "ncnn", arguments)
    wanted["ncnn loop"] = lambda: ncnn_loop(arguments.ncnn, arguments)
    for i in range(half, arguments.runs):
        wanted[f"run {i}"] = lambda: run(arguments.onnx, "onnxruntime", arguments)
    for name, measure in wanted.items():
        if name not in parts:
            parts[name] = measure()
            print(name, parts[name], flush=True)
            record = {"schema": 1, "settings": settings, "device": system.device(), "parts": parts}
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            manifest.write_json(arguments.output, record)
    found = verdict({name: parts[name] for name in wanted})
    record = {"schema": 1, "settings": settings, "device": system.device(), "parts": parts, "verdict": found}
    manifest.write_json(arguments.output, record)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
