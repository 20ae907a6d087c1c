"""Wrong optimised models of every kind that has been met, and the right ones that they were made of.

A mutant is an edit of the right optimised model of one ranker in `models/onnx`, or a pair built by hand where no ranker
has the construct. None of them keeps the stored contract, so that scores, not hashes, must give them away.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import yaml
from helpers import INT64, Graph, rewritten
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from onnxrank.contract import CONTRACT
from onnxrank.feeds import describe
from onnxrank.roles import Roles, resolve

FOLDER = Path(__file__).resolve().parents[2] / "models" / "onnx"


@dataclass(frozen=True)
class Pair:
    """Two models and the contract between them.

    Attributes:
        original: The original.
        optimized: The model under test.
        roles: Roles of the original's inputs.
    """

    original: ModelProto
    optimized: ModelProto
    roles: Roles | None


class Edit:
    """Edits a model in place."""

    def __init__(self, model: ModelProto) -> None:
        self.model = model
        self.graph = model.graph
        self._count = 0

    def nodes(self, *ops: str, reads: str | None = None) -> list[NodeProto]:
        """Nodes by operator, and by a part of an operand's name."""
        return [n for n in self.graph.node if n.op_type in ops and (reads is None or any(reads in i for i in n.input))]

    def array(self, name: str) -> NDArray[Any]:
        return numpy_helper.to_array(next(t for t in self.graph.initializer if t.name == name))

    def known(self, name: str) -> bool:
        return any(t.name == name for t in self.graph.initializer)

    def const(self, data: Any, dtype: Any = np.float32) -> str:
        self._count += 1
        name = f"edited_{self._count}"
        self.graph.initializer.append(numpy_helper.from_array(np.asarray(data, dtype), name))
        return name

    def weight(self, node: NodeProto, change: Callable[[NDArray[Any]], NDArray[Any]], operand: int = 1) -> None:
        """Changes a weight of one node."""
        old = self.array(node.input[operand])
        new = np.ascontiguousarray(change(old.copy()))
        assert new.shape == old.shape and not np.array_equal(new, old), "the mutant is none"
        node.input[operand] = self.const(new, old.dtype)

    def products(self, rows: int = 4) -> list[NodeProto]:
        """Matrix products with a constant of some rows."""
        return [
            n
            for n in self.nodes("Gemm", "MatMul")
            if self.known(n.input[1]) and self.array(n.input[1]).ndim == 2 and min(self.array(n.input[1]).shape) >= rows
        ]

    def candidate_input(self) -> str:
        return next(i.name for i in self.graph.input if i.type.tensor_type.shape.dim[0].dim_param)

    def after(self, tensor: str, op: str, *others: str, **attributes: Any) -> NodeProto:
        """Puts an operator behind a tensor, for all that read it."""
        inner = f"{tensor}/before"
        self._count += 1
        if any(i.name == tensor for i in self.graph.input):
            made = f"{tensor}/after_{self._count}"
            node = helper.make_node(op, [tensor, *others], [made], name=made, **attributes)
            for n in self.graph.node:
                n.input[:] = [made if i == tensor else i for i in n.input]
            self.graph.node.insert(0, node)
            return self.graph.node[0]
        at = next(k for k, n in enumerate(self.graph.node) if tensor in n.output)
        producer = self.graph.node[at]
        producer.output[:] = [inner if o == tensor else o for o in producer.output]
        self.graph.node.insert(at + 1, helper.make_node(op, [inner, *others], [tensor], name=inner, **attributes))
        return self.graph.node[at + 1]

    def insert(self, before: NodeProto, op: str, inputs: list[str], **attributes: Any) -> str:
        """Puts a new operator in front of a node; its output."""
        self._count += 1
        name = f"inserted_{self._count}"
        at = next(k for k, n in enumerate(self.graph.node) if n is before or list(n.output) == list(before.output))
        self.graph.node.insert(at, helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    @property
    def score(self) -> str:
        return self.graph.output[0].name

    def producer(self, tensor: str) -> NodeProto:
        return next(n for n in self.graph.node if tensor in n.output)


Change = Callable[[Edit], None]


# --- weights -----------------------------------------------------------------------------------------------------


def swapped_blocks(e: Edit) -> None:
    e.weight(e.products()[0], lambda w: np.roll(w, len(w) // 2, axis=0))


def slice_boundary(e: Edit) -> None:
    e.weight(e.products()[-1], lambda w: np.roll(w, 1, axis=0))


def swapped_columns(e: Edit) -> None:
    e.weight(e.products()[0], lambda w: w[:, ::-1])


def slightly_off(e: Edit) -> None:
    e.weight(e.products()[0], lambda w: w * np.float32(1 + 5e-4))


def one_weight_off(e: Edit) -> None:
    def change(w: NDArray[Any]) -> NDArray[Any]:
        at = np.unravel_index(np.abs(w).argmax(), w.shape)
        w[at] *= np.float32(1 + 5e-4)
        return w

    e.weight(e.products()[0], change)


def zeroed_row(e: Edit) -> None:
    def change(w: NDArray[Any]) -> NDArray[Any]:
        w[-1] = 0
        return w

    e.weight(e.products()[0], change)


def _biased(e: Edit) -> NodeProto:
    return next(n for n in e.nodes("Gemm") if len(n.input) > 2 and e.known(n.input[2]) and e.array(n.input[2]).any())


def bias_missing(e: Edit) -> None:
    node = _biased(e)
    del node.input[2:]


def bias_twice(e: Edit) -> None:
    e.weight(_biased(e), lambda b: 2 * b, 2)


def _embedding(e: Edit, nth: int = -1) -> NodeProto:
    return [n for n in e.nodes("Gather") if e.known(n.input[0]) and e.array(n.input[0]).ndim == 2][nth]


def rows_above_one(e: Edit) -> None:
    """Ids 0 and 1, which are all that ids drawn in [0, 1) reach, are right."""
    e.weight(_embedding(e), lambda t: np.concatenate([t[:2], np.roll(t[2:], 1, axis=0)]), 0)


def last_row(e: Edit) -> None:
    def change(t: NDArray[Any]) -> NDArray[Any]:
        t[-1] += 1
        return t

    e.weight(_embedding(e), change, 0)


def padding_row(e: Edit) -> None:
    def change(t: NDArray[Any]) -> NDArray[Any]:
        t[0] += 0.1
        return t

    e.weight(_embedding(e, 0), change, 0)


def gru_gates(e: Edit) -> None:
    e.weight(e.nodes("GRU")[0], lambda w: np.roll(w, w.shape[1] // 3, axis=1))


def gru_candidate_bias(e: Edit) -> None:
    node = e.nodes("GRU")[0]
    for a in node.attribute:
        if a.name == "linear_before_reset":
            a.i = 1 - a.i


# --- operators ---------------------------------------------------------------------------------------------------


def _attribute(node: NodeProto, name: str, value: Any) -> None:
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])


def softmax_axis(e: Edit) -> None:
    _attribute(e.nodes("Softmax")[-1], "axis", 0)


def softmax_over_heads(e: Edit) -> None:
    _attribute(e.nodes("Softmax")[-1], "axis", -2)


def mask_sign(e: Edit) -> None:
    node = e.nodes("Where")[0]
    node.input[0] = e.insert(node, "Not", [node.input[0]])


def mask_dropped(e: Edit) -> None:
    node = next(n for n in e.nodes("Not"))
    at = list(e.graph.node).index(node)
    e.graph.node[at].op_type = "Identity"


def mask_too_weak(e: Edit) -> None:
    """The masked value is small but not small enough: padding gets a little weight."""
    node = e.nodes("Where")[0]
    for k in (1, 2):
        maker = [n for n in e.graph.node if node.input[k] in n.output]
        data = e.array(node.input[k]) if e.known(node.input[k]) else None
        if data is None and maker and maker[0].op_type == "Constant":
            data = numpy_helper.to_array(maker[0].attribute[0].t)
        if data is not None and (data < -1e3).any():
            node.input[k] = e.const(np.full(data.shape, -6.0, np.float32))
            return
    raise AssertionError("no mask")


def layer_norm_denominator(e: Edit) -> None:
    """The variance over n - 1."""
    node = e.nodes("LayerNormalization")[-1]
    width = e.array(node.input[1]).size
    e.weight(node, lambda w: w * np.float32(((width - 1) / width) ** 0.5))


def layer_norm_epsilon(e: Edit) -> None:
    _attribute(e.nodes("LayerNormalization")[0], "epsilon", 1e-3)


def batch_norm_epsilon(e: Edit) -> None:
    _attribute(e.nodes("BatchNormalization")[0], "epsilon", 1e-3)


def relu_dropped(e: Edit) -> None:
    node = e.nodes("Relu")[0]
    node.op_type = "Identity"


def relu_leaks(e: Edit) -> None:
    node = e.nodes("Relu")[-1]
    node.op_type = "LeakyRelu"
    _attribute(node, "alpha", 1e-3)


def sum_to_mean(e: Edit) -> None:
    e.nodes("ReduceSum")[-1].op_type = "ReduceMean"
    node = e.nodes("ReduceMean")[-1]
    if len(node.input) > 1 and e.model.opset_import[0].version < 18:
        axes = e.array(node.input[1]) if e.known(node.input[1]) else _constant(e, node.input[1])
        del node.input[1:]
        _attribute(node, "axes", [int(a) for a in axes.reshape(-1)])


def _constant(e: Edit, name: str) -> NDArray[Any]:
    return numpy_helper.to_array(e.producer(name).attribute[0].t)


def half_inside(e: Edit) -> None:
    """A hidden layer in 16 bits: the same function in float64, but not the same rounding."""
    tensor = e.nodes("Relu")[0].output[0]
    node = e.after(tensor, "Cast", to=int(TensorProto.FLOAT16))
    inner = f"{tensor}/half"
    node.output[0] = inner
    at = list(e.graph.node).index(node)
    e.graph.node.insert(at + 1, helper.make_node("Cast", [inner], [tensor], name=inner, to=int(TensorProto.FLOAT)))


def cancellation(e: Edit) -> None:
    """Adds a large number and takes it away again."""
    big = e.const(3e4)
    e.after(e.score, "Sub", big)
    before = e.producer(e.score).input[0]
    e.after(before, "Add", big)


# --- rows --------------------------------------------------------------------------------------------------------


def first_candidate_for_all(e: Edit) -> None:
    """A candidate-level input taken for a request-level one."""
    name = e.candidate_input()
    node = e.after(name, "Gather", e.const([0], np.int64), axis=0)
    one = node.output[0]
    wide = f"{one}/wide"
    for n in e.graph.node[1:]:
        n.input[:] = [wide if i == one else i for i in n.input]
    e.graph.node.insert(1, helper.make_node("Shape", [name], [f"{one}/shape"]))
    e.graph.node.insert(2, helper.make_node("Expand", [one, f"{one}/shape"], [wide]))


def neighbour(e: Edit) -> None:
    """Every candidate gets the score of the one behind it; right where there is only one."""
    size = e.const([1], np.int64)
    end = e.const([2**31], np.int64)
    zero = e.const([0], np.int64)
    score = e.score
    producer = e.producer(score)
    inner = f"{score}/before"
    producer.output[:] = [inner if o == score else o for o in producer.output]
    for name, ends in (("rest", (size, end)), ("first", (zero, size))):
        e.graph.node.append(helper.make_node("Slice", [inner, *ends, zero], [f"{score}/{name}"]))
    e.graph.node.append(helper.make_node("Concat", [f"{score}/rest", f"{score}/first"], [score], axis=0))


def reversed_candidates(e: Edit) -> None:
    score = e.score
    ends = [e.const([v], np.int64) for v in (-1, -(2**31), 0, -1)]
    e.after(score, "Slice", *ends)


def list_norm(e: Edit) -> None:
    """Scores centred over the candidates of the call."""
    score = e.score
    node = e.after(score, "Identity")
    mean = e.insert(node, "ReduceMean", [node.input[0]], keepdims=1)
    node.op_type = "Sub"
    node.input.append(mean)


def hidden_list_norm(e: Edit) -> None:
    """A hidden layer shifted a little by the mean over the candidates."""
    tensor = e.nodes("Relu")[-1].output[0]
    node = e.after(tensor, "Identity")
    mean = e.insert(node, "ReduceMean", [node.input[0]], keepdims=1)
    small = e.insert(node, "Mul", [mean, e.const(1e-3)])
    node.op_type = "Add"
    node.input.append(small)


def _rows_equal(e: Edit, count: int) -> str:
    """1.0 if there are just so many candidates, else 0.0."""
    shape = helper.make_node("Shape", [e.candidate_input()], ["probe/shape"])
    size = helper.make_node("Gather", ["probe/shape", e.const(0, np.int64)], ["probe/size"])
    same = helper.make_node("Equal", ["probe/size", e.const(count, np.int64)], ["probe/same"])
    flag = helper.make_node("Cast", ["probe/same"], ["probe/flag"], to=int(TensorProto.FLOAT))
    for k, node in enumerate((shape, size, same, flag)):
        e.graph.node.insert(k, node)
    return "probe/flag"


def wrong_for_one(e: Edit) -> None:
    flag = _rows_equal(e, 1)
    e.after(e.score, "Add", flag)


def row_for_none(e: Edit) -> None:
    """No candidate, but a score."""
    _rows_equal(e, 0)
    e.after(e.score, "Identity")
    node = e.producer(e.score)
    count = e.insert(node, "Cast", ["probe/same"], to=int(TensorProto.INT64))
    rank = len(e.graph.output[0].type.tensor_type.shape.dim)
    pads = e.insert(node, "Unsqueeze", [count, e.const([0], np.int64)])
    zeros = e.const([0] * (2 * rank - 1), np.int64)
    whole = e.insert(node, "Concat", [e.const([0] * rank, np.int64), pads, e.const([0] * (rank - 1), np.int64)], axis=0)
    del zeros
    node.op_type = "Pad"
    node.input.append(whole)


def wrong_beyond_256(e: Edit) -> None:
    """Only the candidates from the 257th are wrong."""
    score = e.score
    producer = e.producer(score)
    inner = f"{score}/before"
    producer.output[:] = [inner if o == score else o for o in producer.output]
    zero, half, end = (e.const([v], np.int64) for v in (0, 256, 2**31))
    e.graph.node.append(helper.make_node("Slice", [inner, zero, half, zero], ["part/a"]))
    e.graph.node.append(helper.make_node("Slice", [inner, half, end, zero], ["part/b"]))
    e.graph.node.append(helper.make_node("Add", ["part/b", e.const(1e-3)], ["part/c"]))
    e.graph.node.append(helper.make_node("Concat", ["part/a", "part/c"], [score], axis=0))


# --- inputs ------------------------------------------------------------------------------------------------------


def next_user(e: Edit) -> None:
    """The user's id plus one, but for the last."""
    name = e.graph.input[0].name
    kind = e.graph.input[0].type.tensor_type.elem_type
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    node = e.after(name, "Add", e.const(1, dtype))
    e.after(node.output[0], "Min", e.const(49, dtype))


def swapped_users(e: Edit) -> None:
    a, b = e.graph.input[0].name, e.graph.input[1].name
    for n in e.graph.node:
        n.input[:] = [b if i == a else a if i == b else i for i in n.input]


def frozen_user(e: Edit) -> None:
    """The user of the day the model was made, for everybody."""
    name = e.graph.input[0].name
    kind = e.graph.input[0].type.tensor_type.elem_type
    e.after(name, "Mul", e.const(0, helper.tensor_dtype_to_np_dtype(kind)))


def empty_history(e: Edit) -> None:
    """Wrong only where a history is empty."""
    name = next(i.name for i in e.graph.input if i.name.startswith("hist"))
    node = e.after(e.score, "Identity")
    total = e.insert(node, "ReduceMax", [name], keepdims=0)
    none = e.insert(node, "Equal", [total, e.const(0, np.int64)])
    flag = e.insert(node, "Cast", [none], to=int(TensorProto.FLOAT))
    node.op_type = "Add"
    node.input.append(flag)


def full_history(e: Edit) -> None:
    """The last position of a history is lost."""
    name = next(i.name for i in e.graph.input if i.name.startswith("hist"))
    length = e.graph.input[[i.name for i in e.graph.input].index(name)].type.tensor_type.shape.dim[1].dim_value
    keep = np.ones((1, length), np.int64)
    keep[0, -1] = 0
    e.after(name, "Mul", e.const(keep, np.int64))


# --- outputs -----------------------------------------------------------------------------------------------------


def nan_masked(e: Edit) -> None:
    score = e.score
    node = e.after(score, "Identity")
    bad = e.insert(node, "IsNaN", [node.input[0]])
    node.op_type = "Where"
    node.input[:] = [bad, e.const(0.5), node.input[0]]


def swapped_outputs(e: Edit) -> None:
    a, b = e.graph.output[0].name, e.graph.output[1].name
    for n in e.graph.node:
        n.output[:] = [b if o == a else a if o == b else o for o in n.output]


def outputs_in_another_order(e: Edit) -> None:
    kept = list(e.graph.output)
    del e.graph.output[:]
    e.graph.output.extend(kept[::-1])


def dropped_output(e: Edit) -> None:
    del e.graph.output[1]


def renamed_output(e: Edit) -> None:
    name = e.score
    e.producer(name).output[0] = "scores"
    e.graph.output[0].name = "scores"


def double_output(e: Edit) -> None:
    e.after(e.score, "Cast", to=int(TensorProto.DOUBLE))
    e.graph.output[0].type.tensor_type.elem_type = TensorProto.DOUBLE


def frozen_batch(e: Edit) -> None:
    """The output promises the number of candidates of the day."""
    e.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 8


def negated(e: Edit) -> None:
    e.after(e.score, "Neg")


def raised_opset(e: Edit) -> None:
    """An operator that the declared opset does not have."""
    e.after(e.score, "Gelu")


# --- pairs made by hand ------------------------------------------------------------------------------------------


def _model(build: Callable[[Graph, str, str], str], user_rows: int | str, history: int = 0) -> ModelProto:
    g = Graph(17)
    user = g.input("user", [user_rows, *([history] if history else []), 4])
    item = g.input("item", ["N", 4])
    out = build(g, user, item)
    g.nodes[-1].output[0] = "score"
    assert out
    g.output("score", ["N", 1])
    return g.model()


def _weights(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def tile_for_repeat() -> Pair:
    """N candidates against a history of 3 in flat rows: repeat-interleave, against Tile."""

    def build(order: str) -> Callable[[Graph, str, str], str]:
        def make(g: Graph, user: str, item: str) -> str:
            # [N, 4] as [3 N, 4], each candidate three times in a row; the history once per candidate.
            wide = g.op("Unsqueeze", item, g.ints(1 if order == "repeat" else 0))
            three = [1, 3, 1] if order == "repeat" else [3, 1, 1]
            rows = g.op("Reshape", g.op("Tile", wide, g.ints(*three)), g.ints(-1, 4))
            shape = g.op("Shape", item)
            count = g.op("Concat", g.op("Slice", shape, g.ints(0), g.ints(1)), g.ints(1, 1), axis=0)
            once = g.op("Slice", user, g.ints(0), g.ints(1), g.ints(0))
            flat = g.op("Reshape", g.op("Tile", once, count), g.ints(-1, 4))
            product = g.op("MatMul", g.op("Mul", rows, flat), g.const(_weights(4, 1)))
            return g.on_axes("ReduceSum", g.op("Reshape", product, g.ints(-1, 3)), [1], keepdims=1)

        return make

    return Pair(_model(build("repeat"), "N", 3), _model(build("tile"), 1, 3), None)


def row_wise_for_list_wise() -> Pair:
    """The original centres over candidates; the other over the columns."""

    def build(axis: int) -> Callable[[Graph, str, str], str]:
        def make(g: Graph, user: str, item: str) -> str:
            x = g.op("Mul", user, item)
            centred = g.op("Sub", x, g.op("ReduceMean", x, axes=[axis], keepdims=1))
            return g.op("MatMul", centred, g.const(_weights(4, 1)))

        return make

    return Pair(_model(build(0), "N"), _model(build(1), 1), None)


def dropped_cast() -> Pair:
    """The original rounds a number down to its bucket; the other uses it as it is."""

    def build(bucket: bool) -> Callable[[Graph, str, str], str]:
        def make(g: Graph, user: str, item: str) -> str:
            x = item
            if bucket:
                x = g.op("Cast", g.op("Cast", item, to=INT64), to=int(TensorProto.FLOAT))
            return g.op("MatMul", g.op("Add", x, user), g.const(_weights(4, 1)))

        return make

    return Pair(_model(build(True), "N"), _model(build(False), 1), None)


def request_scaled() -> Pair:
    """A division by the number of rows that became a division by the user's single row."""

    def build(rows: str) -> Callable[[Graph, str, str], str]:
        def make(g: Graph, user: str, item: str) -> str:
            extent = g.op("Gather", g.op("Shape", {"user": user, "item": item}[rows]), g.const(0, np.int64))
            count = g.op("Cast", extent, to=int(TensorProto.FLOAT))
            return g.op("Div", g.op("MatMul", g.op("Add", user, item), g.const(_weights(4, 1))), count)

        return make

    return Pair(_model(build("user"), "N"), _model(build("user"), 1), None)


def clipped_input() -> Pair:
    """Right for all ordinary numbers."""

    def build(clipped: bool) -> Callable[[Graph, str, str], str]:
        def make(g: Graph, user: str, item: str) -> str:
            x = g.op("Clip", item, g.const(-50), g.const(50)) if clipped else item
            return g.op("MatMul", g.op("Add", user, x), g.const(_weights(4, 1)))

        return make

    return Pair(_model(build(False), "N"), _model(build(True), 1), None)


def stateful_noise() -> Pair:
    """The other model adds noise."""

    def build(noise: bool) -> Callable[[Graph, str, str], str]:
        def make(g: Graph, user: str, item: str) -> str:
            y = g.op("MatMul", g.op("Add", user, item), g.const(_weights(4, 1)))
            if not noise:
                return g.op("Identity", y)
            return g.op("Add", y, g.op("Mul", g.op("RandomNormalLike", y), g.const(1e-3)))

        return make

    return Pair(_model(build(False), "N"), _model(build(True), 1), None)


# --- beyond what is ordinarily run -------------------------------------------------------------------------------


def _history(change: Callable[[Graph, str], str] | None = None, **parts: Any) -> Callable[[bool], ModelProto]:
    """A ranker whose history has any length: a mean of what its ids stand for, times the item.

    Args:
        change: What is done to the ids of the history, in the wrong model only.
        **parts: Other changes: `pool` of the vectors, and `score` of the result, which may read the ids.
    """

    def make(wrong: bool) -> ModelProto:
        g = Graph(17)
        ids = g.input("hist", [1 if wrong else "N", "L"], INT64)
        item = g.input("item", ["N", 4])
        used = change(g, ids) if wrong and change is not None else ids
        vectors = g.op("Gather", g.const(_weights(2000, 4, seed=1)), used)
        mean = (
            parts["pool"](g, vectors, wrong) if "pool" in parts else g.on_axes("ReduceMean", vectors, [1], keepdims=0)
        )
        y = g.op("MatMul", g.op("Mul", mean, item), g.const(_weights(4, 1)))
        if wrong and "score" in parts:
            parts["score"](g, y, ids)
        g.nodes[-1].output[0] = "score"
        g.output("score", ["N", 1])
        return g.model()

    return make


def _pair(make: Callable[[bool], ModelProto]) -> Callable[[], Pair]:
    return lambda: Pair(make(False), make(True), None)


def cut_first(most: int) -> Callable[[], Pair]:
    return _pair(_history(lambda g, x: g.op("Slice", x, g.ints(0), g.ints(most), g.ints(1))))


def cut_last(most: int) -> Callable[[], Pair]:
    return _pair(_history(lambda g, x: g.op("Slice", x, g.ints(-most), g.ints(2**31), g.ints(1))))


def _extent(g: Graph, tensor: str, axis: int) -> str:
    return g.op("Gather", g.op("Shape", tensor), g.ints(axis))


def _flag(g: Graph, comparison: str, value: str, bound: int) -> str:
    """1.0 where a whole number compares so with a bound, else 0.0; `[1]`."""
    return g.op("Cast", g.op(comparison, value, g.ints(bound)), to=int(TensorProto.FLOAT))


def wrong_where(comparison: str, bound: int) -> Callable[[], Pair]:
    """Half off at some lengths."""

    def score(g: Graph, y: str, ids: str) -> str:
        return g.op("Add", y, g.op("Mul", _flag(g, comparison, _extent(g, ids, 1), bound), g.const(0.5)))

    return _pair(_history(score=score))


def blocks_of_64() -> Pair:
    """What is left over behind the last whole block of 64 is forgotten, once there is a block."""

    def blocks(g: Graph, x: str) -> str:
        n = _extent(g, x, 1)
        whole = g.op("Mul", g.op("Div", n, g.ints(64)), g.ints(64))
        end = g.op("Where", g.op("Less", n, g.ints(64)), n, whole)
        return g.op("Slice", x, g.ints(0), end, g.ints(1))

    return _pair(_history(blocks))()


def mean_over_100() -> Pair:
    """The mean divides by 100 at most."""

    def pool(g: Graph, vectors: str, wrong: bool) -> str:
        n = _extent(g, vectors, 1)
        count = g.op("Cast", g.op("Min", n, g.ints(100)) if wrong else n, to=int(TensorProto.FLOAT))
        return g.op("Div", g.on_axes("ReduceSum", vectors, [1], keepdims=0), count)

    return _pair(_history(pool=pool))()


def best_30() -> Pair:
    """Only the 30 largest of a longer history count."""

    def pool(g: Graph, vectors: str, wrong: bool) -> str:
        n = _extent(g, vectors, 1)
        k = g.op("Min", n, g.ints(30)) if wrong else n
        return g.on_axes("ReduceSum", g.ops("TopK", 2, vectors, k, axis=1)[0], [1], keepdims=0)

    return _pair(_history(pool=pool))()


def positions(change: Callable[[NDArray[Any]], NDArray[Any]], reach: int = 0) -> Callable[[], Pair]:
    """A table of 300 positions is added to the history; in the wrong model it is changed, or ends early."""

    def pool(g: Graph, vectors: str, wrong: bool) -> str:
        table = _weights(300, 4, seed=2)
        steps = g.op("Range", g.const(0, np.int64), g.op("Squeeze", _extent(g, vectors, 1)), g.const(1, np.int64))
        if wrong and reach:
            steps = g.op("Min", steps, g.const(reach, np.int64))
        rows = g.op("Gather", g.const(change(table.copy()) if wrong else table), steps)
        return g.on_axes("ReduceMean", g.op("Mul", vectors, g.op("Unsqueeze", rows, g.ints(0))), [1], keepdims=0)

    return _pair(_history(pool=pool))


def last_position(table: NDArray[Any]) -> NDArray[Any]:
    table[-1] += 1
    return table


def counted(off: str) -> Callable[[], Pair]:
    """A history with the number of its entries: the mask is off by one where all of them count."""

    def make(wrong: bool) -> ModelProto:
        g = Graph(17)
        rows = 1 if wrong else "N"
        ids, count = g.input("hist", [rows, "L"], INT64), g.input("count", [rows, 1], INT64)
        item = g.input("item", ["N", 4])
        n = _extent(g, ids, 1)
        steps = g.op("Range", g.const(0, np.int64), g.op("Squeeze", n), g.const(1, np.int64))
        if wrong:
            full = g.op("Cast", g.op(off, count, n), to=INT64)
            count = g.op("Sub", count, full)
        mask = g.op("Cast", g.op("Less", steps, count), to=int(TensorProto.FLOAT))
        vectors = g.op("Gather", g.const(_weights(500, 4, seed=1)), ids)
        pooled = g.on_axes("ReduceSum", g.op("Mul", vectors, g.op("Unsqueeze", mask, g.ints(2))), [1], keepdims=0)
        g.op("MatMul", g.op("Mul", pooled, item), g.const(_weights(4, 1)))
        g.nodes[-1].output[0] = "score"
        g.output("score", ["N", 1])
        return g.model()

    return _pair(make)


def two_histories(both: bool) -> Callable[[], Pair]:
    """Histories of two lengths: wrong only where both are long, or where one is longer than the other and 40."""

    def make(wrong: bool) -> ModelProto:
        g = Graph(17)
        rows = 1 if wrong else "N"
        a, b = g.input("seen", [rows, "L"], INT64), g.input("bought", [rows, "M"], INT64)
        item = g.input("item", ["N", 4])
        table = g.const(_weights(500, 4, seed=1))
        used = a
        if wrong and not both:
            end = g.op("Max", _extent(g, b, 1), g.ints(40))
            used = g.op("Slice", a, g.ints(0), end, g.ints(1))
        means = [g.on_axes("ReduceMean", g.op("Gather", table, x), [1], keepdims=0) for x in (used, b)]
        y = g.op("MatMul", g.op("Mul", g.op("Sub", *means), item), g.const(_weights(4, 1)))
        if wrong and both:
            least = g.op("Min", _extent(g, a, 1), _extent(g, b, 1))
            g.op("Add", y, _flag(g, "Greater", least, 700))
        g.nodes[-1].output[0] = "score"
        g.output("score", ["N", 1])
        return g.model()

    return _pair(make)


def many(first: int, last: int = 2**31) -> Callable[[], Pair]:
    """Right but for some candidates far down."""

    def make(wrong: bool) -> ModelProto:
        def build(g: Graph, user: str, item: str) -> str:
            y = g.op("MatMul", g.op("Mul", user, item), g.const(_weights(4, 1)))
            if not wrong:
                return g.op("Identity", y)
            cuts = [(0, first), (first, last), (last, 2**31)]
            parts = [g.op("Slice", y, g.ints(a), g.ints(b), g.ints(0)) for a, b in cuts]
            parts[1] = g.op("Neg", parts[1])
            return g.op("Concat", *parts, axis=0)

        return _model(build, 1 if wrong else "N")

    return _pair(make)


def by_count(comparison: str, bound: int, modulus: int = 0) -> Callable[[], Pair]:
    """Right only at some numbers of candidates."""

    def make(wrong: bool) -> ModelProto:
        def build(g: Graph, user: str, item: str) -> str:
            y = g.op("MatMul", g.op("Mul", user, item), g.const(_weights(4, 1)))
            if not wrong:
                return g.op("Identity", y)
            n = _extent(g, item, 0)
            if modulus:
                n = g.op("Mod", n, g.ints(modulus))
            return g.op("Add", y, _flag(g, comparison, n, bound))

        return _model(build, 1 if wrong else "N")

    return _pair(make)


def rows_changed(rows: slice, request: bool = True, renamed: bool = False, shift: int = 0) -> Callable[[], Pair]:
    """Some rows of a table of 100,000 are others."""

    def make(wrong: bool) -> ModelProto:
        g = Graph(17)
        ids = g.input("id", ["N"], INT64)
        item = g.input("item", ["N", 4])
        table = _weights(100_000, 4, seed=3)
        if wrong:
            table[rows] = 0
        name = "table_again" if wrong and renamed else "table"
        g.initializers.append(numpy_helper.from_array(table, name))
        used = g.op("Sub", ids, g.const(shift, np.int64)) if shift else ids
        g.op("MatMul", g.op("Mul", g.op("Gather", name, used), item), g.const(_weights(4, 1)))
        g.nodes[-1].output[0] = "score"
        g.output("score", ["N", 1])
        return g.model()

    roles = {"inputs": {"id" if request else "item": "request"}}
    return lambda: Pair(make(False), make(True), resolve(describe(make(False)), spec=roles))


# --- right for most requests ---------------------------------------------------------------------------------------


def last_candidate(e: Edit) -> None:
    """Only the last candidate of a request is wrong."""
    score = e.score
    producer = e.producer(score)
    inner = f"{score}/before"
    producer.output[:] = [inner if o == score else o for o in producer.output]
    zero, last, end = (e.const([v], np.int64) for v in (0, -1, 2**31))
    e.graph.node.append(helper.make_node("Slice", [inner, zero, last, zero], ["part/a"]))
    e.graph.node.append(helper.make_node("Slice", [inner, last, end, zero], ["part/b"]))
    e.graph.node.append(helper.make_node("Mul", ["part/b", e.const(0.9)], ["part/c"]))
    e.graph.node.append(helper.make_node("Concat", ["part/a", "part/c"], [score], axis=0))


def scored(wrong: Callable[[Graph, str, str, str], str], history: int = 0) -> Callable[[], Pair]:
    """A product of user and item, and what the wrong model makes of it.

    Args:
        wrong: Gets the graph, the score `[N, 1]`, the user and the item.
        history: Positions of the user's input; 0 for a vector.
    """

    def make(other: bool) -> ModelProto:
        def build(g: Graph, user: str, item: str) -> str:
            mean = g.on_axes("ReduceMean", user, [1], keepdims=0) if history else user
            y = g.op("MatMul", g.op("Mul", mean, item), g.const(_weights(4, 1)))
            return wrong(g, y, user, item) if other else g.op("Identity", y)

        return _model(build, 1 if other else "N", history)

    return _pair(make)


def numbered(comparison: str, number: int, table: bool = True) -> Callable[[], Pair]:
    """Half off for some number of the request, an id of a table of 1000 or nothing that is known."""

    def make(other: bool) -> ModelProto:
        g = Graph(17)
        ids, item = g.input("id", ["N"], INT64), g.input("item", ["N", 4])
        vectors = g.op("Gather", g.const(_weights(1000, 4)), ids) if table else item
        age = g.on_axes("Unsqueeze", g.op("Cast", ids, to=int(TensorProto.FLOAT)), [1])
        y = g.op("MatMul", g.op("Mul", vectors, item), g.const(_weights(4, 1)))
        y = g.op("Add", y, g.op("Mul", age, g.const(1e-6)))
        flag = g.on_axes("Unsqueeze", g.op(comparison, ids, g.const(number, np.int64)), [1])
        g.output(_where(g, flag, y) if other else g.op("Identity", y), ["N", 1])
        g.nodes[-1].output[0] = "score"
        g.outputs[-1].name = "score"
        return g.model()

    roles = {"inputs": {"id": "request"}}
    return lambda: Pair(make(False), make(True), resolve(describe(make(False)), spec=roles))


def _where(g: Graph, condition: str, y: str) -> str:
    """Half off where something holds."""
    return g.op("Add", y, g.op("Mul", g.op("Cast", condition, to=int(TensorProto.FLOAT)), g.const(0.5)))


def equal_neighbours(g: Graph, y: str, user: str, item: str) -> str:
    """Half off in requests with two equal candidates side by side."""
    first = g.op("Slice", item, g.ints(0), g.ints(-1), g.ints(0))
    far = g.op("Abs", g.op("Sub", g.op("Slice", item, g.ints(1), g.ints(2**31), g.ints(0)), first))
    apart = g.op("Concat", g.on_axes("ReduceSum", far, [1], keepdims=0), g.const([1.0]), axis=0)
    return _where(g, g.op("Equal", g.op("ReduceMin", apart, keepdims=0), g.const(0.0)), y)


def zero_user(g: Graph, y: str, user: str, item: str) -> str:
    """Half off for a user of zeros: one who is new."""
    return _where(g, g.op("Equal", g.op("ReduceSum", g.op("Abs", user), keepdims=0), g.const(0.0)), y)


def large_numbers(g: Graph, y: str, user: str, item: str) -> str:
    """Half off where an item has a number above 100."""
    return _where(g, g.op("Greater", g.on_axes("ReduceMax", item, [1], keepdims=1), g.const(100.0)), y)


def reversed_weights(g: Graph, y: str, user: str, item: str) -> str:
    """The positions of a history have weights, which are taken from the other end."""
    down = g.op("Mul", user, g.const(np.linspace(0.5, 1.5, 3, dtype=np.float32).reshape(1, 3, 1)))
    return g.op("MatMul", g.op("Mul", g.on_axes("ReduceMean", down, [1], keepdims=0), item), g.const(_weights(4, 1)))


def swapped_histories() -> Pair:
    """Two inputs of one shape and one table, each taken for the other."""

    def make(wrong: bool) -> ModelProto:
        g = Graph(17)
        rows = 1 if wrong else "N"
        a, b = g.input("seen", [rows, "L"], INT64), g.input("bought", [rows, "L"], INT64)
        item = g.input("item", ["N", 4])
        table = g.const(_weights(500, 4, seed=1))
        means = [
            g.on_axes("ReduceMean", g.op("Gather", table, x), [1], keepdims=0) for x in ((b, a) if wrong else (a, b))
        ]
        g.op("MatMul", g.op("Mul", g.op("Sub", *means), item), g.const(_weights(4, 1)))
        g.nodes[-1].output[0] = "score"
        g.output("score", ["N", 1])
        return g.model()

    return _pair(make)()


def padded(change: Callable[[Graph, str, str], str]) -> Callable[[], Pair]:
    """A mean over the entries of a history that are not 0; the wrong model changes its vectors.

    Args:
        change: Gets the graph, the vectors `[1, 20, 4]` and the mask `[1, 20, 1]` of what is no padding.
    """

    def make(wrong: bool) -> ModelProto:
        g = Graph(17)
        ids = g.input("hist", [1 if wrong else "N", 20], INT64)
        item = g.input("item", ["N", 4])
        kept = g.op("Unsqueeze", g.op("Greater", ids, g.const(0, np.int64)), g.ints(2))
        vectors = g.op("Gather", g.const(_weights(100, 4, seed=1)), ids)
        used = change(g, vectors, kept) if wrong else g.op("Where", kept, vectors, g.const(0.0))
        g.op("MatMul", g.op("Mul", g.on_axes("ReduceSum", used, [1], keepdims=0), item), g.const(_weights(4, 1)))
        g.nodes[-1].output[0] = "score"
        g.output("score", ["N", 1])
        return g.model()

    return _pair(make)


def nan_at_padding(g: Graph, vectors: str, kept: str) -> str:
    """Padding is divided away: 0 / 0."""
    weight = g.op("Cast", kept, to=int(TensorProto.FLOAT))
    return g.op("Div", g.op("Mul", vectors, weight), weight)


def first_counts(g: Graph, vectors: str, kept: str) -> str:
    """The first entry counts although it is padding."""
    first = np.arange(20).reshape(1, 20, 1) == 0
    return g.op("Where", g.op("Or", kept, g.const(first, np.bool_)), vectors, g.const(0.0))


def guard_dropped() -> Pair:
    """All rows of the user come in, the first is used, and nothing looks whether the others are the same."""

    def make(wrong: bool) -> ModelProto:
        def build(g: Graph, user: str, item: str) -> str:
            used = g.op("Slice", user, g.ints(0), g.ints(1), g.ints(0)) if wrong else user
            return g.op("MatMul", g.op("Mul", used, item), g.const(_weights(4, 1)))

        return _model(build, "N")

    return Pair(make(False), make(True), resolve(describe(make(False)), spec={"inputs": {"user": "request"}}))


# --- the suite ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mutant:
    """A wrong model.

    Attributes:
        ranker: Stem of a file in `models/onnx`, or `by hand`.
        what: What is wrong with it.
        change: The edit, or what builds the pair.
        verdicts: Verdicts that must fail, among others.
        declared: What the report says that was not looked at, of a model that is right by its contract; nothing fails.
    """

    ranker: str
    what: str
    change: Callable[..., Any]
    verdicts: tuple[str, ...] = ("algebra", "rounding")
    declared: str = ""

    @property
    def name(self) -> str:
        return f"{self.ranker.split('.')[0]}: {self.what}"

    def pair(self) -> Pair:
        """The original and the wrong model."""
        if self.ranker == "by hand":
            made: Pair = self.change()
            return made
        right = pair(self.ranker)
        wrong = ModelProto()
        wrong.CopyFrom(right.optimized)
        self.change(Edit(wrong))
        return Pair(right.original, wrong, right.roles)


@cache
def pair(ranker: str) -> Pair:
    """A ranker with its right optimised model, which no longer says what it was made of."""
    path = FOLDER / f"{ranker}.onnx"
    spec = yaml.safe_load((FOLDER / f"{ranker.split('.')[0]}.roles.yaml").read_text())
    result = rewritten(path, spec=spec)
    assert result.changed
    made = ModelProto()
    made.CopyFrom(result.model)
    kept = [p for p in made.metadata_props if p.key != CONTRACT]
    del made.metadata_props[:]
    made.metadata_props.extend(kept)
    return Pair(onnx.load(path), made, Roles.from_dict(result.report.roles))


_SCORES = ("algebra", "rounding")
_FORM = ("structure",)

MUTANTS = (
    Mutant("deepfm.torchscript", "swapped weight blocks", swapped_blocks),
    Mutant("deepfm.torchscript", "embedding rows permuted above id 1", rows_above_one),
    Mutant("deepfm.torchscript", "weights off by 5e-4", slightly_off),
    Mutant("deepfm.torchscript", "bias missing", bias_missing),
    Mutant("deepfm.torchscript", "FM sum became a mean", sum_to_mean),
    Mutant("deepfm_packed.torchscript", "wrong slice boundary", slice_boundary),
    Mutant("deepfm_packed.torchscript", "NaN masked away", nan_masked),
    Mutant("deepfm_packed.torchscript", "last embedding row", last_row),
    Mutant("dlrm.torchscript", "wrong slice boundary", slice_boundary),
    Mutant("dlrm.torchscript", "bias twice", bias_twice),
    Mutant("dlrm.torchscript", "right for one candidate, shifted for more", neighbour, (*_SCORES, "metamorphic")),
    Mutant("mmoe.torchscript", "an error for N = 0 only", row_for_none),
    Mutant("dcnv2_parallel.torchscript", "one weight off by 5e-4", one_weight_off),
    Mutant("dcnv2_parallel.torchscript", "an error for N = 1 only", wrong_for_one),
    Mutant("dcnv2_parallel.torchscript", "off-by-one user index", next_user),
    Mutant("dcnv2_parallel.torchscript", "candidate 257 and on wrong", wrong_beyond_256),
    Mutant("din.torchscript", "softmax over the wrong axis", softmax_axis),
    Mutant("din.torchscript", "mask sign", mask_sign),
    Mutant("din.torchscript", "mask too weak", mask_too_weak),
    Mutant("din.torchscript", "first candidate for all", first_candidate_for_all),
    Mutant("din.torchscript", "BatchNorm epsilon", batch_norm_epsilon),
    Mutant("din.torchscript", "padding row not zero", padding_row),
    Mutant("mmoe.torchscript", "swapped outputs", swapped_outputs),
    Mutant("mmoe.torchscript", "outputs in another order", outputs_in_another_order, _FORM),
    Mutant("mmoe.torchscript", "dropped output", dropped_output, _FORM),
    Mutant("mmoe.torchscript", "gate softmax over candidates", softmax_axis, (*_SCORES, "metamorphic")),
    Mutant("mmoe.torchscript", "Relu dropped", relu_dropped),
    Mutant("mmoe.torchscript", "last weight row lost", zeroed_row),
    Mutant("two_tower.torchscript", "frozen user", frozen_user, (*_SCORES,)),
    Mutant("two_tower.torchscript", "swapped users", swapped_users),
    Mutant("two_tower.torchscript", "hidden layer in 16 bits", half_inside, ("rounding",)),
    Mutant("two_tower.torchscript", "score negated", negated, (*_SCORES, "ranking")),
    Mutant("history_transformer.torchscript", "LayerNorm with n - 1", layer_norm_denominator),
    Mutant("history_transformer.torchscript", "LayerNorm epsilon", layer_norm_epsilon),
    Mutant("history_transformer.torchscript", "mask sign", mask_sign),
    Mutant("history_transformer.torchscript", "softmax over queries", softmax_over_heads),
    Mutant("history_transformer.torchscript", "last history position lost", full_history),
    Mutant("masked_pooling.torchscript", "mask dropped", mask_dropped),
    Mutant("masked_pooling.torchscript", "wrong for an empty history", empty_history),
    Mutant("masked_pooling.torchscript", "Relu leaks a little", relu_leaks),
    Mutant("masked_pooling.torchscript", "output promises 8 rows", frozen_batch, _FORM),
    Mutant("gru_history.torchscript", "GRU gates permuted", gru_gates),
    Mutant("gru_history.torchscript", "GRU reset gate after the product", gru_candidate_bias),
    Mutant("gru_history.torchscript", "first candidate for all", first_candidate_for_all),
    Mutant("wide_deep.torchscript", "cross-candidate mean", list_norm, (*_SCORES, "metamorphic")),
    Mutant("wide_deep.torchscript", "slight cross-candidate mean", hidden_list_norm, (*_SCORES, "metamorphic")),
    Mutant("wide_deep.torchscript", "double output", double_output, _FORM),
    Mutant("wide_deep.torchscript", "cancellation", cancellation, ("rounding",)),
    Mutant("fwfm.torchscript", "candidates reversed", reversed_candidates, (*_SCORES, "ranking")),
    Mutant("fwfm.torchscript", "renamed output", renamed_output, _FORM),
    Mutant("pnn.torchscript", "swapped columns", swapped_columns),
    Mutant("pnn.torchscript", "operator of a later opset", raised_opset, _FORM),
    Mutant("ple.torchscript", "weights off by 5e-4", slightly_off),
    Mutant("ple.torchscript", "swapped weight blocks", swapped_blocks),
    Mutant("autoint.torchscript", "softmax over queries", softmax_over_heads),
    Mutant("autoint.torchscript", "one weight off by 5e-4", one_weight_off),
    Mutant("by hand", "Tile for repeat-interleave", tile_for_repeat),
    Mutant("by hand", "row-wise for list-wise", row_wise_for_list_wise),
    Mutant("by hand", "dropped Cast", dropped_cast),
    Mutant("by hand", "divided by the user's rows", request_scaled),
    Mutant("by hand", "numbers clipped at 50", clipped_input),
    Mutant("by hand", "noise", stateful_noise),
    Mutant("by hand", "history cut to its first 8", cut_first(8)),
    Mutant("by hand", "history cut to its first 20", cut_first(20)),
    Mutant("by hand", "history cut to its first 50", cut_first(50)),
    Mutant("by hand", "history cut to its first 200", cut_first(200)),
    Mutant("by hand", "history cut to its last 50", cut_last(50)),
    Mutant("by hand", "an error for L = 0 only", wrong_where("Less", 1)),
    Mutant("by hand", "right only for L of at least 2", wrong_where("Less", 2)),
    Mutant("by hand", "right only for L up to 1000", wrong_where("Greater", 1000)),
    Mutant("by hand", "right but for L = 333", wrong_where("Equal", 333)),
    Mutant("by hand", "what is behind the last block of 64 forgotten", blocks_of_64),
    Mutant("by hand", "mean over 100 at most", mean_over_100),
    Mutant("by hand", "the best 30 only", best_30),
    Mutant("by hand", "last row of a table of positions", positions(last_position)),
    Mutant("by hand", "positions beyond 200 taken for 200", positions(lambda t: t, 200)),
    Mutant("by hand", "mask off by one at full length", counted("Equal")),
    Mutant("by hand", "one history cut to the other", two_histories(both=False)),
    Mutant("by hand", "wrong where both histories are long", two_histories(both=True), ("rounding",)),
    Mutant("by hand", "candidates from 600 on wrong", many(600)),
    Mutant("by hand", "candidates 2000 to 2100 wrong", many(2000, 2100)),
    Mutant("by hand", "right only for an even N", by_count("Equal", 1, 2)),
    Mutant("by hand", "right only for N up to 1000", by_count("Greater", 1000)),
    Mutant("by hand", "right but for N = 300", by_count("Equal", 300)),
    Mutant("by hand", "100 rows of 100,000", rows_changed(slice(5000, 5100))),
    Mutant("by hand", "100 rows of 100,000 under another name", rows_changed(slice(5000, 5100), renamed=True)),
    Mutant("by hand", "one row of 100,000", rows_changed(slice(77_777, 77_778), request=False)),
    Mutant("by hand", "one row that a shifted id reaches", rows_changed(slice(70, 71), shift=1000)),
    Mutant("deepfm.torchscript", "last candidate wrong", last_candidate),
    Mutant("by hand", "wrong where neighbours are equal", scored(equal_neighbours), ("metamorphic",)),
    Mutant("by hand", "wrong for a user of zeros", scored(zero_user)),
    Mutant("by hand", "wrong for one id of the request", numbered("Equal", 777)),
    Mutant("by hand", "wrong for ids that count from the end", numbered("Less", 0)),
    Mutant("by hand", "wrong for numbers above 5000", numbered("Greater", 5000, table=False)),
    Mutant("by hand", "wrong for numbers above 100", scored(large_numbers), ("algebra",)),
    Mutant("by hand", "weights of positions from the other end", scored(reversed_weights, 3)),
    Mutant("by hand", "two histories of one shape swapped", swapped_histories),
    Mutant("by hand", "NaN where a history is padded", padded(nan_at_padding), ("rounding",)),
    Mutant("by hand", "padding counts at the first position", padded(first_counts)),
    Mutant("by hand", "guard dropped", guard_dropped, (), declared="rows differ"),
)
