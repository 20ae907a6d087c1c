"""The pieces of `optimize`, for scripts: `read`, `analyse`, `plan`, `emit` and `gate`, each of what the last one gave.

    loaded = onnxrank.read("ranker.onnx")
    analysis = onnxrank.analyse(loaded, request=["user_*"])
    plan = onnxrank.plan(analysis, candidates=512)
    made = onnxrank.emit(analysis, plan)
    report = onnxrank.gate(analysis, made)

`optimize` does the same, and takes back, site by site, what does not pass.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

from onnx import ModelProto

from onnxrank import pipeline
from onnxrank.analysis import Analysis, analyse
from onnxrank.errors import UsageError
from onnxrank.passes.job import Job
from onnxrank.passes.options import Options, span_of
from onnxrank.passes.reading import read
from onnxrank.passes.replaying import follow, replayed_options
from onnxrank.plans import Plan
from onnxrank.ruleset import choose_rules
from onnxrank.verify import gate as checks
from onnxrank.verify.report import Report

__all__ = ["Analysis", "Plan", "analyse", "emit", "gate", "plan", "read"]


def plan(
    analysis: Analysis,
    *,
    interface: str = "request",
    guard: bool = True,
    candidates: int | tuple[int, int] = 512,
    select: Sequence[str] | None = None,
    ignore: Sequence[str] = (),
    extra_rules: Sequence[str | os.PathLike[str]] = (),
) -> Plan:
    """Decides, by predicted costs, what is rewritten and how; nothing is run or checked.

    Args:
        analysis: The model.
        interface: `request`: request-level inputs take one row. `same`: the signature stays.
        guard: With `same`: whether scores become NaN where rows of a request-level input differ.
        candidates: Expected number of candidates per request, or its range.
        select: Names of the rules to use; None for all.
        ignore: Names of rules to leave out.
        extra_rules: Python files with a `RULES` sequence of further rules.

    Returns:
        The plan; `Plan.changed` is False where nothing applies, or pays.

    Raises:
        UsageError: An option is not one that there is.
    """
    rules = choose_rules(select, ignore, extra_rules)
    options = Options(interface, guard, span_of(candidates), rules, check=False)
    return pipeline.run(_job(analysis, options), [pipeline.STUDY, pipeline.REWRITE]).plan


def emit(analysis: Analysis, plan: Plan, *, extra_rules: Sequence[str | os.PathLike[str]] = ()) -> ModelProto:
    """Writes the model that a plan describes: the same bytes for the same model and plan, on any machine.

    Args:
        analysis: The model.
        plan: The plan, of the same model and roles.
        extra_rules: Files of the rules that the plan uses, besides onnxrank's own.

    Returns:
        The rewritten model with its contract, external data referenced and not loaded; the original where the plan
        changes nothing.

    Raises:
        UsageError: The plan belongs to another model, or to rules that are not there.
    """
    loaded = analysis.study.loaded
    if plan.source_sha256 != loaded.sha256:
        raise UsageError("the plan belongs to another model than the analysis")
    options = replayed_options(plan, Options(check=False), None, (), extra_rules)
    again = replace(pipeline.REWRITE, run=lambda job: follow(job, plan))
    return pipeline.run(_job(analysis, options), [pipeline.STUDY, again]).model


def gate(
    analysis: Analysis,
    model: ModelProto,
    *,
    level: str = "standard",
    candidates: Sequence[int] | None = None,
    lengths: Mapping[str, tuple[int, int]] | None = None,
) -> Report:
    """Holds a rewritten model against the original, both in processes of their own.

    Args:
        analysis: The original.
        model: The rewritten model, from `emit`; its external data lie where the original's do.
        level: How thoroughly: `quick`, `standard` or `full`.
        candidates: Numbers of candidates to compare at; None for those of the level.
        lengths: Least and most of symbolic lengths, by the name in their shape or `input.axis`.

    Returns:
        The comparisons and what they found; `Report.passed` says whether the scores are the same.

    Raises:
        UsageError: An option is not one that there is.
        ModelError: The original does not run.
        EnvironmentProblem: onnxruntime is missing.
    """
    study = analysis.study
    return checks.gate(study.loaded, model, study.roles, study.known, level, lengths, candidates)


def _job(analysis: Analysis, options: Options) -> Job:
    return Job(analysis.study.loaded, analysis.study.roles, options, known=analysis)
