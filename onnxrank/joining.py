"""Two plans in one file: an `If` on the number of candidates, around what they do in different ways.

What both do alike stands outside: in front of the `If` what does not depend on a difference, behind it what follows
from tensors that either gives. Large weights that both read are stored once. The condition is made of an extent and a
comparison alone, which run on the CPU wherever the model does, so that no data are waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import reduce
from operator import xor
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from onnxrank.graphs import attribute, captured, claimed, kind, names_in, reads, rename, subgraphs, versions
from onnxrank.operators import Trait, traits

NAME = "onnxrank/crossover"
"""Name of the `If`, and what the names around it begin with."""
TOGETHER = "onnxrank/together"
"""Name of an `If` between candidates in one piece and in blocks, which may stand in the second branch of the other."""
ALONE = "onnxrank/alone"
"""Name of an `If` between a single candidate and more, in whose second branch stands that between few and many."""
LAUNCHES = 10
"""Operators that the `If` costs as many as: its condition, itself, and the graph that it enters."""
SINGLE = 2
"""Where the second graph holds from so many candidates on, the first one is for one candidate, and not for none."""
_LEAST_OPSET = 9
"""Version of ONNX from which on whole numbers can be compared."""
_PART_OF_SHAPE = 15
"""Version of ONNX from which on a single extent can be asked for."""


@dataclass(frozen=True)
class Count:
    """Where a graph reads the number of candidates.

    Attributes:
        input: An input that has rows of candidates.
        axis: The axis of them.
        each: Rows per candidate.
    """

    input: str
    axis: int
    each: int = 1


Shape = Callable[[str, int], Sequence[int] | None]
"""Shape of a tensor that stands outside the `If`, at a number of candidates; None if it is not known."""
_COUNTS = (1, 2, 3, 8, 64, 512)
"""Numbers of candidates at which plans of memory are told apart."""
_SMALL = 1 << 14
"""Bytes of a weight up to which both branches have it."""
_TINY = 1 << 10
"""Bytes of a part of a weight up to which it is stored beside the weight."""
_FACTORED = Trait.PRODUCT | Trait.RECURRENT
"""Operators that multiply with weights."""


def joined(
    few: ModelProto, many: ModelProto, below: int, at: Count, shape: Shape | None = None, name: str = NAME
) -> ModelProto | None:
    """One model of two that compute the same from the same inputs.

    Args:
        few: The model for less than `below` candidates; for exactly one where that is `SINGLE`.
        many: The model for all others, whose metadata and signature the result has.
        below: The number of candidates from which on `many` holds.
        at: Where that is read.
        shape: Tells shapes of the second one's tensors, where they are known.
        name: What the `If` is called.

    Returns:
        The model; None where the graphs cannot stand in one `If`.
    """
    inputs, outputs = ([[v.name for v in getattr(m.graph, ends)] for m in (few, many)] for ends in ("input", "output"))
    sparse = any(m.graph.sparse_initializer for m in (few, many))
    if versions(many)[""] < _LEAST_OPSET or sparse or inputs[0] != inputs[1] or outputs[0] != outputs[1]:
        return None
    # Where a plan of memory for one number of candidates is taken for all, nothing is to depend on it.
    apart = shape is not None and not _plans(inputs[0], shape)
    return _Join(few, many, name, apart).model(below, at, shape)


def is_crossover(node: NodeProto) -> bool:
    """Whether a node is the `If` between two plans."""
    return node.op_type == "If" and node.name == NAME


def chooses(node: NodeProto) -> bool:
    """Whether a node is an `If` between graphs that give the same, by the number of candidates."""
    return node.op_type == "If" and node.name in (NAME, ALONE, TOGETHER)


def for_many(node: NodeProto) -> str:
    """Which branch of such a node has the plan for many candidates, in one piece."""
    return "then_branch" if node.name == TOGETHER else "else_branch"


def crossovers(graph: GraphProto) -> Iterator[NodeProto]:
    """The `If` nodes between two plans; there may be one behind that for a single candidate."""
    for node in graph.node:
        if is_crossover(node):
            yield node
        elif chooses(node) and node.name == ALONE:
            yield from crossovers(attribute(node, for_many(node)))


def exchanged(model: ModelProto) -> ModelProto:
    """A model of two plans with each in the other's place: whoever follows that for many then follows that for few."""
    out = ModelProto()
    out.CopyFrom(model)
    for node in crossovers(out.graph):
        for branch in node.attribute:
            branch.name = "then_branch" if branch.name == "else_branch" else "else_branch"
    return out


class _Side:
    """One of two graphs.

    Attributes:
        title: What its branch is called.
        graph: The graph.
        makers: The node that gives each tensor.
        users: The nodes that read each tensor, and at which places; -1 for one that reads it from a graph inside.
        ends: The outputs.
        stored: What is stored, by name.
        numbers: What each tensor is.
        front: Nodes in front of the `If`.
        behind: Nodes behind it.
        outside: What tensors and weights that both graphs have are called outside.
    """

    def __init__(self, title: str, graph: GraphProto) -> None:
        self.title, self.graph = title, graph
        self.makers = {o: k for k, n in enumerate(graph.node) for o in n.output if o}
        self.users: dict[str, list[tuple[int, int]]] = {}
        for k, node in enumerate(graph.node):
            for at, name in enumerate(node.input):
                self.users.setdefault(name, []).append((k, at))
            for name in reads(node) - set(node.input):
                self.users.setdefault(name, []).append((k, -1))
        self.ends = {o.name for o in graph.output}
        self.stored = {t.name: t for t in graph.initializer}
        self.numbers: dict[str, int] = {}
        self.front: set[int] = set()
        self.behind: set[int] = set()
        self.outside: dict[str, str] = {}


class _Numbers:
    """Tensors of two graphs by what they are: the same number is the same computation on the same data."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], int] = {}

    def of(self, graph: GraphProto) -> dict[str, int]:
        """Numbers of a graph's tensors."""
        out = {"": self._number(("nothing",))}
        out |= {i.name: self._number(("input", i.name)) for i in graph.input}
        for t in graph.initializer:
            if t.name not in out:  # what a caller may give in its place is an input
                out[t.name] = self._number(("stored", _content(t)))
        for k, node in enumerate(graph.node):
            key: tuple[Any, ...] = ("node", kind(node), *(out[i] for i in node.input))
            if subgraphs(node):
                key = ("alone", id(graph), k)
            out |= {o: self._number((key, at)) for at, o in enumerate(node.output) if o}
        return out

    def _number(self, key: tuple[Any, ...]) -> int:
        return self._known.setdefault(key, len(self._known))


def _content(t: TensorProto) -> bytes:
    """What a stored tensor holds."""
    plain = TensorProto()
    plain.CopyFrom(t)
    plain.ClearField("name")
    plain.ClearField("doc_string")
    return bytes(plain.SerializeToString(deterministic=True))


class _Join:
    """Two graphs, divided into what stands in front of the `If`, in it, and behind it; all in it where `apart`."""

    def __init__(self, few: ModelProto, many: ModelProto, name: str, apart: bool) -> None:
        self.base, self.name = many, name
        self.few, self.many = _Side("few", few.graph), _Side("many", many.graph)
        self.taken = names_in(few.graph) | names_in(many.graph)
        self.rows: dict[tuple[str, int], str] = {}
        numbers = _Numbers()
        for side in (self.few, self.many):
            side.numbers = numbers.of(side.graph)
        both = set() if apart else set(self.few.numbers.values()) & set(self.many.numbers.values())
        for side in (self.few, self.many):
            side.front = {
                k for k, n in enumerate(side.graph.node) if all(side.numbers[o] in both for o in n.output if o)
            }
        self.behind = {} if apart else self._behind()
        self.few.behind, self.many.behind = set(self.behind.values()), set(self.behind)
        # What stands in front is called as in the second graph.
        outside = {self.many.numbers[o]: o for k in self.many.front for o in self.many.graph.node[k].output if o}
        outside |= {self.many.numbers[t.name]: t.name for t in many.graph.initializer}
        self.few.outside = {name: outside[k] for name, k in self.few.numbers.items() if name and k in outside}

    # --- what is alike ---------------------------------------------------------------------------------------------

    def _behind(self) -> dict[int, int]:
        """Nodes of the second graph that both have behind what they do in different ways, with those of the first."""
        pairs: dict[int, int] = {}
        for k in reversed(range(len(self.many.graph.node))):
            other = None if k in self.many.front else self._partner(k, pairs)
            if other is not None and self._alike(self.few.graph.node[other], self.many.graph.node[k]):
                pairs[k] = other
        return self._from_products(pairs)

    def _partner(self, k: int, pairs: Mapping[int, int]) -> int | None:
        """The first graph's node whose outputs are read wherever a node's outputs are; None if there is none."""
        node = self.many.graph.node[k]
        mine: list[str] = []
        for o in node.output:
            own = {o} & self.many.ends
            for user, at in self.many.users.get(o, ()):
                if user not in pairs:
                    return None
                own.add(self.few.graph.node[pairs[user]].input[at])
            if len(own) != bool(o):
                return None
            mine += own or {""}
        found = {self.few.makers.get(o) for o in mine if o}
        other = found.pop() if len(found) == 1 else None
        if other is None or other in self.few.front or list(self.few.graph.node[other].output) != mine:
            return None
        read = {u for o in mine for u, _ in self.few.users.get(o, ())}
        return (
            other
            if read <= set(pairs.values()) and set(mine) & self.few.ends == set(node.output) & self.many.ends
            else None
        )

    def _alike(self, few: NodeProto, many: NodeProto) -> bool:
        """Whether two nodes do the same to what nodes give, and with the same of what is stored or fed."""
        if subgraphs(many) or kind(few) != kind(many) or len(few.input) != len(many.input):
            return False
        read = list(zip(few.input, many.input, strict=True))
        made = ((a in self.few.makers and b in self.many.makers) for a, b in read)
        return all(m or self._same(a, b) for m, (a, b) in zip(made, read, strict=True))

    def _same(self, few: str, many: str) -> bool:
        return self.few.numbers[few] == self.many.numbers[many]

    def _from_products(self, pairs: dict[int, int]) -> dict[int, int]:
        """The same from products on: a runtime fuses what follows a product with it, but not across the `If`."""
        kept, nodes = dict(pairs), self.many.graph.node

        def inside(k: int) -> bool:
            """Whether a node has to be in the `If`: as one that a product does not begin with, or for its readers."""
            makers = {self.many.makers.get(i) for i in nodes[k].input} - {None} - self.many.front
            readers = {u for o in nodes[k].output for u, _ in self.many.users.get(o, ())}
            return bool(readers - kept.keys()) or not (traits(nodes[k]) & Trait.PRODUCT or makers <= kept.keys())

        out = [k for k in kept if inside(k)]
        while out:
            for k in out:
                del kept[k]
            out = [k for k in kept if inside(k)]
        return kept

    # --- putting together ------------------------------------------------------------------------------------------

    def model(self, below: int, at: Count, shape: Shape | None) -> ModelProto:
        """The result."""
        out = ModelProto()
        out.CopyFrom(self.base)
        graph, nodes = out.graph, self.many.graph.node
        del graph.node[:], graph.value_info[:], graph.initializer[:]
        behind, given = self._crossing()
        branches = [self._branch(side, [pair[k] for pair in given]) for k, side in enumerate((self.few, self.many))]
        front = [nodes[k] for k in sorted(self.many.front)]
        graph.initializer.extend(self._weights([*front, *behind], branches))
        made, stored = _condition(self.name, below, at, versions(self.base)[""], front, self.taken)
        graph.initializer.extend(stored)
        outer = [*(i.name for i in graph.input), *(o for n in front for o in n.output if o)]
        views, told = self._told_apart(branches, outer, at.input, shape, below == SINGLE)
        ways = dict(zip(("then_branch", "else_branch"), branches, strict=True))
        choice = helper.make_node("If", [made[-1].output[0]], [*given.values(), *told], name=self.name, **ways)
        graph.node.extend([*front, *views, *made, choice, *behind])
        graph.value_info.extend(_described(self.many.graph, {o for n in front for o in n.output}, {}))
        return out

    def _crossing(self) -> tuple[list[NodeProto], dict[tuple[str, str], str]]:
        """What stands behind the `If`, and what that gives: per pair of tensors of the branches its name outside."""
        given: dict[tuple[str, str], str] = {}
        for o in self.base.graph.output:
            if self.many.makers.get(o.name) not in self.many.behind | self.many.front:
                given[o.name, o.name] = o.name
        behind = []
        for k in sorted(self.behind):
            node = NodeProto()
            node.CopyFrom(self.many.graph.node[k])
            for at, (few, many) in enumerate(zip(self.few.graph.node[self.behind[k]].input, node.input, strict=True)):
                if not self._same(few, many) and self.many.makers[many] not in self.many.behind:
                    pair = few, many
                    given.setdefault(pair, many if many not in given.values() else claimed(many, self.taken))
                    node.input[at] = given[pair]
            behind.append(node)
        return behind, given

    def _branch(self, side: _Side, given: Sequence[str]) -> GraphProto:
        """One branch, whose tensors have names of their own."""
        nodes = [k for k in range(len(side.graph.node)) if k not in side.front and k not in side.behind]
        names = dict(side.outside)
        inner = {o for k in nodes for o in side.graph.node[k].output if o}
        own = inner if side is self.few else inner & set(given)
        names |= {o: claimed(f"{side.title}/{o}", self.taken) for o in sorted(own)}
        if side is self.few:
            stored = {i for k in nodes for i in reads(side.graph.node[k])} & side.stored.keys() - side.outside.keys()
            self.moved = {n: claimed(f"few/{n}", self.taken) if n in self.many.numbers else n for n in sorted(stored)}
            names |= self.moved
        out = GraphProto(name=side.title)
        for k in nodes:
            node = out.node.add()
            node.CopyFrom(side.graph.node[k])
            if node.name and side is self.few:
                node.name = f"{side.title}/{node.name}"
            rename(node, names)
        out.value_info.extend(_described(side.graph, inner - set(given), names))
        for name in given:
            made = names.get(name, name)
            if name not in inner:  # a branch gives what it makes itself
                made = claimed(f"{side.title}/{name}", self.taken)
                out.node.append(helper.make_node("Identity", [names.get(name, name)], [made]))
            out.output.add().name = made
        return out

    def _told_apart(
        self, branches: Sequence[GraphProto], outer: Sequence[str], counted: str, shape: Shape | None, single: bool
    ) -> tuple[list[NodeProto], list[str]]:
        """Has branches plan their memory for every number of candidates.

        onnxruntime plans a graph's memory once for each exclusive or of all extents of what the graph is given. Of an
        even number of tensors with rows of candidates those cancel out: the plan for the number that is seen first is
        taken for all, and fits no other. Such a branch takes in one more of them, and gives its shape; but for one
        that is only run for a `single` candidate.

        Returns:
            Nodes to stand in front, and what the `If` gives more, which nobody reads.
        """
        views: list[NodeProto] = []
        more: dict[str, str] = {}
        if shape is None:
            return [], []
        for branch in branches:
            if single and branch is branches[0]:
                continue
            read = captured(branch) & set(outer)
            if _plans(read, shape) or not any(_plans([o], shape) for o in read):
                continue
            found = next((o for o in outer if _plans(read | {o}, shape)), None)
            if found is None and branch is branches[0]:  # with many candidates memory is little of the time
                found = claimed(f"{self.name}/rows", self.taken)
                views = [helper.make_node("Flatten", [counted], [found], axis=0)]
            if found is not None:
                more[branch.name] = found
        for branch in branches if more else ():
            made = branch.output.add().name = claimed(f"{branch.name}/{self.name}/extents", self.taken)
            if branch.name in more:
                branch.node.append(helper.make_node("Shape", [more[branch.name]], [made]))
            else:
                nothing = numpy_helper.from_array(np.zeros(1, np.int64))
                branch.node.append(helper.make_node("Constant", [], [made], value=nothing))
        return views, [claimed(f"{self.name}/extents", self.taken)] if more else []

    def _weights(self, nodes: Sequence[NodeProto], branches: Sequence[GraphProto]) -> list[TensorProto]:
        """What is stored outside; a branch has weights of products that it alone reads, and small ones of any kind.

        Whatever a branch captures is handed over in every run. Weights of products cost more still: onnxruntime packs
        them for every node, and gives one up that all its readers have packed, but a graph that is handed what is no
        tensor any more plans no memory. Two graphs deep it packs nothing that is captured. So a branch copies such a
        weight that others read, too: a runtime does so when it loads the model, and packs the copy.
        """
        stored = [*self.base.graph.initializer]
        for t in self.few.graph.initializer:
            if t.name in self.moved:
                own = TensorProto()
                own.CopyFrom(t)
                own.name = self.moved[t.name]
                stored.append(own)
        outside = {i for n in nodes for i in reads(n)} | {o.name for o in self.base.graph.output}
        outside |= {i.name for i in self.base.graph.input}
        stored = self._selected(stored, branches, outside)
        read = [{i for n in b.node for i in reads(n)} for b in branches]
        out = []
        for t in stored:
            homes = [b for b, own in zip(branches, read, strict=True) if t.name in own]
            alone = len(homes) == 1 and _multiplied(t.name, homes)
            if homes and t.name not in outside and (alone or _is_small(t)):
                for home in homes:
                    own = home.initializer.add()
                    own.CopyFrom(t)
                    if len(homes) > 1:
                        own.name = claimed(f"{home.name}/{t.name}", self.taken)
                        for n in home.node:
                            rename(n, {t.name: own.name})
            elif homes or t.name in outside:
                out.append(t)
                for home in homes:
                    for place, graph in _graphs(home, home.name, t.name):
                        if _is_packed(t, graph):
                            self._copy(t, graph, place)
        return out

    def _copy(self, t: TensorProto, graph: GraphProto, place: str) -> None:
        """Has the nodes of a branch, or of a graph inside it, read a copy of a weight.

        Args:
            t: The weight.
            graph: The graph.
            place: What tells it from others.
        """
        own, key = claimed(f"{place}/{t.name}", self.taken), (place, t.dims[0])
        if key not in self.rows:
            self.rows[key] = claimed(f"{place}/{self.name}/rows", self.taken)
            graph.initializer.append(numpy_helper.from_array(np.arange(t.dims[0]), self.rows[key]))
        for node in graph.node:
            if not subgraphs(node):  # what is inside copies it for itself
                rename(node, {t.name: own})
        nodes = [helper.make_node("Gather", [t.name, self.rows[key]], [own], axis=0), *graph.node]
        del graph.node[:]
        graph.node.extend(nodes)

    def _selected(
        self, stored: Sequence[TensorProto], branches: Sequence[GraphProto], outside: set[str]
    ) -> list[TensorProto]:
        """What is stored, without weights of the second branch that rows of the first one's make up.

        These are selected from them by nodes that the runtime folds when it loads the model.
        """
        read = [{i for n in b.node for i in reads(n)} - outside for b in branches]
        few, many = (
            [t for t in stored if t.name in own and _is_matrix(t, least)]
            for own, least in zip(read, (_SMALL, _TINY), strict=True)
        )
        nodes: list[NodeProto] = []
        gone = set()
        for part in many:
            if part.name not in read[0]:
                found = next((f for w in few if (f := self._selection(part, w)) is not None), None)
                if found is not None:
                    gone.add(part.name)
                    nodes += found[0]
                    branches[1].initializer.append(found[1])
        kept = [*nodes, *branches[1].node]
        del branches[1].node[:]
        branches[1].node.extend(kept)
        return [t for t in stored if t.name not in gone]

    def _selection(self, part: TensorProto, whole: TensorProto) -> tuple[list[NodeProto], TensorProto] | None:
        """Nodes that make one matrix of rows or columns of another one, and which those are; None if it has others."""
        small, large = numpy_helper.to_array(part), numpy_helper.to_array(whole)
        for turned in (False, True):
            for axis in (0, 1):
                at = _places(small.T if turned != (axis == 1) else small, large.T if axis else large)
                if at is None:
                    continue
                picked, index = (claimed(f"{part.name}/{what}", self.taken) for what in ("selected", "places"))
                made = picked if turned else part.name
                nodes = [helper.make_node("Gather", [whole.name, index], [made], axis=axis)]
                if turned:
                    nodes.append(helper.make_node("Transpose", [made], [part.name], perm=[1, 0]))
                return nodes, numpy_helper.from_array(at, index)
        return None


def _is_matrix(t: TensorProto, least: int) -> bool:
    """Whether a tensor is a matrix of more than some bytes, which are in the file."""
    return len(t.dims) == 2 and t.data_location != TensorProto.EXTERNAL and t.ByteSize() > least


def _places(rows: NDArray[Any], among: NDArray[Any]) -> NDArray[np.int64] | None:
    """Which rows of a matrix those of another one are; None if it has others."""
    if rows.dtype != among.dtype or rows.shape[1] != among.shape[1] or len(rows) > len(among):
        return None
    known = {row.tobytes(): k for k, row in enumerate(among)}
    found = [known.get(row.tobytes(), -1) for row in rows]
    return None if -1 in found else np.array(found, np.int64)


def _plans(given: Iterable[str], shape: Shape) -> bool:
    """Whether a graph that is given some tensors gets a plan of memory for every number of candidates."""
    keys = {reduce(xor, (e for g in given for e in shape(g, n) or ()), 0) for n in _COUNTS}
    return len(keys) == len(_COUNTS)


def _multiplied(name: str, graphs: Iterable[GraphProto], by: Trait = _FACTORED) -> bool:
    return any(name in n.input and traits(n) & by for g in graphs for n in g.node)


def _graphs(graph: GraphProto, place: str, name: str) -> Iterator[tuple[str, GraphProto]]:
    """A graph and those inside it that see an outer tensor, but for plans, which have been joined.

    Args:
        graph: The graph.
        place: What tells it from others, which is given with each, too.
        name: The tensor.
    """
    yield place, graph
    for node in graph.node:
        for inner in () if chooses(node) else subgraphs(node):
            if name in captured(inner):
                yield from _graphs(inner, f"{place}/{node.output[0]}/{inner.name}", name)


def _is_packed(t: TensorProto, graph: GraphProto) -> bool:
    """Whether a runtime packs a weight for a graph: matrices of products, and what recurrent layers multiply with."""
    return _multiplied(t.name, [graph], _FACTORED if len(t.dims) == 2 else Trait.RECURRENT)


def _is_small(t: TensorProto) -> bool:
    return t.data_location != TensorProto.EXTERNAL and t.ByteSize() <= _SMALL


def _described(graph: GraphProto, made: Set[str], names: Mapping[str, str]) -> list[ValueInfoProto]:
    """What a graph declares of some tensors, under their new names."""
    out = []
    for v in graph.value_info:
        if v.name in made:
            out.append(ValueInfoProto())
            out[-1].CopyFrom(v)
            out[-1].name = names.get(v.name, v.name)
    return out


def _condition(
    name: str, below: int, at: Count, opset: int, front: Sequence[NodeProto], taken: set[str]
) -> tuple[list[NodeProto], list[TensorProto]]:
    """Nodes that tell whether the first graph holds for so many candidates, and what they read.

    Args:
        name: What the names of its tensors begin with.
        below: The number of candidates from which on the second one does.
        at: Where the number of candidates is read.
        opset: The version of ONNX.
        front: Nodes that stand in front of the condition; the extent is not read twice.
        taken: Names that are taken.
    """
    names = {part: claimed(f"{name}/{part}", taken) for part in ("shape", "axis", "rows", "below", "few")}
    single = below == SINGLE
    stored = [numpy_helper.from_array(np.array([at.each * (1 if single else below)], np.int64), names["below"])]
    if opset >= _PART_OF_SHAPE:
        read = [helper.make_node("Shape", [at.input], [names["rows"]], start=at.axis, end=at.axis + 1)]
    else:
        stored.append(numpy_helper.from_array(np.array([at.axis], np.int64), names["axis"]))
        read = [
            helper.make_node("Shape", [at.input], [names["shape"]]),
            helper.make_node("Gather", [names["shape"], names["axis"]], [names["rows"]], axis=0),
        ]
    last = read[-1]
    same = next((n for n in front if n.input == last.input and kind(n) == kind(last)), None)
    compare = helper.make_node(
        "Equal" if single else "Less", [(same or last).output[0], names["below"]], [names["few"]]
    )
    return [*([] if same else read), compare], stored
