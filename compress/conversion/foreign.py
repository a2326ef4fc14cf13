"""Checkpoints of other repositories, read without their code and without running anything that they hold.

A pickle names classes and functions and says what to call. Here no name is ever imported: each becomes a stand-in
class, whose instances keep the state that was stored and can do nothing. The few calls that rebuild plain data
(tensors, ordered dictionaries, sets, sizes) have replacements of our own; a pickle that asks for any other is refused.

Formats: `torch.save`'s zip archive and the stream of pickles that PyTorch wrote before version 1.6.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from compress.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

_DTYPES = {
    "torch.DoubleStorage": ("float64", 8),
    "torch.FloatStorage": ("float32", 4),
    "torch.HalfStorage": ("float16", 2),
    "torch.BFloat16Storage": ("bfloat16", 2),
    "torch.LongStorage": ("int64", 8),
    "torch.IntStorage": ("int32", 4),
    "torch.ShortStorage": ("int16", 2),
    "torch.CharStorage": ("int8", 1),
    "torch.ByteStorage": ("uint8", 1),
    "torch.BoolStorage": ("bool", 1),
}
# The head of PyTorch's old format: this number, the protocol, facts about the machine; each a pickle of its own.
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001


class _RefusedError(Exception):
    """A pickle that wants something to be run."""


class _Kind(type):
    """Stand-in classes: calling one looks up our own replacement, and never the thing that it is named after."""

    kind: str

    def __call__(cls, *args: Any) -> Any:
        if cls.kind not in _CALLS:
            raise _RefusedError(cls.kind)
        replacement = _CALLS[cls.kind]
        return StandIn.__new__(cls) if replacement is None else replacement(*args)  # type: ignore[arg-type]

    def __setattr__(cls, name: str, value: object) -> None:
        raise _RefusedError(f"{cls.kind}.{name} = …")


class StandIn(metaclass=_Kind):
    """An instance of a class that was never imported: the class's full name, and the state that was pickled."""

    kind: ClassVar[str] = ""
    __slots__ = ("state",)
    state: dict[str, Any]

    def __new__(cls, *_: Any, **__: Any) -> StandIn:
        """Return an instance without state, whatever the arguments."""
        self = object.__new__(cls)
        self.state = {}
        return self

    def __setstate__(self, state: object) -> None:
        self.state = dict(state) if isinstance(state, dict) else {}

    # Instances of subclasses of dict, list and set are filled like these; what they held is of no use here.
    def __setitem__(self, key: object, value: object) -> None:
        pass

    def append(self, item: object) -> None:
        """Ignore an item."""

    extend = add = append


class _Mapping(dict):
    """What an OrderedDict becomes: its items, without attributes."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        pass


@dataclass(frozen=True)
class Storage:
    """Elements in the file: where, of which type, how many."""

    key: str
    dtype: str
    itemsize: int
    numel: int


@dataclass(frozen=True)
class TensorRef:
    """A tensor in the file, not read yet."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class Foreign:
    """What a checkpoint holds: dictionaries, lists, numbers, words, stand-ins, and tensors that are read on demand."""

    path: Path
    content: Any
    read: Callable[[Storage], bytes]

    def tensor(self, ref: TensorRef) -> Tensor:
        """Read a tensor.

        Raises:
            CheckpointError: its data are missing, or it reaches beyond them.
        """
        import torch

        storage = ref.storage
        try:
            data = self.read(storage)
            if len(data) != storage.numel * storage.itemsize:
                raise ValueError(f"{len(data)} bytes for {storage.numel} elements")
            size, stride = _integers(ref.size), _integers(ref.stride)
            if len(size) != len(stride) or min((ref.offset, *size, *stride)) < 0:
                raise ValueError("its sizes and strides do not fit")
            last = ref.offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
            if 0 in size:
                return torch.empty(size, dtype=getattr(torch, storage.dtype))
            if last >= storage.numel or torch.Size(size).numel() > storage.numel:
                raise ValueError("it reaches beyond its data")
            flat = torch.frombuffer(bytearray(data), dtype=getattr(torch, storage.dtype))
            return flat.as_strided(size, stride, ref.offset).clone()
        except (KeyError, TypeError, ValueError, RuntimeError, zipfile.BadZipFile, EOFError) as error:
            raise CheckpointError(f"{self.path} is damaged, a tensor of it cannot be read ({error})") from None


def read_foreign(path: Path) -> Foreign:
    """Read a checkpoint without importing or running anything that it names.

    Raises:
        CheckpointError: the file is missing or damaged, is no checkpoint, or wants something to be run.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist: check the path")
    try:
        return _read_zip(path) if zipfile.is_zipfile(path) else _read_legacy(path)
    except _RefusedError as error:
        raise CheckpointError(f"{path} is not a plain model: opening it would run {error}; refused") from None
    except CheckpointError:
        raise
    except Exception as error:  # what a damaged pickle or archive raises has no common base
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{path} is damaged, or no checkpoint of PyTorch ({reason}): download it again") from None


def _read_zip(path: Path) -> Foreign:
    archive = zipfile.ZipFile(io.BytesIO(path.read_bytes()))
    pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError("the archive holds no data.pkl")
    root = pickles[0].removesuffix("data.pkl")
    # torch never compresses; so no archive grows beyond its own size in memory.
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
        raise ValueError("its archive is compressed, which torch.save never does")
    if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
        raise ValueError("it was written on a big-endian machine")
    content = _load(io.BytesIO(archive.read(pickles[0])), {})
    return Foreign(path, content, lambda storage: archive.read(f"{root}data/{storage.key}"))


def _read_legacy(path: Path) -> Foreign:
    data = path.read_bytes()
    stream = io.BytesIO(data)
    storages: dict[str, Storage] = {}
    if _load(stream, storages) != _LEGACY_MAGIC or _load(stream, storages) != _LEGACY_PROTOCOL:
        raise ValueError("it has no head of a known format")
    _load(stream, storages)  # facts about the machine that wrote it
    content = _load(stream, storages)
    places: dict[str, tuple[int, int]] = {}
    for key in _load(stream, storages):
        (numel,) = struct.unpack("<q", stream.read(8))
        start, size = stream.tell(), numel * storages[key].itemsize
        if numel != storages[key].numel or start + size > len(data):
            raise ValueError(f"the data of storage {key} are cut off")
        places[key] = (start, start + size)
        stream.seek(start + size)
    return Foreign(path, content, lambda storage: data[slice(*places[storage.key])])


def _load(stream: io.BytesIO, storages: dict[str, Storage]) -> Any:
    """Read the pickle that starts where the stream is, and stop behind it."""
    start, size = stream.tell(), stream.getbuffer().nbytes
    for operation, argument, _ in pickletools.genops(stream):
        # Python's unpickler makes a table of that many places at once: no honest pickle has more of them than bytes.
        if operation.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > size:
            raise ValueError("its memo is larger than the file")
    stream.seek(start)
    return _Unpickler(stream, storages).load()


class _Unpickler(pickle.Unpickler):
    """Knows no class and no function but our own."""

    def __init__(self, stream: io.BytesIO, storages: dict[str, Storage]) -> None:
        super().__init__(stream, encoding="utf-8", errors="replace")
        self._storages = storages
        self._kinds: dict[str, type] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for a class or function."""
        kind = f"{module}.{name}".replace("__builtin__.", "builtins.", 1)
        if kind not in self._kinds:
            self._kinds[kind] = _Kind(name, (StandIn,), {"kind": kind, "__slots__": ()})
        return self._kinds[kind]

    def persistent_load(self, pid: Any) -> Any:
        """Return what is stored outside of the pickle: data of tensors, and in the old format the source of classes."""
        if pid[0] == "module":
            return pid[1]
        _, kind, key, _, numel, *view = pid
        if pid[0] != "storage" or kind.kind not in _DTYPES or any(part is not None for part in view):
            raise ValueError(f"it stores data in an unknown form ({getattr(kind, 'kind', kind)})")
        dtype, itemsize = _DTYPES[kind.kind]
        (numel,) = _integers((numel,))
        return self._storages.setdefault(str(key), Storage(str(key), dtype, itemsize, numel))


def _integers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, (tuple, list)) or any(type(value) is not int for value in values):
        raise ValueError(f"{values!r} are no sizes")
    return tuple(values)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> TensorRef:
    if not isinstance(storage, Storage):
        raise ValueError("a tensor without data")
    return TensorRef(storage, _integers((offset,))[0], _integers(size), _integers(stride))


# What may be called while a checkpoint is read, and what is done instead. None: an empty stand-in is made, because the
# value is of no use here (numbers of numpy, dates, paths and arguments of the training that wrote the file).
_CALLS: Mapping[str, Callable[..., Any] | None] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "torch.Size": lambda sizes=(): _integers(sizes),
    "collections.OrderedDict": lambda items=(): _Mapping(items),
    "builtins.set": lambda items=(): set(items),
    **dict.fromkeys(
        (
            *("torch.device", "numpy.dtype", "numpy.core.multiarray.scalar", "numpy.core.multiarray._reconstruct"),
            *("numpy._core.multiarray.scalar", "numpy._core.multiarray._reconstruct", "_codecs.encode"),
            *("datetime.datetime", "datetime.timedelta", "pathlib.Path", "pathlib.PosixPath", "pathlib.WindowsPath"),
            *("pathlib._local.PosixPath", "pathlib._local.WindowsPath", "collections.defaultdict"),
            "copyreg._reconstructor",
        )
    ),
}
