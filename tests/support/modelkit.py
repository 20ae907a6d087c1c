"""Small hand-made models, and holding a rewrite of one against the original with data of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import onnxruntime
from onnx import ModelProto, helper, numpy_helper

import onnxrank
from onnxrank import cost
from onnxrank.passes import choosing
from onnxrank.pipeline import Result
from onnxrank.roles import InputRole, Roles

Feed = dict[str, np.ndarray]
HEAD = "h = Gemm(c, W, b) r = Relu(h) y = Gemm(r, V)"
GEMM = f"(float[N,4] user, float[N,3] item) => (float[N,1] y) {{ c = Concat<axis=1>(user, item) {HEAD} }}"
SIZES = (1, 2, 7)
HIDDEN = 8
OTHER = 4  # value of every symbolic dim that does not count candidates


def graph(
    text: str, *, opset: int = 17, ir: int = 8, domains: Mapping[str, int] | None = None, **weights: Any
) -> ModelProto:
    """A model from `(inputs) => (outputs) { nodes }` in onnx's text form, with initializers from arrays."""
    imports = {"": opset, **(domains or {})}
    listed = ", ".join(f'"{d}": {v}' for d, v in imports.items())
    model = onnx.parser.parse_model(f"<ir_version: {ir}, opset_import: [{listed}]> g {text}")
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(w), k) for k, w in weights.items())
    return model


def w(*shape: int, seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
    """Weights of about unit gain."""
    data = np.random.default_rng((seed, *shape)).standard_normal(shape)
    return (data / np.sqrt(shape[0] if shape else 1)).astype(dtype)


def mlp(text: str = GEMM, width: int = 7, **how: Any) -> ModelProto:
    """A model whose body ends in `HEAD`, on a `c` of so many columns."""
    return graph(text, **{"W": w(width, HIDDEN), "b": w(HIDDEN), "V": w(HIDDEN, 1), **how})


def optimised(model: ModelProto | str | Path, request: Sequence[str] = (), **how: Any) -> Result:
    """`optimize` where only products cost time: the models here are too small for a saving to outweigh a launch."""
    rate = cost.Target(launch=0.0, byte=1e-16, mac=1 / 25e9)
    with mock.patch.object(cost, "CPU", rate), mock.patch.object(choosing, "LEAST_GAIN", 1.0):
        return onnxrank.optimize(model, request=request, **how)


def i64(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def one(value: float, dtype: Any = np.float32) -> np.ndarray:
    return np.array(value, dtype)


def session(model: ModelProto | str | Path, optimise: bool = True) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = model.SerializeToString() if isinstance(model, ModelProto) else str(model)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def _numbers(dtype: np.dtype, shape: Sequence[int], rng: np.random.Generator, ids: int) -> np.ndarray:
    if dtype.kind == "O":
        return rng.choice(np.array(["a", "b", "c"], object), shape)
    if dtype.kind in "iu":
        return rng.integers(0, ids, shape).astype(dtype)
    return (rng.random(shape) < 0.5) if dtype.kind == "b" else rng.standard_normal(shape).astype(dtype)


def draw(model: ModelProto, roles: Roles, n: int, seed: int, ids: Mapping[str, int] | int = 5) -> Feed:
    """Inputs of the original signature: what is request-level is the same in all rows."""
    rng = np.random.default_rng(seed)
    known = {t.name for t in model.graph.initializer}
    feed = {}
    for info in (i for i in model.graph.input if i.name not in known):
        role, kind = roles.inputs[info.name], info.type.tensor_type
        shape = [d.dim_value if d.HasField("dim_value") and d.dim_value >= 0 else OTHER for d in kind.shape.dim]
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(kind.elem_type))
        high = ids if isinstance(ids, int) else ids.get(info.name, 5)
        if role.candidate_axis is None:
            feed[info.name] = _numbers(dtype, shape, rng, high)
            continue
        shape[role.candidate_axis] = n * (role.record or 1)
        data = _numbers(dtype, shape, rng, high)
        rows = _rows(data, role)
        if role.level == "request":
            rows[:] = rows[:1]
        elif role.level == "mixed":
            at = [slice(None)] * rows.ndim
            at[_mixed(role)] = list(role.request)
            rows[tuple(at)] = rows[:1][tuple(at)]
        feed[info.name] = data
    return feed


def _rows(data: np.ndarray, role: InputRole) -> np.ndarray:
    """A view with candidates on axis 0."""
    return data.reshape(-1, role.record) if role.record else np.moveaxis(data, role.candidate_axis, 0)


def _mixed(role: InputRole) -> int:
    """The axis of `_rows` that a mixed input is divided along."""
    if role.record:
        return 1
    assert role.axis is not None and role.candidate_axis is not None
    return role.axis + 1 if role.axis < role.candidate_axis else role.axis


def divide(feed: Feed, roles: Roles) -> Feed:
    """The same inputs under the `request` interface."""
    out: Feed = {}
    for name, data in feed.items():
        role = roles.inputs[name]
        if role.candidate_axis is None or role.level == "candidate":
            out[name] = data
            continue
        rows = _rows(data, role)
        parts = {name: rows[:1]}
        if role.level == "mixed":
            axis = _mixed(role)
            rest = [k for k in range(rows.shape[axis]) if k not in role.request]
            parts = {f"{name}.request": rows[:1].take(role.request, axis), f"{name}.candidate": rows.take(rest, axis)}
        for k, v in parts.items():
            out[k] = np.ascontiguousarray(v.reshape(-1) if role.record else np.moveaxis(v, 0, role.candidate_axis))
    return out


def roles_of(result: Result) -> Roles:
    return Roles.from_dict(result.report.roles)


def fired(result: Result) -> set[str]:
    """Rules that applied. A site counts for the rule that does most there: a folded layer is a divided one too."""
    names = {r.name for r in result.report.rules}
    return names | {"fc"} if "fold" in names else names


def dims(info: onnx.ValueInfoProto) -> list[int | str | None]:
    shape = info.type.tensor_type.shape.dim
    return [d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in shape]


def signature(values: Any) -> list[tuple[str, int, list[int | str | None]]]:
    return [(v.name, v.type.tensor_type.elem_type, dims(v)) for v in values]


def agree(a: np.ndarray, b: np.ndarray, what: str, tolerance: float = 2e-5) -> None:
    assert a.dtype == b.dtype and a.shape == b.shape, (what, a.dtype, b.dtype, a.shape, b.shape)
    if a.dtype.kind != "f":
        assert (a == b).all(), what
        return
    tolerance = {2: 4e-3, 8: 1e-12}.get(a.dtype.itemsize, tolerance)
    scale = max(np.abs(a[np.isfinite(a)]).max(initial=0), 0.1)
    np.testing.assert_allclose(b, a, rtol=0, atol=tolerance * scale, err_msg=what)


def compare(
    model: ModelProto,
    result: Result,
    *,
    sizes: Sequence[int] = SIZES,
    ids: Mapping[str, int] | int = 5,
    seeds: int = 2,
    optimise: bool = True,
) -> None:
    """Holds a result against the original, under the contract, for several requests of several sizes."""
    roles, changed = roles_of(result), result.changed
    before, after = session(model, optimise), session(result.model, optimise)
    names = [o.name for o in model.graph.output]
    assert signature(result.model.graph.output) == signature(model.graph.output)
    for n in sizes:
        for seed in range(seeds):
            feed = draw(model, roles, n, 97 * n + seed, ids)
            mine = divide(feed, roles) if changed and result.report.interface == "request" else feed
            assert {i.name for i in after.get_inputs()} <= set(mine), "inputs"
            wanted = [i.name for i in before.get_inputs()]
            a = before.run(names, {k: feed[k] for k in wanted if k in feed})
            b = after.run(names, {i.name: mine[i.name] for i in after.get_inputs()})
            for name, x, y in zip(names, a, b, strict=True):
                agree(np.asarray(x), np.asarray(y), f"{name} at N = {n}, seed {seed}")


def hold(
    model: ModelProto,
    request: Sequence[str] = (),
    *,
    rules: Sequence[str] = ("fc",),
    share: float | None = 1.0,
    sizes: Sequence[int] = SIZES,
    ids: Mapping[str, int] | int = 5,
    seeds: int = 2,
    runtime_optimises: bool = True,
    **how: Any,
) -> Result:
    """Optimises, compares at several N; asserts that the rules applied and left less than `share` of the work."""
    onnx.checker.check_model(model)
    kept = model.SerializeToString(deterministic=True)
    result = optimised(model, request, **how)
    assert model.SerializeToString(deterministic=True) == kept, "the caller's model was changed"
    report = result.report
    if rules:
        assert result.changed and set(rules) <= fired(result), (fired(result), report.refusals)
        assert report.checks and all(c.passed for c in report.checks)
        if share is not None:
            assert report.macs_after < share * report.macs_before, (report.macs_after, report.macs_before)
    onnx.checker.check_model(result.model)
    assert result.model.ir_version == model.ir_version
    assert list(result.model.opset_import) == list(model.opset_import)
    compare(model, result, sizes=sizes, ids=ids, seeds=seeds, optimise=runtime_optimises)
    return result
