"""Reports as people and programs read them: a table for the terminal, text and JSON for files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from onnxrank.formats import PLAIN, Style
from onnxrank.writers import Markdown, Terminal, Writer, as_text, count, human, percent, three

if TYPE_CHECKING:
    from onnxrank.report import LevelCost, Report
    from onnxrank.rule import Refusal

_MOST_REASONS = 8


def show(report: Report, console: Console, style: Style = PLAIN) -> None:
    """Prints a report in a style."""
    print_report(report, console, style.explain, style.verbose)


def print_report(report: Report, console: Console, explain: bool = False, verbose: bool = False) -> None:
    """Prints a report: costs by level, rules, refusals, predictions, notes and a verdict.

    Args:
        report: The report.
        console: Where to; only ASCII is used where its encoding is not a Unicode one.
        explain: Whether to name every node that was refused.
        verbose: Whether to name the nodes of every rule and print every comparison.
    """
    _Printer(report, Terminal(console)).everything(explain, verbose)


class _Printer:
    def __init__(self, report: Report, to: Writer) -> None:
        self.report, self.to = report, to

    def everything(self, explain: bool, verbose: bool) -> None:
        self.head()
        self.costs()
        self.rules(verbose)
        self.refusals(explain)
        self.predictions()
        self.checks(verbose)
        for note in self.report.notes:
            self.to.item(note, "note: ")
        self.trust()
        self.verdict()

    def head(self) -> None:
        r = self.report
        low, high = r.candidates
        n = str(low) if low == high else f"{r.usual} ({low}..{high})"
        self.to.say(f"{r.source or 'model in memory'}", "bold")
        self.to.say(f"onnxrank {r.version}, interface {r.interface}, costs of one request at N = {n}")
        if r.lengths:
            self.to.say("lengths: " + ", ".join(f"{name} {least}..{most}" for name, (least, most) in r.lengths.items()))
        self.to.blank()

    def costs(self) -> None:
        r = self.report
        if not r.before and not r.after:
            return
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, show_footer=True)
        before, after = _total(r.before.values()), _total(r.after.values())
        table.add_column("level", "total")
        for k, name in enumerate(("nodes", "parameters", "MACs", "bytes")):
            foot = self.to.change(_unit(before[k], k), _unit(after[k], k))
            table.add_column(name, self.to.text(foot), justify="right")
        for level in _levels(r):
            cells = [
                self.to.change(_unit(b, k), _unit(a, k))
                for k, (b, a) in enumerate(zip(_row(r.before.get(level)), _row(r.after.get(level)), strict=True))
            ]
            table.add_row(level, *map(self.to.text, cells))
        self.to.show(table)
        self.to.blank()
        parts = []
        if r.macs_before:
            saved = r.macs_before - r.macs_after
            parts.append(f"MACs saved: {percent(saved / r.macs_before)}")
        parts.append(f"file size: {self.to.change(human(r.size_before, 'B'), human(r.size_after, 'B'))}")
        self.to.say(", ".join(parts))

    def rules(self, verbose: bool) -> None:
        if not self.report.rules:
            return
        self.to.title("Rules")
        width = max(len(r.name) for r in self.report.rules)
        for rule in self.report.rules:
            macs = abs(rule.macs_saved)
            share = f" ({percent(macs / self.report.macs_before)})" if self.report.macs_before else ""
            what = "saved" if rule.macs_saved > 0 else "more, which makes room for other rules"
            saved = f", {human(macs)} MACs {what}{share}" if macs else ""
            known = [n for n in rule.break_even if n is not None]
            pays = f", pays from N = {', '.join(map(str, sorted(set(known))))}" if known else ""
            self.to.item(f"{count(rule.sites, 'site')}{saved}{pays}", f"{rule.name:<{width}}  ")
            for node in rule.nodes if verbose else ():
                self.to.line(node, 6)
        if self.report.below is not None:
            at = self.report.below
            self.to.item(f"all this from N = {at} on; for fewer candidates the file has a second plan, which does less")

    def refusals(self, explain: bool) -> None:
        groups: dict[tuple[str, str], list[Refusal]] = {}
        for refusal in self.report.refusals:
            groups.setdefault((refusal.rule, refusal.reason), []).append(refusal)
        if not groups:
            return
        self.to.title("Left alone")
        ordered = sorted(groups.items(), key=lambda g: (-sum(r.lost for r in g[1]), -len(g[1])))
        for (rule, reason), found in ordered if explain else ordered[:_MOST_REASONS]:
            self.to.item(reason, f"{len(found)} {self.to.times} {rule}: ")
            lost = sum(r.lost for r in found)
            if lost:
                self.to.item(told_lost(lost, self.report.macs_before), indent=6)
            nodes = [f"{r.op} {r.node}" for r in found if r.node]
            for node in shown_nodes(nodes, explain, lost):
                self.to.line(node, 6)
        if not explain:
            left = sum(len(found) for _, found in ordered[_MOST_REASONS:])
            more = f"{count(left, 'more place')} left out; " if left else ""
            self.to.item(f"{more}--explain names every node.")

    def predictions(self) -> None:
        found = self.report.predictions
        if any(p.measured is not None for p in found):
            self.to.title("Measured time of the original over that of the result, by candidates")
        for p in found:
            if p.measured is not None and p.low is not None and p.high is not None:
                beside = f"{three(p.low)} to {three(p.high)}; predicted {three(p.ratio)}"
                self.to.item(f"{three(p.measured)}{self.to.times} at {p.candidates} ({beside})")
        if found:
            self.to.title("Predicted time of the original over that of the result, by candidates")
            self.to.item(", ".join(f"{three(p.ratio)}{self.to.times} at {p.candidates}" for p in found))

    def checks(self, verbose: bool) -> None:
        found = self.report.checks
        if not found:
            return
        self.to.title("Check against the original")
        worst = max(found, key=_share_of_tolerance)
        counts = ", ".join(str(n) for n in sorted({c.candidates for c in found}))
        self.to.item(
            f"{count(len(found), 'comparison')} at N = {counts}: at most {worst.error:.2g} off, "
            f"{worst.tolerance:.2g} is allowed"
        )
        for line in self.report.looked:
            self.to.item(line, "compared at ")
        for line in self.report.unseen:
            self.to.item(line, "not looked at: ")
        for c in found if verbose else ():
            self.to.line(
                f"{'ok  ' if c.passed else 'FAIL'} N = {c.candidates}, seed {c.seed}, {c.output}: {c.error:.3g} "
                f"of {c.tolerance:.3g}",
                6,
            )

    def trust(self) -> None:
        told = trust(self.report.roles)
        if self.report.changed and told:
            self.to.blank()
            self.to.say(told, "bold yellow")

    def verdict(self) -> None:
        r = self.report
        self.to.blank()
        self.to.line(f"Written to {r.output}." if r.output else "No model was written.", 0)
        if not r.changed:
            self.to.say(
                f"Nothing applied: the output {'is' if r.output else 'would be'} the input's own bytes.", "bold yellow"
            )
            return
        uses = ", ".join(f"{rule.sites} {self.to.times} {rule.name}" for rule in r.rules) or "Rewritten"
        gone = ""
        if r.macs_before:
            gone = f": {percent(1 - r.macs_after / r.macs_before)} of MACs are now once per request or gone"
        self.to.say(f"{uses}{gone}.{'' if r.checks else ' Not checked.'}", "bold green")


def told_lost(lost: int, total: int) -> str:
    """What leaving places alone costs, of the multiply-adds of a model as far as these are known."""
    share = f", {percent(lost / total)} of the model" if lost <= total else ""
    return f"it costs {human(lost)} MACs per request{share}"


def shown_nodes(nodes: Sequence[str], every: bool, lost: int) -> list[str]:
    """The nodes that are named under a reason: all, or the first where leaving them alone costs something."""
    if every or not lost or not nodes:
        return list(nodes) if every else []
    return [nodes[0] + (f" and {len(nodes) - 1} more" if len(nodes) > 1 else "")]


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


def _share_of_tolerance(c: Any) -> float:
    share = c.error / max(c.tolerance, 1e-300)
    return math.inf if math.isnan(share) else share


def to_text(report: Report, style: Style = PLAIN) -> str:
    """The report as plain text that the style's encoding takes."""
    return as_text(lambda console: show(report, console, style), style.encoding)


def to_markdown(report: Report, style: Style = PLAIN) -> str:
    """The report as GitHub-flavoured Markdown."""
    to = Markdown()
    _Printer(report, to).everything(style.explain, style.verbose)
    return to.document
