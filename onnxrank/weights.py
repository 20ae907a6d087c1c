"""Constant matrices that products are made with, cut and permuted while the model is rewritten."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxrank.emitter import Emitter


@dataclass(frozen=True)
class Weights:
    """A constant matrix `[K, columns]`, or a stack of those.

    Attributes:
        data: Its entries.
        name: A tensor that holds them, where the model computes them: parts are then taken of that, because the
            entries here are rounded to the model's type.
    """

    data: NDArray[Any]
    name: str | None = None

    def part(self, emit: Emitter, axis: int, index: NDArray[np.int64]) -> Weights:
        """Some of the positions along an axis, as weights of their own."""
        name = None
        if self.name is not None:
            name = emit.add("Gather", [self.name, emit.constant(index.astype(np.int64))], {"axis": axis})
        return Weights(np.ascontiguousarray(self.data.take(index, axis)), name)

    def reshaped(self, emit: Emitter, shape: Sequence[int]) -> Weights:
        """The same entries in a shape."""
        name = self.name
        if name is not None and self.data.shape != tuple(shape):
            name = emit.add("Reshape", [name, emit.constant(np.array(shape, np.int64))])
        return Weights(self.data.reshape(shape), name)

    def tensor(self, emit: Emitter) -> str:
        """Writes all of them."""
        return self.name if self.name is not None else emit.constant(self.data)

    def rows(self, emit: Emitter, index: NDArray[np.int64]) -> str:
        """Writes the rows at some positions, `[*index.shape, columns]`."""
        if self.name is None:
            return emit.constant(np.ascontiguousarray(self.data[index]))
        return emit.add("Gather", [self.name, emit.constant(index.astype(np.int64))], {"axis": 0})
