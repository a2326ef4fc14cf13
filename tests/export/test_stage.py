from __future__ import annotations

from pathlib import Path

from export import stage


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".a.onnx.1234" / "inner").mkdir(parents=True)
    (tmp_path / ".a.onnx.1234" / "inner" / "half.onnx").touch()
    (tmp_path / ".a.onnx.search.json").touch()
    (tmp_path / ".b.onnx.1234").mkdir()
    with stage.scratch(tmp_path / "a.onnx") as folder:
        assert folder.is_dir()
        names = {path.name for path in tmp_path.iterdir()}
        assert names == {folder.name, ".a.onnx.search.json", ".b.onnx.1234"}
    assert {path.name for path in tmp_path.iterdir()} == {".a.onnx.search.json", ".b.onnx.1234"}
