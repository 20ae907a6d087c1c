"""The first pass: the original's shapes are derived, and runs of it confirm them."""

from __future__ import annotations

from onnxrank import cost
from onnxrank import model as files
from onnxrank.analysis import Analysis
from onnxrank.passes.job import Job
from onnxrank.passes.preparation import Preparation
from onnxrank.study import Study
from onnxrank.verify import gate, sizes


def study(job: Job) -> bool:
    """Derives the original's shapes; the runs that confirm them are waited for by `confirmed`."""
    if job.options.check:
        job.side = gate.begun(job.loaded)
    if job.known is None:
        job.known = Analysis(Study(files.flattened(job.loaded.proto), job.roles, job.loaded, wait=False))
    original = job.study = job.known.study
    job.preparation = Preparation(original, job.options, job.remarks, job.notes)
    job.notes += [original.facts.note] if original.facts.note else []
    served = sizes.spans(original.symbols, job.options.lengths or {})
    job.report.lengths = {sizes.name_of(s): span for s, span in served.items()}
    shapes = original.shapes(job.options.usual)
    job.report.before = job.report.after = cost.by_level(original.model.graph, shapes)
    return True


def confirmed(job: Job) -> bool:
    """Whether runs of the original confirm its shapes, so that it can be rewritten at all.

    Raises:
        ModelError: It does not run.
    """
    original = job.preparation.original
    stray = original.contradicted()
    if original.shortest > 1:
        _lengthen(job, original)
    job.report.refusals = [stray] if stray is not None else []
    return stray is None


def _lengthen(job: Job, original: Study) -> None:
    """Takes histories to be no shorter than the original takes them, where nothing else is declared."""
    given = job.options.lengths or {}
    served = sizes.spans(original.symbols, given, original.shortest)
    job.report.lengths = {sizes.name_of(s): span for s, span in served.items()}
    told = [f"{name} = {low}..{high}" for name, (low, high) in job.report.lengths.items() if name not in given]
    if told:
        job.notes.append(
            f"the model does not run with a history of fewer than {original.shortest}: what is served is taken to be "
            f"{' and '.join(told)} (--length says otherwise)"
        )
