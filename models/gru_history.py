"""A GRU over the history; its last state meets the candidate in an MLP that the user gates."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from models.layers import Fields, Ranker, Table, ids


class GRUHistory(Ranker):
    """The gate `W x ⊙ sigmoid(r)` scales the second layer by request-level factors."""

    scales: ClassVar = {
        "small": dict(user=3, history=8, vocab=60, dim=8, hidden=(24, 12)),
        "industrial": dict(user=8, history=50, vocab=1000, dim=64, hidden=(256, 128)),
    }

    def __init__(self, user: int, history: int, vocab: int, dim: int, hidden: tuple[int, int]) -> None:
        super().__init__()
        self.contexts = Table(vocab, dim)
        self.users = Fields(user, 0, vocab, dim, "matrix")
        self.item_table = Table(vocab, dim, padded=True)
        self.gru = nn.GRU(dim, dim, batch_first=True)
        a, b = hidden
        self.first = nn.Linear(2 * dim + self.users.width, a)
        self.second = nn.Linear(a, b)
        self.gate = nn.Linear(self.users.width + dim, b)
        self.head = nn.Linear(b, 1)
        self.specs = [
            ids("user_ids", vocab, user),
            ids("ctx_hour", vocab),
            ids("hist_ids", vocab, history),
            ids("item_id", vocab, low=1),
        ]

    def forward(self, user_ids: Tensor, ctx_hour: Tensor, hist_ids: Tensor, item_id: Tensor) -> Tensor:
        """Returns click probabilities [N, 1]."""
        states, _ = self.gru(self.item_table(hist_ids))
        profile = self.users.user((user_ids,)).flatten(1)
        gate = torch.sigmoid(self.gate(torch.cat([profile, self.contexts(ctx_hour)], dim=1)))
        x = torch.cat([states[:, -1], self.item_table(item_id), profile], dim=1)
        x = torch.relu(self.second(torch.relu(self.first(x))) * gate)
        return torch.sigmoid(self.head(x))
