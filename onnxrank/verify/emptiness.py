"""Where there are no candidates, or nothing along a length: what differs there and is no fault of the second model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx
from numpy.typing import NDArray

from onnxrank import model as files
from onnxrank.errors import ModelError
from onnxrank.graphs import live
from onnxrank.verify import compare
from onnxrank.verify.options import LEVELS
from onnxrank.verify.side import MODEL, Side, run_once
from onnxrank.workers import Crashed

if TYPE_CHECKING:
    from onnxrank.verify.engine import Engine
    from onnxrank.verify.points import Point

_INSIDE = "inside"


class Emptiness:
    """Judges what models give where there is nothing to give, and tells what it excuses.

    Args:
        engine: The run; its models have sessions.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def vacuous(self, p: Point, name: str, a: NDArray[Any], b: NDArray[Any], lengths: str = "") -> bool:
        """Whether an output says nothing where there are no candidates, or nothing along a length; told, if so.

        That is where the original breaks its own promise of a shape; and where neither model gives any entry, for then
        their extents are all that can differ: a `Reshape` takes a computed extent of 0 for that of its operand, and
        fused kernels forget rows. If the second model breaks the promise, it has to be the fault of a kernel.

        Args:
            p: The request.
            name: The output.
            a: What the original gives.
            b: What the other model gives.
            lengths: The lengths that are 0; empty where it is the candidates.
        """
        if a.shape == b.shape:
            return False
        if not self.declares(name, a):
            self.malformed(name, a, lengths)
            return True
        if a.size or b.size:
            return False
        fault = None if self.declares(name, b) else self._misshapen(p, self.engine.optimized)
        if fault == "":
            return False
        self.engine.report.find(
            "rounding",
            "empty",
            f"With {lengths or 'no candidates'} no entries are left of {name!r}: the original gives {list(a.shape)}, "
            f"the optimized model {list(b.shape)}{', which is the fault of onnxruntime: ' + fault if fault else ''}.",
            "note",
        )
        return True

    def excused(self, p: Point, why: ModelError, provider: str, lengths: str = "") -> bool:
        """Whether a failure without candidates, or with nothing along a length, is the runtime's fault; told, if so.

        It is where a kernel gives a tensor inside the original another shape than ONNX does, so that it was no run of
        that model; and where the second model gives what the original gives as long as nothing is fused.

        Args:
            p: The request.
            why: What the runtime says of the second model.
            provider: Where it says so.
            lengths: The lengths that are 0; empty where it is the candidates.
        """
        if isinstance(why, Crashed):
            return False
        reason = self._misshapen(p, self.engine.original)
        if not reason:
            session = f"{provider}/{LEVELS[0]}"
            a, b = run_once(
                self.engine.sides, session, (p.feed, p.bound), self.engine.shared, self.engine.options.timeout
            )
            if isinstance(a, ModelError) or isinstance(b, ModelError):
                return False
            if any(
                compare.gap(a[k], b[k]).largest > 0 and not self.vacuous(p, k, a[k], b[k], lengths)
                for k in self.engine.shared
            ):
                return False
            reason = "without its optimisations it gives what the original gives"
        self.engine.report.find(
            "rounding",
            "runtime",
            f"With {lengths or 'no candidates'} onnxruntime does not run the optimized model ({why}), which is its own "
            f"fault: {reason}.",
            "warning",
            model="optimized",
        )
        return True

    def _misshapen(self, p: Point, side: Side) -> str:
        """Which tensor inside a model has not the shape that ONNX gives it on a request; empty if all have."""
        model = files.without_external(files.flattened(side.proto))
        for o in model.graph.output:  # what it declares is a promise, no operator's
            o.type.tensor_type.ClearField("shape")
        try:
            graph = onnx.shape_inference.infer_shapes(model).graph
        except Exception:  # whatever it stumbles over, nothing is known then
            return ""
        shapes = {
            v.name: [d.dim_value if d.HasField("dim_value") else None for d in v.type.tensor_type.shape.dim]
            for v in (*graph.value_info, *graph.output)
            if v.type.tensor_type.HasField("shape")
        }
        made = [o for n in live(model).graph.node for o in n.output if o in shapes]
        feed = p.feed if side is self.engine.original else p.bound
        try:
            side.call("expose", key=_INSIDE, of=MODEL, names=made)
            side.open(_INSIDE, key=_INSIDE, level=LEVELS[0], precision=self.engine.precision)
            (answer,) = side.run(_INSIDE, [feed], made)
            side.spare(_INSIDE)
        except ModelError:
            return ""
        if isinstance(answer, ModelError):
            return ""
        for name in made:
            have, want = answer[name].shape, shapes[name]
            if len(have) != len(want) or any(n not in (None, m) for m, n in zip(have, want, strict=True)):
                where = "the original" if side is self.engine.original else "the optimized model"
                return f"inside {where} it gives {name!r} the shape {list(have)}"
        return ""

    def declares(self, name: str, data: NDArray[Any]) -> bool:
        """Whether an output has the shape that the original declares."""
        info = next(o for o in self.engine.original.proto.graph.output if o.name == name)
        dims = info.type.tensor_type.shape.dim
        return len(dims) == data.ndim and all(
            not d.HasField("dim_value") or d.dim_value == n for d, n in zip(dims, data.shape, strict=True)
        )

    def malformed(self, name: str, data: NDArray[Any], lengths: str = "") -> None:
        """Notes that an output of the original has not its declared shape: without candidates, or at lengths of 0."""
        self.engine.report.find(
            "rounding",
            "original",
            f"With {lengths or 'no candidates'} the original gives {name!r} the shape {list(data.shape)}, which it "
            "does not declare, so nothing was compared there.",
            "note",
            model="original",
        )
