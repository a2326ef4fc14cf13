"""The page of a report in a browser: it loads without a complaint, draws, sorts, filters and fits a phone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from benchmark import report
from benchmark.records import Score
from benchmark.sources import Source

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")

SWITCHES = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --enable-logging=stderr --v=0 --virtual-time-budget=3000 --dump-dom"
)
HOSTILE = '</script><script>document.title="2"</script><img src=x onerror="document.title=3">'
SHOWN = HOSTILE.rpartition("/")[2]  # names are shortened as paths are
MODELS = {"b9": 9.0, "b10": 10.0, "slow": 30.0, HOSTILE: 20.0}


def visit(folder: Path, text: str) -> tuple[str, list[str]]:
    """Return the document as Chromium leaves it, and what its console said."""
    assert CHROMIUM is not None
    path = folder / "visited.html"
    path.write_text(text, encoding="utf-8")
    done = subprocess.run(
        [CHROMIUM, *SWITCHES.split(), f"--user-data-dir={folder / 'profile'}", path.as_uri()],
        capture_output=True,
        timeout=60,
        check=True,
    )
    return done.stdout.decode(), [line for line in done.stderr.decode().splitlines() if "CONSOLE" in line]


def drive(folder: Path, page: str, script: str) -> tuple[Any, list[str]]:
    """Run a script in a page after its own one, and return what it left in `found`, and what the console said."""
    harness = (
        "<pre id=harness></pre><script>{ const found = {};"
        f"{script}; document.getElementById('harness').textContent = JSON.stringify(found); }}</script></body>"
    )
    allowed = re.sub(r"script-src 'sha256-[^']*'", "script-src 'unsafe-inline'", page)
    dom, console = visit(folder, allowed.replace("</body>", harness))
    return json.loads(unescape(dom.partition('<pre id="harness">')[2].partition("</pre>")[0])), console


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of four models, one of which is not scored, and their layers."""
    folder = tmp_path_factory.mktemp("page")
    cells = [
        {
            "model": name,
            "runtime": "onnxruntime",
            "model_sha256": name,
            "p50_ms": p50,
            "p99_ms": None if name == "slow" else p50,
            "intervals": {"p50_ms": [0.8 * p50, 1.2 * p50]},
            "layers": [{"name": "conv", "type": "Conv", "ms": p50}],
        }
        for name, p50 in MODELS.items()
    ]
    record = {"cells": cells, "device": {"cpu": "Acme"}, "protocol": {"mode": "standard"}}
    scores = [
        Score(name, name, "onnxruntime", "mAP50-95", 0.3 + 0.01 * p50) for name, p50 in MODELS.items() if name != "b10"
    ]
    report.write_reports([Source("zoo", None, [record], scores, {})], folder)
    return (folder / "report.html").read_text()


def test_the_page_loads_without_a_complaint_and_runs_no_other_script(page: str, tmp_path: Path) -> None:
    dom, console = visit(tmp_path, page)
    assert console == []
    assert "<title>zoo – Espalier</title>" in dom
    assert ">4 of 4 rows<" in dom
    _, console = visit(tmp_path, page.replace("</body>", "<script>document.title = 2</script></body>"))
    assert "Content Security Policy" in console[0]


def test_the_plot_draws_every_mark_where_it_belongs(page: str, tmp_path: Path) -> None:
    found, console = drive(
        tmp_path,
        page,
        """
        const plot = document.querySelector('.plot').getBoundingClientRect();
        found.plot = [plot.width, plot.height];
        found.marks = [...document.querySelectorAll('.mark')].map((mark) => {
          const place = mark.querySelector('.reach').getBoundingClientRect(), bar = mark.querySelector('.span');
          return [(place.left + place.right) / 2 - plot.left, (place.top + place.bottom) / 2 - plot.top,
                  bar.getBoundingClientRect().width];
        });
        found.front = document.querySelectorAll('line.front').length;
        """,
    )
    assert console == []
    width, height = found["plot"]
    assert width > 500
    assert height > 300
    # 9, 30 and 20 ms with the scores 0.39, 0.6 and 0.5; the axis of costs ends at 1.12 × 36 ms.
    (x9, y9, bar9), (x30, y30, _), (x20, y20, _) = found["marks"]
    assert [x9, x20, x30] == pytest.approx([width * ms / (1.12 * 36) for ms in (9, 20, 30)], abs=2)
    assert bar9 == pytest.approx(width * 3.6 / (1.12 * 36), abs=4)
    assert (y20 - y30) / (y9 - y20) == pytest.approx(0.1 / 0.11, abs=0.02)
    assert found["front"] == 6  # one step up and one across for each of three


def test_the_table_sorts_by_value_and_filters_by_words(page: str, tmp_path: Path) -> None:
    found, console = drive(
        tmp_path,
        page,
        """
        const table = document.querySelector('table.sortable'), heads = [...table.tHead.rows[0].cells];
        const shown = () => [...table.tBodies[0].rows].filter((row) => !row.hidden);
        const models = () => shown().map((row) => row.cells[0].textContent);
        const sort = (name) => {
          const head = heads.find((head) => head.textContent === name);
          head.querySelector('button').click();
          return [models(), head.getAttribute('aria-sort')];
        };
        const order = [];
        for (const name of ['p50 ms', 'p50 ms', 'model', 'p99 ms', 'p99 ms', 'mAP50-95']) order.push(sort(name));
        found.order = order;
        found.sorted = heads.filter((head) => head.getAttribute('aria-sort') !== 'none').length;
        const box = document.querySelector('.tools input');
        const filter = (text) => {
          box.value = text;
          box.dispatchEvent(new Event('input'));
          return [models().length, document.querySelector('.tools span').textContent];
        };
        found.filtered = [filter('B1 onnx'), filter('B1 torch'), filter('')];
        found.focusable = heads.every((head) => head.querySelector('button').tabIndex === 0);
        """,
    )
    assert console == []
    assert found["order"] == [
        [["b9", "b10", SHOWN, "slow"], "ascending"],
        [["slow", SHOWN, "b10", "b9"], "descending"],
        [["b9", "b10", SHOWN, "slow"], "ascending"],  # 9 before 10, and by letters b10 would come first
        [["b9", "b10", SHOWN, "slow"], "ascending"],
        [[SHOWN, "b10", "b9", "slow"], "descending"],  # what is unknown stays last
        [["b9", SHOWN, "slow", "b10"], "ascending"],
    ]
    assert found["sorted"] == 1
    assert found["filtered"] == [[1, "1 of 4 rows"], [0, "0 of 4 rows"], [4, "4 of 4 rows"]]
    assert found["focusable"]


def test_a_mark_tells_its_details_to_pointer_and_keyboard(page: str, tmp_path: Path) -> None:
    found, _ = drive(
        tmp_path,
        page,
        """
        const tip = document.getElementById('tip'), marks = document.querySelectorAll('.mark');
        found.before = tip.hidden;
        marks[0].dispatchEvent(new PointerEvent('pointerenter'));
        const place = tip.getBoundingClientRect();
        const inside = place.left >= 0 && place.right <= innerWidth && place.top >= 0;
        found.shown = [tip.textContent.split('\\n'), tip.hidden, inside];
        dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape'}));
        found.escaped = tip.hidden;
        marks[2].dispatchEvent(new FocusEvent('focus'));  // the page itself has no focus here
        found.reachable = [...marks].every((mark) => mark.tabIndex === 0);
        found.focused = tip.textContent.split('\\n')[0];
        """,
    )
    assert found["before"]
    lines, is_hidden, is_inside = found["shown"]
    assert lines[:3] == ["b9, onnxruntime", "p50 9.00 ms (7.20–10.80)", "mAP50-95 0.3900"]
    assert (is_hidden, is_inside, found["escaped"]) == (False, True, True)
    assert (found["focused"], found["reachable"]) == (f"{SHOWN}, onnxruntime", True)


@pytest.mark.parametrize("width", [390, 1400])
def test_the_page_fits_a_phone_and_a_wide_screen(page: str, tmp_path: Path, width: int) -> None:
    outer = """<!doctype html><body><iframe style="width:WIDTHpx;height:800px;border:0"></iframe>
    <pre id="harness"></pre>
    <script>
    const frame = document.querySelector('iframe');
    frame.onload = () => {
      const inner = frame.contentDocument, plot = inner.querySelector('.plot').getBoundingClientRect();
      const text = inner.querySelector('.plot text');
      const hidden = (name) => Math.max(...[...inner.querySelectorAll(name)].map((table) => {
        const frame = table.parentElement;
        return frame.scrollWidth - frame.clientWidth;
      }));
      document.getElementById('harness').textContent = JSON.stringify([
        inner.documentElement.scrollWidth - inner.documentElement.clientWidth, plot.width, plot.right,
        parseFloat(frame.contentWindow.getComputedStyle(text).fontSize), hidden('.layers'), hidden('.sortable'),
        [...inner.querySelectorAll('.table')].map((box) => [box.tabIndex === 0, box.scrollWidth > box.clientWidth])]);
    };
    frame.srcdoc = PAGE;
    </script></body>"""
    content = json.dumps(page).replace("</", "<\\/")
    dom, console = visit(tmp_path, outer.replace("WIDTH", str(width)).replace("PAGE", content))
    assert console == []
    numbers = json.loads(dom.rpartition('id="harness">')[2].partition("</pre>")[0])
    scrolled, plot_width, plot_right, letters_px, layers_hidden, rows_hidden, tables = numbers
    assert scrolled == 0  # the page itself does not scroll sideways, wide tables do
    assert plot_width > 280
    assert plot_right <= width
    assert layers_hidden == 0  # px of a table that only scrolling shows
    assert (rows_hidden == 0) == (width == 1400)
    assert all(is_stop == is_wider for is_stop, is_wider in tables)  # so that a keyboard scrolls them
    assert letters_px >= 12
