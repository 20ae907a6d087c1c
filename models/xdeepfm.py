"""xDeepFM: compressed interaction network beside a linear part and an MLP."""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from models.layers import Fields, Ranker, mlp


class XDeepFM(Ranker):
    """Each interaction layer mixes all products of its maps with the fields through a 1 × 1 convolution."""

    scales: ClassVar = {
        "small": dict(user=5, item=3, vocab=50, dim=8, maps=(8, 6), hidden=(32, 16)),
        "industrial": dict(user=24, item=12, vocab=1000, dim=16, maps=(64, 64), hidden=(256, 128)),
    }

    def __init__(
        self, user: int, item: int, vocab: int, dim: int, maps: tuple[int, ...], hidden: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.linear = Fields(user, item, vocab, 1, "joint", std=0.1)
        self.fields = Fields(user, item, vocab, dim, "joint")
        count = self.fields.count
        sizes = (count, *maps)
        self.convolutions = nn.ModuleList(nn.Conv1d(a * count, b, 1) for a, b in pairwise(sizes))
        self.head = nn.Linear(sum(maps), 1)
        self.deep = mlp((self.fields.width, *hidden), head=True)
        self.specs = self.fields.specs

    def forward(self, user_ids: Tensor, item_ids: Tensor) -> Tensor:
        """Returns click probabilities [N, 1]."""
        v = x = self.fields((user_ids, item_ids))
        maps = []
        for convolution in self.convolutions:
            products = torch.einsum("nhd,nmd->nhmd", x, v)
            products = products.reshape(-1, x.shape[1] * v.shape[1], v.shape[2])
            x = torch.relu(convolution(products))
            maps.append(x)
        cin = self.head(torch.cat(maps, dim=1).sum(dim=2))
        return torch.sigmoid(self.linear((user_ids, item_ids)).sum(dim=1) + cin + self.deep(v.flatten(1)))
