"""What running a model tells about it: shapes as functions of the number of candidates, and foldable constants.

Static shape inference leaves many tensors of exported rankers untyped and gets some broadcasts wrong, so shapes are
measured: the model runs at several numbers of candidates with the shape of every tensor exposed, and each extent is
fitted as `a * N + b`. An extent that no such line goes through depends on the data and is treated as unknown.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper

from onnxrank import model as files
from onnxrank import runtime
from onnxrank.emit import captured, subgraphs
from onnxrank.errors import ModelError
from onnxrank.values import CANDIDATES, Dim, Dims, canonical

Extent = tuple[int, tuple[str, ...]]
"""A constant times symbols."""

_MARK = "::shape"
_NOT_DETERMINISTIC = {
    "RandomNormal",
    "RandomUniform",
    "RandomNormalLike",
    "RandomUniformLike",
    "Multinomial",
    "Bernoulli",
}
_SEQUENCES = {"SequenceEmpty", "SequenceConstruct", "SequenceInsert", "SequenceErase", "SequenceMap", "SplitToSequence",
              "Optional", "ZipMap"}  # fmt: skip
"""Operators that make sequences, maps or optionals."""
_KNOWN_DOMAINS = {"", "ai.onnx", "ai.onnx.ml", "com.microsoft", "com.microsoft.nchwc", "ai.onnx.training"}
_LARGEST_FOLD = 1 << 24


@dataclass(frozen=True)
class Setting:
    """Values of all symbols in one run."""

    symbols: dict[str, int]
    seed: int


def settings(symbols: Iterable[str], candidates: Iterable[int] = (2, 3, 5, 3)) -> list[Setting]:
    """Runs whose extents tell the symbols apart; the last repeats the second with other data."""
    primes = [(7, 11, 13, 11), (17, 19, 23, 19), (29, 31, 37, 31), (41, 43, 47, 43)]
    others = [s for s in symbols if s != CANDIDATES]
    out = []
    for k, n in enumerate(candidates):
        point = {s: primes[i % len(primes)][k % 4] for i, s in enumerate(others)}
        out.append(Setting({CANDIDATES: n, **point}, seed=k))
    return out


@dataclass
class Facts:
    """Measured shapes and constants of the tensors of a model's main graph.

    Attributes:
        extents: Per tensor the extent of each dimension; absent where the tensor was not seen.
        folded: Tensors that depend on constants and extents only and are the same for every number of candidates,
            with their data cut to one row along symbols.
        varying: Tensors that depend on constants and extents only and change with the number of candidates.
        unproven: Those of them that may change in another way at numbers that were not tried, by a threshold say.
        unsteady: Tensors that have another rank for a single candidate.
        literals: Data of small integer initializers.
        note: Why nothing could be measured for a part of the model, if so.
    """

    extents: dict[str, tuple[Extent, ...]] = field(default_factory=dict)
    folded: dict[str, tuple[Dims, NDArray[Any]]] = field(default_factory=dict)
    varying: set[str] = field(default_factory=set)
    unproven: set[str] = field(default_factory=set)
    unsteady: set[str] = field(default_factory=set)
    note: str | None = None
    literals: dict[str, NDArray[Any]] = field(default_factory=dict)

    def dims(self, name: str) -> Dims | None:
        """Shape with each extent as one factor, when known; merged extents are opaque symbols."""
        found = self.extents.get(name)
        if found is None:
            return None
        out: list[Dim] = []
        for c, syms in found:
            if len(syms) <= 1 and (c == 1 or not syms):
                out.append(canonical([c, *syms]))
            else:
                out.append(("~".join((*syms, str(c))),))
        return tuple(out)


def shape_derived(nodes: Iterable[NodeProto], constants: Iterable[str]) -> set[str]:
    """Tensors that depend on constants and on shapes, but on no input's values."""
    known = set(constants)
    out: set[str] = set()
    for node in nodes:
        inner = {c for g in subgraphs(node) for c in captured(g)}
        if node.op_type in ("Shape", "Size") or (
            node.op_type not in _NOT_DETERMINISTIC | _SEQUENCES
            and all(not i or i in known for i in {*node.input, *inner})
        ):
            known |= set(node.output)
            out |= {o for o in node.output if o}
    return out


def available(model: ModelProto) -> tuple[list[NodeProto], list[NodeProto]]:
    """Divides the nodes into those that onnxruntime may run and those behind operators it does not have.

    Domains other than ONNX's own and ORT's contrib ones are custom: they need a library that is not loaded.
    """
    dead: set[str] = set()
    good, bad = [], []
    for node in model.graph.node:
        inner = {c for g in subgraphs(node) for c in captured(g)}
        if node.domain not in _KNOWN_DOMAINS or dead & {*node.input, *inner}:
            dead |= set(node.output)
            bad.append(node)
        else:
            good.append(node)
    return good, bad


def _not_tensors(model: ModelProto) -> set[str]:
    """Sequences, maps and optionals, which have no shape."""
    nodes = list(model.graph.node)
    out = {o for n in nodes if n.op_type in _SEQUENCES for o in n.output}
    kinds = {n.op_type for n in nodes} | {n.op_type for node in nodes for g in subgraphs(node) for n in g.node}
    if kinds & _SEQUENCES:
        with contextlib.suppress(Exception):  # what cannot be inferred is known by its operator only
            model = onnx.shape_inference.infer_shapes(model)
    described = [*model.graph.output, *model.graph.value_info]
    return out | {v.name for v in described if v.type.WhichOneof("value") not in (None, "tensor_type")}


class Probe:
    """A model loaded with the shape of every tensor exposed.

    Args:
        model: The model, functions inlined.
        symbols: Names of the symbolic extents of its inputs.
        folder: Where its external data lies.

    Raises:
        ModelError: onnxruntime does not take the model.
    """

    def __init__(self, model: ModelProto, symbols: Iterable[str], folder: str | os.PathLike[str] | None = None) -> None:
        self._model, self._symbols = model, list(symbols)
        good, bad = available(model)
        ops = sorted({f"{n.domain}::{n.op_type}" for n in bad if n.domain not in _KNOWN_DOMAINS})
        self.note = None
        if bad:
            self.note = f"operators onnxruntime does not have ({', '.join(ops)}) and all behind them were not run"
        graph = model.graph
        overridable = files.overridable(model)
        self._derived = shape_derived(good, {t.name for t in graph.initializer} - overridable)
        exposed = ModelProto()
        exposed.CopyFrom(model)
        del exposed.graph.output[:], exposed.graph.value_info[:]
        if bad:
            del exposed.graph.node[:]
            exposed.graph.node.extend(good)
        else:
            exposed.graph.output.extend(o for o in graph.output if o.name not in self._derived)
        others = _not_tensors(model)
        self._names = [o for n in good for o in n.output if o and o not in others]
        used, self._mark = {o for n in good for o in n.output}, _MARK
        while any(name + self._mark in used for name in self._names):
            self._mark += ":"
        for name in self._names:
            exposed.graph.node.append(helper.make_node("Shape", [name], [name + self._mark]))
            exposed.graph.output.append(helper.make_tensor_value_info(name + self._mark, TensorProto.INT64, None))
        for name in sorted(self._derived):
            exposed.graph.output.append(helper.make_empty_tensor_value_info(name))
        self._literals = {
            t.name: files.tensor_data(t)
            for t in graph.initializer
            if t.data_type in (TensorProto.INT64, TensorProto.INT32)
            and t.data_location != TensorProto.EXTERNAL
            and t.ByteSize() < 1 << 20
            and t.name not in overridable
        }
        self._half = runtime.has_half(model)
        if self._half:
            exposed = runtime.retype(exposed, TensorProto.FLOAT, folder)
        self._session = runtime.session(exposed, folder)

    @property
    def session(self) -> Any | None:
        """The session, where it computes the model's outputs just as the model does; it has further outputs."""
        return None if self._half or self.note else self._session

    def release(self) -> None:
        """Lets go of the session, which holds the weights once more; nothing can be measured any longer."""
        self._session = None

    def measure(self, feeds: Callable[[Setting], runtime.Feeds]) -> Facts:
        """Runs the model at several numbers of candidates and fits its shapes.

        Args:
            feeds: Makes the inputs for a setting.

        Raises:
            ModelError: onnxruntime cannot run the model on these inputs.
        """
        facts = Facts(note=self.note, literals=self._literals)
        points = settings(self._symbols)
        wanted = [*(n + self._mark for n in self._names), *self._derived]
        runs = [runtime.run(self._session, feeds(p), wanted) for p in points]
        for name in self._names:
            shapes = [tuple(r[name + self._mark].tolist()) for r in runs]
            if len({len(s) for s in shapes}) == 1:
                facts.extents[name] = tuple(
                    fit([s[k] for s in shapes], points, f"{name}.{k}") for k in range(len(shapes[0]))
                )
        alone = self._at_one(feeds)
        for name in self._names:
            if name + self._mark in alone and name in facts.extents:
                if len(alone[name + self._mark]) != len(facts.extents[name]):
                    facts.unsteady.add(name)
        seen = {name: [np.asarray(r[name]) for r in runs] for name in self._derived}
        for node in self._model.graph.node:
            for name in node.output:
                if name not in seen:
                    continue
                folded = _fold(seen[name], facts.extents.get(name), alone.get(name))
                fixed = all(i not in facts.varying for i in node.input)
                if folded is not None and folded[1].nbytes <= _LARGEST_FOLD and (fixed or _proven(node, seen, facts)):
                    facts.folded[name] = folded
                    continue
                facts.varying.add(name)
                if facts.unproven & set(node.input) or not (fixed or _proven(node, seen, facts)):
                    facts.unproven.add(name)
        if self._half:
            _restore_half(self._model, facts)
        return facts

    def _at_one(self, feeds: Callable[[Setting], runtime.Feeds]) -> dict[str, NDArray[Any]]:
        """Shapes and shape-derived tensors for a single candidate, where an extent of 1 may take another branch."""
        (point,) = settings(self._symbols, (1,))
        try:
            wanted = [*(n + self._mark for n in self._names), *self._derived]
            return runtime.run(self._session, feeds(point), wanted) if wanted else {}
        except ModelError:
            return {}


def _restore_half(model: ModelProto, facts: Facts) -> None:
    """Constants folded in float32 on the way to 16-bit tensors are the 16-bit model's own only if it is cast back."""
    kinds = [t.data_type for t in model.graph.initializer] + [i.type.tensor_type.elem_type for i in model.graph.input]
    half = next(k for k in kinds if k in (TensorProto.FLOAT16, TensorProto.BFLOAT16))
    to = helper.tensor_dtype_to_np_dtype(half)
    exact = {o for n in model.graph.node if n.op_type == "Cast" for o in n.output}
    for name, (dims, data) in list(facts.folded.items()):
        if data.dtype == np.float32 and name not in exact:
            facts.folded[name] = (dims, data.astype(to))


def fit(values: list[int], points: list[Setting], label: str) -> Extent:
    """Expresses an extent, seen in several runs, by the symbols.

    Returns:
        `(c, symbols)` for a constant times symbols; one opaque symbol for anything else, whose name starts with that
        of the candidate count if it may depend on it.
    """
    if len(set(values)) == 1:
        return values[0], ()
    names = sorted(points[0].symbols)
    monomials = [(s,) for s in names] + [(CANDIDATES, s) for s in names if s != CANDIDATES]
    for syms in monomials:
        at = [prod(p.symbols[s] for s in syms) for p in points]
        if at[1] == at[0] or (values[1] - values[0]) % (at[1] - at[0]):
            continue
        a = (values[1] - values[0]) // (at[1] - at[0])
        b = values[0] - a * at[0]
        if a > 0 and all(v == a * x + b for v, x in zip(values, at, strict=True)):
            if b == 0:
                return a, tuple(sorted(syms, key=lambda s: s != CANDIDATES))
            return 1, (f"{'~'.join(sorted(syms, key=lambda s: s != CANDIDATES))}~{a}+{b}",)
    return 1, (f"{CANDIDATES}~?{label}",)


_STRUCTURAL = set(
    """Shape Size Gather Slice Concat Unsqueeze Squeeze Cast Identity Reshape Flatten Transpose Split Expand Tile
    ConstantOfShape Add Sub Mul Neg ReduceProd ReduceSum Range Where""".split()
)
_ROOTS = {"Equal": "equal", "Less": "sign", "Greater": "sign", "LessOrEqual": "sign", "GreaterOrEqual": "sign"}


def _proven(node: NodeProto, seen: Mapping[str, list[NDArray[Any]]], facts: Facts) -> bool:
    """Whether what a node does to extents at a few numbers of candidates tells what it does at all of them.

    Picking, joining, adding and multiplying gives polynomials, which a few points determine. A comparison does not
    change where the difference has no root; a quotient is a line where the divisor divides the slope.
    """
    op = node.op_type
    if facts.unproven.intersection(node.input):
        return False
    if op in ("Gather", "Slice", "Split", "Squeeze", "Unsqueeze", "Tile", "Where"):
        # Positions and conditions that change could change what is picked.
        steering = [node.input[0]] if op == "Where" else node.input[1:]
        return all(i not in facts.varying for i in steering)
    if op in _STRUCTURAL:
        return True
    lines = [_line(seen[i]) if i in facts.varying else None for i in node.input]
    if op in _ROOTS and len(node.input) == 2:
        operands = [
            line if line is not None else (0.0, np.asarray(_constant(i, seen, facts)))
            for i, line in zip(node.input, lines, strict=True)
            if line is not None or i not in facts.varying
        ]
        if len(operands) != 2 or any(o[1].dtype == object for o in operands):
            return False
        slope, start = operands[0][0] - operands[1][0], operands[0][1] - operands[1][1]
        if _ROOTS[op] == "equal":
            with np.errstate(divide="ignore", invalid="ignore"):
                root = np.where(slope == 0, -1, -start / np.where(slope == 0, 1, slope))
            return bool(np.all((root < 0) | (root != np.floor(root))))
        return bool(np.all((slope * start > 0) | (slope == 0)))
    if op in ("Div", "Mod") and len(node.input) == 2 and lines[0] is not None:
        slope, start = lines[0]
        if lines[1] is None:
            divisor = np.asarray(_constant(node.input[1], seen, facts))
            return divisor.dtype != object and bool(np.all(divisor > 0) and np.all(slope % divisor == 0))
        return bool(np.all(start == 0) and np.all(lines[1][1] == 0))
    return False


def _constant(name: str, seen: Mapping[str, list[NDArray[Any]]], facts: Facts) -> Any:
    """Data of an operand that does not vary; an object array if it is not known here."""
    return seen[name][0] if name in seen else facts.literals.get(name, np.array(None, object))


def _line(values: list[NDArray[Any]]) -> tuple[NDArray[Any], NDArray[Any]] | None:
    """Slope and start, entry by entry, of what was seen at 2, 3 and 5 candidates; None if no line."""
    if any(v.shape != values[0].shape for v in values) or values[0].dtype.kind not in "iu":
        return None
    two, three, five = (v.astype(np.int64) for v in values[:3])
    slope = three - two
    return (slope, two - 2 * slope) if (five == two + 3 * slope).all() else None


def _fold(
    values: list[NDArray[Any]], extents: tuple[Extent, ...] | None, alone: NDArray[Any] | None
) -> tuple[Dims, NDArray[Any]] | None:
    """The one row that all runs agree on, if they do."""
    first = values[0]
    if extents is None or len(extents) != first.ndim:
        extents = tuple((n, ()) for n in first.shape)
        if any(v.shape != first.shape for v in values):
            return None
    dims: list[Dim] = []
    cut: list[NDArray[Any]] = []
    for v in [*values, *([alone] if alone is not None and alone.ndim == first.ndim else [])]:
        for axis, (_, syms) in enumerate(extents):
            if syms:
                if v.shape[axis] == 0 or (v != v.take([0], axis)).any():
                    return None
                v = v.take([0], axis)
        cut.append(v)
    if any(c.shape != cut[0].shape or not _same(c, cut[0]) for c in cut[1:]):
        return None
    for c, syms in extents:
        if any("~" in s for s in syms):
            return None
        dims.append(canonical([*syms, c]) if syms else canonical([c]))
    data = cut[0]
    for axis, (c, syms) in enumerate(extents):
        if syms and c > 1:
            data = np.repeat(data, c, axis)
    return tuple(dims), data


def _same(a: NDArray[Any], b: NDArray[Any]) -> bool:
    return np.array_equal(a, b, equal_nan=a.dtype.kind == "f")


def constant_data(t: TensorProto, folder: str | os.PathLike[str] | None) -> NDArray[Any]:
    """Loads an initializer, from its external file if it has one."""
    return files.tensor_data(t, folder)
