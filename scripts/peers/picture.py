"""The picture of the comparison with the peers: how much mAP each way keeps at the same measured latency."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_INK, _SOFT, _OURS, _OTHER = "#1b2420", "#5a6660", "#1f7a4d", "#2a7fd4"


def order(lines: list[dict[str, Any]]) -> list[str]:
    """Return the ways, the one that keeps most mAP on the average over the runtimes first."""
    scores: dict[str, list[float]] = {}
    for line in lines:
        scores.setdefault(line["way"], []).append(line["map50_95"])
    return sorted(scores, key=lambda way: -sum(scores[way]) / len(scores[way]))


def plot(
    rows: list[dict[str, Any]],
    lines: list[dict[str, Any]],
    dense: float | None,
    labels: dict[str, str],
    ours: str,
    path: Path,
) -> None:
    """Draw mAP, a panel for each runtime and a line for each way: all seeds small, mean and deviation large.

    The latencies are nearly one, on purpose: they are written beside the marks, because an axis of them would show
    nothing but what is left of their differences.

    Args:
        rows: of each network, as `outcome.summarise` takes them.
        lines: what it returns.
        dense: mean mAP of the dense models, drawn as a line.
        ours: the way that is set off.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ways, runtimes = order(lines), list(dict.fromkeys(row["runtime"] for row in rows))
    size = (2.4 + 4.6 * len(runtimes), 1.3 + 0.42 * len(ways))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(runtimes), squeeze=False, sharex=True, sharey=True)[0]
    for axes, runtime in zip(panels, runtimes, strict=True):
        for line in (line for line in lines if line["runtime"] == runtime):
            place, colour = ways.index(line["way"]), _OURS if line["way"] == ours else _OTHER
            seeds = [row["map50_95"] for row in rows if (row["runtime"], row["way"]) == (runtime, line["way"])]
            axes.plot(seeds, [place + 0.28] * len(seeds), ".", markersize=4, color=colour, alpha=0.7)
            axes.errorbar(
                line["map50_95"], place, xerr=line["sd"] or 0.0, fmt="s", markersize=6, capsize=3, color=colour
            )
            text = f"{line['ms']:.2f} ms, {line['speedup']:.2f}×"
            axes.text(1.01, place, text, transform=axes.get_yaxis_transform(), va="center", fontsize=8, color=_SOFT)
        if dense is not None:
            axes.axvline(dense, color=_INK, linewidth=0.9, linestyle="--")
            axes.text(dense, -0.75, "dense ", ha="right", va="center", fontsize=8, color=_INK)
        axes.set_title(f"{runtime}, at equal measured latency", fontsize=9, loc="left")
        axes.set(xlabel="mAP50-95, test split", ylim=(len(ways) - 0.4, -1.1))
        axes.set_yticks(range(len(ways)), [labels[way] for way in ways], fontsize=9)
        axes.grid(axis="x", color="#dde3df", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
    figure.supxlabel("large: mean and standard deviation over the seeds; small: each seed", fontsize=8, color=_SOFT)
    figure.savefig(path, metadata={"Software": None})
