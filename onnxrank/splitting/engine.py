"""`split`: rewrites a model, cuts it in two, holds both together against the original, and writes them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from onnx import ModelProto

from onnxrank import cost, halves, matrices, pipeline, ranker
from onnxrank import model as files
from onnxrank.batching.engine import Options as BatchOptions
from onnxrank.batching.engine import convention
from onnxrank.batching.graph import Shape, joined
from onnxrank.batching.rows import NAMES
from onnxrank.contract import PACKED, roles_again, store, stored_contract
from onnxrank.errors import CheckFailed, ModelError, NothingApplied
from onnxrank.feeds import describe
from onnxrank.graphs import names_in
from onnxrank.passes.checking import held
from onnxrank.plans import Plan, label
from onnxrank.roles import InputRole, Roles
from onnxrank.splitting import contract, folder, formats, graph
from onnxrank.splitting.cut import PRICE
from onnxrank.splitting.estimates import Estimates
from onnxrank.splitting.options import Options
from onnxrank.splitting.report import Advice, Part, Report, StateTensor, Sunk
from onnxrank.splitting.state import State
from onnxrank.study import Study
from onnxrank.verify import failure

_CALL = 1e-5
"""Seconds that a second call of the runtime takes."""
_FETCH = 5e-6
"""Seconds to find a state that is there, besides its bytes."""
_LEAST_GAIN = 0.2
"""Share of a request's time that a state must save for two models to be advised."""
_LEAST_SAVED = 5e-5
"""Seconds that it must save: less is lost in what a server does besides."""


@dataclass
class Split:
    """Two models made of one.

    Attributes:
        request: The request model.
        candidate: The candidate model.
        contract: What `contract.json` says.
        report: What was done.
    """

    request: ModelProto
    candidate: ModelProto
    contract: dict[str, Any]
    report: Report


def split(
    model: str | os.PathLike[str] | ModelProto,
    out: str | os.PathLike[str] | None = None,
    *,
    options: Options | None = None,
    roles: Roles | None = None,
    request: Sequence[str] = (),
    spec: Mapping[str, Any] | None = None,
    infer_from: Mapping[str, NDArray[Any]] | None = None,
    candidates: int | tuple[int, int] = 512,
    select: Sequence[str] | None = None,
    ignore: Sequence[str] = (),
    extra_rules: Sequence[str | os.PathLike[str]] = (),
    check: bool | str = True,
    lengths: Mapping[str, tuple[int, int]] | None = None,
    strict: bool = False,
    tune: float = 0.0,
    plan: Plan | str | os.PathLike[str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Split:
    """Makes two models of a ranking model: one that runs once per request, and one that runs on its result.

    The model is optimised first. Both models together are held against the original before anything is written.

    Args:
        model: A path, or a model in memory.
        out: Folder for the models and their contract; None writes nothing.
        options: Choices about the two models; the defaults if None.
        roles: Which inputs are request-level; or give `request`, `spec` or `infer_from`.
        request: Patterns on input names, and columns, that are request-level.
        spec: A roles file's content.
        infer_from: Recorded requests to infer the roles from.
        candidates: Expected number of candidates per request, or its range.
        select: Names of the rules to use; None for all.
        ignore: Names of rules to leave out.
        extra_rules: Python files with a `RULES` sequence of further rules.
        check: Whether to hold the models against the original, or how thoroughly, as for `optimize`.
        lengths: Least and most of the inputs' symbolic lengths.
        strict: Whether a rewriting that does not pass its check is an error instead of taken back in part.
        tune: Seconds to time original and rewritten model in turns, as for `optimize`; 0 for none.
        plan: A plan of the rewriting, or its file.
        progress: Called with the name of each stage.

    Returns:
        The models and the report.

    Raises:
        UsageError: Roles or options are wrong, the folder cannot be written, or no state is as small as asked for.
        ModelError: The model is invalid or not supported.
        NothingApplied: No part of the model depends on the request alone.
        CheckFailed: Both models together do not give the original's scores; nothing was written.
        EnvironmentProblem: onnxruntime is missing, memory or space ran out.
    """
    chosen = options or Options()
    say = progress or (lambda stage: None)
    source = None if isinstance(model, ModelProto) else Path(model)
    place = None if out is None else folder.check(out, source)
    result = pipeline.optimize(
        model,
        roles=roles,
        request=request,
        spec=spec,
        infer_from=infer_from,
        interface="request",
        candidates=candidates,
        select=select,
        ignore=ignore,
        extra_rules=extra_rules,
        check=check,
        lengths=lengths,
        strict=strict,
        tune=tune,
        blocks=0,
        plan=plan,
        progress=progress,
    )
    say("cutting")
    job = Job(result, chosen)
    with folder.staged(place) as stage:
        made = job.write(stage)
        if check:
            say("checking both models together")
            level = "standard" if check is True else check
            job.check(stage, level, lengths or {}, made.report)
        if place is not None:
            folder.take_place(stage, place)
            made.report.output = os.fspath(out) if out is not None else None
    return made


class Job:
    """One run of `split`, after the rewriting.

    Args:
        result: What the rewriting gave.
        options: Choices.

    Raises:
        NothingApplied: No part of the model depends on the request alone.
        ModelError: A run contradicts what was derived of the rewritten model.
        UsageError: No state is as asked for.
    """

    def __init__(self, result: pipeline.Result, options: Options) -> None:
        self.result, self.options = result, options
        self.loaded = result.loaded
        self.notes: list[str] = []
        proto, self.roles, self.contract = self._base()
        self.study = Study(files.flattened(proto), self.roles, replace(self.loaded, proto=proto, path=None))
        stray = self.study.contradicted()
        if stray is not None:
            raise ModelError(f"The model cannot be cut: {stray.reason}.")
        self.model = self.study.model
        if any(name.startswith(ranker.VERSION) for name in names_in(self.model.graph)):
            raise ModelError(f"The model has tensors called {ranker.VERSION!r}, which is what split adds. Rename them.")
        self.levels = graph.levels(self.model, self.roles)
        if not self.levels.request:
            raise NothingApplied("No part of the model depends on the request alone, so there is nothing to divide.")
        self.estimates = Estimates(self.study, result.report, options.dtype)
        self.state = State(self.study, self.levels, self.estimates, options, self.loaded.folder)
        self.notes += self.state.notes

    def _base(self) -> tuple[ModelProto, Roles, dict[str, Any]]:
        """The model that is cut, roles of its inputs, and the contract of how it was made."""
        result, report = self.result, self.result.report
        made = result.model
        told = {
            "version": report.version,
            "source_sha256": self.loaded.sha256,
            "interface": "request",
            "candidates": list(report.candidates),
            "roles": report.roles,
            "rules": {},
        }
        stored = stored_contract(made)
        if stored is not None:
            return made, roles_again(describe(made), stored), stored
        form = result.form
        if not result.changed and form is not None and form.model is not None and not report.retreats:
            # It would not pay in one file; with a state that is there already it may.
            self.notes.append("the rewritten model would not be faster in one file; in two its request side is kept")
            told["rules"] = {name: len(at) for name, at in form.rewrite.sites().items()}
            return form.model, roles_again(describe(form.model), told), told
        # As it is: what takes a row per candidate is candidate-level, whatever its rows hold.
        plain = {
            name: role if role.level == "request" and role.candidate_axis is None else replace(role, level="candidate")
            for name, role in Roles.from_dict(report.roles).inputs.items()
        }
        return made, Roles({n: replace(r, request=(), axis=None, ranges=()) for n, r in plain.items()}), told

    # --- the two models ----------------------------------------------------------------------------------------------

    def write(self, stage: Path) -> Split:
        """Makes the models and writes everything to a folder."""
        levels, options = self.levels, self.options
        inside = frozenset(levels.request[k] for k in self.state.cut.request)
        request, candidate = graph.divide(self.model, levels, inside, self.state.layout)
        packed: dict[str, Any] = {}
        columns: ranker.Matrices = {}
        roles = self.roles
        if options.pack:
            request = self._packed(request, packed).model
            packing = self._packed(candidate, packed)
            candidate, columns, roles = packing.model, packing.told, matrices.roles_of(packing, roles)
        told = contract.state(self.state.layout)
        if options.rows is not None:
            contract.give_rows(told)
        number = contract.version(request, told, self.loaded.folder)
        if options.guard:
            graph.say_version(request, number)
            unguarded = graph.guard(candidate, number)
            if unguarded:
                shown = ", ".join(map(repr, unguarded))
                self.notes.append(f"the version of the state does not guard {shown}, which cannot be NaN")
        rows = None
        if options.rows is not None:
            graph.in_rows(request, candidate)
            candidate, rows = self._several(candidate, roles, columns, options.rows)
        data = {
            p: m.SerializeToString(deterministic=True) for p, m in zip(halves.PARTS, (request, candidate), strict=True)
        }
        models = {"request": request, "candidate": candidate}
        name = options.name or formats.name_of(self.loaded.path)
        where = formats.places(options.format, name, number)
        digests = {p: hashlib.sha256(d).hexdigest() for p, d in data.items()}
        more = {} if rows is None else {"candidate": {"rows": rows}}
        agreed = contract.contract(
            self.result.report.version,
            number,
            options.guard,
            told,
            {p: (where[p], digests[p], models[p]) for p in halves.PARTS},
            self.result.report.roles,
            self.loaded.sha256,
            self.contract,
            packed,
            more,
        )
        folder.put(stage, {where[p]: data[p] for p in halves.PARTS})
        written = [where[p] for p in halves.PARTS]
        for p in halves.PARTS:
            used = sorted({e.value for t in files.tensors(models[p]) for e in t.external_data if e.key == "location"})
            written += folder.share(stage, os.path.dirname(where[p]), used, self.loaded)
        extra = formats.files(options.format, name, agreed)
        folder.put(stage, extra)
        written = list(dict.fromkeys([*written, *extra]))
        agreed["files"] = {f: folder.digest(stage / f) for f in written}
        folder.put(stage, {ranker.CONTRACT_FILE: (json.dumps(agreed, indent=2) + "\n").encode()})
        report = self._report(agreed, models, digests, {p: len(d) for p, d in data.items()}, where)
        report.files = [*written, ranker.CONTRACT_FILE]
        return Split(request, candidate, agreed, report)

    def _packed(self, model: ModelProto, told: dict[str, Any]) -> matrices.Packing:
        """One of the models with its inputs side by side.

        Args:
            model: The model.
            told: Receives which columns are whose.
        """
        handed = {o["name"] for o in contract.state(self.state.layout)["tensors"]}
        made = matrices.pack(model, Roles.from_dict(self.result.report.roles), handed)
        told |= made.told
        self.notes += made.notes
        return made

    def _several(
        self, candidate: ModelProto, known: Roles, columns: ranker.Matrices, form: str
    ) -> tuple[ModelProto, dict[str, Any]]:
        """The candidate model for several requests, and how it takes them.

        Args:
            candidate: The model.
            known: Roles of its inputs, but for the state.
            columns: Which columns of them are whose.
            form: What tells it which candidates are whose.
        """
        proto = files.flattened(candidate)
        state = {t.name for t in self.state.layout.tensors} | {self.state.layout.packed, ranker.VERSION}
        roles = Roles(
            {
                i.name: InputRole(i.name, "request", None) if i.name in state else known.inputs[i.name]
                for i in describe(proto)
            }
        )
        study = Study(proto, roles, replace(self.loaded, proto=proto, path=None))
        axes: dict[str, int | None] = dict.fromkeys(roles.inputs, 0)
        shape = Shape(form, NAMES[form], self.options.guard)
        usual = self.result.report.usual
        batch, made = joined(study, axes, shape, usual, BatchOptions().requests)
        rows = convention(batch, study)
        told = {**self.contract, "roles": roles.to_dict(), "interface": "batch", "rows": rows}
        told |= {PACKED: columns} if columns else {}
        store(made, told)
        self.notes += batch.notes
        return made, rows

    def check(self, stage: Path, level: str, lengths: Mapping[str, tuple[int, int]], report: Report) -> None:
        """Holds both models together against the original.

        Raises:
            CheckFailed: They do not give its scores.
        """
        found = held(self.result, matrices.unpacked(halves.load(stage)), level, lengths, report)
        if not found.passed:
            half = " The state is rounded to 16 bits; use --state-dtype float32." if self.state.layout.half else ""
            raise CheckFailed(f"Both models together did not pass their check: {failure(found)}{half}")

    # --- reporting ---------------------------------------------------------------------------------------------------

    def _report(
        self,
        agreed: Mapping[str, Any],
        models: Mapping[str, ModelProto],
        digests: Mapping[str, str],
        weight: Mapping[str, int],
        where: Mapping[str, str],
    ) -> Report:
        nodes, shapes, before = self.model.graph.node, self.estimates.usual, self.result.report
        inside, once = {self.levels.request[k] for k in self.state.cut.request}, set(self.levels.request)
        late = [k for k in self.levels.request if k not in inside]
        held = {"request": sorted(inside), "candidate": [*late, *self.levels.candidate]}

        def part(name: str) -> Part:
            return Part(
                where[name],
                digests[name],
                len(models[name].graph.node),
                graph.parameters(models[name]),
                sum(cost.node_macs(nodes[k], shapes) for k in held[name]),
                sum(
                    self.estimates.seconds(k, shapes) if k in once else cost.node_seconds(nodes[k], shapes)
                    for k in held[name]
                ),
                weight[name],
            )

        request, candidate = part("request"), part("candidate")
        sunk = [Sunk(label(nodes[k]), nodes[k].op_type, self.estimates.seconds(k, shapes)) for k in late]
        state = self._state(inside)
        fewer = (i.name for i in self.study.declared if i.name in self.levels.inputs)
        self.notes += [] if any(fewer) else ["the request model takes no input"]
        return Report(
            before.version,
            before.source,
            before.source_sha256,
            before.candidates,
            before.usual,
            dict(before.lengths),
            self.options.format,
            self.options.state,
            self.options.dtype,
            agreed[ranker.VERSION],
            self.options.guard,
            state,
            request,
            candidate,
            sunk,
            _advice(request, candidate, sunk, sum(t.bytes for t in state), before.usual),
            {r.name: r.sites for r in before.rules},
            notes=[*before.notes, *self.notes],
        )

    def _state(self, inside: set[int]) -> list[StateTensor]:
        nodes = self.model.graph.node
        maker = {o: k for k in inside for o in nodes[k].output if o}
        out = []
        for t in self.state.layout.tensors:
            behind: set[int] = set()
            line = [t.tensor]
            while line:
                k = maker.get(line.pop())
                if k is not None and k not in behind:
                    behind.add(k)
                    line += graph.reads(nodes[k])
            out.append(
                StateTensor(
                    t.name,
                    t.tensor,
                    self.state.type_of(t),
                    t.shape,
                    self.state.bytes(t, self.estimates.usual),
                    self.state.bytes(t, self.estimates.longest) if self.estimates.bounded(t.tensor) else None,
                    sum(cost.node_macs(nodes[k], self.estimates.usual) for k in behind),
                    sum(self.estimates.seconds(k, self.estimates.usual) for k in behind),
                )
            )
        return out


def _advice(request: Part, candidate: Part, sunk: Sequence[Sunk], size: int, usual: int) -> Advice:
    """Whether two models pay, by what is predicted of them."""
    one = request.seconds + candidate.seconds
    hit = candidate.seconds + size * PRICE + _FETCH
    miss = one + size * PRICE + _FETCH + _CALL
    told = f"at N = {usual} a request is predicted to take {_us(one)} in one file, {_us(hit)} with a state that is "
    told += f"there and {_us(miss)} without"
    if one - hit > max(_LEAST_GAIN * one, _LEAST_SAVED):
        return Advice(2, f"two files pay where requests come again: {told}", hit, miss, one)
    return Advice(1, f"one file is simpler, and about as fast: {told}", hit, miss, one)


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} µs"
