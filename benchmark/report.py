"""The report of a run: what became of speed and accuracy, for people, in a page, in Markdown and in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmark import sections, wording
from benchmark.pages import Block, Heading, Plot, printable, to_html, to_markdown
from benchmark.plots import Point, image, interactive
from compress import manifest
from compress.errors import BenchmarkError, RunError, run_app

IMAGE = "pareto.png"

Run = tuple[dict[str, Any], dict[str, Any]]


def write_report(summary: dict[str, Any], record: dict[str, Any], folder: Path) -> None:
    """Write `report.md`, `report.html` (one page that needs no network) and `pareto.png` for one run.

    Args:
        summary: `summary.json` of a run.
        record: its benchmark record, as `benchmark.latency.measure` returns it.
        folder: where the files go.
    """
    write_reports([(summary, record)], folder)


def write_reports(runs: Sequence[Run], folder: Path) -> None:
    """Write one report about one or several runs; the plot shows all of them."""
    points = [point for summary, record in runs for point in _points(summary, record)]
    title = runs[0][0]["name"] if len(runs) == 1 else f"{len(runs)} runs side by side"
    plot: list[Block] = []
    if points:
        image(points, folder / IMAGE)
        plot = [Plot(IMAGE, interactive(points), _caption(points))]
    blocks: list[Block] = [Heading(1, title)]
    if len(runs) == 1:
        blocks += [*sections.opening(*runs[0]), *plot, *sections.details(*runs[0], level=2)]
    else:
        blocks += [sections.overview([summary for summary, _ in runs]), *plot]
        for summary, record in runs:
            blocks += [
                Heading(2, summary["name"]),
                *sections.opening(summary, record),
                *sections.details(summary, record, level=3),
            ]
    manifest.write_bytes_atomic(folder / "report.md", to_markdown(blocks).encode())
    manifest.write_bytes_atomic(folder / "report.html", to_html(f"{title} – Espalier", blocks).encode())


def print_table(summary: dict[str, Any]) -> None:
    """Print dense against pruned, the realised speed-up and the verdict to the terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text as RichText

    console = Console()
    for block in (sections.comparison(summary), sections.realised(summary)):
        table = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for index, name in enumerate(block.columns):
            table.add_column(name, justify="right" if index else "left")
        for row in block.rows:
            table.add_row(*(RichText(printable(cell)) for cell in row))
        console.print(table)
    console.print(printable(sections.verdict(summary)), markup=False)


def _points(summary: dict[str, Any], record: dict[str, Any]) -> list[Point]:
    cells = {(cell["model"], cell["runtime"]): cell for cell in record["cells"]}
    points = []
    for side in sections.SIDES:
        model = summary[side]
        for runtime, latency in model["latency_ms"].items():
            if latency["p50"] is None or model["map50_95"] is None:
                continue
            cell = cells.get((side, runtime))
            interval = tuple(cell["intervals"]["p50_ms"]) if cell else None
            details = (
                f"{runtime}: p50 {wording.number(latency['p50'], 2)} ms ({wording.interval(interval)}), "
                f"p90 {wording.number(latency['p90'], 2)} ms; mAP50-95 {model['map50_95']:.4f}; "
                f"{wording.size(model['macs'])} MACs"
            )
            points.append(Point(summary["name"], side, runtime, latency["p50"], interval, model["map50_95"], details))
    return points


def _caption(points: Sequence[Point]) -> str:
    several = len({point.run for point in points}) > 1
    colours = ", colours tell the runs apart" if several else ""
    return (
        f"Latency against mAP. Hollow marks are dense, filled ones pruned{colours}; bars are 95 % intervals of the p50."
    )


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="run folders, such as runs/demo")],
    output: Annotated[Path | None, typer.Option(help="folder of the report; the run folder if there is one")] = None,
) -> None:
    """Write the report of a run anew, or one report about several runs."""
    if output is None and len(runs) > 1:
        raise BenchmarkError("a report about several runs needs a folder of its own: add --output DIR")
    folder = output or runs[0]
    loaded = [_read(run) for run in runs]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        write_reports(loaded, folder)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        names = ", ".join(str(run) for run in runs)
        raise RunError(
            f"{names}: the summary or the record is incomplete ({error!r}): run the pipeline again"
        ) from None
    for summary, _ in loaded:
        print_table(summary)
    print(f"report: {folder / 'report.html'}")


def _read(run: Path) -> Run:
    summary, record = run / "summary.json", run / "06_benchmark" / "latency.json"
    for path in (summary, record):
        if not path.is_file():
            raise RunError(f"{path} does not exist: give the folder of a finished run, such as runs/demo")
    return manifest.read_json(summary), manifest.read_json(record)


if __name__ == "__main__":
    run_app(app)
