"""Embedding tables of two models, compared row by row without running anything.

Ids that are drawn at random meet few of a table's rows, so a row that changed would go unnoticed. Tables of one name
are compared exactly, and so are tables whose name changed: they are told by their type, shape and most of their rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from onnxrank.graphs import subgraphs
from onnxrank.joint import limits
from onnxrank.model import LoadedModel
from onnxrank.operators import operator

_CHUNK = 8 << 20
_SAMPLE = 64
_ALIKE = 0.5
"""Share of rows that are equal in two tables of which one is the other with changes."""
_LOOKUPS = ("Gather", "GatherND")


@dataclass(frozen=True)
class Changed:
    """A table that differs.

    Attributes:
        name: Its name in the original.
        other: Its name in the other model.
        size: Its number of rows.
        rows: Those that differ, the most different first.
        ids: Tensors of the original's main graph that index it.
        everywhere: Whether all lookups are in the main graph, so that `ids` are all there are.
    """

    name: str
    other: str
    size: int
    rows: NDArray[np.int64]
    ids: tuple[str, ...]
    everywhere: bool

    @property
    def says(self) -> str:
        """What differs, in a sentence."""
        renamed = f" (now {self.other!r})" if self.other != self.name else ""
        return (
            f"Table {self.name!r}{renamed}: {len(self.rows):,} of {self.size:,} rows differ, first "
            f"{int(self.rows.min())}."
        )


def changed(original: LoadedModel, optimized: LoadedModel) -> tuple[list[Changed], list[str]]:
    """Compares the tables of two models.

    Returns:
        Tables with rows that differ, and the names of those that the second model has no counterpart of.
    """
    before, after = _tensors(original.proto.graph), _tensors(optimized.proto.graph)
    after |= _parts(optimized, after)
    found, lost = [], []
    for name, (ids, everywhere) in _tables(original.proto.graph).items():
        t = before.get(name)
        if t is None or not t.dims or t.dims[0] < 2 or t.data_type == TensorProto.STRING:
            continue
        try:
            twin = _twin(name, t, original, before, after, optimized)
            if twin is not None and _same_place(t, original, after[twin], optimized):
                continue
            data = () if twin is None else (_data(t, original), _data(after[twin], optimized))
        except (OSError, ValueError):  # damaged data are the runtime's to find
            continue
        if twin is None:
            lost.append(name)
            continue
        rows = _differing(*data)
        if len(rows):
            found.append(Changed(name, twin, t.dims[0], rows, tuple(ids), everywhere))
    return found, lost


def _tensors(graph: GraphProto) -> dict[str, TensorProto]:
    """Constants of a main graph."""
    out = {t.name: t for t in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            out.update((node.output[0], a.t) for a in node.attribute if a.name == "value")
    return out


def _parts(loaded: LoadedModel, held: dict[str, TensorProto]) -> dict[str, TensorProto]:
    """Tables that are joined with others, each by itself."""
    graph = loaded.proto.graph
    maker = {o: n for n in graph.node for o in n.output}
    out: dict[str, TensorProto] = {}
    for node in graph.node:
        if not _looks_up(node) or node.input[0] not in held:
            continue
        found = limits(node.input[1], maker, lambda name: _data(held[name], loaded) if name in held else None)
        if found is None:
            continue
        whole = _data(held[node.input[0]], loaded)
        for rows, begin in {(int(n), int(b)) for n, b in zip(found[1].flat, found[2].flat, strict=True)}:
            name = f"{node.input[0]}[{begin}:{begin + rows}]"
            out[name] = numpy_helper.from_array(np.ascontiguousarray(whole[begin : begin + rows]), name)
    return out


def _tables(graph: GraphProto) -> dict[str, tuple[list[str], bool]]:
    """Tensors that rows are looked up in: the ids of the main graph's lookups, and whether there are no others."""
    out: dict[str, tuple[list[str], bool]] = {}
    for node in graph.node:
        if _looks_up(node):
            out.setdefault(node.input[0], ([], True))[0].append(node.input[1])
    for node in graph.node:
        for inner in _inside(node):
            if _looks_up(inner):
                out[inner.input[0]] = (out.get(inner.input[0], ([], True))[0], False)
    return out


def _looks_up(node: NodeProto) -> bool:
    return operator(node) in _LOOKUPS and all(a.i == 0 for a in node.attribute)


def _inside(node: NodeProto) -> Iterator[NodeProto]:
    for graph in subgraphs(node):
        for inner in graph.node:
            yield inner
            yield from _inside(inner)


def _twin(
    name: str,
    t: TensorProto,
    original: LoadedModel,
    before: dict[str, TensorProto],
    after: dict[str, TensorProto],
    optimized: LoadedModel,
) -> str | None:
    """The other model's name of a table."""

    def fits(other: TensorProto) -> bool:
        return other.data_type == t.data_type and list(other.dims) == list(t.dims)

    if name in after and fits(after[name]):
        return name
    others = [n for n, o in after.items() if n not in before and fits(o)]
    if not others:
        return None
    picked = np.unique(np.linspace(0, t.dims[0] - 1, _SAMPLE).astype(np.int64))
    mine = _data(t, original)[picked]
    shares = {n: float(_equal(mine, _data(after[n], optimized)[picked]).mean()) for n in others}
    best = max(shares, key=lambda n: shares[n])
    return best if shares[best] >= _ALIKE else None


def _data(t: TensorProto, loaded: LoadedModel) -> NDArray[Any]:
    """The entries of a tensor; those in a file of their own are mapped, not read."""
    if t.data_location != TensorProto.EXTERNAL or loaded.folder is None:
        return numpy_helper.to_array(t)
    entries = {e.key: e.value for e in t.external_data}
    kind = helper.tensor_dtype_to_np_dtype(t.data_type)
    place = loaded.folder / entries["location"]
    return (
        np.memmap(place, kind, "r", int(entries.get("offset") or 0), tuple(t.dims))
        if prod(t.dims)
        else np.zeros(tuple(t.dims), kind)
    )


def _same_place(a: TensorProto, one: LoadedModel, b: TensorProto, other: LoadedModel) -> bool:
    """Whether two tensors are the same bytes of one file, or of memory."""
    if a.data_location == b.data_location == TensorProto.EXTERNAL:
        return one.folder == other.folder and list(a.external_data) == list(b.external_data)
    return bool(a.raw_data) and a.raw_data == b.raw_data


def _differing(x: NDArray[Any], y: NDArray[Any]) -> NDArray[np.int64]:
    """Rows that differ, the most different first."""
    each = max(1, _CHUNK // max(1, x[:1].nbytes))
    rows: list[NDArray[np.int64]] = []
    gaps: list[NDArray[np.float64]] = []
    for start in range(0, len(x), each):
        mine, its = np.asarray(x[start : start + each]), np.asarray(y[start : start + each])
        at = np.flatnonzero(~_equal(mine, its))
        with np.errstate(all="ignore"):
            far = np.abs(mine[at].astype(np.float64) - its[at].astype(np.float64))
        rows.append(at + start)
        gaps.append(np.nan_to_num(far, nan=np.inf).max(axis=tuple(range(1, far.ndim)), initial=0.0))
    order = np.argsort(-np.concatenate(gaps), kind="stable")
    return np.asarray(np.concatenate(rows)[order], np.int64)


def _equal(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.bool_]:
    """Which rows hold the same numbers, whatever their bits: zeros of both signs and all NaN are alike."""
    flat = [np.ascontiguousarray(v).reshape(len(v), prod(v.shape[1:])) for v in (a, b)]
    same = np.all(flat[0].view(np.uint8) == flat[1].view(np.uint8), axis=1)
    unlike = np.flatnonzero(~same)
    if len(unlike) and a.dtype.kind not in "iub":
        x, y = (v[unlike].astype(np.float64) for v in flat)
        same[unlike] = ((x == y) | (np.isnan(x) & np.isnan(y))).all(axis=1)
    return np.asarray(same, np.bool_)


def names(found: Iterable[int], most: int = 4) -> str:
    """Numbers of rows in words."""
    rows = sorted(int(r) for r in found)
    return ", ".join(map(str, rows[:most])) + (", …" if len(rows) > most else "")
