"""SASRec with the target appended: a causal transformer over the history whose last token is the candidate."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from models.layers import Ranker, SelfAttention, Table, ids, mlp


class EncoderLayer(nn.Module):
    """A transformer layer with the normalisation before each part; all tokens are queries and keys."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attention = SelfAttention(dim, heads)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.feedforward = nn.Sequential(nn.Linear(dim, 4 * dim), nn.ReLU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        """Returns the tokens [N, L + 1, dim] after attention and feed-forward."""
        y = self.norm1(x)
        x = x + self.attention(y, y, hidden)
        return x + self.feedforward(self.norm2(x))


class SASRecTarget(Ranker):
    """The causal mask alone keeps the candidate from the history's rows; the score is an MLP on its own token."""

    scales: ClassVar = {
        "small": dict(history=10, vocab=60, dim=8, heads=2, layers=2, hidden=(16,)),
        "industrial": dict(history=100, vocab=1000, dim=64, heads=4, layers=3, hidden=(64,)),
    }

    def __init__(self, history: int, vocab: int, dim: int, heads: int, layers: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.item_table = Table(vocab, dim, padded=True)
        self.positions = nn.Embedding(history + 1, dim)
        self.layers = nn.ModuleList(EncoderLayer(dim, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.head = mlp((dim, *hidden), head=True)
        self.specs = [ids("hist_ids", vocab, history), ids("item_id", vocab, 1, low=1)]

    def forward(self, hist_ids: Tensor, item_id: Tensor) -> Tensor:
        """Returns click probabilities [N, 1]."""
        tokens = torch.cat([hist_ids, item_id], dim=1)
        position = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.item_table(tokens) + self.positions(position)
        later = position > position.unsqueeze(1)
        # A token always sees itself, so that no row of padding is without keys.
        padding = (tokens == 0).unsqueeze(1) & (position != position.unsqueeze(1))
        hidden = (later | padding).unsqueeze(1)
        for layer in self.layers:
            x = layer(x, hidden)
        return torch.sigmoid(self.head(self.norm(x)[:, -1]))
