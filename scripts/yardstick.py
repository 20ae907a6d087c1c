"""Counts what a model computes by running it, independently of onnxrank.

Every intermediate is exposed, and the multiply-adds of products, convolutions, attention and recurrent layers follow
from the shapes and values seen. The *block ideal* is what is left if no product of two values that are the same for
all candidates is made more than once per request: what an optimiser reaches that divides every operand into
request-level and candidate-level entries, and does not change the order of products. Bodies of Loop, If and Scan are
not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import inliner, numpy_helper

Array = NDArray[Any]
Feed = dict[str, Array]
# Primes, so that no other extent of a model is a multiple of them.
ROWS = (37, 41)
# Entries that vary less than this, relative to themselves and to a typical entry of their tensor, differ by rounding.
_ROUNDING = (3e-6, 2e-7)
_GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
_PRODUCTS = {
    "MatMul": (0, 1),
    "FusedMatMul": (0, 1),
    "MatMulInteger": (0, 1),
    "QLinearMatMul": (0, 3),
    "Gemm": (0, 1),
    "FusedGemm": (0, 1),
}
_COUNTED = {*_PRODUCTS, *_GATES, "Einsum", "Conv", "FusedConv", "Attention", "MultiHeadAttention"}


class Trace:
    """A model that can be run with its insides exposed."""

    def __init__(self, model: onnx.ModelProto | str | Path) -> None:
        folder = "" if isinstance(model, onnx.ModelProto) else str(Path(model).resolve().parent)
        proto = model if isinstance(model, onnx.ModelProto) else onnx.load(model, load_external_data=not folder)
        if proto.functions:
            proto = inliner.inline_local_functions(proto)
        self.nodes = [node for node in proto.graph.node if node.op_type in _COUNTED]
        wanted = {name for node in self.nodes for name in (*node.input, *node.output) if name}
        self._constants = {
            t.name: numpy_helper.to_array(t, folder) for t in proto.graph.initializer if t.name in wanted
        }
        exposed = onnx.ModelProto()
        exposed.CopyFrom(proto)
        known = {o.name for o in proto.graph.output}
        made = {name for node in proto.graph.node for name in node.output}
        for name in sorted((wanted & made) - known):
            exposed.graph.output.append(onnx.ValueInfoProto(name=name))
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        if folder:
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        self._session = onnxruntime.InferenceSession(
            exposed.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self._inputs = {i.name for i in self._session.get_inputs()}
        self._outputs = [name for name in (o.name for o in self._session.get_outputs()) if name in wanted]

    def __call__(self, feed: Feed) -> Feed:
        """Values of everything that counted nodes read or write."""
        fed = {name: value for name, value in feed.items() if name in self._inputs}
        values = dict(zip(self._outputs, self._session.run(self._outputs, fed), strict=True)) if self._outputs else {}
        return {**self._constants, **feed, **values}


def count(trace: Trace, feed: Feed) -> int:
    """Multiply-adds executed."""
    values = trace(feed)
    return sum(_macs(node, values) for node in trace.nodes)


def per_rows(trace: Trace, feed: Callable[[int], Feed], rows: Sequence[int] = ROWS) -> tuple[float, float]:
    """Multiply-adds per request and per candidate, from two numbers of rows."""
    first, second = (count(trace, feed(n)) for n in rows)
    each = (second - first) / (rows[1] - rows[0])
    return first - each * rows[0], each


def block_ideal(
    trace: Trace, feed: Callable[[int, int], Feed], seeds: Sequence[int] = (0, 1, 2, 3), rows: Sequence[int] = ROWS
) -> tuple[float, float]:
    """Multiply-adds per request and per candidate of the block ideal.

    Args:
        trace: The original model.
        feed: Inputs for a number of candidates and a seed.
        seeds: Requests. What varies in any of them varies: a ReLU that is zero for all candidates of one request
            is not request-level. One that is zero in all requests is taken for what the rest of its vector is.
        rows: Two numbers of candidates; an extent that differs between them runs over candidates.
    """
    n = rows[0]
    shapes = {name: value.shape for name, value in trace(feed(rows[1], seeds[0])).items() if _is_array(value)}
    same: dict[str, NDArray[np.bool_]] = {}
    zero: dict[str, NDArray[np.bool_]] = {}
    axes: dict[str, int | None] = {}
    values: Feed = {}
    for seed in seeds:
        values = trace(feed(n, seed))
        for name, value in values.items():
            if not _is_array(value):
                continue
            axes[name] = _candidate_axis(value.shape, shapes[name], rows)
            found = _unvarying(value, axes[name], n)
            before = same.get(name, found)
            same[name] = before & found if before.shape == found.shape else np.zeros(found.shape, bool)
            before = zero.get(name, found)
            zero[name] = before & (value == 0) if before.shape == found.shape else np.zeros(found.shape, bool)
    for name, mask in same.items():
        if mask.ndim:
            same[name] = mask & ~(zero[name] & ~mask.all(axis=-1, keepdims=True))
    request = candidate = 0.0
    for node in trace.nodes:
        total = float(_macs(node, values))
        if all(axes.get(name) is None for name in (*node.input, *node.output)):
            request += total
            continue
        once = _unvarying_macs(node, values, same)
        request += once / n
        candidate += (total - once) / n
    return request, candidate


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind in "biuf"


def _candidate_axis(first: tuple[int, ...], second: tuple[int, ...], rows: Sequence[int]) -> int | None:
    for axis, (a, b) in enumerate(zip(first, second, strict=True)):
        if a != b:
            # Otherwise its size depends on the data.
            return axis if a % rows[0] == 0 and a // rows[0] * rows[1] == b else -1
    return None


def _unvarying(value: Array, axis: int | None, n: int) -> NDArray[np.bool_]:
    """Which entries are the same for all candidates, in the value's shape."""
    if axis is None:
        return np.ones(value.shape, bool)
    if axis < 0 or not value.size:
        return np.zeros(value.shape, bool)
    data = value.astype(np.float64)
    finite = np.isfinite(data)
    sizes = np.abs(data[finite & (data != 0)])
    typical = float(np.median(sizes)) if sizes.size else 0.0
    per_row = value.shape[axis] // n
    best = np.zeros(value.shape, bool)
    # Merged axes: candidates outside, or inside as in sequence-first layouts.
    for inner in (False, True):
        split = (per_row, n) if inner else (n, per_row)
        cut = data.reshape(*value.shape[:axis], *split, *value.shape[axis + 1 :])
        cut = np.moveaxis(cut, axis + 1 if inner else axis, 0)
        first = cut[:1]
        with np.errstate(invalid="ignore"):
            close = np.abs(cut - first) <= _ROUNDING[0] * np.abs(first) + _ROUNDING[1] * typical
            equal = (close & np.isfinite(first)) | (cut == first) | (np.isnan(cut) & np.isnan(first))
        mask = np.broadcast_to(equal.all(axis=0), cut.shape)
        mask = np.moveaxis(mask, 0, axis + 1 if inner else axis).reshape(value.shape)
        if mask.sum() > best.sum():
            best = mask
        if per_row == 1:
            break
    return best


def _attribute(node: onnx.NodeProto, name: str, default: Any = 0) -> Any:
    for attribute in node.attribute:
        if attribute.name == name:
            found = onnx.helper.get_attribute_value(attribute)
            return found.decode() if isinstance(found, bytes) else found
    return default


def _operands(node: onnx.NodeProto, values: dict[str, Any]) -> tuple[Array, Array]:
    """Operands as [..., M, K] and [..., K, P]."""
    a, b = (values[node.input[k]] for k in _PRODUCTS[node.op_type])
    if _attribute(node, "transA"):
        a = np.swapaxes(a, -1, -2)
    if _attribute(node, "transB"):
        b = np.swapaxes(b, -1, -2)
    return (a[None, :] if a.ndim == 1 else a), (b[:, None] if b.ndim == 1 else b)


def _equation(node: onnx.NodeProto, values: dict[str, Any]) -> str:
    """An Einsum's terms with the ellipsis spelt out."""
    terms = _attribute(node, "equation").replace(" ", "").split("->")[0].split(",")
    out = []
    for term, name in zip(terms, node.input, strict=True):
        extra = values[name].ndim - len(term.replace("...", ""))
        out.append(term.replace("...", "".join(chr(ord("Z") - k) for k in reversed(range(extra)))))
    return ",".join(out)


def _macs(node: onnx.NodeProto, values: dict[str, Any]) -> int:
    kind = node.op_type
    if kind in _PRODUCTS:
        a, b = _operands(node, values)
        lead = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        return int(np.prod([*lead, *a.shape[-2:], b.shape[-1]], dtype=np.int64))
    if kind == "Einsum":
        size: dict[str, int] = {}
        for term, name in zip(_equation(node, values).split(","), node.input, strict=True):
            for letter, extent in zip(term, values[name].shape, strict=True):
                size[letter] = max(size.get(letter, 1), extent)
        return int(np.prod(list(size.values()), dtype=np.int64)) if len(node.input) > 1 else 0
    if kind in ("Conv", "FusedConv"):
        weight, y = values[node.input[1]], values[node.output[0]]
        return int(np.prod([*y.shape, *weight.shape[1:]], dtype=np.int64))
    if kind in _GATES:
        return sum(_recurrent(node, values))
    q, k = values[node.input[0]], values[node.input[1]]
    return int(2 * np.prod([*q.shape, k.shape[-2]], dtype=np.int64))


def _recurrent(node: onnx.NodeProto, values: dict[str, Any]) -> tuple[int, int]:
    """Multiply-adds with the input, and with the state."""
    x, w, r = (values[name] for name in node.input[:3])
    rows = x.shape[0] * x.shape[1]
    return int(rows * w.size), int(rows * r.size)


def _unvarying_macs(node: onnx.NodeProto, values: dict[str, Any], same: dict[str, NDArray[np.bool_]]) -> float:
    """Multiply-adds of entries that are the same for all candidates, over all rows."""
    kind = node.op_type
    if kind in _PRODUCTS:
        a, b = _operands(node, same)
        return float((a.sum(-2, dtype=np.float64) * b.sum(-1, dtype=np.float64)).sum())
    if kind == "Einsum" and len(node.input) == 2:
        masks = [same[name].astype(np.float64) for name in node.input]
        return float(np.einsum(f"{_equation(node, values)}->", *masks, optimize=True))
    if kind in _GATES:
        inputs, states = _recurrent(node, values)
        state = next(same[name] for name in node.output if name)
        return inputs * float(same[node.input[0]].mean()) + states * float(state.mean())
    weight = values[node.input[1]]
    if kind == "Conv" and set(weight.shape[2:]) == {1} and _attribute(node, "group", 1) == 1:
        x, y = values[node.input[0]], values[node.output[0]]
        if x.shape[2:] == y.shape[2:]:
            return float(same[node.input[0]].sum(dtype=np.float64) * weight.shape[0])
    return _macs(node, values) * float(same[node.output[0]].mean())
