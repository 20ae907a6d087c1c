"""Runs the optimiser over folders of exported models and writes one table: status, parity, MACs, time.

A folder holds `<name>.roles.yaml` and `<name>.<anything>.onnx`, as the export scripts write them. Requests are drawn
here from the roles files, MACs are counted by `yardstick.py`, and results are compared with onnxruntime's own on the
original, in float32 and in float64: nothing that decides over a result comes from the code under test. Every model
has a process of its own, so that none can stop the table.

    python scripts/coverage.py models/onnx out/deepctr --no-time
    python scripts/coverage.py out/deepctr --markdown coverage.md --json coverage.json --candidates 1,32,512,2048
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import itertools
import json
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import yaml
from numpy.typing import NDArray
from onnx import TensorProto, helper, inliner

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.yardstick import Trace, block_ideal, per_rows

Array = NDArray[Any]
Feed = dict[str, Array]

PARITY_ROWS = (1, 2, 7, 97, 512)  # and 0, where the original takes it
SEEDS = (0, 1)
MACS_AT = 512
# Largest error of a result, relative to the scale of its output.
LARGEST_ERROR = 1e-4
# Errors against float64 up to here are a few units in the last place, whatever the original's own.
ERROR_FLOOR = 5e-7
# Both graphs computed in float64.
ALGEBRA_ERROR = 1e-9
SHARE = 0.97
# Extent of histories of symbolic length.
LENGTH = 11
# Less than this share of the MACs to be saved: nothing to speak of.
NEGLIGIBLE = 0.005


# --- requests -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Input:
    """A graph input with its role, from the roles file.

    Attributes:
        name: The input.
        dtype: Its numpy type.
        dims: Its declared extents; symbolic ones are text.
        level: `request`, `candidate` or `mixed`.
        rows: The axis that runs over candidates; None for one row per request.
        request: Request-level positions of a mixed input.
        axis: The axis that positions count along.
        record: Entries of one candidate where `rows` holds several.
        ranges: `(positions or None, low, high)`.
        length: What to take for extents that are symbolic.
    """

    name: str
    dtype: np.dtype[Any]
    dims: tuple[int | str, ...]
    level: str
    rows: int | None
    request: tuple[int, ...]
    axis: int
    record: int | None
    ranges: tuple[tuple[tuple[int, ...] | None, float, float], ...]
    length: int = LENGTH

    def draw(self, n: int, rng: np.random.Generator) -> Array:
        """Values for n rows, with the axis of rows first and records on the second."""
        shape = [d if isinstance(d, int) else self.length for k, d in enumerate(self.dims) if k != self.rows]
        if self.rows is not None:
            shape = [n, *([self.record] if self.record is not None else []), *shape]
        whole = self.dtype.kind in "iu"
        if self.dtype.kind == "b":
            return rng.integers(0, 2, shape).astype(bool)
        out = np.asarray(rng.integers(0, 2, shape) if whole else rng.uniform(-1, 1, shape), np.float64)
        for positions, low, high in self.ranges:
            index: list[Any] = [slice(None)] * out.ndim
            if positions is not None:
                index[self.position_axis] = list(positions)
            part = out[tuple(index)].shape
            ids = whole or (isinstance(low, int) and isinstance(high, int))
            drawn = rng.integers(math.ceil(low), math.ceil(high), part) if ids else rng.uniform(low, high, part)
            if ids and low == 0 and self.level == "request" and self.record is None and out.ndim == 2 and part[1] > 3:
                # Sequences end in padding; never all of it.
                drawn[:, 0] = np.maximum(drawn[:, 0], 1)
                drawn[:, int(rng.integers(part[1] // 2, part[1] + 1)) :] = 0
            out[tuple(index)] = drawn
        return out.astype(self.dtype)

    @property
    def position_axis(self) -> int:
        """The axis of positions in what `draw` returns."""
        if self.record is not None or self.rows is None:
            return 1 if self.record is not None else self.axis
        return self.axis if self.axis > self.rows else self.axis + 1

    def shaped(self, drawn: Array) -> Array:
        """Brings drawn values into the input's own shape."""
        if self.rows is None:
            return drawn
        return drawn.reshape(-1) if self.record is not None else np.moveaxis(drawn, 0, self.rows)


class Requests:
    """Draws requests that keep to a roles file."""

    def __init__(self, model: onnx.ModelProto, spec: Mapping[str, Any], length: int = LENGTH) -> None:
        known = {t.name for t in model.graph.initializer}
        found = [_input(value, spec) for value in model.graph.input if value.name not in known]
        self.inputs = [replace(i, length=length) for i in found]

    def __call__(self, n: int, seed: int) -> tuple[Feed, Feed]:
        """Inputs of the original, and the same ones as the interface `request` takes them."""
        rng = np.random.default_rng([seed, 17])
        original: Feed = {}
        divided: Feed = {}
        for i in self.inputs:
            once = i.draw(1, rng)
            if i.rows is None:
                original[i.name] = divided[i.name] = once
            elif i.level == "request":
                original[i.name] = i.shaped(np.repeat(once, n, axis=0))
                divided[i.name] = i.shaped(once)
            else:
                values = i.draw(n, rng)
                at = i.position_axis
                if i.level == "candidate":
                    divided[i.name] = i.shaped(values)
                else:
                    rest = [k for k in range(values.shape[at]) if k not in set(i.request)]
                    index: list[Any] = [slice(None)] * values.ndim
                    index[at] = list(i.request)
                    values[tuple(index)] = once[tuple(index)]
                    divided[f"{i.name}.request"] = i.shaped(np.take(once, i.request, at))
                    divided[f"{i.name}.candidate"] = i.shaped(np.take(values, rest, at))
                original[i.name] = i.shaped(values)
        order = np.ascontiguousarray
        return {k: order(v) for k, v in original.items()}, {k: order(v) for k, v in divided.items()}


def _input(value: onnx.ValueInfoProto, spec: Mapping[str, Any]) -> Input:
    kind = value.type.tensor_type
    dims = tuple(d.dim_value if d.dim_value > 0 else d.dim_param or "?" for d in kind.shape.dim)
    entries = spec.get("inputs") or {}
    entry = entries.get(value.name)
    if entry is None:
        entry = next((e for pattern, e in entries.items() if fnmatch.fnmatchcase(value.name, str(pattern))), {})
    entry = {"level": entry} if isinstance(entry, str) else dict(entry)
    for pattern in spec.get("request", ()):
        if fnmatch.fnmatchcase(value.name, pattern):
            entry.setdefault("level", "request")
        elif pattern.startswith(f"{value.name}[") and pattern.endswith("]"):
            entry.setdefault("request", pattern[len(value.name) + 1 : -1])
    rows = entry.get("candidate_axis", spec.get("candidate_axis", 0))
    if rows is not None:
        rows = rows % len(dims) if dims else None
    if rows is not None and dims[rows] == 1:
        rows = None
    ranges = [(None, *entry["range"])] if "range" in entry else []
    ranges += [(_positions(text), *pair) for text, pair in entry.get("ranges", {}).items()]
    axis = entry.get("axis")
    return Input(
        name=value.name,
        dtype=np.dtype(helper.tensor_dtype_to_np_dtype(kind.elem_type)),
        dims=dims,
        level=entry.get("level", "mixed" if "request" in entry else "candidate"),
        rows=rows,
        request=_positions(entry["request"]) if "request" in entry else (),
        axis=axis % len(dims) if axis is not None else (1 - rows if len(dims) == 2 and rows is not None else 0),
        record=entry.get("record"),
        ranges=tuple(ranges),
    )


def _positions(text: Any) -> tuple[int, ...]:
    out: list[int] = []
    for part in itertools.chain(*(str(t).split(",") for t in (text if isinstance(text, list) else [text]))):
        low, _, high = part.partition(":")
        out.extend(range(int(low), int(high) if high else int(low) + 1))
    return tuple(out)


# --- one model ----------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """What is known of one model.

    Attributes:
        model: Its folder and file.
        status: `optimised`, `unchanged`, `WRONG` or `error`.
        message: Why, and anything else worth knowing.
        rules: What applied, with the number of sites.
        optimise_s: Seconds that the optimiser took.
        nodes: Nodes before and after.
        difference: Largest difference from the original by N, relative to the output's scale.
        error_original: Largest error of the original against float64, likewise.
        error_optimised: The same of the result.
        algebra: Largest difference of the two graphs in float64; None unless asked for.
        macs_before: Multiply-adds of the original at 512 candidates.
        macs_after: Those of the result.
        macs_ideal: Those of the block ideal.
        ratio: Time of the original over that of the result, by N.
        time_ms: Median milliseconds of the original and of the result, by N.
        predicted: The optimiser's own prediction of `ratio`.
    """

    model: str
    status: str = "error"
    message: str = ""
    rules: dict[str, int] = field(default_factory=dict)
    optimise_s: float | None = None
    nodes: tuple[int, int] | None = None
    difference: dict[int, float] = field(default_factory=dict)
    error_original: float | None = None
    error_optimised: float | None = None
    algebra: float | None = None
    macs_before: float | None = None
    macs_after: float | None = None
    macs_ideal: float | None = None
    ratio: dict[int, float] = field(default_factory=dict)
    time_ms: dict[int, tuple[float, float]] = field(default_factory=dict)
    predicted: dict[int, float] = field(default_factory=dict)

    @property
    def share(self) -> float | None:
        """What was saved of what the block ideal saves; None where there is next to nothing to save."""
        if self.macs_before is None or self.macs_after is None or self.macs_ideal is None:
            return None
        saving = self.macs_before - self.macs_ideal
        return (self.macs_before - self.macs_after) / saving if saving > NEGLIGIBLE * self.macs_before else None

    @property
    def imprecise(self) -> bool:
        """Whether the result's error is more than twice the original's own."""
        if self.error_original is None or self.error_optimised is None:
            return False
        return self.error_optimised > max(2 * self.error_original, ERROR_FLOOR)


def measure(path: Path, options: argparse.Namespace, say: Callable[[Row], None]) -> Row:
    """Optimises one model and measures the result.

    Args:
        path: The model; its roles lie beside it.
        options: The command line's.
        say: Called with what is known so far, before each step that may take the process down.
    """
    row = Row(f"{path.parent.name}/{path.name}")
    roles = _roles_path(path)
    if roles is None:
        row.message = "no roles file"
        return row
    try:
        with tempfile.TemporaryDirectory() as folder:
            _measure(path, roles, Path(folder) / "optimised.onnx", options, row, say)
    except Exception as error:  # whatever it is, it belongs into the table
        row.status = "WRONG" if type(error).__name__ == "CheckFailed" else "error"
        row.message = "" if row.message.startswith(_DIED) else row.message
        _add(row, f"{type(error).__name__}: {_first_line(error)}")
    return row


def _measure(
    path: Path, roles: Path, out: Path, options: argparse.Namespace, row: Row, say: Callable[[Row], None]
) -> None:
    from onnxrank import optimize
    from onnxrank.roles import load_spec

    row.message = f"{_DIED} optimising"
    say(row)
    begin = time.perf_counter()
    result = optimize(path, spec=load_spec(roles), check=not options.no_check, interface=options.interface)
    row.optimise_s = time.perf_counter() - begin
    result.save(out)
    row.rules = {use.name: use.sites for use in result.report.rules}
    row.predicted = {p.candidates: p.ratio for p in result.report.predictions}
    original, optimised = (onnx.load(p, load_external_data=False) for p in (path, out))
    row.nodes = (len(original.graph.node), len(optimised.graph.node))
    row.status = "optimised" if result.changed else "unchanged"
    row.message = f"{_DIED} measuring"
    say(row)
    row.message = ""
    draw = Requests(original, yaml.safe_load(roles.read_text()), options.length)

    def feeds(n: int, seed: int) -> tuple[Feed, Feed]:
        first, second = draw(n, seed)
        return first, (second if result.changed and options.interface == "request" else first)

    if not result.changed:
        if out.read_bytes() != path.read_bytes():
            raise AssertionError("reported as unchanged, but other bytes were written")
    else:
        _compare(path, out, original, feeds, row)
        if options.algebra:
            _algebra(path, original, load_spec(roles), feeds, row)
    _count(path, out, feeds, row)
    if result.changed and not options.no_time:
        _time(path, out, feeds, options, row)


def _roles_path(path: Path) -> Path | None:
    parts = path.name.removesuffix(".onnx").split(".")
    for k in range(len(parts), 0, -1):
        found = path.with_name(".".join(parts[:k]) + ".roles.yaml")
        if found.exists():
            return found
    return None


def _add(row: Row, text: str) -> None:
    row.message = f"{row.message}; {text}" if row.message else text


def _wrong(row: Row, text: str) -> None:
    row.status = "WRONG"
    _add(row, text)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]


def _session(source: Path | bytes, folder: Path | None = None) -> onnxruntime.InferenceSession:
    """One thread, and onnxruntime's default optimisations."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return onnxruntime.InferenceSession(
        str(source) if isinstance(source, Path) else source, options, providers=["CPUExecutionProvider"]
    )


def _wanted(session: onnxruntime.InferenceSession, feed: Feed) -> Feed:
    names = [i.name for i in session.get_inputs()]
    return {name: feed[name] for name in names}


def _run(session: onnxruntime.InferenceSession, feed: Feed) -> list[Array]:
    return list(session.run(None, _wanted(session, feed)))


# --- parity -------------------------------------------------------------------------------------------------------


def _compare(
    path: Path, out: Path, original: onnx.ModelProto, feeds: Callable[[int, int], tuple[Feed, Feed]], row: Row
) -> None:
    """Holds the result against the original and both against float64; sets the status."""
    before, after = _session(path), _session(out)
    names = [o.name for o in before.get_outputs()]
    if names != [o.name for o in after.get_outputs()]:
        _wrong(row, f"outputs are {[o.name for o in after.get_outputs()]}, not {names}")
        return
    truth: Truth | None = None
    try:
        truth = Truth(original, path.parent)
    except Exception as error:
        _add(row, f"no float64 truth: {_first_line(error)[:80]}")
    results: list[tuple[int, list[Array], list[Array], list[Array] | None]] = []
    for n, seed in itertools.product(PARITY_ROWS, SEEDS):
        first, second = feeds(n, seed)
        try:
            expected = _run(before, first)
        except Exception as error:
            if seed == SEEDS[0]:
                _add(row, f"the original fails at N = {n} (... {_first_line(error)[-60:]})")
            continue
        try:
            got = _run(after, second)
        except Exception as error:
            _wrong(row, f"fails at N = {n}, the original does not: {_first_line(error)}")
            continue
        shapes = [[(str(v.dtype), list(v.shape)) for v in values] for values in (expected, got)]
        if shapes[0] != shapes[1]:
            _wrong(row, f"results are {shapes[1]} at N = {n}, not {shapes[0]}")
            return
        exact = None
        if truth is not None:
            try:
                exact = truth(first, n)
            except Exception as error:
                truth = None
                _add(row, f"no float64 truth: {_first_line(error)[:80]}")
        results.append((n, expected, got, exact))
    shapes_by_rows = {n: [value.shape for value in expected] for n, expected, _, _ in results}
    if 2 in shapes_by_rows and 7 in shapes_by_rows:
        _compare_none(path, out, feeds, shapes_by_rows[2], shapes_by_rows[7], row)
    scales = [
        max((float(np.abs(_finite(r[1][k])).max(initial=0.0)) for r in results), default=0.0) or 1.0
        for k in range(len(names))
    ]
    errors: dict[str, list[float]] = {"original": [], "optimised": []}
    for n, expected, got, exact in results:
        worst = _worst(expected, got, scales)
        row.difference[n] = max(row.difference.get(n, 0.0), worst)
        if exact is not None:
            errors["original"].append(_worst(exact, expected, scales))
            errors["optimised"].append(_worst(exact, got, scales))
    if errors["original"]:
        row.error_original, row.error_optimised = max(errors["original"]), max(errors["optimised"])
    worst = max(row.difference.values(), default=0.0)
    allowed = LARGEST_ERROR if row.error_original is None else max(LARGEST_ERROR, 2 * row.error_original)
    if not results:
        row.status = "error"
        _add(row, "the original runs at no N")
    elif not worst <= 2 * allowed or (row.error_optimised is not None and not row.error_optimised <= allowed):
        _wrong(row, f"differs by {worst:.1e} of the output's scale")
    elif row.imprecise:
        _add(row, "error against float64 more than twice the original's")


def _compare_none(
    path: Path,
    out: Path,
    feeds: Callable[[int, int], tuple[Feed, Feed]],
    at_two: Sequence[tuple[int, ...]],
    at_seven: Sequence[tuple[int, ...]],
    row: Row,
) -> None:
    """Compares at N = 0, in a process of its own: onnxruntime has kernels that do not survive it.

    An original that runs there, but gives results of another form than at any other N, counts as one that does not.
    """
    parent, child = multiprocessing.get_context("fork").Pipe()
    process = multiprocessing.get_context("fork").Process(target=_run_none, args=(path, out, feeds, child))
    process.start()
    child.close()
    found: list[tuple[str, Any]] = []
    with contextlib.suppress(EOFError):
        while len(found) < 2:
            found.append(parent.recv())
    process.join()
    found += [("dies", "")] * (2 - len(found))
    (how, expected), (after, got) = found
    form = [
        tuple(a - 2 * (b - a) // 5 for a, b in zip(x, y, strict=True)) for x, y in zip(at_two, at_seven, strict=True)
    ]
    if how != "runs":
        _add(row, f"the original {how} at N = 0")
    elif [shape for _, shape in expected] != form:
        _add(row, f"the original gives {[list(shape) for _, shape in expected]} at N = 0")
    elif after != "runs":
        _wrong(row, f"{after} at N = 0, the original does not: {got}")
    elif got != expected:
        _wrong(row, f"results are {got} at N = 0, not {expected}")
    else:
        row.difference[0] = 0.0


def _run_none(path: Path, out: Path, feeds: Callable[[int, int], tuple[Feed, Feed]], pipe: Any) -> None:
    """Sends what the original and the result do at N = 0."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    for source, feed in zip((path, out), feeds(0, 0), strict=True):
        try:
            pipe.send(("runs", [(str(value.dtype), value.shape) for value in _run(_session(source), feed)]))
        except Exception as error:
            pipe.send(("fails", _first_line(error)))


def _finite(value: Array) -> Array:
    data = value.astype(np.float64)
    return np.where(np.isfinite(data), data, 0.0)


def _worst(expected: Sequence[Array], got: Sequence[Array], scales: Sequence[float]) -> float:
    """Largest difference relative to the scale of each output; infinite if NaN or infinities differ."""
    worst = 0.0
    for a, b, scale in zip(expected, got, scales, strict=True):
        x, y = a.astype(np.float64), b.astype(np.float64)
        if x.shape != y.shape or not np.array_equal(
            np.nan_to_num(x, nan=7.0) * ~np.isfinite(x), np.nan_to_num(y, nan=7.0) * ~np.isfinite(y)
        ):
            return math.inf
        worst = max(worst, float(np.abs(_finite(a) - _finite(b)).max(initial=0.0)) / scale)
    return worst


class Truth:
    """The original in float64, on onnxruntime or, where that has no kernel, on onnx's slow reference."""

    slow_rows = 100

    def __init__(self, model: onnx.ModelProto, folder: Path) -> None:
        from onnx.reference import ReferenceEvaluator

        double = _in_double(model, folder)
        self._session: onnxruntime.InferenceSession | None = None
        with contextlib.suppress(Exception):
            self._session = _session(double.SerializeToString(), folder)
        self._reference = ReferenceEvaluator(double)

    def __call__(self, feed: Feed, n: int) -> list[Array] | None:
        """Results, or None for too many rows for the reference.

        Raises:
            Exception: Neither can run the model.
        """
        if self._session is not None:
            try:
                return _run(self._session, _double(feed))
            except Exception:
                self._session = None
        if n > self.slow_rows:
            return None
        wanted = set(self._reference.input_names)
        fed = {name: value for name, value in _double(feed).items() if name in wanted}
        return [np.asarray(value) for value in self._reference.run(None, fed)]


def _double(feed: Feed) -> Feed:
    return {k: v.astype(np.float64) if v.dtype.kind == "f" else v for k, v in feed.items()}


def _in_double(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    from onnxrank.runtime import retype

    whole = inliner.inline_local_functions(model) if model.functions else model
    return retype(whole, TensorProto.DOUBLE, folder)


def _algebra(
    path: Path,
    original: onnx.ModelProto,
    spec: Mapping[str, Any],
    feeds: Callable[[int, int], tuple[Feed, Feed]],
    row: Row,
) -> None:
    """Optimises the float64 form of the model, where a wrong rule cannot hide behind rounding."""
    from onnxrank import optimize

    try:
        double = _in_double(original, path.parent)
        before = _session(double.SerializeToString(), path.parent)
        _run(before, _double(feeds(2, 0)[0]))
    except Exception:
        _add(row, "no algebra: onnxruntime lacks a float64 kernel")
        return
    result = optimize(double, spec=spec, check=False)
    if not result.changed:
        _add(row, "no algebra: the float64 form is left alone")
        return
    after = _session(result.model.SerializeToString(), path.parent)
    worst = 0.0
    for n, seed in itertools.product((2, 17), SEEDS):
        first, second = feeds(n, seed)
        expected, got = _run(before, _double(first)), _run(after, _double(second))
        scales = [float(np.abs(_finite(a)).max(initial=0.0)) or 1.0 for a in expected]
        worst = max(worst, _worst(expected, got, scales))
    row.algebra = worst
    if not worst <= ALGEBRA_ERROR:
        _wrong(row, f"differs by {worst:.1e} in float64")


# --- cost ---------------------------------------------------------------------------------------------------------


def _count(path: Path, out: Path, feeds: Callable[[int, int], tuple[Feed, Feed]], row: Row) -> None:
    try:
        before, after = Trace(path), Trace(out)
        once, each = per_rows(before, lambda n: feeds(n, 0)[0])
        row.macs_before = once + MACS_AT * each
        once, each = per_rows(after, lambda n: feeds(n, 0)[1])
        row.macs_after = once + MACS_AT * each
        once, each = block_ideal(before, lambda n, seed: feeds(n, seed)[0])
        row.macs_ideal = once + MACS_AT * each
    except Exception as error:
        _add(row, f"MACs not counted: {type(error).__name__}: {_first_line(error)[:120]}")


def _time(
    path: Path,
    out: Path,
    feeds: Callable[[int, int], tuple[Feed, Feed]],
    options: argparse.Namespace,
    row: Row,
) -> None:
    """Medians of interleaved runs."""
    sessions = (_session(path), _session(out))
    for n in options.candidates:
        try:
            pair = [_wanted(s, feed) for s, feed in zip(sessions, feeds(n, 0), strict=True)]
            seconds: list[list[float]] = [[], []]
            for _ in range(3):
                _interleave(sessions, pair, seconds)
            once = min(seconds[0]) + min(seconds[1])
            repeats = options.repeats or min(max(round(options.seconds / once), 7), 4000)
            seconds = [[], []]
            for _ in range(repeats):
                _interleave(sessions, pair, seconds)
        except Exception as error:
            _add(row, f"not timed at N = {n}: {_first_line(error)[:120]}")
            continue
        first, second = (float(np.median(s)) for s in seconds)
        row.time_ms[n] = (first * 1e3, second * 1e3)
        row.ratio[n] = first / second


def _interleave(
    sessions: Sequence[onnxruntime.InferenceSession], pair: Sequence[Feed], seconds: Sequence[list[float]]
) -> None:
    for session, feed, spent in zip(sessions, pair, seconds, strict=True):
        begin = time.perf_counter()
        session.run(None, feed)
        spent.append(time.perf_counter() - begin)


# --- the table ----------------------------------------------------------------------------------------------------


def columns(rows: Sequence[Row], candidates: Sequence[int]) -> list[list[str]]:
    """The table as text, its heading first."""
    times = [n for n in candidates if any(n in row.ratio for row in rows)]
    exact = any(row.algebra is not None for row in rows)
    heading = ["model", "status", "rules", "difference", "error64", "original's"]
    heading += ["algebra"] if exact else []
    heading += ["MACs", "after", "ideal", "saved share"]
    heading += [f"time x N={n}" for n in times] + ["seconds", "message"]
    table = [heading]
    for row in rows:
        line = [row.model, row.status, " ".join(f"{k}:{v}" for k, v in row.rules.items()) or "-"]
        line += [_number(max(row.difference.values(), default=None), ".0e")]
        line += [_number(row.error_optimised, ".0e"), _number(row.error_original, ".0e")]
        line += [_number(row.algebra, ".0e")] if exact else []
        line += [_millions(row.macs_before), _relative(row.macs_after, row), _relative(row.macs_ideal, row)]
        line += [_number(row.share, ".3f")]
        line += [_number(row.ratio.get(n), ".2f") for n in times]
        line += [_number(row.optimise_s, ".1f"), row.message[:120]]
        table.append(line)
    return table


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _millions(value: float | None) -> str:
    return "-" if value is None else f"{value / 1e6:.4g}M"


def _relative(value: float | None, row: Row) -> str:
    """Multiply-adds relative to the original's."""
    return "-" if value is None or not row.macs_before else f"{value / row.macs_before:.3f}"


def as_text(table: Sequence[Sequence[str]]) -> str:
    """Aligned columns."""
    widths = [max(len(line[k]) for line in table) for k in range(len(table[0]) - 1)]
    return "\n".join(
        "  ".join([*(cell.ljust(w) for cell, w in zip(line[:-1], widths, strict=True)), line[-1]]).rstrip()
        for line in table
    )


def as_markdown(table: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    """A table, and the notes as a list."""
    lines = [[cell.replace("|", "\\|") for cell in line] for line in table]
    head = f"| {' | '.join(lines[0])} |\n|{'---|' * len(lines[0])}"
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines[1:])
    return f"{head}\n{body}\n\n" + "".join(f"- {note}\n" for note in notes)


def summary(rows: Sequence[Row], candidates: Sequence[int]) -> Iterator[str]:
    """What the whole table says."""
    counts = Counter(row.status for row in rows)
    yield f"{len(rows)} models: " + ", ".join(f"{n} {status}" for status, n in counts.most_common())
    failed: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.status in ("WRONG", "error"):
            failed.setdefault((row.status, row.message), []).append(row.model)
    for (status, message), models in failed.items():
        yield f"{status}: {', '.join(models)}: {message}"
    imprecise = [row.model for row in rows if row.imprecise]
    yield f"error against float64 more than twice the original's: {_listed(imprecise)}"
    shares = [(row.share, row.model) for row in rows if row.share is not None]
    low = [f"{model} {share:.3f}" for share, model in sorted(shares) if share < SHARE]
    yield f"saved share below {SHARE}: {_listed(low)} (of {len(shares)} with anything to save)"
    changed = [row for row in rows if row.ratio]
    slow = [f"{row.model} {r:.2f} at N = {n}" for row in changed for n, r in row.ratio.items() if n >= 32 and r < 1]
    if changed:
        yield f"slower than the original at N >= 32: {_listed(slow)}"
    for n in candidates:
        ratios = [row.ratio[n] for row in changed if n in row.ratio]
        if ratios:
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            yield f"time ratio at N = {n}: geometric mean {mean:.2f} over {len(ratios)} optimised models, " + (
                f"least {min(ratios):.2f}, most {max(ratios):.2f}"
            )


def _listed(items: Sequence[str]) -> str:
    return f"{len(items)}: {', '.join(items)}" if items else "none"


# --- the command line ---------------------------------------------------------------------------------------------


def _in_process(path: Path, arguments: Sequence[str], limit: float) -> Row:
    """Measures one model in a process of its own."""
    command = [sys.executable, __file__, *arguments, "--worker", str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
        output, how = done.stdout, f"exit code {done.returncode}: {(done.stderr.strip().splitlines() or [''])[-1]}"
        finished = done.returncode == 0
    except subprocess.TimeoutExpired as expired:
        output = expired.stdout.decode() if isinstance(expired.stdout, bytes) else expired.stdout or ""
        how, finished = f"not done after {limit:.0f} s", False
    row = Row(f"{path.parent.name}/{path.name}")
    for line in output.splitlines():
        if line.startswith(_MARK):
            row = _from_json(line.removeprefix(_MARK))
    if not finished:
        row.status = "error"
        _add(row, how)
    return row


_MARK = "row: "
_DIED = "the process died while"


def _to_json(row: Row) -> str:
    return json.dumps(asdict(row))


def _finite_only(value: Any) -> Any:
    """JSON has no infinity."""
    if isinstance(value, dict):
        return {k: _finite_only(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite_only(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _from_json(text: str) -> Row:
    data = json.loads(text)
    for key in ("difference", "ratio", "time_ms", "predicted"):
        data[key] = {int(k): tuple(v) if isinstance(v, list) else v for k, v in data[key].items()}
    data["nodes"] = tuple(data["nodes"]) if data["nodes"] else None
    return Row(**data)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="a folder of models, or one model")
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--markdown", type=Path, metavar="OUT")
    parser.add_argument("--only", default="*", metavar="GLOB", help="on file names")
    parser.add_argument("--candidates", type=_numbers, default=[1, 32, 512, 2048], metavar="N,N", help="for the times")
    parser.add_argument("--repeats", type=int, help="timed runs; as many as fit into --seconds if not given")
    parser.add_argument("--seconds", type=float, default=2.0, help="for the times, per N")
    parser.add_argument("--no-time", action="store_true")
    parser.add_argument("--no-check", action="store_true", help="without the optimiser's own check")
    parser.add_argument("--algebra", action="store_true", help="compare in float64 as well")
    parser.add_argument("--interface", choices=("request", "same"), default="request")
    parser.add_argument("--length", type=int, default=LENGTH, help="of histories of symbolic length")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time; 1 if times matter")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds for one model")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:

        def say(row: Row) -> None:
            print(_MARK + _to_json(row), flush=True)

        say(measure(options.worker, options, say))
        return 0
    paths: list[Path] = []
    for folder in options.folders:
        paths += sorted(folder.glob("*.onnx")) if folder.is_dir() else [folder]
    paths = [path for path in paths if fnmatch.fnmatch(path.name, options.only)]
    if not paths:
        parser.error("no models found")
    passed = [f"--{flag}" for flag in ("no-time", "no-check", "algebra") if getattr(options, flag.replace("-", "_"))]
    passed += ["--candidates", ",".join(map(str, options.candidates)), "--interface", options.interface]
    passed += ["--seconds", str(options.seconds)] + (["--repeats", str(options.repeats)] if options.repeats else [])
    rows: list[Row] = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for row in pool.map(lambda path: _in_process(path, passed, options.limit), paths):
            rows.append(row)
            share, ratios = _number(row.share, ".3f"), " ".join(f"{n}:{r:.2f}x" for n, r in row.ratio.items())
            text = f"{row.model}: {row.status}, saved share {share} {ratios}".rstrip()
            print(text + (f" ({row.message})" if row.message else ""), file=sys.stderr, flush=True)
    table, notes = columns(rows, options.candidates), list(summary(rows, options.candidates))
    print(as_text(table), *notes, sep="\n")
    if options.json is not None:
        body = {"models": [{**asdict(row), "share": row.share} for row in rows], "summary": notes}
        options.json.write_text(json.dumps(_finite_only(body), indent=1, allow_nan=False) + "\n")
    if options.markdown is not None:
        options.markdown.write_text(as_markdown(table, notes))
    return 1 if any(row.status in ("WRONG", "error") for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
