"""DIEN: a GRU over the history, attention by the candidate, and a second GRU gated by that attention."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from models.layers import Ranker, Table, ids, mlp


class DIEN(Ranker):
    """The attentional GRU is a Python loop: exporters unroll it, as they must."""

    scales: ClassVar = {
        "small": dict(user=2, history=6, vocab=60, dim=8, hidden=(16,)),
        "industrial": dict(user=8, history=20, vocab=1000, dim=64, hidden=(200, 80)),
    }

    def __init__(self, user: int, history: int, vocab: int, dim: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.user_tables = nn.ModuleList(Table(vocab, dim) for _ in range(user))
        self.item_table = Table(vocab, dim, padded=True)
        self.interest = nn.GRU(dim, dim, batch_first=True)
        self.match = nn.Linear(dim, dim, bias=False)
        self.gates_x = nn.Linear(dim, 2 * dim)
        self.gates_h = nn.Linear(dim, 2 * dim, bias=False)
        self.new_x = nn.Linear(dim, dim)
        self.new_h = nn.Linear(dim, dim, bias=False)
        self.deep = mlp(((2 + user) * dim, *hidden), head=True)
        self.specs = [
            *(ids(f"user_{i}", vocab) for i in range(user)),
            ids("hist_ids", vocab, history),
            ids("item_id", vocab, low=1),
        ]

    def forward(self, *inputs: Tensor) -> Tensor:
        """Returns click probabilities [N, 1]."""
        *users, history, item = inputs
        q = self.item_table(item)
        states, _ = self.interest(self.item_table(history))
        scores = torch.matmul(states, self.match(q).unsqueeze(2)).squeeze(2) / states.shape[2] ** 0.5
        scores = scores.masked_fill(history == 0, -1e9).softmax(dim=1)
        h = torch.zeros_like(q)
        for t in range(history.shape[1]):
            x = states[:, t]
            reset, update = torch.sigmoid(self.gates_x(x) + self.gates_h(h)).chunk(2, dim=1)
            new = torch.tanh(self.new_x(x) + self.new_h(reset * h))
            update = update * scores[:, t : t + 1]
            h = (1.0 - update) * h + update * new
        profile = [table(u) for table, u in zip(self.user_tables, users, strict=True)]
        return torch.sigmoid(self.deep(torch.cat([h, q, *profile], dim=1)))
