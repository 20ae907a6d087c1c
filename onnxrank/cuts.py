"""Constants that are cut to the length of a request, in one step, and with what is made of them alone made beforehand.

Exporters write `mask[:L, :L]` as a Slice per axis: the first copies rows as long as the constant's. A chain of slices
of a constant is one Slice of it:

    slice(slice(c, axis 0), axis 1) = slice(c, axes 0 and 1)

What reads such a cut and constants, and works entry by entry, can be made of the whole constant when the model is
rewritten, such as a bias by the distance of two positions, `table[distances[:L, :L]]`:

    f(slice(c)) = slice(f(c))
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, numpy_helper

from onnxrank import extents as ex
from onnxrank.emitter import emitter_for, replaced
from onnxrank.extents import Expr
from onnxrank.facts import Facts, evaluated
from onnxrank.graphs import attribute
from onnxrank.operators import Trait, operator, traits
from onnxrank.uses import Uses

Data = Callable[[str], "NDArray[Any] | None"]
Size = int | Expr

MOST_ENTRIES = 1 << 24
"""Constants with more entries are left as they are."""


@dataclass(frozen=True)
class Stretch:
    """Positions of one axis, from one to another by steps of one.

    Attributes:
        start: The tensor that tells where they start, of one number that is not negative.
        end: The tensor that tells where they end.
        dtype: The type of these numbers.
    """

    start: str
    end: str
    dtype: np.dtype[Any]


@dataclass(frozen=True)
class Cut:
    """A constant of which some positions are taken.

    Attributes:
        constant: The constant.
        axes: Per axis that is cut what is taken: a stretch, or the positions that a tensor holds.
    """

    constant: str
    axes: Mapping[int, Stretch | str]


def resolved(model: ModelProto, facts: Facts, data: Data, folder: Any) -> ModelProto | None:
    """Writes every cut of a constant as one Slice, behind what is made of it alone.

    Args:
        model: The model.
        facts: Its shapes and constants.
        data: Entries of constants; None for what is none.
        folder: Where its external data lies.

    Returns:
        A model of the same outputs; None where there is nothing to replace.
    """
    if not any(operator(n) == "Slice" for n in model.graph.node):
        return None
    # What is made of all positions may fail where that of some does not.
    return _Cuts(model, facts, data, beforehand=True).written(folder) or _Cuts(
        model, facts, data, beforehand=False
    ).written(folder)


class _Cuts:
    """The cuts of a graph's constants, as they are to be written.

    Args:
        model: The model.
        facts: Its shapes and constants.
        data: Entries of constants.
        beforehand: Whether to make what is made of constants alone of all their positions.
    """

    def __init__(self, model: ModelProto, facts: Facts, data: Data, beforehand: bool) -> None:
        self.model, self.facts, self.data = model, facts, data
        self.uses = Uses(model.graph.node)
        self.emit = emitter_for(model)
        self.cuts: dict[str, Cut] = {}
        self.whole: list[NodeProto] = []
        """What is made of whole constants."""
        self.changed: set[str] = set()
        """Tensors that are written in another way."""
        self._made: dict[str, tuple[int, ...]] = {}
        self._outputs = {o.name for o in model.graph.output}
        for node in model.graph.node:
            cut = self._of(node) or (self._beforehand(node) if beforehand else None)
            if cut is not None:
                self.cuts[node.output[0]] = cut

    def _of(self, node: NodeProto) -> Cut | None:
        """What a Slice or Gather takes of a constant; None where that is none, or cannot be told."""
        own = self._taken(node)
        if own is None:
            return None
        name = node.input[0]
        before = self.cuts.get(name)
        if before is None:
            return Cut(name, own) if self.data(name) is not None else None
        if not self._joins(name):
            return None
        self.changed.add(node.output[0])
        return Cut(before.constant, {**before.axes, **own})

    def _taken(self, node: NodeProto) -> dict[int, Stretch | str] | None:
        """What a Slice or Gather takes along its axes; None where that cannot be told."""
        if operator(node) not in ("Slice", "Gather") or node.output[0] not in self.facts.sizes:
            return None
        rank = len(self.facts.sizes[node.output[0]])
        if operator(node) == "Gather":
            known = self._entries(node.input[1])
            along = len(self.facts.sizes.get(node.input[1], ())) == 1 and all(map(_counted, known))
            return {attribute(node, "axis", 0) % rank: node.input[1]} if known and along else None
        axes = self.data(node.input[3]) if len(node.input) > 3 else None
        steps = self.data(node.input[4]) if len(node.input) > 4 and node.input[4] else np.ones(1)
        if axes is None or steps is None or (steps != 1).any():
            return None
        starts, ends = (self._each(i, axes.dtype) for i in node.input[1:3])
        if not len(starts) == len(ends) == len(axes) or not all(_counted(n) for s in starts for n in self._entries(s)):
            return None
        return {int(a) % rank: Stretch(s, e, axes.dtype) for a, s, e in zip(axes, starts, ends, strict=True)}

    def _each(self, name: str, dtype: np.dtype[Any]) -> list[str]:
        """Tensors of one number each, which one of several holds; none where there are no such."""
        known = self._entries(name)
        if len(known) == 1:
            return [name]
        made = self.uses.producers.get(name)
        if made is not None and operator(made) == "Concat":
            return list(made.input) if len(made.input) == len(known) else []
        return [] if self.data(name) is None else [self.emit.constant(np.array([n], dtype)) for n in known]

    def _entries(self, name: str) -> list[Size]:
        """Entries of a tensor of extents; none where they are not known."""
        stored = self.emit.initializers.get(name)
        data = self.data(name) if stored is None else numpy_helper.to_array(stored)
        if data is not None:
            return [int(n) for n in data.reshape(-1)] if data.dtype.kind == "i" else []
        return list(self.facts.entries.get(name, ()))

    def _joins(self, name: str) -> bool:
        """Whether a Slice cuts a constant for nothing else than nodes that can take the same of the constant."""
        slices = any(isinstance(t, Stretch) for t in self.cuts[name].axes.values())  # a Gather already comes first
        return (
            slices
            and name not in self._outputs
            and all(self._follows(self.cuts[name], name, n) for n in self.uses.readers(name))
        )

    def _follows(self, before: Cut, name: str, node: NodeProto) -> bool:
        """Whether a node that reads a cut can take the same of its constant."""
        own = self._taken(node) if node.input[0] == name else None
        if own is None:
            return False
        taken = (*own.values(), *before.axes.values())
        return len({t.dtype for t in taken if isinstance(t, Stretch)}) <= 1 and all(
            self._within(before.axes[axis], t) for axis, t in own.items() if axis in before.axes
        )

    def _within(self, before: Stretch | str, taken: Stretch | str) -> bool:
        """Whether what is taken of the first positions of a constant are these positions of it."""
        if isinstance(before, str) or self._entries(before.start) != [0]:
            return False
        last = self._entries(taken.end) if isinstance(taken, Stretch) else [n + 1 for n in self._entries(taken)]
        all_of = self._entries(before.end)
        return len(all_of) == 1 and bool(last) and all(_counted(n) and _counted(all_of[0] - n) for n in last)

    def _beforehand(self, node: NodeProto) -> Cut | None:
        """The cut that a node's result is of what the node makes of a whole constant; None where it is none."""
        mine = [i for i in node.input if i in self.cuts]
        if len(mine) != 1 or len(node.output) != 1 or len(self.uses.readers(mine[0])) != 1 or mine[0] in self._outputs:
            return None
        cut = self.cuts[mine[0]]
        names = [i for i in node.input if i and i != mine[0]]
        others = [d for i in names if (d := self.data(i)) is not None]
        along = self._along(node, list(node.input).index(mine[0]), cut, others) if len(others) == len(names) else None
        if along is None:
            return None
        shape, axes = along
        name = self.emit.fresh(f"{node.output[0]}/whole")
        made = NodeProto()
        made.CopyFrom(node)
        made.input[:] = [cut.constant if i == mine[0] else i for i in node.input]
        made.output[:] = [name]
        self.whole.append(made)
        self._made[name] = shape
        self.changed.add(node.output[0])
        return Cut(name, {axes[a]: t for a, t in cut.axes.items()})

    def _along(
        self, node: NodeProto, place: int, cut: Cut, others: Sequence[NDArray[Any]]
    ) -> tuple[tuple[int, ...], list[int]] | None:
        """What a node makes of a whole constant: its shape, and which axis each of the constant's becomes.

        Args:
            node: The node.
            place: Which of its operands the cut is.
            cut: The cut.
            others: The other operands.

        Returns:
            None where it does not work along the axes that are cut position by position.
        """
        shape = self._shape(cut.constant)
        same = list(range(len(shape)))
        if operator(node) == "Gather":
            return (shape, same) if place == 1 and others and others[0].ndim == 1 else None
        if operator(node) == "GatherND":
            known = place == 1 and others and not attribute(node, "batch_dims", 0) and len(shape) - 1 not in cut.axes
            return ((*shape[:-1], *others[0].shape[shape[-1] :]), same) if known else None
        if operator(node) == "Unsqueeze" and place == 0:
            given = others[0].reshape(-1) if others else attribute(node, "axes", ())
            new = {int(a) % (len(shape) + len(given)) for a in given}
            kept = [k for k in range(len(shape) + len(new)) if k not in new]
            sizes = dict(zip(kept, shape, strict=True))
            return tuple(sizes.get(k, 1) for k in range(len(kept) + len(new))), kept
        alike = Trait.ELEMENTWISE in traits(node) and not Trait.RANDOM & traits(node)
        return (shape, same) if alike and all(_alike(d.shape, shape, cut.axes) for d in others) else None

    def _shape(self, constant: str) -> tuple[int, ...]:
        """Shape of a whole constant, or of what is made of one."""
        data = self.data(constant)
        return self._made[constant] if data is None else data.shape

    def written(self, folder: Any) -> ModelProto | None:
        """The model with its cuts; None where there are none, or the runtime cannot compute what they are of."""
        if not self.changed:
            return None
        data: Mapping[str, NDArray[Any]] = {}
        if self.whole:
            part = ModelProto()
            part.CopyFrom(self.model)
            part.graph.node.extend(self.whole)
            data = evaluated(part, self.whole, folder)
            if not data:
                return None
        for name, entries in data.items():
            self.emit.initializers[name] = numpy_helper.from_array(entries, name)

        def write(node: NodeProto) -> bool:
            (name,) = node.output[:1] or ("",)
            if name in self.changed:
                self._write(self.cuts[name], name)
            return name in self.changed

        return replaced(self.model, self.emit, write)

    def _write(self, cut: Cut, output: str) -> None:
        """Writes the nodes that take a cut, the last with its name."""
        stretches = {a: t for a, t in sorted(cut.axes.items()) if isinstance(t, Stretch)}
        picks = [(a, t) for a, t in sorted(cut.axes.items()) if isinstance(t, str)]
        name = cut.constant
        for k, (axis, at) in enumerate(picks, 1):
            last = k == len(picks) and not stretches
            name = self.emit.add("Gather", [name, at], {"axis": axis}, output=output if last else None)
        if stretches:
            dtype = next(iter(stretches.values())).dtype
            starts, ends = (
                self._joined(t, dtype) for t in zip(*((t.start, t.end) for t in stretches.values()), strict=True)
            )
            axes = self.emit.constant(np.array([*stretches], dtype))
            self.emit.add("Slice", [name, starts, ends, axes], output=output)

    def _joined(self, names: Sequence[str], dtype: np.dtype[Any]) -> str:
        """Numbers in one tensor."""
        numbers = [n for name in names for n in self._entries(name)]
        if len(numbers) == len(names) and all(isinstance(n, int) for n in numbers):
            return self.emit.constant(np.array(numbers, dtype))
        return names[0] if len(names) == 1 else self.emit.add("Concat", names, {"axis": 0})


def _counted(size: Size) -> bool:
    """Whether a number is proved not to be negative."""
    return ex.bounds(size)[0] >= 0


def _alike(own: tuple[int, ...], shape: tuple[int, ...], axes: Collection[int]) -> bool:
    """Whether an operand is broadcast to a shape, and the same along some axes."""
    padded = (1,) * (len(shape) - len(own)) + own
    return len(own) <= len(shape) and all(
        n == 1 or (n == m and k not in axes) for k, (n, m) in enumerate(zip(padded, shape, strict=True))
    )
