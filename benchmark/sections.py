"""The parts of a report about a pipeline's run: what was cut, what it brought, and the sentence that says so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmark import wording
from benchmark.pages import Block, Heading, Table, Text
from compress.tasks import SCORE_NAMES

SIDES = ("dense", "pruned")


def metrics(summary: dict[str, Any]) -> list[str]:
    """Return by what the models of a run are judged, what matters first: mAP50-95 and mAP50, or top-1 and top-5."""
    return [metric for metric in SCORE_NAMES if metric in summary["dense"]]


def verdict(summary: dict[str, Any]) -> str:
    """Return in one sentence what pruning brought, on onnxruntime if it was measured there."""
    accuracy, name = _accuracy_change(summary), SCORE_NAMES[metrics(summary)[0]]
    runtime = _headline(summary)
    if runtime is None:
        return f"The latency was not measured; the {name} of the pruned model {accuracy}."
    ratio = summary["speedup"][runtime]
    low, high = summary["speedup_interval"].get(runtime) or (ratio, ratio)
    dense, pruned = (summary[side]["latency_ms"][runtime]["p50"] for side in SIDES)
    times = f"p50 {wording.ms(pruned)} ms instead of {wording.ms(dense)} ms"
    if low > 1.0:
        speed = f"In {runtime} the pruned model is {ratio:.2f} times as fast as the dense one ({times})"
    elif high < 1.0:
        speed = f"In {runtime} the pruned model is slower than the dense one, {ratio:.2f} times its speed ({times})"
    else:
        speed = f"In {runtime} the pruned model is not measurably faster than the dense one ({times})"
    return f"{speed}, and its {name} {accuracy}."


def details(summary: dict[str, Any], level: int) -> list[Block]:
    """Return dense against pruned, and the realised speed-up."""
    return [
        Heading(level, "Dense against pruned"),
        comparison(summary),
        Text(
            f"Ratio is dense over pruned; for {_kind(summary)} it is the difference. "
            "File size is that of the ONNX file.",
            "note",
        ),
        Heading(level, "Realised speed-up"),
        realised(summary),
        Text("Realised is the speed-up as a share of the speed-up that the MACs promise.", "note"),
    ]


def opening(summary: dict[str, Any], record: dict[str, Any]) -> list[Block]:
    """Return the verdict, and what it was measured on."""
    protocol = record["protocol"]
    cpu = record["device"]["cpu"] or "an unknown CPU"
    threads = "one thread" if protocol["threads"] == 1 else f"{protocol['threads']} threads"
    blocks: list[Block] = [
        Text(f"{_kind(summary)} on the {summary['split']} split of {summary['data']}, {summary['imgsz']} px.", "note"),
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
    return blocks


def overview(summaries: Sequence[dict[str, Any]]) -> Table:
    """Return one row for each run and runtime."""
    names = {SCORE_NAMES[metrics(summary)[0]] for summary in summaries}
    name = names.pop() if len(names) == 1 else "accuracy"
    rows = [
        [
            f"{summary['name']}, {runtime}",
            *(wording.number(summary[side][metrics(summary)[0]], 3) for side in SIDES),
            wording.ratio(summary["macs_speedup"]),
            wording.ratio(ratio),
            wording.share(summary["realised"].get(runtime)),
        ]
        for summary in summaries
        for runtime, ratio in summary["speedup"].items()
    ]
    return Table(["run", f"dense {name}", f"pruned {name}", "MACs speed-up", "speed-up", "realised"], rows)


def comparison(summary: dict[str, Any]) -> Table:
    """Return dense against pruned, row by row."""
    dense, pruned = (summary[side] for side in SIDES)
    rows = [
        [name, *(wording.number(side[key], 4) for side in (dense, pruned)), wording.difference(dense[key], pruned[key])]
        for name, key in ((SCORE_NAMES[metric], metric) for metric in metrics(summary))
    ]
    rows += [
        [name, *(wording.size(side[key], unit) for side in (dense, pruned)), wording.quotient(dense[key], pruned[key])]
        for name, key, unit in (("parameters", "params", ""), ("MACs", "macs", ""), ("file size", "file_bytes", "B"))
    ]
    rows.append(["training epochs", *(str(side["epochs"]) for side in (dense, pruned)), ""])
    for runtime in dense["latency_ms"]:
        for key in ("p50", "p90"):
            values = [side["latency_ms"].get(runtime, {}).get(key) for side in (dense, pruned)]
            rows.append([f"{runtime} {key}, ms", *map(wording.ms, values), wording.quotient(*values)])
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


def _kind(summary: dict[str, Any]) -> str:
    """Return what the scores of a run are called together."""
    return "mAP" if metrics(summary)[0].startswith("map") else "accuracy"


def _headline(summary: dict[str, Any]) -> str | None:
    """Return the runtime that the verdict speaks of: onnxruntime, else the first that was measured."""
    speedup = summary["speedup"]
    return "onnxruntime" if "onnxruntime" in speedup else next(iter(speedup), None)


def _accuracy_change(summary: dict[str, Any]) -> str:
    dense, pruned = (summary[side][metrics(summary)[0]] for side in SIDES)
    if dense is None or pruned is None:
        return "is unknown"
    if dense == pruned == 0:
        return "is 0 for both: neither finds anything, so it says nothing about the cut"
    change = round(pruned, 3) - round(dense, 3)
    if abs(change) < 0.0005:
        return f"is the same ({dense:.3f})"
    return f"is {abs(change):.3f} {'higher' if change > 0 else 'lower'} ({pruned:.3f} instead of {dense:.3f})"
