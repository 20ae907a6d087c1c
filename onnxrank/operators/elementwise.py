"""Operators that compute every entry from the entries in its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import helper

from onnxrank import extents as ex
from onnxrank import moves, transfers
from onnxrank.extents import Expr, Unproved
from onnxrank.operators import signatures
from onnxrank.operators.entry import Operator, Trait, Valuer
from onnxrank.operators.known import Known, constant, known, objects, whole
from onnxrank.operators.shapers import broadcast, broadcast_together, fixed_only, same, same_as
from onnxrank.operators.use import Use


def _entrywise(do: Callable[..., Any], fixed: Callable[..., Any] | None = None, to: Any = None) -> Valuer:
    """Entries of an elementwise operator.

    Args:
        do: The operator on Python integers and expressions.
        fixed: The operator on arrays of constants; None for `do` entry by entry.
        to: Type of the result; None for that of the operands.
    """

    def value(u: Use) -> list[Known | None]:
        operands = [u.value(k) for k in range(len(u.node.input)) if u.has(k)]
        shape = whole(broadcast([o.shape for o in operands]))
        dtype = np.dtype(to) if to is not None else operands[-1].dtype
        if all(o.concrete for o in operands) and fixed is not None:
            with np.errstate(all="ignore"):
                return [known(shape, np.asarray(fixed(*(o.data for o in operands))), dtype)]
        if any(o.dtype.kind not in "iub" for o in operands):
            raise Unproved("numbers that are no extents")
        arrays = np.broadcast_arrays(*(objects(o.data) for o in operands))
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
    shape = whole(broadcast([condition.shape, a.shape, b.shape]))
    if a.concrete and b.concrete:
        return [known(shape, np.where(condition.data, a.data, b.data), a.dtype)]
    return [known(shape, np.where(condition.data, objects(a.data), objects(b.data)), a.dtype)]


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


def _matrix_diagonal(u: Use) -> list[Known | None]:
    x = u.value(0)
    if not x.fixed or len(x.shape) < 2:
        raise Unproved("a triangle of extents")
    k = 0
    if u.has(1):
        (k,) = u.integers(1, "k") or (0,)
    return [constant(np.triu(x.data, k) if u.attribute("upper", 1) else np.tril(x.data, k))]


_ENTRYWISE = Trait.ELEMENTWISE
_SYMMETRIC = Trait.ELEMENTWISE | Trait.COMMUTATIVE
_EVEN = Trait.ELEMENTWISE | Trait.SMOOTH
_FUNCTION = Trait.ELEMENTWISE | Trait.FUNCTION
_LOGIC = Trait.ELEMENTWISE | Trait.BOOLEAN
_ORDER = Trait.ELEMENTWISE | Trait.BOOLEAN | Trait.COMPARISON
_INF = float("inf")


def _compared(low: float, high: float, fixed: Callable[..., Any]) -> Operator:
    """A comparison that holds where the difference of its operands lies in a range of whole numbers."""
    return Operator(broadcast_together, _entrywise(_compare(low, high), fixed, np.dtype(bool)), traits=_ORDER)


OPERATORS = {
    **{
        op: Operator(broadcast_together, traits=_ENTRYWISE)
        for op in """
            Acos Acosh Asin Asinh Atan Atanh BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cosh Mean Round Shrink
            Sinh Softsign Tan ThresholdedRelu""".split()
    },
    **{op: Operator(broadcast_together, traits=_EVEN) for op in "HardSigmoid LeakyRelu Sum".split()},
    **{op: Operator(broadcast_together, traits=_FUNCTION) for op in "Exp HardSwish Swish".split()},
    **{op: Operator(broadcast_together, traits=_FUNCTION | Trait.SLOW) for op in "Celu Cos Log Selu Sin".split()},
    **{op: Operator(broadcast_together, traits=_FUNCTION | Trait.SERIAL) for op in "Mish Pow".split()},
    **{op: Operator(broadcast_together, traits=_FUNCTION | Trait.SMOOTH) for op in "Erf Gelu Sigmoid Tanh".split()},
    "Elu": Operator(broadcast_together, traits=_FUNCTION | Trait.SLOW | Trait.SMOOTH),
    **{
        op: Operator(broadcast_together, traits=_FUNCTION | Trait.SERIAL | Trait.SMOOTH)
        for op in "PRelu Softplus".split()
    },
    "Add": Operator(
        broadcast_together, _entrywise(lambda a, b: a + b, np.add), traits=_SYMMETRIC | Trait.ADDITIVE | Trait.SMOOTH
    ),
    "Sub": Operator(
        broadcast_together,
        _entrywise(lambda a, b: a - b, np.subtract),
        traits=_ENTRYWISE | Trait.ADDITIVE | Trait.SMOOTH,
    ),
    "Mul": Operator(
        broadcast_together,
        _entrywise(lambda a, b: a * b, np.multiply),
        traits=_SYMMETRIC | Trait.SCALING | Trait.SMOOTH,
    ),
    "Div": Operator(broadcast_together, _entrywise(_quotient_of, _quotient), traits=_ENTRYWISE | Trait.SCALING),
    "Mod": Operator(broadcast_together, _remainder, traits=_ENTRYWISE),
    "Min": Operator(
        broadcast_together, _entrywise(_fold(ex.minimum), _ordered(np.minimum)), traits=_SYMMETRIC | Trait.CHOICE
    ),
    "Max": Operator(
        broadcast_together, _entrywise(_fold(ex.maximum), _ordered(np.maximum)), traits=_SYMMETRIC | Trait.CHOICE
    ),
    "Neg": Operator(same, _entrywise(lambda a: -a, np.negative), traits=_EVEN),
    "Abs": Operator(same, _entrywise(_absolute, np.abs), traits=_EVEN),
    "Sqrt": Operator(same, fixed_only(np.sqrt), traits=_ENTRYWISE),
    "Reciprocal": Operator(same, fixed_only(lambda a: a.dtype.type(1) / a), traits=_ENTRYWISE),
    "Floor": Operator(same, fixed_only(np.floor), traits=_ENTRYWISE),
    "Ceil": Operator(same, fixed_only(np.ceil), traits=_ENTRYWISE),
    "Sign": Operator(same, fixed_only(np.sign), traits=_FUNCTION | Trait.SLOW),
    "Relu": Operator(same, fixed_only(lambda a: np.maximum(a, 0).astype(a.dtype)), traits=_EVEN),
    "Clip": Operator(same, traits=_ENTRYWISE | Trait.PARAMETERS | Trait.CHOICE | Trait.SMOOTH),
    "Equal": _compared(0, 0, np.equal),
    "Less": _compared(-_INF, -1, np.less),
    "LessOrEqual": _compared(-_INF, 0, np.less_equal),
    "Greater": _compared(1, _INF, np.greater),
    "GreaterOrEqual": _compared(0, _INF, np.greater_equal),
    "IsInf": Operator(broadcast_together, traits=_LOGIC),
    "IsNaN": Operator(broadcast_together, traits=_LOGIC),
    "Not": Operator(same, fixed_only(np.logical_not), traits=_LOGIC),
    "And": Operator(broadcast_together, fixed_only(np.logical_and), traits=_LOGIC),
    "Or": Operator(broadcast_together, fixed_only(np.logical_or), traits=_LOGIC),
    "Xor": Operator(broadcast_together, fixed_only(np.logical_xor), traits=_LOGIC),
    "Where": Operator(broadcast_together, _where, traits=_ENTRYWISE | Trait.CHOICE, levels=transfers.where),
    "Cast": Operator(same, _cast, traits=_ENTRYWISE | Trait.CAST, levels=transfers.kept_zero),
    "CastLike": Operator(
        same, traits=_ENTRYWISE | Trait.CAST | Trait.PARAMETERS, levels=lambda f: transfers.moved(f, moves.identity(f))
    ),
    "Trilu": Operator(same, _matrix_diagonal, levels=transfers.kept_zero),
    "Dropout": Operator(same_as(0, 0), traits=Trait.PARAMETERS, levels=transfers.dropout),
    "com.microsoft::Gelu": Operator(same, traits=_FUNCTION),
    "com.microsoft::FastGelu": Operator(same, traits=_FUNCTION),
    "com.microsoft::QuickGelu": Operator(same, traits=_ENTRYWISE),
    "BitCast": Operator(same, signature=signatures.entrywise()),
    "StringConcat": Operator(broadcast_together, signature=signatures.together()),
    "RegexFullMatch": Operator(same, signature=signatures.entrywise()),
    "com.microsoft::FusedGelu": Operator(same),
    "com.microsoft::BiasGelu": Operator(same, traits=Trait.FUNCTION, levels=transfers.elementwise),
}
