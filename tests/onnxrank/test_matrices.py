"""Inputs side by side: scores are the same bits, and everything understands the result."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import numpy as np
import onnx
import pytest
from helpers import Feed, feeds, patterns, rewritten, run, session
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from modelkit import graph
from onnx import ModelProto
from programs import program

import onnxrank
from onnxrank import batches, cli, lookups, matrices, ranker
from onnxrank import model as files
from onnxrank.batching.engine import Options as BatchOptions
from onnxrank.contract import stored_contract
from onnxrank.errors import ModelError, UsageError
from onnxrank.feeds import describe
from onnxrank.profiling.engine import profile
from onnxrank.roles import Roles, resolve
from onnxrank.verify import Options, verify

EVERY = (
    "(int64[N] u_flat, int64[N,1] u_one, int64[N,2] u_two, float[N,2,2] u_cube, float[K3] u_free, int64[N,L] u_hist,"
    " int32[N,1] u_short, int64[N,1] c_one, int64[N] c_flat, float[N,3] c_dense, bool[N,1] c_flag)"
    " => (float[N,2] y) {"
    " a = Gather(T, u_flat) b = Gather(T, u_one) fb = Flatten(b) c = Gather(S, u_two) fc = Flatten(c)"
    " d = Flatten(u_cube) h = Gather(S, u_hist) m = ReduceSum<keepdims=0>(h, axis) s = Gather(S, u_short)"
    " fs = Flatten(s)"
    " e = Gather(T, c_one) fe = Flatten(e) g = Gather(S, c_flat) q = Cast<to=1>(c_flag) f = Mul(c_dense, u_free)"
    " x = Concat<axis=1>(a, fb, fc, d, m, fs, fe, g, f, q) y = MatMul(x, W) }"
).replace("K3", "3")


def every() -> ModelProto:
    """Inputs of every shape and type."""
    rng = np.random.default_rng(0)
    held = {k: rng.integers(-3, 4, s).astype(np.float32) for k, s in (("T", (5, 2)), ("S", (7, 3)), ("W", (29, 2)))}
    return graph(EVERY, axis=np.array([1]), **held)


def fed(n: int, seed: int = 0) -> tuple[Feed, Feed]:
    """Inputs of the original, and with one row of what is the request's."""
    rng = np.random.default_rng(seed)
    one = {
        "u_flat": rng.integers(-5, 5, 1), "u_one": rng.integers(0, 5, (1, 1)), "u_two": rng.integers(0, 7, (1, 2)),
        "u_cube": rng.integers(-3, 4, (1, 2, 2)).astype(np.float32), "u_hist": rng.integers(0, 7, (1, 4)),
        "u_short": rng.integers(0, 7, (1, 1)).astype(np.int32),
    }  # fmt: skip
    free = {"u_free": rng.integers(-3, 4, 3).astype(np.float32)}
    many = {
        "c_one": rng.integers(0, 5, (n, 1)), "c_flat": rng.integers(0, 7, n),
        "c_dense": rng.integers(-3, 4, (n, 3)).astype(np.float32), "c_flag": rng.random((n, 1)) < 0.5,
    }  # fmt: skip
    return {k: np.repeat(v, n, 0) for k, v in one.items()} | free | many, one | free | many


def packed(interface: str = "request", **how: object) -> onnxrank.Result:
    return onnxrank.pack_inputs(every(), request=["u_*"], interface=interface, check=False, **how)


@pytest.mark.parametrize("interface", ["request", "same"])
def test_every_input(interface: str) -> None:
    """What fits is packed, by level and type; what does not stays, and the report says why."""
    result = packed(interface)
    told = matrices.told(result.model)
    assert {m: sorted(c["name"] for c in t["columns"]) for m, t in told.items()} == {
        "request.ids": ["u_flat", "u_one", "u_two"],
        "request.values": ["u_cube", "u_free"] if interface == "request" else ["u_cube"],
        "candidate.ids": ["c_flat", "c_one"],
        "candidate.values": ["c_dense"],
    }
    text = " ".join(result.report.notes)
    for name, why in (
        ("u_hist", "its length varies"),
        ("u_short", "its type is int32"),
        ("c_flag", "its type is bool"),
    ):
        assert f"{name} stays as it is: {why}" in text
    before, after = session(every()), session(result.model)
    for n in (1, 2, 9):
        full, once = fed(n, n)
        given_ = ranker.matrices(told, once if interface == "request" else full)
        assert np.array_equal(run(before, full)["y"], run(after, given_)["y"])
        one_by_one = session(matrices.unpacked(files.load(result.model)).proto)
        assert np.array_equal(run(before, full)["y"], run(one_by_one, once if interface == "request" else full)["y"])


def test_no_candidates() -> None:
    result = packed()
    _, once = fed(0)
    assert run(session(result.model), ranker.matrices(matrices.told(result.model), once))["y"].shape == (0, 2)


def test_contract() -> None:
    """Columns lie as the model brings them side by side, and begin where those before them end."""
    result = packed()
    stored = stored_contract(result.model)
    assert stored is not None and stored["interface"] == "request"
    for name, m in stored["packed"].items():
        at = 0
        for c in m["columns"]:
            assert c["at"] == at and c["width"] == int(np.prod([d or 1 for d in c["shape"] if isinstance(d, int)]))
            at += c["width"]
        info = next(i for i in result.model.graph.input if i.name == name)
        assert info.type.tensor_type.shape.dim[1].dim_value == at


def test_wrong_inputs() -> None:
    told = matrices.told(packed().model)
    _, once = fed(2)
    for name, wrong in (("u_one", np.zeros((2, 1), np.int64)), ("u_one", np.zeros((1, 1), np.int32)),
                        ("u_two", np.zeros(2, np.int64)), ("c_dense", np.zeros((2, 3)))):  # fmt: skip
        with pytest.raises(ValueError, match=f"the input '{name}' is"):
            ranker.matrices(told, {**once, name: wrong})
    with pytest.raises(KeyError, match="u_two"):
        ranker.matrices(told, {k: v for k, v in once.items() if k != "u_two"})


@pytest.mark.slow
def test_it_is_verified() -> None:
    """By the contract, before anything is written and afterwards; a model with columns that changed places fails."""
    result = onnxrank.pack_inputs(every(), request=["u_*"], check="quick")
    assert result.changed and result.report.checks
    assert verify(every(), result.model, Options(level="quick")).passed
    assert verify(result.model, result.model, Options(level="quick")).passed
    wrong = ModelProto()
    wrong.CopyFrom(result.model)
    for p in wrong.metadata_props:
        p.value = p.value.replace('"u_one"', '"?"').replace('"u_flat"', '"u_one"').replace('"?"', '"u_flat"')
    with pytest.raises(Exception):  # noqa: B017
        assert verify(every(), wrong, Options(level="quick")).passed


@pytest.mark.slow
def test_what_is_not_for_it() -> None:
    result = packed()
    with pytest.raises(ModelError, match=r"side by side.*Give the original"):
        onnxrank.optimize(result.model, check=False)
    with pytest.raises(UsageError, match="cannot be packed with the interface 'batch'"):
        onnxrank.pack_inputs(every(), request=["u_*"], interface="batch")
    clash = graph("(int64[N,1] user, float[N,2] item) => (float[N,2] y) { a = Cast<to=1>(user) y = Mul(a, item) }")
    clash.graph.node[0].output[0] = clash.graph.node[1].input[0] = "request.ids"
    with pytest.raises(ModelError, match=r"called 'request.ids'"):
        onnxrank.pack_inputs(clash, request=["user"], check=False)
    broken = ModelProto()
    broken.CopyFrom(result.model)
    del broken.graph.input[0]
    with pytest.raises(ModelError, match="does not say how the inputs are packed"):
        matrices.told(broken)


def test_nothing_to_pack() -> None:
    model = graph("(int32[N,1] u, int32[N,1] c) => (float[N,1] y) { s = Add(u, c) y = Cast<to=1>(s) }")
    result = onnxrank.pack_inputs(model, request=["u"], check=False)
    assert not matrices.told(result.model) and "no input can be packed" in result.report.notes


def test_rows_that_are_no_matrix_stay() -> None:
    model = graph(
        "(float[2,N] u, float[2,N] c, float[N,2] d) => (float[N,2] y) { s = Add(u, c) t = Transpose(s) y = Add(t, d) }"
    )
    spec = {
        "inputs": {"u": {"level": "request", "candidate_axis": 1}, "c": {"level": "candidate", "candidate_axis": 1}}
    }
    result = onnxrank.pack_inputs(model, spec=spec, check=False)
    assert "c stays as it is: its rows are not those of a matrix" in result.report.notes
    assert set(matrices.told(result.model)) == {"request.values", "candidate.values"}


@pytest.mark.parametrize("opset", [11, 13])
def test_side_by_side_it_stays(opset: int) -> None:
    """What the model concatenates is read as it lies, with joined lookups too; ids outside of a table fail."""
    count = 6
    for shape, flat in (("[N,1]", "Flatten(g{k})"), ("[N]", "Flatten(g{k})")):
        inputs = ", ".join(f"int64{shape} u_{k}" for k in range(count))
        nodes = " ".join(f"g{k} = Gather(T{k}, u_{k}) e{k} = {flat.format(k=k)}" for k in range(count))
        joined = ", ".join(f"e{k}" for k in reversed(range(count)))
        body = f"{nodes} x = Concat<axis=1>({joined}, item) y = MatMul(x, W)"
        rng = np.random.default_rng(0)
        tables = {f"T{k}": rng.integers(-3, 4, (5 + k, 2)).astype(np.float32) for k in range(count)}
        weight = rng.integers(-2, 3, (2 * count + 3, 2)).astype(np.float32)
        model = graph(f"({inputs}, float[N,3] item) => (float[N,2] y) {{ {body} }}", opset=opset, W=weight, **tables)
        with mock.patch.object(lookups, "pays", lambda before, after: True):
            result = rewritten(model, request=["u_*"])
        made = matrices.pack(result.model, Roles.from_dict(result.report.roles))
        held = {t.name for t in made.model.graph.initializer}
        assert sum(n.op_type == "Gather" and n.input[0] in held for n in made.model.graph.node) == 1
        readers = {n.op_type for n in made.model.graph.node if "request.ids" in n.input}
        assert readers <= {"Less", "Add", "Reshape", "Squeeze"}
        assert [c["name"] for c in made.told["request.ids"]["columns"]] == [f"u_{k}" for k in reversed(range(count))]
        once = {f"u_{k}": np.full((1,) + (1,) * (shape == "[N,1]"), 4 + k if k else -1) for k in range(count)}
        item = rng.integers(-3, 4, (3, 3)).astype(np.float32)
        want = run(session(model), {k: np.repeat(v, 3, 0) for k, v in once.items()} | {"item": item})["y"]
        after = session(made.model)
        assert np.array_equal(run(after, ranker.matrices(made.told, {**once, "item": item}))["y"], want)
        for k in range(count):
            for bad in (5 + k, -6 - k):
                with pytest.raises(Exception, match="out of data bounds"):
                    run(
                        after,
                        ranker.matrices(made.told, {**once, "item": item, f"u_{k}": np.full_like(once[f"u_{k}"], bad)}),
                    )


@settings(max_examples=12, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 1 << 32), steps=st.integers(0, 8), fields=st.integers(0, 5))
def test_same_bits(seed: int, steps: int, fields: int) -> None:
    """Random programs, joined lookups among them, with their inputs packed."""
    same_bits("request", seed, steps, fields)


@pytest.mark.slow
@pytest.mark.parametrize("interface", ["request", "same"])
@settings(max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 1 << 32), steps=st.integers(0, 16), fields=st.integers(0, 6))
def test_same_bits_of_more(interface: str, seed: int, steps: int, fields: int) -> None:
    same_bits(interface, seed, steps, fields)


def same_bits(interface: str, seed: int, steps: int, fields: int) -> None:
    made_up = program(seed, steps, fields)
    note(onnx.printer.to_text(made_up.model))
    result = rewritten(made_up.model, joined=True, request=patterns(made_up.inputs), interface=interface)
    if not result.changed:
        return
    made = matrices.pack(result.model, Roles.from_dict(result.report.roles))
    note(onnx.printer.to_text(made.model))
    before, after = session(result.model), session(made.model)
    for n in (1, 2, 5):
        _, new = feeds(made_up.inputs, n, interface=interface)
        assert {k: v.tobytes() for k, v in run(before, new).items()} == {
            k: v.tobytes() for k, v in run(after, ranker.matrices(made.told, new)).items()
        }


@pytest.mark.slow
def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(every(), tmp_path / "m.onnx")

    def call(*words: str) -> tuple[int, str]:
        code = cli.main(list(words))
        return code, capsys.readouterr().out

    path, out = str(tmp_path / "m.onnx"), str(tmp_path / "p.onnx")
    common = (path, out, "--request", "u_*", "--pack-inputs", "--tune", "0", "--check", "quick")
    assert call("optimize", *common)[0] == 0
    many = str(tmp_path / "b.onnx")
    assert call("optimize", path, many, *common[2:], "--interface", "batch")[0] == 0
    assert "request.ids" in {i.name for i in onnx.load(many).graph.input}
    assert call("verify", path, out, "--level", "quick")[0] == 0
    code, text = call("inspect", out)
    assert code == 0 and "u_flat" in text and "request.ids" not in text
    assert call("profile", path, out, "--candidates", "2", "--seconds", "0.05", "--no-memory")[0] == 0
    assert call("optimize", out, str(tmp_path / "q.onnx"))[0] == 3


# --- several requests per call ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["lengths", "index", "triton", "padded"])
def test_several_requests(form: str) -> None:
    """A matrix has a row per request, or per candidate; what it cannot take stays an input of its own."""
    how = {"interface": "padded"} if form == "padded" else {"rows": form}
    made = onnxrank.batch(every(), request=["u_*"], check=False, options=BatchOptions(pack=True, **how)).model
    onnx.checker.check_model(made, full_check=True)
    names = {i.name for i in made.graph.input}
    assert {"request.ids", "request.values", "candidate.ids", "candidate.values", "u_hist"} <= names
    assert not names & {"u_flat", "u_one", "c_one", "c_dense"}
    told = batches.convention(made)
    assert told is not None
    for counts in ([1], [4], [2, 1, 3], [0, 5, 0, 40]):
        sizes = [3] * len(counts) if form == "padded" else counts
        both = [fed(n, k) for k, n in enumerate(sizes)]
        feed = batches.joined(told, [once for _, once in both])
        if form in ("lengths", "index"):
            assert [len(feed[m]) for m in ("request.ids", "candidate.ids")] == [len(sizes), sum(sizes)]
        got = batches.parted(told, run(made, feed), sizes)
        assert [batches.candidates(told, once) for _, once in both] == sizes
        for (whole, _), n, found in zip(both, sizes, got, strict=True):
            if n:
                np.testing.assert_array_equal(found["y"], run(every(), whole)["y"])


@pytest.mark.slow
def test_several_requests_are_verified(tmp_path: Path) -> None:
    made = onnxrank.batch(every(), request=["u_*"], check="quick", options=BatchOptions(pack=True))
    assert made.report.checks and any("inputs are packed" in n for n in made.report.notes)
    checks = Options(level="quick", requests=(1, 3))
    found = verify(every(), made.model, checks)
    assert found.passed and any(c.inputs == "3 requests" for c in found.cases)
    wrong = ModelProto()
    wrong.CopyFrom(made.model)
    for p in wrong.metadata_props:
        p.value = p.value.replace('"u_one"', '"?"').replace('"u_flat"', '"u_one"').replace('"?"', '"u_flat"')
    with pytest.raises(Exception):  # noqa: B017
        assert verify(every(), wrong, checks).passed
    onnx.save(made.model, tmp_path / "b.onnx")
    assert profile(tmp_path / "b.onnx", candidates=[4], requests=[1, 2], seconds=0.01)


def test_ranges_of_columns() -> None:
    """What values an input takes holds of its columns."""
    model = graph(
        "(int64[N,1] user, int64[N,2] item, float[N,2,2] cube) => (float[N,4] y) {"
        " a = Cast<to=1>(user) b = Cast<to=1>(item) c = Flatten(cube) d = Concat<axis=1>(b, b) e = Add(a, d)"
        " y = Add(c, e) }"
    )
    spec = {
        "inputs": {
            "user": {"level": "request", "range": [3, 9]},
            "item": {"ranges": {"1": [5, 6]}},
        }
    }
    roles = resolve(describe(model), spec=spec)
    packing = matrices.pack(model, roles)
    found = matrices.roles_of(packing, roles).inputs
    assert {m: (r.level, r.candidate_axis) for m, r in found.items()} == {
        "request.ids": ("request", None),
        "candidate.ids": ("candidate", 0),
        "candidate.values": ("candidate", 0),
    }
    assert [(r.low, r.high, r.positions) for r in found["request.ids"].ranges] == [(3, 9, (0,))]
    assert [(r.low, r.high, r.positions) for r in found["candidate.ids"].ranges] == [(5, 6, (1,))]
