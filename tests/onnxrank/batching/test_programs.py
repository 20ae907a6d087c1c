"""Random programs for several requests per call: the same bits as one request after the other."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from helpers import Feed, feeds, patterns, run, session
from hypothesis import HealthCheck, given, note, reject, settings
from hypothesis import strategies as st
from programs import program

from onnxrank import batches
from onnxrank.batching import regions
from onnxrank.batching.engine import Options, batch
from onnxrank.errors import ModelError

SEEDS, STEPS = st.integers(0, 1 << 32), st.integers(1, 20)
EXAMPLES = settings(
    max_examples=8, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


def _held(seed: int, steps: int, **options: Any) -> None:
    made_up = program(seed, steps)
    note(onnx.printer.to_text(made_up.model))
    try:
        made = batch(made_up.model, request=patterns(made_up.inputs), check=False, options=Options(**options)).model
    except ModelError as e:
        assert "onnxrank" not in str(e)
        reject()
    onnx.checker.check_model(made, full_check=True)
    told = batches.convention(made)
    assert told is not None
    runs = session(made)
    for counts in ([3], [1, 4, 2], [2, 0, 0, 3, 0]):
        if options.get("interface") == "padded":
            counts = [3] * len(counts)
        both = [feeds(made_up.inputs, max(n, 1), seed=k) for k, n in enumerate(counts)]
        parts: list[Feed] = [p for _, p in both]
        if 0 in counts:
            parts = [_without(told, p) if not n else p for p, n in zip(parts, counts, strict=True)]
        got = batches.parted(told, run(runs, batches.joined(told, parts)), counts)
        for (whole, _), n, found in zip(both, counts, got, strict=True):
            want = run(made_up.model, whole) if n else {}
            for name, data in want.items():
                assert found[name].dtype == data.dtype and found[name].shape == data.shape
                np.testing.assert_array_equal(found[name], data)


def _without(told: Any, feed: Feed) -> Feed:
    """A request of no candidates."""
    how = {name: h["axis"] for name, h in told["inputs"].items() if h["each"]}
    how |= {c["name"]: 0 for name, t in told.get("packed", {}).items() if name in how for c in t["columns"]}
    return {k: v.take([], how[k]) if k in how else v for k, v in feed.items()}


@pytest.mark.slow
@EXAMPLES
@given(seed=SEEDS, steps=STEPS, rows=st.sampled_from(["lengths", "offsets", "index", "triton"]), pack=st.booleans())
def test_same_bits(seed: int, steps: int, rows: str, pack: bool) -> None:
    _held(seed, steps, rows=rows, pack=pack)


def _in_turns(seed: int, steps: int, **options: Any) -> None:
    """With loops over requests around nodes that were drawn."""
    rng = np.random.default_rng(seed)
    gains: dict[int, float] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(regions._Choice, "_gain", lambda self, k: gains.setdefault(k, float(rng.choice([-1e-3, 1.0]))))
        _held(seed, steps, **options)


@EXAMPLES
@given(seed=SEEDS, steps=STEPS, rows=st.sampled_from(["lengths", "index"]))
def test_same_bits_in_turns(seed: int, steps: int, rows: str) -> None:
    _in_turns(seed, steps, rows=rows)


@pytest.mark.slow
@settings(EXAMPLES, max_examples=150)
@given(seed=SEEDS, steps=STEPS, rows=st.sampled_from(["lengths", "offsets", "index", "triton", "padded"]))
def test_same_bits_of_many_in_turns(seed: int, steps: int, rows: str) -> None:
    _in_turns(seed, steps, **({"interface": "padded"} if rows == "padded" else {"rows": rows}))


@pytest.mark.slow
@settings(EXAMPLES, max_examples=150)
@given(seed=SEEDS, steps=STEPS, rows=st.sampled_from(["lengths", "index", "padded"]), pack=st.booleans())
def test_same_bits_of_many(seed: int, steps: int, rows: str, pack: bool) -> None:
    _held(seed, steps, **({"interface": "padded"} if rows == "padded" else {"rows": rows}), pack=pack)
