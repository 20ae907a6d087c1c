"""A compression as people read it: the steps, what the gate found, and why nothing was written."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnxrank.formats import PLAIN, Style
from onnxrank.writers import Markdown, Terminal, Writer, as_text, count, human, three

if TYPE_CHECKING:
    from rich.console import Console

    from onnxrank.compress.gate import Criterion, Outcome
    from onnxrank.compress.report import Point, Report, Speed

CRITERIA = {
    "auc": "AUC",
    "log_loss": "log loss",
    "calibration": "mean score",
    "logit_rmse": "logits",
    "overlap": "best candidates",
}
"""What is asked of scores, in words."""


def show(report: Report, console: Console, style: Style = PLAIN) -> None:
    """Prints a report in a style."""
    _Printer(report, Terminal(console)).everything(style.verbose)


def to_text(report: Report, style: Style = PLAIN) -> str:
    """The report as plain text that the style's encoding takes."""
    return as_text(lambda console: show(report, console, style), style.encoding)


def to_markdown(report: Report, style: Style = PLAIN) -> str:
    """The report as GitHub-flavoured Markdown."""
    to = Markdown()
    _Printer(report, to).everything(style.verbose)
    return to.document


def micro(seconds: float) -> str:
    """Seconds in the unit that suits."""
    return f"{three(seconds * 1e3)} ms" if seconds >= 1e-3 else f"{three(seconds * 1e6)} us"


def ratio(speed: Speed | None, times: str = "×") -> str:
    """How many times faster, with half the interval's width."""
    if speed is None:
        return ""
    return f"{speed.ratio:.2f}{times} ±{(speed.high - speed.low) / 2:.2f}"


def change(auc: tuple[float, float, float] | None) -> str:
    """A change of the AUC with its interval."""
    if auc is None:
        return ""
    return f"{auc[0]:+.5f} ({auc[1]:+.5f}, {auc[2]:+.5f})"


def told(p: Point) -> str:
    """What was done at a point."""
    return f"{p.step} at {p.site}" if p.site else "the original"


def value(c: Criterion) -> list[str]:
    """A criterion's value, interval and limit as cells."""
    form = {"auc": "{:+.5f}", "log_loss": "{:+.5f}", "calibration": "{:+.3%}"}.get(c.name, "{:.4f}")
    side = "at least" if c.name in ("auc", "overlap") else "at most"
    bound = f"{c.limit:.1%}" if c.name == "calibration" else f"{c.limit:g}"
    return [form.format(c.value), f"{form.format(c.low)} to {form.format(c.high)}", f"{side} {bound}"]


def basis(outcome: Outcome) -> str:
    """What an output's scores were held against, in words."""
    rows = f"{outcome.rows} rows of {count(outcome.requests, 'request')}"
    if outcome.basis == "labels":
        own = "" if outcome.auc is None else f", AUC of the original {outcome.auc:.4f}"
        return f"{outcome.output}: {outcome.verdict}, by labels ({rows}, {outcome.positives} positive{own})"
    return (
        f"{outcome.output}: {outcome.verdict}, against the original's scores only ({rows}): nothing is labelled, so "
        "this says how well the original is kept, and not how good either is"
    )


class _Printer:
    def __init__(self, report: Report, to: Writer) -> None:
        self.report, self.to = report, to

    def everything(self, verbose: bool) -> None:
        self.steps(verbose)
        self.gate()
        self.more(verbose)
        self.verdict()

    def steps(self, verbose: bool) -> None:
        if not self.report.points:
            return
        self.to.title(f"Steps, times at N = {self.report.candidates}, accuracy on the calibration rows")
        names = ["step", "size", "MACs", "p50", "faster", "AUC falls", "top 10"]
        table = self.to.table([*names, "AUC (95 %)", "logits"] if verbose else names, (0,))
        front = set(self.report.front)
        for k, p in enumerate(self.report.points):
            if not verbose and k not in front and k != len(self.report.points) - 1:
                continue
            cells = [told(p), human(p.bytes, "B"), human(p.macs), "" if p.speed is None else micro(p.speed.seconds)]
            cells += ["" if p.speed is None else f"{p.speed.ratio:.2f}{self.to.times}"]
            cells += ["" if p.auc is None else f"{max(-p.auc[1], 0.0) + 0.0:.5f}"]
            cells += ["" if p.overlap is None else f"{p.overlap:.3f}"]
            cells += [change(p.auc), f"{p.logit_error:.4f}"] if verbose else []
            table.add_row(*(self.to.text(c) for c in cells))
        self.to.show(table)
        self.to.item(
            "AUC falls: at most by so much, by the unfavourable end of the 95 % interval; top 10: share of each "
            "request's best candidates that stayed"
            + ("." if verbose else "; steps that others beat in both are left out."),
            "", 0,
        )  # fmt: skip

    def gate(self) -> None:
        if not self.report.outcomes:
            return
        self.to.title("The gate, on requests that nothing was fitted to")
        for o in self.report.outcomes:
            self.to.item(basis(o), "", 0)
            if o.criteria:
                table = self.to.table(["", "change", f"{100 * o.level:.4g} %", "allowed", ""], (0,))
                for c in o.criteria:
                    table.add_row(*(self.to.text(x) for x in [CRITERIA[c.name], *value(c), c.verdict]))
                self.to.show(table)
            if o.calibration is not None:
                before, after = o.calibration
                change_of = self.to.change(f"{before:.4f}", f"{after:.4f}")
                self.to.item(f"expected over observed: {change_of}", "", 2)
            if o.worst is not None:
                kept = "" if o.worst.overlap is None else f"{o.worst.overlap:.0%} of its best stayed, "
                self.to.item(f"worst request: {o.worst.name}: {kept}logits {o.worst.logit_rmse:.3f} off", "", 2)
            for r in o.reasons:
                self.to.item(r, "", 2)

    def more(self, verbose: bool) -> None:
        r = self.report
        if r.packed:
            self.to.title("Packed away, since it does nothing")
            for p in r.packed:
                self.to.item(p)
        if r.refusals and verbose:
            self.to.title("Left alone")
            for x in r.refusals:
                self.to.item(f"{x.method} at {x.site}: {x.reason}")
        elif r.refusals:
            self.to.item(f"{count(len(r.refusals), 'refusal')}; -v lists them", "note: ", 0)
        for n in r.notes:
            self.to.item(n, "note: ", 0)

    def verdict(self) -> None:
        r = self.report
        self.to.blank()
        if not r.points or r.verdict != "passed":
            self.to.say(f"The gate: {r.verdict}. Nothing was written.", "bold")
            return
        if not r.changed:
            self.to.say("Nothing could be compressed within the limits.", "bold")
            return
        times = self.to.times
        small, fast = r.ratios["size"], r.points[-1].speed
        quick = "" if fast is None else f", {fast.ratio:.2f}{times} as fast"
        self.to.say(f"{small:.2f}{times} smaller{quick}.", "bold")
        for name, reached in r.ratios.items():
            wanted = r.targets.get(name)
            if wanted is not None and reached is not None and reached < wanted:
                why = {
                    "loss": "what may be lost was used up before",
                    "options": "there is nothing more to do; -v says why at each place",
                }.get(r.stopped, "")
                self.to.item(f"The {name} of {wanted:g}{times} was not reached: {why}.", "", 0)
        if r.output is not None:
            self.to.line(f"Written to {r.output}.", 0)
