"""DIN: the history is pooled with weights that an MLP gives each position for this candidate."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from models.layers import Fields, Ranker, Table, ids


class Dice(nn.Module):
    """Data-adaptive activation: a sigmoid of the normalised input blends identity and leak."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width, affine=False)
        self.alpha = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        """Applies the activation to [N, width]."""
        p = torch.sigmoid(self.norm(x))
        return self.alpha * (1.0 - p) * x + p * x


class DIN(Ranker):
    """Item and history positions are item and category embeddings side by side, from shared tables."""

    scales: ClassVar = {
        "small": dict(user=3, history=10, vocab=60, dim=8, attention=(12, 6), hidden=(24, 12)),
        "industrial": dict(user=4, history=100, vocab=1000, dim=64, attention=(80, 40), hidden=(200, 80)),
    }

    def __init__(
        self,
        user: int,
        history: int,
        vocab: int,
        dim: int,
        attention: tuple[int, int],
        hidden: tuple[int, int],
    ) -> None:
        super().__init__()
        self.users = Fields(user, 0, vocab, dim // 4, "matrix")
        self.item_table = Table(vocab, dim // 2, padded=True)
        self.category_table = Table(vocab, dim // 2, padded=True)
        a, b = attention
        self.attention = nn.Sequential(nn.Linear(4 * dim, a), nn.ReLU(), nn.Linear(a, b), nn.ReLU(), nn.Linear(b, 1))
        c, d = hidden
        width = 2 * dim + self.users.width
        self.deep = nn.Sequential(nn.Linear(width, c), Dice(c), nn.Linear(c, d), Dice(d), nn.Linear(d, 1))
        self.specs = [
            ids("user_ids", vocab, user),
            ids("hist_ids", vocab, history),
            ids("hist_categories", vocab, history),
            ids("item_id", vocab, low=1),
            ids("item_category", vocab, low=1),
        ]

    def embed(self, item: Tensor, category: Tensor) -> Tensor:
        """Returns items of any shape as [..., dim]."""
        return torch.cat([self.item_table(item), self.category_table(category)], dim=-1)

    def forward(
        self,
        user_ids: Tensor,
        hist_ids: Tensor,
        hist_categories: Tensor,
        item_id: Tensor,
        item_category: Tensor,
    ) -> Tensor:
        """Returns click probabilities [N, 1]."""
        h = self.embed(hist_ids, hist_categories)
        q = self.embed(item_id, item_category)
        wide = q.unsqueeze(1).expand(-1, h.shape[1], -1)
        scores = self.attention(torch.cat([wide, h, wide - h, wide * h], dim=-1)).squeeze(-1)
        scores = torch.where(hist_ids == 0, torch.full_like(scores, -1e9), scores).softmax(dim=1)
        pooled = torch.matmul(scores.unsqueeze(1), h).squeeze(1)
        return torch.sigmoid(self.deep(torch.cat([pooled, q, self.users.user((user_ids,)).flatten(1)], dim=1)))
