"""What is known of a tensor of the original: its shape, and where its entries come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from onnxrank.values.dims import Dims, extents
from onnxrank.values.division import Codes
from onnxrank.values.sources import Source, codes_of


@dataclass(eq=False)
class Value:
    """A tensor of the original graph: logical shape, and where each entry comes from.

    `whole` is set where the value is one source and nothing else: then the codes are only made when asked for.
    """

    dims: Dims
    dtype: int
    whole: Source | None = None
    _codes: Codes | None = field(default=None, repr=False)

    @property
    def codes(self) -> Codes:
        """Codes, one axis per dimension.

        Raises:
            Unrepresentable: The tensor has too many entries per row to list them.
        """
        if self._codes is None:
            assert self.whole is not None
            self._codes = codes_of(self.whole)
        return self._codes

    @property
    def rank(self) -> int:
        """Number of dimensions."""
        return len(self.dims)


@dataclass(eq=False)
class Sum:
    """An addition not made yet: the value is the sum of the terms, each broadcast to `dims`."""

    dims: Dims
    dtype: int
    terms: list[Value]

    @property
    def rank(self) -> int:
        """Number of dimensions."""
        return len(self.dims)


@dataclass(eq=False)
class Affine(ABC):
    """A normalised value kept apart from its normalisation: `scale * (base @ matrix) + shift` along the last axis.

    Attributes:
        base: Blocks along the last axis, of `K + k` entries.
        scale: One factor per row (last axis of extent 1).
    """

    dims: Dims
    dtype: int
    base: Value
    scale: Value

    @property
    def rank(self) -> int:
        """Number of dimensions."""
        return len(self.dims)

    @abstractmethod
    def fold(self, weight: str) -> tuple[str, str | None]:
        """Writes `matrix @ W` and `shift @ W` (None for no shift) for the name of a weight matrix `W` of K rows."""

    @abstractmethod
    def whole(self) -> Value:
        """The value as the model computes it, for consumers that are not linear."""


Abstract = Value | Sum | Affine


def view(dims: Dims, dtype: int, codes: Codes) -> Value:
    """A value given by its codes."""
    assert codes.shape == extents(dims), (codes.shape, dims)
    return Value(dims, dtype, None, codes)
