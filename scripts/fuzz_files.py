"""Damages model files, and what lies around them, in hundreds of ways, and sees that `onnxrank optimize` ends in order.

    python scripts/fuzz_files.py --cases 500

For every case: one of the documented exit codes, no traceback, no file outside the model's folder read or changed, none
left behind, within the time and memory limits. Cases run in batches in processes of their own, so that a crash is seen.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

CODES = {0, 1, 2, 3, 4}
SECONDS, GIB = 60.0, 4.0
SECRET = b"not for any model: " * 4096
WIDE, NARROW = 64, 16

Case = Callable[[ModelProto, Path, random.Random], "bytes | None"]
CASES: dict[str, Case] = {}
"""What damages a model, or the folder it lies in; it may give the file's bytes itself."""


def case(function: Case) -> Case:
    """Registers a way to damage a model."""
    CASES[function.__name__.strip("_")] = function
    return function


def sound() -> ModelProto:
    """A small ranker with a table, a layer and a branch."""
    rng = np.random.default_rng(0)
    weights = {
        "W": rng.standard_normal((WIDE, WIDE)),
        "C": rng.standard_normal((WIDE + NARROW, NARROW)),
        "table": rng.standard_normal((10, NARROW)),
    }
    branches = {}
    for name, op in (("then_branch", "Neg"), ("else_branch", "Abs")):
        out = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        branches[name] = helper.make_graph([helper.make_node(op, ["y"], [name])], name, [], [out])
    nodes = [
        helper.make_node("MatMul", ["user", "W"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gather", ["table", "item"], ["row"]),
        helper.make_node("Concat", ["r", "row"], ["x"], axis=1),
        helper.make_node("MatMul", ["x", "C"], ["y"]),
        helper.make_node("ReduceSum", ["y"], ["total"], keepdims=0),
        helper.make_node("Less", ["total", "zero"], ["low"]),
        helper.make_node("If", ["low"], ["z"], **branches),
        helper.make_node("Reshape", ["y", "shape"], ["score"]),
    ]
    stored = [numpy_helper.from_array(v.astype(np.float32), k) for k, v in weights.items()]
    stored += [numpy_helper.from_array(np.float32(0), "zero"), numpy_helper.from_array(np.array([-1, NARROW]), "shape")]
    user = helper.make_tensor_value_info("user", TensorProto.FLOAT, ["N", WIDE])
    item = helper.make_tensor_value_info("item", TensorProto.INT64, ["N"])
    outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", NARROW]) for n in ("score", "z")]
    graph = helper.make_graph(nodes, "g", [user, item], outputs, stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def external(model: ModelProto, folder: Path, *, write: bool = True, **entries: str) -> TensorProto:
    """Moves the first weights into a file."""
    tensor = model.graph.initializer[0]
    data = tensor.raw_data
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": "w.bin", **entries}.items():
        tensor.external_data.add(key=key, value=value)
    if write:
        (folder / "w.bin").write_bytes(data)
    return tensor


# --- external data -------------------------------------------------------------------------------------------------


@case
def external_location(model: ModelProto, folder: Path, rng: random.Random) -> None:
    places = [
        "",
        ".",
        "/",
        "..",
        "../secret.bin",
        str(folder.parent / "secret.bin"),
        "a\0b",
        "..\\secret.bin",
        "C:w.bin",
        "sub/../../secret.bin",
        "./w.bin",
        "w.bin/",
        "m.onnx",
        "o.onnx",
        "x" * 5000,
        "\x1b[31m",
        "w.bin\n",
    ]
    external(model, folder, location=rng.choice(places))


@case
def external_numbers(model: ModelProto, folder: Path, rng: random.Random) -> None:
    numbers = [
        "",
        "-1",
        "0",
        "1",
        "3",
        "4096",
        "16383",
        "16385",
        "9" * 30,
        "1e3",
        "0x10",
        " 4",
        "NaN",
        "\0",
        "-" + "9" * 30,
    ]
    external(
        model, folder, **{k: rng.choice(numbers) for k in rng.choice([["offset"], ["length"], ["offset", "length"]])}
    )


@case
def external_file(model: ModelProto, folder: Path, rng: random.Random) -> None:
    external(model, folder)
    path, secret = folder / "w.bin", folder.parent / "secret.bin"
    kind = rng.randrange(9)
    data = path.read_bytes()
    if kind == 0:
        path.write_bytes(data[: rng.randrange(len(data))])
    elif kind == 1:
        path.write_bytes(data + bytes(rng.randrange(1, 1 << 16)))
    else:
        path.unlink()
    if kind == 2:
        path.symlink_to(secret)
    elif kind == 3:
        path.symlink_to("w.bin")
    elif kind == 4:
        (folder / "real.bin").write_bytes(data)
        path.symlink_to("real.bin")
    elif kind == 5:
        (folder / "real.bin").write_bytes(data)
        os.link(folder / "real.bin", path)
    elif kind == 6:
        path.mkdir()
    elif kind == 7:
        os.mkfifo(path)
    elif kind == 8:
        path.symlink_to("/dev/zero")


@case
def external_shape(model: ModelProto, folder: Path, rng: random.Random) -> None:
    tensor = external(model, folder)
    tensor.dims[rng.randrange(2)] = rng.choice([0, -1, -WIDE, 1, 2**31, 2**62, 2**63 - 1])
    if rng.random() < 0.3:
        tensor.data_type = rng.choice([0, TensorProto.STRING, TensorProto.INT4, 99])


@case
def external_hole(model: ModelProto, folder: Path, rng: random.Random) -> None:
    """A sparse file of 64 GiB, of which the tensor claims all or a part."""
    tensor = external(model, folder)
    with open(folder / "w.bin", "r+b") as file:
        file.truncate(1 << 36)
    tensor.dims[0] = rng.choice([WIDE, 1 << 28])


@case
def external_sparse(model: ModelProto, folder: Path, rng: random.Random) -> None:
    held = external(model, folder, offset=rng.choice(["0", "100000"]))
    sparse = model.graph.sparse_initializer.add(dims=[WIDE, WIDE])
    sparse.values.CopyFrom(held)
    sparse.values.dims[:] = [WIDE * WIDE]
    sparse.indices.CopyFrom(numpy_helper.from_array(np.arange(WIDE * WIDE), "at"))
    del model.graph.initializer[0]


# --- tensors, names, graphs ----------------------------------------------------------------------------------------


@case
def sparse(model: ModelProto, folder: Path, rng: random.Random) -> None:
    index = rng.choice([[0, 5], [-1, 5], [5, 5], [9, 2], [0, WIDE * WIDE], [2**62, 1], [0], []])
    made = model.graph.sparse_initializer.add(dims=rng.choice([[WIDE, WIDE], [WIDE], [2**31, 2**31], [-1, 4], []]))
    made.values.CopyFrom(numpy_helper.from_array(np.ones(2, np.float32), rng.choice(["W", "", "other"])))
    made.indices.CopyFrom(numpy_helper.from_array(np.array(index, rng.choice([np.int64, np.float32])), "at"))
    if rng.random() < 0.7:
        del model.graph.initializer[0]


@case
def sparse_constant(model: ModelProto, folder: Path, rng: random.Random) -> None:
    held = TensorProto()
    made = (
        model.graph.node.add(op_type="Constant", output=["W"]).attribute.add(name="sparse_value", type=11).sparse_tensor
    )
    made.dims[:] = rng.choice([[WIDE, WIDE], [2**31, 2**31], [1 << 18, 1 << 18], [-1]])
    held.CopyFrom(numpy_helper.from_array(np.ones(1, np.float32), "v"))
    made.values.CopyFrom(held)
    made.indices.CopyFrom(numpy_helper.from_array(np.array([[rng.choice([0, 2**40, -7]), 0]]), "at"))
    del model.graph.initializer[0]
    nodes = [model.graph.node[-1], *model.graph.node[:-1]]
    copies = [type(n).FromString(n.SerializeToString()) for n in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)


@case
def dimensions(model: ModelProto, folder: Path, rng: random.Random) -> None:
    tensor = rng.choice([t for t in model.graph.initializer if t.dims])
    tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice([0, -1, 1, 7, 2**31, 2**40, 2**62, 2**63 - 1])


@case
def signature(model: ModelProto, folder: Path, rng: random.Random) -> None:
    value = rng.choice([*model.graph.input, *model.graph.output])
    shape = value.type.tensor_type.shape
    shape.dim[rng.randrange(len(shape.dim))].dim_value = rng.choice([0, -5, 7, 2**31, 2**40, 2**62])
    if rng.random() < 0.2:
        value.type.tensor_type.elem_type = rng.choice([0, 8, 16, 23, 99])


@case
def large_results(model: ModelProto, folder: Path, rng: random.Random) -> None:
    op = rng.choice(["ConstantOfShape", "Expand", "Tile", "Range"])
    size = numpy_helper.from_array(np.array([rng.choice([2**34, 2**40, 2**62]), 4]), "size")
    model.graph.initializer.append(size)
    made = {"ConstantOfShape": ["size"], "Range": ["zero_", "most", "one_"]}.get(op, ["zero", "size"])
    for name, v in (("zero_", 0), ("most", 2**50), ("one_", 1)):
        model.graph.initializer.append(numpy_helper.from_array(np.array(v), name))
    model.graph.node.add(op_type=op, input=made, output=["big"])
    model.graph.node.add(op_type="Size", input=["big"], output=["entries"])
    model.graph.output.append(helper.make_tensor_value_info("entries", TensorProto.INT64, []))


@case
def names(model: ModelProto, folder: Path, rng: random.Random) -> None:
    odd = rng.choice(
        ["", "a\0b", "\x1b]0;b\x07", "x" * 100_000, "W", "score", "item", "user.request", "h::shape", "../x"]
    )
    node = rng.choice(model.graph.node)
    kind = rng.randrange(5)
    if kind == 0:
        node.output[0] = odd
    elif kind == 1:
        node.input[0] = odd
    elif kind == 2:
        rng.choice(model.graph.initializer).name = odd
    elif kind == 3:
        rng.choice([*model.graph.input, *model.graph.output]).name = odd
    else:
        node.name = odd


@case
def twice(model: ModelProto, folder: Path, rng: random.Random) -> None:
    field: Any = getattr(model.graph, rng.choice(["node", "initializer", "input", "output"]))
    field.append(rng.choice(field))


@case
def cyclic(model: ModelProto, folder: Path, rng: random.Random) -> None:
    node = rng.choice(model.graph.node)
    node.input[0] = rng.choice([node.output[0], "score", "y", "z"])


@case
def unsorted(model: ModelProto, folder: Path, rng: random.Random) -> None:
    nodes = [type(n).FromString(n.SerializeToString()) for n in model.graph.node]
    rng.shuffle(nodes)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


@case
def kinds(model: ModelProto, folder: Path, rng: random.Random) -> None:
    """Operators whose results, attributes or bodies are not what the nodes behind them take."""
    node = rng.choice(model.graph.node)
    node.op_type = rng.choice(
        [
            "SplitToSequence",
            "SequenceConstruct",
            "Optional",
            "ZipMap",
            "Loop",
            "If",
            "Scan",
            "Shape",
            "Constant",
            "NonZero",
            "",
            "\x1b[31m",
            "Attention",
            "GRU",
        ]
    )
    if rng.random() < 0.3:
        node.domain = rng.choice(["com.microsoft", "ai.onnx.ml", "com.acme", "ai.onnx"])


@case
def attributes(model: ModelProto, folder: Path, rng: random.Random) -> None:
    node = rng.choice([n for n in model.graph.node if n.attribute])
    attribute = rng.choice(node.attribute)
    kind = rng.randrange(4)
    if kind == 0:
        del node.attribute[:]
    elif kind == 1:
        attribute.i = rng.choice([-1, 2**31, 2**62, -(2**63)])
    elif kind == 2:
        attribute.type = rng.choice([0, 1, 4, 5, 11, 13])
    else:
        node.attribute.append(attribute)


@case
def nested(model: ModelProto, folder: Path, rng: random.Random) -> None:
    """Branches inside branches, deeper than a reader's stack or not."""
    node = next(n for n in model.graph.node if n.op_type == "If")
    for _ in range(rng.choice([3, 12, 24])):
        inner = type(node).FromString(node.SerializeToString())
        body = next(a.g for a in node.attribute if a.name == "then_branch")
        del body.node[:]
        inner.output[0] = body.output[0].name
        body.node.append(inner)


@case
def functions(model: ModelProto, folder: Path, rng: random.Random) -> None:
    opset = helper.make_opsetid("", rng.choice([1, 11, 13, 17, 99]))
    inner = rng.choice(["Layer", "Other", "Relu"])
    body = [helper.make_node(inner, ["a"], ["b"], domain="" if inner == "Relu" else "own")]
    for name in ("Layer", "Other")[: rng.choice([1, 2])]:
        model.functions.append(
            helper.make_function("own", name, ["a"], ["b"], body, [opset, helper.make_opsetid("own", 1)])
        )
    model.opset_import.append(helper.make_opsetid("own", 1))
    node = next(n for n in model.graph.node if n.op_type == "Relu")
    node.op_type, node.domain = "Layer", "own"


@case
def truncated(model: ModelProto, folder: Path, rng: random.Random) -> bytes:
    data = model.SerializeToString()
    return data[: rng.randrange(len(data))]


@case
def flipped(model: ModelProto, folder: Path, rng: random.Random) -> bytes:
    data = bytearray(model.SerializeToString())
    weights = len(model.graph.initializer[0].raw_data)
    for _ in range(rng.randrange(1, 16)):
        place = rng.randrange(len(data))
        data[place if rng.random() < 0.3 else place % max(1, len(data) - weights)] ^= 1 << rng.randrange(8)
    return bytes(data)


# --- running -------------------------------------------------------------------------------------------------------


def run(number: int, place: Path) -> tuple[int, float, str, str]:
    """One case: its kind, exit code, seconds, and what was wrong (`-` for nothing)."""
    from onnxrank import cli

    rng = random.Random(number)
    kind = sorted(CASES)[number % len(CASES)]
    folder = place / str(number)
    folder.mkdir()
    secret = place / "secret.bin"
    model = sound()
    data = CASES[kind](model, folder, rng)
    (folder / "m.onnx").write_bytes(model.SerializeToString() if data is None else data)
    before = {p.name for p in folder.iterdir()}
    arguments = ["optimize", str(folder / "m.onnx"), str(folder / "o.onnx"), "--request", "user"]
    arguments += rng.choice([[], ["--no-check"], ["--no-check", "--interface", "same"]])
    opened.clear()
    start, out = time.monotonic(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = cli.main(arguments)
    seconds, text = time.monotonic() - start, out.getvalue()
    left = {p.name for p in folder.iterdir()} - before - {"o.onnx"}
    problem = "-"
    if code not in CODES or "Traceback" in text:
        problem = text[-300:].replace("\n", " / ")
    elif left or (code and (folder / "o.onnx").exists() and "o.onnx" not in before):
        problem = f"left {sorted(left) or 'o.onnx'}"
    elif str(secret) in opened or hashlib.sha256(secret.read_bytes()).digest() != hashlib.sha256(SECRET).digest():
        problem = "touched a file outside the folder"
    elif any(c in text for c in "\x00\x1b\x07"):
        problem = "control characters on the terminal"
    elif seconds > SECONDS:
        problem = "too slow"
    return code, seconds, kind, problem


opened: set[str] = set()
"""Files that Python opened during a case, links followed."""


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Notes every file that is opened."""
    if event == "open" and isinstance(arguments[0], (str, os.PathLike)) and "\0" not in os.fspath(arguments[0]):
        opened.add(os.path.realpath(arguments[0]))


def batch(place: Path, first: int, count: int) -> None:
    """Runs some cases; prints a line for each."""
    sys.addaudithook(watch)
    for number in range(first, first + count):
        code, seconds, kind, problem = run(number, place)
        print("case", number, code, f"{seconds:.2f}", kind, problem, flush=True)
    used = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print("memory", f"{used / (1 << 20):.2f}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--inner", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inner:
        batch(Path(args.inner), args.first, args.batch)
        return 0
    codes: Counter[str] = Counter()
    bad: list[str] = []
    longest, most, start = 0.0, 0.0, time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(os.path.realpath(temporary))
        (place / "secret.bin").write_bytes(SECRET)
        for first in range(args.first, args.first + args.cases, args.batch):
            count = min(args.batch, args.first + args.cases - first)
            command = [sys.executable, __file__, "--first", str(first), "--batch", str(count), "--inner", str(place)]
            done = subprocess.run(command, capture_output=True, text=True)
            seen = 0
            for line in done.stdout.splitlines():
                if line.startswith("memory "):
                    most = max(most, float(line.split()[1]))
                if line.startswith("case "):
                    _, number, code, seconds, kind, problem = line.split(" ", 5)
                    seen += 1
                    codes[code] += 1
                    longest = max(longest, float(seconds))
                    if problem != "-":
                        bad.append(f"case {number} ({kind}): exit {code}: {problem}")
            if seen != count:
                text = done.stderr.strip().splitlines()[-1:]
                bad.append(f"the batch from {first} ended with {done.returncode} after {seen} of {count} cases: {text}")
    if most > GIB:
        bad.append(f"{most:.1f} GiB of memory")
    shown = ", ".join(f"{n} with exit code {c}" for c, n in sorted(codes.items()))
    print(f"{sum(codes.values())} cases: {shown}; longest {longest:.1f} s, most memory {most:.2f} GiB, "
          f"{time.monotonic() - start:.0f} s in all; {len(bad)} bad")  # fmt: skip
    for line in bad[:40]:
        print(line)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
