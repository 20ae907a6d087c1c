"""Fine-tuning: the factors of low-rank layers, trained by gradients against the labels and the original's scores.

What lies before the factors is run by onnxruntime; what lies between them and the scores is run by torch, operator by
operator, so that gradients come out. An operator that is not in the table here leaves the layers before it as they are.
With a ReLU between the factors (atomic feature mimicking, arXiv 2405.18146) a constant is added before it, so large
that the layer gives what it gave at first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto
from torch import Tensor
from torch.nn import functional

from onnxrank.errors import ModelError
from onnxrank.graphs import attribute, versions
from onnxrank.model import tensor_data
from onnxrank.operators import Trait, operator, traits

Given = Sequence[Tensor | None]
_CLOSE = 1e-3
"""Distance of torch's scores from onnxruntime's, relative to their size, above which nothing is trained."""


@dataclass(frozen=True)
class Factors:
    """A layer of low rank in the model that is trained; several may share their first factor.

    Attributes:
        name: The layer's name.
        first: Tensor of its first factor.
        second: Tensor of its second factor.
        inner: What lies between them, by node.
        outer: What the second product gives, by node.
    """

    name: str
    first: str
    second: str
    inner: Sequence[str]
    outer: Sequence[str]


@dataclass
class _Use:
    """One node with its operands: tensors, None for those that are left out."""

    node: NodeProto
    given: Given
    opset: int

    def __getitem__(self, k: int) -> Tensor:
        found = self.given[k]
        assert found is not None
        return found

    def get(self, name: str, default: Any = None) -> Any:
        return attribute(self.node, name, default)

    def integers(self, k: int, name: str, default: Any = None) -> Any:
        """Integers that are an input, or were an attribute once."""
        if k < len(self.given) and self.given[k] is not None:
            return self[k].tolist()
        return self.get(name, default)


def _gemm(u: _Use) -> Tensor:
    a, b = (x.T if u.get(flag, 0) else x for x, flag in ((u[0], "transA"), (u[1], "transB")))
    out: Tensor = u.get("alpha", 1.0) * (a @ b)
    return out + u.get("beta", 1.0) * u[2] if len(u.given) > 2 and u.given[2] is not None else out


def _reshape(u: _Use) -> Tensor:
    shape = [u[0].shape[k] if n == 0 and not u.get("allowzero", 0) else n for k, n in enumerate(u[1].tolist())]
    return u[0].reshape(shape)


def _squeeze(u: _Use) -> Tensor:
    axes = u.integers(1, "axes", [k for k, n in enumerate(u[0].shape) if n == 1])
    return u[0].squeeze(tuple(axes))


def _unsqueeze(u: _Use) -> Tensor:
    axes, out = u.integers(1, "axes"), u[0]
    rank = out.ndim + len(axes)
    for axis in sorted(a % rank for a in axes):
        out = out.unsqueeze(axis)
    return out


def _flatten(u: _Use) -> Tensor:
    axis = u.get("axis", 1) % (u[0].ndim + 1)
    return u[0].reshape(math.prod(u[0].shape[:axis]), -1)


def _reduced(by: Callable[..., Tensor]) -> Callable[[_Use], Tensor]:
    def made(u: _Use) -> Tensor:
        axes = u.integers(1, "axes")
        if not axes and u.get("noop_with_empty_axes", 0):
            return u[0]
        return by(u[0], tuple(axes or range(u[0].ndim)), keepdim=bool(u.get("keepdims", 1)))

    return made


def _slice(u: _Use) -> Tensor:
    starts, ends = u.integers(1, "starts"), u.integers(2, "ends")
    axes = u.integers(3, "axes", list(range(len(starts))))
    steps = u[4].tolist() if len(u.given) > 4 and u.given[4] is not None else [1] * len(starts)
    if any(s < 1 for s in steps):
        raise NotImplementedError("slices that go backwards")
    at = [slice(None)] * u[0].ndim
    for axis, *bounds in zip(axes, starts, ends, steps, strict=True):
        at[axis] = slice(*bounds)
    return u[0][tuple(at)]


def _gather(u: _Use) -> Tensor:
    axis = u.get("axis", 0) % u[0].ndim
    at = u[1] % u[0].shape[axis]
    taken = u[0].index_select(axis, at.reshape(-1))
    return taken.reshape(*u[0].shape[:axis], *at.shape, *u[0].shape[axis + 1 :])


def _split(u: _Use) -> tuple[Tensor, ...]:
    axis, count = u.get("axis", 0), len(u.node.output)
    whole = u[0].shape[axis]
    step = -(-whole // count)
    sizes = u.integers(1, "split") or [min(step, whole - k * step) for k in range(count)]
    starts = np.cumsum([0, *sizes[:-1]]).tolist()
    return tuple(u[0].narrow(axis, start, size) for start, size in zip(starts, sizes, strict=True))


def _clip(u: _Use) -> Tensor:
    low, high = (
        u[k] if k < len(u.given) and u.given[k] is not None else u.get(name) for k, name in ((1, "min"), (2, "max"))
    )
    return u[0].clamp(low, high)


def _softmax(u: _Use) -> Tensor:
    if u.opset < 13:
        axis = u.get("axis", 1) % u[0].ndim
        flat = u[0].reshape(*u[0].shape[:axis], -1)
        return flat.softmax(-1).reshape(u[0].shape)
    return u[0].softmax(u.get("axis", -1))


def _layer_norm(u: _Use) -> Tensor:
    shape = u[0].shape[u.get("axis", -1) :]
    return functional.layer_norm(
        u[0], shape, u[1].expand(shape), u[2].expand(shape) if len(u.given) > 2 else None, u.get("epsilon", 1e-5)
    )


def _batch_norm(u: _Use) -> Tensor:
    scale, bias, mean, variance = (u[k].reshape(1, -1, *[1] * (u[0].ndim - 2)) for k in (1, 2, 3, 4))
    return (u[0] - mean) / torch.sqrt(variance + u.get("epsilon", 1e-5)) * scale + bias


def _cast(u: _Use) -> Tensor:
    to = {TensorProto.FLOAT: torch.float32, TensorProto.DOUBLE: torch.float64}.get(u.get("to"))
    if to is None:
        raise NotImplementedError("casts to what has no gradient")
    return u[0].to(to)


def _concat(u: _Use) -> Tensor:
    return torch.cat([x for x in u.given if x is not None], u.get("axis"))


_OPERATORS: Mapping[str, Callable[[_Use], Tensor | tuple[Tensor, ...]]] = {
    "Abs": lambda u: u[0].abs(),
    "Add": lambda u: u[0] + u[1],
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "Clip": _clip,
    "Concat": _concat,
    "Div": lambda u: u[0] / u[1],
    "Dropout": lambda u: u[0],
    "Einsum": lambda u: torch.einsum(u.get("equation").decode(), *[x for x in u.given if x is not None]),
    "Elu": lambda u: functional.elu(u[0], u.get("alpha", 1.0)),
    "Erf": lambda u: u[0].erf(),
    "Exp": lambda u: u[0].exp(),
    "Expand": lambda u: u[0].expand(np.broadcast_shapes(tuple(u[0].shape), tuple(u[1].tolist()))),
    "Flatten": _flatten,
    "Gather": _gather,
    "Gelu": lambda u: functional.gelu(u[0], approximate=u.get("approximate", b"none").decode()),
    "Gemm": _gemm,
    "HardSigmoid": lambda u: (u.get("alpha", 0.2) * u[0] + u.get("beta", 0.5)).clamp(0, 1),
    "Identity": lambda u: u[0],
    "LayerNormalization": _layer_norm,
    "LeakyRelu": lambda u: functional.leaky_relu(u[0], u.get("alpha", 0.01)),
    "Log": lambda u: u[0].log(),
    "MatMul": lambda u: u[0] @ u[1],
    "Mul": lambda u: u[0] * u[1],
    "Neg": lambda u: -u[0],
    "PRelu": lambda u: torch.where(u[0] < 0, u[0] * u[1], u[0]),
    "Pow": lambda u: u[0] ** u[1],
    "Reciprocal": lambda u: 1 / u[0],
    "ReduceMean": _reduced(torch.mean),
    "ReduceSum": _reduced(torch.sum),
    "Relu": lambda u: u[0].relu(),
    "Reshape": _reshape,
    "Sigmoid": lambda u: u[0].sigmoid(),
    "Slice": _slice,
    "Softmax": _softmax,
    "Softplus": lambda u: functional.softplus(u[0]),
    "Split": _split,
    "Sqrt": lambda u: u[0].sqrt(),
    "Squeeze": _squeeze,
    "Sub": lambda u: u[0] - u[1],
    "Sum": lambda u: sum((x for x in u.given[1:] if x is not None), start=u[0]),
    "Tanh": lambda u: u[0].tanh(),
    "Transpose": lambda u: u[0].permute(*u.get("perm", list(range(u[0].ndim))[::-1])),
    "Unsqueeze": _unsqueeze,
    "Where": lambda u: torch.where(u[0].bool(), u[1], u[2]),
}
"""What torch runs, by the operator's name; of ONNX's own domain."""


class Cone:
    """The nodes between some layers and the scores.

    Args:
        model: The model that is trained.
        sites: Its layers of low rank.
        outputs: Names of the scores.

    Attributes:
        sites: Those of the layers behind which every operator is known.
        refused: Per layer that is left out the operator that is not.
        nodes: What torch runs, in order.
        fed: What it takes from onnxruntime.
        constants: What it takes from the model.
    """

    def __init__(self, model: ModelProto, sites: Sequence[Factors], outputs: Sequence[str]) -> None:
        self._nodes = list(model.graph.node)
        self._wanted = _before(self._nodes, outputs)
        self.refused: dict[str, str] = {}
        for s in sites:
            odd = [operator(n) for n in self._behind([s]) if operator(n) not in _OPERATORS]
            if odd:
                self.refused[s.name] = odd[0]
        self.sites = [s for s in sites if s.name not in self.refused]
        self.nodes = self._behind(self.sites)
        made = {o for n in self.nodes for o in n.output}
        read = dict.fromkeys(i for n in self.nodes for i in n.input if i and i not in made)
        held = {t.name: t for t in model.graph.initializer if t.name in read}
        self.constants = {name: torch.from_numpy(np.array(tensor_data(t))) for name, t in held.items()}
        self.fed = [i for i in read if i not in held]
        self.outputs = [o for o in outputs if o in made]

    def _behind(self, sites: Sequence[Factors]) -> list[NodeProto]:
        """The nodes that depend on factors and that scores depend on."""
        moving = {name for s in sites for name in (s.first, s.second)}
        out = []
        for node in self._nodes:
            if Trait.EXTENTS not in traits(node) and not moving.isdisjoint(node.input) and id(node) in self._wanted:
                moving.update(node.output)
                out.append(node)
        return out


def _before(nodes: Sequence[NodeProto], outputs: Sequence[str]) -> set[int]:
    """The nodes that outputs depend on, by their identity."""
    wanted, out = set(outputs), set()
    for node in reversed(nodes):
        if not wanted.isdisjoint(node.output):
            wanted.update(node.input)
            out.add(id(node))
    return out


class Tuner:
    """Trains factors.

    Args:
        model: The model that is trained.
        sites: Its layers of low rank.
        outputs: Names of the scores.
        steps: How often `step` will be called; the rate falls to 0 by then.
        relu: Whether a ReLU lies between factors.
        rate: The rate at first.
        seed: Of what torch draws.
    """

    def __init__(
        self,
        model: ModelProto,
        sites: Sequence[Factors],
        outputs: Sequence[str],
        steps: int,
        relu: bool = False,
        rate: float = 1e-3,
        seed: int = 0,
    ) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(seed)
        self.cone = Cone(model, sites, outputs)
        self._opset = versions(model)[""]
        names = [name for s in self.cone.sites for name in (s.first, s.second)]
        self._factors = {name: self.cone.constants[name].clone().requires_grad_() for name in names}
        widths = {s.name: self._factors[s.second].shape[-1] for s in self.cone.sites}
        self._shifts = {name: torch.zeros(n, requires_grad=True) for name, n in widths.items()}
        self._lifts: dict[str, Tensor] | None = {} if relu else None
        self._place = {t: s.name for s in self.cone.sites for t in s.outer}
        self._between = {t: s.name for s in self.cone.sites for t in s.inner}
        self._steps, self._rate = steps, rate
        self._optimiser: Any = None

    def scores(self, fed: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
        """The scores from what onnxruntime gives, flat."""
        known: dict[str, Tensor] = {**self.cone.constants, **self._factors}
        known |= {name: torch.from_numpy(np.array(value)) for name, value in fed.items()}
        for node in self.cone.nodes:
            use = _Use(node, [known[i] if i else None for i in node.input], self._opset)
            try:
                made = _OPERATORS[node.op_type](use)
            except (NotImplementedError, RuntimeError, TypeError, ValueError) as e:
                raise ModelError(f"torch does not run {node.op_type} {node.name!r} as the model has it: {e}") from e
            for name, value in zip(node.output, made if isinstance(made, tuple) else (made,), strict=False):
                known[name] = self._changed(name, value)
        return {o: known[o].reshape(-1) for o in self.cone.outputs}

    def _changed(self, name: str, value: Tensor) -> Tensor:
        """A tensor with what is trained beside the factors."""
        if name in self._place:
            return value + self._shifts[self._place[name]]
        if name in self._between and self._lifts is not None:
            site = self._between[name]
            if site not in self._lifts:
                self._lift(site, value.detach())
            return (value + self._lifts[site]).relu()
        return value

    def _lift(self, site: str, value: Tensor) -> None:
        """Adds as much before a ReLU as leaves nothing below 0, and takes off what that adds behind it.

        Behind a factor that several layers share it is added once, and taken off each.
        """
        assert self._lifts is not None
        flat = value.reshape(-1, value.shape[-1])
        most = (flat.std(0) - flat.amin(0)).clamp(min=0)
        self._lifts[site] = most.clone().requires_grad_()
        for s in self.cone.sites:
            if self._between[s.inner[0]] == site:
                self._shifts[s.name].data -= most @ self._factors[s.second].detach()

    def check(self, fed: Mapping[str, NDArray[Any]], right: Mapping[str, NDArray[Any]]) -> None:
        """Holds torch's scores against onnxruntime's.

        Raises:
            ModelError: They differ.
        """
        for name, made in self.scores(fed).items():
            wanted = torch.from_numpy(np.array(right[name])).reshape(-1)
            if not bool(((made - wanted).abs() <= _CLOSE * (1 + wanted.abs())).all()):
                raise ModelError(f"torch gives other scores {name!r} than onnxruntime, so nothing is trained")

    def step(
        self,
        fed: Sequence[Mapping[str, NDArray[Any]]],
        original: Mapping[str, NDArray[np.float64]],
        labels: Mapping[str, NDArray[np.float64]],
    ) -> float:
        """Goes one step; returns the loss.

        Args:
            fed: What onnxruntime gives, run by run.
            original: The original's scores of all rows, by output.
            labels: Labels of all rows, by output that has some.
        """
        runs = [self.scores(f) for f in fed]
        loss = torch.zeros(())
        for name in self.cone.outputs:
            made = torch.cat([r[name] for r in runs])
            wanted = torch.from_numpy(original[name].astype(np.float32))
            loss = loss + _loss(made, wanted, labels.get(name))
        if self._optimiser is None:  # by now it is known what lies before each ReLU
            several = [*self._factors.values(), *self._shifts.values(), *(self._lifts or {}).values()]
            self._optimiser = torch.optim.Adam(several, self._rate)
            self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimiser, self._share)
        self._optimiser.zero_grad()
        torch.autograd.backward(loss)
        self._optimiser.step()
        self._schedule.step()
        return float(loss.detach())

    def _share(self, step: int) -> float:
        """Share of the rate at a step: half a cosine."""
        return (1 + math.cos(math.pi * min(1.0, step / max(1, self._steps)))) / 2

    def found(self) -> dict[str, dict[str, NDArray[np.float64]]]:
        """Per layer its factors, what is added behind them, and before the ReLU between them."""
        out = {}
        for s in self.cone.sites:
            parts = {"first": self._factors[s.first], "second": self._factors[s.second], "shift": self._shifts[s.name]}
            if self._lifts:
                parts["lift"] = self._lifts[self._between[s.inner[0]]]
            out[s.name] = {k: v.detach().double().numpy() for k, v in parts.items()}
        return out


def _loss(made: Tensor, original: Tensor, labels: NDArray[np.float64] | None) -> Tensor:
    """Half the distance from the labels, half that from the original, or the latter alone."""
    odds = bool(((original >= 0) & (original <= 1)).all())
    made, original = made.float(), original.float()
    if odds:
        made = made.clamp(1e-6, 1 - 1e-6)
        off = functional.binary_cross_entropy(made, original)
    else:
        off = ((made - original) ** 2).mean() / original.var().clamp(min=1e-12)
    if labels is None:
        return off
    truth = torch.from_numpy(labels.astype(np.float32))
    by = functional.binary_cross_entropy if odds else functional.binary_cross_entropy_with_logits
    return (off + by(made, truth)) / 2
