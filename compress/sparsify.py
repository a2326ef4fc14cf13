"""Stage 2: sparsity training, which shows by their γ which channels the detector can do without."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from compress import checkpoint, manifest
from compress.errors import SettingsError, run_app
from compress.planning import Planned, plan_pruning
from compress.settings import AUTO, Budget, Prune, Sparsity, load_budget, parse, training_args
from compress.train import MORE_HELP, Common, training_stage

_REPAIR_IMAGES = 256


def sparsify(
    model: str,
    data: Path,
    settings: Sparsity,
    common: Common,
    output: Path,
    cut: Prune | None = None,
    budget: Budget | None = None,
) -> Path:
    """Train with a penalty on the γ of prunable channels and return the checkpoint, `output/model.pt`.

    The last epoch's weights are kept: their γ are the sparsest. Their batch-norm statistics, which may lag behind
    shrinking γ, are estimated anew, and kept where they are better. Watch `output/tensorboard`.

    Args:
        budget: without a `cut`, what λ `auto` may bring near zero in each layer.
        cut: what will be pruned afterwards; with `settings.fade` its channels are chosen early and faded out, and with
            λ `auto` as many γ as it removes are brought near zero. Where it asks for a latency, TensorBoard shows that.
    """

    def repair(trained: Any) -> None:
        from compress.data.dataset import sample_images
        from compress.pruning.repair import repair_statistics
        from compress.training.mean_ap import val_scorer

        sample = sample_images(data, "train", _REPAIR_IMAGES, common.seed)
        score = val_scorer(trained, data, common.imgsz, common.seed)
        if found := repair_statistics(trained, sample, common.imgsz, score):
            print(f"sparsify: {found}")

    rules = cut.budget if cut else budget or Budget()
    share = _share(model, settings, cut, rules, data, common.imgsz) if settings.sr == AUTO else None
    table = _table(model, cut, data, common.imgsz) if cut and cut.by_latency else None
    fade = cut.without_repairs().model_dump(mode="json", exclude_none=True) if cut and settings.fade else None
    notes: dict[str, Any] = {"sr": settings.sr, "sr_decay": settings.sr_decay, "fade": fade, "share": share}
    if fade and cut and cut.sensitivity:  # by which the channels that fade are chosen, and which may be measured anew
        notes |= manifest.input_hashes({"sensitivity_sha256": Path(cut.sensitivity)})
    if settings.sr == AUTO:
        notes["budget"] = rules.model_dump(mode="json", exclude={"source"})
    return training_stage(
        "sparsify",
        "SPARSITY_TRAINERS",
        model,
        data,
        settings,
        common,
        output,
        notes=notes,
        shown={"table": table},
        keep_last=True,
        repair=repair,
    )


def _share(model: str, settings: Sparsity, cut: Prune | None, budget: Budget, data: Path, imgsz: int) -> float:
    """Return the share of γ that shall come near zero: what was asked for, or what the cut will remove."""
    if settings.share is not None:
        from compress.channels.graph import build_graph
        from compress.pruning.budget import removable

        graph = build_graph(_as_trained(model, data), imgsz)
        prunable = sum(group.width for group in graph.groups if not group.frozen)
        reachable = removable(graph, budget).sum() / max(prunable, 1)
        if settings.share > reachable:
            raise SettingsError(
                f"share {settings.share:g} is more than the {reachable:.1%} of the channels that the budget lets go: "
                "ask for less, or loosen the budget"
            )
        return settings.share
    if cut is None:
        raise SettingsError("--sr auto needs to know how many γ shall come near zero: give --share, such as 0.5")
    if cut.percent is not None:
        return cut.percent
    planned = _plan_at_random(model, cut, data, imgsz)  # how many channels go hardly depends on which ones
    before, after = (
        sum(w for w, g in zip(widths, planned.graph.groups, strict=True) if not g.frozen)
        for widths in (planned.graph.widths.tolist(), planned.choice.widths.tolist())
    )
    return 1.0 - after / before


def _table(model: str, cut: Prune, data: Path, imgsz: int) -> str:
    """Return where the latency table lies of the model as it is trained here."""
    from compress.latency.plan import find_table

    return str(find_table(cut, imgsz, checkpoint.structure_hash(_as_trained(model, data)), model)[1])


def _plan_at_random(model: str, cut: Prune, data: Path, imgsz: int) -> Planned:
    return plan_pruning(_as_trained(model, data), cut.model_copy(update={"importance": "random"}), imgsz, source=model)


def _as_trained(model: str, data: Path) -> Any:
    """Return a model with the head that a training on this data gives it."""
    from compress.data.dataset import class_names

    return checkpoint.with_classes(checkpoint.load_trainable(model), len(class_names(data)))


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Annotated[str, typer.Option(help="trained checkpoint (.pt)")],
    data: Annotated[str, typer.Option(help="data set YAML, or 'shapes' for the generated one")],
    output: Annotated[Path, typer.Option(help="folder of this stage")],
    sr: Annotated[str, typer.Option(help="strength λ of the penalty on γ; 'auto' steers to --share")] = "1e-4",
    sr_decay: Annotated[float, typer.Option(help="share of λ that is left at the last epoch")] = 0.1,
    share: Annotated[float | None, typer.Option(help="with --sr auto: share of γ that shall come near zero")] = None,
    fade: Annotated[
        float | None, typer.Option(help="MACs that will remain: what that cut removes is chosen early and faded out")
    ] = None,
    budget: Annotated[
        Path | None, typer.Option(help="with --fade or --sr auto: a file of configs/budgets/, or a device")
    ] = None,
    more: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help=MORE_HELP)] = None,
    epochs: Annotated[int, typer.Option(min=1)] = 100,
    batch: Annotated[int, typer.Option(min=1)] = 16,
    imgsz: Annotated[int, typer.Option(min=32, help="side of the square input, px")] = 640,
    device: Annotated[str, typer.Option(help="cpu, 0, 0,1 …")] = "cpu",
    optimizer: Annotated[str, typer.Option(help="as Ultralytics names them")] = "SGD",
    lr0: Annotated[float, typer.Option(help="first learning rate")] = 0.01,
    workers: Annotated[int, typer.Option(min=0)] = 8,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Train with sparsity; look at the γ with `tensorboard --logdir OUTPUT/tensorboard`."""
    from compress.data.dataset import resolve

    given = {"epochs": epochs, "batch": batch, "optimizer": optimizer, "lr0": lr0, "args": training_args(more or [])}
    given |= {"sr": _number_or_word(sr), "sr_decay": sr_decay, "share": share, "fade": fade is not None}
    settings = parse(Sparsity, given, "sparsify")
    if budget and fade is None and settings.sr != AUTO:
        raise SettingsError("--budget goes with --fade or --sr auto: without, no cut is planned here")
    rules = load_budget(budget) if budget else Budget()
    checkpoint.require(model)
    common, cut, place = Common(imgsz=imgsz, device=device, workers=workers, seed=seed), None, resolve(data)
    if fade is not None:
        content = {"macs": fade, "importance": "taylor", "budget": rules.model_dump(mode="json")}
        cut = parse(Prune, content, "--fade")
        # It is planned in the middle of the training: what no choice of channels can reach is said before.
        _plan_at_random(model, cut, place, imgsz)
    sparsify(model, place, settings, common, output, cut, rules)


def _number_or_word(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


if __name__ == "__main__":
    run_app(app)
