"""Models as text: a line per node, weights by their shapes, names that do not change with those of the code.

What is printed is onnx's own text form, so that it parses again. A weight that is declared (`<float[8,4] W>`) and made
by nobody gets small whole numbers, positive ones if it is called `var`; small tensors of integers, and single numbers,
are written out.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

import onnxrank
from onnxrank import cost, lookups
from onnxrank.passes import choosing

OPSET = 17
ARROW = "-->"
_WIDTH = 76
_REQUEST = ("user", "history", "context")
_FLOATS = (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16)
_WRITTEN = 16
"""Entries of a tensor of integers that are written out."""


@dataclass
class Case:
    """A model before and after.

    Attributes:
        title: What it shows.
        before: The model as text.
        after: What became of it.
    """

    title: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"# {self.title}\n\n{self.before}\n\n{ARROW}\n\n{self.after}\n"


def read(path: Path) -> list[Case]:
    """The cases of a file."""
    out = []
    for part in ("\n" + path.read_text(encoding="utf-8")).split("\n# ")[1:]:
        title, _, rest = part.partition("\n")
        before, _, after = rest.partition(ARROW)
        out.append(Case(title.strip(), before.strip(), after.strip()))
    return out


def write(path: Path, cases: Iterable[Case]) -> None:
    path.write_text("\n".join(map(str, cases)), encoding="utf-8")


def parse(text: str, opset: int = OPSET) -> ModelProto:
    """A model from text, with data for the weights that are declared only."""
    bare = "\n".join(line.partition("#")[0] for line in text.splitlines())
    head = f'<ir_version: 8, opset_import: ["" : {opset}, "com.microsoft" : 1]>'
    model = onnx.parser.parse_model(f"{head} ranker {bare}")
    graph = model.graph
    made = {o for n in graph.node for o in n.output} | {t.name for t in graph.initializer}
    for info in graph.value_info:
        if info.name not in made:
            shape = [d.dim_value for d in info.type.tensor_type.shape.dim]
            dtype = helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
            least = 1 if info.name == "var" else -2
            data = np.random.default_rng(zlib.crc32(info.name.encode())).integers(least, 3, shape)
            graph.initializer.append(numpy_helper.from_array(data.astype(dtype), info.name))
    del graph.value_info[:]
    if not any(n.domain for n in graph.node):
        del model.opset_import[1:]
    onnx.checker.check_model(model)
    return model


def request_level(model: ModelProto) -> list[str]:
    """Inputs whose names say that they are the same for all candidates."""
    return [i.name for i in model.graph.input if i.name.startswith(_REQUEST)]


def rewritten(model: ModelProto) -> onnxrank.Result:
    """The model optimised where multiply-adds and slow kernels are all that counts, however costs are calibrated."""
    rate = cost.Target(launch=0.0, byte=1e-16, mac=1 / 25e9, rates={"serial": cost.Rate(0.0, 1e-15)})
    joined = mock.patch.object(lookups, "pays", lambda before, after: True)
    with joined, mock.patch.object(cost, "CPU", rate), mock.patch.object(choosing, "LEAST_GAIN", 0.0):
        return onnxrank.optimize(model, request=request_level(model), check=False)


def names_of(model: ModelProto) -> set[str]:
    """Names of all tensors."""
    return {o for n in model.graph.node for o in n.output} | {t.name for t in model.graph.initializer}


def text_of(model: ModelProto, known: Iterable[str], once: bool = False) -> str:
    """A model as text.

    Args:
        model: The model.
        known: Names of tensors that are kept; inputs and outputs keep theirs anyway, others are numbered.
        once: Whether to mark the nodes that do not depend on inputs with a row per candidate.
    """
    graph = model.graph
    kept = {*known, *(v.name for v in (*graph.input, *graph.output))}
    names = {"": ""}
    counts = {"W": 0, "k": 0, "t": 0}

    def name_of(name: str, kind: str) -> str:
        if name not in names:
            if name in kept:
                names[name] = name
            else:
                counts[kind] += 1
                while f"{kind}{counts[kind]}" in kept:
                    counts[kind] += 1
                names[name] = f"{kind}{counts[kind]}"
        return names[name]

    weights = {t.name: t for t in graph.initializer}
    declared, lines = [], []
    later = {i.name for i in graph.input if _symbol(i)}
    for node in graph.node:
        for i in node.input:
            if i in weights and i not in names:
                kind = "W" if weights[i].data_type in _FLOATS else "k"
                declared.append(_weight(weights[i], name_of(i, kind)))
        later |= set(node.output) if later & set(node.input) else set()
        read = ", ".join(name_of(i, "t") for i in node.input)
        line = f"  {', '.join(name_of(o, 't') for o in node.output)} = {_operator(node)}({read})"
        lines.append(f"{line:<{_WIDTH - 7}} # once" if once and not later & set(node.output) else line)
    inputs, outputs = (", ".join(map(_value, vs)) for vs in (graph.input, graph.output))
    head = _wrapped(f"({inputs}) => ({outputs})")
    if declared:
        head += "\n" + _wrapped(f"<{', '.join(declared)}>")
    return "\n".join([head + " {", *lines, "}"])


def _wrapped(text: str) -> str:
    """On lines that are not too long, cut between tensors."""
    out = [""]
    for part in text.split(", "):
        joined = f"{out[-1]}, {part}" if out[-1] else part
        if len(joined) > _WIDTH and out[-1]:
            out[-1] += ","
            out.append(" " + part)
        else:
            out[-1] = joined
    return "\n".join(out)


def _symbol(info: onnx.ValueInfoProto) -> bool:
    return any(d.dim_param == "N" for d in info.type.tensor_type.shape.dim)


def _value(info: onnx.ValueInfoProto) -> str:
    kind = info.type.tensor_type
    return f"{_type(kind.elem_type, [d.dim_param or d.dim_value for d in kind.shape.dim])} {info.name}"


def _type(kind: int, shape: Iterable[int | str]) -> str:
    name = TensorProto.DataType.Name(kind).lower()
    return f"{name}[{dims}]" if (dims := ",".join(map(str, shape))) else name


def _weight(t: TensorProto, name: str) -> str:
    data = numpy_helper.to_array(t)
    kind = _type(t.data_type, t.dims)
    if data.size > (_WRITTEN if data.dtype.kind in "iub" else 1):
        return f"{kind} {name}"
    return f"{kind} {name} = {_entries(data)}"


def _entries(data: NDArray[Any]) -> str:
    found = data.reshape(-1).tolist()
    return "{" + ",".join(f"{x:.7g}" if isinstance(x, float) else str(int(x)) for x in found) + "}"


def _operator(node: NodeProto) -> str:
    attributes = sorted(node.attribute, key=lambda a: str(a.name))
    shown = ", ".join(f"{a.name}={_attribute(helper.get_attribute_value(a))}" for a in attributes)
    name = f"{node.domain}.{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type
    return f"{name}<{shown}>" if shown else name


def _attribute(value: Any) -> str:
    if isinstance(value, bytes):
        return f'"{value.decode()}"'
    if isinstance(value, float):
        return f"{value:.7g}" if value % 1 else f"{value:.1f}"
    if isinstance(value, TensorProto):
        return f"{_type(value.data_type, value.dims)} {_entries(numpy_helper.to_array(value))}"
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)


def regenerated(case: Case) -> tuple[Case, ModelProto, onnxrank.Result]:
    """A case as it comes out now, its model, and what was made of that."""
    model = parse(case.before)
    result = rewritten(model)
    assert result.changed, (case.title, result.report.refusals)
    known = names_of(model)
    return Case(case.title, text_of(model, known), text_of(result.model, known, once=True)), model, result
