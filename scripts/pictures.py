"""Makes the README's pictures of `profile` and `inspect`.

    python scripts/export_models.py OUT --scale industrial
    python scripts/pictures.py OUT

The picture of `profile` is its chart as SVG; that of `inspect` is the graph on its page, as Chromium shows it.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import onnxrank
from onnxrank import pages
from onnxrank.inspection.page import to_html
from onnxrank.profiling.page import time_chart
from onnxrank.roles import load_spec

PLACE = Path(__file__).resolve().parent / "pictures"
PROFILED, INSPECTED = "dcnv2_parallel", "dlrm"
_NAMES = ("original", "optimised")
_THIRD = "svg .third { fill: var(--faint); stroke: var(--faint) }"


def of_profile(folder: Path, seconds: float) -> str:
    """The chart, with the page's style inside and a legend."""
    model = folder / f"{PROFILED}.torchscript.onnx"
    spec = load_spec(folder / f"{PROFILED}.roles.yaml")
    with tempfile.TemporaryDirectory() as place:
        fast = Path(place) / "optimised.onnx"
        onnxrank.optimize(model, spec=spec).save(fast)
        found = onnxrank.profile(model, fast, seconds=seconds, memory=False, candidates=[1, 8, 32, 128, 512, 2048])
    chart = time_chart(found)
    return alone(chart, dict(zip(("first", "second"), _NAMES, strict=True)))


def alone(chart: str, legend: Mapping[str, str] | None = None) -> str:
    """A chart of `onnxrank.charts` as a picture: with the page's style inside, and a legend by style."""
    style = f"<style>{pages.asset('page.css')} svg {{ background: var(--page) }} {_THIRD}</style>"
    named = "".join(
        f'<rect class="{kind} plain" x="90" y="{18 + 20 * k}" width="11" height="11"/>'
        f'<text x="108" y="{28 + 20 * k}">{name}</text>'
        for k, (kind, name) in enumerate((legend or {}).items())
    )
    head, rest = chart.split(">", 1)
    return f"{head}>{style}{rest.removesuffix('</svg>')}{named}</svg>\n"


def of_inspect(folder: Path, out: Path) -> None:
    """The graph, before and after."""
    from playwright.sync_api import sync_playwright

    spec = load_spec(folder / f"{INSPECTED}.roles.yaml")
    found = onnxrank.inspect(folder / f"{INSPECTED}.torchscript.onnx", spec=spec, lifts=False)
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with tempfile.TemporaryDirectory() as place, sync_playwright() as playwright:
        file = Path(place) / "inspect.html"
        file.write_text(to_html(found), encoding="utf-8")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.goto(file.as_uri())
        page.wait_for_function("document.documentElement.dataset.ready")
        page.click("#fit")
        page.locator(".graphs").screenshot(path=out)
        browser.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=4.0, help="of timing per number of candidates")
    options = parser.parse_args()
    PLACE.mkdir(exist_ok=True)
    of_inspect(options.folder, PLACE / "inspect.png")
    (PLACE / "profile.svg").write_text(of_profile(options.folder, options.seconds), encoding="utf-8")
    for file in sorted(PLACE.iterdir()):
        print(f"{file}: {file.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
