"""One node of the model for one request, as rules see it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from onnx import NodeProto

from onnxrank.batching.tensors import Impossible, Rows, Size, Tensor
from onnxrank.batching.writer import Writer
from onnxrank.extents import Unproved
from onnxrank.operators import Use


class Site:
    """One node with its operands, and what it gives for one request.

    Args:
        writer: The new graph.
        node: The node.
        operands: Its operands; None where it has none.
        sizes: Shapes of its results for one request.
        use: The node as the registry takes it.
        types: Element types of tensors.
    """

    def __init__(
        self,
        writer: Writer,
        node: NodeProto,
        operands: Sequence[Tensor | None],
        sizes: Sequence[tuple[Size, ...]],
        use: Use,
        types: Mapping[str, int],
    ) -> None:
        self.writer, self.node, self.operands, self.sizes, self.use, self.types = (
            writer, node, operands, sizes, use, types,
        )  # fmt: skip
        self.emit = writer.emit

    @property
    def given(self) -> list[Tensor]:
        """The operands that there are."""
        return [t for t in self.operands if t is not None]

    def operand(self, k: int) -> Tensor:
        """The k-th operand."""
        found = self.operands[k] if k < len(self.operands) else None
        if found is None:
            raise Impossible(f"operand {k} is not there")
        return found

    def optional(self, k: int) -> Tensor | None:
        """The k-th operand, if there is one."""
        return self.operands[k] if k < len(self.operands) else None

    def only(self) -> Tensor:
        """The first operand, the only one that differs between requests."""
        if any(t.rows is not None for t in self.given[1:]) or self.operand(0).rows is None:
            raise Impossible("further operands differ between requests")
        return self.operand(0)

    def constants(self, k: int, name: str) -> list[int]:
        """Whole numbers of an attribute or operand."""
        try:
            found = self.use.integers(k, name)
        except Unproved as e:
            raise Impossible(str(e)) from e
        if found is None:
            raise Impossible(f"{name} is not given")
        return found

    def same(self, inputs: Sequence[str], rows: Rows, attributes: Mapping[str, Any] | None = None) -> list[Tensor]:
        """The node itself on other operands, all results with the same place of the rows."""
        out = self.writer.copy(self.node, inputs, attributes)
        return [Tensor(o, s, rows) for o, s in zip(out, self.sizes, strict=True)]

    def with_first(self, name: str) -> list[str]:
        """Names of the operands with another first one."""
        return [name, *(t.name if t is not None else "" for t in self.operands[1:])]


Rule = Callable[[Site], list[Tensor]]
"""Writes what becomes of a node, and says where its results are."""
