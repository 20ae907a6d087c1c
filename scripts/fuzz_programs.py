"""Rewrites random programs and holds them against the originals, at many numbers of candidates and lengths.

    python scripts/fuzz_programs.py --count 2000 --seed 0

The programs are those of `tests/onnxrank/test_lengths.py`: dynamic lengths, one or two of them, axes without entries,
exact numbers. They are rewritten without a check, so that what is written is seen as it is. The last line counts those
whose scores differ (wrong), that onnxrank could not rewrite for an error of its own (errors), and that it refused.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

from helpers import patterns, rewritten, session
from lengths import difference, program, reduces, text

from onnxrank.errors import OnnxrankError


def main() -> int:
    """Runs the programs; 1 if any is wrong, or ends in an error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="programs")
    parser.add_argument("--seed", type=int, default=0, help="of the first program; the others follow")
    parser.add_argument("--points", type=int, default=6, help="numbers of candidates and lengths per program")
    parser.add_argument("--show", action="store_true", help="print the programs that are wrong")
    options = parser.parse_args()
    wrong = errors = refused = 0
    for seed in range(options.seed, options.seed + options.count):
        random = Random(seed)
        made = program(seed, random.randint(1, 24))
        interface = random.choice(["request", "same"])
        try:
            result = rewritten(made.model, request=patterns(made.inputs), interface=interface)
        except OnnxrankError as e:
            refused += 1
            print(f"{seed} {interface} refused: {e}", flush=True)
            continue
        except Exception:
            errors += 1
            print(f"{seed} {interface} error: {traceback.format_exc(limit=-3)}", flush=True)
            continue
        if not result.changed:
            continue
        before, after = session(made.model), session(result.model)
        for n, at in made.points(seed, options.points):
            if (0 in (n, *at.values())) and reduces(made.model):
                continue
            found = difference(made, before, after, interface, n, at)
            if found is not None:
                wrong += 1
                print(f"{seed} {interface} wrong: {found}", flush=True)
                if options.show:
                    print(text(made.model))
                break
    print(f"{options.count} programs: {wrong} wrong, {errors} errors, {refused} refused")
    return int(wrong + errors > 0)


if __name__ == "__main__":
    raise SystemExit(main())
