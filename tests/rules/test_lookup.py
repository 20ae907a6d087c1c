"""`lookup`: lookups are joined, ids outside their own tables fail as they did, and scores are equal bit by bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import pytest
from helpers import assert_same_scores, patterns, rewritten
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from modelkit import graph, session
from onnx import ModelProto, TensorProto, helper, numpy_helper
from programs import program

import onnxrank
from onnxrank import cost, feeds, lookups, matrices, packing, ranker
from onnxrank import model as files
from onnxrank.joint import bring, limits
from onnxrank.passes import choosing
from onnxrank.plans import LOOKUP
from onnxrank.roles import resolve
from onnxrank.study import Study
from onnxrank.verify import Options, verify
from onnxrank.verify.tables import changed

ROWS = (5, 7, 6, 9)
EXAMPLES = settings(
    max_examples=12, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@pytest.fixture
def joined() -> Iterator[None]:
    """Joins whatever can be, though few lookups do not pay, and keeps it."""
    rate = cost.Target(launch=0.0, byte=1e-16, mac=1 / 25e9)
    with (
        mock.patch.object(lookups, "pays", lambda before, after: True),
        mock.patch.object(cost, "CPU", rate),
        mock.patch.object(choosing, "LEAST_GAIN", 0.0),
    ):
        yield


def model(
    rank: int = 2,
    ids: type = np.int64,
    level: str = "user",
    opset: int = 17,
    body: str = "x = Concat<axis=1>(e0, e1, e2, e3, item)",
    **weights: Any,
) -> ModelProto:
    """Four ids with a table each, brought side by side, and a layer."""
    inputs = ", ".join(f"{np.dtype(ids).name}{'[N]' if rank == 1 else '[N,1]'} {level}_{k}" for k in range(len(ROWS)))
    nodes = " ".join(f"g{k} = Gather(T{k}, {level}_{k}) e{k} = Flatten(g{k})" for k in range(len(ROWS)))
    text = f"({inputs}, float[N,3] item) => (float[N,2] y) {{ {nodes} {body} y = MatMul(x, W) }}"
    rng = np.random.default_rng(3)
    held = {f"T{k}": rng.integers(-3, 4, (n, 4)).astype(np.float32) for k, n in enumerate(ROWS)}
    held["W"] = rng.integers(-2, 3, (19, 2)).astype(np.float32)
    return graph(text, opset=opset, **{**held, **weights})


def feed(made: ModelProto, n: int, level: str = "user", seed: int = 0, least: int = 0) -> dict[str, np.ndarray]:
    """Inputs of the original; ids from a share of their tables' rows below 0 on."""
    rng = np.random.default_rng(seed)
    shape = (n if level == "user" else 1, 3)  # candidates' ids come with what is the request's
    item = rng.integers(-3, 4, shape).astype(np.float32)
    out: dict[str, np.ndarray] = {"item": np.repeat(item, n // len(item), 0)}
    for k, rows in enumerate(ROWS):
        info = next(i for i in made.graph.input if i.name == f"{level}_{k}")
        kind = helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
        data = rng.integers(least * rows, rows, (n,) + (1,) * (len(info.type.tensor_type.shape.dim) - 1))
        out[f"{level}_{k}"] = (np.broadcast_to(data[:1], data.shape) if level == "user" else data).astype(kind)
    return out


def once(result: onnxrank.Result, whole: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same inputs with one row where the result takes one."""
    takes = {i.name: i.type.tensor_type.shape.dim for i in result.model.graph.input}
    return {k: v[:1] if takes[k] and takes[k][0].dim_value == 1 else v for k, v in whole.items() if k in takes}


def same(made: ModelProto, result: onnxrank.Result, level: str = "user") -> None:
    before, after = session(made), session(result.model)
    for n in (1, 2, 7):
        for least in (0, -1):
            whole = feed(made, n, level, n, least)
            assert np.array_equal(before.run(None, whole)[0], after.run(None, once(result, whole))[0])


def tables(made: ModelProto) -> int:
    """Lookups in constants that are left."""
    held = {t.name for t in made.graph.initializer}
    return sum(n.op_type == "Gather" and n.input[0] in held for n in made.graph.node)


@pytest.mark.parametrize(
    ("rank", "ids", "opset"),
    [(1, np.int32, 17), (2, np.int64, 17), (2, np.int32, 11), (1, np.int64, 11), (1, np.int64, 13)],
)
def test_the_request_looks_up_once(joined: None, rank: int, ids: type, opset: int) -> None:
    """Negative ids count from the end of their own table."""
    made = model(rank, ids, opset=opset)
    result = onnxrank.optimize(made, request=["user*"])
    assert tables(result.model) == 1
    assert [(s.op, s.place.step) for s in result.plan.sites if s.place.rule == LOOKUP] == [("Gather", 3)] * 4
    assert {tuple(a.name for a in s.alternatives) for s in result.plan.sites if s.place.rule == LOOKUP} == {
        ("take", "leave")
    }
    (use,) = [r for r in result.report.rules if r.name == LOOKUP]
    assert use.sites == 4 and "4 lookups are one in a joined table" in result.report.notes
    same(made, result)


@pytest.mark.parametrize("interface", ["request", "same"])
def test_no_candidates(joined: None, interface: str) -> None:
    made = model()
    result = onnxrank.optimize(made, request=["user*"], interface=interface)
    whole = feed(made, 1)
    none = {k: v[:0] if interface == "same" or k == "item" else v for k, v in whole.items()}
    assert session(result.model).run(None, none)[0].shape == (0, 2)


@pytest.mark.parametrize("level", ["user", "candidate"])
@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("ids", [np.int32, np.int64])
def test_an_id_outside_its_own_table_fails(joined: None, level: str, rank: int, ids: type) -> None:
    """However far, below and above, in every table; the last id that is inside does not."""
    made = model(rank, ids, level=level)
    result = onnxrank.optimize(made, request=["user*"] if level == "user" else ["item"], check=False)
    assert tables(result.model) == 1
    before, after = session(made), session(result.model)
    limit = np.iinfo(ids)
    for k, rows in enumerate(ROWS):
        far = (sum(ROWS), -sum(ROWS) - 1, limit.max, limit.min)
        for value in (rows, rows + 1, -rows - 1, -rows - 2, *far, -rows, rows - 1):
            whole = feed(made, 3, level)
            whole[f"{level}_{k}"] = whole[f"{level}_{k}"].copy()
            whole[f"{level}_{k}"][slice(None) if level == "user" else 2] = value
            if -rows <= value < rows:
                assert np.array_equal(before.run(None, whole)[0], after.run(None, once(result, whole))[0])
                continue
            for run, given_ in ((before, whole), (after, once(result, whole))):
                with pytest.raises(Exception, match="out of data bounds"):
                    run.run(None, given_)


@pytest.mark.parametrize("level", ["user", "candidate"])
def test_an_id_in_a_matrix_fails_outside_its_own_table(joined: None, level: str) -> None:
    """Side by side with the others it reads no neighbour's row either."""
    made = model(level=level)
    request = ["user*"] if level == "user" else ["item"]
    result = onnxrank.pack_inputs(made, request=request, check=False)
    assert tables(result.model) == 1
    before, after, told = session(made), session(result.model), matrices.told(result.model)
    for k, rows in enumerate(ROWS):
        for value in (rows, -rows - 1, sum(ROWS), -sum(ROWS) - 1, rows - 1, -rows):
            whole = feed(made, 3, level)
            whole[f"{level}_{k}"] = np.full((3, 1), value)
            once = {
                n: v[:1] if n.startswith("user") or (n == "item" and level != "user") else v for n, v in whole.items()
            }
            if -rows <= value < rows:
                assert np.array_equal(before.run(None, whole)[0], after.run(None, ranker.matrices(told, once))[0])
            else:
                with pytest.raises(Exception, match="out of data bounds"):
                    after.run(None, ranker.matrices(told, once))


@pytest.mark.parametrize("kind", [np.float16, np.int8, np.float64])
def test_types_of_tables(joined: None, kind: type) -> None:
    made = model()
    for t in made.graph.initializer:
        if t.name.startswith("T"):
            t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(t).astype(kind), t.name))
    del made.graph.node[-2:]
    made.graph.node.append(helper.make_node("Concat", [f"e{k}" for k in range(4)], ["e"], axis=1))
    made.graph.node.append(helper.make_node("Cast", ["e"], ["c"], to=TensorProto.FLOAT))
    made.graph.node.append(helper.make_node("Concat", ["c", "item"], ["x"], axis=1))
    made.graph.node.append(helper.make_node("MatMul", ["x", "W"], ["y"]))
    result = onnxrank.optimize(made, request=["user*"])
    assert tables(result.model) == 1
    same(made, result)


def test_columns_of_one_input(joined: None) -> None:
    """Ids are followed through Slices and Gathers, so that none is left of these."""
    made = graph(
        "(int64[N,4] user, float[N,3] item) => (float[N,2] y) { a, b = Split<axis=1>(user, halves)"
        " i = Gather<axis=1>(b, one) u = Gather(T, a) v = Gather(S, i) p = Flatten(u) q = Flatten(v)"
        " x = Concat<axis=1>(q, p, item) y = MatMul(x, W) }",
        W=np.ones((11, 2), np.float32),
        halves=np.array([3, 1]), one=np.array([0]),
        T=np.arange(10, dtype=np.float32).reshape(5, 2), S=np.arange(14, dtype=np.float32).reshape(7, 2),
    )  # fmt: skip
    result = onnxrank.optimize(made, request=["user"])
    assert tables(result.model) == 1 and "Split" not in {n.op_type for n in result.model.graph.node}
    for n in (1, 3):
        ids, item = np.tile([[4, 0, -1, 6]], (n, 1)), np.ones((n, 3), np.float32)
        want = session(made).run(None, {"user": ids, "item": item})[0]
        assert np.array_equal(session(result.model).run(None, {"user": ids[:1], "item": item})[0], want)


@pytest.mark.parametrize(("wide", "brought"), [(ROWS, 1), ((5, 7, 6, 10), 2)])
def test_ids_of_two_tables_each_are_brought_once(joined: None, wide: tuple[int, ...], brought: int) -> None:
    """Where both have as many rows: deep and wide parts look up the same ids."""
    rng = np.random.default_rng(1)
    names = [f"V{k}" for k in range(len(ROWS))]
    second = " ".join(f"h{k} = Gather({v}, user_{k}) f{k} = Flatten(h{k})" for k, v in enumerate(names))
    body = f"{second} x = Concat<axis=1>(e0, e1, e2, e3, f0, f1, f2, f3, item)"
    more = {v: rng.integers(-3, 4, (rows, 3)).astype(np.float32) for v, rows in zip(names, wide, strict=True)}
    made = model(body=body, W=np.ones((31, 2), np.float32), **more)
    result = onnxrank.optimize(made, request=["user*"])
    found = [n.op_type for n in result.model.graph.node]
    assert found.count("Gather") == 2 and found.count("Where") == 3 * brought
    same(made, result)


def refused(made: ModelProto | Path, **how: Any) -> tuple[int, list[str]]:
    result = onnxrank.optimize(made, request=["user*"], **how)
    return tables(result.model), [r.reason for r in result.report.refusals if r.rule == LOOKUP]


def test_a_table_that_is_read_elsewhere_stays(joined: None) -> None:
    body = "w = MatMul(item, V) v = MatMul(w, T1) x = Concat<axis=1>(e0, e1, e2, e3, item, v)"
    weights = {"V": np.ones((3, 7), np.float32), "W": np.ones((23, 2), np.float32)}
    left, reasons = refused(model(body=body, **weights))
    assert left == 2 and reasons == ["T1 is read elsewhere, too, so its bytes would be stored twice"]


def test_a_table_of_both_levels_stays(joined: None) -> None:
    body = "c = Gather(T0, item_id) d = Flatten(c) x = Concat<axis=1>(e0, e1, e2, e3, d, item)"
    made = model(body=body, W=np.ones((23, 2), np.float32))
    made.graph.input.append(helper.make_tensor_value_info("item_id", TensorProto.INT64, ["N", 1]))
    left, reasons = refused(made)
    assert left == 3 and reasons == ["T0 is read elsewhere, too, so its bytes would be stored twice"]


def test_a_table_that_is_read_twice_is_joined_once(joined: None) -> None:
    body = "h = Gather(T0, user_0) e4 = Flatten(h) x = Concat<axis=1>(e4, e0, e1, e2, e3, item)"
    made = model(body=body, W=np.ones((23, 2), np.float32))
    result = onnxrank.optimize(made, request=["user*"])
    assert tables(result.model) == 1
    assert max(t.dims[0] for t in result.model.graph.initializer if t.dims) == sum(ROWS)
    same(made, result)


def test_external_and_large_tables_stay(joined: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx.save(model(), tmp_path / "m.onnx", save_as_external_data=True, location="m.bin", size_threshold=0)
    left, reasons = refused(tmp_path / "m.onnx")
    assert left == 4 and reasons[0] == "T0 is external data, which stays where it is"
    monkeypatch.setattr(lookups, "MOST_JOINED", 7 * 4 * 4)
    left, reasons = refused(model())
    assert left == 2 and len(reasons) == 1 and reasons[0].startswith("T3 has more than")
    assert lookups.MOST_JOINED != packing.MOST_JOINED


@pytest.mark.parametrize(
    ("body", "left"),
    [
        ("s = Add(e0, e1) t = Add(e2, e3) x = Concat<axis=1>(s, t, s, t, item)", 4),
        ("s = Relu(e0) x = Concat<axis=1>(s, e1, e2, e3, item)", 2),
    ],
)
def test_lookups_by_themselves_stay(joined: None, body: str, left: int) -> None:
    made = model(body=body)
    result = onnxrank.optimize(made, request=["user*"])
    assert tables(result.model) == left
    same(made, result)


def test_few_do_not_pay() -> None:
    """Nor do those of hundreds of candidates, where what they give is narrow and copied anyway."""
    assert tables(onnxrank.optimize(model(), request=["user*"]).model) == 4
    many = many_lookups(60)
    assert tables(onnxrank.optimize(many, request=["user*"], check=False).model) == 1
    for n, left in ((1, 1), (512, 60)):
        assert tables(onnxrank.optimize(many, request=["item"], candidates=n, check=False).model) == left


def columns_of_one(count: int) -> ModelProto:
    """So many ids that are columns of one input, and a layer."""
    ids = " ".join(
        f"i{k} = Slice(user, at{k}, at{k + 1}, one) g{k} = Gather(T{k}, i{k}) e{k} = Flatten(g{k})"
        for k in range(count)
    )
    rows = ", ".join(f"e{k}" for k in range(count))
    text = (
        f"(int64[N,{count}] user, float[N,3] item) => (float[N,256] y) "
        f"{{ {ids} x = Concat<axis=1>({rows}, item) r = Relu(x) y = MatMul(r, W) }}"
    )
    rng = np.random.default_rng(0)
    held = {f"T{k}": rng.integers(-3, 4, (5 + k, 4)).astype(np.float32) for k in range(count)}
    held |= {f"at{k}": np.array([k]) for k in range(count + 1)}
    weight = rng.integers(-2, 3, (4 * count + 3, 256)).astype(np.float32)
    return graph(text, W=weight, one=np.array([1]), **held)


@pytest.mark.parametrize(("count", "left"), [(6, 6), (10, 1)])
def test_a_few_columns_of_one_input_pay(count: int, left: int) -> None:
    """These are taken in one step, and not cut out one by one."""
    result = onnxrank.optimize(columns_of_one(count), request=["user"], check=False)
    assert result.changed and tables(result.model) == left


@pytest.mark.parametrize(("candidates", "left"), [(64, 1), ((1, 4096), 40)])
def test_what_pays_at_the_usual_number_may_cost_too_much_at_another(
    candidates: int | tuple[int, int], left: int
) -> None:
    result = onnxrank.optimize(columns_of_one(40), request=["item"], candidates=candidates, check=False)
    assert tables(result.model) == left


@pytest.mark.parametrize(("after", "joined"), [("", 1), ("r = Reshape(x, shape)", 1), ("r = Relu(x)", 60)])
def test_what_only_a_layer_reads_is_not_copied(after: str, joined: int) -> None:
    """So lookups of hundreds of candidates are joined, too: each would be copied to lie beside the others."""
    many = many_lookups(60, 16, after)
    result = onnxrank.optimize(many, request=["item"], candidates=512)
    assert tables(result.model) == joined
    if joined == 1:  # nor is the whole
        wide = {o for n in result.model.graph.node if n.op_type == "Gather" for o in n.output}
        behind = {o for n in result.model.graph.node if n.op_type == "Reshape" and wide & {*n.input} for o in n.output}
        readers = [n.op_type for n in result.model.graph.node if behind & {*n.input}]
        assert readers and set(readers) <= {"MatMul", "Gemm"}


def many_lookups(count: int, width: int = 4, after: str = "") -> ModelProto:
    """So many ids of a row each, and a layer; between both a step, from `x` to `r`, if any."""
    inputs = ", ".join(f"int64[N,1] user_{k}" for k in range(count))
    nodes = " ".join(f"g{k} = Gather(T{k}, user_{k}) e{k} = Flatten(g{k})" for k in range(count))
    joined = ", ".join(f"e{k}" for k in range(count))
    body = f"{nodes} x = Concat<axis=1>({joined}, item) {after} y = MatMul({'r' if after else 'x'}, W)"
    text = f"({inputs}, float[N,3] item) => (float[N,2] y) {{ {body} }}"
    rng = np.random.default_rng(0)
    held = {f"T{k}": rng.integers(-3, 4, (20 + k, width)).astype(np.float32) for k in range(count)}
    size = width * count + 3
    return graph(text, W=rng.integers(-2, 3, (size, 2)).astype(np.float32), shape=np.array([-1, size]), **held)


def test_ranges_of_ids_are_found_behind_it(joined: None) -> None:
    """Per id, as in the original: `inspect`, `verify` and `profile` draw them."""
    result = onnxrank.optimize(model(), request=["user*"])
    loaded = files.load(result.model)
    study = Study(loaded.proto, resolve(feeds.describe(loaded.proto), request=["user*"]), loaded)
    assert study.maker.ranges is not None
    assert [float(study.maker.ranges[f"user_{k}"][1].reshape(-1)[0]) for k in range(4)] == list(ROWS)


@given(
    rows=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    extra=st.integers(-9, 9),
    wide=st.booleans(),
)
@settings(EXAMPLES, max_examples=60)
def test_places(rows: list[int], extra: int, wide: bool) -> None:
    """Every id around every table: its own row, or outside of all."""
    kind = np.int64 if wide else np.int32
    nodes: list[onnx.NodeProto] = []
    held: list[TensorProto] = []

    def add(op: str, inputs: Any, hint: str) -> str:
        nodes.append(helper.make_node(op, list(inputs), [hint]))
        return hint

    def numbers(data: Any, hint: str) -> str:
        held.append(numpy_helper.from_array(np.array(data, kind), hint))
        return hint

    begin = np.concatenate([[0], np.cumsum(rows)[:-1]])
    name = bring(add, numbers, "ids", np.array(rows), begin, sum(rows))
    shape = ["N", len(rows)]
    element = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    info = [helper.make_tensor_value_info(n, element, shape) for n in ("ids", name)]
    made = helper.make_model(
        helper.make_graph(nodes, "g", info[:1], info[1:], held),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    limit = np.iinfo(kind)
    ids = np.array([[v] * len(rows) for v in [*range(-9, 9), extra + sum(rows), limit.max, limit.min]], kind)
    (got,) = session(made).run(None, {"ids": ids})
    for column, (n, first) in enumerate(zip(rows, begin, strict=True)):
        want = [first + v % n if -n <= v < n else sum(rows) for v in ids[:, column].tolist()]
        assert got[:, column].tolist() == want
    maker = {o: n for n in nodes for o in n.output}
    known = {t.name: numpy_helper.to_array(t) for t in held}
    found = limits(name, maker, known.get)
    assert found is not None and found[0] == "ids" and found[1].tolist() == rows and found[2].tolist() == begin.tolist()
    assert limits("lookup/inside", maker, known.get) is None


def same_bits(interface: str, seed: int, steps: int) -> None:
    made_up = program(seed, steps, fields=5)
    note(onnx.printer.to_text(made_up.model))
    result = rewritten(made_up.model, joined=True, request=patterns(made_up.inputs), interface=interface)
    assert_same_scores(made_up.model, result, made_up.inputs, interface, (1, 2, 5))


@EXAMPLES
@given(seed=st.integers(0, 1 << 32), steps=st.integers(0, 8))
def test_same_bits(seed: int, steps: int) -> None:
    """Random programs behind a few lookups."""
    same_bits("request", seed, steps)


@pytest.mark.slow
@pytest.mark.parametrize("interface", ["request", "same"])
@settings(EXAMPLES, max_examples=100)
@given(seed=st.integers(0, 1 << 32), steps=st.integers(0, 20))
def test_same_bits_of_more(interface: str, seed: int, steps: int) -> None:
    same_bits(interface, seed, steps)


@pytest.mark.slow
def test_programs_carry_it() -> None:
    found = 0
    for seed in range(12):
        made_up = program(seed, 3, fields=6)
        result = rewritten(made_up.model, joined=True, request=patterns(made_up.inputs))
        found += any(r.name == LOOKUP for r in result.report.rules)
    assert found >= 8


def test_plan_replays(joined: None) -> None:
    made = model()
    result = onnxrank.optimize(made, request=["user*"])
    again = onnxrank.optimize(made, plan=result.plan)
    assert again.model.SerializeToString() == result.model.SerializeToString()
    assert tables(onnxrank.optimize(made, request=["user*"], ignore=["lookup"]).model) == 4


@pytest.mark.slow
def test_what_fails_its_check_is_left_apart(joined: None) -> None:
    """A table that lies elsewhere than its ids are brought to."""
    made = model()
    whole = lookups.Network.stack
    with mock.patch.object(lookups.Network, "stack", lambda net, names, hint: whole(net, names[::-1], hint)):
        result = onnxrank.optimize(made, request=["user*"])
    assert tables(result.model) >= 3 and {r.rule for r in result.report.retreats} == {LOOKUP}
    same(made, result)


@pytest.mark.slow
def test_verify_names_it(joined: None) -> None:
    made = model()
    whole = lookups.Network.stack
    with mock.patch.object(lookups.Network, "stack", lambda net, names, hint: whole(net, names[::-1], hint)):
        wrong = onnxrank.optimize(made, request=["user*"], check=False)
        found = verify(made, wrong.model, Options(bisect=True, level="quick"))
    assert not found.passed and found.culprit is not None and found.culprit.rule == LOOKUP


@pytest.mark.slow
def test_several_requests_per_call(joined: None) -> None:
    """What is made for one request is made for several."""
    result = onnxrank.batch(model(), request=["user*"], check="quick")
    assert tables(result.model) <= 2  # once more in the branch for one request


def test_verify_compares_joined_tables_row_by_row(joined: None) -> None:
    """A row that no drawn id need meet."""
    result = onnxrank.optimize(model(), request=["user*"])
    assert tables_of_two(model(), result.model) == ([], [])
    wrong = ModelProto()
    wrong.CopyFrom(result.model)
    table = max(wrong.graph.initializer, key=lambda t: t.dims[0] if len(t.dims) == 2 and t.dims[1] == 4 else 0)
    data = numpy_helper.to_array(table).copy()
    data[ROWS[0] + 2, 1] += 1
    table.CopyFrom(numpy_helper.from_array(data, table.name))
    found, lost = tables_of_two(model(), wrong)
    assert not lost and [(c.name, c.rows.tolist()) for c in found] == [("T1", [2])]


def tables_of_two(one: ModelProto, other: ModelProto) -> Any:
    return changed(files.load(one), files.load(other))
