"""What makes a model wrong: the first rule and the first site of it, or the first tensor that differs.

The rules that the model's contract names are applied to the original again, one after the other in the order in which
they take nodes, and then the first that makes the result wrong one site after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import ModelProto, NodeProto, inliner

from onnxrank import fused
from onnxrank.contract import stored_contract
from onnxrank.errors import CheckFailed, ModelError, OnnxrankError, UsageError
from onnxrank.plan import label
from onnxrank.rewrite import Rewrite, Rule
from onnxrank.study import Study
from onnxrank.verify import compare, judge
from onnxrank.verify.report import Case, Culprit

if TYPE_CHECKING:
    from onnxrank.verify.engine import Engine
    from onnxrank.verify.points import Point

_ALWAYS = ("movement", "broadcast")
"""Rules without which none of the others can be applied."""


def bisect(engine: Engine) -> Culprit:
    """Finds what makes the second model of a failed run wrong."""
    try:
        by_rule = _by_rule(engine)
    except OnnxrankError as e:
        by_rule = Culprit(None, None, None, f"the rules could not be applied again: {e}")
    if by_rule is not None and by_rule.rule is not None:
        return by_rule
    tensor = _by_tensor(engine)
    if tensor is not None:
        before = f"{by_rule.message}; " if by_rule is not None else ""
        return replace(tensor, message=f"{before}{tensor.message}")
    return by_rule or Culprit(None, None, None, "no rule, and no tensor that both models have, explains it")


# --- by rule -----------------------------------------------------------------------------------------------------


def _by_rule(engine: Engine) -> Culprit | None:
    """The first rule and site; None where the model does not say which rules it was made with."""
    from onnxrank.pipeline import choose_rules

    stored = stored_contract(engine.optimized.proto)
    names = list((stored or {}).get("rules", {}))
    if stored is None or not names:
        return None
    own = {r.name for r in choose_rules(None, (), ())}
    known = {r.name for r in choose_rules(None, (), engine.options.rules)}
    # Those of a file may leave their marks under the names of others.
    names += sorted(known - own - set(names))
    missing = [n for n in names if n not in known]
    if missing:
        raise UsageError(f"the rule {missing[0]!r} is not there; name its file with --rules")
    rules = choose_rules(names, (), engine.options.rules)
    order = [n for n in _ALWAYS if n in names] + [n for n in names if n not in _ALWAYS]
    trial = _Trial(engine, stored, rules)
    if trial.right(order):
        return Culprit(None, None, None, "the rules applied to the original again give a right model: edited since?")
    guilty = next(k for k in range(len(order)) if not trial.right(order[: k + 1]))
    rule = order[guilty]
    sites = trial.sites(order[: guilty + 1], rule)
    for count in range(1, len(sites) + 1):
        if not trial.right(order[: guilty + 1], {rule: set(sites[:count])}):
            node = sites[count - 1]
            return Culprit(
                rule, node, None, f"rule {rule!r} makes it wrong, first at node {node!r} (site {count} of {len(sites)})"
            )
    return Culprit(rule, None, None, f"rule {rule!r} makes it wrong, at no single site of {len(sites)}")


class _Trial:
    """Applies some rules at some sites to the original, and tells whether the result is right."""

    def __init__(self, engine: Engine, stored: dict[str, Any], rules: Sequence[Rule]) -> None:
        self.engine = engine
        self.stored = stored
        self.rules = rules
        self._known: dict[str, bool] = {}
        self._study: Study | None = None

    def right(self, names: Sequence[str], only: dict[str, set[str]] | None = None) -> bool:
        """Whether the original with these rules, each at all or only some nodes, still gives its scores."""
        key = repr((list(names), {k: sorted(v) for k, v in (only or {}).items()}))
        if key not in self._known:
            self._known[key] = self._try(names, only or {})
        return self._known[key]

    def sites(self, names: Sequence[str], rule: str) -> list[str]:
        """Nodes at which a rule applies, in the order of the graph."""
        seen: list[str] = []
        self._make(names, {}, lambda name, node: seen.append(label(node)) if name == rule else None)
        return list(dict.fromkeys(seen))

    def _try(self, names: Sequence[str], only: dict[str, set[str]]) -> bool:
        from onnxrank.verify.engine import failing_points

        try:
            made = self._make(names, only, None)
        except (CheckFailed, ModelError):
            return False
        return made is None or not failing_points(self.engine, made)

    def _make(
        self, names: Sequence[str], only: dict[str, set[str]], taken: Callable[[str, NodeProto], None] | None
    ) -> ModelProto | None:
        from onnxrank.transform import Transformation

        rules = [_limited(r, only.get(r.name), taken) for r in self.rules if r.name in names or r.name in _ALWAYS]
        if self._study is None:
            loaded = self.engine.original.loaded
            model = loaded.proto
            flat = inliner.inline_local_functions(model) if model.functions else model
            self._study = Study(flat, self.engine.roles, loaded)
            gone = _fused(flat) - _fused(self.engine.optimized.loaded.proto)
            if gone:
                self._study = self._study.written_out(gone)
        low, high = self.stored.get("candidates", [512, 512])
        interface = self.stored.get("interface", "request")
        made = Transformation(self._study, rules, interface, False, round((low * high) ** 0.5))
        return made.run()


def _fused(model: ModelProto) -> set[str]:
    """First outputs of fused operators."""
    return {n.output[0] for n in model.graph.node if n.op_type in fused.OPERATORS}


def _limited(rule: Rule, only: set[str] | None, taken: Callable[[str, NodeProto], None] | None) -> Rule:
    """A rule that leaves nodes alone that are not among the given ones, and tells which it took."""

    def limit(transfer: Callable[[Rewrite, NodeProto], Any]) -> Callable[[Rewrite, NodeProto], Any]:
        def apply(rw: Rewrite, node: NodeProto) -> Any:
            if only is not None and label(node) not in only:
                return None
            made = transfer(rw, node)
            if made is not None and taken is not None:
                taken(rule.name, node)
            return made

        return apply

    return replace(rule, operators={op: limit(t) for op, t in rule.operators.items()})


# --- by tensor ---------------------------------------------------------------------------------------------------


def common_tensors(engine: Engine) -> list[str]:
    """Tensors that both models compute under one name, in the second model's order."""
    first, second = (
        [o for n in s.proto.graph.node for o in n.output if o] for s in (engine.original, engine.optimized)
    )
    known = set(first)
    return [o for o in second if o in known]


def exposed(engine: Engine, point: Point, names: Sequence[str], precision: str, level: str) -> list[dict[str, Any]]:
    """Values of tensors of both models for one request.

    Raises:
        ModelError: A model does not run with these tensors among its outputs.
    """
    out = []
    for side, feed in zip(engine.sides, (point.feed, point.bound), strict=True):
        side.call("expose", key="exposed", of="model", names=list(names))
        side.call("open", session="exposed", key="exposed", level=level, precision=precision)
        (answer,) = side.call("run", session="exposed", feeds=[feed], outputs=list(names))
        if "error" in answer:
            raise ModelError(answer["error"])
        out.append(answer["outputs"])
    return out


def worst_point(engine: Engine) -> tuple[Case, Point] | None:
    """The failing comparison with the fewest candidates, and its inputs."""
    order = {"algebra": 0, "rounding": 1}
    failed = [c for c in engine.report.failed_cases if c.verdict in order]
    for c in sorted(failed, key=lambda c: (order[c.verdict], c.candidates)):
        for p in engine.points:
            if (p.inputs, p.candidates, p.seed) == (c.inputs, c.candidates, c.seed):
                return c, p
    return None


def alike(a: Any, b: Any, tolerance: float) -> bool:
    """Whether two tensors agree; one that holds a single row for several equal ones does too."""
    if a.dtype.kind in "OUS":
        return bool(np.array_equal(a, b))
    try:
        wide = np.broadcast_shapes(a.shape, b.shape)
    except ValueError:
        return False
    if wide not in (a.shape, b.shape):
        return False
    x, y = np.broadcast_to(a, wide), np.broadcast_to(b, wide)
    return compare.gap(x, y).largest <= tolerance * max(compare.scale(x), 1e-30)


def _by_tensor(engine: Engine) -> Culprit | None:
    """The first tensor of one name in both models that differs."""
    found = worst_point(engine)
    if found is None:
        return None
    case, point = found
    names = common_tensors(engine)
    exact = case.verdict == "algebra"
    try:
        first, second = exposed(engine, point, names, "double" if exact else engine.precision, "disabled")
    except ModelError:
        return None
    for name in names:
        if name in first and name in second and not alike(first[name], second[name], judge.ALGEBRA if exact else 1e-5):
            node = next(n for n in engine.optimized.proto.graph.node if name in n.output)
            return Culprit(
                None,
                label(node),
                name,
                f"the first tensor of both models that differs is {name!r}, made by {node.op_type}",
            )
    return None
