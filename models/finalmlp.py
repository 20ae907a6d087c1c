"""FinalMLP: two MLPs on features selected by the user and by the item, joined by a bilinear form per head."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from models.layers import Fields, Ranker, mlp


class FinalMLP(Ranker):
    """Each stream scales all features by a gate that reads the fields of one side only."""

    scales: ClassVar = {
        "small": dict(user=5, item=3, vocab=50, dim=8, gate=16, heads=2, hidden=(32, 16)),
        "industrial": dict(user=24, item=8, vocab=1000, dim=32, gate=256, heads=4, hidden=(512, 256)),
    }

    def __init__(
        self, user: int, item: int, vocab: int, dim: int, gate: int, heads: int, hidden: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.fields = Fields(user, item, vocab, dim, "matrix")
        self.heads, self.size = heads, hidden[-1] // heads
        width = self.fields.width
        self.user_gate = nn.Sequential(*mlp((user * dim, gate)), nn.Linear(gate, width), nn.Sigmoid())
        self.item_gate = nn.Sequential(*mlp((item * dim, gate)), nn.Linear(gate, width), nn.Sigmoid())
        self.first, self.second = mlp((width, *hidden)), mlp((width, *hidden))
        self.linear1, self.linear2 = nn.Linear(hidden[-1], 1), nn.Linear(hidden[-1], 1)
        self.bilinear = nn.Parameter(torch.empty(heads, self.size, self.size))
        self.specs = self.fields.specs

    def forward(self, user_ids: Tensor, item_ids: Tensor) -> Tensor:
        """Returns click probabilities [N, 1]."""
        inputs = (user_ids, item_ids)
        x = self.fields(inputs).flatten(1)
        first = self.first(x * 2.0 * self.user_gate(self.fields.user(inputs).flatten(1)))
        second = self.second(x * 2.0 * self.item_gate(self.fields.item(inputs).flatten(1)))
        a = first.reshape(-1, self.heads, 1, self.size)
        b = second.reshape(-1, self.heads, self.size, 1)
        joined = torch.matmul(torch.matmul(a, self.bilinear), b).flatten(1).sum(dim=1, keepdim=True)
        return torch.sigmoid(self.linear1(first) + self.linear2(second) + joined)
