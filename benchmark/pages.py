"""A page as a list of blocks, and the two forms it is written in: Markdown, and one self-contained HTML file.

Every text is escaped here, because names of models, classes and data sets come from strangers.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from benchmark.page_style import CSS, JS
from benchmark.wording import UNKNOWN
from compress.errors import printable

# Nothing may be fetched and no other script may run, whatever slipped through: the page is complete in itself.
_DIGEST = base64.b64encode(hashlib.sha256(JS.encode()).digest()).decode()
_POLICY = f"default-src 'none'; script-src 'sha256-{_DIGEST}'; style-src 'unsafe-inline'; img-src data:"


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
class Number:
    """A cell that sorts by its value, not by its text; None sorts last."""

    text: str
    value: float | None

    @staticmethod
    def of(value: float | None, form: str) -> Number:
        """Return a number written in a form of `str.format`, or a dash where it is unknown."""
        return Number("–" if value is None else form.format(value), value)


Cell = str | Number


@dataclass(frozen=True)
class Table:
    """Rows of cells; the first column names the row. One that is `sortable` can be filtered too."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    sortable: bool = False


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


@dataclass(frozen=True)
class Chart:
    """A fragment of trusted HTML for the page, a table of the same for Markdown."""

    html: str
    table: Table


Block = Heading | Text | Table | Facts | Code | Plot | Chart


def to_html(title: str, blocks: Iterable[Block]) -> str:
    """Return a complete HTML page."""
    body = "\n".join(_html(block) for block in blocks)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{escaped(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        f'<div id="tip" hidden></div>\n<script>{JS}</script>\n</body>\n</html>\n'
    )


def to_markdown(blocks: Iterable[Block]) -> str:
    """Return a Markdown document."""
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def _html(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h{block.level}>{escaped(block.text)}</h{block.level}>"
    if isinstance(block, Text):
        return f'<p class="{block.kind}">{escaped(block.text)}</p>'
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Facts):
        return (
            "<dl>"
            + "".join(f"<dt>{escaped(name)}</dt><dd>{escaped(value)}</dd>" for name, value in block.items)
            + "</dl>"
        )
    if isinstance(block, Code):
        return "<pre>" + "\n".join(escaped(line) for line in block.lines) + "</pre>"
    if isinstance(block, Chart):
        return block.html
    return f"<figure>{block.html}<figcaption>{escaped(block.caption)}</figcaption></figure>"


def _table(block: Table) -> str:
    texts = text_columns(block)
    names = [
        f'<button type="button">{_whole(name)}</button>' if block.sortable else _whole(name) for name in block.columns
    ]
    order = ' aria-sort="none"' if block.sortable else ""
    head = "".join(f'<th scope="col"{_kind(index in texts)}{order}>{name}</th>' for index, name in enumerate(names))
    rows = "\n".join(
        f"<tr>{_cell('th', first)}"
        + "".join(_cell("td", cell, index in texts) for index, cell in enumerate(rest, 1))
        + "</tr>"
        for first, *rest in block.rows
    )
    tools = (
        '<div class="tools" hidden><input type="search" placeholder="Filter: a model, a runtime …" '
        'aria-label="Filter the rows" autocomplete="off"><span class="note" aria-live="polite"></span></div>'
    )
    classes = ' class="sortable"' if block.sortable else ""
    return (
        tools if block.sortable else ""
    ) + f'<div class="table"><table{classes}>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>'


def text_columns(block: Table) -> set[int]:
    """Return the columns of words, which are read from the left: the first, and those in which no number stands.

    >>> text_columns(Table(["model", "runtime", "p50 ms"], [["a", "ncnn 1.0", "5.20"], ["b", "", "–"]]))
    {0, 1}
    """
    found = {0}
    for index in range(1, len(block.columns)):
        cells = [row[index] for row in block.rows]
        said = [cell for cell in cells if cell not in ("", UNKNOWN)]
        if said and all(isinstance(cell, str) and not re.match(r"[+−-]?\d", cell) for cell in said):
            found.add(index)
    return found


def breakable(text: str) -> str:
    """Return a name for HTML that a narrow column breaks where the name has a joint, not in the middle of a word."""
    return "<wbr>".join(escaped(part) for part in re.split(r"(?<=[/_.])(?=[^/_.])", text))


def _whole(name: str) -> str:
    """Return the heading of a column for HTML, in which mAP50-95 stays on one line."""
    return re.sub(r"[^\s<>]*-[^\s<>]*", r'<span class="whole">\g<0></span>', escaped(name))


def _kind(is_text: bool) -> str:
    return ' class="text"' if is_text else ""


def _cell(tag: str, cell: Cell, is_text: bool = False) -> str:
    scope = ' scope="row"' if tag == "th" else _kind(is_text)
    if isinstance(cell, str):
        return f"<{tag}{scope}>{breakable(cell) if tag == 'th' else escaped(cell)}</{tag}>"
    value = "" if cell.value is None else f"{cell.value:.10g}"
    return f'<{tag}{scope} data-value="{value}">{escaped(cell.text)}</{tag}>'


def _markdown(block: Block) -> str:
    if isinstance(block, Heading):
        return "#" * block.level + " " + _mark(block.text)
    if isinstance(block, Text):
        return ("> " if block.kind == "warning" else "") + _mark(block.text)
    if isinstance(block, Table):
        texts = text_columns(block)
        ruler = [":--" if index in texts else "--:" for index in range(len(block.columns))]
        rows = [[_mark(plain(cell)) for cell in row] for row in (block.columns, *block.rows)]
        return "\n".join("| " + " | ".join(row) + " |" for row in (rows[0], ruler, *rows[1:]))
    if isinstance(block, Facts):
        return "\n".join(f"- {_mark(name)}: {_mark(value)}" for name, value in block.items)
    if isinstance(block, Code):
        lines = [printable(line) for line in block.lines]
        longest = max((len(run) for line in lines for run in re.findall("`+", line)), default=0)
        fence = "`" * max(3, longest + 1)
        return "\n".join([f"{fence}sh", *lines, fence])
    if isinstance(block, Chart):
        return _markdown(block.table)
    return f"![{_mark(block.caption)}]({block.image})"


def plain(cell: Cell) -> str:
    """Return the text of a cell."""
    return cell if isinstance(cell, str) else cell.text


def escaped(text: str) -> str:
    """Return a text for HTML, also for the value of an attribute, without control characters."""
    return escape(printable(text))


def _mark(text: str) -> str:
    return re.sub(r"([\\`*_\[\]#|~!])", r"\\\1", escape(printable(text), quote=False))
