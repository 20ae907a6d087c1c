"""HyFormer: few query tokens read the sequences layer by layer, and are mixed with each other between the readings."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from models.layers import Fields, Ranker, SelfAttention, Table, ids, mlp


class HyFormerLayer(nn.Module):
    """Cross-attention of the queries on one encoding of the sequence, then exchange of heads and a layer per token."""

    def __init__(self, tokens: int, queries: int, dim: int, heads: int) -> None:
        super().__init__()
        self.queries, self.tokens, self.dim = queries, tokens, dim
        self.encode = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, dim))
        self.attention = SelfAttention(dim, heads)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.weight = nn.Parameter(torch.empty(tokens, dim, dim))
        self.bias = nn.Parameter(torch.empty(tokens, dim))

    def forward(self, tokens: Tensor, sequence: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Returns tokens [N, tokens, dim] and sequence [N, L, dim]; the first tokens are the queries."""
        sequence = sequence + self.encode(sequence)
        queries = tokens[:, : self.queries]
        queries = queries + self.attention(self.norm1(queries), sequence, mask)
        x = torch.cat([queries, tokens[:, self.queries :]], dim=1)
        heads = x.reshape(-1, self.tokens, self.tokens, self.dim // self.tokens)
        mixed = heads.permute(0, 2, 1, 3).reshape(-1, self.tokens, self.dim)
        own = torch.einsum("ntd,tde->nte", mixed, self.weight) + self.bias
        return self.norm2(x + nn.functional.gelu(own)), sequence


class HyFormer(Ranker):
    """Queries are made of all fields, so they know the candidate; keys and values belong to the request alone."""

    scales: ClassVar = {
        "small": dict(
            user=4, item=2, history=8, vocab=50, actions=5, dim=8, heads=2, queries=2, others=2, layers=2, hidden=(16,)
        ),
        "industrial": dict(
            user=20,
            item=8,
            history=100,
            vocab=1000,
            actions=8,
            dim=64,
            heads=4,
            queries=4,
            others=4,
            layers=2,
            hidden=(128,),
        ),
    }

    def __init__(
        self,
        user: int,
        item: int,
        history: int,
        vocab: int,
        actions: int,
        dim: int,
        heads: int,
        queries: int,
        others: int,
        layers: int,
        hidden: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.fields = Fields(user, item, vocab, dim, "matrix")
        self.item_table, self.action_table = Table(vocab, dim, padded=True), Table(actions, dim)
        tokens = queries + others
        self.tokens = nn.Linear(self.fields.width, tokens * dim)
        self.layers = nn.ModuleList(HyFormerLayer(tokens, queries, dim, heads) for _ in range(layers))
        self.count, self.dim = tokens, dim
        self.head = mlp((tokens * dim, *hidden), head=True)
        self.specs = [
            ids("user_ids", vocab, user),
            ids("hist_ids", vocab, history),
            ids("hist_actions", actions, history),
            ids("item_ids", vocab, item),
        ]

    def forward(self, user_ids: Tensor, hist_ids: Tensor, hist_actions: Tensor, item_ids: Tensor) -> Tensor:
        """Returns click probabilities [N, 1]."""
        sequence = self.item_table(hist_ids) + self.action_table(hist_actions)
        mask = torch.where(hist_ids == 0, -1e9, 0.0).unsqueeze(1).unsqueeze(1)
        tokens = self.tokens(self.fields((user_ids, item_ids)).flatten(1)).reshape(-1, self.count, self.dim)
        for layer in self.layers:
            tokens, sequence = layer(tokens, sequence, mask)
        return torch.sigmoid(self.head(tokens.flatten(1)))
