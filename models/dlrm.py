"""DLRM: dot products of all pairs of embeddings, with the dense features as one more embedding."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from models.layers import Fields, Ranker, dense, ids, mlp


class DLRM(Ranker):
    """Lower triangle of the Gram matrix beside the bottom MLP's output, then the top MLP."""

    scales: ClassVar = {
        "small": dict(user=5, item=3, user_dense=4, vocab=50, dim=8, bottom=(), top=(32, 16)),
        "industrial": dict(user=18, item=8, user_dense=13, vocab=1000, dim=64, bottom=(64,), top=(512, 256)),
    }

    def __init__(
        self,
        user: int,
        item: int,
        user_dense: int,
        vocab: int,
        dim: int,
        bottom: tuple[int, ...],
        top: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.fields = Fields(user, item, vocab, dim, std=dim**-0.25)
        self.bottom = mlp((user_dense, *bottom, dim))
        count = self.fields.count + 1
        lower = [(i, j) for i in range(count) for j in range(i)]
        self.register_buffer("rows", torch.tensor([i for i, _ in lower]), persistent=False)
        self.register_buffer("columns", torch.tensor([j for _, j in lower]), persistent=False)
        self.top = mlp((dim + len(lower), *top), head=True)
        self.specs = [dense("user_dense", user_dense), *self.fields.specs]

    def forward(self, user_dense: Tensor, *inputs: Tensor) -> Tensor:
        """Returns click probabilities [N, 1]."""
        x = self.bottom(user_dense)
        return self.interact(x, self.fields(inputs))

    def interact(self, x: Tensor, embeddings: Tensor) -> Tensor:
        """Scores [N, 1] of the bottom's output [N, dim] and the embeddings [N, fields, dim]."""
        t = torch.cat([x.unsqueeze(1), embeddings], dim=1)
        gram = torch.bmm(t, t.transpose(1, 2))
        return torch.sigmoid(self.top(torch.cat([x, gram[:, self.rows, self.columns]], dim=1)))


class DLRMBags(DLRM):
    """Several ids per field, summed by EmbeddingBag, with one table for each field."""

    scales: ClassVar = {
        "small": dict(user=3, item=2, user_dense=4, vocab=50, dim=8, bottom=(), top=(16,), bag=3),
        "industrial": dict(user=18, item=8, user_dense=13, vocab=1000, dim=64, bottom=(64,), top=(512, 256), bag=4),
    }

    def __init__(self, bag: int, **sizes: Any) -> None:
        super().__init__(**sizes)
        user, item = self.fields.user_count, self.fields.item_count
        vocab, dim = sizes["vocab"], sizes["dim"]
        del self.fields
        self.tables = nn.ModuleList(Bags(vocab, dim) for _ in range(user + item))
        names = [f"user_{i}" for i in range(user)] + [f"item_{i}" for i in range(item)]
        self.specs = [dense("user_dense", sizes["user_dense"]), *(ids(name, vocab, bag) for name in names)]

    def forward(self, user_dense: Tensor, *inputs: Tensor) -> Tensor:
        """Returns click probabilities [N, 1]."""
        x = self.bottom(user_dense)
        return self.interact(x, torch.stack([table(i) for table, i in zip(self.tables, inputs, strict=True)], dim=1))


class Bags(nn.EmbeddingBag):
    """A table whose rows are summed over the ids of a bag, [N, bag] to [N, dim]."""

    def __init__(self, rows: int, dim: int) -> None:
        super().__init__(rows, dim, mode="sum")
