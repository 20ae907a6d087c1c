"""Lengths that a model declares as free, and that constants of its graph fix all the same.

`view(-1, 50 * d)` under a dynamic axis gives a model that takes histories of 50 and no others. Such a model does not
run at the lengths that shapes are confirmed at; the numbers that its graph admits are read off the sizes of its
tensors.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from onnxrank import facts, feeds
from onnxrank.errors import ModelError
from onnxrank.extents import Expr, product
from onnxrank.facts import Facts
from onnxrank.graphs import attribute
from onnxrank.model import LoadedModel, flattened
from onnxrank.operators import Trait, operator, traits
from onnxrank.roles import Roles
from onnxrank.study import Study, extents_of
from onnxrank.values import CANDIDATES, symbols

_MOST = 16
"""Ways to fix the lengths that are tried."""


def with_lengths(loaded: LoadedModel, roles: Roles) -> tuple[LoadedModel, str] | None:
    """A model that does not run as it declares, with the lengths declared that it does run at.

    Args:
        loaded: The model.
        roles: Roles of its inputs.

    Returns:
        The model with other declared shapes, and what is to be said of it; None where no such lengths are found.
    """
    flat = flattened(loaded.proto)
    declared = feeds.inputs(flat, roles)
    free = {s for i in declared for s in symbols(i.dims)} - {CANDIDATES}
    if not free:
        return None
    found = facts.derive(flat, {i.name: extents_of(i.dims) for i in declared}, loaded.folder)
    admitted = _admitted(flat, found, free)
    ways = itertools.product(*([(s, n) for n in sorted(admitted[s])] for s in sorted(admitted)))
    for way in itertools.islice(ways, _MOST):
        if not way:
            return None
        if _runs(loaded, roles, dict(way)):
            shown = " and ".join(f"{s.removeprefix('S:')} = {n}" for s, n in way)
            note = f"the model runs with {shown} only, which constants of its graph fix: so its inputs are declared now"
            return _fixed(loaded, roles, dict(way)), note
    return None


def declared_by(loaded: LoadedModel, roles: Roles, other: ModelProto) -> LoadedModel | None:
    """A model with the lengths declared that another one, made of it, declares; None where it declares none."""
    theirs = {i.name: i.dims or () for i in feeds.describe(other)}
    lengths = {
        d[0]: n
        for i in feeds.inputs(loaded.proto, roles)
        for d, n in zip(i.dims, theirs.get(i.name, ()), strict=False)
        if len(d) == 1 and isinstance(d[0], str) and d[0] != CANDIDATES and isinstance(n, int)
    }
    return _fixed(loaded, roles, lengths) if lengths else None


def _runs(loaded: LoadedModel, roles: Roles, lengths: Mapping[str, int]) -> bool:
    """Whether a model runs at some lengths, of which it says what runs say."""
    made = _fixed(loaded, roles, lengths)
    try:
        return Study(flattened(made.proto), roles, made).contradicted() is None
    except ModelError:
        return False


def _fixed(loaded: LoadedModel, roles: Roles, lengths: Mapping[str, int]) -> LoadedModel:
    proto = ModelProto()
    proto.CopyFrom(loaded.proto)
    shapes = {i.name: i.type.tensor_type.shape.dim for i in proto.graph.input}
    for i in feeds.inputs(loaded.proto, roles):
        for axis, dim in enumerate(i.dims):
            if len(dim) == 1 and dim[0] in lengths:
                shapes[i.name][axis].dim_value = lengths[str(dim[0])]
    return replace(loaded, proto=proto)


def _admitted(model: ModelProto, found: Facts, free: set[str]) -> dict[str, set[int]]:
    """Per length the numbers that nodes ask for."""
    out: dict[str, set[int]] = {}
    constants = _numbers(model.graph)
    shapes = {t.name: tuple(t.dims) for t in model.graph.initializer}
    sizes = {**shapes, **found.sizes}
    for node in model.graph.node:
        for size, entries in _asked(node, sizes, constants):
            match = _affine(size, free)
            if match is None:
                continue
            length, times, added = match
            if (entries - added) % times == 0 and entries - added > times:
                out.setdefault(length, set()).add((entries - added) // times)
    return out


def _affine(size: int | Expr, free: set[str]) -> tuple[str, int, int] | None:
    """The length that an extent is a multiple of, but for candidates: how many times, and what is added to that.

    None if it is of none. What is added is an extent, too: that of a history with the candidate behind it.
    """
    if not isinstance(size, Expr):
        return None
    times: dict[tuple[Any, ...], int] = {}
    rows = set()
    for atoms, factor in size.terms:
        others = tuple(a for a in atoms if a != CANDIDATES)
        times[others] = factor
        rows.add(len(atoms) - len(others))
    added = times.pop((), 0)
    if len(rows) != 1 or len(times) != 1:
        return None
    ((lengths, factor),) = times.items()
    if len(lengths) != 1 or lengths[0] not in free or factor < 0:
        return None
    return str(lengths[0]), factor, added


def _numbers(graph: GraphProto) -> dict[str, tuple[int, ...]]:
    """Entries of the small tensors that shapes are made of, without those that are computed."""
    tensors = {t.name: t for t in graph.initializer}
    tensors |= {n.output[0]: attribute(n, "value") for n in graph.node if operator(n) == "Constant"}
    out = {
        name: tuple(int(n) for n in numpy_helper.to_array(t).reshape(-1))
        for name, t in tensors.items()
        if t is not None and np.prod(t.dims) <= _MOST and t.data_type == TensorProto.INT64
    }
    for node in graph.node:
        if operator(node) == "Concat":
            out[node.output[0]] = tuple(n for i in node.input for n in out.get(i, ()))
        elif operator(node) == "Unsqueeze" and node.input[0] in out:
            out[node.output[0]] = out[node.input[0]]
    return out


def _asked(
    node: NodeProto, sizes: Mapping[str, tuple[int | Expr, ...]], constants: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[int | Expr, int]]:
    """Extents, and the numbers of entries that a node takes along them."""
    shapes = [sizes.get(i) for i in node.input]
    if len(shapes) < 2 or shapes[0] is None:
        return
    if operator(node) == "Reshape":
        asked = [n for n in constants.get(node.input[1], ()) if n > 0]
        yield product(shapes[0]), prod(asked)
        if shapes[0] and asked:
            yield shapes[0][0], asked[0]  # in front of axes that are computed, as that of rows and heads
    elif operator(node) in ("MatMul", "Gemm") and shapes[0] and shapes[1]:
        yield shapes[0][-1], next((n for n in shapes[1][-2:][:1] if isinstance(n, int)), 0)
    elif Trait.ELEMENTWISE in traits(node):
        for a, b in itertools.permutations([s for s in shapes if s is not None], 2):
            yield from ((x, y) for x, y in zip(a[::-1], b[::-1], strict=False) if isinstance(y, int))
