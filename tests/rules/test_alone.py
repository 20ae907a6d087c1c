"""Operators that work on rows alone: once where all they read is the request's, and right where it is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from helpers import INT64, Given, Graph, candidate, optimised, refusals, request, rewritten, whole_numbers
from onnx import TensorProto, helper

import onnxrank
from onnxrank.plans import label
from onnxrank.values import Level

ML, MS = "ai.onnx.ml", "com.microsoft"
Made = Callable[..., str]


@dataclass(frozen=True)
class Case:
    """A use of an operator.

    Attributes:
        op: Its key.
        shapes: Shapes of what it reads, behind the candidate axis; `L` is a length.
        make: Appends it; gives a tensor of numbers that has the rows on its first axis.
        opset: Version of ONNX.
    """

    op: str
    shapes: tuple[tuple[int | str, ...], ...]
    make: Made
    opset: int = 17


CASES: dict[str, Case] = {}


def case(op: str, *shapes: tuple[int | str, ...], opset: int = 17, name: str = "") -> Callable[[Made], Made]:
    def add(make: Made) -> Made:
        CASES[name or op] = Case(op, shapes, make, opset)
        return make

    return add


def ids(g: Graph, x: str, count: int) -> str:
    """Whole numbers below a count."""
    return g.op("Cast", g.op("Mod", g.op("Abs", x), g.const(count), fmod=1), to=INT64)


def numbers(g: Graph, x: str) -> str:
    return g.op("Cast", x, to=TensorProto.FLOAT)


def bytes_of(g: Graph, x: str, domain: str = "") -> tuple[str, str, str]:
    scale, zero = g.const(0.5), g.const(128, np.uint8)
    return g.op("QuantizeLinear", x, scale, zero, domain=domain), scale, zero


def reals(g: Graph, x: str, scale: str, zero: str, domain: str = "") -> str:
    return g.op("DequantizeLinear", x, scale, zero, domain=domain)


def words(g: Graph, x: str) -> str:
    """Three words."""
    return g.op("LabelEncoder", ids(g, x, 3), domain=ML, keys_int64s=[0, 1, 2], values_strings=list("abc"))


# --- movement -------------------------------------------------------------------------------------------------------


@case("ReverseSequence", (4, 3), ())
def _(g: Graph, x: str, n: str) -> str:
    lengths = g.op("Add", ids(g, n, 4), g.const(1, np.int64))
    return g.op("ReverseSequence", x, lengths, batch_axis=0, time_axis=1)


@case("ReverseSequence", ("L", 3), name="ReverseSequence of a length")
def _(g: Graph, x: str) -> str:
    turned = g.op("Transpose", x, perm=[1, 0, 2])
    shape = g.op("Shape", x)
    lengths = g.op("Expand", g.op("Gather", shape, g.ints(1), axis=0), g.op("Gather", shape, g.ints(0), axis=0))
    return g.op("ReduceMax", g.op("ReverseSequence", turned, lengths), axes=[0], keepdims=0)


@case("ScatterElements", (4, 3), (4, 3), (4, 3))
def _(g: Graph, x: str, at: str, new: str) -> str:
    return g.op("ScatterElements", x, ids(g, at, 1), new, axis=1)


@case("ScatterND", (4,), opset=18)
def _(g: Graph, x: str) -> str:
    turned = g.op("Transpose", x, perm=[1, 0])
    new = g.op("Neg", g.op("Gather", turned, g.ints(1, 3), axis=0))
    return g.op("Transpose", g.op("ScatterND", turned, g.const([[0], [2]], np.int64), new), perm=[1, 0])


@case("GatherND", (4, 3), (2,))
def _(g: Graph, x: str, at: str) -> str:
    return g.op("GatherND", x, g.op("Unsqueeze", ids(g, at, 4), g.ints(2)), batch_dims=1)


@case("Compress", (4, 3))
def _(g: Graph, x: str) -> str:
    return g.op("Compress", x, g.const([1, 0, 1, 1], np.bool_), axis=1)


@case("Pad", ("L", 3))
def _(g: Graph, x: str) -> str:
    padded = g.op("Pad", x, g.ints(0, 2, 0, 0, 1, 0), g.const(2.0))
    return g.op("ReduceSum", padded, g.ints(1), keepdims=0)


@case("Pad", (4, 3), name="Pad by reflection")
def _(g: Graph, x: str) -> str:
    return g.op("Pad", x, g.ints(0, 2, 0, 0, 0, 0), mode="reflect")


@case("Pad", ("L", 3), name="Pad up to a length")
def _(g: Graph, x: str) -> str:
    have = g.op("Gather", g.op("Shape", x), g.ints(1), axis=0)
    missing = g.op("Sub", g.ints(40), have)
    pads = g.op("Concat", g.ints(0, 0, 0, 0), missing, g.ints(0), axis=0)
    return g.op("ReduceSum", g.op("Pad", x, pads), g.ints(1), keepdims=0)


@case("Resize", (2, 4))
def _(g: Graph, x: str) -> str:
    return g.op("Resize", x, "", g.const([1.0, 1.0, 2.0]), mode="nearest")


@case("Resize", (2, 4), opset=18, name="Resize to a length")
def _(g: Graph, x: str) -> str:
    return g.op("Resize", x, "", "", g.ints(7), axes=[2], mode="nearest")


@case("Resize", (4, 2), opset=18, name="Resize to the length that an axis has")
def _(g: Graph, x: str) -> str:
    return g.op("Resize", x, "", "", g.ints(7, 2), axes=[1, 2], mode="nearest")


@case("GridSample", (2, 4, 4), (3, 3, 2), opset=16)
def _(g: Graph, x: str, grid: str) -> str:
    return g.op("GridSample", x, g.op("Mul", grid, g.const(0.25)))


@case("RoiAlign", (4,))
def _(g: Graph, x: str) -> str:
    regions = g.op("Add", g.op("Abs", x), g.const([0, 0, 4, 4]))
    first = g.op("Cast", g.op("Mul", g.op("Gather", x, g.const(0, np.int64), axis=1), g.const(0)), to=INT64)
    return g.op("RoiAlign", g.const(whole_numbers(1, 2, 8, 8)), regions, first, output_height=2, output_width=2)


@case("Col2Im", (8, 4), opset=18)
def _(g: Graph, x: str) -> str:
    return g.op("Col2Im", x, g.ints(4, 4), g.ints(2, 2), strides=[2, 2])


@case("CenterCropPad", (5, 3), opset=18)
def _(g: Graph, x: str) -> str:
    return g.op("CenterCropPad", x, g.ints(3), axes=[1])


@case("DepthToSpace", (8, 2, 2))
def _(g: Graph, x: str) -> str:
    return g.op("DepthToSpace", x, blocksize=2)


@case("DepthToSpace", (8, 2, 2), name="DepthToSpace by columns")
def _(g: Graph, x: str) -> str:
    return g.op("DepthToSpace", x, blocksize=2, mode="CRD")


@case("SpaceToDepth", (2, 4, 6))
def _(g: Graph, x: str) -> str:
    return g.op("SpaceToDepth", x, blocksize=2)


@case("TensorScatter", (4, 3), (2, 3), opset=24)
def _(g: Graph, x: str, new: str) -> str:
    rows = g.op("Gather", g.op("Shape", x), g.ints(0), axis=0)
    return g.op("TensorScatter", x, new, g.op("Expand", g.ints(1), rows), axis=1)


@case("DeformConv", (4, 5, 5), (8, 4, 4), opset=19)
def _(g: Graph, x: str, offset: str) -> str:
    return g.op("DeformConv", x, g.const(whole_numbers(3, 4, 2, 2)), g.op("Mul", offset, g.const(0.125)))


@case("Einsum", (3, 3), name="Einsum of a diagonal")
def _(g: Graph, x: str) -> str:
    return g.op("Einsum", x, equation="bii->bi")


@case("Einsum", (3, 3), name="Einsum of sums")
def _(g: Graph, x: str) -> str:
    return g.op("Einsum", x, equation="bij->b")


@case("ArgMax", (4, 3))
def _(g: Graph, x: str) -> str:
    return numbers(g, g.op("ArgMax", x, axis=1, keepdims=0))


@case("CastLike", (4, 3))
def _(g: Graph, x: str) -> str:
    """Like a tensor of another shape."""
    return g.op("CastLike", g.op("ReduceSum", x, g.ints(1), keepdims=1), x)


@case("CumProd", (4, 3), opset=26)
def _(g: Graph, x: str) -> str:
    return g.op("CumProd", x, g.const(1, np.int64))


@case("BitCast", (4, 3), opset=26)
def _(g: Graph, x: str) -> str:
    return g.op("BitCast", g.op("BitCast", x, to=TensorProto.INT32), to=TensorProto.FLOAT)


# --- convolutions and pools along a history ---------------------------------------------------------------------------


@case("Conv", ("L", 4), name="Conv of a length")
def _(g: Graph, x: str) -> str:
    turned = g.op("Transpose", x, perm=[0, 2, 1])
    made = g.op("Conv", turned, g.const(whole_numbers(3, 4, 3)), pads=[1, 1])
    return g.op("ReduceMax", g.op("Relu", made), axes=[2], keepdims=0)


@case("Conv", ("L", 4), name="Conv in steps")
def _(g: Graph, x: str) -> str:
    turned = g.op("Transpose", x, perm=[0, 2, 1])
    made = g.op("Conv", turned, g.const(whole_numbers(3, 4, 3)), pads=[2, 2], strides=[2], dilations=[2])
    return g.op("ReduceMax", made, axes=[2], keepdims=0)


@case("MaxPool", ("L", 4), name="MaxPool of a length")
def _(g: Graph, x: str) -> str:
    turned = g.op("Transpose", x, perm=[0, 2, 1])
    made = g.op("MaxPool", turned, kernel_shape=[3], pads=[1, 1], strides=[2])
    return g.op("ReduceSum", made, g.ints(2), keepdims=0)


@case("AveragePool", ("L", 4), name="AveragePool of a length")
def _(g: Graph, x: str) -> str:
    turned = g.op("Transpose", x, perm=[0, 2, 1])
    made = g.op("AveragePool", turned, kernel_shape=[2], auto_pad="SAME_UPPER")
    return g.op("ReduceMax", made, axes=[2], keepdims=0)


@case("GlobalMaxPool", ("L", 4), name="GlobalMaxPool of a length")
def _(g: Graph, x: str) -> str:
    return g.op("Flatten", g.op("GlobalMaxPool", g.op("Transpose", x, perm=[0, 2, 1])))


@case("ConvTranspose", (4, 5))
def _(g: Graph, x: str) -> str:
    return g.op("ConvTranspose", x, g.const(whole_numbers(4, 2, 3)))


@case("ConvInteger", (4, 5))
def _(g: Graph, x: str) -> str:
    data, _, zero = bytes_of(g, x)
    return numbers(g, g.op("ConvInteger", data, g.const(whole_numbers(3, 4, 2), np.uint8), zero))


@case("QLinearConv", (4, 5))
def _(g: Graph, x: str) -> str:
    data, scale, zero = bytes_of(g, x)
    kernel = g.const(whole_numbers(3, 4, 2), np.int8)
    return reals(
        g, g.op("QLinearConv", data, scale, zero, kernel, g.const(1), g.const(0, np.int8), scale, zero), scale, zero
    )


# --- quantised ------------------------------------------------------------------------------------------------------


@case("DynamicQuantizeLinear", (6,))
def _(g: Graph, x: str) -> str:
    return reals(g, *g.ops("DynamicQuantizeLinear", 3, x))


@case("MatMulInteger", (6,))
def _(g: Graph, x: str) -> str:
    data, scale, zero = g.ops("DynamicQuantizeLinear", 3, x)
    made = g.op("MatMulInteger", data, g.const(whole_numbers(6, 4), np.int8), zero, g.const(0, np.int8))
    return g.op("Mul", numbers(g, made), scale)


@case("QLinearMatMul", (6,))
def _(g: Graph, x: str) -> str:
    data, scale, zero = bytes_of(g, x)
    weights = g.const(whole_numbers(6, 4), np.int8)
    return reals(
        g, g.op("QLinearMatMul", data, scale, zero, weights, g.const(1), g.const(0, np.int8), scale, zero), scale, zero
    )


@case(f"{MS}::DynamicQuantizeMatMul", (6,))
def _(g: Graph, x: str) -> str:
    return g.op(
        "DynamicQuantizeMatMul", x, g.const(whole_numbers(6, 4), np.int8), g.const(1), g.const(0, np.int8), domain=MS
    )


@case(f"{MS}::MatMulIntegerToFloat", (6,))
def _(g: Graph, x: str) -> str:
    data, scale, zero = bytes_of(g, x)
    weights = g.const(whole_numbers(6, 4), np.int8)
    return g.op("MatMulIntegerToFloat", data, weights, scale, g.const(1), zero, g.const(0, np.int8), domain=MS)


@case(f"{MS}::QGemm", (6,))
def _(g: Graph, x: str) -> str:
    data, scale, zero = bytes_of(g, x)
    weights = g.const(whole_numbers(6, 4), np.int8)
    return reals(
        g,
        g.op("QGemm", data, scale, zero, weights, g.const(1), g.const(0, np.int8), "", scale, zero, domain=MS),
        scale,
        zero,
    )


@case(f"{MS}::MatMulNBits", (16,))
def _(g: Graph, x: str) -> str:
    packed = np.random.default_rng(0).integers(0, 256, (4, 1, 8))
    return g.op(
        "MatMulNBits", x, g.const(packed, np.uint8), g.const(np.ones(4)), domain=MS, K=16, N=4, bits=4, block_size=16
    )


@case(f"{MS}::QLinearAdd", (6,), (6,))
def _(g: Graph, x: str, y: str) -> str:
    out = g.const(1), g.const(128, np.uint8)
    return reals(g, g.op("QLinearAdd", *bytes_of(g, x), *bytes_of(g, y), *out, domain=MS), *out)


@case(f"{MS}::QLinearMul", (6,), (6,))
def _(g: Graph, x: str, y: str) -> str:
    out = g.const(1), g.const(128, np.uint8)
    return reals(g, g.op("QLinearMul", *bytes_of(g, x), *bytes_of(g, y), *out, domain=MS), *out)


@case(f"{MS}::QLinearConcat", (6,), (2,))
def _(g: Graph, x: str, y: str) -> str:
    out = g.const(1), g.const(128, np.uint8)
    return reals(g, g.op("QLinearConcat", *out, *bytes_of(g, x), *bytes_of(g, y), domain=MS, axis=1), *out)


@case(f"{MS}::QLinearSigmoid", (6,))
def _(g: Graph, x: str) -> str:
    out = g.const(0.01), g.const(0, np.uint8)
    return reals(g, g.op("QLinearSigmoid", *bytes_of(g, x), *out, domain=MS), *out)


@case(f"{MS}::QLinearLeakyRelu", (6,))
def _(g: Graph, x: str) -> str:
    out = g.const(1), g.const(128, np.uint8)
    return reals(g, g.op("QLinearLeakyRelu", *bytes_of(g, x), *out, domain=MS, alpha=0.5), *out)


@case(f"{MS}::QLinearSoftmax", (6,))
def _(g: Graph, x: str) -> str:
    out = g.const(0.01), g.const(0, np.uint8)
    return reals(g, g.op("QLinearSoftmax", *bytes_of(g, x), *out, domain=MS, opset=13), *out)


@case(f"{MS}::QuantizeLinear", (6,))
def _(g: Graph, x: str) -> str:
    return reals(g, *bytes_of(g, x, MS), MS)


@case(f"{MS}::TransposeMatMul", (6,))
def _(g: Graph, x: str) -> str:
    return g.op("TransposeMatMul", x, g.const(whole_numbers(4, 6)), domain=MS, transB=1)


@case(f"{MS}::Inverse", (3, 3))
def _(g: Graph, x: str) -> str:
    return g.op("Inverse", g.op("Add", x, g.const(10 * np.eye(3))), domain=MS)


@case("Det", (3, 3))
def _(g: Graph, x: str) -> str:
    return g.op("Det", x)


@case("DFT", (8, 1), opset=18)
def _(g: Graph, x: str) -> str:
    return g.op("DFT", x, axis=1)


@case("STFT", (16,))
def _(g: Graph, x: str) -> str:
    return g.op("STFT", g.op("Unsqueeze", x, g.ints(2)), g.const(4, np.int64), "", g.const(8, np.int64))


@case("MeanVarianceNormalization", (4, 3))
def _(g: Graph, x: str) -> str:
    return g.op("MeanVarianceNormalization", x, axes=[1, 2])


# --- strings and features ---------------------------------------------------------------------------------------------


@case("StringConcat", (3,), (3,), opset=20)
def _(g: Graph, x: str, y: str) -> str:
    both = g.op("StringConcat", words(g, x), words(g, y))
    pairs = [a + b for a in "abc" for b in "abc"]
    return numbers(g, g.op("LabelEncoder", both, domain=ML, keys_strings=pairs, values_int64s=list(range(9))))


@case("RegexFullMatch", (3,), opset=20)
def _(g: Graph, x: str) -> str:
    return numbers(g, g.op("RegexFullMatch", words(g, x), pattern="a|b"))


@case("TfIdfVectorizer", (3,))
def _(g: Graph, x: str) -> str:
    counts = {"ngram_counts": [0], "ngram_indexes": [0, 1, 2], "pool_int64s": [0, 1, 2]}
    how = {"min_gram_length": 1, "max_gram_length": 1, "max_skip_count": 0}
    return g.op("TfIdfVectorizer", ids(g, x, 3), mode="TF", **counts, **how)


@case(f"{ML}::LabelEncoder", (3,))
def _(g: Graph, x: str) -> str:
    return g.op(
        "LabelEncoder", ids(g, x, 4), domain=ML, keys_int64s=[0, 1, 2], values_floats=[3.0, 5.0, 7.0], default_float=1.0
    )


@case(f"{ML}::CategoryMapper", (3,))
def _(g: Graph, x: str) -> str:
    there = {"cats_int64s": [0, 1], "cats_strings": ["a", "b"], "domain": ML}
    return numbers(g, g.op("CategoryMapper", g.op("CategoryMapper", ids(g, x, 2), **there), **there))


@case(f"{ML}::Binarizer", (3,))
def _(g: Graph, x: str) -> str:
    return g.op("Binarizer", x, domain=ML, threshold=1.0)


@case(f"{ML}::Imputer", (3,))
def _(g: Graph, x: str) -> str:
    return g.op("Imputer", x, domain=ML, imputed_value_floats=[1.0, 5.0, 7.0], replaced_value_float=2.0)


@case(f"{ML}::Scaler", (3,))
def _(g: Graph, x: str) -> str:
    return g.op("Scaler", x, domain=ML, offset=[1.0, 2.0, 3.0], scale=[2.0, 1.0, 4.0])


@case(f"{ML}::OneHotEncoder", (3,))
def _(g: Graph, x: str) -> str:
    return g.op("OneHotEncoder", ids(g, x, 4), domain=ML, cats_int64s=[0, 1, 2])


@case(f"{ML}::ArrayFeatureExtractor", (4,))
def _(g: Graph, x: str) -> str:
    return g.op("ArrayFeatureExtractor", x, g.ints(2, 0), domain=ML)


@case(f"{ML}::FeatureVectorizer", (4,), (2,))
def _(g: Graph, x: str, y: str) -> str:
    return g.op("FeatureVectorizer", x, y, domain=ML, inputdimensions=[4, 2])


@case(f"{ML}::FeatureVectorizer", (4,), (2,), name=f"{ML}::FeatureVectorizer of other lengths")
def _(g: Graph, x: str, y: str) -> str:
    return g.op("FeatureVectorizer", x, y, domain=ML, inputdimensions=[3, 4])


@case(f"{MS}::SkipSimplifiedLayerNormalization", (4, 6), (4, 6))
def _(g: Graph, x: str, y: str) -> str:
    return g.op("SkipSimplifiedLayerNormalization", x, y, g.const(np.ones(6)), domain=MS)


@case(f"{ML}::Normalizer", (4,))
def _(g: Graph, x: str) -> str:
    return g.op("Normalizer", g.op("Add", g.op("Abs", x), g.const(1)), domain=ML, norm="MAX")


@case(f"{ML}::LinearRegressor", (4,))
def _(g: Graph, x: str) -> str:
    return g.op(
        "LinearRegressor", x, domain=ML, targets=2, coefficients=whole_numbers(8).tolist(), intercepts=[1.0, 2.0]
    )


def classified(g: Graph, made: list[str]) -> str:
    return g.op("Concat", g.op("Unsqueeze", numbers(g, made[0]), g.ints(1)), made[1], axis=1)


@case(f"{ML}::LinearClassifier", (4,))
def _(g: Graph, x: str) -> str:
    weights = {"coefficients": whole_numbers(12).tolist(), "intercepts": [1.0, 2.0, 3.0]}
    return classified(g, g.ops("LinearClassifier", 2, x, domain=ML, classlabels_ints=[0, 1, 2], **weights))


@case(f"{ML}::SVMRegressor", (4,))
def _(g: Graph, x: str) -> str:
    how = {
        "coefficients": [1.0, -1.0, 2.0],
        "support_vectors": whole_numbers(12).tolist(),
        "n_supports": 3,
        "rho": [1.0],
    }
    return g.op("SVMRegressor", x, domain=ML, kernel_type="LINEAR", kernel_params=[0.0, 0.0, 0.0], **how)


def tree(**more: object) -> dict[str, object]:
    """Two trees of three nodes each."""
    return {
        "nodes_treeids": [0, 0, 0, 1, 1, 1],
        "nodes_nodeids": [0, 1, 2] * 2,
        "nodes_featureids": [0, 0, 0, 3, 0, 0],
        "nodes_modes": ["BRANCH_LEQ", "LEAF", "LEAF"] * 2,
        "nodes_values": [0.5, 0.0, 0.0, -0.5, 0.0, 0.0],
        "nodes_truenodeids": [1, 0, 0] * 2,
        "nodes_falsenodeids": [2, 0, 0] * 2,
        "domain": ML,
        **more,
    }


@case(f"{ML}::TreeEnsembleRegressor", (4,))
def _(g: Graph, x: str) -> str:
    leaves = {"target_treeids": [0, 0, 1, 1], "target_nodeids": [1, 2, 1, 2], "target_ids": [0] * 4}
    return g.op("TreeEnsembleRegressor", x, **tree(target_weights=[1.0, 2.0, 4.0, 8.0], n_targets=1, **leaves))


@case(f"{ML}::SVMClassifier", (4,))
def _(g: Graph, x: str) -> str:
    how = {"coefficients": [1.0, -1.0, 2.0], "support_vectors": whole_numbers(12).tolist(), "vectors_per_class": [2, 1]}
    how |= {"kernel_type": "LINEAR", "kernel_params": [0.0, 0.0, 0.0], "rho": [1.0], "classlabels_ints": [0, 1]}
    return classified(g, g.ops("SVMClassifier", 2, x, domain=ML, **how))


@case(f"{ML}::TreeEnsemble", (4,), opset=18)
def _(g: Graph, x: str) -> str:
    g.versions[ML] = 5
    how = {
        "nodes_featureids": [0, 3],
        "nodes_modes": helper.make_tensor("modes", TensorProto.UINT8, [2], [0, 0]),
        "nodes_splits": helper.make_tensor("splits", TensorProto.FLOAT, [2], [0.5, -0.5]),
        "nodes_truenodeids": [0, 2],
        "nodes_falsenodeids": [1, 3],
        "nodes_trueleafs": [1, 1],
        "nodes_falseleafs": [1, 1],
        "tree_roots": [0, 1],
        "leaf_targetids": [0] * 4,
        "leaf_weights": helper.make_tensor("weights", TensorProto.FLOAT, [4], [1.0, 2.0, 4.0, 8.0]),
    }
    return g.op("TreeEnsemble", x, domain=ML, n_targets=1, aggregate_function=1, post_transform=0, **how)


@case(f"{ML}::TreeEnsembleClassifier", (4,))
def _(g: Graph, x: str) -> str:
    leaves = {"class_treeids": [0, 0, 1, 1], "class_nodeids": [1, 2, 1, 2], "class_ids": [0, 1, 2, 0]}
    return classified(
        g,
        g.ops(
            "TreeEnsembleClassifier",
            2,
            x,
            **tree(classlabels_int64s=[0, 1, 2], class_weights=[1.0, 2.0, 4.0, 8.0], **leaves),
        ),
    )


# --- tests -----------------------------------------------------------------------------------------------------------


def graph(case: Case, levels: list[str]) -> tuple[Graph, list[Given], str]:
    """The operator on operands of some levels, behind which a layer takes in its result beside a candidate."""
    g = Graph(case.opset)
    g.versions[ML] = 3
    given, read = [candidate("x", 2)], []
    given[0].declare(g)
    for k, (shape, level) in enumerate(zip(case.shapes, levels, strict=True)):
        if level != "mixed":
            given.append({"request": request, "candidate": candidate}[level](f"o{k}", *shape))
            read.append(given[-1].declare(g))
            continue
        *front, last = shape
        first = int(last) // 2
        given += [request(f"u{k}", *front, first), candidate(f"i{k}", *front, int(last) - first)]
        read.append(g.op("Concat", *(i.declare(g) for i in given[-2:]), axis=len(shape)))
    made = case.make(g, *read)
    node = next(n for n in reversed(g.nodes) if n.op_type == case.op.rpartition("::")[2])
    flat = g.op("Reshape", made, g.ints(0, -1))
    both = g.op("Concat", flat, "x", axis=1)
    total = g.on_axes("ReduceSum", g.op("Relu", both), [1], keepdims=1)
    g.output(total, ["N", 1])
    g.checked = False
    return g, given, str(node.output[0])


def lengths(case: Case) -> list[dict[str, int]]:
    return [{"L": 6}, {"L": 23}] if any("L" in s for s in case.shapes) else [{}]


def checked(case: Case, levels: list[str]) -> tuple[onnxrank.Result, list[Given], str]:
    g, given, name = graph(case, levels)
    return optimised(g, given, counts=(1, 2, 5), tolerance=1e-5, lengths=lengths(case), candidates=512), given, name


@pytest.mark.parametrize("name", CASES)
def test_once(name: str) -> None:
    case = CASES[name]
    result, _, made = checked(case, ["request"] * len(case.shapes))
    assert result.changed and result.form is not None, refusals(result)
    value = result.form.rewrite.rw.values[made]
    assert not any(s.startswith("N") for s in result.form.rewrite.rw.present(result.form.rewrite.rw.settle(value))), (
        refusals(result)
    )


@pytest.mark.parametrize("condition", [[1, 0, 1], [0] * 600])
def test_a_condition_for_rows(condition: list[int]) -> None:
    """How many rows Compress keeps depends on how many there are: the condition is cut, or names the first few."""
    g, given = Graph(), [request("u", 4), candidate("x", 4)]
    u, x = (i.declare(g) for i in given)
    kept = g.op("Compress", g.op("Add", u, x), g.const(condition, np.bool_), axis=0)
    g.output(g.op("Relu", g.op("MatMul", kept, g.const(whole_numbers(4, 2)))), ["M", 2])
    g.output(g.op("MatMul", u, g.const(whole_numbers(4, 2))), ["N", 2])
    assert "an error of onnxrank" not in refusals(optimised(g, given))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_mixed(name: str) -> None:
    """With operands of several levels the result is right, and where it has all rows there is a remark."""
    case = CASES[name]
    levels = ["request", "candidate"] * len(case.shapes)
    ways = [levels[: len(case.shapes)], levels[1 : len(case.shapes) + 1]] if len(case.shapes) > 1 else []
    if case.shapes[0] and case.shapes[0][-1] != 1:
        ways.append(["mixed", *["candidate"] * (len(case.shapes) - 1)])
    for way in ways:
        result, _, made = checked(case, way)
        assert result.form is not None
        rw = result.form.rewrite.rw
        index = rw.index_of[made]
        if rw.taken.get(index, ("",))[0] == "picks":
            continue  # rows that candidates pick are not made of anything
        earlier = {label(n) for n in rw.nodes[: index + 1]}
        assert Level.REQUEST in rw.levels(rw.values[made]) or earlier & {r.node for r in result.report.refusals}, way


WORK = {
    "MatMulInteger": 6 * 4,
    "QLinearMatMul": 6 * 4,
    f"{MS}::DynamicQuantizeMatMul": 6 * 4,
    f"{MS}::MatMulIntegerToFloat": 6 * 4,
    f"{MS}::QGemm": 6 * 4,
    f"{MS}::MatMulNBits": 16 * 4,
    "ConvInteger": 3 * 4 * 4 * 2,
    "QLinearConv": 3 * 4 * 4 * 2,
    "ConvTranspose": 4 * 5 * 2 * 3,
    f"{ML}::LinearRegressor": 4 * 2,
    f"{ML}::LinearClassifier": 4 * 3,
    f"{ML}::SVMRegressor": 4 * 3,
    f"{ML}::SVMClassifier": 4 * 3,
    f"{ML}::TreeEnsemble": 2,
    f"{ML}::TreeEnsembleRegressor": 2,
    f"{ML}::TreeEnsembleClassifier": 2,
}
"""Multiply-adds per row of the cases, or steps down their trees."""


@pytest.mark.parametrize("name", WORK)
def test_work_is_counted(name: str) -> None:
    g, given, _ = graph(CASES[name], ["request"])
    found = rewritten(g.model(), request=[i.name for i in given if i.level == "request"], ignore=["pack"]).report
    assert (found.macs_before, found.macs_after) == (512 * WORK[name], WORK[name])


# --- what is left alone -----------------------------------------------------------------------------------------------


def barrier(op: str, opset: int = 17) -> Callable[[Made], Made]:
    def add(make: Made) -> Made:
        BARRIERS[op] = (make, opset)
        return make

    return add


BARRIERS: dict[str, tuple[Made, int]] = {}


@barrier("Bernoulli")
@barrier("RandomNormalLike")
def _(g: Graph, x: str, op: str) -> str:
    return g.op(op, g.op("Clip", x, g.const(0), g.const(1)))


@barrier("Multinomial")
def _(g: Graph, x: str, op: str) -> str:
    return numbers(g, g.op(op, x, sample_size=8))


@barrier("NonZero")
def _(g: Graph, x: str, op: str) -> str:
    at = numbers(g, g.op("ReduceSum", g.op(op, x), g.ints(1), keepdims=1))
    return g.op("Add", x, g.op("ReduceSum", at, g.ints(0), keepdims=1))


@barrier("Unique")
def _(g: Graph, x: str, op: str) -> str:
    return g.op("Add", x, g.op("ReduceMax", g.op(op, x), keepdims=0))


@barrier("SequenceConstruct")
def _(g: Graph, x: str, op: str) -> str:
    return g.op("SequenceAt", g.op(op, x, x), g.const(0, np.int64))


@barrier("SplitToSequence")
def _(g: Graph, x: str, op: str) -> str:
    return g.op("ConcatFromSequence", g.op(op, x, g.const(1, np.int64), axis=1), axis=1)


@barrier("If")
def _(g: Graph, x: str, op: str) -> str:
    ways = []
    for kind in ("Neg", "Relu"):
        out = g.fresh("branch")
        given = helper.make_tensor_value_info(out, TensorProto.FLOAT, None)
        ways.append(helper.make_graph([helper.make_node(kind, [x], [out])], g.fresh("body"), [], [given]))
    test = g.op("Greater", g.op("ReduceSum", x, keepdims=0), g.const(0))
    return g.op(op, test, then_branch=ways[0], else_branch=ways[1])


@barrier("Scan")
def _(g: Graph, x: str, op: str) -> str:
    one, out = g.fresh("one"), g.fresh("out")
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [8]) for n in (one, out)]
    body = helper.make_graph([helper.make_node("Neg", [one], [out])], "body", infos[:1], infos[1:])
    return g.op(op, x, body=body, num_scan_inputs=1)


@pytest.mark.parametrize("op", BARRIERS)
def test_what_is_left_alone_says_so(op: str) -> None:
    make, opset = BARRIERS[op]
    g, given = Graph(opset), [request("u", 8), candidate("x", 8)]
    u, x = (i.declare(g) for i in given)
    made = make(g, u, op)
    layer = g.op("MatMul", g.op("Add", g.op("Relu", made), x), g.const(whole_numbers(8, 2)))
    g.output(layer, ["N", 2])
    g.checked = False
    node = next(n for n in g.nodes if n.op_type == op)
    told = {r.op for r in rewritten(g.model(), request=["u"], ignore=["pack"]).report.refusals if r.node == label(node)}
    assert told == {op}
