"""HTML pages in a real browser: offline, without a word on the console, in both colour schemes."""

from __future__ import annotations

import itertools
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from exports import QUICK

import onnxrank
from onnxrank import pages
from onnxrank.inspection import page as inspection_page
from onnxrank.inspection.report import Block, Inspection, Node, Tensor
from onnxrank.profiling import page as profile_page
from onnxrank.profiling.report import Profile
from onnxrank.roles import load_spec

MODELS = Path(__file__).resolve().parents[2] / "models" / "onnx"
SCHEMES = ("light", "dark")
LARGE = 5000
HOSTILE = "</script><img src=x onerror=alert(1)>\u2028\x1b[31m"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium as the system has it."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield made
        made.close()


class Shown:
    """A page, and everything that it said or asked for."""

    def __init__(self, browser: Any, file: Path, scheme: str, first: str = "") -> None:
        self.context = browser.new_context(color_scheme=scheme, offline=True, viewport={"width": 1280, "height": 1000})
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: self.said.append(dialog.message))
        self.page.on("request", lambda request: self.asked.append(request.url))
        if first:
            self.page.add_init_script(first)
        self.page.goto(file.as_uri())

    def close(self) -> None:
        """Ends it; nothing may have been fetched but the page, and nothing said."""
        self.context.close()
        assert not self.said
        assert [url for url in self.asked if not url.startswith("data:")] == self.asked[:1]

    def value(self, expression: str) -> Any:
        return self.page.evaluate(expression)

    def ready(self) -> float:
        """Waits for the graph, and returns the milliseconds it took."""
        self.page.wait_for_function("document.documentElement.dataset.ready")
        return float(self.value("document.documentElement.dataset.ready"))


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    folder = tmp_path_factory.mktemp("profiled")
    source = MODELS / "hadamard_pairs.torchscript.onnx"
    onnxrank.optimize(source, spec=load_spec(MODELS / "hadamard_pairs.roles.yaml"), check=False).save(folder / "f.onnx")
    return onnxrank.profile(source, folder / "f.onnx", candidates=[2, 24, 512], seconds=1e-3, memory=False)


def inspected(name: str) -> Inspection:
    return onnxrank.inspect(MODELS / name, spec=load_spec(MODELS / f"{name.split('.')[0]}.roles.yaml"), lifts=False)


def largest() -> str:
    """The model of most nodes."""
    import onnx

    return max(QUICK, key=lambda n: len(onnx.load(MODELS / n).graph.node))


def large() -> Inspection:
    """A made-up model of many nodes in nested layers, ten wide."""
    small = inspected("two_tower.dynamo.onnx")
    nodes, tensors = [], []
    for k in range(LARGE):
        inputs = (f"t{k - 10}",) if k >= 10 else (small.inputs[k % len(small.inputs)].name,)
        inputs += (f"t{k - 7}",) if k % 13 == 0 and k >= 10 else ()
        level = ("request", "mixed", "candidate")[k % 3]
        name = f"/block{k // 500}/layer{k // 100}/{HOSTILE if k == 4321 else ''}Op{k}"
        scope = f"block{k // 500}/layer{k // 100}"
        nodes.append(Node(name, "MatMul", scope, inputs, (f"t{k}",), level, True, k, k // 2, 4 * k, 7, 0, ""))
        blocks = (Block(1, "0:8", "request"), Block(1, "8:32", "candidate")) if level == "mixed" else ()
        tensors.append(Tensor(f"t{k}", ("N", "32"), level, 0.25, blocks))
    return replace(small, nodes=tuple(nodes), tensors=tuple(tensors), result=tuple(nodes))


def write(folder: Path, text: str) -> Path:
    file = folder / "page.html"
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.slow
def test_nothing_to_fetch(profiled: Profile) -> None:
    for text in (profile_page.to_html(profiled), inspection_page.to_html(inspected("dlrm.dynamo.onnx"))):
        assert not re.search(r"(src|href)=\"(?!data:)", text) and "@import" not in text and "url(" not in text
        assert "default-src 'none'" in text
        assert [u for u in re.findall(r"https?://[^\"' <]+", text) if u != "http://www.w3.org/2000/svg"] == []


def test_escapes() -> None:
    text = pages.document(HOSTILE, [pages.table(["a"], [[HOSTILE]])], {"name": HOSTILE})
    assert "<img" not in text and "\x1b" not in text and text.count("</script>") == 2


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_profile(browser: Any, tmp_path: Path, profiled: Profile, scheme: str) -> None:
    shown = Shown(browser, write(tmp_path, profile_page.to_html(profiled)), scheme)
    page = shown.page
    assert page.locator("svg").count() >= 3 and "Speed-up" in page.inner_text("body")
    visible = page.locator("[data-candidates]:visible")
    assert visible.count() == 1 and visible.get_attribute("data-candidates") == "512"
    page.select_option("#candidates", "2")
    assert visible.get_attribute("data-candidates") == "2"
    (dark,) = shown.value("[getComputedStyle(document.body).backgroundColor]")
    assert (sum(map(int, re.findall(r"\d+", dark)[:3])) < 200) is (scheme == "dark")
    # Two curves of as many points as there are numbers of candidates, inside the picture.
    assert page.locator("svg").first.locator("circle").count() == 2 * 3
    for svg in page.locator("svg").all():
        frame = svg.bounding_box()
        for box in (c.bounding_box() for c in svg.locator("circle").all()):
            assert frame["x"] <= box["x"] and box["y"] + box["height"] <= frame["y"] + frame["height"]
    assert page.screenshot(path=tmp_path / "profile.png")
    shown.close()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_inspect(browser: Any, tmp_path: Path, scheme: str) -> None:
    shown = Shown(browser, write(tmp_path, inspection_page.to_html(inspected("dlrm.torchscript.onnx"))), scheme)
    page = shown.page
    shown.ready()
    items = "onnxrank.graphs[0].items.length"
    nodes = shown.value("onnxrank.graphs[0].data.nodes.length")
    assert page.locator("canvas:visible").count() == 2
    # Something is painted, in the colours of the levels.
    assert shown.value(_PAINTED) > 500
    page.click("#collapse")
    closed = shown.value(items)
    page.click("#expand")
    opened = shown.value(items)
    assert closed < opened < nodes
    page.check("#constants")
    assert shown.value(items) == nodes
    page.uncheck("#constants")
    page.click("#collapse")
    assert shown.value(items) == closed
    page.fill("#search", "top.0")
    hits = page.locator("#hits button")
    assert hits.count() >= 1
    hits.first.click()
    assert shown.value(items) > closed and shown.value("onnxrank.graphs[0].marked !== null")
    box = page.locator("canvas").first.bounding_box()
    # The node that was found is in the middle now.
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    tip = page.inner_text("#tip")
    assert "top.0" in tip and "multiply-adds" in tip and "candidate" in tip and "rule fc" in tip
    scale = shown.value("onnxrank.graphs[0].view.scale")
    page.mouse.wheel(0, -300)
    page.wait_for_function(f"onnxrank.graphs[0].view.scale > {scale}")
    x = shown.value("onnxrank.graphs[0].view.x")
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2 + 50, box["y"] + box["height"] / 2)
    page.mouse.up()
    assert shown.value("onnxrank.graphs[0].view.x") == pytest.approx(x + 50, abs=1)
    # Closes the layer that the node is in.
    before = shown.value(items)
    page.mouse.dblclick(box["x"] + box["width"] / 2 + 50, box["y"] + box["height"] / 2)
    assert shown.value(items) < before
    page.fill("#search", "no such thing")
    assert not hits.count()
    page.uncheck("#after")
    assert page.locator("canvas:visible").count() == 1
    page.click("#fit")
    assert page.screenshot(path=tmp_path / "inspect.png")
    shown.close()


_PAINTED = """(() => {
  const canvas = document.querySelector("canvas"), c = canvas.getContext("2d");
  const data = c.getImageData(0, 0, canvas.width, canvas.height).data;
  let painted = 0;
  for (let k = 3; k < data.length; k += 4) painted += data[k] > 0;
  return painted;
})()"""


_LABELS = """(() => {
  window.labels = [];
  const write = CanvasRenderingContext2D.prototype.fillText;
  CanvasRenderingContext2D.prototype.fillText = function (text, ...at) {
    const size = parseFloat(this.font.match(/([\\d.]+)px/)[1]) * this.getTransform().a / window.devicePixelRatio;
    const room = text.length && this.measureText(text).width;
    window.labels.push([text, size, room]);
    return write.call(this, text, ...at);
  };
})()"""


@pytest.mark.slow
def test_labels_can_be_read_at_once(browser: Any, tmp_path: Path) -> None:
    """As the page opens, in pixels of the screen; a closed layer shows its own name first."""
    for name in ("history_transformer.torchscript.onnx", "dlrm.torchscript.onnx"):
        found = write(tmp_path, inspection_page.to_html(inspected(name)))
        shown = Shown(browser, found, "light", _LABELS)
        shown.ready()
        labels = shown.value("labels")
        assert len(labels) > 10 and min(size for _, size, _ in labels) > 9
        assert max(room for *_, room in labels) <= 150
        if name.startswith("history"):
            texts = [text for text, *_ in labels]
            assert texts.index("▸ layers.0") + 1 == texts.index("35 nodes")
            assert texts[texts.index("item_id") + 1] == "input"
        shown.close()


@pytest.mark.slow
def test_fit_shows_the_whole_graph(browser: Any, tmp_path: Path) -> None:
    shown = Shown(browser, write(tmp_path, inspection_page.to_html(inspected("dlrm.torchscript.onnx"))), "light")
    shown.ready()
    assert shown.value("onnxrank.graphs[0].view.scale") == 0.5
    shown.page.click("#fit")
    bottom = "(g => g.view.y + g.box[3] * g.view.scale)(onnxrank.graphs[0])"
    assert 500 < shown.value(bottom) < 620
    shown.close()


def laboratory(colour: str, under: str, alpha: float) -> tuple[float, float, float]:
    """CIE L*a*b* of a colour over another."""
    mixed = []
    for k in (1, 3, 5):
        over, base = int(colour[k : k + 2], 16) / 255, int(under[k : k + 2], 16) / 255
        v = alpha * over + (1 - alpha) * base
        mixed.append(v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4)
    r, g, b = mixed
    xyz = (
        (0.4124 * r + 0.3576 * g + 0.1805 * b) / 0.9505,
        0.2126 * r + 0.7152 * g + 0.0722 * b,
        (0.0193 * r + 0.1192 * g + 0.9505 * b) / 1.089,
    )
    x, y, z = (t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116 for t in xyz)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_levels_can_be_told_apart(scheme: str) -> None:
    """As they are painted in the graph: thin, over the panel."""
    css = pages.asset("page.css")
    block = css[css.index(":root") :] if scheme == "light" else css[css.index("@media") :]
    colours = dict(re.findall(r"--([a-z]+): (#[0-9a-f]{6});", block[: block.index("}")]))
    thin = float(re.search(r"FILL = ([\d.]+)", pages.asset("page.js")).group(1))  # type: ignore[union-attr]
    found = {n: laboratory(colours[n], colours["panel"], thin) for n in ("request", "candidate", "mixed", "constant")}
    for a, b in itertools.combinations(found, 2):
        assert math.dist(found[a], found[b]) > 18, (a, b)


def test_verdict_and_ideal_on_top() -> None:
    """Before anything else, and why a rewrite can be better than the ideal."""
    text = inspection_page.to_html(inspected("dlrm.torchscript.onnx"))
    said = re.search(r"<p class=\"verdict\">(.*?)</p>", text)
    assert said and re.fullmatch(r"optimize would save \d+ % of MACs: predicted [\d.]+× at N = 512\.", said[1])
    assert said.start() < text.index("<h2>") < text.index("Block ideal: ") < text.index("below the block ideal")
    unchanged = replace(inspected("dlrm.torchscript.onnx"), result=())
    assert ">optimize would change nothing.<" in inspection_page.to_html(unchanged)


def test_many_layers_do_not_open_on_a_wall() -> None:
    """Of a tower of 40 layers those that are shared are shown, and what they lie in; all of them on demand."""
    small = inspected("dlrm.torchscript.onnx")
    like = next(x for x in small.layers if x.macs)
    each = small.macs_before // 80
    layers = [
        replace(like, scope="", macs=80 * each, once=each),
        replace(like, scope="tower", macs=80 * each, once=each),
    ]
    for k in range(40):
        for scope in (f"tower/layers.{k}", f"tower/layers.{k}/linear"):
            layers.append(replace(like, scope=scope, macs=2 * each, once=each * (k == 0), saved=0))
    text = inspection_page.to_html(replace(small, layers=tuple(layers)))
    first, _, rest = text[text.index("<h2>Layers</h2>") :].partition("<details>")
    assert first.count("<tr>") == 1 + 4 and "layers.0<" in first and "layers.1<" not in first
    assert "all 82 layers" in rest and "layers.39<" in rest


@pytest.mark.slow
def test_layers_that_cost_nothing_are_folded_away(browser: Any, tmp_path: Path) -> None:
    found = inspected("dlrm.torchscript.onnx")
    free = [layer for layer in found.layers if not layer.macs]
    shown = Shown(browser, write(tmp_path, inspection_page.to_html(found)), "light")
    table = shown.page.locator("h2:text('Layers') + div.scroll")
    assert free and table.locator("tbody tr").count() < len(found.layers) - len(free) + 1
    assert "top.0" in table.inner_text() and "user_tables" not in table.inner_text()
    inner, outer = (table.locator(f"td:text-is('{n}')").bounding_box() for n in ("top.0", "top"))
    text = "el => parseFloat(getComputedStyle(el).paddingLeft)"
    assert table.locator("td:text-is('top.0')").evaluate(text) > table.locator("td:text-is('top')").evaluate(text) > 0
    assert inner["y"] > outer["y"] and "u2003" not in shown.page.content()
    details = shown.page.locator("details")
    assert not details.locator("table").is_visible()
    details.locator("summary").click()
    assert details.locator("tbody tr:visible").count() == len(found.layers)
    shown.close()


def test_speed_up_is_drawn(profiled: Profile) -> None:
    """Over a linear axis that begins at 0, with a line at 1."""
    svg = profile_page.speedup_chart(profiled)
    assert svg.count("<circle") == 3 and 'class="even"' in svg and ">0×<" in svg
    heights = [float(y) for y in re.findall(r'cy="([\d.]+)"', svg)]
    ratios = [p.speedup.ratio for p in profiled.points if p.speedup]
    assert sorted(heights, reverse=True) == [heights[k] for k in sorted(range(3), key=ratios.__getitem__)]
    assert svg in profile_page.to_html(profiled)


@pytest.mark.slow
def test_nothing_to_show_after(browser: Any, tmp_path: Path) -> None:
    unchanged = replace(inspected("dlrm.dynamo.onnx"), result=())
    shown = Shown(browser, write(tmp_path, inspection_page.to_html(unchanged)), "light")
    shown.ready()
    assert shown.page.locator("canvas:visible").count() == 1 and not shown.page.locator("#after").is_visible()
    shown.close()


@pytest.mark.slow
def test_largest_model(browser: Any, tmp_path: Path) -> None:
    shown = Shown(browser, write(tmp_path, inspection_page.to_html(inspected(largest()))), "light")
    assert shown.ready() < 5000
    shown.close()


@pytest.mark.slow
def test_thousands_of_nodes(browser: Any, tmp_path: Path) -> None:
    shown = Shown(browser, write(tmp_path, inspection_page.to_html(large())), "dark")
    assert shown.ready() < 5000
    assert shown.value("onnxrank.graphs[0].items.length") < 30
    began = shown.value("performance.now()")
    shown.page.click("#expand")
    assert shown.value("onnxrank.graphs[0].items.length") > LARGE
    assert shown.value("performance.now()") - began < 5000
    shown.page.fill("#search", "Op4321")
    shown.page.locator("#hits button").first.click()
    assert shown.value("onnxrank.graphs[0].marked") is not None
    shown.close()
