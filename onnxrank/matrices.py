"""Inputs side by side in few matrices: one of ids and one of floats per level, in place of hundreds of inputs.

Every input costs a server something, however small it is. `pack` gives a model matrices, `[1, k]` for the request and
`[N, k]` for candidates, and takes them apart inside; what the model itself brings side by side stays together. Which
columns are whose is in the contract. `unpacked` is a model that stands for the result and takes the inputs one by one,
for everything that asks about those.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, pairwise
from math import prod
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from onnxrank.contract import CONTRACT, PACKED, stored_contract
from onnxrank.errors import ModelError
from onnxrank.graphs import attribute, captured_by, live, names_in, reads, rename, versions
from onnxrank.model import LoadedModel, flattened
from onnxrank.operators import operator
from onnxrank.ranker import Matrices
from onnxrank.roles import InputRole, Roles, ValueRange

_KINDS = {int(TensorProto.INT64): ("ids", "int64"), int(TensorProto.FLOAT): ("values", "float32")}
_FEW = 2
"""Pieces of a matrix up to which each is a Slice; more are one Split."""


def told(model: ModelProto) -> Matrices:
    """Which columns of a model's inputs are whose, by its contract; empty for a model whose inputs are not packed.

    Raises:
        ModelError: The contract does not fit the inputs.
    """
    stored = stored_contract(model)
    found = stored.get(PACKED) if stored is not None else None
    if not found:
        return {}
    inputs = {i.name for i in model.graph.input}
    fits = isinstance(found, dict) and found.keys() <= inputs
    if not fits or not all(isinstance(m, dict) and isinstance(m.get("columns"), list) for m in found.values()):
        raise ModelError("The stored contract does not say how the inputs are packed. Optimise the original again.")
    return dict(found)


# --- packing ---------------------------------------------------------------------------------------------------------


@dataclass
class Packing:
    """A model with its inputs in matrices.

    Attributes:
        model: The model.
        told: Per matrix its type, and per column or columns the input, where they begin, how many there are, and the
            input's shape.
        notes: What became of the inputs, a sentence each.
    """

    model: ModelProto
    told: dict[str, dict[str, Any]]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Input:
    """An input that becomes columns.

    Attributes:
        name: Its name.
        kind: Its element type.
        level: `request` or `candidate`.
        shape: Its extents; names of those that vary.
        width: Entries per row.
    """

    name: str
    kind: int
    level: str
    shape: tuple[int | str, ...]
    width: int

    @property
    def matrix(self) -> str:
        """The matrix that it becomes part of."""
        return f"{self.level}.{_KINDS[self.kind][0]}"

    @property
    def rows(self) -> int | str:
        """Rows of that matrix."""
        varies = self.shape and isinstance(self.shape[0], str)
        return self.shape[0] if varies else 1


def pack(model: ModelProto, roles: Roles, state: Iterable[str] = ()) -> Packing:
    """Brings a model's inputs side by side.

    Args:
        model: A model with the interface `request` or `same`; it is copied.
        roles: Roles of the original's inputs. Parts of one that is divided are called `X.request` and `X.candidate`.
        state: Inputs that are no features.

    Returns:
        The model; as it is where no input can be packed.

    Raises:
        ModelError: It has tensors that are called like a matrix.
    """
    stays: dict[str, str] = {}
    found: list[_Input] = []
    out = ModelProto()
    out.CopyFrom(flattened(model))
    held, given = {t.name for t in out.graph.initializer} | set(state), {o.name for o in out.graph.output}
    for info in out.graph.input:
        if info.name in held:
            continue
        made = _input(info, roles)
        if isinstance(made, str) or info.name in given:
            stays[info.name] = made if isinstance(made, str) else "it is an output, too"
        else:
            found.append(made)
    many = {i.matrix for i in found if i.rows != 1}
    stays |= {i.name: "it has no rows, and others do" for i in found if i.matrix in many and i.rows == 1}
    found = [i for i in found if i.name not in stays]
    notes = [f"{name} stays as it is: {why}" for name, why in stays.items()]
    if not found:
        return Packing(out, {}, [*notes, "no input can be packed"])
    taken = names_in(out.graph) & {i.matrix for i in found}
    if taken:
        raise ModelError(f"The model has a tensor called {min(taken)!r}, as inputs that are packed are. Rename it.")
    front = _Front(out, found).run()
    counts = ", ".join(f"{m}: {len(t['columns'])} inputs in {_width(t)} columns" for m, t in front.items())
    return Packing(out, front, [f"inputs are packed ({counts})", *notes])


def roles_of(packing: Packing, before: Roles) -> Roles:
    """Roles of the inputs of a packed model.

    Args:
        packing: The model, whose request-level matrices have one row.
        before: Roles of the inputs that it had.
    """
    found = {}
    for info in packing.model.graph.input:
        if info.name in before.inputs:
            found[info.name] = before.inputs[info.name]
        elif info.name in packing.told:
            level = info.name.partition(".")[0]
            ranges = [r for c in packing.told[info.name]["columns"] for r in _ranges(c, before.inputs[c["name"]])]
            rows, along = None if level == "request" else 0, 1 if ranges else None
            found[info.name] = InputRole(info.name, level, rows, along, ranges=tuple(ranges))
    return Roles(found)


def _ranges(column: Mapping[str, Any], role: InputRole) -> list[ValueRange]:
    """What values an input takes, by columns of its matrix."""
    width = int(column["width"])
    rest = [n for n in column["shape"] if isinstance(n, int)]
    places = np.arange(width).reshape(rest if prod(rest) == width else [width]) + int(column["at"])
    axis = None if role.axis is None else role.axis - (len(column["shape"]) - places.ndim)
    own = [places if r.positions is None else places.take(r.positions, axis) for r in role.ranges]
    return [replace(r, positions=tuple(p.ravel().tolist())) for r, p in zip(role.ranges, own, strict=True)]


def _input(info: ValueInfoProto, roles: Roles) -> _Input | str:
    """An input as columns; why it is none otherwise."""
    kind = info.type.tensor_type
    shape = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or "" for d in kind.shape.dim)
    if kind.elem_type not in _KINDS:
        return f"its type is {TensorProto.DataType.Name(kind.elem_type).lower()}, and matrices are int64 and float"
    stem, _, part = info.name.rpartition(".")
    role = roles.inputs.get(info.name) or roles.inputs.get(stem)
    if role is None:
        return "nothing is known of its rows"
    level = role.level if info.name in roles.inputs or role.level != "mixed" else part
    level = "request" if level == "request" else "candidate"
    rest, axis = shape, role.candidate_axis
    if axis is not None and (level == "candidate" or isinstance(shape[axis], str)):
        if axis != 0 or role.record is not None or isinstance(shape[0], int):
            return "its rows are not those of a matrix"
        rest = shape[1:]
    if not all(isinstance(d, int) and d > 0 for d in rest):
        return "its length varies"
    if level == "candidate" and rest is shape:
        return "it has no rows of candidates"
    return _Input(info.name, kind.elem_type, level, shape, prod(int(d) for d in rest))


def _width(matrix: Mapping[str, Any]) -> int:
    return sum(int(c["width"]) for c in matrix["columns"])


@dataclass(frozen=True)
class _Piece:
    """Columns of a matrix, `[begin, end)`."""

    matrix: str
    begin: int
    end: int


class _Front:
    """The inputs of a model, exchanged for matrices.

    Args:
        model: The model; it is changed.
        inputs: Those that are packed.
    """

    def __init__(self, model: ModelProto, inputs: Sequence[_Input]) -> None:
        self._model, self._graph = model, model.graph
        self._opset = versions(model)[""]
        self._taken = names_in(model.graph)
        self._inputs = self._ordered(inputs)
        self._by_name = {i.name: i for i in self._inputs}
        self._pieces: dict[str, _Piece] = {}
        ends: dict[str, int] = {}
        for i in self._inputs:
            begin = ends.get(i.matrix, 0)
            ends[i.matrix] = begin + i.width
            self._pieces[i.name] = _Piece(i.matrix, begin, ends[i.matrix])
        self._ends = ends
        self._front: list[NodeProto] = []
        self._cut: dict[_Piece, str] = {}
        self._names: dict[str, str] = {}

    def run(self) -> dict[str, dict[str, Any]]:
        """Exchanges them; says which columns are whose."""
        graph = self._graph
        self._join_concats()
        made = live(self._model)
        read = set().union(*(reads(n) | captured_by(n) for n in made.graph.node), (o.name for o in graph.output))
        kept = [n for n in made.graph.node]
        for i in self._inputs:
            if i.name in read:
                self._take_apart(i)
        nodes = [*self._cuts(), *self._front, *kept]
        # What is cut out is no input, and may stand beside one: see `unpacked`.
        names = {i.name: self._fresh(f"{i.name}/column") for i in self._inputs}
        for node in nodes:
            rename(node, names)
        rows = {i.matrix: i.rows for i in self._inputs[::-1]}
        others = [i for i in graph.input if i.name not in self._by_name]
        first = [helper.make_tensor_value_info(m, self._kind(m), [rows[m], width]) for m, width in self._ends.items()]
        del graph.node[:], graph.input[:]
        graph.node.extend(nodes)
        graph.input.extend([*first, *others])
        stale = [v for v in graph.value_info if v.name not in self._by_name]
        del graph.value_info[:]
        graph.value_info.extend(stale)
        return {m: self._told(m) for m in self._ends}

    def _told(self, matrix: str) -> dict[str, Any]:
        mine = [i for i in self._inputs if i.matrix == matrix]
        columns = [
            {"name": i.name, "at": self._pieces[i.name].begin, "width": i.width, "shape": [d or None for d in i.shape]}
            for i in mine
        ]
        return {"type": _KINDS[mine[0].kind][1], "columns": columns}

    def _kind(self, matrix: str) -> int:
        return next(i.kind for i in self._inputs if i.matrix == matrix)

    # --- order -------------------------------------------------------------------------------------------------------

    def _ordered(self, inputs: Sequence[_Input]) -> list[_Input]:
        """Inputs in the order in which the model brings them side by side, as far as it does; the most first."""
        by_name = {i.name: i for i in inputs}
        through = self._through(by_name)
        joins = [[through[i] for i in n.input if i in through] for n in self._graph.node if operator(n) == "Concat"]
        order = [name for names in sorted(joins, key=len, reverse=True) for name in names]
        place = {name: k for k, name in enumerate(dict.fromkeys([*order, *by_name]))}
        levels = sorted({i.matrix for i in inputs}, reverse=True)  # the request's first
        return sorted(inputs, key=lambda i: (levels.index(i.matrix), place[i.name]))

    def _through(self, by_name: Mapping[str, _Input]) -> dict[str, str]:
        """Tensors that are an input as a matrix of its own, or the vector of a single row that it is."""
        out = {name: name for name, i in by_name.items() if len(i.shape) == 2 or self._is_one(i)}
        for n in self._graph.node:
            name = n.input[0] if n.input else ""
            if operator(n) == "Unsqueeze" and name in by_name and len(by_name[name].shape) == 1:
                if isinstance(by_name[name].shape[0], str) and self._axes(n) in ([1], [-1]):
                    out[n.output[0]] = name
        return out

    def _is_one(self, i: _Input) -> bool:
        return len(i.shape) == 1 and not isinstance(i.shape[0], str)

    def _axes(self, node: NodeProto) -> list[int]:
        if self._opset < 13:
            return list(attribute(node, "axes", ()))
        held = next((t for t in self._graph.initializer if t.name == node.input[1]), None)
        return [] if held is None else [int(n) for n in numpy_helper.to_array(held).reshape(-1)]

    # --- what the model brings side by side itself -------------------------------------------------------------------

    def _join_concats(self) -> None:
        """Has Concats of columns that lie side by side read them as one."""
        through = self._through(self._by_name)
        made: list[NodeProto] = []
        for node in self._graph.node:
            made += self._joined(node, through) if operator(node) == "Concat" else [node]
        for node in made:
            rename(node, self._names)
        del self._graph.node[:]
        self._graph.node.extend(made)

    def _joined(self, node: NodeProto, through: Mapping[str, str]) -> list[NodeProto]:
        """A Concat with runs of columns as one operand each."""
        names = [through.get(i) for i in node.input]
        known = [self._by_name[n] for n in names if n is not None]
        flat = bool(known) and all(map(self._is_one, known))
        if (
            not known
            or any(self._is_one(i) != flat for i in known)
            or attribute(node, "axis") not in ((0, -1) if flat else (1, -1))
        ):
            return [node]
        runs = self._runs(names)
        if all(len(run) == 1 for run in runs):
            return [node]
        operands = []
        for run in runs:
            piece = self._run([names[k] for k in run])
            if len(run) == 1 or piece is None:
                operands += [node.input[k] for k in run]
                continue
            name = self._piece(piece)
            operands.append(self._squeezed(name, 0, self._fresh(f"{name}/flat")) if flat else name)
        if len(operands) > 1:
            del node.input[:]
            node.input.extend(operands)
            return [node]
        if node.output[0] in {o.name for o in self._graph.output}:
            return [helper.make_node("Identity", operands, [node.output[0]], name=node.name)]
        self._names[node.output[0]] = operands[0]
        return []

    def _runs(self, names: Sequence[str | None]) -> list[list[int]]:
        """Operands of a Concat, those together that lie side by side."""
        ends = [0] + [
            k
            for k, (a, b) in enumerate(pairwise(names), 1)
            if a is None or b is None or not self._follows(self._pieces[a], self._pieces[b])
        ]
        return [list(range(begin, end)) for begin, end in pairwise([*ends, len(names)])]

    @staticmethod
    def _follows(a: _Piece, b: _Piece) -> bool:
        return a.matrix == b.matrix and a.end == b.begin

    def _run(self, names: Sequence[str | None]) -> _Piece | None:
        pieces = [self._pieces[n] for n in names if n is not None]
        return _Piece(pieces[0].matrix, pieces[0].begin, pieces[-1].end) if pieces else None

    # --- taking matrices apart ---------------------------------------------------------------------------------------

    def _piece(self, piece: _Piece, name: str | None = None) -> str:
        """The tensor of some columns."""
        if name is None and (piece.begin, piece.end) == (0, self._ends[piece.matrix]):
            return piece.matrix
        return self._cut.setdefault(piece, name or self._fresh(f"{piece.matrix}/{piece.begin}"))

    def _take_apart(self, i: _Input) -> None:
        """Gives an input again, in its own shape."""
        piece = self._pieces[i.name]
        if len(i.shape) == 2 and self._cut.get(piece, i.name) == i.name:
            self._cut[piece] = i.name
            return
        name = self._piece(piece)
        shape = [0 if isinstance(d, str) else d for d in i.shape]  # 0 is the extent as it is
        if len(i.shape) == 1:
            self._squeezed(name, int(isinstance(i.shape[0], str)), i.name)
        elif len(i.shape) == 2:
            self._node("Identity", [name], i.name)
        else:
            self._node("Reshape", [name, self._constant(shape)], i.name)

    def _cuts(self) -> list[NodeProto]:
        """The nodes that give pieces of the matrices: a Split for several that do not overlap."""
        out: list[NodeProto] = []
        for matrix, mine in groupby(sorted(self._cut, key=lambda p: (p.matrix, p.begin, p.end)), lambda p: p.matrix):
            pieces, apart, end = list(mine), [], 0
            for p in sorted(pieces, key=lambda p: p.end):
                if p.begin >= end:
                    apart.append(p)
                    end = p.end
            if len(apart) > _FEW:
                out.append(self._split(matrix, apart))
                pieces = [p for p in pieces if p not in apart]
            out += [self._slice(p) for p in pieces]
        return out

    def _slice(self, piece: _Piece) -> NodeProto:
        ends = [self._constant([n]) for n in (piece.begin, piece.end, 1)]
        return helper.make_node("Slice", [piece.matrix, *ends], [self._cut[piece]], name=f"onnxrank/{self._cut[piece]}")

    def _split(self, matrix: str, pieces: Sequence[_Piece]) -> NodeProto:
        names, sizes, at = [], [], 0
        for p in [*pieces, _Piece(matrix, self._ends[matrix], self._ends[matrix])]:
            if p.begin > at:
                names.append(self._fresh(f"{matrix}/rest"))
                sizes.append(p.begin - at)
            if p.end > p.begin:
                names.append(self._cut[p])
                sizes.append(p.end - p.begin)
            at = p.end
        made = helper.make_node("Split", [matrix], names, name=f"onnxrank/{matrix}", axis=1)
        if self._opset < 13:
            made.attribute.append(helper.make_attribute("split", sizes))
        else:
            made.input.append(self._constant(sizes))
        return made

    def _squeezed(self, name: str, axis: int, result: str) -> str:
        """The same without an axis of 1."""
        if self._opset < 13:
            return self._node("Squeeze", [name], result, axes=[axis])
        return self._node("Squeeze", [name, self._constant([axis])], result)

    def _node(self, op: str, operands: Sequence[str], result: str, **attributes: Any) -> str:
        self._front.append(helper.make_node(op, operands, [result], name=f"onnxrank/{result}", **attributes))
        return result

    def _constant(self, data: Sequence[int]) -> str:
        name = self._fresh("onnxrank/columns")
        self._graph.initializer.append(numpy_helper.from_array(np.array(data, np.int64), name))
        if self._model.ir_version < 4:
            self._graph.input.append(helper.make_tensor_value_info(name, TensorProto.INT64, [len(data)]))
        return name

    def _fresh(self, hint: str) -> str:
        name, k = hint, 0
        while name in self._taken:
            k += 1
            name = f"{hint}_{k}"
        self._taken.add(name)
        return name


# --- one by one again ------------------------------------------------------------------------------------------------


def unpacked(loaded: LoadedModel) -> LoadedModel:
    """The same model with inputs one by one, as before they were packed; a model that takes them so, as it is."""
    found = told(loaded.proto)
    return replace(loaded, proto=_one_by_one(loaded.proto, found)) if found else loaded


def _one_by_one(model: ModelProto, found: Matrices) -> ModelProto:
    """The model behind nodes that bring its inputs side by side."""
    taken = names_in(model.graph)
    out = ModelProto()
    out.CopyFrom(model)
    kinds = {i.name: i.type.tensor_type.elem_type for i in model.graph.input}
    inputs: list[ValueInfoProto] = []
    before: list[NodeProto] = []
    for matrix, t in found.items():
        parts = []
        for c in t["columns"]:
            inputs.append(helper.make_tensor_value_info(c["name"], kinds[matrix], c["shape"]))
            parts.append(c["name"])
            if len(c["shape"]) != 2:
                parts[-1], shape = (_unlike(f"{c['name']}/{part}", taken) for part in ("row", "width"))
                width = numpy_helper.from_array(np.array([-1, c["width"]], np.int64))
                before.append(helper.make_node("Constant", [], [shape], name=shape, value=width))
                before.append(helper.make_node("Reshape", [c["name"], shape], [parts[-1]], name=parts[-1]))
        before.append(helper.make_node("Concat", parts, [matrix], name=matrix, axis=1))
    nodes = [*before, *out.graph.node]
    others = [i for i in out.graph.input if i.name not in found]
    del out.graph.node[:], out.graph.input[:]
    out.graph.node.extend(nodes)
    out.graph.input.extend([*inputs, *others])
    stored = stored_contract(out) or {}
    for p in out.metadata_props:
        if p.key == CONTRACT:
            p.value = json.dumps({k: v for k, v in stored.items() if k != PACKED}, sort_keys=True)
    return out


def _unlike(name: str, taken: set[str]) -> str:
    """A name that nothing has yet."""
    while name in taken:
        name += "_"
    taken.add(name)
    return name
