"""Proved shapes: every extent of a graph as an expression over the symbols of its inputs, without running it.

The walk goes over the nodes once. The registry (`operators`) says what an operator does to shapes, and to tensors that
are computed from shapes; for operators without an entry onnx's own inference of that operator is asked. An extent that
neither proves gets a symbol of its own, which equals nothing but itself: whoever depends on it is left alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations
from typing import Any

import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, TypeProto, helper

from onnxrank import extents as ex
from onnxrank.extents import Expr, Unproved
from onnxrank.graphs import attribute, live, reads, subgraphs, versions
from onnxrank.operators import Known, Operator, Shape, Trait, Use, constant, domain_of, find, operator, traits

_LARGEST = 1 << 24
"""Bytes of the largest tensor of constants that is computed here."""

Load = Callable[[], NDArray[Any]]


@dataclass
class Derivation:
    """What was derived of a graph.

    Attributes:
        shapes: Per tensor its shape; absent where not even the number of dimensions is proved.
        values: Tensors that are computed from constants and extents alone.
        unknown: Tensors of an unknown number of dimensions, with the reason.
        opaque: Symbols of extents that are not proved, with the tensor that they belong to and the reason.
        missing: Nodes that depend on constants alone, and that onnxrank does not compute itself.
        longest: What lengths are at most wherever the model runs, by their symbols.
    """

    shapes: dict[str, Shape] = field(default_factory=dict)
    values: dict[str, Known] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)
    opaque: dict[str, tuple[str, str]] = field(default_factory=dict)
    missing: list[NodeProto] = field(default_factory=list)
    longest: dict[str, int] = field(default_factory=dict)


class _Initializers(Mapping[str, Known]):
    """Constants of a model, loaded when asked for."""

    def __init__(self, load: Mapping[str, tuple[tuple[int, ...], int, Load]]) -> None:
        self._load = load
        self._loaded: dict[str, Known] = {}

    def __getitem__(self, name: str) -> Known:
        if name not in self._loaded:
            self._loaded[name] = constant(self._load[name][2]())
        return self._loaded[name]

    def __iter__(self) -> Any:
        return iter(self._load)

    def __len__(self) -> int:
        return len(self._load)


def derive(
    model: ModelProto,
    inputs: Mapping[str, Shape],
    loads: Mapping[str, tuple[tuple[int, ...], int, Load]],
    given: Mapping[str, NDArray[Any]] | None = None,
    rows: str = "N",
    longest: Mapping[str, int] | None = None,
) -> Derivation:
    """Derives all shapes of a model's main graph.

    Args:
        model: The model, functions inlined.
        inputs: Shapes of its inputs, overridable initializers among them.
        loads: Per constant initializer its shape, its size in bytes, and what loads its entries.
        given: Entries of tensors that depend on constants alone and were computed elsewhere.
        rows: The symbol that counts candidates. The name of an extent that is not proved and may depend on them starts
            with it.
        longest: What lengths are at most, by their symbols, where that is known.
    """
    ranks: dict[str, int] = {}
    least: dict[str, int] = {}
    most: dict[str, int] = dict(longest or {})
    plain = Derivation()
    lengths = {s for shape in inputs.values() for n in shape for s in ex.symbols_of(n) if not s.startswith(rows)}
    while True:
        # Meanwhile a symbol stands for what its length is beyond the least one.
        shift: dict[str | ex.Call, int | Expr] = {s: ex.symbol(s) + n for s, n in least.items()}
        from_least = {name: tuple(ex.replaced(n, shift) for n in shape) for name, shape in inputs.items()}
        ends = {s: n - least.get(s, 0) for s, n in most.items()}
        found = _Walk(model, from_least, loads, given or {}, rows, ranks, ends).run()
        plain = plain if least else found
        more = _demanded(model, found)
        low, high = _demanded_lengths(model, found, lengths)
        longer = {s: least.get(s, 0) + n for s, n in low.items()}
        shorter = {s: least.get(s, 0) + n for s, n in high.items() if n < ends.get(s, n + 1)}
        if not more and not longer and not shorter:
            with contextlib.suppress(Unproved):  # what divides by a length, which is not told from one below the least
                plain = _of_whole_lengths(found, {s: ex.symbol(s) - n for s, n in least.items()})
            return replace(plain, longest=most)
        ranks |= more
        least |= longer
        most |= shorter


def _of_whole_lengths(found: Derivation, lengths: Mapping[str | ex.Call, int | Expr]) -> Derivation:
    """What was derived with lengths in the place of what they are beyond the least ones."""

    def entries(value: Known) -> Known:
        data = value.data
        if not value.concrete:
            data = data.copy()
            data.reshape(-1)[:] = [ex.replaced(x, lengths) if isinstance(x, Expr) else x for x in data.reshape(-1)]
        return Known(tuple(ex.replaced(n, lengths) for n in value.shape), data, value.dtype)

    if not lengths:
        return found
    values = {name: entries(value) for name, value in found.values.items()}
    shapes = {name: tuple(ex.replaced(n, lengths) for n in shape) for name, shape in found.shapes.items()}
    return replace(found, values=values, shapes=shapes)


def _demanded_lengths(
    model: ModelProto, found: Derivation, lengths: Collection[str]
) -> tuple[dict[str, int], dict[str, int]]:
    """The least lengths, if more than none, and the largest ones at which operands fit each other.

    `x[:, -7:]` has 7 positions or all that there are: where a tensor of 7 is added to it, or a weight has 7 rows for
    it, the model does not run at lengths that are shorter. Nor does it run at longer ones than a table of positions
    has, where its first rows are added to those of a history.
    """
    least: dict[str, int] = {}
    most: dict[str, int] = {}
    if not any(ex.calls(n, "min") for shape in found.shapes.values() for n in shape):
        return least, most
    for node in live(model).graph.node:
        broadcast = Trait.ELEMENTWISE in traits(node)
        for a, b in _meeting(node, [found.shapes.get(i, ()) for i in node.input]):
            for name, n in ex.most_where(a, b).items():
                most[name] = min(n, most.get(name, n))
            if isinstance(b, int) and not (broadcast and min(ex.bounds(a)[0], b) <= 1):
                for name, n in ex.least_where(a, b).items():
                    least[name] = max(n, least.get(name, 0))
    return {s: n for s, n in least.items() if n > 0 and s in lengths}, {s: n for s, n in most.items() if s in lengths}


def _meeting(node: NodeProto, shapes: Sequence[Shape]) -> Iterable[tuple[int | Expr, int | Expr]]:
    """Pairs of extents that are equal wherever a node runs, or one of which is broadcast, each either way round."""
    if Trait.ELEMENTWISE in traits(node):
        return (p for x, y in permutations(shapes, 2) for p in zip(x[::-1], y[::-1], strict=False))
    if operator(node) in ("MatMul", "Gemm") and all(len(s) > 1 for s in shapes[:2]):
        a = shapes[0][-2 if attribute(node, "transA", 0) else -1]
        b = shapes[1][-1 if attribute(node, "transB", 0) else -2]
        return ((a, b), (b, a))
    return ()


def _demanded(model: ModelProto, found: Derivation) -> dict[str, int]:
    """Ranks that a Concat demands of what Squeeze without axes gives, where that depends on extents.

    Where an extent is 1 that such a rank counts, the Concat fails, and the model gives nothing at all.
    """
    made = {n.output[0] for n in model.graph.node if operator(n) == "Squeeze" and n.input[0] in found.shapes}
    made &= found.unknown.keys()
    ranks: dict[str, int] = {}
    for node in live(model).graph.node if made else ():
        known = [len(found.shapes[i]) for i in node.input if i in found.shapes]
        if known and operator(node) == "Concat":
            ranks |= dict.fromkeys(made.intersection(node.input), known[0])
    return ranks


class _Walk:
    """One derivation."""

    def __init__(
        self,
        model: ModelProto,
        inputs: Mapping[str, Shape],
        loads: Mapping[str, tuple[tuple[int, ...], int, Load]],
        given: Mapping[str, NDArray[Any]],
        rows: str,
        ranks: Mapping[str, int],
        most: Mapping[str, int],
    ) -> None:
        self.model, self.rows, self.given, self.ranks, self.most = model, rows, given, ranks, most
        self.loads = loads
        self.initializers = _Initializers(loads)
        self.out = Derivation()
        self.out.shapes.update(inputs)
        self.out.shapes.update({name: tuple(shape) for name, (shape, _, _) in loads.items() if name not in inputs})
        self.opsets = versions(model)
        self.types: dict[str, int] = {t.name: t.data_type for t in model.graph.initializer}
        self.types |= {i.name: i.type.tensor_type.elem_type for i in model.graph.input}
        self._inferred: dict[str, TypeProto] | None = None
        self._left: set[str] = set()

    def run(self) -> Derivation:
        """Goes over all nodes."""
        for node in self.model.graph.node:
            self._step(node)
        return self.out

    def _value(self, name: str) -> Known | None:
        if name in self.out.values:
            return self.out.values[name]
        found = self.loads.get(name)
        if found is None or found[1] > _LARGEST:
            return None
        return self.initializers[name]

    def _step(self, node: NodeProto) -> None:
        entry = find(node)
        use = Use(
            node,
            self.opsets.get(domain_of(node), 1),
            [self.out.shapes.get(i) if i else None for i in node.input],
            _Values([i for i in node.input], self._value),
        )
        values: Sequence[Known | None] = ()
        names = [o for o in node.output if o]
        if self.given and names and all(o in self.given for o in names):
            values = [constant(self.given[o]) if o else None for o in node.output]
        elif self._from_constants(node, entry):
            if entry is not None and entry.value is not None and not entry.random:
                with contextlib.suppress(Unproved, ArithmeticError, IndexError, TypeError, ValueError):
                    values = entry.value(use)
            if not values and self._is_constant(node, entry):
                self._leave(node)
        elif self._is_constant(node, entry):
            self._leave(node)
        shapes, reason_why = self._shapes(use, entry)
        for k, name in enumerate(node.output):
            if not name:
                continue
            value = values[k] if k < len(values) else None
            if value is not None:
                self.out.values[name] = value
                self.out.shapes[name] = value.shape
                continue
            partial = shapes[k] if k < len(shapes) else None
            if partial is None:
                self.out.unknown[name] = reason_why or f"{node.op_type} gives another number of dimensions case by case"
            else:
                self.out.shapes[name] = tuple(self._opaque(name, j, n, node) for j, n in enumerate(partial))

    def _opaque(self, name: str, axis: int, size: int | Expr | None, node: NodeProto) -> int | Expr:
        """An extent, or a symbol of its own for one that is not proved."""
        if size is not None and ex.bounds(size)[1] >= 0:
            return ex.within(size, self.most) if self.most else size
        read = [self.out.shapes.get(i) for i in node.input if i]
        rows = subgraphs(node) or any(s is None or any(self._rows(n) for n in s) for s in read)
        made = f"{self.rows if rows else ''}~?{name}.{axis}"
        self.out.opaque[made] = (name, f"{node.op_type} gives an extent that is not proved")
        return ex.symbol(made)

    def _rows(self, size: int | Expr) -> bool:
        """Whether an extent may depend on the number of candidates."""
        return any(s.startswith(self.rows) for s in ex.symbols_of(size))

    def _from_constants(self, node: NodeProto, entry: Operator | None) -> bool:
        """Whether a node reads extents and small constants alone."""
        if entry is not None and Trait.EXTENTS in entry.traits:
            return node.input[0] in self.out.shapes
        for name in node.input:  # most nodes have one that is not, and need not be gone into
            if name and name not in self.out.values and not self._small(name):
                return False
        return all(i in self.out.values or self._small(i) for i in reads(node))

    def _small(self, name: str) -> bool:
        return name in self.loads and self.loads[name][1] <= _LARGEST

    def _leave(self, node: NodeProto) -> None:
        """Leaves a node of constants to the runtime."""
        self.out.missing.append(node)
        self._left.update(o for o in node.output if o)

    def _is_constant(self, node: NodeProto, entry: Operator | None) -> bool:
        """Whether a node's result is the same at all extents, so that running it once tells it."""
        if entry is not None and entry.random:
            return False
        return all(map(self._is_fixed, node.input)) and all(map(self._is_fixed, reads(node)))

    def _is_fixed(self, name: str) -> bool:
        """Whether an input of a node, if it is one at all, is the same at all extents."""
        if not name or name in self._left or self._small(name):
            return True
        found = self.out.values.get(name)
        return found is not None and found.fixed

    # --- shapes ----------------------------------------------------------------------------------------------------

    def _shapes(self, use: Use, entry: Operator | None) -> tuple[list[Any], str | None]:
        """Shapes of a node's outputs, and why one is missing."""
        node = use.node
        if entry is not None and entry.shape is not None:
            try:
                return list(entry.shape(use)), None
            except Unproved as e:
                return self._as_demanded(use) or self._ask_onnx(use), f"{node.op_type}: {e}"
            except (ArithmeticError, IndexError, TypeError, ValueError) as e:
                return self._ask_onnx(use), f"{node.op_type}: {e}"
        return self._ask_onnx(use), f"{node.op_type} is not an operator whose shapes onnxrank knows"

    def _as_demanded(self, use: Use) -> list[Any] | None:
        """What a squeeze leaves where its reader demands that it leaves every extent that is not 1 always."""
        rank = self.ranks.get(use.node.output[0])
        left = None if rank is None else [n for n in use.shape(0) if n != 1]
        return [left] if left is not None and len(left) == rank else None

    def _ask_onnx(self, use: Use) -> list[Any]:
        """Onnx's inference of one operator, with a name for every different expression."""
        node = use.node
        domain = domain_of(node)
        if subgraphs(node):
            return [self._declared(o) for o in node.output]
        try:
            schema = onnx.defs.get_schema(node.op_type, self.opsets.get(domain, 1), domain)
        except onnx.defs.SchemaError:
            return [None] * len(node.output)
        names: dict[str, Expr] = {}
        types: dict[str, TypeProto] = {}
        data: dict[str, TensorProto] = {}
        for i in node.input:
            if not i:
                continue
            shape = self.out.shapes.get(i)
            kind = self._type_of(i)
            if shape is None or kind is None:
                return [None] * len(node.output)
            dims: list[int | str] = []
            for n in shape:
                if isinstance(n, Expr):
                    names[str(n)] = n
                dims.append(n if not isinstance(n, Expr) else str(n))
            types[i] = helper.make_tensor_type_proto(kind, dims)
            value = self._value(i)
            if value is not None and value.fixed and value.data.dtype != object and value.data.nbytes < 1 << 16:
                data[i] = onnx.numpy_helper.from_array(value.data, i)
        try:
            found = onnx.shape_inference.infer_node_outputs(
                schema, node, types, data, opset_imports=list(self.model.opset_import), ir_version=self.model.ir_version
            )
        except Exception:  # a damaged node: whatever onnx stumbles over, nothing is known then
            return [None] * len(node.output)
        out: list[Any] = []
        for o in node.output:
            kind_of = found.get(o)
            if kind_of is None or not kind_of.HasField("tensor_type"):
                out.append(None)
                continue
            if kind_of.tensor_type.elem_type:
                self.types[o] = kind_of.tensor_type.elem_type
            out.append(_partial(kind_of, names))
        return out

    def _type_of(self, name: str) -> int | None:
        """Element type of a tensor, by onnx's inference over the whole graph."""
        if name in self.types:
            return self.types[name] or None
        value = self.out.values.get(name)
        if value is not None and value.data.dtype != object:
            return int(helper.np_dtype_to_tensor_dtype(value.dtype))
        found = self._whole_inference().get(name)
        return found.tensor_type.elem_type or None if found is not None else None

    def _declared(self, name: str) -> list[Any] | None:
        """Shape of what a control-flow node gives, as far as onnx's inference of its bodies fixes it."""
        found = self._whole_inference().get(name)
        return None if found is None or not found.HasField("tensor_type") else _partial(found, {})

    def _whole_inference(self) -> dict[str, TypeProto]:
        """Onnx's inference over the whole graph, of what the file says of inputs and initializers only."""
        if self._inferred is None:
            bare = ModelProto()
            bare.CopyFrom(self.model)
            _forget_shapes(bare.graph)
            try:
                made = onnx.shape_inference.infer_shapes(bare)
            except Exception:  # whatever it stumbles over, nothing is known then
                made = bare
            self._inferred = {v.name: v.type for v in made.graph.value_info}
        return self._inferred


class _Values(Sequence["Known | None"]):
    """Entries of a node's inputs, looked up when asked for: most operators never ask."""

    def __init__(self, names: Sequence[str], find: Callable[[str], Known | None]) -> None:
        self._names, self._find = names, find

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, k: Any) -> Any:
        return self._find(self._names[k]) if self._names[k] else None


def _forget_shapes(graph: onnx.GraphProto) -> None:
    """Removes what exporters say of tensors that are computed."""
    del graph.value_info[:]
    for node in graph.node:
        for inner in subgraphs(node):
            _forget_shapes(inner)
            for o in inner.output:
                if o.type.HasField("tensor_type"):
                    o.type.tensor_type.ClearField("shape")


def _partial(found: TypeProto, names: Mapping[str, Expr]) -> list[Any] | None:
    """A shape that onnx inferred; None for extents that it does not fix."""
    if not found.tensor_type.HasField("shape"):
        return None
    return [
        d.dim_value if d.HasField("dim_value") else names.get(d.dim_param) if d.HasField("dim_param") else None
        for d in found.tensor_type.shape.dim
    ]


def fixed_values(found: Derivation) -> Iterable[tuple[str, Known]]:
    """Tensors whose entries are constants, whatever the extents."""
    return ((name, v) for name, v in found.values.items() if v.concrete)
