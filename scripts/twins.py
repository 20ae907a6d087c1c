"""Hand-optimised twins of reference models: what a person who knows the trick would write.

A twin takes the same inputs by the same names, but request-level ones have a single row. It shares the
weights of the original. These are the level that an automatic rewrite should reach or pass.

    python scripts/twins.py out --scale industrial --names dlrm din
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models import InputSpec, build, sample
from models.dcn import DCNv2Parallel
from models.deepfm import DeepFM, fm
from models.din import DIN
from models.dlrm import DLRM
from models.experts import PLE, Extraction, MMoE
from models.field_attention import FieldAttention
from models.hadamard_pairs import HadamardPairs
from models.history_transformer import CausalLayer, HistoryTransformer
from models.layers import Fields, Ranker
from models.two_tower import TwoTower
from models.wide_deep import WideDeep
from scripts.export_models import EXPORT_ROWS, arguments, export_torchscript, run, session, write

TOLERANCE = 2e-5
CHECK_ROWS = (1, 3, 17)


def entries(positions: Iterable[int], width: int) -> list[int]:
    """Entries of a flattened [positions, width] array that belong to some positions."""
    return [p * width + k for p in positions for k in range(width)]


class SplitLinear(nn.Module):
    """A linear layer over request-level and candidate-level entries as `Gemm(x, W_x, C = Gemm(u, W_u, b))`.

    The sum rides in C's broadcast, so it costs no kernel of its own.
    """

    def __init__(self, layer: nn.Linear, user: Sequence[int], item: Sequence[int]) -> None:
        super().__init__()
        weight = layer.weight.detach().t()
        self.register_buffer("user_weight", weight[list(user)].contiguous())
        self.register_buffer("item_weight", weight[list(item)].contiguous())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        """Combines u [1, user entries] and x [N, item entries]."""
        once = torch.mm(u, self.user_weight) if self.bias is None else torch.addmm(self.bias, u, self.user_weight)
        return torch.addmm(once, x, self.item_weight)


def split_fields(layer: nn.Linear, fields: Fields) -> SplitLinear:
    """Splits a layer over the flattened fields."""
    return SplitLinear(layer, entries(fields.user_positions, fields.dim), entries(fields.item_positions, fields.dim))


def head(layer: nn.Linear, h: Tensor, rest: Tensor) -> Tensor:
    """A layer to one logit with the rest of the logit, this layer's bias included, as C of its Gemm."""
    return torch.addmm(rest, h, layer.weight.t())


class WideDeepTwin(nn.Module):
    """First deep layer and wide part split; all logits meet in the last Gemm."""

    def __init__(self, original: WideDeep) -> None:
        super().__init__()
        self.original = original
        fields = original.fields
        user_dense, item_dense = (spec.shape[1] for spec in original.specs[-2:])
        first = fields.width
        user = entries(fields.user_positions, fields.dim) + list(range(first, first + user_dense))
        last = first + user_dense
        item = entries(fields.item_positions, fields.dim) + list(range(last, last + item_dense))
        self.first = SplitLinear(original.deep[0], user, item)
        self.wide = SplitLinear(original.wide_dense, range(user_dense), range(user_dense, user_dense + item_dense))

    def forward(self, *inputs: Tensor) -> Tensor:
        """Returns click probabilities [N, 1]."""
        m = self.original
        *ids, user_dense, item_dense = inputs
        u = torch.cat([m.fields.user(ids).flatten(1), user_dense], dim=1)
        x = torch.cat([m.fields.item(ids).flatten(1), item_dense], dim=1)
        h = m.deep[1:-1](self.first(u, x))
        once = m.wide.user(ids).sum(dim=1) + m.deep[-1].bias
        wide = self.wide(user_dense, item_dense) + (m.wide.item(ids).sum(dim=1) + once)
        return torch.sigmoid(head(m.deep[-1], h, wide))


class DeepFMTwin(nn.Module):
    """`fm(u) + fm(x) + ⟨Σu, Σx⟩`, and the first deep layer split."""

    def __init__(self, original: DeepFM) -> None:
        super().__init__()
        self.original = original
        self.first = split_fields(original.deep[0], original.fields)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Returns click probabilities [N, 1]."""
        m = self.original
        u, x = m.fields.user(inputs), m.fields.item(inputs)
        once = m.linear.user(inputs).sum(dim=1) + fm(u) + m.deep[-1].bias
        sum_x = x.sum(dim=1)
        # ½(‖Σx‖² − Σ‖x‖²) + ⟨Σu, Σx⟩ = ½(⟨Σx + 2Σu, Σx⟩ − Σ‖x‖²)
        pairs = (sum_x * (sum_x + 2.0 * u.sum(dim=1))).sum(dim=1, keepdim=True)
        squares = (x * x).flatten(1).sum(dim=1, keepdim=True)
        rest = m.linear.item(inputs).sum(dim=1) + once + 0.5 * (pairs - squares)
        h = m.deep[1:-1](self.first(u.flatten(1), x.flatten(1)))
        return torch.sigmoid(head(m.deep[-1], h, rest))


class DLRMTwin(nn.Module):
    """Only dot products with an item are made per candidate.

    The triangle is never gathered: the top layer's weights are spread over the full blocks instead, with
    zeros for the entries of the upper triangle.
    """

    def __init__(self, original: DLRM) -> None:
        super().__init__()
        self.original = original
        fields, dim = original.fields, original.fields.dim
        layer = original.top[0]
        # Position 0 of the Gram matrix is the bottom MLP's output.
        user = [0, *(1 + p for p in fields.user_positions)]
        item = [1 + p for p in fields.item_positions]
        weight = layer.weight.detach().t()
        pair_row = {
            frozenset(pair): dim + k
            for k, pair in enumerate(zip(original.rows.tolist(), original.columns.tolist(), strict=True))
        }

        def block(rows: list[int], columns: list[int]) -> Tensor:
            spread = torch.zeros(len(rows), len(columns), weight.shape[1])
            for a, i in enumerate(rows):
                for b, j in enumerate(columns):
                    if rows is not columns or a > b:
                        spread[a, b] = weight[pair_row[frozenset((i, j))]]
            return spread.flatten(0, 1)

        self.register_buffer("dense_user_user", torch.cat([weight[:dim], block(user, user)]))
        self.register_buffer("item_user", block(item, user))
        self.register_buffer("item_item", block(item, item))
        self.register_buffer("bias", layer.bias.detach().clone())

    def forward(self, user_dense: Tensor, *inputs: Tensor) -> Tensor:
        """Returns click probabilities [N, 1]."""
        m = self.original
        dense = m.bottom(user_dense)
        u = torch.cat([dense.unsqueeze(1), m.fields.user(inputs)], dim=1)[0]
        x = m.fields.item(inputs)
        # Extents come from the configuration: taken from a tensor, they would be traced as Shape nodes.
        users, count, dim = m.fields.user_count + 1, m.fields.item_count, m.fields.dim
        user_user = torch.mm(u, u.t()).reshape(1, users * users)
        once = torch.addmm(self.bias, torch.cat([dense, user_user], dim=1), self.dense_user_user)
        item_user = torch.mm(x.reshape(-1, dim), u.t()).reshape(-1, count * users)
        item_item = torch.bmm(x, x.transpose(1, 2)).reshape(-1, count * count)
        h = torch.addmm(torch.addmm(once, item_user, self.item_user), item_item, self.item_item)
        return torch.sigmoid(m.top[1:](h))


class DCNv2ParallelTwin(nn.Module):
    """The context half of every cross layer stays affine in the candidate's tensors and is never made.

    For one request, context half c and candidate half t_0 of the input: after l layers the context half is
    `A + Σ_k t_k M_k` with A and M_k made once, and t_l the candidate half. The last layer goes into the head.
    """

    def __init__(self, original: DCNv2Parallel) -> None:
        super().__init__()
        self.original = original
        fields = original.fields
        user = entries(fields.user_positions, fields.dim)
        item = entries(fields.item_positions, fields.dim)
        self.layers = len(original.cross)
        for k, layer in enumerate(original.cross):
            weight, bias = layer.weight.detach().t(), layer.bias.detach()
            for name, rows, columns in (
                ("cc", user, user),
                ("ct", user, item),
                ("tc", item, user),
                ("tt", item, item),
            ):
                self.register_buffer(f"{name}{k}", weight[rows][:, columns].contiguous())
            self.register_buffer(f"bias_c{k}", bias[user])
            self.register_buffer(f"bias_t{k}", bias[item])
        final = original.head.weight.detach().t()
        self.register_buffer("head_c", final[user])
        self.register_buffer("head_t", final[item])
        self.register_buffer("head_deep", final[fields.width :])
        self.first = split_fields(original.deep[0], fields)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Returns click probabilities [N, 1]."""
        m = self.original
        c, t0 = m.fields.user(inputs).flatten(1), m.fields.item(inputs).flatten(1)
        deep = m.deep[1:](self.first(c, t0))
        offset, basis, maps = c, [t0], []
        for k in range(self.layers):
            cc, ct, tc, tt = (getattr(self, f"{name}{k}") for name in ("cc", "ct", "tc", "tt"))
            bias_c, bias_t = getattr(self, f"bias_c{k}"), getattr(self, f"bias_t{k}")
            # Candidate half: one Gemm per tensor it depends on, each with the previous one as C.
            z = torch.addmm(bias_t, offset, ct)
            for t, linear in zip(basis, [*(torch.mm(linear, ct) for linear in maps), tt], strict=True):
                z = torch.addmm(z, t, linear)
            following = t0 * z + basis[-1]
            if k < self.layers - 1:
                maps = [torch.mm(linear, cc) * c + linear for linear in maps] + [tc * c]
                offset = c * torch.addmm(bias_c, offset, cc) + offset
                basis.append(following)
                continue
            # x_c · h_c = (c ⊙ z_c + x_{l,c}) · h_c: one vector per tensor instead of a map.
            scaled = c.t() * self.head_c
            column = torch.addmm(self.head_c, cc, scaled)
            logit = torch.addmm(torch.addmm(m.head.bias, bias_c.unsqueeze(0), scaled), offset, column)
            for t, vector in zip(
                basis, [*(torch.mm(linear, column) for linear in maps), torch.mm(tc, scaled)], strict=True
            ):
                logit = torch.addmm(logit, t, vector)
            logit = torch.addmm(logit, following, self.head_t)
        return torch.sigmoid(torch.addmm(logit, deep, self.head_deep))


class DINTwin(nn.Module):
    """The first attention layer is one Gemm of the candidates with weights made per request.

    `[q, h, q − h, q ⊙ h] W + b = q (diag(h) W_* + W_q + W_-) + h (W_h − W_-) + b`, for all positions at once.
    """

    def __init__(self, original: DIN) -> None:
        super().__init__()
        self.original = original
        layer = original.attention[0]
        q, h, difference, product = layer.weight.detach().t().chunk(4)
        self.register_buffer("query", (q + difference).unsqueeze(1).contiguous())
        self.register_buffer("product", product.unsqueeze(1).contiguous())
        self.register_buffer("history", (h - difference).contiguous())
        self.register_buffer("bias", layer.bias.detach().clone())
        dim, width = layer.in_features // 4, original.deep[0].in_features
        pooled, profile = list(range(dim)), list(range(2 * dim, width))
        self.first = SplitLinear(original.deep[0], profile, [*pooled, *range(dim, 2 * dim)])

    def forward(
        self,
        user_ids: Tensor,
        hist_ids: Tensor,
        hist_categories: Tensor,
        item_id: Tensor,
        item_category: Tensor,
    ) -> Tensor:
        """Returns click probabilities [N, 1]."""
        m = self.original
        h, q = m.embed(hist_ids, hist_categories)[0], m.embed(item_id, item_category)
        length, dim, width = m.specs[1].shape[1], self.history.shape[0], self.bias.shape[0]
        # [dim, positions, hidden]: next to the transposed history, so that only a column of h is spread.
        weight = (h.t().unsqueeze(2) * self.product + self.query).reshape(dim, length * width)
        once = torch.addmm(self.bias, h, self.history).reshape(1, length * width)
        # The activation comes before the reshape, where the runtime can fuse it into the Gemm.
        hidden = m.attention[1](torch.addmm(once, q, weight)).reshape(-1, width)
        scores = m.attention[2:](hidden).reshape(-1, length)
        padding = torch.where(hist_ids == 0, -1e9, 0.0)
        pooled = torch.mm((scores + padding).softmax(dim=1), h)
        x = self.first(m.users.user((user_ids,)).flatten(1), torch.cat([pooled, q], dim=1))
        return torch.sigmoid(m.deep[1:](x))


class HistoryTransformerTwin(nn.Module):
    """The history goes through the layers once; each candidate is one query per layer."""

    def __init__(self, original: HistoryTransformer) -> None:
        super().__init__()
        self.original = original
        self.register_buffer("causal", original.causal[:-1].clone())

    def forward(self, hist_ids: Tensor, item_id: Tensor) -> Tensor:
        """Returns click probabilities [N, 1]."""
        m = self.original
        padding = torch.where(hist_ids == 0, -1e9, 0.0)
        mask = self.causal + padding
        h = m.item_table(hist_ids)[0] + m.positions[:-1]
        x = m.item_table(item_id) + m.positions[-1:]
        for k, layer in enumerate(m.layers):
            normal = layer.norm1(h)
            key = self._heads(layer, layer.attention.key(normal)).transpose(1, 2)
            value = self._heads(layer, layer.attention.value(normal))
            if k < len(m.layers) - 1:  # the history's own result of the last layer is not needed
                h = self._layer(layer, h, normal, key, value, mask)
            x = self._layer(layer, x, layer.norm1(x), key, value, padding)
        return torch.sigmoid(m.head(m.norm(x)))

    @staticmethod
    def _heads(layer: CausalLayer, x: Tensor) -> Tensor:
        return x.reshape(-1, layer.attention.heads, layer.attention.head_dim).transpose(0, 1)

    def _layer(self, layer: CausalLayer, x: Tensor, normal: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        attention = layer.attention
        query = self._heads(layer, attention.query(normal)) * (1.0 / math.sqrt(attention.head_dim))
        weights = (torch.matmul(query, key) + mask).softmax(dim=-1)
        context = torch.matmul(weights, value).transpose(0, 1)
        x = x + attention.out(context.reshape(-1, attention.heads * attention.head_dim))
        return x + layer.feedforward(layer.norm2(x))


def weighted_sum(experts: Sequence[Tensor], gate: Tensor) -> Tensor:
    """Mixes experts [N, H] by a gate's logits [N, experts] without stacking them."""
    weights = gate.softmax(dim=1).split(1, dim=1)
    total = weights[0] * experts[0]
    for weight, expert in zip(weights[1:], experts[1:], strict=True):
        total = total + weight * expert
    return total


class SplitGates(nn.Module):
    """Several gates on one input as a single split product."""

    def __init__(self, gates: Sequence[nn.Linear], fields: Fields) -> None:
        super().__init__()
        self.sizes = [gate.out_features for gate in gates]
        joined = nn.Linear(gates[0].in_features, sum(self.sizes), bias=False)
        with torch.no_grad():
            joined.weight.copy_(torch.cat([gate.weight for gate in gates]))
        self.product = split_fields(joined, fields)

    def forward(self, u: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        """Returns the logits of each gate."""
        return self.product(u, x).split(self.sizes, dim=1)


class MMoETwin(nn.Module):
    """First layer of every expert split, all gates in one split product."""

    def __init__(self, original: MMoE) -> None:
        super().__init__()
        self.original = original
        self.first = nn.ModuleList(split_fields(expert[0], original.fields) for expert in original.experts)
        self.gates = SplitGates(list(original.gates), original.fields)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Returns one probability [N, 1] per task."""
        m = self.original
        u, x = m.fields.user(inputs).flatten(1), m.fields.item(inputs).flatten(1)
        experts = [expert[1:](first(u, x)) for expert, first in zip(m.experts, self.first, strict=True)]
        gates = self.gates(u, x)
        return tuple(
            torch.sigmoid(tower(weighted_sum(experts, gate))) for gate, tower in zip(gates, m.towers, strict=True)
        )


class PLETwin(nn.Module):
    """First level split as in MMoE; the streams of later levels are candidate-level."""

    def __init__(self, original: PLE) -> None:
        super().__init__()
        self.original = original
        level: Extraction = original.levels[0]
        self.first = nn.ModuleList(
            nn.ModuleList(split_fields(expert[0], original.fields) for expert in group) for group in level.experts
        )
        self.gates = SplitGates(list(level.gates), original.fields)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Returns probabilities [N, tasks]."""
        m = self.original
        u, x = m.fields.user(inputs).flatten(1), m.fields.item(inputs).flatten(1)
        outputs = [
            [expert[1:](first(u, x)) for expert, first in zip(group, firsts, strict=True)]
            for group, firsts in zip(m.levels[0].experts, self.first, strict=True)
        ]
        streams = self._mix(outputs, self.gates(u, x))
        for level in m.levels[1:]:
            outputs = [[expert(s) for expert in group] for group, s in zip(level.experts, streams, strict=True)]
            # The last level has no gate for the shared stream.
            streams = self._mix(outputs, [gate(s) for gate, s in zip(level.gates, streams, strict=False)])
        return torch.sigmoid(torch.cat([tower(s) for tower, s in zip(m.towers, streams, strict=True)], dim=1))

    def _mix(self, outputs: list[list[Tensor]], gates: Sequence[Tensor]) -> list[Tensor]:
        everything = [expert for group in outputs for expert in group]
        return [
            weighted_sum(everything if k == self.original.tasks else outputs[k] + outputs[-1], gate)
            for k, gate in enumerate(gates)
        ]


class TwoTowerTwin(nn.Module):
    """The user tower runs at one row; the scores are one product with its normalised result."""

    def __init__(self, original: TwoTower) -> None:
        super().__init__()
        self.original = original

    def forward(self, *inputs: Tensor) -> Tensor:
        """Returns click probabilities [N]."""
        m = self.original
        user = m.user_tower(m.fields.user(inputs).flatten(1))
        item = m.item_tower(m.fields.item(inputs).flatten(1))
        user = user / (user.norm(dim=1, keepdim=True).clamp(min=1e-12) * m.temperature)
        scores = torch.mm(item, user.t()) / item.norm(dim=1, keepdim=True).clamp(min=1e-12)
        return torch.sigmoid(scores).reshape(-1)


class HadamardPairsTwin(nn.Module):
    """Request × candidate products are folded into the layer's weights, once per request.

    `Σ_{r,c,d} W[r,c,d,:] R[r,d] C[n,c,d] = Σ_{c,d} M[c,d,:] C[n,c,d]`, `M[c,d,:] = Σ_r W[r,c,d,:] R[r,d]`.
    """

    def __init__(self, original: HadamardPairs) -> None:
        super().__init__()
        self.original = original
        fields, layer = original.fields, original.deep[0]
        dim, user, item = fields.dim, fields.user_positions, fields.item_positions
        pairs = list(zip(original.left.tolist(), original.right.tolist(), strict=True))
        row = {frozenset(pair): k for k, pair in enumerate(pairs)}
        weight = layer.weight.detach().t().reshape(len(pairs), dim, -1)

        def within(positions: list[int]) -> tuple[list[int], list[int], Tensor]:
            found = [(a, b) for a in range(len(positions)) for b in range(a + 1, len(positions))]
            rows = [row[frozenset((positions[a], positions[b]))] for a, b in found]
            return [a for a, _ in found], [b for _, b in found], weight[rows].flatten(0, 1)

        for name, positions in (("user", user), ("item", item)):
            left, right, part = within(positions)
            self.register_buffer(f"{name}_left", torch.tensor(left))
            self.register_buffer(f"{name}_right", torch.tensor(right))
            self.register_buffer(f"{name}_weight", part.contiguous())
        mixed = torch.stack([torch.stack([weight[row[frozenset((r, c))]] for c in item]) for r in user])
        # [d, r, c, hidden]: the sum over r is one product per d.
        self.register_buffer("mixed", mixed.permute(2, 0, 1, 3).flatten(2).contiguous())
        self.register_buffer("bias", layer.bias.detach().clone())

    def forward(self, *inputs: Tensor) -> Tensor:
        """Returns logits [N, 1]."""
        m = self.original
        u, x = m.fields.user(inputs), m.fields.item(inputs)
        dim, count, hidden = m.fields.dim, m.fields.item_count, self.bias.shape[0]
        user_pairs = u.index_select(1, self.user_left) * u.index_select(1, self.user_right)
        once = torch.addmm(self.bias, user_pairs.flatten(1), self.user_weight)
        mixed = torch.matmul(u[0].t().unsqueeze(1), self.mixed).reshape(dim, count, hidden)
        mixed = mixed.transpose(0, 1).reshape(count * dim, hidden)
        item_pairs = x.index_select(1, self.item_left) * x.index_select(1, self.item_right)
        h = torch.addmm(torch.addmm(once, x.flatten(1), mixed), item_pairs.flatten(1), self.item_weight)
        return m.deep[1:](h)


class FieldAttentionTwin(nn.Module):
    """Request queries meet request keys once; the result joins each candidate's softmax as one more key.

    For a request query with scores s over the request keys, the softmax over them and the candidate's scores
    t is that over `[log Σ exp s, t]`, or over `[0, t − log Σ exp s]`, with the values pooled once as value of
    the first entry. Every product with a request-level operand has the candidates' fields as rows. Heads are
    computed one by one: each writes its rows in place, and only one small block of scores is transposed.
    """

    def __init__(self, original: FieldAttention) -> None:
        super().__init__()
        self.original = original
        attention, fields = original.attention, original.fields
        self.heads, d = attention.heads, attention.head_dim
        scale = 1.0 / math.sqrt(d)
        final = original.head.weight.detach().reshape(fields.count, self.heads, d)
        for k in range(self.heads):
            rows = slice(k * d, (k + 1) * d)
            for name, layer, factor in (
                ("query", attention.query, scale),
                ("key", attention.key, 1.0),
                ("value", attention.value, 1.0),
                ("residual", original.residual, 1.0),
            ):
                self.register_buffer(f"{name}{k}", (layer.weight.detach()[rows] * factor).t().contiguous())
                bias = torch.zeros(layer.out_features) if layer.bias is None else layer.bias.detach()
                self.register_buffer(f"{name}_bias{k}", bias[rows] * factor)
            self.register_buffer(f"user_head{k}", final[fields.user_positions, k].reshape(-1, 1))
            self.register_buffer(f"item_head{k}", final[fields.item_positions, k].reshape(-1, 1))

    def forward(self, *inputs: Tensor) -> Tensor:
        """Returns logits [N, 1]."""
        m = self.original
        u, x = m.fields.user(inputs), m.fields.item(inputs)
        u, x = u[0], x.reshape(-1, m.fields.dim)
        logit = m.head.bias
        for k in range(self.heads):
            user, item = self._head(k, u, x)
            logit = torch.addmm(
                torch.addmm(logit, user, self._weight("user_head", k)), item, self._weight("item_head", k)
            )
        return logit

    def _weight(self, name: str, k: int) -> Tensor:
        return getattr(self, f"{name}{k}")

    def _project(self, name: str, k: int, x: Tensor) -> Tensor:
        return torch.addmm(self._weight(f"{name}_bias", k), x, self._weight(name, k))

    def _head(self, k: int, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """One head's features of the request fields and of the candidate fields, [N, fields * d] each."""
        fields, d = self.original.fields, self.original.attention.head_dim
        users, items = fields.user_count, fields.item_count

        uq, uk, uv = (self._project(name, k, u) for name in ("query", "key", "value"))
        scores = torch.mm(uq, uk.t())
        once = torch.logsumexp(scores, dim=1, keepdim=True)
        pooled = torch.mm((scores - once).exp(), uv)

        iq, ik, iv = (self._project(name, k, x) for name in ("query", "key", "value"))
        batched_q, batched_k, batched_v = (part.reshape(-1, items, d) for part in (iq, ik, iv))

        # Candidate queries: one softmax over request keys and own keys.
        to_user = torch.mm(iq, uk.t()).reshape(-1, items, users)
        to_item = torch.bmm(batched_q, batched_k.transpose(1, 2))
        from_user, from_item = torch.cat([to_user, to_item], dim=2).softmax(dim=2).split([users, items], dim=2)
        item = torch.addmm(torch.mm(x, self._weight("residual", k)), from_user.reshape(-1, users), uv)
        item = torch.relu(item.reshape(-1, items, d) + torch.bmm(from_item, batched_v))

        # Request queries: the candidate's scores relative to those of the request, which become a zero.
        relative = torch.addmm(-once.t(), ik, uq.t()).reshape(-1, items, users).transpose(1, 2)
        own, before = functional.pad(relative, (0, 1)).softmax(dim=2).split([items, 1], dim=2)
        # Not torch.mm: the exporter would fuse it with the addition to a Gemm whose C has three axes.
        user_residual = self._project("residual", k, u)
        user = torch.bmm(own, batched_v) + (before * pooled + user_residual)
        return torch.relu(user).reshape(-1, users * d), item.reshape(-1, items * d)


_TWINS: dict[str, type[nn.Module]] = {
    "wide_deep": WideDeepTwin,
    "deepfm": DeepFMTwin,
    "dcnv2_parallel": DCNv2ParallelTwin,
    "dlrm": DLRMTwin,
    "din": DINTwin,
    "history_transformer": HistoryTransformerTwin,
    "mmoe": MMoETwin,
    "ple": PLETwin,
    "two_tower": TwoTowerTwin,
    "hadamard_pairs": HadamardPairsTwin,
    "field_attention": FieldAttentionTwin,
}

TWIN_NAMES: tuple[str, ...] = tuple(_TWINS)


def twin(name: str, module: Ranker, specs: Sequence[InputSpec]) -> nn.Module:
    """Returns the hand-optimised form of a model.

    Args:
        name: One of `TWIN_NAMES`.
        module: The original, from `models.build`; its weights are shared or rearranged.
        specs: Its inputs. The twin takes them in the same order, request-level ones with one row.
    """
    optimised = _TWINS[name](module)
    optimised.specs = list(specs)
    optimised.output_names = module.output_names
    return optimised.eval()


def one_row(feeds: dict[str, np.ndarray], specs: Sequence[InputSpec]) -> dict[str, np.ndarray]:
    """Cuts request-level inputs to their first row."""
    return {spec.name: feeds[spec.name][:1] if spec.level == "request" else feeds[spec.name] for spec in specs}


def export_twins(outdir: Path, scale: str = "small", names: Sequence[str] = TWIN_NAMES) -> None:
    """Writes `<name>.twin.onnx` for each name, after a check against the original in onnxruntime.

    Raises:
        ValueError: If a twin differs from its original.
    """
    outdir.mkdir(parents=True, exist_ok=True)
    for name in names:
        module, specs = build(name, scale)
        original = session(export_torchscript(module, specs))
        args = tuple(
            value[:1] if spec.level == "request" else value
            for value, spec in zip(arguments(specs, EXPORT_ROWS), specs, strict=True)
        )
        varying = [spec.name for spec in specs if spec.level != "request"]
        with torch.no_grad():
            model = export_torchscript(twin(name, module, specs), specs, args, varying)
        opened = session(model)
        found = []
        for n in CHECK_ROWS:
            feeds = sample(specs, n, seed=n)
            pairs = zip(run(original, feeds), run(opened, one_row(feeds, specs)), strict=True)
            worst = max(float(np.abs(a - b).max()) if a.shape == b.shape else math.inf for a, b in pairs)
            if not worst < TOLERANCE:
                raise ValueError(f"{name}: differs from the original by {worst:.1e} at N = {n}")
            found.append(f"N={n} {worst:.0e}")
        path = outdir / f"{name}.twin.onnx"
        write(model, path)
        size = path.stat().st_size / 1024
        print(f"{path.name}: {len(model.graph.node)} nodes, {size:.0f} KB, {', '.join(found)}")


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("outdir", type=Path)
    parser.add_argument("--scale", choices=("small", "industrial"), default="small")
    parser.add_argument("--names", nargs="+", choices=TWIN_NAMES, default=TWIN_NAMES, metavar="NAME")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    export_twins(options.outdir, options.scale, options.names)
    return 0


if __name__ == "__main__":
    sys.exit(main())
