"""The plan: which channels stay, and why. Model + plan gives the pruned model, always the same."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ValidationError

from compress.channels.slots import FIXED
from compress.errors import PlanError
from compress.manifest import write_bytes_atomic
from compress.settings import Strict

if TYPE_CHECKING:
    from compress.channels.graph import Axis, Graph
    from compress.pruning.budget import Choice

PLAN_SCHEMA = 1
_RUN = re.compile(r"(?:(\d+)@(\d+):(\d+)(?:x(\d+))?|\*(\d+))")


class PlannedGroup(Strict):
    """A group that loses channels.

    Attributes:
        name: as in the channel graph.
        layers: the layers that are cut with it.
        width: number of channels before.
        keep: the channels that stay, as ranges: "0-15,18,20-31".
        why: what decided.
        tied_to: groups that must keep the same share of their channels.
    """

    name: str
    layers: tuple[str, ...]
    width: int
    keep: str
    why: str
    tied_to: tuple[str, ...] = ()


class Plan(Strict):
    """All cuts of one pruning.

    Attributes:
        structure: hash of the names and shapes of the model that is cut.
        target: what was asked for, in words.
        groups: the groups that lose channels.
        axes: how each cut dimension of each weight is made of groups: "0@0:16 *4 1@0:8x49" reads "channels 0 to 15
            of group 0, 4 that stay, then each of the channels 0 to 7 of group 1 forty-nine times".
    """

    schema_version: int = PLAN_SCHEMA
    structure: str
    target: str
    importance: str
    groups: tuple[PlannedGroup, ...]
    axes: dict[str, str]

    def masks(self) -> list[np.ndarray]:
        """Return per planned group which channels stay, boolean arrays of shape (width,).

        Raises:
            PlanError: a group's channels are out of range, repeated, or none, or tied groups keep unlike shares.
        """
        masks = [_parse_keep(group) for group in self.groups]
        kept = {group.name: (int(mask.sum()), group.width) for group, mask in zip(self.groups, masks, strict=True)}
        for group in self.groups:
            count, width = kept[group.name]
            for other in group.tied_to:
                other_count, other_width = kept.get(other, (width, width))  # a group that is not in the plan stays
                if count * other_width != other_count * width:
                    found = f"{other_count} of {other_width}" if other in kept else "all"
                    raise PlanError(
                        f"group {group.name} keeps {count} of {width} channels, {other}, which is tied to it, {found}: "
                        "tied groups must keep the same share"
                    )
        return masks

    def axis_masks(self) -> Iterator[tuple[str, int, np.ndarray]]:
        """Yield (tensor, dimension, which indices stay) for every cut dimension.

        Raises:
            PlanError: an axis that is not of the described form, or that names a group which is not there.
        """
        masks = self.masks()
        for key, text in self.axes.items():
            tensor, _, dim = key.rpartition(":")
            if not tensor or not dim.isdigit():
                raise PlanError(f"the plan's axis '{key}' must have the form tensor:dimension")
            yield tensor, int(dim), _parse_axis(key, text, masks)


def make_plan(graph: Graph, choice: Choice, structure: str, target: str, importance: str) -> Plan:
    """Write down a choice of channels for the model that the graph was made of."""
    cut = [index for index, mask in enumerate(choice.keep) if not mask.all()]
    number = {index: position for position, index in enumerate(cut)}
    tied: dict[int, list[str]] = defaultdict(list)
    for group in graph.groups:
        tied[group.tie].append(group.name)
    groups = tuple(
        PlannedGroup(
            name=graph.groups[i].name,
            layers=graph.groups[i].layers,
            width=graph.groups[i].width,
            keep=_format_keep(choice.keep[i]),
            why=choice.why[i],
            tied_to=tuple(name for name in tied[graph.groups[i].tie] if name != graph.groups[i].name),
        )
        for i in cut
    )
    axes = {
        f"{axis.tensor}:{axis.dim}": _format_axis(axis, number) for axis in graph.axes if np.isin(axis.group, cut).any()
    }
    return Plan(structure=structure, target=target, importance=importance, groups=groups, axes=axes)


def parse_plan(content: Any, source: str) -> Plan:
    """Check a plan that comes from a file or a checkpoint.

    Raises:
        PlanError: it is not a plan of this version.
    """
    found = content.get("schema_version") if isinstance(content, dict) else None
    if found != PLAN_SCHEMA:
        raise PlanError(f"{source} is no plan of schema {PLAN_SCHEMA} (it has {found}): make it anew with this version")
    try:
        return Plan.model_validate_json(json.dumps(content))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise PlanError(f"{source} is not a plan: {where}: {first['msg']}") from None


def load_plan(path: Path) -> Plan:
    """Read plan.json."""
    try:
        return parse_plan(json.loads(path.read_text(encoding="utf-8")), str(path))
    except FileNotFoundError:
        raise PlanError(f"{path} does not exist: check the path") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PlanError(f"{path} is not valid JSON: {error}") from None


def save_plan(plan: Plan, path: Path) -> None:
    """Write plan.json."""
    write_bytes_atomic(path, (plan.model_dump_json(indent=1) + "\n").encode())


def _format_keep(mask: np.ndarray) -> str:
    """Write the true positions as ranges.

    >>> _format_keep(np.array([True, True, False, True]))
    '0-1,3'
    """
    kept = np.flatnonzero(mask)
    runs = np.split(kept, np.flatnonzero(np.diff(kept) > 1) + 1)
    return ",".join(f"{run[0]}-{run[-1]}" if run.size > 1 else f"{run[0]}" for run in runs)


def _parse_keep(group: PlannedGroup) -> np.ndarray:
    mask = np.zeros(group.width, dtype=bool)
    for run in group.keep.split(","):
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", run)
        if not found:
            raise PlanError(f"group {group.name}: '{group.keep}' is not a list of ranges such as 0-15,18")
        first, last = int(found[1]), int(found[2] or found[1])
        if not first <= last < group.width:
            raise PlanError(f"group {group.name}: channels {run} are not within its width {group.width}")
        if mask[first : last + 1].any():
            raise PlanError(f"group {group.name}: channels {run} are named twice")
        mask[first : last + 1] = True
    return mask


def _format_axis(axis: Axis, number: dict[int, int]) -> str:
    """Write an axis as runs of consecutive, equally repeated units."""
    runs: list[list[int]] = []  # [group, start, stop, repeat] or [FIXED, 0, count, 1]
    position = 0
    while position < axis.group.size:
        group, unit = int(axis.group[position]), int(axis.unit[position])
        end = position
        while end < axis.group.size and axis.group[end] == group and (group not in number or axis.unit[end] == unit):
            end += 1
        repeat, position = end - position, end
        last = runs[-1] if runs else None
        if group not in number:
            if last and last[0] == FIXED:
                last[2] += repeat
            else:
                runs.append([FIXED, 0, repeat, 1])
        elif last and last[0] == number[group] and last[2] == unit and last[3] == repeat:
            last[2] += 1
        else:
            runs.append([number[group], unit, unit + 1, repeat])
    return " ".join(
        f"*{stop}" if group == FIXED else f"{group}@{start}:{stop}" + (f"x{repeat}" if repeat > 1 else "")
        for group, start, stop, repeat in runs
    )


def _parse_axis(key: str, text: str, masks: list[np.ndarray]) -> np.ndarray:
    parts = []
    for run in text.split():
        found = _RUN.fullmatch(run)
        if not found:
            raise PlanError(f"the plan's axis {key} has '{run}', which is not of the form 0@0:16, 0@0:16x4 or *16")
        if found[5]:
            parts.append(np.ones(int(found[5]), dtype=bool))
            continue
        group, start, stop = int(found[1]), int(found[2]), int(found[3])
        if group >= len(masks) or not start < stop <= masks[group].size:
            raise PlanError(f"the plan's axis {key} reads channels {run}, which no group has")
        parts.append(np.repeat(masks[group][start:stop], int(found[4] or 1)))
    return np.concatenate(parts) if parts else np.ones(0, dtype=bool)
