"""Progress bars for work that takes more than some seconds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

Item = TypeVar("Item")


def track(items: Iterable[Item], description: str) -> Iterator[Item]:
    """Yield items and show a bar on standard error while doing so; silent where that is not a terminal."""
    from rich.console import Console
    from rich.progress import track as rich_track

    console = Console(stderr=True)
    total = len(items) if isinstance(items, Sized) else None
    yield from rich_track(items, description, total=total, console=console, disable=not console.is_terminal)
