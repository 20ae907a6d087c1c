"""A compression as a self-contained HTML page: what each step saves against what it costs."""

from __future__ import annotations

from pathlib import PurePath

from onnxrank import charts, pages
from onnxrank.compress.render import CRITERIA, basis, change, micro, ratio, told, value
from onnxrank.compress.report import Report
from onnxrank.writers import human

_LEAST = 1e-6  # of a logarithmic axis


def to_html(report: Report) -> str:
    """The page: the front as a chart, the steps, and what the gate found."""
    name = PurePath(report.source).name if report.source else "the model"
    body = [
        f"<h1>{pages.escape(name)} compressed</h1>",
        f'<p class="faint">onnxrank {pages.escape(report.version)}, times at N = {report.candidates}, '
        f"{report.rows.get('calibration', 0)} rows for calibration, {report.rows.get('gate', 0)} for the gate</p>",
        f'<p class="verdict">{pages.escape(_verdict(report))}</p>',
        *(f"<p>Note: {pages.escape(n)}</p>" for n in report.notes),
        *_front(report),
        *_gate(report),
        *_more(report),
    ]
    return pages.document(f"{name} compressed", body)


def _verdict(report: Report) -> str:
    if report.verdict != "passed":
        return f"The gate: {report.verdict}. Nothing was written."
    small, fast = report.ratios["size"], report.ratios["latency"]
    quick = "" if fast is None else f", {fast:.2f}× as fast"
    return f"{small:.2f}× smaller{quick}; the gate let it pass." if report.changed else "Nothing could be compressed."


def front_chart(report: Report) -> str:
    """Distance of logits against size; points that no other beats in both are joined."""
    front = [report.points[k] for k in report.front]
    size = report.points[0].bytes / 1024
    joined = [(p.bytes / 1024, *(max(p.logit_error, _LEAST),) * 3) for p in front if p.bytes / 1024 <= size]
    return charts.curves(
        [charts.Series("the front", "second", sorted(joined))],
        "size in KiB",
        lambda v: f"{v:.2g}",
    )


def speed_chart(report: Report) -> str:
    """Time of the original over that of each step, in the order of the steps."""
    points = [
        (float(k), p.speed.ratio, p.speed.low, p.speed.high)
        for k, p in enumerate(report.points, 1)
        if p.speed is not None
    ]
    series = [charts.Series("times faster", "first", points)]
    return charts.curves(series, "steps", lambda v: f"{v:.3g}×", 240, even=1.0)


def _front(report: Report) -> list[str]:
    if not report.points:
        return []
    front = set(report.front)
    rows = [
        [
            told(p), human(p.bytes, "B"), human(p.parameters), human(p.macs),
            "" if p.speed is None else micro(p.speed.seconds), ratio(p.speed), f"{p.logit_error:.4f}", change(p.auc),
            "" if p.overlap is None else f"{p.overlap:.4f}", "yes" if k in front else "",
        ]
        for k, p in enumerate(report.points)
    ]  # fmt: skip
    heads = "step,size,parameters,MACs,p50,faster,logits,AUC (95 %),top 10,front".split(",")
    return [
        "<h2>What is given up for the size</h2>",
        '<p class="faint">Distance of the logits on the calibration rows, relative to their spread, of the models that '
        "no other beats in both; and how many times faster than the original every step is.</p>",
        f'<div class="row"><div>{front_chart(report)}</div><div>{speed_chart(report)}</div></div>',
        "<h2>Steps</h2>",
        pages.table(heads, rows),
    ]


def _gate(report: Report) -> list[str]:
    out = ["<h2>The gate, on requests that nothing was fitted to</h2>"] if report.outcomes else []
    for o in report.outcomes:
        out.append(f"<p>{pages.escape(basis(o))}</p>")
        if o.criteria:
            heads = ["", "change", f"{100 * o.level:.4g} %", "allowed", "verdict"]
            out.append(pages.table(heads, [[CRITERIA[c.name], *value(c), c.verdict] for c in o.criteria]))
        out += [f"<p>{pages.escape(r)}</p>" for r in o.reasons]
        if o.calibration is not None:
            out.append(f"<p>Expected over observed: {o.calibration[0]:.4f} → {o.calibration[1]:.4f}</p>")
        if o.worst is not None:
            kept = "" if o.worst.overlap is None else f"{o.worst.overlap:.0%} of its best stayed, "
            line = f"Worst request: {o.worst.name}: {kept}logits {o.worst.logit_rmse:.3f} off"
            out.append(f"<p>{pages.escape(line)}</p>")
    return out


def _more(report: Report) -> list[str]:
    out = []
    if report.packed:
        out += ["<h2>Packed away, since it does nothing</h2>", *(f"<p>{pages.escape(p)}</p>" for p in report.packed)]
    if report.refusals:
        rows = [[x.site, x.method, x.reason] for x in report.refusals]
        out += ["<h2>Left alone</h2>", pages.table(["site", "method", "why"], rows, (0, 1, 2))]
    return out
