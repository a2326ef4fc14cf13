"""What a record says beside its numbers: device, protocol, doubts, comparisons, layers and parity, as blocks.

Records come from several devices and versions: what one does not say is left out, and what is new in one is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmark import charts, wording
from benchmark.entries import Entry
from benchmark.pages import Block, Facts, Heading, Number, Table, Text

_SCALARS = (str, int, float, bool)
_DEVICE: dict[str, str] = {
    "name": "name",
    "cpu": "CPU",
    "gpu": "GPU",
    "architecture": "architecture",
    "cores": "cores",
    "usable_cores": "usable cores",
    "memory_bytes": "memory",
    "os": "operating system",
    "kernel": "kernel",
    "container": "container",
    "virtual_machine": "virtual machine",
    "others_cores": "busy with other work",
    "start_power_mw": "power at rest, mW",
    "load_power_mw": "power under load, mW",
    "end_power_mw": "power at the end, mW",  # of earlier records
}
_CHANGING = {
    "frequency_mhz": "clock, MHz",
    "temperature_c": "temperature, °C",
    "throttle_count": "throttled, times",
    "load_average": "load of the last 1, 5 and 15 minutes",
}
_PROTOCOL = {
    "imgsz": "image side, px",
    "min_queries": "least queries per cell",
    "min_seconds": "least seconds per cell",
    "burst_s": "length of a burst, s",
    "lead_in_queries": "lead-in of a burst, queries that do not count",
    "seconds": "duration of all, s",
}


def warnings(record: dict[str, Any]) -> list[Block]:
    """Return what to beware of."""
    blocks: list[Block] = []
    protocol = record.get("protocol") or {}
    if protocol.get("mode") == "quick" and "counted" not in protocol:  # instructions are the same on every day
        blocks.append(Text("Quick measurement: for development, not for publication.", "warning"))
    if record.get("noisy"):
        blocks.append(Text(f"Noisy measurement: {'; '.join(record.get('noise') or ['no reason given'])}.", "warning"))
    return blocks


def device(record: dict[str, Any]) -> Facts:
    """Return what is known of the device, and of its state at the start and at the end."""
    found: dict[str, Any] = record.get("device") or {}
    start: dict[str, Any] = found.get("start") or {}
    end: dict[str, Any] = found.get("end") or {}
    items = [
        (_DEVICE.get(key, _words(key)), _device_value(key, value))
        for key, value in found.items()
        if value is None or isinstance(value, _SCALARS)
    ]
    items += [(_CHANGING.get(key, _words(key)), _change(start[key], end.get(key))) for key in start]
    known = [(name, value) for name, value in items if value != wording.UNKNOWN]
    unknown = ", ".join(name for name, value in items if value == wording.UNKNOWN)
    return Facts([*known, ("not known", unknown)] if unknown else known)


def protocol(record: dict[str, Any]) -> Facts:
    """Return how it was measured."""
    found: dict[str, Any] = record.get("protocol") or {}
    shown = {key: value for key, value in found.items() if key != "label" and isinstance(value, _SCALARS)}
    if "label" in found and "mode" in shown:
        shown["mode"] = found["label"]
    return Facts([(_PROTOCOL.get(key, _words(key)), _plain(value)) for key, value in shown.items()])


def comparisons(record: dict[str, Any]) -> list[Block]:
    """Return by how much each model is faster, or cheaper in instructions, than the first one."""
    found = record.get("comparisons") or []
    if not found:
        return []
    rows = [
        [
            f"{item['model']} against {item['baseline']}",
            item["runtime"] + (f", batch {item['batch']}" if item.get("batch", 1) != 1 else ""),
            Number(wording.ratio(item["speedup"]), item["speedup"]),
            wording.interval(item["interval"]),
        ]
        for item in found
    ]
    counted = any(item.get("unit") == "instructions" for item in found)
    return [Table(["models", "runtime", "fewer instructions" if counted else "speed-up", "95 % interval"], rows)]


def layers(rows: Sequence[Entry], level: int) -> list[Block]:
    """Return the layers of each runtime: of two models side by side, the first of a record against each other one."""
    blocks: list[Block] = []
    known = [row for row in rows if row.cost and row.cost.layers]
    for first in known:
        assert first.cost
        alike = [row for row in known if row.cost and _setting(row) == _setting(first)]
        if alike[0] is not first:
            continue
        for pair in [(first, other) for other in alike[1:]] or [(first,)]:
            names = [row.name for row in pair]
            title = f"Layers in {first.runtime}: {' against '.join(names)}"
            chart = charts.bars(names, [row.cost.layers for row in pair if row.cost], first.cost.unit)
            blocks += [Heading(level, title), chart, *_explained(pair)]
    if blocks:
        blocks.append(
            Text("The dearest layers first. A profiled run is slower than a timed one: compare shares.", "note")
        )
    return blocks


def _explained(rows: Sequence[Entry]) -> list[Block]:
    """Return what the layers leave out, where the records say so."""
    known = [(row.name, row.cost) for row in rows if row.cost and row.cost.layers_share is not None]
    if not known:
        return []
    shares = ", ".join(f"{name} {wording.share(cost.layers_share)}" for name, cost in known)
    left_out = f" Left out: {known[0][1].layers_left_out}." if known[0][1].layers_left_out else ""
    return [Text(f"Together the layers are, of a query: {shares}.{left_out}", "note")]


def parity(records: dict[str, Any], level: int) -> list[Block]:
    """Return how far each exported file is from PyTorch."""
    if not records:
        return [Heading(level, "Parity with PyTorch"), Text("Not recorded.", "note")]
    rows = []
    for name, item in records.items():
        output, found = (item.get("outputs") or [{}])[0], item.get("detections")
        runtime = item.get("runtime", "onnxruntime")
        rows.append(
            [
                name,
                "passed" if item["passed"] else "FAILED",
                wording.known(item.get("images")),
                wording.significant(output["max_box_error_px"]) if "max_box_error_px" in output else "",
                wording.significant(output["max_score_error"]) if "max_score_error" in output else "",
                f"{found['torch']} / {found[runtime]}" if found else "",
                str(found["unmatched"]) if found else "",
            ]
        )
    columns = [
        "export",
        "parity",
        "images",
        "box error, px",
        "score error",
        "detections, PyTorch / export",
        "unmatched",
    ]
    return [Heading(level, "Parity with PyTorch"), Table(columns, rows)]


def _setting(row: Entry) -> tuple[Any, ...]:
    cost = row.cost
    return (
        row.run,
        row.runtime,
        cost and (cost.record, cost.unit, cost.precision, cost.threads, cost.imgsz, cost.batch),
    )


def _words(key: str) -> str:
    return key.replace("_", " ")


def _device_value(key: str, value: Any) -> str:
    if key.endswith("_bytes"):
        return wording.size(value, "B")
    if key == "others_cores" and value is not None:
        return f"{value:.2f} cores"
    return _plain(value)


def _change(start: Any, end: Any) -> str:
    if start is None:
        return wording.UNKNOWN
    if start == end:
        return wording.known(start)
    return f"{wording.known(start)} at the start, {wording.known(end)} at the end"


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else wording.known(value)
