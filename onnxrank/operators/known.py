"""Tensors whose entries are constants or extents, as they are known before a model runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxrank.extents import Expr, Unproved

Shape = tuple[int | Expr, ...]
Partial = Sequence[int | Expr | None]
"""A shape of which some extents are not known."""


@dataclass(frozen=True)
class Known:
    """A tensor whose entries are constants or extents.

    Attributes:
        shape: Its shape.
        data: Its entries, with a single one along symbolic axes, which it is constant along; of type `object` where
            some of them are expressions.
        dtype: Type of the entries.
    """

    shape: Shape
    data: NDArray[Any]
    dtype: np.dtype[Any]

    @property
    def concrete(self) -> bool:
        """Whether no entry depends on an extent."""
        return self.data.dtype.kind != "O" or self.dtype.kind == "O"

    @property
    def fixed(self) -> bool:
        """Whether neither entries nor shape depend on an extent."""
        return self.concrete and all(isinstance(n, int) for n in self.shape)

    def sizes(self) -> list[int | Expr]:
        """The entries of a tensor of integers, in order.

        Raises:
            Unproved: It is constant along a symbolic axis, or does not hold integers.
        """
        if self.dtype.kind not in "iub" or any(isinstance(n, Expr) for n in self.shape):
            raise Unproved("entries that are no extents")
        return [x if isinstance(x, Expr) else int(x) for x in self.data.reshape(-1).tolist()]


def constant(data: NDArray[Any]) -> Known:
    """A tensor of constants."""
    return Known(tuple(data.shape), data, data.dtype)


def known(shape: Sequence[int | Expr], data: NDArray[Any], dtype: np.dtype[Any]) -> Known:
    """A tensor from entries of any kind; expressions that turn out to be constants become such."""
    if not isinstance(data, np.ndarray):  # numpy gives single entries for arrays without dimensions
        alone = np.empty((), object)
        alone[()] = data
        data = alone
    if data.dtype.kind != "O":
        data = data.astype(dtype, copy=False)
    elif dtype.kind != "O" and not any(isinstance(x, Expr) for x in data.reshape(-1)):
        data = data.astype(dtype)
    return Known(tuple(shape), data, dtype)


def whole(partial: Partial) -> Shape:
    """A shape all of whose extents are known.

    Raises:
        Unproved: One is not.
    """
    out: list[int | Expr] = []
    for n in partial:
        if n is None:
            raise Unproved("an extent")
        out.append(n)
    return tuple(out)


def kept(shape: Shape) -> tuple[int, ...]:
    """Shape of an array that holds one entry along symbolic axes."""
    return tuple(1 if isinstance(n, Expr) else n for n in shape)


def objects(data: NDArray[Any]) -> NDArray[Any]:
    """Entries that expressions may stand among."""
    return data if data.dtype.kind == "O" else data.astype(object)
