"""The Pareto front: what each latency costs in importance, as a table, a picture and data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import checkpoint, manifest
from compress.errors import BudgetError

if TYPE_CHECKING:
    from compress.latency.table import LatencyTable
    from compress.settings import Prune

RECORD, PICTURE = "front.json", "front.png"
_LABEL = (60.0, 14.0)  # px that a label takes


def draw_front(
    model: Path, settings: Prune, imgsz: int, seed: int, data: Path | None, count: int, output: Path | None
) -> list[dict[str, Any]]:
    """Print the best trade-offs between latency and importance, from the dense model to the fastest.

    With `output` they are also written there, as `front.json` and `front.png`.

    Args:
        settings: importance, budget and table; its target is not read.

    Returns:
        Per point: latency, speed-up, kept importance, loss, bound and gap of the loss, MACs, memory, and the widths of
        the groups that may be cut.

    Raises:
        SettingsError: there is no latency table that fits.
        BudgetError: no widths are within the limit of memory.
    """
    from compress.latency.memory import memory_of
    from compress.latency.plan import find_table, memory_limit
    from compress.latency.solver import build_problem, front
    from compress.latency.table import check_widths, evaluate
    from compress.planning import score

    network = checkpoint.load_model(model)
    table, path = find_table(settings, imgsz, checkpoint.structure_hash(network), str(model))
    scored = score(network, settings, imgsz, seed, data)
    graph = scored.graph
    check_widths(graph, table, settings.budget)
    memory = memory_of(graph, 2 if table.precision == "fp16" else 4)
    latency, most = evaluate(table, graph), memory_limit(settings)
    problem = build_problem(graph, settings.budget, scored.scores, latency, memory, most)
    groups = [index for tie in problem.ties for index in tie.units]
    rows = [
        {
            "latency": found.cost,
            "speedup": table.dense / found.cost,
            "kept": found.kept(len(groups)),
            "loss": found.loss,
            "bound": found.bound,
            "gap": found.gap,
            "macs": graph.macs(found.widths),
            "memory_bytes": int(memory(found.widths)),
            "widths": {graph.groups[i].name: int(found.widths[i]) for i in groups},
        }
        for found in front(problem, count)
    ]
    if not rows:
        raise BudgetError(f"no widths that the budget allows need at most {settings.memory} of memory: ask for more")
    _print(rows, table, graph.macs(graph.widths))
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        content = {"unit": table.unit, "dense": table.dense, "table": str(path), "table_sha256": table.sha256}
        manifest.write_json(output / RECORD, {**content, "points": rows})
        _plot(rows, table.unit, output / PICTURE)
        print(f"front: {output / RECORD} and {output / PICTURE}")
    return rows


def _print(rows: list[dict[str, Any]], table: LatencyTable, dense_macs: float) -> None:
    from rich.console import Console
    from rich.table import Table

    from compress.latency.table import amount

    console, shown = Console(), Table(title="the most importance at each latency, as predicted")
    for heading in ("latency", "speed-up", "importance\nkept", "gap to\nthe bound", "MACs\nkept"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        shown.add_row(
            amount(row["latency"], table.unit),
            f"{row['speedup']:.2f}×",
            f"{row['kept']:.2%}",
            f"{row['gap']:.2%}",
            f"{row['macs'] / dense_macs:.1%}",
        )
    console.print(shown)
    fit = table.fit
    console.print(  # why the dense widths' own prediction need not be 1.00×
        f"speed-up: over the {amount(table.dense, table.unit)} that the dense model was measured at; predictions are "
        f"within {fit.median_error:.1%} (median), {fit.p95_error:.1%} (95th percentile)",
        highlight=False,
    )


def _plot(rows: list[dict[str, Any]], unit: str, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    scale = 1.0 if unit == "ms" else 1e6
    places = [(row["latency"] / scale, 100 * row["kept"]) for row in rows]
    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(*zip(*places, strict=True), "o-", color="#2a7fd4", markersize=5)
    axes.margins(x=0.1, y=0.1)
    axes.set_xlim(left=0)
    figure.draw_without_rendering()  # so that places in the picture are known
    pixels = axes.transData.transform(places)
    for index in legible([(float(x), float(y)) for x, y in pixels]):
        style: dict[str, Any] = {"textcoords": "offset points", "xytext": (5, -4), "va": "top", "fontsize": 8}
        axes.annotate(f"{rows[index]['speedup']:.2f}×", places[index], **style)
    label = "predicted latency, ms" if unit == "ms" else "predicted cost, M instructions"
    axes.set(xlabel=f"{label} (numbers: speed-up)", ylabel="importance that a group keeps, mean, %")
    axes.grid(color="#dde3df", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Software": None})


def legible(places: list[tuple[float, float]]) -> list[int]:
    """Return which points can bear a label without covering that of another; the first and the last always do.

    Args:
        places: of the points in the picture, pixels.
    """
    shown: list[int] = []
    for index in sorted(range(len(places)), key=lambda index: index not in (0, len(places) - 1)):
        x, y = places[index]
        if all(abs(x - places[other][0]) > _LABEL[0] or abs(y - places[other][1]) > _LABEL[1] for other in shown):
            shown.append(index)
    return sorted(shown)
