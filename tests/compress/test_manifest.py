from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from compress import manifest
from compress.errors import RunError, run_app
from compress.manifest import MANIFEST, STARTED, begin, finish, input_hashes, is_finished, lock, read_json

ROOT = Path(__file__).parents[2]
CONFIG = {"epochs": 3, "budget": ("a", "b")}  # a tuple reads back from JSON as a list
PARENTS = {"model": "abc"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "stage"


def finished(folder: Path, config: dict[str, Any] = CONFIG, parents: dict[str, str] = PARENTS) -> bool:
    return is_finished(folder, "train", config, parents)


def work(folder: Path, config: dict[str, Any] = CONFIG) -> None:
    """Do a whole stage whose results are two files."""
    begin(folder, "train", config, PARENTS)
    (folder / "model.pt").write_bytes(b"weights")
    (folder / "sub").mkdir()
    (folder / "sub" / "log").write_text("loss")
    finish(folder, "train", config, PARENTS, ["sub/log", "model.pt"], {"map": 0.5}, seed=7)


def change(folder: Path, **entries: Any) -> None:
    """Tamper with a manifest; None deletes an entry."""
    content = json.loads((folder / MANIFEST).read_text()) | entries
    (folder / MANIFEST).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def test_a_stage_is_finished_only_with_its_manifest(folder: Path) -> None:
    assert not finished(folder)
    begin(folder, "train", CONFIG, PARENTS)
    (folder / "model.pt").write_bytes(b"weights")
    assert not finished(folder)
    finish(folder, "train", CONFIG, PARENTS, ["model.pt"], {})
    assert finished(folder)
    assert not (folder / STARTED).exists()


def test_what_a_manifest_says(folder: Path) -> None:
    work(folder)
    content = read_json(folder / MANIFEST)
    tools = content.pop("tools")
    assert content == {
        "schema": 1,
        "stage": "train",
        "config": {"epochs": 3, "budget": ["a", "b"]},
        "seed": 7,
        "parents": PARENTS,
        "metrics": {"map": 0.5},
        "files": {  # as sha256sum says
            "model.pt": "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c",
            "sub/log": "2ea71c18131a7f0383294917672136b6d5beae857e6bacca02d99d83e5f7d371",
        },
    }
    assert {"python", "torch", "ultralytics", "numpy"} <= set(tools)


@pytest.mark.parametrize(
    ("config", "parents"),
    [
        ({**CONFIG, "epochs": 4}, PARENTS),
        ({"epochs": 3}, PARENTS),
        (CONFIG, {"model": "abd"}),
        (CONFIG, {**PARENTS, "data": "x"}),
    ],
)
def test_another_configuration_or_parent_is_other_work(folder: Path, config: dict, parents: dict) -> None:
    work(folder)
    assert finished(folder)
    assert not finished(folder, config, parents)


def test_the_order_of_keys_is_no_change(folder: Path) -> None:
    work(folder)
    assert finished(folder, dict(reversed(CONFIG.items())))


def test_other_work_is_moved_aside_and_not_lost(folder: Path) -> None:
    for epochs in (3, 4, 5):
        work(folder, {"epochs": epochs})
    assert sorted(path.name for path in folder.parent.iterdir()) == ["stage", "stage.1", "stage.2"]
    for name, epochs in (("stage.1", 3), ("stage.2", 4), ("stage", 5)):
        assert is_finished(folder.with_name(name), "train", {"epochs": epochs}, PARENTS)


@pytest.mark.parametrize(
    ("stage", "config", "parents", "reason"),
    [
        ("train", {"epochs": 4, "batch": 2}, PARENTS, "another batch, budget, epochs"),
        ("train", {**CONFIG, **dict.fromkeys("abcde", 0)}, PARENTS, "another a, b, c, d …"),
        ("train", {**CONFIG, "table": None}, PARENTS, "another table"),  # a setting that an earlier version had not
        ("train", CONFIG, {**PARENTS, "teacher": "x"}, "another teacher"),
        ("train", {**CONFIG, "data": "b.yaml"}, {**PARENTS, "data": "x"}, "another data"),  # its name and images
        ("prune", CONFIG, PARENTS, "stage 'train'"),
        ("train", CONFIG, PARENTS, "its files were changed"),
    ],
)
def test_where_other_work_went_is_said(folder: Path, capsys, stage: str, config: dict, parents: dict, reason) -> None:
    work(folder)
    assert capsys.readouterr().out == ""
    begin(folder, stage, config, parents)
    moved = folder.with_name("stage.1")
    assert capsys.readouterr().out == f"{stage}: {folder} held other work ({reason}), which is now {moved}\n"


@pytest.mark.parametrize("record", ["{", "[]", '{"stage": "train"}'])
def test_other_work_of_a_damaged_record_is_moved_aside_too(folder: Path, capsys, record: str) -> None:
    work(folder)
    (folder / MANIFEST).write_text(record)
    begin(folder, "train", CONFIG, PARENTS)
    assert "(its record is damaged)" in capsys.readouterr().out
    assert (folder.with_name("stage.1") / MANIFEST).read_text() == record


def test_a_free_name_is_found_beside_other_folders(folder: Path) -> None:
    work(folder)
    folder.with_name("stage.1").mkdir()
    (folder.with_name("stage.1") / "mine").write_text("x")
    assert not begin(folder, "train", {"epochs": 4}, PARENTS)
    assert (folder.with_name("stage.1") / "mine").read_text() == "x"
    assert finished(folder.with_name("stage.2"))


@pytest.mark.parametrize("damage", ["changed", "cut short", "missing", "a folder"])
def test_a_damaged_result_is_not_finished(folder: Path, damage: str) -> None:
    work(folder)
    model = folder / "model.pt"
    if damage == "changed":
        model.write_bytes(b"Weights")
    elif damage == "cut short":
        model.write_bytes(b"weight")
    else:
        model.unlink()
    if damage == "a folder":
        model.mkdir()
    assert not finished(folder)
    assert not begin(folder, "train", CONFIG, PARENTS)  # starts anew …
    assert (folder.with_name("stage.1") / "sub" / "log").read_text() == "loss"  # … and loses nothing


def test_scratch_files_may_go(folder: Path) -> None:
    begin(folder, "train", CONFIG, PARENTS)
    for name in ("model.pt", "scratch"):
        (folder / name).write_text(name)
    finish(folder, "train", CONFIG, PARENTS, ["model.pt"], {})
    (folder / "scratch").unlink()
    assert finished(folder)


def test_an_interrupted_start_is_resumed(folder: Path) -> None:
    assert not begin(folder, "train", CONFIG, PARENTS)
    (folder / "half").write_text("epoch 1")
    assert begin(folder, "train", CONFIG, PARENTS)
    assert (folder / "half").read_text() == "epoch 1"


@pytest.mark.parametrize(
    ("stage", "config", "parents"),
    [("train", {"epochs": 4}, PARENTS), ("train", CONFIG, {"model": "x"}), ("sparsify", CONFIG, PARENTS)],
)
def test_an_interrupted_start_of_other_work_is_moved_aside(folder: Path, stage: str, config: dict, parents) -> None:
    begin(folder, "train", CONFIG, PARENTS)
    (folder / "half").write_text("epoch 1")
    assert not begin(folder, stage, config, parents)
    assert not (folder / "half").exists()
    assert (folder.with_name("stage.1") / "half").read_text() == "epoch 1"


def test_a_start_that_left_nothing_is_not_kept(folder: Path, capsys) -> None:
    begin(folder, "train", CONFIG, PARENTS)
    assert not begin(folder, "train", {"epochs": 4}, PARENTS)
    assert capsys.readouterr().out == ""
    assert not folder.with_name("stage.1").exists()
    assert read_json(folder / STARTED)["config"] == {"epochs": 4}


def test_a_start_killed_at_its_first_write_is_begun_again(folder: Path) -> None:
    folder.mkdir()
    (folder / f".{STARTED}.4711.tmp").write_text('{"sch')
    assert not begin(folder, "train", CONFIG, PARENTS)
    assert begin(folder, "train", CONFIG, PARENTS)


def test_an_empty_folder_may_be_used(folder: Path) -> None:
    folder.mkdir()
    assert not begin(folder, "train", CONFIG, PARENTS)


def test_a_foreign_folder_is_refused(folder: Path) -> None:
    folder.mkdir()
    (folder / "thesis.tex").write_text("mine")
    for use in (finished, lambda folder: begin(folder, "train", CONFIG, PARENTS)):  # before any work, and at its end
        with pytest.raises(RunError, match=r"stage is not empty and holds no stage of Espalier: choose another"):
            use(folder)
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]


def test_a_file_in_place_of_the_folder_is_refused(folder: Path) -> None:
    folder.write_text("mine")
    for use in (finished, lambda folder: begin(folder, "train", CONFIG, PARENTS)):
        with pytest.raises(RunError, match=r"stage is a file: choose another --output"):
            use(folder)
    assert folder.read_text() == "mine"


@pytest.mark.parametrize("schema", [0, 2, "1", None])
def test_another_version_is_refused(folder: Path, schema: object) -> None:
    work(folder)
    change(folder, schema=schema)
    before = (folder / MANIFEST).read_bytes()
    with pytest.raises(RunError) as caught:
        finished(folder)
    assert str(caught.value) == (
        f"{folder}/manifest.json has schema {schema}, this version reads schema 1: "
        "choose another folder, or delete this one"
    )
    assert (folder / MANIFEST).read_bytes() == before


def test_another_stage_is_refused(folder: Path) -> None:
    work(folder)
    with pytest.raises(RunError, match="holds the stage 'train', not 'prune': choose another --output"):
        is_finished(folder, "prune", CONFIG, PARENTS)


@pytest.mark.parametrize("entry", [{"files": None}, {"files": []}, {"config": None}, {"parents": 3}, {"stage": None}])
def test_a_damaged_manifest_is_refused(folder: Path, entry: dict) -> None:
    work(folder)
    change(folder, **entry)
    with pytest.raises(RunError, match=rf"manifest\.json is damaged, its '{next(iter(entry))}' is missing or wrong"):
        finished(folder)


@pytest.mark.parametrize("text", ["", "{", "\xff", '{"schema": 1'])
def test_a_manifest_that_is_no_json_is_refused(folder: Path, text: str) -> None:
    work(folder)
    (folder / MANIFEST).write_text(text, encoding="latin-1")
    with pytest.raises(RunError, match=r"manifest\.json is not valid JSON"):
        finished(folder)


def test_a_manifest_that_is_no_mapping_is_of_no_version(folder: Path) -> None:
    work(folder)
    (folder / MANIFEST).write_text("[]")
    with pytest.raises(RunError, match="has schema None"):
        finished(folder)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"absent\.json does not exist"):
        read_json(tmp_path / "absent.json")
    (tmp_path / "model.pt").write_bytes(b"weights")
    with pytest.raises(RunError, match=r"absent\.pt does not exist: check the path"):
        input_hashes({"model": tmp_path / "model.pt", "teacher": tmp_path / "absent.pt"})


def test_hashes_of_inputs(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # the sha256 of nothing
    assert input_hashes({"data": tmp_path / "empty"}) == {"data": empty}
    assert manifest.sha256_json({"a": 1, "b": [2]}) == manifest.sha256_json({"b": [2], "a": 1})
    assert manifest.sha256_json({"a": 1}) != manifest.sha256_json({"a": 2})


class FullDisk:
    """A file whose disk is full after some bytes."""

    def __init__(self, stream: Any, room: int) -> None:
        self.stream, self.room = stream, room

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, content: bytes) -> None:
        self.stream.write(content[: self.room])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def full_disk(monkeypatch) -> None:
    opened = Path.open

    def open_(path: Path, mode: str = "r", *rest: Any, **more: Any) -> Any:
        stream = opened(path, mode, *rest, **more)
        return FullDisk(stream, 3) if "w" in mode else stream

    monkeypatch.setattr(Path, "open", open_)


def test_a_write_replaces_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    manifest.write_json(path, {"a": "γ"})
    manifest.write_json(path, {"b": 1})
    assert path.read_text() == '{\n  "b": 1\n}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_a_failing_write_leaves_the_old_content(tmp_path: Path, request) -> None:
    path = tmp_path / "plan.json"
    manifest.write_json(path, {"old": 1})
    request.getfixturevalue("full_disk")
    with pytest.raises(OSError, match="No space left"):
        manifest.write_json(path, {"new": 1})
    assert read_json(path) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("moment", [(os, "fsync"), (Path, "replace")], ids=["before it is on disk", "at the very end"])
def test_a_write_that_is_killed_leaves_the_old_content(tmp_path: Path, monkeypatch, moment: tuple[Any, str]) -> None:
    path = tmp_path / "plan.json"
    manifest.write_json(path, {"old": 1})

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(*moment, killed)
    with pytest.raises(KeyboardInterrupt):
        manifest.write_json(path, {"new": 1})
    assert read_json(path) == {"old": 1}


def test_a_full_disk_is_one_line_and_loses_nothing(folder: Path, request, capsys) -> None:
    begin(folder, "train", CONFIG, PARENTS)
    (folder / "model.pt").write_bytes(b"weights")
    request.getfixturevalue("full_disk")
    with pytest.raises(SystemExit) as stop:
        run_app(lambda: finish(folder, "train", CONFIG, PARENTS, ["model.pt"], {}))
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "error: No space left on device: free some space or choose another --output, then run the same command again\n"
    )
    assert sorted(path.name for path in folder.iterdir()) == ["model.pt", STARTED]
    assert not finished(folder)
    assert begin(folder, "train", CONFIG, PARENTS)  # and is resumed


def test_a_full_disk_at_the_start_leaves_an_empty_folder(folder: Path, full_disk) -> None:
    with pytest.raises(OSError, match="No space left"):
        begin(folder, "train", CONFIG, PARENTS)
    assert list(folder.iterdir()) == []


HOLD = "import sys; from pathlib import Path; from compress.manifest import lock\n"
HOLD += "with lock(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"


def test_a_folder_in_use_is_refused_until_its_process_ends(folder: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RunError) as caught, lock(folder):
            pass
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert str(caught.value) == f"{folder} is in use by another process: wait for it, or choose another --output"
    with lock(folder):  # a kill -9 leaves no lock behind
        assert not folder.exists()  # the lock lies beside the folder


def test_a_lock_is_given_back_after_a_mistake(folder: Path) -> None:
    with pytest.raises(RunError, match="mistake"), lock(folder):
        raise RunError("mistake")
    with lock(folder), lock(folder.with_name("other")):
        pass


def test_one_folder_has_one_lock_under_all_its_names(folder: Path, monkeypatch) -> None:
    folder.mkdir()
    monkeypatch.chdir(folder)
    with lock(Path()), pytest.raises(RunError, match="in use"), lock(folder):
        pass
