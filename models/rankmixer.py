"""RankMixer: tokens mixed by exchanging their heads, then a feed-forward network of its own for every token."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from models.layers import Fields, Ranker, mlp


def exchange(x: Tensor, tokens: int, dim: int) -> Tensor:
    """As many heads as tokens: head h of all tokens [N, tokens, dim], side by side, is the new token h."""
    heads = x.reshape(-1, tokens, tokens, dim // tokens)
    return heads.transpose(1, 2).reshape(-1, tokens, dim)


class MixerBlock(nn.Module):
    """Tokens that exchange their heads, and a feed-forward network of its own for each."""

    def __init__(self, tokens: int, dim: int, factor: int) -> None:
        super().__init__()
        self.tokens, self.dim = tokens, dim
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.up = nn.Parameter(torch.empty(tokens, dim, factor * dim))
        self.up_bias = nn.Parameter(torch.empty(tokens, factor * dim))
        self.down = nn.Parameter(torch.empty(tokens, factor * dim, dim))
        self.down_bias = nn.Parameter(torch.empty(tokens, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Returns the tokens [N, tokens, dim]."""
        return self.transform(x, exchange(x, self.tokens, self.dim))

    def transform(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Returns the tokens from what they were, and what the exchange gave them."""
        x = self.norm1(x + mixed)
        hidden = torch.einsum("ntd,tdh->nth", x, self.up) + self.up_bias
        y = torch.einsum("nth,thd->ntd", nn.functional.gelu(hidden), self.down) + self.down_bias
        return self.norm2(x + y)


class RankMixer(Ranker):
    """Fields are grouped to tokens by position; towers read the mean of the tokens."""

    scales: ClassVar = {
        "small": dict(user=6, item=2, vocab=50, dim=4, tokens=4, width=8, factor=2, blocks=2, tasks=2, hidden=8),
        "industrial": dict(
            user=24, item=8, vocab=1000, dim=32, tokens=8, width=64, factor=4, blocks=2, tasks=2, hidden=64
        ),
    }

    def __init__(
        self,
        user: int,
        item: int,
        vocab: int,
        dim: int,
        tokens: int,
        width: int,
        factor: int,
        blocks: int,
        tasks: int,
        hidden: int,
    ) -> None:
        super().__init__()
        self.fields = Fields(user, item, vocab, dim)
        self.group = self.fields.width // tokens
        self.tokens = nn.ModuleList(nn.Linear(self.group, width) for _ in range(tokens))
        self.blocks = nn.ModuleList(MixerBlock(tokens, width, factor) for _ in range(blocks))
        self.towers = nn.ModuleList(mlp((width, hidden), head=True) for _ in range(tasks))
        self.output_names = tuple(f"task_{i}" for i in range(tasks))
        self.specs = self.fields.specs

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Returns one probability [N, 1] per task."""
        groups = self.fields(inputs).flatten(1).split(self.group, dim=1)
        x = torch.stack([layer(group) for layer, group in zip(self.tokens, groups, strict=True)], dim=1)
        for block in self.blocks:
            x = block(x)
        pooled = x.mean(dim=1)
        return tuple(torch.sigmoid(tower(pooled)) for tower in self.towers)
