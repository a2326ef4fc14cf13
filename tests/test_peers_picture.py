from __future__ import annotations

import struct
from pathlib import Path

from scripts.peers import outcome, picture

SCORES = {"worse": (0.40, 0.44), "ours": (0.58, 0.59), "better": (0.60, 0.62)}


def test_the_ways_are_drawn_by_what_they_keep_and_a_panel_stands_for_each_runtime(tmp_path: Path) -> None:
    rows = [
        {"runtime": runtime, "way": way, "seed": seed, "map50_95": score, "ms": 5.0, "speedup": 1.8, "macs": 4e8}
        for runtime in ("onnxruntime", "ncnn")
        for way, scores in SCORES.items()
        for seed, score in enumerate(scores)
    ]
    lines = outcome.summarise(rows, "ours")
    assert picture.order(lines) == ["better", "ours", "worse"]
    sizes = {}
    for name, runtimes in (("one", ("ncnn",)), ("two", ("onnxruntime", "ncnn"))):
        path = tmp_path / f"{name}.png"
        mine = [[item for item in items if item["runtime"] in runtimes] for items in (rows, lines)]
        picture.plot(mine[0], mine[1], 0.65, {way: way for way in SCORES}, "ours", path)
        sizes[name] = struct.unpack(">II", path.read_bytes()[16:24])
    assert sizes["two"][0] - sizes["one"][0] == 690  # 4.6 inches at 150 dpi
    assert sizes["two"][1] == sizes["one"][1]
