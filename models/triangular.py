"""Models that keep rank through depth: what is the same for all candidates of a request never reads a candidate.

A feature's level says over what it varies. Where a mixing layer lets every feature read every other one, each of them
is the candidate's behind the first layer, and the whole request is computed again for every candidate. Here a feature
reads those of its own level and below, which makes every mixing matrix block-triangular: at every depth the context's
rows are computed once per request, and candidates still read everything.

`triangular` makes that mask of a list of features with their levels. Attention over fields takes it as the mask of its
scores. RankMixer's mixing of tokens has no weights to mask: there context tokens exchange their heads among themselves,
and candidate tokens, mixed last, with all. The cross network is in `models.rdcn`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from models.autoint import AutoInt
from models.layers import Fields, Ranker, mlp
from models.rankmixer import MixerBlock, exchange
from models.spec import InputSpec, Level, columns

_RANK: dict[str, int] = {"request": 0, "candidate": 1}


def field_levels(specs: Sequence[InputSpec]) -> list[Level]:
    """The level of every feature, in the order of the inputs and of their columns.

    Args:
        specs: The inputs; one `[N]` is a feature, one `[N, k]` is k of them.
    """
    found: list[Level] = []
    for spec in specs:
        count = int(spec.shape[1]) if len(spec.shape) > 1 else 1
        request = set(columns(spec.request_columns or "")) if spec.level == "mixed" else set()
        mixed: list[Level] = ["request" if k in request else "candidate" for k in range(count)]
        found += mixed if spec.level == "mixed" else [spec.level] * count
    return found


def triangular(levels: Sequence[Level], widths: int | Sequence[int] = 1) -> Tensor:
    """Which features may read which: those of their own level and below.

    Args:
        levels: Of every feature.
        widths: How many entries each has side by side, or all have.

    Returns:
        Booleans `[entries, entries]`, a row per reader: block-triangular once context features come first. It masks
        the weight `[out, in]` of a layer; its negation hides scores `[queries, keys]` of an attention.

    Raises:
        ValueError: If a feature has no single level, or the widths are not those of the features.
    """
    if unknown := set(levels) - set(_RANK):
        raise ValueError(f"a feature is request- or candidate-level, not {', '.join(sorted(unknown))}")
    each = [widths] * len(levels) if isinstance(widths, int) else list(widths)
    if len(each) != len(levels):
        raise ValueError(f"{len(each)} widths for {len(levels)} features")
    rank = torch.tensor([_RANK[level] for level, width in zip(levels, each, strict=True) for _ in range(width)])
    return rank[:, None] >= rank[None, :]


class TriangularAutoInt(AutoInt):
    """AutoInt whose context fields attend to context fields only, in every layer."""

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.mask = ~triangular(field_levels(self.specs))


class TriangularMixerBlock(nn.Module):
    """Tokens mixed and transformed, context tokens by themselves.

    Context tokens exchange as many heads as there are of them. Candidate tokens take the place of the last of all
    tokens: all are cut into as many heads as there are tokens, and candidate token k gets head k of every one. So a
    candidate reads a share of every token, as in RankMixer, and no parameter is added.
    """

    def __init__(self, context: int, target: int, dim: int, factor: int) -> None:
        super().__init__()
        if dim % context or dim % (context + target):
            raise ValueError(f"tokens of {dim} cannot be cut into {context} and into {context + target} heads")
        self.context, self.target = (MixerBlock(tokens, dim, factor) for tokens in (context, target))

    def forward(self, context: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the tokens of both levels, [N, context, dim] and [N, target, dim]."""
        count, dim = self.context.tokens, self.context.dim
        every = exchange(torch.cat([context, target], dim=1), count + self.target.tokens, dim)
        return (
            self.context.transform(context, exchange(context, count, dim)),
            self.target.transform(target, every[:, count:]),
        )


class TriangularRankMixer(Ranker):
    """RankMixer with candidate tokens mixed last; fields are grouped to tokens of one level."""

    scales: ClassVar = {
        "small": dict(
            user=4, item=4, vocab=50, dim=4, context=2, target=2, width=8, factor=2, blocks=2, tasks=2, hidden=8
        ),
        "industrial": dict(
            user=24, item=8, vocab=1000, dim=32, context=4, target=4, width=64, factor=4, blocks=2, tasks=2, hidden=64
        ),
    }

    def __init__(
        self,
        user: int,
        item: int,
        vocab: int,
        dim: int,
        context: int,
        target: int,
        width: int,
        factor: int,
        blocks: int,
        tasks: int,
        hidden: int,
    ) -> None:
        super().__init__()
        self.fields = Fields(user, item, vocab, dim)
        self.groups = (user * dim // context, item * dim // target)
        self.tokens = nn.ModuleList(
            nn.ModuleList(nn.Linear(group, width) for _ in range(count))
            for group, count in zip(self.groups, (context, target), strict=True)
        )
        self.blocks = nn.ModuleList(TriangularMixerBlock(context, target, width, factor) for _ in range(blocks))
        self.towers = nn.ModuleList(mlp((width, hidden), head=True) for _ in range(tasks))
        self.output_names = tuple(f"task_{i}" for i in range(tasks))
        self.specs = self.fields.specs

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Returns one probability [N, 1] per task."""
        both = self.fields.user(inputs), self.fields.item(inputs)
        context, target = (
            torch.stack([layer(g) for layer, g in zip(layers, x.flatten(1).split(group, dim=1), strict=True)], dim=1)
            for x, layers, group in zip(both, self.tokens, self.groups, strict=True)
        )
        for block in self.blocks:
            context, target = block(context, target)
        pooled = torch.cat([context, target], dim=1).mean(dim=1)
        return tuple(torch.sigmoid(tower(pooled)) for tower in self.towers)
