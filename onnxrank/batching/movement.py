"""What becomes of operators that move entries, and compute nothing, when requests lie one behind the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from onnx import TensorProto

from onnxrank import extents as ex
from onnxrank.batching.site import Rule, Site
from onnxrank.batching.tensors import Count, Impossible, Rows, Size, Tensor
from onnxrank.graphs import attribute


def reshaped(site: Site, x: Tensor, sizes: tuple[Size, ...]) -> Tensor:
    """A tensor in another shape; entries stay in their order."""
    rows, writer = x.rows, site.writer
    assert rows is not None
    before = 1 if rows.added else ex.product([*x.sizes[: rows.axis], rows.outer])
    target = _candidates(before, sizes) if rows.each else _requests(before, sizes)
    if not target.each and target.added and not (rows.added or before == 1):
        raise Impossible("requests are mixed with other entries")
    out = Tensor("", sizes, target)
    return Tensor(writer.reshape(x.name, out.shape()), sizes, target)


def _candidates(before: Size, sizes: Sequence[Size]) -> Rows:
    """Where candidates lie behind so many entries, in another shape."""
    passed: Size = 1
    for k, n in enumerate(sizes):
        if "N" not in {s[:1] for s in ex.symbols_of(n)}:
            passed = passed * n
            continue
        outer, entries = ex.divide(before, passed), ex.divide(n, ex.symbol("N"))
        inner = None if outer is None or entries is None else ex.divide(entries, outer)
        if outer is None or inner is None:
            raise Impossible("candidates are mixed with other entries")
        return Rows(True, k, outer, inner)
    return _together(before, sizes)


def _requests(before: Size, sizes: Sequence[Size]) -> Rows:
    """Where requests lie behind so many entries, in another shape."""
    passed: Size = 1
    for k, n in enumerate(sizes):
        if passed == before and n == 1:
            return Rows(False, k)
        passed = passed * n
    return _together(before, sizes)


def _together(before: Size, sizes: Sequence[Size]) -> Rows:
    """The same in a shape that has no axis for them alone."""
    if before == 1:
        return Rows(False, 0, added=True)
    passed: Size = 1
    for k, n in enumerate(sizes):
        outer = ex.divide(before, passed)
        inner = None if outer is None else ex.divide(n, outer)
        if outer is not None and inner is not None and not (isinstance(inner, int) and inner < 1):
            return Rows(False, k, outer, inner)
        passed = passed * n
    raise Impossible("requests are mixed with other entries")


def _reshape(site: Site) -> list[Tensor]:
    x = site.operand(0)
    if x.rows is None:
        raise Impossible("its shape differs between requests")
    if not x.rows.each and (x.rows.added or not x.rows.plain) and not _leads(x):
        x = site.writer.leading(x)
    try:
        return [reshaped(site, x, site.sizes[0])]
    except Impossible:
        if x.rows is None or x.rows.each:
            raise
        return [reshaped(site, site.writer.leading(x), site.sizes[0])]


def _leads(x: Tensor) -> bool:
    """Whether nothing lies before a request's entries."""
    assert x.rows is not None
    return x.rows.added or all(n == 1 for n in (*x.sizes[: x.rows.axis], x.rows.outer))


def _transpose(site: Site) -> list[Tensor]:
    x = site.only()
    assert x.rows is not None
    order = [int(k) for k in attribute(site.node, "perm", range(x.rank)[::-1])]
    if x.rows.added:
        return site.same([x.name], Rows(x.rows.each, 0, added=True), {"perm": [0, *(k + 1 for k in order)]})
    return site.same([x.name], Rows(x.rows.each, order.index(x.rows.axis), x.rows.outer, x.rows.inner))


def _concat(site: Site) -> list[Tensor]:
    axis = int(attribute(site.node, "axis")) % len(site.sizes[0])
    tensors = site.given
    many = next((t for t in tensors if t.each), None)
    if all(t.rows is not None and not t.rows.added and t.rows.axis == axis for t in tensors):
        found = [t.rows for t in tensors if t.rows is not None]
        if len({(r.each, r.inner) for r in found}) == 1 and (many is not None or not all(r.plain for r in found)):
            outer = sum((r.outer for r in found[1:]), found[0].outer)
            return site.same([t.name for t in tensors], Rows(found[0].each, axis, outer, found[0].inner))
    if many is not None:
        assert many.rows is not None
        if many.rows.axis == axis:
            raise Impossible("candidates lie beside something else")
        if any((t.rows if t.each else None) != many.rows for t in tensors):
            raise Impossible("not all operands have a row for every candidate")
        return site.same([t.name for t in tensors], many.rows)
    return _concat_requests(site, axis)


def _concat_requests(site: Site, axis: int) -> list[Tensor]:
    """A Concat of what requests give, with what is the same for all of them repeated."""
    rank, writer, tensors = len(site.sizes[0]), site.writer, site.given
    own = [t for t in tensors if t.rows is not None]
    fits = [t.rows.axis for t in own if t.rows and not t.rows.added and t.rows.plain and t.rows.axis != axis]
    if fits and all(t.size(fits[0] - rank) == 1 for t in tensors):
        place, rows, extra = fits[0] - rank, Rows(False, fits[0]), 0
    else:
        place, rows, extra = -(rank + 1), Rows(False, 0, added=True), 1
    names = []
    for t in tensors:
        if t.rows is not None:
            names.append(writer.at(t, place, rank))
            continue
        shape: list[Size | Count] = [1, *t.sizes] if extra else list(t.sizes)
        shape[rows.axis] = Count(False)
        names.append(writer.emit.add("Expand", [t.name, writer.vector(shape)]))
    return site.same(names, rows, {"axis": axis + extra} if extra else None)


def _off_rows(site: Site, x: Tensor, axes: Sequence[int]) -> Tensor:
    """An operand whose rows do not lie along some axes."""
    assert x.rows is not None
    if x.rows.added or x.rows.axis not in axes:
        return x
    if x.rows.each:
        raise Impossible("it divides candidates")
    return site.writer.leading(x)


def _slice(site: Site) -> list[Tensor]:
    x = site.only()
    if site.emit.opset < 10:
        starts = site.constants(9, "starts")
        axes = site.use.attribute("axes", list(range(len(starts))))
    else:
        ends = site.use.shape(1)[0]
        assert isinstance(ends, int)
        axes = site.constants(3, "axes") if site.optional(3) is not None else list(range(ends))
    axes = [int(a) % x.rank for a in axes]
    x = _off_rows(site, x, axes)
    assert x.rows is not None
    inputs = site.with_first(x.name)
    at = [x.axis(a) for a in axes]
    if site.emit.opset < 10:
        return site.same(inputs, x.rows, {"axes": at})
    if x.rows.added:
        inputs[3:4] = [site.writer.constant(at)]
    return site.same(inputs, x.rows)


def _pad(site: Site) -> list[Tensor]:
    x = site.only()
    if site.optional(3) is not None:
        raise Impossible("it names its axes")
    pads = site.constants(1, "pads")
    x = _off_rows(site, x, [k % x.rank for k, n in enumerate(pads) if n])
    assert x.rows is not None
    if x.rows.added:  # in front and behind
        pads = [n for half in (pads[: x.rank], pads[x.rank :]) for n in (*half[: x.rows.axis], 0, *half[x.rows.axis :])]
    inputs = site.with_first(x.name)
    if site.emit.opset < 11:
        return site.same(inputs, x.rows, {"pads": pads})
    return site.same([inputs[0], site.writer.constant(pads), *inputs[2:]], x.rows)


def _split(site: Site) -> list[Tensor]:
    x = site.only()
    axis = int(attribute(site.node, "axis", 0)) % x.rank
    assert x.rows is not None
    parts = len(site.node.output)
    if x.rows.axis == axis and not x.rows.added and isinstance(x.rows.outer, int) and site.optional(1) is None:
        if x.rows.outer % parts == 0 and attribute(site.node, "split") is None:
            return site.same([x.name], Rows(x.rows.each, axis, x.rows.outer // parts, x.rows.inner))
    x = _off_rows(site, x, [axis])
    assert x.rows is not None
    return site.same(site.with_first(x.name), x.rows, {"axis": x.axis(axis)} if x.rows.added else None)


def _squeeze(site: Site) -> list[Tensor]:
    """Squeeze and Unsqueeze, and whatever else leaves entries in their order."""
    x = site.operand(0)
    assert x.rows is not None
    old, new = x.sizes, site.sizes[0]
    if not x.rows.added and x.rows.plain and (site.emit.opset >= 13 or "axes" in {a.name for a in site.node.attribute}):
        axes = [a % max(len(old), len(new)) for a in site.constants(1, "axes")]
        if len(new) > len(old):
            kept = [k for k in range(len(new)) if k not in axes]
            axis = kept[x.rows.axis]
        elif x.rows.axis in axes:
            return [reshaped(site, x, new)] if _leads(x) else [reshaped(site, site.writer.leading(x), new)]
        else:
            axis = x.rows.axis - sum(a < x.rows.axis for a in axes)
        return site.same(site.with_first(x.name), Rows(x.rows.each, axis))
    return _reshape(site)


def _gather(site: Site) -> list[Tensor]:
    table, ids = site.operand(0), site.operand(1)
    axis = int(attribute(site.node, "axis", 0)) % max(table.rank, 1)
    if table.rows is None:
        rows = ids.rows
        assert rows is not None
        if rows.added and axis:
            raise Impossible("rows between others")
        return site.same([table.name, ids.name], Rows(rows.each, axis + rows.axis, rows.outer, rows.inner, rows.added))
    if ids.each and not axis and not table.each:
        return [_of_its_request(site, table, ids)]
    if ids.rows is not None:
        raise Impossible("positions and what they are taken of differ between requests")
    x = _off_rows(site, table, [axis])
    assert x.rows is not None
    shift = ids.rank - 1 if not x.rows.added and axis < x.rows.axis else 0
    rows = Rows(x.rows.each, x.rows.axis + shift, x.rows.outer, x.rows.inner, x.rows.added)
    return site.same([x.name, ids.name], rows, {"axis": x.axis(axis)} if x.rows.added else None)


def _of_its_request(site: Site, table: Tensor, ids: Tensor) -> Tensor:
    """What candidates pick, each of what its own request has."""
    rows, writer, add = ids.rows, site.writer, site.emit.add
    assert rows is not None
    shape = ids.shape()
    turn = writer.reshape(
        writer.requests.index(rows.outer, rows.inner), [n if isinstance(n, Count) else 1 for n in shape]
    )
    turns = add("Expand", [turn, writer.vector(shape)])
    places = add("Cast", [ids.name], {"to": int(TensorProto.INT64)})
    both = [writer.reshape(name, [*shape, 1]) for name in (turns, places)]
    at = add("Concat", both, {"axis": len(shape)})
    made = add("GatherND", [writer.leading(table).name, at])
    return Tensor(made, site.sizes[0], Rows(True, rows.axis, rows.outer, rows.inner))


def _top_k(site: Site) -> list[Tensor]:
    x = site.only()
    axis = int(attribute(site.node, "axis", -1)) % x.rank
    x = _off_rows(site, x, [axis])
    assert x.rows is not None
    return site.same(site.with_first(x.name), x.rows, {"axis": x.axis(axis)} if x.rows.added else None)


def _gather_elements(site: Site) -> list[Tensor]:
    x, ids = site.operand(0), site.operand(1)
    axis = int(attribute(site.node, "axis", 0)) % x.rank
    if not (x.each and x.rows == ids.rows and x.rows is not None and x.rows.axis != axis):
        raise Impossible("positions and what they are taken of lie in several ways")
    return site.same([x.name, ids.name], x.rows)


def _tile(site: Site) -> list[Tensor]:
    x = site.only()
    assert x.rows is not None
    repeats = site.constants(1, "repeats")
    if x.rows.added:
        repeats.insert(x.rows.axis, 1)
        return site.same([x.name, site.writer.constant(repeats)], x.rows)
    return site.same(site.with_first(x.name), replace(x.rows, outer=x.rows.outer * repeats[x.rows.axis]))


def _expand(site: Site) -> list[Tensor]:
    x, sizes, writer = site.operand(0), site.sizes[0], site.writer
    rank = len(sizes)
    along = [k for k, n in enumerate(sizes) if any(s.startswith("N") for s in ex.symbols_of(n))]
    if x.each:
        assert x.rows is not None
        if along != [rank + x.place] or sizes[x.place] != x.sizes[x.place]:
            raise Impossible("candidates are repeated")
        return _expanded(site, x.name, Rows(True, rank + x.place, x.rows.outer, x.rows.inner))
    if along:
        return _expand_to_candidates(site, x, along)
    if x.rows is None:
        raise Impossible("its shape differs between requests")
    if not x.rows.plain:
        return _expanded(site, writer.at(x, -(rank + 1), rank), Rows(False, 0, added=True))
    names, rows = writer.aligned([x, Tensor("", sizes)], sizes)
    return _expanded(site, names[0], rows)


def _expand_to_candidates(site: Site, x: Tensor, along: Sequence[int]) -> list[Tensor]:
    """What has one row, or one per request, repeated for every candidate."""
    sizes, writer = site.sizes[0], site.writer
    (k, *more), rank = along, len(sizes)
    inner = ex.divide(sizes[k], ex.symbol("N"))
    if more or not isinstance(inner, int) or x.size(k - rank) != 1:
        raise Impossible("rows along several axes")
    rows = Rows(True, k, 1, inner)
    if x.rows is None:
        shape: list[Size | Count] = list(sizes)
        shape[k] = Count(True, inner)
        return [Tensor(site.emit.add("Expand", [x.name, writer.vector(shape)]), sizes, rows)]
    name = writer.spread(x, Tensor("", sizes, rows), rank)
    own = [*(1,) * (rank - x.rank), *x.sizes]
    if all(a == b for a, b in zip(own[:k] + own[k + 1 :], sizes[:k] + sizes[k + 1 :], strict=True)):
        return [Tensor(name, sizes, rows)]
    return _expanded(site, name, rows)


def _expanded(site: Site, name: str, rows: Rows) -> list[Tensor]:
    """An Expand that leaves rows as they are."""
    sizes = site.sizes[0]
    target: list[Size | Count] = [1, *sizes] if rows.added else list(sizes)
    target[rows.axis] = 1
    return [Tensor(site.emit.add("Expand", [name, site.writer.vector(target)]), sizes, rows)]


RULES: dict[str, Rule] = {
    **dict.fromkeys(("Reshape", "Flatten"), _reshape),
    **dict.fromkeys(("Squeeze", "Unsqueeze"), _squeeze),
    "Transpose": _transpose,
    "Concat": _concat,
    "Slice": _slice,
    "Pad": _pad,
    "Split": _split,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "TopK": _top_k,
    "Tile": _tile,
    "Expand": _expand,
}
"""By operator."""
