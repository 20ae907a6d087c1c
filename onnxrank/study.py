"""What is known of the user's model before anything is rewritten."""

from __future__ import annotations

from collections.abc import Collection

import onnx
from onnx import ModelProto, helper

from onnxrank import facts, feeds
from onnxrank import model as files
from onnxrank.emit import rename_captured
from onnxrank.errors import ModelError, UsageError
from onnxrank.facts import Facts
from onnxrank.fused import written_out
from onnxrank.plan import label
from onnxrank.rewrite import Refusal
from onnxrank.roles import Roles
from onnxrank.values import (
    CANDIDATES,
    Dims,
    extents,
    symbols,
)

_DATA_SHAPED = {"NonZero", "Unique", "Compress", "Loop", "If", "Scan", "NonMaxSuppression"}
_SHAPE_OPERANDS = {"Reshape": 1, "Expand": 1, "Tile": 1, "ConstantOfShape": 0, "Range": 0, "Slice": 1, "TopK": 1}


class Study:
    """What is known of the original: its nodes with extents resolved, inputs, shapes, constants and types."""

    def __init__(self, model: ModelProto, roles: Roles, loaded: files.LoadedModel) -> None:
        self.loaded, self.roles = loaded, roles
        self.model = model
        self.declared = feeds.inputs(model, roles)
        self.symbols = sorted({s for i in self.declared for s in symbols(i.dims)})
        if CANDIDATES not in self.symbols:
            raise UsageError("no input has a candidate axis: name the inputs that differ between candidates")
        self.maker = feeds.Maker(self.declared, None)
        self.probe = facts.Probe(model, self.symbols, loaded.folder)
        self.facts = self._first_look()
        resolved = resolve_ifs(self.model, self.facts)
        if resolved is not None:
            self.model = resolved
            self.probe = facts.Probe(resolved, self.symbols, loaded.folder)
            self.facts = self.probe.measure(self.maker)
        self.dtypes = element_types(self.model)
        self.maker = feeds.Maker(self.declared, self._ranges())
        if self._data_shaped():
            self.facts = self.probe.measure(self.maker)

    def _first_look(self) -> Facts:
        """Shapes, from inputs that most models accept: ids of 1, or else of 0."""
        try:
            return self.probe.measure(self.maker)
        except ModelError:
            self.maker = feeds.Maker(self.declared, None, fill=0)
        try:
            return self.probe.measure(self.maker)
        except ModelError as e:
            shown = ", ".join(f"{i.name} {_shown(i.dims)}" for i in self.declared)
            raise ModelError(
                f"the model does not run at several numbers of candidates with inputs of these roles: {shown}. {e}. "
                "If it is a static batch export, export it again with a dynamic one (torch: dynamic_axes or "
                "dynamic_shapes; tf2onnx: a batch of None); if an input takes values of its own, give their range in a "
                "roles file."
            ) from e

    def _ranges(self) -> feeds.Ranges:
        from onnxrank.rules import movement

        return feeds.find_ranges(self.model, self.declared, self.facts, self.loaded.folder, self.dtypes, movement.RULE)

    def _data_shaped(self) -> bool:
        """Whether a shape may depend on the data of the inputs, which the first run fed with zeros."""
        fixed = set(self.facts.folded) | self.facts.varying | {t.name for t in self.model.graph.initializer}
        for n in self.model.graph.node:
            if n.op_type in _DATA_SHAPED:
                return True
            first = _SHAPE_OPERANDS.get(n.op_type)
            if first is not None and any(i and i not in fixed for i in n.input[first:]):
                return True
        return False

    def unproven_shapes(self) -> Refusal | None:
        """A shape that is computed from the number of candidates in a way that a few runs cannot tell."""
        for n in self.model.graph.node:
            first = _SHAPE_OPERANDS.get(n.op_type)
            if first is not None and self.facts.unproven.intersection(n.input[first:]):
                reason = "a shape is computed from the number of candidates in a way that cannot be followed"
                return Refusal("movement", label(n), n.op_type, reason)
        return None

    def written_out(self, fused: Collection[str]) -> Study:
        """The same of a model in which some fused operators, known by their first outputs, are their steps.

        Raises:
            Unsupported: One of them cannot be written out.
            ModelError: The model does not run that way.
        """
        stored = {t.name: tuple((n, ()) for n in t.dims) for t in self.model.graph.initializer}
        types = {t.name: t.data_type for t in self.model.graph.initializer}
        types |= {i.name: i.dtype for i in self.declared}
        shapes = {**stored, **self.input_extents(), **self.facts.extents}
        # Masks are among the inputs behind queries, keys and values.
        read = {i for n in self.model.graph.node if n.output and n.output[0] in fused for i in n.input[3:]}
        initializers = (t for t in self.model.graph.initializer if t.name in read)
        constants = {t.name: facts.constant_data(t, self.loaded.folder) for t in initializers}
        constants |= {name: data for name, (dims, data) in self.facts.folded.items() if not symbols(dims)}
        model = written_out(self.model, shapes, types | self.dtypes, constants, fused)
        return Study(model, self.roles, self.loaded)

    def input_extents(self) -> dict[str, tuple[facts.Extent, ...]]:
        """Extents of the inputs."""
        return {i.name: extents_of(i.dims) for i in self.declared}


def _shown(dims: Dims) -> str:
    """A factored shape in a message."""
    return "[" + ", ".join("*".join(str(f).removeprefix("S:") for f in d) or "1" for d in dims) + "]"


def extents_of(dims: Dims) -> tuple[facts.Extent, ...]:
    """A factored shape as constants times symbols."""
    return tuple((extents((d,))[0], symbols([d])) for d in dims)


def element_types(model: ModelProto) -> dict[str, int]:
    """Element types of tensors, as far as onnx's inference knows them."""
    try:
        inferred = onnx.shape_inference.infer_shapes(model)
    except Exception:
        return {}
    out = {v.name: v.type.tensor_type.elem_type for v in inferred.graph.value_info if v.type.HasField("tensor_type")}
    out |= {o.name: o.type.tensor_type.elem_type for o in model.graph.output}
    return {name: t for name, t in out.items() if t}


def resolve_ifs(model: ModelProto, found: Facts) -> ModelProto | None:
    """Replaces every `If` whose condition is an extent's, and the same for all numbers of candidates, by its branch."""
    if not any(n.op_type == "If" and n.input[0] in found.folded for n in model.graph.node):
        return None
    out = ModelProto()
    out.CopyFrom(model)
    del out.graph.node[:]
    taken = {o for n in model.graph.node for o in n.output} | {t.name for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type != "If" or node.input[0] not in found.folded:
            out.graph.node.append(node)
            continue
        chosen = "then_branch" if bool(found.folded[node.input[0]][1].reshape(-1)[0]) else "else_branch"
        branch = next(a.g for a in node.attribute if a.name == chosen)
        names = dict(zip((o.name for o in branch.output), node.output, strict=True))
        local = {o for n in branch.node for o in n.output} | {t.name for t in branch.initializer}
        for name in sorted(local - names.keys()):
            if name in taken:
                names[name] = f"{node.output[0]}/{name}"
            taken.add(names.get(name, name))
        for t in branch.initializer:
            copy = out.graph.initializer.add()
            copy.CopyFrom(t)
            copy.name = names.get(t.name, t.name)
        for inner in branch.node:
            copied = out.graph.node.add()
            copied.CopyFrom(inner)
            copied.input[:] = [names.get(i, i) if i in local else i for i in inner.input]
            copied.output[:] = [names.get(o, o) for o in inner.output]
            rename_captured(copied, {n: names[n] for n in names if n in local})
        made = {o for n in branch.node for o in n.output}
        for inner_name, outer in zip((o.name for o in branch.output), node.output, strict=True):
            if inner_name not in made:
                out.graph.node.append(helper.make_node("Identity", [inner_name], [outer], name=outer))
    return out
