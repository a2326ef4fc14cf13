"""Look at a model before anything is cut: its channel groups, what they cost, and what is frozen by what."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.errors import EspalierError, SettingsError, printable, run_app
from compress.settings import Budget, load_budget

if TYPE_CHECKING:
    from torch import nn

    from compress.channels.graph import Graph
    from compress.inspection.overview import Overview

SCHEMA = 1
_SHOWN = 3  # names in a cell, before "+ n"
_FILE_COLUMNS = 170  # where the output is no terminal
_WIDE_COLUMNS = 120  # a narrower terminal has no room for the layers of a group

_HEADER = (
    "MACs, params: what would be gone if the whole group were, at the layers that make it and at those that read it; "
    "a weight between two groups counts for both, so the columns sum to more than 100 %. "
    "Groups of one tie keep the same width."
)
_NARROW = "The layers that carry and read each group are shown with --layers, --html, or in a wider terminal."


def inspect(model: str, imgsz: int, budget: Budget) -> tuple[nn.Module, Graph, Overview]:
    """Open a model of any task and return it with its channel graph and what that holds under a budget.

    Raises:
        CheckpointError: missing, damaged, or not a model.
        GraphError: the model cannot be traced at this image size.
    """
    from compress.channels.graph import build_graph
    from compress.checkpoint import load_model
    from compress.inspection.overview import overview

    opened: Any = load_model(model)
    opened = getattr(opened, "student_model", opened)  # one that is being distilled has its teacher along
    channels = getattr(opened, "yaml", {}).get("channels", 3)
    graph = build_graph(opened, imgsz, channels)
    return opened, graph, overview(graph, budget)


def as_json(found: Overview, model: str, imgsz: int, budget: Budget) -> dict[str, Any]:
    """Return the overview as plain values; shares are between 0 and 1."""
    return {
        "schema": SCHEMA,
        "model": model,
        "imgsz": imgsz,
        "budget": budget.model_dump(mode="json"),
        "totals": {
            "groups": len(found.groups),
            "prunable_groups": len(found.prunable),
            "channels": sum(row.width for row in found.groups),
            "prunable_channels": found.prunable_channels,
            **{key: value for key, value in asdict(found).items() if key not in ("groups", "frozen")},
        },
        "groups": [asdict(row) for row in found.groups],
        "frozen": [asdict(row) for row in found.frozen],
    }


def print_overview(found: Overview, title: str, *, all_layers: bool) -> None:
    """Print the groups, their sums, and what is frozen.

    Args:
        all_layers: print every layer's name, instead of shortened and counted ones.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from compress.inspection.overview import short_widths

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_FILE_COLUMNS)

    def names(short: tuple[str, ...], whole: tuple[str, ...]) -> str:
        if all_layers:
            return escape("\n".join(map(printable, whole)))
        more = f" + {len(short) - _SHOWN}" if len(short) > _SHOWN else ""
        return escape(printable(", ".join(short[:_SHOWN]))) + more

    wide = all_layers or console.width >= _WIDE_COLUMNS
    table = Table(title=escape(printable(title)), title_justify="left", box=None, header_style="bold", pad_edge=False)
    for heading in ("#", "group", "width", "allowed", "MACs", "params", "tie"):
        justify = "left" if heading in ("group", "allowed") else "right"
        table.add_column(heading, justify=justify, no_wrap=True)
    for heading in ("layers" if all_layers else "also in", "read by") if wide else ():
        table.add_column(heading, overflow="fold")
    for row in found.groups:
        cells = [
            str(row.number),
            escape(printable(row.name)),
            str(row.width),
            "[dim]frozen[/dim]" if row.frozen else short_widths(row.allowed),
            f"{row.macs:.1%}",
            f"{row.params:.1%}",
            str(row.tie or ""),
        ]
        if wide:
            cells += [names(row.also_in, row.layers), names(row.read_by, row.consumers)]
        table.add_row(*cells)
    console.print(_HEADER if wide else f"{_HEADER} {_NARROW}", style="dim")
    console.print(table)
    _print_totals(console, found)
    frozen = Table(title="frozen", title_justify="left", box=None, header_style="bold", pad_edge=False)
    frozen.add_column("channels", justify="right")
    for heading in ("by", "layers", "groups"):
        frozen.add_column(heading, overflow="fold")
    for row in found.frozen:
        numbers = ", ".join(map(str, row.groups))
        frozen.add_row(str(row.channels), escape(printable(row.reason)), names(row.layers, row.layers), numbers)
    if found.frozen:
        console.print()
        console.print(frozen)


def _print_totals(console: Any, found: Overview) -> None:
    prunable, channels = len(found.prunable), sum(row.width for row in found.groups)
    free = f"{found.prunable_channels:,} of {channels:,} channels"
    console.print(f"\n  groups: {len(found.groups)}, {prunable} of them can be pruned ({free})")
    for name, count, share, least in (
        ("MACs", found.macs, found.prunable_macs, found.least_macs),
        ("params", found.params, found.prunable_params, found.least_params),
    ):
        console.print(
            f"{name:>8}: {count:,}, {share:.1%} of them in prunable groups; "
            f"{least:.1%} are left at the least allowed widths"
        )


def _title(model: Path) -> str:
    """Return what a model is called; every stage calls its own model.pt, so that the folder says which it is.

    >>> _title(Path("runs/slim/prune/model.pt")), _title(Path("weights/yolov8n.pt")), _title(Path("model.pt"))
    ('prune/model.pt', 'yolov8n.pt', 'model.pt')
    """
    return "/".join(model.parts[-2:]) if model.name == "model.pt" else model.name


def _check_output(path: Path | None, suffix: str, option: str) -> None:
    """Meet mistakes before the model is opened, and never write over a file of another kind, such as the model.

    Raises:
        SettingsError: another suffix, a folder, or a place where nothing can be written.
    """
    if path is None:
        return
    if path.suffix.lower() != suffix:
        raise SettingsError(f"{option} {path} must end with {suffix}")
    if path.is_dir():
        raise SettingsError(f"{option} {path} is a folder: give the name of a file")
    place = next(folder for folder in path.absolute().parents if folder.exists())
    if not place.is_dir():
        raise SettingsError(f"{option} {path}: {place} is no folder: choose another")


def _write(path: Path, content: bytes, option: str) -> None:
    from compress.manifest import write_bytes_atomic

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes_atomic(path, content)
    except OSError as error:
        raise EspalierError(f"{option} {path} cannot be written ({error.strerror}): choose another path") from None
    print(f"inspect: {path}")


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Annotated[str | None, typer.Argument(help="checkpoint (.pt) or architecture (.yaml) of any task")] = None,
    model_option: Annotated[str | None, typer.Option("--model", help="the same, as other commands name it")] = None,
    imgsz: Annotated[int, typer.Option(min=32, help="side of the square input, px")] = 640,
    budget: Annotated[Path | None, typer.Option(help="allowed widths: a file of configs/budgets/, or a device")] = None,
    gamma: Annotated[Path | None, typer.Option(help="draw the histograms of γ (.png)")] = None,
    html: Annotated[Path | None, typer.Option(help="draw the channel graph as a page (.html)")] = None,
    json: Annotated[Path | None, typer.Option(help="write all of it as data (.json)")] = None,
    layers: Annotated[bool, typer.Option("--layers", help="print every layer's name, none shortened")] = False,
) -> None:
    """Show the channel groups of a model, and what is frozen by what."""
    if (model is None) == (model_option is None):
        raise SettingsError("name one model: python -m compress.inspect MODEL")
    model = model or model_option or ""
    for path, suffix, option in ((gamma, ".png", "--gamma"), (html, ".html", "--html"), (json, ".json", "--json")):
        _check_output(path, suffix, option)
    rules = load_budget(budget) if budget else Budget()
    from rich.console import Console

    with Console(stderr=True).status(f"tracing {Path(model).name!r}"):  # silent where that is not a terminal
        opened, graph, found = inspect(model, imgsz, rules)
    name = _title(Path(model))
    print_overview(found, f"{name}, {imgsz} px", all_layers=layers)
    if json:
        import json as encoder

        content = as_json(found, model, imgsz, rules)
        _write(json, (encoder.dumps(content, indent=1, ensure_ascii=False) + "\n").encode(), "--json")
    if html:
        from compress.inspection.blocks import blocks
        from compress.inspection.graph_page import page

        _write(html, page(name, blocks(graph, opened), found, imgsz).encode(), "--html")
    if gamma:
        from compress.inspection.gammas import gamma_png, prunable_gammas, start_mean, title_of
        from compress.training.penalty import NEAR_ZERO

        frozen = [row.frozen for row in found.groups]
        gammas = prunable_gammas(graph, opened, frozen, NEAR_ZERO, start_mean(Path(model).parent))
        _write(gamma, gamma_png(gammas, title_of(gammas, found.prunable_channels, name)), "--gamma")


if __name__ == "__main__":
    run_app(app)
