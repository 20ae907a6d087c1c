"""Numbers of candidates and lengths that are run, and what is said of those that are not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from helpers import INT64, Graph, rewritten
from mutants import FOLDER, many, numbered, rows_changed
from onnx import ModelProto, numpy_helper

import onnxrank
from onnxrank import cli
from onnxrank.errors import UsageError
from onnxrank.feeds import describe
from onnxrank.roles import resolve
from onnxrank.verify import Options, Report, sizes, tables, verify
from onnxrank.verify.sizes import Size

LENGTH = "S:L"
FAULTY = tuple(map(int, onnxruntime.__version__.split(".")[:2])) < (1, 32)
"""Whether onnxruntime's kernels give results without entries a wrong shape."""


def pooled(most: int | None = None, table: int = 2000, positions: int = 0) -> ModelProto:
    """A mean over a history `[N, L]`, cut to its first entries, and positions added from a table of so many."""
    g = Graph(17)
    ids, item = g.input("hist", ["N", "L"], INT64), g.input("item", ["N", 4])
    used = ids if most is None else g.op("Slice", ids, g.ints(0), g.ints(most), g.ints(1))
    weights = np.random.default_rng(0).standard_normal((table, 4)).astype(np.float32)
    x = g.op("Gather", g.const(weights), used)
    if positions:
        rows = np.random.default_rng(1).standard_normal((1, positions, 4)).astype(np.float32)
        n = g.op("Gather", g.op("Shape", ids), g.ints(1))
        x = g.op("Add", x, g.op("Slice", g.const(rows), g.ints(0), n, g.ints(1)))
    g.op("Mul", g.on_axes("ReduceMean", x, [1], keepdims=0), item)
    g.nodes[-1].output[0] = "score"
    g.output("score", ["N", 4])
    return g.model()


def check(a: ModelProto, b: ModelProto, **options: Any) -> Report:
    chosen = {"request": ["hist"], "level": "standard", **options}
    return verify(a, b, Options(**chosen))


# --- which -------------------------------------------------------------------------------------------------------


def test_landmarks() -> None:
    """Numbers in Slices, also behind an Unsqueeze, and tables; weights are none."""
    found = sizes.landmarks([pooled(37, positions=51)])
    assert {37, 51, 2000} <= found.near and found.rows.isdisjoint({37, 51})
    g = Graph(17)
    x = g.input("item", ["N", 4])
    end = g.op("Unsqueeze", g.const(91, np.int64), g.ints(0))
    g.output(g.op("Slice", x, g.ints(0), end, g.ints(0)), None)
    assert 91 in sizes.landmarks([g.model()]).rows


def test_plan() -> None:
    found = sizes.plan({LENGTH: (1, 1000)}, [], [pooled(50)], [512], [512])
    at = [(s.candidates, dict(s.lengths)) for s in found]
    assert at[0] == (sizes.FEW, {LENGTH: 1000}) and at[-1] == (512, {LENGTH: 1000})
    assert {(sizes.FEW, n) for n in (0, 1, 49, 50, 51, 1000)} <= {(c, s.get(LENGTH)) for c, s in at}
    assert (512, {}) in at and len({(s.kind, s.candidates) for s in found}) == len(found)


def test_declared_ranges_are_kept() -> None:
    found = sizes.plan({LENGTH: (5, 40)}, [LENGTH], [pooled(50)], [], [])
    lengths = {s.lengths[LENGTH] for s in found}
    assert min(lengths) == 5 and max(lengths) == 40
    assert sizes.usual([LENGTH, "N"], {LENGTH: (9, 40)}) == {LENGTH: 9}


def test_two_lengths() -> None:
    found = sizes.plan({"S:A": (1, 10), "S:B": (1, 20)}, [], [], [], [])
    pairs = [tuple(s.lengths.values()) for s in found if len(s.lengths) == 2]
    assert {(10, 20), (1, 1), (10, 1), (1, 20)} <= set(pairs)


def test_many() -> None:
    assert sizes.many_of((64, 2048), "standard", (1, 2, 17)) == [2048, 362, 64]
    assert sizes.many_of(None, "standard", (1, 2, 17)) == [512]
    assert sizes.many_of(None, "full", (0, 1, 2, 17, 512)) == [4096]
    assert sizes.many_of((64, 2048), "quick", (1, 2, 17)) == []


def test_names() -> None:
    assert sizes.spans(["N", LENGTH, "S:h.1"], {"h.1": (2, 3)}) == {LENGTH: sizes.LENGTHS, "S:h.1": (2, 3)}
    with pytest.raises(UsageError, match="Did you mean 'hist'"):
        sizes.spans(["N", "S:hist"], {"hits": (1, 2)})
    with pytest.raises(UsageError, match="no input has a length of its own"):
        sizes.spans(["N"], {"hist": (1, 2)})


def test_listing() -> None:
    found = [Size(512), Size(2, {LENGTH: 5}), Size(2, {LENGTH: 1}), Size(1, {LENGTH: 3, "S:M": 4}), Size(2, about="x")]
    assert sizes.listing(found) == ["N = 512", "L = 1, 5 with N = 2", "L = 3, M = 4 with N = 1"]


# --- runs --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("level", ["quick", "standard"])
def test_cut_history(level: str) -> None:
    """Wrong from 38 entries on; right, and told so, where no more are served."""
    found = check(pooled(), pooled(37), level=level)
    assert not found.passed and "L = " in found.errors[0].message
    right = check(pooled(), pooled(37), level=level, lengths={"L": (1, 37)})
    assert right.passed and any("37 with N = 2" in line for line in right.looked)
    assert right.budget > 0 and not right.unseen


def test_beyond_a_table_of_positions() -> None:
    """The original does not run there: a note, no failure."""
    found = check(pooled(positions=50), pooled(positions=50))
    assert found.passed, found.errors
    (note,) = [f for f in found.findings if "does not run (" in f.message]
    assert note.severity == "note" and "51" in note.message and any("49, 50" in line for line in found.looked)


@pytest.mark.parametrize("rows", [7, 8, 9])
def test_ids_of_small_tables(rows: int) -> None:
    """Ids are not taken for counts of a history, however many rows their table has."""
    g = Graph(17)
    kind, item = g.input("kind", ["N", 1], INT64), g.input("item", ["N", 4])
    weights = np.random.default_rng(0).standard_normal((rows, 4)).astype(np.float32)
    row = g.op("Squeeze", g.op("Gather", g.const(weights), kind), g.ints(1))
    short, long = (g.on_axes("ReduceMean", g.input(f"hist_{s}", ["N", s, 4]), [1], keepdims=0) for s in "LM")
    g.output(g.op("Mul", g.op("Mul", g.op("Mul", short, long), row), item), ["N", 4])
    found = check(g.model(), g.model(), request=["hist_*", "kind"])
    assert found.passed and not [f for f in found.findings if "does not run (" in f.message]
    assert any("N = 512" in line for line in found.looked)


def test_no_time() -> None:
    """What was not reached is listed; ordinary inputs are compared all the same."""
    found = check(pooled(), pooled(37), budget=0.0)
    assert found.passed and any("the time was up" in line and "1024" in line for line in found.unseen)
    assert found.looked[0].startswith("N = 1, 2, 17 with L = 7")


def test_contract_tells_the_numbers() -> None:
    path = FOLDER / "mmoe.torchscript.onnx"
    made = rewritten(path, request=["user_*"], candidates=(3, 700)).model
    found = verify(path, made, Options(level="standard"))
    assert found.passed and {3, 46, 700} <= {c.candidates for c in found.cases}


def test_span() -> None:
    pair = many(600)()
    assert verify(pair.original, pair.optimized, Options(level="standard", span=(1, 512))).passed
    assert not verify(pair.original, pair.optimized, Options(level="standard", span=(1, 700))).passed
    wrong = verify(pair.original, pair.optimized, Options(level="full"))
    assert not wrong.passed and any(c.candidates == 4096 for c in wrong.failed_cases)


def test_huge_inputs() -> None:
    with pytest.raises(UsageError, match="GiB"):
        check(pooled(), pooled(), candidates=(1_000_000,), lengths={"L": (1000, 1000)})


@pytest.mark.slow
def test_optimize_checks_what_is_served() -> None:
    path = FOLDER / "mmoe.torchscript.onnx"
    report = onnxrank.optimize(path, request=["user_*"], candidates=(64, 1024)).report
    assert {0, 1, 2, 17, 64, 256, 1024} == {c.candidates for c in report.checks}
    assert report.looked and not report.unseen
    with pytest.raises(UsageError, match="the check 'slow'"):
        onnxrank.optimize(path, request=["user_*"], check="slow")
    with pytest.raises(UsageError, match="no input has a length"):
        onnxrank.optimize(path, request=["user_*"], lengths={"hist": (1, 5)})


# --- tables ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_changed_rows_are_counted() -> None:
    pair = rows_changed(slice(5000, 5100))()
    found = verify(pair.original, pair.optimized, Options(roles=pair.roles, level="quick"))
    assert not found.passed
    assert any("100 of 100,000 rows differ, first 5000" in f.message for f in found.findings)


def test_rows_that_no_id_reaches() -> None:
    """Ids are declared to be below 100: the rows beyond are told of, and do not fail."""
    pair = rows_changed(slice(5000, 5100))()
    spec = {"inputs": {"id": {"level": "request", "range": [0, 100]}}}
    found = verify(pair.original, pair.optimized, Options(spec=spec, level="quick"))
    assert found.passed and any("100 changed rows of table 'table'" in line for line in found.unseen)


def test_equal_tables(tmp_path: Path) -> None:
    """Zeros of both signs are equal; external data is compared too."""
    pair = rows_changed(slice(0, 0))()
    other = ModelProto()
    other.CopyFrom(pair.original)
    t = other.graph.initializer[0]
    data = numpy_helper.to_array(t).copy()
    data[3], data[9] = 0.0, 7.0
    t.CopyFrom(numpy_helper.from_array(data, t.name))
    onnx.save(other, tmp_path / "m.onnx", save_as_external_data=True, location="m.data")
    loaded = onnxrank.model.load(tmp_path / "m.onnx")
    assert loaded.external
    (changed,), lost = tables.changed(onnxrank.model.load(pair.original), loaded)
    assert not lost and changed.rows.tolist() == [9, 3]
    assert tables.changed(loaded, loaded) == ([], [])


# --- command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    onnx.save(pooled(), tmp_path / "a.onnx")
    onnx.save(pooled(37), tmp_path / "b.onnx")
    original = FOLDER / "mmoe.torchscript.onnx"
    (tmp_path / "mmoe.onnx").write_bytes(original.read_bytes())
    (tmp_path / "fast.onnx").write_bytes(rewritten(original, request=["user_*"]).model.SerializeToString())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_length_option(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["verify", "a.onnx", "b.onnx", "--request", "hist", "--level", "standard"]
    assert cli.main(args) == 1
    assert cli.main([*args, "--length", "L=1..30"]) == 0
    out = capsys.readouterr().out
    assert "Roles are trusted" in out and "--data" in out and "compared at L = " in out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["fast.onnx", "mmoe.onnx"], "The arguments are swapped: fast.onnx was made of mmoe.onnx"),
        (["mmoe.onnx", "fast.onnx", "--rtol", "tasks_0:0"], "Did you mean 'task_0'"),
        (["mmoe.onnx", "fast.onnx", "--atol", "ctr:0"], "no output of the original. They are 'task_0'"),
        (["mmoe.onnx", "fast.onnx", "--candidates", "1000000000"], "more than the 1,000,000 that are run"),
        (["mmoe.onnx", "fast.onnx", "--length", "hist=1..5"], "no input has a length of its own"),
        (["a.onnx", "b.onnx", "--length", "L=5..1"], "goes down"),
        (["a.onnx", "b.onnx", "--length", "L"], "is not NAME=LOW..HIGH"),
        (["a.onnx", "b.onnx", "--request", "hist", "--length", "M=1..5"], "the lengths are 'L'"),
    ],
)
def test_usage(folder: Path, capsys: pytest.CaptureFixture[str], args: list[str], words: str) -> None:
    assert cli.main(["verify", *args]) == 2
    out, err = capsys.readouterr()
    assert words in err and out == "" and "Traceback" not in err


@pytest.mark.slow
def test_optimize_tells_that_roles_are_trusted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["optimize", "mmoe.onnx", "out.onnx", "--request", "user_*", "--check", "quick"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Roles are trusted, not tested: that user_ids is the same" in out and "compared at N = 1, 2, 17" in out


@pytest.mark.slow
def test_no_steps_in_a_reduction_that_gives_nothing_a_wrong_shape() -> None:
    """Of no entries onnxruntime's reductions keep all axes, which the operators behind them do not take."""
    g = Graph(11)
    user, item = g.input("user", ["N", "L", 2]), g.input("item", ["N", "L"])
    g.output(g.on_axes("ReduceSum", user, [-1], keepdims=0), ["N", "L"])
    g.output(g.op("Neg", item), ["N", "L"])
    result = rewritten(g.model(), request=["user"])
    assert result.changed
    report = verify(g.model(), result.model)
    assert report.passed, report.errors
    assert any("With L = 0 the original gives" in f.message for f in report.findings) == FAULTY


def _row_of_a_product(n: int) -> ModelProto:
    """A score `[1, M, N]` of a Reshape that takes extents of 0 for those of its operand, and a second one."""
    g = Graph(17)
    user, item = g.input("user", ["N", 4]), g.input("item", ["N", 4])
    count = g.op("Gather", g.op("Shape", item), g.ints(0))
    wide = g.op("Expand", g.op("Unsqueeze", item, g.ints(2)), g.op("Concat", g.ints(1, 1), count, axis=0))
    shape = g.op("Concat", g.ints(1), g.op("Mul", count, g.ints(n)), count, axis=0)
    g.op("Reshape", wide, shape)
    g.nodes[-1].output[0] = "flat"
    g.output("flat", [1, "M", "N"])
    g.op("MatMul", g.op("Mul", user, item), g.const(np.ones((4, 1))))
    g.nodes[-1].output[0] = "score"
    g.output("score", ["N", 1])
    return g.model()


def test_nothing_of_two_shapes() -> None:
    """Without candidates the original's Reshape copies an extent, and no model has an entry: that is told, no more."""
    result = rewritten(_row_of_a_product(4), request=["user"])
    other = onnx.ModelProto()
    other.CopyFrom(result.model)
    for node in other.graph.node:
        if node.op_type == "Reshape":
            node.attribute.append(onnx.helper.make_attribute("allowzero", 1))
    report = verify(_row_of_a_product(4), other, Options(candidates=(0, 1, 2, 5)))
    assert report.passed, report.errors
    assert any("no entries are left of 'flat'" in f.message for f in report.findings)


def _least_of_each(plain: bool) -> ModelProto:
    """Least numbers beside all of them; not `plain`: put together along the other axis."""
    g = Graph(20)
    x = g.input("x", ["N", 4, 3])
    parts = [g.on_axes("ReduceMin", x, [-1], keepdims=0), g.op("Flatten", x, axis=1)]
    if plain:
        g.op("Concat", *parts, axis=1)
    else:
        turned = [g.op("Transpose", part, perm=[1, 0]) for part in parts]
        g.op("Transpose", g.op("Concat", *turned, axis=0), perm=[1, 0])
    g.nodes[-1].output[0] = "score"
    g.output("score", ["N", 16])
    return g.model()


def _product(plain: bool) -> ModelProto:
    """A product of the transposed input; not `plain`: one that onnxruntime fuses with the transposition."""
    g = Graph(17)
    x, weight = g.input("x", ["N", 4, 3]), g.const(np.arange(8.0).reshape(4, 2))
    if plain:
        g.op("Einsum", x, weight, equation="ncb,cz->nbz")
    else:
        g.op("MatMul", g.op("Transpose", x, perm=[0, 2, 1]), weight)
    g.nodes[-1].output[0] = "score"
    g.output("score", ["N", 3, 2])
    return g.model()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_least_of_each, "inside the original it gives"),
        (_product, "without its optimisations it gives what the original gives"),
    ],
)
def test_runtime_that_fails_without_candidates(make: Callable[[bool], ModelProto], words: str) -> None:
    """Of nothing onnxruntime's kernels make wrong shapes, and its fused ones fail: no fault of a model."""
    report = verify(make(True), make(False))
    assert report.passed, report.errors
    told = [f for f in report.findings if f.kind == "runtime" and "does not run the optimized" in f.message]
    assert len(told) == FAULTY
    assert all(words in f.message and f.severity == "warning" for f in told)


@pytest.mark.parametrize("length", [4, "L"])
def test_wrong_shape_of_nothing_in_the_second_model_alone(length: int | str) -> None:
    """A kernel forgets that it reduces where there is nothing to add up; the original brings that into shape again."""

    def made(shaped: bool) -> ModelProto:
        g = Graph(17)
        x = g.input("x", ["N", length, 3])
        y = g.on_axes("ReduceSum", x, [-1], keepdims=1)
        if shaped:
            parts = [g.op("Gather", g.op("Shape", x), g.ints(k)) for k in (0, 1)]
            g.op("Reshape", y, g.op("Concat", *parts, g.ints(1), axis=0), allowzero=1)
        g.nodes[-1].output[0] = "score"
        g.output("score", ["N", length, 1])
        return g.model()

    report = verify(made(True), made(False))
    assert report.passed, report.errors
    told = [f for f in report.findings if "which is the fault of onnxruntime: inside the optimized model" in f.message]
    assert bool(told) == FAULTY


def test_numbers_that_nothing_is_known_of_are_told() -> None:
    made = numbered("Greater", 5000, table=False)()
    found = verify(made.original, made.original, Options(roles=made.roles))
    assert found.passed and any("large values of 'id'" in line for line in found.unseen)
    ranged = resolve(describe(made.original), spec={"inputs": {"id": {"level": "request", "range": [0, 9000]}}})
    found = verify(made.original, made.original, Options(roles=ranged))
    assert found.passed and not any("large values" in line for line in found.unseen)


@pytest.mark.parametrize("level", ["quick", "standard"])
@pytest.mark.parametrize("change", ["clipped", "shifted"])
def test_ids_that_count_from_the_end(change: str, level: str) -> None:
    """Lookups take minus the size of their table and on; what brings ids elsewhere must bring those, too."""

    def make(wrong: bool) -> ModelProto:
        g = Graph(17)
        hist, item = g.input("hist", [1 if wrong else "N", "L"], INT64), g.input("item", ["N"], INT64)
        table = g.const(np.arange(44, dtype=np.float32).reshape(11, 4))
        if wrong and change == "clipped":
            hist = g.op("Max", hist, g.const(0, np.int64))
        if wrong and change == "shifted":  # into a table behind another one
            table = g.op("Concat", g.const(np.ones((3, 4), np.float32)), table, axis=0)
            hist, item = (g.op("Add", ids, g.const(3, np.int64)) for ids in (hist, item))
        user = g.on_axes("ReduceSum", g.op("Gather", table, hist), [1], keepdims=0)
        g.op("Mul", user, g.op("Gather", table, item))
        g.nodes[-1].output[0] = "score"
        g.output("score", ["N", 4])
        return g.model()

    right = check(make(False), make(False), level=level)
    assert right.passed and any("ends of tables ('hist', 'item')" in line for line in right.looked)
    found = check(make(False), make(True), level=level)
    assert not found.passed and any("ends of tables" in f.message for f in found.errors)


def test_ids_that_the_original_does_not_count_from_the_end() -> None:
    """One input of three is an extent as well: the others are looked at, and the report says what was not."""
    g = Graph(17)
    ids = [g.input(name, ["N"], INT64) for name in ("a", "b", "c")]
    table = g.const(np.arange(12, dtype=np.float32).reshape(3, 4))
    rows = [g.op("Gather", table, i) for i in ids]
    long = g.op("ConstantOfShape", g.op("Gather", ids[1], g.ints(0)))
    g.op("Add", g.op("Sum", *rows), g.op("ReduceSum", long, keepdims=0))
    g.nodes[-1].output[0] = "score"
    g.output("score", ["N", 4])
    found = check(g.model(), g.model(), request=["a"])
    assert found.passed, found.errors
    assert any("('c', 'a')" in line for line in found.looked), (found.looked, found.unseen, found.findings)
    (note,) = [f for f in found.findings if "does not run (" in f.message]
    assert "ends of tables ('b')" in note.message
