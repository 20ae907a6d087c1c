"""AutoInt: stacked self-attention over the fields."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from models.layers import Fields, Ranker, SelfAttention


class AutoInt(Ranker):
    """Each layer is attention without output projection, plus a projected residual, then ReLU."""

    scales: ClassVar = {
        "small": dict(user=5, item=3, vocab=50, dim=8, layers=2, heads=2, head_dim=4),
        "industrial": dict(user=24, item=12, vocab=1000, dim=16, layers=3, heads=2, head_dim=16),
    }

    def __init__(self, user: int, item: int, vocab: int, dim: int, layers: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.fields = Fields(user, item, vocab, dim, "matrix")
        # What each field may not attend to, [fields, fields].
        self.register_buffer("mask", None, persistent=False)
        inner = heads * head_dim
        sizes = (dim, *[inner] * layers)
        self.attention = nn.ModuleList(SelfAttention(a, heads, head_dim, project=False) for a in sizes[:-1])
        self.residual = nn.ModuleList(nn.Linear(a, inner, bias=False) for a in sizes[:-1])
        self.head = nn.Linear(self.fields.count * inner, 1)
        self.specs = self.fields.specs

    def forward(self, user_ids: Tensor, item_ids: Tensor) -> Tensor:
        """Returns click probabilities [N, 1]."""
        x = self.fields((user_ids, item_ids))
        for attention, residual in zip(self.attention, self.residual, strict=True):
            x = torch.relu(attention(x, x, self.mask) + residual(x))
        return torch.sigmoid(self.head(x.flatten(1)))
