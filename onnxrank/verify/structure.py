"""What can be said of two models without running them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from onnx import ModelProto, TensorProto, ValueInfoProto

from onnxrank import feeds, runtime
from onnxrank.contract import CONTRACT, stored_contract
from onnxrank.graphs import kind, subgraphs
from onnxrank.model import LoadedModel
from onnxrank.plans import label
from onnxrank.verify.pairing import Binding
from onnxrank.verify.report import Report
from onnxrank.verify.words import listed

_CHUNK = 1 << 20
_QUANTISING = {"QuantizeLinear", "DynamicQuantizeLinear"}


def inspect(original: LoadedModel, optimized: LoadedModel, binding: Binding, report: Report) -> bool:
    """Compares interfaces, versions and what both models share.

    Returns:
        Whether the second model can be fed at all.
    """
    strict = made_of(original, optimized)
    _outputs(original.proto, optimized.proto, strict, report)
    fed = _inputs(original.proto, optimized.proto, binding, strict, report)
    _versions(original.proto, optimized.proto, strict, report)
    _shared(original, optimized, report)
    _origin(original, optimized, report)
    return fed


def made_of(original: LoadedModel, optimized: LoadedModel) -> bool:
    """Whether the optimized model says that it was made of just this original.

    Such a model keeps all that it says nothing of; of others, made by whatever means, only the scores are expected.
    """
    stored = stored_contract(optimized.proto)
    return stored is not None and stored.get("source_sha256") == original.sha256


def changes_precision(original: ModelProto, optimized: ModelProto) -> bool:
    """Whether only one of the models computes in 16-bit floats."""
    return runtime.has_half(original) != runtime.has_half(optimized)


def half_type(*models: ModelProto) -> int:
    """The 16-bit float type that occurs in some models."""
    kinds = [t.data_type for m in models for t in m.graph.initializer]
    kinds += [i.type.tensor_type.elem_type for m in models for i in m.graph.input]
    return int(TensorProto.BFLOAT16 if TensorProto.BFLOAT16 in kinds else TensorProto.FLOAT16)


def quantises(model: ModelProto) -> bool:
    """Whether values are rounded to integers on the way, so that a last digit may become a whole step."""
    return any(n.op_type in _QUANTISING for n in model.graph.node)


def _outputs(original: ModelProto, optimized: ModelProto, strict: bool, report: Report) -> None:
    before, after = list(original.graph.output), list(optimized.graph.output)
    names, found = [o.name for o in before], [o.name for o in after]
    if names != found:
        lost = [n for n in names if n not in found]
        new = [n for n in found if n not in names]
        what = "; ".join(
            part
            for part in (
                f"missing: {listed(lost)}" if lost else "",
                f"new: {listed(new)}" if new else "",
                "in another order" if not lost and not new else "",
            )
            if part
        )
        report.find("structure", "interface", f"The outputs are not the original's: {what}.", model="optimized")
    precise = not changes_precision(original, optimized)
    its = {o.name: o for o in after}
    for o in before:
        other = its.get(o.name)
        if other is None:
            continue
        _compare_types(report, f"Output {o.name!r}", _type(o), _type(other), precise)
        a, b = _dims(o), _dims(other)
        if a is not None and a != b:
            clash = b is not None and (
                len(a) != len(b) or any(isinstance(y, int) and x != y for x, y in zip(a, b, strict=True))
            )
            report.find(
                "structure",
                "interface",
                f"Output {o.name!r} is declared as {_shape(b)} where the original has {_shape(a)}.",
                "error" if clash or strict else "warning",
                model="optimized",
            )


def _inputs(original: ModelProto, optimized: ModelProto, binding: Binding, strict: bool, report: Report) -> bool:
    for text in binding.misfits:
        report.find("structure", "interface", f"The inputs contradict the contract: {text}.", model="optimized")
    if binding.strange:
        report.find(
            "structure",
            "interface",
            f"The optimized model takes inputs that the original does not have: {listed(binding.strange)}.",
            model="optimized",
        )
    for name in binding.missing:
        read = any(name in n.input for n in original.graph.node)
        why = "" if read else ", which the original does not read"
        report.find(
            "structure",
            "interface",
            f"The optimized model does not take the input {name!r}{why}.",
            "error" if read and strict else "warning",
            model="optimized",
        )
    if binding.renamed:
        report.find("structure", "interface", "No input kept its name; they were matched by their order.", "warning")
    types = {i.name: i.elem_type for i in feeds.describe(original)}
    precise = not changes_precision(original, optimized)
    for info in feeds.describe(optimized):
        if info.name not in binding.sources:
            continue
        source = binding.sources[info.name][0]
        was = types.get(source, types.get(source.rpartition(".")[0], info.elem_type))
        _compare_types(report, f"Input {info.name!r}", was, info.elem_type, precise)
    return not binding.strange and not binding.misfits


def _versions(original: ModelProto, optimized: ModelProto, strict: bool, report: Report) -> None:
    before = {o.domain: o.version for o in original.opset_import}
    after = {o.domain: o.version for o in optimized.opset_import}
    for domain in sorted(before.keys() | after.keys()):
        a, b = before.get(domain), after.get(domain)
        used = any(n.domain in ({"", "ai.onnx"} if not domain else {domain}) for n in optimized.graph.node)
        if a == b or (b is None and not used):
            continue
        report.find(
            "structure",
            "opset",
            f"Opset of {domain or 'the default domain'}: {'none' if b is None else b} instead of "
            f"{'none' if a is None else a}.",
            "error" if strict else "warning",
            model="optimized",
        )
    if optimized.ir_version > original.ir_version:
        report.find(
            "structure",
            "ir version",
            f"IR version {optimized.ir_version} instead of {original.ir_version}: an older runtime may refuse it.",
            "error" if strict else "warning",
            model="optimized",
        )


def _shared(original: LoadedModel, optimized: LoadedModel, report: Report) -> None:
    """Whether what both models call by one name is the same thing.

    In a model made by `optimize` a difference is an error; others may keep a name and change what it stands for.
    """
    strict = made_of(original, optimized)
    before = {t.name: t for t in original.proto.graph.initializer}
    changed = [
        t.name
        for t in optimized.proto.graph.initializer
        if t.name in before and not _same(before[t.name], original, t, optimized)
    ]
    if changed:
        report.find(
            "structure",
            "untouched parts",
            f"{len(changed)} initializers have the original's name but other content: {listed(changed)}.",
            "error" if strict else "warning",
            model="optimized",
        )
    nodes = {o: n for n in original.proto.graph.node for o in n.output if o}
    edited = []
    for n in optimized.proto.graph.node:
        twin = next((nodes[o] for o in n.output if o in nodes), None)
        if twin is None or twin.op_type != n.op_type or list(twin.input) != list(n.input):
            continue
        if list(twin.output) != list(n.output) or any(subgraphs(n)):
            continue  # renamed; what branches read from outside may have new names too
        # One of another name was made anew, and happens to do what the original's does.
        own = [kind(x) if twin.name != n.name else x.SerializeToString(deterministic=True) for x in (twin, n)]
        if own[0] != own[1]:
            edited.append(label(n))
    if edited:
        report.find(
            "structure",
            "untouched parts",
            f"{len(edited)} nodes have the original's operator and operands but other attributes or documentation: "
            f"{listed(edited)}.",
            "error" if strict else "warning",
            model="optimized",
            node=edited[0],
        )


def _same(a: TensorProto, one: LoadedModel, b: TensorProto, other: LoadedModel) -> bool:
    if (a.data_type, list(a.dims)) != (b.data_type, list(b.dims)):
        return False
    external = [t.data_location == TensorProto.EXTERNAL for t in (a, b)]
    if not any(external):
        fields = ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data")
        return all(getattr(a, f) == getattr(b, f) for f in fields)
    if external[0] != external[1]:
        return _digest(_content(a, one)) == _digest(_content(b, other))
    entries = [{e.key: e.value for e in t.external_data} for t in (a, b)]
    if one.folder == other.folder and entries[0] == entries[1]:
        return True
    return _digest(_content(a, one)) == _digest(_content(b, other))


def _content(t: TensorProto, loaded: LoadedModel) -> Iterator[bytes]:
    """The bytes of a tensor, by and by."""
    if t.data_location != TensorProto.EXTERNAL or loaded.folder is None:
        from onnx import numpy_helper

        yield numpy_helper.to_array(t).tobytes()
        return
    entries = {e.key: e.value for e in t.external_data}
    left = int(entries.get("length") or 0) or None
    with open(loaded.folder / entries["location"], "rb") as file:
        file.seek(int(entries.get("offset") or 0))
        while left is None or left > 0:
            chunk = file.read(_CHUNK if left is None else min(_CHUNK, left))
            if not chunk:
                return
            left = None if left is None else left - len(chunk)
            yield chunk


def _digest(chunks: Iterator[bytes]) -> bytes:
    found = hashlib.sha256()
    for chunk in chunks:
        found.update(chunk)
    return found.digest()


def _origin(original: LoadedModel, optimized: LoadedModel, report: Report) -> None:
    stored = stored_contract(optimized.proto)
    if stored is None:
        if any(p.key == CONTRACT for p in optimized.proto.metadata_props):
            report.find(
                "structure", "contract", "The contract in the metadata cannot be read.", "warning", model="optimized"
            )
        return
    if stored.get("source_sha256") not in (None, original.sha256) and optimized.sha256 != original.sha256:
        report.find(
            "structure",
            "contract",
            "By its contract the optimized model was made of another file than this original: "
            f"{str(stored['source_sha256'])[:12]}… instead of {original.sha256[:12]}….",
            "warning",
            model="optimized",
        )


def _type(v: ValueInfoProto) -> int:
    return int(v.type.tensor_type.elem_type)


def _compare_types(report: Report, what: str, was: int, now: int, precise: bool) -> None:
    """Notes a type that changed; from one float type to another it may, where precision does anyway."""
    if was == now:
        return
    report.find(
        "structure",
        "interface",
        f"{what} has the type {_name(now)} where the original has {_name(was)}.",
        "warning" if {was, now} <= runtime.FLOATS and not precise else "error",
        model="optimized",
    )


def _name(kind: int) -> str:
    try:
        return str(TensorProto.DataType.Name(kind)).lower()
    except ValueError:
        return f"type {kind}"


def _dims(v: ValueInfoProto) -> tuple[int | str | None, ...] | None:
    if not v.type.tensor_type.HasField("shape"):
        return None
    return tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in v.type.tensor_type.shape.dim)


def _shape(dims: tuple[int | str | None, ...] | None) -> str:
    return "no shape" if dims is None else f"[{', '.join('?' if d is None else str(d) for d in dims)}]"
