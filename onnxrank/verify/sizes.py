"""Numbers of candidates and lengths of histories that two models are compared at, the most telling first.

A model may be right at every extent that was tried and wrong beyond: cut to its last 50 positions, or to the rows of a
table. So lengths are run at both ends of what is served and around every number that either graph cuts, pads or picks
by, and candidates at the numbers that the model was made for.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from onnxrank import joining
from onnxrank.blocks import ROWS
from onnxrank.errors import UsageError
from onnxrank.facts import settings
from onnxrank.graphs import subgraphs
from onnxrank.operators import Trait, having, operator, traits
from onnxrank.values import CANDIDATES

Span = tuple[int, int]
"""Least and most."""

LENGTHS: Span = (1, 1024)
"""What an undeclared length is taken to be."""
MANY = "many"
"""What inputs with more candidates than ordinary ones are called."""
NONE = "no"
"""What inputs without candidates are called."""
FEW = 2
"""Candidates of requests that are about lengths."""
MOST = {"quick": 17, "standard": 512, "full": 4096}
"""Candidates at most, by level, where the models do not say."""

_PREFIX = "S:"
_SMALL = 64
"""Entries of a constant that may hold bounds."""
_MOST_FAR = 24
_MOST_ROWS = 12
_MOST_CORNERS = 8

_CARRY = Trait.FREE | Trait.CAST | Trait.ADDITIVE
"""Operators, beside Concat and Neg, whose result still holds the constants that went into them."""
_CUT = {"Slice": (1, True), "Pad": (1, False), "TopK": (1, True), "Clip": (1, False), "Split": (1, True),
        "Min": (0, False), "Max": (0, False), "Where": (0, False), "Range": (0, False), "Mod": (0, False),
        "Trilu": (1, False), **dict.fromkeys(having(Trait.COMPARISON), (0, False))}  # fmt: skip
"""Operators that cut, pad or choose, with the first operand that says where, and whether that is along an axis."""
_TABLES = {*having(Trait.LOOKUP), "Slice"}
"""Operators that a constant's own extents bound, where they read one."""


@dataclass(frozen=True)
class Size:
    """Extents of one request.

    Attributes:
        candidates: Number of candidates.
        lengths: Extents by symbol, where they are not the usual ones.
        full: Whether histories have no padding.
        about: What its inputs are about, if not about extents.
    """

    candidates: int
    lengths: Mapping[str, int] = field(default_factory=dict)
    full: bool = True
    about: str = ""

    @property
    def kind(self) -> str:
        """What its inputs are called."""
        if self.about:
            return self.about
        if not self.lengths:
            return MANY if self.candidates else NONE
        return f"{self.says}{'' if self.full else ', padded'}"

    @property
    def says(self) -> str:
        """Its lengths in words."""
        return ", ".join(f"{name_of(s)} = {n}" for s, n in self.lengths.items())


def name_of(symbol: str) -> str:
    """What a user calls a symbol: the name in the declared shape, or `input.axis` where it has none."""
    return symbol.removeprefix(_PREFIX)


def lengths_of(symbols: Iterable[str]) -> list[str]:
    """The symbols that are no number of candidates."""
    return sorted(s for s in symbols if s != CANDIDATES)


def spans(symbols: Iterable[str], given: Mapping[str, Span], least: int = LENGTHS[0]) -> dict[str, Span]:
    """Least and most of every length, by symbol.

    Args:
        symbols: Symbols of the inputs' shapes.
        given: What the user declares, by name.
        least: The least that others are taken to be.

    Raises:
        UsageError: A name is none of the inputs' lengths, or a range is none.
    """
    known = {name_of(s): s for s in lengths_of(symbols)}
    for name, (low, high) in given.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            have = f"the lengths are {', '.join(map(repr, known))}" if known else "no input has a length of its own"
            raise UsageError(f"No input has a length named {name!r}: {have}.{hint}")
        if low < 0 or high < low:
            raise UsageError(f"The length {name!r} cannot be in {low}..{high}.")
    return {s: given.get(name, (least, max(least, LENGTHS[1]))) for name, s in known.items()}


def usual(symbols: Iterable[str], ranges: Mapping[str, Span]) -> dict[str, int]:
    """Lengths that tell the symbols apart, within their ranges."""
    (found,) = settings(lengths_of(symbols), (FEW,))
    return {s: min(max(found.symbols[s], low), high) for s, (low, high) in ranges.items()}


# --- what a graph cuts by ----------------------------------------------------------------------------------------


@dataclass
class Landmarks:
    """Whole numbers of graphs at which what they compute may change.

    Attributes:
        near: What they cut, pad or choose by, and extents of tables.
        rows: Those among them that may be about the first axis, along which candidates mostly are.
        far: All other small constants.
        compared: What something is compared with.
    """

    near: set[int] = field(default_factory=set)
    rows: set[int] = field(default_factory=set)
    far: set[int] = field(default_factory=set)
    compared: set[int] = field(default_factory=set)


def landmarks(models: Iterable[ModelProto]) -> Landmarks:
    """Finds the numbers in some models."""
    found = Landmarks()
    for model in models:
        _look(model.graph, {}, found)
        for function in model.functions:
            _follow(function.node, {}, {}, found)
    return found


def _look(graph: GraphProto, outer: Mapping[str, frozenset[int]], found: Landmarks) -> None:
    known = dict(outer)
    shapes: dict[str, tuple[int, ...]] = {}
    for t in graph.initializer:
        shapes[t.name] = tuple(t.dims)
        if t.data_type == TensorProto.BOOL:
            found.near.update(t.dims)
        known[t.name] = _numbers(t)
        found.far |= known[t.name]
    _follow(graph.node, known, shapes, found)


def _follow(
    nodes: Iterable[NodeProto],
    known: dict[str, frozenset[int]],
    shapes: dict[str, tuple[int, ...]],
    found: Landmarks,
) -> None:
    for node in nodes:
        if node.op_type == "Constant":
            numbers, dims = _constant(node)
            known[node.output[0]], shapes[node.output[0]] = numbers, dims
            found.far |= numbers
            continue
        read, op = [known.get(i, frozenset()) for i in node.input], operator(node)
        if traits(node) & _CARRY or op in ("Concat", "Neg"):
            carried = frozenset(itertools.chain(*read))
            known[node.output[0]] = carried if len(carried) <= _SMALL else frozenset()
        if Trait.COMPARISON in traits(node):
            found.compared.update(*read)
        if op in _CUT:
            first, along = _CUT[op]
            here = set(itertools.chain(*read[first:]))
            here.update(n for a in node.attribute if a.name not in ("axis", "axes") for n in (a.i, *a.ints))
            found.near |= here
            if not along or 0 in _axes(node, known):
                found.rows |= here
        if op in _TABLES:
            found.near.update(shapes.get(node.input[0], ()))
        for graph in subgraphs(node):
            _look(graph, known, found)


def _axes(node: NodeProto, known: Mapping[str, frozenset[int]]) -> set[int]:
    """Axes that a node works along, as far as they can be told."""
    given = {n for a in node.attribute if a.name in ("axis", "axes") for n in (*a.ints, a.i)}
    if operator(node) == "Slice" and len(node.input) > 3:
        return set(known.get(node.input[3], frozenset({0})))
    return given or {0}


def _constant(node: NodeProto) -> tuple[frozenset[int], tuple[int, ...]]:
    for a in node.attribute:
        if a.name == "value":
            return _numbers(a.t), tuple(a.t.dims)
        if a.name in ("value_int", "value_ints"):
            return frozenset(map(abs, (a.i, *a.ints))), ()
        if a.name in ("value_float", "value_floats"):
            return _whole(np.array([a.f, *a.floats], np.float64)), ()
    return frozenset(), ()


def _numbers(t: TensorProto) -> frozenset[int]:
    """Absolute values of a small tensor's whole numbers."""
    kinds = (TensorProto.INT64, TensorProto.INT32, TensorProto.FLOAT, TensorProto.DOUBLE)
    if t.data_type not in kinds or t.data_location == TensorProto.EXTERNAL:
        return frozenset()
    # Weights of floats are no bounds.
    if int(np.prod(t.dims, dtype=np.float64)) > (_SMALL if t.data_type in kinds[:2] else 1):
        return frozenset()
    try:
        return _whole(numpy_helper.to_array(t).reshape(-1).astype(np.float64))
    except ValueError:  # a damaged tensor is the checker's to find
        return frozenset()


def _whole(data: NDArray[np.float64]) -> frozenset[int]:
    kept = np.abs(data[np.isfinite(data) & (data == np.floor(data)) & (np.abs(data) < 2**31)])
    return frozenset(int(v) for v in kept)


# --- what is run -------------------------------------------------------------------------------------------------


def plan(
    ranges: Mapping[str, Span],
    declared: Iterable[str],
    models: Iterable[ModelProto],
    many: Sequence[int],
    served: Sequence[int],
) -> list[Size]:
    """The sizes to run beside the ordinary ones, the most telling first, each once.

    Args:
        ranges: Least and most of every length, by symbol.
        declared: Symbols whose range the user gave: nothing outside of it is run.
        models: Both models.
        many: Further numbers of candidates.
        served: Those that are run with the longest lengths.
    """
    found = landmarks(models)
    near, far = sorted(found.near), sorted(found.far - found.near)
    rows = [n + d for n in sorted(found.rows) if n > 2 for d in (1, 0) if n + d <= max(many, default=0)]
    given = set(declared)
    longest = {s: high for s, (_, high) in ranges.items()}
    shortest = {s: low for s, (low, _) in ranges.items()}

    def around(symbol: str, numbers: Iterable[int]) -> Iterator[int]:
        low, high = ranges[symbol]
        least = low if symbol in given else 0
        return (n for n in numbers if least <= n <= high)

    def about(numbers: Sequence[int]) -> list[int]:
        return [n + d for n in numbers if n > 1 for d in (1, 0, -1)]

    def one_by_one(*groups: Iterable[int], full: bool = True) -> Iterator[Size]:
        columns = [[Size(FEW, {s: n}, full) for n in around(s, itertools.chain(*groups))] for s in ranges]
        return (size for row in itertools.zip_longest(*columns) for size in row if size is not None)

    out = [Size(FEW, {s: n}) for s, n in longest.items()]
    out += [Size(n) for n in (*many, *[n for n in rows if n not in many][:_MOST_ROWS])]
    out += [Size(FEW, {s: n}) for s in ranges for n in around(s, (ranges[s][0], 0, 1, 2))]
    out += one_by_one(about(near))
    if len(ranges) > 1:
        ends = itertools.product(*([(s, n) for n in (ranges[s][1], ranges[s][0])] for s in ranges))
        out += [Size(FEW, longest), Size(FEW, shortest)]
        out += [Size(FEW, dict(corner)) for corner in itertools.islice(ends, _MOST_CORNERS)]
    out += [Size(FEW, {s: n}, False) for s, n in longest.items()]
    out += [Size(n, longest) for n in (1, 17) if longest]
    out += one_by_one([n + 1 for n in near if n > 1], full=False)
    out += one_by_one(about([n for n in far if n > 2][:_MOST_FAR]))
    out += [Size(n, longest) for n in served if longest]
    seen: set[tuple[str, int]] = set()
    kept = []
    for size in out:
        if (size.kind, size.candidates) not in seen:
            seen.add((size.kind, size.candidates))
            kept.append(size)
    return kept


def many_of(span: Span | None, level: str, counts: Sequence[int]) -> list[int]:
    """Numbers of candidates beyond the ordinary ones: the most, the usual and the least that are served.

    Args:
        span: Least and most candidates that the models were made for, where they say.
        level: How much is compared.
        counts: The ordinary numbers.
    """
    if level == "quick":
        return []
    low, high = span or (MOST[level], MOST[level])
    found = [high, round((low * high) ** 0.5), low]
    if level == "full":
        found.append(MOST[level])
    return [n for n in dict.fromkeys(found) if n not in counts]


def turns(models: Iterable[ModelProto]) -> list[int]:
    """Numbers of candidates around those at which a file goes from one plan to the other, or to one more block."""
    found = []
    for model in models:
        found += _turns(model.graph, {})
    return list(dict.fromkeys(found))


def _turns(graph: GraphProto, around: Mapping[str, TensorProto]) -> list[int]:
    """The same of a graph, with what is stored around it."""
    found = []
    makers = {o: node for node in graph.node for o in node.output}
    stored = {**around, **{t.name: t for t in graph.initializer}}
    for n in _numbers(stored[ROWS]) if ROWS in stored else ():
        found += [k + d for k in (n, 2 * n) for d in (-1, 0, 1)]
    for node in filter(joining.chooses, graph.node):
        less = makers.get(node.input[0])
        for i in less.input if less is not None else ():
            found += [n + d for n in (_numbers(stored[i]) if i in stored else ()) for d in (-1, 0, 1)]
        for branch in subgraphs(node):
            found += _turns(branch, stored)
    return found


def listing(sizes: Iterable[Size]) -> list[str]:
    """Sizes in words, those that differ in one extent on one line."""
    numbers: list[int] = []
    single: dict[tuple[str, int], list[int]] = {}
    joint: list[str] = []
    for size in sizes:
        if size.about:
            continue
        if not size.lengths:
            numbers.append(size.candidates)
        elif len(size.lengths) == 1:
            ((symbol, n),) = size.lengths.items()
            single.setdefault((name_of(symbol), size.candidates), []).append(n)
        else:
            joint.append(f"{size.says} with N = {size.candidates}")
    out = [f"N = {_numbers_in(numbers)}"] if numbers else []
    out += [f"{name} = {_numbers_in(found)} with N = {n}" for (name, n), found in single.items()]
    return out + list(dict.fromkeys(joint))


def _numbers_in(found: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(set(found))))
