"""Holds a rewritten model against the original: the same scores, under the contract, by running both.

The measure is not a tolerance someone chose but the float64 result of the original: the rewritten model may be at most
twice as far from it as the original itself is, plus a few units of rounding. Where float64 cannot be run, the
original's own scores are the measure.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto

from onnxrank import runtime
from onnxrank.errors import ModelError
from onnxrank.facts import Setting, settings
from onnxrank.report import Comparison

CANDIDATES = (1, 2, 17)
SEEDS = 2
_ALGEBRA = 1e-10


def floor(dtype: np.dtype[Any], exact: bool) -> float:
    """Allowed difference in units of the output's scale: rounding of a few dozen operations.

    Args:
        dtype: Type of the output.
        exact: Whether the comparison is with a float64 truth (or else with the original's own rounded result).
    """
    if dtype.kind != "f" and dtype.name != "bfloat16":
        return 0.0
    eps = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype.name]
    return eps * (32 if exact else 512)


def difference(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Largest absolute difference; infinite where shape or type differ, or one is finite and the other is not."""
    if a.shape != b.shape:
        return float("inf")
    if a.dtype.kind not in "f" and a.dtype.name != "bfloat16":
        return 0.0 if np.array_equal(a, b) else float("inf")
    x, y = a.astype(np.float64), b.astype(np.float64)
    finite = np.isfinite(x)
    if not np.array_equal(finite, np.isfinite(y)):
        return float("inf")
    if not np.array_equal(x[~finite], y[~finite], equal_nan=True):
        return float("inf")
    gap = np.abs(x[finite] - y[finite])
    return float(gap.max()) if gap.size else 0.0


def compare(
    original: ModelProto,
    rewritten: ModelProto,
    feeds: Callable[[Setting], runtime.Feeds],
    translate: Callable[[runtime.Feeds], runtime.Feeds],
    symbols: Iterable[str],
    folder: str | os.PathLike[str] | None = None,
    *,
    candidates: Sequence[int] = CANDIDATES,
    seeds: int = SEEDS,
    sessions: Sequence[Any | None] = (None, None),
    raise_to_double: bool = True,
) -> tuple[list[Comparison], list[str]]:
    """Compares two models at several numbers of candidates.

    Args:
        original: The user's model.
        rewritten: The model under test.
        feeds: Makes the original's inputs.
        translate: Turns them into the rewritten model's.
        symbols: Names of the symbolic extents of the inputs.
        folder: Where external data lies.
        candidates: Numbers of candidates.
        seeds: Different data for each.
        sessions: Sessions of the two models, where there are any yet.
        raise_to_double: Whether to look for a float64 truth.

    Returns:
        The comparisons, and what could not be done.

    Raises:
        ModelError: onnxruntime does not run one of the models.
    """
    notes: list[str] = []
    pair = [original, rewritten]
    if runtime.has_half(original):
        try:
            made = [runtime.session(m, folder) for m in pair]
        except ModelError:
            notes.append("onnxruntime has no 16-bit kernels here for this model: it was checked in float32")
            pair = [runtime.retype(m, TensorProto.FLOAT, folder) for m in pair]
            made = [runtime.session(m, folder) for m in pair]
    else:
        made = [s or runtime.session(m, folder) for s, m in zip(sessions, pair, strict=True)]
    external = any(t.data_location == TensorProto.EXTERNAL for t in original.graph.initializer)
    double = [runtime.Float64(m, folder) for m in pair] if raise_to_double and not external else None
    names = [o.name for o in original.graph.output]
    runs: list[_Run] = []
    for n in candidates:
        for seed in range(seeds):
            (point,) = settings(symbols, (n,))
            feed = feeds(Setting(point.symbols, 100 * n + seed))
            other = translate(feed)
            try:
                scores = runtime.run(made[0], feed, names)
            except ModelError:
                if n > 1:
                    raise
                notes.append("the original does not run with a single candidate")
                break
            mine = runtime.run(made[1], other, names)
            truth = None
            if double is not None:
                try:
                    truth = [d.run(f, names) for d, f in zip(double, (feed, other), strict=True)]
                except ModelError:
                    double = None
            runs += [_Run(n, seed, k, scores[k], mine[k], [t[k] for t in truth] if truth else None) for k in names]
    if double is None:
        notes.append("no float64 run was possible, so the original's own scores were the measure")
    return [c for k in names for c in _verdicts([r for r in runs if r.output == k])], notes


@dataclass(frozen=True)
class _Run:
    """One output of both models at one setting; `truth` holds both in float64."""

    candidates: int
    seed: int
    output: str
    original: NDArray[Any]
    rewritten: NDArray[Any]
    truth: list[NDArray[Any]] | None


def _verdicts(runs: Sequence[_Run]) -> list[Comparison]:
    """Judges all runs of one output; its scale, and the original's own error, are those of all runs together."""
    scale, own = 1e-30, 0.0
    for r in runs:
        if runtime.is_float(r.original):
            finite = r.original.astype(np.float64)
            finite = np.abs(finite[np.isfinite(finite)])
            scale = max(scale, float(finite.max()) if finite.size else 0.0)
        if r.truth is not None:
            error = difference(r.original.astype(r.truth[0].dtype), r.truth[0])
            own = max(own, error if np.isfinite(error) else 0.0)
    out = []
    for r in runs:
        dtype, gap = r.original.dtype, difference(r.original, r.rewritten)
        allowed = floor(dtype, exact=False) * scale
        if r.truth is not None and np.isfinite(gap):
            apart = difference(*r.truth)
            if apart > _ALGEBRA * scale:
                gap, allowed = apart, _ALGEBRA * scale
            else:
                gap = difference(r.rewritten.astype(r.truth[0].dtype), r.truth[0])
                allowed = 2 * own + floor(dtype, exact=True) * scale
        out.append(Comparison(r.candidates, r.seed, r.output, gap, allowed, gap <= allowed))
    return out
