"""How near a model is to the machine: the multiply-adds of its products over time, against those of a large product.

What a model does besides products (moving entries, activations, sums, launches of small operators) and products that
are too small or too narrow for the machine keep it below. Multiply-adds follow from the proved shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from onnxrank import cost
from onnxrank.analysis import Analysis
from onnxrank.profiling.report import Kernels, Point, Work, Works
from onnxrank.values import CANDIDATES

LEVELS = ("request", "repeated", "candidate")


def macs(analysis: Analysis, extents: Mapping[str, int]) -> dict[str, int]:
    """Multiply-adds of a model by the level that its nodes run at.

    Args:
        analysis: The model.
        extents: Values of the symbols, candidates among them.
    """
    shapes = analysis.study.shapes(extents[CANDIDATES])
    shapes = replace(shapes, symbols={**shapes.symbols, **extents})
    out = dict.fromkeys(LEVELS, 0)
    for node, level in cost.by_rows(analysis.study.model.graph, shapes):
        if level == "candidate" and all(analysis.is_once(o) for o in node.output if o):
            level = "repeated"
        if level in out:  # what is constant is computed when the model is loaded
            out[level] += cost.node_macs(node, shapes)
    return out


def works(found: Mapping[str, int], point: Point, model: int, kernels: Kernels) -> Works:
    """The shares of the peak that a model reaches.

    Args:
        found: Its multiply-adds by level.
        point: What was timed at a number of candidates.
        model: Which of the models it is.
        kernels: Where its time goes there.
    """
    took = {s.name: s.seconds for s in kernels.levels}
    every = _work("all", sum(found.values()), point.times[model].median, point.peak)
    return Works(
        point.candidates, every, tuple(_work(k, found[k], took.get(k, 0.0), point.peak) for k in LEVELS if found[k])
    )


def _work(name: str, count: int, seconds: float, peak: float) -> Work:
    return Work(name, count, count / seconds / peak if seconds else None)
