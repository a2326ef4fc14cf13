"""A picture of a sensitivity measurement: which tie of groups loses how much mAP at which share of its channels."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compress.pruning.sensitivity_file import Sensitivity, Tie

_APART = 0.03  # a share that differs by more from that of its column is written into the cell


def label(tie: Tie) -> str:
    """Return the first group of a tie, and how many others are cut with it."""
    first, *others = tie.groups
    return f"{first} +{len(others)}" if others else first


def places(removed: Sequence[float], columns: Sequence[float]) -> tuple[int, ...]:
    """Return the column of each share that was removed: a tie of few units has fewer, and not those of the columns.

    Both ascend, and so do the places; of all ways the one that is nearest is taken.

    >>> places((0.5,), (0.25, 0.5, 0.75)), places((0.33, 0.67), (0.25, 0.5, 0.75))
    ((1,), (0, 2))
    """

    def distance(chosen: tuple[int, ...]) -> float:
        return sum(abs(share - columns[column]) for share, column in zip(removed, chosen, strict=True))

    return min(itertools.combinations(range(len(columns)), len(removed)), key=distance)


def cells(found: Sensitivity) -> tuple[tuple[float, ...], list[dict[int, tuple[float, float]]]]:
    """Return the shares of the columns, and for each tie, by column, (share that was removed, share of mAP lost)."""
    columns = max(found.ties, key=lambda tie: len(tie.removed)).removed
    return columns, [
        {
            column: (share, 1.0 - left / found.map50_95)
            for column, share, left in zip(places(tie.removed, columns), tie.removed, tie.map50_95, strict=True)
        }
        for tie in found.ties
    ]


def draw(found: Sensitivity, path: Path) -> None:
    """Draw ties × removed shares as a heat map of the share of mAP that is lost, in the order of the forward pass."""
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns, rows = cells(found)
    lost = np.full((len(rows), len(columns)), np.nan)
    height = 1.9 + 0.24 * len(rows)
    figure = Figure(figsize=(4.2 + 0.9 * len(columns), height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colours = colormaps["magma_r"]
    for row, known in enumerate(rows):
        for column, (share, value) in known.items():
            lost[row, column] = 100.0 * min(1.0, max(0.0, value))
            red, green, blue, _ = colours(lost[row, column] / 100.0)
            is_dark = 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.4
            note = "" if abs(share - columns[column]) <= _APART else f" at {share:.0%}"
            text = {"ha": "center", "va": "center", "fontsize": 7, "color": "white" if is_dark else "black"}
            axes.text(column, row, f"{round(100 * value)}{note}", **text)
    axes.set_facecolor("#eceeed")
    image = axes.imshow(lost, cmap=colours, vmin=0.0, vmax=100.0, aspect="auto")
    axes.set_xticks(range(len(columns)), [f"{share:.0%}" for share in columns], fontsize=8)
    axes.set_yticks(range(len(rows)), [label(tie).replace("$", r"\$") for tie in found.ties], fontsize=7)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("channels removed of one tie alone (grey: a tie of too few units)", fontsize=8)
    how = "batch norm mended" if found.repaired else "batch norm left as it was"
    title = f"mAP50-95 lost, % of the {found.map50_95:.3f} uncut\n{found.model}, {found.images} images, {how}"
    axes.set_title(title.replace("$", r"\$"), fontsize=9, loc="left")
    bar = figure.colorbar(image, ax=axes, fraction=0.03, pad=0.02, aspect=30)
    bar.ax.tick_params(labelsize=7)
    bar.set_label("mAP50-95 lost, %", fontsize=8)
    bar.outline.set_visible(False)
    figure.savefig(path, metadata={"Software": None})
