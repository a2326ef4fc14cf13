"""Progress of work that takes more than some seconds: a bar in a terminal, a line a minute anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

Item = TypeVar("Item")
EVERY_S = 60.0


def track(items: Iterable[Item], description: str) -> Iterator[Item]:
    """Yield items and say on standard error how far that is.

    In a terminal a bar shows it. In a log, a line each minute says how many are done and how long the rest may take,
    so that work of hours is not silent there.
    """
    from rich.console import Console
    from rich.progress import track as rich_track

    console = Console(stderr=True)
    total = len(items) if isinstance(items, Sized) else None
    if console.is_terminal:
        yield from rich_track(items, description, total=total, console=console)
    else:
        yield from _logged(items, description, total)


def _logged(items: Iterable[Item], description: str, total: int | None) -> Iterator[Item]:
    began = told = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - told >= EVERY_S:
            rest = "" if total is None else f" of {total}, about {_minutes((now - began) / done * (total - done))} left"
            print(f"{description}: {done}{rest}", file=sys.stderr, flush=True)
            told = now
        yield item


def _minutes(seconds: float) -> str:
    """Return a duration as a person says it.

    >>> _minutes(50), _minutes(600), _minutes(9000)
    ('1 min', '10 min', '2.5 h')
    """
    return f"{max(1, round(seconds / 60))} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
