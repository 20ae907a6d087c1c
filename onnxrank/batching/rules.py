"""What becomes of every operator when the requests of a call lie one behind the other.

Each rule is an identity of its own: what the new nodes give is, request by request, what the node gives for that
request alone. So whatever is made of them is right as a whole. Where no rule knows an operator, a node that depends
on requests alone runs request by request, and one that depends on candidates cannot be followed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from onnx import GraphProto, NodeProto, TensorProto, helper

from onnxrank import extents as ex
from onnxrank.batching.tensors import Count, Impossible, Rows, Size, Tensor
from onnxrank.batching.writer import Writer
from onnxrank.extents import Unproved
from onnxrank.graphs import attribute, captured, subgraphs
from onnxrank.operators import Trait, Use, find, operator, traits


class Site:
    """One node with its operands, and what it gives for one request.

    Args:
        writer: The new graph.
        node: The node.
        operands: Its operands; None where it has none.
        sizes: Shapes of its results for one request.
        use: The node as the registry takes it.
        types: Element types of tensors.
    """

    def __init__(
        self,
        writer: Writer,
        node: NodeProto,
        operands: Sequence[Tensor | None],
        sizes: Sequence[tuple[Size, ...]],
        use: Use,
        types: Mapping[str, int],
    ) -> None:
        self.writer, self.node, self.operands, self.sizes, self.use, self.types = (
            writer, node, operands, sizes, use, types,
        )  # fmt: skip
        self.emit = writer.emit

    @property
    def given(self) -> list[Tensor]:
        """The operands that there are."""
        return [t for t in self.operands if t is not None]

    def operand(self, k: int) -> Tensor:
        """The k-th operand."""
        found = self.operands[k] if k < len(self.operands) else None
        if found is None:
            raise Impossible(f"operand {k} is not there")
        return found

    def optional(self, k: int) -> Tensor | None:
        """The k-th operand, if there is one."""
        return self.operands[k] if k < len(self.operands) else None

    def only(self) -> Tensor:
        """The first operand, the only one that differs between requests."""
        if any(t.rows is not None for t in self.given[1:]) or self.operand(0).rows is None:
            raise Impossible("further operands differ between requests")
        return self.operand(0)

    def constants(self, k: int, name: str) -> list[int]:
        """Whole numbers of an attribute or operand."""
        try:
            found = self.use.integers(k, name)
        except Unproved as e:
            raise Impossible(str(e)) from e
        if found is None:
            raise Impossible(f"{name} is not given")
        return found

    def same(self, inputs: Sequence[str], rows: Rows, attributes: Mapping[str, Any] | None = None) -> list[Tensor]:
        """The node itself on other operands, all results with the same place of the rows."""
        out = self.writer.copy(self.node, inputs, attributes)
        return [Tensor(o, s, rows) for o, s in zip(out, self.sizes, strict=True)]

    def with_first(self, name: str) -> list[str]:
        """Names of the operands with another first one."""
        return [name, *(t.name if t is not None else "" for t in self.operands[1:])]


Rule = Callable[[Site], "list[Tensor]"]


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
        if k not in batch:
            continue
        if t.size(batch[k]) != 1 and not t.each:
            raise Impossible("several sequences per request")
        if t.rows is None:
            shape: list[Size | Count] = list(t.sizes)
            shape[batch[k]] = Count(each)
            inputs[k] = site.emit.add("Expand", [t.name, site.writer.vector(shape)])
        elif t.each:
            if t.place != batch[k] or not t.rows.plain:
                raise Impossible("sequences lie along several axes")
        else:
            inputs[k] = site.writer.at(t, batch[k], t.rank)
            if each:
                axis = t.rank + batch[k]
                inputs[k] = site.emit.add("Gather", [inputs[k], site.writer.requests.index()], {"axis": axis})
    out = site.writer.copy(site.node, inputs)
    return [Tensor(o, s, Rows(each, len(s) - 2)) if o else Tensor("", ()) for o, s in zip(out, site.sizes, strict=True)]


# --- movement --------------------------------------------------------------------------------------------------------


def reshaped(site: Site, x: Tensor, sizes: tuple[Size, ...]) -> Tensor:
    """A tensor in another shape; entries stay in their order."""
    rows, writer = x.rows, site.writer
    assert rows is not None
    before = 1 if rows.added else ex.product([*x.sizes[: rows.axis], rows.outer])
    behind: Size = 1
    target: Rows | None = None
    for k, n in enumerate(sizes):
        if rows.each and "N" not in {s[:1] for s in ex.symbols_of(n)}:
            behind = behind * n
            continue
        if rows.each:
            outer = ex.divide(before, behind)
            entries = ex.divide(n, ex.symbol("N"))
            inner = None if outer is None or entries is None else ex.divide(entries, outer)
            if outer is None or inner is None:
                raise Impossible("candidates are mixed with other entries")
            target = Rows(True, k, outer, inner)
            break
        if behind == before and n == 1:
            target = Rows(False, k)
            break
        behind = behind * n
    if target is None:
        target = _placed(before, sizes)
    if target.each is False and target.added and not (rows.added or before == 1):
        raise Impossible("requests are mixed with other entries")
    out = Tensor("", sizes, target)
    return Tensor(writer.reshape(x.name, out.shape()), sizes, target)


def _placed(before: Size, sizes: Sequence[Size]) -> Rows:
    """Where requests lie behind so many entries, in a shape that has no axis for them alone."""
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
    rank = len(site.sizes[0])
    axis = int(attribute(site.node, "axis")) % rank
    writer, tensors = site.writer, site.given
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
    if ids.rows is not None:
        raise Impossible("positions and what they are taken of differ between requests")
    x = _off_rows(site, table, [axis])
    assert x.rows is not None
    shift = ids.rank - 1 if not x.rows.added and axis < x.rows.axis else 0
    rows = Rows(x.rows.each, x.rows.axis + shift, x.rows.outer, x.rows.inner, x.rows.added)
    return site.same([x.name, ids.name], rows, {"axis": x.axis(axis)} if x.rows.added else None)


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


def _expand(site: Site) -> list[Tensor]:
    x, sizes, writer = site.operand(0), site.sizes[0], site.writer
    rank = len(sizes)
    along = [k for k, n in enumerate(sizes) if any(s.startswith("N") for s in ex.symbols_of(n))]
    if x.each:
        assert x.rows is not None
        place = x.place
        if along != [rank + place] or sizes[place] != x.sizes[place]:
            raise Impossible("candidates are repeated")
        rows = Rows(True, rank + place, x.rows.outer, x.rows.inner)
        name = x.name
    elif along:
        (k, *more) = along
        inner = ex.divide(sizes[k], ex.symbol("N"))
        if more or not isinstance(inner, int) or x.size(k - rank) != 1:
            raise Impossible("rows along several axes")
        rows = Rows(True, k, 1, inner)
        if x.rows is None:
            shape: list[Size | Count] = list(sizes)
            shape[k] = Count(True, inner)
            return [Tensor(site.emit.add("Expand", [x.name, writer.vector(shape)]), sizes, rows)]
        like = Tensor("", sizes, rows)
        name = writer.spread(x, like, rank)
        if (1,) * (rank - x.rank) + tuple(1 if a == k else n for a, n in enumerate(x.sizes, rank - x.rank)) == tuple(
            1 if a == k else n for a, n in enumerate(sizes)
        ):
            return [Tensor(name, sizes, rows)]
    else:
        if x.rows is None:
            raise Impossible("its shape differs between requests")
        names, rows = (
            writer.aligned([x, Tensor("", sizes)], sizes) if x.rows.plain else ([], Rows(False, 0, added=True))
        )
        name = names[0] if names else writer.at(x, -(rank + 1), rank)
    target: list[Size | Count] = [1, *sizes] if rows.added else list(sizes)
    target[rows.axis] = 1
    return [Tensor(site.emit.add("Expand", [name, writer.vector(target)]), sizes, rows)]


# --- products --------------------------------------------------------------------------------------------------------


def _product(site: Site) -> list[Tensor]:
    return [matmul(site, site.operand(0), site.operand(1), site.sizes[0], site.node.output[0])]


def matmul(site: Site, a: Tensor, b: Tensor, sizes: tuple[Size, ...], output: str | None = None) -> Tensor:
    """A product of matrices, or of stacks of them.

    Args:
        site: Where.
        a: The left operand.
        b: The right operand.
        sizes: Shape of the result for one request.
        output: A name for it.
    """
    rank = len(sizes)

    def made(left: str, right: str, rows: Rows) -> Tensor:
        name = site.emit.add("MatMul", [left, right], hint=output)
        return Tensor(name, sizes, rows)

    if b.rank < 2 or a.rank < 2:
        if b.rank == 1 and b.rows is None and a.rows is not None and a.rank > 1 and a.place != -1:
            return made(a.name, b.name, Rows(a.each, a.rows.axis, a.rows.outer, a.rows.inner, a.rows.added))
        raise Impossible("a product of vectors")
    if b.rows is None or a.rows is None:
        moving, other, side = (a, b, -2) if b.rows is None else (b, a, -1)
        place, rows = moving.place, moving.rows
        assert rows is not None
        free = place == side or (place <= -3 and other.size(place) == 1)
        if rows.added and other.rank > moving.rank:
            free = False
        name = moving.name
        if not free:
            if rows.each:
                raise Impossible("it adds up over candidates")
            name, place, rows = site.writer.at(moving, -(rank + 1), rank), -(rank + 1), Rows(False, 0, added=True)
        rows = Rows(rows.each, max(rank + place, 0), rows.outer, rows.inner, rows.added)
        return made(name, b.name, rows) if moving is a else made(a.name, name, rows)
    if a.each and b.each:
        if a.place == b.place <= -3 and (a.rows.outer, a.rows.inner) == (b.rows.outer, b.rows.inner):
            return made(a.name, b.name, Rows(True, rank + a.place, a.rows.outer, a.rows.inner))
        raise Impossible("candidates meet other candidates")
    if not a.each and not b.each:
        fits = [t.place for t in (a, b) if -rank <= t.place <= -3 and sizes[t.place] == 1]
        place = fits[0] if fits else -(rank + 1)
        rows = Rows(False, max(rank + place, 0), added=not fits)
        return made(site.writer.at(a, place, rank), site.writer.at(b, place, rank), rows)
    return _packed(site, a, b, sizes)


def _packed(site: Site, a: Tensor, b: Tensor, sizes: tuple[Size, ...]) -> Tensor:
    """A product of candidates with what their request gives: side by side per request, and back."""
    many, once = (a, b) if a.each else (b, a)
    assert many.rows is not None
    place = many.place
    if place == (-1 if many is a else -2):
        raise Impossible("it adds up over candidates")
    if place == -1:
        raise Impossible("candidates are columns")
    stacks = many.rank > 2 or any(n != 1 for n in once.sizes[:-2])
    if many.rows.outer == 1 and not stacks:
        return _packed_matrix(site, many, once, sizes)
    if not many.rows.plain:
        return _packed_apart(site, many, once, sizes, many is a)
    if place <= -3:
        return _packed_stacks(site, many, once, sizes, many is a)
    return _packed_rows(site, many, once, sizes)


def _packed_apart(site: Site, many: Tensor, once: Tensor, sizes: tuple[Size, ...], left: bool) -> Tensor:
    """A product in which an axis holds candidates and other entries: those get axes of their own meanwhile."""
    writer, rows, place = site.writer, many.rows, many.place
    assert rows is not None
    own = [*([rows.outer] if rows.outer != 1 else []), ex.symbol("N"), *([rows.inner] if rows.inner != 1 else [])]
    at, along, k = rows.axis, len(sizes) + place, max(0, once.rank + place)
    before = 0 if rows.outer == 1 else 1
    wide = (*many.sizes[:at], *own, *many.sizes[at + 1 :])
    apart = Tensor("", wide, Rows(True, at + before))
    apart = replace(apart, name=writer.reshape(many.name, apart.shape()))
    lead = (*once.sizes[:k], *(1,) * (len(own) - 1), *once.sizes[k:])
    weights = Tensor(writer.reshape(writer.first(once), [Count(False), *lead]), lead, Rows(False, 0, added=True))
    pair = (apart, weights) if left else (weights, apart)
    product = _packed(site, *pair, (*sizes[:along], *own, *sizes[along + 1 :]))
    out = Tensor("", sizes, Rows(True, along, rows.outer, rows.inner))
    return replace(out, name=writer.reshape(product.name, out.shape()))


def _merging(site: Site, packed: str, weights: str, left: Sequence[Size], columns: Size) -> str:
    """`[requests, most, *left]` times `[requests, left[-1], columns]`: one matrix per request."""
    rows = int(np.prod([n for n in left[:-1] if isinstance(n, int)] or [1]))
    shapes = [site.writer.constant([0, -1, *n]) for n in ((left[-1],), (rows, columns))]
    flat = site.emit.add("Reshape", [packed, shapes[0]])
    return site.emit.add("Reshape", [site.emit.add("MatMul", [flat, weights]), shapes[1]])


def _packed_matrix(
    site: Site, many: Tensor, once: Tensor, sizes: tuple[Size, ...], addend: Tensor | None = None
) -> Tensor:
    """A product of a matrix with a row, or several, per candidate; with a row of the request's added to all of them."""
    writer, rank = site.writer, len(sizes)
    assert many.rows is not None
    inner, depth, columns = many.rows.inner, many.sizes[-1], once.sizes[-1]
    weights = writer.first(once)
    if once.rank > 2:
        weights = writer.reshape(weights, [Count(False), depth, columns])
    lead = many.name if inner == 1 else writer.reshape(many.name, [Count(True), inner, depth])
    packed = writer.packed(lead, [depth] if inner == 1 else [inner, depth])
    if inner == 1:
        product = site.emit.add("MatMul", [packed, weights])
    elif all(isinstance(n, int) for n in (inner, depth, columns)):
        product = _merging(site, packed, weights, [inner, depth], columns)
    else:
        product = site.emit.add("MatMul", [packed, writer.reshape(weights, [Count(False), 1, depth, columns])])
    if addend is not None:
        ones = [1] if inner == 1 else [1, 1]
        row = writer.reshape(writer.first(addend), [Count(False), *ones, columns])
        product = site.emit.add("Add", [product, row])
    taken = writer.unpacked(product, [columns] if inner == 1 else [inner, columns])
    out = Tensor(taken, sizes, Rows(True, rank - 2, 1, inner))
    return out if inner == 1 and rank == 2 else Tensor(writer.reshape(taken, out.shape()), sizes, out.rows)


def _packed_stacks(site: Site, many: Tensor, once: Tensor, sizes: tuple[Size, ...], left: bool) -> Tensor:
    """A product of stacks of matrices, one stack per candidate."""
    writer, rank = site.writer, len(sizes)
    assert many.rows is not None
    place, axis = many.place, many.rows.axis
    if once.size(place) != 1:
        raise Impossible("an operand has other entries for every candidate")
    mine = [n for k, n in enumerate(many.sizes) if k != axis]
    its = [n for k, n in enumerate(once.sizes) if k != once.rank + place]
    lead = writer.transpose(many.name, [axis, *(k for k in range(many.rank) if k != axis)])
    if len(its) > len(mine):
        mine = [*(1,) * (len(its) - len(mine)), *mine]
        lead = writer.reshape(lead, [Count(True), *mine])
    packed = writer.packed(lead, mine)
    rest = [n for k, n in enumerate(sizes) if k != rank + place]
    own = writer.first(once)
    if left and all(n == 1 for n in its[:-2]) and all(isinstance(n, int) for n in (*mine, its[-1])):
        product = _merging(site, packed, writer.reshape(own, [Count(False), *its[-2:]]), mine, its[-1])
        taken = writer.reshape(writer.unpacked(product, [*mine[:-1], its[-1]]), [Count(True), *rest])
    else:
        own = writer.reshape(own, [Count(False), 1, *(1,) * (len(mine) - len(its)), *its])
        product = site.emit.add("MatMul", [packed, own] if left else [own, packed])
        taken = writer.unpacked(product, rest)
    at = rank + place
    return Tensor(writer.transpose(taken, [*range(1, at + 1), 0, *range(at + 1, rank)]), sizes, Rows(True, at))


def _packed_rows(site: Site, many: Tensor, once: Tensor, sizes: tuple[Size, ...]) -> Tensor:
    """A product of matrices with a row per candidate, one of a stack each, with others that the request gives."""
    writer, rank = site.writer, len(sizes)
    assert many.rows is not None
    packed = site.emit.add("Gather", [many.name, writer.requests.pack()], {"axis": many.rows.axis})
    own = writer.first(once)
    if once.rank > 2:
        own = writer.transpose(own, [*range(1, once.rank - 1), 0, once.rank - 1, once.rank])
    product = site.emit.add("MatMul", [packed, own])  # [..., requests, most, columns]
    lead = writer.transpose(product, [rank - 2, rank - 1, *range(rank - 2), rank])
    taken = site.emit.add("GatherND", [lead, writer.requests.unpack()])
    name = writer.transpose(taken, [*range(1, rank - 1), 0, rank - 1])
    return Tensor(name, sizes, Rows(True, rank - 2))


def _gemm(site: Site) -> list[Tensor]:
    node, writer = site.node, site.writer
    a, b, c = site.operand(0), site.operand(1), site.optional(2)
    sizes = site.sizes[0]
    turned = [bool(attribute(node, name, 0)) for name in ("transA", "transB")]
    if a.rows is not None and b.rows is None and not turned[0]:
        x = a if a.each else writer.merged(a)
        addend = c
        fits = x.rows is not None and not x.rows.added and x.rows.axis == 0
        if fits and addend is None:
            return site.same([x.name, b.name], _kept(x))
        if fits and addend is not None and addend.size(-2) == 1:
            assert x.rows is not None
            if addend.rows is None:
                return site.same([x.name, b.name, addend.name], _kept(x))
            if x.each and not addend.each:
                return site.same([x.name, b.name, writer.spread(addend, x, 2)], _kept(x))
            if x.rows.plain and not addend.each:
                return site.same([x.name, b.name, writer.at(addend, -2, 2)], _kept(x))
        if fits and addend is not None and x.each and addend.each and addend.rows == x.rows:
            return site.same([x.name, b.name, addend.name], _kept(x))
    a, b = (_turned(site, t) if turn else t for t, turn in zip((a, b), turned, strict=True))
    plain = attribute(node, "alpha", 1.0) == attribute(node, "beta", 1.0) == 1.0
    if c is not None and a.each and plain and _rides(a, b, c):
        return [_packed_matrix(site, a, b, sizes, c)]
    product = matmul(site, a, b, sizes)
    product = _times(site, product, attribute(node, "alpha", 1.0))
    if c is None:
        return [product]
    c = _times(site, c, attribute(node, "beta", 1.0))
    names, rows = writer.aligned([product, c], sizes)
    return [Tensor(site.emit.add("Add", names), sizes, rows)]


def _rides(a: Tensor, b: Tensor, c: Tensor) -> bool:
    """Whether an addend that the request gives is added where candidates meet weights that it gives."""
    once = [t.rows is not None and not t.each for t in (b, c)]
    whole = c.rank > 0 and c.sizes[-1] == b.sizes[-1] and c.size(-2) == 1
    return all(once) and whole and a.rows is not None and a.rows.axis == 0 and a.rows.outer == 1


def _kept(x: Tensor) -> Rows:
    assert x.rows is not None
    return Rows(x.rows.each, x.rows.axis, x.rows.outer, x.rows.inner, x.rows.added)


def _turned(site: Site, x: Tensor) -> Tensor:
    """A matrix with its axes the other way round."""
    sizes = x.sizes[::-1]
    if x.rows is None:
        return Tensor(site.writer.transpose(x.name, [1, 0]), sizes)
    if x.rows.added:
        return Tensor(site.writer.transpose(x.name, [0, 2, 1]), sizes, x.rows)
    rows = Rows(x.rows.each, 1 - x.rows.axis, x.rows.outer, x.rows.inner)
    return Tensor(site.writer.transpose(x.name, [1, 0]), sizes, rows)


def _times(site: Site, x: Tensor, factor: float) -> Tensor:
    if factor == 1.0:
        return x
    kind = helper.tensor_dtype_to_np_dtype(site.types.get(site.node.output[0], TensorProto.FLOAT))
    name = site.emit.add("Mul", [x.name, site.emit.constant(np.array(factor, kind))])
    return Tensor(name, x.sizes, x.rows)


def _einsum(site: Site) -> list[Tensor]:
    equation = attribute(site.node, "equation").decode().replace(" ", "")
    left, arrow, result = equation.partition("->")
    terms = left.split(",")
    if not arrow or "." in equation:
        raise Impossible("the equation is not written out")
    tensors = site.given
    moving = [(k, t) for k, t in enumerate(tensors) if t.rows is not None]
    if len(moving) == 1 and moving[0][1].rows is not None and not moving[0][1].rows.added:
        k, t = moving[0]
        rows = t.rows
        assert rows is not None
        letter = terms[k][rows.axis]
        elsewhere = any(letter in term for j, term in enumerate(terms) if j != k)
        if letter in result and not elsewhere and terms[k].count(letter) == 1:
            return site.same([x.name for x in tensors], Rows(rows.each, result.index(letter), rows.outer, rows.inner))
    if any(t.each for t in tensors):
        raise Impossible("candidates meet other entries")
    fresh = next(c for c in "abcdefghijklmnopqrstuvwxyz" if c not in equation)
    names = [t.name if t.rows is None else site.writer.leading(t).name for t in tensors]
    terms = [term if t.rows is None else fresh + term for term, t in zip(terms, tensors, strict=True)]
    equation = f"{','.join(terms)}->{fresh}{result}"
    return site.same(names, Rows(False, 0, added=True), {"equation": equation})


_RULES: dict[str, Rule] = {
    **dict.fromkeys(("Reshape", "Flatten"), _reshape),
    **dict.fromkeys(("Squeeze", "Unsqueeze"), _squeeze),
    "Identity": _elementwise,
    "Transpose": _transpose,
    "Concat": _concat,
    "Slice": _slice,
    "Split": _split,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "TopK": _top_k,
    "Expand": _expand,
    "MatMul": _product,
    "Gemm": _gemm,
    "Einsum": _einsum,
    **dict.fromkeys(("Conv", "BatchNormalization", "InstanceNormalization", "MaxPool", "AveragePool"), _images),
    **dict.fromkeys(("GRU", "LSTM", "RNN"), _recurrent),
}
