"""PEPNet: gates made of the domain scale the embeddings, gates made of user and item scale the layers of the towers."""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from models.layers import Fields, Ranker, Table, ids


class Gate(nn.Module):
    """Factors between 0 and 2."""

    def __init__(self, width: int, hidden: int, out: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, out), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        """Maps [N, width] to [N, out]."""
        return 2.0 * self.layers(x)


class PEPNet(Ranker):
    """EPNet reads domain and embeddings; PPNet reads the ids of user, author and item beside what EPNet gives."""

    scales: ClassVar = {
        "small": dict(user=4, item=2, vocab=50, dim=8, domains=4, tasks=2, gate=12, hidden=(16, 8)),
        "industrial": dict(user=24, item=8, vocab=1000, dim=32, domains=8, tasks=3, gate=128, hidden=(256, 128, 64)),
    }

    def __init__(
        self,
        user: int,
        item: int,
        vocab: int,
        dim: int,
        domains: int,
        tasks: int,
        gate: int,
        hidden: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.fields = Fields(user, item, vocab, dim, "matrix")
        self.domain_table, self.user_table = Table(domains, dim), Table(vocab, dim)
        self.author_table, self.item_table = Table(vocab, dim), Table(vocab, dim)
        width = self.fields.width
        self.embedding_gate = Gate(dim + width, gate, width)
        sizes = (width, *hidden)
        self.gates = nn.ModuleList(Gate(3 * dim + width, gate, tasks * size) for size in sizes)
        self.towers = nn.ModuleList(
            nn.ModuleList(nn.Linear(a, b) for a, b in pairwise((*sizes, 1))) for _ in range(tasks)
        )
        self.output_names = tuple(f"task_{i}" for i in range(tasks))
        self.specs = [
            ids("ctx_domain", domains),
            ids("user_id", vocab),
            ids("item_author", vocab),
            ids("item_id", vocab),
            *self.fields.specs,
        ]

    def forward(
        self, ctx_domain: Tensor, user_id: Tensor, item_author: Tensor, item_id: Tensor, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        """Returns one probability [N, 1] per task."""
        x = self.fields(inputs).flatten(1)
        x = x * self.embedding_gate(torch.cat([self.domain_table(ctx_domain), x.detach()], dim=1))
        prior = [self.user_table(user_id), self.author_table(item_author), self.item_table(item_id), x.detach()]
        prior = torch.cat(prior, dim=1)
        gates = [gate(prior).chunk(len(self.towers), dim=1) for gate in self.gates]
        outputs = []
        for task, tower in enumerate(self.towers):
            y = x
            for k, layer in enumerate(tower):
                y = layer(y * gates[k][task])
                y = torch.relu(y) if k < len(tower) - 1 else y
            outputs.append(torch.sigmoid(y))
        return tuple(outputs)
