"""Products of matrices, convolutions, Einsum: sums of products, which count as multiply-adds."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from onnx import NodeProto

from onnxrank import extents as ex
from onnxrank import transfers
from onnxrank.extents import Expr
from onnxrank.graphs import attribute, einsum_terms
from onnxrank.operators import signatures
from onnxrank.operators.entry import Extents, Operator, Trait
from onnxrank.operators.known import Partial
from onnxrank.operators.shapers import broadcast, same, windows
from onnxrank.operators.use import Flow, Use


def mat_mul(u: Use) -> list[Partial | None]:
    """Shape of the products of stacks of matrices."""
    a, b = u.shape(0), u.shape(1)
    if not a or not b:
        return [None]
    rows, columns = a[-2:-1], b[-1:] if len(b) > 1 else ()
    return [[*broadcast([a[:-2], b[:-2]]), *rows, *columns]]


def matmul_order(node: NodeProto, k: int, rank: int) -> list[int]:
    """The order in which FusedMatMul takes the axes of its k-th operand.

    `transBatch` moves the first axis behind the batch's, `trans` turns the last two of what that gives.
    """
    given = {a.name: a.i for a in node.attribute}
    moved = given.get(f"transBatch{'AB'[k]}", 0) and rank > 2
    front = range(1, rank - 1) if moved else range(rank - 2)
    ends = [0 if moved else rank - 2, rank - 1]
    return [*front, *(ends[::-1] if given.get(f"trans{'AB'[k]}", 0) else ends)]


def _fused_mat_mul(u: Use) -> list[Partial | None]:
    a, b = u.shape(0), u.shape(1)
    if len(a) < 2 or len(b) < 2:
        return [None]
    a, b = (tuple(x[p] for p in matmul_order(u.node, k, len(x))) for k, x in enumerate((a, b)))
    return [[*broadcast([a[:-2], b[:-2]]), a[-2], b[-1]]]


def gemm(u: Use) -> list[Partial | None]:
    """Shape of the product of two matrices, either of which may be turned."""
    a, b = u.shape(0), u.shape(1)
    return [[a[-1] if u.attribute("transA", 0) else a[0], b[0] if u.attribute("transB", 0) else b[-1]]]


def _einsum(u: Use) -> list[Partial | None]:
    shapes = [u.shape(k) for k in range(len(u.node.input))]
    terms, out = einsum_terms(u.attribute("equation"), [len(s) for s in shapes])
    sizes: dict[str, int | Expr | None] = {}
    for term, shape in zip(terms, shapes, strict=True):
        for letter, n in zip(term, shape, strict=True):
            have = sizes.get(letter, 1)
            sizes[letter] = n if have == 1 else have if n in (1, have) else None
    return [[sizes[c] for c in out]]


def matrix_macs(node: NodeProto, x: Sequence[Extents | None], out: Extents | None) -> int:
    """Multiply-adds of a product of matrices: the axis that it contracts, for every entry of the result."""
    a = x[0]
    if out is None or a is None:
        return 0
    turned = attribute(node, "transA") and len(a) > 1
    return prod(out) * (a[-2] if turned else a[-1])


def conv_macs(node: NodeProto, x: Sequence[Extents | None], out: Extents | None) -> int:
    """Multiply-adds of a convolution: the kernel, for every entry of the result."""
    return 0 if out is None or x[1] is None else prod(out) * prod(x[1][1:])


def _conv_transpose_macs(node: NodeProto, x: Sequence[Extents | None], out: Extents | None) -> int:
    """The kernel, for every entry of the operand."""
    return 0 if x[0] is None or x[1] is None else prod(x[0]) * prod(x[1][1:])


def _einsum_macs(node: NodeProto, x: Sequence[Extents | None], out: Extents | None) -> int:
    if len(node.input) < 2 or any(s is None for s in x):
        return 0
    terms, _ = einsum_terms(attribute(node, "equation"), [len(s or ()) for s in x])
    size: dict[str, int] = {}
    for term, s in zip(terms, x, strict=True):
        for c, n in zip(term, s or (), strict=False):
            size[c] = max(size.get(c, 1), n)
    return prod(size.values())


def _fused_mat_mul_levels(f: Flow) -> list[transfers.Made] | None:
    return transfers.mat_mul(f, [matmul_order(f.node, k, len(f.dim(k))) for k in (0, 1)])


def _spectra(u: Use) -> list[Partial | None]:
    """STFT: pieces of every signal, each with its frequencies in two parts."""
    length, step = u.entries(3) if u.has(3) else None, u.entries(1)
    size = length[0] if length else u.shape(2)[0] if u.has(2) else None
    if size is None or step is None or not all(isinstance(n, int) for n in (size, step[0])):
        return [[u.shape(0)[0], None, None, 2]]
    pieces = ex.floor_divide(u.shape(0)[1] - size, step[0]) + 1
    return [[u.shape(0)[0], pieces, ex.floor_divide(size, 2) + 1 if u.attribute("onesided", 1) else size, 2]]


MATRIX = Trait.PRODUCT | Trait.MATRIX

OPERATORS = {
    "MatMul": Operator(
        mat_mul, traits=MATRIX | Trait.LINEAR | Trait.SMOOTH, levels=transfers.mat_mul, macs=matrix_macs
    ),
    "Gemm": Operator(gemm, traits=MATRIX | Trait.LINEAR | Trait.SMOOTH, levels=transfers.gemm, macs=matrix_macs),
    "com.microsoft::FusedMatMul": Operator(
        _fused_mat_mul, traits=MATRIX, levels=_fused_mat_mul_levels, macs=matrix_macs
    ),
    "com.microsoft::FusedMatMulActivation": Operator(_fused_mat_mul, traits=MATRIX, macs=matrix_macs),
    "com.microsoft::TransposeMatMul": Operator(
        _fused_mat_mul, traits=MATRIX, levels=_fused_mat_mul_levels, macs=matrix_macs
    ),
    "com.microsoft::FusedGemm": Operator(gemm, traits=MATRIX, levels=transfers.gemm, macs=matrix_macs),
    "ai.onnx.ml::LinearRegressor": Operator(
        lambda u: [[u.shape(0)[0], int(u.attribute("targets", 1))]],
        traits=MATRIX,
        levels=transfers.linear,
        factors=(0,),
        macs=matrix_macs,
        signature=signatures.samples(2),
    ),
    "Conv": Operator(
        windows, traits=Trait.PRODUCT | Trait.LINEAR | Trait.IMAGES, levels=transfers.conv, macs=conv_macs
    ),
    "ConvTranspose": Operator(traits=Trait.PRODUCT | Trait.IMAGES, macs=_conv_transpose_macs),
    "com.microsoft::FusedConv": Operator(windows, traits=Trait.PRODUCT | Trait.IMAGES, macs=conv_macs),
    "DeformConv": Operator(traits=Trait.PRODUCT, macs=conv_macs, signature=signatures.rows(places=(0, 2, 4))),
    "com.microsoft.nchwc::Conv": Operator(traits=Trait.PRODUCT, macs=conv_macs),
    "Einsum": Operator(
        _einsum,
        traits=Trait.PRODUCT | Trait.LINEAR | Trait.SMOOTH,
        levels=transfers.einsum,
        macs=_einsum_macs,
        signature=signatures.einsum,
    ),
    "com.microsoft::Inverse": Operator(same, signature=signatures.square),
    "Det": Operator(signature=signatures.square),
    "DFT": Operator(signature=signatures.fourier),
    "STFT": Operator(_spectra, signature=signatures.rows(4)),
}
