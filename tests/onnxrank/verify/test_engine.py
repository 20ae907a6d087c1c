"""What is compared under which contract, and what passes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from helpers import FLOAT, INT64, Graph, rewritten
from mutants import FOLDER, pair
from onnx import ModelProto, TensorProto, helper, numpy_helper

from onnxrank import optimize
from onnxrank.contract import CONTRACT
from onnxrank.errors import EnvironmentProblem, ModelError, UsageError
from onnxrank.verify import Options, Report, sessions, verify
from onnxrank.verify.side import Side, open_both
from onnxrank.workers import Crashed

RNG = np.random.default_rng(0)
HALF = int(TensorProto.FLOAT16)
W = RNG.standard_normal((8, 1)).astype(np.float32)


def tower(
    user: int | str = "N", weights: np.ndarray = W, names: tuple[str, str] = ("user", "item"), dtype: int = FLOAT
) -> ModelProto:
    """A linear layer over a user and an item; a user with one row is broadcast."""
    kind = helper.tensor_dtype_to_np_dtype(dtype)
    g = Graph(17)
    u, i = g.input(names[0], [user, 4], dtype), g.input(names[1], ["N", 4], dtype)
    if user == "N":
        y = g.op("MatMul", g.op("Concat", u, i, axis=1), g.const(weights, kind))
    else:
        y = g.op("Add", g.op("MatMul", i, g.const(weights[4:], kind)), g.op("MatMul", u, g.const(weights[:4], kind)))
    g.nodes[-1].output[0] = "score"
    assert y
    g.output("score", ["N", 1], dtype)
    return g.model()


def messages(report: Report, severity: str | None = None) -> str:
    return "\n".join(f.message for f in report.findings if severity in (None, f.severity))


# --- the contract ------------------------------------------------------------------------------------------------


def test_shapes_tell_the_interface() -> None:
    found = verify(tower(), tower(user=1))
    assert found.passed, found.errors
    assert found.contract["source"] == "told by the shapes of the inputs"
    assert [i["level"] for i in found.contract["inputs"]] == ["request", "candidate"]


def test_same_interface_without_roles() -> None:
    """Two models of one signature: all inputs count as candidate-level."""
    assert verify(tower(), tower()).passed
    assert "Nothing says that an input is the same" in messages(verify(tower(), tower()), "note")
    found = verify(tower(), tower(weights=W * np.float32(1.0005)))
    assert not found.passed and found.verdicts["algebra"] == found.verdicts["rounding"] == "failed"


def test_one_row_in_both() -> None:
    assert verify(tower(user=1), tower(user=1)).passed


def test_stored_contract() -> None:
    path = FOLDER / "deepfm_packed.torchscript.onnx"
    result = rewritten(path, request=["X[0,2,4,6,8:10,11]"])
    found = verify(path, result.model)
    assert found.passed, found.errors
    assert found.contract["source"] == "stored in the optimized model"
    assert found.original == str(path) and found.optimized is None


def test_divided_columns_need_roles() -> None:
    right = pair("deepfm_packed.torchscript")
    with pytest.raises(UsageError, match=r"X\[0:8\]"):
        verify(right.original, right.optimized)
    assert verify(right.original, right.optimized, Options(roles=right.roles, level="quick")).passed


@pytest.mark.slow
def test_wrong_columns() -> None:
    right = pair("deepfm_packed.torchscript")
    found = verify(right.original, right.optimized, Options(request=["X[0,2,4]"]))
    assert not found.passed and "7 columns where the roles say 3" in messages(found)
    found = verify(right.original, right.optimized, Options(request=["X[0,2,4,6,8:10,12]"], level="quick"))
    assert not found.passed


def test_renamed_inputs_go_by_order() -> None:
    found = verify(tower(), tower(names=("a", "b")))
    assert found.passed and "matched by their order" in messages(found, "warning")


def test_strange_input() -> None:
    found = verify(tower(), tower(names=("user", "other")))
    assert not found.passed and "'other'" in messages(found, "error")


@pytest.mark.slow
def test_optimized_again() -> None:
    """An original that was optimised before has the interface that its own contract says."""
    path = FOLDER / "two_tower.torchscript.onnx"
    first = rewritten(path, request=["user_*"]).model
    found = verify(first, first)
    assert found.passed, found.errors
    assert found.contract["source"] == "stored in the original"


def test_contract_of_another_original() -> None:
    path = FOLDER / "two_tower.torchscript.onnx"
    made = rewritten(path, request=["user_*"]).model
    found = verify(FOLDER / "two_tower.dynamo.onnx", made, Options(level="quick"))
    assert "made of another file" in messages(found, "warning")


def test_damaged_contract() -> None:
    made = tower(user=1)
    entry = made.metadata_props.add()
    entry.key, entry.value = CONTRACT, "{"
    found = verify(tower(), made)
    assert found.passed and "cannot be read" in messages(found, "warning")


# --- types and precision -----------------------------------------------------------------------------------------


def test_half_against_float() -> None:
    """With weights rounded alike it is the same function; the rounding allowed is that of 16 bits."""
    for pair_of in ((tower(), tower(dtype=HALF)), (tower(dtype=HALF), tower()), (tower(), tower(user=1, dtype=HALF))):
        found = verify(*pair_of)
        assert found.passed, found.errors
        assert found.verdicts["algebra"] == "passed" and "float16" in messages(found, "warning")
    assert not verify(tower(), tower(weights=W * np.float32(1.3), dtype=HALF)).passed
    slightly = verify(tower(), tower(weights=W * np.float32(1.003), dtype=HALF))
    assert slightly.verdicts["algebra"] == "skipped" and "more than the rounding" in messages(slightly, "warning")


def test_half_that_only_the_original_loads() -> None:
    """What runs as it is must do so afterwards: types that do not fit are no lack of kernels for 16 bits."""
    broken = tower(dtype=HALF)
    (node,) = (n for n in broken.graph.node if "score" in n.output)
    node.output[0] = "h"
    broken.graph.initializer.append(numpy_helper.from_array(np.float32(-100), "least"))
    broken.graph.node.append(helper.make_node("Max", ["h", "least"], ["score"]))
    found = verify(tower(dtype=HALF), broken)
    assert not found.passed and "does not load" in messages(found, "error")


def test_user_limits() -> None:
    """They come on top of what rounding allows."""
    path = FOLDER / "mmoe.torchscript.onnx"
    made = rewritten(path, request=["user_*"]).model
    assert verify(path, made, Options(level="quick", rtol={None: 1e-2}, atol={None: 1e-5})).passed
    found = verify(path, made, Options(level="quick", atol={"task_1": 1e-12}))
    assert {c.output for c in found.failed_cases} == {"task_1"} and found.verdicts["algebra"] == "passed"


def test_statistics() -> None:
    path = FOLDER / "mmoe.torchscript.onnx"
    found = verify(path, rewritten(path, request=["user_*"]).model, Options(level="quick"))
    assert {(s.level, s.output) for s in found.statistics} == {
        (level, output) for level in ("disabled", "all") for output in ("task_0", "task_1")
    }
    for s in found.statistics:
        assert 0 < s.error <= s.allowed and s.own_error <= s.allowed
        assert s.p50 <= s.p99 <= s.atol and s.ulp_p50 <= s.ulp_p99 <= s.ulp_max
        worst = max(c.error for c in found.cases if (c.verdict, c.output, c.level) == ("rounding", s.output, s.level))
        assert worst >= s.error
    tight = max(s.atol for s in found.statistics)
    again = verify(path, rewritten(path, request=["user_*"]).model, Options(level="quick", atol={None: tight * 1.01}))
    assert again.passed


def test_tolerances_that_would_pass() -> None:
    """They are held against large inputs, too, which differ by more than ordinary ones."""
    options = Options(request=["user"])
    found = verify(tower(), tower(1), options)
    assert found.passed and found.statistics
    tight = max(s.atol for s in found.statistics)
    assert verify(tower(), tower(1), replace(options, atol={None: tight * 1.01})).passed
    assert not verify(tower(), tower(1), replace(options, atol={None: tight * 0.99})).passed


def test_quantised() -> None:
    """A value at the border of two steps may fall on either side."""
    g = Graph(17)
    x = g.input("item", ["N", 4])
    s, z = g.const(0.03), g.const(3, np.int8)
    q = g.op("DequantizeLinear", g.op("QuantizeLinear", x, s, z), s, z)
    g.output(g.op("MatMul", q, g.const(W[:4])), ["N", 1])
    found = verify(g.model(), g.model())
    assert found.passed and "quantised" in messages(found, "note")


def test_original_is_not_equivariant() -> None:
    """A list-wise ranker against itself: no fault of the second model."""
    g = Graph(17)
    x = g.input("item", ["N", 4])
    g.output(g.op("Softmax", g.op("MatMul", x, g.const(W[:4])), axis=0), ["N", 1])
    found = verify(g.model(), g.model())
    assert found.passed and "influence each other too" in messages(found, "warning")


def test_histories() -> None:
    """Patterns of padding are tried: a model that is wrong for an empty history only is caught."""
    kinds = {c.inputs for c in verify(FOLDER / "din.torchscript.onnx", pair("din.torchscript").optimized).cases}
    assert {"random", "edges", "padding"} <= kinds


def test_strings() -> None:
    g = Graph(17)
    x = g.input("item", ["N"], int(TensorProto.STRING))
    encoded = g.op("LabelEncoder", x, domain="ai.onnx.ml", keys_strings=["a", "b"], values_floats=[1.0, 2.0])
    g.output(encoded, ["N"], FLOAT)
    graph = helper.make_graph(g.nodes, "g", g.inputs, g.outputs)
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 2)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    assert verify(model, model).passed


@pytest.mark.parametrize("given", [False, True])
def test_a_count_of_a_history(given: bool) -> None:
    """How many entries of a history of any length count: no range holds at every length, and none is needed."""
    g = Graph(17)
    h, n, c = g.input("h", ["N", "L", 1]), g.input("n", ["N", 1, 1], INT64), g.input("c", ["N", 1])
    last = g.op("GatherElements", h, g.op("Sub", n, g.const(1, np.int64)), axis=1)
    g.output(g.op("Add", c, g.op("Squeeze", last, g.ints(2))), ["N", 1])
    count: dict[str, Any] = {"level": "request"} | ({"range": [1, 1000]} if given else {})
    spec = {"inputs": {"h": "request", "n": count, "c": "candidate"}}
    model = g.model()
    if not given:
        assert verify(model, model, Options(spec=spec)).passed
        return
    with pytest.raises(ModelError, match="is better without one"):
        verify(model, model, Options(spec=spec))


# --- files and environment ---------------------------------------------------------------------------------------


def saved(folder: Path, model: ModelProto) -> Path:
    folder.mkdir()
    onnx.save(model, folder / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    return folder / "m.onnx"


@pytest.mark.slow
def test_external_data(tmp_path: Path) -> None:
    first = saved(tmp_path / "a", tower())
    second = saved(tmp_path / "b", tower(user=1))
    assert verify(first, second).passed
    data = tmp_path / "b" / "m.data"
    data.write_bytes(np.roll(np.frombuffer(data.read_bytes(), np.uint8), 4).tobytes())
    found = verify(first, second)
    assert not found.passed and found.verdicts["algebra"] == "failed"


def test_stale_external_data_of_one_name(tmp_path: Path) -> None:
    """Initializers that kept their name have kept their content, wherever it lies."""
    first, second = saved(tmp_path / "a", tower()), saved(tmp_path / "b", tower())
    assert not messages(verify(first, second), "warning")
    data = tmp_path / "b" / "m.data"
    data.write_bytes(bytes(len(data.read_bytes())))
    found = verify(first, second)
    assert not found.passed and "other content" in messages(found)


def test_external_data_outside(tmp_path: Path) -> None:
    path = saved(tmp_path / "a", tower())
    model = onnx.load(path, load_external_data=False)
    for t in model.graph.initializer:
        next(e for e in t.external_data if e.key == "location").value = "../secret"
    (tmp_path / "secret").write_bytes(bytes(64))
    (tmp_path / "a" / "bad.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="outside the model's folder"):
        verify(path, tmp_path / "a" / "bad.onnx")


def test_no_cuda_is_no_pass() -> None:
    with pytest.raises(EnvironmentProblem, match="CUDAExecutionProvider"):
        verify(tower(), tower(user=1), Options(providers=("cpu", "cuda")))


@pytest.mark.slow
def test_tf32_is_told() -> None:
    assert verify(tower(), tower()).environment["tf32"] == "not used"


def test_original_must_run() -> None:
    g = Graph(17)
    x = g.input("item", ["N", 4])
    g.output(g.op("Reshape", x, g.ints(7, 4)), ["N", 4])
    with pytest.raises(ModelError, match="does not run"):
        verify(g.model(), g.model())


@pytest.mark.slow
def test_original_that_kills_the_runtime_while_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """As onnxruntime's optimiser does at some 16-bit models: no fault of the other model, nor of a rule."""

    def dies(sides: tuple[Side, Side], key: str, **how: Any) -> list[Exception | None]:
        first = Crashed("died of SIGSEGV", "crash") if key == "cpu/all" else None
        return [first, *open_both(sides, key, **how)[1:]]

    monkeypatch.setattr(sessions, "open_both", dies)
    with pytest.raises(ModelError, match=r"The original makes .* loaded \(cpu, optimisations all\): died of SIGSEGV"):
        verify(tower(), tower(1), Options(request=["user"]))
    path = FOLDER / "dcn.torchscript.onnx"
    with pytest.raises(ModelError, match="The original makes onnxruntime fail"):
        optimize(path, request=["user_*"])


@pytest.mark.slow
def test_in_memory_models_are_not_changed() -> None:
    first, second = tower(), tower(user=1)
    kept = [m.SerializeToString(deterministic=True) for m in (first, second)]
    verify(first, second)
    assert [m.SerializeToString(deterministic=True) for m in (first, second)] == kept


def test_structure() -> None:
    """Opset, IR version, attributes and documents of what was not touched."""
    path = FOLDER / "two_tower.torchscript.onnx"
    result = rewritten(path, request=["user_*"])

    def changed(how: Any) -> Report:
        made = ModelProto()
        made.CopyFrom(result.model)
        how(made)
        return verify(path, made, Options(level="quick", candidates=(2,), seeds=1))

    assert not changed(lambda m: None).errors
    assert "IR version" in messages(changed(lambda m: setattr(m, "ir_version", 9)), "error")
    kept = next(n for n in result.model.graph.node if n.op_type == "Gather")

    def document(m: ModelProto) -> None:
        next(n for n in m.graph.node if n.name == kept.name).doc_string = "x"

    assert "other attributes or documentation" in messages(changed(document), "error")

    def anew(m: ModelProto) -> None:
        node = next(n for n in m.graph.node if n.name == kept.name)
        node.name, node.doc_string = "made/anew", "y"

    assert not changed(anew).errors

    def weights(m: ModelProto) -> None:
        t = next(t for t in m.graph.initializer if t.name == "user_tower.0.bias")
        t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(t) + 0, t.name))

    assert not changed(weights).errors

    def opset(m: ModelProto) -> None:
        m.opset_import[0].version = 18

    assert "Opset of the default domain: 18 instead of 17" in messages(changed(opset), "error")


@pytest.mark.slow
def test_integers() -> None:
    """Outputs that are no scores are compared exactly."""

    def model(shift: int) -> ModelProto:
        g = Graph(17)
        x = g.input("item", ["N", 2], INT64)
        g.output(g.op("Add", x, g.ints(shift)), ["N", 2], INT64)
        made = g.model()
        made.graph.node[-1].output[0] = made.graph.output[0].name = "ids"
        return made

    assert verify(model(1), model(1)).passed
    assert not verify(model(1), model(2)).passed
