"""What a stage leaves on disk: files, and a manifest that is written last.

No manifest means not finished. A stage is skipped only when its manifest names the same configuration and the same
inputs as now and every file that it lists is still there, byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from compress.errors import RunError

SCHEMA = 1
MANIFEST = "manifest.json"
STARTED = "started.json"
_TEMPORARY = ".tmp"
_SHOWN = 4  # differences that a line names
_FORM = {"stage": str, "config": dict, "parents": dict, "files": dict}
_TOOLS = (
    *("torch", "torchvision", "ultralytics", "onnx", "onnxruntime", "onnxsim", "ncnn", "pnnx", "numpy"),
    *("tensorrt", "tensorrt_rtx"),
)
_OTHER_NAMES = {"onnxruntime": ("onnxruntime-gpu",)}  # of distributions that bring the same package


def sha256_file(path: Path) -> str:
    """Return the sha256 of a file's bytes, as hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """Return the sha256 of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_bytes_atomic(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a kill -9, sees the old content or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}{_TEMPORARY}")
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically, readable by a person."""
    write_bytes_atomic(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        RunError: the file is missing, a folder, or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise RunError(f"{path} is a folder: name a file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RunError(f"{path} is not valid JSON ({error}): delete it and run again") from None


def tool_versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that shape a result."""
    found = {"python": platform.python_version()}
    for name in _TOOLS:
        for distribution in (name, *_OTHER_NAMES.get(name, ())):
            with suppress(PackageNotFoundError):
                found[name] = version(distribution)
    return found


def input_hashes(inputs: Mapping[str, Path], output: Path | None = None) -> dict[str, str]:
    """Return the sha256 of each input file, by its role (model, plan, data …).

    Args:
        output: folder of the stage that reads them.

    Raises:
        RunError: one of them is missing, or lies in the folder of the stage, which moves the work of before aside.
    """
    for path in inputs.values():
        if not path.is_file():
            raise RunError(f"{path} does not exist: check the path")
        if output is not None:
            check_outside(path, output)
    return {role: sha256_file(path) for role, path in inputs.items()}


def check_outside(path: Path, output: Path) -> None:
    """Check that an input does not lie in the folder of a stage, which moves the work of before aside.

    Raises:
        RunError: it does.
    """
    if path.resolve().is_relative_to(output.resolve()):
        raise RunError(f"{path} lies in the folder of its own result, {output}: choose another --output")


def check_schema(content: Any, path: Path) -> None:
    """Check that a file of a run folder was written by this version of Espalier.

    Raises:
        RunError: it was not.
    """
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != SCHEMA:
        raise RunError(
            f"{path} has schema {schema}, this version reads schema {SCHEMA}: choose another folder, or delete this one"
        )


def is_finished(folder: Path, stage: str, config: Mapping[str, Any], parents: Mapping[str, str]) -> bool:
    """Tell whether `folder` holds this very stage, finished, unchanged and undamaged.

    Raises:
        RunError: the folder was written by another version of Espalier, by another stage or by no stage at all, or its
            manifest is damaged.
    """
    path = folder / MANIFEST
    if not _holds_work(folder) or not path.exists():
        return False
    manifest = read_json(path)
    check_schema(manifest, path)
    for key, kind in _FORM.items():
        if not isinstance(manifest.get(key), kind):
            raise RunError(f"{path} is damaged, its '{key}' is missing or wrong: delete the folder and run again")
    if manifest["stage"] != stage:
        raise RunError(f"{folder} holds the stage '{manifest['stage']}', not '{stage}': choose another --output")
    if manifest["config"] != _plain(config) or manifest["parents"] != dict(parents):
        return False
    return all(
        (folder / name).is_file() and sha256_file(folder / name) == digest for name, digest in manifest["files"].items()
    )


def begin(folder: Path, stage: str, config: Mapping[str, Any], parents: Mapping[str, str]) -> bool:
    """Prepare `folder` for a stage that is not finished; tell whether an interrupted start of the same work is there.

    Work of another configuration is moved aside to `NAME.1`, `NAME.2` …, never overwritten, and a line says so.

    Raises:
        RunError: the folder holds files that no stage wrote, or is a file.
    """
    identity = {"schema": SCHEMA, "stage": stage, "config": _plain(config), "parents": dict(parents)}
    started = folder / STARTED
    if started.exists() and not (folder / MANIFEST).exists() and read_json(started) == identity:
        return True
    if _holds_work(folder):
        reason = _difference(started if started.exists() else folder / MANIFEST, identity)
        kept = set_aside(folder)
        print(f"{stage}: {folder} held other work ({reason}), which is now {kept}")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(started, identity)
    return False


def _holds_work(folder: Path) -> bool:
    """Tell whether a stage has left something in a folder.

    Raises:
        RunError: it holds files that no stage wrote, or is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file: choose another --output")
    started = folder / STARTED
    # A kill -9 may leave the temporary file of the very first write, which is nobody's work, and a mistake that is met
    # at once leaves nothing but the record of its start.
    if not folder.exists() or all(path.suffix == _TEMPORARY or path == started for path in folder.iterdir()):
        return False
    if not started.exists() and not (folder / MANIFEST).exists():
        raise RunError(f"{folder} is not empty and holds no stage of Espalier: choose another --output")
    return True


def _difference(record: Path, identity: Mapping[str, Any]) -> str:
    """Say in a few words how the work of a record, `started.json` or a manifest, differs from the one that begins."""
    try:
        known = read_json(record)
        pairs = [(known[part], identity[part]) for part in ("config", "parents")]
        names = [(name, old, new) for old, new in pairs for name in sorted({*old, *new})]
        changed = list(dict.fromkeys(name for name, old, new in names if old.get(name, ...) != new.get(name, ...)))
        stage = known["stage"]
    except (RunError, KeyError, TypeError, AttributeError):
        return "its record is damaged"
    if stage != identity["stage"]:
        return f"stage '{stage}'"
    shown = ", ".join(changed[:_SHOWN]) + (" …" if len(changed) > _SHOWN else "")
    return f"another {shown}" if changed else "its files were changed"


def finish(
    folder: Path,
    stage: str,
    config: Mapping[str, Any],
    parents: Mapping[str, str],
    files: list[str],
    metrics: Mapping[str, Any],
    seed: int | None = None,
) -> dict[str, Any]:
    """Write the manifest of a finished stage, last and atomically, and return it.

    Args:
        files: the stage's results, relative to `folder`; scratch files are not listed and may be deleted.
    """
    manifest = {
        "schema": SCHEMA,
        "stage": stage,
        "config": _plain(config),
        "seed": seed,
        "parents": dict(parents),
        "tools": tool_versions(),
        "metrics": dict(metrics),
        "files": {name: sha256_file(folder / name) for name in sorted(files)},
    }
    write_json(folder / MANIFEST, manifest)
    (folder / STARTED).unlink(missing_ok=True)
    return manifest


def remembered(
    folder: Path,
    stage: str,
    config: Mapping[str, Any],
    parents: Mapping[str, str],
    find: Callable[[], Mapping[str, Any]],
) -> dict[str, Any]:
    """Return the metrics of a stage that leaves nothing else: found once, and read from its manifest afterwards."""
    with lock(folder):
        if not is_finished(folder, stage, config, parents):
            begin(folder, stage, config, parents)
            finish(folder, stage, config, parents, [], find())
        return read_json(folder / MANIFEST)["metrics"]


@contextmanager
def lock(folder: Path, chosen_by: str = "--output") -> Iterator[None]:
    """Hold `folder` for this process alone. The lock ends with the process, also after kill -9.

    The lock file lies beside the folder, because a stage may move the folder itself aside.

    Args:
        chosen_by: the setting that names the folder, for the message.

    Raises:
        RunError: another process holds it.
    """
    from filelock import FileLock, Timeout

    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    place = folder.parent / f".{folder.name}.lock"
    held = FileLock(place)
    try:
        held.acquire(timeout=0)
    except Timeout:
        raise RunError(f"{folder} is in use by another process: wait for it, or choose another {chosen_by}") from None
    try:
        yield
    finally:
        # While it is still held: whoever has opened the file meanwhile sees that its name is gone, and starts anew.
        with suppress(OSError):
            place.unlink()
        held.release()


def _plain(value: Any) -> Any:
    """Return `value` as it reads back from JSON, so that a fresh configuration equals a stored one."""
    return json.loads(json.dumps(value, default=str))


def set_aside(work: Path) -> Path:
    """Move a file or a folder to the first of NAME.1, NAME.2 … that does not exist, and return that."""
    number = 1
    while (other := work.with_name(f"{work.name}.{number}")).exists():
        number += 1
    return work.rename(other)
