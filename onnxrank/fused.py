"""Fused operators written out as the steps they stand for.

A fused operator is kept as long as its operands are the same for all candidates, or none of them is: a runtime has a
kernel for it. Where they hold entries of several levels, only the steps can be divided.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper

from onnxrank.emitter import Emitter, emitter_for, replaced
from onnxrank.facts import Extent
from onnxrank.operators.products import matmul_order

Extents = tuple[Extent, ...]
SAVED = frozenset({"FusedGemm", "FusedMatMul", "SkipLayerNormalization", "RotaryEmbedding"})
"""What ONNX Runtime's optimiser makes of several operators."""
OPERATORS = SAVED | {"Attention", "MultiHeadAttention"}
"""The same, and fused attention; these two and RotaryEmbedding are operators of ONNX, too."""
ACTIVATIONS = {"Relu": (), "Sigmoid": (), "Tanh": (), "LeakyRelu": ("alpha",)}
"""What FusedGemm may apply to its product, with the attributes of that."""
_MICROSOFT = "com.microsoft"
_EPSILON = 1e-12
"""What ONNX Runtime adds to variances unless told otherwise."""
_MASKED = -10000.0
"""What ONNX Runtime's own operators add to masked scores unless told otherwise."""


class Unsupported(Exception):
    """Why a fused operator is not written out.

    Attributes:
        output: Its first output.
    """

    output = ""


def written_out(
    model: ModelProto,
    extents: Mapping[str, Extents],
    dtypes: Mapping[str, int],
    constants: Mapping[str, NDArray[Any]],
    outputs: Collection[str],
) -> ModelProto:
    """A copy of a model with some fused operators as their steps.

    Args:
        model: The model.
        extents: Its shapes.
        dtypes: Element type per tensor, where known.
        constants: Data of tensors that are constant.
        outputs: First outputs of the operators.

    Raises:
        Unsupported: One of them does something that is not known here.
    """
    emit = emitter_for(model)

    def write(node: NodeProto) -> bool:
        if not node.output or node.output[0] not in outputs:
            return False
        try:
            _Steps(emit, node, extents, dtypes, constants).write()
        except Unsupported as e:
            e.output = node.output[0]
            raise
        return True

    return replaced(model, emit, write)


class _Steps:
    """Writes the steps of one fused operator.

    Args:
        emit: Receives them.
        node: The operator.
        extents: Shapes.
        dtypes: Element type per tensor, where known.
        constants: Data of tensors that are constant.
    """

    def __init__(
        self,
        emit: Emitter,
        node: NodeProto,
        extents: Mapping[str, Extents],
        dtypes: Mapping[str, int],
        constants: Mapping[str, NDArray[Any]],
    ) -> None:
        self.emit, self.node, self.extents, self.dtypes, self.constants = emit, node, extents, dtypes, constants
        self.given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        kind = dtypes.get(node.output[0], dtypes.get(node.input[0], TensorProto.FLOAT))
        self.dtype = helper.tensor_dtype_to_np_dtype(kind)
        emit.hint = node.name or node.output[0]

    def write(self) -> None:
        """Writes all steps; the last makes the operator's own output."""
        if self.node.op_type == "SkipLayerNormalization":
            self._skip_norm()
            return
        if len([o for o in self.node.output if o]) > 1:
            raise Unsupported("it has more outputs than one")
        if self.node.op_type == "FusedGemm":
            self._gemm()
        elif self.node.op_type == "FusedMatMul":
            self._matmul()
        elif self.node.op_type == "RotaryEmbedding":
            self._rotary()
        elif self.node.domain != _MICROSOFT:
            self._onnx()
        elif self.node.op_type == "Attention":
            self._packed()
        else:
            self._multi_head()

    def _gemm(self) -> None:
        """A Gemm and its activation."""
        kind = self.given.pop("activation", b"").decode()
        own = {k.removeprefix("activation_"): v for k, v in self.given.items() if k.startswith("activation_")}
        if kind not in ACTIVATIONS:
            raise Unsupported(f"its activation {kind!r} is not one that is written out")
        attrs = {k: v for k, v in self.given.items() if not k.startswith("activation_")}
        made = self.emit.add("Gemm", self.node.input, attrs)
        kept = {k: own[k] for k in ACTIVATIONS[kind] if k in own}
        self.emit.add(kind, [made], kept, output=self.node.output[0])

    def _matmul(self) -> None:
        """Transpositions, the product, and its factor."""
        operands = list(self.node.input[:2])
        for k, name in enumerate(operands):
            rank = len(self._extents(name))
            order = matmul_order(self.node, k, rank)
            if order != list(range(rank)):
                operands[k] = self.emit.add("Transpose", [name], {"perm": order})
        alpha, out = self.given.get("alpha", 1.0), self.node.output[0]
        if alpha == 1:
            self.emit.add("MatMul", operands, output=out)
        else:
            self.emit.add("Mul", [self.emit.add("MatMul", operands), self._number(alpha)], output=out)

    def _skip_norm(self) -> None:
        """Two additions and a normalisation; the sum may be an output, too."""
        if self.emit.opset < 17:
            raise Unsupported("before opset 17 there is no LayerNormalization")
        outputs = [*self.node.output, "", "", ""]
        if outputs[1] or outputs[2]:
            raise Unsupported("it gives its mean and deviation")
        total, bias, last = self.node.input[:2], self._name(4), outputs[3] or None
        if bias:
            made = self.emit.add("Add", [self.emit.add("Add", total), bias], output=last)
        else:
            made = self.emit.add("Add", total, output=last)
        inputs = [made, self.node.input[2], *filter(None, [self._name(3)])]
        attrs = {"axis": -1, "epsilon": self.given.get("epsilon", _EPSILON)}
        self.emit.add("LayerNormalization", inputs, attrs, output=outputs[0])

    def _rotary(self) -> None:
        """Pairs of entries turned by an angle per position, of ONNX since opset 23 and of ONNX Runtime."""
        own, out = self.node.domain == _MICROSOFT, self.node.output[0]
        self._only(4, ("interleaved", "num_heads", "rotary_embedding_dim", *(["scale"] if own else [])))
        x, positions, *caches = (self._name(k) for k in ((0, 1, 2, 3) if own else (0, 3, 1, 2)))
        if self.emit.opset < 13 or self.given.get("scale", 1.0) != 1:
            raise Unsupported("it scales, or comes before opset 13")
        if positions and len(self._extents(positions)) != 2:
            raise Unsupported("its positions are an offset")
        half, width = self._constant(self._extents(caches[0])[-1]), self._constant(self._extents(x)[-1])
        beside = len(self._extents(x)) == 3
        heads = (self.given.get("num_heads", 0) or width // (2 * half)) if beside else 1
        if positions:
            caches = [self.emit.add("Gather", [c, positions], {"axis": 0}) for c in caches]
        cos, sin = (self.emit.add("Unsqueeze", [c, self._ints(2 if beside else 1)]) for c in caches)
        if beside:
            x = self.emit.add("Reshape", [x, self._ints(0, 0, heads, width // heads)])
        turned = self._turned(x, cos, sin, half)
        rest = width // heads - 2 * half
        if rest:
            turned = self.emit.add("Concat", [turned, self._part(x, 2 * half, 2 * half + rest, 1)], {"axis": -1})
        shape = self._ints(0, 0, width) if beside else self._ints(0, 0, 0, width)
        self.emit.add("Reshape", [turned, shape], output=out)

    def _turned(self, x: str, cos: str, sin: str, half: int) -> str:
        """The first `2 * half` entries of the last axis, turned: neighbours are a pair, or those of both halves."""
        add, apart = self.emit.add, bool(self.given.get("interleaved", 0))
        step = 2 if apart else 1
        first = self._part(x, 0, 2 * half if apart else half, step)
        second = self._part(x, 1 if apart else half, 2 * half, step)
        real = add("Sub", [add("Mul", [first, cos]), add("Mul", [second, sin])])
        imaginary = add("Add", [add("Mul", [first, sin]), add("Mul", [second, cos])])
        if not apart:
            return add("Concat", [real, imaginary], {"axis": -1})
        pairs = [add("Unsqueeze", [t, self._ints(-1)]) for t in (real, imaginary)]
        return add("Reshape", [add("Concat", pairs, {"axis": -1}), self._ints(0, 0, 0, 2 * half)])

    def _part(self, x: str, start: int, end: int, step: int) -> str:
        """Entries of the last axis."""
        return self.emit.add("Slice", [x, *(self._ints(n) for n in (start, end, -1, step))])

    def _onnx(self) -> None:
        """The operator of ONNX, since opset 23."""
        self._only(4, ("is_causal", "kv_num_heads", "q_num_heads", "scale"))
        rank = len(self._extents(self.node.input[0]))
        query, key, value = self.node.input[:3]
        if rank == 3:
            heads, others = (self.given.get(f"{x}_num_heads", 0) for x in ("q", "kv"))
        else:
            heads, others = (self._constant(self._extents(x)[1]) for x in (query, key))
        if heads != others or not heads:
            raise Unsupported("its keys have other heads than its queries")
        beside = heads if rank == 3 else 0
        mask, causal = self._name(3), bool(self.given.get("is_causal", 0))
        self._sees(mask, causal)
        if mask and self.dtypes.get(mask) == TensorProto.BOOL:
            zero, least = self._number(0), self._number(-np.inf)
            mask = self.emit.add("Where", [mask, zero, least])
        size = self._constant(self._extents(query)[-1]) // max(beside, 1)
        # As the standard has it: both sides are multiplied by the root, rounded to a float.
        root = float(np.sqrt(np.float32(self.given.get("scale", size**-0.5))))
        query, key = (self.emit.add("Mul", [x, self._number(root)]) for x in (query, key))
        masks = [mask]
        if causal:
            masks.append(self._causal(self.node.input[0], self.node.input[1], rank - 2))
        self._attend([query, key, value], beside, 1, masks)

    def _multi_head(self) -> None:
        """ONNX Runtime's operator with projected queries, keys and values `[N, positions, heads * size]`."""
        self._only(6, ("num_heads", "mask_filter_value", "scale", "unidirectional"))
        operands = list(self.node.input[:3])
        if len(operands) < 3 or not all(operands) or any(len(self._extents(x)) != 3 for x in operands):
            raise Unsupported("its queries, keys and values are packed")
        widths = [self._constant(self._extents(x)[-1]) for x in operands]
        if self._name(3):
            biases = self._cut(self._name(3), widths, 0)
            operands = [self.emit.add("Add", [x, b]) for x, b in zip(operands, biases, strict=True)]
        self._microsoft(operands, widths, self.node.input[0], self.node.input[1], self._name(4), self._name(5))

    def _packed(self) -> None:
        """ONNX Runtime's operator that projects its input, `[N, positions, width]`, itself."""
        self._only(6, ("num_heads", "mask_filter_value", "scale", "unidirectional", "qkv_hidden_sizes"))
        if self._name(4):
            raise Unsupported("it goes on from earlier keys and values")
        x, weights = self.node.input[:2]
        joined = self._constant(self._extents(weights)[-1])
        widths = list(self.given.get("qkv_hidden_sizes", [joined // 3] * 3))
        if sum(widths) != joined:
            raise Unsupported("its weights are not those of queries, keys and values")
        made = self.emit.add("MatMul", [x, weights])
        if self._name(2):
            made = self.emit.add("Add", [made, self._name(2)])
        self._microsoft(self._cut(made, widths, 2), widths, x, x, self._name(3), self._name(5))

    def _microsoft(
        self, operands: Sequence[str], widths: Sequence[int], rows: str, columns: str, padding: str, bias: str
    ) -> None:
        """What both of ONNX Runtime's operators do with queries, keys and values."""
        heads, causal = self.given["num_heads"], bool(self.given.get("unidirectional", 0))
        self._sees(bias, causal)
        masks = [bias]
        if padding:
            if len(self._extents(padding)) != 2 or self._extents(padding)[-1] != self._extents(columns)[1]:
                raise Unsupported("its mask is not one of keys")
            kept = self.emit.add("Cast", [padding], {"to": int(helper.np_dtype_to_tensor_dtype(self.dtype))})
            hidden = self.emit.add("Sub", [self._number(1), kept])
            added = self.emit.add("Mul", [hidden, self._number(self.given.get("mask_filter_value", _MASKED))])
            masks.append(self.emit.add("Unsqueeze", [added, self._ints(1, 2)]))
        if causal:
            masks.append(self._causal(rows, columns, 1))
        scale = self.given.get("scale", 0.0) or (widths[0] // heads) ** -0.5
        self._attend(operands, heads, scale, masks)

    def _attend(self, operands: Sequence[str], heads: int, scale: float, masks: Sequence[str]) -> None:
        """Scores, softmax and weighted sum; `heads` where they lie side by side on the last axis."""
        emit = self.emit
        query, key, value = operands
        if heads:
            query, key, value = (
                emit.add("Transpose", [emit.add("Reshape", [x, self._ints(0, 0, heads, -1)])], {"perm": [0, 2, 1, 3]})
                for x in operands
            )
        turned = emit.add("Transpose", [key], {"perm": [0, 1, 3, 2]})
        scores = emit.add("MatMul", [query, turned])
        if scale != 1:
            scores = emit.add("Mul", [scores, self._number(scale)])
        for mask in filter(None, masks):
            scores = emit.add("Add", [scores, mask])
        weights = emit.add("Softmax", [scores], {"axis": -1})
        out = self.node.output[0]
        if not heads:
            emit.add("MatMul", [weights, value], output=out)
            return
        joined = emit.add("Transpose", [emit.add("MatMul", [weights, value])], {"perm": [0, 2, 1, 3]})
        emit.add("Reshape", [joined, self._ints(0, 0, -1)], output=out)

    def _sees(self, mask: str, causal: bool) -> None:
        """Refuses a mask that may hide all keys of a row: operators differ in what they make of that."""
        if not mask:
            return
        data = self.constants.get(mask)
        if data is None:
            raise Unsupported("its mask is computed, and may hide all keys of a row")
        seen = data if data.dtype == bool else np.isfinite(data)
        if causal:
            seen = seen & (np.tri(*seen.shape[-2:]) > 0)
        if not seen.any(-1).all():
            raise Unsupported("its mask hides all keys of a row")

    def _causal(self, rows: str, columns: str, axis: int) -> str:
        """A mask to add, by which no query sees a later key."""
        count, others = (self._constant(self._extents(x)[axis]) for x in (rows, columns))
        if count != others:
            raise Unsupported("it is causal, with other keys than its own positions")
        return self.emit.constant(np.where(np.tri(count, dtype=bool), 0, -np.inf).astype(self.dtype))

    def _cut(self, name: str, widths: Sequence[int], axis: int) -> list[str]:
        """A tensor cut into parts along an axis."""
        cuts = itertools.pairwise(np.cumsum([0, *widths]).tolist())
        return [self.emit.add("Slice", [name, *(self._ints(n) for n in (*cut, axis))]) for cut in cuts]

    def _only(self, inputs: int, attributes: Collection[str]) -> None:
        """Refuses further inputs and attributes."""
        more = [a for a, v in self.given.items() if a not in attributes and v]
        if any(self.node.input[inputs:]) or more:
            raise Unsupported(f"it uses {more[0] if more else 'earlier keys or lengths'}")

    def _name(self, k: int) -> str:
        return self.node.input[k] if k < len(self.node.input) else ""

    def _extents(self, name: str) -> Extents:
        found = self.extents.get(name)
        if found is None:
            raise Unsupported(f"the shape of {name} is not known")
        return found

    @staticmethod
    def _constant(extent: Extent) -> int:
        if extent[1]:
            raise Unsupported("its positions, heads or sizes are not constant")
        return extent[0]

    def _number(self, value: float) -> str:
        return self.emit.constant(np.array(value, self.dtype))

    def _ints(self, *values: Any) -> str:
        data: NDArray[np.int64] = np.array(values, np.int64)
        return self.emit.constant(data)
