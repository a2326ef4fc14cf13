"""A latency table: what a model costs on one device at given widths, learnt from measurements of that device.

`benchmark.profile` measures and writes it; here it is read, checked and evaluated. A network is cut into *segments*,
each of which ends with a convolution: what a runtime computes after the convolution before, up to this one. A segment
costs a sum of terms that are never negative: a constant, the channels that its convolution reads and makes, those of
the convolution before, and the product of what it reads and makes, with a surcharge where a width is off the blocks
that runtimes move channels in. So latency is interpolated inside a stair and never across one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from compress import manifest
from compress.channels.slots import FIXED
from compress.errors import BudgetError, SettingsError
from compress.settings import Budget, Strict, parse

if TYPE_CHECKING:
    from compress.channels.graph import Graph

SCHEMA = 1
FOLDER = Path("runs/tables")
BLOCKS = (4, 8, 16)
Unit = Literal["ms", "instructions"]
_REMEDY = "name another file, or delete it and profile the model anew"  # what is there is never overwritten
# Terms of one segment: they multiply (reads, makes, before) as `features` lays them out.
TERMS = (
    "constant",
    "reads",
    "makes",
    "before",
    "product",
    *(f"{side}_off_{b}" for b in BLOCKS for side in ("in", "out")),
)


class Segment(Strict):
    """What is computed after one convolution up to the next one, in the order of the runtime.

    Attributes:
        name: of the convolution in the runtime's file.
        tensor: its weight in the model; null for one whose widths never change, and for what follows the last one.
        before: the weight of the convolution before; null where there is none.
        terms: cost per unit of each of `TERMS`; one that is missing is 0.
    """

    name: str
    tensor: str | None
    before: str | None
    terms: dict[str, float]


class Fit(Strict):
    """How well the table predicts whole networks that it was not fitted on.

    Attributes:
        variants: number of measured networks.
        median_error, p95_error: of |predicted / measured - 1| over all of them, each predicted by a table that was
            fitted without it.
    """

    variants: int
    median_error: float
    p95_error: float


class LatencyTable(Strict):
    """What a device, a runtime and a model cost; see the module.

    Attributes:
        unit: of all costs.
        device: the name of the device, such as cpu.
        machine: what the device says about itself.
        structure: hash of the names and shapes of the dense model.
        budget: the widths that were measured.
        dense: measured cost of the dense model.
        scale, offset: whole network = scale · sum of segments + offset.
    """

    schema_version: int = SCHEMA
    unit: Unit
    device: str
    machine: str | None
    runtime: str
    runtime_version: str
    precision: str
    threads: int = Field(ge=1)
    imgsz: int = Field(ge=1)
    structure: str
    budget: Budget
    dense: float = Field(gt=0.0)
    dense_interval: tuple[float, float]
    scale: float = Field(gt=0.0)
    offset: float
    segments: tuple[Segment, ...]
    fit: Fit

    @property
    def sha256(self) -> str:
        """Hash of the content."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


@dataclass(frozen=True)
class Latency:
    """The cost of a model at any widths of its channel groups.

    Attributes:
        terms: coefficients, shape (segments, len(TERMS)).
        forms: of what a segment reads, makes, and what came before it, shape (3, segments, groups).
        consts: the fixed channels of each, shape (3, segments).
        offset: cost that no width changes.
        names: of the segments.
    """

    unit: str
    terms: np.ndarray
    forms: np.ndarray
    consts: np.ndarray
    offset: float
    names: tuple[str, ...]

    def __call__(self, widths: np.ndarray) -> np.ndarray | float:
        """Return the total at widths of shape (groups,) or (many, groups)."""
        total = self.per_segment(widths).sum(axis=-1) + self.offset
        return float(total) if total.ndim == 0 else total

    def per_segment(self, widths: np.ndarray) -> np.ndarray:
        """Return the cost of each segment, shape (…, segments)."""
        reads, makes, before = (widths @ self.forms[k].T + self.consts[k] for k in range(3))
        return (features(reads, makes, before, self._used) * self.terms[:, self._used]).sum(axis=-1)

    @cached_property
    def _used(self) -> np.ndarray:
        return np.flatnonzero(self.terms.any(axis=0))


def features(reads: np.ndarray, makes: np.ndarray, before: np.ndarray, columns: np.ndarray | None = None) -> np.ndarray:
    """Return what the terms of a segment multiply, shape (…, len(TERMS)) or those of `columns`.

    >>> features(np.array(16.0), np.array(24.0), np.array(8.0)).tolist()
    [1.0, 16.0, 24.0, 8.0, 384.0, 0.0, 0.0, 0.0, 0.0, 0.0, 384.0]
    """
    product = reads * makes
    made = [np.ones_like(product), reads, makes, before, product]
    made += [product * (side % block != 0) for block in BLOCKS for side in (reads, makes)]
    return np.stack([made[i] for i in (range(len(made)) if columns is None else columns)], axis=-1)


def linear_form(graph: Graph, tensor: str | None, reads: bool) -> tuple[np.ndarray, float]:
    """Return how many channels a weight reads or makes, as factors of the groups' widths and a constant."""
    count = len(graph.groups)
    if tensor is None:
        return np.zeros(count), 0.0
    for axis in graph.axes:
        if axis.tensor == tensor and axis.reads == reads:
            used = axis.group[axis.group != FIXED]
            factors = np.bincount(used, minlength=count) / np.maximum(graph.widths, 1)
            return factors, float((axis.group == FIXED).sum())
    return np.zeros(count), float(graph.shapes[tensor][1 if reads else 0])


def evaluate(table: LatencyTable, graph: Graph) -> Latency:
    """Return the cost of a model, in the table's unit, as a function of the widths of its groups.

    Raises:
        BudgetError: the table names a weight that the model does not have.
    """
    for segment in table.segments:
        for tensor in (segment.tensor, segment.before):
            if tensor is not None and tensor not in graph.shapes:
                raise BudgetError(f"the latency table knows {tensor}, which the model does not have: profile it anew")
    terms = np.array([[segment.terms.get(name, 0.0) for name in TERMS] for segment in table.segments])
    places = [(s.tensor, True) for s in table.segments], [(s.tensor, False) for s in table.segments]
    before = [(s.before, False) for s in table.segments]
    made = [[linear_form(graph, *place) for place in kind] for kind in (*places, before)]
    forms = np.array([[form for form, _ in kind] for kind in made])
    consts = np.array([[const for _, const in kind] for kind in made])
    names = tuple(segment.name for segment in table.segments)
    return Latency(table.unit, terms * table.scale, forms, consts, table.offset, names)


def load_table(path: Path) -> LatencyTable:
    """Read a latency table.

    Raises:
        SettingsError: it is missing, damaged, or of another version.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError(
            f"{path} does not exist: make it with python -m benchmark.profile --output {path}"
        ) from None
    except IsADirectoryError:
        raise SettingsError(f"{path} is a folder: name a file") from None
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path} is not a latency table ({error}): {_REMEDY}") from None
    found = content.get("schema_version") if isinstance(content, dict) else None
    if found != SCHEMA:
        raise SettingsError(f"{path} is no latency table of schema {SCHEMA} (it has {found}): {_REMEDY}")
    digest = content.pop("sha256", None)
    table = parse(LatencyTable, content, str(path))
    if any(name not in TERMS or value < 0 for segment in table.segments for name, value in segment.terms.items()):
        raise SettingsError(f"{path} has terms that are unknown or below zero: {_REMEDY}")
    if digest != table.sha256:
        raise SettingsError(f"{path} was changed after it was measured: {_REMEDY}")
    return table


def save_table(table: LatencyTable, path: Path) -> None:
    """Write a latency table with the hash of its content, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_json(path, {**json.loads(table.model_dump_json()), "sha256": table.sha256})


def default_path(device: str, runtime: str, threads: int, imgsz: int, structure: str, budget: Budget) -> Path:
    """Return where the table of a model on a device lies when nothing else is said."""
    rules = manifest.sha256_json(budget.model_dump(mode="json", exclude={"source"}))
    name = f"{device}-{runtime}-{threads}t-{imgsz}px-{structure[:12]}-{rules[:6]}.json"
    return FOLDER / "".join(c if c.isalnum() or c in "-._" else "_" for c in name)


def check_fits(
    table: LatencyTable,
    wanted: Mapping[str, object],
    path: Path,
    remedy: str = "profile this one with python -m benchmark.profile",
) -> None:
    """Check that a table is of the device, runtime, threads, image size and model that are meant.

    Args:
        wanted: values by field name; those that are None are not checked.
        remedy: what to do where it is not.

    Raises:
        SettingsError: it is not; the message names each field with both values.
    """
    wrong = [
        f"{name} {_short(getattr(table, name))}, not {_short(value)}"
        for name, value in wanted.items()
        if value is not None and getattr(table, name) != value
    ]
    if wrong:
        raise SettingsError(f"{path} is of {', of '.join(wrong)}: {remedy}")


def check_widths(graph: Graph, table: LatencyTable, budget: Budget) -> None:
    """Check that every width which a budget allows is one that the table was measured for.

    Raises:
        SettingsError: it is not; the message names the first group and its widths.
    """
    from compress.pruning.budget import ties

    for mine, measured in zip(ties(graph, budget), ties(graph, table.budget), strict=True):
        if missing := sorted(set(mine.parts) - set(measured.parts)):
            index = next(iter(mine.units))
            group = graph.groups[index]
            widths = ", ".join(str(part * mine.units[index] * group.unit) for part in missing[:3])
            raise SettingsError(
                f"the latency table was not measured at {widths} channels of {group.name}, which the budget allows: "
                "profile the model with this budget"
            )


def amount(value: float, unit: str) -> str:
    """Write a cost as a person reads it: as many digits for each, so that a column of them is comparable.

    >>> amount(12.345, "ms"), amount(9.7, "ms"), amount(119_000_000.0, "instructions")
    ('12.35 ms', '9.700 ms', '119.0 M instructions')
    >>> amount(12_345_600_000.0, "instructions")
    '12346 M instructions'
    """
    scaled, name = (value, "ms") if unit == "ms" else (value / 1e6, "M instructions")
    return f"{scaled:#.4g}".rstrip(".") + f" {name}" if scaled < 9999.5 else f"{scaled:.0f} {name}"


def _short(value: object) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text
