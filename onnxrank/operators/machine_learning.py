"""Models that are no networks, and what prepares their features: the operators of the domain `ai.onnx.ml`."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, log2, prod

from onnx import NodeProto

from onnxrank import extents as ex
from onnxrank.extents import Unproved
from onnxrank.graphs import attribute
from onnxrank.operators import signatures
from onnxrank.operators.entry import Extents, Macs, Operator, Shaper, Trait
from onnxrank.operators.known import Partial
from onnxrank.operators.shapers import same
from onnxrank.operators.use import Use


def _extracted(u: Use) -> list[Partial | None]:
    """ArrayFeatureExtractor: entries of the last axis."""
    have, places = u.shape(0), u.shape(1)
    return [[*(have[:-1] or (1,)), ex.product(places)]]


def _extraction(u: Use) -> signatures.Signature:
    rank = len(u.shape(0))
    if rank < 2:
        raise Unproved("a single row")
    return signatures.around(lambda u: [-1])(u)


def _one_hot(u: Use) -> list[Partial | None]:
    count = len(u.attribute("cats_int64s") or u.attribute("cats_strings") or [])
    return [[*u.shape(0), count]]


def _by_column(u: Use) -> signatures.Signature:
    """Entry by entry, with numbers of its own for each column, or the same for all."""
    rank = len(u.shape(0))
    given = [u.attribute(name) or () for name in ("imputed_value_floats", "imputed_value_int64s", "scale", "offset")]
    single = all(len(found) < 2 for found in given)
    return signatures.entrywise()(u) if single or not rank else signatures.around(lambda u: [-1])(u)


def _side_by_side(u: Use) -> list[Partial | None]:
    """FeatureVectorizer: the columns of several matrices, of each as many as it says."""
    counts = u.attribute("inputdimensions")
    return [[u.shape(0)[0] if len(u.shape(0)) == 2 else 1, sum(map(int, counts)) if counts else None]]


def _vectorising(u: Use) -> signatures.Signature:
    if any(len(u.shape(k)) != 2 for k in range(len(u.node.input))):
        raise Unproved("features that are no matrix")
    return signatures.rows(2, places=range(len(u.node.input)))(u)


def _classes(u: Use) -> int:
    """How many classes a classifier has."""
    names = ("classlabels_ints", "classlabels_int64s", "classlabels_strings")
    return max(len(u.attribute(name) or []) for name in names)


def _scored(u: Use) -> list[Partial | None]:
    """The class of every row, and the scores of all of them."""
    count = _classes(u)
    by_pairs = u.attribute("vectors_per_class") and not u.attribute("prob_a") and count > 2
    if len(u.shape(0)) != 2 or count < 2 or by_pairs:
        return [None, None]
    return [[u.shape(0)[0]], [u.shape(0)[0], count]]


def _regressed(u: Use) -> list[Partial | None]:
    if len(u.shape(0)) != 2:
        return [None]
    return [[u.shape(0)[0], int(u.attribute("n_targets", 1))]]


def _times(*names: str) -> Macs:
    """Multiply-adds of every row with each of some stored numbers."""

    def macs(node: NodeProto, x: Sequence[Extents | None], out: Extents | None) -> int:
        stored = next((found for name in names if (found := attribute(node, name))), ())
        return 0 if x[0] is None else prod(x[0][:-1]) * len(stored)

    return macs


def _steps(node: NodeProto, x: Sequence[Extents | None], out: Extents | None) -> int:
    """Comparisons on the way through every tree, as if each had all its leaves at one depth."""
    trees = len(attribute(node, "tree_roots") or {*(attribute(node, "nodes_treeids") or ())})
    given = len(attribute(node, "nodes_featureids") or ())
    if x[0] is None or not trees:
        return 0
    # The fifth version lists leaves apart, older ones among the nodes, of which one more than half are leaves.
    leaves = given / trees + 1 if attribute(node, "tree_roots") else (given / trees + 1) / 2
    return prod(x[0][:-1]) * ceil(trees * log2(max(leaves, 1)))


_ENTRIES = signatures.entrywise()
_KEPT = Operator(same, signature=_ENTRIES)
_WEIGHED = Trait.PRODUCT | Trait.MATRIX


def _forest(shape: Shaper, *ranks: int) -> Operator:
    return Operator(shape, traits=Trait.TREES, factors=(), macs=_steps, signature=signatures.samples(*ranks))


def _supported(shape: Shaper, *ranks: int) -> Operator:
    macs = _times("support_vectors", "coefficients")
    return Operator(shape, traits=Trait.PRODUCT, factors=(0,), macs=macs, signature=signatures.samples(*ranks))


OPERATORS = {
    **{f"ai.onnx.ml::{op}": _KEPT for op in ("Binarizer", "CategoryMapper", "LabelEncoder")},
    **{f"ai.onnx.ml::{op}": Operator(same, signature=_by_column) for op in ("Imputer", "Scaler")},
    "ai.onnx.ml::ArrayFeatureExtractor": Operator(_extracted, signature=_extraction),
    "ai.onnx.ml::OneHotEncoder": Operator(_one_hot, signature=signatures.entrywise(None)),
    "ai.onnx.ml::FeatureVectorizer": Operator(_side_by_side, signature=_vectorising),
    "ai.onnx.ml::Normalizer": Operator(same, signature=signatures.around(lambda u: [-1])),
    "ai.onnx.ml::LinearClassifier": Operator(
        _scored,
        traits=_WEIGHED,
        factors=(0,),
        macs=_times("coefficients"),
        signature=signatures.samples(1, 2),
    ),
    "ai.onnx.ml::SVMClassifier": _supported(_scored, 1, 2),
    "ai.onnx.ml::SVMRegressor": _supported(_regressed, 2),
    "ai.onnx.ml::TreeEnsemble": _forest(_regressed, 2),
    "ai.onnx.ml::TreeEnsembleRegressor": _forest(_regressed, 2),
    "ai.onnx.ml::TreeEnsembleClassifier": _forest(_scored, 1, 2),
    "TfIdfVectorizer": Operator(signature=signatures.samples(2)),
    **{f"ai.onnx.ml::{op}": Operator(traits=Trait.SEQUENCE) for op in ("CastMap", "DictVectorizer")},
}
