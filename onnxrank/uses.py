"""Who makes and who reads the tensors of a graph, and questions about everything that lies behind one of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, TypeVar

from onnx import NodeProto

from onnxrank.graphs import reads
from onnxrank.operators import Trait, traits

T = TypeVar("T")


class Uses:
    """Producers and readers of the tensors of a graph.

    Args:
        nodes: All nodes, in topological order.

    Attributes:
        producers: The node that makes each tensor; graph inputs and initializers have none.
    """

    def __init__(self, nodes: Iterable[NodeProto] = ()) -> None:
        self.producers: dict[str, NodeProto] = {}
        self._readers: dict[str, list[NodeProto]] = {}
        self._answers: dict[tuple[Hashable, str], Any] = {}
        for node in nodes:
            self.producers.update({o: node for o in node.output if o})
            for i in node.input:
                if i:
                    self._readers.setdefault(i, []).append(node)

    def readers(self, name: str) -> list[NodeProto]:
        """The nodes that read a tensor, once for every operand that it is."""
        return self._readers.get(name, [])

    def behind(
        self,
        name: str,
        question: Hashable,
        judge: Callable[[NodeProto, str], T | None],
        join: Callable[[str, list[T]], T],
    ) -> T:
        """Answers a question about a tensor from the answers for its readers.

        Every tensor is asked once: paths may double at every node. Nothing recurses: chains may be of any length.

        Args:
            name: The tensor.
            question: What is asked; the key that answers are kept under.
            judge: The answer for a node and the operand that it is reached by; None where it is that for its first
                output.
            join: The answer for a tensor from those for its readers.
        """
        stack = [name]
        while stack:
            at = stack[-1]
            if (question, at) in self._answers:
                stack.pop()
                continue
            found: list[T] = []
            waiting = []
            for node in self.readers(at):
                answer = judge(node, at)
                if answer is None:
                    behind = node.output[0]
                    if (question, behind) not in self._answers:
                        waiting.append(behind)
                        continue
                    answer = self._answers[question, behind]
                found.append(answer)
            if waiting:
                stack += waiting
            else:
                self._answers[question, at] = join(at, found)
        result: T = self._answers[question, name]
        return result

    def forget(self) -> None:
        """Drops all answers, because something that they depend on has changed."""
        self._answers.clear()


def changed_by(nodes: Iterable[NodeProto], tensors: Iterable[str]) -> set[str]:
    """The tensors whose entries those of some others may change; what their extents change does not count.

    Args:
        nodes: All nodes, in topological order.
        tensors: The others, which are among the result.
    """
    out = set(tensors)
    for node in nodes:
        if not out.isdisjoint(reads(node)) and Trait.EXTENTS not in traits(node):
            out.update(o for o in node.output if o)
    return out
