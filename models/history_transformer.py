"""A causal transformer over the history in which the appended candidate is a query and never a key."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from models.layers import Ranker, SelfAttention, Table, ids, mlp


class CausalLayer(nn.Module):
    """A transformer layer with the normalisation first; keys are all tokens but the last."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attention = SelfAttention(dim, heads)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.feedforward = nn.Sequential(nn.Linear(dim, 4 * dim), nn.ReLU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Returns the tokens [N, L + 1, dim] after attention and feed-forward."""
        y = self.norm1(x)
        x = x + self.attention(y, y[:, :-1], mask)
        return x + self.feedforward(self.norm2(x))


class HistoryTransformer(Ranker):
    """The score is an MLP on the candidate's token; padding is masked on top of the causal mask."""

    scales: ClassVar = {
        "small": dict(history=12, vocab=60, dim=8, heads=2, layers=2, hidden=(16,)),
        "industrial": dict(history=128, vocab=1000, dim=64, heads=4, layers=3, hidden=(64,)),
    }

    def __init__(self, history: int, vocab: int, dim: int, heads: int, layers: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.item_table = Table(vocab, dim, padded=True)
        self.positions = nn.Parameter(torch.empty(history + 1, dim))
        self.layers = nn.ModuleList(CausalLayer(dim, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.head = mlp((dim, *hidden), head=True)
        # Query i sees the history positions up to i; the candidate, the last query, sees them all.
        causal = torch.triu(torch.full((history + 1, history), -1e9), diagonal=1)
        self.register_buffer("causal", causal, persistent=False)
        self.specs = [ids("hist_ids", vocab, history), ids("item_id", vocab, low=1)]

    def forward(self, hist_ids: Tensor, item_id: Tensor) -> Tensor:
        """Returns click probabilities [N, 1]."""
        x = torch.cat([self.item_table(hist_ids), self.item_table(item_id).unsqueeze(1)], dim=1) + self.positions
        padding = torch.where(hist_ids == 0, -1e9, 0.0)
        mask = self.causal + padding.unsqueeze(1).unsqueeze(1)
        for layer in self.layers:
            x = layer(x, mask)
        return torch.sigmoid(self.head(self.norm(x[:, -1])))
