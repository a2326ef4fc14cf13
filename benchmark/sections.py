"""The parts of a report about a pipeline run, as blocks: the verdict, tables, device, protocol and parity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmark import wording
from benchmark.pages import Block, Code, Facts, Heading, Table, Text

SIDES = ("dense", "pruned")


def verdict(summary: dict[str, Any]) -> str:
    """Return in one sentence what pruning brought, on onnxruntime if it was measured there."""
    accuracy = _accuracy_change(summary)
    runtime = _headline(summary)
    if runtime is None:
        return f"The latency was not measured; the mAP50-95 of the pruned model {accuracy}."
    ratio = summary["speedup"][runtime]
    low, high = summary["speedup_interval"].get(runtime) or (ratio, ratio)
    dense, pruned = (summary[side]["latency_ms"][runtime]["p50"] for side in SIDES)
    times = f"p50 {wording.number(pruned, 2)} ms instead of {wording.number(dense, 2)} ms"
    if low > 1.0:
        speed = f"In {runtime} the pruned model is {ratio:.2f} times as fast as the dense one ({times})"
    elif high < 1.0:
        speed = f"In {runtime} the pruned model is slower than the dense one, {ratio:.2f} times its speed ({times})"
    else:
        speed = f"In {runtime} the pruned model is not measurably faster than the dense one ({times})"
    return f"{speed}, and its mAP50-95 {accuracy}."


def opening(summary: dict[str, Any], record: dict[str, Any]) -> list[Block]:
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
                f"{wording.share(summary['realised'].get(runtime))} of that became speed in {runtime}."
            )
        )
    if protocol["mode"] == "quick":
        blocks.append(Text("Quick measurement: for development, not for publication.", "warning"))
    if record["noisy"]:
        blocks.append(Text(f"Noisy measurement: {'; '.join(record['noise'])}.", "warning"))
    return blocks


def details(summary: dict[str, Any], record: dict[str, Any], level: int) -> list[Block]:
    """Return tables of what was measured, and on what, how and from what it can be measured again."""
    return [
        Heading(level, "Dense against pruned"),
        comparison(summary),
        Text("Ratio is dense over pruned; for mAP it is the difference. File size is that of the ONNX file.", "note"),
        Heading(level, "Realised speed-up"),
        realised(summary),
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


def overview(summaries: Sequence[dict[str, Any]]) -> Table:
    """Return one row for each run and runtime."""
    rows = [
        [
            f"{summary['name']}, {runtime}",
            *(wording.number(summary[side]["map50_95"], 3) for side in SIDES),
            wording.ratio(summary["macs_speedup"]),
            wording.ratio(ratio),
            wording.share(summary["realised"].get(runtime)),
        ]
        for summary in summaries
        for runtime, ratio in summary["speedup"].items()
    ]
    return Table(["run", "dense mAP50-95", "pruned mAP50-95", "MACs speed-up", "speed-up", "realised"], rows)


def comparison(summary: dict[str, Any]) -> Table:
    """Return dense against pruned, row by row."""
    dense, pruned = (summary[side] for side in SIDES)
    rows = [
        [name, *(wording.number(side[key], 4) for side in (dense, pruned)), wording.difference(dense[key], pruned[key])]
        for name, key in (("mAP50-95", "map50_95"), ("mAP50", "map50"))
    ]
    rows += [
        [name, *(wording.size(side[key], unit) for side in (dense, pruned)), wording.quotient(dense[key], pruned[key])]
        for name, key, unit in (("parameters", "params", ""), ("MACs", "macs", ""), ("file size", "file_bytes", "B"))
    ]
    rows.append(["training epochs", *(str(side["epochs"]) for side in (dense, pruned)), ""])
    for runtime in dense["latency_ms"]:
        for key in ("p50", "p90"):
            values = [side["latency_ms"].get(runtime, {}).get(key) for side in (dense, pruned)]
            rows.append(
                [f"{runtime} {key}, ms", *(wording.number(value, 2) for value in values), wording.quotient(*values)]
            )
    return Table(["", "dense", "pruned", "ratio"], rows)


def realised(summary: dict[str, Any]) -> Table:
    """Return the speed-up of each runtime as a share of what the MACs promise."""
    rows = [
        [
            runtime,
            wording.ratio(ratio),
            wording.interval(summary["speedup_interval"].get(runtime)),
            wording.ratio(summary["macs_speedup"]),
            wording.share(summary["realised"].get(runtime)),
        ]
        for runtime, ratio in summary["speedup"].items()
    ]
    return Table(["runtime", "speed-up", "95 % interval", "MACs speed-up", "realised"], rows)


def _cells(record: dict[str, Any]) -> Table:
    rows = [
        [
            f"{cell['model']}, {cell['runtime']} {cell['runtime_version'] or ''}".rstrip(),
            wording.number(cell["p50_ms"], 2),
            wording.interval(cell["intervals"]["p50_ms"]),
            wording.number(cell["p90_ms"], 2),
            wording.number(cell["p99_ms"], 2),
            str(cell["queries"]),
            wording.number(cell["cold_start_ms"], 0),
            wording.size(cell["peak_memory_bytes"], "B"),
        ]
        for cell in record["cells"]
    ]
    columns = ["", "p50 ms", "95 % interval", "p90 ms", "p99 ms", "queries", "cold start ms", "peak memory"]
    return Table(columns, rows)


def _device(device: dict[str, Any]) -> list[tuple[str, str]]:
    start, end, others = device["start"], device["end"], device["others_cores"]

    def change(key: str) -> str:
        return (
            wording.UNKNOWN
            if start[key] is None
            else f"{wording.known(start[key])} at the start, {wording.known(end[key])} at the end"
        )

    return [
        ("CPU", wording.known(device["cpu"])),
        ("architecture", wording.known(device["architecture"])),
        ("cores", f"{wording.known(device['cores'])}, usable {wording.known(device['usable_cores'])}"),
        ("memory", wording.size(device["memory_bytes"], "B")),
        ("operating system", f"{device['os']}, {device['kernel']}"),
        ("container", wording.known(device["container"])),
        ("virtual machine", {True: "yes", False: "no"}.get(device["virtual_machine"], wording.UNKNOWN)),
        ("governor", wording.known(start["governor"])),
        ("clock, MHz", change("frequency_mhz")),
        ("temperature, °C", change("temperature_c")),
        ("load average", change("load_average")),
        ("busy with other work", wording.UNKNOWN if others is None else f"{others:.2f} cores"),
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
