"""Dynamic sparse learning: models that are trained with a tenth of their weights, and stay that small all along.

After arXiv 2402.02855. Every target has a mask at a density, random at first. Every so many steps a share of what is
kept, the smallest by magnitude, is dropped, and as much grows where the gradient of the batch is largest. New weights
start at 0, and so does what the optimiser remembers of them. The share falls by a cosine from 0.5 to 0.005. Budgets are
exact after every step.

What a mask is worth when the model runs depends on what it keeps together:

- `Rows` keeps exactly k entries of every row of a table: `onnxrank compress --methods sparse-tables` stores those;
- `Units` keeps whole units of a layer: `--methods pack` takes the others out;
- `Entries` keeps any weights, as the paper does. No kernel that onnxruntime has is faster for it.

    masks = SparseTraining(torch.optim.Adam(model.parameters()), [Rows(model.table.weight, 0.1)], steps=1000)
    loss.backward()
    masks.step()
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor, nn


class Target(ABC):
    """Something with a mask: groups of as many items each, of which every group keeps the same number.

    Attributes:
        keep: What is kept, `[groups, items]`.
        each: How many items a group keeps.
    """

    keep: Tensor

    def __init__(self, groups: int, items: int, density: float) -> None:
        if not 0 < density <= 1:
            raise ValueError(f"a density is above 0 and at most 1, not {density}")
        self.shape = (groups, items)
        self.each = max(1, round(density * items))

    @abstractmethod
    def magnitude(self) -> Tensor:
        """How much every item is worth, `[groups, items]`."""

    @abstractmethod
    def gradient(self) -> Tensor:
        """How much every item would be worth, had it a weight, `[groups, items]`."""

    @abstractmethod
    def spread(self, items: Tensor) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Parameters that are 0 where an item is not kept, and where each holds these items `[groups, items]`."""

    def behind(self, items: Tensor) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """What else belongs to these items, and keeps its value while they are not kept."""
        yield from ()

    @torch.no_grad()
    def hold(self) -> None:
        """Makes 0 what the mask hides."""
        for p, where in self.spread(~self.keep):
            p.masked_fill_(where, 0)

    @torch.no_grad()
    def finish(self) -> None:
        """Makes 0 all that is of no use under the mask, once it stays."""
        for p, where in chain(self.spread(~self.keep), self.behind(~self.keep)):
            p.masked_fill_(where, 0)

    def draw(self, generator: torch.Generator) -> None:
        """Takes a random mask."""
        self.keep = _first(torch.rand(self.shape, generator=generator), self.each)

    def prune(self) -> None:
        """Takes the mask of the largest magnitudes, and makes the rest 0: pruning after training."""
        self.keep = _first(-self.magnitude(), self.each)
        self.finish()

    def move(self, share: float, gradient: Tensor) -> Tensor:
        """Drops the smallest of what is kept, and grows as much.

        Only what has a gradient grows, and no more is dropped than grows: a row of a table that no example of the batch
        looked up stays as it is.

        Args:
            share: Of what is kept, at most.
            gradient: As `gradient` gave it before anything was masked.

        Returns:
            What changed, `[groups, items]`.
        """
        slope = gradient.masked_fill(self.keep, 0)
        count = (slope > 0).sum(1, keepdim=True).clamp(max=int(share * self.each))
        dropped = self.keep & _first(self.magnitude().masked_fill(~self.keep, math.inf), count)
        grown = _first(-slope, count)
        self.keep = (self.keep & ~dropped) | grown
        return dropped | grown


class Entries(Target):
    """Any weights of a tensor."""

    def __init__(self, parameter: nn.Parameter, density: float) -> None:
        self.parameter = parameter
        super().__init__(1, parameter.numel(), density)

    def magnitude(self) -> Tensor:
        return self.parameter.detach().abs().reshape(self.shape)

    def gradient(self) -> Tensor:
        return _slope(self.parameter).abs().reshape(self.shape)

    def spread(self, items: Tensor) -> Iterator[tuple[nn.Parameter, Tensor]]:
        yield self.parameter, items.reshape(self.parameter.shape)


class Rows(Entries):
    """Equally many weights in every row of a table `[rows, width]`."""

    def __init__(self, parameter: nn.Parameter, density: float) -> None:
        Target.__init__(self, *parameter.shape, density)
        self.parameter = parameter


class Units(Target):
    """Whole units between two layers.

    What is dropped loses the weights by which the next layer reads it; those by which it reads stay, so that it has an
    output that a gradient can ask for. `finish` makes these 0 as well.

    Args:
        layer: Gives the units.
        reader: The only layer that reads them, through a function of each.
        density: Share of units kept.
    """

    def __init__(self, layer: nn.Linear, reader: nn.Linear, density: float) -> None:
        if layer.out_features != reader.in_features:
            raise ValueError(f"a layer of {layer.out_features} units is not read by one of {reader.in_features} inputs")
        self.layer, self.reader = layer, reader
        super().__init__(1, layer.out_features, density)

    def magnitude(self) -> Tensor:
        # A unit may have large weights on one side and small ones on the other: what counts is their product.
        before, after = self.layer.weight.detach().norm(dim=1), self.reader.weight.detach().norm(dim=0)
        return (before * after)[None]

    def gradient(self) -> Tensor:
        return _slope(self.reader.weight).norm(dim=0)[None]

    def spread(self, items: Tensor) -> Iterator[tuple[nn.Parameter, Tensor]]:
        yield self.reader.weight, items.expand_as(self.reader.weight)

    def behind(self, items: Tensor) -> Iterator[tuple[nn.Parameter, Tensor]]:
        yield self.layer.weight, items.T.expand_as(self.layer.weight)
        if self.layer.bias is not None:
            yield self.layer.bias, items[0]


class SparseTraining:
    """Steps an optimiser so that masks hold, and move.

    Args:
        optimiser: Any of torch's whose memory of a weight is a tensor of the weight's shape.
        targets: What has masks.
        steps: How many there will be, for the cosine.
        every: Steps between two moves; 0 keeps the random masks, as a control.
        first: Share that is dropped at the first move.
        last: The same at the last.
        until: Share of the steps after which masks stay, so that what grew last is trained.
        seed: Of the random masks.
        draw: Whether to begin with random masks; targets that were pruned have theirs.
    """

    def __init__(
        self,
        optimiser: torch.optim.Optimizer,
        targets: Sequence[Target],
        steps: int,
        *,
        every: int = 100,
        first: float = 0.5,
        last: float = 0.005,
        until: float = 0.75,
        seed: int = 0,
        draw: bool = True,
    ) -> None:
        self.optimiser, self.targets = optimiser, list(targets)
        self.every, self.first, self.last, self.end = every, first, last, int(until * steps)
        self.count = 0
        generator = torch.Generator().manual_seed(seed)
        for target in self.targets:
            if draw:
                target.draw(generator)
            target.hold()

    def share(self) -> float:
        """What may be dropped now, of what is kept."""
        done = min(1.0, self.count / max(1, self.end))
        return self.last + (self.first - self.last) * (1 + math.cos(math.pi * done)) / 2

    @torch.no_grad()
    def step(self) -> None:
        """Steps by the gradients that are there, and moves the masks if it is time."""
        self.count += 1
        slopes = [target.gradient() for target in self.targets]  # of what is hidden, too
        for target in self.targets:
            for p, hidden in target.spread(~target.keep):
                _slope(p).masked_fill_(hidden, 0)
        self.optimiser.step()
        moves = self.every and self.count % self.every == 0 and self.count < self.end
        for target, slope in zip(self.targets, slopes, strict=True):
            target.hold()
            if not moves:
                continue
            changed = target.move(self.share(), slope)
            for p, where in chain(target.spread(changed), target.behind(changed)):
                for held in self.optimiser.state[p].values():
                    if isinstance(held, Tensor) and held.shape == p.shape:
                        held.masked_fill_(where, 0)
            target.hold()

    def finish(self) -> None:
        """Makes 0 whatever the masks hide; to be called after the last step."""
        for target in self.targets:
            target.finish()

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on, the optimiser's own included."""
        return {
            "optimiser": self.optimiser.state_dict(),
            "count": self.count,
            "keep": [target.keep for target in self.targets],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where another left off.

        Raises:
            ValueError: If that one had other targets.
        """
        if [tuple(k.shape) for k in state["keep"]] != [t.shape for t in self.targets]:
            raise ValueError("the checkpoint has masks of other targets")
        self.optimiser.load_state_dict(state["optimiser"])
        self.count = state["count"]
        for target, keep in zip(self.targets, state["keep"], strict=True):
            target.keep = keep.clone()


def unit_share(sizes: Sequence[int], density: float) -> float:
    """The share of hidden units with which an MLP through `sizes` keeps so much of its weights.

    Its inputs and its outputs stay: with a share p, the first layer keeps p of its weights, those inside p².
    """
    ends = sizes[0] * sizes[1] + sizes[-2] * sizes[-1]
    inside = sum(a * b for a, b in pairwise(sizes[1:-1]))
    whole = density * (ends + inside)
    return 2 * whole / (ends + math.sqrt(ends**2 + 4 * inside * whole))


def _first(score: Tensor, count: int | Tensor) -> Tensor:
    """Marks the `count` items of least score in every group, the earlier one where they are equal."""
    order = score.argsort(dim=1, stable=True)
    place = torch.empty_like(order).scatter_(1, order, torch.arange(score.shape[1]).expand_as(order))
    return place < count


def _slope(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None or parameter.grad.is_sparse:
        raise ValueError("a target needs a dense gradient in every step: set sparse=False, and use all parameters")
    return parameter.grad
