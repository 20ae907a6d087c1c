"""What holds of every rewritten model, on every committed export."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml
from exports import FILES, FOLDER, QUICK, every_export
from helpers import FLOAT, Feed, Graph, rewritten, run, session, transformation, witness
from onnx import inliner, numpy_helper

import onnxrank
from onnxrank.contract import CONTRACT, roles_again, stored_contract
from onnxrank.facts import Setting
from onnxrank.feeds import describe
from onnxrank.operators import Trait, traits
from onnxrank.roles import Roles
from onnxrank.transform import Transformation
from onnxrank.verify import Options, verify


def spec(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / f"{name.split('.')[0]}.roles.yaml").read_text())


@cache
def optimised(name: str, interface: str = "request") -> onnxrank.Result:
    return rewritten(FOLDER / name, spec=spec(name), interface=interface)


def inlined_original(name: str) -> onnx.ModelProto:
    original = onnx.load(FOLDER / name)
    return inliner.inline_local_functions(original) if original.functions else original


@cache
def rewrite(name: str) -> Transformation:
    return transformation(onnx.load(FOLDER / name), spec(name))


@cache
def sessions(name: str) -> list[Any]:
    return [session(str(FOLDER / name)), session(optimised(name).model)]


def feed(name: str, n: int, seed: int = 0) -> Feed:
    """Inputs of the original for one request of `n` candidates."""
    study = rewrite(name).study
    return dict(study.maker(Setting({**dict.fromkeys(study.symbols, 7), "N": n}, seed)))


def candidate_inputs(name: str) -> list[str]:
    """Inputs of the rewritten model that have rows of candidates, all of them on axis 0."""
    return [i.name for i in optimised(name).model.graph.input if i.type.tensor_type.shape.dim[0].HasField("dim_param")]


def close(a: Feed, b: Feed) -> None:
    """Equal up to the rounding of products of other sizes."""
    assert a.keys() == b.keys()
    for name, score in a.items():
        np.testing.assert_allclose(
            b[name], score, rtol=2e-5, atol=2e-5 * max(float(np.abs(score).max(initial=0)), 1e-6)
        )


@pytest.mark.slow
@every_export
def test_every_model_changes(name: str) -> None:
    """The other tests say something only of a model that was rewritten."""
    assert optimised(name).changed


@pytest.mark.slow
@every_export
def test_signature_of_outputs(name: str) -> None:
    """Names, order, types, shapes and symbolic dims of the outputs; of the inputs under `same`."""
    original = onnx.load(FOLDER / name)
    assert list(optimised(name).model.graph.output) == list(original.graph.output)
    same = optimised(name, "same").model.graph
    assert list(same.output) == list(original.graph.output)
    assert [(i.name, i.type) for i in same.input] == [(i.name, i.type) for i in original.graph.input]


@every_export
def test_scores(name: str) -> None:
    """The same scores, measured as the check does."""
    roles = Roles.from_dict(optimised(name).report.roles)
    found = verify(FOLDER / name, optimised(name).model, Options(roles=roles, level="quick", candidates=(1, 2, 7, 97)))
    assert {c.candidates for c in found.cases if c.inputs == "random"} == {1, 2, 7, 97}
    assert found.passed, found.findings


def run_without_candidates(names: list[str]) -> None:
    """Prints, a line each, what the original and then the rewritten model give for no candidates."""
    for name in names:
        rows = feed(name, 2)
        new = rewrite(name).translate(rows)
        new |= {i: new[i][:0] for i in candidate_inputs(name)}
        for made, fed in zip(sessions(name), ({k: v[:0] for k, v in rows.items()}, new), strict=True):
            print(json.dumps(name), end=" ", flush=True)
            try:
                print(json.dumps({k: [str(v.dtype), *v.shape] for k, v in run(made, fed).items()}), flush=True)
            except Exception as e:
                print(json.dumps(str(e)), flush=True)


def elsewhere(call: str) -> list[str]:
    """Lines that a function of this file prints in another process, which hashes strings otherwise and may crash."""
    code = f"import runpy; space = runpy.run_path({__file__!r}); exec({call!r}, space)"
    path = os.pathsep.join([str(Path(__file__).parents[1] / "support"), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": path}
    return subprocess.run([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True).stdout.splitlines()


@cache
def without_candidates() -> dict[str, list[Any]]:
    """Per model what the original and the rewritten one give; None where onnxruntime crashed."""
    found: dict[str, list[Any]] = {name: [] for name in FILES}
    left = FILES
    while left:
        for line in elsewhere(f"run_without_candidates({left!r})"):
            name, at = json.JSONDecoder().raw_decode(line)
            found[name].append(json.loads(line[at:]) if line[at:].strip() else None)
        crashed = [n for n in left if len(found[n]) < 2 or None in found[n]]
        assert not crashed or found[crashed[0]], "the process did not start"
        left = left[left.index(crashed[0]) + 1 :] if crashed else []
    return found


@pytest.mark.slow
@every_export
def test_no_candidates(name: str) -> None:
    """Without candidates there are no scores, where the original gives none."""
    want, *got = without_candidates()[name]
    if not isinstance(want, dict):
        pytest.skip("onnxruntime does not run the original without candidates")
    declared = {o.name: len(o.type.tensor_type.shape.dim) for o in optimised(name).model.graph.output}
    if any(len(shape) - 1 != declared[k] for k, shape in want.items()):
        pytest.skip("onnxruntime's reductions of no rows give wrong shapes")
    assert got == [want]


@every_export
def test_idempotent(name: str) -> None:
    """There is nothing left to do on a result."""
    made = optimised(name).model
    again = onnxrank.optimize(made, check=False)
    assert not again.changed
    assert again.model.SerializeToString() == made.SerializeToString()


@pytest.mark.slow
@every_export
def test_idempotent_without_its_contract(name: str) -> None:
    """Nobody says that it was optimised before: all the same next to nothing is left to gain."""
    made = onnx.ModelProto()
    made.CopyFrom(optimised(name).model)
    contract = stored_contract(made)
    assert contract is not None
    del made.metadata_props[:]
    again = onnxrank.optimize(made, roles=roles_again(describe(made), contract), check=False)
    if again.changed:
        before, after = again.report.macs_before, again.report.macs_after
        assert 0 <= before - after < 1e-3 * before


def digests() -> dict[str, str]:
    """Hash of every rewritten model."""
    out = {}
    for name in FILES:
        made = rewritten(FOLDER / name, spec=spec(name))
        out[name] = hashlib.sha256(made.model.SerializeToString()).hexdigest()
    return out


@pytest.mark.slow
def test_deterministic() -> None:
    """The same bytes in this process and in one that hashes strings otherwise."""
    here = digests()
    assert json.loads(elsewhere("print(json.dumps(digests()))")[-1]) == here
    cached = {n: hashlib.sha256(optimised(n).model.SerializeToString()).hexdigest() for n in FILES}
    assert cached == here


@every_export
def test_candidates_do_not_meet(name: str) -> None:
    """Permuting, duplicating, dropping and appending candidates does the same to their scores."""
    after = sessions(name)[1]
    new = rewrite(name).translate(feed(name, 7))
    rows = candidate_inputs(name)
    scores = run(after, new)
    for picked in ([6, 2, 0, 1, 5, 4, 3], [3, 3, 3, 0], [4], [0, 1, 2, 3, 4, 5, 6, 6, 0]):
        close(
            {k: v[picked] for k, v in scores.items()},
            run(after, {k: v[picked] if k in rows else v for k, v in new.items()}),
        )


@pytest.mark.slow
@every_export
def test_same_interface(name: str) -> None:
    """The old inputs give the old scores; rows of one request-level input that differ give NaN."""
    made = session(optimised(name, "same").model)
    rows = feed(name, 5)
    want = run(sessions(name)[0], rows)
    close(want, run(made, rows))
    for role in rewrite(name).study.declared:
        if role.role.level == "candidate":
            continue
        bad = rows[role.name].copy()
        column = (3, *(0,) * (bad.ndim - 1)) if role.role.level == "request" else (3, role.role.request[0])
        bad[column] = bad[column] + 1 if bad[column] < 1 else bad[column] - 1
        got = run(made, {**rows, role.name: bad})
        assert all(np.isnan(score).all() for score in got.values()), role.name


@every_export
def test_untouched_parts(name: str) -> None:
    """Nodes and initializers that no rule touched, versions and metadata are the original's."""
    original, inlined, made = onnx.load(FOLDER / name), inlined_original(name), optimised(name).model
    nodes = {tuple(n.output): n for n in inlined.graph.node}
    for n in made.graph.node:
        own = nodes.get(tuple(n.output))
        if own is not None and own.name == n.name and list(own.input) == list(n.input):
            assert own == n
    tensors = {t.name: t for t in inlined.graph.initializer}
    assert any(t.name in tensors for t in made.graph.initializer)
    assert all(tensors[t.name] == t for t in made.graph.initializer if t.name in tensors)
    assert made.ir_version == original.ir_version
    assert list(made.opset_import) == list(inlined.opset_import)
    assert (made.producer_name, made.producer_version, made.doc_string) == (
        original.producer_name, original.producer_version, original.doc_string)  # fmt: skip
    assert (made.graph.name, made.graph.doc_string) == (inlined.graph.name, inlined.graph.doc_string)
    stored = {p.key: p.value for p in made.metadata_props}
    contract = json.loads(stored.pop(CONTRACT))
    assert stored == {p.key: p.value for p in original.metadata_props}
    assert contract["source_sha256"] == hashlib.sha256((FOLDER / name).read_bytes()).hexdigest()
    assert contract["interface"] == "request"
    levels = {i["name"]: i["level"] for i in contract["roles"]["inputs"]}
    assert levels.keys() == {i.name for i in original.graph.input}
    assert {"request", "mixed"} & set(levels.values())
    assert set(contract["rules"]) == {r.name for r in optimised(name).report.rules}
    onnx.checker.check_model(made, full_check=True)


@pytest.mark.slow
def test_most_nodes_stay() -> None:
    """Nodes that compute keep their names and outputs wherever nothing had to change: the diff is small.

    Moves and constants do not count: a rewrite that needs fewer of the original's is no larger diff.
    """

    def computes(node: onnx.NodeProto) -> bool:
        return node.op_type != "Constant" and Trait.MOVEMENT not in traits(node)

    share = []
    for name in QUICK:
        original, made = onnx.load(FOLDER / name), optimised(name).model
        own = {(n.name, tuple(n.output)) for n in original.graph.node}
        share.append(np.mean([(n.name, tuple(n.output)) in own for n in made.graph.node if computes(n)]))
    assert np.median(share) > 1 / 3


def constants(graph: onnx.GraphProto) -> dict[str, tuple[Any, ...]]:
    """Type, shape and bytes of what a graph has as a constant, whether an initializer or a node."""
    tensors = {t.name: t for t in graph.initializer}
    tensors |= {n.output[0]: n.attribute[0].t for n in graph.node if n.op_type == "Constant"}
    arrays = {name: numpy_helper.to_array(t) for name, t in tensors.items()}
    return {name: (a.dtype, a.shape, a.tobytes()) for name, a in arrays.items()}


def renamed(original: onnx.GraphProto, made: onnx.GraphProto) -> tuple[list[str], list[str]]:
    """Values of `made` that the original computes, too: those that have another name there, and those that do not.

    Two nodes compute the same if they have the same operator, attributes and inputs; constants are the same if their
    bytes are.
    """

    def computes(node: onnx.NodeProto, names: dict[str, str]) -> tuple[Any, ...]:
        attributes = sorted(a.SerializeToString() for a in node.attribute)
        return node.op_type, node.domain, *(names.get(name, name) for name in node.input), *attributes

    known: dict[tuple[Any, ...], str] = {}
    for name, data in constants(original).items():
        known.setdefault(data, name)
    of_original = {name: known[data] for name, data in constants(original).items()}
    of_made = {name: known.get(data, name) for name, data in constants(made).items()}
    there: dict[tuple[Any, ...], list[list[str]]] = {}
    for node in (n for n in original.node if n.op_type != "Constant"):
        same = there.setdefault(computes(node, of_original), [list(node.output)])
        of_original |= zip(node.output, same[0], strict=False)
        same.append(list(node.output))
    other, kept = [], []
    for node in (n for n in made.node if n.op_type != "Constant"):
        if same := there.get(computes(node, of_made), []):
            of_made |= zip(node.output, same[0], strict=False)
            (kept if list(node.output) in same else other).append(node.output[0])
    return other, kept


@every_export
def test_what_is_computed_as_before_keeps_its_name(name: str) -> None:
    """Nothing that the original computes is written anew: a diff shows what changed, and nothing else."""
    other, _ = renamed(inlined_original(name).graph, optimised(name).model.graph)
    assert not other


@pytest.mark.parametrize("name", ["mmoe.torchscript.onnx", "din.torchscript.onnx"])
def test_a_value_with_another_name_is_found(name: str) -> None:
    """Each value that keeps its name, were it named otherwise, is told, and what is computed from it is followed."""
    original, made = inlined_original(name).graph, optimised(name).model
    _, kept = renamed(original, made.graph)
    assert kept
    for value in kept:
        changed = onnx.ModelProto.FromString(made.SerializeToString())
        for node in changed.graph.node:
            for names in (node.input, node.output):
                names[:] = ["another" if one == value else one for one in names]
        other, rest = renamed(original, changed.graph)
        assert other == ["another"]
        assert rest == [one for one in kept if one != value]


def adversarial(name: str, rows: Feed, kind: str) -> Feed:
    """Candidates that are all equal, or wildly different."""
    out = dict(rows)
    for role in rewrite(name).study.declared:
        data = rows[role.name].copy()
        if role.role.level == "request":
            continue
        own = list(role.candidate_positions) if role.role.level == "mixed" else slice(None)
        part = data[:, own] if role.role.level == "mixed" else data
        if kind == "equal":
            part = np.repeat(part[:1], len(part), 0)
        else:
            down = (-1, *(1,) * (part.ndim - 1))
            ends = np.where(np.arange(len(part)).reshape(down) % 2, part.max(0), part.min(0))
            factors = np.array([1e3, -1e3, 1e-3, 0, 30])[: len(part)].reshape(down)
            part = np.where(part == np.round(part), ends, part * factors).astype(data.dtype)  # ids stay ids
        if role.role.level == "mixed":
            data[:, own] = part
        else:
            data = part
        out[role.name] = data
    return out


@pytest.mark.slow
@every_export
def test_claims_have_a_witness(name: str) -> None:
    """What is said not to vary is seen not to vary, in the original."""
    made = rewrite(name)
    setting = Setting({**dict.fromkeys(made.study.symbols, 7), "N": 5}, 0)
    for seed in (1, 2):
        rows = feed(name, 5, seed)
        claims = witness(made, rows, setting, 1e-5)
        assert claims
    for kind in ("equal", "different"):
        witness(made, adversarial(name, rows, kind), setting, 1e-5)


def test_witness_can_fail() -> None:
    """A request-level input that does differ between rows is noticed."""
    name = "wide_deep.torchscript.onnx"
    rows = feed(name, 5, 1)
    for role in rewrite(name).study.declared:
        if role.role.level == "request":
            rows[role.name] = rows[role.name].copy()
            rows[role.name][2] = rows[role.name][2] * 0
    with pytest.raises(AssertionError, match="differs by"):
        witness(rewrite(name), rows, Setting({"N": 5}, 0), 1e-5)


def many_features(count: int) -> Graph:
    """Lookups of `count` single-id features, side by side, into a small tower."""
    g = Graph()
    parts = []
    for k in range(count):
        ids = g.input(f"{'user' if k % 2 else 'item'}_{k}", ["N"], onnx.TensorProto.INT64)
        x = g.op("Gather", g.const(np.arange(20).reshape(10, 2) - k % 7), ids, axis=0)
        x = g.on_axes("Unsqueeze", x, [1])
        x = g.op("Mul", x, g.const(np.float32(2)))
        x = g.op("Relu", x)
        x = g.op("Identity", x)
        x = g.op("Neg", x)
        x = g.op("Reshape", x, g.ints(-1, 2))
        parts.append(g.op("Abs", x))
    x = g.op("Concat", *parts, axis=1)
    x = g.op("Relu", g.op("MatMul", x, g.const(np.ones((2 * count, 8)))))
    g.output(g.op("MatMul", x, g.const(np.ones((8, 1)))), ["N", 1])
    return g


def deep_chain(count: int) -> Graph:
    """Elementwise nodes, one behind the other, ahead of a layer."""
    g = Graph()
    u, c = g.input("user_x", ["N", 4]), g.input("item_x", ["N", 4])
    for k in range(count):
        u = g.op(("Relu", "Neg", "Abs", "Tanh")[k % 4], u)
    x = g.op("Concat", u, c, axis=1)
    for k in range(count // 10):
        x = g.op(("Relu", "Neg")[k % 2], x)
    g.output(g.op("MatMul", x, g.const(np.ones((8, 1)))), ["N", 1])
    return g


@pytest.mark.slow
@pytest.mark.parametrize("graph", [lambda: many_features(1250), lambda: deep_chain(5000)], ids=["wide", "deep"])
def test_large_graphs(graph: Any) -> None:
    """Thousands of nodes are optimised, with the same scores."""
    model = graph().model()
    result = onnxrank.optimize(model, request=["user_*"], check=False)
    assert result.report.macs_after < result.report.macs_before
    rng = np.random.default_rng(0)
    old, new = {}, {}
    for i in model.graph.input:
        kind = np.float32 if i.type.tensor_type.elem_type == FLOAT else np.int64
        shape = [3, *(d.dim_value for d in i.type.tensor_type.shape.dim[1:])]
        data = rng.integers(0, 10, shape).astype(kind)
        request = i.name.startswith("user")
        old[i.name] = np.repeat(data[:1], 3, 0) if request else data
        new[i.name] = data[:1] if request else data
    close(run(model, old), run(result.model, new))
