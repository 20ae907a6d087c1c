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


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int64", "int32", "uint8", "bool"])
def test_arrays(dtype: str) -> None:
    data = np.arange(6).reshape(2, 1, 3).astype(dtype)
    stream = io.BytesIO()
    wire.send(stream, {"a": [data, np.zeros((0, 4), dtype), np.array(["x", "ü"], object)]})
    stream.seek(0)
    a, b, c = wire.receive(stream)["a"]
    assert a.dtype == data.dtype and (a == data).all() and b.shape == (0, 4) and c.tolist() == ["x", "ü"]
    a[...] = 0  # may be written to
