from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import original
from compress.conversion.foreign import StandIn, TensorRef, read_foreign
from compress.errors import CheckpointError


class Call:
    """What pickle turns into a call when it opens the file."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call

    def __call__(self) -> None:
        """Let one call make the function of another."""


class State:
    """Pickled as an object with a state of our choice."""

    def __init__(self, state: object) -> None:
        self.state = state

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, (), self.state


def saved(content: object, path: Path, legacy: bool = False) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_foreign(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def assembled(path: Path, data: bytes, storages: dict[str, bytes] | None = None, **more: Any) -> Path:
    """A zip archive as torch.save's, around a pickle of our own."""
    with zipfile.ZipFile(path, "w", **more) as archive:
        archive.writestr("archive/data.pkl", data)
        for key, content in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", content)
    return path


# What is read.

TENSORS = {
    "float": torch.arange(6.0).reshape(2, 3),
    "half": torch.tensor([0.5, -2.0], dtype=torch.float16),
    "bfloat16": torch.tensor([1.5], dtype=torch.bfloat16),
    "double": torch.tensor([1e-9], dtype=torch.float64),
    "long": torch.tensor(7),
    "bool": torch.tensor([True, False]),
    "transposed": torch.arange(6.0).reshape(2, 3).T,
    "a view": torch.arange(10.0)[3:7:2],
    "empty": torch.zeros(0, 3),
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "old format"])
def test_tensors_are_read_in_both_formats(tmp_path: Path, legacy: bool) -> None:
    foreign = read_foreign(saved(TENSORS, tmp_path / "tensors.pt", legacy))
    for name, expected in TENSORS.items():
        ref = foreign.content[name]
        assert isinstance(ref, TensorRef)
        found = foreign.tensor(ref)
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected), name


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "old format"])
def test_models_become_stand_ins_with_their_state(tmp_path: Path, legacy: bool) -> None:
    model = original.Model([[-1, 1, "Conv", [8, 3, 2]], [[0], 1, "Detect", []]])
    content = read_foreign(original.save(model, tmp_path / "model.pt", legacy, epochs={1, 2})).content
    assert content["epochs"] == {1, 2}
    root = content["model"]
    assert (root.kind, root.state["names"]) == ("models.yolo.Model", ["thing0", "thing1", "thing2"])
    conv = root.state["_modules"]["model"].state["_modules"]["0"]
    assert (conv.kind, conv.state["f"], conv.state["i"]) == ("models.common.Conv", -1, 0)
    assert conv.state["_modules"]["conv"].state["_parameters"]["weight"].size == (8, 3, 3, 3)
    assert not callable(conv)


def test_values_of_no_use_become_empty_stand_ins(tmp_path: Path) -> None:
    content = {
        "a": np.float64(0.5),
        "b": np.zeros(3),
        "c": Path("x"),
        "d": torch.device("cpu"),
        "e": torch.Size([1, 2]),
    }
    found = read_foreign(saved(content, tmp_path / "more.pt")).content
    assert [isinstance(found[key], StandIn) for key in "abcd"] == [True] * 4
    assert found["e"] == (1, 2)


# What would run something.


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "old format"])
def test_a_command_is_refused_and_not_run(tmp_path: Path, legacy: bool) -> None:
    path, ran = tmp_path / "evil.pt", tmp_path / "ran"
    saved({"model": Call(os.system, f"touch {ran}")}, path, legacy)
    assert refusal(path) == f"{path} is not a plain model: opening it would run {os.name}.system; refused"
    assert not ran.exists()
    torch.load(path, weights_only=False)  # it is armed
    assert ran.exists()


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (Call(eval, "open('ran', 'w')"), "builtins.eval"),
        (Call(getattr, nn.Module, "__subclasses__"), "builtins.getattr"),
        (Call(exec, "open('ran', 'w')"), "builtins.exec"),
        (Call(__import__, "antigravity"), "builtins.__import__"),
        (Call(nn.Linear, 3, 3), "torch.nn.modules.linear.Linear"),
        (Call(torch.hub.load_state_dict_from_url, "http://127.0.0.1:9/a.pt"), "torch.hub.load_state_dict_from_url"),
    ],
    ids=["eval", "getattr", "exec", "import", "a class", "torch's own"],
)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "old format"])
def test_no_call_is_made(tmp_path: Path, monkeypatch, call: Call, name: str, legacy: bool) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("webbrowser.open", lambda *_: pytest.fail("imported"))
    path = saved([call], tmp_path / "evil.pt", legacy)
    assert f"would run {name}; refused" in refusal(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "old format"])
def test_a_chain_of_calls_ends_at_its_first(tmp_path: Path, legacy: bool) -> None:
    ran = tmp_path / "ran"
    path = saved(Call(Call(getattr, Path, "touch"), ran), tmp_path / "evil.pt", legacy)
    assert "would run builtins.getattr; refused" in refusal(path)
    assert not ran.exists()
    torch.load(path, weights_only=False)  # it is armed
    assert ran.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"(Vtouch ran\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nVtouch ran\no.",  # OBJ
        b"\x80\x02cos\nsystem\nVtouch ran\n\x85\x81.",  # NEWOBJ
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x09touch ran\x85R.",  # STACK_GLOBAL and REDUCE
        b"\x80\x02cos\nsystem\n}V__call__\nNsb.",  # BUILD on what stands for the function
        b"\x80\x02ccollections\nOrderedDict\nN}V__new__\nNs\x86b.",  # attributes of a class
    ],
    ids=["inst", "obj", "newobj", "stack global", "build", "attributes"],
)
def test_no_opcode_helps(tmp_path: Path, monkeypatch, data: bytes) -> None:
    monkeypatch.chdir(tmp_path)
    path = assembled(tmp_path / "evil.pt", data)
    try:
        content = read_foreign(path).content
    except CheckpointError:
        content = None
    assert content is None or isinstance(content, StandIn)
    assert not (tmp_path / "ran").exists()


def test_attributes_of_a_dictionary_are_ignored(tmp_path: Path) -> None:
    found = read_foreign(saved(State({"items": 3}), tmp_path / "a.pt")).content
    assert list(found.items()) == []


# Files that are damaged, or lie.


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: b"",
        lambda whole: whole[: len(whole) // 2],
        lambda whole: whole[:-30],
        lambda whole: bytes(range(256)) * 8,
        lambda whole: b"hello",
        lambda whole: b"PK\x03\x04" + bytes(60),
        lambda whole: pickle.dumps({"model": 1}),
    ],
    ids=["empty", "half", "end missing", "garbage", "text", "a broken zip", "a plain pickle"],
)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "old format"])
def test_a_damaged_file_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes], legacy: bool) -> None:
    path = saved(TENSORS, tmp_path / "damaged.pt", legacy)
    path.write_bytes(damage(path.read_bytes()))
    assert "is damaged, or no checkpoint of PyTorch" in refusal(path)


def tensor_pickle(kind: str, numel: int, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    """The pickle of one tensor, as torch writes it."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return obj.pid if isinstance(obj, Place) else None

    class Place:
        pid = ("storage", getattr(torch, kind), "0", "cpu", numel)

    stream = io.BytesIO()
    rebuild = torch._utils._rebuild_tensor_v2  # type: ignore[attr-defined]
    Pickler(stream, 2).dump(Call(rebuild, Place(), offset, size, stride, False, OrderedDict()))
    return stream.getvalue()


@pytest.mark.parametrize(
    ("numel", "offset", "size", "stride", "text"),
    [
        (4, 2, (3,), (1,), "reaches beyond its data"),
        (4, 0, (2, 2), (4, 1), "reaches beyond its data"),
        (4, 0, (1000, 1000, 1000), (0, 0, 0), "reaches beyond its data"),
        (4, -1, (2,), (1,), "sizes and strides do not fit"),
        (4, 0, (2,), (-1,), "sizes and strides do not fit"),
        (4, 0, (2, 2), (1,), "sizes and strides do not fit"),
        (5, 0, (5,), (1,), "16 bytes for 5 elements"),
    ],
)
def test_a_tensor_cannot_reach_beyond_its_data(
    tmp_path: Path, numel: int, offset: int, size: tuple, stride: tuple, text: str
) -> None:
    data = tensor_pickle("FloatStorage", numel, offset, size, stride)
    foreign = read_foreign(assembled(tmp_path / "a.pt", data, {"0": struct.pack("<4f", 1, 2, 3, 4)}))
    with pytest.raises(CheckpointError, match=text):
        foreign.tensor(foreign.content)


def test_a_tensor_of_our_own_making_is_read(tmp_path: Path) -> None:
    """So that the refusals above are not those of a wrong pickle."""
    data = tensor_pickle("FloatStorage", 4, 1, (3,), (1,))
    foreign = read_foreign(assembled(tmp_path / "a.pt", data, {"0": struct.pack("<4f", 1, 2, 3, 4)}))
    assert foreign.tensor(foreign.content).tolist() == [2.0, 3.0, 4.0]
    missing = read_foreign(assembled(tmp_path / "b.pt", data))
    with pytest.raises(CheckpointError, match="a tensor of it cannot be read"):
        missing.tensor(missing.content)


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    path = assembled(tmp_path / "bomb.pt", pickle.dumps("0" * 10_000, 2), compression=zipfile.ZIP_DEFLATED)
    assert "compressed, which torch.save never does" in refusal(path)


def test_a_memo_without_bounds_is_refused(tmp_path: Path) -> None:
    path = assembled(tmp_path / "bomb.pt", b"\x80\x02}r\xff\xff\xff\x7f.")
    assert "its memo is larger than the file" in refusal(path)


def test_data_of_an_unknown_kind_are_named(tmp_path: Path) -> None:
    data = tensor_pickle("ComplexFloatStorage", 2, 0, (2,), (1,))
    assert "unknown form (torch.ComplexFloatStorage)" in refusal(assembled(tmp_path / "a.pt", data, {"0": bytes(16)}))
