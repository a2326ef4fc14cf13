"""Compare the program of a deploy bundle with the Python runner, box by box: docs/results/bundle_parity.json.

usage: python -m scripts.studies.bundle_parity --data D.yaml --model M.pt … [--target aarch64 …] [--imgsz 320]

Both get the same image files. scripts/build_bundle.sh builds the programs; see the README of a bundle for JPEG files on
aarch64. On a machine of another kind, the aarch64 program runs in qemu (Debian, Ubuntu: qemu-user-static), which is
exact but tells nothing about latency. Sums differ with the vector units of a CPU, above all in fp16; so with
--python-root, the root folder of an aarch64 system, the Python runner runs on the emulated CPU too.

Every finished row is on disk at once; rows of other models, sizes and targets stay. Exit code 1 where a row misses its
limits.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmark.runners import ncnn_runner
from compress import manifest
from compress.data.dataset import data_hash, images
from compress.data.pixels import letterbox
from export import deploy
from export.matching import match
from export.ncnn import export_ncnn
from scripts.studies import rows

ROOT = Path(__file__).parents[2]
CONFIDENCE = 0.25
LOWEST = 0.24  # what lies below the confidence by less than this may be a partner, and counts for nothing else
IOU = 0.7
MIN_IOU, MAX_SCORE_ERROR = 0.99, 1e-3
# What is emulated: Raspberry Pi 4, which has no fp16 arithmetic, and Raspberry Pi 5, which has.
CPUS = {"fp32": ("cortex-a72",), "fp16": ("cortex-a72", "cortex-a76")}
KEYS = ("model", "head", "precision", "data", "imgsz", "target", "cpu", "jpeg_reader", "python_machine")
# What another Python runs: it needs numpy, ncnn and the file of the runner.
RUNNER = """
import sys
runners, folder, scratch = sys.argv[1:]
sys.path.insert(0, runners)
import numpy as np
import ncnn_runner
session = ncnn_runner.load(folder, 1)
outputs = [ncnn_runner.infer(session, image)[0] for image in np.load(f"{scratch}/inputs.npy")]
np.save(f"{scratch}/outputs.npy", np.stack(outputs))
"""


def in_python(folder: Path, files: list[Path], imgsz: int, python: list[str] | None = None) -> list[np.ndarray]:
    """Return per image the (n, 6) detections of the Python runner, in px of the image: decoded, suppressed, moved.

    Args:
        folder: the model, NAME_ncnn_model.
        files: images.
        imgsz: side of the square input, px.
        python: how to start another Python than this one for the runner; its letterboxed input and what becomes of its
            output are this one's.
    """
    import torch
    from ultralytics.utils.nms import non_max_suppression
    from ultralytics.utils.ops import scale_boxes
    from ultralytics.utils.patches import imread

    inputs = [letterbox(file, imgsz) for file in files]
    found = []
    for file, output in zip(files, _infer(folder, inputs, python), strict=True):
        end2end = output.shape[-1] == 6
        kept: Any = non_max_suppression(torch.from_numpy(output), LOWEST, IOU, end2end=end2end)[0]
        image: Any = imread(str(file))
        kept[:, :4] = scale_boxes((imgsz, imgsz), kept[:, :4], image.shape[:2])
        found.append(kept.numpy())
    return found


def _infer(folder: Path, inputs: list[np.ndarray], python: list[str] | None) -> list[np.ndarray]:
    if python is None:
        session = ncnn_runner.load(str(folder), 1)
        return [ncnn_runner.infer(session, image)[0] for image in inputs]
    with tempfile.TemporaryDirectory() as scratch:
        np.save(Path(scratch) / "inputs.npy", np.stack(inputs))
        script = Path(ncnn_runner.__file__).parent, folder, scratch
        subprocess.run([*python, "-c", RUNNER, *map(str, script)], check=True)  # noqa: S603  (a Python that was named)
        return list(np.load(Path(scratch) / "outputs.npy"))


def in_program(command: list[str], bundle: Path, files: list[Path]) -> tuple[list[np.ndarray], dict[str, Any]]:
    """Return per image the (n, 6) detections of the program, and its whole answer."""
    options = ["--model", str(bundle / "model"), "--threads", "1", "--warmup", "0", "--confidence", str(LOWEST)]
    done = subprocess.run(  # noqa: S603  (a program of this repository, with our own arguments)
        [*command, *options, *map(str, files)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()}")
    answer = json.loads(done.stdout)
    found = [[[*row["box"], row["score"], row["class"]] for row in image["detections"]] for image in answer["images"]]
    return [np.array(image, np.float64).reshape(-1, 6) for image in found], answer


def compare(expected: list[np.ndarray], found: list[np.ndarray]) -> dict[str, Any]:
    """Return what the detections of all images differ by, and whether that is within the limits."""
    ious: list[float] = []
    score_error = box_error = 0.0
    unmatched = 0
    for python, program in zip(expected, found, strict=True):
        pairs, alone = match(python, program)
        unmatched += alone
        for i, j, iou in pairs:
            ious.append(iou)
            error = np.abs(python[i, :5] - program[j, :5])
            box_error, score_error = max(box_error, float(error[:4].max())), max(score_error, float(error[4]))
    counts = [sum(int((boxes[:, 4] >= CONFIDENCE).sum()) for boxes in side) for side in (expected, found)]
    least = min(ious, default=0.0)
    return {
        "python": counts[0],
        "program": counts[1],
        "matched": len(ious),
        "unmatched": unmatched,
        "min_iou": least,
        "max_box_error_px": box_error,
        "max_score_error": score_error,
        "passed": unmatched == 0 and least >= MIN_IOU and score_error <= MAX_SCORE_ERROR,
    }


def starts(target: str, precision: str) -> list[tuple[str | None, list[str]]]:
    """Return the CPUs that stand for a target here (None: this machine's own), each with what goes before programs."""
    if target == platform.machine():
        return [(None, [])]
    return [(cpu, [f"qemu-{target}-static", "-cpu", cpu]) for cpu in CPUS[precision]]


def python_in(root: Path, before: list[str]) -> list[str]:
    """Return how the Python of another system is started, whose root folder is `root`."""
    root = root.resolve()
    return [*before, "-E", f"PYTHONHOME={root / 'usr'}", "-L", str(root), str(root / "usr/bin/python3")]


def fused_to_one_head(model: Path, folder: Path) -> Path:
    """Write the checkpoint that keeps only the end-to-end head of a model with two, and return its path."""
    from compress.checkpoint import load_model, save_model

    network: Any = load_model(model)
    if not hasattr(network.model[-1], "one2one_cv2"):
        raise SystemExit(f"{model.name} has no end-to-end head")
    network.model[-1].end2end = True
    network.fuse(verbose=False)
    save_model(network.eval(), folder / model.name, {"task": "detect"})
    return folder / model.name


def build(bundle: Path, targets: list[str]) -> dict[str, Path]:
    """Build the program of a bundle and return its path by target."""
    subprocess.run(  # noqa: S603  (our own script)
        ["/usr/bin/env", "bash", str(ROOT / "scripts" / "build_bundle.sh"), str(bundle), *targets], check=True
    )
    return {target: bundle / "bin" / target / "detect" for target in targets}


def _store(path: Path, row: dict[str, Any]) -> None:
    limits = {"min_iou": MIN_IOU, "max_score_error": MAX_SCORE_ERROR, "unmatched": 0, "confidence": CONFIDENCE}
    rows.store(path, row, KEYS, {"limits": limits})
    print({key: row[key] for key in row if key not in ("tools", "model_sha256", "data_sha256")}, flush=True)


def main() -> None:
    """Make every row, and write the record after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, nargs="+", required=True, help="checkpoints (.pt)")
    parser.add_argument("--data", type=Path, required=True, help="data set YAML; images of its val split are compared")
    parser.add_argument("--images", type=int, default=32, help="how many of them")
    parser.add_argument("--imgsz", type=int, default=640, help="side of the square input, px")
    parser.add_argument("--target", nargs="+", choices=["x86_64", "aarch64"], default=[platform.machine()])
    parser.add_argument("--precision", nargs="+", choices=["fp32", "fp16"], default=["fp32", "fp16"])
    parser.add_argument("--end2end", action="store_true", help="the end-to-end head of models that have two")
    parser.add_argument("--python-root", type=Path, help="aarch64 system with usr/bin/python3, numpy and ncnn")
    parser.add_argument("--output", type=Path, default=Path("docs/results/bundle_parity.json"))
    arguments = parser.parse_args()
    data = arguments.data.resolve()
    files = images(data, "val")[: arguments.images]
    shared = {
        "data": data.name,
        "data_sha256": data_hash(data, "val"),
        "images": len(files),
        "imgsz": arguments.imgsz,
        "tools": manifest.tool_versions(),
    }
    failed = False
    with tempfile.TemporaryDirectory() as scratch:
        programs: dict[str, Path] = {}
        for model in arguments.model:
            checkpoint = fused_to_one_head(model, Path(scratch)) if arguments.end2end else model
            for precision in arguments.precision:
                name = f"{model.stem}_{precision}"
                folder = Path(scratch) / f"{name}_ncnn_model"
                export_ncnn(checkpoint, folder, imgsz=arguments.imgsz, half=precision == "fp16")
                bundle = deploy.write_bundle(folder, Path(scratch) / name)
                # The same program for every model: that is what the first one's has to prove.
                programs = programs or build(bundle, arguments.target)
                local = in_python(folder, files, arguments.imgsz)
                runs = [(target, *each) for target in programs for each in starts(target, precision)]
                for target, cpu, before in runs:
                    found, answer = in_program([*before, str(programs[target])], bundle, files)
                    expected = {platform.machine(): local}
                    if cpu and arguments.python_root:
                        python = python_in(arguments.python_root, before)
                        expected[f"{target} {cpu}"] = in_python(folder, files, arguments.imgsz, python)
                    for machine, detections in expected.items():
                        row = {
                            "model": model.stem,
                            "model_sha256": manifest.sha256_file(model),
                            "head": "end-to-end" if arguments.end2end else "one-to-many",
                            "precision": precision,
                            "target": target,
                            "cpu": cpu,
                            **{name: answer[name] for name in ("runtime", "jpeg_reader")},
                            "python_machine": machine,
                            **shared,
                            **compare(detections, found),
                        }
                        failed |= not row["passed"]
                        _store(arguments.output, row)
    raise SystemExit(int(failed))


if __name__ == "__main__":
    main()
