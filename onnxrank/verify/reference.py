"""ONNX's reference evaluator, with its Loop as ONNX describes it.

That of onnx makes no turn where no condition is given, joins what turns give along an axis that is there already
instead of one of their own, and fails where there is no turn. Loops of exporters, and those over requests, do all of
this.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.ops.op_loop import Loop as _Loop


def evaluator(model: ModelProto) -> ReferenceEvaluator:
    """A model, ready to run."""
    return ReferenceEvaluator(model, new_ops=[Loop])


class Loop(_Loop):
    """A loop. Its name is that of the operator."""

    op_domain = ""
    body: Any
    _run_body: Any

    def _run(  # type: ignore[override]
        self,
        most: NDArray[Any] | None,
        going: NDArray[Any] | None,
        *carried: Any,
        context: Mapping[str, Any] | None = None,
        body: Any = None,
        **how: Any,
    ) -> tuple[Any, ...]:
        """Makes the turns.

        Args:
            most: How many there are at most.
            going: Whether there is a first one.
            *carried: What the first one takes.
            context: What the body may read of the graph around it.
            body: Is an attribute of the operator, too.
            **how: For the evaluator.
        """
        made: list[list[NDArray[Any]]] = [[] for _ in range(self.K)]
        turn, state = 0, [np.array(True) if going is None else going, *carried]
        while state[0] and (most is None or turn < most):
            given = zip(self.body.input_names, [np.array(turn, np.int64), *state], strict=True)
            found = self._run_body({**(context or {}), **dict(given)}, **how)
            state = found[: 1 + self.N]
            for own, value in zip(made, found[1 + self.N :], strict=True):
                own.append(value)
            turn += 1
        graph = self.body.proto_
        return (*state[1:], *(np.stack(x) if x else _nothing(graph, 1 + self.N + k) for k, x in enumerate(made)))


def _nothing(body: GraphProto, k: int) -> NDArray[Any]:
    """What no turn gives: as many axes as the body says, of no extent where it says none."""
    kind = body.output[k].type.tensor_type
    return np.zeros([0, *(d.dim_value for d in kind.shape.dim)], helper.tensor_dtype_to_np_dtype(kind.elem_type))
