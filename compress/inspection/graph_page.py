"""The channel graph as one self-contained HTML page: blocks in the order of the forward pass, layers by their groups.

Every text is escaped, because names of modules and files come from strangers, and the page's policy lets no script run
but its own, whatever slipped through.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from compress.inspection.graph_style import CSS, JS
from compress.inspection.overview import GroupRow, Overview, short_widths

if TYPE_CHECKING:
    from compress.inspection.blocks import Block, Layer, Part

_LANE, _JOINT = 11, 20  # px between lanes; px from the top of a block to its dot
_GOLDEN_ANGLE = 137.508  # degrees: hues of neighbours, in forward order, lie far apart
_GROUP_COLUMNS = (
    *(("group", ""), ("name", ""), ("width", "n"), ("allowed", "w"), ("MACs", "n"), ("params", "n"), ("tie", "n")),
    *(("also in", "l"), ("read by", "l"), ("frozen by", "l")),
)


def page(title: str, blocks: Sequence[Block], found: Overview, imgsz: int) -> str:
    """Return the page: the graph, what is frozen, and the table of groups."""
    digest = base64.b64encode(hashlib.sha256(JS.encode()).digest()).decode()
    policy = f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:"
    lanes = _lanes(blocks)
    gutter = 20 + _LANE * (1 + max((lane for lane, _ in lanes.values()), default=-1))
    rows = "\n".join(_block(index, blocks, lanes, gutter, found.groups) for index in range(len(blocks)))
    prunable = len(found.prunable)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{_text(title)}</title>
<style>{CSS}{_colours(found.groups)}</style>
</head>
<body>
<h1>{_text(title)}</h1>
<p>{len(found.groups)} channel groups, of which {prunable} can be pruned. They hold {found.prunable_macs:.1%} of the
{_amount(found.macs)} MACs (one image of {imgsz} px) and {found.prunable_params:.1%} of the {_amount(found.params)}
parameters.</p>
<p class="note">Blocks run from top to bottom; the lines on the left are their connections. A box is a layer: its width
(input → output channels), its share of the MACs and the numbers of its groups. The stripe above is what it reads, the
stripe below what it makes; one colour is one group, whose channels live and die together, and grey stripes are frozen.
Click on a layer to see its groups everywhere.</p>
<div class="tools"><input id="search" type="search" placeholder="layer, kind, #group or reason"
 aria-label="Search layers" autocomplete="off"><button class="clear">Clear</button><span id="found" class="note"
 aria-live="polite"></span></div>
<div class="stage">
<ol class="blocks" style="--lanes: {gutter}px">
{rows}
</ol>
<aside id="panel" class="panel" aria-live="polite"><button class="clear" aria-label="Close">×</button><div>
<p class="note">No layer is chosen.</p></div></aside>
</div>
<h2>What is frozen</h2>
{_frozen_table(found)}
<h2>Groups</h2>
<p class="note">MACs and params: the share of the model's that would be gone if the whole group were, at the layers that
make it and at those that read it. A weight between two groups counts for both, so these columns sum to more than
100 %. Groups of one tie keep the same width.</p>
{_group_table(found.groups)}
<script>{JS}</script>
</body>
</html>
"""


def _lanes(blocks: Sequence[Block]) -> dict[int, tuple[int, list[int]]]:
    """Return, per block that is read further down than by the next one, its lane and those readers, ascending."""
    readers: dict[int, list[int]] = {}
    for index, block in enumerate(blocks):
        for source in block.sources:
            if abs(index - source) > 1:
                readers.setdefault(source, []).append(index)
    free: list[int] = []  # per lane the block where it ends
    lanes = {}
    for source in sorted(readers):
        lane = next((number for number, end in enumerate(free) if end < source), len(free))
        free[lane : lane + 1] = [max(readers[source])]
        lanes[source] = (lane, readers[source])
    return lanes


def _block(
    index: int,
    blocks: Sequence[Block],
    lanes: dict[int, tuple[int, list[int]]],
    gutter: int,
    groups: Sequence[GroupRow],
) -> str:
    block = blocks[index]
    far = [_block_label(blocks[source].name) for source in block.sources if source != index - 1]
    if not block.sources:
        far = ["image"]
    elif far and index - 1 in block.sources:
        far.append(_block_label(blocks[index - 1].name))
    reads = f'<span class="note">← {_text(", ".join(far))}</span>' if far else ""
    share = sum(layer.macs for layer in block.layers)
    bar = (
        f'<span class="share" style="--share: {share:.4f}">{_text(_percent(share))} of MACs</span>'
        if block.layers
        else ""
    )
    parts: list[tuple[str, list[str]]] = []
    for layer in block.layers:
        inside, label = _place_in_block(layer.name, block.name)
        if not parts or parts[-1][0] != inside:
            parts.append((inside, []))
        parts[-1][1].append(_chip(layer, label, block, groups))
    chips = "".join(
        f'<div class="part"><span>{_text(inside)}</span>{"".join(inner)}</div>' if inside else "".join(inner)
        for inside, inner in parts
    )
    return (
        f'<li class="block">{_connections(index, blocks, lanes, gutter)}<div class="head">'
        f"<b>{_text(_block_label(block.name))}</b> {_text(block.kind)} {reads}{bar}</div>"
        + (f'<div class="chips">{chips}</div>' if chips else "")
        + "</li>"
    )


def _connections(index: int, blocks: Sequence[Block], lanes: dict[int, tuple[int, list[int]]], gutter: int) -> str:
    """Draw what passes, leaves and enters beside one block: heights are percentages, as its height is not known."""
    trunk, bend = gutter - 9, 6
    shapes = []
    if index - 1 in blocks[index].sources:
        shapes.append(f'<line x1="{trunk}" y1="0" x2="{trunk}" y2="{_JOINT}"/>')
    if index + 1 < len(blocks) and index in blocks[index + 1].sources:
        shapes.append(f'<line x1="{trunk}" y1="{_JOINT}" x2="{trunk}" y2="100%"/>')
    for source, (lane, readers) in lanes.items():
        x = trunk - _LANE * (lane + 1)
        if source == index:
            shapes.append(f'<path d="M{trunk} {_JOINT}H{x + bend}Q{x} {_JOINT} {x} {_JOINT + bend}"/>')
            shapes.append(f'<line x1="{x}" y1="{_JOINT + bend}" x2="{x}" y2="100%"/>')
        if index in readers:
            shapes.append(f'<path d="M{x} 0V{_JOINT - bend}Q{x} {_JOINT} {x + bend} {_JOINT}H{trunk}"/>')
        if source < index < max(readers):
            shapes.append(f'<line x1="{x}" y1="0" x2="{x}" y2="100%"/>')
    return f'<svg class="lanes" aria-hidden="true">{"".join(shapes)}<circle cx="{trunk}" cy="{_JOINT}" r="4.5"/></svg>'


def _chip(layer: Layer, label: str, block: Block, groups: Sequence[GroupRow]) -> str:
    reads, makes = layer.widths
    made, read = _groups_of(layer.makes), _groups_of(layer.reads)
    frozen = list(dict.fromkeys(f"frozen: {groups[i].frozen}" for i in made if groups[i].frozen))
    title = "\n".join(
        [
            f"{layer.name}  ({layer.kind})",
            f"{reads} → {makes} channels",
            f"{_percent(layer.macs)} of MACs, {_percent(layer.params)} of parameters",
            *frozen,
        ]
    )
    numbers = " ".join(f"#{groups[i].number}" for i in made)
    searched = f"{title} {block.kind} {numbers} {' '.join(groups[i].name for i in made)}".lower()
    return (
        f'<button class="chip{" frozen" if frozen else ""}" title="{_text(title, lines=True)}" '
        f'data-text="{_text(searched)}" data-makes="{_numbers(made, groups)}" data-reads="{_numbers(read, groups)}" '
        f'style="--reads: {_gradient(layer.reads, groups)}; --makes: {_gradient(layer.makes, groups)}">'
        f"<b>{_text(label)}</b><i>{_text(layer.kind)}</i>"
        f"<span>{reads} → {makes}</span><i>{_text(_percent(layer.macs))}</i>"
        f"<span>{numbers}</span></button>"
    )


def _groups_of(parts: Iterable[Part]) -> list[int]:
    return list(dict.fromkeys(group for group, _ in parts if group is not None))


def _numbers(indices: Iterable[int], groups: Sequence[GroupRow]) -> str:
    return " ".join(str(groups[index].number) for index in indices)


def _gradient(parts: Sequence[Part], groups: Sequence[GroupRow]) -> str:
    """Return a stripe in which each run of channels has its group's colour and its share of the width.

    Frozen runs stay clear: the hatched grey below shows there.
    """
    total = sum(count for _, count in parts)
    stops, start = [], 0
    for group, count in parts:
        frozen = group is None or groups[group].frozen is not None
        colour = "transparent" if frozen else f"var(--g{groups[group].number})"  # type: ignore[index]
        stops.append(f"{colour} {start / total:.2%} {(start + count) / total:.2%}")
        start += count
    return f"linear-gradient(90deg, {', '.join(stops)})"


def _colours(groups: Sequence[GroupRow]) -> str:
    """Return the colours of all groups, as CSS variables that are legible on a light and a dark page."""
    colours = [
        f"--g{row.number}: oklch({(0.62, 0.7, 0.55)[row.number % 3]} 0.16 {row.number * _GOLDEN_ANGLE % 360:.1f})"
        for row in groups
    ]
    return f":root {{ {'; '.join(colours)} }}\n"


def _place_in_block(layer: str, block: str) -> tuple[str, str]:
    """Split a layer's name within its block into the part of the block and the rest.

    >>> _place_in_block("model.4.m.0.cv1.conv", "model.4"), _place_in_block("model.0.conv", "model.0")
    (('m.0', 'cv1'), ('', 'conv'))
    """
    inside = layer.removeprefix(f"{block}.")
    short = inside.removesuffix(".conv")
    names = short.split(".")
    cut = min(2, len(names) - 1)
    return ".".join(names[:cut]), ".".join(names[cut:])


def _block_label(name: str) -> str:
    return name.removeprefix("model.") or "the model itself"


def _frozen_table(found: Overview) -> str:
    if not found.frozen:
        return "<p>Nothing: every channel may be removed.</p>"
    rows = "\n".join(
        f'<tr><td class="n">{row.channels}</td><td class="l">{_text(row.reason)}</td>'
        f'<td class="l">{_text(", ".join(row.layers))}</td><td>{_picks(row.groups)}</td></tr>'
        for row in found.frozen
    )
    return _table((("channels", "n"), ("by", "l"), ("layers", "l"), ("groups", "")), rows, "frozen")


def _group_table(groups: Sequence[GroupRow]) -> str:
    rows = "\n".join(
        f'<tr data-group="{row.number}"><td>{_swatch(row)}{_picks([row.number])}</td><td>{_text(row.name)}</td>'
        f'<td class="n">{row.width}</td><td class="w">{"" if row.frozen else short_widths(row.allowed)}</td>'
        f'<td class="n">{_text(_percent(row.macs))}</td><td class="n">{_text(_percent(row.params))}</td>'
        f'<td class="n">{row.tie or ""}</td><td class="l">{_text(", ".join(row.also_in))}</td>'
        f'<td class="l">{_text(", ".join(row.read_by))}</td><td class="l">{_text(row.frozen or "")}</td></tr>'
        for row in groups
    )
    return _table(_GROUP_COLUMNS, rows, "groups")


def _table(columns: Iterable[tuple[str, str]], rows: str, name: str) -> str:
    head = "".join(f'<th scope="col" class="{kind}">{text}</th>' for text, kind in columns)
    return (
        f'<div class="table"><table id="{name}"><thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>'
    )


def _picks(numbers: Iterable[int]) -> str:
    return " ".join(f'<button class="pick" data-group="{number}">#{number}</button>' for number in numbers)


def _swatch(row: GroupRow) -> str:
    return f'<span class="swatch" style="background: var(--{"frozen" if row.frozen else f"g{row.number}"})"></span>'


def _percent(share: float) -> str:
    """Return a share as text, which is yet to be escaped."""
    return f"{share:.1%}" if share >= 0.0005 or share == 0 else "<0.1%"


def _amount(count: int) -> str:
    for limit, sign in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= 0.9995 * limit:  # what would be 1000 of the smaller sign in three digits
            return f"{count / limit:.3g} {sign}"
    return str(count)


def _text(text: str, *, lines: bool = False) -> str:
    """Escape a text; control characters, which could hide what is read, become spaces."""
    return escape("".join(sign if sign.isprintable() or (lines and sign == "\n") else " " for sign in text))
