"""The walk over a model: per node the first rule that may take it and can follow it, else a barrier.

A rule that gives up or fails leaves nothing behind. What one gives is held against the proved shapes before it counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import NodeProto, TensorProto, helper

from onnxrank.errors import OnnxrankError
from onnxrank.extents import Expr
from onnxrank.graphs import captured_by, rename_captured, subgraphs
from onnxrank.operators import Trait, operator, traits
from onnxrank.plans import Place, label
from onnxrank.rewrite import Rewrite
from onnxrank.rule import Rule, SiteFailed, Transfer, internal_error, opaque_reason
from onnxrank.uses import Uses
from onnxrank.values import (
    CANDIDATES,
    Abstract,
    Affine,
    Deferred,
    Dims,
    Level,
    Origin,
    Source,
    Sum,
    Unrepresentable,
    Value,
    canonical,
    extents,
    is_candidate_symbol,
    keep_symbols,
    symbols,
)

_DEEPEST = 32
"""Steps put off on top of each other before they are made: each is made by the one behind it, on Python's stack."""


class Interpreter:
    """One walk over the nodes of a model.

    Attributes:
        rw: What rules may ask and write through.
    """

    def __init__(self, rw: Rewrite) -> None:
        self.rw = rw
        self._journal = rw.sources.journal
        self._depths: dict[str, int] = {}

    def run(self, nodes: Sequence[NodeProto]) -> None:
        """Runs the transfer rules over all nodes, in order."""
        rw = self.rw
        rw.nodes = nodes
        rw.graph = Uses(nodes)
        rw.index_of = {o: k for k, node in enumerate(nodes) for o in node.output if o}
        rw.values.update({name: self._empty(name) for name in rw.values if self._is_empty(name)})
        by_op: dict[str, list[tuple[Rule, dict[str, Transfer]]]] = {}
        for rule in rw.rules:
            for op in dict.fromkeys(op for form in (rule.operators, *(rule.forms or ())) for op in form):
                by_op.setdefault(op, []).append((rule, rule.alternatives(op)))
        for k, node in enumerate(nodes):
            rw.emit.origin, rw.emit.hint, rw.node = k, next((o for o in node.output if o), node.name), node
            self._follow(k, node, by_op.get(operator(node), []))

    def _follow(self, index: int, node: NodeProto, rules: Sequence[tuple[Rule, Mapping[str, Transfer]]]) -> None:
        """Gives the outputs of a node their values."""
        rw, outputs = self.rw, [o for o in node.output if o]
        if outputs and all(o in rw.facts.folded for o in outputs):
            rw.values.update({o: self._folded(node, o) for o in outputs})
            self._bound_depth(index, node)
            return
        if outputs and all(self._is_empty(o) for o in outputs):
            rw.values.update({o: self._empty(o) for o in outputs})
            return
        if len(outputs) == 1 and self._tells(outputs[0]):
            rw.values[outputs[0]] = self._told(outputs[0])
            return
        expected = [rw.is_constant(o) for o in node.output]
        for name, value in zip(node.output, self._made(index, node, rules), strict=False):
            if name:
                rw.values[name] = self._empty(name) if self._is_empty(name) else value
        if expected != [rw.is_constant(o) for o in node.output]:
            rw.graph.forget()
        self._bound_depth(index, node)

    def _bound_depth(self, index: int, node: NodeProto) -> None:
        """Makes a node's results that were put off, if too many steps before them were, too.

        Raises:
            SiteFailed: They cannot be made.
        """
        depth = 1 + max((self._depths.get(i, 0) for i in node.input), default=0)
        for name in node.output:
            value = self.rw.values.get(name)
            if value is None or not (isinstance(value, Sum) or self._put_off(value)):
                continue
            if depth <= _DEEPEST:
                self._depths[name] = depth
                continue
            try:
                made = self.rw.values[name] = self.rw.settle(value) if isinstance(value, Sum) else value
                for source in self._put_off(made):
                    self.rw.layout.name_of(source)
            except Unrepresentable as e:
                raise SiteFailed(index, f"the layout is not one that can be followed: {e}", layout=True) from e

    def _put_off(self, value: Abstract) -> list[Source]:
        """The tensors in a value that are written when somebody asks for them."""
        if isinstance(value, Sum):
            return [s for t in value.terms for s in self._put_off(t)]
        if isinstance(value, Affine):
            return [s for v in (value.base, value.scale) for s in self._put_off(v)]
        found = [value.whole] if value.whole is not None else self.rw.sources.of(value.codes)
        return [s for s in found if s.offers(Deferred) is not None]

    def _made(
        self, index: int, node: NodeProto, rules: Sequence[tuple[Rule, Mapping[str, Transfer]]]
    ) -> list[Abstract]:
        """The outputs of a node by the first rule that may take it and can follow it, or as a barrier."""
        if any(i in self.rw.facts.unknown for i in node.input):
            self.rw.refuse("movement", self._no_rank(node))
            return self._barrier(node)
        repeated = self._repeated(node)
        for rule, forms in rules:
            form = self.rw.choice.at(Place(rule.name, index))
            made = self._tried(rule, forms[form], node, repeated) if form in forms else None
            if made is not None:
                self.rw.taken[index] = (rule.name, form)
                return made
        return self._barrier(node, known=bool(rules))

    def _tried(self, rule: Rule, transfer: Transfer, node: NodeProto, repeated: set[str]) -> list[Abstract] | None:
        """What a rule makes of a node; where it gives up or fails, nothing of what it did is left, and a remark is."""
        self.rw.emit.rule = None
        mark, sources = self._journal.mark(), self.rw.sources.count
        given = {i: self.rw.values[i] for i in node.input if i} if repeated else {}
        made: list[Abstract] | None = None
        try:
            self.rw.values.update({i: self.rw.entire(v, repeated) for i, v in given.items()})
            made = transfer(self.rw, node)
            if made is not None:
                self._confirm(node, made, repeated)
                return [self.rw.entire(v, repeated) for v in made] if repeated else made
        except Unrepresentable as e:
            self.rw.refuse(rule.name, f"the layout is not one that can be followed: {e}")
        except (SiteFailed, OnnxrankError, MemoryError):
            raise
        except Exception as e:
            self.rw.refuse(rule.name, internal_error(rule.name, label(node), e))
        finally:
            self.rw.values.update(given)
            self.rw.emit.rule = None
        self._journal.back(mark)
        self.rw.sources.forget(sources)
        return None

    def _repeated(self, node: NodeProto) -> set[str]:
        """Symbols that a tensor which the node reads or makes has more than once, as `[N, N]` has.

        Of such a tensor the domain cannot say that it varies along one of the axes only: it holds both, or neither.
        """
        shapes = [symbols(self.rw.values[i].dims) for i in node.input if i]
        shapes += [tuple(s for _, syms in self.rw.facts.extents.get(o, ()) for s in syms) for o in node.output if o]
        return {s for syms in shapes for s in syms if syms.count(s) > 1}

    def _is_empty(self, name: str) -> bool:
        """Whether an original tensor has an axis without entries, whatever the symbols are."""
        value, seen = self.rw.values.get(name), self.rw.facts.extents.get(name, ())
        return any(c == 0 for c, _ in seen) or (value is not None and 0 in extents(value.dims))

    def _empty(self, name: str) -> Value:
        """A tensor without entries: a constant."""
        value, known = self.rw.values.get(name), self.rw.facts.dims(name)
        dims = known if value is None or (known is not None and 0 in extents(known)) else value.dims
        assert dims is not None
        dtype = self.rw.dtype(name, TensorProto.FLOAT if value is None else value.dtype)
        data = np.zeros(extents(dims), self.rw.constant_type(dtype))
        return self.rw.new(dims, dtype, (), load=lambda: data)

    def _tells(self, name: str) -> bool:
        """Whether a tensor is one number that is told from the extents of inputs in no more steps than exporters take.

        They read it off the shape of whatever is at hand, in nodes of its own for each place.
        """
        rw, found = self.rw, self.rw.facts.entries.get(name, ())
        if len(found) != 1 or not isinstance(found[0], Expr) or rw.dtype(name) != TensorProto.INT64:
            return False
        few = len(found[0].terms) <= 2 and all(len(atoms) <= 1 for atoms, _ in found[0].terms)
        return few and len(rw.facts.sizes[name]) <= 1 and rw.layout.sizes.tells(found[0])

    def _told(self, name: str) -> Value:
        """Such a number."""
        rw, (size,) = self.rw, self.rw.facts.entries[name]
        dims = tuple(canonical([n]) for n in rw.facts.sizes[name] if isinstance(n, int))
        made = _Told(rw, size, len(dims))
        return Value(dims, TensorProto.INT64, rw.defer(dims, TensorProto.INT64, made, None))

    def _confirm(self, node: NodeProto, made: list[Abstract], repeated: set[str]) -> None:
        """Holds the shapes that a rule gives against the proved ones, and against what the domain can tell apart."""
        for name in node.output[len(made) :]:
            if name and (name in self.rw.outputs or self.rw.readers(name)):
                raise Unrepresentable(f"nothing was made of {name}")
        for name, value in zip(node.output, made, strict=False):
            syms = symbols(value.dims)
            twice = {s for s in syms if syms.count(s) > 1}
            if not twice <= repeated or (twice and not (isinstance(value, Value) and value.whole is not None)):
                raise Unrepresentable(f"two axes of extent {min(twice)}")
            seen = self.rw.facts.sizes.get(name) if name else None
            if seen is None:
                continue
            derived = tuple(self.rw.facts.size_of(d) for d in value.dims)
            if derived != seen:
                raise Unrepresentable(f"a rule gives the shape {list(derived)} where {list(seen)} is proved")

    def _no_rank(self, node: NodeProto) -> str:
        """Why a node is left alone that reads a tensor of an unknown number of dimensions."""
        name = next(i for i in node.input if i in self.rw.facts.unknown)
        return f"it reads {name!r}, whose number of dimensions is not proved ({self.rw.facts.unknown[name]})"

    def _barrier(self, node: NodeProto, known: bool = False) -> list[Abstract]:
        """Leaves a node as it is: operands get their original layout, with all rows.

        Args:
            node: The node.
            known: Whether there are rules for its operator, and it is a matter of its operands.
        """
        operands = [self.rw.values[i] for i in node.input if i]
        inner = sorted(c for c in captured_by(node) if c in self.rw.values)
        operands += [self.rw.values[c] for c in inner]
        rows = any(is_candidate_symbol(s) for v in operands for s in symbols(v.dims))
        told = known and bool(self.rw.refusals) and self.rw.refusals[-1].node == label(node)
        if rows and not told and any(Level.REQUEST in self.rw.levels(v) for v in operands):
            self.rw.refuse("broadcast", opaque_reason(operator(node), known))
        dims: list[Dims] = []
        for o in node.output:
            found = self.rw.facts.dims(o) if o else ()
            if found is None:
                found = ((f"{CANDIDATES}~?{o}",),)
            dims.append(found)
        names = [self.rw.full(i) if i else "" for i in node.input]
        if operator(node) == "MatMul" and not any(i in self.rw.facts.unknown for i in node.input):
            shapes = (self.rw.values[i].dims for i in node.input)
            names = [self.rw.layout.factor(names[k], d, max(-1 - k, -len(d)), True) for k, d in enumerate(shapes)]
        if subgraphs(node):
            captured = {c: self.rw.full(c) for c in inner}
            self._describe({**captured, **dict(zip(node.input, names, strict=True))})
            renamed = NodeProto()
            renamed.CopyFrom(node)
            rename_captured(renamed, captured)
            node = renamed
        made = self.rw.keep(node, names, dims, {s for d in dims for s in symbols(d)}, opaque=True)
        for o, value in zip(node.output, made, strict=True):
            if o and self.rw.facts.dims(o) is not None:
                self._count(value)
        return made

    def _count(self, made: Abstract) -> None:
        """Notes where extents can be read that only a node's result has, as that of the positions NonZero finds."""
        sizes = self.rw.layout.sizes
        for axis, d in enumerate(made.dims):
            if len(symbols([d])) == 1 and symbols([d])[0] not in sizes.expressions:
                (held,) = extents((d,))
                sizes.extent_of.setdefault(symbols([d])[0], (self.rw.tensor(made), axis, held))

    def _describe(self, names: Mapping[str, str]) -> None:
        """Declares what original tensors are now, by their new names, for a node with graphs inside.

        onnxruntime refuses a Scan whose state has a rank that it cannot infer, as behind a Reshape to a computed shape.
        """
        for original, name in names.items():
            value = self.rw.values.get(original)
            if name and value is not None and original not in self.rw.facts.unknown:
                self.rw.emit.describe(name, value.dtype, len(value.dims))

    def _folded(self, node: NodeProto, name: str) -> Value:
        """A constant: the user's own nodes if these make it from constants, else new data."""
        dims, data = self.rw.facts.folded[name]
        dtype = self.rw.dtype(name, helper.np_dtype_to_tensor_dtype(data.dtype))
        operands = [self.rw.values.get(i) for i in node.input if i]
        own = all(
            isinstance(v, Value) and v.whole is not None and v.whole.level is Level.CONSTANT and v.whole.name != ""
            for v in operands
        )
        written = not symbols(dims) and own and operator(node) not in ("Shape", "Size") and not subgraphs(node)
        rounded = Trait.LINEAR in traits(node) or any(
            isinstance(v, Value) and v.whole is not None and v.whole.rounded for v in operands
        )
        source = self.rw.sources.add(
            keep_symbols(dims, ()),
            dtype,
            load=lambda: data,
            deferred=_OwnNode(self.rw, node, name) if written else None,
            origin=Origin(self.rw.emit.origin, self.rw.emit.hint),
            rounded=written and rounded,
        )
        return Value(dims, dtype, source)


@dataclass(eq=False)
class _Told(Deferred):
    """A number that is told from extents.

    Attributes:
        rw: The rewrite.
        size: The number.
        rank: How many dimensions it has.
    """

    rw: Rewrite
    size: int | Expr
    rank: int

    def materialise(self) -> str:
        sizes = self.rw.layout.sizes
        return sizes.size(self.size) if self.rank else sizes.scalar(self.size)


@dataclass(eq=False)
class _OwnNode(Deferred):
    """A constant that the user's own node makes of other constants.

    Attributes:
        rw: The rewrite.
        node: The node.
        output: Which of its outputs.
    """

    rw: Rewrite
    node: NodeProto
    output: str

    def materialise(self) -> str:
        rw = self.rw
        inputs = [rw.tensor(rw.values[i]) if i else "" for i in self.node.input]
        rw.emit.copy(self.node, inputs, [rw.claim(o) or o if o else "" for o in self.node.output])
        for o in self.node.output:
            made = rw.values.get(o)
            if isinstance(made, Value) and made.whole is not None:
                rw.sources.journal.put(made.whole, "name", o)
        return self.output
