"""The models of models/onnx as runtimes, quantisers and converters leave them: optimised, and held against theirs.

Every model is saved by onnxruntime's own optimiser, quantised dynamically and statically, and converted to 16-bit
floats and to other opsets. Each variant that onnxruntime runs must be optimised, or left alone with remarks; none may
be wrong, and none may be refused.

    python scripts/variants.py [--models 'din*'] [--variants 'ort-*,qdq'] [--check standard] [--show]
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import logging
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import yaml
from onnx import version_converter
from onnxruntime import quantization
from onnxruntime.transformers.float16 import convert_float_to_float16

import onnxrank
from onnxrank.errors import OnnxrankError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.coverage import Requests

COUNTS = (1, 3, 700)
OPSETS = range(13, 24)
SENSITIVE = ["Softmax", "LayerNormalization", "ReduceMean", "ReduceSum", "Pow", "Sqrt", "Exp", "GRU"]
"""Operators that are usually left in 32 bits."""
TOLERANCE = {"fp16": 2e-2, "q": 5e-2}
"""Largest difference relative to the scores' scale, by the first letters of a variant; 1e-4 for others."""

Make = Callable[[Path, Path, Requests], None]
"""Writes a variant of a model, given requests for it."""


class Requesting(quantization.CalibrationDataReader):
    """Requests to calibrate with.

    Args:
        requests: Draws them.
    """

    def __init__(self, requests: Requests) -> None:
        self._left = iter([requests(16, seed)[0] for seed in range(4)])

    def get_next(self) -> dict[str, Any] | None:
        """The next one; None at the end."""
        return next(self._left, None)


def saved_by_runtime(level: str) -> Make:
    """The model as onnxruntime's optimiser leaves it."""

    def make(source: Path, out: Path, requests: Requests) -> None:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
        options.optimized_model_filepath = str(out)
        options.log_severity_level = 4
        onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])

    return make


def quantised(source: Path, out: Path, requests: Requests) -> None:
    """The model with weights of 8 bits, and activations quantised as they come."""
    quantization.quantize_dynamic(str(source), str(out))


def calibrated(form: quantization.QuantFormat) -> Make:
    """The model with weights and activations of 8 bits."""

    def make(source: Path, out: Path, requests: Requests) -> None:
        quantization.quantize_static(str(source), str(out), Requesting(requests), quant_format=form)

    return make


def halved(**how: Any) -> Make:
    """The model in 16 bits, as a whole or in part."""

    def make(source: Path, out: Path, requests: Requests) -> None:
        onnx.save(convert_float_to_float16(onnx.load(source), **how), out)

    return make


def converted(opset: int) -> Make:
    """The model in another opset."""

    def make(source: Path, out: Path, requests: Requests) -> None:
        onnx.save(version_converter.convert_version(onnx.load(source), opset), out)

    return make


VARIANTS: Mapping[str, Make] = {
    "plain": lambda source, out, requests: onnx.save(onnx.load(source), out),
    "ort-basic": saved_by_runtime("ORT_ENABLE_BASIC"),
    "ort-extended": saved_by_runtime("ORT_ENABLE_EXTENDED"),
    "ort-all": saved_by_runtime("ORT_ENABLE_ALL"),
    "q-dynamic": quantised,
    "q-qdq": calibrated(quantization.QuantFormat.QDQ),
    "q-operator": calibrated(quantization.QuantFormat.QOperator),
    "fp16": halved(),
    "fp16-io": halved(keep_io_types=True),
    "fp16-blocks": halved(keep_io_types=True, op_block_list=SENSITIVE),
    **{f"opset-{n}": converted(n) for n in OPSETS},
}


@dataclass(frozen=True)
class Outcome:
    """What became of one variant of one model.

    Attributes:
        what: `optimised`, `left alone`, `wrong`, `lost` (refused), or `error` (of onnxrank's own); `not made` or
            `not run` where there is no such variant.
        why: Details.
        saved: Share of multiply-adds that is saved.
        error: Largest difference relative to the scores' scale.
        seconds: Time to optimise.
    """

    what: str
    why: str = ""
    saved: float = 0.0
    error: float = 0.0
    seconds: float = 0.0

    @property
    def bad(self) -> bool:
        """Whether it must not be."""
        return self.what in ("wrong", "lost", "error")


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without what converters have to say."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def outcome(source: Path, variant: str, folder: Path, check: str) -> Outcome:
    """Makes a variant, optimises it, and holds the result against it."""
    spec = yaml.safe_load((source.parent / f"{source.name.split('.')[0]}.roles.yaml").read_text())
    requests = Requests(onnx.load(source), spec)
    made = folder / f"{source.stem}.{variant}.onnx"
    try:
        with quietly():
            VARIANTS[variant](source, made, requests)
    except Exception as e:  # whatever converters raise
        return Outcome("not made", first_line(e))
    try:
        requests = Requests(onnx.load(made), spec)
        wanted = {n: answer(made.read_bytes(), requests(n, n)[0]) for n in COUNTS}
    except Exception as e:
        return Outcome("not run", first_line(e))
    start = time.monotonic()
    try:
        result = onnxrank.optimize(made, spec=spec, check=check)
    except OnnxrankError as e:
        return Outcome("lost", f"exit code {e.exit_code}: {e}")
    except Exception:
        return Outcome("error", traceback.format_exc(limit=-3))
    seconds = time.monotonic() - start
    report = result.report
    why = "; ".join([*report.notes, *(f"{r.rule} {r.node}: {r.reason}" for r in report.refusals)])
    if not result.changed:
        return Outcome("left alone", why or "(silent)", seconds=seconds)
    try:
        error = max(differ(wanted[n], answer(result.model.SerializeToString(), requests(n, n)[1])) for n in COUNTS)
    except Exception as e:
        return Outcome("wrong", f"the result does not run: {first_line(e)}")
    allowed = next((t for start, t in TOLERANCE.items() if variant.startswith(start)), 1e-4)
    saved = 1 - report.macs_after / max(report.macs_before, 1)
    return Outcome("optimised" if error <= allowed else "wrong", why, saved, error, seconds)


def answer(model: bytes, feed: Mapping[str, Any]) -> list[Any]:
    """The scores of a model."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    types = {"tensor(float16)": np.float16, "tensor(float)": np.float32}
    return list(
        session.run(
            None, {i.name: feed[i.name].astype(types.get(i.type, feed[i.name].dtype)) for i in session.get_inputs()}
        )
    )


def differ(before: Sequence[Any], after: Sequence[Any]) -> float:
    """Largest difference between scores, relative to their scale; infinite where shapes or types differ."""
    worst = 0.0
    for a, b in zip(before, after, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype or np.isnan(a).any() != np.isnan(b).any():
            return float("inf")
        a, b = a.astype(np.float64), b.astype(np.float64)
        worst = max(worst, float(np.abs(a - b).max(initial=0)) / max(float(np.abs(a).max(initial=0)), 1e-6))
    return worst


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def table(found: Mapping[str, Mapping[str, Outcome]]) -> Iterator[str]:
    """Per variant what became of the models, and what is saved of what is saved of the plain ones."""
    kinds = ("optimised", "left alone", "wrong", "lost", "error")
    heads = "".join(f"{kind:>11}" for kind in kinds)
    yield f"{'variant':14} {'made':>5}{heads}  saved  of plain    worst  seconds"
    plain = found.get("plain", {})
    for variant, outcomes in found.items():
        made = {m: o for m, o in outcomes.items() if o.what not in ("not made", "not run")}
        counts = Counter(o.what for o in made.values())
        numbers = "".join(f"{counts[kind]:11}" for kind in kinds)
        saved, could = (sum(o.saved for o in of) for of in (made.values(), (plain[m] for m in made if m in plain)))
        yield (
            f"{variant:14} {len(made):5}{numbers} {saved / max(len(made), 1):6.1%} "
            f"{saved / could if could else float('nan'):9.1%} {max((o.error for o in made.values()), default=0):8.1e} "
            f"{sum(o.seconds for o in made.values()):8.1f}"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(__file__).resolve().parents[1] / "models" / "onnx")
    parser.add_argument("--models", default="*", help="pattern on the names of models")
    parser.add_argument("--variants", default="*", help="patterns on the names of variants, separated by commas")
    parser.add_argument("--check", default="standard", help="how thoroughly onnxrank checks")
    parser.add_argument("--keep", type=Path, help="folder for the variants")
    parser.add_argument("--show", action="store_true", help="print every model, not only what fails")
    options = parser.parse_args(arguments)
    wanted = [v for v in VARIANTS if any(fnmatch.fnmatch(v, p) for p in options.variants.split(","))]
    found: dict[str, dict[str, Outcome]] = defaultdict(dict)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        for source in sorted(options.folder.glob(f"{options.models}.onnx")):
            for variant in wanted:
                o = found[variant][source.stem] = outcome(source, variant, folder, options.check)
                if options.show or o.bad:
                    numbers = f"saved {o.saved:.0%}, differs by {o.error:.1e}, {o.seconds:.1f} s"
                    print(f"{source.stem} {variant}: {o.what}, {numbers}: {o.why[:1000]}", flush=True)
    print("\n".join(table(found)))
    return int(any(o.bad for outcomes in found.values() for o in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
