"""Random programs, divided: both models together, the state through bytes, give the same bits as the whole one."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import pytest
from helpers import Feed, feeds, patterns, run
from hypothesis import HealthCheck, given, note, reject, settings
from hypothesis import strategies as st
from programs import program

from onnxrank import halves
from onnxrank.errors import NothingApplied, UsageError
from onnxrank.splitting import Options, split

SEEDS, STEPS = st.integers(0, 1 << 32), st.integers(1, 20)
EXAMPLES = settings(
    max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


def _held(seed: int, steps: int, **options: Any) -> None:
    made_up = program(seed, steps)
    note(onnx.printer.to_text(made_up.model))
    with TemporaryDirectory() as folder:
        out = Path(folder, "out")
        try:
            split(made_up.model, out, request=patterns(made_up.inputs), check=False, options=Options(**options))
        except NothingApplied:
            reject()
        except UsageError as e:
            assert "cannot be packed" in str(e)
            reject()
        onnx.checker.check_model(onnx.load(out / "request.onnx"), full_check=True)
        onnx.checker.check_model(onnx.load(out / "candidate.onnx"), full_check=True)
        onnx.checker.check_model(halves.load(out).proto, full_check=True)
        pair = halves.Pair(out)
        once = {i["name"] for i in halves.read_contract(out)["models"]["request"]["inputs"]}
        names = [o.name for o in made_up.model.graph.output]
        for n in (1, 2, 5):
            whole, parts = feeds(made_up.inputs, n)
            # Where nothing was rewritten, inputs have a row per candidate still.
            feed: Feed = {k: v for k, v in {**parts, **whole}.items() if k not in once} | {k: parts[k] for k in once}
            want = run(made_up.model, whole)
            for name, got in zip(names, pair.run(names, feed), strict=True):
                assert got.dtype == want[name].dtype and got.shape == want[name].shape
                np.testing.assert_array_equal(got, want[name])


@EXAMPLES
@given(seed=SEEDS, steps=STEPS)
def test_same_bits(seed: int, steps: int) -> None:
    _held(seed, steps)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"state": "packed"}, {"guard": False, "most": 1 << 40}])
@settings(EXAMPLES, max_examples=150)
@given(seed=SEEDS, steps=STEPS)
def test_same_bits_of_many(options: dict[str, Any], seed: int, steps: int) -> None:
    _held(seed, steps, **options)
