"""An inspection as a self-contained HTML page with a picture of the graph."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePath
from typing import Any

from onnxrank import charts, pages
from onnxrank.inspection.render import (
    BELOW_IDEAL,
    alike,
    gain_text,
    input_key,
    many,
    opportunity_key,
    shape_text,
    table_key,
    verdict,
)
from onnxrank.inspection.report import Inspection, Layer, Node, Tensor
from onnxrank.roles import parse_ranges
from onnxrank.writers import human, percent, three

_MOST_ROWS = 60
_LEAST_SHARE = 0.005  # of all multiply-adds, for a layer to be listed at once
_IDEAL = (
    "Block ideal: every product of values that are the same for all candidates is made once, and everything else as "
    "the model makes it."
)
_LEGEND = [
    ("request", "the same for all candidates"),
    ("candidate", "per candidate"),
    ("mixed", "some entries the same for all, some not"),
    ("constant", "constant"),
]


def to_html(found: Inspection) -> str:
    """The page: costs, the graph before and after, layers, opportunities, refusals, tables and sequences."""
    name = PurePath(found.source).name if found.source else "model in memory"
    low, high = found.candidates
    n = str(low) if low == high else f"{low}..{high}"
    body = [
        f"<h1>{pages.escape(name)}</h1>",
        f'<p class="verdict">{pages.escape(verdict(found, "×"))}</p>',
        f'<p class="faint">onnxrank {found.version}, {len(found.nodes)} nodes, costs of one request at N = {n}</p>',
        *(f"<p>Note: {pages.escape(note)}</p>" for note in found.notes),
        "<h2>Multiply-adds per request</h2>",
        cost_chart(found),
        f'<p class="faint">{_IDEAL}{" " + BELOW_IDEAL if found.macs_after < found.ideal.macs else ""}</p>',
        "<h2>Graph</h2>",
        pages.legend(_LEGEND),
        _GRAPH.replace("HIDDEN", "" if found.result else " hidden"),
        "<h2>Inputs</h2>",
        _inputs(found),
        "<h2>Layers</h2>",
        _layers(found),
        *_opportunities(found),
        *_refusals(found),
        *_lookups(found),
    ]
    graphs = [_graph(found.nodes, found.tensors, found)]
    if found.result:
        graphs.append(_graph(found.result, found.tensors, found))
    return pages.document(f"{name}: onnxrank inspect", body, {"graphs": graphs})


_GRAPH = """<div class="tools">
<input id="search" type="search" placeholder="search nodes, tensors, operators" aria-label="search">
<button id="fit">Fit</button><button id="collapse">Collapse all</button><button id="expand">Expand all</button>
<label><input type="checkbox" id="constants"> constants</label>
<label HIDDEN><input type="checkbox" id="after" checked> after optimize</label>
<span class="faint" id="state"></span></div>
<ul id="hits"></ul>
<div class="graphs">
<div class="graph"><h3>before</h3><canvas tabindex="0" aria-label="graph before"></canvas></div>
<div class="graph" id="second"HIDDEN><h3>after optimize</h3>
<canvas tabindex="0" aria-label="graph after"></canvas></div>
</div>
<p class="faint">Drag to move, wheel to zoom, hover for shape, level, blocks and cost, click to mark a node and its
neighbours on both sides, double-click a layer to open it and a node to close its layer.</p>
<div id="tip" hidden></div>"""


def cost_chart(found: Inspection) -> str:
    """Multiply-adds now, in the block ideal, and after `optimize`, by how often they are made."""

    def bar(name: str, once: float, each: float) -> charts.Bar:
        parts = [("request", once, f"once per request: {human(once)}")]
        parts.append(("candidate", each, f"per candidate, all together: {human(each)}"))
        total = f", {percent((once + each) / found.macs_before)}" if found.macs_before else ""
        return charts.Bar(name, parts, f"{human(once + each)}{total}")

    rows = []
    for name, costs in (("now", found.before), ("optimize", found.after)):
        each = costs["candidate"].macs if "candidate" in costs else 0
        rows.append(bar(name, sum(c.macs for c in costs.values()) - each, each))
    rows.insert(1, bar("block ideal", found.ideal.once, max(found.ideal.macs - found.ideal.once, 0)))
    legend = pages.legend([("request", "made once per request"), ("candidate", "made for every candidate")])
    return legend + charts.bars([("", rows)], 760, 120)


def _graph(nodes: Iterable[Node], tensors: Iterable[Tensor], found: Inspection) -> dict[str, Any]:
    """A graph as the page's script takes it: nodes, and edges as pairs of their numbers."""
    known = {t.name: t for t in tensors}
    total = found.macs_before or 1
    out: list[dict[str, Any]] = []
    made: dict[str, int] = {}
    edges: set[tuple[int, int]] = set()
    nodes = list(nodes)
    read = {i for n in nodes for i in n.inputs}
    produced = {o for n in nodes for o in n.outputs}
    names = [i.name for i in found.inputs]
    for name in [*names, *(f"{i}.{part}" for i in names for part in ("request", "candidate"))]:
        if name in read and name not in produced:
            made[name] = len(out)
            role = next((i.role for i in found.inputs if i.name == name), name.rsplit(".", 1)[-1])
            t = known.get(name)
            out.append({"name": name, "op": "input", "scope": "", "level": role, **_shape(t)})
    for n in nodes:
        k = len(out)
        made.update(dict.fromkeys(n.outputs, k))
        edges.update((made[i], k) for i in n.inputs if i in made and made[i] != k)
        told: dict[str, Any] = {"name": n.name, "op": n.op, "scope": n.scope, "level": n.level, "macs": n.macs}
        told |= {"once": n.once, "bytes": n.bytes, "share": round(n.macs / total, 5), "rule": n.rule}
        told |= {"saved": n.saved, "tensor": n.outputs[0] if n.outputs else "", "rows": n.rows}
        own = known.get(n.outputs[0]) if n.outputs and n.level in ("mixed", "candidate", "request") else None
        out.append(told | (_shape(own) if own is None or own.level == n.level else {}))
    return {"nodes": out, "edges": sorted(edges)}


def _shape(tensor: Tensor | None) -> dict[str, Any]:
    if tensor is None:
        return {}
    out: dict[str, Any] = {"shape": shape_text(tensor.dims)}
    if tensor.blocks:
        out["blocks"] = [[b.level, len(parse_ranges(b.positions)), b.positions] for b in tensor.blocks]
        out["axis"] = tensor.blocks[0].axis
    return out


def _inputs(found: Inspection) -> str:
    rows = []
    for several in alike(found.inputs, input_key):
        i = several[0]
        role = f"{i.role}, request-level [{i.request}]" if i.request else i.role
        rows.append([many([x.name for x in several]), i.dtype, shape_text(i.dims), role, gain_text(i.gain)])
    return pages.table(["name", "type", "shape", "role", "if it were request-level"], rows, (0, 1, 2, 3))


def _layers(found: Inspection) -> str:
    """The layers that cost something; all of them on demand.

    Of very many, only the outer ones and those with something that is the same for all candidates.
    """
    shown = [x for x in found.layers if not x.scope or x.macs >= _LEAST_SHARE * max(found.macs_before, 1)]
    if len(shown) > _MOST_ROWS:
        shown = [x for x in shown if x.once or x.saved or "/" not in x.scope]
    every = f"<details><summary>all {len(found.layers)} layers</summary>{_layer_table(found, found.layers)}</details>"
    return _layer_table(found, shown) + (every if len(shown) < len(found.layers) else "")


def _layer_table(found: Inspection, layers: Iterable[Layer]) -> str:
    rows: list[list[object]] = []
    for layer in layers:
        depth = layer.scope.count("/") + bool(layer.scope)
        name = pages.Indented(layer.scope.rsplit("/", 1)[-1] or "all", depth)
        share = percent(layer.macs / found.macs_before) if found.macs_before else ""
        once = percent(layer.once / layer.macs) if layer.macs else ""
        saved = percent(layer.saved / found.macs_before) if found.macs_before else ""
        rows.append(
            [name, layer.nodes, human(layer.parameters), human(layer.bytes, "B"), human(layer.macs), share, once, saved]
        )
    heads = ["layer", "nodes", "parameters", "bytes written", "MACs", "of all", "same for all", "saved, of all"]
    return pages.table(heads, rows)


def _opportunities(found: Inspection) -> list[str]:
    rows = []
    for several in alike(found.opportunities, opportunity_key)[:_MOST_ROWS]:
        o = several[0]
        where = o.node if len(several) == 1 else f"{o.node} and {len(several) - 1} more"
        saved = human(o.macs) if o.macs >= 0 else f"-{human(-o.macs)}"
        rows.append([o.rule, f"{o.op} {where}", saved, percent(o.share), f"{three(o.seconds * 1e6)} us"])
    if not rows:
        return []
    heads = ["rule", "node", "MACs saved", "of all", "predicted time saved"]
    return ["<h2>Best opportunities</h2>", pages.table(heads, rows, (0, 1))]


def _refusals(found: Inspection) -> list[str]:
    rows = [[r.rule, r.reason, len(r.nodes), human(r.macs), human(r.lost), r.lift] for r in found.refusals]
    if not rows:
        return []
    return [
        "<h2>Left alone</h2>",
        pages.table(["rule", "reason", "nodes", "MACs", "of these once", "what would lift it"], rows, (0, 1, 5)),
    ]


def _lookups(found: Inspection) -> list[str]:
    out = []
    rows: list[list[object]] = []
    for several in alike(found.tables, table_key):
        t = several[0]
        sizes = [human(t.rows), t.width, human(t.bytes, "B"), human(t.lookups), human(t.needed)]
        rows.append([many([x.name for x in several]), *sizes, t.level])
    if rows:
        heads = ["table", "rows", "width", "size", "lookups", "needed", "ids"]
        out += ["<h2>Embedding tables</h2>", pages.table(heads, rows)]
    rows = [[s.input, s.length or "any", s.level, ", ".join(s.tables), ", ".join(s.readers)] for s in found.sequences]
    if rows:
        heads = ["input", "steps", "level", "looked up in", "taken in by"]
        out += ["<h2>Sequences</h2>", pages.table(heads, rows, (0, 2, 3, 4))]
    return out
