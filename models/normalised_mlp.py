"""An MLP whose wide input goes through a layer normalisation first, with batch normalisation inside."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from models.layers import Fields, Ranker
from models.spec import InputSpec, column_text


class NormalisedMLP(Ranker):
    """Dense features of user and item alternate in one matrix `dense`: an even column belongs to the user."""

    scales: ClassVar = {
        "small": dict(user=4, item=3, numbers=6, vocab=50, dim=8, hidden=32),
        "industrial": dict(user=24, item=12, numbers=26, vocab=1000, dim=32, hidden=512),
    }

    def __init__(self, user: int, item: int, numbers: int, vocab: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.fields = Fields(user, item, vocab, dim)
        width = self.fields.width + numbers
        self.norm = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, hidden)
        self.batch_norm = nn.BatchNorm1d(hidden)
        self.head = nn.Linear(hidden, 1)
        request = column_text(range(0, numbers, 2))
        self.specs = [
            *self.fields.specs,
            InputSpec("dense", "float32", ("N", numbers), "mixed", -1.0, 1.0, request),
        ]

    def forward(self, *inputs: Tensor) -> Tensor:
        """Returns click probabilities [N]."""
        x = self.norm(torch.cat([self.fields(inputs[:-1]).flatten(1), inputs[-1]], dim=1))
        return torch.sigmoid(self.head(torch.relu(self.batch_norm(self.hidden(x))))).squeeze(1)
