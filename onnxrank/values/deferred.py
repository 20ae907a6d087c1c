"""What is put off: how a tensor is written once somebody asks for it, and what else can be asked of it before."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from onnxrank.values.dims import Dims
from onnxrank.values.division import Codes

if TYPE_CHECKING:
    from onnxrank.values.sources import Source


@dataclass(frozen=True)
class Origin:
    """What nodes are written for.

    Attributes:
        index: The original node that they belong to, by its place.
        hint: What the names of their tensors are derived from.
        rule: Name of the rule that they are accounted to; None for none.
    """

    index: int = 0
    hint: str = ""
    rule: str | None = None


class Deferred(ABC):
    """How a tensor is written that nobody has asked for yet.

    What else can be asked of it before it is written, it says by the other classes below that it belongs to.
    """

    @abstractmethod
    def materialise(self) -> str:
        """Writes the tensor; gives its name.

        Raises:
            Unrepresentable: The layout of an operand cannot be written.
        """


class DeferredMatMul(Deferred):
    """A matrix product that is not written yet: what is added to it can be added on the way.

    Attributes:
        dims: Its physical shape.
    """

    dims: Dims

    @abstractmethod
    def materialise(self, addend: str | None = None, have: Dims = ()) -> str:
        """Writes the product, with a tensor added to it.

        Args:
            addend: The tensor; None for none.
            have: Its physical shape, of which `dims` is a broadcast.
        """


class OpenProduct(Deferred):
    """A sum of request-level times candidate-level entries.

    A linear map behind it can take the request-level factors into its weights (`rules/fold.py`).
    """

    @abstractmethod
    def factors(self) -> tuple[Codes, Codes]:
        """Request-level and candidate-level factors of every entry, `[extents..., terms]` each."""


class Multiplicable(Deferred):
    """A tensor that can be multiplied with a matrix without being written."""

    @abstractmethod
    def then_matmul(self, weight: str, width: int) -> list[Source]:
        """Multiplies with a matrix behind it.

        Args:
            weight: Name of the matrix, of a row for each entry.
            width: Its number of columns.

        Returns:
            Tensors `[N, width]` whose sum is the product.
        """


class Selectable(Deferred):
    """A product of which some columns can be made alone."""

    @abstractmethod
    def select_columns(self, columns: NDArray[np.int64]) -> Source:
        """The same product with some of its columns only."""


class Scalable(Deferred):
    """A product that takes a number into its weights."""

    @abstractmethod
    def scale(self, number: str, times: bool) -> Source:
        """The product times a scalar constant, or divided by it.

        Args:
            number: Name of the scalar.
            times: Whether to multiply; divides if not.
        """


class AffineProduct(Deferred):
    """A product with constants or request-level weights, for whom it pays to know those."""

    @abstractmethod
    def coefficients(self) -> tuple[Codes, Codes]:
        """Weights and candidate-level entries of every column, `[columns, terms]` each."""
