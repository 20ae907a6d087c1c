"""Reports as people and programs read them: a table for the terminal, text and JSON for files."""

from __future__ import annotations

import io
import json
import math
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, Protocol

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from onnxrank.errors import UsageError

if TYPE_CHECKING:
    from onnxrank.report import LevelCost, Report
    from onnxrank.rewrite import Refusal

FORMATS = ("json", "text")
_ENDINGS = {
    ".json": "json",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".csv": "csv",
    ".html": "html",
    ".htm": "html",
}
_MOST_REASONS = 8
_WIDTH = 100  # of text files


# --- to a terminal -----------------------------------------------------------------------------------------------


def print_report(report: Report, console: Console, explain: bool = False, verbose: bool = False) -> None:
    """Prints a report: costs by level, rules, refusals, predictions, notes and a verdict.

    Args:
        report: The report.
        console: Where to; only ASCII is used where its encoding is not a Unicode one.
        explain: Whether to name every node that was refused.
        verbose: Whether to name the nodes of every rule and print every comparison.
    """
    _Printer(report, console).everything(explain, verbose)


class Printer:
    """Prints paragraphs and titles to a console in what its encoding has.

    Args:
        console: Where to; only ASCII is used where its encoding is not a Unicode one.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.ascii_only = console.options.ascii_only
        self.times, self.arrow = ("x", "->") if self.ascii_only else ("×", "→")

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
        """Prints a line that is never broken: names of nodes must stay searchable."""
        self.console.print(self.text(" " * indent + text), soft_wrap=True)

    def text(self, text: str, style: str = "") -> Text:
        """Text that the console's encoding takes."""
        return Text(printable(text, self.console.encoding), style)

    def title(self, text: str) -> None:
        """Prints a title behind an empty line."""
        self.console.print()
        self.say(text, "bold")

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


class _Printer(Printer):
    def __init__(self, report: Report, console: Console) -> None:
        super().__init__(console)
        self.report = report

    def everything(self, explain: bool, verbose: bool) -> None:
        self.head()
        self.costs()
        self.rules(verbose)
        self.refusals(explain)
        self.predictions()
        self.checks(verbose)
        for note in self.report.notes:
            self.item(note, "note: ")
        self.trust()
        self.verdict()

    def head(self) -> None:
        r = self.report
        low, high = r.candidates
        n = str(low) if low == high else f"{round(math.sqrt(low * high))} ({low}..{high})"
        self.say(f"{r.source or 'model in memory'}", "bold")
        self.say(f"onnxrank {r.version}, interface {r.interface}, costs of one request at N = {n}")
        self.console.print()

    def costs(self) -> None:
        r = self.report
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, show_footer=True)
        before, after = _total(r.before.values()), _total(r.after.values())
        table.add_column("level", "total")
        for k, name in enumerate(("nodes", "parameters", "MACs", "bytes")):
            foot = self.change(_unit(before[k], k), _unit(after[k], k))
            table.add_column(name, self.text(foot), justify="right")
        for level in _levels(r):
            cells = [
                self.change(_unit(b, k), _unit(a, k))
                for k, (b, a) in enumerate(zip(_row(r.before.get(level)), _row(r.after.get(level)), strict=True))
            ]
            table.add_row(level, *map(self.text, cells))
        self.console.print(table)
        self.console.print()
        parts = []
        if r.macs_before:
            saved = r.macs_before - r.macs_after
            parts.append(f"MACs saved: {percent(saved / r.macs_before)}")
        parts.append(f"file size: {self.change(human(r.size_before, 'B'), human(r.size_after, 'B'))}")
        self.say(", ".join(parts))

    def rules(self, verbose: bool) -> None:
        if not self.report.rules:
            return
        self.title("Rules")
        width = max(len(r.name) for r in self.report.rules)
        for rule in self.report.rules:
            share = f" ({percent(rule.macs_saved / self.report.macs_before)})" if self.report.macs_before else ""
            saved = f", {human(rule.macs_saved)} MACs saved{share}" if rule.macs_saved else ""
            known = [n for n in rule.break_even if n is not None]
            pays = f", pays from N = {', '.join(map(str, sorted(set(known))))}" if known else ""
            self.item(f"{count(rule.sites, 'site')}{saved}{pays}", f"{rule.name:<{width}}  ")
            for node in rule.nodes if verbose else ():
                self.line(node, 6)

    def refusals(self, explain: bool) -> None:
        groups: dict[tuple[str, str], list[Refusal]] = {}
        for refusal in self.report.refusals:
            groups.setdefault((refusal.rule, refusal.reason), []).append(refusal)
        if not groups:
            return
        self.title("Left alone")
        ordered = sorted(groups.items(), key=lambda g: -len(g[1]))
        for (rule, reason), found in ordered if explain else ordered[:_MOST_REASONS]:
            self.item(reason, f"{len(found)} {self.times} {rule}: ")
            for refusal in found if explain else ():
                self.line(f"{refusal.op} {refusal.node}", 6)
        if not explain:
            left = sum(len(found) for _, found in ordered[_MOST_REASONS:])
            more = f"{count(left, 'more place')} left out; " if left else ""
            self.item(f"{more}--explain names every node.")

    def predictions(self) -> None:
        found = self.report.predictions
        if found:
            self.title("Predicted time of the original over that of the result, by candidates")
            self.item(", ".join(f"{three(p.ratio)}{self.times} at {p.candidates}" for p in found))

    def checks(self, verbose: bool) -> None:
        found = self.report.checks
        if not found:
            return
        self.title("Check against the original")
        worst = max(found, key=_share_of_tolerance)
        counts = ", ".join(str(n) for n in sorted({c.candidates for c in found}))
        self.item(
            f"{count(len(found), 'comparison')} at N = {counts}: at most {worst.error:.2g} off, "
            f"{worst.tolerance:.2g} is allowed"
        )
        for line in self.report.looked:
            self.item(line, "compared at ")
        for line in self.report.unseen:
            self.item(line, "not looked at: ")
        for c in found if verbose else ():
            self.line(
                f"{'ok  ' if c.passed else 'FAIL'} N = {c.candidates}, seed {c.seed}, {c.output}: {c.error:.3g} "
                f"of {c.tolerance:.3g}",
                6,
            )

    def trust(self) -> None:
        told = trust(self.report.roles)
        if self.report.changed and told:
            self.console.print()
            self.say(told, "bold yellow")

    def verdict(self) -> None:
        r = self.report
        self.console.print()
        self.line(f"Written to {r.output}." if r.output else "No model was written.", 0)
        if not r.changed:
            self.say(
                f"Nothing applied: the output {'is' if r.output else 'would be'} the input's own bytes.", "bold yellow"
            )
            return
        uses = ", ".join(f"{rule.sites} {self.times} {rule.name}" for rule in r.rules) or "Rewritten"
        gone = ""
        if r.macs_before:
            gone = f": {percent(1 - r.macs_after / r.macs_before)} of MACs are now once per request or gone"
        self.say(f"{uses}{gone}.{'' if r.checks else ' Not checked.'}", "bold green")


def trust(contract: Mapping[str, Any], requests: int = 0) -> str:
    """A sentence on what nobody has proved of roles; empty where no input is request-level.

    Args:
        contract: The roles, as `Roles.to_dict` gives them.
        requests: Number of recorded requests that kept them.
    """
    claimed = [
        str(i["name"])
        for i in contract.get("inputs", ())
        if i.get("level") != "candidate" and i.get("candidate_axis") is not None
    ]
    if not claimed:
        return ""
    names = ", ".join(claimed[:4]) + (f" and {len(claimed) - 4} more" if len(claimed) > 4 else "")
    if requests:
        return f"Roles: {names} kept to one value per request in {count(requests, 'recorded request')}."
    return (
        f"Roles are trusted, not tested: that {names} {'is' if len(claimed) == 1 else 'are'} the same for all "
        "candidates of a request is taken from you; only recorded requests can show it (onnxrank verify --data)."
    )


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


def _levels(report: Report) -> list[str]:
    known = ["constant", "request", "candidate"]
    present = {**report.before, **report.after}
    return [level for level in known if level in present] + [level for level in present if level not in known]


def _row(cost: LevelCost | None) -> tuple[int, int, int, int]:
    return (cost.nodes, cost.parameters, cost.macs, cost.bytes) if cost else (0, 0, 0, 0)


def _total(costs: Iterable[LevelCost]) -> list[int]:
    return [sum(column) for column in zip(*(_row(c) for c in costs), strict=True)] or [0, 0, 0, 0]


def _unit(value: int, column: int) -> str:
    return str(value) if column == 0 else human(value, "B" if column == 3 else "")


def count(n: int, what: str) -> str:
    """A number of things: 1 site, 2 sites."""
    return f"{n} {what}{'' if n == 1 else 's'}"


def _share_of_tolerance(c: Any) -> float:
    share = c.error / max(c.tolerance, 1e-300)
    return math.inf if math.isnan(share) else share


# --- to files ----------------------------------------------------------------------------------------------------


def parse_target(
    target: str, formats: Sequence[str] = FORMATS, endings: Mapping[str, str] = _ENDINGS
) -> tuple[str, str]:
    """Reads `[FORMAT:]FILE`; without a format the file's ending tells it. `-` is stdout.

    Args:
        target: What to read.
        formats: The formats there are.
        endings: Formats by the endings of files.

    Returns:
        The format and the file.

    Raises:
        UsageError: The format or the ending is unknown, or there is no file.
    """
    match = re.fullmatch(r"([A-Za-z][A-Za-z0-9_+.]+):(.*)", target, re.DOTALL)  # C:\x is a path
    kinds = " or ".join([", ".join(formats[:-1]), formats[-1]])
    if match:
        form, file = match[1].lower(), match[2]
        if form not in formats:
            raise UsageError(f"--report {target}: the format {match[1]!r} is unknown; it must be {kinds}.")
    else:
        file = target
        form = endings.get(os.path.splitext(file)[1].lower(), "")
        if file and form not in formats:
            raise UsageError(
                f"--report {target}: the format cannot be told from the file's ending. Put {kinds} in front, such as "
                f"json:{target}."
            )
    if not file:
        raise UsageError(f"--report {target or repr('')}: the file is missing.")
    return form, file


def check_target(
    target: str,
    taken: Sequence[str | os.PathLike[str]] = (),
    formats: Sequence[str] = FORMATS,
    endings: Mapping[str, str] = _ENDINGS,
) -> None:
    """Finds out before any work whether a report can be written.

    Args:
        target: `[FORMAT:]FILE`.
        taken: Files that it must not replace.
        formats: The formats there are.
        endings: Formats by the endings of files.

    Raises:
        UsageError: It cannot.
    """
    from onnxrank.model import check_output

    _, file = parse_target(target, formats, endings)
    if file == "-" or _is_stream(Path(file)):
        return
    place = check_output(file)
    if any(os.path.realpath(other) == str(place) for other in taken):
        raise UsageError(f"--report {target} would replace the model. Choose another file.")


def write_report(report: Report, target: str, explain: bool = False, verbose: bool = False) -> None:
    """Writes a report to `[FORMAT:]FILE`; the file appears whole or not at all.

    Args:
        report: The report.
        target: Format and file; `-` is stdout, which needs the format: `json:-`.
        explain: As for `print_report`, for text.
        verbose: As for `print_report`, for text.

    Raises:
        UsageError: The format is unknown, or the file cannot be written.
        EnvironmentProblem: There is no space.
    """

    def make(form: str, encoding: str) -> str:
        return to_json(report) if form == "json" else to_text(report, explain, verbose, encoding)

    write_document(make, target)


def write_document(make: Callable[[str, str], str], target: str, formats: Sequence[str] = FORMATS) -> None:
    """Writes a document to `[FORMAT:]FILE`; the file appears whole or not at all.

    Args:
        make: Makes the text for a format and an encoding.
        target: Format and file; `-` is stdout, which needs the format: `json:-`.
        formats: Those that are known here.

    Raises:
        UsageError: The format is unknown, or the file cannot be written.
        EnvironmentProblem: There is no space.
    """
    form, file = parse_target(target, formats)
    put(file, make(form, encoding_of(file)))


def encoding_of(file: str) -> str:
    """What text to a file is written in: UTF-8, but for stdout, which is `-`, its own."""
    return (sys.stdout.encoding or "utf-8") if file == "-" else "utf-8"


def put(file: str, text: str) -> None:
    """Writes text to a file, which appears whole or not at all, to a device, or to stdout, which is `-`.

    Raises:
        UsageError: The file cannot be written.
        EnvironmentProblem: There is no space.
    """
    from onnxrank.model import check_output, replace_files

    encoding = encoding_of(file)

    def write(out: BinaryIO) -> None:
        out.write(text.encode(encoding))

    if file == "-":
        sys.stdout.write(text)
    elif _is_stream(Path(file)):
        with open(file, "wb") as out:
            write(out)
    else:
        replace_files({check_output(file): write})


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


def to_text(report: Report, explain: bool = False, verbose: bool = False, encoding: str = "utf-8") -> str:
    """The report as plain text that the encoding takes."""
    return as_text(lambda console: print_report(report, console, explain, verbose), encoding)


def as_text(show: Callable[[Console], None], encoding: str = "utf-8", width: int = _WIDTH) -> str:
    """What a function prints to a console, as plain text that the encoding takes."""
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="\n")
    console = Console(file=file, width=width, color_system=None, force_terminal=False, legacy_windows=False)
    show(console)
    file.seek(0)
    return "".join(f"{line.rstrip()}\n" for line in file)


def _is_stream(path: Path) -> bool:
    """Whether something is there to write to that must not be replaced: a pipe or device."""
    return path.exists() and not path.is_file() and not path.is_dir()


def finite(value: Any) -> Any:
    """A value for JSON. JSON has no NaN and no infinity: null stands for them."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
