"""What several test files share: small graphs, sessions, inputs of a request, and the witness of abstract values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial, partialmethod
from random import Random
from types import MappingProxyType
from typing import Any
from unittest import mock

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

import onnxrank
from onnxrank import lookups
from onnxrank import model as files
from onnxrank.facts import Setting
from onnxrank.forms import Form
from onnxrank.passes import choosing
from onnxrank.passes.job import Job
from onnxrank.plans import LEAVE, Alternative, Choice, Place
from onnxrank.rewrite import Rewrite
from onnxrank.roles import resolve
from onnxrank.ruleset import choose_rules
from onnxrank.study import Study
from onnxrank.transform import Transformation
from onnxrank.values import (
    HOLE,
    Abstract,
    Affine,
    Dims,
    Level,
    Sum,
    Unrepresentable,
    Value,
    extents,
    is_candidate_symbol,
    symbols,
)

Feed = dict[str, NDArray[Any]]
FLOAT, INT64, BOOL = int(TensorProto.FLOAT), int(TensorProto.INT64), int(TensorProto.BOOL)


class Graph:
    """A model under construction; every node and constant gets a name of its own."""

    def __init__(self, opset: int = 17) -> None:
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.initializers: list[TensorProto] = []
        self._count = 0
        self.checked = True
        self.versions: dict[str, int] = {}

    def fresh(self, hint: str) -> str:
        self._count += 1
        return f"{hint}_{self._count}"

    def input(self, name: str, shape: Sequence[int | str], dtype: int = FLOAT) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def const(self, data: Any, dtype: Any = np.float32) -> str:
        name = self.fresh("c")
        self.initializers.append(numpy_helper.from_array(np.asarray(data, dtype), name))
        return name

    def ints(self, *values: int) -> str:
        return self.const(values, np.int64)

    def op(self, kind: str, *inputs: str, **attrs: Any) -> str:
        return self.ops(kind, 1, *inputs, **attrs)[0]

    def ops(self, kind: str, count: int, *inputs: str, domain: str = "", **attrs: Any) -> list[str]:
        name = self.fresh(kind.lower())
        outputs = [name] if count == 1 else [f"{name}.{k}" for k in range(count)]
        self.nodes.append(helper.make_node(kind, list(inputs), outputs, name=name, domain=domain, **attrs))
        return outputs

    def on_axes(self, kind: str, x: str, axes: Sequence[int], **attrs: Any) -> str:
        """Squeeze, Unsqueeze or a reduction, in the form of the opset."""
        since = 13 if kind in ("Squeeze", "Unsqueeze", "ReduceSum") else 18
        if self.opset >= since:
            return self.op(kind, x, self.ints(*axes), **attrs)
        return self.op(kind, x, axes=list(axes), **attrs)

    def output(self, name: str, shape: Sequence[int | str | None] | None, dtype: int = FLOAT) -> None:
        """Declares an output; of what shape is inferred where None is given."""
        self.outputs.append(helper.make_tensor_value_info(name, dtype, shape))

    def model(self) -> ModelProto:
        graph = helper.make_graph(self.nodes, "g", self.inputs, self.outputs, self.initializers)
        versions = {"": self.opset} | {n.domain: self.versions.get(n.domain, 1) for n in self.nodes if n.domain}
        opsets = [helper.make_opsetid(domain, version) for domain, version in versions.items()]
        made = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        seen = {o.name: o.type for o in onnx.shape_inference.infer_shapes(made, data_prop=True).graph.output}
        for o in made.graph.output:
            if not o.type.tensor_type.HasField("shape"):
                o.type.CopyFrom(seen[o.name])
        if self.checked and all(o.type.tensor_type.HasField("shape") for o in made.graph.output):
            onnx.checker.check_model(made, full_check=True)
        return made


def session(model: ModelProto | str) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    source = model if isinstance(model, str) else model.SerializeToString()
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def run(model: ModelProto | onnxruntime.InferenceSession, feed: Mapping[str, NDArray[Any]]) -> Feed:
    """Outputs by name."""
    made = session(model) if isinstance(model, ModelProto) else model
    names = [o.name for o in made.get_outputs()]
    wanted = {i.name for i in made.get_inputs()}
    return dict(zip(names, made.run(names, {k: v for k, v in feed.items() if k in wanted}), strict=True))


# --- inputs of a request -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Given:
    """An input of a test model: shape behind the candidate axis, and which of it is request-level.

    Attributes:
        name: The input.
        shape: Shape behind axis 0; names are lengths that differ from request to request.
        level: `request`, `candidate`, `once` (request-level, one row in the original already) or `mixed`.
        columns: Request-level columns of a mixed input.
        ids: Ids are drawn below this; floats are small whole numbers.
    """

    name: str
    shape: tuple[int | str, ...]
    level: str
    columns: tuple[int, ...] = ()
    ids: int | None = None

    @property
    def pattern(self) -> str | None:
        """What `request=` takes for it."""
        if self.level == "mixed":
            return f"{self.name}[{','.join(map(str, self.columns))}]"
        return self.name if self.level == "request" else None

    def declare(self, graph: Graph) -> str:
        rows: int | str = 1 if self.level == "once" else "N"
        return graph.input(self.name, [rows, *self.shape], FLOAT if self.ids is None else INT64)


def patterns(given: Iterable[Given]) -> list[str]:
    return [p for g in given if (p := g.pattern) is not None]


def feeds(
    given: Iterable[Given],
    n: int,
    seed: int = 0,
    interface: str = "request",
    lengths: Mapping[str, int] = MappingProxyType({}),
) -> tuple[Feed, Feed]:
    """Inputs of `n` candidates of one request: for the original, and for the model of an interface."""
    rng = np.random.default_rng([seed, n])
    old: Feed = {}
    new: Feed = {}
    for g in given:

        def draw(rows: int, g: Given = g) -> NDArray[Any]:
            shape = [rows, *(lengths[d] if isinstance(d, str) else d for d in g.shape)]
            if g.ids is not None:
                return rng.integers(0, g.ids, shape)
            return rng.integers(-3, 4, shape).astype(np.float32)

        one = draw(1)
        if g.level == "once":
            old[g.name] = new[g.name] = one
        elif g.level == "request":
            old[g.name], new[g.name] = np.repeat(one, n, 0), one
        elif g.level == "candidate":
            old[g.name] = new[g.name] = draw(n)
        else:
            rows = draw(n)
            rest = [k for k in range(rows.shape[1]) if k not in g.columns]
            rows[:, list(g.columns)] = one[:, list(g.columns)]
            old[g.name] = rows
            new[f"{g.name}.request"] = one[:, list(g.columns)]
            new[f"{g.name}.candidate"] = rows[:, rest]
    return old, (old if interface == "same" else new)


def assert_same_scores(
    original: ModelProto,
    result: onnxrank.Result,
    given: Sequence[Given],
    interface: str = "request",
    counts: Sequence[int] = (0, 1, 2, 5),
    tolerance: float = 0.0,
    lengths: Mapping[str, int] = MappingProxyType({}),
) -> None:
    """Bit for bit, or within a share of the output's scale, where the original runs."""
    if interface == "same" and tuple(counts) != (0,):
        counts = [n for n in counts if n]  # no candidates is a test of its own
    before, after = session(original), session(result.model)
    for n in counts:
        old, new = feeds(given, n, interface=interface, lengths=lengths)
        try:
            want = run(before, old)
        except Exception:
            assert n < 2 or 0 in lengths.values(), "the original must run"
            continue
        got = run(after, new if result.changed else old)
        for name, score in want.items():
            assert got[name].dtype == score.dtype, (name, n)
            assert got[name].shape == score.shape, (name, n, got[name].shape, score.shape)
            what = f"{name} at N = {n}, {dict(lengths)}"
            if tolerance and score.dtype.kind == "f":
                allowed = tolerance * max(float(np.abs(score).max(initial=0)), 1e-6)
                np.testing.assert_allclose(got[name], score, rtol=0, atol=allowed, err_msg=what)
            else:
                np.testing.assert_array_equal(got[name], score, err_msg=what)


def rewritten(model: Any, joined: bool = False, decisions: int | None = None, **options: Any) -> onnxrank.Result:
    """Optimises, unchecked and whether or not it pays: test models are too small to be worth it.

    Args:
        model: The model.
        joined: Whether lookups are joined wherever they can be, whether or not that pays.
        decisions: A seed to draw decisions by, as plans may hold them, instead of those that cost least.
        options: Further arguments of `optimize`.
    """
    with ExitStack() as patched:
        if joined:
            patched.enter_context(mock.patch.object(lookups, "pays", lambda before, after: True))
        if decisions is not None:
            patched.enter_context(mock.patch.object(Choice, "decide", partialmethod(_drawn, decisions)))
            patched.enter_context(mock.patch.object(choosing, "choose", partial(_drawn_form, decisions)))
        patched.enter_context(mock.patch.object(choosing, "LEAST_GAIN", 0.0))
        return onnxrank.optimize(model, check=False, **options)


def _drawn(choice: Choice, seed: int, place: Place, alternatives: Sequence[Alternative], _: float) -> str:
    """Any of a rule's alternatives, the same one whenever it is asked for."""
    wanted = choice.at(place)
    return wanted if wanted == LEAVE else Random(f"{seed} {place}").choice([a.name for a in alternatives])


def _drawn_form(seed: int, job: Job, found: Sequence[Form]) -> None:
    """Goes on with any form in which something is rewritten."""
    job.found = tuple(found)
    choosing.go_on_with(job, Random(seed).choice([f for f in found if f.changed] or found))


def optimised(
    graph: Graph,
    given: Sequence[Given],
    *,
    counts: Sequence[int] = (0, 1, 2, 5),
    tolerance: float = 0.0,
    lengths: Sequence[Mapping[str, int]] = (MappingProxyType({}),),
    **options: Any,
) -> onnxrank.Result:
    """Optimises, unchecked; the scores are held against the original's under both interfaces."""
    model = graph.model()
    for interface in ("same", "request"):
        result = rewritten(model, request=patterns(given), interface=interface, **options)
        for at in lengths:
            assert_same_scores(model, result, given, interface, counts, tolerance, at)
    return result


def request(name: str, *shape: int | str, ids: int | None = None) -> Given:
    """A request-level input."""
    return Given(name, shape, "request", ids=ids)


def candidate(name: str, *shape: int | str, ids: int | None = None) -> Given:
    """A candidate-level input."""
    return Given(name, shape, "candidate", ids=ids)


def whole_numbers(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    """Small weights, so that float32 is exact."""
    return np.random.default_rng(seed).integers(-2, 3, shape).astype(np.float32)


def rows(result: onnxrank.Result, given: Sequence[Given], n: int = 5) -> dict[str, int]:
    """Largest extent per tensor of the rewritten model, which for `n` beyond all other extents tells its level."""
    new = feeds(given, n)[int(result.changed)]
    return {name: max(data.shape, default=1) for name, data in run(exposed(result.model), new).items()}


def rules(result: onnxrank.Result) -> dict[str, int]:
    """Sites by rule."""
    return {r.name: r.sites for r in result.report.rules}


def operators(model: ModelProto) -> list[str]:
    return [n.op_type for n in model.graph.node]


def refusals(result: onnxrank.Result) -> str:
    """All refusals as one text."""
    return "\n".join(f"{r.rule} {r.op}: {r.reason}" for r in result.report.refusals)


# --- witness -------------------------------------------------------------------------------------------------------


def transformation(
    model: ModelProto, spec: Mapping[str, Any] | None = None, request: Sequence[str] = ()
) -> Transformation:
    """A finished rewrite, with the abstract values that it rests on."""
    from onnx import inliner

    from onnxrank import feeds as declared

    inlined = inliner.inline_local_functions(model) if model.functions else model
    roles = resolve(declared.describe(inlined), request=request, spec=spec)
    made = Transformation(Study(inlined, roles, files.load(model)), choose_rules(None, (), ()), "request", True, 512)
    made.run()
    return made


def exposed(model: ModelProto) -> onnxruntime.InferenceSession:
    """The model with every tensor among its outputs."""
    out = ModelProto()
    out.CopyFrom(model)
    del out.graph.output[:], out.graph.value_info[:]
    out.graph.output.extend(helper.make_empty_tensor_value_info(o) for n in out.graph.node for o in n.output if o)
    return session(out)


Claim = tuple[tuple[str, ...], NDArray[np.int64]]


def _claims(rw: Rewrite, value: Abstract) -> tuple[list[set[str]] | set[str], list[NDArray[np.int64]]] | None:
    """Per entry the symbols it may vary along, and keys that are equal where the entries are."""
    if isinstance(value, Affine):
        parts = [value.scale, value.base]
        return set().union(*(rw.present(p) for p in parts)), []
    terms = value.terms if isinstance(value, Sum) else [value]
    if any(t.whole is not None and t._codes is None and t.whole.size > 1 << 16 for t in terms):
        return set().union(*(rw.present(t) for t in terms)), []
    try:
        keys = [np.broadcast_to(t.codes, extents(value.dims)).reshape(-1) for t in terms]
    except Unrepresentable:
        return set().union(*(rw.present(t) for t in terms)), []
    per_entry: list[set[str]] = [set() for _ in range(keys[0].size)]
    for key in keys:
        for k, code in enumerate(key.tolist()):
            if code != HOLE:
                per_entry[k] |= set(rw.sources[code >> 40].symbols)
            else:
                per_entry[k] |= set(symbols(value.dims))
    return per_entry, keys


def witness(made: Transformation, feed: Mapping[str, NDArray[Any]], setting: Setting, tolerance: float) -> int:
    """Holds every claim of a rewrite against the tensors of the original; returns how many entries were claimed.

    Args:
        made: The rewrite.
        feed: Inputs of the original, request-level ones equal in all rows.
        setting: The values of the symbols in `feed`.
        tolerance: Allowed difference in units of the tensor's scale; the runtime may round rows differently.
    """
    seen = run(exposed(made.study.model), feed)
    count = levels_hold(made.study, seen, setting, tolerance)
    for name, data in seen.items():
        value = made.rw.values.get(name)
        if value is None or not isinstance(data, np.ndarray) or data.dtype == object:
            continue
        if any(s not in setting.symbols for s in symbols(value.dims)):
            continue
        rows, entries = _by_symbol(data, value.dims, setting)
        scale = float(np.nanmax(np.abs(entries[np.isfinite(entries)]), initial=0.0))
        found = _claims(made.rw, value)
        if found is None:
            continue
        held, keys = found
        per_entry = [held] * entries.shape[-1] if isinstance(held, set) else held
        assert len(per_entry) == entries.shape[-1], name
        for k, present in enumerate(per_entry):
            column = entries[..., k]
            for axis, s in enumerate(rows):
                if s not in present:
                    count += 1
                    _equal(
                        column, np.broadcast_to(column.take([0], axis), column.shape), tolerance * scale, (name, k, s)
                    )
        if keys and not any((key == HOLE).any() for key in keys):
            _, first, back = np.unique(np.stack(keys), axis=1, return_index=True, return_inverse=True)
            twins = first[back.reshape(-1)]
            if (twins != np.arange(len(twins))).any():
                count += int((twins != np.arange(len(twins))).sum())
                _equal(entries, entries[..., twins], tolerance * scale, (name, "equal codes"))
        if isinstance(value, Value) and made.rw.level(value) is Level.CONSTANT and keys and scale:
            if not (value.whole is not None and value.whole.load is None):
                count += 1
                data = made.rw.sources.constants(keys[0]).astype(np.float64)
                _equal(entries, np.broadcast_to(data, entries.shape), tolerance * scale, (name, "constant"))
    return count


def levels_hold(study: Study, seen: Mapping[str, Any], setting: Setting, tolerance: float) -> int:
    """Holds the analysis against tensors of a run: what is made once for all candidates is the same for all.

    Args:
        study: What is known of the original.
        seen: The tensors.
        setting: The values of the symbols in the run.
        tolerance: Allowed difference in units of the tensor's scale.

    Returns:
        How many entries were compared.
    """
    count = 0
    for name, data in seen.items():
        found = study.flow.tensors[name]
        numbers = isinstance(data, np.ndarray) and data.dtype != object
        if not numbers or set(symbols(found.dims)) - setting.symbols.keys():
            continue
        rows, entries = _by_symbol(data, found.dims, setting)
        scale = float(np.nanmax(np.abs(entries[np.isfinite(entries)]), initial=0.0))
        levels = np.broadcast_to(found.levels, extents(found.dims)).reshape(-1)
        once = entries[..., (levels == Level.REQUEST) | (levels == Level.CONSTANT)]
        for axis, s in enumerate(rows):
            if is_candidate_symbol(s):
                count += once.shape[-1]
                first = np.broadcast_to(once.take([0], axis), once.shape)
                _equal(once, first, tolerance * scale, (name, "level", s))
        known = study.flow.data_of(name)
        if known is not None and known.dtype.kind in "biuf":
            same = np.broadcast_to(known.reshape(-1).astype(np.float64), entries.shape)
            _equal(entries, same, tolerance * scale, (name, "constant"))
        zeros = study.flow.zeros.get(name)
        if zeros is not None:
            nothing = entries[..., zeros.reshape(-1)]
            _equal(nothing, np.zeros_like(nothing), 0.0, (name, "zero"))
        low, high = study.flow.interval(name)
        if (np.isfinite(low) | np.isfinite(high)).any() and not np.isnan(entries).any():
            low, high = (np.broadcast_to(b, extents(found.dims)).reshape(-1) for b in (low, high))
            slack = 1e-5 * max(scale, 1.0)
            assert ((entries >= low - slack) & (entries <= high + slack)).all(), (name, "interval")
    return count


def _by_symbol(data: NDArray[Any], dims: Dims, setting: Setting) -> tuple[list[str], NDArray[np.float64]]:
    """Symbols first, an axis each, the entries flat behind them."""
    factors = [f for d in dims for f in d]
    shaped = data.astype(np.float64).reshape([f if isinstance(f, int) else setting.symbols[f] for f in factors])
    order = [k for k, f in enumerate(factors) if isinstance(f, str)] + [
        k for k, f in enumerate(factors) if isinstance(f, int)
    ]
    names = [f for f in factors if isinstance(f, str)]
    moved = shaped.transpose(order)
    return names, moved.reshape(*moved.shape[: len(names)], -1)


def _equal(a: NDArray[Any], b: NDArray[Any], allowed: float, what: Any) -> None:
    same = np.isclose(a, b, rtol=0, atol=allowed, equal_nan=True)
    assert same.all(), f"{what}: differs by {np.abs(a - b)[~same].max()} where {allowed} is allowed"
