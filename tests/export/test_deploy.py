"""The deploy bundle: what is written, and what is refused."""

from __future__ import annotations

import errno
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from compress import manifest
from compress.errors import ExportError, run_app
from export import deploy
from export import ncnn as exporter


@pytest.fixture
def run(run_command: Any) -> Any:
    return partial(run_command, exporter.app)


def edit(model: Path, folder: Path, **changes: Any) -> Path:
    """Copy a model folder with other metadata."""
    copy = folder / model.name
    shutil.copytree(model, copy)
    content = manifest.read_json(copy / "metadata.yaml")
    manifest.write_json(copy / "metadata.yaml", {**content, **changes})
    return copy


def test_a_bundle_is_complete(ncnn_model: Path, bundle: Path) -> None:
    assert sorted(path.name for path in bundle.iterdir()) == ["README.md", "android", "cpp", "model"]
    assert sorted(path.name for path in (bundle / "model").iterdir()) == [
        "detector.txt",
        "labels.txt",
        "metadata.yaml",
        "model.ncnn.bin",
        "model.ncnn.param",
    ]
    for name in ("model.ncnn.bin", "model.ncnn.param", "metadata.yaml"):
        assert (bundle / "model" / name).read_bytes() == (ncnn_model / name).read_bytes()
    for name in ("cpp/CMakeLists.txt", "cpp/main.cpp", "android/app/build.gradle.kts", "android/README.md"):
        assert (bundle / name).read_bytes() == (deploy.TEMPLATES / name).read_bytes()
    assert [path.name for path in bundle.parent.iterdir() if path.name.startswith(".")] == []


def test_constants_and_labels_are_what_the_program_needs(ncnn_model: Path, bundle: Path) -> None:
    lines = (bundle / "model/detector.txt").read_text().splitlines()
    entries = dict(line.split(" ", 1) for line in lines if not line.startswith("#"))
    assert entries == {
        "format": "1",
        "param": f"model.ncnn.param {(ncnn_model / 'model.ncnn.param').stat().st_size}",
        "bin": f"model.ncnn.bin {(ncnn_model / 'model.ncnn.bin').stat().st_size}",
        "precision": "fp32",
        "input_width": "64",
        "input_height": "64",
        "padding": "114",
        "divisor": "255",
        "strides": "8 16 32",
        "outputs": "out0 out1 out2 out3 out4 out5",
        "classes": "3",
        "reg_max": "16",
        "end2end": "0",
        "confidence": "0.25",
        "iou": "0.7",
        "max_detections": "300",
    }
    assert (bundle / "model/labels.txt").read_text() == "circle\nsquare\nstar\n"


def test_names_stay_on_their_lines_and_in_their_order(ncnn_model: Path, tmp_path: Path) -> None:
    names = {"10": "k", "2": "a\nb", "0": " x\ty ", **{str(i): str(i) for i in (1, 3, 4, 5, 6, 7, 8, 9)}}
    written = deploy.write_bundle(edit(ncnn_model, tmp_path, names=names), tmp_path / "bundle")
    assert (written / "model/labels.txt").read_text().splitlines() == ["x y", "1", "a b", *"3456789", "k"]


def test_what_exists_is_never_overwritten(ncnn_model: Path, tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "mine.txt").write_text("mine")
    with pytest.raises(ExportError, match="bundle exists: remove it, or choose another --bundle"):
        deploy.write_bundle(ncnn_model, tmp_path / "bundle")
    assert [path.name for path in (tmp_path / "bundle").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "segment"}, "is a model for segment: a bundle can only run detectors"),
        ({"channels": 1}, "takes images of 1 channels: a bundle gives it 3, RGB"),
        ({"files": {}}, "is not a model of export.ncnn"),
    ],
)
def test_models_that_the_program_cannot_run_are_refused(
    changes: dict[str, Any], message: str, ncnn_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=message):
        deploy.write_bundle(edit(ncnn_model, tmp_path, **changes), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("copies", [0, 5, 25])
def test_a_full_disk_is_one_line_and_leaves_nothing(
    copies: int,
    ncnn_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    honest, left = shutil.copyfile, copies

    def copy(source: Path, target: Path) -> None:
        nonlocal left
        if left == 0:
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        left -= 1
        honest(source, target)

    monkeypatch.setattr(deploy.shutil, "copyfile", copy)
    with pytest.raises(SystemExit):
        run_app(lambda: deploy.write_bundle(ncnn_model, tmp_path / "bundle"))
    error = capsys.readouterr().err
    assert error.startswith("error: No space left on device (")
    assert len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_a_bundle_of_what_it_proved(
    run: Any, detector: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, bundle = tmp_path / "out", tmp_path / "deep" / "bundle"
    arguments = ("--model", detector, "--data", data, "--imgsz", 64, "--output", out, "--parity-images", 1)
    assert run(*arguments, "--bundle", bundle) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"bundle: {bundle} (its README.md says what to type)"
    made = (out / "tiny_ncnn_model" / "model.ncnn.bin").read_bytes()
    assert (bundle / "model" / "model.ncnn.bin").read_bytes() == made

    # Before anything is exported.
    assert run(*arguments[:-4], "--output", tmp_path / "other", "--bundle", bundle) == 2
    assert capsys.readouterr().err == f"error: {bundle} exists: remove it, or choose another --bundle\n"
    (tmp_path / "file").touch()
    assert run(*arguments[:-4], "--output", tmp_path / "other", "--bundle", tmp_path / "file" / "b") == 2
    message = f"error: {tmp_path / 'file'} is a file, no folder can lie in it: choose another --bundle\n"
    assert capsys.readouterr().err == message
    assert not (tmp_path / "other").exists()
    for place in (tmp_path / "other", tmp_path / "other" / "in"):
        assert run(*arguments[:-4], "--output", place, "--bundle", tmp_path / "other") == 2
        assert capsys.readouterr().err == (
            f"error: --bundle {tmp_path / 'other'} is where --output goes: choose another --bundle\n"
        )
        assert not (tmp_path / "other").exists()


def test_a_bundle_of_another_task_is_refused_before_the_export(
    run: Any, models: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--model", models["segment"], "--data", data, "--imgsz", 64, "--output", tmp_path / "out")
    assert run(*arguments, "--bundle", tmp_path / "bundle") == 2
    assert capsys.readouterr().err == "error: segment.pt is a model for segment: a bundle can only run detectors\n"
    assert list(tmp_path.iterdir()) == []


def test_the_app_calls_the_library_as_it_is_written() -> None:
    app = deploy.TEMPLATES / "android/app/src/main"
    kotlin = (app / "java/org/espalier/detector/Detector.kt").read_text()
    kinds = {"String": "jstring", "ByteBuffer": "jobject", "Int": "jint", "Long": "jlong", "FloatArray": "jfloatArray"}
    called = {
        name: (kinds.get(returned, "void"), [kinds[kind] for kind in re.findall(r": (\w+)", words)])
        for name, words, returned in re.findall(r"external fun (\w+)\(([^)]*)\)(?:: (\w+))?", kotlin)
    }
    native = re.sub(r"/\*.*?\*/", "", (app / "cpp/detector_jni.cpp").read_text())
    prefix = "Java_org_espalier_detector_Detector_"
    exported = {
        name: (returned, re.findall(r"(j\w+)\s+\w+", words))
        for returned, name, words in re.findall(rf"JNIEXPORT (\w+) JNICALL\s+{prefix}(\w+)\(([^)]*)\)", native)
    }
    assert len(exported) == 3
    assert exported == called
    read = re.search(r"val FILES = listOf\((.*)\)", kotlin)
    assert read
    assert set(re.findall(r'"([^"]+)"', read[1])) == {deploy.CONSTANTS, deploy.PARAM, deploy.BIN}


def test_every_template_is_installed_with_the_package(root: Path) -> None:
    assert 'export = ["bundle/**/*"]' in (root / "pyproject.toml").read_text()
    hidden = [path for path in deploy.TEMPLATES.rglob("*") if path.name.startswith(".")]
    assert hidden == []  # setuptools' patterns pass such files by
