"""`optimize`: from a user's model to a rewritten, checked one."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from numpy.typing import NDArray
from onnx import ModelProto

from onnxrank import baked, feeds, workers
from onnxrank import model as files
from onnxrank.contract import is_done, same_roles, stored_contract
from onnxrank.errors import DoesNotRun, UsageError
from onnxrank.passes import blocking, checking, choosing, studying, timing
from onnxrank.passes.emission import Result, plan_of, result, unchanged
from onnxrank.passes.job import Job, Pass
from onnxrank.passes.options import Options, span_of
from onnxrank.passes.reading import described, read, roles_of
from onnxrank.passes.replaying import follow, replayed_options
from onnxrank.plans import Plan
from onnxrank.roles import Roles
from onnxrank.ruleset import choose_rules
from onnxrank.tune import SLOWDOWN
from onnxrank.values import symbols
from onnxrank.verify import sizes

__all__ = ["Result", "optimize", "read"]

STUDY = Pass("deriving shapes", "none", studying.study)
REWRITE = Pass("rewriting", "exact", choosing.rewrite)
CHECK = Pass("checking", "undo", checking.check)
TIME = Pass("timing", "undo", timing.measure)
BLOCKS = Pass("dividing candidates", "exact", blocking.divide, anew=True)
_RARELY = 50_000
"""Objects that are made before garbage is looked for, while a model is optimised: nearly all of them stay."""
_LOCK = threading.Lock()
_usual: list[tuple[int, int, int]] = []
"""How often garbage is looked for otherwise, once for every run."""


@contextmanager
def _rarely_collected() -> Iterator[None]:
    """Looks for garbage less often, until the last of the runs that go on at once is over."""
    with _LOCK:
        usual = _usual[0] if _usual else gc.get_threshold()
        _usual.append(usual)
        if usual[0]:  # 0 is never
            gc.set_threshold(max(usual[0], _RARELY), *usual[1:])
    try:
        yield
    finally:
        with _LOCK:
            _usual.pop()
            if not _usual:
                gc.set_threshold(*usual)


@_rarely_collected()
def optimize(
    model: str | os.PathLike[str] | ModelProto | files.LoadedModel,
    *,
    roles: Roles | None = None,
    request: Sequence[str] = (),
    spec: Mapping[str, Any] | None = None,
    infer_from: Mapping[str, NDArray[Any]] | None = None,
    interface: str = "request",
    guard: bool = True,
    candidates: int | tuple[int, int] = 512,
    select: Sequence[str] | None = None,
    ignore: Sequence[str] = (),
    extra_rules: Sequence[str | os.PathLike[str]] = (),
    check: bool | str = True,
    lengths: Mapping[str, tuple[int, int]] | None = None,
    strict: bool = False,
    tune: float = 0.0,
    slowdown: float = SLOWDOWN,
    blocks: int | None = None,
    plan: Plan | str | os.PathLike[str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Result:
    """Rewrites a ranking model so that what is the same for all candidates is computed once per request.

    What does not pass the check is taken back, site by site, and so is, with `tune`, what is not faster; the report
    says what. Where nothing can be kept the model is left as it is.

    Args:
        model: A path, or a model in memory or as it was loaded.
        roles: Which inputs are request-level; or give `request`, `spec` or `infer_from`.
        request: Patterns on input names, `user_*`, and columns, `X[0:13,20]`, that are request-level.
        spec: A roles file's content.
        infer_from: Recorded requests to infer the roles from.
        interface: `request`: request-level inputs take one row. `same`: the signature stays.
        guard: With `same`: whether scores become NaN where rows of a request-level input differ.
        candidates: Expected number of candidates per request, or its range.
        select: Names of the rules to use; None for all.
        ignore: Names of rules to leave out.
        extra_rules: Python files with a `RULES` sequence of further rules.
        check: Whether to hold the result against the original, or how thoroughly: `quick`, `standard` (what True
            stands for) or `full`.
        lengths: Least and most of the inputs' symbolic lengths, by the name in their shape or `input.axis`, for the
            check; 1..1024 for those not named.
        strict: Whether a result that does not pass its check is an error instead of taken back in part.
        tune: Seconds to time original and result in turns; 0 for none. What was measured makes the bytes depend on the
            machine; `Result.plan` gives the same ones again.
        slowdown: By which share of the original's time the result may be slower where `tune` times it, if it is faster
            at another number of candidates: 0.05 for five per cent.
        blocks: Most candidates of a block, to score them block by block; 0 for never. None: where timing with `tune`
            says that it is faster and a thousand candidates or more are expected. For results that run on a CPU.
        plan: A plan, or its file, to be replayed: it has roles, interface, candidates, guard and rules.
        progress: Called with the name of each stage.

    Returns:
        The rewritten model and the report.

    Raises:
        UsageError: Roles or options are wrong, or the plan does not belong to the model.
        ModelError: The model is invalid or not supported.
        CheckFailed: With `strict` or `plan`: the rewritten model does not give the original's scores.
        EnvironmentProblem: onnxruntime is missing, or memory ran out.
    """
    span, how = span_of(candidates), "standard" if check is True else check
    options = Options(
        interface,
        guard,
        span,
        check=how,
        lengths=lengths,
        strict=strict,
        tune=tune,
        slowdown=slowdown,
        blocks=blocks,
        progress=progress,
    )
    if check:
        workers.warm()
    options.say("reading")
    loaded = read(model)
    if plan is not None:
        found = Plan.of(plan)
        told = (roles, request, spec, infer_from)
        return replay(loaded, found, replayed_options(found, options, select, ignore, extra_rules), told)
    options = replace(options, rules=choose_rules(select, ignore, extra_rules))
    given, notes = roles_of(loaded, roles, request, spec, infer_from)
    contract = stored_contract(loaded.proto)
    use = (given, options.interface, options.span, options.names, options.lengths or {})
    if contract is not None and roles is None and is_done(contract, described(loaded), *use):
        return left_alone(loaded, options, given)
    passes = [STUDY, REWRITE, *([CHECK] if options.check else []), *([TIME] if options.tune else []), BLOCKS]
    try:
        return run(Job(loaded, given, options, notes), passes)
    except DoesNotRun:
        known = baked.with_lengths(loaded, given)
        if known is None:
            raise
    fixed, note = known
    free = {sizes.name_of(s) for i in feeds.inputs(fixed.proto, given) for s in symbols(i.dims)}
    left = {name: span for name, span in (lengths or {}).items() if name in free}
    return run(Job(fixed, given, replace(options, lengths=left), [*notes, note]), passes)


def run(job: Job, passes: Iterable[Pass]) -> Result:
    """Goes through passes, as far as they leave anything to go on with."""
    try:
        for step in passes:
            if job.kept or step.anew:
                job.options.say(step.name)
                job.kept = step.run(job)
        return result(job) if job.kept else unchanged(job)
    finally:
        if job.side is not None:
            job.side.close()


def left_alone(loaded: files.LoadedModel, options: Options, roles: Roles) -> Result:
    """The result for a model that was optimised before: nothing to do."""
    job = Job(loaded, roles, options, ["the model's contract says that it was optimised before, for the same use"])
    return Result(loaded.proto, job.report, loaded, plan=plan_of(job, None))


def replay(
    loaded: files.LoadedModel, found: Plan, options: Options, told: tuple[Any, ...] = (None, (), None, None)
) -> Result:
    """Does what a plan says; nothing is decided or timed.

    Args:
        loaded: The original.
        found: The plan.
        options: From `replayed_options`.
        told: Roles that the caller gave after all, as for `roles_of`.

    Raises:
        UsageError: The plan does not belong to the model, or to this version's rules.
        CheckFailed: The result does not give the original's scores.
    """
    if found.source_sha256 != loaded.sha256:
        raise UsageError(
            f"the plan belongs to another model: to one of SHA-256 {found.source_sha256[:12]}..., and this one is "
            f"{loaded.sha256[:12]}..."
        )
    roles = Roles.from_dict(found.roles)
    if any(told) and not same_roles(roles_of(loaded, *told)[0], roles):
        raise UsageError("the plan was made for other roles than those given: leave them out, or the plan")
    again = Pass(REWRITE.name, REWRITE.policy, lambda job: studying.confirmed(job) and follow(job, found))
    return run(Job(loaded, roles, options), [STUDY, again, *([CHECK] if options.check else [])])
