"""One self-attention layer over the fields and a linear head."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from models.layers import Fields, Ranker, SelfAttention


class FieldAttention(Ranker):
    """Attention without output projection, plus a projected residual, then ReLU and a linear head."""

    scales: ClassVar = {
        "small": dict(user=5, item=3, vocab=50, dim=8, heads=2, head_dim=4),
        "industrial": dict(user=28, item=12, vocab=1000, dim=32, heads=2, head_dim=32),
    }

    def __init__(self, user: int, item: int, vocab: int, dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.fields = Fields(user, item, vocab, dim, "joint", std=1.0)
        self.attention = SelfAttention(dim, heads, head_dim, project=False)
        self.residual = nn.Linear(dim, heads * head_dim, bias=False)
        self.head = nn.Linear(self.fields.count * heads * head_dim, 1)
        self.specs = self.fields.specs

    def forward(self, user_ids: Tensor, item_ids: Tensor) -> Tensor:
        """Returns logits [N, 1]."""
        x = self.fields((user_ids, item_ids))
        return self.head(torch.relu(self.attention(x, x) + self.residual(x)).flatten(1))
