"""A page as a list of blocks, and the two forms it is written in: Markdown, and one self-contained HTML file.

Every text is escaped here, because names of models, classes and data sets come from strangers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

_CSS = """
:root { color-scheme: light; --ink: #1b2420; --soft: #5a6660; --line: #dde3df; --paper: #fff; --wash: #f4f7f5;
  --accent: #1f7a4d; --warn: #8a5a00; --warn-wash: #fdf4e0; }
@media screen and (prefers-color-scheme: dark) { :root { color-scheme: dark; --ink: #e6ece8; --soft: #9aa8a0;
  --line: #313a35; --paper: #141916; --wash: #1c2320; --accent: #5cc690; --warn: #f0c368; --warn-wash: #2c2414; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 54rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  overflow-wrap: anywhere; }
h1, h2, h3 { line-height: 1.2; text-wrap: balance; letter-spacing: -.01em; }
h1 { font-size: clamp(1.7rem, 5vw, 2.3rem); margin: 0 0 .35rem; }
h2 { font-size: 1.3rem; margin: 2.75rem 0 .6rem; padding-top: 1.25rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 2.25rem 0 .5rem; }
p { margin: .5rem 0; max-width: 44rem; }
.lead { font-size: clamp(1.1rem, 3vw, 1.25rem); line-height: 1.5; margin: 1rem 0; text-wrap: pretty; }
.note, figcaption { color: var(--soft); font-size: .9rem; }
.warning { background: var(--warn-wash); color: var(--warn); border-left: 3px solid currentColor; padding: .5rem .9rem;
  border-radius: 2px; font-size: .95rem; }
figure { margin: 1.75rem 0; }
figcaption { margin-top: .5rem; }
figure .plot { height: 27rem; }
.table { overflow-x: auto; margin: .75rem 0; background:
  linear-gradient(90deg, var(--paper) 40%, transparent) 0 0 / 2.5rem 100% no-repeat local,
  linear-gradient(270deg, var(--paper) 40%, transparent) 100% 0 / 2.5rem 100% no-repeat local,
  linear-gradient(90deg, var(--line), transparent) 0 0 / .8rem 100% no-repeat scroll,
  linear-gradient(270deg, var(--line), transparent) 100% 0 / .8rem 100% no-repeat scroll; }
table { border-collapse: collapse; width: 100%; font-size: .93rem; font-variant-numeric: tabular-nums; }
th, td { padding: .42rem 0 .42rem 1.1rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: normal; }
th:first-child, td:first-child { padding-left: 0; text-align: left; }
thead th { color: var(--soft); font-weight: 600; font-size: .85rem; border-bottom-color: var(--soft);
  vertical-align: bottom; }
tbody th { font-weight: 400; }
td { white-space: nowrap; }
dl { display: grid; grid-template-columns: minmax(8rem, 13rem) 1fr; gap: .35rem 1.1rem; margin: .75rem 0;
  font-size: .93rem; }
dt { color: var(--soft); }
dd { margin: 0; }
pre { background: var(--wash); border-radius: 4px; padding: .8rem 1rem; font-size: .88rem; line-height: 1.5;
  white-space: pre-wrap; }
.plot .xtick text, .plot .ytick text, .plot .g-xtitle text, .plot .g-ytitle text,
.plot .legendtext { fill: var(--ink) !important; }
.plot .gridlayer path { stroke: var(--line) !important; }
.plot .zerolinelayer path { stroke: var(--soft) !important; }
@media (max-width: 30rem) {
  body { padding-top: 1.5rem; }
  figure .plot { height: 22rem; }
  table { font-size: .82rem; }
  thead th { font-size: .78rem; }
  th, td { padding-left: .5rem; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: .5rem; }
}
@media print {
  body { max-width: none; padding: 0; font-size: 10.5pt; }
  .table { background: none; overflow: visible; }
  h2 { margin-top: 1.5rem; padding-top: .9rem; }
  h2, h3 { break-after: avoid; }
  figure, .table, dl, pre { break-inside: avoid; }
}
"""

# Nothing may be fetched, whatever slipped through: the page is complete in itself.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"


@dataclass(frozen=True)
class Heading:
    """A heading; level 1 is the title of the page."""

    level: int
    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph; its kind is lead, note, warning or plain."""

    text: str
    kind: str = "plain"


@dataclass(frozen=True)
class Table:
    """Rows of cells; the first column names the row."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Facts:
    """Names and values."""

    items: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Code:
    """Lines to copy."""

    lines: Sequence[str]


@dataclass(frozen=True)
class Plot:
    """A figure: an image file for Markdown, a fragment of trusted HTML for the page."""

    image: str
    html: str
    caption: str


Block = Heading | Text | Table | Facts | Code | Plot


def printable(text: str) -> str:
    """Return a text without control characters, which could steer a terminal or hide what is read."""
    return "".join(sign if sign.isprintable() else " " for sign in text)


def to_html(title: str, blocks: Iterable[Block]) -> str:
    """Return a complete HTML page."""
    body = "\n".join(_html(block) for block in blocks)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{_text(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def to_markdown(blocks: Iterable[Block]) -> str:
    """Return a Markdown document."""
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def _html(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h{block.level}>{_text(block.text)}</h{block.level}>"
    if isinstance(block, Text):
        return f'<p class="{block.kind}">{_text(block.text)}</p>'
    if isinstance(block, Table):
        head = "".join(f'<th scope="col">{_text(name)}</th>' for name in block.columns)
        rows = "\n".join(
            f'<tr><th scope="row">{_text(first)}</th>' + "".join(f"<td>{_text(cell)}</td>" for cell in rest) + "</tr>"
            for first, *rest in block.rows
        )
        return f'<div class="table"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>'
    if isinstance(block, Facts):
        return (
            "<dl>" + "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in block.items) + "</dl>"
        )
    if isinstance(block, Code):
        return "<pre>" + "\n".join(_text(line) for line in block.lines) + "</pre>"
    return f'<figure><div class="plot">{block.html}</div><figcaption>{_text(block.caption)}</figcaption></figure>'


def _markdown(block: Block) -> str:
    if isinstance(block, Heading):
        return "#" * block.level + " " + _mark(block.text)
    if isinstance(block, Text):
        return ("> " if block.kind == "warning" else "") + _mark(block.text)
    if isinstance(block, Table):
        ruler = [":--", *["--:"] * (len(block.columns) - 1)]
        rows = [[_mark(cell) for cell in row] for row in (block.columns, *block.rows)]
        return "\n".join("| " + " | ".join(row) + " |" for row in (rows[0], ruler, *rows[1:]))
    if isinstance(block, Facts):
        return "\n".join(f"- {_mark(name)}: {_mark(value)}" for name, value in block.items)
    if isinstance(block, Code):
        lines = [printable(line) for line in block.lines]
        longest = max((len(run) for line in lines for run in re.findall("`+", line)), default=0)
        fence = "`" * max(3, longest + 1)
        return "\n".join([f"{fence}sh", *lines, fence])
    return f"![{_mark(block.caption)}]({block.image})"


def _text(text: str) -> str:
    return escape(printable(text))


def _mark(text: str) -> str:
    return re.sub(r"([\\`*_\[\]#|~!])", r"\\\1", escape(printable(text), quote=False))
