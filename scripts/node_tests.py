"""ONNX's own node tests as ranking models: optimised without a check, and held against onnxruntime.

Every test whose inputs can have a leading dimension of candidates becomes several models: with its first input
request-level and the others candidate-level, the other way round, and with each input put together from a request-level
and a candidate-level part, along its last axis and along its second, the others being constants (for the largest one
candidate-level, too). In one more model all inputs are request-level, and an input beside them tells how many
candidates there are: whether the operator is made once there is told, and which ones are not. What onnxruntime does not
run itself is skipped.

    python scripts/node_tests.py [--only PATTERN] [--ways once] [--show]
"""

from __future__ import annotations

import argparse
import fnmatch
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import onnx
from onnx import ModelProto, helper, numpy_helper

import onnxrank
from onnxrank import cost, runtime
from onnxrank.errors import ModelError, OnnxrankError
from onnxrank.passes import choosing
from onnxrank.values import is_candidate_symbol
from onnxrank.workers import RemoteSession

COUNTS = (1, 2, 7, 64)
ONCE, ITEM = "once", "beside/item"
_ITEM_ROW = np.ones((1, 1), np.float32)
OPSET = 26
"""The latest that onnxruntime knows: what the operators of a later one do the same way there is run in this one."""
_KINDS = "fiub"
Feed = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """A ranking model made of a node test.

    Attributes:
        name: Name of the test and of the way.
        model: The model; every input has a leading dimension of candidates.
        rows: One row per input, to be repeated or varied.
        request: Its request-level inputs.
    """

    name: str
    model: ModelProto
    rows: dict[str, np.ndarray]
    request: tuple[str, ...]

    def feeds(self, count: int) -> Feed:
        """Inputs for so many candidates: request-level rows are equal."""
        rng = np.random.default_rng(count)
        out = {}
        for name, row in self.rows.items():
            data = np.repeat(row, count, 0)
            if name not in self.request:
                for k in range(1, count):
                    data[k] = rng.permutation(row.reshape(-1)).reshape(row.shape[1:])
            out[name] = data
        return out


def tests() -> Iterator[tuple[str, ModelProto, list[np.ndarray]]]:
    """ONNX's node tests with one model and the inputs of their first data set."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = collect_testcases(None)
    for case in found:
        if case.model is None or not case.data_sets:
            continue
        inputs, _ = case.data_sets[0]
        yield case.name, case.model, list(inputs)


def cases(name: str, model: ModelProto, inputs: Sequence[Any]) -> Iterator[Case]:
    """The ranking models that a test makes."""
    given = [i.name for i in model.graph.input]
    if len(given) != len(inputs) or any(not isinstance(x, np.ndarray) or x.dtype.kind not in _KINDS for x in inputs):
        return
    batch = {k for k, x in enumerate(inputs) if x.ndim >= 1 and x.shape[0] >= 1 and x.size and x.dtype.kind == "f"}
    if not batch:
        return
    rows = {given[k]: np.ascontiguousarray(inputs[k][:1]) for k in batch}
    fixed = {given[k]: inputs[k] for k in range(len(inputs)) if k not in batch}
    ordered = [given[k] for k in sorted(batch)]
    yield Case(f"{name}/{ONCE}", _beside(_batched(model, rows, fixed)), {**rows, ITEM: _ITEM_ROW}, tuple(ordered))
    if len(ordered) > 1:
        yield Case(f"{name}/first", _batched(model, rows, fixed), rows, (ordered[0],))
        yield Case(f"{name}/others", _batched(model, rows, fixed), rows, tuple(ordered[1:]))
    largest = max(batch, key=lambda k: inputs[k].size)
    for k in sorted(batch):
        row, target = rows[given[k]], given[k]
        others = {n: r for n, r in rows.items() if n != target}
        constants = {given[j]: x for j, x in enumerate(inputs) if j != k}
        for axis, way in ((row.ndim - 1, "joined"), (1, "front"))[: 1 if row.ndim == 2 else 2]:
            if row.ndim < 2 or row.shape[axis] < 2:
                continue
            parts = dict(zip(("user", "item"), np.array_split(row, [row.shape[axis] // 2], axis), strict=True))
            if others and k == largest:
                joined = {**others, **parts}
                yield Case(f"{name}/{way}", _batched(model, joined, fixed, target, axis), joined, ("user",))
            yield Case(f"{name}/{way}/{target}", _batched(model, parts, constants, target, axis), parts, ("user",))


def _batched(model: ModelProto, rows: Feed, fixed: Feed, join: str | None = None, axis: int = -1) -> ModelProto:
    """The test's model with a leading dimension of candidates; other inputs become initializers."""
    out = ModelProto()
    out.CopyFrom(model)
    graph = out.graph
    del graph.input[:], graph.value_info[:]
    for name, row in rows.items():
        kind = helper.np_dtype_to_tensor_dtype(row.dtype)
        graph.input.append(helper.make_tensor_value_info(name, kind, ["N", *row.shape[1:]]))
    graph.initializer.extend(numpy_helper.from_array(x, name) for name, x in fixed.items())
    if join is not None:
        graph.node.insert(0, helper.make_node("Concat", ["user", "item"], [join], axis=axis))
    for o in graph.output:
        for d in o.type.tensor_type.shape.dim:
            d.Clear()
    out.ir_version = min(out.ir_version, 10)
    for o in out.opset_import:
        if o.domain == "":
            o.version = min(o.version, OPSET)
    return out


def _beside(model: ModelProto) -> ModelProto:
    """The model with an input and an output of candidates beside it."""
    graph, result = model.graph, f"{ITEM}/relu"
    graph.node.append(helper.make_node("Relu", [ITEM], [result]))
    infos = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", 1]) for name in (ITEM, result)]
    graph.input.append(infos[0])
    graph.output.append(infos[1])
    return model


def _repeated(result: onnxrank.Result) -> list[str]:
    """What a model whose inputs are the request's makes for every candidate, with the reasons."""
    assert result.form is not None
    rw, graph = result.form.rewrite.rw, result.form.study.model.graph
    made = {o.name: rw.values[o.name] for o in graph.output if not o.name.startswith(ITEM) and o.name in rw.values}
    left = [n for n, v in made.items() if any(map(is_candidate_symbol, rw.present(rw.settle(v))))]
    return [f"{name} ({'; '.join(r.reason for r in result.report.refusals)})" for name in left]


@contextmanager
def eagerly() -> Iterator[None]:
    """Where only products cost time and no loss is too great: these models are too small for a saving."""
    free = cost.Target(launch=0.0, byte=1e-16, mac=1 / 25e9)
    with mock.patch.object(cost, "CPU", free), mock.patch.object(choosing, "LEAST_GAIN", 0.0):
        yield


def run(case: Case) -> tuple[str, str]:
    """Optimises one model: what became of it, and what there is to say."""
    try:
        with RemoteSession(case.model) as before:
            expected = {n: before.run(case.feeds(n)) for n in COUNTS}
    except ModelError as e:
        return "not run by onnxruntime", str(e)
    try:
        with eagerly():
            result = onnxrank.optimize(case.model, request=list(case.request), check=False)
    except OnnxrankError as e:
        return "refused", f"{type(e).__name__}: {e}"
    except Exception:
        return "error", traceback.format_exc(limit=-3)
    once = case.name.endswith(f"/{ONCE}")
    if not result.changed:
        return "for each" if once else "left alone", "; ".join(f"{r.rule}: {r.reason}" for r in result.report.refusals)
    try:
        with RemoteSession(result.model) as after:
            for n, outputs in expected.items():
                feed = case.feeds(n)
                found = after.run({k: v[:1] if k in case.request else v for k, v in feed.items()})
                for name, a in outputs.items():
                    if not _alike(a, found[name]):
                        return "wrong", f"{name} at N = {n}"
    except ModelError as e:
        return "wrong", f"the result does not run: {e}"
    repeated = _repeated(result) if once else []
    if repeated:
        return "for each", ", ".join(repeated)
    return "optimised", ", ".join(f"{r.sites} x {r.name}" for r in result.report.rules)


def _alike(a: np.ndarray, b: np.ndarray) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not runtime.is_float(a):
        return bool(np.array_equal(a, b))
    tolerance = 2e-2 if a.dtype.itemsize == 2 else 1e-4
    with np.errstate(invalid="ignore"):
        scale = np.nanmax(np.abs(np.where(np.isfinite(a), a, 0)), initial=1e-6)
    return bool(np.allclose(a.astype(np.float64), b.astype(np.float64), tolerance, tolerance * scale, equal_nan=True))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="pattern on the names of tests")
    parser.add_argument("--ways", default="*", help="pattern on the ways in which models are made of a test")
    parser.add_argument("--show", action="store_true", help="print every model, not only what fails")
    options = parser.parse_args(arguments)
    counts: Counter[str] = Counter()
    for name, model, inputs in tests():
        if not fnmatch.fnmatch(name, options.only):
            continue
        for case in cases(name, model, inputs):
            if not fnmatch.fnmatch(case.name.removeprefix(f"{name}/"), options.ways):
                continue
            try:
                onnx.checker.check_model(case.model)
            except onnx.checker.ValidationError:
                continue
            what, why = run(case)
            counts[what] += 1
            if options.show or what in ("wrong", "error", "refused", "for each"):
                print(f"{what:12} {case.name}: {why}", flush=True)
    print(f"{sum(counts.values())} models: " + ", ".join(f"{n} {what}" for what, n in counts.most_common()))
    return int(bool(counts["wrong"] or counts["error"]))


if __name__ == "__main__":
    sys.exit(main())
