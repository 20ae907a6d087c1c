"""Which nodes run request by request, because what they make of all requests together does not stay in the cache.

What a node makes of one request, weights among it, is still at hand when the next node reads it. What it makes of all
requests of a call goes to memory and back, and where candidates meet what their request made, it is copied besides. In
return, a node runs once, and reads its weights once. Both are costs, and the nodes with the better sum form a loop.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
from onnx import GraphProto, NodeProto, TensorProto, helper

from onnxrank.batching.tensors import Impossible, Rows, Size, Tensor
from onnxrank.batching.writer import Writer
from onnxrank.graphs import reads
from onnxrank.halves import renamed
from onnxrank.maxflow import NEVER, Network
from onnxrank.operators import Trait, traits

_CACHE = 1 << 20
"""Bytes that a core keeps at hand."""
_BYTE = 0.125e-9
"""Seconds per byte that a node writes."""
_FAR = _BYTE * 2 / 3
"""Seconds that a byte takes longer that is not at hand."""
_COPY = _BYTE + _FAR
"""Seconds per byte of what goes into a loop, or comes out."""
_UNIT = 1e12
_SHARED = _BYTE / 3
"""Seconds per byte of the weights of a product, which several requests together read once."""
_LAUNCH = 1.5e-6
"""Seconds that a node takes besides what it computes and writes."""
_MAC = 0.04e-9
"""Seconds per multiply-add, in which bytes come, too."""
TURN = 2e-5
"""Seconds that a turn of a loop takes besides its nodes."""
SINCE = 13
"""The first opset whose loops carry sequences."""


def ordered(nodes: Sequence[NodeProto], found: Sequence[frozenset[int]]) -> list[list[int]]:
    """An order of the nodes in which those of a region come one behind the other.

    Returns:
        Their places; those of a region as one list.
    """
    unit = {k: u for u in (sorted(r) for r in found) for k in u}
    units = {k: unit.get(k, [k]) for k in range(len(nodes))}
    maker = {o: k for k, n in enumerate(nodes) for o in n.output if o}
    done: set[int] = set()
    out: list[list[int]] = []
    waiting = list({u[-1]: u for u in units.values()}.values())
    while waiting:
        late = []
        for own in sorted(waiting, key=lambda u: u[-1]):
            needed = {maker[i] for k in own for i in reads(nodes[k]) if i in maker}
            if needed <= done | set(own):
                out.append(own)
                done |= set(own)
            else:
                late.append(own)
        waiting = late
    return out


def regions(
    nodes: Sequence[NodeProto],
    tensors: Mapping[str, Tensor],
    size: Callable[[str], int],
    macs: Callable[[NodeProto], int],
    requests: int,
) -> list[frozenset[int]]:
    """Finds the nodes that are to run request by request.

    Args:
        nodes: The nodes of the model for one request, in order.
        tensors: Where the requests lie in each tensor of the model for several.
        size: Bytes of a tensor for one request.
        macs: Multiply-adds of a node for one request.
        requests: How many there usually are.

    Returns:
        Sets of nodes, by place; no way leads out of one and back into it.
    """
    return _Choice(nodes, tensors, size, macs, requests).run()


def obliged(nodes: Sequence[NodeProto], places: Collection[int]) -> list[frozenset[int]]:
    """The regions in which some nodes have to run request by request.

    Args:
        nodes: The nodes of the model for one request, in order.
        places: Those nodes, by place.

    Returns:
        Sets of nodes, by place; no way leads out of one and back into it.
    """
    ways = _Ways(nodes)
    return list(map(frozenset, ways.convex(ways.groups(places))))


class _Ways:
    """Which nodes lead to which."""

    def __init__(self, nodes: Sequence[NodeProto]) -> None:
        self.nodes, self.reads = nodes, [reads(n) for n in nodes]
        self.maker = {o: k for k, n in enumerate(nodes) for o in n.output if o}
        self.readers: dict[str, set[int]] = defaultdict(set)
        for k, names in enumerate(self.reads):
            for name in names:
                self.readers[name].add(k)

    def after(self, k: int) -> set[int]:
        """The nodes that read what a node makes."""
        return set().union(*(self.readers[o] for o in self.nodes[k].output if o))

    def before(self, k: int) -> set[int]:
        """The nodes that make what a node reads."""
        return {self.maker[i] for i in self.reads[k] if i in self.maker}

    def groups(self, places: Collection[int], counts: Callable[[str], bool] = lambda name: True) -> list[set[int]]:
        """Of some nodes, those that hand something over to each other that counts."""
        left = set(places)
        found = []
        while left:
            group: set[int] = set()
            line = [left.pop()]
            while line:
                k = line.pop()
                group.add(k)
                near = {self.maker[i] for i in self.reads[k] if i in self.maker and counts(i)}
                near = near.union(*(self.readers[o] for o in self.nodes[k].output if o and counts(o)))
                line += near & left
                left -= near
            found.append(group)
        return found

    def convex(self, groups: Sequence[set[int]]) -> list[set[int]]:
        """Groups with all that lies on a way from one of their nodes to another; they may become one by that."""
        left = list(groups)
        unit = {k: group for group in left for k in group}
        joined: list[set[int]] = []
        while left:
            own = left.pop()
            whole = _reached(own, unit, self.after) & _reached(own, unit, self.before)
            left = [group for group in left if not group & whole]
            joined.append(whole)
        return joined


class _Choice:
    def __init__(
        self,
        nodes: Sequence[NodeProto],
        tensors: Mapping[str, Tensor],
        size: Callable[[str], int],
        macs: Callable[[NodeProto], int],
        requests: int,
    ) -> None:
        self.nodes, self.tensors, self.size, self.macs, self.requests = nodes, tensors, size, macs, requests
        self.ways = _Ways(nodes)
        self.reads, self.maker, self.readers = self.ways.reads, self.ways.maker, self.ways.readers
        self.gains = [self._gain(k) for k in range(len(nodes))]

    def run(self) -> list[frozenset[int]]:
        """The regions."""
        groups = self.ways.groups(self._cheapest(), lambda name: self._rows(name) is not None)
        return [frozenset(r) for r in self.ways.convex(groups) if self._worth(r) > TURN]

    def _worth(self, inside: set[int]) -> float:
        """Seconds per request that a loop saves, without what a turn takes: what goes in and out is copied."""
        given = {i for k in inside for i in self.reads[k] if self._rows(i) is not None}
        made = {o for k in inside for o in self.nodes[k].output if self._rows(o) is not None}
        wanted = {o for o in made if not self.readers[o] <= inside or not self.readers[o]}
        copied = sum(map(self.size, (given - made) | wanted))
        return sum(self.gains[k] for k in inside) - copied * _COPY

    def _rows(self, name: str) -> Rows | None:
        t = self.tensors.get(name)
        return None if t is None else t.rows

    def _gain(self, k: int) -> float:
        """Seconds per request that a node saves in a loop; below 0 where it costs them."""
        node, kinds = self.nodes[k], traits(self.nodes[k])
        if Trait.FREE in kinds:
            return 0.0
        moving = [i for i in self.reads[k] if self._rows(i) is not None]
        made = sum(self.size(o) for o in node.output if o)
        bytes_ = made + sum(map(self.size, moving))
        if not moving or self.requests * bytes_ <= _CACHE:
            return -_LAUNCH
        # Bytes come while multiply-adds are made.
        gain = max(0.0, bytes_ * _FAR - _MAC * self.macs(node)) - _LAUNCH
        if Trait.PRODUCT in kinds:
            gain -= _SHARED * sum(self.size(i) for i in self.reads[k] if self._rows(i) is None)
            each = [i for i in moving if self.tensors[i].each]
            if len(moving) > len(each) > 0:  # there and back
                gain += _BYTE * (made + sum(map(self.size, each)))
        return gain

    def _cheapest(self) -> set[int]:
        """The nodes for which gains and copies of what goes in and out come to the best sum: a smallest cut."""
        names = [n for n in dict.fromkeys(i for r in self.reads for i in r) if self._rows(n) is not None]
        names += [n for n in self.maker if self._rows(n) is not None and not self.readers[n]]
        count = len(self.nodes)
        source, sink = count + 2 * len(names), count + 2 * len(names) + 1
        net = Network(sink + 1)
        for k, gain in enumerate(self.gains):
            ends = (source, k) if gain > 0 else (k, sink)
            net.join(*ends, round(abs(gain) * _UNIT))
        for j, name in enumerate(names):
            maker, price = self.maker.get(name, sink), round(self.size(name) * _COPY * _UNIT)
            out, into = count + 2 * j, count + 2 * j + 1
            net.join(into, maker, price)
            net.join(maker, out, price)
            for k in self.readers[name]:
                net.join(out, k, NEVER)
                net.join(k, into, NEVER)
            if not self.readers[name]:
                net.join(out, sink, NEVER)
        net.flow(source, sink)
        late = net.before(sink)
        return {k for k in range(count) if k not in late}


def _reached(start: set[int], unit: Mapping[int, set[int]], near: Callable[[int], set[int]]) -> set[int]:
    """Nodes that a way leads to from a group; at any of a group it goes on from all of that.

    What is reached from a group and reaches it has to be one with it: else neither could run before the other.
    """
    seen, line = set(start), list(start)
    while line:
        for k in near(line.pop()):
            fresh = unit.get(k, {k}) - seen
            seen |= fresh
            line += fresh
    return seen


# --- writing ---------------------------------------------------------------------------------------------------------


class Turns:
    """Writes the nodes of a region as a loop over requests, in which they are as they are for one.

    Args:
        writer: The new graph.
        types: Element types of tensors.
        name: What the loop is called.

    Raises:
        Impossible: What goes in or out has candidates between other entries, or a type that is not known.
    """

    def __init__(self, writer: Writer, types: Mapping[str, int], name: str) -> None:
        self.writer, self.types, self.name, self.emit = writer, types, name, writer.emit
        self.body = GraphProto(name=name)
        self._made: dict[str, str] = {}
        self.turn = self._fresh("turn")
        self.body.input.append(helper.make_tensor_value_info(self.turn, TensorProto.INT64, []))
        going, on = self._fresh("going"), self._fresh("on")
        self.body.input.append(helper.make_tensor_value_info(going, TensorProto.BOOL, []))
        self.body.output.append(helper.make_tensor_value_info(on, TensorProto.BOOL, []))
        self.body.node.append(helper.make_node("Identity", [going], [on], name=on))

    def run(
        self, nodes: Sequence[NodeProto], held: Mapping[str, Tensor], results: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Writes the loop.

        Args:
            nodes: The nodes, in order.
            held: What they read that they do not make.
            results: What is read elsewhere of what they make, as it is without the loop.

        Returns:
            The results.
        """
        names = {name: self._given(t) for name, t in held.items()}
        own = {o: self._fresh(o) for n in nodes for o in n.output if o}
        self.body.node.extend(renamed(n, names | own) for n in nodes)
        joined = [name for name, t in results.items() if t.each]
        stacked = [name for name, t in results.items() if not t.each]
        starts = [self._collected(own[name], name, results[name]) for name in joined]
        for name in stacked:
            self.body.output.append(helper.make_tensor_value_info(own[name], self._type(name), None))
        parts = [self.emit.fresh(f"{name}/turns") for name in (*joined, *stacked)]
        loop = helper.make_node("Loop", [self.writer.requests.turns(), "", *starts], parts, name=self.name)
        loop.attribute.append(helper.make_attribute("body", self.body))
        self.emit.copy(loop, list(loop.input), parts)
        out = {}
        for name, part in zip((*joined, *stacked), parts, strict=True):
            t = results[name]
            if not t.each:
                out[name] = Tensor(part, t.sizes, Rows(False, 0, added=True))
                continue
            assert t.rows is not None
            whole = self.emit.add("ConcatFromSequence", [part], {"axis": t.rows.axis}, hint=name)
            out[name] = Tensor(whole, t.sizes, t.rows)
        return out

    def _fresh(self, hint: str) -> str:
        return self.emit.fresh(f"{hint}/turn")

    def _type(self, name: str) -> int:
        if not self.types.get(name):
            raise Impossible(f"the type of {name!r} is not known")
        return self.types[name]

    def _node(self, op: str, operands: Sequence[str], hint: str, **attributes: Any) -> str:
        out = self._fresh(hint)
        self.body.node.append(helper.make_node(op, list(operands), [out], name=out, **attributes))
        return out

    def _given(self, t: Tensor) -> str:
        """What a request has of a tensor."""
        if t.rows is None:
            return t.name
        if not t.each:
            return self._node("Gather", [self.writer.leading(t).name, self.turn], t.name, axis=0)
        _check(t)
        ends = [self._bound(k, t.rows.inner) for k in range(2)]
        return self._node("Slice", [t.name, *ends, self.writer.constant([t.rows.axis])], t.name)

    def _bound(self, k: int, inner: Size) -> str:
        """Where the candidates of a request begin, or end, or how many these are, int64 [1]."""
        key = f"{k}/{inner}"
        if key not in self._made:
            column = self._made.get("turn") or self._node("Reshape", [self.turn, self.writer.constant([1])], "turn")
            self._made["turn"] = column
            bound = self._node("Gather", [self.writer.requests.span()[k], column], "bound", axis=0)
            wide = bound if inner == 1 else self._node("Mul", [bound, self.writer.vector([inner])], "bound")
            self._made[key] = wide
        return self._made[key]

    def _collected(self, own: str, name: str, t: Tensor) -> str:
        """Has the body collect what it makes of candidates; the sequence to begin with."""
        _check(t)
        assert t.rows is not None
        kind = self._type(name)
        shape = self.writer.vector([0 if k == t.rows.axis else n for k, n in enumerate(t.sizes)])
        value = helper.make_tensor("value", kind, [1], np.zeros(1, helper.tensor_dtype_to_np_dtype(kind)))
        nothing = self.emit.add("ConstantOfShape", [shape], {"value": value}, hint=name)
        before, behind = self._fresh(f"{name}/before"), self._fresh(f"{name}/behind")
        self.body.input.append(helper.make_tensor_sequence_value_info(before, kind, None))
        self.body.output.append(helper.make_tensor_sequence_value_info(behind, kind, None))
        ends = [self.writer.constant([0]), self._bound(2, t.rows.inner)]
        cut = self._node("Slice", [own, *ends, self.writer.constant([t.rows.axis])], name)
        self.body.node.append(helper.make_node("SequenceInsert", [before, cut], [behind], name=behind))
        return self.emit.add("SequenceConstruct", [nothing], hint=name)


def _check(t: Tensor) -> None:
    assert t.rows is not None
    if t.rows.outer != 1:
        raise Impossible("candidates lie between other entries")
