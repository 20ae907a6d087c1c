"""The report of `verify` for a terminal."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from onnxrank.formats import PLAIN, Style
from onnxrank.verify.report import Report
from onnxrank.verify.reports import common
from onnxrank.writers import as_text, printable

_STYLES = {"passed": "green", "failed": "bold red", "skipped": "dim"}
_MOST_FINDINGS = 12


def to_text(report: Report, style: Style = PLAIN) -> str:
    """The report as plain text that the style's encoding takes."""
    return as_text(lambda console: show(report, console, style), style.encoding)


def show(report: Report, console: Console, style: Style = PLAIN) -> None:
    """Prints a report: what was compared, a table of verdicts, distances, findings, and the verdict.

    Args:
        report: The report.
        console: Where to; only ASCII is used where its encoding is not a Unicode one.
        style: Whether to print every comparison and finding.
    """
    page = _Page(report, console, style.verbose)
    page.say(f"{report.original or 'model in memory'} against {report.optimized or 'model in memory'}", "bold")
    page.say(common.environment(report))
    page.say(f"contract: {report.contract.get('source', 'none')}")
    if told := common.trust(report):
        page.say(told, "bold yellow")
    console.print()
    page.verdicts()
    console.print()
    page.distances()
    page.compared()
    page.findings()
    console.print()
    page.say(f"{common.headline(report)} ({report.seconds:.1f} s)", "bold green" if report.passed else "bold red")


class _Page:
    """The parts of a report, printed.

    Args:
        report: The report.
        console: Where to.
        verbose: Whether to print every comparison and finding.
    """

    def __init__(self, report: Report, console: Console, verbose: bool) -> None:
        self.report, self.console, self.verbose = report, console, verbose

    def say(self, text: str, style: str = "", indent: int = 0) -> None:
        """Prints a line."""
        made = Text(" " * indent + printable(text, self.console.encoding), style)
        self.console.print(made, soft_wrap=True)

    def verdicts(self) -> None:
        """The table of verdicts."""
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for name, justify in (
            ("verdict", "left"),
            ("", "left"),
            ("cases", "right"),
            ("worst", "right"),
            ("allowed", "right"),
        ):
            table.add_column(name, justify=justify)  # type: ignore[arg-type]
        table.add_column("where", overflow="fold")
        for line in common.lines(self.report):
            w = line.worst
            table.add_row(
                line.verdict,
                Text(line.outcome, _STYLES[line.outcome]),
                str(line.cases) if not line.failed else f"{line.failed} of {line.cases} failed",
                f"{w.error:.2g}" if w else "",
                f"{w.allowed:.2g}" if w else "",
                Text(
                    printable(
                        f"{w.output}, N={w.candidates}, {w.inputs}, {w.provider} {w.level}", self.console.encoding
                    )
                    if w
                    else line.says
                ),
            )
        self.console.print(table)

    def distances(self) -> None:
        """How far scores and their order are apart."""
        for s in self.report.statistics:
            if self.verbose or s.level == "all":
                self.say(common.distances(s), indent=2)
        for r in self.report.ranking:
            extra = ""
            if r.auc_before is not None and r.auc_after is not None:
                extra += f"; AUC {r.auc_before:.6f} to {r.auc_after:.6f}"
            if r.logloss_before is not None and r.logloss_after is not None:
                extra += f"; log loss {r.logloss_before:.6f} to {r.logloss_after:.6f}"
            if self.verbose or extra or r.move or r.overlap < 1:
                self.say(
                    f"order of {r.output}: least top-{r.top_k} overlap {r.overlap:.3g}, least Kendall tau {r.tau:.6g}, "
                    f"largest move {r.move}, {r.requests} lists{extra}",
                    indent=2,
                )

    def compared(self) -> None:
        """Where the models were compared, and where not."""
        for place in self.report.looked:
            self.say(f"compared at {place}", indent=2)
        for place in self.report.unseen:
            self.say(f"not looked at: {place}", "yellow", indent=2)
        if self.report.requests:
            self.say(f"{self.report.requests} recorded requests", indent=2)

    def findings(self) -> None:
        """What was found, and what to do with that."""
        report, verbose = self.report, self.verbose
        order = {"error": 0, "warning": 1, "note": 2}
        findings = sorted(report.findings, key=lambda f: order[f.severity])
        for f in findings if verbose else findings[:_MOST_FINDINGS]:
            self.say(f"{f.severity}: {f.verdict}: {f.message}", "red" if f.severity == "error" else "", indent=2)
        left = len(findings) - _MOST_FINDINGS
        if left > 0 and not verbose:
            self.say(f"{left} more; -v names them.", indent=2)
        for c in report.cases if verbose else ():
            self.say(f"{'ok  ' if c.passed else 'FAIL'} {c.name}: {c.error:.3g} of {c.allowed:.3g}", indent=4)
        if report.culprit is not None:
            self.say(f"bisect: {report.culprit.message}", "bold", indent=2)
        if report.saved is not None:
            self.say(f"The failing case is in {report.saved}; repro.py there shows it.", indent=2)
