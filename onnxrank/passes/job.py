"""One run of `optimize`: what its passes hand on."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata

from onnx import ModelProto

from onnxrank import cost, remarks
from onnxrank import model as files
from onnxrank.analysis import Analysis
from onnxrank.crossover import Pair
from onnxrank.forms import Form
from onnxrank.passes.options import Options
from onnxrank.passes.preparation import Preparation
from onnxrank.plans import Measured
from onnxrank.report import Report, Retreat
from onnxrank.roles import Roles
from onnxrank.rule import Refusal
from onnxrank.study import Study
from onnxrank.verify.side import Side


@dataclass(frozen=True)
class Pass:
    """A step of `optimize`.

    Attributes:
        name: What is said while it runs.
        policy: What it may do to the model: `none`, `exact` for what gives the same scores but for rounding and is
            checked, or `undo` for what only takes back.
        run: Goes on from a job's model, analysis, options and report, which it changes; whether there is anything to
            go on with, or the original has to be kept.
        anew: Whether it runs also where there is nothing to go on with, as it may find something.
    """

    name: str
    policy: str
    run: Callable[[Job], bool]
    anew: bool = False


@dataclass
class Job:
    """One run of `optimize` on a model.

    Attributes:
        loaded: The original.
        roles: Roles of its inputs.
        options: What the caller chose.
        notes: Anything worth knowing, a sentence each.
        known: What is known of the original's tensors, where somebody has analysed it already.
        report: What was done so far.
        remarks: Why places were left alone, by form.
        preparation: What is done before any rule looks at the model.
        study: What is known of the original, in the form that is rewritten.
        found: The ways to rewrite it.
        form: The one that was chosen; None once the model was given up.
        full: The form with all rules.
        pair: The chosen form, and another one for few candidates; None where it holds for any number.
        span: Least and most candidates that are timed: the original may not run with as few as are expected.
        measured: What timing gave.
        tried: What it gave of every way that was timed.
        blocks: Most candidates of a block, where they are scored in blocks; 0 where they are not.
        blocks_from: The number of candidates from which on they are; 0 for any number.
        kept: Whether the passes so far left anything to go on with.
        spent: Seconds that timing took.
        without: Rules that were out before timing left any out.
        guilty: Rules with operators at which one of their sites made the check fail.
        others: Remarks on rules that were left out as a whole.
        made: The result with its contract, and of what it was made.
        side: The original in the process that the check runs it in, where that was begun ahead of it.
    """

    loaded: files.LoadedModel
    roles: Roles
    options: Options
    notes: list[str] = field(default_factory=list)
    known: Analysis | None = None
    preparation: Preparation = field(init=False)
    study: Study = field(init=False)

    def __post_init__(self) -> None:
        self.report = new_report(self.loaded, self.options, self.roles)
        self.report.notes = self.notes
        self.remarks = remarks.Remarks(self.options.usual)
        self.found: tuple[Form, ...] = ()
        self.form: Form | None = None
        self.full: Form | None = None
        self.pair: Pair | None = None
        self.span = self.options.span
        self.measured: tuple[Measured, ...] = ()
        self.tried: list[tuple[Measured, ...]] = []
        self.blocks = self.blocks_from = 0
        self.kept = True
        self.spent = 0.0
        self.without: frozenset[str] = frozenset()
        self.guilty: set[tuple[str, str]] = set()
        self.others: list[Refusal] = []
        self.made: tuple[Form, Pair | None, tuple[Measured, ...], int, int, ModelProto] | None = None
        self.side: Side | None = None

    @property
    def chosen(self) -> Form:
        """The form that was chosen; there must be one."""
        assert self.form is not None
        return self.form

    @cached_property
    def plain(self) -> Form:
        """The original as it is, with the result's signature."""
        o = self.options
        return Form(self.preparation.original, (), o.interface, o.guard, o.span)

    def before(self) -> Callable[[int], float]:
        """Predicted time of the original, by the number of candidates."""
        study = self.preparation.original
        return lambda n: cost.seconds(study.model.graph, study.shapes(n))

    def give_up(self, cause: str, reason: str) -> None:
        """Leaves the model alone after all."""
        self.report.retreats.append(Retreat("", None, cause, reason))
        self.notes.append(f"the rewritten model was given up, so the original is kept: {reason}")
        self.form = self.pair = None


def new_report(loaded: files.LoadedModel, options: Options, roles: Roles) -> Report:
    """A report of a run that has not changed anything yet."""
    source = None if loaded.path is None else os.fspath(loaded.path)
    version, interface = metadata.version("onnxrank"), options.interface
    report = Report(version, source, loaded.sha256, interface, options.span, roles.to_dict())
    report.size_before = report.size_after = loaded.size
    return report
