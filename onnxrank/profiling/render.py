"""A profile as people and programs read it: tables for the terminal, and CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from onnxrank.formats import PLAIN, Style
from onnxrank.profiling.timing import fitted
from onnxrank.writers import Markdown, Terminal, Writer, as_text, count, human, percent, three

if TYPE_CHECKING:
    from rich.console import Console

    from onnxrank.profiling.report import Call, Kernels, ModelProfile, Profile, Share, Speedup, Work

LEVELS = {
    "request": "once per request",
    "repeated": "per candidate, though the same for all",
    "candidate": "per candidate",
}
_EXPECTED = 512  # the number of candidates whose kernels are shown, or the one next to it
_BAR = 12
_MOST_ROWS = 7


def duration(seconds: float) -> str:
    """Seconds with three digits and the unit that suits: 1.23 ms."""
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "us")):
        if seconds * factor >= 0.9995 or unit == "us":
            break
    return f"{three(seconds * factor)} {unit}"


def shown_candidates(profile: Profile) -> int:
    """The number of candidates, of those measured, that stands for all: the one next to 512."""
    return min((p.candidates for p in profile.points), key=lambda n: abs(math.log(n / _EXPECTED)))


def spread(median: float, low: float, high: float) -> str:
    """Half the width of an interval, relative to the median."""
    half = (high - low) / 2 / median if median else 0.0
    return f"±{100 * half:.1f} %"


def verdict(speedup: Speedup, times: str) -> str:
    """A speed-up in words."""
    interval = f"{speedup.low:.3f} to {speedup.high:.3f}"
    if not speedup.significant:
        return f"no significant difference ({interval})"
    return f"{three(speedup.ratio)}{times} ({interval})"


def conclusion(profile: Profile, second: str) -> str:
    """What the times of two models say, in a sentence; `second` is what the second one is called."""
    even, points = profile.break_even, profile.points
    assert even is not None
    sure = [str(p.candidates) for p in points if p.speedup is not None and p.speedup.significant]
    if not sure:
        return "No difference can be told at any number measured."
    if even.kind == "always" and len(sure) < len(points):
        return f"{second} is faster at N = {', '.join(sure)}; elsewhere no difference can be told."
    return {
        "always": f"{second} is faster at every number measured.",
        "measured": f"{second} is faster from {even.candidates} candidates on.",
        "extrapolated": f"{second} would be faster from about {even.candidates} candidates on, beyond those measured.",
        "never": f"{second} is not faster at any number of candidates.",
    }[even.kind]


def how(call: Call, requests: int) -> str:
    """How a model scores several requests."""
    return "one call" if call.together else f"{requests} call{'s' * (requests > 1)}"


def works_table(profile: Profile) -> tuple[str, list[str], list[list[str]]]:
    """How near the machine the models are: a title, heads and rows; no rows where nothing is known."""
    several = len(profile.models) > 1
    reached = [(k, x) for k, m in enumerate(profile.models, 1) for x in m.works]
    levels = [level for level in LEVELS if any(w.name == level for _, x in reached for w in x.levels)]
    rows = []
    for point in profile.points:
        for k, x in reached:
            if x.candidates == point.candidates:
                own = {w.name: w for w in x.levels}
                shown = [_share(x.all), *(_share(own.get(level)) for level in levels)]
                rows.append([str(x.candidates), *[str(k)] * several, human(x.all.macs), *shown])
    peaks = sorted(point.peak for point in profile.points)
    found = " to ".join(dict.fromkeys(human(p, "MACs") for p in (peaks[0], peaks[-1])))
    title = f"Share of the machine's peak, {found} per second in one large product"
    return title, ["N", *["model"] * several, "MACs", "all", *(LEVELS[level] for level in levels)], rows


def _share(work: Work | None) -> str:
    return "" if work is None or work.of_peak is None else percent(work.of_peak)


def ratio(speedup: Speedup | None, times: str) -> str:
    """A speed-up in short."""
    if speedup is None:
        return ""
    return f"{speedup.ratio:.2f}{times}" if speedup.significant else f"({speedup.ratio:.2f}{times})"


def show(profile: Profile, console: Console, style: Style = PLAIN) -> None:
    """Prints a profile in a style."""
    print_profile(profile, console, style.verbose)


def to_text(profile: Profile, style: Style = PLAIN) -> str:
    """The profile as plain text that the style's encoding takes."""
    return as_text(lambda console: show(profile, console, style), style.encoding)


def to_markdown(profile: Profile, style: Style = PLAIN) -> str:
    """The profile as GitHub-flavoured Markdown."""
    to = Markdown()
    _Printer(profile, to).everything(style.verbose)
    return to.document


def print_profile(profile: Profile, console: Console, verbose: bool = False) -> None:
    """Prints a profile: times, speed-ups, costs, and where the time goes.

    Args:
        profile: The profile.
        console: Where to.
        verbose: Whether to tell where the time goes at every number of candidates, and the longest kernels.
    """
    _Printer(profile, Terminal(console)).everything(verbose)


class _Printer:
    def __init__(self, profile: Profile, to: Writer) -> None:
        self.profile, self.to = profile, to

    def everything(self, verbose: bool) -> None:
        self.head()
        self.times_table()
        self.speedups()
        self.several()
        self.costs()
        self.works()
        shown = [p.candidates for p in self.profile.points] if verbose else [shown_candidates(self.profile)]
        for n in shown:
            self.where(n, verbose)
        self.memory()
        for note in self.profile.notes:
            self.to.item(note, "note: ")

    def head(self) -> None:
        p = self.profile
        for k, m in enumerate(p.models, 1):
            self.to.line(f"{k}: {m.source}" if len(p.models) > 1 else m.source, 0)
        how = [count(p.threads, "thread")]
        how += ["I/O binding"] * p.io_binding + ["CUDA graph"] * p.cuda_graph
        self.to.item(
            f"onnxrank {p.version}, onnxruntime {p.onnxruntime} on {p.provider} ({p.device}), {', '.join(how)}", "", 0
        )

    def times_table(self) -> None:
        several = len(self.profile.models) > 1
        self.to.title("Time per request")
        names = ["N", *["model"] * several, "median", "95 %", "p90", "p99", "candidates/s", ""]
        table = self.to.table(names, (len(names) - 1,))

        for p in self.profile.points:
            slowest = max(t.median for t in p.times)
            for k, t in enumerate(p.times, 1):
                error = spread(t.median, t.low, t.high).replace("±", self.to.plus_minus)
                cells = [str(p.candidates) if k == 1 else "", *[str(k)] * several, duration(t.median), error]
                cells += [duration(t.p90), duration(t.p99), human(t.candidates_per_second)]
                bar = self.to.bar(t.median / slowest, _BAR) if several else ""
                table.add_row(*map(self.to.text, cells), self.to.text(bar, "cyan" if k == 1 else "green"))
        self.to.show(table)
        copied = [t.copies for t in self.profile.points[-1].times if t.copies is not None]
        if copied:
            shown = ", ".join(duration(c) for c in copied)
            self.to.item(f"of it for copies between host and device at the largest N: {shown}")
        loose = [str(p.candidates) for p in self.profile.points if not p.settled]
        if loose:
            self.to.item(
                f"the time was used up before the interval was narrow at N = {', '.join(loose)}: see --seconds"
            )

    def speedups(self) -> None:
        p = self.profile
        if len(p.models) < 2:
            return
        self.to.title("Speed-up: time of 1 over time of 2, and its 95 % interval")
        width = max(len(str(point.candidates)) for point in p.points)
        for point in p.points:
            assert point.speedup is not None
            self.to.item(verdict(point.speedup, self.to.times), f"N = {point.candidates:>{width}}  ")
        self.to.item(conclusion(p, "2"))

    def several(self) -> None:
        if not self.profile.several:
            return
        many = len(self.profile.models) > 1
        self.to.title("Time of several requests")
        names = ["R", "N", *["model"] * many, "", "all", "95 %", "per request", "per candidate", *["1 over 2"] * many]
        table = self.to.table(names, (2 + many,))
        for p in self.profile.several:
            for k, c in enumerate(p.calls, 1):
                cells = [str(p.requests), str(p.candidates)] if k == 1 else ["", ""]
                cells += [*[str(k)] * many, how(c, p.requests), duration(c.median)]
                cells += [spread(c.median, c.low, c.high).replace("±", self.to.plus_minus)]
                cells += [duration(c.per_request), duration(c.per_candidate)]
                cells += [ratio(p.speedup, self.to.times) if k > 1 else ""] * many
                table.add_row(*map(self.to.text, cells))
        self.to.show(table)

    def costs(self) -> None:
        lines = [(k, m.line) for k, m in enumerate(self.profile.models, 1) if m.line is not None]
        if not lines:
            return
        self.to.title("Fitted cost of a request")
        for k, line in lines:
            once = f"{duration(line.once)} once + " if line.once else "no cost once that can be told, "
            bent = ""
            if line.knee is not None:
                bent = f" up to {line.knee} candidates, {duration(line.beyond)} beyond"
            self.to.item(
                f"{once}{duration(line.each)} per candidate{bent} (misses a median by {percent(line.error)} at most)",
                f"{k}: " if len(lines) > 1 else "",
            )
        measured = [point.candidates for point in self.profile.points]
        if fitted(measured) != measured:
            self.to.item("N = 1 is left out of the fit: a product with one row runs another kernel")

    def works(self) -> None:
        title, names, rows = works_table(self.profile)
        if not rows:
            return
        self.to.title(title)
        table = self.to.table(names, ())
        for row in rows:
            table.add_row(*map(self.to.text, row))
        self.to.show(table)

    def where(self, candidates: int, verbose: bool) -> None:
        found = [next(k for k in m.kernels if k.candidates == candidates) for m in self.profile.models]
        self.to.title(f"Where the time goes at N = {candidates}, by onnxruntime's profiler")
        for m, kernels in zip(self.profile.models, found, strict=True):
            if len(found) > 1:
                self.to.line(m.source, 0)
            self.shares(kernels, m, verbose)

    def shares(self, kernels: Kernels, model: ModelProfile, verbose: bool) -> None:
        table = self.to.table(["", "kernels", "time", "share", ""], (0, 4))

        def rows(shares: Sequence[Share], names: dict[str, str] | None = None) -> None:
            shown = shares if verbose else shares[:_MOST_ROWS]
            for s in shown:
                part = s.seconds / kernels.seconds if kernels.seconds else 0.0
                cells = [(names or {}).get(s.name, s.name), str(s.kernels), duration(s.seconds), percent(part)]
                table.add_row(*map(self.to.text, cells), self.to.text(self.to.bar(part, _BAR), "cyan"))
            rest = shares[len(shown) :]
            if rest:
                spent = sum(s.seconds for s in rest)
                many, part = sum(s.kernels for s in rest), spent / kernels.seconds
                cells = [f"{len(rest)} others", str(many), duration(spent), percent(part)]
                table.add_row(*map(self.to.text, cells), self.to.text(self.to.bar(part, _BAR), "cyan"))
            table.add_section()

        rows(kernels.levels, LEVELS)
        rows(kernels.operators)
        if model.optimised:
            names = {"none": "the user's own nodes", "other": "onnxruntime's own nodes"}
            rows(kernels.rules, {s.name: names.get(s.name, f"rule {s.name}") for s in kernels.rules})
        if len(kernels.providers) > 1 or self.profile.provider != "cpu":
            rows(kernels.providers)
        self.to.show(table)
        between = kernels.session - kernels.seconds
        extra = [f"kernels {duration(kernels.seconds)}, between them {duration(max(between, 0.0))}"]
        if kernels.copies.kernels:
            extra.append(f"{count(kernels.copies.kernels, 'copy kernel')} {duration(kernels.copies.seconds)}")
        if kernels.device is not None:
            extra.append(f"on the device {duration(kernels.device)}")
        self.to.item(", ".join(extra))
        for k in kernels.longest if verbose else ():
            self.to.line(f"{duration(k.seconds):>9}  {k.op} {k.name} ({k.level}, {k.rule})", 4)

    def memory(self) -> None:
        found = [(k, m.memory) for k, m in enumerate(self.profile.models, 1) if m.memory is not None]
        if not found:
            return
        self.to.title("Resident memory of a process that runs the model")
        for k, m in found:
            lead = f"{k}: " if len(self.profile.models) > 1 else ""
            self.to.item(
                f"{human(m.peak - m.start, 'B')} above an empty process at the peak, of which "
                f"{human(m.loaded - m.start, 'B')} for the loaded model (N = {m.candidates})",
                lead,
            )


def to_csv(profile: Profile) -> str:
    """One row per number of candidates and model, then those of several requests; times in seconds."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        "candidates model runs median low high p90 p99 candidates_per_second copies kernels once repeated "
        "per_candidate speedup speedup_low speedup_high significant requests seconds_per_request "
        "seconds_per_candidate macs of_peak".split()
    )
    for p in profile.points:
        for k, (model, t) in enumerate(zip(profile.models, p.times, strict=True)):
            kernels = next(x for x in model.kernels if x.candidates == p.candidates)
            levels = {s.name: s.seconds for s in kernels.levels}
            row = [p.candidates, model.source, t.runs, t.median, t.low, t.high, t.p90, t.p99]
            row += [t.candidates_per_second, "" if t.copies is None else t.copies, kernels.seconds]
            row += [levels.get(level, 0.0) for level in ("request", "repeated", "candidate")]
            s = p.speedup if k == 1 else None
            row += [s.ratio, s.low, s.high, int(s.significant)] if s else [""] * 4
            reached = next((x.all for x in model.works if x.candidates == p.candidates), None)
            row += [1, t.median, t.median / p.candidates]
            writer.writerow([*row, *(["", ""] if reached is None else [reached.macs, reached.of_peak])])
    for v in profile.several:
        for k, (model, c) in enumerate(zip(profile.models, v.calls, strict=True)):
            row = [v.candidates, model.source, c.runs, c.median, c.low, c.high, "", "", 1 / c.per_candidate, *[""] * 5]
            s = v.speedup if k == 1 else None
            row += [s.ratio, s.low, s.high, int(s.significant)] if s else [""] * 4
            writer.writerow([*row, v.requests, c.per_request, c.per_candidate, "", ""])
    return out.getvalue()
