"""A plan as a person reads it: every group with its width before and after, and why; and what that should bring."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compress.latency.plan import Prediction
    from compress.planning import Planned
    from compress.settings import Budget


def print_plan(planned: Planned, budget: Budget) -> None:
    """Print every group: width before and after, and why."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from compress.pruning.budget import rule_for

    table = Table(title=f"plan: {planned.plan.target}")
    table.add_column("group", no_wrap=True)
    for heading in ("width", "kept", "multiple of"):
        table.add_column(heading, justify="right")
    table.add_column("why")
    for group, width, why in zip(planned.graph.groups, planned.choice.widths, planned.choice.why, strict=True):
        multiple = rule_for(group.layers, budget)[0].multiple_of
        kept = f"[bold]{width}[/bold]" if width < group.width else str(width)
        table.add_row(escape(group.name), str(group.width), kept, str(multiple), escape(why))
    console = Console()
    console.print(table)
    metrics = planned.metrics()
    for name in ("macs", "params", "channels"):
        before, after = metrics[name]
        console.print(f"{name:>8}: {before:,} → {after:,} ({after / before:.1%} kept)")
    if planned.prediction:
        print_prediction(planned.prediction)


def print_prediction(prediction: Prediction) -> None:
    """Print what a latency table says about a plan."""
    from compress.latency.table import amount

    unit = prediction.unit
    if prediction.target is None:
        asked = f"the fastest that keeps {prediction.keep_importance:.2%}"
        proof = f"no widths that keep so much take less than {amount(prediction.bound, unit)}"
    else:
        asked = f"target {amount(prediction.target, unit)}"
        proof = f"no widths within the target lose less than {prediction.bound:.4f}"
    print(
        f" latency: {amount(prediction.dense, unit)} → {amount(prediction.predicted, unit)} predicted "
        f"({prediction.dense / prediction.predicted:.2f}×), {asked}; memory {prediction.memory_bytes / 1e6:.4g} MB"
    )
    print(
        f"    kept: {prediction.kept:.2%} of the importance of a group on average; loss {prediction.loss:.4f}, "
        f"{proof} (gap {prediction.gap:.2%})"
    )
