"""The report of a run: what became of speed and accuracy, for people, in a page, in Markdown and in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmark.pages import Block, Code, Facts, Heading, Plot, Table, Text, printable, to_html, to_markdown
from benchmark.plots import Point, image, interactive
from compress import manifest
from compress.errors import BenchmarkError, RunError, run_app

SIDES = ("dense", "pruned")
IMAGE = "pareto.png"
UNKNOWN = "–"

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
        blocks += [*_opening(*runs[0]), *plot, *_details(*runs[0], level=2)]
    else:
        blocks += [_overview([summary for summary, _ in runs]), *plot]
        for summary, record in runs:
            blocks += [Heading(2, summary["name"]), *_opening(summary, record), *_details(summary, record, level=3)]
    manifest.write_bytes_atomic(folder / "report.md", to_markdown(blocks).encode())
    manifest.write_bytes_atomic(folder / "report.html", to_html(f"{title} – Espalier", blocks).encode())


def verdict(summary: dict[str, Any]) -> str:
    """Return in one sentence what pruning brought, on onnxruntime if it was measured there."""
    accuracy = _accuracy_change(summary)
    runtime = _headline(summary)
    if runtime is None:
        return f"The latency was not measured; the mAP50-95 of the pruned model {accuracy}."
    ratio = summary["speedup"][runtime]
    low, high = summary["speedup_interval"].get(runtime) or (ratio, ratio)
    dense, pruned = (summary[side]["latency_ms"][runtime]["p50"] for side in SIDES)
    times = f"p50 {_number(pruned, 2)} ms instead of {_number(dense, 2)} ms"
    if low > 1.0:
        speed = f"In {runtime} the pruned model is {ratio:.2f} times as fast as the dense one ({times})"
    elif high < 1.0:
        speed = f"In {runtime} the pruned model is slower than the dense one, {ratio:.2f} times its speed ({times})"
    else:
        speed = f"In {runtime} the pruned model is not measurably faster than the dense one ({times})"
    return f"{speed}, and its mAP50-95 {accuracy}."


def print_table(summary: dict[str, Any]) -> None:
    """Print dense against pruned, the realised speed-up and the verdict to the terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text as RichText

    console = Console()
    for block in (_comparison(summary), _realised(summary)):
        table = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for index, name in enumerate(block.columns):
            table.add_column(name, justify="right" if index else "left")
        for row in block.rows:
            table.add_row(*(RichText(printable(cell)) for cell in row))
        console.print(table)
    console.print(printable(verdict(summary)), markup=False)


def _opening(summary: dict[str, Any], record: dict[str, Any]) -> list[Block]:
    """Return the verdict, what it was measured on, and what to beware of."""
    protocol = record["protocol"]
    cpu = record["device"]["cpu"] or "an unknown CPU"
    threads = "one thread" if protocol["threads"] == 1 else f"{protocol['threads']} threads"
    blocks: list[Block] = [
        Text(f"mAP on the {summary['split']} split of {summary['data']}, {summary['imgsz']} px.", "note"),
        Text(f"Latency of one image on {cpu} with {threads}.", "note"),
        Text(verdict(summary), "lead"),
    ]
    if runtime := _headline(summary):
        blocks.append(
            Text(
                f"The pruned model needs {summary['macs_speedup']:.2f} times fewer multiply-accumulates; "
                f"{_share(summary['realised'].get(runtime))} of that became speed in {runtime}."
            )
        )
    if protocol["mode"] == "quick":
        blocks.append(Text("Quick measurement: for development, not for publication.", "warning"))
    if record["noisy"]:
        blocks.append(Text(f"Noisy measurement: {'; '.join(record['noise'])}.", "warning"))
    return blocks


def _details(summary: dict[str, Any], record: dict[str, Any], level: int) -> list[Block]:
    return [
        Heading(level, "Dense against pruned"),
        _comparison(summary),
        Text("Ratio is dense over pruned; for mAP it is the difference. File size is that of the ONNX file.", "note"),
        Heading(level, "Realised speed-up"),
        _realised(summary),
        Text("Realised is the speed-up as a share of the speed-up that the MACs promise.", "note"),
        Heading(level, "Latency"),
        _cells(record),
        Text(f"Intervals: {record['protocol']['interval']}. No query was dropped for being slow.", "note"),
        Heading(level, "Device"),
        Facts(_device(record["device"])),
        Heading(level, "Protocol"),
        Facts(_protocol(record["protocol"])),
        Heading(level, "Parity with PyTorch"),
        *_parity(summary.get("parity") or {}),
        Heading(level, "Reproduce"),
        Code(summary["commands"]),
    ]


def _overview(summaries: Sequence[dict[str, Any]]) -> Table:
    rows = [
        [
            f"{summary['name']}, {runtime}",
            *(_number(summary[side]["map50_95"], 3) for side in SIDES),
            _ratio(summary["macs_speedup"]),
            _ratio(ratio),
            _share(summary["realised"].get(runtime)),
        ]
        for summary in summaries
        for runtime, ratio in summary["speedup"].items()
    ]
    return Table(["run", "dense mAP50-95", "pruned mAP50-95", "MACs speed-up", "speed-up", "realised"], rows)


def _comparison(summary: dict[str, Any]) -> Table:
    dense, pruned = (summary[side] for side in SIDES)
    rows = [
        [name, *(_number(side[key], 4) for side in (dense, pruned)), _difference(dense[key], pruned[key])]
        for name, key in (("mAP50-95", "map50_95"), ("mAP50", "map50"))
    ]
    rows += [
        [name, *(_size(side[key], unit) for side in (dense, pruned)), _quotient(dense[key], pruned[key])]
        for name, key, unit in (("parameters", "params", ""), ("MACs", "macs", ""), ("file size", "file_bytes", "B"))
    ]
    rows.append(["training epochs", *(str(side["epochs"]) for side in (dense, pruned)), ""])
    for runtime in dense["latency_ms"]:
        for key in ("p50", "p90"):
            values = [side["latency_ms"].get(runtime, {}).get(key) for side in (dense, pruned)]
            rows.append([f"{runtime} {key}, ms", *(_number(value, 2) for value in values), _quotient(*values)])
    return Table(["", "dense", "pruned", "ratio"], rows)


def _realised(summary: dict[str, Any]) -> Table:
    rows = [
        [
            runtime,
            _ratio(ratio),
            _interval(summary["speedup_interval"].get(runtime)),
            _ratio(summary["macs_speedup"]),
            _share(summary["realised"].get(runtime)),
        ]
        for runtime, ratio in summary["speedup"].items()
    ]
    return Table(["runtime", "speed-up", "95 % interval", "MACs speed-up", "realised"], rows)


def _cells(record: dict[str, Any]) -> Table:
    rows = [
        [
            f"{cell['model']}, {cell['runtime']} {cell['runtime_version'] or ''}".rstrip(),
            _number(cell["p50_ms"], 2),
            _interval(cell["intervals"]["p50_ms"]),
            _number(cell["p90_ms"], 2),
            _number(cell["p99_ms"], 2),
            str(cell["queries"]),
            _number(cell["cold_start_ms"], 0),
            _size(cell["peak_memory_bytes"], "B"),
        ]
        for cell in record["cells"]
    ]
    columns = ["", "p50 ms", "95 % interval", "p90 ms", "p99 ms", "queries", "cold start ms", "peak memory"]
    return Table(columns, rows)


def _device(device: dict[str, Any]) -> list[tuple[str, str]]:
    start, end = device["start"], device["end"]

    def change(key: str) -> str:
        return UNKNOWN if start[key] is None else f"{_known(start[key])} at the start, {_known(end[key])} at the end"

    return [
        ("CPU", _known(device["cpu"])),
        ("architecture", _known(device["architecture"])),
        ("cores", f"{_known(device['cores'])}, usable {_known(device['usable_cores'])}"),
        ("memory", _size(device["memory_bytes"], "B")),
        ("operating system", f"{device['os']}, {device['kernel']}"),
        ("container", _known(device["container"])),
        ("virtual machine", {True: "yes", False: "no"}.get(device["virtual_machine"], UNKNOWN)),
        ("governor", _known(start["governor"])),
        ("clock, MHz", change("frequency_mhz")),
        ("temperature, °C", change("temperature_c")),
        ("load average", change("load_average")),
        ("busy with other work", "–" if device["others_cores"] is None else f"{device['others_cores']:.2f} cores"),
    ]


def _protocol(protocol: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        ("mode", protocol["label"]),
        ("least per cell", f"{protocol['min_queries']} queries and {protocol['min_seconds']:g} s"),
        ("turns", f"{protocol['rounds']} rounds, shuffled, in bursts of {protocol['burst_s']:g} s"),
        ("lead-in of each burst", f"{protocol['lead_in_queries']} queries, not counted"),
        ("image", f"batch {protocol['batch']}, {protocol['imgsz']} px, {protocol['input']}"),
        ("timed", protocol["timed"]),
        ("threads", str(protocol["threads"])),
        ("seed", str(protocol["seed"])),
        ("duration", f"{protocol['seconds']:g} s in all"),
    ]


def _parity(parity: dict[str, Any]) -> list[Block]:
    if not parity:
        return [Text("Not recorded.", "note")]
    rows = []
    for name, item in parity.items():
        output, found = item["outputs"][0], item.get("detections")
        runtime = item.get("runtime", "onnxruntime")
        rows.append(
            [
                name,
                "passed" if item["passed"] else "FAILED",
                str(item["images"]),
                f"{output['max_box_error_px']:.2g}" if "max_box_error_px" in output else "",
                f"{output['max_score_error']:.2g}" if "max_score_error" in output else "",
                f"{found['torch']} / {found[runtime]}" if found else "",
                str(found["unmatched"]) if found else "",
            ]
        )
    columns = ["", "parity", "images", "box error px", "score error", "detections torch / export", "unmatched"]
    return [Table(columns, rows)]


def _points(summary: dict[str, Any], record: dict[str, Any]) -> list[Point]:
    cells = {(cell["model"], cell["runtime"]): cell for cell in record["cells"]}
    points = []
    for side in SIDES:
        model = summary[side]
        for runtime, latency in model["latency_ms"].items():
            if latency["p50"] is None or model["map50_95"] is None:
                continue
            cell = cells.get((side, runtime))
            interval = tuple(cell["intervals"]["p50_ms"]) if cell else None
            details = (
                f"{runtime}: p50 {_number(latency['p50'], 2)} ms ({_interval(interval)}), "
                f"p90 {_number(latency['p90'], 2)} ms; mAP50-95 {model['map50_95']:.4f}; {_size(model['macs'])} MACs"
            )
            points.append(Point(summary["name"], side, runtime, latency["p50"], interval, model["map50_95"], details))
    return points


def _caption(points: Sequence[Point]) -> str:
    several = len({point.run for point in points}) > 1
    colours = ", colours tell the runs apart" if several else ""
    return (
        f"Latency against mAP. Hollow marks are dense, filled ones pruned{colours}; bars are 95 % intervals of the p50."
    )


def _headline(summary: dict[str, Any]) -> str | None:
    """Return the runtime that the verdict speaks of: onnxruntime, else the first that was measured."""
    speedup = summary["speedup"]
    return "onnxruntime" if "onnxruntime" in speedup else next(iter(speedup), None)


def _accuracy_change(summary: dict[str, Any]) -> str:
    dense, pruned = (summary[side]["map50_95"] for side in SIDES)
    if dense is None or pruned is None:
        return "is unknown"
    change = round(pruned, 3) - round(dense, 3)
    if abs(change) < 0.0005:
        return f"is the same ({dense:.3f})"
    return f"is {abs(change):.3f} {'higher' if change > 0 else 'lower'} ({pruned:.3f} instead of {dense:.3f})"


def _number(value: float | None, digits: int) -> str:
    return UNKNOWN if value is None else f"{value:.{digits}f}"


def _size(value: float | None, unit: str = "") -> str:
    if value is None:
        return UNKNOWN
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:g} {unit}".rstrip()


def _ratio(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.2f}×"


def _quotient(dense: float | None, pruned: float | None) -> str:
    return _ratio(None if dense is None or not pruned else dense / pruned)


def _difference(dense: float | None, pruned: float | None) -> str:
    return UNKNOWN if dense is None or pruned is None else f"{pruned - dense:+.4f}".replace("-", "−")


def _share(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.0%}".replace("%", " %")


def _interval(value: Sequence[float] | None) -> str:
    return UNKNOWN if value is None else f"{value[0]:.2f}–{value[1]:.2f}"


def _known(value: object) -> str:
    if isinstance(value, list):
        return " ".join(str(item) for item in value)
    return UNKNOWN if value is None else str(value)


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
