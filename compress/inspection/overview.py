"""What the channel graph of a model holds, as plain rows: groups, totals, and what is frozen by what."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from compress.channels.coverage import group_shares, prunable_share
from compress.pruning.budget import rule_for, ties
from compress.settings import Budget

if TYPE_CHECKING:
    from compress.channels.graph import Graph

BY_RULE = "a rule of the budget"


@dataclass(frozen=True)
class GroupRow:
    """One channel group.

    Attributes:
        number: its place in the forward pass, from 1.
        name, width, layers, consumers: as in `graph.Group`.
        also_in: the layers that carry it beside the one that names it, shortened.
        read_by: the consumers, shortened.
        tie: groups with the same number keep the same width; None if it is free.
        macs, params: share of the model's that would be gone if the whole group were.
        allowed: widths under the budget, descending; the dense one alone if it is frozen.
        frozen: why no channel may be removed, or None.
    """

    number: int
    name: str
    width: int
    layers: tuple[str, ...]
    consumers: tuple[str, ...]
    also_in: tuple[str, ...]
    read_by: tuple[str, ...]
    tie: int | None
    macs: float
    params: float
    allowed: tuple[int, ...]
    frozen: str | None


@dataclass(frozen=True)
class FrozenRow:
    """Channels that stay for one reason."""

    reason: str
    channels: int
    groups: tuple[int, ...]
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Overview:
    """A model's groups and their sums.

    Attributes:
        macs, params: of the whole model, for one image.
        prunable_macs, prunable_params: share that lies in groups that model and budget allow to prune.
        least_macs, least_params: share that is left when every group has its least allowed width.
    """

    groups: list[GroupRow]
    frozen: list[FrozenRow]
    macs: int
    params: int
    prunable_macs: float
    prunable_params: float
    least_macs: float
    least_params: float

    @property
    def prunable(self) -> list[GroupRow]:
        """The groups that may lose channels."""
        return [row for row in self.groups if row.frozen is None]

    @property
    def prunable_channels(self) -> int:
        """How many channels those groups have."""
        return sum(row.width for row in self.prunable)


def overview(graph: Graph, budget: Budget) -> Overview:
    """Describe a channel graph under a budget."""
    groups = graph.groups
    frozen = _frozen(graph, budget)
    allowed = _allowed(graph, budget)
    members = Counter(group.tie for group in groups)
    numbers = {tie: number for number, tie in enumerate((tie for tie in members if members[tie] > 1), start=1)}
    shorten = Shortener([group.layers for group in groups])
    shorten_consumers = Shortener([group.consumers for group in groups])
    computing = {tensor.rpartition(".")[0] for tensor in graph.positions}
    rows = []
    for index, (group, macs, params) in enumerate(
        zip(groups, group_shares(graph, graph.macs), group_shares(graph, graph.params), strict=True)
    ):
        maker = {group.name.partition("[")[0]}
        rows.append(
            GroupRow(
                number=index + 1,
                name=group.name,
                width=group.width,
                layers=group.layers,
                consumers=group.consumers,
                also_in=tuple(name for name in shorten(group.layers) if shorten.layers(name) & computing != maker),
                read_by=shorten_consumers(group.consumers),
                tie=numbers.get(group.tie),
                macs=macs,
                params=params,
                allowed=allowed[index],
                frozen=frozen[index],
            )
        )
    least = np.array([widths[-1] for widths in allowed], dtype=np.int64)
    macs, params = graph.macs(graph.widths), graph.params(graph.widths)
    return Overview(
        groups=rows,
        frozen=_by_reason(rows, shorten),
        macs=round(macs),
        params=round(params),
        prunable_macs=prunable_share(graph, graph.macs, frozen),
        prunable_params=prunable_share(graph, graph.params, frozen),
        least_macs=graph.macs(least) / macs if macs else 1.0,
        least_params=graph.params(least) / params if params else 1.0,
    )


class Shortener:
    """Names a module instead of its layers, where all of its layers are meant.

    >>> shorten = Shortener([("a.conv", "a.bn"), ("b.m.conv", "b.m.bn", "b.n")])
    >>> shorten(("a.conv", "a.bn", "b.m.conv", "b.m.bn"))
    ('a', 'b.m')
    """

    def __init__(self, layers: Iterable[Sequence[str]]) -> None:
        self._below: dict[str, set[str]] = defaultdict(set)  # a module's name → the layers in it
        for layer in {layer for several in layers for layer in several}:
            for parent in _parents(layer):
                self._below[parent].add(layer)

    def layers(self, name: str) -> set[str]:
        """Return the layers that a name of the result means."""
        return self._below.get(name, {name})

    def __call__(self, layers: Sequence[str]) -> tuple[str, ...]:
        """Return the shortest list of modules and layers that means `layers`, in their order."""
        mine = set(layers)
        return tuple(
            dict.fromkeys(
                next((parent for parent in _parents(layer) if self._below[parent] <= mine), layer) for layer in layers
            )
        )


def short_widths(widths: Sequence[int]) -> str:
    """Return ascending widths in a few signs.

    >>> short_widths([64, 48, 32, 16]), short_widths([50, 48, 40, 32, 24]), short_widths([64, 32, 16])
    ('16…64 step 16', '24…48 step 8, 50', '16, 32, 64')
    """
    ascending = sorted(widths)
    for count in (len(ascending), len(ascending) - 1):  # the dense width need not be a multiple of the others
        steps = set(np.diff(ascending[:count]).tolist())
        if count > 3 and len(steps) == 1:
            step = steps.pop()
            run = f"{ascending[0]}…{ascending[count - 1]}" + (f" step {step}" if step > 1 else "")
            return ", ".join([run, *map(str, ascending[count:])])
    return ", ".join(map(str, ascending))


def _parents(layer: str) -> list[str]:
    """Return the modules that a layer lies in, outermost first, without the model itself."""
    parts = layer.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


def _frozen(graph: Graph, budget: Budget) -> list[str | None]:
    """Return why each group stays whole: by the model, or by a rule of the budget for it or for one tied to it."""
    by_rule = {group.tie for group in graph.groups if not group.frozen and rule_for(group.layers, budget)[1]}
    return [group.frozen or (BY_RULE if group.tie in by_rule else None) for group in graph.groups]


def _allowed(graph: Graph, budget: Budget) -> list[tuple[int, ...]]:
    """Return the widths that each group may have, descending; tied groups keep the same share of theirs."""
    found = ties(graph, budget)
    widths = {index: tuple(part * units for part in tie.parts) for tie in found for index, units in tie.units.items()}
    return [widths[index] for index in range(len(graph.groups))]


def _by_reason(rows: list[GroupRow], shorten: Shortener) -> list[FrozenRow]:
    """Return what is frozen, the reason of most channels first."""
    reasons: dict[str, list[GroupRow]] = defaultdict(list)
    for row in rows:
        if row.frozen:
            reasons[row.frozen].append(row)
    found = [
        FrozenRow(
            reason,
            sum(row.width for row in mine),
            tuple(row.number for row in mine),
            shorten(list(dict.fromkeys(layer for row in mine for layer in row.layers))),
        )
        for reason, mine in reasons.items()
    ]
    return sorted(found, key=lambda row: (-row.channels, row.reason))
