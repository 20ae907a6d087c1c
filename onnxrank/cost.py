"""What a model costs per request, from its shapes: multiply-adds, bytes and launches by level."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import fsum, prod
from typing import Any

from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from onnxrank.epilogues import ProductSum, ShapeOf, behind_products
from onnxrank.extents import evaluate
from onnxrank.facts import Extent, Facts, constant_data
from onnxrank.graphs import attribute, einsum_terms
from onnxrank.masks import MOST, Masks
from onnxrank.moves import one_by_one
from onnxrank.operators import Trait, element_type, find, operator, traits
from onnxrank.report import LevelCost
from onnxrank.values import CANDIDATES, is_candidate_symbol

_COUNTED = Trait.PRODUCT | Trait.RECURRENT
_NEWEST = 1 << 30
"""A version of a domain that no operator is younger than."""
_NEAR = 1 << 19
"""Bytes of a tensor up to which picking entries out of it stays in a core's cache."""
_LINE = 64
"""Bytes of a line of a cache: up to as many in a row, copying it takes as long as finding it."""
_PAGES = 1 << 13
"""Bytes of a row from which on every row of a part that is copied lies on pages of memory of its own."""
_READ, _ROWS = 4, 16
"""Multiply-adds that take as long as reading a weight does, and rows of a product from which on that takes no time."""
_WORD = 8
"""Bytes that a Transpose moves as one number."""
CACHE = 3 << 18
"""Bytes that an operator goes through up to which they are still in a core's cache when the next one reads them."""
_SPILLED = 7 << 18
"""Bytes from which on none of them are."""
_SHARED = (1 << 23, 3 << 24)
"""The same of the cache that cores share, of which one has a part."""
WIDE = 512
"""Columns from which on a tensor has a product of its own before it is copied to lie beside others, whatever it is."""

_GONE = ("Constant", "Identity")
Data = Callable[[str], NDArray[Any] | None]
"""Entries of a constant by its name; None for other tensors, and where they are many."""

LENGTH = 64
"""What symbols other than the number of candidates are taken as: a history between short and long ones."""
MANY = 512
"""Candidates that two ways to write the same nodes are compared for: of few, neither takes long."""
_WIDTHS = {
    kind: helper.tensor_dtype_to_np_dtype(kind).itemsize
    for kind in TensorProto.DataType.values()
    if kind not in (TensorProto.UNDEFINED, TensorProto.STRING)
}


def spilled(size: int, within: tuple[int, int] = (CACHE, _SPILLED)) -> float:
    """Which share of so many bytes has left a cache, a core's own unless said, when the next operator reads them."""
    least, most = within
    return min(1.0, max(0.0, (size - least) / (most - least)))


@dataclass(frozen=True)
class Rate:
    """Seconds that operators of a kind take per launch, byte, run of bytes that lie together, and multiply-add.

    `far` are further seconds per run that comes from beyond a core's cache, whose lines hold several short ones.
    """

    launch: float
    byte: float
    run: float = 0.0
    mac: float = 0.0
    far: float = 0.0


@dataclass(frozen=True)
class Bill:
    """What an operator is billed for.

    Attributes:
        kind: Which rate holds.
        bytes: Bytes that it writes; of a reduction and of a TopK, that it reads; of an elementwise operator, the more
            of both; of a recurrent layer, those of its state at every step.
        runs: Of data movement, and of operands that are broadcast, the number of pieces that lie together; of stacks of
            products, the number of products; of what goes by rows, that of rows; of a reduction and of a TopK, that of
            results; of a recurrent layer, that of steps of all rows.
        macs: Multiply-adds; of products of few rows, those that take as long as reading the weights.
        launches: Operators that it stands for, one with many results being more; 0 for what costs nothing at all.
        denormals: Weights of a softmax that masks make denormal numbers.
    """

    kind: str
    bytes: int = 0
    runs: int = 0
    macs: int = 0
    launches: float = 1
    denormals: int = 0

    @property
    def far(self) -> int:
        """Runs, or lines of a cache that hold several, which are fetched one by one."""
        return min(self.runs, self.bytes // _LINE)


def out_of_caches(bill: Bill) -> float:
    """Bytes that an operator writes to memory that is in no cache; reductions, whose bytes are read, write few."""
    return 0.0 if bill.kind.startswith("reduce") else spilled(bill.bytes, _SHARED) * bill.bytes


@dataclass(frozen=True)
class Target:
    """What things cost where the model runs.

    Attributes:
        launch, byte, mac: Seconds per operator run, byte written and multiply-add, where nothing more is known.
        rates: The same by kind of operator, where that is known; `scripts/calibrate.py` measures it.
        call: Seconds that a request takes before any operator runs, and after.
        spill: Further seconds per byte that does not stay in a core's cache.
        memory: Further seconds per byte that is written and stays in no cache.
        denormal: Further seconds that a softmax and the product behind it take for a denormal weight
            (`scripts/underflow.py` measures it).
    """

    launch: float
    byte: float
    mac: float
    rates: Mapping[str, Rate] = field(default_factory=dict)
    call: float = 0.0
    spill: float = 0.0
    memory: float = 0.0
    denormal: float = 9e-9

    def rate(self, kind: str) -> Rate:
        """What operators of a kind take."""
        return self.rates.get(kind) or Rate(self.launch, self.byte, 0.0, self.mac)

    def seconds(self, bill: Bill) -> float:
        """Time of one run of an operator."""
        if not bill.launches:
            return 0.0
        rate = self.rate(bill.kind)
        steps = bill.launches * rate.launch + bill.bytes * rate.byte + bill.runs * rate.run + bill.macs * rate.mac
        beyond = spilled(bill.bytes) * (bill.bytes * self.spill + bill.far * rate.far)
        return steps + beyond + out_of_caches(bill) * self.memory + bill.denormals * self.denormal


_RESULT = 0.5
"""Launches that one more result of an operator takes as long as."""
_OPERAND = 0.3
"""The same of one more operand of a Concat."""
_LAUNCHES = {"Slice": 2.2, "Einsum": 5.0}
"""The same of operators that work out at every run what they are to do."""
_MULTIPLIED = (2.0, 3.0)
"""Exponents for which a runtime multiplies."""
_STEP = 0.34e-6
CPU = Target(
    launch=_STEP,
    byte=0.042e-9,
    mac=0.0132e-9,
    rates={
        "feed": Rate(1.2e-6, 0.0),
        "view": Rate(0.42e-6, 0.0),
        "elementwise": Rate(_STEP, 0.038e-9),
        "broadcast": Rate(_STEP, 0.049e-9, run=12.5e-9),
        "where": Rate(1.06e-6, 0.031e-9, run=18.5e-9),
        "function": Rate(_STEP, 0.104e-9),
        "slow function": Rate(_STEP, 0.47e-9),
        "serial": Rate(_STEP, 1.40e-9),
        "lookup": Rate(_STEP, 0.030e-9, run=9.7e-9),
        "regroup": Rate(_STEP, 0.024e-9, run=2.0e-9),
        "regroup far": Rate(_STEP, 0.029e-9, run=4.4e-9),
        "copy": Rate(_STEP, 0.046e-9, run=2.0e-9, far=4e-9),
        "copy far": Rate(_STEP, 0.046e-9, run=2.0e-9, far=12e-9),
        "expand": Rate(_STEP, 0.031e-9, run=3.1e-9),
        "transpose": Rate(_STEP, 0.031e-9, run=0.45e-9),
        "permute": Rate(_STEP, 0.031e-9, run=2.3e-9),
        "exchange": Rate(_STEP, 0.029e-9, run=8.2e-9),
        "reduce": Rate(_STEP, 0.031e-9, run=4.7e-9),
        "reduce across": Rate(_STEP, 0.029e-9, run=9.9e-9),
        "softmax": Rate(_STEP, 0.30e-9, run=12.7e-9),
        "top": Rate(_STEP, 0.40e-9, run=40e-9),
        "norm": Rate(_STEP, 0.109e-9, run=30.7e-9),
        "product": Rate(0.50e-6, 0.050e-9, mac=0.0132e-9),
        "stack": Rate(0.35e-6, 0.032e-9, run=112e-9, mac=0.027e-9),
        "trees": Rate(5e-6, 0.030e-9, mac=5.5e-9),
        "recurrent": Rate(2.5e-6, 1.75e-9, run=90e-9, mac=0.022e-9),
        "weights": Rate(0.0, 0.014e-9),
    },
    call=8.5e-6,
    spill=0.020e-9,
    memory=0.09e-9,
)
"""One core of an x86 server, onnxruntime on one thread; `scripts/calibrate.py --models` fits it to whole models."""


@dataclass
class Alike:
    """What holds of the nodes of a graph at any number of candidates, found when somebody asks.

    Attributes:
        kinds: The nodes' kinds as numbers, by the first tensor they give: those of one operator with equal attributes
            on equal extents are of one kind.
        numbers: What is behind the numbers.
        varying: Whether tensors have rows of candidates.
        runs: What runs for a request.
    """

    kinds: dict[str, int] = field(default_factory=dict)
    numbers: dict[Hashable, int] = field(default_factory=dict)
    varying: dict[str, bool] = field(default_factory=dict)
    runs: Runs | None = None


@dataclass(frozen=True)
class Runs:
    """The nodes of a graph that run for a request, as a runtime runs them.

    Attributes:
        nodes: One of each kind, with how many there are.
        sums: Additions right behind products.
        weights: Bytes of the constants that they read as a whole.
        cuts: The same of nodes that are each one result of a Split, as `nodes` has them.
    """

    nodes: tuple[tuple[NodeProto, int], ...]
    sums: tuple[ProductSum, ...]
    weights: int = 0
    cuts: tuple[tuple[NodeProto, int], ...] = ()


@dataclass(frozen=True)
class Shapes:
    """Shapes of all tensors of a graph at one number of candidates.

    Attributes:
        facts: What is known of them.
        initializers: Shapes of what is stored.
        inputs: Extents of the inputs.
        symbols: Values of the symbols.
        types: Element types.
        hidden: Shares of the entries that masks hide, by the first tensor that a softmax gives.
        multiplied: What powers give for which a runtime multiplies.
        seconds: Predicted times of the nodes that were asked for, by the first tensor they give; under an empty name,
            that of all of them.
        bills: What nodes of a kind are billed for.
        alike: What holds of the graph's nodes at any number of candidates.
    """

    facts: Facts
    initializers: Mapping[str, tuple[int, ...]]
    inputs: Mapping[str, tuple[Extent, ...]]
    symbols: Mapping[str, int]
    types: Mapping[str, int] = field(default_factory=dict)
    hidden: Mapping[str, float] = field(default_factory=dict)
    multiplied: frozenset[str] = frozenset()
    _known: dict[str, tuple[int, ...] | None] = field(default_factory=dict, init=False, repr=False, compare=False)
    _sizes: dict[tuple[Extent, ...], tuple[int, ...]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    seconds: dict[str, float] = field(default_factory=dict, init=False, repr=False, compare=False)
    bills: dict[int, Bill] = field(default_factory=dict, init=False, repr=False, compare=False)
    alike: Alike = field(default_factory=Alike, repr=False, compare=False)

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
        varying = self.alike.varying
        if name not in varying:
            found = self.facts.extents.get(name) or self.inputs.get(name) or ()
            varying[name] = any(is_candidate_symbol(s) for _, syms in found for s in syms)
        return varying[name]

    def kind(self, node: NodeProto, name: str) -> int:
        """A number for nodes that are billed alike; `name` is the first tensor that the node gives."""
        kinds, numbers = self.alike.kinds, self.alike.numbers
        if name not in kinds:
            attributes = tuple([a.SerializeToString(deterministic=True) for a in node.attribute])
            tensors = tuple([self._extents(t) for names in (node.input, node.output) for t in (*names, None)])
            key = operator(node), attributes, tensors, self.hidden.get(name), name in self.multiplied
            kinds[name] = numbers.setdefault(key, len(numbers))
        return kinds[name]

    def _extents(self, name: str | None) -> Hashable:
        """What there is to know of a tensor's shape and type at any number of candidates; None for none."""
        if not name:
            return name
        stored = self.initializers.get(name)
        found = stored if stored is not None else self.facts.extents.get(name) or self.inputs.get(name)
        return found, self.width(name)


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


def _first(node: NodeProto) -> str | None:
    """The first tensor that a node gives."""
    name: str
    for name in node.output:
        if name:
            return name
    return None


def billed(node: NodeProto, shapes: Shapes) -> Bill:
    """What a node is billed for."""
    name = _first(node)
    if name is None:
        return _billed(node, shapes)
    kind = shapes.kind(node, name)
    if kind not in shapes.bills:
        shapes.bills[kind] = _billed(node, shapes)
    return shapes.bills[kind]


def _billed(node: NodeProto, shapes: Shapes) -> Bill:
    what, op, shape = traits(node), operator(node), shapes.shape
    if Trait.FREE in what:
        return Bill("free", launches=0)
    out = shape(node.output[0]) if node.output else None
    written = _written(node, shapes)
    if Trait.TREES in what:
        return Bill("trees", written, 0, _macs(node, shape))
    if what & _COUNTED:
        macs = _macs(node, shape)
        if Trait.RECURRENT in what:
            sequence, again = (shape(i) or () for i in (node.input[0], node.input[2]))
            steps = prod(sequence[:2]) * prod(again[:1])
            return Bill("recurrent", shapes.width(node.input[0]) * steps * prod(again[-1:]), steps, macs)
        stack = _products(node, shape)
        if not stack and Trait.MATRIX in what and out:
            macs = round(macs * _as_many(prod(out[:-1])))
        return Bill("stack" if stack else "product", written, stack, macs, launches=_LAUNCHES.get(op, 1))
    if out is None or not node.input or Trait.EXTENTS in what:
        return Bill("other", written)
    entries = prod(out)
    first = shape(node.input[0]) or ()
    if Trait.PICK in what:
        if op == "Gather" and attribute(node, "axis", 0) % max(1, len(first)) == 0:
            row = shapes.width(node.input[0]) * prod(first[1:])
            # Rows of a table: as fast as any other step that writes them, unless there is little to write in each.
            return (
                Bill("lookup", written, entries // max(1, prod(first[1:])))
                if row < _LINE
                else Bill("elementwise", written)
            )
        far = shapes.width(node.input[0]) * prod(first) > _NEAR
        kinds = {"Gather": "regroup far" if far else "regroup", "Expand": "expand"}
        if op in ("Concat", "Split"):
            apart, axis = out if op == "Concat" else first, attribute(node, "axis", 0) % max(1, len(first))
            row = shapes.width(node.output[0]) * prod(apart[axis:]) if axis else 0
            kinds[op] = "copy far" if row > _PAGES else "copy"
        launches = _LAUNCHES.get(op, 1) + _RESULT * (len(node.output) - 1)
        if op == "Concat":
            launches += _OPERAND * (len(node.input) - 1)
        return Bill(kinds.get(op, "copy"), written, _runs(node, first, out), launches=launches)
    if op == "Transpose":
        order = attribute(node, "perm") or list(range(len(out)))[::-1]
        still = next((k for k, p in enumerate(order[::-1]) if p != len(order) - 1 - k), len(order))
        run = prod(out[len(out) - still :])
        if run > 1:
            return transposed(written, shapes.width(node.output[0]) * run, entries // run)
        return Bill("transpose" if len(one_by_one(tuple(order))) <= 1 else "permute", written, entries)
    if op == "TopK":
        return Bill("top", shapes.width(node.input[0]) * prod(first), entries)
    if Trait.FUNCTION in what and node.output[0] not in shapes.multiplied:
        slow = "slow function" if Trait.SLOW in what else "function"
        return Bill("serial" if Trait.SERIAL in what else slow, written)
    if Trait.ROWS in what:
        hidden = round(entries * shapes.hidden.get(node.output[0], 0.0))
        rows = entries // max(1, out[-1] if out else 1)
        return Bill("softmax" if op == "Softmax" else "norm", written, rows, denormals=hidden)
    if Trait.REDUCTION in what:
        kind = "reduce" if first[-1:] != (1,) and (len(out) < len(first) or out[-1] == 1) else "reduce across"
        return Bill(kind, shapes.width(node.input[0]) * prod(first), entries)
    operands = [(i, s) for i in node.input if i and (s := shape(i)) is not None]
    spans = _spans(out, [s for _, s in operands])
    if op == "Where":  # each side in a pass of its own, and both together in a third
        return Bill("where", written, spans)
    moved = max(written, sum([shapes.width(i) * prod(s) for i, s in operands]))
    return Bill("broadcast", moved, spans) if spans > 1 else Bill("elementwise", moved)


def _as_many(rows: int) -> float:
    """How many times as long a row of a product of so many rows takes as one of many, for which weights are read once.

    Reading a weight takes as long as four multiply-adds, which so many rows have beside them at most.
    """
    return 1 + _READ * max(0.0, 1 / max(1, rows) - 1 / _ROWS)


def transposed(written: int, run: int, runs: int) -> Bill:
    """What a Transpose is billed for that leaves entries side by side.

    Args:
        written: Bytes.
        run: Bytes that stay together.
        runs: How often.
    """
    return Bill("exchange" if run > _WORD else "transpose", written, runs)


def _products(node: NodeProto, shape: ShapeOf) -> int:
    """How many products a node makes one after the other; 0 where that is a single one."""
    first, second = (shape(i) if i else None for i in (*node.input, "", "")[:2])
    op = operator(node)
    if first is None or second is None:
        return 0
    if op == "Conv":
        return first[0] * int(attribute(node, "group", 1)) if first else 0
    if op == "Einsum" and len(node.input) == 2:
        terms, result = einsum_terms(attribute(node, "equation"), [len(first), len(second)])
        sizes = dict(zip("".join(terms), (*first, *second), strict=False))
        made = prod(sizes[c] for c in result if all(c in t for t in terms))
        return made if made > 1 else 0
    if op in ("MatMul", "com.microsoft::FusedMatMul") and prod(second[:-2]) > 1:
        return max(prod(s[:-2]) for s in (first, second))
    return 0


def _spans(out: tuple[int, ...], operands: Sequence[tuple[int, ...]]) -> int:
    """In how many pieces operands that are broadcast are gone through: within one, each is read on or stands still.

    onnxruntime passes over axes of one entry as far as all operands have them, and takes entry by entry what has
    nothing else there.
    """
    entries = prod(out)
    if all(prod(s) == entries for s in operands):
        return 1
    shared = max(1, min(map(len, operands)))
    if prod(out[len(out) - shared :]) == 1:
        return entries
    padded = [(1,) * (len(out) - len(s)) + s for s in operands]
    span, mode = 1, None
    for k in (k for k in reversed(range(len(out))) if out[k] != 1):
        own = tuple(s[k] == out[k] for s in padded)
        if mode not in (None, own):
            break
        mode, span = own, span * out[k]
    return entries // max(1, span)


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


def shapes_of(
    model: ModelProto,
    facts: Facts,
    inputs: Mapping[str, tuple[Extent, ...]],
    candidates: int,
    folder: str | os.PathLike[str] | None,
) -> Shapes:
    """Shapes at a number of candidates; other symbols are taken as `LENGTH`.

    Args:
        model: The model.
        facts: What is known of its tensors.
        inputs: Extents of its inputs.
        candidates: The number.
        folder: Where its external data lies.
    """
    graph = model.graph
    initializers = {t.name: tuple(t.dims) for t in graph.initializer}
    initializers |= {s.values.name: tuple(s.dims) for s in graph.sparse_initializer}
    others = {s for found in [*facts.extents.values(), *inputs.values()] for _, syms in found for s in syms}
    others |= {s for size in facts.expressions.values() for s in size.symbols}
    symbols = {**{s: LENGTH for s in others if "~" not in s}, CANDIDATES: candidates}
    types = types_of(graph)
    stored = {t.name: t for t in graph.initializer}

    def data(name: str) -> NDArray[Any] | None:
        if name in facts.folded:
            known: NDArray[Any] = facts.folded[name][1]
            return known if known.size <= MOST else None
        tensor = stored.get(name)
        return constant_data(tensor, folder) if tensor is not None and prod(tensor.dims) <= MOST else None

    return Shapes(
        facts, initializers, inputs, symbols, types, _hidden_in(graph, types, data), _multiplied_in(graph, data)
    )


def _hidden_in(graph: GraphProto, types: Mapping[str, int], data: Data) -> dict[str, float]:
    """Shares of the entries that masks hide, by what softmaxes of float32 give."""
    found = [n for n in graph.node if operator(n) == "Softmax" and types.get(n.input[0]) == TensorProto.FLOAT]
    if not found:
        return {}
    masks = Masks(graph.node, data)
    shares = {n.output[0]: masks.share(n.input[0]) for n in found}
    return {name: share for name, share in shares.items() if share}


def _multiplied_in(graph: GraphProto, data: Data) -> frozenset[str]:
    """What powers with such exponents give."""
    powers = {n.output[0]: data(n.input[1]) for n in graph.node if operator(n) == "Pow"}
    return frozenset(k for k, v in powers.items() if v is not None and v.size == 1 and v.item() in _MULTIPLIED)


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


BOUNDED = 0.6e-9
"""Seconds per score of bounding the scores of a row from below (`scripts/underflow.py`)."""


def estimate(macs: float = 0, written: float = 0, launches: float = 0) -> float:
    """Seconds on one core, where no more is known than this.

    Args:
        macs: Multiply-adds of matrix products.
        written: Bytes written.
        launches: Operators run.
    """
    return macs * CPU.mac + written * CPU.byte + launches * CPU.launch


def beside(columns: int) -> float:
    """Seconds per row of copying a tensor of so many columns, so that it lies beside others."""
    rate = CPU.rate("copy")
    return 4 * columns * rate.byte + rate.run


def added(columns: int) -> tuple[float, float]:
    """Seconds, per request and per row, of one more product of so many columns that is added to another."""
    rate = CPU.rate("product")
    return rate.launch, 4 * columns * rate.byte


def node_seconds(node: NodeProto, shapes: Shapes) -> float:
    """Predicted time of one node on one core."""
    name = _first(node)
    if name is None:
        return CPU.seconds(billed(node, shapes))
    if name not in shapes.seconds:
        shapes.seconds[name] = CPU.seconds(billed(node, shapes))
    return shapes.seconds[name]


def bills(graph: GraphProto, shapes: Shapes) -> Iterator[Bill]:
    """What the nodes of a graph are billed for that run for a request, as a runtime runs them; those alike together.

    It computes what is constant when it loads the model, and adds biases and takes activations within products. What
    only gives a tensor another shape moves nothing, but runs. Weights that do not fit in a core's cache together come
    from farther away for every request, however many candidates it has.
    """
    for bill, times in _counted(graph, shapes):
        yield from [bill] * times


def seconds(graph: GraphProto, shapes: Shapes) -> float:
    """Predicted time of one request on one core."""
    if "" not in shapes.seconds:
        # However the nodes are ordered, the sum of their times is the same number.
        shapes.seconds[""] = CPU.call + fsum([CPU.seconds(bill) * n for bill, n in _counted(graph, shapes)])
    return shapes.seconds[""]


def _counted(graph: GraphProto, shapes: Shapes) -> Iterator[tuple[Bill, int]]:
    """What is billed for a request, and how often."""
    if shapes.alike.runs is None:
        shapes.alike.runs = _runs_of(graph, shapes)
    runs = shapes.alike.runs
    yield Bill("feed"), sum(i.name not in shapes.initializers for i in graph.input)
    if far := round(spilled(runs.weights) * runs.weights):
        yield Bill("weights", far), 1
    apart = [(node, 1) for found in runs.sums if not found.adds_row(shapes.shape) for node in found.behind]
    for node, times in (*runs.nodes, *apart):
        bill = billed(node, shapes)
        yield bill if bill.launches else Bill("view"), times
    for node, times in runs.cuts:
        yield replace(billed(node, shapes), launches=_RESULT), times


def _runs_of(graph: GraphProto, shapes: Shapes) -> Runs:
    """The nodes that run for a request."""
    sums, activations = behind_products(graph)
    within = activations | {n.output[0] for found in sums for n in found.behind}
    cuts = _cut_together(graph, shapes)
    found: dict[tuple[int, bool], list[Any]] = {}
    running: set[str] = set()
    fixed, read = set(shapes.initializers), set()
    for node, level in by_rows(graph, shapes):
        if level == "constant":
            fixed.update(node.output)
        if level == "constant" or node.op_type in _GONE:
            continue
        running.add(node.output[0])
        read.update(node.input[1:] if Trait.PICK in traits(node) else node.input)
        if node.output[0] not in within:
            name = _first(node)
            kind = -1 - len(found) if name is None else shapes.kind(node, name)
            found.setdefault((kind, node.output[0] in cuts), [node, 0])[1] += 1
    counted, cut = (tuple((n, times) for (_, at), (n, times) in found.items() if at == way) for way in (False, True))
    weights = sum([shapes.width(name) * prod(shapes.shape(name) or ()) for name in sorted(fixed & read)])
    return Runs(counted, tuple(s for s in sums if s.node.output[0] in running), weights, cut)


def _cut_together(graph: GraphProto, shapes: Shapes) -> set[str]:
    """What Slices give that cut a tensor into parts, all of it and once, which a runtime does by one Split."""
    readers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in dict.fromkeys(node.input):
            readers.setdefault(name, []).append(node)
    out: set[str] = set()
    for name, nodes in readers.items():
        nodes = [n for n in nodes if Trait.EXTENTS not in traits(n)]
        if len(nodes) < 2 or any(operator(n) != "Slice" or n.input[0] != name for n in nodes):
            continue
        whole, parts = shapes.shape(name), [shapes.shape(n.output[0]) for n in nodes]
        if whole is None or any(p is None or len(p) != len(whole) for p in parts):
            continue
        axes = {tuple(k for k, (a, b) in enumerate(zip(whole, p or (), strict=True)) if a != b) for p in parts}
        if len(axes) == 1 and len(along := axes.pop()) == 1:
            if sum(p[along[0]] for p in parts if p is not None) == whole[along[0]]:
                out.update(n.output[0] for n in nodes)
    return out
