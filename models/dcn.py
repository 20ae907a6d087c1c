"""Deep & Cross networks: v1 (vector weights) and v2 (full, low-rank, mixture of low-rank experts)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from models.layers import Fields, Layout, Ranker, mlp


class _CrossModel(Ranker):
    """Sizes and inputs that all variants share; `layout` and `interleaved` differ to vary the exports."""

    layout: Layout = "vector"
    interleaved = False

    def __init__(self, user: int, item: int, vocab: int, dim: int, layers: int) -> None:
        super().__init__()
        self.fields = Fields(user, item, vocab, dim, self.layout, interleaved=self.interleaved)
        self.width, self.layers = self.fields.width, layers
        self.specs = self.fields.specs

    def embed(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """Returns all embeddings side by side, [N, width]."""
        return self.fields(inputs).flatten(1)


_SMALL = dict(user=5, item=3, vocab=50, dim=8)
_INDUSTRIAL = dict(user=24, item=8, vocab=1000, dim=32)


class DCN(_CrossModel):
    """First version: `x_{l+1} = x_0 (x_l · w) + b + x_l`, beside an MLP."""

    scales: ClassVar = {
        "small": dict(**_SMALL, layers=3, hidden=(32, 16)),
        "industrial": dict(**_INDUSTRIAL, layers=3, hidden=(1024, 512, 256)),
    }
    interleaved = True

    def __init__(self, hidden: tuple[int, ...], **sizes: int) -> None:
        super().__init__(**sizes)
        self.cross = nn.ParameterList(nn.Parameter(torch.empty(self.width, 1)) for _ in range(self.layers))
        self.bias = nn.ParameterList(nn.Parameter(torch.empty(self.width)) for _ in range(self.layers))
        self.deep = mlp((self.width, *hidden))
        self.head = nn.Linear(self.width + hidden[-1], 1)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Returns click probabilities [N, 1]."""
        x0 = x = self.embed(inputs)
        for weight, bias in zip(self.cross, self.bias, strict=True):
            x = x0 * torch.matmul(x, weight) + bias + x
        return torch.sigmoid(self.head(torch.cat([x, self.deep(x0)], dim=1)))


class DCNv2Parallel(_CrossModel):
    """Full cross matrices, `x_{l+1} = x_0 ⊙ (W x_l + b) + x_l`, beside an MLP."""

    scales: ClassVar = {
        "small": dict(**_SMALL, layers=3, hidden=(32, 16)),
        "industrial": dict(**_INDUSTRIAL, layers=3, hidden=(1024, 512, 256)),
    }
    layout = "matrix"

    def __init__(self, hidden: tuple[int, ...], **sizes: int) -> None:
        super().__init__(**sizes)
        self.cross = nn.ModuleList(nn.Linear(self.width, self.width) for _ in range(self.layers))
        self.deep = mlp((self.width, *hidden))
        self.head = nn.Linear(self.width + hidden[-1], 1)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Returns click probabilities [N, 1]."""
        x0 = x = self.embed(inputs)
        for layer in self.cross:
            x = x0 * layer(x) + x
        return torch.sigmoid(self.head(torch.cat([x, self.deep(x0)], dim=1)))


class DCNv2Stacked(_CrossModel):
    """Full cross matrices below an MLP."""

    scales: ClassVar = {
        "small": dict(**_SMALL, layers=2, hidden=(32, 16)),
        "industrial": dict(**_INDUSTRIAL, layers=3, hidden=(1024, 512, 256)),
    }
    interleaved = True

    def __init__(self, hidden: tuple[int, ...], **sizes: int) -> None:
        super().__init__(**sizes)
        self.cross = nn.ModuleList(nn.Linear(self.width, self.width) for _ in range(self.layers))
        self.deep = mlp((self.width, *hidden), head=True)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Returns click probabilities [N, 1]."""
        x0 = x = self.embed(inputs)
        for layer in self.cross:
            x = x0 * layer(x) + x
        return torch.sigmoid(self.deep(x))


class DCNv2LowRank(_CrossModel):
    """Cross matrices factored as `U V^T`, below an MLP."""

    scales: ClassVar = {
        "small": dict(**_SMALL, layers=2, rank=8, hidden=(32, 16)),
        "industrial": dict(**_INDUSTRIAL, layers=3, rank=128, hidden=(1024, 512, 256)),
    }
    layout = "column"

    def __init__(self, rank: int, hidden: tuple[int, ...], **sizes: int) -> None:
        super().__init__(**sizes)
        self.down = nn.ModuleList(nn.Linear(self.width, rank, bias=False) for _ in range(self.layers))
        self.up = nn.ModuleList(nn.Linear(rank, self.width) for _ in range(self.layers))
        self.deep = mlp((self.width, *hidden), head=True)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Returns click probabilities [N, 1]."""
        x0 = x = self.embed(inputs)
        for down, up in zip(self.down, self.up, strict=True):
            x = x0 * up(down(x)) + x
        return torch.sigmoid(self.deep(x))


class DCNv2Mix(_CrossModel):
    """Gated low-rank experts with tanh between the factors, weights on the left as `W^T x[N, width, 1]`."""

    scales: ClassVar = {
        "small": dict(**_SMALL, layers=2, rank=6, experts=3, hidden=(32, 16)),
        "industrial": dict(**_INDUSTRIAL, layers=2, rank=64, experts=4, hidden=(1024, 512, 256)),
    }
    layout = "matrix"

    def __init__(self, rank: int, experts: int, hidden: tuple[int, ...], **sizes: int) -> None:
        super().__init__(**sizes)
        width, layers = self.width, self.layers
        self.experts = experts
        self.down = nn.ParameterList(nn.Parameter(torch.empty(experts, width, rank)) for _ in range(layers))
        self.core = nn.ParameterList(nn.Parameter(torch.empty(experts, rank, rank)) for _ in range(layers))
        self.up = nn.ParameterList(nn.Parameter(torch.empty(experts, rank, width)) for _ in range(layers))
        self.bias = nn.ParameterList(nn.Parameter(torch.empty(width, 1)) for _ in range(layers))
        self.gates = nn.ModuleList(nn.Linear(width, 1, bias=False) for _ in range(experts))
        self.deep = mlp((width, *hidden))
        self.head = nn.Linear(width + hidden[-1], 1)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Returns click probabilities [N, 1]."""
        flat = self.embed(inputs)
        x0 = x = flat.unsqueeze(2)
        for down, core, up, bias in zip(self.down, self.core, self.up, self.bias, strict=True):
            outputs, gates = [], []
            for e, gate in enumerate(self.gates):
                gates.append(gate(x.flatten(1)))
                v = torch.tanh(torch.matmul(down[e].t(), x))
                v = torch.tanh(torch.matmul(core[e].t(), v))
                outputs.append((x0 * (torch.matmul(up[e].t(), v) + bias)).squeeze(2))
            mixture = torch.matmul(torch.stack(outputs, dim=2), torch.stack(gates, dim=1).softmax(dim=1))
            x = mixture + x
        return torch.sigmoid(self.head(torch.cat([x.flatten(1), self.deep(flat)], dim=1)))
