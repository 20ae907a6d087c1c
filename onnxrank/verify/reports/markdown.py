"""Markdown for a comment on a pull request."""

from __future__ import annotations

from onnxrank.verify.report import Report
from onnxrank.verify.reports import common
from onnxrank.writers import code, escape

_MARKS = {"passed": "✅", "failed": "❌", "skipped": "➖"}


def to_markdown(report: Report) -> str:
    """The report as GitHub-flavoured Markdown."""
    mark = _MARKS["passed" if report.passed else "failed"]
    out = [
        f"### {mark} onnxrank verify: {escape(common.headline(report))}",
        "",
        f"`{code(report.original or 'model in memory')}` against `{code(report.optimized or 'model in memory')}`, "
        f"contract {escape(str(report.contract.get('source', 'none')))}",
        "",
        "| verdict | | cases | worst | allowed | where |",
        "|---|---|--:|--:|--:|---|",
    ]
    for line in common.lines(report):
        w = line.worst
        where = f"`{code(w.output)}`, N = {w.candidates}, {w.inputs}, {w.provider} {w.level}" if w else line.says
        counts = f"{line.failed} of {line.cases} failed" if line.failed else str(line.cases)
        limits = f"{w.error:.2g} | {w.allowed:.2g}" if w else " | "
        out.append(f"| {line.verdict} | {_MARKS[line.outcome]} {line.outcome} | {counts} | {limits} | {where} |")
    out.append("")
    for f in report.findings:
        if f.severity != "note":
            out.append(f"- **{f.severity}**, {f.verdict}: {escape(f.message)}")
    out += [f"- **not looked at**: {escape(line)}" for line in report.unseen]
    if told := common.trust(report):
        out.append(f"- {escape(told)}")
    if report.culprit is not None:
        out.append(f"- **bisect**: {escape(report.culprit.message)}")
    out += ["", "<details><summary>Distances and environment</summary>", ""]
    out += [f"- {escape(common.distances(s))}" for s in report.statistics]
    for r in report.ranking:
        out.append(
            f"- order of {escape(r.output)}: top-{r.top_k} overlap {r.overlap:.3g}, Kendall tau {r.tau:.6g}, largest "
            f"move {r.move}, {r.requests} lists"
        )
    out += [f"- compared at {escape(line)}" for line in report.looked]
    if report.requests:
        out.append(f"- {report.requests} recorded requests")
    out += [f"- {escape(common.environment(report))}", "", "</details>", ""]
    return "\n".join(out)
