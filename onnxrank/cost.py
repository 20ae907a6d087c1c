"""What a model costs per request, from its shapes: multiply-adds, bytes and launches by level."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod

from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from onnxrank.extents import evaluate
from onnxrank.facts import Extent, Facts
from onnxrank.graphs import attribute
from onnxrank.moves import one_by_one
from onnxrank.operators import Trait, element_type, find, operator, traits
from onnxrank.report import LevelCost
from onnxrank.values import CANDIDATES, is_candidate_symbol

_COUNTED = Trait.PRODUCT | Trait.RECURRENT
_NEWEST = 1 << 30
"""A version of a domain that no operator is younger than."""
_NEAR = 1 << 19
"""Bytes of a tensor up to which picking entries out of it stays in a core's cache."""
ShapeOf = Callable[[str], "tuple[int, ...] | None"]

LENGTH = 32
"""What symbols other than the number of candidates are taken as."""
_WIDTHS = {
    kind: helper.tensor_dtype_to_np_dtype(kind).itemsize
    for kind in TensorProto.DataType.values()
    if kind not in (TensorProto.UNDEFINED, TensorProto.STRING)
}


@dataclass(frozen=True)
class Rate:
    """Seconds that operators of a kind take per launch, byte, run of bytes that lie together, and multiply-add."""

    launch: float
    byte: float
    run: float = 0.0
    mac: float = 0.0


@dataclass(frozen=True)
class Bill:
    """What an operator is billed for.

    Attributes:
        kind: Which rate holds.
        bytes: Bytes that it writes.
        runs: Of data movement, the number of pieces that lie together; of stacks of products, the number of products.
        macs: Multiply-adds.
        launches: Operators that it stands for; 0 for what costs nothing at all.
    """

    kind: str
    bytes: int = 0
    runs: int = 0
    macs: int = 0
    launches: int = 1


@dataclass(frozen=True)
class Target:
    """What things cost where the model runs.

    Attributes:
        launch, byte, mac: Seconds per operator run, byte written and multiply-add, where nothing more is known.
        rates: The same by kind of operator, where that is known; `scripts/calibrate.py` measures it.
    """

    launch: float
    byte: float
    mac: float
    rates: Mapping[str, Rate] = field(default_factory=dict)

    def seconds(self, bill: Bill) -> float:
        """Time of one run of an operator."""
        if not bill.launches:
            return 0.0
        rate = self.rates.get(bill.kind) or Rate(self.launch, self.byte, 0.0, self.mac)
        return bill.launches * rate.launch + bill.bytes * rate.byte + bill.runs * rate.run + bill.macs * rate.mac


CPU = Target(
    launch=1.5e-6,
    byte=1 / 8e9,
    mac=1 / 25e9,
    rates={
        "regroup": Rate(1.5e-6, 1 / 8e9, run=4e-9),
        "regroup far": Rate(1.5e-6, 1 / 8e9, run=8e-9),
        "copy": Rate(1.5e-6, 1 / 8e9, run=0.3e-9),
        "transpose": Rate(1.5e-6, 1 / 10e9, run=0.35e-9),
        "exchange": Rate(1.5e-6, 1 / 8e9, run=8e-9),
        "permute": Rate(1.5e-6, 1 / 8e9, run=2.3e-9),
        "softmax": Rate(1.5e-6, 1 / 8e9, run=9e-9),
        "stack": Rate(1.5e-6, 1 / 8e9, run=70e-9, mac=1 / 25e9),
    },
)
"""One core of an x86 server, onnxruntime on one thread.

Times per run come from `scripts/calibrate.py`, three quarters of what it measured on a busy machine. That of `copy` is
a tenth of what it measured (3.6 ns): with the whole of it, some exports were predicted faster that are slower.
"""


@dataclass(frozen=True)
class Shapes:
    """Shapes of all tensors of a graph at one number of candidates.

    Attributes:
        facts: What is known of them.
        initializers: Shapes of what is stored.
        inputs: Extents of the inputs.
        symbols: Values of the symbols.
        types: Element types.
        seconds: Predicted times of the nodes that were asked for, by the first tensor they give; under an empty name,
            that of all of them.
    """

    facts: Facts
    initializers: Mapping[str, tuple[int, ...]]
    inputs: Mapping[str, tuple[Extent, ...]]
    symbols: Mapping[str, int]
    types: Mapping[str, int] = field(default_factory=dict)
    _known: dict[str, tuple[int, ...] | None] = field(default_factory=dict, init=False, repr=False, compare=False)
    _sizes: dict[tuple[Extent, ...], tuple[int, ...]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    seconds: dict[str, float] = field(default_factory=dict, init=False, repr=False, compare=False)

    def at(self, candidates: int) -> Shapes:
        """The same at another number of candidates."""
        return replace(self, symbols={**self.symbols, CANDIDATES: candidates})

    def width(self, name: str) -> int:
        """Bytes of an entry of a tensor; 4 where its type is not known."""
        return _WIDTHS.get(self.types.get(name, 0), 4)

    def symbol(self, name: str) -> int:
        """Value of a symbol, opaque ones included; 1 where the extent depends on data."""
        if name in self.symbols:
            return self.symbols[name]
        found = self.facts.expressions.get(name)
        if found is None or not found.symbols <= self.symbols.keys():
            return 1
        return evaluate(found, self.symbols)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of a tensor, if known."""
        if name not in self._known:
            self._known[name] = self._shape(name)
        return self._known[name]

    def _shape(self, name: str) -> tuple[int, ...] | None:
        if name in self.initializers:
            return self.initializers[name]
        found = self.facts.extents.get(name) or self.inputs.get(name)
        if found is None:
            return None
        if found not in self._sizes:
            self._sizes[found] = tuple(c * prod(self.symbol(s) for s in syms) for c, syms in found)
        return self._sizes[found]

    def per_candidate(self, name: str) -> bool:
        """Whether a tensor has rows of candidates."""
        found = self.facts.extents.get(name) or self.inputs.get(name) or ()
        return any(is_candidate_symbol(s) for _, syms in found for s in syms)


def node_macs(node: NodeProto, shapes: Shapes) -> int:
    """Multiply-adds of the matrix products of one node; 0 for other operators and unknown shapes."""
    return _macs(node, shapes.shape)


def _macs(node: NodeProto, shape: ShapeOf) -> int:
    entry = find(node)
    if entry is None or entry.macs is None:
        return 0
    return entry.macs(node, [shape(i) if i else None for i in node.input], shape(node.output[0]))


def node_bytes(node: NodeProto, shapes: Shapes) -> int:
    """Bytes that a node writes."""
    return 0 if Trait.FREE in traits(node) else _written(node, shapes)


def _written(node: NodeProto, shapes: Shapes) -> int:
    """Bytes of what a node gives."""
    found = [(o, shapes.shape(o)) for o in node.output if o]
    return sum([shapes.width(o) * prod(s) for o, s in found if s is not None])


def billed(node: NodeProto, shapes: Shapes) -> Bill:
    """What a node is billed for."""
    what, shape = traits(node), shapes.shape
    if Trait.FREE in what:
        return Bill("free", launches=0)
    out = shape(node.output[0]) if node.output else None
    written = _written(node, shapes)
    if what & _COUNTED:
        op = operator(node)
        first, second = (shape(i) if i else None for i in (*node.input, "", "")[:2])
        stack = max((prod(s[:-2]) for s in (first, second) if s is not None), default=1)
        both = op in ("MatMul", "com.microsoft::FusedMatMul") and second is not None and prod(second[:-2]) > 1
        if op == "com.microsoft::FusedGemm":  # as what it was made of, which the runtime fuses when it loads the model
            return Bill("product", 2 * written, 0, _macs(node, shape), 2)
        return Bill("stack" if both else "product", written, stack if both else 0, _macs(node, shape))
    if out is None or not node.input:
        return Bill("other", written)
    entries = prod(out)
    first = shape(node.input[0]) or ()
    if Trait.PICK in what:
        op = operator(node)
        if op == "Gather" and attribute(node, "axis", 0) % max(1, len(first)) == 0:
            return Bill("elementwise", written)  # rows of a table: as fast as any other step that writes them
        far = shapes.width(node.input[0]) * prod(first) > _NEAR
        kinds = {"Gather": "regroup far" if far else "regroup", "Expand": "expand"}
        return Bill(kinds.get(op, "copy"), written, _runs(node, first, out))
    if operator(node) == "Transpose":
        order = attribute(node, "perm") or list(range(len(out)))[::-1]
        still = next((k for k, p in enumerate(order[::-1]) if p != len(order) - 1 - k), len(order))
        run = prod(out[len(out) - still :])
        if run > 1:
            return Bill("exchange", written, entries // run)
        return Bill("transpose" if len(one_by_one(tuple(order))) <= 1 else "permute", written, entries)
    if Trait.FUNCTION in what:
        return Bill("function", written)
    if Trait.ROWS in what:
        return Bill("softmax", written, entries // max(1, out[-1] if out else 1))
    return Bill("elementwise", written)


def _runs(node: NodeProto, first: tuple[int, ...], out: tuple[int, ...]) -> int:
    """In how many pieces data movement copies, at least."""
    op, entries = operator(node), prod(out)
    rank = len(first) or 1
    if op in ("Gather", "Concat", "Split"):
        axis = attribute(node, "axis", 0) % rank
        if op == "Gather":
            return entries // max(1, prod(first[axis + 1 :]))
        return prod(first[:axis]) * len(node.input if op == "Concat" else node.output)
    shift = len(out) - len(first)
    differs = [k for k in range(len(first)) if first[k] != out[k + shift]]
    if not differs:
        return 1
    last = differs[-1] + shift
    # A slice takes a part of the last axis that is cut; a repeated axis repeats what is behind it.
    return max(1, entries // max(1, prod(out[last + (op == "Expand") :])))


def shapes_of(model: ModelProto, facts: Facts, inputs: Mapping[str, tuple[Extent, ...]], candidates: int) -> Shapes:
    """Shapes at a number of candidates; other symbols are taken as `LENGTH`."""
    graph = model.graph
    initializers = {t.name: tuple(t.dims) for t in graph.initializer}
    initializers |= {s.values.name: tuple(s.dims) for s in graph.sparse_initializer}
    others = {s for found in [*facts.extents.values(), *inputs.values()] for _, syms in found for s in syms}
    others |= {s for size in facts.expressions.values() for s in size.symbols}
    return Shapes(facts, initializers, inputs, {**{s: LENGTH for s in others if "~" not in s}, CANDIDATES: candidates},
                  types_of(graph))  # fmt: skip


def types_of(graph: GraphProto) -> dict[str, int]:
    """Element types of tensors, as far as they follow from those of initializers and inputs, operator by operator."""
    out = {t.name: t.data_type for t in [*graph.initializer, *(s.values for s in graph.sparse_initializer)]}
    out |= {i.name: i.type.tensor_type.elem_type for i in [*graph.input, *graph.value_info, *graph.output]}
    for node in graph.node:
        stored = next((a.t.data_type for a in node.attribute if a.name == "value" and a.HasField("t")), None)
        for k, name in enumerate(node.output):
            if name not in out:
                out[name] = stored or element_type(node, k, _NEWEST, out) or TensorProto.FLOAT
    return out


def by_rows(graph: GraphProto, shapes: Shapes) -> Iterator[tuple[NodeProto, str]]:
    """The nodes of a graph with how often each runs as it stands: per candidate where its result has rows of them."""
    fixed = set(shapes.initializers)
    for node in graph.node:
        level = "request"
        if any(o and shapes.per_candidate(o) for o in node.output):
            level = "candidate"
        elif all(not i or i in fixed for i in node.input) and Trait.EXTENTS not in traits(node):
            level = "constant"
            fixed |= set(node.output)
        yield node, level


def by_level(graph: GraphProto, shapes: Shapes) -> dict[str, LevelCost]:
    """Costs of a graph by level of its nodes."""
    totals = {level: [0, 0, 0, 0] for level in ("constant", "request", "candidate")}
    seen: set[str] = set()
    for node, level in by_rows(graph, shapes):
        t = totals[level]
        t[0] += 1
        for i in node.input:
            if i in shapes.initializers and i not in seen:
                seen.add(i)
                t[1] += prod(shapes.initializers[i])
        t[2] += node_macs(node, shapes)
        t[3] += node_bytes(node, shapes)
    return {level: LevelCost(*t) for level, t in totals.items()}


def estimate(macs: float = 0, written: float = 0, launches: float = 0) -> float:
    """Seconds on one core, where no more is known than this.

    Args:
        macs: Multiply-adds of matrix products.
        written: Bytes written.
        launches: Operators run.
    """
    return macs * CPU.mac + written * CPU.byte + launches * CPU.launch


def node_seconds(node: NodeProto, shapes: Shapes) -> float:
    """Predicted time of one node on one core."""
    name = next((o for o in node.output if o), None)
    if name is None:
        return CPU.seconds(billed(node, shapes))
    if name not in shapes.seconds:
        shapes.seconds[name] = CPU.seconds(billed(node, shapes))
    return shapes.seconds[name]


def seconds(graph: GraphProto, shapes: Shapes) -> float:
    """Predicted time of one request on one core."""
    if "" not in shapes.seconds:
        shapes.seconds[""] = sum(node_seconds(n, shapes) for n in graph.node)
    return shapes.seconds[""]
