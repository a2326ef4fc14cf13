"""The program of the deploy bundle, built against the ncnn that scripts/build_bundle.sh keeps; and that script."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmark.runners import ncnn_runner
from compress.data.pixels import letterbox
from export import deploy
from export.matching import match
from export.ncnn import export_ncnn

CPP = deploy.TEMPLATES / "cpp"
JNI = deploy.TEMPLATES / "android/app/src/main/cpp/detector_jni.cpp"
STUBS = Path(__file__).with_name("bundle") / "stubs"

Program = Callable[..., subprocess.CompletedProcess[str]]


def ncnn_cache(root: Path, name: str) -> Path:
    version = re.search(r"^ncnn==([\d.]+)", (root / "requirements.lock").read_text(), re.MULTILINE)
    assert version
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "espalier" / f"ncnn-{version[1]}" / name


@pytest.mark.parametrize("source", [*sorted(CPP.glob("*.cpp")), JNI], ids=lambda path: path.name)
def test_sources_compile_against_the_headers_of_ncnn(
    compile_cpp: Callable[..., None], root: Path, source: Path
) -> None:
    headers = ncnn_cache(root, "include")
    if not headers.is_dir():
        pytest.skip("needs ncnn's headers: bash scripts/build_bundle.sh --headers")
    # Android's ncnn makes its users compile without exceptions and RTTI.
    android = ["-fno-exceptions", "-fno-rtti", "-I", STUBS] if source == JNI else []
    switch = "-DNCNN_SIMPLEOCV=1"
    compile_cpp("-fsyntax-only", switch, *android, "-I", CPP, "-isystem", headers, source)


@pytest.fixture(scope="module")
def program(compile_cpp: Callable[..., None], root: Path, tmp_path_factory: pytest.TempPathFactory) -> Program:
    """Call the program, built against the ncnn in the cache with every check that the compiler can add."""
    found = sorted(ncnn_cache(root, ".").glob(f"{platform.machine()}-[0-9]/lib/cmake/ncnn"))
    if not found or shutil.which("cmake") is None:
        pytest.skip("needs ncnn and cmake: bash scripts/build_bundle.sh BUNDLE")
    build = tmp_path_factory.mktemp("program")
    options = ["-DCMAKE_BUILD_TYPE=Debug", "-DESPALIER_SANITIZE=ON", "-DESPALIER_WERROR=ON"]
    for command in (
        ["cmake", "-S", CPP, "-B", build, f"-Dncnn_DIR={found[-1]}", *options],
        ["cmake", "--build", build, "--parallel", "2"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"

    def call(*words: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run([build / "detect", *map(str, words)], capture_output=True, text=True, check=False)

    return call


@pytest.mark.parametrize("name", ["detector", "two_heads", "end2end"])
def test_the_program_finds_what_python_finds(
    program: Program,
    name: str,
    images: list[Path],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    import cv2

    model = export_ncnn(request.getfixturevalue(name), tmp_path / "a_ncnn_model", imgsz=64)
    written = deploy.write_bundle(model, tmp_path / "bundle")
    done = program("--model", written / "model", "--threads", 1, "--repeat", 3, images[0].parent)
    assert (done.returncode, done.stderr) == (0, "")
    answer = json.loads(done.stdout)
    assert answer["latency_ms"]["samples"] == 9
    assert [image["file"] for image in answer["images"]] == [str(path) for path in images]

    session = ncnn_runner.load(str(model), 1)
    for path, image in zip(images, answer["images"], strict=True):
        shape: Any = cv2.imread(str(path)).shape[:2]  # type: ignore[union-attr]
        assert (image["height"], image["width"]) == shape
        output = ncnn_runner.infer(session, letterbox(path, 64))[0]
        expected = boxes_in_image(output, session.metadata["end2end"], shape)
        found = np.array([[*row["box"], row["score"], row["class"]] for row in image["detections"]])
        assert len(expected) > 0
        pairs, alone = match(expected, found)
        assert (len(pairs), alone) == (len(expected), 0)
        assert min(iou for _, _, iou in pairs) > 0.99
        assert max(abs(expected[i, 4] - found[j, 4]) for i, j, _ in pairs) < 1e-3


def boxes_in_image(output: np.ndarray, end2end: bool, shape: tuple[int, int]) -> np.ndarray:
    from ultralytics.utils.nms import non_max_suppression
    from ultralytics.utils.ops import scale_boxes

    kept: Any = non_max_suppression(torch.from_numpy(output), 0.25, 0.7, end2end=end2end)
    kept[0][:, :4] = scale_boxes((64, 64), kept[0][:, :4], shape)
    return kept[0].numpy()


def test_photos_are_turned_upright(program: Program, bundle: Path, tmp_path: Path) -> None:
    from PIL import Image

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
    exif = Image.Exif()
    for orientation in (1, 6):
        exif[0x0112] = orientation
        image.save(tmp_path / f"{orientation}.jpg", exif=exif)
    answer = json.loads(program("--model", bundle / "model", tmp_path).stdout)
    assert [(found["width"], found["height"]) for found in answer["images"]] == [(60, 40), (40, 60)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "{model}", "missing.jpg"], "missing.jpg does not exist: check the path"),
        (["--model", "{model}", "{tmp}/text.jpg"], "text.jpg cannot be read as an image: remove or replace it"),
        (["--model", "{model}", "{tmp}/short.jpg"], "short.jpg cannot be read as an image: remove or replace it"),
        (["--model", "{model}", "{tmp}/empty"], "empty has no images (.jpg, .jpeg, .png, .bmp)"),
        (["--model", "missing", "{tmp}/text.jpg"], "missing is not a model folder: it has no detector.txt"),
        (["--model", "{model}"], "give an image or a folder of images: see --help"),
        (["--iou", "2", "x.png"], "--iou cannot be 2: see --help"),
        (["--threads", "0.5", "x.png"], "--threads cannot be 0.5: see --help"),
        (["--treads", "1", "x.png"], "there is no option --treads: see --help"),
        (["x.png", "--repeat"], "--repeat needs a value: see --help"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    program: Program,
    words: list[str],
    message: str,
    bundle: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "short.jpg").write_bytes(b"\xff\xd8\xff\xe1\x00")
    (tmp_path / "empty").mkdir()
    done = program(*(word.format(model=bundle / "model", tmp=tmp_path) for word in words))
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


def script(root: Path, *words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", root / "scripts/build_bundle.sh", *map(str, words)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_the_script_says_what_is_missing(root: Path, bundle: Path, tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "uname", "cat"):
        (tools / name).symlink_to(str(shutil.which(name)))
    with_cmake = tmp_path / "with_cmake"
    shutil.copytree(tools, with_cmake, symlinks=True)
    (with_cmake / "cmake").symlink_to("/bin/true")
    cases: list[tuple[list[Any], Path | None, str]] = [
        ([], None, "give the folder of a bundle"),
        ([tmp_path], None, "is not a bundle: write one with python -m export.ncnn --bundle"),
        ([bundle, "mips"], None, "there is no target mips: x86_64 or aarch64"),
        ([bundle], tools, "cmake is missing: sudo apt install cmake"),
        ([bundle], with_cmake, "g++ is missing: sudo apt install g++"),
    ]
    if platform.machine() == "x86_64":
        missing = "aarch64-linux-gnu-g++ is missing: sudo apt install g++-aarch64-linux-gnu"
        cases.append(([bundle, "aarch64"], with_cmake, missing))
    for words, path, message in cases:
        done = script(root, *words, XDG_CACHE_HOME=str(tmp_path), PATH=str(path or os.environ["PATH"]))
        assert done.returncode == 2, message
        assert done.stderr.startswith("error: ")
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1


FAKE_CMAKE = """#!/bin/sh
case "$1" in
-S) for word; do case "$word" in -DCMAKE_INSTALL_PREFIX=*) echo "${word#*=}" >"$4/prefix" ;; esac; done ;;
--build)
    printf '[ 5%%] Building a\\n[ 7%%] Building b\\n[2/4] Building c\\nsome text\\n[100%%] Built\\n'
    [ -z "$BROKEN" ] || { echo "no such header"; exit 1; }
    touch "$2/detect"
    [ ! -f "$2/prefix" ] || mkdir -p "$(cat "$2/prefix")" ;;
esac
"""


def test_the_script_tells_how_far_it_is_and_why_it_stopped(root: Path, bundle: Path, tmp_path: Path) -> None:
    tools, machine = tmp_path / "tools", platform.machine()
    bundle = shutil.copytree(bundle, tmp_path / "bundle")
    tools.mkdir()
    for name, text in {"cmake": FAKE_CMAKE, "g++": "#!/bin/sh\n"}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    archive = tmp_path / "ncnn.tar.gz"
    archive.write_bytes(b"unpacked before")
    version = hashlib.sha256(b"unpacked before").hexdigest()[:16]
    (tmp_path / "espalier" / f"ncnn-{version}" / "source").mkdir(parents=True)
    given = {"XDG_CACHE_HOME": str(tmp_path), "NCNN_SOURCE": str(archive), "PATH": f"{tools}:{os.environ['PATH']}"}
    done = script(root, bundle, machine, BROKEN="yes", **given)
    assert (done.returncode, done.stderr.splitlines()[-2:]) == (
        2,
        ["no such header", "error: the compiler failed: the last lines are above"],
    )
    done = script(root, bundle, machine, **given)
    assert (done.returncode, (bundle / "bin" / machine / "detect").is_file()) == (0, True)
    assert done.stderr.splitlines() == [f"build_bundle: {share} %" for share in (5, 50, 100)] * 2  # ncnn, the program
    assert "Building" not in done.stdout
    # What is built already does not wait for another build, which may take an hour for another target.
    with (tmp_path / "espalier" / f"ncnn-{version}" / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        done = script(root, bundle, machine, **given)
    assert (done.returncode, done.stderr.splitlines()) == (0, [f"build_bundle: {share} %" for share in (5, 50, 100)])


def test_only_the_archive_that_the_index_names_is_unpacked(root: Path, tmp_path: Path) -> None:
    import importlib.util
    import io
    import tarfile

    spec = importlib.util.spec_from_file_location("ncnn_source", root / "scripts/ncnn_source.py")
    assert spec
    assert spec.loader
    source: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(source)

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name in ("ncnn-1.0/CMakeLists.txt", "ncnn-1.0/src/net.h"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    archive = buffer.getvalue()
    digest = hashlib.sha256(archive).hexdigest()
    page = f'<a href="../f/ncnn-1.0.tar.gz#sha256={digest}">1</a><a href="ncnn-1.0-cp311.whl#sha256={digest}">2</a>'
    answers = {"https://i/simple/ncnn/": page.encode(), "https://i/simple/f/ncnn-1.0.tar.gz": archive}
    source._read = answers.__getitem__
    assert source.download("1.0", "https://i/simple/") == archive
    with pytest.raises(LookupError, match=r"no source package ncnn-2\.0\.tar\.gz"):
        source.download("2.0", "https://i/simple")
    answers["https://i/simple/f/ncnn-1.0.tar.gz"] = archive + b"x"
    with pytest.raises(LookupError, match="does not have the sha256"):
        source.download("1.0", "https://i/simple")

    (tmp_path / "source.unpacked" / "left over").mkdir(parents=True)
    source.unpack(archive, tmp_path / "source")
    assert sorted(path.name for path in (tmp_path / "source").iterdir()) == ["CMakeLists.txt", "src"]
    with pytest.raises(LookupError, match=r"no \.tar\.gz archive"):
        source.unpack(b"no archive", tmp_path / "other")
    assert not (tmp_path / "other").exists()
