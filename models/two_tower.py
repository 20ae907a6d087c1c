"""Two towers: user and item each through an MLP, scored by cosine."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from models.layers import Fields, Ranker, mlp


class TwoTower(Ranker):
    """The towers' outputs are normalised; the cosine is divided by a temperature."""

    scales: ClassVar = {
        "small": dict(user=5, item=4, vocab=50, dim=8, hidden=(32, 16), temperature=0.5),
        "industrial": dict(user=24, item=12, vocab=1000, dim=32, hidden=(512, 256, 64), temperature=0.2),
    }

    def __init__(self, user: int, item: int, vocab: int, dim: int, hidden: tuple[int, ...], temperature: float) -> None:
        super().__init__()
        self.fields = Fields(user, item, vocab, dim)
        self.temperature = temperature
        self.user_tower = mlp((user * dim, *hidden))[:-1]
        self.item_tower = mlp((item * dim, *hidden))[:-1]
        self.specs = self.fields.specs

    def forward(self, *inputs: Tensor) -> Tensor:
        """Returns click probabilities [N]."""
        user = functional.normalize(self.user_tower(self.fields.user(inputs).flatten(1)), dim=1)
        item = functional.normalize(self.item_tower(self.fields.item(inputs).flatten(1)), dim=1)
        return torch.sigmoid((user * item).sum(dim=1) / self.temperature)
