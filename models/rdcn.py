"""rDCN: cross networks that keep rank through depth, in place of DCNv2.

Known of the original ("rank-aware decomposition", arXiv 2605.27450): its aim, that the context's half of every cross
layer is computed once per request; its claim, that it matches DCNv2 within training noise at 67 % fewer FLOPs; and its
name. Its equations were not to be had. What is here is a reconstruction: DCNv2's layer `x0 ⊙ (W x + b) + x` with a
block-triangular W, of which the context's rows read the context only,

    c' = c0 ⊙ (c W_cc + b_c) + c                   once per request
    t' = t0 ⊙ (c W_ct + t W_tt + b_t) + t          per candidate `t W_tt` alone

With d_t of d entries the candidate's that leaves (d_t / d)² of the multiply-adds of a layer per candidate: 33 % at
d_t / d = 0.57, which fits the claim. `optimize` keeps plain DCNv2 affine in the candidate at any depth, exactly and
without training; that takes l(l + 1)/2 products of d_t² for l layers, and matrices that are made once per request.
rDCN takes l, and matrices that are constant: its case is depth, and few candidates.

`from_dcnv2` starts one from a trained DCNv2, whose block W_tc (candidate into context) is left out; train it further.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from models.dcn import DCNv2LowRank, DCNv2Parallel, DCNv2Stacked, _CrossModel
from models.layers import Layout, mlp


class TriangularCross(nn.Module):
    """Cross layers with block-triangular matrices.

    Args:
        context: Width of what is the same for all candidates.
        target: Width of what is the candidate's.
        layers: How many.
        rank: Of the factors of every block row, `U Vᵀ`; 0 for full matrices.
        across: Whether candidates read the context. Without, the blocks between levels are missing altogether: a
            control, that no product of a context and a candidate feature is left.
    """

    def __init__(self, context: int, target: int, layers: int, rank: int = 0, across: bool = True) -> None:
        super().__init__()
        self.across = across

        def block(read: int, width: int) -> nn.Module:
            if not rank:
                return nn.Linear(read, width)
            return nn.Sequential(nn.Linear(read, rank, bias=False), nn.Linear(rank, width))

        self.context = nn.ModuleList(block(context, context) for _ in range(layers))
        self.target = nn.ModuleList(block(context * across + target, target) for _ in range(layers))

    def forward(self, context: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Returns both halves `[N, context]` and `[N, target]` after all layers."""
        c0, t0, c, t = context, target, context, target
        for mine, its in zip(self.context, self.target, strict=True):
            # The candidate's half reads the context's from before this layer, as in DCNv2.
            read = torch.cat([c, t], dim=1) if self.across else t
            c, t = c0 * mine(c) + c, t0 * its(read) + t
        return c, t


class _Triangular(_CrossModel):
    """What the variants share; entries are always context first, in whatever order the fields come."""

    def __init__(self, rank: int = 0, across: bool = True, **sizes: int) -> None:
        super().__init__(**sizes)
        self.halves = (sizes["user"] * sizes["dim"], sizes["item"] * sizes["dim"])
        self.cross = TriangularCross(*self.halves, self.layers, rank, across)

    def embed_halves(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Embeddings of the context and of the candidates, side by side each."""
        return self.fields.user(inputs).flatten(1), self.fields.item(inputs).flatten(1)


class RDCNParallel(_Triangular):
    """In place of `DCNv2Parallel`: the cross network beside an MLP that reads the embeddings."""

    scales: ClassVar = DCNv2Parallel.scales
    layout: Layout = DCNv2Parallel.layout

    def __init__(self, hidden: tuple[int, ...], **sizes: int) -> None:
        super().__init__(**sizes)
        self.deep = mlp((self.width, *hidden))
        self.head = nn.Linear(self.width + hidden[-1], 1)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Returns click probabilities [N, 1]."""
        both = self.embed_halves(inputs)
        return torch.sigmoid(self.head(torch.cat([*self.cross(*both), self.deep(torch.cat(both, dim=1))], dim=1)))


class RDCNStacked(_Triangular):
    """In place of `DCNv2Stacked`: the cross network below an MLP; with `hidden=()` below one linear unit."""

    scales: ClassVar = DCNv2Stacked.scales
    interleaved = DCNv2Stacked.interleaved

    def __init__(self, hidden: tuple[int, ...], **sizes: int) -> None:
        super().__init__(**sizes)
        self.deep = mlp((self.width, *hidden), head=True)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Returns click probabilities [N, 1]."""
        return torch.sigmoid(self.deep(torch.cat(self.cross(*self.embed_halves(inputs)), dim=1)))


class RDCNLowRank(RDCNStacked):
    """In place of `DCNv2LowRank`: every block row factored as `U Vᵀ`, below an MLP."""

    scales: ClassVar = DCNv2LowRank.scales
    layout: Layout = DCNv2LowRank.layout
    interleaved = DCNv2LowRank.interleaved


def from_dcnv2(model: DCNv2Parallel | DCNv2Stacked | DCNv2LowRank) -> _Triangular:
    """An rDCN that starts from the weights of a DCNv2, to be trained further.

    Everything is copied but the block by which the context's half reads candidates; where that is 0, the two give the
    same scores. Of low-rank layers both block rows keep the rank.

    Args:
        model: The trained model. It is not changed.

    Returns:
        The model in its place, with the same inputs and outputs, in training mode if the other is.

    Raises:
        TypeError: If it is none of the three.
    """
    kinds = {DCNv2Parallel: RDCNParallel, DCNv2Stacked: RDCNStacked, DCNv2LowRank: RDCNLowRank}
    if type(model) not in kinds:
        raise TypeError(f"{type(model).__name__} is no DCNv2 that has an rDCN in its place")
    fields, dim = model.fields, model.fields.dim
    rank = {"rank": model.down[0].out_features} if isinstance(model, DCNv2LowRank) else {}
    linear = [part for part in model.deep if isinstance(part, nn.Linear)]
    made = kinds[type(model)](
        hidden=tuple(p.out_features for p in linear if p.out_features > 1 or p is not linear[-1]),
        user=fields.user_count,
        item=fields.item_count,
        vocab=fields.specs[0].high,
        dim=dim,
        layers=model.layers,
        **rank,
    )
    entries = torch.arange(model.width).view(fields.count, dim)
    c, t = entries[fields.user_positions].flatten(), entries[fields.item_positions].flatten()
    both = torch.cat([c, t])
    with torch.no_grad():
        made.fields.load_state_dict(fields.state_dict())
        for k in range(model.layers):
            for half, read, rows in ((made.cross.context[k], c, c), (made.cross.target[k], both, t)):
                if isinstance(model, DCNv2LowRank):
                    half[0].weight.copy_(model.down[k].weight[:, read])
                    half = half[1]
                    half.weight.copy_(model.up[k].weight[rows])
                    half.bias.copy_(model.up[k].bias[rows])
                else:
                    half.weight.copy_(model.cross[k].weight[rows][:, read])
                    half.bias.copy_(model.cross[k].bias[rows])
        made.deep.load_state_dict({k: v[:, both] if k == "0.weight" else v for k, v in model.deep.state_dict().items()})
        if isinstance(model, DCNv2Parallel):
            made.head.weight.copy_(torch.cat([model.head.weight[:, both], model.head.weight[:, model.width :]], dim=1))
            made.head.bias.copy_(model.head.bias)
    return made.train(model.training)
