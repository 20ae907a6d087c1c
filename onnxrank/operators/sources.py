"""Operators that make tensors of constants, extents, or chance, and those that give no tensors."""

from __future__ import annotations

from math import prod

import numpy as np
from onnx import helper, numpy_helper

from onnxrank import extents as ex
from onnxrank.extents import Expr, Unproved
from onnxrank.model import sparse_data
from onnxrank.operators.entry import Operator, Trait
from onnxrank.operators.known import Known, Partial, constant, kept, known, whole
from onnxrank.operators.shapers import same, unknown
from onnxrank.operators.use import Use


def _constant_entries(u: Use) -> list[Known | None]:
    (attribute,) = u.node.attribute
    if attribute.name == "value":
        return [constant(numpy_helper.to_array(attribute.t))]
    if attribute.name == "sparse_value":
        return [constant(sparse_data(attribute.sparse_tensor))]
    found = helper.get_attribute_value(attribute)
    kinds = {"f": np.float32, "i": np.int64, "s": object}
    kind = kinds[attribute.name.removeprefix("value_")[0]]
    if kind is object:
        found = [s.decode() for s in found] if isinstance(found, list) else found.decode()
    return [constant(np.array(found, kind))]


def _shape_of(u: Use) -> list[Partial | None]:
    rank = len(u.shape(0))
    return [[len(range(rank)[slice(u.attribute("start", 0), u.attribute("end", rank))])]]


def _shape_entries(u: Use) -> list[Known | None]:
    shape = u.shape(0)
    wanted = shape[slice(u.attribute("start", 0), u.attribute("end", len(shape)))]
    out = np.empty(len(wanted), object)
    out[:] = wanted
    return [known((len(wanted),), out, np.dtype(np.int64))]


def _size_entries(u: Use) -> list[Known | None]:
    out = np.empty((), object)
    out[()] = ex.product(u.shape(0))
    return [known((), out, np.dtype(np.int64))]


def _constant_of_shape(u: Use) -> list[Partial | None]:
    length = u.shape(0)
    found = u.values[0]
    if isinstance(length[0], Expr):
        return [None]
    return [unknown(length[0]) if found is None else list(found.sizes())]


def _constant_of_shape_entries(u: Use) -> list[Known | None]:
    given = u.attribute("value")
    data = np.zeros(1, np.float32) if given is None else numpy_helper.to_array(given)
    shape = tuple(u.value(0).sizes())
    stored = kept(shape)
    if prod(stored) > 1 << 22:
        raise Unproved("a large constant")
    return [known(shape, np.full(stored, data.reshape(-1)[0]), data.dtype)]


def _range(u: Use) -> list[Partial | None]:
    start, limit, step = (u.values[k] for k in range(3))
    if start is None or limit is None or step is None or not step.concrete or step.dtype.kind not in "iu":
        if (
            start is not None
            and limit is not None
            and step is not None
            and all(v.concrete for v in (start, limit, step))
        ):
            return [[len(np.arange(start.data.item(), limit.data.item(), step.data.item()))]]
        return [[None]]
    (first,), (last,), delta = start.sizes(), limit.sizes(), int(step.data.item())
    if delta == 0:
        return [[None]]
    span = last - first if delta > 0 else first - last
    return [[ex.maximum(ex.ceil_divide(span, abs(delta)), 0)]]


def _range_entries(u: Use) -> list[Known | None]:
    (found,) = _range(u)
    assert found is not None
    (count,) = whole(found)
    if isinstance(count, Expr) or count > 1 << 22:
        raise Unproved("a symbolic number of entries")
    start, step = u.value(0), u.value(2)
    data = np.arange(count)
    if start.concrete and step.concrete:
        return [known((count,), (start.data + data * step.data).astype(start.dtype), start.dtype)]
    raise Unproved("a symbolic start")


OPERATORS = {
    "Constant": Operator(None, _constant_entries, traits=Trait.FREE),
    "Shape": Operator(_shape_of, _shape_entries, traits=Trait.EXTENTS),
    "Size": Operator(lambda u: [()], _size_entries, traits=Trait.EXTENTS),
    "ConstantOfShape": Operator(_constant_of_shape, _constant_of_shape_entries),
    "Range": Operator(_range, _range_entries),
    "EyeLike": Operator(same),
    **dict.fromkeys(("RandomNormal", "RandomUniform", "Multinomial"), Operator(traits=Trait.RANDOM)),
    **dict.fromkeys(("RandomNormalLike", "RandomUniformLike", "Bernoulli"), Operator(same, traits=Trait.RANDOM)),
    **dict.fromkeys(
        """SequenceEmpty SequenceConstruct SequenceInsert SequenceErase SequenceMap SplitToSequence Optional
        ai.onnx.ml::ZipMap""".split(),
        Operator(traits=Trait.SEQUENCE),
    ),
}
