"""Levels of tensors as the walk finds them: against rewrites, against runs (`witness`), and operator by operator."""

from __future__ import annotations

from math import prod
from pathlib import Path

import kinds
import lengths
import numpy as np
import onnx
import pytest
import textform
from helpers import candidate, exposed, feeds, levels_hold, patterns, request, run, transformation
from hypothesis import HealthCheck, given, note, reject, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from programs import program

import onnxrank
from onnxrank import operators
from onnxrank.facts import Setting
from onnxrank.operators import Trait
from onnxrank.rewrite import Rewrite
from onnxrank.roles import load_spec
from onnxrank.rule import SiteFailed
from onnxrank.transform import Transformation
from onnxrank.values import Abstract, Affine, Level, Sum, Unrepresentable, extents

MODELS = Path(__file__).resolve().parents[2] / "models" / "onnx"
FILES = sorted(p.name for p in MODELS.glob("*.onnx"))
U, C, R, X = (int(v) for v in (Level.UNREAD, Level.CONSTANT, Level.REQUEST, Level.CANDIDATE))
EXAMPLES = settings(
    max_examples=80, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
SEEDS, STEPS = st.integers(0, 2**32 - 1), st.integers(1, 24)


# --- against rewrites ------------------------------------------------------------------------------------------------


def entry_levels(rw: Rewrite, value: Abstract) -> NDArray[np.int8]:
    """Levels that a rewrite knows of, in the shape of the constant extents."""
    shape = extents(value.dims)
    if isinstance(value, Sum):
        parts = [entry_levels(rw, t) for t in value.terms]
        wide = [np.broadcast_to(p.reshape((1,) * (len(shape) - p.ndim) + p.shape), shape) for p in parts]
        return np.maximum.reduce(wide)
    if isinstance(value, Affine) or value.whole is not None or prod(shape) > 1 << 22:
        return np.broadcast_to(np.int8(rw.level(value)), shape)
    return rw.sources.levels(value.codes)


def hold_against(made: Transformation) -> None:
    """The walk knows at least what the rewrite found out, of every tensor and entry."""
    for name, value in made.rw.values.items():
        found, theirs = made.study.flow.tensors[name], entry_levels(made.rw, value)
        if found.dims != value.dims:  # told apart in more factors, so that a reshape can be followed
            assert found.opaque is None and sum(map(len, found.dims)) > sum(map(len, value.dims)), name
            continue
        ours = np.broadcast_to(found.levels, theirs.shape)
        worse = (ours > theirs) & (theirs > U if ours.max(initial=U) < X else ours > R)
        assert not worse.any(), (name, found.opaque, np.unique(ours), np.unique(theirs))


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_no_rewrite_knows_more(name: str) -> None:
    spec = load_spec(MODELS / f"{name.split('.')[0]}.roles.yaml")
    hold_against(transformation(onnx.load(MODELS / name), spec))


@pytest.mark.slow
@settings(EXAMPLES, max_examples=30)
@given(seed=SEEDS, steps=STEPS)
def test_no_rewrite_along_lengths_knows_more(seed: int, steps: int) -> None:
    """Programs of many more operators, along axes of symbolic length; and what is said of them holds."""
    made_up = kinds.program(seed, steps)
    note(lengths.text(made_up.model))
    try:
        made = transformation(made_up.model, request=patterns(made_up.inputs))
    except (Unrepresentable, SiteFailed):
        reject()
    hold_against(made)
    at = {name: 3 + k for k, name in enumerate(made_up.lengths)}
    old, _ = feeds(made_up.inputs, 5, seed, lengths=at)
    setting = Setting({"N": 5, **{f"S:{name}": n for name, n in at.items()}}, seed)
    levels_hold(made.study, run(exposed(made.study.model), old), setting, 1e-5)


@pytest.mark.slow
@EXAMPLES
@given(seed=SEEDS, steps=STEPS)
def test_no_rewrite_of_a_random_program_knows_more(seed: int, steps: int) -> None:
    made_up = program(seed, steps)
    note(onnx.printer.to_text(made_up.model))
    try:
        made = transformation(made_up.model, request=patterns(made_up.inputs))
    except Unrepresentable:
        reject()
    hold_against(made)


# --- operator by operator --------------------------------------------------------------------------------------------

INPUTS = [
    request("user", 3),
    candidate("item", 2),
    request("seq", 4, 3),
    candidate("more", 1, 3),
    candidate("id", ids=5),
]
HEAD = "(float[N,3] user, float[N,2] item, float[N,4,3] seq, float[N,1,3] more, int64[N] id) => ({out} y)"
MIXED = "x = Concat<axis = 1>(user, item)"
KEYS = "k = Concat<axis = 1>(seq, more)"


def analysed(lines: str, weights: str = "", opset: int = 17, out: str = "float") -> onnxrank.Analysis:
    """The analysis of a few nodes on `user [N,3]`, `item [N,2]`, `seq [N,4,3]`, `more [N,1,3]` and `id [N]`.

    What it says is held against runs first.
    """
    text = "\n".join([HEAD.format(out=out), f"<{weights}>" if weights else "", "{", *lines.split("; "), "}"])
    model = textform.parse(text, opset)
    found = onnxrank.analyse(model, request=["user", "seq"])
    for seed in (1, 2):
        old, _ = feeds(INPUTS, 5, seed)
        levels_hold(found.study, run(exposed(found.study.model), old), Setting({"N": 5}, seed), 1e-6)
    return found


def levels_of(lines: str, weights: str = "", opset: int = 17, out: str = "float") -> list[object]:
    """Levels of `y`."""
    made: list[object] = analysed(lines, weights, opset, out).levels("y").tolist()
    return made


@pytest.mark.parametrize(
    ("lines", "weights", "expected"),
    [
        # entries stay in their places
        (f"{MIXED}; y = Relu(x)", "", [[R, R, R, X, X]]),
        (f"{MIXED}; y = Add(x, b)", "float[5] b", [[R, R, R, X, X]]),
        ("y = Mul(user, t)", "float[3] t", [[R, R, R]]),
        (f"{MIXED}; m = Concat<axis = 1>(item, user); y = Max(x, m)", "", [[X, X, R, X, X]]),
        (f"{MIXED}; y = BatchNormalization(x, b, b, b, var)", "float[5] b, float[5] var", [[R, R, R, X, X]]),
        (f"{MIXED}; y = Dropout(x)", "", [[R, R, R, X, X]]),
        (f"{MIXED}; c = Cast<to = 1>(x); y = Where(t, c, x)", "bool[5] t", [[R, R, R, X, X]]),
        # and move
        (f"{MIXED}; y = Transpose<perm = [1, 0]>(x)", "", [[R], [R], [R], [X], [X]]),
        (
            f"{MIXED}; y = Slice(x, from, to, axis)",
            "int64[1] from = {2}, int64[1] to = {9}, int64[1] axis = {1}",
            [[R, X, X]],
        ),
        (f"{MIXED}; y = Gather<axis = 1>(x, at)", "int64[3] at = {4, -5, 3}", [[X, R, X]]),
        (f"{MIXED}; a, y = Split<axis = 1>(x, at)", "int64[2] at = {2, 3}", [[R, X, X]]),
        (f"{MIXED}; y = Pad(x, at)", "int64[4] at = {0, 1, 0, 0}", [[C, R, R, R, X, X]]),
        (f"{MIXED}; y = Tile(x, at)", "int64[2] at = {1, 2}", [[R, R, R, X, X] * 2]),
        (f"{KEYS}; y = Reshape(k, at)", "int64[2] at = {-1, 15}", [[R] * 12 + [X] * 3]),
        (f"{KEYS}; y = Reshape(k, at)", "int64[2] at = {-1, 3}", [[R] * 3] * 4 + [[X] * 3]),
        # entries along an axis are taken in together
        (f"{KEYS}; y = ReduceSum<keepdims = 0>(k, at)", "int64[1] at = {2}", [[R, R, R, R, X]]),
        (f"{KEYS}; y = ReduceMax<axes = [1], keepdims = 1>(k)", "", [[[X, X, X]]]),
        (f"{KEYS}; y = Softmax<axis = 2>(k)", "", [[[R] * 3] * 4 + [[X] * 3]]),
        (f"{KEYS}; y = LayerNormalization<axis = 2>(k, g)", "float[3] g", [[[R] * 3] * 4 + [[X] * 3]]),
        (f"{KEYS}; y = CumSum(k, at)", "int64 at = {2}", [[[R] * 3] * 4 + [[X] * 3]]),
        (f"{KEYS}; a = ArgMax<axis = 2, keepdims = 0>(k); y = Cast<to = 1>(a)", "", [[R, R, R, R, X]]),
        (f"{KEYS}; y, a = TopK<axis = 2>(k, at)", "int64[1] at = {2}", [[[R] * 2] * 4 + [[X] * 2]]),
        # products
        (f"{MIXED}; y = MatMul(x, W)", "float[5,2] W", [[X, X]]),
        ("y = Gemm<transB = 1>(user, W, b)", "float[2,3] W, float[2] b", [[R, R]]),
        (f"{KEYS}; y = MatMul(k, W)", "float[3,2] W", [[[R] * 2] * 4 + [[X] * 2]]),
        (f"{KEYS}; t = Transpose<perm = [0, 2, 1]>(k); y = MatMul(k, t)", "", [[[R] * 4 + [X]] * 4 + [[X] * 5]]),
        (f'{KEYS}; y = Einsum<equation = "nld,nmd->nlm">(k, k)', "", [[[R] * 4 + [X]] * 4 + [[X] * 5]]),
        (f'{KEYS}; y = Einsum<equation = "nld,de->nel">(k, W)', "float[3,2] W", [[[R] * 4 + [X]] * 2]),
        (f'{KEYS}; y = Einsum<equation = "...ld,lde->...le">(k, W)', "float[5,3,2] W", [[[R] * 2] * 4 + [[X] * 2]]),
        (f'{KEYS}; y = Einsum<equation = "nld,de">(k, W)', "float[3,2] W", [[[R]] * 4 + [[X]]] * 2),
        (f"{KEYS}; y = com.microsoft.FusedMatMul<transB = 1>(k, k)", "", [[[R] * 4 + [X]] * 4 + [[X] * 5]]),
        (f"{KEYS}; y = com.microsoft.FusedMatMul<transA = 1>(k, k)", "", [[[X] * 3] * 3]),
        (f"{KEYS}; y = Conv(k, W)", "float[2,5,1] W", [[[X] * 3] * 2]),
        (f"{KEYS}; y = Conv<group = 5>(k, W)", "float[10,1,1] W", [[[R] * 3] * 8 + [[X] * 3] * 2]),
        ("t = Concat<axis = 2>(seq, seq); y = Conv(t, W)", "float[2,4,3] W", [[[R] * 4] * 2]),
        (f"{KEYS}; t = Transpose<perm = [0, 2, 1]>(k); y = Conv(t, W)", "float[2,3,1] W", [[[R] * 4 + [X]] * 2]),
        # look-ups
        ("y = Gather(T, id)", "float[5,2] T", [[X, X]]),
        ("o = OneHot(id, n, v); y = Add(o, user)", "int64 n = {3}, float[2] v", [[X, X, X]]),
        ("a = ArgMax<axis = 2, keepdims = 0>(seq); y = GatherElements<axis = 1>(user, a)", "", [[R] * 4]),
    ],
)
def test_levels(lines: str, weights: str, expected: list[object]) -> None:
    assert levels_of(lines, weights) == expected


def test_what_nobody_reads() -> None:
    found = analysed(f"{KEYS}; h = Relu(k); y = Gather<axis = 1>(h, last)", "int64 last = {-1}")
    assert found.levels("h").tolist() == [[[U] * 3] * 4 + [[X] * 3]]
    assert found.levels("k").tolist() == [[[U] * 3] * 4 + [[X] * 3]]


MASKED = (
    f"{KEYS}; t = Transpose<perm = [0, 2, 1]>(k); s = MatMul(k, t); m = Add(s, mask); w = Softmax<axis = 2>(m); "
    "n = IsNaN(w); v = Where(n, nothing, w); y = MatMul(v, k)"
)
CAUSAL = "float[5,5] mask = {%s}, float nothing = {0}"


@pytest.mark.parametrize(("far", "hidden"), [(-1e9, True), (-1e3, False)])
def test_a_mask_keeps_candidates_from_rows(far: float, hidden: bool) -> None:
    mask = ", ".join(str(v) for v in np.triu(np.full((5, 5), far), 1).reshape(-1))
    found = analysed(MASKED, CAUSAL % mask)
    low, high = found.interval("mask")
    assert low.min() == high.min() == far
    row = [[R] * 3] * 4 if hidden else [[X] * 3] * 4
    assert found.levels("y").tolist() == [[*row, [X] * 3]]
    assert found.levels("w")[0, :4, 4].tolist() == [C if hidden else X] * 4


def test_what_is_0_is_that_no_longer_behind_other_operators() -> None:
    """A weight of 0 that is normalised, or quantised by a zero point, takes part in products again."""
    mask = ", ".join(str(v) for v in np.triu(np.full((5, 5), -1e9), 1).reshape(-1))
    head = MASKED.partition("; n = ")[0]
    for step in ("BatchNormalization(w, one, one, one, var)", "Sigmoid(w)", "Add(w, one)"):
        found = analysed(f"{head}; v = {step}; y = MatMul(v, k)", CAUSAL % mask + ", float[5] one, float[5] var")
        assert found.levels("y").tolist() == [[[X] * 3] * 5], step
    found = analysed(f"{head}; v = Cast<to = 1>(w); y = MatMul(v, k)", CAUSAL % mask)
    assert found.levels("y").tolist() == [[[R] * 3] * 4 + [[X] * 3]]


def test_candidates_are_not_taken_in_together() -> None:
    """What goes over candidates is known as a whole only: made once, where no candidates are left."""
    found = analysed(
        "a = ReduceMean<axes = [0]>(item); c = Sub(item, a); b = Softmax<axis = 0>(user); "
        "y = Concat<axis = 1>(b, user, c)"
    )
    assert found.levels("a").tolist() == [[R, R]] and "ReduceMean works in a way" in found.opaque["a"]
    assert found.levels("b").tolist() == [[X, X, X]] and found.tensors["y"].present == {Level.REQUEST, Level.CANDIDATE}


def test_opaque() -> None:
    found = analysed(
        "r = RandomNormalLike(user); z = Sub(r, r); a = Add(z, user); b = NonZero(item); c = Cast<to = 1>(b); "
        "d = ReduceSum(c); y = Add(a, d)"
    )
    assert found.level("a") is Level.CANDIDATE
    assert found.opaque["r"] == "RandomNormalLike may give something else each time"
    assert found.opaque["b"] == "NonZero works in a way that cannot be followed here"
    assert found.level("d") is Level.REQUEST


# --- the registry ----------------------------------------------------------------------------------------------------


def test_traits_say_what_they_need() -> None:
    """What moves says where, what takes in axes says which, what counts as products says how many."""
    entries = {name: operators.REGISTRY[name] for name in operators.having(Trait.NONE)}
    for name, entry in entries.items():
        assert bool(entry.move) == (Trait.MOVEMENT in entry.traits), name
        if Trait.MATRIX in entry.traits:
            assert Trait.PRODUCT in entry.traits and entry.macs is not None, name
        if entry.traits & (Trait.REDUCTION | Trait.NORMALISATION) and Trait.IMAGES not in entry.traits:
            assert entry.axes is not None or entry.levels is not None, name
    assert {"Softmax", "LogSoftmax"} <= set(operators.having(Trait.NORMALISATION | Trait.ROWS))


def test_a_domain_counts() -> None:
    own, foreign = (onnx.helper.make_node("Softmax", ["x"], ["y"], domain=d) for d in ("ai.onnx", "com.acme"))
    assert Trait.NORMALISATION in operators.traits(own) and operators.traits(foreign) is Trait.NONE
