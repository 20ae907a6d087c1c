# ruff: noqa: E501
"""Derived shapes and shape tensors, against onnxruntime at extents far from those that anything was derived at."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import ModelProto, numpy_helper

from onnxrank import facts, operators
from onnxrank.errors import ModelError
from onnxrank.extents import Expr, Unproved, evaluate, symbol
from onnxrank.operators.movements import sliced
from onnxrank.operators.registry import KINDS
from onnxrank.workers import RemoteSession

_AT = [(2, 7), (3, 11), (1, 1), (17, 0), (512, 50), (33, 51), (0, 300), (1, 49), (64, 100)]
_INPUTS = {"x": ((1, ("N",)), (1, ("S:L",)), (4, ())), "c": ((1, ("N",)), (6, ())), "h": ((1, ("S:L",)),)}


QUANTISED = "s = Constant<value_float=0.1>() z = Constant<value=int8 {0}>() q = QuantizeLinear(x, s, z) "
"""Every entry in 8 bits."""


def _model(text: str, opset: int = 17, **initializers: Any) -> ModelProto:
    head = f'<ir_version: 8, opset_import: ["" : {opset}, "com.microsoft" : 1, "ai.onnx.ml" : 1]>\n'
    made = onnx.parser.parse_model(f"{head}g (float[N,L,4] x, float[N,6] c, int64[L] h) => (float y) {{ {text} }}")
    del made.graph.output[:]
    for name, data in initializers.items():
        made.graph.initializer.append(numpy_helper.from_array(np.asarray(data), name))
    return made


def _feed(n: int, length: int) -> dict[str, Any]:
    rng = np.random.default_rng(n * 1000 + length)
    x, c = rng.standard_normal((n, length, 4)), rng.standard_normal((n, 6))
    return {"x": x.astype(np.float32), "c": c.astype(np.float32), "h": rng.integers(0, 5, length)}


def _runs(model: ModelProto) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """What onnxruntime gives, wherever it runs: it dies of some operators without rows."""
    with RemoteSession(model) as session:
        for n, length in _AT:
            with contextlib.suppress(ModelError):
                yield n, length, session.run(_feed(n, length))


def _held(text: str, opset: int = 17, **initializers: Any) -> facts.Facts:
    """Derives a model, and holds shapes and constants against what onnxruntime gives."""
    model = _model(text, opset, **initializers)
    found = facts.derive(model, _INPUTS, None)
    names = [o for n in model.graph.node for o in n.output if o]
    exposed = ModelProto()
    exposed.CopyFrom(model)
    exposed.graph.output.extend(onnx.helper.make_empty_tensor_value_info(o) for o in names)
    for n, length, given_ in _runs(exposed):
        values = {"N": n, "S:L": length}
        for name in names:
            for size, have in zip(found.sizes.get(name, ()), np.shape(given_[name]), strict=name in found.sizes):
                if not isinstance(size, Expr) or size.symbols <= values.keys():
                    assert evaluate(size, values) == have, (name, size, values)
            if name in found.folded:
                _, data = found.folded[name]
                assert np.array_equal(np.broadcast_to(data, given_[name].shape), given_[name]), name
    return found


def _sizes(found: facts.Facts, name: str = "y") -> list[str]:
    return [str(n) for n in found.sizes[name]]


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("s = Constant<value_ints=[-50]>() e = Constant<value_ints=[9223372036854775807]>() a = Constant<value_ints=[1]>()"
         " y = Slice(x, s, e, a)", ["N", "min(S:L, 50)", "4"]),
        ("s = Constant<value_ints=[0]>() e = Constant<value_ints=[100]>() a = Constant<value_ints=[0]>()"
         " y = Slice(c, s, e, a)", ["min(N, 100)", "6"]),
        ("s = Constant<value_ints=[1]>() e = Constant<value_ints=[-1]>() a = Constant<value_ints=[1]>()"
         " y = Slice(x, s, e, a)", None),
        ("s = Constant<value_ints=[0]>() e = Constant<value_ints=[-1]>() a = Constant<value_ints=[1]>()"
         " y = Slice(x, s, e, a)", ["N", "max(S:L - 1, 0)", "4"]),
        ("s = Constant<value_ints=[3]>() e = Constant<value_ints=[9223372036854775807]>() a = Constant<value_ints=[1]>()"
         " t = Constant<value_ints=[2]>() y = Slice(x, s, e, a, t)", None),
        ("t = Constant<value_ints=[-1, 4]>() y = Reshape(x, t)", ["N*S:L", "4"]),
        ("t = Constant<value_ints=[0, -1]>() y = Reshape(x, t)", ["N", "4*S:L"]),
        ("f = Flatten<axis=2>(x) s = Shape(x) y = Reshape(f, s)", ["N", "S:L", "4"]),
        ("y = Concat<axis=1>(x, x)", ["N", "2*S:L", "4"]),
        ("a = Constant<value_ints=[1]>() u = Unsqueeze(c, a) s = Constant<value_ints=[0]>() e = Constant<value_ints=[4]>()"
         " w = Constant<value_ints=[2]>() v = Slice(u, s, e, w) y = Concat<axis=1>(x, v)", ["N", "S:L + 1", "4"]),
        ("p = Constant<value_ints=[0, 2, 0, 0, 3, 0]>() y = Pad(x, p)", ["N", "S:L + 5", "4"]),
        ("s = Shape(h) z = Constant<value_int=0>() n = Squeeze(s) o = Constant<value_int=20>() y = Range(z, n, o)",
         ["((S:L + 19) // 20)"]),
        ("s = Shape(x) y = ConstantOfShape(s)", ["N", "S:L", "4"]),
        ("m = Transpose<perm=[0,2,1]>(x) y = MatMul(x, m)", ["N", "S:L", "S:L"]),
        ("y = Einsum<equation=\"blk,bjk->bjl\">(x, x)", ["N", "S:L", "S:L"]),
        ("y = Einsum<equation=\"...lk,...mk->...lm\">(x, x)", ["N", "S:L", "S:L"]),
        ("y = Einsum<equation=\"abk,cbk\">(x, x)", ["N", "N"]),
        ("a = Constant<value_ints=[1]>() y = ReduceSum<keepdims=0>(x, a)", ["N", "4"]),
        ("r = Constant<value_ints=[1, 2, 1]>() y = Tile(x, r)", ["N", "2*S:L", "4"]),
        ("k = Constant<value_ints=[2]>() y, i = TopK<axis=2>(x, k)", ["N", "S:L", "2"]),
        ("d = Constant<value_int=5>() v = Constant<value_ints=[0, 1]>() y = OneHot(h, d, v)", ["S:L", "5"]),
        ("s = Shape<start=2>(x) o = Constant<value_ints=[1]>() v = Concat<axis=0>(o, s) i = Constant<value_ints=[-2]>()"
         " d = Constant<value_int=3>() t = OneHot(i, d, v) z = Constant<value_ints=[0]>() r = Squeeze(t, z)"
         " y = Tile(x, r)", ["N", "4*S:L", "4"]),
        ("s = Shape<start=1, end=2>(x) o = Constant<value_ints=[1]>() v = Concat<axis=0>(o, s)"
         " i = Constant<value_ints=[1]>() d = Constant<value_int=2>() t = OneHot<axis=0>(i, d, v)"
         " z = Constant<value_ints=[1]>() r = Squeeze(t, z) y = Tile(c, r)", ["N", "6*S:L"]),
        ("y, z = Split<axis=1>(c)", ["N", "3"]),
        ("y = com.microsoft.FusedGemm<activation=\"Relu\", transB=1>(c, c)", ["N", "N"]),
        ("y = com.microsoft.FusedMatMul<transB=1>(x, x)", ["N", "S:L", "S:L"]),
        ("t = Transpose<perm=[1,2,0]>(x) y = com.microsoft.FusedMatMul<transA=1, transBatchA=1>(t, x)", None),
        ("t = Transpose<perm=[1,0,2]>(x) y = com.microsoft.FusedMatMul<transBatchA=1, transB=1>(t, x)",
         ["N", "S:L", "S:L"]),
        ("q, s, z = DynamicQuantizeLinear(x) d = DequantizeLinear(q, s, z) y = Relu(d)", ["N", "S:L", "4"]),
        (QUANTISED + "m = Transpose<perm=[0,2,1]>(q) y = QLinearMatMul(q, s, z, m, s, z, s, z)", ["N", "S:L", "S:L"]),
        (QUANTISED + "y = com.microsoft.QLinearAdd(q, s, z, q, s, z, s, z)", ["N", "S:L", "4"]),
        (QUANTISED + "y = com.microsoft.QLinearSigmoid(q, s, z, s, z)", ["N", "S:L", "4"]),
        (QUANTISED + "y = com.microsoft.QLinearConcat<axis=1>(s, z, q, s, z, q, s, z)", ["N", "2*S:L", "4"]),
        (QUANTISED + "y = com.microsoft.QLinearSoftmax<axis=-1, opset=17>(q, s, z, s, z)", ["N", "S:L", "4"]),
        ("s = Constant<value_float=0.1>() z = Constant<value=int8 {0}>() q = QuantizeLinear(c, s, z)"
         " y = com.microsoft.QGemm<transB=1>(q, s, z, q, s, z)", ["N", "N"]),
        ("y = ai.onnx.ml.LinearRegressor<coefficients=[1.0,2.0,3.0,4.0,5.0,6.0,1.0,2.0,3.0,4.0,5.0,6.0], targets=2>(c)",
         ["N", "2"]),
    ],
)  # fmt: skip
def test_shape(text: str, sizes: list[str] | None) -> None:
    found = _held(text)
    assert sizes is None or _sizes(found) == sizes


@pytest.mark.parametrize(
    "text",
    [
        # A number of rows that is rounded, filtered or found in the data is never an expression of N.
        "p = Constant<value_float=0.05>() s = Shape<start=0, end=1>(c) f = Cast<to=1>(s) g = Mul(f, p) k0 = Cast<to=7>(g)"
        " o = Constant<value_ints=[1]>() k = Add(k0, o) y, i = TopK<axis=0>(c, k)",
        "z = Constant<value_float=0.0>() a = Constant<value_ints=[1]>() m = ReduceSum<keepdims=0>(c, a) b = Greater(m, z)"
        " w = NonZero(b) o = Constant<value_ints=[0]>() i = Squeeze(w, o) y = Gather(c, i)",
        "z = Constant<value_float=0.0>() a = Constant<value_ints=[1]>() m = ReduceSum<keepdims=0>(c, a) b = Greater(m, z)"
        " y = Compress<axis=0>(c, b)",
        "y = Unique<sorted=1>(h)",
    ],
)
def test_an_extent_that_is_not_proved_is_opaque(text: str) -> None:
    found = _held(text)
    (first, *_) = found.sizes["y"]
    assert isinstance(first, Expr) and first.symbols <= found.opaque.keys()


def test_extents_that_are_not_proved_equal_only_themselves() -> None:
    found = _held("y = NonZero(c) z = NonZero(c) w = Add(y, y)")
    assert found.sizes["y"] != found.sizes["z"]
    assert found.sizes["w"] == found.sizes["y"]


def test_squeeze_without_axes_has_no_rank_where_an_extent_may_be_one() -> None:
    found = _held("a = Constant<value_ints=[1]>() u = Unsqueeze(c, a) y = Squeeze(u)")
    assert "y" in found.unknown


_SQUEEZED = "a = Constant<value_ints=[1]>() u = Unsqueeze(c, a) y = Squeeze(u) "
"""Of rank 2, and of rank 1 where there is one candidate."""


def _squeezed(reader: str, output: str = "z") -> tuple[ModelProto, facts.Facts]:
    model = _model(_SQUEEZED + reader)
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(output))
    return model, facts.derive(model, _INPUTS, None)


@pytest.mark.parametrize("reader", ["z = Concat<axis=1>(y, r)", "v = Squeeze(u) z = Concat<axis=1>(v, y, r)"])
def test_squeeze_without_axes_has_the_rank_that_its_reader_demands(reader: str) -> None:
    text = f"r = Relu(c) {reader}"
    model, found = _squeezed(text)
    assert _sizes(found) == ["N", "6"]
    # It holds of all runs that there are: with one candidate there is none.
    runs = {n: given["z"].shape for n, _, given in _runs(model)}
    assert 1 not in runs and runs[3] == (3, evaluate(found.sizes["z"][1], {}))
    assert "y" in _squeezed(text, "r")[1].unknown  # nothing runs a Concat that nobody reads


@pytest.mark.parametrize(
    "reader",
    ["z = Add(y, c)", "q = Squeeze(u) z = Concat<axis=0>(y, q)", "t = Transpose(c) w = MatMul(t, c) z = Gemm(y, w)"],
)
def test_squeeze_without_axes_has_no_rank_where_its_reader_demands_none(reader: str) -> None:
    assert "y" in _squeezed(reader)[1].unknown


_LAST = (
    "a = Constant<value_ints=[-7]>() b = Constant<value_ints=[9223372036854775807]>() i = Constant<value_ints=[1]>()"
    " w = Constant<value_ints=[0, 2, 0, 0, 0, 0]>() p = Pad(x, w) l = Slice(p, a, b, i) m = Slice(x, a, b, i) "
)
"""The last 7 positions, or all that there are: with two more in front, and without."""
_DATA = {name: np.ones(shape, np.float32) for name, shape in (("seven", (7, 4)), ("one", (1, 4)), ("square", (7, 3)))}


def _last(reader: str) -> tuple[ModelProto, facts.Facts]:
    model = _model(_LAST + reader, **_DATA)
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info("z"))
    return model, facts.derive(model, _INPUTS, None)


@pytest.mark.parametrize(
    ("reader", "least"),
    [
        ("z = Add(l, seven)", 5),
        ("t = Transpose<perm=[0, 2, 1]>(m) z = MatMul(t, square)", 7),
        ("f = Flatten(l) v = Constant<value_ints=[28, 1]>() o = Expand(v, v) k = Cast<to=1>(o) z = Gemm(f, k)", 5),
    ],
)
def test_lengths_at_which_a_model_does_not_run_do_not_count(reader: str, least: int) -> None:
    """What is added to 7 positions has 7, wherever there is a result at all."""
    model, found = _last(reader)
    assert _sizes(found, "m" if least == 7 else "l") == ["N", "7", "4"]
    runs = {length for _, length, _ in _runs(model)}
    assert runs == {length for _, length in _AT if length >= least}
    for n, length, given_ in _runs(model):
        sizes = found.sizes["z"]
        assert given_["z"].shape == tuple(evaluate(s, {"N": n, "S:L": length}) for s in sizes)


@pytest.mark.parametrize(
    ("reader", "name"),
    [("z = Add(l, one)", "l"), ("z = Add(m, seven)", "m"), ("z = Relu(l) y = Add(l, seven)", "l"),
     ("k = Constant<value_ints=[-1, 3, 4]>() z = Reshape(l, k)", "l")],
)  # fmt: skip
def test_lengths_at_which_a_model_runs_do_count(reader: str, name: str) -> None:
    """One position is broadcast, nothing runs an addition that nobody reads, and a Reshape may take other rows."""
    model, found = _last(reader)
    assert _sizes(found, name)[1].startswith("min(S:L")
    assert any(length < 5 for _, length, _ in _runs(model))


@pytest.mark.parametrize(("rows", "size"), [(40, "S:L + 2"), (1, "min(S:L + 2, 3)")])
def test_tables_that_are_as_long_as_any_history(rows: int, size: str) -> None:
    """Where the first rows of a table meet a history, no history is longer, and a mask of two more is as long, too."""
    text = (
        "s = Shape<start=1, end=2>(x) o = Constant<value_ints=[0]>() p = Slice(table, o, s, o) z = Add(x, p)"
        " two = Constant<value_ints=[2]>() e = Add(s, two) m = Slice(mask, o, e, o) y = Relu(m)"
    )
    data = {"table": np.ones((rows, 4), np.float32), "mask": np.ones(rows + 2, np.float32)}
    model = _model(text, **data)
    for name in "zy":
        model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    assert _sizes(facts.derive(model, _INPUTS, None)) == [size]


def test_shape_arithmetic_is_folded_where_it_is_constant_only() -> None:
    found = _held(
        "s = Shape(x) i = Constant<value_int=2>() d = Gather(s, i) f = Cast<to=1>(d) q = Sqrt(f) j = Constant<value_int=1>()"
        " l = Gather(s, j) b = Constant<value_int=8>() big = Greater(l, b) same = Equal(d, b)"
    )
    assert found.folded["q"][1] == np.float32(2)
    assert not found.folded["same"][1]
    assert "big" not in found.folded and "l" not in found.folded


def test_comparison_that_holds_for_all_extents() -> None:
    found = _held("s = Shape<start=0, end=1>(x) m = Constant<value_ints=[-1]>() y = Equal(s, m) z = Greater(s, m)")
    assert not found.folded["y"][1].any() and found.folded["z"][1].all()


def test_zeros_with_a_row_per_candidate_are_constants() -> None:
    found = _held("s = Shape<start=0, end=1>(c) o = Constant<value_ints=[1]>() t = Concat<axis=0>(s, o)"
                  " y = ConstantOfShape(t) e = Expand(y, t)")  # fmt: skip
    dims, data = found.folded["e"]
    assert dims == (("N",), ()) and data.shape == (1, 1) and data[0, 0] == 0


def test_entries_that_a_reshape_moves_between_candidates_are_no_constants() -> None:
    found = _held("s = Shape<start=0, end=1>(c) t = Concat<axis=0>(two, s, two) e = Expand(m, t) y = Reshape(e, k)"
                  " z = Reshape(e, q)", m=np.arange(4.0, dtype=np.float32).reshape(2, 1, 2), two=[2], k=[-1, 2, 2],
                  q=[2, 1, -1, 2])  # fmt: skip
    assert "e" in found.folded and "y" not in found.folded and "z" in found.folded


def test_mixed_types_keep_their_own() -> None:
    model = _model("f = Cast<to=10>(w) y = Transpose<perm=[1,0]>(w) z = Transpose<perm=[1,0]>(f)",
                   w=np.ones((2, 3), np.float32) / 3)  # fmt: skip
    found = facts.derive(model, _INPUTS, None)
    assert found.folded["y"][1].dtype == np.float32 and found.folded["z"][1].dtype == np.float16


def test_constants_of_operators_without_an_entry_are_computed_by_the_runtime() -> None:
    found = _held("a = Constant<value_floats=[0.5, 2.0]>() e = Erf(a) y = Exp(e)")
    assert found.folded["y"][1].shape == (2,)


@given(st.integers(-60, 60), st.integers(-60, 60), st.integers(1, 4), st.integers(0, 200))
def test_slice_of_a_symbolic_axis(start: int, end: int, step: int, length: int) -> None:
    try:
        made = sliced(symbol("L"), start, end, step)
    except Unproved:
        return
    if made is not None:
        assert evaluate(made, {"L": length}) == len(range(length)[start:end:step])


def test_every_entry_names_an_operator_that_exists() -> None:
    for op in operators.REGISTRY:
        if "::" not in op and op != "SimplifiedLayerNormalization":
            assert onnx.defs.has(op), op


def test_what_a_dimension_means_follows_what_is_known_of_its_symbols() -> None:
    """A symbol stands for itself until it is known what it is made of."""
    known = facts.Facts()
    made = symbol("S:a") + symbol("S:b")
    dim = (f"~{made}", 3)
    assert known.size_of(dim) == symbol(f"~{made}") * 3
    assert known.symbol_of(made) == dim[0]
    assert known.size_of(dim) == made * 3
    assert known.extent(made * 3) == known.extent(made * 3) == (3, (dim[0],))


def test_an_operator_has_one_entry() -> None:
    assert sum(len(kind.OPERATORS) for kind in KINDS) == len(operators.REGISTRY)
