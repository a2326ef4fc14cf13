"""Labels read from their text files alone: never from a cache, which is a pickle that came with the data."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ultralytics.data import build
from ultralytics.data.dataset import ClassificationDataset, YOLODataset


class FreshLabels(YOLODataset):
    """Ultralytics' data set, which neither reads a label cache nor writes one into the user's data folder."""

    def _load_or_scan_cache(self, cache_path: Path, cache_hash: str) -> tuple[dict[str, Any], bool]:  # noqa: ARG002
        with tempfile.TemporaryDirectory() as folder:
            return self.cache_labels(Path(folder) / cache_path.name), False


class FreshClasses(ClassificationDataset):
    """Ultralytics' data set of folders, one for each class, without a cache of which images can be read."""

    def verify_images(self) -> list[tuple]:
        """Return the samples whose image can be opened."""
        from ultralytics.data.utils import verify_image

        checked = [verify_image((sample, "")) for sample in self.samples]
        return [sample for sample, found, _, _ in checked if found]


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
