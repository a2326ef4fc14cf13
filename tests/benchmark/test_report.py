from __future__ import annotations

import copy
import csv
import json
import re
import struct
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from benchmark import facts, records, report, sections, wording
from benchmark.pages import Code, Number, Table, Text, to_html, to_markdown

HOSTILE = '</script><script>alert(1)</script><img src=x onerror="alert(2)">| `[red]*_$\\frac\n# x\x1b[31m %{x} &amp;'


def summary(name: str = "demo") -> dict[str, Any]:
    """A run that halved the latency in onnxruntime and brought a quarter less than that in torch."""
    return {
        "name": name,
        "imgsz": 160,
        "data": "shapes.yaml",
        "split": "test",
        "dense": {
            "map50_95": 0.603,
            "map50": 0.9,
            "params": 3_000_000,
            "macs": 1_000_000_000,
            "file_bytes": 12_000_000,
            "epochs": 20,
            "latency_ms": {"torch": {"p50": 30.0, "p90": 33.0}, "onnxruntime": {"p50": 20.0, "p90": 22.0}},
        },
        "pruned": {
            "map50_95": 0.592,
            "map50": 0.91,
            "params": 1_200_000,
            "macs": 400_000_000,
            "file_bytes": 4_800_000,
            "epochs": 20,
            "latency_ms": {"torch": {"p50": 20.0, "p90": 24.0}, "onnxruntime": {"p50": 10.0, "p90": 11.0}},
        },
        "macs_speedup": 2.5,
        "speedup": {"torch": 1.5, "onnxruntime": 2.0},
        "speedup_interval": {"torch": [1.4, 1.6], "onnxruntime": [1.9, 2.1]},
        "realised": {"torch": 0.6, "onnxruntime": 0.8},
        "parity": {
            "dense": {
                "images": 16,
                "outputs": [{"max_box_error_px": 0.0012, "max_score_error": 3e-6}],
                "detections": {"torch": 41, "onnxruntime": 41, "unmatched": 0},
                "passed": True,
            }
        },
        "commands": ["python -m compress.run --config configs/pipelines/demo.yaml"],
    }


def record() -> dict[str, Any]:
    state = {"governor": None, "frequency_mhz": 2600.0, "temperature_c": None, "load_average": [0.1, 0.2, 0.3]}
    cells = [
        {
            "model": model,
            "runtime": runtime,
            "runtime_version": "9.9",
            "p50_ms": p50,
            "p90_ms": 1.1 * p50,
            "p99_ms": 1.2 * p50,
            "intervals": {"p50_ms": [0.98 * p50, 1.03 * p50]},
            "queries": 123,
            "cold_start_ms": 88.4,
            "peak_memory_bytes": 105_000_000,
        }
        for model, runtime, p50 in (
            ("dense", "torch", 30.0),
            ("dense", "onnxruntime", 20.0),
            ("pruned", "torch", 20.0),
            ("pruned", "onnxruntime", 10.0),
        )
    ]
    return {
        "cells": cells,
        "comparisons": [],
        "device": {
            "cpu": "Acme 9000",
            "architecture": "x86_64",
            "cores": 2,
            "usable_cores": 2,
            "memory_bytes": 8_000_000_000,
            "os": "Debian",
            "kernel": "Linux 6",
            "container": None,
            "virtual_machine": True,
            "start": state,
            "end": state,
            "others_cores": 0.013,
        },
        "protocol": {
            "mode": "standard",
            "label": "standard",
            "min_queries": 512,
            "min_seconds": 20.0,
            "burst_s": 0.5,
            "lead_in_queries": 2,
            "rounds": 41,
            "imgsz": 160,
            "batch": 1,
            "threads": 1,
            "seed": 0,
            "input": "noise",
            "timed": "inference only",
            "interval": "95 %, bootstrap over rounds",
            "seconds": 90.0,
        },
        "noisy": False,
        "noise": [],
    }


class Page(HTMLParser):
    """The tags of a page with the names of their attributes, its links, and its text outside scripts."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, tuple[str, ...]]] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "wbr":  # where a long name may break depends on the name
            return
        self.tags.append((tag, tuple(name for name, _ in attrs)))
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] not in ("script", "style"):
            self.text += f"{data}\n"


def write(folder: Path, content: dict[str, Any], measured: dict[str, Any]) -> tuple[Page, str]:
    folder.mkdir(exist_ok=True)
    report.write_report(content, measured, folder)
    return Page((folder / "report.html").read_text()), (folder / "report.md").read_text()


@pytest.fixture
def run(run_command: Any) -> Any:
    return partial(run_command, report.app)


def run_folder(root: Path, name: str) -> Path:
    folder = root / name
    (folder / "06_benchmark").mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(summary(name)))
    (folder / "06_benchmark" / "latency.json").write_text(json.dumps(record()))
    return folder


def test_markdown_holds_the_numbers(tmp_path: Path) -> None:
    _, markdown = write(tmp_path, summary(), record())
    for row in (
        "| mAP50-95 | 0.6030 | 0.5920 | −0.0110 |",
        "| mAP50 | 0.9000 | 0.9100 | +0.0100 |",
        "| parameters | 3 M | 1.2 M | 2.50× |",
        "| MACs | 1 G | 400 M | 2.50× |",
        "| file size | 12 MB | 4.8 MB | 2.50× |",
        "| training epochs | 20 | 20 |  |",
        "| onnxruntime p50, ms | 20.00 | 10.00 | 2.00× |",
        "| torch p90, ms | 33.00 | 24.00 | 1.38× |",
        "| onnxruntime | 2.00× | 1.90–2.10 | 2.50× | 80 % |",
        "| pruned | onnxruntime 9.9 | 0.5920 | 10.00 | 9.80–10.30 | 11.00 | 12.00 | 123 | 88 | 105 MB | front |",
        "| dense | onnxruntime 9.9 | 0.6030 | 20.00 | 19.60–20.60 | 22.00 | 24.00 | 123 | 88 | 105 MB | front |",
        "| pruned | torch 9.9 | 0.5920 | 20.00 | 19.60–20.60 | 22.00 | 24.00 | 123 | 88 | 105 MB |  |",
        "| dense | passed | 16 | 0.0012 | 3e-06 | 41 / 41 | 0 |",
    ):
        assert row in markdown.splitlines()
    assert "```sh\npython -m compress.run --config configs/pipelines/demo.yaml\n```" in markdown
    assert "](pareto.png)" in markdown
    assert "- not known: container, governor, temperature, °C" in markdown  # unknown stays unknown
    assert "- clock, MHz: 2600.0\n" in markdown  # the same at the end


def test_the_page_says_the_same_as_the_markdown(tmp_path: Path) -> None:
    page, _ = write(tmp_path, summary(), record())
    for text in (sections.verdict(summary()), "2.50×", "−0.0110", "9.80–10.30", "Acme 9000", "Reproduce"):
        assert text in page.text


def test_the_page_needs_no_network(tmp_path: Path) -> None:
    page, _ = write(tmp_path, summary(), record())
    content = (tmp_path / "report.html").read_text()
    assert set(page.links) == {"data:,"}
    assert len(content) < 60_000
    assert "default-src 'none'" in content
    assert "@import" not in content.split("</style>")[0]
    files = [path.name for path in sorted(tmp_path.iterdir())]
    assert files == ["pareto.png", "report.csv", "report.html", "report.md"]


def test_the_plot_has_a_mark_for_each_model_and_runtime(tmp_path: Path) -> None:
    write(tmp_path, summary(), record())
    content = (tmp_path / "report.html").read_text()
    marks = re.findall(r'<g class="mark( hollow)?".*? aria-label="([^"]*)">(.*?)</g>', content, re.DOTALL)
    assert [(bool(hollow), label.splitlines()[0]) for hollow, label, _ in marks] == [
        (True, "dense, torch"),
        (True, "dense, onnxruntime"),
        (False, "pruned, torch"),
        (False, "pruned, onnxruntime"),
    ]
    _, label, drawn = marks[3]
    assert label.splitlines()[1:] == [
        "p50 10.00 ms (9.80–10.30), p90 11.00 ms",
        "mAP50-95 0.5920; 400 M MACs",
        "threads: 1, 160 px",
        "on the Pareto front",
    ]
    # The axis ends at 1.12 × 30.9 ms, so that 10 ms are 28.9 % of it.
    bar = re.search(r'x1="([\d.]+)%".* x2="([\d.]+)%"', drawn)
    mark = re.search(r'<svg x="([\d.]+)%"', drawn)
    assert bar
    assert mark
    shares = [float(bar[1]), float(mark[1]), float(bar[2])]
    assert shares == pytest.approx([100 * ms / (1.12 * 30.9) for ms in (9.8, 10.0, 10.3)], abs=0.01)


def test_the_image_is_a_png_of_the_promised_size(tmp_path: Path) -> None:
    write(tmp_path, summary(), record())
    head = (tmp_path / "pareto.png").read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", head[16:24]) == (1080, 660)


@pytest.mark.parametrize(
    ("ratio", "interval", "pruned_map", "expected"),
    [
        (2.0, [1.9, 2.1], 0.592, "is 2.00 times as fast as the dense one (p50 10.00 ms instead of 20.00 ms), "),
        (1.01, [0.99, 1.03], 0.592, "is not measurably faster than the dense one"),
        (0.8, [0.7, 0.9], 0.592, "is slower than the dense one, 0.80 times its speed"),
        (2.0, None, 0.592, "is 2.00 times as fast"),  # an interval that nobody measured
        (2.0, [1.9, 2.1], 0.592, "its mAP50-95 is 0.011 lower (0.592 instead of 0.603)."),
        (2.0, [1.9, 2.1], 0.610, "its mAP50-95 is 0.007 higher (0.610 instead of 0.603)."),
        (2.0, [1.9, 2.1], 0.6032, "its mAP50-95 is the same (0.603)."),
        (2.0, [1.9, 2.1], None, "its mAP50-95 is unknown."),
        (2.0, [1.9, 2.1], 0.0, "its mAP50-95 is 0.603 lower (0.000 instead of 0.603)."),
    ],
)
def test_the_verdict_follows_the_numbers(
    ratio: float, interval: list[float] | None, pruned_map: float | None, expected: str
) -> None:
    content = summary()
    content["speedup"]["onnxruntime"] = ratio
    content["speedup_interval"]["onnxruntime"] = interval
    content["pruned"]["map50_95"] = pruned_map
    assert expected in sections.verdict(content)


def test_two_models_that_find_nothing_are_not_called_equal() -> None:
    content = summary()
    content["dense"]["map50_95"] = content["pruned"]["map50_95"] = 0.0
    expected = "and its mAP50-95 is 0 for both: neither finds anything, so it says nothing about the cut."
    assert sections.verdict(content).endswith(expected)


def test_the_verdict_speaks_of_another_runtime_or_of_none() -> None:
    content = summary()
    del content["speedup"]["onnxruntime"]
    assert sections.verdict(content).startswith("In torch the pruned model is 1.50 times as fast")
    content["speedup"] = {}
    assert sections.verdict(content).startswith(
        "The latency was not measured; the mAP50-95 of the pruned model is 0.011"
    )


def test_quick_and_noisy_measurements_say_so(tmp_path: Path) -> None:
    measured = record()
    _, trusted = write(tmp_path, summary(), measured)
    assert "> " not in trusted
    measured["protocol"]["mode"] = "quick"
    measured["noisy"], measured["noise"] = True, ["other processes kept 1.50 of 2 cores busy"]
    page, doubted = write(tmp_path, summary(), measured)
    assert "> Quick measurement: for development, not for publication." in doubted
    assert "> Noisy measurement: other processes kept 1.50 of 2 cores busy." in doubted
    assert "Noisy measurement: other processes kept 1.50 of 2 cores busy." in page.text


def test_a_count_of_instructions_is_not_called_quick() -> None:
    counted = {"protocol": {"mode": "quick", "counted": "instructions of the inference"}}
    assert facts.warnings(counted) == []


def test_a_run_is_named_where_several_are_printed(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [run_folder(tmp_path, name) for name in ("aligned", "unaligned")]
    assert run(*folders, "--output", tmp_path / "both") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line in ("aligned", "unaligned")] == ["aligned", "unaligned"]
    assert run(folders[0], "--output", tmp_path / "one") == 0
    assert "aligned" not in capsys.readouterr().out.splitlines()


def test_a_difference_that_no_table_shows_puts_nothing_on_the_front(run: Any, tmp_path: Path) -> None:
    cells = [cell("a", 10.0), cell("b", 20.0), cell("c", 30.0)]
    folder = benchmark_folder(tmp_path / "x", cells, {"a": 0.59010426, "b": 0.59010449, "c": 0.5903})
    assert run(folder) == 0
    rows = list(csv.DictReader((folder / "report.csv").read_text().splitlines()))
    assert [row["on_pareto_front"] for row in rows] == ["True", "False", "True"]


def test_words_are_read_from_the_left_and_numbers_from_the_right() -> None:
    table = Table(
        ["export", "parity", "images", "error"],
        [["a", "passed", "16", "0.0045"], ["b", "FAILED", "–", ""], ["c", "–", "2", Number.of(0.5, "{:.1f}")]],
    )
    assert to_markdown([table]).splitlines()[1] == "| :-- | :-- | --: | --: |"
    page = to_html("t", [table])
    assert '<th scope="col" class="text">parity</th><th scope="col">images</th>' in page
    assert '<td class="text">FAILED</td><td>–</td>' in page


def test_a_long_name_may_break_at_its_joints_and_keeps_its_text() -> None:
    page = to_html("t", [Table(["layer"], [["/model.0/cv1_<b>.conv"]])])
    assert '<th scope="row">/<wbr>model.<wbr>0/<wbr>cv1_<wbr>&lt;b&gt;.<wbr>conv</th>' in page


def test_errors_of_parity_have_no_exponent_where_they_are_large() -> None:
    output = {"max_box_error_px": 123.4, "max_score_error": 8.13e-06}
    _, table = facts.parity({"a": {"passed": False, "images": 16, "outputs": [output]}}, 2)
    assert isinstance(table, Table)
    assert list(table.rows[0][:5]) == ["a", "FAILED", "16", "123", "8.1e-06"]


@pytest.mark.parametrize(
    ("count", "text"),
    [(999_400, "999 k"), (999_600, "1 M"), (1_080_000_000, "1.08 G"), (999_999_999, "1 G"), (999, "999"), (None, "–")],
)
def test_a_size_never_needs_an_exponent(count: int | None, text: str) -> None:
    assert wording.size(count) == text


def test_below_a_millisecond_the_third_digit_is_shown(run: Any, tmp_path: Path) -> None:
    folder = benchmark_folder(tmp_path / "x", [cell("a", 0.3456), cell("b", 1.0)], {"a": 0.5, "b": 0.6})
    assert run(folder) == 0
    markdown = (folder / "report.md").read_text().splitlines()
    assert "| a | onnxruntime | 0.5000 | 0.346 | 0.342–0.349 | 0.346 | 0.346 | – | – | – | front |" in markdown
    assert "| b | onnxruntime | 0.6000 | 1.00 | 0.990–1.010 | 1.00 | 1.00 | – | – | – | front |" in markdown


def test_unknown_values_are_a_dash_not_a_guess(tmp_path: Path) -> None:
    content, measured = summary(), record()
    content["pruned"]["latency_ms"]["torch"] = {"p50": None, "p90": None}
    content["parity"] = {}
    measured["device"]["cpu"] = None
    measured["cells"][0]["peak_memory_bytes"] = None
    _, markdown = write(tmp_path, content, measured)
    assert "| torch p50, ms | 30.00 | – | – |" in markdown
    assert "on an unknown CPU with one thread" in markdown
    assert "Not recorded." in markdown


def hostile() -> tuple[dict[str, Any], dict[str, Any]]:
    content, measured = summary(HOSTILE), record()
    content["data"] = content["split"] = HOSTILE
    content["commands"] = [HOSTILE]
    content["parity"] = {HOSTILE: content["parity"]["dense"]}
    for side in ("dense", "pruned"):
        content[side]["latency_ms"][HOSTILE] = content[side]["latency_ms"].pop("torch")
    for table in ("speedup", "speedup_interval", "realised"):
        content[table][HOSTILE] = content[table].pop("torch")
    for cell in measured["cells"]:
        if cell["runtime"] == "torch":
            cell["runtime"] = HOSTILE
        cell["runtime_version"] = HOSTILE
    measured["device"] |= {"cpu": HOSTILE, "os": HOSTILE, "container": HOSTILE}
    measured["noisy"], measured["noise"] = True, [HOSTILE]
    return content, measured


def test_strange_names_change_no_tag_of_the_page(tmp_path: Path) -> None:
    content, measured = hostile()
    harmless = json.loads(json.dumps([content, measured]).replace(json.dumps(HOSTILE)[1:-1], "harmless"))
    expected, _ = write(tmp_path / "harmless", *harmless)
    page, markdown = write(tmp_path / "hostile", content, measured)
    assert page.tags == expected.tags
    assert "alert(1)" in page.text  # it is there, as text
    assert "\x1b" not in (tmp_path / "hostile" / "report.html").read_text()
    assert "<script" not in re.sub(r"```+sh.*?```+", "", markdown, flags=re.DOTALL)


def test_strange_names_keep_markdown_tables_and_code_whole(tmp_path: Path) -> None:
    _, markdown = write(tmp_path, *hostile())
    tables: list[set[int]] = [set()]
    for line in markdown.splitlines():
        if line.startswith("|"):
            tables[-1].add(len(re.findall(r"(?<!\\)\|", line)))
        elif tables[-1]:
            tables.append(set())
    assert [sorted(widths) for widths in tables if widths] == [[5], [6], [12], [8]]
    assert not any(line.startswith("# x") for line in markdown.splitlines())


def test_blocks_are_escaped_by_hand_computed_examples() -> None:
    assert to_markdown([Table(["a|b"], [["*c*"]])]) == "| a\\|b |\n| :-- |\n| \\*c\\* |\n"
    assert to_markdown([Code(["echo ```"])]) == "````sh\necho ```\n````\n"
    assert '<p class="note">1 &lt; 2 &amp; &quot;3&quot;</p>' in to_html("t", [Text('1 < 2 & "3"', "note")])


def test_the_terminal_shows_the_table_and_no_escape_sequences(capsys: pytest.CaptureFixture[str]) -> None:
    report.print_table(summary(), record())
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "mAP50-95 0.6030 0.5920 −0.0110" in lines
    assert "onnxruntime 2.00× 1.90–2.10 2.50× 80 %" in lines
    report.print_table(*hostile())
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "[red]" in "".join(out.split())  # not read as markup


def test_command_line_rewrites_the_report_of_a_run(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_folder(tmp_path, "demo")
    assert run(folder) == 0
    assert (folder / "report.html").is_file()
    assert "80 %" in capsys.readouterr().out


def test_several_runs_share_one_page(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [run_folder(tmp_path, name) for name in ("aligned", "unaligned")]
    assert run(*folders, "--output", tmp_path / "both") == 0
    markdown = (tmp_path / "both" / "report.md").read_text()
    assert markdown.startswith("# 2 runs side by side\n")
    assert "| unaligned, onnxruntime | 0.603 | 0.592 | 2.50× | 2.00× | 80 % |" in markdown
    assert (tmp_path / "both" / "report.html").read_text().count('<g class="mark') == 8
    assert not (folders[0] / "report.md").exists()


def test_a_folder_without_a_finished_run_is_one_line(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path) == 2
    error = capsys.readouterr().err
    assert (
        error
        == f"error: no record of a benchmark in {tmp_path}: give the folder of a finished run, such as runs/demo\n"
    )
    folder = run_folder(tmp_path, "old")
    content = copy.deepcopy(summary())
    del content["macs_speedup"]
    (folder / "summary.json").write_text(json.dumps(content))
    assert run(folder) == 2
    error = capsys.readouterr().err
    assert "is incomplete (KeyError('macs_speedup')): run the pipeline or the benchmark again" in error
    assert error.count("\n") == 1


def cell(model: str, p50_ms: float, **more: Any) -> dict[str, Any]:
    interval = {"p50_ms": [0.99 * p50_ms, 1.01 * p50_ms]}
    base = {"model": model, "runtime": "onnxruntime", "model_sha256": f"sha {model}", "p50_ms": p50_ms}
    return {**base, "p90_ms": p50_ms, "p99_ms": p50_ms, "intervals": interval, **more}


def benchmark_folder(folder: Path, cells: list[dict[str, Any]], scores: dict[str, float], **more: Any) -> Path:
    """A folder in which latency and accuracy left their records."""
    for name, content in (
        ("latency", {**record(), "cells": cells, **more}),
        ("accuracy", [{"model": f"{m}.onnx", "model_sha256": f"sha {m}", "map50_95": s} for m, s in scores.items()]),
    ):
        (folder / name).mkdir(parents=True)
        (folder / name / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_a_folder_of_latency_and_accuracy(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compared = [{"runtime": "onnxruntime", "baseline": "a", "model": "b", "speedup": 2.0, "interval": [1.9, 2.1]}]
    cells = [cell("a", 20.0), cell("b", 10.0), cell("c", 30.0)]
    folder = benchmark_folder(tmp_path / "zoo", cells, {"a": 0.5, "b": 0.5, "d": 0.1}, comparisons=compared)
    assert run(folder) == 0
    markdown = (folder / "report.md").read_text().splitlines()
    assert markdown[0] == "# zoo"
    assert "| b | onnxruntime | 0.5000 | 10.00 | 9.90–10.10 | 10.00 | 10.00 | – | – | – | front |" in markdown
    assert "| a | onnxruntime | 0.5000 | 20.00 | 19.80–20.20 | 20.00 | 20.00 | – | – | – |  |" in markdown
    assert "| c | onnxruntime | – | 30.00 | 29.70–30.30 | 30.00 | 30.00 | – | – | – |  |" in markdown
    assert "| d.onnx |  | 0.1000 | – | – | – | – | – | – | – |  |" in markdown
    assert "| b against a | onnxruntime | 2.00× | 1.90–2.10 |" in markdown
    assert any(line.startswith("Without a score, and so in no plot: 1 of 4 rows.") for line in markdown)
    assert (folder / "report.html").read_text().count('<g class="mark') == 2
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "b onnxruntime 10.00 ms mAP50-95 0.5000 front" in lines
    assert lines[-1] == f"report: {folder / 'report.html'}"


def test_batches_and_streams_have_plots_of_their_own(run: Any, tmp_path: Path, capsys: Any) -> None:
    cells = [cell("a", 20.0), cell("b", 10.0), cell("a", 80.0, batch=8), cell("a", 50.0, streams=4)]
    folder = benchmark_folder(tmp_path / "zoo", cells, {"a": 0.5, "b": 0.4})
    assert run(folder) == 0
    plots = (folder / "report.html").read_text().split("<figure>")[1:]
    assert [plot.count('<g class="mark') for plot in plots] == [2, 1, 1]
    titles = re.findall('<figure><p class="note">(.*?)</p>', (folder / "report.html").read_text())
    device = records.device_key(record()["device"])
    assert titles == [device, f"{device}, batch 8", f"{device}, 4 streams"]
    assert "a onnxruntime, batch 8 80.00 ms" in " ".join(capsys.readouterr().out.split())


def test_a_score_of_another_folder_belongs_to_the_same_file(run: Any, tmp_path: Path) -> None:
    timed = benchmark_folder(tmp_path / "timed", [cell("a", 20.0)], {})
    scored = benchmark_folder(tmp_path / "scored", [cell("b", 10.0)], {"a": 0.5, "b": 0.4})
    assert run(timed, scored) == 0
    rows = list(csv.DictReader((tmp_path / "report" / "report.csv").read_text().splitlines()))
    assert [(row["run"], row["model"], row["score"]) for row in rows] == [("timed", "a", "0.5"), ("scored", "b", "0.4")]


def test_equal_names_are_told_apart_by_their_folders(run: Any, tmp_path: Path) -> None:
    folders = [benchmark_folder(tmp_path / name, [cell("model", 20.0)], {"model": 0.5}) for name in ("x", "y")]
    assert run(*folders, "--output", tmp_path / "out") == 0
    markdown = (tmp_path / "out" / "report.md").read_text()
    assert "| x/model | onnxruntime |" in markdown
    assert "| y/model | onnxruntime |" in markdown
    deep = [benchmark_folder(tmp_path / name / "run", [cell("m", 20.0)], {"m": 0.5}) for name in ("p", "q")]
    assert run(*deep, "--output", tmp_path / "out") == 0
    assert "## q/run" in (tmp_path / "out" / "report.md").read_text()


def test_all_of_a_folder_of_runs(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a shell writes runs/*: with the store, with folders of something else, and with the report of last time."""
    runs = [run_folder(tmp_path, "demo"), benchmark_folder(tmp_path / "zoo", [cell("a", 20.0)], {"a": 0.5})]
    (tmp_path / "espalier.sqlite").write_text("")
    (tmp_path / "notes").mkdir()
    assert run(*sorted(tmp_path.iterdir())) == 0
    out = capsys.readouterr().out
    assert f"report: {tmp_path / 'notes'} holds no record, left out" in out
    assert "espalier.sqlite" not in out
    assert run(*sorted(tmp_path.iterdir()), tmp_path / "nowhere") == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'nowhere'} does not exist: check the path\n"
    assert (tmp_path / "report" / "report.md").read_text().startswith(f"# {len(runs)} runs side by side\n")
    assert run(*sorted(tmp_path.iterdir())) == 0
    assert f"{tmp_path / 'report'} holds no record" not in capsys.readouterr().out


def test_instructions_have_a_plot_and_columns_of_their_own(run: Any, tmp_path: Path) -> None:
    counted = {"unit": "instructions", "runtime": "ncnn", "instructions": [200e6, 202e6, 201e6]}
    kept = {key: value for key, value in cell("c", 1.0).items() if not key.endswith("_ms") and key != "intervals"}
    compared = {"runtime": "ncnn", "baseline": "b", "model": "c", "speedup": 2.0, "interval": [1.99, 2.01]}
    more = {"comparisons": [{**compared, "unit": "instructions"}]}
    folder = benchmark_folder(tmp_path / "x", [cell("a", 20.0), {**kept, **counted}], {"a": 0.5, "c": 0.4}, **more)
    assert run(folder) == 0
    assert sorted(path.name for path in folder.glob("*.png")) == ["pareto-2.png", "pareto.png"]
    markdown = (folder / "report.md").read_text()
    assert "| a | onnxruntime | 0.5000 | 20.00 | 19.80–20.20 | 20.00 | 20.00 | – | – | – | – | front |" in markdown
    assert "| c | ncnn | 0.4000 | – | – | – | – | 201 M | 3 | – | – | front |" in markdown
    assert "how long they take, nobody measured" in markdown
    assert "| c against b | ncnn | 2.00× | 1.99–2.01 |" in markdown
    assert "| runtime | fewer instructions |" in markdown
    content = (folder / "report.html").read_text()
    first, second = re.findall(r"<figure>.*?</figure>", content, re.DOTALL)
    assert ("latency, ms" in first, "instructions" in first) == (True, False)
    assert ("instructions of one query" in second, " ms" in second) == (True, False)
    assert "p50 201 M instructions" in second
    rows = list(csv.DictReader((folder / "report.csv").read_text().splitlines()))
    assert [(row["p50_ms"], row["p50_instructions"]) for row in rows] == [("20.0", ""), ("", "201000000.0")]


def test_layers_are_shown_side_by_side(tmp_path: Path) -> None:
    def layers(*costs: float) -> list[dict[str, Any]]:
        return [{"name": f"l{i}", "type": "Conv", "ms": cost} for i, cost in enumerate(costs)]

    measured = record()
    measured["cells"][1]["layers"] = layers(1.0, 4.0)
    measured["cells"][3]["layers"] = layers(0.5, 1.0)
    measured["cells"][2]["layers"] = None
    measured["cells"][1] |= {"layers_share": 0.914, "layers_left_out": "the decoding"}
    measured["cells"][3] |= {"layers_share": 0.88, "layers_left_out": "the decoding"}
    _, markdown = write(tmp_path, summary(), measured)
    assert "## Layers in onnxruntime: dense against pruned" in markdown
    assert "| l1 | 4.000 | 1.000 | 4.00× |\n| l0 | 1.000 | 0.500 | 2.00× |" in markdown
    assert "Layers in torch" not in markdown
    assert "Together the layers are, of a query: dense 91 %, pruned 88 %. Left out: the decoding." in markdown
    content = (tmp_path / "report.html").read_text()
    assert re.findall(r'<i class="m[01]" style="width:([\d.]+)%">', content) == ["100.00", "25.00", "25.00", "12.50"]


def test_a_sheet_reads_no_formula_in_a_name(run: Any, tmp_path: Path) -> None:
    names = ["=HYPERLINK(1)", " @a", 'a,b"c\nd', "-1+2"]
    folder = benchmark_folder(tmp_path / "x", [cell(name, 20.0) for name in names], {})
    assert run(folder) == 0
    rows = list(csv.DictReader((folder / "report.csv").read_text().splitlines()))
    assert [row["model"] for row in rows] == ["'=HYPERLINK(1)", "' @a", 'a,b"c d', "'-1+2"]
    assert {row["p50_ms"] for row in rows} == {"20.0"}


def test_a_record_of_another_device_shows_what_it_has(run: Any, tmp_path: Path) -> None:
    folder = benchmark_folder(
        tmp_path / "x",
        [cell("a", 20.0)],
        {"a": 0.5},
        device={"name": "jetson-nano", "soc": "Tegra", "memory_bytes": 4_000_000_000, "start": {"fan": 1}},
        protocol={"mode": "standard", "streams": 4, "order": [[0]]},
    )
    assert run(folder) == 0
    markdown = (folder / "report.md").read_text()
    for line in ("- name: jetson-nano", "- soc: Tegra", "- memory: 4 GB", "- fan: 1 at the start, – at the end"):
        assert line in markdown.splitlines()
    assert "- streams: 4" in markdown
    assert "order" not in markdown


def test_a_comparison_says_of_which_batch_it_is() -> None:
    compared = {"runtime": "torch", "baseline": "a", "model": "b", "unit": "ms", "speedup": 2.0, "interval": [1.9, 2.1]}
    (table,) = facts.comparisons({"comparisons": [{**compared, "batch": 1}, {**compared, "batch": 8}]})
    assert isinstance(table, Table)
    assert [row[1] for row in table.rows] == ["torch", "torch, batch 8"]
