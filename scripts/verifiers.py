"""Runs the wrong models of the test suite through `verify` and the checks of other tools, at their defaults, and prints
a table.

    python scripts/verifiers.py --tools onnxrank
    pip install onnxsim onnxslim polygraphy hypothesis pytest -e '.[cpu]'
    python scripts/verifiers.py 2> /dev/null

A model that is right by its contract, and wrong only for calls that this rules out, is `declared` where the report says
that those were not looked at.

Every tool gets the original and the other model. onnxsim refuses symbolic dims unless shapes are given, so it gets 1
for them, which the others take by themselves. A tool that does not take a right model cannot tell wrong ones of that
ranker apart either; such rankers are counted as `cannot`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from onnx import ModelProto

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

from mutants import MUTANTS, Pair, pair

from onnxrank.errors import OnnxrankError
from onnxrank.verify import Options, verify


def onnxrank(p: Pair) -> bool:
    return verify(p.original, p.optimized, Options(roles=p.roles)).passed


def declares(p: Pair, words: str) -> bool:
    """Whether `verify` passes a pair, and says what it did not look at."""
    found = verify(p.original, p.optimized, Options(roles=p.roles))
    return found.passed and any(words in line for line in found.unseen)


def onnxsim(p: Pair) -> bool:
    from onnxsim.model_checking import compare

    shapes = {i.name: [d.dim_value or 1 for d in i.type.tensor_type.shape.dim] for i in p.original.graph.input}
    return bool(compare(p.optimized, p.original, input_shapes=shapes, verbose=False))


def onnxslim(p: Pair) -> bool:
    from onnxslim.utils import check_onnx, check_result, onnxruntime_inference

    feeds, before, _ = check_onnx(copied(p.original))
    after, _ = onnxruntime_inference(copied(p.optimized), feeds)
    return bool(check_result(before, after))


def polygraphy(p: Pair) -> bool:
    from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
    from polygraphy.comparator import Comparator

    runners = [OnnxrtRunner(SessionFromOnnx(m.SerializeToString())) for m in (p.original, p.optimized)]
    return bool(Comparator.compare_accuracy(Comparator.run(runners)))


def copied(model: ModelProto) -> ModelProto:
    out = ModelProto()
    out.CopyFrom(model)
    return out


def passes(tool: Callable[[Pair], bool], p: Pair) -> bool:
    """What a tool says of a pair; an error says that they are not the same."""
    np.random.seed(0)  # of the tools that draw from it
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            return tool(p)
        except OnnxrankError:
            return False
        except Exception:
            return False


def main() -> int:
    logging.disable(logging.CRITICAL)
    os.environ.setdefault("POLYGRAPHY_AUTOINSTALL_DEPS", "0")
    tools = {"onnxrank": onnxrank, "onnxsim": onnxsim, "onnxslim": onnxslim, "Polygraphy": polygraphy}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", nargs="+", choices=tools, default=[*tools])
    tools = {t: tools[t] for t in parser.parse_args().tools}
    rankers = sorted({m.ranker for m in MUTANTS} - {"by hand"})
    right = {(t, r): passes(tool, pair(r)) for t, tool in tools.items() for r in rankers}
    width = max(len(m.name) for m in MUTANTS)
    print(f"{'wrong model':{width}}  " + "  ".join(f"{t:>10}" for t in tools))
    caught = dict.fromkeys(tools, 0)
    missed = dict.fromkeys(tools, 0)
    cannot = dict.fromkeys(tools, 0)
    declared = dict.fromkeys(tools, 0)
    for m in MUTANTS:
        made = m.pair()
        cells = []
        for t, tool in tools.items():
            if m.ranker != "by hand" and not right[t, m.ranker]:
                cannot[t] += 1
                cells.append("cannot")
            elif m.declared and tool is onnxrank and declares(made, m.declared):
                declared[t] += 1
                cells.append("declared")
            elif passes(tool, made):
                missed[t] += 1
                cells.append("missed")
            else:
                caught[t] += 1
                cells.append("caught")
        print(f"{m.name:{width}}  " + "  ".join(f"{c:>10}" for c in cells), flush=True)
    for name, counts in (("caught", caught), ("declared", declared), ("missed", missed), ("cannot", cannot)):
        print(f"{name + f' of {len(MUTANTS)}':{width}}  " + "  ".join(f"{counts[t]:>10}" for t in tools))
    taken = {t: sum(right[t, r] for r in rankers) for t in tools}
    print(f"{f'right models taken of {len(rankers)}':{width}}  " + "  ".join(f"{taken[t]:>10}" for t in tools))
    return 0 if not missed.get("onnxrank") and taken.get("onnxrank", len(rankers)) == len(rankers) else 1


if __name__ == "__main__":
    sys.exit(main())
