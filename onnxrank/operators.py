"""The registry of operators: what each one is, and does to shapes, entries, levels and costs.

An entry is found by domain and operator (`find`). Where an operator has no entry, onnx's own inference for that
operator is asked for shapes; what neither knows is opaque, and whoever depends on it is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Flag, auto
from functools import cache, reduce
from math import prod
from operator import or_
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from onnxrank import extents as ex
from onnxrank import moves, transfers
from onnxrank.extents import Expr, Unproved
from onnxrank.graphs import attribute, domain, einsum_terms
from onnxrank.model import sparse_data
from onnxrank.values import Dim, Dims, Unrepresentable

if TYPE_CHECKING:
    from onnxrank.facts import Facts

Shape = tuple[int | Expr, ...]
Partial = Sequence[int | Expr | None]
"""A shape of which some extents are not known."""

UNBOUNDED = (1 << 31) - 1
"""Bounds of slices from here on mean the end of the axis."""


@dataclass(frozen=True)
class Known:
    """A tensor whose entries are constants or extents.

    Attributes:
        shape: Its shape.
        data: Its entries, with a single one along symbolic axes, which it is constant along; of type `object` where
            some of them are expressions.
        dtype: Type of the entries.
    """

    shape: Shape
    data: NDArray[Any]
    dtype: np.dtype[Any]

    @property
    def concrete(self) -> bool:
        """Whether no entry depends on an extent."""
        return self.data.dtype.kind != "O" or self.dtype.kind == "O"

    @property
    def fixed(self) -> bool:
        """Whether neither entries nor shape depend on an extent."""
        return self.concrete and all(isinstance(n, int) for n in self.shape)

    def sizes(self) -> list[int | Expr]:
        """The entries of a tensor of integers, in order.

        Raises:
            Unproved: It is constant along a symbolic axis, or does not hold integers.
        """
        if self.dtype.kind not in "iub" or any(isinstance(n, Expr) for n in self.shape):
            raise Unproved("entries that are no extents")
        return [x if isinstance(x, Expr) else int(x) for x in self.data.reshape(-1).tolist()]


def constant(data: NDArray[Any]) -> Known:
    """A tensor of constants."""
    return Known(tuple(data.shape), data, data.dtype)


def known(shape: Sequence[int | Expr], data: NDArray[Any], dtype: np.dtype[Any]) -> Known:
    """A tensor from entries of any kind; expressions that turn out to be constants become such."""
    if not isinstance(data, np.ndarray):  # numpy gives single entries for arrays without dimensions
        alone = np.empty((), object)
        alone[()] = data
        data = alone
    if data.dtype.kind != "O":
        data = data.astype(dtype, copy=False)
    elif dtype.kind != "O" and not any(isinstance(x, Expr) for x in data.reshape(-1)):
        data = data.astype(dtype)
    return Known(tuple(shape), data, dtype)


_MOST_DIMENSIONS = 64


@dataclass(frozen=True)
class Use:
    """One use of an operator: its node, and what is known of its operands.

    Attributes:
        node: The node.
        opset: Version of the node's domain.
        shapes: Shapes of the operands; None where not even the number of dimensions is known, or nothing is given.
        values: Operands computed from constants and extents.
    """

    node: NodeProto
    opset: int
    shapes: Sequence[Shape | None]
    values: Sequence[Known | None]

    def attribute(self, name: str, default: Any = None) -> Any:
        """Value of an attribute."""
        return attribute(self.node, name, default)

    def has(self, k: int) -> bool:
        """Whether the k-th input is given."""
        return k < len(self.node.input) and bool(self.node.input[k])

    def shape(self, k: int) -> Shape:
        """Shape of the k-th input.

        Raises:
            Unproved: It is not known.
        """
        found = self.shapes[k] if k < len(self.shapes) else None
        if found is None:
            raise Unproved(f"the shape of input {k}")
        return found

    def value(self, k: int) -> Known:
        """Entries of the k-th input.

        Raises:
            Unproved: They are not known.
        """
        found = self.values[k] if k < len(self.values) else None
        if found is None:
            raise Unproved(f"the entries of input {k}")
        return found

    def integers(self, k: int, attribute: str) -> list[int] | None:
        """Constants that are an attribute in old opsets and an input in new ones; None if they are not given.

        Raises:
            Unproved: They are computed from something else than constants.
        """
        given = self.attribute(attribute)
        if given is not None:
            return [int(i) for i in given] if isinstance(given, (list, tuple)) else [int(given)]
        if not self.has(k):
            return None
        found = self.value(k).sizes()
        if any(isinstance(x, Expr) for x in found):
            raise Unproved(f"input {k} varies with extents")
        return [int(x) for x in found]  # type: ignore[arg-type]

    def axis(self, default: int, rank: int) -> int:
        """The attribute `axis`, counted from the front."""
        return int(self.attribute("axis", default)) % max(rank, 1)


@dataclass(frozen=True)
class Placed(Use):
    """One use of an operator whose operands have factored shapes, as rewrites and the analysis know them.

    Attributes:
        dims: Factored shapes of the operands; None where nothing is known of one.
        facts: Proved shapes.
        data: Entries of an operand that is a constant without symbolic extents; None for others.
    """

    dims: Sequence[Dims | None] = ()
    facts: Facts | None = None
    data: Callable[[int], NDArray[Any] | None] = lambda k: None

    def dim(self, k: int) -> Dims:
        """Factored shape of the k-th input.

        Raises:
            Unrepresentable: It is not known.
        """
        found = self.dims[k] if k < len(self.dims) else None
        if found is None:
            raise Unrepresentable(f"the shape of input {k} is not known")
        return found

    def shape(self, k: int) -> Shape:
        """Shape of the k-th input.

        Raises:
            Unproved: It is not known.
        """
        found = self.dims[k] if k < len(self.dims) else None
        if found is None:
            raise Unproved(f"the shape of input {k}")
        return tuple(self.size(d) for d in found)

    def value(self, k: int) -> Known:
        """Entries of the k-th input.

        Raises:
            Unproved: It is not a constant.
        """
        found = self.array(k)
        if found is None:
            raise Unproved(f"the entries of input {k}")
        return constant(found)

    def array(self, k: int) -> NDArray[Any] | None:
        """Entries of the k-th input if it is a constant without symbolic extents."""
        return self.data(k) if self.has(k) else None

    def constants(self, k: int, attribute: str) -> list[int] | None:
        """Whole numbers that are an attribute in old opsets and an input in new ones; None if they are no constants."""
        given = self.attribute(attribute)
        if given is not None:
            return [int(i) for i in given]
        found = self.array(k)
        return None if found is None else [int(i) for i in found.reshape(-1)]

    def entries(self, k: int) -> list[int | Expr] | None:
        """Whole numbers that are constants or made of extents; None where they are not known."""
        assert self.facts is not None
        found = self.array(k)
        return self.facts.entries.get(self.node.input[k]) if found is None else [int(i) for i in found.reshape(-1)]

    @property
    def targets(self) -> list[Sequence[moves.Extent] | None]:
        """Proved extents of the outputs; None where not even the number of dimensions is."""
        assert self.facts is not None
        return [self.facts.extents.get(o) for o in self.node.output]

    def target(self, k: int) -> Sequence[moves.Extent]:
        """Proved extents of an output.

        Raises:
            Unrepresentable: Not even the number of dimensions is proved.
        """
        found = self.targets[k]
        if found is None:
            raise Unrepresentable(f"the shape of {self.node.output[k]} is not known")
        return found

    def sizes(self, k: int) -> Shape:
        """Proved extents of an output as expressions."""
        assert self.facts is not None
        return self.facts.sizes[self.node.output[k]]

    def known(self, k: int) -> Dims:
        """An output's shape with each extent as one factor."""
        self.target(k)
        assert self.facts is not None
        found = self.facts.dims(self.node.output[k])
        assert found is not None
        return found

    def size(self, dim: Dim) -> int | Expr:
        """A factored extent as an expression."""
        assert self.facts is not None
        return self.facts.size_of(dim)


@dataclass(frozen=True)
class Flow(Placed):
    """One use of an operator in the analysis: what is known of its operands, entry by entry.

    Attributes:
        entry: The operator.
        level: Levels of an operand, in the shape of its constant extents.
        zero: Entries of an operand that are 0 for sure; None where none is known to be.
        hidden: Of a Softmax along an axis, the scores that a mask hides for sure from rows that have others; None if
            there are none.
    """

    entry: Operator = field(default_factory=lambda: Operator())
    level: Callable[[int], NDArray[np.int8]] = lambda k: np.zeros((), np.int8)
    zero: Callable[[int], NDArray[np.bool_] | None] = lambda k: None
    hidden: Callable[[int], NDArray[np.bool_] | None] = lambda axis: None

    def core(self) -> Sequence[int] | None:
        """The axes of the first operand that are taken in together; None where they are computed."""
        if self.entry.axes is None:
            return None
        try:
            return self.entry.axes(self)
        except Unproved:
            return None


Shaper = Callable[[Use], "list[Partial | None]"]
Valuer = Callable[[Use], "list[Known | None]"]


class Trait(Flag):
    """What an operator is; whoever has to know asks the registry, never the operator's name."""

    NONE = 0
    ELEMENTWISE = auto()
    """An entry of the result is computed from the entries in its place, operands broadcast as numpy does."""
    MOVEMENT = auto()
    """Results hold entries of the operands in other places, and nothing else."""
    FREE = auto()
    """Entries stay in their order, or are constants, so that nothing is done at run time."""
    RESHAPE = auto()
    """Movement that gives entries another shape and leaves them in their order."""
    PICK = auto()
    """Movement or look-up that copies some entries of one tensor, or of several, side by side."""
    LOOKUP = auto()
    """Entries of the first operand at positions that the second one holds."""
    PRODUCT = auto()
    """A sum of products, which counts as multiply-adds."""
    MATRIX = auto()
    """A product of two matrices, or stacks of them, the first of which is the first input."""
    LINEAR = auto()
    """A product that is linear in its first operand, where the others are constants."""
    RECURRENT = auto()
    """Steps along a sequence, with products in each."""
    REDUCTION = auto()
    """Entries along some axes are taken in together: sums, extrema, pools, running sums."""
    NORMALISATION = auto()
    """The shape stays, and every entry depends on all those along some axes."""
    COMMUTATIVE = auto()
    """An elementwise operator of two operands whose order does not matter."""
    FUNCTION = auto()
    """An elementwise function that takes a runtime longer than arithmetic does."""
    ROWS = auto()
    """A normalisation whose time goes by rows."""
    EXTENTS = auto()
    """Reads the shape of its operand, not its entries."""
    RANDOM = auto()
    """Two runs may give different results."""
    IMAGES = auto()
    """Rows lie along the first axis, and everything behind it is taken in together."""
    CAST = auto()
    """Entries in another type."""
    BOOLEAN = auto()
    """Gives conditions."""
    COMPARISON = auto()
    """Conditions on which of two numbers is the greater."""
    SEQUENCE = auto()
    """Gives sequences, maps or optionals, which have no shape."""


@dataclass(frozen=True)
class Operator:
    """What is known of an operator.

    Attributes:
        shape: Shapes of its outputs; None asks onnx's own inference.
        value: Its outputs where all operands are constants or extents.
        like: Input whose element type its outputs have, where onnx has no schema of it.
        traits: What it is.
        move: What it moves where, if it only moves entries.
        axes: The axes of its first operand that it takes in together, for reductions and normalisations.
        levels: Levels of its results, where they do not follow from the traits.
        factors: Of a product, the inputs that are multiplied; its weights may also be in attributes.
        macs: Multiply-adds of its products, from the shapes of its operands and of its first output.
    """

    shape: Shaper | None = None
    value: Valuer | None = None
    like: int = 0
    traits: Trait = Trait.NONE
    move: moves.Mover | None = None
    axes: Callable[[Use], Sequence[int]] | None = None
    levels: transfers.Transfer | None = None
    factors: tuple[int, ...] = (0, 1)
    macs: Callable[[NodeProto, Sequence[tuple[int, ...] | None], tuple[int, ...] | None], int] | None = None

    @property
    def random(self) -> bool:
        """Whether two runs may give different results."""
        return Trait.RANDOM in self.traits


# --- broadcasting ----------------------------------------------------------------------------------------------------


def broadcast(shapes: Sequence[Shape]) -> list[int | Expr | None]:
    """Numpy's broadcasting; None for an extent that depends on which symbols are 1."""
    rank = max((len(s) for s in shapes), default=0)
    out: list[int | Expr | None] = []
    for k in range(rank):
        found = {s[k - rank + len(s)] for s in shapes if k >= rank - len(s)} - {1}
        found -= {n for n in found if any(ex.is_cut_of(n, other) for other in found)}
        out.append(1 if not found else next(iter(found)) if len(found) == 1 else None)
    return out


def _elementwise(u: Use) -> list[Partial | None]:
    return [broadcast([u.shape(k) for k in range(len(u.node.input)) if u.has(k)])]


def _same(u: Use) -> list[Partial | None]:
    return [u.shape(0)]


def _whole(partial: Partial) -> Shape:
    """A shape all of whose extents are known.

    Raises:
        Unproved: One is not.
    """
    out: list[int | Expr] = []
    for n in partial:
        if n is None:
            raise Unproved("an extent")
        out.append(n)
    return tuple(out)


def _objects(data: NDArray[Any]) -> NDArray[Any]:
    return data if data.dtype.kind == "O" else data.astype(object)


def _entrywise(do: Callable[..., Any], fixed: Callable[..., Any] | None = None, to: Any = None) -> Valuer:
    """Entries of an elementwise operator.

    Args:
        do: The operator on Python integers and expressions.
        fixed: The operator on arrays of constants; None for `do` entry by entry.
        to: Type of the result; None for that of the operands.
    """

    def value(u: Use) -> list[Known | None]:
        operands = [u.value(k) for k in range(len(u.node.input)) if u.has(k)]
        shape = _whole(broadcast([o.shape for o in operands]))
        dtype = np.dtype(to) if to is not None else operands[-1].dtype
        if all(o.concrete for o in operands) and fixed is not None:
            with np.errstate(all="ignore"):
                return [known(shape, np.asarray(fixed(*(o.data for o in operands))), dtype)]
        if any(o.dtype.kind not in "iub" for o in operands):
            raise Unproved("numbers that are no extents")
        arrays = np.broadcast_arrays(*(_objects(o.data) for o in operands))
        out = np.empty(arrays[0].shape, object)
        for at in np.ndindex(out.shape):
            out[at] = do(*(a[at] for a in arrays))
        return [known(shape, out, dtype)]

    return value


def _quotient(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
    if a.dtype.kind in "iu":
        if not np.all(b):
            raise Unproved("a division by 0")
        found = np.abs(a) // np.abs(b)
        return np.asarray(np.where((a < 0) != (b < 0), -found, found))
    with np.errstate(all="ignore"):
        return np.asarray(a / b)


def _quotient_of(a: int | Expr, b: int | Expr) -> int | Expr:
    if ex.bounds(a)[0] < 0:
        raise Unproved(f"({a}) / ({b})")  # rounds towards 0 there, not down
    return ex.floor_divide(a, b)


def _remainder(u: Use) -> list[Known | None]:
    if u.attribute("fmod", 0):
        raise Unproved("fmod")
    return _entrywise(ex.modulo, np.mod)(u)


def _compare(low: float, high: float) -> Callable[[Any, Any], bool]:
    """Whether a difference lies in a range of whole numbers, decided for all values of the symbols."""

    def compare(a: int | Expr, b: int | Expr) -> bool:
        least, most = ex.bounds(a - b)
        if low <= least and most <= high:
            return True
        if most < low or least > high:
            return False
        raise Unproved(f"({a}) against ({b})")

    return compare


def _where(u: Use) -> list[Known | None]:
    condition, a, b = u.value(0), u.value(1), u.value(2)
    if not condition.concrete:
        raise Unproved("a condition on extents")
    shape = _whole(broadcast([condition.shape, a.shape, b.shape]))
    if a.concrete and b.concrete:
        return [known(shape, np.where(condition.data, a.data, b.data), a.dtype)]
    return [known(shape, np.where(condition.data, _objects(a.data), _objects(b.data)), a.dtype)]


def _cast(u: Use) -> list[Known | None]:
    x = u.value(0)
    to = helper.tensor_dtype_to_np_dtype(int(u.attribute("to")))
    if x.concrete:
        if x.dtype.kind == "f" and to.kind in "iu" and not np.isfinite(x.data).all():
            raise Unproved("a number that no integer is")
        with np.errstate(all="ignore"):
            return [Known(x.shape, x.data.astype(to), to)]
    if to.kind not in "iu" or to.itemsize < 4:
        raise Unproved("an extent as a number of another type")
    return [Known(x.shape, x.data, to)]


# --- movement --------------------------------------------------------------------------------------------------------


def _moved(shape: Shaper, move: Callable[[Use, NDArray[Any], Shape], NDArray[Any]]) -> Valuer:
    """Entries of an operator that puts those of its first input elsewhere."""

    def value(u: Use) -> list[Known | None]:
        x = u.value(0)
        found = shape(u)[0]
        if found is None:
            raise Unproved("the number of dimensions")
        out = _whole(found)
        return [known(out, move(u, x.data, out), x.dtype)]

    return value


def _kept(shape: Shape) -> tuple[int, ...]:
    """Shape of an array that holds one entry along symbolic axes."""
    return tuple(1 if isinstance(n, Expr) else n for n in shape)


def _as_shape(u: Use, data: NDArray[Any], shape: Shape) -> NDArray[Any]:
    """Entries in another shape: symbolic axes stay where they are, between as many entries as before."""
    if data.size == 1:
        return np.broadcast_to(data.reshape(()), _kept(shape))
    if _segments(u.shape(0)) != _segments(shape):
        raise Unproved("entries move along a symbolic axis")
    return data.reshape(_kept(shape))


def _segments(shape: Shape) -> list[int | Expr]:
    """The symbolic extents of a shape in order, and the number of entries between them."""
    out: list[int | Expr] = [1]
    for n in shape:
        if isinstance(n, Expr):
            out += [n, 1]
        else:
            out[-1] = out[-1] * n
    return out


def _shape_of(u: Use) -> list[Partial | None]:
    rank = len(u.shape(0))
    return [[len(range(rank)[slice(u.attribute("start", 0), u.attribute("end", rank))])]]


def _shape_entries(u: Use) -> list[Known | None]:
    shape = u.shape(0)
    wanted = shape[slice(u.attribute("start", 0), u.attribute("end", len(shape)))]
    out = np.empty(len(wanted), object)
    out[:] = wanted
    return [known((len(wanted),), out, np.dtype(np.int64))]


def _size_entries(u: Use) -> list[Known | None]:
    out = np.empty((), object)
    out[()] = ex.product(u.shape(0))
    return [known((), out, np.dtype(np.int64))]


def _unknown(count: int) -> Partial:
    """So many extents that are not known, as far as a tensor of a damaged model can have them."""
    if count > _MOST_DIMENSIONS:
        raise Unproved(f"{count} dimensions")
    return [None] * count


def _reshape(u: Use) -> list[Partial | None]:
    have = u.shape(0)
    rank = u.shape(1)
    if len(rank) != 1 or isinstance(rank[0], Expr):
        return [None]
    found = u.values[1] if len(u.values) > 1 else None
    if found is None:
        return [_unknown(rank[0])]
    target: list[int | Expr | None] = list(found.sizes())
    whole = bool(u.attribute("allowzero", 0))
    unknown = [k for k, n in enumerate(target) if not isinstance(n, Expr) and n == -1]
    for k, n in enumerate(target):
        if isinstance(n, Expr):
            if ex.bounds(n)[0] < 0:
                target[k] = None
        elif n == 0 and not whole:
            target[k] = have[k] if k < len(have) else None
    if len(unknown) == 1:
        (at,) = unknown
        rest = [n for k, n in enumerate(target) if k != at]
        if any(n is None for n in rest):
            target[at] = None
        else:
            target[at] = ex.divide(ex.product(have), ex.product(_whole(rest)))
    return [target]


def _flatten(u: Use) -> list[Partial | None]:
    have = u.shape(0)
    axis = int(u.attribute("axis", 1))
    axis = axis + len(have) if axis < 0 else axis
    return [[ex.product(have[:axis]), ex.product(have[axis:])]]


def _squeeze(u: Use) -> list[Partial | None]:
    have = u.shape(0)
    axes = u.integers(1, "axes")
    if axes is None:
        if any(isinstance(n, Expr) and _may_be_one(n) for n in have):
            raise Unproved("without axes it drops every axis of 1, which the candidates' may be")
        return [[n for n in have if n != 1]]
    gone = {a % len(have) for a in axes}
    return [[n for k, n in enumerate(have) if k not in gone]]


def _may_be_one(n: Expr) -> bool:
    low, high = ex.bounds(n)
    return low <= 1 <= high


def _unsqueeze(u: Use) -> list[Partial | None]:
    have = u.shape(0)
    axes = u.integers(1, "axes") or []
    rank = len(have) + len(axes)
    new = {a % rank for a in axes}
    old = iter(have)
    return [[1 if k in new else next(old) for k in range(rank)]]


def _perm(u: Use) -> list[int]:
    rank = len(u.shape(0))
    return [int(p) for p in u.attribute("perm", list(range(rank))[::-1])]


def _transpose(u: Use) -> list[Partial | None]:
    return [[u.shape(0)[p] for p in _perm(u)]]


def _slices(u: Use) -> list[tuple[int, int | Expr | None, int | Expr | None, int]]:
    """Axis, start, end and step per axis that is cut; None for bounds that are not known."""
    rank = len(u.shape(0))
    if u.opset < 10:
        starts, ends = list(u.attribute("starts")), list(u.attribute("ends"))
        axes: list[Any] = list(u.attribute("axes", range(len(starts))))
        return [(int(a) % rank, int(s), int(e), 1) for a, s, e in zip(axes, starts, ends, strict=True)]

    def entries(k: int) -> list[int | Expr] | None:
        found = u.values[k] if k < len(u.values) else None
        return None if found is None else found.sizes()

    starts_, ends_ = entries(1), entries(2)
    given = entries(3) if u.has(3) else None
    if u.has(3) and given is None:
        raise Unproved("the axes")
    steps = entries(4) if u.has(4) else None
    if u.has(4) and (steps is None or any(isinstance(s, Expr) for s in steps)):
        raise Unproved("the steps")
    count = next((len(x) for x in (given, starts_, ends_) if x is not None), None)
    if count is None:
        length = u.shape(1)[0]
        if isinstance(length, Expr):
            raise Unproved("the axes")
        count = length
    out = []
    for k in range(count):
        axis = given[k] if given is not None else k
        assert isinstance(axis, int)
        step = steps[k] if steps is not None else 1
        assert isinstance(step, int)
        start = starts_[k] if starts_ is not None else None
        out.append((axis % rank, start, ends_[k] if ends_ is not None else None, step))
    return out


def _slice(u: Use) -> list[Partial | None]:
    out: list[int | Expr | None] = list(u.shape(0))
    try:
        cuts = _slices(u)
    except Unproved:
        return [[None] * len(out)]
    for axis, start, end, step in cuts:
        n = out[axis]
        assert n is not None
        out[axis] = None if start is None or end is None else sliced(n, start, end, step)
    return [out]


def sliced(n: int | Expr, start: int | Expr, end: int | Expr, step: int) -> int | Expr | None:
    """Extent of a slice of an axis of `n` entries; None if it cannot be told."""
    if isinstance(n, int) and isinstance(start, int) and isinstance(end, int):
        whole = slice(start, None if step < 0 and end < -n - 1 else end, step)
        return len(range(n)[whole])
    if step < 0:
        whole_axis = start in (-1,) or (isinstance(start, int) and start >= UNBOUNDED)
        return n if step == -1 and whole_axis and isinstance(end, int) and end <= -UNBOUNDED else None
    first, last = _position(start, n), _position(end, n)
    if first is None or last is None:
        return None
    if last == n and isinstance(start, int):
        count = ex.maximum(n - start, 0) if start >= 0 else ex.minimum(n, -start)
    else:
        count = ex.maximum(last - first, 0)
    return count if step == 1 else ex.ceil_divide(count, step)


def _position(at: int | Expr, n: int | Expr) -> int | Expr | None:
    """A bound of a slice, brought between 0 and `n`."""
    if isinstance(at, int) and at >= UNBOUNDED:
        return n
    if isinstance(at, int) and at <= -UNBOUNDED:
        return 0
    low, high = ex.bounds(at)
    if low >= 0:
        return ex.minimum(at, n)
    if high < 0:
        return ex.maximum(n + at, 0)
    return None


def _slice_entries(u: Use, data: NDArray[Any], shape: Shape) -> NDArray[Any]:
    have = u.shape(0)
    index: list[slice] = [slice(None)] * len(have)
    for axis, start, end, step in _slices(u):
        if isinstance(have[axis], Expr):
            continue  # constant along it
        if not isinstance(start, int) or not isinstance(end, int):
            raise Unproved("the bounds")
        index[axis] = slice(start, None if step < 0 and end < -(1 << 30) else end, step)
    return data[tuple(index)].reshape(_kept(shape))


def _split(u: Use) -> list[Partial | None]:
    have = u.shape(0)
    axis = u.axis(0, len(have))
    count = len(u.node.output)
    sizes: list[int | Expr] | None
    given = u.attribute("split")
    if given is not None:
        sizes = [int(n) for n in given]
    elif u.has(1):
        found = u.values[1]
        sizes = None if found is None else found.sizes()
        if sizes is None:
            return [[*have[:axis], None, *have[axis + 1 :]]] * count
    else:
        n = have[axis]
        if isinstance(n, int):
            each = -(-n // count)
            sizes = [min(each, n - k * each) for k in range(count)]
        else:
            part = ex.divide(n, count)
            if part is None:
                return [[*have[:axis], None, *have[axis + 1 :]]] * count
            sizes = [part] * count
    return [[*have[:axis], n, *have[axis + 1 :]] for n in sizes]


def _split_entries(u: Use) -> list[Known | None]:
    x, out = u.value(0), []
    axis, at = u.axis(0, len(u.shape(0))), 0
    for found in _split(u):
        assert found is not None
        shape = _whole(found)
        n = shape[axis]
        if isinstance(n, Expr):
            raise Unproved("parts of a symbolic axis")
        out.append(known(shape, x.data.take(range(at, at + n), axis), x.dtype))
        at += n
    return list(out)


def _concat(u: Use) -> list[Partial | None]:
    shapes = [u.shape(k) for k in range(len(u.node.input))]
    axis = u.axis(0, len(shapes[0]))
    if any(len(s) != len(shapes[0]) for s in shapes):
        return [None]
    out: list[int | Expr | None] = []
    for k in range(len(shapes[0])):
        found = {s[k] for s in shapes}
        if k == axis:
            total: int | Expr = 0
            for s in shapes:
                total = total + s[k]
            out.append(total)
        elif len(found) == 1:
            out.append(found.pop())
        else:
            # They are equal wherever the model runs.
            fixed = [n for n in found if isinstance(n, int)]
            out.append(fixed[0] if len(fixed) == 1 else None)
    return [out]


def _concat_entries(u: Use) -> list[Known | None]:
    operands = [u.value(k) for k in range(len(u.node.input))]
    (found,) = _concat(u)
    assert found is not None
    shape = _whole(found)
    axis = u.axis(0, len(shape))
    if isinstance(shape[axis], Expr):
        raise Unproved("a symbolic axis")
    if all(o.concrete for o in operands):
        return [known(shape, np.concatenate([o.data for o in operands], axis), operands[0].dtype)]
    return [known(shape, np.concatenate([_objects(o.data) for o in operands], axis), operands[0].dtype)]


def _gather(u: Use) -> list[Partial | None]:
    have, ids = u.shape(0), u.shape(1)
    axis = u.axis(0, len(have))
    return [[*have[:axis], *ids, *have[axis + 1 :]]]


def _gather_entries(u: Use) -> list[Known | None]:
    x, ids = u.value(0), u.value(1)
    (found,) = _gather(u)
    assert found is not None
    shape = _whole(found)
    axis = u.axis(0, len(x.shape))
    n = x.shape[axis]
    if not ids.concrete or isinstance(n, Expr):
        raise Unproved("positions on a symbolic axis")
    at = np.where(ids.data < 0, ids.data + n, ids.data)
    if at.size and (at.min() < 0 or at.max() >= n):
        raise Unproved("a position outside")
    return [known(shape, np.take(x.data, at.astype(np.int64), axis), x.dtype)]


def _gather_nd(u: Use) -> list[Partial | None]:
    have, ids = u.shape(0), u.shape(1)
    if isinstance(ids[-1], Expr):
        return [None]
    batch = int(u.attribute("batch_dims", 0))
    return [[*ids[:-1], *have[batch + ids[-1] :]]]


def _expand(u: Use) -> list[Partial | None]:
    have, length = u.shape(0), u.shape(1)
    if isinstance(length[0], Expr):
        return [None]
    found = u.values[1]
    if found is None:
        return [_unknown(max(len(have), length[0]))]
    return [broadcast([have, tuple(found.sizes())])]


def _expand_entries(u: Use, data: NDArray[Any], shape: Shape) -> NDArray[Any]:
    goal = _kept(shape)
    # One entry is held along symbolic axes, also where the tensor had all of a constant one: that is no broadcast.
    return np.broadcast_to(data, goal)


def _tile(u: Use) -> list[Partial | None]:
    have = u.shape(0)
    found = u.values[1]
    if found is None:
        return [[None] * len(have)]
    return [[n * r for n, r in zip(have, found.sizes(), strict=True)]]


def _tile_entries(u: Use, data: NDArray[Any], shape: Shape) -> NDArray[Any]:
    repeats = [1 if isinstance(n, Expr) else n // max(1, k) for n, k in zip(shape, data.shape, strict=True)]
    if any(isinstance(n, Expr) and k > 1 for n, k in zip(shape, data.shape, strict=True)):
        raise Unproved("entries that repeat a symbolic number of times")
    return np.tile(data, repeats)


def _constant_of_shape(u: Use) -> list[Partial | None]:
    length = u.shape(0)
    found = u.values[0]
    if isinstance(length[0], Expr):
        return [None]
    return [_unknown(length[0]) if found is None else list(found.sizes())]


def _constant_of_shape_entries(u: Use) -> list[Known | None]:
    given = u.attribute("value")
    data = np.zeros(1, np.float32) if given is None else numpy_helper.to_array(given)
    shape = tuple(u.value(0).sizes())
    kept = _kept(shape)
    if prod(kept) > 1 << 22:
        raise Unproved("a large constant")
    return [known(shape, np.full(kept, data.reshape(-1)[0]), data.dtype)]


def _range(u: Use) -> list[Partial | None]:
    start, limit, step = (u.values[k] for k in range(3))
    if start is None or limit is None or step is None or not step.concrete or step.dtype.kind not in "iu":
        if (
            start is not None
            and limit is not None
            and step is not None
            and all(v.concrete for v in (start, limit, step))
        ):
            return [[len(np.arange(start.data.item(), limit.data.item(), step.data.item()))]]
        return [[None]]
    (first,), (last,), delta = start.sizes(), limit.sizes(), int(step.data.item())
    if delta == 0:
        return [[None]]
    span = last - first if delta > 0 else first - last
    return [[ex.maximum(ex.ceil_divide(span, abs(delta)), 0)]]


def _range_entries(u: Use) -> list[Known | None]:
    (found,) = _range(u)
    assert found is not None
    (count,) = _whole(found)
    if isinstance(count, Expr) or count > 1 << 22:
        raise Unproved("a symbolic number of entries")
    start, step = u.value(0), u.value(2)
    data = np.arange(count)
    if start.concrete and step.concrete:
        return [known((count,), (start.data + data * step.data).astype(start.dtype), start.dtype)]
    raise Unproved("a symbolic start")


def _pad(u: Use) -> list[Partial | None]:
    have = u.shape(0)
    given = u.attribute("pads")
    if given is not None:
        pads: list[int | Expr] = [int(p) for p in given]
    else:
        found = u.values[1] if len(u.values) > 1 else None
        if found is None:
            return [[None] * len(have)]
        pads = found.sizes()
    axes = [a % len(have) for a in u.integers(3, "axes") or []] if u.has(3) else list(range(len(have)))
    out: list[int | Expr | None] = list(have)
    for k, axis in enumerate(axes):
        out[axis] = have[axis] + pads[k] + pads[k + len(axes)]
    return [out]


def _top_k(u: Use) -> list[Partial | None]:
    have = list(u.shape(0))
    axis = u.axis(-1, len(have))
    k: int | Expr | None = u.attribute("k")
    if k is None:
        found = u.values[1]
        (k,) = found.sizes() if found is not None else (None,)
    out: list[int | Expr | None] = [*have[:axis], k, *have[axis + 1 :]]
    return [out, out]


# --- the rest --------------------------------------------------------------------------------------------------------


def _mat_mul(u: Use) -> list[Partial | None]:
    a, b = u.shape(0), u.shape(1)
    if not a or not b:
        return [None]
    rows, columns = a[-2:-1], b[-1:] if len(b) > 1 else ()
    return [[*broadcast([a[:-2], b[:-2]]), *rows, *columns]]


def matmul_order(node: NodeProto, k: int, rank: int) -> list[int]:
    """The order in which FusedMatMul takes the axes of its k-th operand.

    `transBatch` moves the first axis behind the batch's, `trans` turns the last two of what that gives.
    """
    given = {a.name: a.i for a in node.attribute}
    moved = given.get(f"transBatch{'AB'[k]}", 0) and rank > 2
    front = range(1, rank - 1) if moved else range(rank - 2)
    ends = [0 if moved else rank - 2, rank - 1]
    return [*front, *(ends[::-1] if given.get(f"trans{'AB'[k]}", 0) else ends)]


def _fused_mat_mul(u: Use) -> list[Partial | None]:
    a, b = u.shape(0), u.shape(1)
    if len(a) < 2 or len(b) < 2:
        return [None]
    a, b = (tuple(x[p] for p in matmul_order(u.node, k, len(x))) for k, x in enumerate((a, b)))
    return [[*broadcast([a[:-2], b[:-2]]), a[-2], b[-1]]]


def _gemm(u: Use) -> list[Partial | None]:
    a, b = u.shape(0), u.shape(1)
    return [[a[-1] if u.attribute("transA", 0) else a[0], b[0] if u.attribute("transB", 0) else b[-1]]]


def _quantised(shape: Shaper, first: int = 0) -> Shaper:
    """An operator each of whose operands is followed by its scale and its zero point.

    Args:
        shape: That of the operator on real numbers.
        first: Place of the first operand.
    """

    def shaped(u: Use) -> list[Partial | None]:
        node = NodeProto(op_type=u.node.op_type, input=u.node.input[first::3], attribute=u.node.attribute)
        return shape(replace(u, node=node, shapes=u.shapes[first::3], values=[None] * len(node.input)))

    return shaped


def _reduced_axes(since: int) -> Callable[[Use], list[int]]:
    """The axes of a reduction, which are an input from an opset on."""

    def axes(u: Use) -> list[int]:
        rank = len(u.shape(0))
        given = u.integers(1, "axes") if u.opset >= since else u.attribute("axes")
        if not given:
            return [] if u.attribute("noop_with_empty_axes", 0) else list(range(rank))
        return sorted({int(a) % rank for a in given})

    return axes


def _reduction(since: int) -> Shaper:
    """A reduction whose axes are an input from an opset on."""
    axes = _reduced_axes(since)

    def shape(u: Use) -> list[Partial | None]:
        gone, have, keep = axes(u), u.shape(0), bool(u.attribute("keepdims", 1))
        return [[1 if k in gone else n for k, n in enumerate(have) if keep or k not in gone]]

    return shape


def _reduced(since: int, do: Callable[[Any, Any], Any]) -> Valuer:
    """Entries of a reduction of integers."""
    shaper = _reduction(since)

    def value(u: Use) -> list[Known | None]:
        x = u.value(0)
        (found,) = shaper(u)
        assert found is not None
        shape = _whole(found)
        if x.dtype.kind not in "iu":
            raise Unproved("numbers that are no extents")
        gone = set(_reduced_axes(since)(u))
        if not gone and u.attribute("noop_with_empty_axes", 0):
            return [x]
        if any(isinstance(x.shape[a], Expr) for a in gone):
            raise Unproved("a symbolic axis")
        order = [k for k in range(x.data.ndim) if k not in gone] + sorted(gone)
        lines = _objects(x.data).transpose(order).reshape([x.data.shape[k] for k in order if k not in gone] + [-1])
        out = np.empty(lines.shape[:-1], object)
        for at in np.ndindex(out.shape):
            total = lines[at][0] if len(lines[at]) else None
            if total is None:
                raise Unproved("no entries")
            for other in lines[at][1:]:
                total = do(total, other)
            out[at] = total
        return [known(shape, out.reshape(_kept(shape)), x.dtype)]

    return value


def _arg_reduction(u: Use) -> list[Partial | None]:
    have = u.shape(0)
    axis = u.axis(0, len(have))
    keep = bool(u.attribute("keepdims", 1))
    return [[1 if k == axis else n for k, n in enumerate(have) if keep or k != axis]]


def _layer_normalization(u: Use) -> list[Partial | None]:
    have = u.shape(0)
    axis = u.axis(-1, len(have))
    moments = [1 if k >= axis else n for k, n in enumerate(have)]
    return [have, moments, moments]


def _einsum(u: Use) -> list[Partial | None]:
    shapes = [u.shape(k) for k in range(len(u.node.input))]
    terms, out = einsum_terms(u.attribute("equation"), [len(s) for s in shapes])
    sizes: dict[str, int | Expr | None] = {}
    for term, shape in zip(terms, shapes, strict=True):
        for letter, n in zip(term, shape, strict=True):
            have = sizes.get(letter, 1)
            sizes[letter] = n if have == 1 else have if n in (1, have) else None
    return [[sizes[c] for c in out]]


def _one_hot(u: Use) -> list[Partial | None]:
    have = list(u.shape(0))
    axis = int(u.attribute("axis", -1))
    axis = axis + len(have) + 1 if axis < 0 else axis
    found = u.values[1]
    depth = found.sizes()[0] if found is not None and found.dtype.kind in "iu" else None
    return [[*have[:axis], depth, *have[axis:]]]


def _non_zero(u: Use) -> list[Partial | None]:
    return [[len(u.shape(0)) or 1, None]]


def _recurrent(u: Use) -> list[Partial | None]:
    steps, batch, _ = u.shape(0)
    directions = u.shape(1)[0]
    hidden = u.shape(2)[-1]
    if u.attribute("layout", 0):
        steps, batch = batch, steps
        return [[batch, steps, directions, hidden], [batch, directions, hidden], [batch, directions, hidden]]
    return [[steps, directions, batch, hidden], [directions, batch, hidden], [directions, batch, hidden]]


def _same_as(*positions: int) -> Shaper:
    """Outputs with the shapes of inputs."""
    return lambda u: [u.shape(k) for k in positions]


def _fixed_only(do: Callable[..., Any]) -> Valuer:
    """Entries of an operator on constants alone, which numpy computes to the last bit as any runtime does."""

    def value(u: Use) -> list[Known | None]:
        operands = [u.value(k) for k in range(len(u.node.input)) if u.has(k)]
        if not all(o.concrete for o in operands):
            raise Unproved("an operator on extents")
        shape = _whole(broadcast([o.shape for o in operands]))
        with np.errstate(all="ignore"):
            data = np.asarray(do(*(o.data for o in operands)))
        return [Known(shape, data, data.dtype)]

    return value


def _constant_entries(u: Use) -> list[Known | None]:
    (attribute,) = u.node.attribute
    if attribute.name == "value":
        return [constant(numpy_helper.to_array(attribute.t))]
    if attribute.name == "sparse_value":
        return [constant(sparse_data(attribute.sparse_tensor))]
    found = helper.get_attribute_value(attribute)
    kinds = {"f": np.float32, "i": np.int64, "s": object}
    kind = kinds[attribute.name.removeprefix("value_")[0]]
    if kind is object:
        found = [s.decode() for s in found] if isinstance(found, list) else found.decode()
    return [constant(np.array(found, kind))]


def _attention(u: Use) -> list[Partial | None]:
    """Onnxruntime's attention with its projections packed: `[batch, length, width] x [width, q + k + v]`."""
    batch, length, _ = u.shape(0)
    sizes = u.attribute("qkv_hidden_sizes")
    return [[batch, length, int(sizes[2]) if sizes else ex.divide(u.shape(1)[-1], 3)], None]


def _multi_head_attention(u: Use) -> list[Partial | None]:
    """Onnxruntime's attention behind projections; keys and values may be packed with the queries."""
    query = u.shape(0)
    if len(query) != 3 or not u.has(2) or len(u.shape(2)) != 3:
        return [[*query[:2], None]]
    return [[*query[:2], u.shape(2)[2]], None, None]


def _matrix_diagonal(u: Use) -> list[Known | None]:
    x = u.value(0)
    if not x.fixed or len(x.shape) < 2:
        raise Unproved("a triangle of extents")
    k = 0
    if u.has(1):
        (k,) = u.integers(1, "k") or (0,)
    return [constant(np.triu(x.data, k) if u.attribute("upper", 1) else np.tril(x.data, k))]


def _non_zero_entries(u: Use) -> list[Known | None]:
    x = u.value(0)
    if not x.fixed:
        raise Unproved("positions along a symbolic axis")
    return [constant(np.array(np.nonzero(np.atleast_1d(x.data)), np.int64))]


def _cum_sum_entries(u: Use) -> list[Known | None]:
    x, axis = u.value(0), u.value(1)
    if not x.fixed or not axis.fixed or u.attribute("exclusive", 0) or u.attribute("reverse", 0):
        raise Unproved("a sum of extents")
    return [constant(np.cumsum(x.data, int(axis.data), dtype=x.dtype))]


_SAME = """CastLike Clip Softmax LogSoftmax Hardmax LpNormalization BatchNormalization InstanceNormalization
    GroupNormalization MeanVarianceNormalization LRN CumSum Trilu QuantizeLinear DequantizeLinear RMSNormalization
    ScatterND ScatterElements Scatter ReverseSequence EyeLike RandomNormalLike RandomUniformLike Bernoulli""".split()
"""Operators whose result has their first operand's shape."""
_REDUCTIONS = """ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd
    ReduceSumSquare""".split()


def _registry() -> dict[tuple[str, str], Operator]:
    """All entries."""
    own = {op: Operator(_elementwise) for op in _TRAITS[Trait.ELEMENTWISE].split() if "::" not in op}
    own |= {op: Operator(_same) for op in _SAME}
    own |= {op: Operator(_reduction(18)) for op in _REDUCTIONS}
    boolean = np.dtype(bool)
    inf = float("inf")
    own |= {
        "Add": Operator(_elementwise, _entrywise(lambda a, b: a + b, np.add)),
        "Sub": Operator(_elementwise, _entrywise(lambda a, b: a - b, np.subtract)),
        "Mul": Operator(_elementwise, _entrywise(lambda a, b: a * b, np.multiply)),
        "Div": Operator(_elementwise, _entrywise(_quotient_of, _quotient)),
        "Mod": Operator(_elementwise, _remainder),
        "Neg": Operator(_same, _entrywise(lambda a: -a, np.negative)),
        "Abs": Operator(_same, _entrywise(_absolute, np.abs)),
        "Sqrt": Operator(_same, _fixed_only(np.sqrt)),
        "Reciprocal": Operator(_same, _fixed_only(lambda a: a.dtype.type(1) / a)),
        "Floor": Operator(_same, _fixed_only(np.floor)),
        "Ceil": Operator(_same, _fixed_only(np.ceil)),
        "Sign": Operator(_same, _fixed_only(np.sign)),
        "Relu": Operator(_same, _fixed_only(lambda a: np.maximum(a, 0).astype(a.dtype))),
        "Min": Operator(_elementwise, _entrywise(_fold(ex.minimum), _ordered(np.minimum))),
        "Max": Operator(_elementwise, _entrywise(_fold(ex.maximum), _ordered(np.maximum))),
        "Equal": Operator(_elementwise, _entrywise(_compare(0, 0), np.equal, boolean)),
        "Less": Operator(_elementwise, _entrywise(_compare(-inf, -1), np.less, boolean)),
        "LessOrEqual": Operator(_elementwise, _entrywise(_compare(-inf, 0), np.less_equal, boolean)),
        "Greater": Operator(_elementwise, _entrywise(_compare(1, inf), np.greater, boolean)),
        "GreaterOrEqual": Operator(_elementwise, _entrywise(_compare(0, inf), np.greater_equal, boolean)),
        "Not": Operator(_same, _fixed_only(np.logical_not)),
        "And": Operator(_elementwise, _fixed_only(np.logical_and)),
        "Or": Operator(_elementwise, _fixed_only(np.logical_or)),
        "Xor": Operator(_elementwise, _fixed_only(np.logical_xor)),
        "Where": Operator(_elementwise, _where),
        "Cast": Operator(_same, _cast),
        "Identity": Operator(_same, lambda u: [u.value(0)]),
        "Constant": Operator(None, _constant_entries),
        "Shape": Operator(_shape_of, _shape_entries),
        "Size": Operator(lambda u: [()], _size_entries),
        "Reshape": Operator(_reshape, _moved(_reshape, _as_shape)),
        "Flatten": Operator(_flatten, _moved(_flatten, _as_shape)),
        "Squeeze": Operator(_squeeze, _moved(_squeeze, _as_shape)),
        "Unsqueeze": Operator(_unsqueeze, _moved(_unsqueeze, _as_shape)),
        "Transpose": Operator(_transpose, _moved(_transpose, lambda u, d, s: d.transpose(_perm(u)))),
        "Slice": Operator(_slice, _moved(_slice, _slice_entries)),
        "Split": Operator(_split, _split_entries),
        "Concat": Operator(_concat, _concat_entries),
        "Gather": Operator(_gather, _gather_entries),
        "GatherElements": Operator(_same_as(1)),
        "GatherND": Operator(_gather_nd),
        "Expand": Operator(_expand, _moved(_expand, _expand_entries)),
        "Tile": Operator(_tile, _moved(_tile, _tile_entries)),
        "ConstantOfShape": Operator(_constant_of_shape, _constant_of_shape_entries),
        "Range": Operator(_range, _range_entries),
        "Pad": Operator(_pad),
        "TopK": Operator(_top_k),
        "MatMul": Operator(_mat_mul),
        "MatMulInteger": Operator(_mat_mul),
        "Gemm": Operator(_gemm),
        "Einsum": Operator(_einsum),
        "ReduceSum": Operator(_reduction(13), _reduced(13, lambda a, b: a + b)),
        "ReduceProd": Operator(_reduction(18), _reduced(18, lambda a, b: a * b)),
        "ReduceMax": Operator(_reduction(18), _reduced(18, ex.maximum)),
        "ReduceMin": Operator(_reduction(18), _reduced(18, ex.minimum)),
        "ArgMax": Operator(_arg_reduction),
        "ArgMin": Operator(_arg_reduction),
        "LayerNormalization": Operator(_layer_normalization),
        "BatchNormalization": Operator(_same),
        "Dropout": Operator(_same_as(0, 0)),
        "OneHot": Operator(_one_hot),
        "Trilu": Operator(_same, _matrix_diagonal),
        "CumSum": Operator(_same, _cum_sum_entries),
        "NonZero": Operator(_non_zero, _non_zero_entries),
        "GRU": Operator(_recurrent),
        "LSTM": Operator(_recurrent),
        "RNN": Operator(_recurrent),
    }
    out = {("", op): entry for op, entry in own.items()}
    for op in ("Gelu", "FastGelu", "QuickGelu", "BiasGelu", "FusedGelu", "BiasSoftmax", "Inverse"):
        out["com.microsoft", op] = Operator(_same)
    for op in ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "SimplifiedLayerNormalization"):
        out["com.microsoft", op] = Operator(lambda u: [u.shape(0), None, None, u.shape(0)])
    out["", "SimplifiedLayerNormalization"] = Operator(_layer_normalization)
    out["com.microsoft", "QuantizeLinear"] = Operator(_same, like=2)
    out["com.microsoft", "DequantizeLinear"] = Operator(_same, like=1)
    for op in ("FusedMatMul", "FusedMatMulActivation", "TransposeMatMul"):
        out["com.microsoft", op] = Operator(_fused_mat_mul)
    out["com.microsoft", "DynamicQuantizeMatMul"] = Operator(_mat_mul)
    out["com.microsoft", "MatMulIntegerToFloat"] = Operator(_mat_mul, like=2)
    for op in ("QLinearSigmoid", "QLinearLeakyRelu", "QLinearSoftmax"):
        out["com.microsoft", op] = Operator(_same)
    for op in ("QLinearAdd", "QLinearMul"):
        out["com.microsoft", op] = Operator(lambda u: [broadcast([u.shape(0), u.shape(3)])])
    out["com.microsoft", "QLinearConcat"] = Operator(_quantised(_concat, 2), like=1)
    out["com.microsoft", "QGemm"] = Operator(_quantised(_gemm), like=8)
    out["", "QLinearMatMul"] = Operator(_quantised(_mat_mul))
    out["", "DynamicQuantizeLinear"] = Operator(lambda u: [u.shape(0), (), ()])
    out["com.microsoft", "FusedGemm"] = Operator(_gemm)
    out["ai.onnx.ml", "LinearRegressor"] = Operator(lambda u: [[u.shape(0)[0], int(u.attribute("targets", 1))]])
    out["com.microsoft", "RotaryEmbedding"] = Operator(_same)
    out["com.microsoft", "Attention"] = Operator(_attention)
    out["com.microsoft", "MultiHeadAttention"] = Operator(_multi_head_attention)
    for name in dict.fromkeys(
        [*(op for ops in _TRAITS.values() for op in ops.split()), *_MOVES, *_AXES, *_LEVELS, *_MACS]
    ):
        domain, _, op = name.rpartition("::")
        entry = out.get((domain, op), Operator())
        traits = [trait for trait, ops in _TRAITS.items() if name in ops.split()]
        out[domain, op] = replace(
            entry,
            traits=reduce(or_, traits, Trait.NONE),
            move=_MOVES.get(name),
            axes=_AXES.get(name),
            levels=_LEVELS.get(name),
            factors=_FACTORS.get(name, (0, 1)),
            macs=_MACS.get(name),
        )
    return out


# --- what operators are ----------------------------------------------------------------------------------------------

_TRAITS = {
    Trait.ELEMENTWISE: """
        Abs Acos Acosh Asin Asinh Atan Atanh BitwiseNot Ceil Celu Cos Cosh Elu Erf Exp Floor Gelu HardSigmoid HardSwish
        Identity IsInf IsNaN LeakyRelu Log Mish Neg Not Reciprocal Relu Round Selu Shrink Sigmoid Sign Sin Sinh Softplus
        Softsign Sqrt Swish Tan Tanh ThresholdedRelu Cast Add And BitShift BitwiseAnd BitwiseOr BitwiseXor Div Equal
        Greater GreaterOrEqual Less LessOrEqual Max Mean Min Mod Mul Or PRelu Pow Sub Sum Where Xor Clip CastLike
        com.microsoft::Gelu com.microsoft::FastGelu com.microsoft::QuickGelu""",
    Trait.FUNCTION: """
        Sigmoid Tanh Exp Erf Gelu Softplus Log Pow Elu Selu Celu Mish Sin Cos Swish HardSwish com.microsoft::Gelu
        com.microsoft::FastGelu com.microsoft::BiasGelu""",
    Trait.COMMUTATIVE: "Add Mul Max Min",
    Trait.CAST: "Cast CastLike",
    Trait.BOOLEAN: "And Equal Greater GreaterOrEqual IsInf IsNaN Less LessOrEqual Not Or Xor",
    Trait.COMPARISON: "Equal Greater GreaterOrEqual Less LessOrEqual",
    Trait.SEQUENCE: """
        SequenceEmpty SequenceConstruct SequenceInsert SequenceErase SequenceMap SplitToSequence Optional
        ai.onnx.ml::ZipMap""",
    Trait.MOVEMENT: """
        Reshape Flatten Squeeze Unsqueeze Identity Transpose Slice Split Concat Expand Tile Gather GatherND""",
    Trait.FREE: "Constant Identity Reshape Flatten Squeeze Unsqueeze",
    Trait.RESHAPE: "Reshape Flatten Squeeze Unsqueeze",
    Trait.PICK: "Gather Slice Concat Split Expand",
    Trait.LOOKUP: "Gather GatherND GatherElements",
    Trait.MATRIX: """
        MatMul Gemm MatMulInteger QLinearMatMul com.microsoft::FusedMatMul com.microsoft::FusedGemm com.microsoft::QGemm
        com.microsoft::DynamicQuantizeMatMul com.microsoft::MatMulIntegerToFloat com.microsoft::TransposeMatMul
        com.microsoft::FusedMatMulActivation ai.onnx.ml::LinearRegressor""",
    Trait.PRODUCT: """
        MatMul Gemm MatMulInteger QLinearMatMul com.microsoft::FusedMatMul com.microsoft::FusedGemm com.microsoft::QGemm
        com.microsoft::DynamicQuantizeMatMul com.microsoft::MatMulIntegerToFloat com.microsoft::TransposeMatMul
        com.microsoft::FusedMatMulActivation com.microsoft::MatMulNBits ai.onnx.ml::LinearRegressor
        Conv ConvTranspose ConvInteger QLinearConv com.microsoft::FusedConv com.microsoft.nchwc::Conv Einsum Attention
        com.microsoft::Attention com.microsoft::MultiHeadAttention""",
    Trait.LINEAR: "MatMul Gemm Conv Einsum",
    Trait.RECURRENT: "GRU LSTM RNN",
    Trait.REDUCTION: """
        ReduceSum ReduceMean ReduceSumSquare ReduceMax ReduceMin ReduceProd ReduceL1 ReduceL2 ReduceLogSum
        ReduceLogSumExp CumSum ArgMax ArgMin GlobalAveragePool GlobalMaxPool GlobalLpPool AveragePool MaxPool LpPool""",
    Trait.NORMALISATION: """
        Softmax LogSoftmax Hardmax LayerNormalization RMSNormalization BatchNormalization InstanceNormalization
        GroupNormalization LpNormalization MeanVarianceNormalization LRN SimplifiedLayerNormalization
        com.microsoft::SkipLayerNormalization com.microsoft::SkipSimplifiedLayerNormalization""",
    Trait.ROWS: """
        Softmax LogSoftmax LayerNormalization RMSNormalization com.microsoft::SkipLayerNormalization""",
    Trait.EXTENTS: "Shape Size",
    Trait.RANDOM: "RandomNormal RandomUniform Multinomial RandomNormalLike RandomUniformLike Bernoulli",
    Trait.IMAGES: """
        Conv ConvTranspose MaxPool AveragePool GlobalMaxPool GlobalAveragePool LpPool GlobalLpPool DepthToSpace
        SpaceToDepth InstanceNormalization GroupNormalization LRN""",
}
"""Operators by what they are; each is in all the lines that hold for it."""

_MOVES: dict[str, moves.Mover] = {
    "Reshape": moves.reshape,
    "Flatten": moves.reshape,
    "Squeeze": moves.squeeze,
    "Unsqueeze": moves.unsqueeze,
    "Identity": moves.identity,
    "Transpose": moves.transpose,
    "Slice": moves.slice_,
    "Split": moves.split,
    "Concat": moves.concat,
    "Expand": moves.expand,
    "Tile": moves.tile,
    "Gather": moves.gather,
    "GatherND": moves.gather_nd,
}


def _from_axis(default: int) -> Callable[[Use], Sequence[int]]:
    """All axes from the attribute on."""
    return lambda u: range(u.axis(default, len(u.shape(0))), len(u.shape(0)))


def _one_axis(default: int) -> Callable[[Use], Sequence[int]]:
    """The axis of the attribute."""
    return lambda u: [u.axis(default, len(u.shape(0)))]


def _softmax_axes(u: Use) -> Sequence[int]:
    return _one_axis(-1)(u) if u.opset >= 13 else _from_axis(1)(u)


_AXES: dict[str, Callable[[Use], Sequence[int]]] = {
    **{op: _softmax_axes for op in ("Softmax", "LogSoftmax", "Hardmax")},
    **{op: _from_axis(-1) for op in ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")},
    "LpNormalization": _one_axis(-1),
    "MeanVarianceNormalization": lambda u: u.attribute("axes", [0, 2, 3]),
    **{op: _reduced_axes(18) for op in _REDUCTIONS},
    "ReduceSum": _reduced_axes(13),
    "ArgMax": _one_axis(0),
    "ArgMin": _one_axis(0),
    "TopK": _one_axis(-1),
    "CumSum": lambda u: u.integers(1, "axis") or [],
}
_LEVELS: dict[str, transfers.Transfer] = {
    **{op: transfers.kept_zero for op in ("Cast", "Trilu")},
    **{op: transfers.kept for op in ("QuantizeLinear", "DequantizeLinear")},
    "com.microsoft::BiasGelu": transfers.elementwise,
    "BatchNormalization": transfers.batch_normalised,
    "Where": transfers.where,
    "Dropout": transfers.dropout,
    "Softmax": transfers.softmax,
    "CumSum": transfers.normalised,
    "Hardmax": transfers.normalised,
    "TopK": transfers.top_k,
    "Pad": transfers.pad,
    "Concat": transfers.concat,
    "Slice": transfers.slice_,
    "Gather": transfers.gather,
    "GatherND": transfers.gather_nd,
    "GatherElements": transfers.gather_elements,
    "OneHot": transfers.one_hot,
    "Conv": transfers.conv,
    "MatMul": transfers.mat_mul,
    "MatMulInteger": transfers.mat_mul,
    "com.microsoft::MatMulIntegerToFloat": transfers.mat_mul,
    "com.microsoft::FusedMatMul": lambda f: transfers.mat_mul(
        f, [matmul_order(f.node, k, len(f.dim(k))) for k in (0, 1)]
    ),
    "QLinearMatMul": transfers.quantised,
    "Gemm": transfers.gemm,
    "com.microsoft::FusedGemm": transfers.gemm,
    "Einsum": transfers.einsum,
    "ai.onnx.ml::LinearRegressor": transfers.linear,
    **{name: transfers.whole_rows for op in ("Attention", "RotaryEmbedding") for name in (op, f"com.microsoft::{op}")},
    "com.microsoft::MultiHeadAttention": transfers.whole_rows,
    **{op: transfers.recurrent for op in ("GRU", "LSTM", "RNN")},
    "com.microsoft::SkipLayerNormalization": transfers.skip_normalised,
    "com.microsoft::SkipSimplifiedLayerNormalization": transfers.skip_normalised,
}

_FACTORS = {
    **dict.fromkeys(("QLinearMatMul", "com.microsoft::QGemm", "QLinearConv"), (0, 3)),
    "ai.onnx.ml::LinearRegressor": (0,),
}
Extents = tuple[int, ...]


def _matrix_macs(node: NodeProto, x: Sequence[Extents | None], out: Extents | None) -> int:
    a = x[0]
    if out is None or a is None:
        return 0
    turned = attribute(node, "transA") and len(a) > 1
    return prod(out) * (a[-2] if turned else a[-1])


def _conv_macs(node: NodeProto, x: Sequence[Extents | None], out: Extents | None) -> int:
    return 0 if out is None or x[1] is None else prod(out) * prod(x[1][1:])


def _einsum_macs(node: NodeProto, x: Sequence[Extents | None], out: Extents | None) -> int:
    if len(node.input) < 2 or any(s is None for s in x):
        return 0
    terms, _ = einsum_terms(attribute(node, "equation"), [len(s or ()) for s in x])
    size: dict[str, int] = {}
    for term, s in zip(terms, x, strict=True):
        for c, n in zip(term, s or (), strict=False):
            size[c] = max(size.get(c, 1), n)
    return prod(size.values())


def _recurrent_macs(node: NodeProto, x: Sequence[Extents | None], out: Extents | None) -> int:
    sequence, weights, again = (*x, None, None, None)[:3]
    if sequence is None or weights is None or again is None:
        return 0
    return prod(sequence[:2]) * (prod(weights) + prod(again))


def _packed_attention_macs(node: NodeProto, x: Sequence[Extents | None], out: Extents | None) -> int:
    """Of `[batch, length, width]`, by weights `[width, 3 * hidden]` of queries, keys and values; both products."""
    rows, weights = (*x, None, None)[:2]
    if rows is None or weights is None:
        return 0
    *batch, length, _ = rows
    return prod(rows) * weights[-1] + 2 * prod(batch) * length * length * (weights[-1] // 3)


def _attention_macs(node: NodeProto, x: Sequence[Extents | None], out: Extents | None) -> int:
    """Of every query with every key, and of every weight with every value; `[..., heads, length, size]` or merged."""
    queries, keys = (*x, None, None)[:2]
    if queries is None or keys is None:
        return 0
    values = x[2] if len(x) > 2 and x[2] is not None else keys
    return prod(queries[:-1]) * keys[-2] * (queries[-1] + values[-1])


_MACS = {
    **{op: _matrix_macs for op in _TRAITS[Trait.MATRIX].split()},
    **{op: _conv_macs for op in ("Conv", "com.microsoft::FusedConv", "com.microsoft.nchwc::Conv")},
    "Einsum": _einsum_macs,
    **{op: _recurrent_macs for op in _TRAITS[Trait.RECURRENT].split()},
    "com.microsoft::Attention": _packed_attention_macs,
    "Attention": _attention_macs,
    "com.microsoft::MultiHeadAttention": _attention_macs,
}


def having(traits: Trait) -> list[str]:
    """The operators of the registry that have all of some traits, as `operator` names them."""
    return [f"{d}::{op}" if d else op for (d, op), entry in REGISTRY.items() if traits in entry.traits]


def traits(node: NodeProto) -> Trait:
    """What a node's operator is; nothing, where the registry has no entry of it."""
    entry = find(node)
    return Trait.NONE if entry is None else entry.traits


def _absolute(a: int | Expr) -> int | Expr:
    if ex.bounds(a)[0] < 0:
        raise Unproved(f"|{a}|")
    return a


def _fold(do: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """An operator of two operands on any number of them."""

    def folded(first: Any, *others: Any) -> Any:
        for other in others:
            first = do(first, other)
        return first

    return folded


def _ordered(do: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """Min or Max of constants; which operand wins against a NaN is the runtime's own affair."""

    def folded(*operands: NDArray[Any]) -> Any:
        if any(o.dtype.kind == "f" and np.isnan(o).any() for o in operands):
            raise Unproved("not a number")
        return _fold(do)(*operands)

    return folded


def operator(node: NodeProto) -> str:
    """The key of a node's operator: its type alone for ONNX's own, `domain::Type` for any other domain.

    What is compared to a name must be this, never the bare type: `com.acme::Softmax` is not ONNX's Softmax.
    """
    own = domain(node.domain)
    return f"{own}::{node.op_type}" if own else str(node.op_type)


def domain_of(node: NodeProto) -> str:
    """A node's domain; ONNX's own is empty."""
    return domain(node.domain)


def find(node: NodeProto) -> Operator | None:
    """The entry of a node's operator."""
    return REGISTRY.get((domain(node.domain), node.op_type))


def element_type(node: NodeProto, k: int, version: int, types: Mapping[str, int]) -> int | None:
    """Element type of an output of a node; None where it cannot be told.

    Args:
        node: The node.
        k: Which output.
        version: Version of its domain.
        types: Element types of its operands, as far as they are known.
    """
    given = _type_names(node.op_type, version, domain_of(node))
    if given is None:
        entry = find(node)
        if entry is None or entry.like >= len(node.input):
            return None
        return types.get(node.input[entry.like])
    inputs, outputs = given
    own = next((a for a in node.attribute if a.name in ("to", "dtype")), None)
    if own is not None and own.i:
        return int(own.i)
    kind = outputs[min(k, len(outputs) - 1)]
    if kind.startswith("tensor("):
        return _KINDS.get(kind)
    for at, name in enumerate(node.input):
        if name in types and inputs[min(at, len(inputs) - 1)] == kind:
            return types[name]
    return None


@cache
def _type_names(op: str, version: int, domain: str) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """What onnx's schema calls the types of an operator's inputs and outputs; None where it has none."""
    if not onnx.defs.has(op, version, domain):
        return None
    schema = onnx.defs.get_schema(op, version, domain)
    only = {c.type_param_str: c.allowed_type_strs[0] for c in schema.type_constraints if len(c.allowed_type_strs) == 1}
    inputs, outputs = ([only.get(x.type_str, x.type_str) for x in side] for side in (schema.inputs, schema.outputs))
    return tuple(inputs), tuple(outputs)


_KINDS = {f"tensor({kind.lower()})": int(number) for kind, number in TensorProto.DataType.items()}


REGISTRY = _registry()
