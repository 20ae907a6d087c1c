"""Self-contained HTML pages: one file each, nothing fetched, readable in dark and light and without a network."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from onnxrank.writers import finite

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


@cache
def asset(name: str) -> str:
    """Text of a file in `onnxrank/assets`."""
    return resources.files("onnxrank").joinpath("assets", name).read_text(encoding="utf-8")


def escape(text: object) -> str:
    """Text for the page; control characters, which names in models may hold, as escapes."""
    shown = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in str(text))
    return html.escape(shown)


def document(title: str, body: Iterable[str], data: Any = None) -> str:
    """A page.

    Args:
        title: Plain text.
        body: HTML.
        data: What the page's script works on, as JSON.
    """
    # "<" would let a name in the model end the script element.
    held = json.dumps(finite(data), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    script = f'<script type="application/json" id="data">{held}</script><script>{asset("page.js")}</script>'
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<link rel="icon" href="data:,">',
            f"<title>{escape(title)}</title><style>{asset('page.css')}</style></head><body>",
            *body,
            script,
            "</body></html>\n",
        ]
    )


@dataclass(frozen=True)
class Indented:
    """Text of a cell, indented by some steps."""

    text: str
    depth: int

    def __str__(self) -> str:
        return self.text


def table(heads: Sequence[str], rows: Iterable[Sequence[object]], left: Sequence[int] = (0,)) -> str:
    """A table; columns in `left` are flush left and may wrap."""

    def cell(kind: str, k: int, text: object) -> str:
        where = ' class="left"' if k in left else ""
        if isinstance(text, Indented) and text.depth:
            where += f' style="padding-left: {1.2 * text.depth:.1f}em"'
        return f"<{kind}{where}>{escape(text)}</{kind}>"

    head = "".join(cell("th", k, h) for k, h in enumerate(heads))
    body = "".join(f"<tr>{''.join(cell('td', k, c) for k, c in enumerate(row))}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def legend(entries: Iterable[tuple[str, str]]) -> str:
    """Colours and what they stand for: pairs of a style class and a text."""
    return "<p>" + "".join(f'<span class="swatch {kind}"></span>{escape(text)}' for kind, text in entries) + "</p>"
