"""The tensors that index maps speak of."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import TensorProto

from onnxrank.values import (
    HOLE,
    Level,
    Sources,
    canonical,
    codes_of,
)


def constant(sources: Sources, data: NDArray[Any]) -> Any:
    dims = tuple(canonical([n]) for n in data.shape)
    return sources.add(dims, TensorProto.FLOAT, load=lambda: data)


def test_levels_are_read_off_the_sources() -> None:
    sources = Sources()
    made = [
        constant(sources, np.arange(3.0)),
        sources.add((("S:L",), (3,)), TensorProto.FLOAT, "u"),
        sources.add((("N",), (3,)), TensorProto.FLOAT, "x"),
        sources.add((("N~?k.0",), (3,)), TensorProto.FLOAT, "k"),
    ]
    assert [s.level for s in made] == [Level.CONSTANT, Level.REQUEST, Level.CANDIDATE, Level.CANDIDATE]
    codes = np.array([codes_of(s).reshape(-1)[0] for s in made] + [HOLE])
    assert sources.levels(codes).tolist() == [0, 1, 2, 2, -1]
    assert sources.of(np.array([HOLE])) == [] and sources.symbols(np.array([HOLE])) == set()


def test_constants_are_looked_up_by_code() -> None:
    sources = Sources()
    a, b = (constant(sources, d) for d in (np.arange(6.0).reshape(2, 3), np.array([10.0, 20.0])))
    codes = np.concatenate([codes_of(a)[::-1].reshape(-1), codes_of(b)]).reshape(4, 2)
    assert sources.constants(codes).tolist() == [[3, 4], [5, 0], [1, 2], [10, 20]]


def test_sources_taken_back_are_noticed_by_their_codes() -> None:
    sources = Sources()
    sources.add((), TensorProto.FLOAT, "kept")
    since = sources.count
    gone = codes_of(sources.add((), TensorProto.FLOAT, "gone"))
    sources.forget(since)
    assert sources.add((), TensorProto.FLOAT, "later").number == since + 1
    with pytest.raises(LookupError, match="taken back"):
        sources.of(gone)
