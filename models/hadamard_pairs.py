"""All element-wise products of two fields into an MLP, the core of FiBiNET, PNN and FFM style models."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from models.layers import Fields, Ranker, mlp, pair_indices


class HadamardPairs(Ranker):
    """Products of all pairs side by side, then one hidden layer."""

    scales: ClassVar = {
        "small": dict(user=5, item=3, vocab=50, dim=8, hidden=32),
        "industrial": dict(user=24, item=8, vocab=1000, dim=16, hidden=256),
    }

    def __init__(self, user: int, item: int, vocab: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.fields = Fields(user, item, vocab, dim, "matrix", std=1.0)
        left, right = pair_indices(self.fields.count)
        self.register_buffer("left", torch.tensor(left), persistent=False)
        self.register_buffer("right", torch.tensor(right), persistent=False)
        self.deep = mlp((len(left) * dim, hidden), head=True)
        self.specs = self.fields.specs

    def forward(self, user_ids: Tensor, item_ids: Tensor) -> Tensor:
        """Returns logits [N, 1]."""
        v = self.fields((user_ids, item_ids))
        pairs = v.index_select(1, self.left) * v.index_select(1, self.right)
        return self.deep(pairs.flatten(1))
