"""Stage 3: choose channels under the device's rules, cut them out, and prove the cut."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress import checkpoint, manifest
from compress.errors import RunError, SettingsError, run_app, warn
from compress.planning import Planned, plan_pruning
from compress.pruning.plan_table import print_plan
from compress.settings import LATENCY_TARGETS, Budget, Importance, Prune, load_budget

if TYPE_CHECKING:
    from torch import nn

MODEL = "model.pt"
PLAN = "plan.json"
_FOLD_IMAGES = 256


def prune(model: Path, data: Path, settings: Prune, imgsz: int, seed: int, output: Path) -> Path:
    """Prune a checkpoint and return the pruned one, `output/model.pt`; the plan is `output/plan.json`.

    Raises:
        SurgeryError: the pruned model does not equal the masked dense one; nothing is written then.
    """
    config = {**settings.model_dump(mode="json"), "imgsz": imgsz, "seed": seed}
    from compress.data.dataset import fingerprint

    inputs = {"model": model} | ({"sensitivity": Path(settings.sensitivity)} if settings.sensitivity else {})
    parents = manifest.input_hashes(inputs, output) | {"data": fingerprint(data)}
    if settings.by_latency:
        from compress.latency.plan import find_table

        structure = checkpoint.structure_hash(checkpoint.load_model(model))
        parents["table"] = find_table(settings, imgsz, structure, str(model))[0].sha256
    result = output / MODEL
    with manifest.lock(output):
        if manifest.is_finished(output, "prune", config, parents):
            print(f"prune: finished before, unchanged: {result}")
            return result
        from compress.pruning.oracle import check_oracle
        from compress.pruning.plan import save_plan
        from compress.pruning.surgery import apply_plan

        dense, rounds = checkpoint.load_model(model), []
        if settings.by_latency:
            from compress.latency.measured import plan_measured

            planned, rounds = plan_measured(dense, settings, imgsz, seed, data, str(model))
            _say_what_had_not_faded(model, planned)
        else:
            planned = plan_pruning(dense, settings, imgsz, seed, data)
        pruned = apply_plan(planned.model, planned.plan)
        error = check_oracle(planned.graph, pruned, planned.choice.keep, seed)
        repaired = repair_cut(pruned, planned, data, settings, imgsz, seed, model)
        manifest.begin(output, "prune", config, parents)
        save_plan(planned.plan, output / PLAN)
        checkpoint.save_model(pruned, result, {**checkpoint.load_training_args(model), "imgsz": imgsz})
        metrics = {**planned.metrics(), "oracle_error": error, **repaired}
        if rounds:
            metrics["latency"]["measured"] = rounds
        manifest.finish(output, "prune", config, parents, [MODEL, PLAN], metrics, seed)
    before, after = metrics["macs"]
    print(f"prune: {result} ({after / before:.1%} of the MACs kept, oracle error {error:.1e})")
    return result


def _say_what_had_not_faded(model: Path, planned: Planned) -> None:
    """Say how far a cut goes beyond what the sparsity training of the model faded by the table as it was then.

    A measurement may ask for other widths than the table. An importance that sees γ (bn, taylor) still lets the faded
    channels go first: they have none.
    """
    stage = model.parent / manifest.MANIFEST
    if not stage.exists():
        return
    try:
        faded_before = bool(manifest.read_json(stage)["config"].get("fade"))
    except (RunError, LookupError, TypeError, AttributeError):  # not ours: any program may write a manifest.json
        return
    if not faded_before:
        return
    from compress.training.fade import faded

    gone, cut = faded(planned.plan, planned.model)
    if gone < cut:
        print(f"prune: {cut - gone} of the {cut} batch-norm channels that are cut had not been faded before")


def repair_cut(
    pruned: nn.Module, planned: Planned, data: Path, settings: Prune, imgsz: int, seed: int, source: Path
) -> dict[str, Any]:
    """Mend a cut model in place by what the settings switch on, say what helped, and return it as metrics.

    Args:
        source: the dense model's checkpoint.
    """
    from compress.data.dataset import sample_images
    from compress.pruning.repair import Repairs, repair
    from compress.training.mean_ap import val_scorer

    counts = (_FOLD_IMAGES if settings.fold else 0, settings.recalibrate_images, settings.reconstruct_images)
    if not any(counts):
        return {}
    if settings.recalibrate_images:
        _warn_of_other_size(source, imgsz)
    score = val_scorer(pruned, data, imgsz, seed)
    if score is None and settings.reconstruct_images:
        warn(f"nothing is reconstructed: {data} has no val mAP of {source} that could tell whether that helps")
    samples = [sample_images(data, "train", count, seed) if count else [] for count in counts]
    found = repair(pruned, planned.model, planned.plan, Repairs(*samples), imgsz, score, seed)
    if found is None:
        return {}
    print(f"prune: {found}")
    return found.metrics()


def _warn_of_other_size(model: Path, imgsz: int) -> None:
    """Say so where the statistics of batch norm will be those of another image size than the weights are made for."""
    trained = checkpoint.load_training_args(model).get("imgsz")
    if trained is not None and trained != imgsz:
        warn(
            f"{model} was trained at {trained} px, and its batch norms are estimated anew at {imgsz} px, which costs "
            f"accuracy until it is fine-tuned: cut with --imgsz {trained}, or train at {imgsz} px first"
        )


def _own_budget(device: str, runtime: str | None, by_latency: object) -> Budget:
    """Return the budget where none is given: with a latency that of the device."""
    if not by_latency:
        return Budget()
    from compress.devices import device_budget

    return device_budget(f"{device}:{runtime or ''}")


def _first_given(options: Mapping[str, object]) -> str | None:
    return next((name for name, value in options.items() if value is not None), None)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Annotated[Path, typer.Option(help="checkpoint (.pt), best after sparsity training")],
    output: Annotated[Path | None, typer.Option(help="folder of this stage (not needed with --dry-run)")] = None,
    data: Annotated[str | None, typer.Option(help="data set YAML or 'shapes', for batch norm and taylor")] = None,
    percent: Annotated[float | None, typer.Option(help="share of the prunable channels to remove")] = None,
    macs: Annotated[float | None, typer.Option(help="MACs that remain, as a share of the dense model's")] = None,
    params: Annotated[float | None, typer.Option(help="parameters that remain, as a share")] = None,
    latency: Annotated[
        str | None, typer.Option(help="latency that remains, such as 12ms; needs a latency table")
    ] = None,
    speedup: Annotated[str | None, typer.Option(help="dense latency over the pruned one, such as 2x")] = None,
    keep_importance: Annotated[
        float | None, typer.Option(help="the fastest that keeps so much importance, such as 0.9; needs a latency table")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="with a latency table: weights and peak activations, such as 8MB")
    ] = None,
    device: Annotated[str, typer.Option(help="with a latency table: where the model will run")] = "cpu",
    host: Annotated[str | None, typer.Option(help="with --device: \\[user@]host[:port], or a serial of adb")] = None,
    python: Annotated[str | None, typer.Option(help="with --device: interpreter on it")] = None,
    bootstrap: Annotated[
        bool, typer.Option("--bootstrap", help="with --device: put missing packages into a folder there")
    ] = False,
    runtime: Annotated[str | None, typer.Option(help="with --device: one that it has; its first one")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="with --device: of the runtime; its own")] = None,
    table: Annotated[Path | None, typer.Option(help="latency table, if not where benchmark.profile puts it")] = None,
    front: Annotated[int | None, typer.Option(min=2, help="print so many best trade-offs of latency, and stop")] = None,
    budget: Annotated[Path | None, typer.Option(help="a file of configs/budgets/, or a device")] = None,
    multiple_of: Annotated[int | None, typer.Option(min=1, help="channel counts are multiples of this")] = None,
    power_of_two: Annotated[bool, typer.Option("--power-of-two", help="channel counts are powers of two")] = False,
    max_removed: Annotated[float | None, typer.Option(help="largest share that one group may lose")] = None,
    importance: Annotated[Importance, typer.Option(help="bn, l1, l2, fpgm, taylor or random")] = "bn",
    sensitivity: Annotated[Path | None, typer.Option(help="sensitivity.json: what each group may lose")] = None,
    fold: Annotated[bool, typer.Option(help="let what reads removed channels keep what they send on average")] = True,
    recalibrate_images: Annotated[int, typer.Option(min=0, help="to estimate batch-norm statistics anew")] = 256,
    reconstruct_images: Annotated[
        int, typer.Option(min=0, help="to refit, layer by layer, what reads removed channels; takes minutes; 0: off")
    ] = 0,
    imgsz: Annotated[int, typer.Option(min=32, help="side of the square input, px")] = 640,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the plan and stop")] = False,
) -> None:
    """Prune a detector under a budget of widths.

    Exactly one of --percent, --macs, --params, --latency, --speedup, --keep-importance says how much; the last three
    need a latency table, which benchmark.profile makes. Of the repairs (--fold, --recalibrate-images,
    --reconstruct-images) that which scores best on the val split is kept, if any does.
    """
    from compress.settings import parse

    amount = {"percent": percent, "macs": macs, "params": params, "latency": latency, "speedup": speedup}
    amount |= {"keep_importance": keep_importance}
    by_latency = front or any(amount[name] is not None for name in LATENCY_TARGETS)
    where = {"device": device if device != "cpu" else None, "host": host, "python": python, "runtime": runtime}
    where |= {"threads": threads, "table": table, "bootstrap": bootstrap or None}
    if front is not None and (asked := _first_given(amount)):
        raise SettingsError(f"--front draws what all latencies cost: leave out --{asked.replace('_', '-')}")
    if front is not None and dry_run:
        raise SettingsError("--front cuts nothing: leave out --dry-run")
    if not by_latency and (asked := _first_given(where)):
        remedy = f"the widths that {device} likes are --budget {device}" if asked == "device" else "leave it out"
        raise SettingsError(f"--{asked} goes with --latency, --speedup, --keep-importance or --front: {remedy}")
    rules = load_budget(budget) if budget else _own_budget(device, runtime, by_latency)
    changes = {"multiple_of": multiple_of, "max_removed": max_removed, "power_of_two": power_of_two or None}
    rules = rules.model_dump(mode="json") | {key: value for key, value in changes.items() if value is not None}
    if front is not None:
        amount["speedup"] = 2.0  # only its table is read
    content = {key: value for key, value in amount.items() if value is not None}
    content |= {"device": device, "host": host, "python": python, "bootstrap": bootstrap}
    content |= {"runtime": runtime, "threads": threads}
    content |= {"memory": memory} if memory is not None else {}
    content |= {"table": str(table) if table else None, "sensitivity": str(sensitivity) if sensitivity else None}
    content |= {"fold": fold, "recalibrate_images": recalibrate_images, "reconstruct_images": reconstruct_images}
    settings = parse(Prune, {**content, "importance": importance, "budget": rules}, "prune")
    checkpoint.require(model)
    if front is None and not dry_run and (output is None or data is None):
        raise SettingsError("--output and --data are needed, unless --dry-run only prints the plan")
    if front is None and not dry_run:
        checkpoint.require_weights(model)
    from compress.data.dataset import resolve

    yaml = resolve(data) if data is not None else None
    if sensitivity is not None:
        from compress.pruning.sensitivity_file import warn_of_others

        warn_of_others(sensitivity, model, yaml)
    if front is not None:
        from compress.latency.front import draw_front

        draw_front(model, settings, imgsz, seed, yaml, front, output)
    elif output is None or yaml is None or dry_run:
        planned = plan_pruning(checkpoint.load_model(model), settings, imgsz, seed, yaml, str(model))
        print_plan(planned, settings.budget)
    else:
        prune(model, yaml, settings, imgsz, seed, output)


if __name__ == "__main__":
    run_app(app)
