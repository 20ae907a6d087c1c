"""A profile as a self-contained HTML page."""

from __future__ import annotations

from pathlib import PurePath

from onnxrank import charts, pages
from onnxrank.profiling.render import (
    LEVELS,
    conclusion,
    duration,
    how,
    ratio,
    shown_candidates,
    spread,
    verdict,
    works_table,
)
from onnxrank.profiling.report import Kernels, ModelProfile, Profile
from onnxrank.profiling.timing import fitted
from onnxrank.writers import human, percent

_STYLES = ("first", "second")
_MOST_OPERATORS = 12


def to_html(profile: Profile) -> str:
    """The page: time against N, speed-up, costs, stacked time by level, operators and rules."""
    names = _names(profile)
    title = " against ".join(names)
    how = [f"{profile.threads} thread{'s' * (profile.threads != 1)}"]
    how += ["I/O binding"] * profile.io_binding + ["CUDA graph"] * profile.cuda_graph
    where = f"onnxrank {profile.version}, onnxruntime {profile.onnxruntime} on {profile.provider} ({profile.device})"
    body = [
        f"<h1>{pages.escape(title)}</h1>",
        *_verdict(profile),
        f'<p class="faint">{pages.escape(where)}, {", ".join(how)}</p>',
        *(f"<p>Note: {pages.escape(n)}</p>" for n in profile.notes),
        "<h2>Time per request against the number of candidates</h2>",
        '<div class="row"><div>',
        pages.legend(list(zip(_STYLES, names, strict=False))),
        time_chart(profile),
        "</div><div>",
        _times(profile),
        "</div></div>",
        *_speedups(profile),
        *_several(profile),
        *_costs(profile, names),
        *_works(profile),
        "<h2>Where the time goes, by level</h2>",
        '<p class="faint">Kernel time per request by onnxruntime\'s profiler, which slows small kernels down; at every '
        "N the longer bar is as long as the room.</p>",
        pages.legend(list(LEVELS.items())),
        level_chart(profile),
        "<h2>Operators and rules</h2>",
        _chooser(profile),
    ]
    for p in profile.points:
        hidden = "" if p.candidates == shown_candidates(profile) else " hidden"
        body.append(f'<div class="row" data-candidates="{p.candidates}"{hidden}>')
        body += [_operators(profile, p.candidates), *_rules(profile, p.candidates), "</div>"]
    return pages.document(title, body)


def _names(profile: Profile) -> list[str]:
    return [PurePath(m.source).name for m in profile.models]


def _verdict(profile: Profile) -> list[str]:
    return [] if profile.break_even is None else [f'<p class="verdict">{conclusion(profile, "The second model")}</p>']


def time_chart(profile: Profile) -> str:
    """Time per request against the number of candidates, with the medians' intervals."""
    series = [
        charts.Series(
            name, style, [(p.candidates, p.times[k].median, p.times[k].low, p.times[k].high) for p in profile.points]
        )
        for k, (name, style) in enumerate(zip(_names(profile), _STYLES, strict=False))
    ]
    return charts.curves(series, "candidates per request", duration)


def _times(profile: Profile) -> str:
    rows: list[list[object]] = []
    for p in profile.points:
        for name, t in zip(_names(profile), p.times, strict=True):
            row = [p.candidates, name, duration(t.median), spread(t.median, t.low, t.high), duration(t.p90)]
            rows.append([*row, duration(t.p99), human(t.candidates_per_second), t.runs])
    return pages.table("N,model,median,95 %,p90,p99,candidates/s,runs".split(","), rows, (1,))


def _speedups(profile: Profile) -> list[str]:
    if profile.break_even is None:
        return []
    rows = [[p.candidates, verdict(p.speedup, "×")] for p in profile.points if p.speedup]
    heads = ["N", "time of the first over time of the second, and its 95 % interval"]
    told = pages.table(heads, rows, (1,))
    chart = f'<div class="row"><div>{speedup_chart(profile)}</div><div>{told}</div></div>'
    return ["<h2>Speed-up</h2>", chart]


def _several(profile: Profile) -> list[str]:
    if not profile.several:
        return []
    rows: list[list[object]] = []
    for p in profile.several:
        for k, (name, c) in enumerate(zip(_names(profile), p.calls, strict=True)):
            row = [p.requests, p.candidates, name, how(c, p.requests), duration(c.median)]
            row += [spread(c.median, c.low, c.high), duration(c.per_request), duration(c.per_candidate)]
            rows.append([*row, ratio(p.speedup, "×") if k else ""])
    heads = ["R", "N", "model", "", "all", "95 %", "per request", "per candidate", "first over second"]
    return ["<h2>Time of several requests</h2>", pages.table(heads, rows, (2, 3))]


def speedup_chart(profile: Profile) -> str:
    """Time of the first model over that of the second, with intervals, and a line where they are equal."""
    points = [(p.candidates, p.speedup.ratio, p.speedup.low, p.speedup.high) for p in profile.points if p.speedup]
    series = [charts.Series("speed-up", "second", points)]
    return charts.curves(series, "candidates per request", lambda v: f"{v:.3g}×", 240, even=1.0)


def _costs(profile: Profile, names: list[str]) -> list[str]:
    lines = [(name, m.line) for name, m in zip(names, profile.models, strict=True) if m.line is not None]
    bent = any(line.knee is not None for _, line in lines)
    rows = []
    for name, line in lines:
        beyond = "" if line.knee is None else f"{duration(line.beyond)} from N = {line.knee}"
        once = duration(line.once) if line.once else "none that can be told"
        rows.append([name, once, duration(line.each), *([beyond] * bent), percent(line.error)])
    memory = [
        [name, human(m.memory.peak - m.memory.start, "B"), human(m.memory.loaded - m.memory.start, "B")]
        for name, m in zip(names, profile.models, strict=True)
        if m.memory is not None
    ]
    out = []
    if rows:
        heads = ["model", "once per request", "per candidate", *(["per candidate beyond"] * bent)]
        out += ["<h2>Fitted cost of a request</h2>", pages.table([*heads, "largest miss of a median"], rows)]
        measured = [p.candidates for p in profile.points]
        if fitted(measured) != measured:
            out.append("<p>N = 1 is left out of the fit: a product with one row runs another kernel.</p>")
    if memory:
        heads = ["model", "peak above an empty process", "of it the loaded model"]
        out += ["<h2>Memory</h2>", pages.table(heads, memory)]
    return out


def _works(profile: Profile) -> list[str]:
    title, heads, rows = works_table(profile)
    if not rows:
        return []
    by_kernels = '<p class="faint">All by the time of a request, levels by that of their kernels.</p>'
    return [f"<h2>{title}</h2>", by_kernels, pages.table(heads, rows)]


def _at(model: ModelProfile, candidates: int) -> Kernels:
    return next(k for k in model.kernels if k.candidates == candidates)


def level_chart(profile: Profile) -> str:
    """Kernel time per request by level, stacked, for every number of candidates."""
    groups = []
    for p in profile.points:
        several = []
        for name, m in zip(_names(profile), profile.models, strict=True):
            found = {s.name: s.seconds for s in _at(m, p.candidates).levels}
            parts = [(k, found[k], f"{told}: {duration(found[k])}") for k, told in LEVELS.items() if k in found]
            several.append(charts.Bar(name, parts, duration(sum(found.values()))))
        groups.append((f"N = {p.candidates}", several))
    return charts.bars(groups, 860, 200)


def _chooser(profile: Profile) -> str:
    options = "".join(
        f"<option{' selected' * (p.candidates == shown_candidates(profile))}>{p.candidates}</option>"
        for p in profile.points
    )
    return f'<p class="tools"><label>N = <select id="candidates">{options}</select></label></p>'


def _operators(profile: Profile, candidates: int) -> str:
    spent: dict[str, list[float]] = {}
    for k, m in enumerate(profile.models):
        for s in _at(m, candidates).operators:
            spent.setdefault(s.name, [0.0] * len(profile.models))[k] = s.seconds
    longest = sorted(spent, key=lambda op: -max(spent[op]))[:_MOST_OPERATORS]
    groups = []
    for op in longest:
        several = [
            charts.Bar(op if k == 0 else "", [(_STYLES[k], t, f"{op}: {duration(t)}")], duration(t) if t else "")
            for k, t in enumerate(spent[op])
        ]
        groups.append(("", several))
    return f"<div>{charts.bars(groups)}</div>"


def _rules(profile: Profile, candidates: int) -> list[str]:
    out = []
    said = {"none": "the user's own nodes", "other": "onnxruntime's own nodes"}
    for name, m in zip(_names(profile), profile.models, strict=True):
        found = _at(m, candidates)
        shown = [*found.rules] if m.optimised else []
        shown += [s for s in found.providers if len(found.providers) > 1]
        rows = [[said.get(s.name, s.name), s.kernels, duration(s.seconds), percent(s.seconds / (found.seconds or 1))]
                for s in shown]  # fmt: skip
        if rows:
            listed = pages.table(["rule", "kernels", "time", "share"], rows)
            out.append(f"<div><p>{pages.escape(name)}</p>{listed}</div>")
    return out
