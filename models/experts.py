"""Multi-task models with gated experts: MMoE and PLE."""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from models.layers import Fields, Ranker, mlp


def mix(experts: list[Tensor], gate: Tensor) -> Tensor:
    """Sum of the experts [N, H], weighted by the softmax of the gate's logits [N, experts]."""
    return (torch.stack(experts, dim=1) * gate.softmax(dim=1).unsqueeze(2)).sum(dim=1)


class MMoE(Ranker):
    """All experts and gates read the same input; one output per task."""

    scales: ClassVar = {
        "small": dict(user=5, item=3, vocab=50, dim=8, experts=3, tasks=2, hidden=(24, 12), tower=8),
        "industrial": dict(user=16, item=6, vocab=1000, dim=32, experts=6, tasks=3, hidden=(256, 128), tower=64),
    }

    def __init__(
        self,
        user: int,
        item: int,
        vocab: int,
        dim: int,
        experts: int,
        tasks: int,
        hidden: tuple[int, ...],
        tower: int,
    ) -> None:
        super().__init__()
        self.fields = Fields(user, item, vocab, dim, "matrix")
        width = self.fields.width
        self.experts = nn.ModuleList(mlp((width, *hidden)) for _ in range(experts))
        self.gates = nn.ModuleList(nn.Linear(width, experts, bias=False) for _ in range(tasks))
        self.towers = nn.ModuleList(mlp((hidden[-1], tower), head=True) for _ in range(tasks))
        self.output_names = tuple(f"task_{i}" for i in range(tasks))
        self.specs = self.fields.specs

    def forward(self, user_ids: Tensor, item_ids: Tensor) -> tuple[Tensor, ...]:
        """Returns one probability [N, 1] per task."""
        x = self.fields((user_ids, item_ids)).flatten(1)
        experts = [expert(x) for expert in self.experts]
        return tuple(
            torch.sigmoid(tower(mix(experts, gate(x)))) for gate, tower in zip(self.gates, self.towers, strict=True)
        )


class Extraction(nn.Module):
    """One level of PLE: experts and a gate for each task, shared experts and a gate for the shared stream."""

    def __init__(self, width: int, hidden: int, tasks: int, experts: int, last: bool) -> None:
        super().__init__()
        # Stream 0 .. tasks - 1 belong to the tasks, the last stream is shared.
        self.experts = nn.ModuleList(
            nn.ModuleList(mlp((width, hidden)) for _ in range(experts)) for _ in range(tasks + 1)
        )
        self.gates = nn.ModuleList(nn.Linear(width, 2 * experts, bias=False) for _ in range(tasks))
        if not last:
            self.gates.append(nn.Linear(width, (tasks + 1) * experts, bias=False))

    def forward(self, streams: list[Tensor]) -> list[Tensor]:
        """Maps one input per stream to one output per gate."""
        outputs = [[expert(x) for expert in group] for group, x in zip(self.experts, streams, strict=True)]
        mixed = []
        for i, gate in enumerate(self.gates):
            is_shared = i == len(streams) - 1
            experts = [e for group in outputs for e in group] if is_shared else outputs[i] + outputs[-1]
            mixed.append(mix(experts, gate(streams[i])))
        return mixed


class PLE(Ranker):
    """Two extraction levels, one output [N, tasks]."""

    scales: ClassVar = {
        "small": dict(user=4, item=3, vocab=50, dim=8, experts=2, tasks=2, hidden=(16, 12), tower=8),
        "industrial": dict(user=16, item=6, vocab=1000, dim=32, experts=2, tasks=2, hidden=(256, 128), tower=64),
    }

    def __init__(
        self,
        user: int,
        item: int,
        vocab: int,
        dim: int,
        experts: int,
        tasks: int,
        hidden: tuple[int, ...],
        tower: int,
    ) -> None:
        super().__init__()
        self.fields = Fields(user, item, vocab, dim, interleaved=True)
        self.tasks = tasks
        sizes = (self.fields.width, *hidden)
        self.levels = nn.ModuleList(
            Extraction(a, b, tasks, experts, last=i == len(hidden) - 1) for i, (a, b) in enumerate(pairwise(sizes))
        )
        self.towers = nn.ModuleList(mlp((hidden[-1], tower), head=True) for _ in range(tasks))
        self.specs = self.fields.specs

    def forward(self, *inputs: Tensor) -> Tensor:
        """Returns probabilities [N, tasks]."""
        streams = [self.fields(inputs).flatten(1)] * (self.tasks + 1)
        for level in self.levels:
            streams = level(streams)
        return torch.sigmoid(torch.cat([tower(x) for tower, x in zip(self.towers, streams, strict=True)], dim=1))
