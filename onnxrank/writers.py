"""What reports are written with: writers for the terminal and for Markdown, numbers in words, and JSON."""

from __future__ import annotations

import io
import json
import math
import re
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

_WIDTH = 100  # of text files


class Writer(ABC):
    """Takes what a report says: paragraphs, items, titles and tables.

    Args:
        ascii_only: Whether to do with ASCII.
    """

    def __init__(self, ascii_only: bool) -> None:
        self.ascii_only = ascii_only
        self.times, self.arrow, self.plus_minus = ("x", "->", "+-") if ascii_only else ("×", "→", "±")

    @abstractmethod
    def say(self, text: str, style: str = "") -> None:
        """Writes a paragraph."""

    @abstractmethod
    def item(self, text: str, lead: str = "", indent: int = 2) -> None:
        """Writes a paragraph whose further lines are indented."""

    @abstractmethod
    def line(self, text: str, indent: int) -> None:
        """Writes a line that is never broken: names of nodes must stay searchable."""

    @abstractmethod
    def title(self, text: str) -> None:
        """Writes a title."""

    @abstractmethod
    def blank(self) -> None:
        """Divides what comes from what was."""

    @abstractmethod
    def show(self, table: Table) -> None:
        """Writes a table."""

    def text(self, text: str, style: str = "") -> Text:
        """Text for a cell of a table."""
        return Text(printable(text, "utf-8"), style)

    def change(self, before: str, after: str) -> str:
        """What changed into what."""
        return before if before == after else f"{before} {self.arrow} {after}"

    def table(self, columns: Sequence[str], left: Sequence[int] = (0,)) -> Table:
        """A table whose columns are flush right but for those in `left`, which may wrap."""
        made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
        for k, name in enumerate(columns):
            side: Literal["left", "right"] = "left" if k in left else "right"
            made.add_column(self.text(name), justify=side, no_wrap=k not in left, overflow="fold")
        return made

    def bar(self, share: float, width: int) -> str:
        """A bar of at most so many characters, in steps of an eighth of one."""
        share = min(max(share, 0.0), 1.0) if math.isfinite(share) else 0.0
        if self.ascii_only:
            return "#" * round(share * width)
        whole, rest = divmod(round(share * width * 8), 8)
        return "█" * whole + ("▏▎▍▌▋▊▉"[rest - 1] if rest else "")


class Terminal(Writer):
    """Prints to a console, in what its encoding has.

    Args:
        console: Where to; only ASCII is used where its encoding is not a Unicode one.
    """

    def __init__(self, console: Console) -> None:
        super().__init__(console.options.ascii_only)
        self.console = console

    def say(self, text: str, style: str = "") -> None:
        """Prints a paragraph."""
        self.console.print(self.text(text, style))

    def item(self, text: str, lead: str = "", indent: int = 2) -> None:
        """Prints a paragraph whose further lines are indented."""
        width = max(self.console.width - indent - len(lead), 20)
        lines = textwrap.wrap(printable(text, self.console.encoding, keep="\n"), width, break_on_hyphens=False)
        for k, line in enumerate(lines):
            self.line((lead if k == 0 else " " * len(lead)) + line, indent)

    def line(self, text: str, indent: int) -> None:
        """Prints a line that is never broken."""
        self.console.print(self.text(" " * indent + text), soft_wrap=True)

    def title(self, text: str) -> None:
        """Prints a title behind an empty line."""
        self.blank()
        self.say(text, "bold")

    def blank(self) -> None:
        """Prints an empty line."""
        self.console.print()

    def show(self, table: Table) -> None:
        """Prints a table."""
        self.console.print(table)

    def text(self, text: str, style: str = "") -> Text:
        """Text that the console's encoding takes."""
        return Text(printable(text, self.console.encoding), style)


class Markdown(Writer):
    """Writes what the terminal shows as Markdown; `text` is the document."""

    def __init__(self) -> None:
        super().__init__(ascii_only=False)
        self._blocks: list[str] = []
        self._in_list = False

    @property
    def document(self) -> str:
        """What was written so far, ending in a newline."""
        return "\n".join(self._blocks).strip("\n") + "\n"

    def say(self, text: str, style: str = "") -> None:
        """Writes a paragraph, bold if its style is."""
        shown = escape(text)
        self._block(f"**{shown}**" if "bold" in style else shown)

    def item(self, text: str, lead: str = "", indent: int = 2) -> None:
        """Writes an item of a list, or a paragraph if it is not indented."""
        shown = escape(" ".join((lead + text).split()))
        if indent:
            self._item(shown, indent)
        else:
            self._block(shown)

    def line(self, text: str, indent: int) -> None:
        """Writes a line as code, so that nothing in it is taken for Markdown."""
        shown = f"`{code(text)}`"
        if indent:
            self._item(shown, indent)
        else:
            self._block(shown)

    def title(self, text: str) -> None:
        """Writes a heading."""
        self._block(f"### {escape(text)}")

    def blank(self) -> None:
        """Nothing: blocks are divided anyway."""

    def show(self, table: Table) -> None:
        """Writes a table."""
        names = [str(c.header) for c in table.columns]
        lines = [names, ["--:" if c.justify == "right" else "---" for c in table.columns]]
        cells = [[str(cell) for cell in c.cells] for c in table.columns]
        lines += [list(row) for row in zip(*cells, strict=True)]
        if table.show_footer:
            lines.append([str(c.footer) for c in table.columns])
        shown = [lines[0], *lines[2:]]
        escaped = [[_indented(cell) for cell in row] for row in shown]
        escaped.insert(1, lines[1])
        self._block("\n".join(f"| {' | '.join(row)} |" for row in escaped))

    def _block(self, text: str) -> None:
        if self._in_list:
            self._blocks.append("")
        self._blocks += [text, ""]
        self._in_list = False

    def _item(self, text: str, indent: int) -> None:
        self._blocks.append(f"{'  ' * (indent > 2 and self._in_list)}- {text}")
        self._in_list = True


def as_text(show: Callable[[Console], None], encoding: str = "utf-8", width: int = _WIDTH) -> str:
    """What a function prints to a console, as plain text that the encoding takes."""
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="\n")
    console = Console(file=file, width=width, color_system=None, force_terminal=False, legacy_windows=False)
    show(console)
    file.seek(0)
    return "".join(f"{line.rstrip()}\n" for line in file)


# --- text -------------------------------------------------------------------------------------------------------


def printable(text: str, encoding: str, keep: str = "") -> str:
    """Text that any terminal takes: control characters, and what the encoding lacks, as escapes.

    Args:
        text: Any text; names of nodes come from files of any origin.
        encoding: That of the stream.
        keep: Control characters to let through.
    """
    safe = "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)
    return safe.encode(encoding, "backslashreplace").decode(encoding)


def human(value: float, unit: str = "") -> str:
    """A number with three digits and k, M, G or T: 1234567 is 1.23M."""
    for prefix in ("", "k", "M", "G", "T"):
        if value < 999.5 or prefix == "T":
            break
        value /= 1000
    if not prefix:
        return f"{value:.0f}{unit}"
    return f"{three(value)}{prefix}{unit}"


def three(value: float) -> str:
    """A number with about three digits: 1.23, 12.3, 123."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def percent(share: float) -> str:
    """A share in per cent; only all is 100 %, only nothing is 0 %."""
    value = 100 * share
    whole = value in (0, 100) or 1 <= abs(value) < 98.95
    if whole:
        return f"{value:.0f} %"
    # Cut, not rounded, so that 99.97 % does not become all of it.
    cut = math.trunc(value * 10) / 10
    return f"{cut:.1f} %" if cut else f"{'-' if value < 0 else ''}<0.1 %"


def count(n: int, what: str) -> str:
    """A number of things: 1 site, 2 sites."""
    return f"{n} {what}{'' if n == 1 else 's'}"


def _indented(cell: str) -> str:
    """A cell of a table, in which leading blanks would be lost."""
    inner = cell.strip()
    return "&emsp;" * ((len(cell) - len(cell.lstrip())) // 2 if inner else 0) + escape(inner)


def escape(text: str) -> str:
    """Text without what Markdown or HTML would make something of."""
    return re.sub(r"([\\`*_\[\]<>|#@])", r"\\\1", printable(text, "utf-8"))


def code(text: str) -> str:
    """Text for a code span, in a table or elsewhere."""
    return printable(text, "utf-8").replace("`", "'").replace("|", "\\|")


# --- JSON -------------------------------------------------------------------------------------------------------


class Reported(Protocol):
    """Any report."""

    def to_dict(self) -> dict[str, Any]:
        """Its JSON form."""


def to_json(report: Reported) -> str:
    """The JSON form, which the schemas describe, ending in a newline."""
    return dumps(report.to_dict())


def dumps(value: Any) -> str:
    """Readable JSON that ends in a newline; null stands for NaN and infinity."""
    return json.dumps(finite(value), indent=2, allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """A value for JSON. JSON has no NaN and no infinity: null stands for them."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
