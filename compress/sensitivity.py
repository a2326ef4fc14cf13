"""How much mAP each group of channels is worth: cut one tie after another, alone, mend batch norm, and measure.

Nothing is trained. The result stands in for the importance between groups (`compress.prune --sensitivity`), and shows
where a network is easy to cut.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress import checkpoint, manifest
from compress.errors import DataError, SettingsError, run_app
from compress.pruning.sensitivity_file import SCHEMA, Sensitivity, Tie
from compress.settings import Importance, Share, Strict, parse

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from compress.channels.graph import Graph
    from compress.pruning.budget import Tie as BudgetTie

STAGE, RESULT, PICTURE, JOURNAL = "sensitivity", "sensitivity.json", "sensitivity.png", "measured.json"
FOLDER = Path("runs/sensitivity")
_DENSE, _MENDED = "dense", "mended"
_HARM = 0.9  # share of the mAP that mending the uncut model must leave to be trusted

Measure = Callable[["nn.Module"], float]
Mend = Callable[["nn.Module"], "nn.Module"]


class Wanted(Strict):
    """What is measured, and how."""

    split: str = "val"
    shares: tuple[Share, ...] = (0.25, 0.5, 0.75)
    importance: Importance = "taylor"
    images: int = 64
    repair: bool = True
    imgsz: int = 640
    seed: int = 0


def sensitivity(model: Path, data: Path, wanted: Wanted, output: Path | None = None) -> Path:
    """Measure the mAP that every tie of groups costs at several shares, and return `sensitivity.json`.

    What was measured before an interruption is not measured again.

    Args:
        output: folder of the result; one that model, data and settings name when not given.

    Raises:
        DataError: the model finds nothing on these images, so that nothing can be lost.
        SettingsError: no group of the model may be cut.
    """
    from compress.data.dataset import fingerprint
    from compress.inspection.sensitivities import draw

    config = wanted.model_dump(mode="json")
    parents = manifest.input_hashes({"model": model}) | {"data": fingerprint(data)}
    folder = output or FOLDER / f"{model.stem}-{manifest.sha256_json([config, parents])[:12]}"
    result = folder / RESULT
    with manifest.lock(folder):
        if manifest.is_finished(folder, STAGE, config, parents):
            print(f"sensitivity: finished before, unchanged: {result}")
            return result
        network = checkpoint.load_model(model)
        found = _measure(network, model, data, wanted, _Journal(folder, config, parents))
        origin = {"model_sha256": parents["model"], "data_fingerprint": parents["data"]}
        found = found.model_copy(update=origin)
        manifest.write_json(result, found.model_dump(mode="json"))
        draw(found, folder / PICTURE)
        metrics = {"map50_95": found.map50_95, "ties": len(found.ties)}
        manifest.finish(folder, STAGE, config, parents, [RESULT, PICTURE], metrics, wanted.seed)
    print(f"sensitivity: {result} ({len(found.ties)} ties, mAP50-95 {found.map50_95:.4f} uncut), {folder / PICTURE}")
    return result


class _Journal:
    """What was measured so far, kept on disk; the folder is only touched when there is something to keep."""

    def __init__(self, folder: Path, config: dict[str, Any], parents: dict[str, str]) -> None:
        self.path, self.identity, self.known = folder / JOURNAL, (config, parents), {}
        started = folder / manifest.STARTED
        if started.exists() and self.path.exists() and manifest.begin(folder, STAGE, config, parents):
            self.known = manifest.read_json(self.path)

    def get(self, key: str) -> float | None:
        """Return what was measured under a key."""
        return self.known.get(key)

    def add(self, key: str, value: float) -> None:
        """Keep a measurement."""
        if not self.known:
            manifest.begin(self.path.parent, STAGE, *self.identity)
        self.known[key] = value
        manifest.write_json(self.path, self.known)


def _measure(network: nn.Module, model: Path, data: Path, wanted: Wanted, journal: _Journal) -> Sensitivity:
    from compress.planning import score
    from compress.progress import track
    from compress.pruning.budget import ties
    from compress.settings import Budget, Prune
    from compress.training.mean_ap import sample_images, scorer

    chosen = sample_images(data, wanted.split, wanted.images, wanted.seed)
    measure = scorer(network, data, chosen, wanted.imgsz)
    mend = _mender(data, wanted)
    every_width = Budget(multiple_of=1, min_width=1, max_removed=1.0)
    if (dense := journal.get(_DENSE)) is None:
        dense, mended = _measure_dense(network, measure, mend, wanted)
        if dense <= 0.0:
            raise DataError(
                f"{model} finds nothing on {len(chosen)} images of {data}, '{wanted.split}': train it first"
            )
        journal.add(_MENDED, float(mended))
        journal.add(_DENSE, dense)
    mended = bool(journal.get(_MENDED))
    scored = score(network, Prune(percent=0.5, importance=wanted.importance), wanted.imgsz, wanted.seed, data)
    graph = scored.graph
    tied = [tie for tie in ties(graph, every_width) if len(tie.parts) > 1]
    if not tied:
        raise SettingsError(f"no group of channels of {model} may be cut: python -m compress.inspect {model} says why")
    found = []
    for tie in track(tied, "sensitivity"):
        groups = [graph.groups[index].name for index in tie.units]
        parts = {share: _part(tie, share) for share in sorted(wanted.shares)}
        left = {}
        for part in dict.fromkeys(parts.values()):
            key = f"{groups[0]} {part}"
            if (value := journal.get(key)) is None:
                cut = _cut(network, graph, scored.scores, tie, part)
                value = measure(mend(cut) if mended else cut)
                journal.add(key, value)
            left[1.0 - part / tie.parts[0]] = value
        found.append(Tie(groups=tuple(groups), removed=tuple(left), map50_95=tuple(left.values())))
    return Sensitivity(
        schema_version=SCHEMA,
        structure=checkpoint.structure_hash(network),
        model=model.name,
        data=data.name,
        split=wanted.split,
        imgsz=wanted.imgsz,
        images=len(chosen),
        importance=wanted.importance,
        repaired=mended,
        map50_95=dense,
        ties=tuple(found),
    )


def _measure_dense(network: nn.Module, measure: Measure, mend: Mend, wanted: Wanted) -> tuple[float, bool]:
    """Return the mAP without any cut, and whether mending batch norm can be trusted.

    The uncut model is mended too, so that no cut is charged with what the mending itself changes. Where that alone
    takes mAP away, as it does at another image size than that of the training, it would drown what a cut does.
    """
    plain = measure(network)
    if not wanted.repair:
        return plain, False
    mended = measure(mend(copy.deepcopy(network)))
    if mended >= _HARM * plain:
        return mended, True
    print(
        f"sensitivity: batch norm is left as it is, to mend it takes the uncut model from mAP50-95 {plain:.4f} to "
        f"{mended:.4f}: was it trained at {wanted.imgsz} px? More --images estimate better"
    )
    return plain, False


def _mender(data: Path, wanted: Wanted) -> Mend:
    """Return what re-estimates the batch-norm statistics of a network in place."""
    from compress.pruning.batch_norm import recalibrate_batch_norm
    from compress.training.mean_ap import sample_images

    train = sample_images(data, "train", wanted.images, wanted.seed)

    def mend(network: nn.Module) -> nn.Module:
        recalibrate_batch_norm(network, train, wanted.imgsz)
        return network

    return mend


def _part(tie: BudgetTie, share: float) -> int:
    """Return how many parts of a tie stay when about `share` of them goes: at least one goes and one stays."""
    wanted = tie.parts[0] * (1.0 - share)
    return min((part for part in tie.parts[1:] if part), key=lambda part: abs(part - wanted))


def _cut(network: nn.Module, graph: Graph, scores: list[np.ndarray], tie: BudgetTie, part: int) -> nn.Module:
    """Return a copy of a network in which one tie alone keeps the most important `part` of its parts."""
    from compress.pruning.budget import keep_best
    from compress.pruning.plan import make_plan
    from compress.pruning.surgery import apply_plan
    from compress.settings import Budget

    widths = graph.widths.copy()
    for index, units in tie.units.items():
        widths[index] = part * units
    choice = keep_best(graph, scores, widths, Budget(multiple_of=1, min_width=1, max_removed=1.0), STAGE)
    return apply_plan(network, make_plan(graph, choice, checkpoint.structure_hash(network), STAGE, STAGE))


def print_table(found: Sensitivity, count: int = 8) -> None:
    """Print the ties that lose most and least mAP at the largest share."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from compress.inspection.sensitivities import label

    ranked = sorted(found.ties, key=lambda tie: tie.map50_95[-1])
    shown = ranked if len(ranked) <= 2 * count else [*ranked[:count], *ranked[-count:]]
    table = Table(title=f"mAP50-95 with one tie cut, {found.map50_95:.4f} uncut; the dearest first")
    table.add_column("group", no_wrap=True)
    table.add_column("removed → mAP50-95")
    for tie in shown:
        steps = zip(tie.removed, tie.map50_95, strict=True)
        table.add_row(escape(label(tie)), ", ".join(f"{share:.0%} → {left:.4f}" for share, left in steps))
    Console().print(table)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Annotated[Path, typer.Option(help="checkpoint (.pt) that was trained on the data")],
    data: Annotated[str, typer.Option(help="data set YAML, or 'shapes' for the generated one")],
    more: Annotated[list[float] | None, typer.Argument(metavar="SHARE", help="more shares")] = None,
    output: Annotated[Path | None, typer.Option(help="folder of the result; below runs/sensitivity")] = None,
    split: Annotated[str, typer.Option(help="train, val or test")] = "val",
    shares: Annotated[list[float] | None, typer.Option(help="shares of a tie to remove; 0.25 0.5 0.75")] = None,
    importance: Annotated[Importance, typer.Option(help="which channels of a group go first")] = "taylor",
    images: Annotated[int, typer.Option(min=1, help="images that are scored, and that mend batch norm")] = 64,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair/--no-repair", help="re-estimate batch norm after a cut, unless that harms the uncut model"
        ),
    ] = True,
    imgsz: Annotated[int, typer.Option(min=32, help="side of the square input, px")] = 640,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Measure what every group of channels is worth in mAP, without training."""
    from compress.data.dataset import resolve
    from compress.pruning.sensitivity_file import load_sensitivity

    content: dict[str, Any] = {"split": split, "importance": importance, "images": images, "repair": repair}
    content |= {"imgsz": imgsz, "seed": seed}
    if given := [*(shares or []), *(more or [])]:
        content["shares"] = sorted(set(given))
    checkpoint.require_weights(model)
    result = sensitivity(model, resolve(data), parse(Wanted, content, STAGE), output)
    print_table(load_sensitivity(result, checkpoint.structure_hash(checkpoint.load_model(model))))


if __name__ == "__main__":
    run_app(app)
