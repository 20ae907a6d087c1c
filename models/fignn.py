"""FiGNN: fields are the nodes of a graph; edges are weighted by attention, states updated by a GRU cell."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from models.layers import Fields, Ranker


class FiGNN(Ranker):
    """A node sends through a matrix of its own and receives through another; the score is a gated sum over nodes."""

    scales: ClassVar = {
        "small": dict(user=4, item=2, vocab=50, dim=8, steps=2),
        "industrial": dict(user=20, item=8, vocab=1000, dim=32, steps=2),
    }

    def __init__(self, user: int, item: int, vocab: int, dim: int, steps: int) -> None:
        super().__init__()
        self.fields = Fields(user, item, vocab, dim, "matrix")
        self.count, self.dim, self.steps = self.fields.count, dim, steps
        self.edge = nn.Linear(2 * dim, 1, bias=False)
        self.send = nn.Parameter(torch.empty(self.count, dim, dim))
        self.receive = nn.Parameter(torch.empty(self.count, dim, dim))
        self.bias = nn.Parameter(torch.empty(dim))
        self.reset, self.update = (nn.Linear(2 * dim, dim) for _ in range(2))
        self.state_in, self.state = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.score = nn.Linear(dim, 1)
        self.weight = nn.Sequential(nn.Linear(self.count * dim, self.count), nn.Sigmoid())
        # Ordered pairs of all nodes, themselves included; no edge leads back to its own node.
        self.register_buffer("source", torch.arange(self.count).repeat_interleave(self.count), persistent=False)
        self.register_buffer("target", torch.arange(self.count).repeat(self.count), persistent=False)
        self.register_buffer("loops", torch.eye(self.count, dtype=torch.bool).unsqueeze(0), persistent=False)
        self.specs = self.fields.specs

    def forward(self, *inputs: Tensor) -> Tensor:
        """Returns click probabilities [N, 1]."""
        h = h0 = self.fields(inputs)
        ends = torch.cat([h0[:, self.source], h0[:, self.target]], dim=2)
        edges = nn.functional.leaky_relu(self.edge(ends).reshape(-1, self.count, self.count))
        graph = edges.masked_fill(self.loops, -1e9).softmax(dim=-1)
        for _ in range(self.steps):
            sent = torch.matmul(self.send, h.unsqueeze(-1)).squeeze(-1)
            received = torch.matmul(graph, sent)
            a = torch.matmul(self.receive, received.unsqueeze(-1)).squeeze(-1) + self.bias
            both = torch.cat([a, h], dim=2)
            reset, update = torch.sigmoid(self.reset(both)), torch.sigmoid(self.update(both))
            new = torch.tanh(self.state_in(a) + reset * self.state(h))
            h = (1.0 - update) * new + update * h + h0
        return torch.sigmoid((self.score(h).squeeze(-1) * self.weight(h.flatten(1))).sum(dim=1, keepdim=True))
