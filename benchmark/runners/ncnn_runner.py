"""ncnn on the CPU, or with the variant `vulkan` on the first GPU; the head is decoded in numpy.

One of the self-contained runners: `load`, `infer` and `describe` are plain functions that need numpy and ncnn and
nothing else, so that this file alone can be copied to a device. A model is a folder with `model.ncnn.param`,
`model.ncnn.bin` and `metadata.yaml`, as `export.ncnn` writes it: the network ends at the last convolutions of the
head, because on a device only the few anchors above a threshold would be decoded.
"""

from __future__ import annotations

import ctypes
import json
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import ncnn as _ncnn
import numpy as np

ncnn: Any = _ncnn  # a compiled module: its names are in no type stub
PARAM, BIN, METADATA = "model.ncnn.param", "model.ncnn.bin", "metadata.yaml"
_SAID = {"names", "imgsz", "strides", "precision", "outputs", "end2end", "max_detections"}
_FP16_OPTIONS = ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic")
_SOFTWARE = 3  # ncnn's type of a Vulkan device that is a program on the CPU
# mallopt's M_MMAP_THRESHOLD (its largest), M_TRIM_THRESHOLD and M_TOP_PAD, bytes; see malloc.h.
_MALLOC = ((-3, 32 << 20), (-1, 1 << 30), (-2, 64 << 20))
_PROBE = "7767517\n2 2\nInput in0 0 1 in0\nSwish swish 1 1 in0 out0\n"


@dataclass(frozen=True)
class Session:
    """A network ready to infer, and what its outputs mean."""

    net: Any
    threads: int
    metadata: dict[str, Any]
    gpu: str | None = None


def load(path: str, threads: int, variant: str = "") -> Session:
    """Open a model folder with `threads` threads on the CPU; with `vulkan` as variant the layers run on the GPU.

    A model stored in fp16 lets ncnn compute in fp16 where the CPU can; one stored in fp32 stays in fp32 everywhere. In
    one stored in int8 the layers with 8-bit weights multiply in integers, and all else is in fp32.

    Raises:
        ValueError: the folder is not a model of `export.ncnn`, a file in it is damaged, or there is no GPU for Vulkan.
    """
    keep_memory()
    folder = Path(path)
    metadata = _metadata(folder)
    gpu = _vulkan_gpu(path) if variant == "vulkan" else None
    net = ncnn.Net()
    _set_options(net, threads, metadata["precision"] == "fp16")
    net.opt.use_vulkan_compute = gpu is not None
    for name, open_file in ((PARAM, net.load_param), (BIN, net.load_model)):
        if open_file(str(folder / name)) != 0:
            raise ValueError(f"{folder / name} cannot be opened by ncnn: export the model again")
    return Session(net, threads, metadata, gpu)


def infer(session: Session, images: np.ndarray) -> list[np.ndarray]:
    """Run the network and decode its head.

    Args:
        session: what `load` returned.
        images: (n, 3, height, width) float32 in [0, 1], RGB, of the size that the model was exported with; where that
            was left open, of any that its stride divides.

    Returns:
        The arrays that `torch_runner.infer` returns, for a detector one: (n, 4 + classes, anchors), boxes as centre x,
        centre y, width, height in px; for an end-to-end head (n, detections, 6), rows of x1, y1, x2, y2, score, class.

    Raises:
        ValueError: the images have another size, or ncnn cannot run the network.
    """
    (height, width), (rows, columns) = session.metadata["imgsz"], images.shape[2:]
    if not session.metadata.get("dynamic") and (rows, columns) != (height, width):
        raise ValueError(f"takes images of {width}×{height} px, got {columns}×{rows}")
    stride = session.metadata["stride"]
    if rows % stride or columns % stride:
        raise ValueError(f"takes images whose sides are multiples of {stride} px, got {columns}×{rows}")
    found = [_infer_one(session, image) for image in np.ascontiguousarray(images)]
    return [np.stack(outputs) for outputs in zip(*found)]  # noqa: B905  (Python 3.8 has no `strict`)


def keep_memory() -> None:
    """Let glibc keep the memory that blobs have had, for the next inference.

    By itself it gives large blocks back to the system as soon as they are free, and every inference pays for the page
    faults of getting them again: a quarter of the latency of a small network, and another share in every process.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    for option, size in _MALLOC:
        libc.mallopt(option, size)


def blobs(session: Session, image: np.ndarray, names: list[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Run the network on one image (3, height, width) and yield values inside of it, one at a time.

    Args:
        session: what `load` returned.
        image: as for `infer`.
        names: of blobs in the graph.

    Raises:
        ValueError: ncnn cannot compute one of them.
    """
    with session.net.create_extractor() as extractor:
        extractor.set_light_mode(False)  # nothing is freed before it was asked for
        extractor.input("in0", ncnn.Mat(image))
        for name in names:
            yield name, _extract(extractor, name)


def describe(session: Session) -> dict[str, Any]:
    """Return what a benchmark record says about the runtime.

    `precision` is what the model was stored for, `precision_executed` what this CPU makes of activations.
    """
    metadata = session.metadata
    precision, on_gpu = metadata["precision"], session.gpu is not None
    executed = precision if precision != "fp16" or rounds_to_fp16() else "fp32"
    return {
        "runtime": "ncnn-vulkan" if on_gpu else "ncnn",
        "version": ncnn.__version__,
        "threads": session.threads,
        "precision": precision,
        "precision_executed": None if on_gpu else executed,
        "providers": [session.gpu] if on_gpu else None,
        "memory_format": None,
        "input_shape": [1, 3, *([None, None] if metadata.get("dynamic") else metadata["imgsz"])],
        "task": metadata.get("task", "detect"),
        "classes": len(metadata["names"]),
        "keypoints": metadata.get("kpt_shape"),
        "end2end": bool(metadata["end2end"]),
    }


def decode(
    levels: list[tuple[np.ndarray, np.ndarray]],
    anchors: np.ndarray,
    strides: np.ndarray,
    xyxy: bool,
    angles: np.ndarray | None = None,
) -> np.ndarray:
    """Turn the maps of the head into boxes and scores.

    Args:
        levels: per level the box map (4 · bins, height, width) and the class map (classes, height, width), logits.
            The bins are a distribution over the distance from the anchor to a side, in strides; a single bin is the
            distance itself.
        anchors: (2, anchors), x and y in strides.
        strides: (anchors,), px.
        xyxy: boxes as corners; otherwise as centre and size.
        angles: (anchors,), radians: turns the distances, and boxes are centre and size.

    Returns:
        (4 + classes, anchors): boxes in px, scores in [0, 1].
    """
    bins, classes, count = len(levels[0][0]) // 4, len(levels[0][1]), len(strides)
    logits = np.concatenate([boxes.reshape(4, bins, -1) for boxes, _ in levels], axis=2)
    output = np.empty((4 + classes, count), np.float32)
    distances = _expectation(logits)
    if angles is not None:
        x, y = (distances[2:] - distances[:2]) / 2
        cos, sin = np.cos(angles), np.sin(angles)
        output[:2] = anchors + np.stack([x * cos - y * sin, x * sin + y * cos])
        output[2:4] = distances[:2] + distances[2:]
    else:
        first, second = anchors - distances[:2], anchors + distances[2:]
        output[:2] = first if xyxy else (first + second) / 2
        output[2:4] = second if xyxy else second - first
    output[:4] *= strides
    scores = output[4:]
    np.concatenate([maps.reshape(classes, -1) for _, maps in levels], axis=1, out=scores)
    _sigmoid(scores)
    return output


def decode_key_points(raw: np.ndarray, anchors: np.ndarray, strides: np.ndarray, dims: int, halved: bool) -> np.ndarray:
    """Turn the maps of key points into px.

    Args:
        raw: (points · dims, anchors): x and y, as distances from the anchor in strides, and a logit of visibility.
        anchors: (2, anchors), x and y in strides.
        strides: (anchors,), px.
        dims: 2, or 3 with visibility.
        halved: distances are stored halved, and from the corner of the cell, as heads before YOLO26 have them.

    Returns:
        (points · dims, anchors): x and y in px, visibility in [0, 1].
    """
    points = raw.reshape(-1, dims, raw.shape[1]).copy()
    points[:, :2] = (points[:, :2] * 2 + (anchors - 0.5) if halved else points[:, :2] + anchors) * strides
    if dims == 3:
        points[:, 2] = _sigmoid(points[:, 2].copy())
    return points.reshape(raw.shape)


def top_detections(decoded: np.ndarray, max_detections: int, classes: int | None = None) -> np.ndarray:
    """Return the best rows of an end-to-end head, best first, as Ultralytics picks them.

    Args:
        decoded: (4 + classes + more, anchors), boxes as corners.
        max_detections: how many rows to return, where there are as many anchors.
        classes: how many there are; all channels behind the box when not given.

    Returns:
        (detections, 6 + more): x1, y1, x2, y2 in px, score, class, and the rest of the anchor.
    """
    behind = len(decoded) if classes is None else 4 + classes
    scores = decoded[4:behind]
    count = min(max_detections, scores.shape[1])
    candidates = _top(scores.max(axis=0), count)
    best = scores[:, candidates].T  # (count, classes)
    chosen = _top(best.ravel(), count)
    rows, labels = np.divmod(chosen, best.shape[1])
    anchors = candidates[rows]
    columns = [decoded[:4, anchors].T, best[rows, labels], labels, decoded[behind:, anchors].T]
    return np.column_stack(columns).astype(np.float32)


@lru_cache(maxsize=8)
def make_anchors(imgsz: tuple[int, ...], strides: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return the anchors (2, n) in strides, at the centre of each cell, and the stride of each (n,), level by level.

    Args:
        imgsz: height and width of the input, px.
        strides: of the levels, px.
    """
    grids = [np.zeros((2, 0), np.float32)]  # a task without boxes has no levels
    for stride in strides:
        y, x = np.mgrid[: imgsz[0] // stride, : imgsz[1] // stride]
        grids.append(np.stack([x.ravel(), y.ravel()]) + np.float32(0.5))
    per_anchor = np.repeat(np.array(strides, np.float32), [grid.shape[1] for grid in grids[1:]])
    return np.concatenate(grids, axis=1).astype(np.float32), per_anchor


def rounds_to_fp16() -> bool:
    """Tell whether ncnn rounds activations to fp16 on this CPU when it may: asked of ncnn, not of a list of CPUs."""
    net = ncnn.Net()
    _set_options(net, 1, half=True)
    net.load_param_mem(_PROBE)
    net.load_model(ncnn.DataReaderFromEmpty())
    values = np.linspace(0.1, 3, 256, dtype=np.float32).reshape(16, 4, 4)
    with net.create_extractor() as extractor:
        # A Mat borrows the array's memory; the clone has its own, because the layer works in place.
        extractor.input("in0", ncnn.Mat(values).clone())
        output = np.array(extractor.extract("out0")[1])
    return bool((output.astype(np.float16) == output).all())


def _metadata(folder: Path) -> dict[str, Any]:
    try:
        # JSON, which every YAML reader takes too.
        metadata = json.loads((folder / METADATA).read_text(encoding="utf-8"))
        sizes = {name: int(metadata["files"][name]["bytes"]) for name in (PARAM, BIN)}
        if not _SAID.issubset(metadata):
            raise ValueError("not of export.ncnn")
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{folder} is not a model of export.ncnn: it has no {METADATA} that says what it is") from None
    for name, size in sizes.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else 0
        if found != size:
            raise ValueError(f"{folder / name} has {found} bytes, it was written with {size}: copy the folder again")
    return metadata


def _vulkan_gpu(path: str) -> str:
    """Return the name of the GPU that ncnn takes; one that is only a program on the CPU does not count."""
    if ncnn.get_gpu_count() == 0:
        raise ValueError(f"{path}: ncnn finds no GPU with Vulkan here: install its driver, or use the runtime ncnn")
    info = ncnn.get_gpu_info(ncnn.get_default_gpu_index())
    if info.type() == _SOFTWARE:
        raise ValueError(f"{path}: Vulkan is only emulated here ({info.device_name()}): use the runtime ncnn")
    return info.device_name()


def _set_options(net: Any, threads: int, half: bool) -> None:
    net.opt.num_threads = threads
    net.opt.use_vulkan_compute = False
    net.opt.use_bf16_storage = False
    for name in _FP16_OPTIONS:
        setattr(net.opt, name, half)


def _infer_one(session: Session, image: np.ndarray) -> list[np.ndarray]:
    with session.net.create_extractor() as extractor:
        extractor.input("in0", ncnn.Mat(image))
        maps = [_extract(extractor, name) for name in session.metadata["outputs"]]
    metadata = session.metadata
    if not metadata["strides"]:  # a task without boxes
        return maps
    anchors, strides = make_anchors(image.shape[1:], tuple(metadata["strides"]))
    # The prototypes of masks are the one map that belongs to no level.
    per_level, prototypes = divmod(len(maps), len(metadata["strides"]))
    levels = [maps[start : start + per_level] for start in range(0, len(maps) - prototypes, per_level)]
    more = [np.concatenate([maps.reshape(len(maps), -1) for maps in kind], axis=1) for kind in zip(*levels)]  # noqa: B905
    extras, angles = more[2:], None
    if metadata["task"] == "obb":
        # Heads before YOLO26 squeeze the angle into [-π/4, 3π/4].
        extras = [more[2] if metadata["head"].endswith("26") else (_sigmoid(more[2].copy()) - 0.25) * np.pi]
        angles = extras[0][0]
    elif metadata["task"] == "pose":
        halved = not metadata["head"].endswith("26")
        extras = [decode_key_points(more[2], anchors, strides, metadata["kpt_shape"][1], halved)]
    end2end, boxes = metadata["end2end"], [(level[0], level[1]) for level in levels]
    decoded = decode(boxes, anchors, strides, xyxy=end2end, angles=angles)
    classes = len(decoded) - 4
    if extras:
        decoded = np.concatenate([decoded, *extras])
    if end2end:
        decoded = top_detections(decoded, metadata["max_detections"], classes)
    return [decoded, *maps[len(maps) - prototypes :]]


def _sigmoid(values: np.ndarray) -> np.ndarray:
    """Turn logits into probabilities, in place."""
    with np.errstate(over="ignore"):  # 1 / (1 + exp(1000)) is 0, as it should be
        np.exp(np.negative(values, out=values), out=values)
    return np.reciprocal(np.add(values, 1, out=values), out=values)


def _extract(extractor: Any, name: str) -> np.ndarray:
    status, output = extractor.extract(name)
    if status != 0:
        raise ValueError(f"ncnn cannot compute {name} (status {status}): it may be out of memory")
    return np.array(output)


def _expectation(logits: np.ndarray) -> np.ndarray:
    """Return the mean (4, n) of the distributions over bins that (4, bins, n) logits stand for."""
    bins = logits.shape[1]
    if bins == 1:
        return logits[:, 0]
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.matmul(np.arange(bins, dtype=np.float32), weights) / weights.sum(axis=1)


def _top(values: np.ndarray, count: int) -> np.ndarray:
    """Return the indices of the `count` largest values, largest first."""
    indices = np.argpartition(-values, count - 1)[:count]
    return indices[np.argsort(-values[indices], kind="stable")]
