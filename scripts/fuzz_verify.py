"""Damages models in thousands of ways and sees that `onnxrank verify` always ends in order.

    python scripts/fuzz_verify.py models/onnx/mmoe.torchscript.onnx --cases 2000

For every case: one of the documented exit codes, no traceback, no file written, within the time and memory limits.
Cases run in batches in processes of their own, so that a crash of verify itself is seen too. Half of the cases damage
the optimized model, a quarter the original, a quarter both in the same way.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

CODES = {0, 1, 2, 3, 4}
OPTIONS = "--candidates 0,1,3 --seeds 1 --timeout 20 --memory 4 --request user_*"
SECONDS = 60.0
GIB = 4.0


def damage(data: bytes, rng: random.Random) -> bytes:
    """Cuts, flips bits, overwrites, doubles or drops pieces."""
    out = bytearray(data)
    kind = rng.randrange(6)
    if kind == 0:
        return bytes(out[: rng.randrange(len(out))])
    if kind in (1, 2):
        for _ in range(1 if kind == 1 else rng.randrange(2, 64)):
            out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
        return bytes(out)
    start = rng.randrange(len(out))
    end = min(len(out), start + rng.randrange(1, 200))
    if kind == 3:
        del out[start:end]
    elif kind == 4:
        out[start:end] = bytes(rng.randrange(256) for _ in range(end - start))
    else:
        out[start:start] = out[start:end]
    return bytes(out)


def structured(data: bytes, rng: random.Random) -> bytes:
    """Damages a field rather than a byte: such models get further before they fail."""
    from onnx import ModelProto

    model = ModelProto.FromString(data)
    graph = model.graph
    node = rng.choice(graph.node)
    kind = rng.randrange(9)
    if kind == 0 and graph.initializer:
        tensor = rng.choice(graph.initializer)
        if tensor.dims:
            tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice([0, -1, 1, 2**31, 2**62])
    elif kind == 1:
        shape = rng.choice([*graph.input, *graph.output]).type.tensor_type.shape
        if shape.dim:
            shape.dim[rng.randrange(len(shape.dim))].dim_value = rng.choice([0, -5, 7, 2**40, 2**62])
    elif kind == 2 and node.attribute:
        attribute = rng.choice(node.attribute)
        attribute.i = rng.choice([-1, 2**31, 2**62, -(2**63)])
        if attribute.ints:
            attribute.ints[0] = rng.choice([-(2**31), 2**40])
    elif kind == 3 and node.input:
        node.input[rng.randrange(len(node.input))] = rng.choice(["", "nothing", rng.choice(graph.node).output[0]])
    elif kind == 4:
        node.op_type = rng.choice(
            ["Loop", "If", "Scan", "Reshape", "Expand", "Tile", "ConstantOfShape", "Gelu", "\x1b[31m"]
        )
    elif kind == 5:
        node.name = node.output[0] = "a\x00\x1b]0;b\x07\n<&>`|:: ‮"
    elif kind == 6:
        del graph.node[rng.randrange(len(graph.node))]
    elif kind == 7:
        model.opset_import[0].version = rng.choice([0, 1, 9, 11, 99, 2**62])
    else:
        tensor = rng.choice(graph.initializer)
        tensor.data_type = rng.choice([0, 2, 7, 8, 10, 16, 23, 99])
    return model.SerializeToString()


def batch(model: str, optimized: str, first: int, count: int) -> None:
    """Runs some cases; prints `case exit-code seconds` for each."""
    from onnxrank import cli

    sources = [Path(p).read_bytes() for p in (model, optimized)]
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for number in range(first, first + count):
            rng = random.Random(number)
            which = number % 4
            how = structured if rng.random() < 0.5 else damage
            files = list(sources)
            if which in (0, 1, 3):
                files[1] = how(files[1], rng)
            if which == 2:
                files[0] = how(files[0], rng)
            if which == 3:
                files[0] = files[1]
            for name, data in zip(("a.onnx", "b.onnx"), files, strict=True):
                Path(name).write_bytes(data)
            start = time.monotonic()
            out = io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                code = cli.main(["verify", "a.onnx", "b.onnx", *OPTIONS.split()])
            seconds = time.monotonic() - start
            text = out.getvalue()
            left = sorted(os.listdir("."))
            problem = ""
            if code not in CODES or "Traceback" in text:
                problem = text[-300:].replace("\n", " / ")
            elif left != ["a.onnx", "b.onnx"]:
                problem = f"left {left}"
            elif seconds > SECONDS:
                problem = "too slow"
            elif any(c in text for c in "\x00\x1b\x07‮"):
                problem = "control characters on the terminal"
            print("case", number, code, f"{seconds:.2f}", problem or "-", flush=True)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)
    print("memory", f"{used:.2f}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--inner", nargs=1, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inner:
        batch(args.model, args.inner[0], args.first, args.batch)
        return 0
    import onnxrank

    codes: Counter[str] = Counter()
    bad: list[str] = []
    longest, most = 0.0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        optimized = os.path.join(folder, "optimized.onnx")
        onnxrank.optimize(args.model, request=["user_*"], check=False).save(optimized)
        start = time.monotonic()
        for first in range(args.first, args.first + args.cases, args.batch):
            count = min(args.batch, args.first + args.cases - first)
            command = [
                sys.executable,
                __file__,
                os.path.realpath(args.model),
                "--first",
                str(first),
                "--batch",
                str(count),
            ]
            done = subprocess.run([*command, "--inner", optimized], stdout=subprocess.PIPE, text=True)
            seen = 0
            for line in done.stdout.splitlines():
                if line.startswith("memory "):
                    most = max(most, float(line.split()[1]))
                if line.startswith("case "):
                    _, number, code, seconds, problem = line.split(" ", 4)
                    seen += 1
                    codes[code] += 1
                    longest = max(longest, float(seconds))
                    if problem != "-":
                        bad.append(f"case {number}: exit {code}: {problem}")
            if seen != count:
                bad.append(f"the batch from {first} ended with {done.returncode} after {seen} of {count} cases")
    if most > GIB:
        bad.append(f"{most:.1f} GiB of memory")
    shown = ", ".join(f"{n} with exit code {c}" for c, n in sorted(codes.items()))
    print(f"{sum(codes.values())} cases: {shown}; longest {longest:.1f} s, most memory {most:.2f} GiB, "
          f"{time.monotonic() - start:.0f} s in all; {len(bad)} bad")  # fmt: skip
    for line in bad[:20]:
        print(line)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
