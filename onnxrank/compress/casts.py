"""One cast behind a concatenation in the place of one behind each of the lookups that it brings together.

To move entries of 16 bits and then to cast them gives what the other order gives, to the bit. `fp16-tables` casts what
every lookup gives; where many of them give little each, as in wide models, a node takes longer than its entries do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from onnx import NodeProto

from onnxrank.compress.quantised import FP16_TABLES
from onnxrank.graphs import attribute
from onnxrank.network import Network, made_by
from onnxrank.operators import Trait, operator, traits

_METHOD = FP16_TABLES.name
_MANY = 16
"""Casts side by side that are joined where a concatenation has other operands: what they give is then copied twice."""


@dataclass(frozen=True)
class _Way:
    """How an operand of a concatenation comes from a cast.

    Attributes:
        cast: The cast.
        tensors: The operand, what it is made of, and so on up to what the cast gives.
    """

    cast: NodeProto
    tensors: tuple[str, ...]

    @property
    def to(self) -> int:
        """The type that is cast to."""
        return int(attribute(self.cast, "to"))


def join_casts(net: Network) -> int:
    """Casts what lookups give behind the concatenations that it goes into, in place, and that into the next ones.

    Returns:
        How many casts the model has less.
    """
    gone = 0
    for node in [n for n in net.nodes if operator(n) == "Concat" and len(n.input) > 1]:
        for start, ways in reversed(_runs([_way(net, i) for i in node.input])):
            if len(ways) >= min(len(node.input), _MANY):
                _join(net, node, start, ways)
                gone += len(ways) - 1
    return gone


def _way(net: Network, operand: str) -> _Way | None:
    """How an operand comes from the cast of a lookup, other shapes at most between, and nobody else reads it there."""
    tensors = [operand]
    while net.alone(tensors[-1]) is not None:
        node = net.maker.get(tensors[-1])
        if node is not None and operator(node) == "Cast":
            return _Way(node, tuple(tensors)) if made_by(node, _METHOD) else None
        if node is None or Trait.RESHAPE not in traits(node):
            return None
        tensors.append(node.input[0])
    return None


def _runs(ways: Sequence[_Way | None]) -> list[tuple[int, list[_Way]]]:
    """Operands side by side that are cast to the same type, from which place on."""
    out: list[tuple[int, list[_Way]]] = []
    last = None
    for k, way in enumerate(ways):
        if way is not None and last is not None and last.to == way.to:
            out[-1][1].append(way)
        elif way is not None:
            out.append((k, [way]))
        last = way
    return out


def _join(net: Network, node: NodeProto, start: int, ways: Sequence[_Way]) -> None:
    """Has a concatenation of what is not cast yet, and a cast behind it, give the operands of several casts."""
    casts = {w.cast.output[0]: w.cast.input[0] for w in ways}
    operands = [casts.get(i, i) for i in node.input[start : start + len(ways)]]
    for way in ways:
        for reader in net.readers[way.cast.output[0]]:
            reader.input[:] = [casts.get(i, i) for i in reader.input]
        net.resized(way.tensors)  # their type is no longer the one that the file declares
    net.nodes = [n for n in net.nodes if all(n is not w.cast for w in ways)]
    whole = len(ways) == len(node.input)
    half = net.fresh(f"{node.output[0]}.half")
    wide = node.output[0] if whole else net.fresh(f"{node.output[0]}.wide")
    made = [
        net.node(_METHOD, "Concat", operands, [half], axis=attribute(node, "axis")),
        net.node(_METHOD, "Cast", [half], [wide], to=ways[0].to),
    ]
    node.input[start : start + len(ways)] = [wide]
    net.replace(node, made if whole else [*made, node])
