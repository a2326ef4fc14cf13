"""The trtexec command in the options of each version."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from export import trtexec

REQUEST: dict[str, Any] = {
    "onnx": "model.onnx",
    "engine": "model.engine",
    "timing_cache": None,
    "precision": "fp16",
    "rest": "fp32",
    "float_nodes": [],
    "profiles": {},
    "workspace_mib": None,
    "version_compatible": False,
    "hardware_compatible": False,
    "dla": None,
}
COMMON = ["--onnx=model.onnx", "--saveEngine=model.engine", "--noTF32"]


@pytest.mark.parametrize(
    ("flavour", "version", "words"),
    [
        ("tensorrt", "8.5.2", ["trtexec", *COMMON, "--fp16", "--profilingVerbosity=detailed", "--buildOnly"]),
        ("tensorrt", "10.3.0", ["trtexec", *COMMON, "--fp16", "--profilingVerbosity=detailed", "--skipInference"]),
        (
            "tensorrt",
            "10.12",
            ["trtexec", *COMMON, "--stronglyTyped", "--profilingVerbosity=detailed", "--skipInference"],
        ),
        ("tensorrt", "11.4.0", ["trtexec", *COMMON, "--profilingVerbosity=detailed", "--skipInference"]),
        ("tensorrt_rtx", "1.7.1", ["tensorrt_rtx", *COMMON, "--profilingVerbosity=detailed", "--skipInference"]),
    ],
)
def test_each_version_is_told_the_precision_in_its_own_way(flavour: str, version: str, words: list[str]) -> None:
    assert trtexec.command(flavour, version, REQUEST) == words


def test_every_setting_has_its_option() -> None:
    request = {
        **REQUEST,
        "precision": "int8",
        "rest": "fp16",
        "float_nodes": ["/a/Mul", "/a/Add"],
        "profiles": {"images": [[1, 3, 320, 320], [4, 3, 640, 640], [8, 3, 960, 960]]},
        "workspace_mib": 512,
        "timing_cache": "timing.cache",
        "version_compatible": True,
        "hardware_compatible": True,
        "dla": 1,
    }
    assert trtexec.command("tensorrt", "10.3", request)[4:] == [
        "--int8",
        "--fp16",
        "--precisionConstraints=prefer",
        "--layerPrecisions=/a/Mul:fp32,/a/Add:fp32",
        "--layerOutputTypes=/a/Mul:fp32,/a/Add:fp32",
        "--minShapes=images:1x3x320x320",
        "--optShapes=images:4x3x640x640",
        "--maxShapes=images:8x3x960x960",
        "--memPoolSize=workspace:512",
        "--timingCacheFile=timing.cache",
        "--versionCompatible",
        "--hardwareCompatibilityLevel=ampere+",
        "--useDLACore=1",
        "--allowGPUFallback",
        "--profilingVerbosity=detailed",
        "--skipInference",
    ]
    assert "--noTF32" not in trtexec.command("tensorrt", "10.3", {**REQUEST, "precision": "tf32"})


def test_a_name_never_becomes_shell(tmp_path: Path) -> None:
    """The script is run with a trtexec that only writes down what it was given."""
    name = "a b$(touch oops);'.onnx"
    (tmp_path / "build.sh").write_text(trtexec.script("tensorrt", "10.3", {**REQUEST, "onnx": name}))
    (tmp_path / "trtexec").write_text('#!/bin/sh\nprintf "%s\\n" "$@" >given\n')
    (tmp_path / "trtexec").chmod(0o755)
    subprocess.run(
        ["sh", "build.sh"], cwd=tmp_path, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, check=True, capture_output=True
    )
    assert (tmp_path / "given").read_text().splitlines()[0] == f"--onnx={name}"
    assert not (tmp_path / "oops").exists()
