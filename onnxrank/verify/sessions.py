"""The sessions of both models: in which precision, with which provider and optimisations, and when they are made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from onnxrank import runtime
from onnxrank.errors import ModelError
from onnxrank.verify.options import LEVELS, Options
from onnxrank.verify.side import Side, open_both
from onnxrank.workers import Crashed

if TYPE_CHECKING:
    from onnxrank.verify.engine import Engine

_TRUTH = "float64"


def begin(engine: Engine) -> None:
    """Has sessions made while the rest is done, where it is known which and where they fit into memory."""
    if not any(s.large or runtime.has_half(s.proto) for s in engine.sides):
        for side in engine.sides:
            open_ahead(side, engine.options)


def open_ahead(side: Side, options: Options) -> None:
    """Has the sessions of a model made that it is compared in, without anybody waiting; what takes longest first."""
    optimised = [(provider, LEVELS[-1]) for provider in options.providers]
    others = [(provider, level) for provider in options.providers for level in LEVELS[:-1]]
    for provider, level in optimised:
        side.ahead(f"{provider}/{level}", **_settings(options, provider, level, "own"))
    side.ahead(_TRUTH, precision="double")
    for provider, level in others:
        side.ahead(f"{provider}/{level}", **_settings(options, provider, level, "own"))


def settings(engine: Engine, provider: str, level: str) -> dict[str, Any]:
    """How a session is made."""
    return _settings(engine.options, provider, level, engine.precision)


def _settings(options: Options, provider: str, level: str, precision: str) -> dict[str, Any]:
    return {"provider": provider, "level": level, "precision": precision, "tf32": options.tf32}


def opened(engine: Engine, provider: str, level: str) -> bool:
    """Makes a session of each model; whether the second model loads."""
    how = settings(engine, provider, level)
    where = f"({provider}, optimisations {level})"
    first, second = open_both(engine.sides, f"{provider}/{level}", **how)
    if isinstance(first, Crashed):
        raise ModelError(f"The original makes onnxruntime fail while it is loaded {where}: {first}.") from first
    if isinstance(first, ModelError):
        raise ModelError(f"The original does not load {where}: {first}.") from first
    if isinstance(second, Crashed):
        engine.crashed("structure", engine.optimized, f"while it was loaded {where}", second)
        return False
    if isinstance(second, ModelError):
        message = f"onnxruntime does not load it {where}: {second}"
        engine.report.find("structure", "runtime", message, model="optimized")
        return False
    for trouble in (first, second):
        if trouble is not None:
            raise trouble
    return True


def find_precision(engine: Engine) -> None:
    """Models with 16-bit floats that the runtime has no kernels for here are compared in float32.

    That is told by the original: where it runs as it is, the other one must run as it is too.
    """
    if not any(runtime.has_half(s.proto) for s in engine.sides):
        return
    how = {"provider": engine.options.providers[0], "level": "disabled"}
    for side in engine.sides:
        try:
            side.open("try", precision="own", **how)
            if side is engine.original and runtime.has_half(side.proto):
                return
        except Crashed:
            return
        except ModelError:
            engine.precision = "float"
            engine.report.find(
                "rounding",
                "precision",
                "onnxruntime has no 16-bit kernels here for these models: they were compared in float32.",
                "note",
            )
            return


def open_truth(engine: Engine) -> bool:
    """Makes float64 sessions of both models; whether there are such."""
    for side, trouble in zip(engine.sides, open_both(engine.sides, _TRUTH, precision="double"), strict=True):
        if trouble is not None:
            engine.no_truth(side, trouble)
            return False
    return True
