"""Unpack ncnn's source package, from a file or from a package index: usage: ncnn_source.py VERSION|FILE INDEX FOLDER.

Standard library only; `scripts/build_bundle.sh` runs it with whatever Python there is.
"""

from __future__ import annotations

import hashlib
import html
import io
import re
import shutil
import sys
import tarfile
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path


def find(page: str, version: str) -> tuple[str, str]:
    """Return the link and the sha256 of a version's source package on a project page (PEP 503).

    Raises:
        LookupError: it has none.
    """
    for link in re.findall(r'href\s*=\s*"([^"]+)"', page):
        url, _, digest = html.unescape(link).partition("#sha256=")
        if url.rsplit("/", 1)[-1] == f"ncnn-{version}.tar.gz" and re.fullmatch(r"[0-9a-f]{64}", digest):
            return url, digest
    raise LookupError(f"no source package ncnn-{version}.tar.gz with a sha256")


def download(version: str, index: str) -> bytes:
    """Return the source package of a version, whose sha256 is the index's.

    Raises:
        LookupError: the index has no such package, or its bytes are others.
        OSError: the index cannot be reached.
    """
    project = f"{index.rstrip('/')}/ncnn/"
    url, digest = find(_read(project).decode(), version)
    content = _read(urllib.parse.urljoin(project, url))
    if hashlib.sha256(content).hexdigest() != digest:
        raise LookupError(f"ncnn-{version}.tar.gz does not have the sha256 that the index names")
    return content


def unpack(archive: bytes, folder: Path) -> None:
    """Unpack the single folder of a .tar.gz as `folder`; nothing gets out of it.

    Raises:
        LookupError: it is no such archive.
    """
    if not hasattr(tarfile, "data_filter"):
        raise LookupError("this Python cannot unpack safely: it takes 3.10.12, 3.11.4 or 3.12, or a later one")
    scratch = folder.with_name(f"{folder.name}.unpacked")
    shutil.rmtree(scratch, ignore_errors=True)  # of an earlier attempt
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
            tar.extractall(scratch, filter="data")
    except tarfile.TarError as error:
        raise LookupError(f"no .tar.gz archive ({error})") from None
    roots = list(scratch.iterdir())
    if len(roots) != 1 or not (roots[0] / "CMakeLists.txt").is_file():
        raise LookupError("no CMakeLists.txt in the single folder of the archive")
    roots[0].rename(folder)
    scratch.rmdir()


def main() -> None:
    """Unpack what the arguments name, or say in one line why not."""
    source, index, folder = sys.argv[1:]
    try:
        unpack(Path(source).read_bytes() if Path(source).is_file() else download(source, index), Path(folder))
    except (LookupError, OSError) as error:
        host = urllib.parse.urlsplit(index).hostname or index
        remedy = "download it and name it: NCNN_SOURCE=FILE"
        print(f"error: ncnn's source {source} ({host}): {error}; {remedy}", file=sys.stderr)
        raise SystemExit(2) from None


def _read(url: str) -> bytes:
    if not url.startswith("https://") and not url.startswith("http://localhost"):
        raise LookupError(f"{url} is no https address")
    with urllib.request.urlopen(url, timeout=60) as answer:  # noqa: S310  (its scheme was checked)
        return answer.read()


if __name__ == "__main__":
    main()
