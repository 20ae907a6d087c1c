"""Wukong: stacked layers of a factorisation machine block beside a linear compression of the embeddings."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from models.layers import Fields, Ranker, dense, mlp


class WukongLayer(nn.Module):
    """Products of all embeddings with few compressed ones go through an MLP to new embeddings."""

    def __init__(self, count: int, dim: int, rank: int, machine: int, linear: int, hidden: int) -> None:
        super().__init__()
        self.machine, self.dim = machine, dim
        self.compress = nn.Linear(count, rank, bias=False)
        self.norm1, self.norm2 = nn.LayerNorm(count * rank), nn.LayerNorm(dim)
        self.deep = nn.Sequential(*mlp((count * rank, hidden)), nn.Linear(hidden, machine * dim))
        self.linear = nn.Linear(count, linear, bias=False)
        self.residual = nn.Linear(count, machine + linear, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [N, count, dim] to [N, machine + linear, dim]."""
        across = x.transpose(1, 2)
        products = torch.bmm(x, self.compress(across))
        machine = self.deep(self.norm1(products.flatten(1))).reshape(-1, self.machine, self.dim)
        y = torch.cat([machine, self.linear(across).transpose(1, 2)], dim=1)
        return self.norm2(y + self.residual(across).transpose(1, 2))


class Wukong(Ranker):
    """The dense features of the user are one more embedding."""

    scales: ClassVar = {
        "small": dict(
            user=5, item=3, user_dense=4, vocab=50, dim=8, layers=2, rank=3, machine=3, linear=2, hidden=16, top=(16,)
        ),
        "industrial": dict(
            user=24,
            item=8,
            user_dense=13,
            vocab=1000,
            dim=32,
            layers=3,
            rank=8,
            machine=8,
            linear=8,
            hidden=256,
            top=(256, 128),
        ),
    }

    def __init__(
        self,
        user: int,
        item: int,
        user_dense: int,
        vocab: int,
        dim: int,
        layers: int,
        rank: int,
        machine: int,
        linear: int,
        hidden: int,
        top: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.fields = Fields(user, item, vocab, dim, "matrix")
        self.bottom = mlp((user_dense, dim))
        counts = [self.fields.count + 1] + (layers - 1) * [machine + linear]
        self.layers = nn.ModuleList(WukongLayer(count, dim, rank, machine, linear, hidden) for count in counts)
        self.top = mlp(((machine + linear) * dim, *top), head=True)
        self.specs = [dense("user_dense", user_dense), *self.fields.specs]

    def forward(self, user_dense: Tensor, *inputs: Tensor) -> Tensor:
        """Returns click probabilities [N, 1]."""
        x = torch.cat([self.bottom(user_dense).unsqueeze(1), self.fields(inputs)], dim=1)
        for layer in self.layers:
            x = layer(x)
        return torch.sigmoid(self.top(x.flatten(1)))
