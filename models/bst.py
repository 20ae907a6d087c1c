"""BST: the candidate is appended to the history and one transformer layer runs over both."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from models.layers import Fields, Ranker, SelfAttention, Table, ids, mlp


class EncoderLayer(nn.Module):
    """A transformer layer with the normalisation after each residual."""

    def __init__(self, dim: int, heads: int, feedforward: int) -> None:
        super().__init__()
        self.attention = SelfAttention(dim, heads)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.feedforward = nn.Sequential(nn.Linear(dim, feedforward), nn.ReLU(), nn.Linear(feedforward, dim))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Returns the tokens [N, L, dim] after attention and feed-forward."""
        x = self.norm1(x + self.attention(x, x, mask))
        return self.norm2(x + self.feedforward(x))


class BST(Ranker):
    """Attention is bidirectional (history rows see the candidate), all tokens go to the MLP."""

    scales: ClassVar = {
        "small": dict(user=3, history=8, vocab=60, dim=8, heads=2, hidden=(24, 12)),
        "industrial": dict(user=8, history=50, vocab=1000, dim=64, heads=4, hidden=(512, 256)),
    }

    def __init__(self, user: int, history: int, vocab: int, dim: int, heads: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.users = Fields(user, 0, vocab, dim, "matrix")
        self.item_table = Table(vocab, dim, padded=True)
        self.positions = nn.Parameter(torch.empty(history + 1, dim))
        self.encoder = EncoderLayer(dim, heads, 4 * dim)
        self.deep = mlp(((history + 1) * dim + self.users.width, *hidden), head=True)
        self.specs = [
            ids("user_ids", vocab, user),
            ids("hist_ids", vocab, history),
            ids("item_id", vocab, 1, low=1),
        ]

    def forward(self, user_ids: Tensor, hist_ids: Tensor, item_id: Tensor) -> Tensor:
        """Returns click probabilities [N, 1]."""
        tokens = torch.cat([hist_ids, item_id], dim=1)
        x = torch.cat([self.item_table(hist_ids), self.item_table(item_id)], dim=1) + self.positions
        mask = torch.where(tokens == 0, -1e9, 0.0).unsqueeze(1).unsqueeze(1)
        x = self.encoder(x, mask)
        profile = self.users.user((user_ids,))
        return torch.sigmoid(self.deep(torch.cat([x.flatten(1), profile.flatten(1)], dim=1)))
