"""Reports of `split` as people read them."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from onnxrank.formats import PLAIN, Style
from onnxrank.splitting.report import Report
from onnxrank.writers import Markdown, Terminal, Writer, as_text, count, human

_MOST = 12
"""State tensors that are listed, the largest first, unless all are asked for."""


def show(report: Report, console: Console, style: Style = PLAIN) -> None:
    """Prints a report: both models, the state, what was checked, and whether two files pay."""
    _Printer(report, Terminal(console)).everything(style)


def to_text(report: Report, style: Style = PLAIN) -> str:
    """The report as plain text that the style's encoding takes."""
    return as_text(lambda console: show(report, console, style), style.encoding)


def to_markdown(report: Report, style: Style = PLAIN) -> str:
    """The report as GitHub-flavoured Markdown."""
    to = Markdown()
    _Printer(report, to).everything(style)
    return to.document


class _Printer:
    def __init__(self, report: Report, to: Writer) -> None:
        self.report, self.to = report, to

    def everything(self, style: Style) -> None:
        r = self.report
        low, high = r.candidates
        n = str(low) if low == high else f"{r.usual} ({low}..{high})"
        self.to.say(f"{r.source or 'model in memory'}", "bold")
        self.to.say(f"onnxrank {r.version}, two models, costs of one call at N = {n}")
        if r.lengths:
            self.to.say("lengths: " + ", ".join(f"{name} {least}..{most}" for name, (least, most) in r.lengths.items()))
        self.to.blank()
        self.models()
        self.state(style.verbose or style.explain)
        self.sunk()
        self.checks(style.verbose)
        for note in r.notes:
            self.to.item(note, "note: ")
        self.to.blank()
        self.to.line(f"Written to {r.output}: {', '.join(r.files)}." if r.output else "Nothing was written.", 0)
        self.to.say(f"Advice: {r.advice.reason}.", "bold green" if r.advice.files == 2 else "bold yellow")

    def models(self) -> None:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        table.add_column("model")
        for name in ("nodes", "parameters", "MACs", "predicted", "file"):
            table.add_column(name, justify="right")
        for name, p in (("request", self.report.request), ("candidate", self.report.candidate)):
            cells = (str(p.nodes), human(p.parameters), human(p.macs), _us(p.seconds), human(p.size, "B"))
            table.add_row(name, *map(self.to.text, cells))
        self.to.show(table)

    def state(self, every: bool) -> None:
        r = self.report
        most = r.most_state_bytes
        longest = (
            ""
            if most == r.state_bytes
            else ", without a limit"
            if most is None
            else f", {human(most, 'B')} at the longest lengths"
        )
        self.to.title(
            f"State: {count(len(r.state), 'tensor')}, {r.form}, {human(r.state_bytes, 'B')}{longest}; version "
            f"{r.state_version}{'' if r.guard else ', not guarded'}"
        )
        ordered = sorted(r.state, key=lambda t: -t.bytes)
        for t in ordered if every else ordered[:_MOST]:
            shape = ", ".join(map(str, t.shape))
            saved = f"saves {_us(t.saved_seconds)}" + (f", {human(t.saved_macs)} MACs" if t.saved_macs else "")
            self.to.item(f"{t.type} [{shape}], {human(t.bytes, 'B')}: {saved} per call", f"{t.name}  ")
        if not every and len(ordered) > _MOST:
            self.to.item(f"{len(ordered) - _MOST} more; -v lists them")

    def sunk(self) -> None:
        found = self.report.sunk
        if found:
            self.to.title("Done again at every call, because the result is larger than that is slow")
            for s in found:
                self.to.item(f"{s.op} {s.node}, {_us(s.seconds)}")

    def checks(self, every: bool) -> None:
        r = self.report
        if not r.checks:
            return
        self.to.title("Check of both models together against the original")
        worst = max(r.checks, key=lambda c: c.error / max(c.tolerance, 1e-300))
        counts = ", ".join(str(n) for n in sorted({c.candidates for c in r.checks}))
        self.to.item(
            f"{count(len(r.checks), 'comparison')} at N = {counts}, the state passed through bytes: at most "
            f"{worst.error:.2g} off, {worst.tolerance:.2g} is allowed"
        )
        for line in r.looked if every else ():
            self.to.item(line, "compared at ")
        for line in r.unseen:
            self.to.item(line, "not looked at: ")


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} µs" if seconds < 1e-5 else f"{seconds * 1e6:.0f} µs"
