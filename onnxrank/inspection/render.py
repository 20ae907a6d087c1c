"""An inspection as people read it on a terminal."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

from onnxrank.formats import PLAIN, Style
from onnxrank.render import shown_nodes, told_lost
from onnxrank.report import report_candidates
from onnxrank.writers import Markdown, Terminal, Writer, as_text, count, human, percent, three

if TYPE_CHECKING:
    from rich.console import Console

    from onnxrank.inspection.engine import Explanation
    from onnxrank.inspection.report import InputTensor, Inspection, Layer, Opportunity
    from onnxrank.inspection.report import Table as Embedding

_BAR = 16
_MOST_ROWS = 12
_MOST_INPUTS = 24
_LEAST_GAIN = 0.005
_NAME = 34
BELOW_IDEAL = (
    "optimize is below the block ideal, which keeps the order of products: it also changes that order, as fold, cross "
    "and attention do, and leaves out what nobody reads."
)


def show(found: Inspection, console: Console, style: Style = PLAIN) -> None:
    """Prints an inspection, or what it says of one node, in a style."""
    _write(found, Terminal(console), style)


def to_text(found: Inspection, style: Style = PLAIN) -> str:
    """The inspection as plain text that the style's encoding takes."""
    return as_text(lambda console: show(found, console, style), style.encoding)


def to_markdown(found: Inspection, style: Style = PLAIN) -> str:
    """The inspection as GitHub-flavoured Markdown."""
    to = Markdown()
    _write(found, to, style)
    return to.document


def _write(found: Inspection, to: Writer, style: Style) -> None:
    if style.node is None:
        _Printer(found, to, style.verbose).everything()
    else:
        from onnxrank.inspection.engine import explain

        _explain(explain(found, style.node), to)


def print_inspection(found: Inspection, console: Console, verbose: bool = False) -> None:
    """Prints an inspection: inputs, costs, layers, opportunities, refusals, tables and sequences.

    Args:
        found: The inspection.
        console: Where to.
        verbose: Whether to list everything instead of what costs most.
    """
    _Printer(found, Terminal(console), verbose).everything()


def print_explanation(explained: Explanation, console: Console) -> None:
    """Prints why a tensor has its level: the chain from the inputs that make it so."""
    _explain(explained, Terminal(console))


def _explain(explained: Explanation, p: Writer) -> None:
    t = explained.tensor
    p.line(t.name, 0)
    node = explained.node
    p.item(f"made by {node.op} {node.name}" if node else "an input of the model")
    p.item(f"shape {shape_text(t.dims)}, level {t.level}")
    if t.level == "mixed":
        p.item(f"{percent(t.once)} of its entries are the same for all candidates")
    for b in t.blocks:
        p.item(f"axis {b.axis}, positions {b.positions}: {b.level}", indent=4)
    if node is not None and node.macs:
        p.item(f"{human(node.macs)} multiply-adds per request, {human(node.once)} of them the same for all candidates")
    if node is not None and node.rule:
        p.item(f"rule {node.rule} saves {human(node.saved)} multiply-adds here")
    p.title("Why")
    p.item(explained.reason)
    for k, step in enumerate(explained.chain):
        how = f"{step.op} {step.node}" if step.op else "input"
        lead = "   " if k == 0 else f"{p.arrow:<3}"
        p.line(f"{lead}{step.tensor} {shape_text(step.dims)} {step.level}  ({how})", 4)
    p.title("Inputs behind it")
    for role in ("request", "mixed", "candidate"):
        names = [i.name for i in explained.inputs if i.role == role]
        if names:
            p.item(", ".join(names), f"{role}: ")


def shape_text(dims: Sequence[str]) -> str:
    """A shape: `[N, 50, 64]`."""
    return f"[{', '.join(dims)}]"


def verdict(found: Inspection, times: str) -> str:
    """What `optimize` would gain, in a sentence."""
    if not found.result:
        return "optimize would change nothing."
    saved = f"{percent(1 - found.macs_after / found.macs_before)} of MACs" if found.macs_before else "no MACs"
    expected = report_candidates(found.candidates)
    at = min(found.predictions, key=lambda p: abs(math.log(p.candidates / expected)))
    return f"optimize would save {saved}: predicted {three(at.ratio)}{times} at N = {at.candidates}."


_Item = TypeVar("_Item")


def alike(items: Iterable[_Item], key: Callable[[_Item], object]) -> list[list[_Item]]:
    """Neighbours of one key together."""
    return [list(several) for _, several in itertools.groupby(items, key)]


def input_key(i: InputTensor) -> object:
    """What is told of an input but for its name."""
    return i.dtype, i.dims, i.role, i.request, gain_text(i.gain)


def table_key(t: Embedding) -> object:
    """What is told of a table but for its name and inputs."""
    return t.rows, t.width, t.lookups, t.needed, t.level


def opportunity_key(o: Opportunity) -> object:
    """What is told of an opportunity but for its place."""
    return o.rule, o.op, o.macs, o.seconds


def many(names: Sequence[str]) -> str:
    """One name, or the first and the last of several."""
    return names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]} ({len(names)})"


def gain_text(gain: float | None) -> str:
    """What declaring an input request-level would save."""
    return "" if gain is None or gain < _LEAST_GAIN else f"+{100 * gain:.1f} % saved"


class _Printer:
    def __init__(self, found: Inspection, to: Writer, verbose: bool) -> None:
        self.found, self.to, self.verbose = found, to, verbose

    def everything(self) -> None:
        self.head()
        self.inputs()
        self.costs()
        self.layers()
        self.opportunities()
        self.refusals()
        self.lookups()
        for note in self.found.notes:
            self.to.item(note, "note: ")
        self.verdict()

    def cut(self, rows: Sequence[object], most: int = _MOST_ROWS) -> int:
        """How many of some rows to show."""
        return len(rows) if self.verbose else min(len(rows), most)

    def rest(self, rows: Sequence[object], shown: int, what: str) -> None:
        if len(rows) > shown:
            self.to.item(f"{count(len(rows) - shown, what)} more; -v lists all.")

    def head(self) -> None:
        f = self.found
        low, high = f.candidates
        n = str(low) if low == high else f"{report_candidates(f.candidates)} ({low}..{high})"
        self.to.line(f.source or "model in memory", 0)
        self.to.item(f"onnxrank {f.version}, {count(len(f.nodes), 'node')}, costs of one request at N = {n}", indent=0)

    def inputs(self) -> None:
        self.to.title("Inputs")
        table = self.to.table(["name", "type", "shape", "role", "if request-level"], (0, 1, 2, 3, 4))
        groups = alike(self.found.inputs, input_key)
        shown = self.cut(groups, _MOST_INPUTS)
        for several in groups[:shown]:
            i = several[0]
            name = many([x.name for x in several])
            role = f"{i.role}, request-level [{i.request}]" if i.request else i.role
            each = " each" if len(several) > 1 and gain_text(i.gain) else ""
            table.add_row(*map(self.to.text, (name, i.dtype, shape_text(i.dims), role, gain_text(i.gain) + each)))
        self.to.show(table)
        self.rest(groups, shown, "group")

    def costs(self) -> None:
        f = self.found
        self.to.title("Costs by level")
        table = self.to.table(["level", "nodes", "parameters", "MACs", "bytes"])
        for level, c in f.before.items():
            table.add_row(
                *map(self.to.text, (level, str(c.nodes), human(c.parameters), human(c.macs), human(c.bytes, "B")))
            )
        self.to.show(table)
        if not f.macs_before:
            return
        self.to.title("Multiply-adds per request")
        for name, macs, told in (
            ("now", f.macs_before, ""),
            ("block ideal", f.ideal.macs, "each shared product made once"),
            ("optimize", f.macs_after, "what it would leave"),
        ):
            share = macs / f.macs_before
            bar = self.to.bar(share, _BAR)
            self.to.line(f"{name:<12}{human(macs):>6} {percent(share):>7}  {bar:<{_BAR}}  {told}".rstrip(), 2)
        if f.macs_after < f.ideal.macs:
            self.to.item(BELOW_IDEAL)

    def layers(self) -> None:
        f = self.found
        inner = [layer for layer in f.layers if layer.scope]
        if not inner or not f.macs_before:
            return
        self.to.title("Layers")
        table = self.to.table(["layer", "nodes", "parameters", "MACs", "", "same for all", "saved"])
        shown = set(self.dearest(inner))
        for layer in inner:
            if layer.scope not in shown:
                continue
            depth = layer.scope.count("/")
            name = "  " * depth + layer.scope.rsplit("/", 1)[-1]
            name = name if len(name) <= _NAME else name[: _NAME - 2] + ".."
            cells = [name, str(layer.nodes), human(layer.parameters), human(layer.macs)]
            cells += [percent(layer.macs / f.macs_before)]
            cells += [percent(layer.once / layer.macs) if layer.macs else "", percent(layer.saved / f.macs_before)]
            table.add_row(*map(self.to.text, cells))
        self.to.show(table)
        self.rest(inner, len(shown), "layer")

    def dearest(self, layers: Sequence[Layer]) -> list[str]:
        """The layers to show: those that cost most, with the ones they are in."""
        if self.verbose:
            return [layer.scope for layer in layers]
        out: list[str] = []
        for layer in sorted(layers, key=lambda x: -x.macs)[:_MOST_ROWS]:
            parts = layer.scope.split("/")
            out += ["/".join(parts[:k]) for k in range(1, len(parts) + 1)]
        return list(dict.fromkeys(out))

    def opportunities(self) -> None:
        found = self.found.opportunities
        if not found:
            return
        self.to.title("Best opportunities: what optimize takes, by predicted time")
        groups = alike(found, opportunity_key)
        shown = self.cut(groups)
        table = self.to.table(["rule", "MACs", "", "time", "node"], (0, 4))
        for several in groups[:shown]:
            o = several[0]
            saved = f"{three(o.seconds * 1e6)} us" if o.seconds < 1e-3 else f"{three(o.seconds * 1e3)} ms"
            cells = [o.rule, human(o.macs) if o.macs >= 0 else f"-{human(-o.macs)}", percent(o.share), saved]
            each = f" each, {len(several)} places" if len(several) > 1 else ""
            table.add_row(*map(self.to.text, [*cells, f"{o.op} {o.node}{each}"]))
        self.to.show(table)
        self.rest(groups, shown, "group")

    def refusals(self) -> None:
        found = self.found.refusals
        if not found:
            return
        self.to.title("Left alone")
        shown = self.cut(found, 8)
        for r in found[:shown]:
            self.to.item(r.reason, f"{max(1, len(r.nodes))} {self.to.times} {r.rule}: ")
            if r.lost:
                self.to.item(told_lost(r.lost, self.found.macs_before), indent=6)
            elif r.macs:
                share = percent(r.macs / self.found.macs_before)
                self.to.item(f"{human(r.macs)} multiply-adds, {share}", indent=6)
            if r.lift:
                self.to.item(r.lift, f"{self.to.arrow} ", indent=6)
            for node in shown_nodes(r.nodes, self.verbose, r.lost):
                self.to.line(node, 6)
        self.rest(found, shown, "reason")

    def lookups(self) -> None:
        f = self.found
        if f.tables:
            self.to.title("Embedding tables")
            table = self.to.table(["table", "rows", "width", "size", "lookups", "needed", "ids"], (0, 6))
            groups = alike(f.tables, table_key)
            shown = self.cut(groups)
            for several in groups[:shown]:
                t = several[0]
                cells = [many([x.name for x in several]), human(t.rows), str(t.width), human(t.bytes, "B")]
                table.add_row(*map(self.to.text, [*cells, human(t.lookups), human(t.needed), t.level]))
            self.to.show(table)
            self.rest(groups, shown, "group")
        if f.sequences:
            self.to.title("Sequences")
            for s in f.sequences:
                steps = f"{s.length} steps" if s.length else "steps of any number"
                into = f", taken in by {', '.join(s.readers)}" if s.readers else ""
                where = f", looked up in {', '.join(s.tables)}" if s.tables else ""
                self.to.item(f"{steps}, {s.level}-level{where}{into}", f"{s.input}: ")

    def verdict(self) -> None:
        self.to.blank()
        self.to.say(verdict(self.found, self.to.times), "bold green" if self.found.result else "bold yellow")
