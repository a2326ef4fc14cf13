"""What the comparison with the peers comes to: mean and spread over the seeds, and a table."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean, stdev
from typing import Any


def summarise(rows: list[dict[str, Any]], ours: str) -> list[dict[str, Any]]:
    """Return a line for each runtime and way, in the order of the rows, with what `ours` is ahead by.

    Args:
        rows: `runtime`, `way`, `seed`, `map50_95`, `ms`, `speedup` and `macs` of each network.

    Returns:
        Per line the means; `sd`, the standard deviation of mAP over the seeds (null for a single one); and for every
        way but ours, over the seeds that both have, `margin`, the mean of our mAP less that of the way; `spread`, the
        larger of the two standard deviations; `ahead`, whether the margin is larger than it; and `seeds_ahead`, on
        how many seeds we are ahead.
    """
    cells: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["runtime"], row["way"]), {})[row["seed"]] = row
    lines = []
    for (runtime, way), found in cells.items():
        line = {
            "runtime": runtime,
            "way": way,
            "seeds": len(found),
            "sd": _sd(row["map50_95"] for row in found.values()),
            **{key: fmean(row[key] for row in found.values()) for key in ("map50_95", "ms", "speedup", "macs")},
        }
        reference = cells.get((runtime, ours), {})
        both = [seed for seed in found if seed in reference]
        if way != ours and both:
            pairs = [(reference[seed]["map50_95"], found[seed]["map50_95"]) for seed in both]
            deviations = [_sd(side) for side in zip(*pairs, strict=True)]
            margin = fmean(mine - other for mine, other in pairs)
            spread = max((sd for sd in deviations if sd is not None), default=None)
            line |= {"margin": margin, "spread": spread, "ahead": spread is not None and margin > spread}
            line |= {"seeds_ahead": sum(mine > other for mine, other in pairs)}
        lines.append(line)
    return lines


def _sd(values: Iterable[float]) -> float | None:
    known = list(values)
    return stdev(known) if len(known) > 1 else None


def table(lines: list[dict[str, Any]], labels: dict[str, str]) -> str:
    """Return the summary as a Markdown table."""
    heading = ["runtime", "way", "p50, ms", "speed-up", "MACs", "mAP50-95", "± seeds", "Espalier ahead by", "spread"]
    text = [f"| {' | '.join(heading)} |", f"|---|---|{'--:|' * (len(heading) - 2)}"]
    for line in lines:
        cells = [
            line["runtime"],
            labels[line["way"]],
            f"{line['ms']:.2f}",
            f"{line['speedup']:.2f}×",
            f"{line['macs'] / 1e6:.0f} M",
            f"{line['map50_95']:.4f}",
            _number(line["sd"]),
            _margin(line),
            _number(line.get("spread")),
        ]
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join(text)


def _margin(line: dict[str, Any]) -> str:
    if "margin" not in line:
        return ""
    doubtful = line["spread"] is not None and not line["ahead"]
    return f"{line['margin']:+.4f}{' (within the spread)' if doubtful and line['margin'] > 0 else ''}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
