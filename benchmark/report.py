"""The report of one or several benchmarks: one page that needs no network, Markdown, CSV and an image of each plot.

It takes a pipeline's run, and any folder in which latency or accuracy left its record.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmark import charts, facts, plots, sections, sources
from benchmark.entries import Entry, entries, panels, short_table, table, to_csv
from benchmark.latency_record import noise_remark
from benchmark.pages import (
    Block,
    Code,
    Heading,
    Plot,
    Table,
    Text,
    plain,
    text_columns,
    to_html,
    to_markdown,
)
from benchmark.runtimes import distinct_names
from benchmark.sources import Source
from compress import manifest
from compress.errors import RunError, printable, run_app

IMAGE = "pareto.png"
FILES = ("report.html", "report.md", "report.csv")


def write_report(summary: dict[str, Any], record: dict[str, Any], folder: Path) -> None:
    """Write the report of a pipeline's run, as `write_reports` does.

    Args:
        summary: `summary.json` of the run.
        record: its benchmark record, as `benchmark.latency.measure` returns it.
        folder: where the files go; scores of each runtime are read from the run that is there.
    """
    accuracy = folder / sources.BENCHMARK / sources.ACCURACY
    known = sources.scores_of(accuracy) if accuracy.is_file() else None
    write_reports([sources.of_pipeline(summary, record, known)], folder)


def write_reports(found: Sequence[Source], folder: Path) -> list[Entry]:
    """Write one report, and return its rows.

    It is `report.html`, one page that needs no network, `report.md` and `report.csv`, and a picture of each plot:
    `pareto.png`, `pareto-2.png` …
    """
    rows = entries(found)
    title = found[0].name if len(found) == 1 else f"{len(found)} runs side by side"
    figures: list[Block] = []
    for number, panel in enumerate(panels(rows), 1):
        name = IMAGE if number == 1 else f"pareto-{number}.png"
        plots.image(panel, folder / name)
        figures.append(Plot(name, charts.pareto(panel), plots.caption(panel)))
    blocks: list[Block] = [Heading(1, printable(title))]
    if len(found) == 1:
        blocks += [*_opening(found[0]), *figures, *_details(found[0], rows, 2, _all_rows(rows, 2))]
    else:
        pipelines = [source.summary for source in found if source.summary]
        blocks += [sections.overview(pipelines)] if pipelines else []
        blocks += [*figures, *_all_rows(rows, 2)]
        for source in found:
            own = [row for row in rows if row.run == source.name]
            blocks += [Heading(2, source.name), *_opening(source), *_details(source, own, 3)]
    contents = (to_html(f"{title} – Espalier", blocks), to_markdown(blocks), to_csv(rows))
    for name, content in zip(FILES, contents, strict=True):
        manifest.write_bytes_atomic(folder / name, content.encode(errors="replace"))
    return rows


def print_table(summary: dict[str, Any], record: dict[str, Any]) -> None:
    """Print dense against pruned, the realised speed-up, the verdict of a pipeline, and why it may be doubted."""
    for block in (sections.comparison(summary), sections.realised(summary)):
        _print(block)
    for line in (sections.verdict(summary), noise_remark(record)):
        if line:
            print(printable(line))


def _opening(source: Source) -> list[Block]:
    blocks: list[Block] = sections.opening(source.summary, source.records[0]) if source.summary else []
    return blocks + list(dict.fromkeys(block for record in source.records for block in facts.warnings(record)))


def _all_rows(rows: Sequence[Entry], level: int) -> list[Block]:
    blocks: list[Block] = [Heading(level, "All measurements"), table(rows)]
    if any(row.cost and row.cost.unit == "ms" for row in rows):
        blocks.append(Text("p50, p90 and p99 of single queries. No query was dropped for being slow.", "note"))
    if any(row.cost and row.cost.unit == "instructions" for row in rows):
        blocks.append(Text("Instructions were counted by an emulator; how long they take, nobody measured.", "note"))
    missing = sum(1 for row in rows if row.cost and not row.score)
    if missing:
        blocks.append(
            Text(
                f"Without a score, and so in no plot: {missing} of {len(rows)} rows. Run benchmark.accuracy on the "
                "very files that were timed.",
                "note",
            )
        )
    return blocks


def _details(source: Source, rows: Sequence[Entry], level: int, more: Sequence[Block] = ()) -> list[Block]:
    blocks: list[Block] = sections.details(source.summary, level) if source.summary else []
    blocks += more
    for record in source.records:
        compared = [] if source.summary else facts.comparisons(record)
        blocks += [Heading(level, "Against the first model"), *compared] if compared else []
    blocks += facts.layers(rows, level)
    for record in source.records:
        blocks += [Heading(level, "Device"), facts.device(record), Heading(level, "Protocol"), facts.protocol(record)]
    if source.summary or source.parity:
        blocks += facts.parity(source.parity, level)
    if source.summary:
        blocks += [Heading(level, "Reproduce"), Code(source.summary["commands"])]
    return blocks


def _distinct(found: dict[Path, Source]) -> list[Source]:
    """Return the sources of folders; if two have the same name, all are named by their paths, as short as can be."""
    names = [source.name for source in found.values()]
    if len(set(names)) < len(names):
        names = distinct_names(list(found))
    return [
        replace(source, name=name, summary=source.summary and {**source.summary, "name": name})
        for source, name in zip(found.values(), names, strict=True)
    ]


def _print(block: Table) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text as RichText

    texts = text_columns(block)
    shown = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for index, name in enumerate(block.columns):
        # Where the terminal is too narrow, names are folded and numbers stay whole.
        is_number = index not in texts
        shown.add_column(name, justify="right" if is_number else "left", no_wrap=is_number, overflow="fold")
    for row in block.rows:
        shown.add_row(*(RichText(printable(plain(cell))) for cell in row))
    Console().print(shown)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    runs: Annotated[
        list[Path], typer.Argument(metavar="FOLDER", help="runs, or folders of benchmark.latency and accuracy")
    ],
    output: Annotated[
        Path | None, typer.Option(help="folder of the report; that of the run, or 'report' beside several")
    ] = None,
) -> None:
    """Write a report about one or several runs or benchmarks."""
    for run in runs:
        if not run.exists():
            raise RunError(f"{run} does not exist: check the path")
    paths = list(dict.fromkeys(run.resolve() for run in runs))
    folder = output or (runs[0] if len(paths) == 1 else Path(os.path.commonpath(paths)) / "report")
    read = {path: sources.read(path) for path in paths if path != folder.resolve() or len(paths) == 1}
    found = _distinct({path: source for path, source in read.items() if source})
    if not found:
        names = ", ".join(str(run) for run in runs)
        raise RunError(f"no record of a benchmark in {names}: give the folder of a finished run, such as runs/demo")
    for path in (path for path, source in read.items() if source is None and path.is_dir()):
        print(f"report: {printable(str(path))} holds no record, left out")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        rows = write_reports(found, folder)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        names = ", ".join(source.name for source in found)
        raise RunError(
            f"{names}: the summary or the record is incomplete ({error!r}): run the pipeline or the benchmark again"
        ) from None
    if any(source.summary is None for source in found):
        _print(short_table(rows))
    for source in found:
        if source.summary and len(found) > 1:
            print(f"\n{printable(source.name)}")
        if source.summary:
            print_table(source.summary, source.records[0])
    print(f"report: {folder / FILES[0]}")


if __name__ == "__main__":
    run_app(app)
