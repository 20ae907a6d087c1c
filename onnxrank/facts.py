"""Facts about a model's tensors: proved shapes, constants, and a run that confirms them.

Shapes are derived (`shapes`) and held here in the form that the rewriter works with: per extent a constant times
symbols. An extent that is no such product gets a symbol of its own whose expression is known. Running the model only
confirms: a run that contradicts what was derived is an error of onnxrank, and nothing is rewritten then.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, SparseTensorProto, TensorProto, helper

from onnxrank import extents as ex
from onnxrank import model as files
from onnxrank import runtime, shapes
from onnxrank.errors import ModelError
from onnxrank.extents import Expr, Unproved
from onnxrank.graphs import reads, subgraphs
from onnxrank.operators import Trait, traits
from onnxrank.values import CANDIDATES, Dim, Dims, canonical, is_candidate_symbol
from onnxrank.workers import RemoteSession

Extent = tuple[int, tuple[str, ...]]
"""A constant times symbols."""

_MARK = "::onnxrank/shape"
_KNOWN_DOMAINS = {"", "ai.onnx", "ai.onnx.ml", "com.microsoft", "com.microsoft.nchwc", "ai.onnx.training"}


@dataclass(frozen=True)
class Setting:
    """Values of all symbols in one run."""

    symbols: dict[str, int]
    seed: int


def settings(symbols: Iterable[str], candidates: Iterable[int] = (2, 3, 5, 3), beyond: int = 0) -> list[Setting]:
    """Runs whose extents tell the symbols apart; the last repeats the second with other data.

    Args:
        symbols: The symbols.
        candidates: Number of candidates of each run.
        beyond: Added to every other extent.
    """
    primes = [(7, 11, 13, 11), (17, 19, 23, 19), (29, 31, 37, 31), (41, 43, 47, 43)]
    others = [s for s in symbols if s != CANDIDATES]
    out = []
    for k, n in enumerate(candidates):
        point = {s: beyond + primes[i % len(primes)][k % 4] for i, s in enumerate(others)}
        out.append(Setting({CANDIDATES: n, **point}, seed=k))
    return out


@dataclass
class Facts:
    """Proved shapes and constants of the tensors of a model's main graph.

    Attributes:
        extents: Per tensor the extent of each dimension; absent where the number of dimensions is not proved.
        sizes: The same as expressions.
        expressions: What symbols stand for that are not extents of inputs; absent for extents that are not proved.
        folded: Tensors whose entries are constants, with their data cut to one row along symbols.
        entries: Entries of tensors that are made of extents.
        unknown: Tensors whose number of dimensions is not proved, with the reason.
        opaque: Symbols of extents that are not proved, with the tensor and the reason.
        longest: What lengths are at most wherever the model runs, by their symbols.
        note: Why nothing could be said of a part of the model, if so.
    """

    extents: dict[str, tuple[Extent, ...]] = field(default_factory=dict)
    sizes: dict[str, tuple[int | Expr, ...]] = field(default_factory=dict)
    expressions: dict[str, Expr] = field(default_factory=dict)
    folded: dict[str, tuple[Dims, NDArray[Any]]] = field(default_factory=dict)
    entries: dict[str, list[int | Expr]] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)
    opaque: dict[str, tuple[str, str]] = field(default_factory=dict)
    longest: dict[str, int] = field(default_factory=dict)
    note: str | None = None
    _extents: dict[int | Expr, Extent] = field(default_factory=dict, init=False, repr=False, compare=False)
    _sizes: dict[Dim, int | Expr] = field(default_factory=dict, init=False, repr=False, compare=False)

    def dims(self, name: str) -> Dims | None:
        """Shape with each extent as one factor, when known; merged extents are symbols of their own."""
        found = self.extents.get(name)
        if found is None:
            return None
        out: list[Dim] = []
        for (c, syms), size in zip(found, self.sizes[name], strict=True):
            if len(syms) <= 1 and (c == 1 or not syms):
                out.append(canonical([c, *syms]))
            else:
                assert isinstance(size, Expr)
                out.append((self.symbol_of(size),))
        return tuple(out)

    def extent(self, size: int | Expr) -> Extent:
        """An extent as a constant times symbols."""
        if size not in self._extents:
            c, found = ex.factors(size)
            named = [f if isinstance(f, str) else self.symbol_of(f) for f in found]
            self._extents[size] = c, tuple(sorted(named, key=lambda s: s != CANDIDATES))
        return self._extents[size]

    def size(self, extent: Extent) -> int | Expr:
        """An extent as an expression."""
        c, found = extent
        return c * ex.product(map(self.meaning, found))

    def symbol_of(self, size: Expr) -> str:
        """The symbol that stands for an expression."""
        rows = any(map(is_candidate_symbol, size.symbols))
        name = f"{CANDIDATES if rows else ''}~{size}"
        if name not in self.expressions:
            self.expressions[name] = size
            self._sizes.clear()  # it may have stood for itself before
        return name

    def size_of(self, dim: Dim) -> int | Expr:
        """The extent of a factored dimension as an expression."""
        if dim not in self._sizes:
            self._sizes[dim] = ex.product(f if isinstance(f, int) else self.meaning(f) for f in dim)
        return self._sizes[dim]

    def meaning(self, symbol: str) -> Expr:
        """The expression that a symbol stands for."""
        found = self.expressions.get(symbol)
        return ex.symbol(symbol) if found is None else found

    def unproved(self, name: str) -> str | None:
        """Why the shape of a computed tensor is not proved; None if it is."""
        if name not in self.sizes:
            return self.unknown.get(name, "the number of its dimensions is not known")
        lost = next((self.opaque[s] for n in self.sizes[name] for s in ex.symbols_of(n) if s in self.opaque), None)
        return None if lost is None else f"{lost[0]!r}: {lost[1]}"

    def note_shape(self, name: str, sizes: Sequence[int | Expr]) -> None:
        """Takes up a tensor's shape."""
        self.sizes[name] = tuple(sizes)
        self.extents[name] = tuple(self.extent(n) for n in sizes)


def derive(
    model: ModelProto,
    inputs: Mapping[str, Sequence[Extent]],
    folder: str | os.PathLike[str] | None,
    known: Facts | None = None,
    longest: Mapping[str, int] | None = None,
) -> Facts:
    """Derives the shapes of all tensors, and the entries of those that are constants.

    Args:
        model: The model, functions inlined.
        inputs: Shapes of its inputs, as constants times symbols.
        folder: Where its external data lies.
        known: What was derived of the model that this one was made of. Its inputs may have symbols of that, and what
            the runtime would have to compute is not asked for again.
        longest: What lengths are at most, by their symbols, where that is known.
    """
    facts = Facts(expressions=dict(known.expressions) if known is not None else {})
    replaced = files.overridable(model)
    given: dict[str, tuple[int | Expr, ...]] = {}
    for i in model.graph.input:
        found = inputs.get(i.name)
        if found is not None:
            given[i.name] = tuple(map(facts.size, found))
    loads: dict[str, tuple[tuple[int, ...], int, shapes.Load]] = {}
    for t in model.graph.initializer:
        if t.name in replaced:
            given[t.name] = tuple(t.dims)
        else:
            loads[t.name] = (tuple(t.dims), _bytes(t, t.dims), _loader(t, folder))
    for sparse in model.graph.sparse_initializer:
        loads[sparse.values.name] = (
            tuple(sparse.dims),
            _bytes(sparse.values, sparse.dims),
            _sparse_loader(sparse, folder),
        )
    made = shapes.derive(model, given, loads, longest=longest)
    if made.missing and known is None:
        computed = evaluated(model, made.missing, folder)
        made = shapes.derive(model, given, loads, computed, longest=longest)
    for name, sizes in made.shapes.items():
        if name not in loads and name not in inputs:
            facts.note_shape(name, sizes)
    facts.unknown, facts.opaque, facts.longest = made.unknown, made.opaque, made.longest
    for name, value in made.values.items():
        if not value.concrete:
            with contextlib.suppress(Unproved):
                facts.entries[name] = value.sizes()
    for name, value in shapes.fixed_values(made):
        dims = tuple(canonical([*syms, c]) if syms else canonical([c]) for c, syms in facts.extents[name])
        data = value.data
        for axis, (c, syms) in enumerate(facts.extents[name]):
            if syms and c > 1:
                data = np.repeat(data, c, axis)
        facts.folded[name] = dims, data
    return facts


def _bytes(t: TensorProto, dims: Sequence[int]) -> int:
    """Size of a tensor's entries.

    Raises:
        ModelError: It has an element type that there is not.
    """
    if t.data_type not in helper.get_all_tensor_dtypes():
        raise ModelError(f"initializer {t.name!r} has element type {t.data_type}, which ONNX does not have")
    return prod(dims) * max(1, np.dtype(helper.tensor_dtype_to_np_dtype(t.data_type)).itemsize)


def _sparse_loader(t: SparseTensorProto, folder: str | os.PathLike[str] | None) -> shapes.Load:
    return lambda: files.sparse_data(t, folder)


def _loader(t: TensorProto, folder: str | os.PathLike[str] | None) -> shapes.Load:
    return lambda: constant_data(t, folder)


def evaluated(
    model: ModelProto, nodes: Sequence[NodeProto], folder: str | os.PathLike[str] | None
) -> dict[str, NDArray[Any]]:
    """Entries that the runtime computes from constants; none if it cannot.

    Args:
        model: The model.
        nodes: The nodes that compute them.
        folder: Where the model's external data lies.
    """
    wanted = [o for n in nodes for o in n.output if o]
    part = _behind(model, wanted)
    try:
        with RemoteSession(part, folder) as session:
            return session.run({})
    except ModelError:
        return {}


def _behind(model: ModelProto, wanted: Sequence[str]) -> ModelProto:
    """The part of a model that some tensors depend on, with those for outputs."""
    needed, kept = set(wanted), []
    for node in reversed(model.graph.node):
        if needed & set(node.output):
            kept.append(node)
            needed |= reads(node)
    out = ModelProto(ir_version=model.ir_version)
    out.opset_import.extend(model.opset_import)
    out.graph.name = model.graph.name
    out.graph.node.extend(kept[::-1])
    out.graph.initializer.extend(t for t in model.graph.initializer if t.name in needed)
    out.graph.sparse_initializer.extend(t for t in model.graph.sparse_initializer if t.values.name in needed)
    out.graph.output.extend(helper.make_empty_tensor_value_info(o) for o in wanted)
    return out


def available(model: ModelProto) -> tuple[list[NodeProto], list[NodeProto]]:
    """Divides the nodes into those that onnxruntime may run and those behind operators it does not have.

    Domains other than ONNX's own and ORT's contrib ones are custom: they need a library that is not loaded.
    """
    dead: set[str] = set()
    good, bad = [], []
    for node in model.graph.node:
        if node.domain not in _KNOWN_DOMAINS or dead & reads(node):
            dead |= set(node.output)
            bad.append(node)
        else:
            good.append(node)
    return good, bad


def unavailable(model: ModelProto) -> str | None:
    """Which operators onnxruntime does not have, in a sentence; None if it has them all."""
    _, bad = available(model)
    ops = sorted({f"{n.domain}::{n.op_type}" for n in bad if n.domain not in _KNOWN_DOMAINS})
    return f"operators onnxruntime does not have ({', '.join(ops)}) and all behind them were not run" if bad else None


@dataclass(frozen=True)
class Contradiction:
    """A tensor whose measured shape is not the derived one.

    Attributes:
        name: The tensor.
        derived: Its derived shape, at the values of the run.
        measured: Its shape in the run.
        symbols: Values of the symbols in the run.
    """

    name: str
    derived: tuple[int, ...]
    measured: tuple[int, ...]
    symbols: dict[str, int]

    def __str__(self) -> str:
        at = ", ".join(f"{s.removeprefix('S:')} = {n}" for s, n in self.symbols.items())
        return f"{self.name!r} has the shape {list(self.measured)} where {list(self.derived)} was derived ({at})"


def _not_tensors(model: ModelProto) -> set[str]:
    """Sequences, maps and optionals, which have no shape."""
    nodes = list(model.graph.node)
    out = {o for n in nodes if Trait.SEQUENCE in traits(n) for o in n.output}
    inner = [n for node in nodes for g in subgraphs(node) for n in g.node]
    if any(Trait.SEQUENCE in traits(n) for n in (*nodes, *inner)):
        with contextlib.suppress(Exception):  # what cannot be inferred is known by its operator only
            model = onnx.shape_inference.infer_shapes(model)
    described = [*model.graph.output, *model.graph.value_info]
    return out | {v.name for v in described if v.type.WhichOneof("value") not in (None, "tensor_type")}


class Probe:
    """A model, in a process of its own, with the shape of every tensor exposed.

    Nobody waits for it to be loaded before something is measured.

    Args:
        model: The model, functions inlined.
        folder: Where its external data lies.
        small: Tensors that may as well be given whole, which takes no node of their own.
    """

    def __init__(
        self, model: ModelProto, folder: str | os.PathLike[str] | None = None, small: Collection[str] = ()
    ) -> None:
        good, _ = available(model)
        exposed = ModelProto()
        exposed.CopyFrom(model)
        del exposed.graph.output[:], exposed.graph.value_info[:], exposed.graph.node[:]
        exposed.graph.node.extend(good)
        others = _not_tensors(model)
        self._names = [o for n in good for o in n.output if o and o not in others]
        self._small = [n for n in self._names if n in small]
        exposed.graph.output.extend(helper.make_empty_tensor_value_info(n) for n in self._small)
        for name in self._names:
            if name not in small:
                exposed.graph.node.append(helper.make_node("Shape", [name], [name + _MARK]))
                exposed.graph.output.append(helper.make_tensor_value_info(name + _MARK, TensorProto.INT64, None))
        self._outputs = [o.name for o in exposed.graph.output]
        precision = "float" if runtime.has_half(model) else "own"
        self._session = RemoteSession(exposed, folder, precision=precision, ahead=True)

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *error: object) -> None:
        self._session.close()

    def ask(self, feeds: runtime.Feeds) -> None:
        """Has shapes measured that `answer` fetches, in the order in which they were asked for."""
        if self._names:
            self._session.ask(feeds, self._outputs, self._small)

    def answer(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors for the inputs that were asked for first.

        Raises:
            ModelError: onnxruntime does not take the model, or cannot run it on these inputs.
        """
        return self._shapes(self._session.answer()) if self._names else {}

    def measure(self, feeds: runtime.Feeds) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors for some inputs; what was asked for before is dropped.

        Raises:
            ModelError: onnxruntime does not take the model, or cannot run it on these inputs.
        """
        return self._shapes(self._session.run(feeds, self._outputs, self._small)) if self._names else {}

    def _shapes(self, found: runtime.Feeds) -> dict[str, tuple[int, ...]]:
        return {name.removesuffix(_MARK): tuple(shape.tolist()) for name, shape in found.items()}


def contradictions(facts: Facts, measured: Mapping[str, tuple[int, ...]], setting: Setting) -> Iterator[Contradiction]:
    """What a run says against what was derived."""
    for name, seen in measured.items():
        sizes = facts.sizes.get(name)
        if sizes is None:
            continue
        derived = tuple(
            ex.evaluate(n, setting.symbols) if ex.symbols_of(n) <= setting.symbols.keys() else -1 for n in sizes
        )
        if len(derived) != len(seen) or any(d not in (-1, s) for d, s in zip(derived, seen, strict=True)):
            yield Contradiction(name, derived, seen, setting.symbols)


def constant_data(t: TensorProto, folder: str | os.PathLike[str] | None) -> NDArray[Any]:
    """Loads an initializer, from its external file if it has one."""
    return files.tensor_data(t, folder)
