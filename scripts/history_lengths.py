"""Compares what models with a history gain when its length is fixed and when it is left open.

Production exports leave the length of a history symbolic. Each model here is exported both ways, by both exporters,
and optimised; the table says which share of the multiply-adds is left at a length of 50, counted by running, whether
the scores are right at other lengths and numbers of candidates, and, with `--time`, the speed-up at some lengths of
the symbolic export over that of one of just that length.

    python scripts/history_lengths.py
    python scripts/history_lengths.py --names ranker din --exporter torchscript --refusals --time 20 50 200
"""

from __future__ import annotations

import argparse
import io
import logging
import statistics
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from export_models import by_parameter, run, session
from torch import Tensor, nn
from yardstick import Trace, count

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import onnxrank
from models import InputSpec, build
from models.din import Dice
from models.history_transformer import HistoryTransformer
from models.layers import Fields, Ranker, SelfAttention, Table, ids, initialise, mlp
from onnxrank.turns import of_thread

LENGTH = 50
LENGTHS = (0, 1, 2, 20, 50, 200, 1000)
COUNTS = (1, 2, 33, 512)
# Large enough that the scores at L = 1000 and N = 512 would take long.
MOST_ROWS = 130_000
TOLERANCE = 2e-5
Feed = dict[str, np.ndarray]

WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "expand": lambda q, h: q.unsqueeze(1).expand(-1, h.shape[1], -1),
    "none": lambda q, h: q[:, None, :].expand(-1, h.shape[1], -1),
    "expand_as": lambda q, h: q.unsqueeze(1).expand_as(h),
    "shapes": lambda q, h: q.unsqueeze(1).expand(h.shape[0], h.shape[1], q.shape[1]),
    "repeat": lambda q, h: q.unsqueeze(1).repeat(1, h.shape[1], 1),
    "tile": lambda q, h: torch.tile(q.unsqueeze(1), (1, h.shape[1], 1)),
}
"""How people repeat the candidate along the history."""


class TargetRanker(Ranker):
    """Target attention with a mask, cross layers and an MLP with two heads."""

    output_names = ("click", "buy")

    def __init__(self, way: str, dim: int = 16, vocab: int = 100, softmax: bool = True, flat: bool = False) -> None:
        super().__init__()
        self.way, self.softmax, self.flat = way, softmax, flat
        self.users = Fields(4, 0, vocab, dim, "matrix")
        self.item_table = Table(vocab, dim, padded=True)
        steps = [Dice(32), Dice(16)] if flat else [nn.ReLU(), nn.ReLU()]
        layers = [nn.Linear(4 * dim, 32), nn.Linear(32, 16), nn.Linear(16, 1)]
        self.attention = nn.Sequential(layers[0], steps[0], layers[1], steps[1], layers[2])
        width = 2 * dim + self.users.width
        self.cross = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.deep = mlp((width, 64, 32))
        self.heads = nn.ModuleList(nn.Linear(32 + width, 1) for _ in range(2))
        self.specs = [ids("user_ids", vocab, 4), ids("hist_ids", vocab, LENGTH), ids("item_id", vocab, low=1)]

    def forward(self, user_ids: Tensor, hist_ids: Tensor, item_id: Tensor) -> tuple[Tensor, ...]:
        """Returns two probabilities [N, 1]."""
        q, k = self.item_table(item_id), self.item_table(hist_ids)
        wide = WAYS[self.way](q, k)
        pairs = torch.cat([wide, k, wide - k, wide * k], dim=-1)
        if self.flat:
            rows = pairs.reshape(-1, pairs.shape[2])
            scores = self.attention(rows).reshape(-1, k.shape[1], 1)
        else:
            scores = self.attention(pairs)
        hidden = (hist_ids == 0).unsqueeze(-1)
        weights = scores.masked_fill(hidden, -1e9).softmax(1) if self.softmax else scores.masked_fill(hidden, 0.0)
        pooled = (weights * k).sum(1)
        x0 = torch.cat([self.users.user((user_ids,)).flatten(1), pooled, q], dim=1)
        x = x0
        for layer in self.cross:
            x = x0 * layer(x) + x
        y = torch.cat([self.deep(x0), x], dim=1)
        return tuple(torch.sigmoid(head(y)) for head in self.heads)


class CandidateQuery(Ranker):
    """A transformer layer over the history alone; the candidate is one query of several heads on what it gives."""

    def __init__(self, dim: int = 16, heads: int = 2, vocab: int = 100) -> None:
        super().__init__()
        self.item_table = Table(vocab, dim, padded=True)
        self.positions = nn.Embedding(1001, dim)
        self.encoder, self.attention = SelfAttention(dim, heads), SelfAttention(dim, heads)
        self.norm = nn.LayerNorm(dim)
        self.deep = mlp((3 * dim, 64, 32), head=True)
        self.specs = [ids("hist_ids", vocab, LENGTH), ids("item_id", vocab, low=1)]

    def forward(self, hist_ids: Tensor, item_id: Tensor) -> Tensor:
        """Returns click probabilities [N, 1]."""
        q = self.item_table(item_id)
        k = self.item_table(hist_ids) + self.positions(torch.arange(hist_ids.shape[1]))
        mask = torch.where(hist_ids == 0, -1e9, 0.0).unsqueeze(1).unsqueeze(1)
        k = self.norm(k + self.encoder(k, k, mask))
        pooled = self.attention(q.unsqueeze(1), k, mask).squeeze(1)
        return torch.sigmoid(self.deep(torch.cat([pooled, q, pooled * q], dim=1)))


class OpenTransformer(HistoryTransformer):
    """The history transformer, with positions and mask cut to the length of the request."""

    def forward(self, hist_ids: Tensor, item_id: Tensor) -> Tensor:
        """Returns click probabilities [N, 1]."""
        length = hist_ids.shape[1]
        x = torch.cat([self.item_table(hist_ids), self.item_table(item_id).unsqueeze(1)], dim=1)
        x = x + self.positions[: length + 1]
        at = torch.arange(length + 1)
        causal = torch.where(at[:length] > at.unsqueeze(1), -1e9, 0.0)
        mask = causal + torch.where(hist_ids == 0, -1e9, 0.0).unsqueeze(1).unsqueeze(1)
        for layer in self.layers:
            x = layer(x, mask)
        return torch.sigmoid(self.head(self.norm(x[:, -1])))


class Opened(Ranker):
    """A model of long histories whose positions and masks are cut to the length of the request.

    Args:
        model: The model.
        cuts: Per parameter or buffer how many entries it has beyond those of the history, along each of its axes that
            goes over positions.
    """

    def __init__(self, model: nn.Module, cuts: Mapping[str, Sequence[int]]) -> None:
        super().__init__()
        self.model, self.cuts, self.specs = model, dict(cuts), model.specs
        self.output_names = model.output_names
        self.history = next(k for k, s in enumerate(model.specs) if s.name.startswith("hist_"))
        for name in cuts:
            whole = getattr(model, name).detach()
            delattr(model, name)
            self.register_buffer(name, whole)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Returns what the model does."""
        length = inputs[self.history].shape[1]
        for name, beyond in self.cuts.items():
            setattr(self.model, name, getattr(self, name)[tuple(slice(length + k) for k in beyond)])
        try:
            return self.model(*inputs)
        finally:  # torch.export takes no model that has other attributes afterwards
            for name in self.cuts:
                delattr(self.model, name)


def _opened(name: str, **cuts: Sequence[int]) -> Callable[[], tuple[nn.Module, list[InputSpec]]]:
    def make() -> tuple[nn.Module, list[InputSpec]]:
        module, specs = build(name, history=1000)
        return Opened(module, cuts).eval(), specs

    return make


def _transformer() -> tuple[nn.Module, list[InputSpec]]:
    module = OpenTransformer(history=1000, vocab=100, dim=16, heads=2, layers=2, hidden=(16,))
    initialise(module, seed=1)
    return module, module.specs


def _query() -> tuple[nn.Module, list[InputSpec]]:
    module = CandidateQuery()
    initialise(module, seed=3)
    return module, module.specs


def _ranker(way: str, **how: bool) -> Callable[[], tuple[nn.Module, list[InputSpec]]]:
    def make() -> tuple[nn.Module, list[InputSpec]]:
        module = TargetRanker(way, **how)
        initialise(module, seed=2)
        return module, module.specs

    return make


MODELS: dict[str, Callable[[], tuple[nn.Module, list[InputSpec]]]] = {
    "ranker": _ranker("expand"),
    **{f"ranker_{way}": _ranker(way) for way in WAYS if way != "expand"},
    "ranker_sum": _ranker("expand", softmax=False),
    "ranker_flat": _ranker("expand", flat=True),
    "din": lambda: build("din", history=LENGTH, dim=16, attention=(32, 16), hidden=(64, 32)),
    "masked_pooling": lambda: build("masked_pooling", history=LENGTH, dim=16, hidden=(64, 32)),
    "gru_history": lambda: build("gru_history", history=LENGTH, dim=16, hidden=(64, 32)),
    "sasrec_target": lambda: build("sasrec_target", history=1000, dim=16),
    "history_transformer": _transformer,
    "candidate_query": _query,
    "dmr": _opened("dmr", positions=(0,)),
    "sim": _opened("sim"),
    "hyformer": _opened("hyformer"),
    "interformer": _opened("interformer", positions=(0,)),
    "transact": _opened("transact"),
    "hstu": _opened("hstu", positions=(1,), distance=(1, 1), causal=(1, 1)),
    "onetrans": _opened("onetrans", positions=(0,), later=(5, 5), others=(5, 5)),
}


def draw(specs: Sequence[InputSpec], n: int, length: int, seed: int = 0) -> Feed:
    """One request with `n` candidates; its histories end in padding, and their first position is none."""
    rng = np.random.default_rng((seed, n, length))
    feed = {}
    for s in specs:
        tail = [length if s.name.startswith("hist_") else int(k) for k in s.shape[1:]]
        data = rng.integers(int(s.low), int(s.high), [1 if s.level == "request" else n, *tail])
        if s.name.startswith("hist_") and length:
            data[:, 0] = np.maximum(data[:, 0], 1)
            data[:, length - length // 4 :] = 0
        feed[s.name] = np.ascontiguousarray(np.repeat(data, n, 0) if s.level == "request" else data)
    return feed


def once(feed: Feed, specs: Sequence[InputSpec]) -> Feed:
    """The request-level inputs cut to their one row."""
    return {s.name: feed[s.name][:1] if s.level == "request" else feed[s.name] for s in specs}


def export(
    module: nn.Module, specs: Sequence[InputSpec], exporter: str, symbolic: bool, length: int = LENGTH
) -> onnx.ModelProto:
    """Exports with rows of candidates, and lengths that are fixed or not."""
    feed = draw(specs, 7, length)
    args = tuple(torch.from_numpy(feed[s.name]) for s in specs)
    axes = {s.name: {0: "N", **({1: "L"} if symbolic and s.name.startswith("hist_") else {})} for s in specs}
    names, buffer = [s.name for s in specs], io.BytesIO()
    outputs = list(module.output_names)
    if exporter == "torchscript":
        axes |= {o: {0: "N"} for o in outputs}
        torch.onnx.export(module, args, buffer, input_names=names, output_names=outputs, dynamic_axes=axes,
                          opset_version=17, dynamo=False)  # fmt: skip
    else:
        made = {"N": torch.export.Dim("N"), "L": torch.export.Dim("L", max=1000)}
        shapes = by_parameter(module, tuple({k: made[v] for k, v in axes[s.name].items()} for s in specs))
        torch.onnx.export(module, args, buffer, input_names=names, output_names=outputs, dynamic_shapes=shapes,
                          opset_version=20, dynamo=True, external_data=False, verbose=False)  # fmt: skip
    return onnx.load_from_string(buffer.getvalue())


def left(before: onnx.ModelProto, after: onnx.ModelProto, specs: Sequence[InputSpec], n: int = 512) -> float:
    """The share of the multiply-adds that is left, per candidate beyond the first few."""
    shares = []
    for model, cut in ((before, False), (after, True)):
        trace = Trace(model)
        feed = draw(specs, n // 8, LENGTH)
        small = count(trace, once(feed, specs) if cut else feed)
        feed = draw(specs, n // 4, LENGTH)
        large = count(trace, once(feed, specs) if cut else feed)
        each = (large - small) / (n // 8)
        shares.append(small - each * (n // 8) + each * n)
    return shares[1] / shares[0]


def wrong(before: onnx.ModelProto, after: onnx.ModelProto, specs: Sequence[InputSpec], lengths: Sequence[int]) -> str:
    """Where scores differ from the original's, if anywhere; lengths at which the original fails do not count."""
    a, b = session(before), session(after)
    found, failing = [], []
    for length in lengths:
        requests = {n: draw(specs, n, length) for n in COUNTS if n * length <= MOST_ROWS}
        try:
            expected = {n: run(a, feed) for n, feed in requests.items()}
        except Exception:
            failing.append(length)
            continue
        for n, feed in requests.items():
            try:
                got = run(b, once(feed, specs))
            except Exception as error:
                found.append(f"fails at N={n} L={length}: {str(error)[:160]}")
                continue
            for x, y in zip(expected[n], got, strict=True):
                if x.shape != y.shape:
                    found.append(f"shape {y.shape} for {x.shape} at N={n} L={length}")
                elif not (np.isnan(x) == np.isnan(y)).all() or not np.nanmax(np.abs(x - y), initial=0.0) < TOLERANCE:
                    found.append(f"differs by {np.abs(x - y).max():.1e} at N={n} L={length}")
    said = "; ".join(found[:3]) or "right"
    return said + (f" (the original fails at L = {', '.join(map(str, failing))})" if failing else "")


def times(models: Sequence[tuple[onnx.ModelProto, Feed]], repeats: int = 25) -> list[float]:
    """Median seconds per run of each model, run in turns; of the thread, so that a busy machine does not count."""
    opened = [(session(m), feed) for m, feed in models]
    taken: list[list[float]] = [[] for _ in opened]
    for k in range(repeats + 2):
        for (s, feed), into in zip(opened, taken, strict=True):
            start = of_thread()
            run(s, feed)
            if k > 1:
                into.append(of_thread() - start)
    return [statistics.median(t) for t in taken]


def speed_ups(pairs: Sequence[tuple[onnx.ModelProto, onnxrank.Result]], feed: Feed, specs: Sequence[InputSpec]) -> str:
    """Of an export of a fixed and of one of a symbolic length, and how they compare, where both run."""
    cut = once(feed, specs)
    for before, _ in pairs:
        try:
            run(session(before), feed)
        except Exception:  # an exporter fixes the length all the same
            return "the original fails"
    every = [form for before, result in pairs
             for form in ((before, feed), (result.model, cut if result.changed else feed))]  # fmt: skip
    found = times(every)
    fixed, symbolic = found[0] / found[1], found[2] / found[3]
    return f"{fixed:.2f} -> {symbolic:.2f} ({symbolic / fixed:.2f})"


def study(name: str, exporter: str, options: argparse.Namespace) -> None:
    """Prints the line of one model."""
    module, specs = MODELS[name]()
    request = [s.name for s in specs if s.level == "request"]
    shares, said, made, refusals = [], [], [], {}
    for symbolic in (False, True):
        try:
            before = export(module, specs, exporter, symbolic)
        except Exception as error:
            print(f"{name:20} {exporter:12} export failed ({'symbolic' if symbolic else 'fixed'}): {str(error)[:200]}")
            return
        if options.save:
            options.save.mkdir(parents=True, exist_ok=True)
            onnx.save(before, options.save / f"{name}.{exporter}.{'open' if symbolic else 'fixed'}.onnx")
        result = onnxrank.optimize(before, request=request, check=False)
        made.append((before, result))
        if options.save:
            onnx.save(result.model, options.save / f"{name}.{exporter}.{'open' if symbolic else 'fixed'}.fast.onnx")
        shares.append(left(before, result.model, specs) if result.changed else 1.0)
        if symbolic or options.refusals:
            refusals[symbolic] = dict.fromkeys(f"{r.rule}: {r.node}: {r.reason}" for r in result.report.refusals)
        # onnxruntime aborts in recurrent layers over no steps.
        lengths = [n for n in LENGTHS if n or "GRU" not in {k.op_type for k in before.graph.node}]
        said.append(wrong(before, result.model, specs, lengths if symbolic else (LENGTH,)) if result.changed else "-")
    line = f"{name:20} {exporter:12} left {shares[0]:6.1%} fixed {shares[1]:6.1%} symbolic   {said[0]}, {said[1]}"
    for length in options.time:
        fixed = made[0]
        if length != LENGTH:
            before = export(module, specs, exporter, False, length)
            fixed = before, onnxrank.optimize(before, request=request, check=False)
        line += f"   L = {length}: {speed_ups([fixed, made[1]], draw(specs, 512, length), specs)}"
    print(line, flush=True)
    if options.refusals:
        for symbolic, lines in refusals.items():
            for text in lines:
                if symbolic and text not in refusals[False]:
                    print(f"    symbolic: {text}")


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--names", nargs="+", choices=list(MODELS), default=list(MODELS), metavar="NAME")
    parser.add_argument("--exporter", choices=("torchscript", "dynamo", "both"), default="both")
    parser.add_argument("--refusals", action="store_true", help="what is left alone at a symbolic length only")
    parser.add_argument("--time", type=int, nargs="*", default=[], metavar="LENGTH", help="also time, at these lengths")
    parser.add_argument("--save", type=Path, help="a folder for the models")
    options: Any = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    for exporter in ("torchscript", "dynamo") if options.exporter == "both" else (options.exporter,):
        for name in options.names:
            study(name, exporter, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
