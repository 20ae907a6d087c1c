"""Writes a failing case for somebody else: the inputs, both models cut down to what differs, and a script.

The models are cut at tensors that both compute under one name: those that agree become inputs, the first that does not
is the output. Nothing of onnxrank is needed to run what is written.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper, numpy_helper

from onnxrank.errors import EnvironmentProblem, ModelError, UsageError
from onnxrank.graphs import captured_by
from onnxrank.model import tensor_data, tensors
from onnxrank.verify import compare, judge
from onnxrank.verify.bisect import alike, common_tensors, exposed, worst_point

if TYPE_CHECKING:
    from onnxrank.verify.engine import Engine
    from onnxrank.verify.points import Point
    from onnxrank.verify.report import Case

_AGREES = 1e-5
"""Share of a tensor's scale within which float32 results count as the same when models are cut."""

_SCRIPT = '''"""Runs both models on the recorded inputs and prints where they differ. Needs numpy, onnx and onnxruntime.

{about}
"""

import pathlib
import sys

import numpy as np
import onnx
import onnx.reference
import onnxruntime

FOLDER = pathlib.Path(__file__).resolve().parent
OUTPUTS = {outputs!r}
LEVEL = onnxruntime.GraphOptimizationLevel.{level}
ALLOWED = {allowed!r}
WHOLE = {whole!r}


def run(name):
    path = str(FOLDER / (name + ".onnx"))
    onnx.checker.check_model(path)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = LEVEL
    options.intra_op_num_threads = 1
    feeds = dict(np.load(FOLDER / (name + ".npz")))
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return session.run(OUTPUTS, feeds)
    except Exception as error:
        print("onnxruntime does not run", name, "so ONNX's reference evaluator does:", str(error).splitlines()[0])
    return onnx.reference.ReferenceEvaluator(path).run(OUTPUTS, feeds)


failed = False
for name, expected, found in zip(OUTPUTS, run("original"), run("optimized")):
    print(name, "original", expected.dtype, list(expected.shape), "optimized", found.dtype, list(found.shape))
    if expected.shape != found.shape:
        shapes = (expected.shape, found.shape)
        try:
            expected, found = np.broadcast_arrays(expected, found)
        except ValueError:
            pass
        # Inside the models one row may stand for several equal ones.
        if WHOLE or expected.shape != found.shape or expected.shape not in shapes:
            print("  the shapes differ")
            failed = True
            continue
    if expected.dtype.kind not in "fiub":
        failed = failed or not np.array_equal(expected, found)
        continue
    a, b = expected.reshape(-1).astype(np.float64), found.reshape(-1).astype(np.float64)
    with np.errstate(invalid="ignore"):
        gap = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0, np.abs(a - b))
    gap = np.where(np.isnan(gap), np.inf, gap)
    if not gap.size:
        continue
    worst = int(gap.argmax())
    at = tuple(int(k) for k in np.unravel_index(worst, expected.shape))
    print("  largest difference", gap[worst], "at", at, ":", b[worst], "instead of", a[worst], "; allowed", ALLOWED)
    failed = failed or gap[worst] > ALLOWED
print("the models differ" if failed else "the models agree")
sys.exit(1 if failed else 0)
'''


def save_failing(engine: Engine, folder: str | os.PathLike[str]) -> str | None:
    """Writes the failing case with the fewest candidates.

    Args:
        engine: A failed run.
        folder: Where to; made if it does not exist.

    Returns:
        The folder, or None where no failing comparison can be written down.

    Raises:
        UsageError: The folder cannot be written to.
        EnvironmentProblem: There is no space.
    """
    found = worst_point(engine)
    if found is None:
        return None
    case, point = found
    cut = _cut(engine, case, point)
    parts = cut or _whole(engine, case, point)
    if parts is None:
        return None
    where = Path(folder)
    level = "ORT_ENABLE_ALL" if case.level == "all" else "ORT_DISABLE_ALL"
    place = f" of output {case.output!r}" if case.output else ""
    about = (
        f"verdict {case.verdict}{place}: {case.error:.6g} where {case.allowed:.6g} is allowed;\n"
        f"{case.inputs} inputs, {case.candidates} candidates, seed {case.seed}, optimisations {case.level}"
    ).replace("\\", "/").replace('"""', "'''")  # fmt: skip
    outputs, allowed = parts[0].outputs, parts[0].allowed
    script = _SCRIPT.format(about=about, outputs=outputs, level=level, allowed=allowed, whole=cut is None)
    try:
        where.mkdir(exist_ok=True)
        for name, part in zip(("original", "optimized"), parts, strict=True):
            (where / f"{name}.onnx").write_bytes(part.model.SerializeToString(deterministic=True))
            np.savez_compressed(where / f"{name}.npz", **part.feed)  # type: ignore[arg-type]
        (where / "repro.py").write_text(script, encoding="utf-8")
    except PermissionError as e:
        raise UsageError(f"The failing case cannot be written to {folder}: {e.strerror}.") from e
    except OSError as e:
        raise EnvironmentProblem(f"The failing case cannot be written to {folder}: {e.strerror or e}.") from e
    return os.fspath(folder)


class _Part:
    """One model of a failing case, with its inputs."""

    def __init__(
        self, model: ModelProto, feed: Mapping[str, NDArray[Any]], outputs: Sequence[str], allowed: float
    ) -> None:
        self.model = model
        self.outputs = list(outputs)
        self.allowed = allowed
        needed = {i.name for i in model.graph.input}
        self.feed = {k: v for k, v in feed.items() if k in needed}


def _models(engine: Engine, case: Case) -> list[ModelProto]:
    """Both models as the failing comparison ran them, functions inlined: in float64 for algebra."""
    out = []
    for side in engine.sides:
        if case.verdict == "algebra":
            out.append(ModelProto.FromString(side.call("raised", key="model")))
        else:
            out.append(ModelProto.FromString(side.call("inlined", key="model")))
    return out


def _wide(feed: Mapping[str, Any], case: Case) -> dict[str, Any]:
    """Inputs in float64 for algebra."""
    if case.verdict != "algebra":
        return dict(feed)
    return {k: v.astype(np.float64) if v.dtype.kind == "f" else v for k, v in feed.items()}


def _whole(engine: Engine, case: Case, point: Point) -> list[_Part] | None:
    """Both models as they are, external data included."""
    try:
        models = _models(engine, case)
    except ModelError:
        return None
    for side, model in zip(engine.sides, models, strict=True):
        _load(model, side.loaded.folder)
    feeds = [_wide(f, case) for f in (point.feed, point.bound)]
    return [_Part(m, f, [case.output], case.allowed) for m, f in zip(models, feeds, strict=True)]


def _load(model: ModelProto, folder: Path | None) -> None:
    """Puts external data into the model."""
    for t in tensors(model):
        if t.external_data and folder is not None:
            t.CopyFrom(numpy_helper.from_array(tensor_data(t, folder), t.name))


def _cut(engine: Engine, case: Case, point: Point) -> list[_Part] | None:
    """Both models from the last tensors that agree to the first that does not; None if they cannot be cut."""
    exact = case.verdict == "algebra"
    try:
        models = _models(engine, case)
        names = common_tensors(engine)
        values = exposed(engine, point, names, "double" if exact else engine.precision, "disabled")
    except (ModelError, KeyError):
        return None
    tolerance = judge.ALGEBRA if exact else _AGREES
    same = {n for n in names if n in values[0] and n in values[1] and alike(values[0][n], values[1][n], tolerance)}
    differing = [n for n in names if n in values[0] and n in values[1] and n not in same]
    if not differing:
        return None
    goal = differing[0]
    parts = []
    scale = max(compare.scale(values[0][goal]), 1e-30)
    for side, model, feed, seen in zip(engine.sides, models, (point.feed, point.bound), values, strict=True):
        given = {**seen, **_wide(feed, case)}
        part = subgraph(model, same, goal, given)
        if part is None:
            return None
        _load(part, side.loaded.folder)
        parts.append(_Part(part, given, [goal], tolerance * scale))
    return parts


def subgraph(model: ModelProto, known: set[str], goal: str, values: Mapping[str, NDArray[Any]]) -> ModelProto | None:
    """The part of a model that computes one tensor from known ones.

    Args:
        model: The model.
        known: Tensors whose values are given.
        goal: The tensor.
        values: Values of the known tensors and of the inputs, for their types.

    Returns:
        The part; None where it would need a tensor whose value is not there.
    """
    graph = model.graph
    producer = {o: n for n in graph.node for o in n.output if o}
    kept: list[NodeProto] = []
    seen: set[str] = set()
    inputs: list[str] = []
    stack = [goal]
    initial = {t.name for t in graph.initializer} | {t.values.name for t in graph.sparse_initializer}
    while stack:
        name = stack.pop()
        if name in seen or not name:
            continue
        seen.add(name)
        if name in initial:
            continue
        if name in producer and (name == goal or name not in known or name not in values):
            node = producer[name]
            kept.append(node)
            stack += [*node.input, *captured_by(node)]
        elif name in values:
            inputs.append(name)
        elif name not in producer:
            return None
    out = ModelProto()
    out.CopyFrom(model)
    for field in (
        "node",
        "input",
        "output",
        "value_info",
        "initializer",
        "sparse_initializer",
        "quantization_annotation",
    ):
        out.graph.ClearField(field)
    del out.metadata_props[:], out.functions[:]
    order = {id(n): k for k, n in enumerate(graph.node)}
    unique = sorted({id(n): n for n in kept}.values(), key=lambda n: order[id(n)])
    out.graph.node.extend(unique)
    out.graph.initializer.extend(t for t in graph.initializer if t.name in seen)
    out.graph.sparse_initializer.extend(t for t in graph.sparse_initializer if t.values.name in seen)
    declared = {i.name: i for i in graph.input}
    for name in sorted(inputs):
        if name in declared:
            out.graph.input.append(declared[name])
            continue
        out.graph.input.append(helper.make_tensor_value_info(name, _kind(values[name]), values[name].shape))
    made = values[goal]
    out.graph.output.append(helper.make_tensor_value_info(goal, _kind(made), made.shape))
    return out


def _kind(data: NDArray[Any]) -> int:
    return int(helper.np_dtype_to_tensor_dtype(data.dtype))
