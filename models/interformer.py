"""InterFormer: fields and sequence are refined side by side, each with a summary of the other."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from models.layers import Fields, Ranker, SelfAttention, Table, ids, mlp


class InterFormerLayer(nn.Module):
    """A summary of the fields makes the map that the sequence goes through; one of the sequence joins the fields."""

    def __init__(self, fields: int, dim: int, heads: int, summary: int) -> None:
        super().__init__()
        self.dim, self.summary = dim, summary
        # The pooled tokens, the last one and the first, which is the class token.
        self.pool = nn.Parameter(torch.empty(summary, dim))
        self.scores = SelfAttention(dim, heads)
        self.gate = nn.Sequential(nn.Linear(summary * dim, summary * dim), nn.Sigmoid())
        self.mix = nn.Linear(fields + summary, fields)
        self.deep = nn.Sequential(nn.Linear(dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, dim))
        self.field_norm, self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.select = nn.Sequential(nn.Linear(fields * dim, dim), nn.Sigmoid())
        self.personal = nn.Linear(dim, dim * dim)
        self.attention = SelfAttention(dim, heads)

    def forward(self, fields: Tensor, sequence: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Returns fields [N, F, dim] and sequence [N, L, dim]."""
        pool = self.pool.unsqueeze(0).expand(sequence.shape[0], -1, -1)
        pooled = self.scores(pool, sequence, mask).flatten(1)
        pooled = (pooled * self.gate(pooled)).reshape(-1, self.summary, self.dim)
        joined = self.mix(torch.cat([fields, pooled], dim=1).transpose(1, 2)).transpose(1, 2)
        known = fields.mean(dim=1) * self.select(fields.flatten(1))
        fields = self.field_norm(fields + self.deep(joined))
        own = self.personal(known).reshape(-1, self.dim, self.dim) / self.dim**0.5
        sequence = self.norm1(sequence + torch.matmul(sequence, own))
        return fields, self.norm2(sequence + self.attention(sequence, sequence, mask))


class InterFormer(Ranker):
    """The candidate is one of the fields, so the sequence knows it from the first layer on."""

    scales: ClassVar = {
        "small": dict(user=4, item=2, history=8, vocab=50, dim=8, heads=2, summary=2, layers=1, hidden=(16,)),
        "industrial": dict(
            user=20, item=8, history=50, vocab=1000, dim=32, heads=2, summary=4, layers=2, hidden=(256, 64)
        ),
    }

    def __init__(
        self,
        user: int,
        item: int,
        history: int,
        vocab: int,
        dim: int,
        heads: int,
        summary: int,
        layers: int,
        hidden: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.fields = Fields(user, item, vocab, dim, "matrix")
        self.item_table = Table(vocab, dim, padded=True)
        self.positions = nn.Parameter(torch.empty(history, dim))
        self.layers = nn.ModuleList(InterFormerLayer(user + item, dim, heads, summary) for _ in range(layers))
        self.head = mlp(((user + item + 1) * dim, *hidden), head=True)
        self.specs = [ids("user_ids", vocab, user), ids("hist_ids", vocab, history), ids("item_ids", vocab, item)]

    def forward(self, user_ids: Tensor, hist_ids: Tensor, item_ids: Tensor) -> Tensor:
        """Returns click probabilities [N, 1]."""
        fields = self.fields((user_ids, item_ids))
        sequence = self.item_table(hist_ids) + self.positions
        mask = torch.where(hist_ids == 0, -1e9, 0.0).unsqueeze(1).unsqueeze(1)
        for layer in self.layers:
            fields, sequence = layer(fields, sequence, mask)
        return torch.sigmoid(self.head(torch.cat([fields.flatten(1), sequence.mean(dim=1)], dim=1)))
