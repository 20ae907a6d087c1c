"""One use of an operator: a node, and what is known of its operands where somebody asks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from onnxrank import moves
from onnxrank.extents import Expr, Unproved
from onnxrank.graphs import attribute
from onnxrank.operators.entry import Operator
from onnxrank.operators.known import Known, Shape, constant
from onnxrank.values import Dim, Dims, Unrepresentable

if TYPE_CHECKING:
    from onnxrank.facts import Facts


@dataclass(frozen=True)
class Use:
    """One use of an operator: its node, and what is known of its operands.

    Attributes:
        node: The node.
        opset: Version of the node's domain.
        shapes: Shapes of the operands; None where not even the number of dimensions is known, or nothing is given.
        values: Operands computed from constants and extents.
    """

    node: NodeProto
    opset: int
    shapes: Sequence[Shape | None]
    values: Sequence[Known | None]

    def attribute(self, name: str, default: Any = None) -> Any:
        """Value of an attribute."""
        return attribute(self.node, name, default)

    def has(self, k: int) -> bool:
        """Whether the k-th input is given."""
        return k < len(self.node.input) and bool(self.node.input[k])

    def shape(self, k: int) -> Shape:
        """Shape of the k-th input.

        Raises:
            Unproved: It is not known.
        """
        found = self.shapes[k] if k < len(self.shapes) else None
        if found is None:
            raise Unproved(f"the shape of input {k}")
        return found

    def value(self, k: int) -> Known:
        """Entries of the k-th input.

        Raises:
            Unproved: They are not known.
        """
        found = self.values[k] if k < len(self.values) else None
        if found is None:
            raise Unproved(f"the entries of input {k}")
        return found

    def integers(self, k: int, attribute: str) -> list[int] | None:
        """Constants that are an attribute in old opsets and an input in new ones; None if they are not given.

        Raises:
            Unproved: They are computed from something else than constants.
        """
        given = self.attribute(attribute)
        if given is not None:
            return [int(i) for i in given] if isinstance(given, (list, tuple)) else [int(given)]
        if not self.has(k):
            return None
        found = self.value(k).sizes()
        if any(isinstance(x, Expr) for x in found):
            raise Unproved(f"input {k} varies with extents")
        return [int(x) for x in found]  # type: ignore[arg-type]

    def entries(self, k: int) -> list[int | Expr] | None:
        """Whole numbers that are constants or made of extents; None where they are not known."""
        found = self.values[k] if k < len(self.values) else None
        return None if found is None else found.sizes()

    def axis(self, default: int, rank: int) -> int:
        """The attribute `axis`, counted from the front."""
        return int(self.attribute("axis", default)) % max(rank, 1)


@dataclass(frozen=True)
class Placed(Use):
    """One use of an operator whose operands have factored shapes, as rewrites and the analysis know them.

    Attributes:
        dims: Factored shapes of the operands; None where nothing is known of one.
        facts: Proved shapes.
        data: Entries of an operand that is a constant without symbolic extents; None for others.
    """

    dims: Sequence[Dims | None] = ()
    facts: Facts | None = None
    data: Callable[[int], NDArray[Any] | None] = lambda k: None

    def dim(self, k: int) -> Dims:
        """Factored shape of the k-th input.

        Raises:
            Unrepresentable: It is not known.
        """
        found = self.dims[k] if k < len(self.dims) else None
        if found is None:
            raise Unrepresentable(f"the shape of input {k} is not known")
        return found

    def shape(self, k: int) -> Shape:
        """Shape of the k-th input.

        Raises:
            Unproved: It is not known.
        """
        found = self.dims[k] if k < len(self.dims) else None
        if found is None:
            raise Unproved(f"the shape of input {k}")
        return tuple(self.size(d) for d in found)

    def value(self, k: int) -> Known:
        """Entries of the k-th input.

        Raises:
            Unproved: It is not a constant.
        """
        found = self.array(k)
        if found is None:
            raise Unproved(f"the entries of input {k}")
        return constant(found)

    def array(self, k: int) -> NDArray[Any] | None:
        """Entries of the k-th input if it is a constant without symbolic extents."""
        return self.data(k) if self.has(k) else None

    def constants(self, k: int, attribute: str) -> list[int] | None:
        """Whole numbers that are an attribute in old opsets and an input in new ones; None if they are no constants."""
        given = self.attribute(attribute)
        if given is not None:
            return [int(i) for i in given]
        found = self.array(k)
        return None if found is None else [int(i) for i in found.reshape(-1)]

    def entries(self, k: int) -> list[int | Expr] | None:
        """Whole numbers that are constants or made of extents; None where they are not known."""
        assert self.facts is not None
        found = self.array(k)
        return self.facts.entries.get(self.node.input[k]) if found is None else [int(i) for i in found.reshape(-1)]

    @property
    def targets(self) -> list[Sequence[moves.Extent] | None]:
        """Proved extents of the outputs; None where not even the number of dimensions is."""
        assert self.facts is not None
        return [self.facts.extents.get(o) for o in self.node.output]

    def target(self, k: int) -> Sequence[moves.Extent]:
        """Proved extents of an output.

        Raises:
            Unrepresentable: Not even the number of dimensions is proved.
        """
        found = self.targets[k]
        if found is None:
            raise Unrepresentable(f"the shape of {self.node.output[k]} is not known")
        return found

    def sizes(self, k: int) -> Shape:
        """Proved extents of an output as expressions."""
        assert self.facts is not None
        return self.facts.sizes[self.node.output[k]]

    def known(self, k: int) -> Dims:
        """An output's shape with each extent as one factor."""
        self.target(k)
        assert self.facts is not None
        found = self.facts.dims(self.node.output[k])
        assert found is not None
        return found

    def size(self, dim: Dim) -> int | Expr:
        """A factored extent as an expression."""
        assert self.facts is not None
        return self.facts.size_of(dim)


@dataclass(frozen=True)
class Flow(Placed):
    """One use of an operator in the analysis: what is known of its operands, entry by entry.

    Attributes:
        entry: The operator.
        level: Levels of an operand, in the shape of its constant extents.
        zero: Entries of an operand that are 0 for sure; None where none is known to be.
        hidden: Of a Softmax along an axis, the scores that a mask hides for sure from rows that have others; None if
            there are none.
    """

    entry: Operator = field(default_factory=lambda: Operator())
    level: Callable[[int], NDArray[np.int8]] = lambda k: np.zeros((), np.int8)
    zero: Callable[[int], NDArray[np.bool_] | None] = lambda k: None
    hidden: Callable[[int], NDArray[np.bool_] | None] = lambda axis: None

    def core(self) -> Sequence[int] | None:
        """The axes of the first operand that are taken in together; None where they are computed."""
        if self.entry.axes is None:
            return None
        try:
            return self.entry.axes(self)
        except Unproved:
            return None
