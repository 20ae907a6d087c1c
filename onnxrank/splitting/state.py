"""Which tensors one model hands to the other, and in what form."""

from __future__ import annotations

import os
from collections.abc import Sequence
from math import prod

import numpy as np
from onnx import TensorProto

from onnxrank import cost, halves
from onnxrank.errors import ModelError, UsageError
from onnxrank.extents import Expr
from onnxrank.facts import settings
from onnxrank.feeds import Maker
from onnxrank.graphs import names_in
from onnxrank.splitting import contract, graph
from onnxrank.splitting.cut import PRICE, Cut, Impossible, Problem, Step, divided, least
from onnxrank.splitting.estimates import Estimates
from onnxrank.splitting.graph import Handed, Layout, Levels
from onnxrank.splitting.options import Options
from onnxrank.study import Study
from onnxrank.verify import sizes
from onnxrank.workers import RemoteSession


class State:
    """What a request model gives and a candidate model takes.

    Args:
        study: What is known of the model that is cut.
        levels: The levels of its nodes.
        estimates: What is predicted of it.
        options: Choices.
        folder: Folder of its external data.

    Attributes:
        cut: Which steps are the request model's, and which tensors are handed over.
        layout: In what form these are.
        notes: What is to be said of that.

    Raises:
        ModelError: A tensor would have to be handed over that none can be.
        UsageError: No state is as asked for.
    """

    def __init__(
        self,
        study: Study,
        levels: Levels,
        estimates: Estimates,
        options: Options,
        folder: str | os.PathLike[str] | None,
    ) -> None:
        self.study, self.model, self.levels, self.estimates = study, study.model, levels, estimates
        self.options, self.folder = options, folder
        self.notes: list[str] = []
        self.cut = self._cut()
        self.layout = self._layout()
        self._check_size()

    def _cut(self) -> Cut:
        """The cheapest cut; the cheapest of those that are small enough, where that is asked for."""
        problem = self._problem(self.estimates.usual, False)
        try:
            found = least(problem)
            if self.options.most is None:
                return found
            most = self._problem(self.estimates.longest, True)
            price = PRICE
            while True:
                found = least(most, price)
                if found.bytes <= self.options.most:
                    return divided(problem, found.request)
                if price > 1.0:
                    raise UsageError(
                        f"No state is as small as {self.options.most} bytes: it has {found.bytes} at least, at the "
                        "longest lengths served (--length says which these are)."
                    )
                price *= 2
        except Impossible as e:
            why = "of which nothing limits the size, or which is" if self.options.most is not None else "which is"
            raise ModelError(
                f"The model cannot be cut: the state would have to hold {e.tensor!r}, {why} no tensor of numbers whose "
                "type and number of axes are known."
            ) from e

    def _problem(self, shapes: cost.Shapes, bounded: bool) -> Problem:
        nodes, levels = self.model.graph.node, self.levels
        given = set(levels.inputs)
        for k in levels.request:
            given |= {o for o in nodes[k].output if o}
        steps = []
        held: dict[str, int | None] = dict.fromkeys(levels.inputs)
        for k in levels.request:
            seconds = None if graph.is_random(nodes[k]) else self.estimates.seconds(k, shapes)
            own = tuple(o for o in nodes[k].output if o)
            steps.append(Step(tuple(sorted(graph.reads(nodes[k]) & given)), own, seconds))
            held |= dict.fromkeys(own)
        for name in held:
            held[name] = self.estimates.bytes(name, shapes) if not bounded or self.estimates.bounded(name) else None
        return Problem(steps, held, levels.wanted)

    def _layout(self) -> Layout:
        names = graph.state_names(self.model, self.cut.state)
        tensors = [Handed(t, names[t], self.estimates.types[t], self._extents(t, names[t])) for t in self.cut.state]
        half = self.options.dtype == "float16"
        large = self._beyond_half(tensors) if half else frozenset()
        if self.options.state == "named":
            shown = ", ".join(map(repr, sorted(large)))
            self.notes += [f"{shown} stays float32: it has values that 16 bits do not hold"] if large else []
            return Layout(contract.ordered(tensors), None, half, large)
        if large:
            raise UsageError(
                f"The state cannot be packed in 16 bits: {min(large)!r} has values that these do not hold. Use --state "
                "named, which leaves it as it is, or --state-dtype float32."
            )
        contract.check_packable(tensors)
        taken = names_in(self.model.graph) | set(names.values())
        vector = next(n for n in ("state", *(f"state_{k}" for k in range(len(taken) + 1))) if n not in taken)
        return Layout(tuple(tensors), vector, half)

    def _beyond_half(self, tensors: Sequence[Handed]) -> frozenset[str]:
        """Tensors that have finite values beyond the range of 16 bits, as masks have, for some inputs that are tried.

        Raises:
            ModelError: The model does not run.
        """
        floats = tuple(t for t in tensors if t.type == TensorProto.FLOAT)
        if not floats:
            return frozenset()
        inside = frozenset(self.levels.request[k] for k in self.cut.request)
        request, _ = graph.divide(self.model, self.levels, inside, Layout(floats))
        declared, most = self.study.declared, float(np.finfo(np.float16).max)
        # Ids of 0 are padding in many models, and a mask shows where there is some.
        makers = [self.study.maker, Maker(declared, None, 0), Maker(declared, None, 1)]
        found: set[str] = set()
        with RemoteSession(request, self.folder) as session:
            for k, setting in enumerate(settings(self.study.symbols, beyond=self.study.shortest - 1)):
                for maker in makers if not k else makers[:2]:
                    try:
                        made = session.run(maker(setting))
                    except ModelError:
                        if maker is self.study.maker:
                            raise
                        continue
                    found |= {t.tensor for t in floats if (np.isfinite(v := made[t.name]) & (np.abs(v) > most)).any()}
        return frozenset(found)

    def type_of(self, t: Handed) -> str:
        """The type in which a tensor is handed over, by numpy's name."""
        return halves.type_name(self.layout.kind if self.layout.packed else self.layout.type_of(t)) or ""

    def bytes(self, t: Handed, shapes: cost.Shapes) -> int:
        """The size in which a tensor is handed over."""
        return prod(shapes.shape(t.tensor) or ()) * np.dtype(self.type_of(t)).itemsize

    def _check_size(self) -> None:
        """Holds the state as it is handed over against its limit: in what form that is, the cut did not know.

        Raises:
            UsageError: It is too large.
        """
        size = sum(self.bytes(t, self.estimates.longest) for t in self.layout.tensors)
        if self.options.most is not None and size > self.options.most:
            raise UsageError(
                f"The state has {size} bytes as it is handed over ({self.options.state}, {self.options.dtype}), and "
                f"may have {self.options.most}."
            )

    def _extents(self, tensor: str, name: str) -> tuple[int | str, ...]:
        """A tensor's extents: numbers, or what they are called."""
        found = self.study.facts.sizes.get(tensor)
        if found is None:
            expressions = [c if not s else s[0] for c, s in self.study.input_extents()[tensor]]
            return tuple(sizes.name_of(e) if isinstance(e, str) else e for e in expressions)
        out: list[int | str] = []
        for axis, size in enumerate(found):
            known = isinstance(size, Expr) and size.symbols <= self.estimates.spans.keys()
            out.append(size if isinstance(size, int) else str(size).replace("S:", "") if known else f"{name}.{axis}")
        return tuple(out)
