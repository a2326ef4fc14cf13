"""A picture of the batch-norm scales γ, by which one judges whether the λ of a sparsity training was right."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.errors import GraphError, printable
from compress.pruning.importance import prunable_scales

if TYPE_CHECKING:
    from torch import nn

    from compress.channels.graph import Graph

_BINS = 80
_INK, _SOFT, _BULK, _NEAR = "#1b2420", "#5a6660", "#2a7fd4", "#c8501e"
_ROWS = 34  # layers in a column of ridges, before another column is begun
_ROW_INCH = 0.27
_MOST_COLUMNS = 4
_CELL_INCH, _LEAST_INCH, _TOP_INCH = 4.4, 8.8, 3.3


@dataclass(frozen=True)
class Gammas:
    """|γ| of the channels that may be pruned; a channel has one in each batch norm that scales it, or none.

    Attributes:
        layers: by the name of the batch norm, in the order of the forward pass, shape (prunable channels,).
        threshold: |γ| below this is near zero.
        measure: what the threshold is, in words.
    """

    layers: dict[str, np.ndarray]
    threshold: float
    measure: str

    @property
    def all(self) -> np.ndarray:
        """Those of all layers."""
        return np.concatenate(list(self.layers.values()))

    def near_zero(self, values: np.ndarray) -> float:
        """Return the share of values that are near zero."""
        return float((values < self.threshold).mean())


def prunable_gammas(
    graph: Graph, model: nn.Module, frozen: Sequence[str | None], share: float, start_mean: float | None
) -> Gammas:
    """Collect |γ| of prunable channels; near zero is less than a share of the mean before sparsity training.

    Args:
        frozen: why each group of the graph stays whole, or None, as `overview` tells.
        start_mean: the mean |γ| before the sparsity training; None if it is not known: the mean of now stands for it.

    Raises:
        GraphError: no batch norm has a channel that may be pruned.
    """
    scales = prunable_scales(graph, model, frozen)
    layers = {name.removesuffix(".weight"): values for name, values in scales.items()}
    if not layers:
        raise GraphError("the model has no batch norm whose channels can be pruned: there are no γ to draw")
    mean = float(np.concatenate(list(layers.values())).mean()) if start_mean is None else start_mean
    when = "of this model" if start_mean is None else "before sparsity training"
    return Gammas(layers, share * mean, f"{share:.0%} of the mean |γ| {when}, {mean:.3g}")


def gamma_png(gammas: Gammas, title: str) -> bytes:
    """Return a PNG: the histogram of all γ, with linear and with logarithmic counts, and one ridge for each layer."""
    import warnings

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(gammas.layers)
    columns = min(_MOST_COLUMNS, math.ceil(len(names) / _ROWS))
    rows = math.ceil(len(names) / columns)
    cell = max(_CELL_INCH, _LEAST_INCH / columns)
    width, height = cell * columns, _TOP_INCH + _ROW_INCH * (rows + 1) + 0.5
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    every = gammas.all
    upper = _upper(every)
    near = f"near zero: {gammas.near_zero(every):.1%} of {every.size:,} γ"
    note = f"{near} (|γ| < {gammas.threshold:.3g}, {gammas.measure}); the last bin holds all that is larger"
    figure.text(0.15 / width, 1 - 0.32 / height, _plain(title), fontsize=12, color=_INK)
    figure.text(0.15 / width, 1 - 0.58 / height, note, fontsize=9, color=_SOFT)

    def place(left: float, bottom: float, right: float, top: float) -> Any:
        """Add axes between distances in inches from the left and the upper edge."""
        box = (left / width, 1 - bottom / height, (right - left) / width, (bottom - top) / height)
        return figure.add_axes(box)

    for half, scale in enumerate(("linear", "log")):
        left = half * width / 2
        axes = place(left + 0.85, _TOP_INCH - 0.55, left + width / 2 - 0.2, 0.8)
        _histogram(axes, every, bin_edges(gammas.threshold, upper, _BINS), gammas.threshold)
        count = "number of γ" if scale == "linear" else "number of γ, logarithmic"
        axes.set(yscale=scale, xlabel="|γ|", ylabel=count, xlim=(0.0, upper))
        axes.grid(color="#dde3df", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    for column in range(columns):
        left = column * cell
        axes = place(left + 1.3, height - 0.5, left + cell - 0.85, _TOP_INCH)
        _ridges(axes, gammas, names[column * rows : (column + 1) * rows], rows, upper)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a name may hold signs that the font lacks
        figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def title_of(gammas: Gammas, channels: int, name: str) -> str:
    """Return what the picture counts: γ, which are not as many as prunable channels, see `Gammas`."""
    return f"{gammas.all.size:,} γ of {channels:,} prunable channels, {name}"


def start_mean(folder: Path) -> float | None:
    """Return the mean |γ| that a sparsity training in `folder` began with, or None if none left a note there."""
    from compress.manifest import read_json
    from compress.training.penalty import SPARSITY

    path = folder / SPARSITY
    content = read_json(path) if path.is_file() else None
    found = content.get("start_mean") if isinstance(content, dict) else None
    return float(found) if isinstance(found, (int, float)) and math.isfinite(found) and found > 0 else None


def _upper(values: np.ndarray) -> float:
    """Return where the horizontal axis ends: a few outliers shall not press all others to the left."""
    return float(np.quantile(values, 0.998)) * 1.02 or 1.0


def bin_edges(threshold: float, upper: float, bins: int) -> np.ndarray:
    """Return the edges of about `bins` bins from 0 to `upper`; the threshold is one: no bin lies on both sides.

    >>> bin_edges(0.1, 1.0, 4).round(3).tolist(), bin_edges(2.0, 1.0, 4).tolist()
    ([0.0, 0.1, 0.325, 0.55, 0.775, 1.0], [0.0, 0.25, 0.5, 0.75, 1.0])
    """
    if threshold >= upper:
        return np.linspace(0.0, upper, bins + 1)
    near = max(1, round(bins * threshold / upper))
    rest = max(1, round(bins * (1.0 - threshold / upper)))
    return np.concatenate([np.linspace(0.0, threshold, near, endpoint=False), np.linspace(threshold, upper, rest + 1)])


def _histogram(axes: Any, values: np.ndarray, edges: np.ndarray, threshold: float) -> None:
    clipped = np.minimum(values, edges[-1])
    for part, colour in ((clipped[values >= threshold], _BULK), (clipped[values < threshold], _NEAR)):
        # A bin of γ near zero may be narrower than a pixel: its outline is not.
        axes.hist(part, edges, color=colour, linewidth=0.8 if colour == _NEAR else 0, edgecolor=colour)
    axes.axvline(threshold, color=_NEAR, linewidth=0.9, linestyle="--")


def _ridges(axes: Any, gammas: Gammas, names: list[str], rows: int, upper: float) -> None:
    """Draw one filled histogram for each layer, the first on top.

    Heights are square roots of counts, relative to the layer's maximum, so that a peak at zero hides nothing beside it.
    """
    edges = bin_edges(gammas.threshold, upper, _BINS // 2)
    is_near = edges[:-1] < gammas.threshold
    axes.text(1.02, rows + 0.1, "near zero", transform=axes.get_yaxis_transform(), fontsize=7, color=_SOFT)
    for row, name in enumerate(names):
        values = gammas.layers[name]
        base = rows - 1 - row
        counts = np.histogram(np.minimum(values, edges[-1]), edges)[0]
        heights = np.sqrt(counts / counts.max()) * 0.86
        for shown, colour in ((~is_near, _BULK), (is_near, _NEAR)):
            axes.bar(
                edges[:-1][shown],
                heights[shown],
                np.diff(edges)[shown],
                base,
                align="edge",
                color=colour,
                linewidth=0.8 if colour == _NEAR else 0,
                edgecolor=colour,
            )
        axes.axhline(base, color="#c9d1cc", linewidth=0.5)
        share = gammas.near_zero(values)
        label = {"fontsize": 7, "va": "bottom", "color": _NEAR if share >= 0.005 else _SOFT}
        axes.text(1.02, base + 0.1, f"{share:.0%} of {values.size}", transform=axes.get_yaxis_transform(), **label)
    shown = [_short(name) for name in names]
    axes.set_yticks([rows - 1 - row + 0.3 for row in range(len(names))], shown, fontsize=7)
    axes.tick_params(axis="y", length=0, pad=3)
    axes.tick_params(axis="x", labelsize=8)
    axes.set(xlim=(0.0, upper), ylim=(-0.15, rows + 0.1))
    axes.set_xlabel("|γ|; heights are square roots of counts", fontsize=8)
    axes.axvline(gammas.threshold, color=_NEAR, linewidth=0.8, linestyle="--")
    axes.spines[["top", "right", "left"]].set_visible(False)


def _short(name: str) -> str:
    """Return a layer's name as it fits beside its ridge, safe for matplotlib, which reads `$` as mathematics."""
    name = name.removesuffix(".bn").removeprefix("model.")
    return _plain(name if len(name) <= 24 else f"…{name[-23:]}")


def _plain(text: str) -> str:
    return printable(text).replace("$", r"\$")
