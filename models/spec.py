"""Descriptions of model inputs, free of torch so that anything may import them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Level = Literal["request", "candidate", "mixed"]


@dataclass(frozen=True)
class InputSpec:
    """One graph input and what may be fed to it.

    Attributes:
        name: Starts with `user_`, `ctx_` or `hist_` if request-level, with `item_` if candidate-level.
        dtype: `float32` or `int64`.
        shape: Extents; `"N"` is the number of candidates.
        level: Whether all rows of one request are equal; `mixed` for a matrix with both kinds of columns.
        low: Smallest value.
        high: End of the value range, exclusive.
        request_columns: For `mixed` inputs, the request-level columns along axis 1: `"0:13,20"`, half-open.
        column_ranges: Ranges of groups of columns, where they differ: `(columns, low, high)`.
    """

    name: str
    dtype: Literal["float32", "int64"]
    shape: tuple[int | Literal["N"], ...]
    level: Level
    low: float
    high: float
    request_columns: str | None = None
    column_ranges: tuple[tuple[str, float, float], ...] = ()


def columns(text: str) -> list[int]:
    """Expands `"0:2,5"` to `[0, 1, 5]`."""
    return list(_expand(text))


def _expand(text: str) -> Iterator[int]:
    for part in filter(None, text.split(",")):
        first, _, end = part.partition(":")
        yield from range(int(first), int(end) if end else int(first) + 1)


def column_text(indices: Sequence[int]) -> str:
    """Writes column numbers the way `columns` reads them, in runs as long as possible."""
    runs: list[list[int]] = []
    for i in sorted(indices):
        if runs and runs[-1][1] == i:
            runs[-1][1] = i + 1
        else:
            runs.append([i, i + 1])
    return ",".join(f"{a}:{b}" if b - a > 1 else str(a) for a, b in runs)


def roles(specs: Sequence[InputSpec]) -> dict[str, Any]:
    """The content of a roles file for these inputs."""
    inputs: dict[str, Any] = {}
    for spec in specs:
        role: dict[str, Any] = {}
        if spec.level == "request":
            role["level"] = "request"
        if spec.request_columns is not None:
            role["request"] = spec.request_columns
        if spec.column_ranges:
            role["ranges"] = {text: [low, high] for text, low, high in spec.column_ranges}
        else:
            role["range"] = [spec.low, spec.high]
        inputs[spec.name] = role
    return {"inputs": inputs}


def sample(specs: Sequence[InputSpec], n: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Draws one request with `n` candidates; request-level values are repeated on all rows."""
    rng = np.random.default_rng(seed)
    return {spec.name: _draw(spec, n, rng) for spec in specs}


def _draw(spec: InputSpec, n: int, rng: np.random.Generator) -> np.ndarray:
    rows = 1 if spec.level == "request" else n
    shape = (rows, *(int(k) for k in spec.shape[1:]))
    if spec.column_ranges:
        value = np.empty(shape, np.float32)
        for text, low, high in spec.column_ranges:
            index = columns(text)
            is_id = isinstance(low, int) and isinstance(high, int)
            part = (rows, len(index))
            value[:, index] = rng.integers(low, high, part) if is_id else rng.uniform(low, high, part)
    elif spec.dtype == "int64":
        value = rng.integers(int(spec.low), int(spec.high), shape)
        if spec.name.startswith("hist_"):
            # Real histories end in padding; half of the positions at most, so that no mask is ever all empty.
            # The first position is kept non-zero for the same reason.
            value[:, 0] = np.maximum(value[:, 0], 1)
            value[:, shape[1] - int(rng.integers(0, shape[1] // 2 + 1)) :] = 0
    else:
        value = rng.uniform(spec.low, spec.high, shape)
    if spec.level == "request":
        value = np.repeat(value, n, axis=0)
    elif spec.request_columns is not None and n:
        index = columns(spec.request_columns)
        value[:, index] = value[:1, index]
    return np.ascontiguousarray(value.astype(spec.dtype))
