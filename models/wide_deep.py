"""Wide & Deep: a linear model over ids and dense features beside an MLP over their embeddings."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from models.layers import Fields, Ranker, dense, mlp


class WideDeep(Ranker):
    """Ids as one [N] input per field; dense features of user and item as matrices."""

    scales: ClassVar = {
        "small": dict(user=6, item=4, user_dense=3, item_dense=2, vocab=50, dim=8, hidden=(32, 16)),
        "industrial": dict(user=24, item=12, user_dense=13, item_dense=7, vocab=1000, dim=32, hidden=(1024, 512, 256)),
    }

    def __init__(
        self,
        user: int,
        item: int,
        user_dense: int,
        item_dense: int,
        vocab: int,
        dim: int,
        hidden: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.wide = Fields(user, item, vocab, 1, std=0.2)
        self.fields = Fields(user, item, vocab, dim)
        width = user_dense + item_dense
        self.wide_dense = nn.Linear(width, 1)
        self.deep = mlp((self.fields.width + width, *hidden), head=True)
        self.specs = [*self.fields.specs, dense("user_dense", user_dense), dense("item_dense", item_dense)]

    def forward(self, *inputs: Tensor) -> Tensor:
        """Returns click probabilities [N, 1]."""
        ids = inputs[:-2]
        numbers = torch.cat(inputs[-2:], dim=1)
        wide = self.wide(ids).sum(dim=1) + self.wide_dense(numbers)
        deep = self.deep(torch.cat([self.fields(ids).flatten(1), numbers], dim=1))
        return torch.sigmoid(wide + deep)
