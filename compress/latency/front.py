"""The Pareto front: what each latency costs in importance, as a table, a picture and data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import checkpoint, manifest

if TYPE_CHECKING:
    from compress.settings import Prune

RECORD, PICTURE = "front.json", "front.png"


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
    """
    from compress.latency.memory import memory_of
    from compress.latency.plan import find_table, memory_limit
    from compress.latency.solver import build_problem, front
    from compress.latency.table import check_widths, evaluate
    from compress.prune import score

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
    _print(rows, table.unit, graph.macs(graph.widths))
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        content = {"unit": table.unit, "dense": table.dense, "table": str(path), "table_sha256": table.sha256}
        manifest.write_json(output / RECORD, {**content, "points": rows})
        _plot(rows, table.unit, output / PICTURE)
        print(f"front: {output / RECORD} and {output / PICTURE}")
    return rows


def _print(rows: list[dict[str, Any]], unit: str, dense_macs: float) -> None:
    from rich.console import Console
    from rich.table import Table

    from compress.latency.table import amount

    shown = Table(title="the most importance at each latency, as predicted")
    for heading in ("latency", "speed-up", "kept importance", "gap to the bound", "MACs kept"):
        shown.add_column(heading, justify="right")
    for row in rows:
        shown.add_row(
            amount(row["latency"], unit),
            f"{row['speedup']:.2f}×",
            f"{row['kept']:.2%}",
            f"{row['gap']:.2%}",
            f"{row['macs'] / dense_macs:.1%}",
        )
    Console().print(shown)


def _plot(rows: list[dict[str, Any]], unit: str, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    scale = 1.0 if unit == "ms" else 1e6
    figure, axes = plt.subplots(figsize=(7, 4.2), dpi=150)
    axes.plot([row["latency"] / scale for row in rows], [100 * row["kept"] for row in rows], "o-")
    for row in rows:
        place = (row["latency"] / scale, 100 * row["kept"])
        axes.annotate(f"{row['speedup']:.2f}×", place, textcoords="offset points", xytext=(6, -10))
    label = "predicted latency, ms" if unit == "ms" else "predicted cost, M instructions"
    axes.set(xlabel=label, ylabel="kept importance of a group, %", xlim=0)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
