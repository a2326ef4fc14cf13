"""Stage 3: choose channels under the device's rules, cut them out, and prove the cut."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress import checkpoint, manifest
from compress.errors import SettingsError, run_app
from compress.settings import Budget, Importance, Prune, load_budget

if TYPE_CHECKING:
    from torch import nn

    from compress.budget import Choice, Target
    from compress.graph import Graph
    from compress.plan import Plan

MODEL = "model.pt"
PLAN = "plan.json"


@dataclass(frozen=True)
class Planned:
    """A model, its channel graph, and what was chosen for it."""

    model: nn.Module
    graph: Graph
    choice: Choice
    plan: Plan

    def metrics(self) -> dict[str, Any]:
        """Return parameters and MACs before and after, and the number of groups."""
        before, after = self.graph.widths, self.choice.widths
        return {
            "params": [int(self.graph.params(before)), int(self.graph.params(after))],
            "macs": [int(self.graph.macs(before)), int(self.graph.macs(after))],
            "channels": [int(before.sum()), int(after.sum())],
            "groups": len(self.graph.groups),
            "groups_cut": len(self.plan.groups),
            "frozen": self.graph.frozen(),
        }


def plan_pruning(model: nn.Module, settings: Prune, imgsz: int, seed: int = 0, data: Path | None = None) -> Planned:
    """Trace a model, score its channels and choose widths; nothing is cut.

    Args:
        data: data set YAML, for importance that asks the loss.

    Raises:
        SettingsError: the importance needs `data`.
        GraphError: the model cannot be captured.
        BudgetError: no widths under the budget meet the target.
    """
    from compress.budget import choose
    from compress.graph import build_graph
    from compress.importance import importance
    from compress.plan import make_plan
    from compress.taylor import taylor_scores

    graph = build_graph(model, imgsz)
    target = target_of(settings)
    if settings.importance != "taylor":
        scores = importance(graph, model, settings.importance, seed)
    elif data is None:
        raise SettingsError("importance 'taylor' asks the loss on training images: give --data")
    else:
        scores = taylor_scores(graph, model, data, imgsz, seed=seed)
    choice = choose(graph, scores, target, settings.budget)
    words = f"{target.kind} {target.value:g}"
    plan = make_plan(graph, choice, checkpoint.structure_hash(model), words, settings.importance)
    return Planned(model, graph, choice, plan)


def target_of(settings: Prune) -> Target:
    """Return the one target that the settings hold."""
    from compress.budget import Target

    if settings.percent is not None:
        return Target("percent", settings.percent)
    if settings.macs is not None:
        return Target("macs", settings.macs)
    assert settings.params is not None
    return Target("params", settings.params)


def prune(model: Path, data: Path, settings: Prune, imgsz: int, seed: int, output: Path) -> Path:
    """Prune a checkpoint and return the pruned one, `output/model.pt`; the plan is `output/plan.json`.

    Raises:
        SurgeryError: the pruned model does not equal the masked dense one; nothing is written then.
    """
    config = {**settings.model_dump(mode="json"), "imgsz": imgsz, "seed": seed}
    from compress.dataset import fingerprint

    parents = manifest.input_hashes({"model": model}) | {"data": fingerprint(data)}
    result = output / MODEL
    with manifest.lock(output):
        if manifest.is_finished(output, "prune", config, parents):
            print(f"prune: finished before, unchanged: {result}")
            return result
        from compress.dataset import images
        from compress.oracle import check_oracle
        from compress.plan import save_plan
        from compress.repair import recalibrate_batch_norm
        from compress.surgery import apply_plan

        planned = plan_pruning(checkpoint.load_model(model), settings, imgsz, seed, data)
        pruned = apply_plan(planned.model, planned.plan)
        error = check_oracle(planned.graph, pruned, planned.choice.keep, seed)
        if settings.recalibrate_images:
            train = images(data, "train")
            sample = random.Random(seed).sample(train, min(settings.recalibrate_images, len(train)))
            recalibrate_batch_norm(pruned, sample, imgsz)
        manifest.begin(output, "prune", config, parents)
        save_plan(planned.plan, output / PLAN)
        checkpoint.save_model(pruned, result, {**checkpoint.load_training_args(model), "imgsz": imgsz})
        metrics = {**planned.metrics(), "oracle_error": error}
        manifest.finish(output, "prune", config, parents, [MODEL, PLAN], metrics, seed)
    before, after = metrics["macs"]
    print(f"prune: {result} (MACs {after / before:.1%}, oracle error {error:.1e})")
    return result


def print_plan(planned: Planned, budget: Budget) -> None:
    """Print every group: width before and after, and why."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from compress.budget import rule_for

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
        console.print(f"{name:>8}: {before:,} → {after:,} ({after / before:.1%})")


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Annotated[Path, typer.Option(help="checkpoint (.pt), best after sparsity training")],
    output: Annotated[Path | None, typer.Option(help="folder of this stage (not needed with --dry-run)")] = None,
    data: Annotated[str | None, typer.Option(help="data set YAML or 'shapes', to re-estimate batch norm")] = None,
    percent: Annotated[float | None, typer.Option(help="share of the prunable channels to remove")] = None,
    macs: Annotated[float | None, typer.Option(help="MACs that remain, as a share of the dense model's")] = None,
    params: Annotated[float | None, typer.Option(help="parameters that remain, as a share")] = None,
    budget: Annotated[Path | None, typer.Option(help="a file of configs/budgets/")] = None,
    multiple_of: Annotated[int | None, typer.Option(min=1, help="channel counts are multiples of this")] = None,
    power_of_two: Annotated[bool, typer.Option("--power-of-two", help="channel counts are powers of two")] = False,
    max_removed: Annotated[float | None, typer.Option(help="largest share that one group may lose")] = None,
    importance: Annotated[Importance, typer.Option(help="bn, l1, l2, taylor or random")] = "bn",
    imgsz: Annotated[int, typer.Option(min=32)] = 640,
    seed: Annotated[int, typer.Option()] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the plan and stop")] = False,
) -> None:
    """Prune a detector under a budget of widths; exactly one of --percent, --macs, --params says how much."""
    from compress.settings import parse

    rules = load_budget(budget) if budget else Budget()
    changes = {"multiple_of": multiple_of, "max_removed": max_removed, "power_of_two": power_of_two or None}
    rules = rules.model_dump(mode="json") | {key: value for key, value in changes.items() if value is not None}
    amount = {"percent": percent, "macs": macs, "params": params}
    content = {key: value for key, value in amount.items() if value is not None}
    settings = parse(Prune, {**content, "importance": importance, "budget": rules}, "prune")
    if not dry_run and (output is None or data is None):
        raise SettingsError("--output and --data are needed, unless --dry-run only prints the plan")
    from compress.dataset import resolve

    yaml = resolve(data) if data is not None else None
    if output is None or yaml is None or dry_run:
        print_plan(plan_pruning(checkpoint.load_model(model), settings, imgsz, seed, yaml), settings.budget)
    else:
        prune(model, yaml, settings, imgsz, seed, output)


if __name__ == "__main__":
    run_app(app)
