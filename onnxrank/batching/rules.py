"""What becomes of every operator when the requests of a call lie one behind the other.

Each rule is an identity of its own: what the new nodes give is, request by request, what the node gives for that
request alone. So whatever is made of them is right as a whole. Where no rule knows an operator, a node that depends
on requests alone runs request by request, and one that depends on candidates cannot be followed.
"""

from __future__ import annotations

from typing import Any

from onnx import GraphProto, NodeProto, helper

from onnxrank.batching import movement, products
from onnxrank.batching.site import Rule, Site
from onnxrank.batching.tensors import Count, Impossible, Rows, Size, Tensor
from onnxrank.extents import Unproved
from onnxrank.graphs import attribute, captured, subgraphs
from onnxrank.operators import Trait, find, operator, traits


def translate(site: Site) -> list[Tensor]:
    """Writes what becomes of a node of which an operand differs between requests.

    Raises:
        Impossible: Its requests cannot be kept apart.
    """
    rule = _rule(site.node)
    try:
        if rule is None:
            raise Impossible("it is not known to treat rows independently")
        return rule(site)
    except Impossible:
        if any(t.each for t in site.given):
            raise
        return _one_by_one(site)


def _rule(node: NodeProto) -> Rule | None:
    known = _RULES.get(operator(node))
    entry = find(node)
    if known is not None or entry is None:
        return known
    if traits(node) & Trait.RANDOM:
        return None
    if traits(node) & Trait.ELEMENTWISE:
        return _elementwise
    if entry.axes is not None and traits(node) & (Trait.REDUCTION | Trait.NORMALISATION):
        return _along
    return None


def _one_by_one(site: Site) -> list[Tensor]:
    """A node on requests, one after the other."""
    node, writer = site.node, site.writer
    if any(captured(g) for g in subgraphs(node)) or writer.emit.opset < 9:
        raise Impossible("it is not known to treat rows independently")
    many = {t.name: writer.leading(t).name for t in site.given if t.rows is not None}
    if any(t is not None and t.name not in site.types for t in site.operands if t is not None and t.rows is not None):
        raise Impossible("its operands' types are not known")
    if any(o and o not in site.types for o in node.output):
        raise Impossible("its results' types are not known")
    body = GraphProto(name=f"{node.output[0]}/request")
    names = {}
    for t in site.given:
        if t.rows is not None and t.name not in names:
            names[t.name] = f"{node.output[0]}/one/{t.name}"
            body.input.append(helper.make_tensor_value_info(names[t.name], site.types[t.name], None))
    inner = NodeProto()
    inner.CopyFrom(node)
    inner.input[:] = ["" if t is None else names.get(t.name, t.name) for t in site.operands]
    inner.output[:] = [f"{o}/one" if o else "" for o in node.output]
    body.node.append(inner)
    made = [o for o in inner.output if o]
    for o, own in zip(made, (o for o in node.output if o), strict=True):
        body.output.append(helper.make_tensor_value_info(o, site.types[own], None))
    scan = helper.make_node(
        "Scan", [many[n] for n in names], [o for o in node.output if o], name=node.name, body=body,
        num_scan_inputs=len(names),
    )  # fmt: skip
    writer.emit.copy(scan, list(scan.input), list(scan.output))
    return [Tensor(o, s, Rows(False, 0, added=True)) for o, s in zip(node.output, site.sizes, strict=True)]


# --- entries in their places -----------------------------------------------------------------------------------------


def _elementwise(site: Site) -> list[Tensor]:
    names, rows = site.writer.aligned(site.given, site.sizes[0])
    found = iter(names)
    return site.same(["" if t is None else next(found) for t in site.operands], rows)


def _along(site: Site) -> list[Tensor]:
    """Reductions and normalisations of the first operand along axes."""
    x = site.only()
    entry = find(site.node)
    assert entry is not None and entry.axes is not None and x.rows is not None
    try:
        axes = sorted({a % max(x.rank, 1) for a in entry.axes(site.use)})
    except Unproved as e:
        raise Impossible(str(e)) from e
    if not x.rows.added and x.rows.axis in axes:
        if x.rows.each:
            raise Impossible("it takes in candidates together")
        x = site.writer.leading(x)
    assert x.rows is not None
    inputs = site.with_first(x.name)
    attributes: dict[str, Any] = {}
    if x.rows.added:
        inputs, attributes = _moved_axes(site, inputs, [x.axis(a) for a in axes])
    gone = 0 if len(site.sizes[0]) == x.rank else sum(a < x.rows.axis for a in axes)
    return site.same(
        inputs, Rows(x.rows.each, x.rows.axis - gone, x.rows.outer, x.rows.inner, x.rows.added), attributes
    )


def _moved_axes(site: Site, inputs: list[str], axes: list[int]) -> tuple[list[str], dict[str, Any]]:
    """Operands and attributes of a node that works along other axes."""
    node, emit = site.node, site.emit
    if operator(node) == "CumSum":
        return [inputs[0], site.writer.constant(axes[0])], {}
    if not node.op_type.startswith("Reduce"):
        name = "axes" if operator(node) == "MeanVarianceNormalization" else "axis"
        return inputs, {name: axes if name == "axes" else axes[0]}
    since = 13 if node.op_type == "ReduceSum" else 18
    if emit.opset >= since:
        return [inputs[0], site.writer.constant(axes)], {}
    return inputs[:1], {"axes": axes}


def _images(site: Site) -> list[Tensor]:
    """What has rows along the first axis and takes in everything behind it."""
    x = site.writer.merged(site.only())
    assert x.rows is not None
    return site.same(site.with_first(x.name), Rows(x.rows.each, 0, x.rows.outer, x.rows.inner))


def _recurrent(site: Site) -> list[Tensor]:
    """GRU, LSTM and RNN: a row per sequence."""
    if attribute(site.node, "layout", 0):
        raise Impossible("sequences lie along the first axis")
    batch = {0: -2, 4: -1, 5: -2, 6: -2}
    named = {k: t for k, t in enumerate(site.operands) if t is not None}
    moving = [t for k, t in named.items() if k in batch]
    if any(t.rows is not None for k, t in named.items() if k not in batch):
        raise Impossible("weights differ between requests")
    each = any(t.each for t in moving)
    inputs = [t.name if t is not None else "" for t in site.operands]
    for k, t in named.items():
        if k in batch:
            inputs[k] = _sequences(site, t, batch[k], each)
    out = site.writer.copy(site.node, inputs)
    return [Tensor(o, s, Rows(each, len(s) - 2)) if o else Tensor("", ()) for o, s in zip(out, site.sizes, strict=True)]


def _sequences(site: Site, t: Tensor, place: int, each: bool) -> str:
    """An operand of a recurrent layer with a row per candidate, or per request, at an axis."""
    if t.size(place) != 1 and not t.each:
        raise Impossible("several sequences per request")
    if t.rows is None:
        shape: list[Size | Count] = list(t.sizes)
        shape[place] = Count(each)
        return site.emit.add("Expand", [t.name, site.writer.vector(shape)])
    if t.each:
        if t.place != place or not t.rows.plain:
            raise Impossible("sequences lie along several axes")
        return t.name
    name = site.writer.at(t, place, t.rank)
    if not each:
        return name
    return site.emit.add("Gather", [name, site.writer.requests.index()], {"axis": t.rank + place})


_RULES: dict[str, Rule] = {
    **movement.RULES,
    **products.RULES,
    "Identity": _elementwise,
    **dict.fromkeys(("Conv", "BatchNormalization", "InstanceNormalization", "MaxPool", "AveragePool"), _images),
    **dict.fromkeys(("GRU", "LSTM", "RNN"), _recurrent),
}
