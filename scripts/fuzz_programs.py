"""Rewrites random programs and holds them against the originals, at many numbers of candidates and lengths.

    python scripts/fuzz_programs.py --count 2000 --seed 0
    python scripts/fuzz_programs.py --count 2000 --seed 0 --check 10     # every tenth goes through the gate, too

The programs are those of `tests/support/kinds.py`: dynamic lengths, one or two of them, axes without entries, every
operator of the registry, and the layers of `tests/support/layers.py`. They are rewritten without a check, so that what
is written is seen as it is; in two of three programs decisions are drawn instead of those that cost least, since what
pays for a layer does not for one so small, and every fourth is tried with its candidates in blocks, too.

The rules that were applied are counted: nothing is shown of one that none was drawn for. The last line counts programs
whose scores differ (wrong), that onnxrank could not rewrite for an error of its own (errors), and that it refused;
then what the gate looked at, with those of which it took a site or everything back. Not counted are originals that
onnxruntime does not run, even if it dies of them: what they should give is not known. Counted apart are those of whose
original or result onnxruntime's optimiser makes a graph that onnxruntime does not load: since opset 21 it moves
QuantizeLinear of int8 past data movement with the zero point of another type.
"""

from __future__ import annotations

import argparse
import re
import sys
import traceback
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

import onnx
from helpers import operators, patterns, rewritten, session
from kinds import program
from lengths import Program, difference, reduces, text
from onnxrank.rules import RULES

import onnxrank
from onnxrank.errors import OnnxrankError
from onnxrank.graphs import live
from onnxrank.passes import choosing
from onnxrank.plans import ALWAYS

_DOES_NOT_RUN = re.compile("makes onnxruntime fail|does not run|onnxruntime cannot")

_REWRITTEN = ("changed", "taken back", "fault")
_FAULT = "output_dtype INT8 does not match y_zero_point type UINT8"
_CHUNK = 50
Looked = tuple[Counter[str], Counter[str], Counter[str], list[str]]


def main() -> int:
    """Runs the programs; 1 if any is wrong, ends in an error, or is taken back by the gate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="programs")
    parser.add_argument("--seed", type=int, default=0, help="of the first program; the others follow")
    parser.add_argument("--points", type=int, default=6, help="numbers of candidates and lengths per program")
    parser.add_argument("--check", type=int, default=0, metavar="K", help="has the gate look at every K-th program")
    parser.add_argument("--show", action="store_true", help="print the programs that are wrong")
    options = parser.parse_args()
    counts: Counter[str] = Counter()
    used: Counter[str] = Counter()
    applied: Counter[str] = Counter()
    end = options.seed + options.count
    chunks = [range(k, min(k + _CHUNK, end)) for k in range(options.seed, end, _CHUNK)]
    for some, operators_of, rules_of, says in _in_processes(chunks, options.points, options.check, options.show):
        counts += some
        used += operators_of
        applied += rules_of
        for line in says:
            print(line, flush=True)
    rare = ", ".join(f"{op} {n}" for op, n in sorted(used.items(), key=lambda item: item[1])[:5])
    print(f"{len(used)} operators, the rarest {rare}")
    weighed = [r.name for r in RULES if r.name not in ALWAYS]
    print(f"programs by rule: {', '.join(f'{name} {applied[name]}' for name in weighed)}")
    print(
        f"{options.count} programs: {counts['wrong']} wrong, {counts['error']} errors, {counts['refused']} refused, "
        f"{sum(counts[k] for k in _REWRITTEN)} rewritten, {counts['unchanged']} left alone, "
        f"{counts['does not run']} do not run; {counts['checked']} checked by the gate: "
        f"{counts['taken back']} taken back, {counts['fault']} that onnxruntime itself breaks"
    )
    return int(counts["wrong"] + counts["error"] + counts["taken back"] > 0)


def _in_processes(chunks: Sequence[range], *how: Any) -> Iterator[Looked]:
    """What came of each chunk; one that kills its process is looked at again, program by program."""
    pool: ProcessPoolExecutor | None = None
    for chunk in chunks:
        pool = pool or _pool()
        try:
            yield pool.submit(looked, chunk, *how).result()
        except BrokenProcessPool:
            pool = None
            for seed in chunk if len(chunk) > 1 else ():
                yield from _in_processes([range(seed, seed + 1)], *how)
            if len(chunk) == 1:
                yield Counter(error=1), Counter(), Counter(), [f"{chunk[0]} error: its process died"]
    if pool is not None:
        pool.shutdown()


def _pool() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=20)


def looked(seeds: range, points: int, check: int, show: bool) -> Looked:
    """Rewrites programs and compares: outcomes, operators, rules, and what is to be said."""
    counts: Counter[str] = Counter()
    used: Counter[str] = Counter()
    applied: Counter[str] = Counter()
    lines = []
    for seed in seeds:
        random = Random(seed)
        made = program(seed, random.randint(1, 24), fields=0 if seed % 4 else 5)
        interface = random.choice(["request", "same"])
        used.update(set(operators(made.model)))
        gated = bool(check) and seed % check == 0
        found, says, rules = outcome(made, seed, interface, points, gated)
        applied.update(rules)
        counts[found] += 1
        if gated and found in _REWRITTEN:
            counts["checked"] += 1
        if says:
            lines.append(f"{seed} {interface} {found}: {says}")
            if show:
                lines.append(text(made.model))
    return counts, used, applied, lines


def outcome(made: Program, seed: int, interface: str, points: int, gated: bool) -> tuple[str, str, Collection[str]]:
    """What came of a program, what is to be said of it, and the rules that were applied."""
    request, decisions = patterns(made.inputs), seed if seed % 3 else None
    try:
        result = rewritten(made.model, joined=seed % 2 == 0, decisions=decisions, request=request, interface=interface)
    except OnnxrankError as e:
        return ("does not run" if _DOES_NOT_RUN.search(str(e)) else "refused"), str(e), ()
    except Exception:
        return "error", traceback.format_exc(limit=-3), ()
    rules = {r.name for r in result.report.rules if r.sites} | {s.place.rule for s in result.plan.sites if s.taken}
    failed = [r.reason for r in result.report.refusals if "internal error" in r.reason]
    if failed:
        return "error", "; ".join(failed), rules
    if not result.changed:
        return "unchanged", "", rules
    says = differs(made, result.model, seed, interface, points)
    says = says or (in_blocks(made, seed, interface, points) if seed % 4 == 1 else None)
    if says is not None:
        return "wrong", says, rules
    if gated:
        try:
            with mock.patch.object(choosing, "LEAST_GAIN", 0.0):
                checked = onnxrank.optimize(made.model, request=request, interface=interface, check="quick")
        except Exception as e:
            return "fault" if _FAULT in str(e) else "error", traceback.format_exc(limit=-3), rules
        if checked.report.retreats:
            broken = all(_FAULT in r.reason for r in checked.report.retreats)
            return "fault" if broken else "taken back", "; ".join(str(r) for r in checked.report.retreats), rules
    return "changed", "", rules


def in_blocks(made: Program, seed: int, interface: str, points: int) -> str | None:
    """Where the result with its candidates in blocks differs; None if nowhere, or if it cannot have any."""
    rows = Random(seed).choice((1, 3, 100))
    try:
        result = rewritten(made.model, decisions=seed, request=patterns(made.inputs), interface=interface, blocks=rows)
    except OnnxrankError:
        return None
    except Exception:
        return f"in blocks of {rows}: {traceback.format_exc(limit=-3)}"
    found = differs(made, result.model, seed, interface, points) if result.plan.blocks else None
    return found and f"in blocks of {rows}: {found}"


def differs(made: Program, result: onnx.ModelProto, seed: int, interface: str, points: int) -> str | None:
    """Where the result differs from the original; None if nowhere."""
    # What no output depends on is not run by onnxrank either; onnxruntime may have no kernel for it.
    before = session(live(made.model))
    try:
        after = session(result)
    except Exception as e:
        return f"onnxruntime does not load it: {e}"
    for n, at in made.points(seed, points):
        if (0 in (n, *at.values())) and reduces(made.model):
            continue
        found = difference(made, before, after, interface, n, at)
        if found is not None:
            return found
    return None


if __name__ == "__main__":
    raise SystemExit(main())
