"""What is known of one tensor of the original."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto

from onnxrank.values import (
    MAX_ENTRIES,
    Sources,
    Unrepresentable,
    codes_of,
    view,
)


def test_a_view_has_a_code_per_entry() -> None:
    with pytest.raises(AssertionError):
        view(((2,),), TensorProto.FLOAT, np.zeros(3, np.int64))
    large = Sources().add(((MAX_ENTRIES + 1,),), TensorProto.FLOAT, "t")
    with pytest.raises(Unrepresentable, match="entries per row"):
        codes_of(large)
