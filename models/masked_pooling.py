"""Histories pooled in the four usual ways, then an MLP with the candidate."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from models.layers import Ranker, Table, ids, mlp


class MaskedPooling(Ranker):
    """Sum, mean, mean over the valid positions, and maximum over the valid positions."""

    scales: ClassVar = {
        "small": dict(history=10, vocab=60, dim=8, hidden=(32, 16)),
        "industrial": dict(history=50, vocab=1000, dim=64, hidden=(512, 256)),
    }

    def __init__(self, history: int, vocab: int, dim: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.item_table = Table(vocab, dim, padded=True)
        self.category_table = Table(vocab, dim)
        self.deep = mlp((6 * dim, *hidden), head=True)
        self.specs = [
            ids("hist_ids", vocab, history),
            ids("hist_categories", vocab, history),
            ids("item_id", vocab, 1, low=1),
            ids("item_category", vocab, 1),
        ]

    def forward(self, hist_ids: Tensor, hist_categories: Tensor, item_id: Tensor, item_category: Tensor) -> Tensor:
        """Returns click probabilities [N, 1]."""
        items, categories = self.item_table(hist_ids), self.category_table(hist_categories)
        valid = (hist_ids != 0).to(items.dtype).unsqueeze(2)
        count = valid.sum(dim=1).clamp(min=1.0)
        pooled = [
            items.sum(dim=1) / hist_ids.shape[1] ** 0.5,
            categories.mean(dim=1),
            (categories * valid).sum(dim=1) / count,
            # No embedding comes near 10, and an empty history still gives numbers of order one.
            (items + (valid - 1.0) * 10.0).max(dim=1).values,
        ]
        candidate = [self.item_table(item_id).squeeze(1), self.category_table(item_category).squeeze(1)]
        return torch.sigmoid(self.deep(torch.cat([*pooled, *candidate], dim=1)))
