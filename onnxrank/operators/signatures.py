"""Which axes operators work on one by one.

A signature is that of a generalised function of numpy's: `(b,t,f),(b)->(b,t,f)` says of ReverseSequence that it does to
every entry along `b` and `f` the same, alone. Where no operand varies along such an axis, one entry of it is enough.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from onnxrank.extents import Expr, Unproved
from onnxrank.graphs import einsum_terms
from onnxrank.operators.use import Use

Axes = tuple[int | None, ...]
"""Per axis of a tensor a number; None for an axis that is worked on as a whole, or that is new."""


@dataclass(frozen=True)
class Signature:
    """Which axes of operands and results lie beside each other.

    Attributes:
        inputs: The axes of each input. Along axes of one number the operator does the same for every entry, alone.
        outputs: The axes of each output.
        broadcasts: Whether operands may have a single entry along an axis that others have more of.
        as_set: Whether results depend on all entries of all operands, but not on how often each comes, as the greatest
            of them does: then nothing may vary along an axis that is to be worked on one by one.
    """

    inputs: tuple[Axes, ...]
    outputs: tuple[Axes, ...]
    broadcasts: bool = False
    as_set: bool = False


Signer = Callable[[Use], Signature]


def signed(
    u: Use, inputs: Mapping[int, Axes], *outputs: Axes, broadcasts: bool = False, as_set: bool = False
) -> Signature:
    """A signature; inputs that are not named are worked on as a whole.

    Raises:
        Unproved: The number of dimensions of an input is not known, or another one.
    """
    axes = [inputs.get(k, (None,) * len(u.shape(k))) if u.has(k) else () for k in range(len(u.node.input))]
    if any(u.has(k) and len(u.shape(k)) != len(found) for k, found in enumerate(axes)):
        raise Unproved("operands of other numbers of dimensions")
    return Signature(tuple(axes), outputs, broadcasts, as_set)


def _all_axes(u: Use, k: int = 0) -> tuple[int, ...]:
    return tuple(range(len(u.shape(k))))


def _without(axes: Axes, gone: Sequence[int]) -> Axes:
    """Axes of which some are worked on as a whole."""
    left = {a % len(axes) for a in gone} if axes else set()
    return tuple(None if k in left else a for k, a in enumerate(axes))


def entrywise(*new: None) -> Signer:
    """Every entry of the first operand alone, each of which may become several along new axes behind."""
    return lambda u: signed(u, {0: _all_axes(u)}, *[(*_all_axes(u), *new)] * len(u.node.output))


def together(*places: int) -> Signer:
    """Entries of several operands in their places, broadcast as numpy does."""

    def signature(u: Use) -> Signature:
        given = [k for k in (places or range(len(u.node.input))) if u.has(k)]
        rank = max(len(u.shape(k)) for k in given)
        axes = tuple(range(rank))
        return signed(u, {k: axes[rank - len(u.shape(k)) :] for k in given}, axes, broadcasts=True)

    return signature


def around(core: Callable[[Use], Sequence[int]], *places: int) -> Signer:
    """Some axes as a whole, which stay; of the first operand, or of several of one shape.

    Args:
        core: The axes.
        places: The operands.
    """

    def signature(u: Use) -> Signature:
        kept = _without(_all_axes(u), core(u))
        given = [k for k in (places or (0,)) if u.has(k)]
        return signed(u, dict.fromkeys(given, kept), *[kept] * len(u.node.output))

    return signature


def rows(*ranks: int, places: Sequence[int] = (0,)) -> Signer:
    """The first axis of some operands one by one, as images or samples lie.

    Args:
        ranks: Numbers of dimensions of the results; none for that of the first operand.
        places: The operands.
    """

    def signature(u: Use) -> Signature:
        given = [k for k in places if u.has(k)]
        if any(len(u.shape(k)) < 1 for k in given):
            raise Unproved("an operand without rows")
        axes = {k: (0, *(None,) * (len(u.shape(k)) - 1)) for k in given}
        made = ranks or (len(u.shape(given[0])),)
        return signed(u, axes, *[(0, *(None,) * (rank - 1)) for rank in made])

    return signature


def samples(*ranks: int) -> Signer:
    """Rows of a matrix of features; a vector is a single row."""

    def signature(u: Use) -> Signature:
        if len(u.shape(0)) != 2:
            raise Unproved("features that are no matrix")
        return rows(*ranks)(u)

    return signature


def matrices(first: int = 0, second: int = 1, as_set: bool = False) -> Signer:
    """Stacks of products of matrices.

    Args:
        first: Place of the first factor.
        second: Place of the second.
        as_set: Whether the first is quantised by its least and greatest entry.
    """

    def signature(u: Use) -> Signature:
        a, b = len(u.shape(first)), len(u.shape(second))
        batch = tuple(range(max(a, b, 2) - 2))
        row, column = len(batch), len(batch) + 1
        left = (*batch[len(batch) - a + 2 :], row, None) if a > 1 else (None,)
        right = (*batch[len(batch) - b + 2 :], None, column) if b > 1 else (None,)
        out = (*batch, *((row,) if a > 1 else ()), *((column,) if b > 1 else ()))
        return signed(u, {first: left, second: right}, out, as_set=as_set)

    return signature


def quantised_gemm(u: Use) -> Signature:
    """QGemm: two matrices, either of which may be turned, and what is added to each row."""
    left: Axes = (None, 0) if u.attribute("transA", 0) else (0, None)
    right: Axes = (1, None) if u.attribute("transB", 0) else (None, 1)
    return signed(u, {0: left, 3: right}, (0, 1))


def as_set(u: Use) -> Signature:
    """DynamicQuantizeLinear: every entry by the least and the greatest of all."""
    return signed(u, {0: _all_axes(u)}, _all_axes(u), (), (), as_set=True)


def einsum(u: Use) -> Signature:
    """Einsum: letters of the result that no operand has twice."""
    terms, out = einsum_terms(u.attribute("equation"), [len(u.shape(k)) for k in range(len(u.node.input))])
    alone = [c for c in out if all(term.count(c) < 2 for term in terms)]
    numbers = {c: k for k, c in enumerate(alone)}
    sides = {k: tuple(numbers.get(c) for c in term) for k, term in enumerate(terms)}
    return signed(u, sides, tuple(numbers.get(c) for c in out))


def selected(u: Use) -> Signature:
    """ArgMax and ArgMin: an axis as a whole, which stays or goes."""
    kept = _without(_all_axes(u), [u.attribute("axis", 0)])
    return signed(u, {0: kept}, kept if u.attribute("keepdims", 1) else tuple(a for a in kept if a is not None))


def square(u: Use) -> Signature:
    """Stacks of matrices, the last two axes, each of which becomes a number or another matrix."""
    axes = _without(_all_axes(u), (-2, -1))
    return signed(u, {0: axes}, axes if u.node.op_type == "Inverse" else axes[:-2])


def reverse_sequence(u: Use) -> Signature:
    """ReverseSequence: steps as a whole, with a length for each sequence."""
    batch = int(u.attribute("batch_axis", 1)) % len(u.shape(0))
    axes = _without(_all_axes(u), [u.attribute("time_axis", 0)])
    return signed(u, {0: axes, 1: (batch,)}, axes)


def scatter_elements(u: Use) -> Signature:
    """ScatterElements: each line along the axis alone, where positions are given for every line."""
    shapes = [u.shape(k) for k in range(3)]
    axes = tuple(k if len({s[k] for s in shapes}) == 1 else None for k in range(len(shapes[0])))
    axes = _without(axes, [u.attribute("axis", 0)])
    return signed(u, dict.fromkeys(range(3), axes), axes)


def scatter_nd(u: Use) -> Signature:
    """ScatterND: what lies behind the axes that positions are of."""
    width, places = u.shape(1)[-1], len(u.shape(1)) - 1
    if isinstance(width, Expr):
        raise Unproved("positions of a symbolic number of axes")
    behind = _all_axes(u)[width:]
    axes = ((None,) * width) + behind
    return signed(u, {0: axes, 2: ((None,) * places) + behind}, axes)


def gather_nd(u: Use) -> Signature:
    """GatherND: the batch's axes, those of the positions, and what lies behind the axes that positions are of."""
    width, batch = u.shape(1)[-1], int(u.attribute("batch_dims", 0))
    if isinstance(width, Expr):
        raise Unproved("positions of a symbolic number of axes")
    rank, places = len(u.shape(0)), len(u.shape(1)) - 1
    front, behind = tuple(range(batch)), tuple(range(rank + batch + width, 2 * rank))
    picked = tuple(range(2 * rank, 2 * rank + places - batch))
    data = (*front, *(None,) * width, *behind)
    return signed(u, {0: data, 1: (*front, *picked, None)}, (*front, *picked, *behind))


def pad(u: Use) -> Signature:
    """Pad: axes that nothing is added to, whatever the others get."""
    rank, pads = len(u.shape(0)), u.attribute("pads") or u.entries(1)
    axes = [a % rank for a in u.integers(3, "axes") or range(rank)]
    if pads is None or len(pads) != 2 * len(axes):
        raise Unproved("what it adds")
    padded = [a for k, a in enumerate(axes) if pads[k] != 0 or pads[k + len(axes)] != 0]
    kept = _without(_all_axes(u), padded)
    return signed(u, {0: kept}, kept)


def compress(u: Use) -> Signature:
    """Compress along an axis."""
    if u.attribute("axis") is None:
        raise Unproved("all entries in one row")
    return around(lambda u: [u.attribute("axis")])(u)


def resized(u: Use) -> dict[int, float]:
    """By how much Resize makes the axes longer that it works on, or how long; the axes that it is told of.

    Raises:
        Unproved: That is computed, or something is cut out, too.
    """
    rank, modes = len(u.shape(0)), ("coordinate_transformation_mode", "keep_aspect_ratio_policy")
    if any(u.attribute(name) in (b"tf_crop_and_resize", b"not_larger", b"not_smaller") for name in modes):
        raise Unproved("it cuts out what is resized, or keeps its proportions")
    axes = [int(a) % rank for a in u.attribute("axes") or range(rank)]
    told = u.integers(3, "sizes") if u.has(3) else u.value(2).data.reshape(-1).tolist()
    return dict(zip(axes, map(float, told or ()), strict=True))


def resize(u: Use) -> Signature:
    """Resize: axes that it does not work on, or by a scale of 1; a length that is told holds for all of an axis."""
    found = resized(u)
    kept = _without(_all_axes(u), [a for a, n in found.items() if u.has(3) or n != 1])
    return signed(u, {0: kept}, kept)


def grid_sample(u: Use) -> Signature:
    """GridSample: channel by channel."""
    space = (None,) * (len(u.shape(0)) - 2)
    return signed(u, {0: (0, 1, *space), 1: (0, *space, None)}, (0, 1, *space))


def roi_align(u: Use) -> Signature:
    """RoiAlign: every region alone, channel by channel."""
    return signed(u, {0: (None, 1, None, None), 1: (0, None), 2: (0,)}, (0, 1, None, None))


def fourier(u: Use) -> Signature:
    """DFT: along an axis, of numbers whose parts lie along the last one."""
    (axis,) = u.integers(2, "axis") or [1 if u.opset < 20 else -2]
    axes = _without(_all_axes(u), [axis, -1])
    return signed(u, {0: axes}, axes)
