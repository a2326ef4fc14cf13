"""Labels read from their text files alone, never from a cache, which is a pickle that came with the data.

The user's images and folders stay as they are.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ultralytics.data import build, utils
from ultralytics.data.dataset import ClassificationDataset, YOLODataset
from ultralytics.utils.patches import imread


class FreshLabels(YOLODataset):
    """Ultralytics' data set, which neither reads a label cache nor writes one into the user's data folder."""

    def _load_or_scan_cache(self, cache_path: Path, cache_hash: str) -> tuple[dict[str, Any], bool]:  # noqa: ARG002
        with tempfile.TemporaryDirectory() as folder, _images_as_they_are():
            return self.cache_labels(Path(folder) / cache_path.name), False


class FreshClasses(ClassificationDataset):
    """Ultralytics' data set of folders, one for each class, without a cache of which images can be read."""

    def verify_images(self) -> list[tuple]:
        """Return the samples whose image can be opened."""
        with _images_as_they_are():
            checked = [utils.verify_image((sample, "")) for sample in self.samples]
        return [sample for sample, found, _, _ in checked if found]


@contextmanager
def _images_as_they_are() -> Iterator[None]:
    """Let Ultralytics check images without writing.

    It encodes a JPEG with bytes behind its end, as many phones write them, once more and puts that in its place: other
    data, of which no stage that read the first was finished any more.
    """
    library: Any = utils
    before = library.check_image, library._replace_image

    def check(file: str) -> tuple[str, tuple[int, int]]:
        return "", before[0](file)[1]  # without its word of a restored file

    def require_readable(file: str | Path, *_: Any) -> None:
        if imread(file) is None:
            raise OSError("cannot be decoded")

    library.check_image, library._replace_image = check, require_readable
    try:
        yield
    finally:
        library.check_image, library._replace_image = before


@contextmanager
def fresh_labels() -> Iterator[None]:
    """Let Ultralytics' own builder make `FreshLabels` data sets."""
    builder: Any = build
    before = builder.YOLODataset
    builder.YOLODataset = FreshLabels
    try:
        yield
    finally:
        builder.YOLODataset = before
