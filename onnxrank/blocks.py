"""Candidates in blocks: what depends on them runs block by block, so that its rows stay in the cache.

Past some number of candidates the rows of intermediates leave the cache, and every node waits for memory. What depends
on candidates stands in one Scan over blocks of them then, behind what a request needs once. That is right where no node
takes in several candidates together, which is derived here: along which axis of each tensor the candidates lie, node by
node, each by an identity of its own. What no rule knows cannot be scored in blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from onnxrank import cost
from onnxrank import extents as ex
from onnxrank.extents import Expr, Unproved
from onnxrank.forms import Form
from onnxrank.graphs import attribute, claimed, einsum_terms, names_in, reads, rename, subgraphs, versions
from onnxrank.operators import Known, Trait, Use, constant, find, operator, traits
from onnxrank.plans import label
from onnxrank.values import CANDIDATES, is_candidate_symbol

NAME = "onnxrank/blocks"
"""Name of the Scan, and what the names around it begin with."""
ROWS = f"{NAME}/rows"
"""Name of the constant that says how many candidates a block has at most."""
_LEAST_OPSET = 13
"""Version of ONNX from which on axes of Unsqueeze are an input, as they are written here."""
_LAUNCHES, _LAUNCHES_EACH = 20, 4
"""Operators that a Scan costs as many as: with what tells the blocks, and for each of them."""
_SMALL = 64
"""Entries of a constant that may be axes."""

Size = int | Expr
Sizes = tuple[Size, ...]


class Impossible(Exception):
    """Why a model cannot be scored in blocks."""


@dataclass(frozen=True)
class Rows:
    """Where the candidates lie in a tensor.

    Attributes:
        axis: The axis that holds them; its extent is `outer * N *` entries per candidate.
        outer: How often all candidates come along that axis.
    """

    axis: int
    outer: Size = 1


@dataclass
class Split:
    """The nodes of a model, by whether they depend on its candidates.

    Attributes:
        inputs: Inputs with rows of candidates, and their axes.
        inside: Nodes that depend on them.
        outside: All others.
    """

    inputs: dict[str, int]
    inside: list[NodeProto] = field(default_factory=list)
    outside: list[NodeProto] = field(default_factory=list)


def split(form: Form) -> Split:
    """Finds what can be done block by block in a result.

    Raises:
        Impossible: A node takes in candidates together, or is not known not to.
    """
    return _Derivation(form).run()


def blocked(form: Form, rows: int) -> ModelProto:
    """A result with its candidates in blocks.

    There are as few blocks as hold `rows` candidates each at most, and they are of one size. Places that are left over,
    less than one per block, hold the last candidate again, whose ids are as valid as any, and are cut off.

    Args:
        form: How the model is rewritten.
        rows: Candidates per block, at most.

    Raises:
        Impossible: A node takes in candidates together, or is not known not to.
    """
    return _Writer(form, rows).run()


def seconds(form: Form, rows: int, candidates: int) -> float:
    """Predicted time of a result with its candidates in blocks.

    Args:
        form: How the model is rewritten.
        rows: Candidates per block, at most.
        candidates: The number of candidates.

    Raises:
        Impossible: A node takes in candidates together, or is not known not to.
    """
    parts, count = split(form), max(1, -(-candidates // rows))

    def of(nodes: Sequence[NodeProto], n: int) -> float:
        """Of some of the nodes, without that of a call."""
        assert form.model is not None
        part = GraphProto(node=nodes, output=form.model.graph.output)
        return cost.seconds(part, replace(form.shapes(n), alike=cost.Alike())) - cost.CPU.call

    once = of(parts.outside, candidates) + cost.CPU.call + cost.estimate(launches=_LAUNCHES)
    return once + count * (of(parts.inside, -(-candidates // count)) + cost.estimate(launches=_LAUNCHES_EACH))


# --- that no node takes in candidates together -----------------------------------------------------------------------


class _Derivation:
    """Goes over the nodes in order.

    Attributes:
        rows: Where the candidates lie, of tensors that have a row per candidate.
        counts: Tensors of whole numbers that follow from how many candidates there are.
        moving: Tensors that depend on the candidates, or on their number.
        given: Shapes of the inputs.
        once: Inputs that are the same for all candidates, and may repeat them in rows nonetheless.
    """

    def __init__(self, form: Form) -> None:
        if form.model is None:
            raise Impossible("nothing was rewritten")
        self.model, self.facts = form.model, form.derived
        self.opsets = versions(self.model)
        self.stored = {t.name: t for t in self.model.graph.initializer}
        self.given = {
            name: tuple(c * ex.product(map(self.facts.meaning, symbols)) for c, symbols in extents)
            for name, extents in form.rewrite.input_extents().items()
        }
        self.once = {i.name for i in form.study.declared if i.role.level == "request"}
        self.rows: dict[str, Rows] = {}
        self.counts: set[str] = set()
        self.moving: set[str] = set()

    def run(self) -> Split:
        """The nodes inside and outside."""
        if self.opsets[""] < _LEAST_OPSET:
            raise Impossible(f"the model has opset {self.opsets['']}, and blocks need {_LEAST_OPSET}")
        for name in self.given.keys() - self.once:
            axis = _axis(self.sizes(name))
            if axis is not None:
                self.take(name, Rows(axis))
        found = Split({i.name: self.rows[i.name].axis for i in self.model.graph.input if i.name in self.rows})
        for node in self.model.graph.node:
            inside = bool(reads(node) & self.moving)
            (found.inside if inside else found.outside).append(node)
            if inside:
                self.moving |= set(node.output)
                self.follow(node)
        self._check_ends(found)
        return found

    def _check_ends(self, found: Split) -> None:
        if any(self.sizes(name)[axis] != ex.symbol(CANDIDATES) for name, axis in found.inputs.items()):
            raise Impossible("an input has several rows per candidate")
        ends = [o.name for o in self.model.graph.output if o.name in self.moving]
        if not found.inputs or not ends:
            raise Impossible("nothing depends on the candidates")
        for name in ends:
            first, *rest = self.sizes(name)
            each = ex.divide(first, ex.symbol(CANDIDATES))
            if self.rows.get(name) != Rows(0) or any(isinstance(n, Expr) or not n for n in (each, *rest)):
                raise Impossible(f"the output {name!r} does not have its candidates one behind the other")

    # --- what is known ---------------------------------------------------------------------------------------------

    def sizes(self, name: str) -> Sizes:
        """Shape of a tensor."""
        if name in self.stored:
            return tuple(self.stored[name].dims)
        found = self.given.get(name, self.facts.sizes.get(name))
        if found is None:
            raise Impossible(f"the shape of {name!r} is not known")
        return tuple(found)

    def take(self, name: str, rows: Rows) -> None:
        """Takes up where the candidates lie in a tensor."""
        sizes = self.sizes(name)
        each = ex.divide(sizes[rows.axis], rows.outer * ex.symbol(CANDIDATES))
        if _axis(sizes) != rows.axis or each is None or _counts(each) or _counts(rows.outer):
            raise Impossible(f"{name!r} does not have its candidates along one axis")
        self.rows[name] = rows
        self.moving.add(name)

    def follow(self, node: NodeProto) -> None:
        """Takes up what comes of a node."""
        outputs = [o for o in node.output if o]
        if any(self._is_for_all(name) for name in reads(node) - self.moving - self.stored.keys()):
            raise Impossible(f"{label(node)!r} reads request-level rows for all candidates at once")
        if subgraphs(node) or traits(node) & Trait.RANDOM:
            raise self.unknown(node)
        if all(o in self.facts.entries for o in outputs):
            self.counts |= set(outputs)
        elif all(o in self.facts.folded for o in outputs):
            for o in outputs:
                axis = _axis(self.sizes(o))
                if axis is not None:
                    self.take(o, Rows(axis))
        elif traits(node) & Trait.EXTENTS:
            self.counts |= set(outputs)
        else:
            self._data(node, outputs)

    def _is_for_all(self, name: str) -> bool:
        """Whether a tensor from outside has rows of candidates, or tells how many there are."""
        return any(map(_counts, (*self.sizes(name), *self.facts.entries.get(name, ()))))

    def _data(self, node: NodeProto, outputs: Sequence[str]) -> None:
        known = _RULES.get(operator(node))
        if known is None and traits(node) & Trait.ELEMENTWISE:
            known = _elementwise
        entry = find(node)
        if known is None and entry is not None and entry.axes is not None:
            known = _along
        if known is None and traits(node) & Trait.IMAGES:
            known = _images
        if known is None and entry is not None and entry.signature is not None:
            known = _alone
        if known is None:
            raise self.unknown(node)
        numbers = _NUMBERS.get(operator(node), ())
        if any(name in self.counts and k not in numbers for k, name in enumerate(node.input)):
            raise Impossible(f"{label(node)!r} computes with the number of candidates")
        for o in outputs:
            self.take(o, known(_Site(self, node, o)))

    def unknown(self, node: NodeProto) -> Impossible:
        """Of a node that no rule knows."""
        return Impossible(f"{label(node)!r} ({operator(node)}) is not known to take candidates one by one")


class _Site:
    """A node with a row per candidate in some operand, and one of its results."""

    def __init__(self, known: _Derivation, node: NodeProto, output: str) -> None:
        self.node, self.output, self._known = node, output, known
        self.sizes = known.sizes(output)
        self.operands = [(name, known.sizes(name), known.rows.get(name)) for name in node.input if name]

    def fail(self) -> Impossible:
        """It takes in candidates together."""
        return Impossible(f"{label(self.node)!r} ({operator(self.node)}) takes in candidates together")

    def operand(self, k: int) -> tuple[Sizes, Rows | None]:
        """Shape of an operand and where its candidates lie."""
        if k >= len(self.node.input) or not self.node.input[k]:
            return (), None
        return self._known.sizes(self.node.input[k]), self._known.rows.get(self.node.input[k])

    def only(self) -> tuple[Sizes, Rows]:
        """The first operand, which alone may have candidates."""
        sizes, rows = self.operand(0)
        if rows is None or any(r for _, r in map(self.operand, range(1, len(self.node.input)))):
            raise self.fail()
        return sizes, rows

    def agreed(self, found: Iterable[Rows]) -> Rows:
        """What all operands say of the result."""
        said = set(found)
        if len(said) != 1:
            raise self.fail()
        return said.pop()

    def extents(self, axis: int) -> list[Size]:
        """Extents of all results along an axis."""
        return [self._known.sizes(o)[axis] for o in self.node.output if o]

    def beside(self, sizes: Sizes, rows: Rows, place: int | None = None) -> Rows:
        """The result's rows where those of an operand stay at an axis, counted from the end."""
        place = rows.axis - len(sizes) if place is None else place
        axis = len(self.sizes) + place
        if axis < 0 or self.sizes[axis] != sizes[rows.axis]:
            raise self.fail()
        return Rows(axis, rows.outer)

    def value(self, k: int) -> Known | None:
        """A small constant operand."""
        name = self.node.input[k] if k < len(self.node.input) else ""
        t = self._known.stored.get(name)
        if t is not None and int(np.prod(t.dims)) <= _SMALL and t.data_location != TensorProto.EXTERNAL:
            return constant(numpy_helper.to_array(t))
        found = self._known.facts.folded.get(name)
        return None if found is None else constant(found[1])

    @property
    def use(self) -> Use:
        """What the registry asks."""
        every = range(len(self.node.input))
        opset = self._known.opsets.get(self.node.domain, 1)
        return Use(self.node, opset, [self.operand(k)[0] for k in every], [self.value(k) for k in every])


Rule = Callable[[_Site], Rows]


def _axis(sizes: Sizes) -> int | None:
    """The axis in whose extent the number of candidates is; None if there is none."""
    found = [k for k, n in enumerate(sizes) if _counts(n)]
    if len(found) > 1:
        raise Impossible("a tensor has candidates along several axes")
    return found[0] if found else None


def _counts(size: Size) -> bool:
    return any(map(is_candidate_symbol, ex.symbols_of(size)))


def _elementwise(site: _Site) -> Rows:
    return site.agreed(site.beside(s, r) for _, s, r in site.operands if r)


def _along(site: _Site) -> Rows:
    """What takes in entries of the first operand along some axes."""
    sizes, rows = site.only()
    entry = find(site.node)
    assert entry is not None and entry.axes is not None
    try:
        axes = {a % max(len(sizes), 1) for a in entry.axes(site.use)}
    except Unproved as e:
        raise Impossible(str(e)) from e
    if rows.axis in axes:
        raise site.fail()
    gone = 0 if len(site.sizes) == len(sizes) else sum(a < rows.axis for a in axes)
    return Rows(rows.axis - gone, rows.outer)


def _alone(site: _Site) -> Rows:
    """What works on some axes one by one, by its signature."""
    entry = find(site.node)
    assert entry is not None and entry.signature is not None
    try:
        signature = entry.signature(site.use)
    except (Unproved, ArithmeticError, IndexError, TypeError, ValueError) as e:
        raise Impossible(str(e)) from e
    made = signature.outputs[list(site.node.output).index(site.output)]
    found = []
    for k, axes in enumerate(signature.inputs):
        sizes, rows = site.operand(k)
        if rows is not None:
            axis = axes[rows.axis]
            if signature.as_set or axis is None or axis not in made:
                raise site.fail()
            found.append(site.beside(sizes, rows, made.index(axis) - len(made)))
    return site.agreed(found)


def _images(site: _Site) -> Rows:
    """What has rows along the first axis and takes in everything behind it."""
    _, rows = site.only()
    if rows.axis:
        raise site.fail()
    return rows


def _mat_mul(site: _Site) -> Rows:
    (a, left), (b, right) = site.operand(0), site.operand(1)
    if min(len(a), len(b)) < 2:
        raise site.fail()
    found = []
    for sizes, rows, summed in ((a, left, -1), (b, right, -2)):
        if rows is not None:
            place = rows.axis - len(sizes)
            if place == summed:
                raise site.fail()
            found.append(site.beside(sizes, rows, place))
    return site.agreed(found)


def _gemm(site: _Site) -> Rows:
    found = []
    for k, free in enumerate((attribute(site.node, "transA", 0), 1 - attribute(site.node, "transB", 0))):
        sizes, rows = site.operand(k)
        if rows is not None:
            if rows.axis != free:
                raise site.fail()
            found.append(site.beside(sizes, rows, k - 2))
    sizes, rows = site.operand(2)
    return site.agreed([*found, *([site.beside(sizes, rows)] if rows is not None else [])])


def _einsum(site: _Site) -> Rows:
    terms, result = einsum_terms(attribute(site.node, "equation"), [len(s) for _, s, _ in site.operands])
    found = []
    for term, (_, sizes, rows) in zip(terms, site.operands, strict=True):
        if rows is not None:
            letter = term[rows.axis]
            if letter not in result or term.count(letter) > 1:
                raise site.fail()
            found.append(site.beside(sizes, rows, result.index(letter) - len(result)))
    return site.agreed(found)


def _reshape(site: _Site) -> Rows:
    """Entries stay in their order: as many stand in front of all candidates as before."""
    sizes, rows = site.operand(0)
    axis = _axis(site.sizes)
    if rows is None or axis is None:
        raise site.fail()
    outer = ex.divide(ex.product(sizes[: rows.axis]) * rows.outer, ex.product(site.sizes[:axis]))
    if outer is None:
        raise site.fail()
    return Rows(axis, outer)


def _transpose(site: _Site) -> Rows:
    sizes, rows = site.only()
    turned = attribute(site.node, "perm") or range(len(sizes))[::-1]
    return Rows(list(turned).index(rows.axis), rows.outer)


def _concat(site: _Site) -> Rows:
    """Operands side by side, or all candidates of one behind all candidates of another."""
    along = attribute(site.node, "axis") % len(site.sizes)
    found = [(sizes, rows) for _, sizes, rows in site.operands if rows is not None]
    if len(found) < len(site.operands):
        raise site.fail()
    if any(rows.axis != along for _, rows in found):
        return _elementwise(site)
    site.agreed(Rows(along, _together(sizes, rows)) for sizes, rows in found)
    return Rows(along, sum((rows.outer for _, rows in found), 0))


def _split(site: _Site) -> Rows:
    """Parts of every candidate, or all candidates of some parts."""
    sizes, rows = site.only()
    if rows.axis != attribute(site.node, "axis", 0) % len(sizes):
        return rows
    outer = [ex.divide(n, _together(sizes, rows)) for n in site.extents(rows.axis)]
    if None in outer:
        raise site.fail()
    return Rows(rows.axis, ex.divide(site.sizes[rows.axis], _together(sizes, rows)) or 1)


def _together(sizes: Sizes, rows: Rows) -> Size:
    """How many entries along the axis of the candidates hold all of them once."""
    found = ex.divide(sizes[rows.axis], rows.outer)
    assert found is not None
    return found


def _slice(site: _Site) -> Rows:
    """Parts of every candidate."""
    sizes, rows = site.only()
    known = site.value(3)
    axes = range(len(sizes)) if known is None else known.data.reshape(-1).tolist()
    if rows.axis in {int(a) % len(sizes) for a in axes}:
        raise site.fail()
    return rows


def _expand(site: _Site) -> Rows:
    sizes, rows = site.operand(0)
    axis = _axis(site.sizes)
    if axis is None:
        raise site.fail()
    return Rows(axis) if rows is None else site.beside(sizes, rows)


def _gather(site: _Site) -> Rows:
    (data, held), (places, chosen) = site.operand(0), site.operand(1)
    along = attribute(site.node, "axis", 0) % len(data)
    if held is None and chosen is not None:
        return Rows(along + chosen.axis, chosen.outer)
    if held is None or chosen is not None or held.axis == along:
        raise site.fail()
    return Rows(held.axis + (len(places) - 1 if held.axis > along else 0), held.outer)


def _gather_elements(site: _Site) -> Rows:
    (data, held), (places, chosen) = site.operand(0), site.operand(1)
    along = attribute(site.node, "axis", 0) % len(data)
    if held is None or held != chosen or held.axis == along or data[held.axis] != places[held.axis]:
        raise site.fail()
    return held


def _filled(site: _Site) -> Rows:
    axis = _axis(site.sizes)
    if axis is None:
        raise site.fail()
    return Rows(axis)


_RULES: Mapping[str, Rule] = {
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), _reshape),
    "BatchNormalization": _images,
    "Slice": _slice,
    "Split": _split,
    "MatMul": _mat_mul,
    "Gemm": _gemm,
    "Einsum": _einsum,
    "Transpose": _transpose,
    "Concat": _concat,
    "Expand": _expand,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "ConstantOfShape": _filled,
}
_NUMBERS: Mapping[str, Sequence[int]] = {"Reshape": (1,), "Expand": (1,), "Split": (1,), "ConstantOfShape": (0,)}
"""Operands that hold extents."""


# --- writing ---------------------------------------------------------------------------------------------------------


class _Writer:
    """Writes the Scan and what stands around it."""

    def __init__(self, form: Form, rows: int) -> None:
        self.known, self.rows = _Derivation(form), rows
        self.parts = self.known.run()
        self.out = ModelProto()
        self.out.CopyFrom(self.known.model)
        self.taken = names_in(self.out.graph)
        self.nodes: list[NodeProto] = []

    def run(self) -> ModelProto:
        """The model."""
        graph, parts = self.out.graph, self.parts
        made = {o for n in parts.inside for o in n.output if o}
        ends = [o for o in graph.output if o.name in made]
        body = self._body(ends)
        index, total = self._index()
        given = [self._add("Gather", [name, index], axis=axis) for name, axis in parts.inputs.items()]
        results = [claimed(f"{NAME}/{o.name}", self.taken) for o in ends]
        self.nodes.append(
            helper.make_node(
                "Scan",
                given,
                results,
                name=NAME,
                body=body,
                num_scan_inputs=len(given),
                scan_input_axes=list(parts.inputs.values()),
            )
        )
        for o, found in zip(ends, results, strict=True):
            self._flat(found, o.name, total)
        described = [v for v in graph.value_info if v.name not in made]
        del graph.node[:], graph.value_info[:]
        graph.node.extend([*parts.outside, *self.nodes])
        graph.value_info.extend(described)
        return self.out

    def _body(self, ends: Sequence[ValueInfoProto]) -> GraphProto:
        """What is done to a block."""
        graph, parts = self.out.graph, self.parts
        own = [*parts.inputs, *(o.name for o in ends)]
        names = {name: claimed(f"{NAME}/block/{name}", self.taken) for name in own}
        body = GraphProto(name=f"{NAME}/block")
        for node in parts.inside:
            body.node.append(node)
            rename(body.node[-1], names)
        infos = {i.name: i for i in (*graph.input, *ends)}
        for name in own:
            shape = [n if isinstance(n, int) else None for n in self.known.sizes(name)]
            described = helper.make_tensor_value_info(names[name], infos[name].type.tensor_type.elem_type, shape)
            (body.input if name in parts.inputs else body.output).append(described)
        return body

    def _index(self) -> tuple[str, str]:
        """Names which candidates are in which block, and how many there are."""
        (name, axis), *_ = self.parts.inputs.items()
        zero, one, most = self._constant(0), self._constant(1), self._constant(self.rows, ROWS)
        total = self._add("Gather", [self._add("Shape", [name]), self._constant(axis)])
        blocks = self._add("Max", [self._rounded_up(total, most, one), one])
        each = self._rounded_up(total, blocks, one)
        starts = self._add("Mul", [self._add("Range", [zero, blocks, one]), each])
        column = self._add("Unsqueeze", [starts, self._constant([1])])
        places = self._add("Add", [column, self._add("Range", [zero, each, one])])
        return self._add("Min", [places, self._add("Sub", [total, one])]), total

    def _rounded_up(self, number: str, by: str, one: str) -> str:
        return self._add("Div", [self._add("Sub", [self._add("Add", [number, by]), one]), by])

    def _flat(self, found: str, output: str, total: str) -> None:
        """Puts blocks of results one behind the other, and cuts off what is too much."""
        first, *rest = self.known.sizes(output)
        each = ex.divide(first, ex.symbol(CANDIDATES))
        flat = self._add("Reshape", [found, self._constant([-1, *rest])])
        end = self._add("Mul", [total, self._constant([each])])
        self.nodes.append(helper.make_node("Slice", [flat, self._constant([0]), end, self._constant([0])], [output]))

    def _add(self, op: str, operands: Sequence[str], **attributes: Any) -> str:
        name = claimed(f"{NAME}/{op}", self.taken)
        self.nodes.append(helper.make_node(op, operands, [name], **attributes))
        return name

    def _constant(self, value: Any, name: str = f"{NAME}/constant") -> str:
        name = claimed(name, self.taken)
        self.out.graph.initializer.append(numpy_helper.from_array(np.array(value, np.int64), name))
        return name
