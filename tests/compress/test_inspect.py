from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from compress import inspect
from compress.channels.coverage import group_shares, prunable_share
from compress.channels.graph import build_graph
from compress.errors import CheckpointError, EspalierError, GraphError, SettingsError
from compress.inspection.blocks import Block, Layer, blocks
from compress.inspection.gammas import Gammas, bin_edges, gamma_png, prunable_gammas, start_mean, title_of
from compress.inspection.graph_page import page
from compress.inspection.overview import BY_RULE, Shortener, overview, short_widths
from compress.settings import Budget, LayerRule
from topologies import Chain, ChunkTie, Concat, Depthwise, Grouped, LayerScale, Residual, SplitFixed, Transposed

ANY = Budget(multiple_of=1, min_width=1)


# What a group is worth


def test_share_in_prunable_groups() -> None:
    """Of Chain's 232 + 888 + 52 parameters, the 4 biases of the frozen head alone hang on no prunable channel."""
    graph = build_graph(Chain().eval(), 16)
    assert prunable_share(graph, graph.params) == pytest.approx(1 - 4 / 1172)
    assert prunable_share(graph, graph.macs) == 1.0
    assert prunable_share(graph, graph.macs, ["frozen", None, "frozen"]) == pytest.approx(912 / 1128)


def test_share_beside_fixed_channels() -> None:
    """SplitFixed: a (348 parameters) is frozen; b has 228; of head's 60, its 4 outputs read 6 channels of b."""
    graph = build_graph(SplitFixed().eval(), 16)
    assert prunable_share(graph, graph.params) == pytest.approx((228 + 24) / 636)


def test_a_group_counts_where_it_is_made_and_read() -> None:
    """Chain: 216, 864 and 48 MACs a pixel; b's convolution counts for a and for b."""
    graph = build_graph(Chain().eval(), 16)
    assert group_shares(graph, graph.macs) == pytest.approx([1080 / 1128, 912 / 1128, 48 / 1128])


# Rows


def test_tied_groups_may_have_the_widths_that_all_may_have() -> None:
    rule = LayerRule(layers="b.conv", multiple_of=4)  # the second half alone is made by b too
    found = overview(build_graph(ChunkTie().eval(), 16), Budget(multiple_of=2, min_width=2, rules=(rule,)))
    assert [(row.name, row.tie, row.allowed) for row in found.groups] == [
        ("a.conv[0:8]", 1, (8, 4)),
        ("a.conv[8:16]", 1, (8, 4)),
        ("head", None, (4,)),
    ]
    assert found.groups[1].also_in == ("b",)
    assert found.groups[1].read_by == ("b", "head")


def test_a_rule_of_the_budget_freezes_what_it_is_tied_to() -> None:
    rules = (LayerRule(layers="b.conv", freeze=True),)
    found = overview(build_graph(ChunkTie().eval(), 16), Budget(multiple_of=2, min_width=2, rules=rules))
    assert [row.frozen for row in found.groups] == [BY_RULE, BY_RULE, "output of the model"]
    assert (found.prunable, found.prunable_macs, found.least_macs) == ([], 0.0, 1.0)


def test_least_widths() -> None:
    """Chain down to a 2, b 3: 54 + 54 + 12 of 1128 MACs a pixel."""
    found = overview(build_graph(Chain().eval(), 16), ANY)
    assert found.least_macs == pytest.approx(120 / 1128)
    assert found.least_params == pytest.approx((54 + 4 + 54 + 6 + 16) / 1172)
    assert (found.macs, found.params) == (256 * 1128, 1172)


def test_frozen_channels_by_reason_the_most_first() -> None:
    found = overview(build_graph(SplitFixed().eval(), 16), ANY)
    assert [(row.channels, row.reason, row.groups, row.layers) for row in found.frozen] == [
        (12, "split into fixed sizes [8, 4] in the model", (1,), ("a",)),
        (4, "output of the model", (3,), ("head",)),
    ]


def test_names_are_shortened_where_all_of_a_module_is_meant() -> None:
    shorten = Shortener([("a.conv", "a.bn"), ("b.m.conv", "b.m.bn", "b.n")])
    assert shorten(("a.conv", "a.bn", "b.m.conv", "b.m.bn")) == ("a", "b.m")
    assert shorten(("b.n", "b.m.bn", "b.m.conv")) == ("b",)
    assert shorten(("a.bn", "b.m.bn")) == ("a.bn", "b.m.bn")


@pytest.mark.parametrize(
    ("widths", "text"),
    [
        ([64, 48, 32, 16], "16…64 step 16"),
        ([7, 6, 5, 4], "4…7"),
        ([50, 48, 40, 32, 24], "24…48 step 8, 50"),  # the dense width fits no rule
        ([64, 32, 16, 8], "8, 16, 32, 64"),
        ([48, 32, 16], "16, 32, 48"),
        ([5], "5"),
    ],
)
def test_widths_in_a_few_signs(widths: list[int], text: str) -> None:
    assert short_widths(widths) == text


# Blocks and layers


def blocks_of(model: nn.Module) -> dict[str, Block]:
    model.eval()
    return {block.name: block for block in blocks(build_graph(model, 16), model)}


def only(block: Block) -> Layer:
    (layer,) = block.layers
    return layer


def test_blocks_connect_through_operations_of_the_model() -> None:
    """x = a; x = x + b(x); head(x + c(x))."""
    found = blocks_of(Residual())
    assert [(name, block.kind, block.sources) for name, block in found.items()] == [
        ("a", "Block", ()),
        ("b", "Block", (0,)),
        ("c", "Block", (0, 1)),
        ("head", "Conv2d", (0, 1, 2)),
    ]


def test_what_a_layer_reads_and_makes() -> None:
    """In forward order: a makes group 0, c 1, b 2."""
    head = only(blocks_of(Concat())["head"])
    assert head.reads == ((1, 10), (0, 8), (2, 6))
    assert (head.makes, head.kind, head.widths) == (((3, 4),), "1×1", (24, 4))
    assert head.macs == pytest.approx(24 * 4 / (3 * 8 * 9 + 8 * 6 * 9 + 8 * 10 * 9 + 24 * 4))


def test_widths_of_layers_whose_weights_are_laid_out_otherwise() -> None:
    depthwise = blocks_of(Depthwise())
    assert only(depthwise["a"]).reads == ((None, 3),)
    assert (only(depthwise["dw"]).widths, only(depthwise["dw"]).kind) == ((8, 8), "3×3 dw")
    assert only(depthwise["multiplied"]).widths == (8, 16)
    grouped = only(blocks_of(Grouped())["grouped"])
    assert (grouped.widths, len(grouped.makes)) == ((16, 24), 4)
    up = only(blocks_of(Transposed())["up"])
    assert (up.reads, up.makes, up.kind) == (((0, 8),), ((1, 6),), "2×2 ×2")


def test_containers_are_no_blocks() -> None:
    found = blocks_of(nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU()), nn.Conv2d(8, 4, 1)))
    assert [(name, block.kind, block.sources) for name, block in found.items()] == [
        ("0.0", "Conv2d", ()),
        ("0.1", "ReLU", (0,)),
        ("1", "Conv2d", (1,)),
    ]
    assert only(found["0.0"]).kind == "3×3 /2"


def test_a_parameter_of_the_model_itself_is_no_block() -> None:
    assert list(blocks_of(LayerScale())) == ["a", "b", "head"]


# The picture of γ


def gammas_of(model: nn.Module, start: float | None = None, budget: Budget = ANY) -> tuple[Gammas, int]:
    """The γ of a model's prunable channels, and how many channels these are."""
    graph = build_graph(model, 16)
    found = overview(graph, budget)
    return prunable_gammas(graph, model, [row.frozen for row in found.groups], 0.05, start), found.prunable_channels


def test_near_zero_share_of_prunable_gammas() -> None:
    """SplitFixed: a is frozen, so the 6 γ of b alone count; 2 of them are below 0.05 · mean 0.5."""
    model = SplitFixed().eval()
    model.a.bn.weight.data.zero_()
    model.b.bn.weight.data = torch.tensor([0.0, -0.02, 0.03, 1.0, -1.0, 0.95])
    gammas, _ = gammas_of(model)
    assert list(gammas.layers) == ["b.bn"]
    assert gammas.layers["b.bn"] == pytest.approx([0.0, 0.02, 0.03, 1.0, 1.0, 0.95])
    assert gammas.threshold == pytest.approx(0.025)
    assert gammas.near_zero(gammas.all) == pytest.approx(2 / 6)
    known, _ = gammas_of(model, 1.0)
    assert (known.threshold, known.near_zero(known.all)) == (0.05, 0.5)


def test_gammas_are_not_called_channels() -> None:
    """Residual: a, b and c are one group of 8 channels, each with a batch norm of its own."""
    gammas, channels = gammas_of(Residual().eval())
    assert title_of(gammas, channels, "r.pt") == "24 γ of 8 prunable channels, r.pt"


def test_what_the_budget_freezes_is_not_drawn() -> None:
    rules = (LayerRule(layers="b.conv", freeze=True),)
    gammas, channels = gammas_of(Chain().eval(), budget=ANY.model_copy(update={"rules": rules}))
    assert (list(gammas.layers), channels) == (["a.bn"], 8)


def test_the_picture_is_a_png_also_with_odd_names() -> None:
    model = nn.Sequential()
    model.add_module("a$b_^", nn.Conv2d(3, 8, 1))
    model.add_module("漢字\u202e", nn.BatchNorm2d(8))
    model.add_module("head", nn.Conv2d(8, 4, 1))
    gammas, _ = gammas_of(model.eval())
    png = gamma_png(gammas, "$\\x$ 漢字")
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))
    assert width > 900
    assert height > 400


def test_a_picture_of_many_layers_grows_in_columns() -> None:
    layers = [layer for _ in range(40) for layer in (nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))]
    model = nn.Sequential(nn.Conv2d(3, 8, 1), *layers, nn.Conv2d(8, 4, 1)).eval()
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.zero_()  # all dead: no width of the axis follows from them
    gammas, _ = gammas_of(model, 1.0)
    png = gamma_png(gammas, "dead")
    assert (len(gammas.layers), gammas.near_zero(gammas.all)) == (40, 1.0)
    assert int.from_bytes(png[20:24], "big") < 40 * 0.27 * 110  # 20 rows, not 40


@pytest.mark.parametrize(("threshold", "upper"), [(0.056, 7.4), (0.001, 3.0), (0.5, 1.0), (0.999, 1.0)])
def test_no_bin_lies_on_both_sides_of_the_threshold(threshold: float, upper: float) -> None:
    edges = bin_edges(threshold, upper, 80)
    assert (edges[0], edges[-1]) == (0.0, pytest.approx(upper))
    assert np.abs(edges - threshold).min() == 0.0
    assert (np.diff(edges) > 0).all()
    assert 80 <= len(edges) - 1 <= 82


def test_every_value_is_near_zero_below_a_threshold_beyond_the_picture() -> None:
    assert bin_edges(2.0, 1.0, 4).tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_gammas_near_zero_have_a_colour_of_their_own_in_every_layer() -> None:
    """Half of the channels are dead: their bar is as tall as the layer's own, in the colour of the threshold."""
    from PIL import Image

    picture = {}
    for name, dead in (("dead", 8), ("alive", 0)):
        values = np.r_[np.full(dead, 0.001), np.full(16 - dead, 0.6)]
        png = gamma_png(Gammas({"a.bn": values, "b.bn": values}, 0.05, "5%"), "x")
        below = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)[370:]  # the layers
        near = (np.abs(below - (0xC8, 0x50, 0x1E)).sum(-1) < 30)[:, : below.shape[1] * 6 // 10]
        picture[name] = near.sum(axis=0).max()
    assert picture["dead"] > picture["alive"] + 20


def test_no_batch_norm_no_picture() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)).eval()
    with pytest.raises(GraphError, match="no γ to draw"):
        gammas_of(model)


@pytest.mark.parametrize(
    ("content", "mean"),
    [('{"sr": 1, "start_mean": 0.97}', 0.97), ('{"sr": 1}', None), ('{"start_mean": "x"}', None), ("[]", None)],
)
def test_mean_before_sparsity_training(tmp_path: Path, content: str, mean: float | None) -> None:
    assert start_mean(tmp_path) is None
    (tmp_path / "sparsity.json").write_text(content)
    assert start_mean(tmp_path) == mean


# The page


class Page(HTMLParser):
    """Chips, group rows, texts and every tag of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.chips: list[dict[str, str]] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.tags.append((tag, found))
        if found.get("class", "").split()[:1] == ["chip"]:
            self.chips.append(found)


def page_of(model: nn.Module, title: str = "model") -> str:
    graph = build_graph(model.eval(), 16)
    return page(title, blocks(graph, model), overview(graph, ANY), 16)


def test_a_chip_for_each_layer_with_its_groups() -> None:
    """Groups in forward order: 1 and 2 are the halves of a, 3 is head."""
    chips = Page(page_of(ChunkTie())).chips
    assert [(chip["data-reads"], chip["data-makes"]) for chip in chips] == [("", "1 2"), ("2", "2"), ("1 2", "3")]
    assert chips[0]["title"].splitlines()[:2] == ["a.conv  (3×3)", "3 → 16 channels"]
    assert "var(--g1) 0.00% 50.00%, var(--g2) 50.00% 100.00%" in chips[0]["style"]
    assert "transparent 0.00% 100.00%" in chips[2]["style"].partition("--makes")[2]  # frozen
    assert chips[2]["title"].splitlines()[-1] == "frozen: output of the model"
    assert [chip["class"] for chip in chips] == ["chip", "chip", "chip frozen"]


def test_connections_that_pass_a_block_have_lanes() -> None:
    """Residual: a is read by c and head too, b by head: two lanes; c → head is the trunk."""
    text = page_of(Residual())
    drawings = re.findall(r'<svg class="lanes".*?</svg>', text)
    assert [drawing.count("<path") for drawing in drawings] == [1, 1, 1, 2]  # a leaves; b leaves; a enters; both enter
    assert [drawing.count('y1="0"') for drawing in drawings] == [0, 2, 3, 1]
    assert "--lanes: 42px" in text
    assert "← a, b, c" in text


def test_a_small_share_is_escaped_once_wherever_it_is_shown() -> None:
    graph = build_graph(Chain().eval(), 16)
    small = [
        replace(block, layers=[replace(layer, macs=1e-4, params=1e-4) for layer in block.layers])
        for block in blocks(graph, Chain().eval())
    ]
    found = overview(graph, ANY)
    rows = [replace(row, macs=1e-4, params=1e-4) for row in found.groups]
    text = page("model", small, replace(found, groups=rows), 16)
    assert "&amp;lt;" not in text
    assert Page(text).chips[0]["title"].splitlines()[2] == "<0.1% of MACs, <0.1% of parameters"
    assert '<td class="n">&lt;0.1%</td><td class="n">&lt;0.1%</td>' in text


def test_the_page_is_complete_in_itself() -> None:
    text = page_of(Chain())
    assert re.findall(r"https?:|//\w|url\(|@import", text) == []
    assert [tag for tag, attributes in Page(text).tags if "src" in attributes] == []
    script = text.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in text


ATTACK = '"><img src=x onerror="document.title=1"><script>document.title=2</script>'


def attacked() -> nn.Module:
    """Names from a stranger; torch allows anything but dots in them."""
    attack = ATTACK.replace(".", "·")
    model = nn.Sequential()
    model.add_module(attack, nn.Sequential(nn.Conv2d(3, 8, 1)))
    model.add_module("b", nn.Conv2d(8, 4, 1))
    return model


def test_names_of_strangers_stay_text() -> None:
    text = page_of(attacked(), ATTACK)
    parsed = Page(text)
    assert [tag for tag, _ in parsed.tags if tag in ("img", "script")] == ["script"]
    assert [name for _, found in parsed.tags for name in found if name.startswith("on")] == []
    assert any(ATTACK.replace(".", "·") in chip["title"] for chip in parsed.chips)
    assert "\u202e" not in page_of(Chain(), "a\u202eb")


# In a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")


def visit(folder: Path, text: str, fragment: str = "") -> tuple[str, list[str]]:
    """Return the document as Chromium leaves it, and what its console said."""
    assert CHROMIUM is not None
    path = folder / "page.html"
    path.write_text(text, encoding="utf-8")
    switches = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --enable-logging=stderr --v=0 --dump-dom"
    )
    done = subprocess.run(
        [CHROMIUM, *switches.split(), f"--user-data-dir={folder / 'profile'}", f"{path.as_uri()}#{fragment}"],
        capture_output=True,
        timeout=60,
        check=True,
    )
    return done.stdout.decode(), [line for line in done.stderr.decode().splitlines() if "CONSOLE" in line]


def states(dom: str) -> list[set[str]]:
    return [set(chip["class"].split()) - {"chip", "frozen"} for chip in Page(dom).chips]


@needs_browser
def test_a_group_is_shown_with_its_layers_and_consumers(tmp_path: Path) -> None:
    """Group 2 of ChunkTie, the second half of a, is carried by b; b and head read it."""
    dom, console = visit(tmp_path, page_of(ChunkTie()), "g2")
    assert console == []
    assert states(dom) == [{"makes"}, {"makes", "reads"}, {"reads"}]
    panel = dom.partition('id="panel"')[2].partition("</aside>")[0]
    assert "a.conv[8:16]" in panel
    assert "a.conv[0:8]" not in panel


@needs_browser
def test_search_and_click(tmp_path: Path) -> None:
    dom, console = visit(tmp_path, page_of(Concat()), "q=C.CONV")
    assert console == []
    assert states(dom) == [set(), {"hit"}, set(), set()]
    assert "1 of 4 layers" in dom
    clicks = "<script>document.querySelectorAll('.chip')[1].click()</script></body>"
    allowed = re.sub(r"script-src 'sha256-[^']*'", "script-src 'unsafe-inline'", page_of(Concat()))
    dom, console = visit(tmp_path, allowed.replace("</body>", clicks))
    assert console == []
    assert states(dom) == [set(), {"makes"}, set(), {"reads"}]


@needs_browser
def test_no_script_but_the_page_s_own_runs(tmp_path: Path) -> None:
    dom, console = visit(tmp_path, page_of(attacked(), ATTACK), "g1")
    assert console == []
    assert states(dom)[0] == {"makes"}
    assert re.findall(r"<title>[12]</title>", dom) == []
    dom, console = visit(tmp_path, page_of(Chain()).replace("</body>", "<script>document.title=2</script></body>"))
    assert "<title>model</title>" in dom
    assert "Content Security Policy" in console[0]


# The command


def run(*arguments: object) -> None:
    import typer

    typer.main.get_command(inspect.app).main([str(argument) for argument in arguments], standalone_mode=False)


def test_everything_of_a_checkpoint(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    budget = tmp_path / "budget.yaml"
    budget.write_text("multiple_of: 4\nmin_width: 4\n")
    files = {name: tmp_path / "new" / f"graph.{name}" for name in ("png", "html", "json")}
    options = ("--gamma", files["png"], "--html", files["html"], "--json", files["json"])
    run(dense, "--imgsz", 64, "--budget", budget, *options)
    printed = capsys.readouterr().out
    content = json.loads(files["json"].read_text())
    model, graph, found = inspect.inspect(str(dense), 64, Budget(multiple_of=4, min_width=4))
    totals = content["totals"]
    assert totals["params"] == sum(p.numel() for p in model.parameters())
    assert totals["groups"] == len(graph.groups) == len(content["groups"])
    assert content["groups"][1]["allowed"] == [16, 12, 8, 4]
    assert content["groups"][1]["read_by"] == ["model.2.cv1"]
    assert content["budget"]["multiple_of"] == 4
    assert {row["reason"] for row in content["frozen"]} == {"output of the model"}
    rows = [line.split() for line in printed.splitlines()]
    assert ["2", "model.1.conv", "16", "4…16", "step", "4"] in [row[:6] for row in rows]
    assert f"params: {totals['params']:,}, {found.prunable_params:.1%} of them in prunable groups" in printed
    assert len(Page(files["html"].read_text("utf-8")).chips) == len(graph.positions)
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    assert printed.splitlines()[-3:] == [f"inspect: {files[name]}" for name in ("json", "html", "png")]


def test_a_pruned_model_and_all_layers(pruned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("--model", pruned, "--imgsz", 64, "--layers")
    printed = capsys.readouterr().out
    for layer in ("model.2.m.0.cv2.bn", "model.6.cv2.2.0.bn"):
        assert layer in printed


@pytest.mark.parametrize("task", ["cls", "seg", "pose", "obb"])
def test_other_tasks(task: str) -> None:
    model, graph, found = inspect.inspect(f"yolov8n-{task}.yaml", 32, Budget())
    assert found.prunable_params > 0.9
    shown = [layer for block in blocks(graph, model) for layer in block.layers]
    assert sum(layer.macs for layer in shown) == pytest.approx(1.0)
    assert np.isclose(sum(layer.params for layer in shown), 1.0, atol=0.02)  # batch norms are no layers


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((), SettingsError, "name one model"),
        (("a.pt", "--model", "b.pt"), SettingsError, "name one model"),
        (("missing.pt",), CheckpointError, r"missing\.pt does not exist"),
        (("{tmp}/text.yaml",), CheckpointError, "does not describe a model of Ultralytics' form: it has no 'head'"),
        (("yolov8n.yaml", "--imgsz", "50"), SettingsError, "imgsz 50 must be a multiple .* stride 32: use 64"),
        (("x.yaml", "--budget", "{tmp}/none.yaml"), SettingsError, r"none\.yaml does not exist"),
        (("x.yaml", "--budget", "{tmp}/text.yaml"), SettingsError, "unknown key 'width'"),
        (("x.pt", "--json", "x.pt"), SettingsError, r"--json x\.pt must end with \.json"),
        (("x.pt", "--html", "{tmp}"), SettingsError, r"must end with \.html"),
        (("x.pt", "--html", "{tmp}/folder.html"), SettingsError, "is a folder"),
        (("x.pt", "--gamma", "{tmp}/text.yaml/a.png"), SettingsError, r"text\.yaml is no folder"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, arguments: tuple[str, ...], error: type, message: str) -> None:
    (tmp_path / "text.yaml").write_text("width: 3\n")
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(error, match=message) as caught:
        run(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert isinstance(caught.value, EspalierError)
    assert "\n" not in str(caught.value).strip()


def test_no_folder_is_made_for_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        run(tmp_path / "missing.pt", "--html", tmp_path / "new" / "graph.html")
    assert not (tmp_path / "new").exists()
