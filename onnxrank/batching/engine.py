"""`optimize --interface batch` and `padded`: rewrites a model for one request, and makes one for several of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from onnx import ModelProto

from onnxrank import batches, cost, matrices, pipeline
from onnxrank import model as files
from onnxrank.batching.graph import Batch, Shape, joined
from onnxrank.batching.regions import TURN
from onnxrank.batching.rows import FORMS, NAMES, PADDED
from onnxrank.batching.single import for_one
from onnxrank.batching.tensors import Tensor
from onnxrank.blocks import ROWS
from onnxrank.contract import PACKED, store
from onnxrank.errors import CheckFailed, ModelError, UsageError
from onnxrank.passes.checking import held
from onnxrank.plans import Plan
from onnxrank.roles import Roles
from onnxrank.study import Study
from onnxrank.verify import failure

CALL = 1e-5
"""Seconds that a call of the runtime takes besides its nodes."""
_POINTS = ((8, 64), (32, 16), (8, 512))
"""Numbers of requests and of candidates of each at which the report says what batching brings."""


@dataclass(frozen=True)
class Options:
    """What a caller may choose about several requests per call.

    Attributes:
        interface: `batch`: candidates of one request behind those of another. `padded`: `[R, M, ...]`.
        rows: With `batch`, what tells which candidates are whose: `lengths` [R], `offsets` [R + 1], `index` [sum of N],
            or `triton`: candidate-level inputs flat, with the item shapes of one of them, [R, rank].
        name: What that input is called; None for a name by its kind.
        requests: Expected number of requests per call.
        guard: Whether scores become NaN where what tells the requests apart does not add up.
        turns: Whether nodes may run request by request in a loop, where that is quicker on a CPU.
        pack: Whether inputs lie side by side in few matrices, with a row per request or per candidate.

    Raises:
        UsageError: A value is not one that there is.
    """

    interface: str = "batch"
    rows: str = "lengths"
    name: str | None = None
    requests: int = 8
    guard: bool = True
    turns: bool = True
    pack: bool = False

    def __post_init__(self) -> None:
        if self.interface not in batches.INTERFACES:
            raise UsageError(f"interface {self.interface!r} is not one for several requests; use 'batch' or 'padded'")
        if self.rows not in FORMS:
            raise UsageError(f"rows {self.rows!r} are not known; use {', '.join(map(repr, FORMS))}")
        if self.interface == PADDED and (self.rows != "lengths" or self.name is not None):
            raise UsageError(
                "with the interface 'padded' nothing tells requests apart: leave the rows and their name out"
            )
        if self.requests < 1:
            raise UsageError(f"{self.requests} requests per call cannot be")

    @property
    def shape(self) -> Shape:
        """How the model takes requests."""
        form = PADDED if self.interface == PADDED else self.rows
        return Shape(form, self.name or NAMES.get(form, ""), self.guard)


def batch(
    model: str | os.PathLike[str] | ModelProto,
    *,
    options: Options | None = None,
    check: bool | str = True,
    lengths: Mapping[str, tuple[int, int]] | None = None,
    plan: Plan | str | os.PathLike[str] | None = None,
    progress: Callable[[str], None] | None = None,
    **how: Any,
) -> pipeline.Result:
    """Rewrites a ranking model so that one call scores several requests, what is the same per request computed once.

    The model is optimised for one request first. What comes of it is held against the original, request by request.

    Args:
        model: A path, or a model in memory; the original, or what `optimize` made of it.
        options: Choices about several requests; the defaults if None.
        check: Whether to hold the result against the original, or how thoroughly, as for `optimize`.
        lengths: Least and most of the inputs' symbolic lengths.
        plan: A plan of the rewriting, or its file.
        progress: Called with the name of each stage.
        **how: Further arguments of `pipeline.optimize`: roles, candidates, rules, tune.

    Returns:
        The model for several requests, and the report.

    Raises:
        UsageError: Roles or options are wrong.
        ModelError: The model is invalid, or its requests cannot be kept apart: the message names the node.
        CheckFailed: The result does not give the original's scores.
        EnvironmentProblem: onnxruntime is missing, or memory ran out.
    """
    chosen = options or Options()
    say = progress or (lambda stage: None)

    if how.pop("blocks", None):
        raise UsageError("Candidates are scored in blocks for one request per call: leave blocks out.")
    result = pipeline.optimize(
        model, interface="request", check=check, lengths=lengths, blocks=0, plan=plan, progress=progress, **how
    )
    say("joining requests")
    made = _Job(result, chosen)
    if check:
        say("checking several requests")
        made.check("standard" if check is True else check, lengths or {})
    return made.result()


def convention(graph: Batch, study: Study) -> dict[str, Any]:
    """The calling convention of a model for several requests, as the contract stores it.

    Args:
        graph: The model, made.
        study: What is known of the model for one request.

    Raises:
        ModelError: Rows of an input or output lie together with other entries.
    """
    each = next(i.name for i in study.declared if i.role.level != "request")
    infos = {i.name: i for i in (*study.model.graph.input, *study.model.graph.output)}

    def one(name: str, t: Tensor) -> dict[str, Any]:
        assert t.rows is not None
        dims = [
            d.dim_value if d.HasField("dim_value") else d.dim_param or None
            for d in infos[name].type.tensor_type.shape.dim
        ]
        shape = [n if isinstance(n, int) and k != t.rows.axis else None for k, n in enumerate(t.sizes)]
        if not isinstance(t.rows.inner, int) or t.rows.outer != 1:
            raise ModelError(f"Rows of {name!r} lie together with other entries.")
        found = {"each": t.rows.each, "axis": t.rows.axis, "inner": t.rows.inner, "added": t.rows.added}
        return {**found, "dims": dims, "shape": shape, "first": name == each}

    return {
        "form": graph.shape.form,
        "name": graph.shape.name,
        "guard": graph.shape.guard,
        "inputs": {i.name: one(i.name, graph.given[i.name]) for i in study.declared},
        "outputs": {o.name: one(o.name, graph.tensors[o.name]) for o in study.model.graph.output},
    }


class _Job:
    """One run of `batch`, behind the rewriting.

    Args:
        result: What the rewriting gave.
        options: Choices.
    """

    def __init__(self, result: pipeline.Result, options: Options) -> None:
        self.before, self.options = result, options
        self.loaded = result.loaded
        proto, roles, self.contract = for_one(result)
        if any(t.name == ROWS for t in proto.graph.initializer):
            raise ModelError("The model scores its candidates in blocks: start from the original, or use --blocks 0.")
        original = Roles.from_dict(self.contract["roles"])
        axes: dict[str, int | None] = {}
        for name, role in original.inputs.items():
            axes[name] = axes[f"{name}.request"] = role.candidate_axis
        self.notes: list[str] = []
        if options.pack:
            packing = matrices.pack(proto, original)
            proto, roles, self.notes = packing.model, matrices.roles_of(packing, roles), packing.notes
            self.contract |= {PACKED: packing.told}
            axes |= dict.fromkeys(packing.told, 0)
        self.study = Study(files.flattened(proto), roles, replace(self.loaded, proto=proto, path=None))
        stray = self.study.contradicted()
        if stray is not None:
            raise ModelError(f"Several requests cannot be scored in one call: {stray.reason}.")
        self.graph, self.made = joined(
            self.study, axes, options.shape, result.report.usual, options.requests if options.turns else 1
        )
        told = convention(self.graph, self.study)
        self.contract |= {"interface": options.interface, "rows": told, "requests": options.requests}
        store(self.made, self.contract)

    def result(self) -> pipeline.Result:
        """The result, and the report of it."""
        report = self.before.report
        report.interface = self.options.interface
        report.changed = True
        report.size_after = self.made.ByteSize()
        report.notes += self.notes + self.graph.notes
        if self.graph.alone:
            report.notes.append(f"these run request by request: {', '.join(self.graph.alone)}")
        report.notes += self._worth()
        return replace(self.before, model=self.made, report=report)

    def _worth(self) -> list[str]:
        """What one call for several requests is predicted to bring against one after the other."""
        study, told = self.study, []
        inside = frozenset[int]().union(*self.graph.turns)
        own = [
            (node, "turns" if k in inside else level)
            for k, (node, level) in enumerate(cost.by_rows(study.model.graph, study.shapes(2)))
            if level != "constant"
        ]
        points = dict.fromkeys([(self.options.requests, self.before.report.usual), *_POINTS])
        for r, n in points:
            one, many = study.shapes(n), study.shapes(r * n)
            alone = CALL + sum(cost.node_seconds(node, one) for node, _ in own)
            together = CALL + cost.estimate(launches=self.graph.further) + r * TURN * len(self.graph.turns)
            for node, level in own:
                seconds = cost.node_seconds(node, one)
                # A step with a row per request takes its time per row, but for its launch.
                once = seconds + max(0.0, seconds - cost.CPU.launch) * (r - 1)
                together += {"candidate": cost.node_seconds(node, many), "turns": r * seconds}.get(level, once)
            told.append(f"{r * alone / together:.2f} at R = {r}, N = {n}")
        most = ", ".join(told)
        return [f"one call is predicted to be faster than one per request by {most}; it pays with few candidates"]

    def check(self, level: str, lengths: Mapping[str, tuple[int, int]]) -> None:
        """Holds the result against the original, as one request and several at once.

        Raises:
            CheckFailed: It does not give the original's scores.
        """
        report = self.before.report
        second = files.LoadedModel(self.made, None, self.loaded.folder, "", self.made.ByteSize(), self.loaded.external)
        found = held(self.before, matrices.unpacked(batches.single(second)), level, lengths, report)
        if not found.passed:
            report.changed = False
            raise CheckFailed(f"The model for several requests did not pass its check: {failure(found)}", report)
