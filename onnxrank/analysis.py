"""What is known of a model's tensors, without rewriting it: shapes, levels of entries, constants, bounds.

`analyse` is asked by scripts; `inspect`, `profile` and the remarks of `optimize` ask the same `Analysis`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto

from onnxrank import baked, feeds
from onnxrank import model as files
from onnxrank.contract import find_roles, stored_contract
from onnxrank.errors import DoesNotRun, ModelError
from onnxrank.extents import Expr
from onnxrank.flow import Tensor
from onnxrank.graphs import attribute
from onnxrank.intervals import Interval
from onnxrank.operators import Operator, Trait, find, operator
from onnxrank.operators.products import matmul_order
from onnxrank.roles import Roles
from onnxrank.study import Study
from onnxrank.transfers import Levels, highest
from onnxrank.values import Level

_NOTHING = Operator()


def analyse(
    model: str | os.PathLike[str] | ModelProto | files.LoadedModel,
    roles: Roles | None = None,
    *,
    request: Sequence[str] = (),
    spec: Mapping[str, Any] | None = None,
    infer_from: Mapping[str, NDArray[Any]] | None = None,
) -> Analysis:
    """Finds, for every tensor of a model, its shape and how often each of its entries need be made.

    Nothing is rewritten. The model runs a few times, in a process of its own, to confirm the shapes.

    Args:
        model: A path, a model in memory, or what `read` gives.
        roles: Which inputs are request-level; or give `request`, `spec` or `infer_from`, as for `optimize`.
        request: Patterns on input names, `user_*`, and columns, `X[0:13,20]`, that are request-level.
        spec: A roles file's content.
        infer_from: Recorded requests to infer the roles from.

    Returns:
        The analysis.

    Raises:
        UsageError: The roles are wrong, or nothing is said of them.
        ModelError: The model is invalid, does not run, or contradicts a derived shape.
        EnvironmentProblem: onnxruntime is missing, or memory ran out.
    """
    loaded = model if isinstance(model, files.LoadedModel) else files.load(model)
    if roles is None:
        contract = None if request or spec is not None else stored_contract(loaded.proto)
        inputs = feeds.describe(loaded.proto)
        roles, _ = find_roles(inputs, contract, request=request, spec=spec, infer_from=infer_from)
    try:
        study = Study(files.flattened(loaded.proto), roles, loaded)
    except DoesNotRun:
        found = baked.with_lengths(loaded, roles)
        if found is None:
            raise
        study = Study(files.flattened(found[0].proto), roles, found[0])
    stray = study.contradicted()
    if stray is not None:
        raise ModelError(stray.reason)
    return Analysis(study)


@dataclass(frozen=True, eq=False)
class Analysis:
    """What is known of the tensors of a model's main graph, without its dead nodes and with its functions inlined.

    Attributes:
        study: The model with its roles, proved shapes and constants.
    """

    study: Study

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """All tensors by name: inputs, initializers and what nodes make."""
        return self.study.flow.tensors

    def levels(self, name: str) -> Levels:
        """Level of every entry of a row (`values.Level`), in the shape of the tensor's constant extents.

        Args:
            name: The tensor.

        Returns:
            An array of `int8`: -1 unread, 0 constant, 1 request, 2 candidate. Of a tensor `[N * 50, 8]` it has the
            shape `[50, 8]`. What has one level is one entry, broadcast.

        Raises:
            KeyError: There is no such tensor.
        """
        return self.tensors[name].levels

    def level(self, name: str) -> Level:
        """The highest level of any entry of a tensor.

        Raises:
            KeyError: There is no such tensor.
        """
        return self.tensors[name].level

    def extents(self, name: str) -> tuple[int | Expr, ...]:
        """Proved extents: integers, or expressions over `N` and `S:NAME`; what is not proved is a symbol of its own.

        Raises:
            KeyError: There is no such tensor.
        """
        return tuple(map(self.study.facts.size_of, self.tensors[name].dims))

    def constant(self, name: str) -> NDArray[Any] | None:
        """Entries of a tensor that is the same whatever the inputs and the number of candidates; None for others."""
        return self.study.flow.data_of(name)

    def interval(self, name: str) -> Interval:
        """Least and greatest value of every entry, of shapes that broadcast to the tensor's constant extents.

        Infinite where nothing is known; truth values are 0 and 1.
        """
        return self.study.flow.interval(name)

    @property
    def ranges(self) -> feeds.Ranges:
        """Per input the values that it may hold, entry by entry: ids lie inside the tables that they look up."""
        return self.study.known.ranges

    @cached_property
    def opaque(self) -> dict[str, str]:
        """Tensors that could not be followed, with the reason."""
        return {t.name: t.opaque for t in self.tensors.values() if t.opaque is not None}

    def is_once(self, name: str) -> bool:
        """Whether a tensor is the same for all candidates."""
        return self.level(name) <= Level.REQUEST

    # --- shares of multiply-adds ---------------------------------------------------------------------------------

    def once_share(self, node: NodeProto) -> float:
        """Share of a node's multiply-adds whose factors are all the same for all candidates.

        Args:
            node: A node of `study.model`.
        """
        entry = find(node) or _NOTHING
        factors = [k for k in entry.factors if k < len(node.input) and node.input[k]]
        masks = [self._once(node.input[k]) for k in factors]
        if len(masks) < len(entry.factors) or any(m is None for m in masks):
            return self._whole(node)
        known = [m for m in masks if m is not None]
        if Trait.MATRIX in entry.traits and len(known) == 2:
            return _matrix_share(node, *known)
        if operator(node) == "Einsum":
            return _einsum_share(node, known)
        plain = operator(node) == "Conv" and known[1].ndim >= 3 and set(known[1].shape[2:]) == {1}
        if (plain and attribute(node, "group", 1) == 1) or len(known) == 1:
            return float(known[0].mean())
        return self._whole(node)

    def _once(self, name: str) -> NDArray[np.bool_] | None:
        found = self.tensors.get(name)
        return None if found is None else found.levels < Level.CANDIDATE

    def _whole(self, node: NodeProto) -> float:
        found = [self.tensors[o] for o in node.output if o in self.tensors]
        return float(bool(found) and all(highest(t.levels) < Level.CANDIDATE for t in found))


def _matrix_share(node: NodeProto, a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    a, b = (x.transpose(matmul_order(node, k, x.ndim)) if x.ndim > 1 else x for k, x in enumerate((a, b)))
    a, b = a[None, :] if a.ndim == 1 else a, b[:, None] if b.ndim == 1 else b
    if not (a.size and b.size):
        return 0.0  # a product of no entries
    rows, columns = a.mean(-2), b.mean(-1)  # per inner position, the share that is the same
    if rows.shape[-1] != columns.shape[-1]:
        return 0.0  # an inner axis that is factored differently
    return float((rows * columns).mean())


def _einsum_share(node: NodeProto, masks: Sequence[NDArray[np.bool_]]) -> float:
    terms = attribute(node, "equation").decode().replace(" ", "").split("->")[0]
    try:
        both = float(np.einsum(f"{terms}->", *(m.astype(float) for m in masks), optimize=True))
        every = float(np.einsum(f"{terms}->", *(np.ones(m.shape) for m in masks), optimize=True))
    except ValueError:
        return 0.0
    return both / every if every else 0.0
