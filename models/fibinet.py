"""FiBiNET: squeeze-and-excitation over the fields and bilinear products of all pairs."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from models.layers import Fields, Ranker, mlp


class FiBiNET(Ranker):
    """One D × D matrix per pair, shared by the plain and the re-weighted branch."""

    scales: ClassVar = {
        "small": dict(user=4, item=3, vocab=50, dim=8, reduction=3, hidden=(32, 16)),
        "industrial": dict(user=12, item=6, vocab=1000, dim=16, reduction=3, hidden=(256, 128)),
    }

    def __init__(self, user: int, item: int, vocab: int, dim: int, reduction: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.fields = Fields(user, item, vocab, dim)
        count = self.fields.count
        pairs = count * (count - 1) // 2
        self.squeeze = nn.Linear(count, max(1, count // reduction))
        self.excite = nn.Linear(max(1, count // reduction), count)
        self.bilinear = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(pairs))
        self.deep = mlp((2 * pairs * dim, *hidden), head=True)
        self.specs = self.fields.specs

    def forward(self, *inputs: Tensor) -> Tensor:
        """Returns click probabilities [N, 1]."""
        v = self.fields(inputs)
        weights = torch.relu(self.excite(torch.relu(self.squeeze(v.mean(dim=2)))))
        pairs = torch.cat([self._pairs(v), self._pairs(v * weights.unsqueeze(2))], dim=1)
        return torch.sigmoid(self.deep(pairs.flatten(1)))

    def _pairs(self, v: Tensor) -> Tensor:
        pieces = v.split(1, dim=1)
        pairs = [(p, q) for i, p in enumerate(pieces) for q in pieces[i + 1 :]]
        return torch.cat([layer(p) * q for layer, (p, q) in zip(self.bilinear, pairs, strict=True)], dim=1)
