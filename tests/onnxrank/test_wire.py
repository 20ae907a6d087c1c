"""Messages, there and back."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxrank import wire

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text() | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(min_size=1).filter(lambda k: k != "\0"), inner),
    max_leaves=12,
)


@given(VALUES)
def test_messages(value: object) -> None:
    stream = io.BytesIO()
    wire.send(stream, value)
    stream.seek(0)
    assert wire.receive(stream) == value
    with pytest.raises(EOFError):
        wire.receive(stream)


def test_large_and_small_arrays_side_by_side() -> None:
    sizes = [1, wire._SMALL, 3, 0, wire._SMALL // 4 - 1, wire._SMALL // 4, 2]
    sent = [np.arange(n, dtype=np.int32) for n in sizes]
    stream = io.BytesIO()
    wire.send(stream, sent)
    wire.send(stream, sent[::-1])
    stream.seek(0)
    for whole in (sent, sent[::-1]):
        assert all(np.array_equal(a, b) for a, b in zip(wire.receive(stream), whole, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int64", "int32", "uint8", "bool"])
def test_arrays(dtype: str) -> None:
    data = np.arange(6).reshape(2, 1, 3).astype(dtype)
    stream = io.BytesIO()
    wire.send(stream, {"a": [data, np.zeros((0, 4), dtype), np.array(["x", "ü"], object)]})
    stream.seek(0)
    a, b, c = wire.receive(stream)["a"]
    assert a.dtype == data.dtype and (a == data).all() and b.shape == (0, 4) and c.tolist() == ["x", "ü"]
    a[...] = 0  # may be written to


def test_a_message_that_is_cut_short_ends_the_stream() -> None:
    stream = io.BytesIO()
    wire.send(stream, {"a": np.arange(3), "b": [np.zeros(wire._SMALL), b"x"]})
    whole = stream.getvalue()
    for length in {*range(200), len(whole) // 2, *range(len(whole) - 20, len(whole))}:
        with pytest.raises(EOFError):
            wire.receive(io.BytesIO(whole[:length]))
