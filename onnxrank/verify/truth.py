"""A model run in float64: by onnxruntime, and where it lacks a kernel by ONNX's reference evaluator for that part."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from onnxrank import facts, fused, runtime
from onnxrank.errors import ModelError
from onnxrank.graphs import claimed, names_in, reads, subgraphs, versions
from onnxrank.model import tensor_data, tensors
from onnxrank.operators import domain_of, element_type
from onnxrank.study import element_types
from onnxrank.verify import compare

_LACKS = re.compile(r"(?:Could not find an implementation for|Failed to find kernel for) (\w+)\(")
_REFUSES = re.compile(r"[Tt]ype 'tensor\(double\)' of input parameter .*? of operator \((\w+)\)")
_FAILS = re.compile(r"while running (\w+) node\..*(?:not support|[Nn]ot[ _]?[Ii]mplemented|NOT_IMPLEMENTED)")
_MOST_BYTES = 1 << 30
_NARROWER = runtime.FLOATS - {TensorProto.DOUBLE}
INEXACT = ("Sigmoid", "Sin", "Cos", "Tan", "Sinh", "Cosh", "Asin", "Acos", "Atan", "Asinh", "Acosh", "Atanh")
"""Operators whose float64 kernels in onnxruntime are approximations: Sigmoid is off by 3e-10 of its value far out."""


class Truth:
    """A model in float64.

    Attributes:
        how: `onnxruntime`, `parts` (some operators by the reference evaluator) or `reference` (all of them).

    Args:
        model: The model, functions inlined.
        folder: Where its external data lies; it is loaded.
        avoided: Operators that the reference evaluator runs in any case.

    Raises:
        ModelError: It is too large, or cannot be raised.
    """

    def __init__(
        self, model: ModelProto, folder: str | os.PathLike[str] | None = None, avoided: Iterable[str] = ()
    ) -> None:
        if 2 * _floats(model) > _MOST_BYTES:
            raise ModelError("the weights are too large to be raised to float64 in memory")
        self._model = raised(_in_steps(model, folder), folder)
        self._folder = folder
        self._parts: list[_Part] = []
        self._lacking = {n.op_type for outer in model.graph.node for n in _with_inner(outer)} & set(avoided)
        self.how = "onnxruntime"
        self._divide()

    def _divide(self) -> None:
        """Puts the model into as few parts as can be; every failure to load one names an operator to leave out."""
        for _ in range(32):
            try:
                self._parts = _parts(self._model, self._lacking, self._folder)
                self.how = "parts" if self._lacking else "onnxruntime"
                return
            except ModelError as e:
                found = _LACKS.search(str(e)) or _REFUSES.search(str(e))
                if found is None or found[1] in self._lacking:
                    break
                self._lacking.add(found[1])
        self._all_by_reference()

    def _all_by_reference(self) -> None:
        self.how = "reference"
        self._parts = [_Part(self._model, None)]

    def run(self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
        """Runs on feeds of any float type.

        Args:
            feeds: Inputs by name.
            outputs: Names of outputs; None for all.

        Raises:
            ModelError: Neither runtime runs it.
        """
        if outputs is None:
            outputs = [o.name for o in self._model.graph.output]
        wide = {k: v.astype(np.float64) if runtime.is_float(v) else v for k, v in feeds.items()}
        while self.how != "reference":
            try:
                return self._through(wide, outputs)
            except ModelError as e:
                # Some kernels say only when they run that they have no float64.
                found = _FAILS.search(str(e))
                if found is None or found[1] in self._lacking:
                    raise
                self._lacking.add(found[1])
                self._divide()
        return self._through(wide, outputs)

    def _through(self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> dict[str, NDArray[Any]]:
        known = dict(feeds)
        for part in self._parts:
            known |= part.run(known)
        missing = [o for o in outputs if o not in known]
        if missing:
            raise ModelError(f"the model has no output {missing[0]!r}")
        return {o: known[o] for o in outputs}


def raised(model: ModelProto, folder: str | os.PathLike[str] | None = None) -> ModelProto:
    """A copy of a model that computes in float64.

    What an operator gives as float32 whatever it takes, such as Scaler, is cast behind it: else it would be rounded or
    not by whether a Cast that changes nothing follows.

    Args:
        model: The model, functions inlined.
        folder: Where its external data lies; it is loaded.
    """
    out = runtime.retype(model, TensorProto.DOUBLE, folder)
    version = versions(out)

    def casts(node: NodeProto) -> Iterator[NodeProto]:
        for k, name in enumerate(node.output):
            if name and element_type(node, k, version.get(domain_of(node), 1), {}) in _NARROWER:
                node.output[k] = claimed(f"{name}/own", taken)
                yield helper.make_node("Cast", [node.output[k]], [name], to=TensorProto.DOUBLE)

    def graph(g: GraphProto) -> None:
        nodes = [n for node in g.node for n in (node, *casts(node))]
        del g.node[:]
        g.node.extend(nodes)
        for node in nodes:
            for inner in subgraphs(node):
                graph(inner)

    taken = names_in(out.graph)
    graph(out.graph)
    return out


def _in_steps(model: ModelProto, folder: str | os.PathLike[str] | None) -> ModelProto:
    """A model with the operators of ONNX Runtime's optimiser, of which there are no float64 kernels, as their steps."""
    saved = {n.output[0] for n in model.graph.node if n.domain == "com.microsoft" and n.op_type in fused.SAVED}
    if not saved:
        return model
    given = {
        i.name: tuple((d.dim_value, ()) if d.dim_value else (1, (f"{i.name}.{k}",)) for k, d in enumerate(dims))
        for i in model.graph.input
        for dims in [i.type.tensor_type.shape.dim]
    }
    shapes = facts.derive(model, given, folder).extents
    stored = {t.name: tuple((n, ()) for n in t.dims) for t in model.graph.initializer}
    try:
        return fused.written_out(model, {**stored, **given, **shapes}, element_types(model), {}, saved)
    except fused.Unsupported:
        return model


class _Part:
    """Some nodes of a model, as a model of their own; without a session the reference evaluator runs it."""

    def __init__(self, model: ModelProto, session: Any | None) -> None:
        self.model = model
        self.session = session
        self.inputs = [i.name for i in model.graph.input]
        self.outputs = [o.name for o in model.graph.output]
        self._evaluator: Any = None

    def run(self, known: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Outputs by name."""
        feeds = {k: known[k] for k in self.inputs if k in known}
        if self.session is not None:
            return runtime.run(self.session, feeds, self.outputs)
        try:
            if self._evaluator is None:
                from onnxrank.verify import reference

                self._evaluator = reference.evaluator(self.model)
            with np.errstate(all="ignore"):
                made = self._evaluator.run(self.outputs, feeds)
            return dict(zip(self.outputs, made, strict=True))
        except Exception as e:
            raise ModelError(f"the model cannot be run in float64: {runtime.first_line(e)}") from e


def rounded(model: ModelProto, to: int, folder: str | os.PathLike[str] | None = None) -> ModelProto:
    """A copy of a model with every float weight rounded to a narrower type, but kept in its own.

    What the type cannot hold becomes the largest number that it can, as converters do.

    Args:
        model: The model.
        to: ONNX element type.
        folder: Where its external data lies.
    """
    out = ModelProto()
    out.CopyFrom(model)
    kind = helper.tensor_dtype_to_np_dtype(to)
    most = float(ml_dtypes.finfo(kind).max)  # type: ignore[no-untyped-call]
    for t in tensors(out):
        if t.data_type in runtime.FLOATS:
            data = tensor_data(t, folder)
            wide = np.where(np.isfinite(data), np.clip(data.astype(np.float64), -most, most), data.astype(np.float64))
            t.CopyFrom(numpy_helper.from_array(wide.astype(kind).astype(data.dtype), t.name))
    return out


def nudged(model: ModelProto, seed: int, exact: bool, folder: str | os.PathLike[str] | None = None) -> ModelProto:
    """A copy of a model whose float weights are moved by one unit in the last place, up or down at random.

    Single numbers stay: they are exponents, bounds and small terms rather than weights.

    Args:
        model: The model, functions inlined.
        seed: For up or down.
        exact: Whether in the last place of a float64, which the model is raised to.
        folder: Where its external data lies; it is loaded.
    """
    out = ModelProto()
    out.CopyFrom(raised(model, folder) if exact else model)
    rng = np.random.default_rng(seed)
    for t in tensors(out):
        if t.data_type in runtime.FLOATS and t.data_type != TensorProto.BFLOAT16 and np.prod(t.dims) > 1:
            data = numpy_helper.to_array(t, "" if folder is None else os.fspath(folder))
            t.CopyFrom(numpy_helper.from_array(compare.nudged(data, rng), t.name))
    return out


def _floats(model: ModelProto) -> int:
    """Bytes of float initializers as float32."""
    return sum(
        4 * int(np.prod(t.dims, dtype=np.float64)) for t in model.graph.initializer if t.data_type in runtime.FLOATS
    )


def _parts(model: ModelProto, lacking: set[str], folder: str | os.PathLike[str] | None) -> list[_Part]:
    """Divides a model at the operators that onnxruntime lacks.

    Raises:
        ModelError: onnxruntime does not take a part; the message is its own.
    """
    if not lacking:
        return [_Part(model, runtime.session(model, folder, reuse=False))]
    stage: dict[str, int] = {}
    groups: dict[int, list[NodeProto]] = {}
    for node in model.graph.node:
        # Even stages are onnxruntime's, odd ones the reference evaluator's.
        odd = any(n.op_type in lacking for n in _with_inner(node))
        at = max((stage.get(i, 0) for i in reads(node)), default=0)
        at += int((at % 2 == 1) != odd)
        for o in node.output:
            stage[o] = at
        groups.setdefault(at, []).append(node)
    out = []
    wanted = {o.name for o in model.graph.output}
    declared = {i.name: i for i in model.graph.input}
    # Operators whose results are float32 by definition compute in float64 here, too.
    types = {k: TensorProto.DOUBLE if t in runtime.FLOATS else t for k, t in element_types(model).items()}
    for at in sorted(groups):
        nodes = groups[at]
        read = {i for n in nodes for i in reads(n)}
        made = {o for n in nodes for o in n.output if o}
        later = {i for k, g in groups.items() if k != at for n in g for i in reads(n)}
        initial = [t for t in model.graph.initializer if t.name in read]
        given = sorted(read - made - {t.name for t in initial} - {""})
        part = ModelProto()
        part.CopyFrom(model)
        for field in ("node", "initializer", "input", "output", "value_info", "sparse_initializer"):
            part.graph.ClearField(field)
        part.graph.node.extend(nodes)
        part.graph.initializer.extend(initial)
        for name in given:
            if name in declared:
                part.graph.input.append(declared[name])
            else:
                part.graph.input.append(helper.make_tensor_value_info(name, types.get(name, TensorProto.DOUBLE), None))
        kept = sorted(made & (later | wanted))
        part.graph.output.extend(helper.make_empty_tensor_value_info(n) for n in kept)
        out.append(_Part(part, None if at % 2 else runtime.session(part, folder, reuse=False)))
    return out


def _with_inner(node: NodeProto) -> list[NodeProto]:
    return [node, *(m for g in subgraphs(node) for n in g.node for m in _with_inner(n))]
