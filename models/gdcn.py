"""GDCN: a cross network whose every layer has a gate of the same size, beside an MLP."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from models.layers import Fields, Ranker, mlp


class GDCN(Ranker):
    """`x_{l+1} = x_0 ⊙ (W x_l + b) ⊙ σ(G x_l) + x_l`."""

    scales: ClassVar = {
        "small": dict(user=4, item=2, vocab=50, dim=8, layers=2, hidden=(32, 16)),
        "industrial": dict(user=24, item=8, vocab=1000, dim=32, layers=3, hidden=(512, 256)),
    }

    def __init__(self, user: int, item: int, vocab: int, dim: int, layers: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.fields = Fields(user, item, vocab, dim, "joint")
        width = self.fields.width
        self.cross = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.gates = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))
        self.deep = mlp((width, *hidden))
        self.head = nn.Linear(width + hidden[-1], 1)
        self.specs = self.fields.specs

    def forward(self, user_ids: Tensor, item_ids: Tensor) -> Tensor:
        """Returns click probabilities [N, 1]."""
        x0 = x = self.fields((user_ids, item_ids)).flatten(1)
        for layer, gate in zip(self.cross, self.gates, strict=True):
            x = x0 * layer(x) * torch.sigmoid(gate(x)) + x
        return torch.sigmoid(self.head(torch.cat([x, self.deep(x0)], dim=1)))
