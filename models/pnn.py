"""PNN: inner and outer products of all pairs of fields, fed to an MLP together with the embeddings."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from models.layers import Fields, Ranker, mlp, pair_indices


class PNN(Ranker):
    """Ids as two matrices. The outer product of a pair is reduced by one D × D kernel per pair."""

    scales: ClassVar = {
        "small": dict(user=5, item=3, vocab=50, dim=8, hidden=(32, 16)),
        "industrial": dict(user=24, item=8, vocab=1000, dim=16, hidden=(512, 256)),
    }

    def __init__(self, user: int, item: int, vocab: int, dim: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.fields = Fields(user, item, vocab, dim, "matrix")
        left, right = pair_indices(self.fields.count)
        self.register_buffer("left", torch.tensor(left), persistent=False)
        self.register_buffer("right", torch.tensor(right), persistent=False)
        self.kernel = nn.Parameter(torch.empty(len(left), dim, dim))
        self.deep = mlp((self.fields.width + 2 * len(left), *hidden), head=True)
        self.specs = self.fields.specs

    def forward(self, user_ids: Tensor, item_ids: Tensor) -> Tensor:
        """Returns click probabilities [N, 1]."""
        v = self.fields((user_ids, item_ids))
        p, q = v.index_select(1, self.left), v.index_select(1, self.right)
        inner = (p * q).sum(dim=2)
        outer = (torch.einsum("npd,pde->npe", p, self.kernel) * q).sum(dim=2)
        return torch.sigmoid(self.deep(torch.cat([v.flatten(1), inner, outer], dim=1)))
