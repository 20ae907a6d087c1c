"""EDCN: cross and deep layers in parallel that exchange what they know after every layer."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from models.layers import Fields, Ranker


class Regulation(nn.Module):
    """Weights of the fields, one softmax for each of the two networks."""

    def __init__(self, fields: int, dim: int, temperature: float = 2.0) -> None:
        super().__init__()
        self.fields, self.dim, self.temperature = fields, dim, temperature
        self.cross, self.deep = nn.Parameter(torch.empty(fields)), nn.Parameter(torch.empty(fields))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns two scaled copies of [N, fields * dim]."""
        parts = x.reshape(-1, self.fields, self.dim)
        first, second = (
            (parts * (weight / self.temperature).softmax(dim=0).unsqueeze(1) * self.fields).flatten(1)
            for weight in (self.cross, self.deep)
        )
        return first, second


class EDCN(Ranker):
    """The bridge is the product of both layers; it is what the next layer's regulation reads."""

    scales: ClassVar = {
        "small": dict(user=5, item=3, vocab=50, dim=8, layers=2),
        "industrial": dict(user=24, item=8, vocab=1000, dim=32, layers=3),
    }

    def __init__(self, user: int, item: int, vocab: int, dim: int, layers: int) -> None:
        super().__init__()
        self.fields = Fields(user, item, vocab, dim, interleaved=True)
        width = self.fields.width
        self.regulations = nn.ModuleList(Regulation(self.fields.count, dim) for _ in range(layers))
        self.cross = nn.ParameterList(nn.Parameter(torch.empty(width, 1)) for _ in range(layers))
        self.bias = nn.ParameterList(nn.Parameter(torch.empty(width)) for _ in range(layers))
        self.deep = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.head = nn.Linear(3 * width, 1)
        self.specs = self.fields.specs

    def forward(self, *inputs: Tensor) -> Tensor:
        """Returns click probabilities [N, 1]."""
        bridge = x0 = self.fields(inputs).flatten(1)
        for regulation, weight, bias, layer in zip(self.regulations, self.cross, self.bias, self.deep, strict=True):
            cross, deep = regulation(bridge)
            cross = x0 * torch.matmul(cross, weight) + bias + cross
            deep = torch.relu(layer(deep))
            bridge = cross * deep
        return torch.sigmoid(self.head(torch.cat([cross, deep, bridge], dim=1)))
