"""What makes a model wrong: the first rule and the first site of it, or the first tensor that differs.

The rules that the model's contract names are applied to the original again: the first of them with which the result is
wrong is found by halving, and then the first of its sites.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import ModelProto

from onnxrank.contract import stored_contract
from onnxrank.errors import CheckFailed, ModelError, OnnxrankError, UsageError
from onnxrank.fused import Unsupported
from onnxrank.model import flattened
from onnxrank.plans import LEAVE, PACKING, Choice, Plan, Site, label
from onnxrank.retreat import GaveUp, Search, order
from onnxrank.rule import Rule, SiteFailed
from onnxrank.study import Study
from onnxrank.values import Unrepresentable
from onnxrank.verify import compare, judge
from onnxrank.verify.report import Case, Culprit

if TYPE_CHECKING:
    from onnxrank.verify.engine import Engine
    from onnxrank.verify.points import Point

_MOST_SECONDS = 600.0

Fails = Callable[[ModelProto], bool]
"""Whether a model in the place of the one under test fails where that did."""


def bisect(engine: Engine, fails: Fails) -> Culprit:
    """Finds what makes the second model of a failed run wrong.

    Args:
        engine: The failed run.
        fails: Tells whether another model fails in the same way.
    """
    try:
        by_rule = _by_rule(engine, fails)
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


def _by_rule(engine: Engine, fails: Fails) -> Culprit | None:
    """The first rule and site; None where the model does not say which rules it was made with."""
    from onnxrank.ruleset import choose_rules

    stored = stored_contract(engine.optimized.proto)
    found = (stored or {}).get("rules")
    if stored is None or not isinstance(found, dict) or not found:
        return None
    names = list(found)
    own = {r.name for r in choose_rules(None, (), ())}
    known = {r.name for r in choose_rules(None, (), engine.options.rules)}
    # Those of a file may leave their marks under the names of others.
    names += sorted(known - own - set(names))
    missing = [n for n in names if n not in known]
    if missing:
        raise UsageError(f"the rule {missing[0]!r} is not there; name its file with --rules")
    trial = _Trial(engine, fails, stored, choose_rules(names, (), engine.options.rules))
    search = Search(trial.make, trial.right, seconds=_MOST_SECONDS)
    try:
        if search.right(Choice()):
            return Culprit(
                None, None, None, "the rules applied to the original again give a right model: edited since?"
            )
        guilty = search.culprit(Choice(), order(names))
    except GaveUp:
        return Culprit(None, None, None, "the rules applied to the original again were not told apart in time")
    if guilty.node is None:
        message = f"rule {guilty.rule!r} makes it wrong, at no single site of {guilty.count}"
        return Culprit(guilty.rule, None, None, message)
    where = f"first at node {guilty.node!r} (site {guilty.number} of {guilty.count})"
    return Culprit(guilty.rule, guilty.node, None, f"rule {guilty.rule!r} makes it wrong, {where}")


class _Trial:
    """Applies the rules to the original as a choice says, and tells whether the result is right."""

    def __init__(self, engine: Engine, fails: Fails, stored: dict[str, Any], rules: Sequence[Rule]) -> None:
        self.engine, self.fails = engine, fails
        self.stored = stored
        self.rules = rules
        self._studies: dict[tuple[Site, ...], Study] = {}

    def right(self, made: ModelProto) -> bool:
        """Whether a model gives the original's scores where the one under test does not."""
        try:
            return not self.fails(made)
        except (CheckFailed, ModelError):
            return False

    def make(self, choice: Choice) -> tuple[ModelProto, list[Site]]:
        """The original with the rules that a choice allows, and where they are applied.

        Raises:
            ModelError: They cannot be applied that way.
        """
        from onnxrank.transform import Transformation

        preparation = self._preparation(choice)
        if preparation not in self._studies:
            self._studies[preparation] = self._studied(preparation)
        low, high = self._span()
        interface = str(self.stored.get("interface", "request"))
        study = self._studies[preparation]
        made = Transformation(study, self.rules, interface, False, round((low * high) ** 0.5), choice)
        try:
            packed = [s for s in preparation if s.place.rule in PACKING]
            return made.run(), [*packed, *made.decisions()]
        except (SiteFailed, Unrepresentable) as e:
            raise ModelError(f"the rules cannot be applied: {e}") from e

    def _preparation(self, choice: Choice) -> tuple[Site, ...]:
        """What comes before all rules by the contract's plan, packed where a choice allows it."""
        try:
            found = Plan.from_contract(self.stored).preparation
        except UsageError:  # of another version, or edited
            return ()
        return tuple(s for s in found if s.place.rule not in PACKING or choice.at(s.place) != LEAVE)

    def _studied(self, preparation: Sequence[Site]) -> Study:
        """The original, prepared."""
        loaded = self.engine.original.loaded
        study = Study(flattened(loaded.proto), self.engine.roles, loaded)
        try:
            return study.prepared(preparation)
        except (UsageError, Unsupported):
            return study

    def _span(self) -> tuple[int, int]:
        found = self.stored.get("candidates")
        if isinstance(found, list) and len(found) == 2 and all(isinstance(n, int) and n > 0 for n in found):
            return found[0], found[1]
        return 512, 512


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
