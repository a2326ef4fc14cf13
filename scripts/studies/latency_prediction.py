"""How well latency tables predict, and what the solver makes of them: docs/results/latency_prediction.json and .png.

usage: python scripts/studies/latency_prediction.py --models yolov8n.pt yolo11n.pt --runtimes onnxruntime ncnn \
           --imgsz 320 --output docs/results/latency_prediction.json

For each model and runtime: a table; random plans that it has not seen, predicted and measured; plans for latency
targets, each measured and corrected as `compress.prune` does; the speed-up at half of the MACs, and what it could be at
best if importance did not count, as predicted; and how much importance the solver keeps beside other ways to choose
widths at the same predicted latency. All latencies are those of `benchmark.latency`, in turns with the dense model.
Every part is a file below --work: an interrupted study goes on.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmark import latency, variants
from benchmark.observe import Wanted
from benchmark.profile import profile
from compress import manifest
from compress.channels.graph import Graph
from compress.checkpoint import load_model
from compress.errors import BudgetError
from compress.latency.measured import plan_measured
from compress.latency.solver import build_problem, cheapest, least_loss
from compress.latency.table import Latency, LatencyTable, evaluate
from compress.planning import Scored, score
from compress.pruning.budget import Target, choose, log_share_lost, ties
from compress.settings import Budget, Prune, load_budget

TARGETS = (0.3, 0.425, 0.55, 0.675, 0.8)
TOGETHER = 5  # networks in one interleaved measurement, beside the dense one
SEED = 100  # tables are drawn with seed 0


@dataclass(frozen=True)
class Case:
    """One model on one runtime."""

    name: str
    runtime: str
    imgsz: int
    budget: Budget
    mode: str
    model: nn.Module
    scored: Scored
    table: LatencyTable
    table_path: Path
    latency: Latency

    @property
    def wanted(self) -> Wanted:
        """What is measured."""
        return Wanted(self.runtime, self.imgsz, self.budget)

    @property
    def graph(self) -> Graph:
        """The channel graph."""
        return self.scored.graph


def measure(case: Case, networks: list[np.ndarray], folder: Path) -> list[dict[str, Any]]:
    """Measure networks of given widths, each beside the dense one; each group of measurements is a file in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for start in range(0, len(networks), TOGETHER):
        part, file = networks[start : start + TOGETHER], folder / f"{start}.json"
        wanted = [widths.tolist() for widths in part]
        if not file.exists() or manifest.read_json(file)["widths"] != wanted:
            manifest.write_json(file, {"widths": wanted, "record": _measure_together(case, part)})
        record = manifest.read_json(file)["record"]
        cells = {cell["model"]: cell for cell in record["cells"]}
        speedups = {c["model"]: c for c in record["comparisons"]}
        for number, widths in enumerate(part):
            cell, found = cells[f"plan{number}"], speedups[f"plan{number}"]
            predicted = float(case.latency(widths))
            # On a day when the dense model takes longer than when the table was made, so does a plan.
            today = cells["dense"]["p50_ms"] / case.table.dense
            rows.append(
                {
                    "predicted_ms": round(predicted, 4),
                    "measured_ms": cell["p50_ms"],
                    "dense_ms": cells["dense"]["p50_ms"],
                    "speedup": found["speedup"],
                    "interval": found["interval"],
                    "error": round(predicted / cell["p50_ms"] - 1, 5),
                    "error_beside_dense": round(predicted * today / cell["p50_ms"] - 1, 5),
                    "noisy": record["noisy"],
                }
            )
    return rows


def _measure_together(case: Case, networks: list[np.ndarray]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        cuts = [variants.cut(case.model, case.graph, widths) for widths in networks]
        models = {"dense": case.model, **{f"plan{number}": network for number, network in enumerate(cuts)}}
        files = variants.export_here(models, case.wanted, Path(scratch))
        record = latency.measure(files, imgsz=case.imgsz, threads=1, mode=case.mode)
    for cell in record["cells"]:
        del cell["samples_ms"]
    return record


def kept(case: Case, widths: np.ndarray) -> float:
    """Return the geometric mean, over the groups that may be cut, of the share of importance that widths keep."""
    groups = [index for tie in ties(case.graph, case.budget) if len(tie.parts) > 1 for index in tie.units]
    loss = sum(log_share_lost(np.sort(case.scored.scores[i]), int(widths[i])) for i in groups)
    return float(np.exp(-loss / len(groups)))


def uniform(graph: Graph, budget: Budget, share: float) -> np.ndarray:
    """Return widths that are the nearest allowed ones to one share of all."""
    widths = graph.widths.copy()
    for tie in ties(graph, budget):
        parts = min(tie.parts, key=lambda p: (abs(p - share * tie.parts[0]), p))
        for group, units in tie.units.items():
            widths[group] = parts * units
    return widths


def most_within(case: Case, limit: float, make: Callable[[float], np.ndarray]) -> np.ndarray | None:
    """Return what `make` makes of the largest share whose predicted latency is within a limit."""
    low, high, best = 0.01, 1.0, None
    for _ in range(14):
        share = (low + high) / 2
        try:
            widths = make(share)
        except BudgetError:
            low = share
            continue
        if case.latency(widths) <= limit:
            low, best = share, widths
        else:
            high = share
    return best


def compare_choices(case: Case) -> list[dict[str, Any]]:
    """Return how much importance each way to choose widths keeps at the same predicted latency."""
    problem = build_problem(case.graph, case.budget, case.scored.scores, case.latency)

    def by(kind: Any, amount: Callable[[float], float]) -> Callable[[float], np.ndarray]:
        return lambda share: choose(case.graph, case.scored.scores, Target(kind, amount(share)), case.budget).widths

    rows = []
    for target in TARGETS:
        limit = target * case.table.dense
        found = least_loss(problem, limit)
        if found is None:
            rows.append({"target": target, "reachable": float(problem.cost(cheapest(problem))) / case.table.dense})
            continue
        others = {
            "importance only": most_within(case, limit, by("percent", lambda share: 1 - share)),
            "importance per MAC": most_within(case, limit, by("macs", lambda share: min(share, 0.999))),
            "uniform width": most_within(case, limit, lambda share: uniform(case.graph, case.budget, share)),
        }
        row: dict[str, Any] = {
            "target": target,
            "solver": round(kept(case, found.widths), 5),
            "gap": round(found.gap, 6),
        }
        for name, widths in others.items():
            row[name] = None if widths is None else round(kept(case, widths), 5)
        rows.append(row)
    return rows


def meet_targets(case: Case, folder: Path) -> list[dict[str, Any]]:
    """Plan for each target with the measured loop, then measure all of the plans together."""
    rows, widths = [], []
    folder.mkdir(parents=True, exist_ok=True)
    for target in TARGETS:
        file = folder / f"target_{target}.json"
        if not file.exists():
            wanted = Prune(
                speedup=1 / target,
                importance="l1",
                budget=case.budget,
                runtime=case.runtime,  # type: ignore[arg-type]
                table=str(case.table_path),
            )
            try:
                planned, rounds = plan_measured(case.model, wanted, case.imgsz, 0, None, case.name)
            except BudgetError as error:
                manifest.write_json(file, {"target": target, "infeasible": str(error)})
            else:
                content = {"target": target, "widths": planned.choice.widths.tolist(), "rounds": rounds}
                manifest.write_json(file, content)
        row = manifest.read_json(file)
        rows.append(row)
        if "widths" in row:
            widths.append(np.array(row["widths"]))
    measured = iter(measure(case, widths, folder / "targets"))
    return [
        {**row, "measured": (found := next(measured)), "met": round(1 / found["speedup"] / row["target"] - 1, 5)}
        if "widths" in row
        else row
        for row in rows
    ]


def half_macs(case: Case, folder: Path) -> list[dict[str, Any]]:
    """Return the realised speed-up at half of the MACs, of the solver and of the greedy choice by MACs."""
    problem = build_problem(case.graph, case.budget, case.scored.scores, case.latency)
    dense = case.graph.macs(case.graph.widths)
    low, high = float(problem.cost(cheapest(problem))), case.table.dense
    for _ in range(14):
        limit = (low + high) / 2
        found = least_loss(problem, limit)
        if found is not None and case.graph.macs(found.widths) <= 0.5 * dense:
            low = limit
        else:
            high = limit
    solved = least_loss(problem, low)
    assert solved is not None
    plans = {
        "solver": solved.widths,
        "importance per MAC": choose(case.graph, case.scored.scores, Target("macs", 0.5), case.budget).widths,
    }
    rows = []
    for (name, widths), found in zip(plans.items(), measure(case, list(plans.values()), folder), strict=True):
        macs = dense / case.graph.macs(widths)
        rows.append(
            {"widths": name, "macs_speedup": round(macs, 4), "kept": round(kept(case, widths), 5), **found}
            | {"realised": round(found["speedup"] / macs, 4)}
        )
    return rows


def best_realised(case: Case, starts: int = 6) -> float:
    """Return the largest predicted share of the MACs speed-up that any widths with half of the MACs were found to have.

    Importance does not count. One tie after another takes its best width, from `starts` points: a local search.
    """
    problem = build_problem(case.graph, case.budget, case.scored.scores, case.latency)
    dense_macs, dense_cost = case.graph.macs(case.graph.widths), float(case.latency(case.graph.widths))

    def realised(levels: np.ndarray) -> float:
        widths = problem.widths(levels)
        macs = case.graph.macs(widths) / dense_macs
        off_target = max(0.0, abs(macs - 0.5) - 0.01)
        return macs / (float(case.latency(widths)) / dense_cost) - 20 * off_target

    generator, best = np.random.default_rng(SEED), 0.0
    for _ in range(starts):
        levels, before = np.array([generator.integers(0, parts.size) for parts in problem.parts]), -np.inf
        while (now := realised(levels)) > before:
            before = now
            for tie in generator.permutation(levels.size):
                rows = np.repeat(levels[None], problem.parts[tie].size, axis=0)
                rows[:, tie] = np.arange(len(rows))
                levels = max(rows, key=realised)
        best = max(best, before)
    return round(best, 4)


def study(case: Case, plans: int, folder: Path) -> dict[str, Any]:
    """Do everything for one model on one runtime."""
    drawn = variants.draw_widths(case.graph, case.budget, plans + 2, SEED)[2:]
    random_plans = measure(case, list(drawn), folder / "random")
    errors = {
        name: {"median": round(float(np.median(values)), 5), "p95": round(float(np.percentile(values, 95)), 5)}
        for name in ("error", "error_beside_dense")
        for values in [np.abs([row[name] for row in random_plans])]
    }
    dense = float(case.latency(case.graph.widths))
    return {
        "model": case.name,
        "runtime": case.runtime,
        "table": {"dense": case.table.dense, "fit": case.table.fit.model_dump(), "sha256": case.table.sha256},
        "errors": errors,
        "random_plans": random_plans,
        "targets": meet_targets(case, folder),
        "half_macs": half_macs(case, folder / "half"),
        "best_realised_at_half_macs": best_realised(case),
        "share_that_no_width_changes": round(float(case.latency.terms[:, 0].sum() + case.latency.offset) / dense, 4),
        "kept_at_equal_latency": compare_choices(case),
    }


def plot(cases: list[dict[str, Any]], path: Path) -> None:
    """Draw predicted over measured latency of random plans and of plans for a target, as shares of the dense model's.

    As shares, since on another day the whole machine may be faster or slower than when the table was made.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(cases), 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(cases), squeeze=False)[0]
    for axes, case in zip(panels, cases, strict=True):
        points = case["random_plans"]
        met = [row["measured"] for row in case["targets"] if "measured" in row]
        dense_ms = case["table"]["dense"]
        most = 1.05 * max(max(1 / p["speedup"], p["predicted_ms"] / dense_ms) for p in [*points, *met])
        axes.fill_between(
            [0, most], [0, 0.95 * most], [0, 1.05 * most], color="#dde3df", label="within 5 %", linewidth=0
        )
        axes.plot([0, most], [0, most], color="#5a6660", linewidth=0.8)
        for found, sign, colour, label in (
            (points, "o", "#2a7fd4", "random widths"),
            (met, "s", "#d2691e", "plan for a target"),
        ):
            measured, predicted = [1 / p["speedup"] for p in found], [p["predicted_ms"] / dense_ms for p in found]
            look = {"markersize": 5, "color": colour, "markeredgecolor": "white", "markeredgewidth": 0.5}
            axes.plot(measured, predicted, sign, label=label, **look)
        axes.set_title(f"{case['model']}, {case['runtime']}", fontsize=10, loc="left")
        axes.set(xlabel="measured share of the dense latency", xlim=(0, most), ylim=(0, most), aspect="equal")
        axes.xaxis.set_major_formatter("{x:.0%}")
        axes.yaxis.set_major_formatter("{x:.0%}")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("predicted share")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=9
    )
    figure.savefig(path, metadata={"Software": None})


def main() -> None:
    """Run all and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, nargs="+", required=True)
    parser.add_argument("--runtimes", nargs="+", default=["onnxruntime", "ncnn"])
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--budget", type=Path, default=Path("configs/budgets/onnxruntime-cpu.yaml"))
    parser.add_argument("--variants", type=int, default=64, help="networks of each table")
    parser.add_argument("--plans", type=int, default=30, help="random plans of each case")
    parser.add_argument("--mode", default="quick", help="of benchmark.latency")
    parser.add_argument("--work", type=Path, default=Path("runs/studies/latency_prediction"))
    parser.add_argument("--output", type=Path, default=Path("docs/results/latency_prediction.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    budget, cases = load_budget(given.budget), []
    for path in given.models:
        model = load_model(path)
        scored = score(model, Prune(macs=0.5, importance="l1", budget=budget), given.imgsz)
        for runtime in given.runtimes:
            folder = given.work / f"{path.stem}-{runtime}"
            folder.mkdir(parents=True, exist_ok=True)
            wanted = Wanted(runtime, given.imgsz, budget, variants=given.variants)
            table, table_path = profile(model, wanted, folder / "table.json")
            costs = evaluate(table, scored.graph)
            case = Case(path.stem, runtime, given.imgsz, budget, given.mode, model, scored, table, table_path, costs)
            cases.append(study(case, given.plans, folder))
            print(path.stem, runtime, cases[-1]["errors"], flush=True)
    record = {"imgsz": given.imgsz, "threads": 1, "mode": given.mode, "tools": manifest.tool_versions(), "cases": cases}
    manifest.write_json(given.output, record)
    plot(cases, given.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
