"""FwFM: a factorisation machine with one weight per pair of fields."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from models.layers import Fields, Ranker, pair_indices


class FwFM(Ranker):
    """Ids as two matrices, joined before the lookup."""

    scales: ClassVar = {
        "small": dict(user=6, item=4, vocab=50, dim=8),
        "industrial": dict(user=24, item=12, vocab=1000, dim=32),
    }

    def __init__(self, user: int, item: int, vocab: int, dim: int) -> None:
        super().__init__()
        self.linear = Fields(user, item, vocab, 1, "joint", std=0.1)
        self.fields = Fields(user, item, vocab, dim, "joint", std=dim**-0.25)
        left, right = pair_indices(self.fields.count)
        self.register_buffer("left", torch.tensor(left), persistent=False)
        self.register_buffer("right", torch.tensor(right), persistent=False)
        self.pair_weight = nn.Parameter(torch.empty(len(left), 1))
        self.bias = nn.Parameter(torch.empty(1))
        self.specs = self.fields.specs

    def forward(self, user_ids: Tensor, item_ids: Tensor) -> Tensor:
        """Returns click probabilities [N, 1]."""
        v = self.fields((user_ids, item_ids))
        products = (v.index_select(1, self.left) * v.index_select(1, self.right)).sum(dim=2)
        logit = self.linear((user_ids, item_ids)).sum(dim=1) + products @ self.pair_weight + self.bias
        return torch.sigmoid(logit)
