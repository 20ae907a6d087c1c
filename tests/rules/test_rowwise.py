"""Operators that work on every row alone."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import FLOAT
from onnx import helper
from onnxrank.rules.rowwise import ROWWISE

from onnxrank.emitter import Emitter
from onnxrank.facts import Facts
from onnxrank.rewrite import Rewrite
from onnxrank.values import CANDIDATES, codes_of, view


@pytest.mark.parametrize("stored", [(0, 1, 2), (1, 0, 2), (0, 2, 1)])
def test_softmax_over_a_length_is_made_as_rows_lie(stored: tuple[int, ...]) -> None:
    """Scores of candidates on the keys of a history, with heads in front: nothing is turned for it."""
    rw = Rewrite(Facts(), [], Emitter(["x", "y"], 17), {})
    own = ((CANDIDATES,), (2,), ("S:L",))
    source = rw.sources.add(tuple(own[k] for k in stored), FLOAT, "x")
    codes = codes_of(source).transpose(np.argsort(stored))
    rw.values["x"] = view(own, FLOAT, codes)
    (made,) = ROWWISE["Softmax"](rw, helper.make_node("Softmax", ["x"], ["y"], axis=-1)) or []
    assert made.dims == own
    kinds = [n.proto.op_type for n in rw.emit.nodes]
    assert ("Transpose" in kinds) == (stored[-1] != 2), "the axis that it goes over is the last"
    assert kinds[-1] == "Softmax"
