"""What is found out before any scores are compared: what was asked for, whether there is anything to compare, and how.

`agreed` reads the contract, `comparable` what can be told without scores: the interfaces, ONNX's checker, tables.
"""

from __future__ import annotations

import difflib
import platform
from typing import TYPE_CHECKING, Any

from onnxrank.contract import stored_contract
from onnxrank.errors import UsageError
from onnxrank.verify import structure, tables
from onnxrank.verify.pairing import Terms, terms
from onnxrank.verify.report import Severity
from onnxrank.verify.side import MODEL, Side
from onnxrank.verify.words import listed
from onnxrank.workers import Crashed

if TYPE_CHECKING:
    from onnxrank.verify.engine import Engine


def agreed(engine: Engine) -> Terms:
    """What the inputs of both models mean.

    Raises:
        UsageError: The models are the wrong way round, or limits are for outputs that are not there.
    """
    _not_swapped(engine)
    _limits_known(engine)
    return _terms(engine)


def comparable(engine: Engine) -> bool:
    """Tells of the structure of both models what is wrong with it; whether the second one can be run at all."""
    _environment(engine)
    fed = structure.inspect(engine.original.loaded, engine.optimized.loaded, engine.binding, engine.report)
    _tables(engine)
    _trusted_rows(engine)
    engine.say("checking the structure")
    return _check(engine) and fed


def _not_swapped(engine: Engine) -> None:
    stored = stored_contract(engine.original.proto) or {}
    if stored.get("source_sha256") == engine.optimized.loaded.sha256 != engine.original.loaded.sha256:
        names = [s.loaded.path or f"the {s.name} model" for s in engine.sides]
        raise UsageError(
            f"The arguments are swapped: {names[0]} was made of {names[1]}, so the original is the latter and goes "
            "first."
        )


def _limits_known(engine: Engine) -> None:
    for what, limits in (("--rtol", engine.options.rtol), ("--atol", engine.options.atol)):
        for name in limits:
            if name is not None and name not in engine.names:
                near = difflib.get_close_matches(name, engine.names, 1)
                hint = f"Did you mean {near[0]!r}?" if near else f"They are {', '.join(map(repr, engine.names[:8]))}."
                raise UsageError(f"{what} names {name!r}, which is no output of the original. {hint}")


def _terms(engine: Engine) -> Terms:
    o = engine.options
    original, optimized = engine.original.proto, engine.optimized.proto
    found = terms(original, optimized, o.request, o.spec, o.roles)
    for note in found.notes:
        engine.report.find("structure", "contract", f"{note[0].upper()}{note[1:]}.", "warning")
    told = not (o.request or o.spec or o.roles) and found.source.startswith("told")
    if told and all(r.level == "candidate" for r in found.roles.inputs.values()):
        engine.report.find(
            "structure",
            "contract",
            "Nothing says that an input is the same for all candidates of a request, so all of them were varied. "
            "Name such inputs with --request or --roles.",
            "note",
        )
    engine.report.contract = {"source": found.source, **found.roles.to_dict()}
    return found


def _environment(engine: Engine) -> None:
    # The original's process is asked, so that a runtime that cannot be loaded is not met here.
    about = engine.original.call("available")
    cuda = "cuda" in engine.options.providers
    engine.report.environment = {
        "onnxrank": engine.report.version,
        "onnxruntime": about["version"],
        "providers": list(engine.options.providers),
        "available": about["providers"],
        "tf32": ("on" if engine.options.tf32 else "off") if cuda else "not used",
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


def _check(engine: Engine) -> bool:
    """ONNX's own checker on both; whether the second model is one."""
    before = _calmly(engine, engine.original, "check", key=MODEL)
    after = _calmly(engine, engine.optimized, "check", key=MODEL)
    if before is None or after is None:
        return False
    if "error" in after:
        severity: Severity = "warning" if "error" in before else "error"
        engine.report.find(
            "structure",
            "checker",
            f"Not valid ONNX: {after['error']}",
            severity,
            model="optimized",
        )
        return severity != "error"
    if "inference" in after and not before:
        engine.report.find(
            "structure",
            "checker",
            f"Its declared types or shapes contradict each other: {after['inference']}",
            model="optimized",
        )
    return True


def _calmly(engine: Engine, side: Side, do: str, **arguments: Any) -> Any:
    """Has a model do something; a crash becomes a finding, and None is returned."""
    try:
        return side.call(do, **arguments)
    except Crashed as e:
        engine.crashed("structure", side, f"in {do}", e)
        return None


def _tables(engine: Engine) -> None:
    """Compares embedding tables row by row."""
    first, second = engine.original.loaded, engine.optimized.loaded
    if structure.changes_precision(first.proto, second.proto):
        return
    engine.changed, lost = tables.changed(first, second)
    for c in engine.changed:
        engine.report.find("structure", "tables", c.says, "warning", model="optimized")
    if lost and not structure.made_of(first, second):
        what = "embedding table" if len(lost) == 1 else "embedding tables"
        engine.report.unseen.append(
            f"rows of the {what} {listed(lost)} that no generated id met: the optimized model has none of its type, "
            "shape and content"
        )


def _trusted_rows(engine: Engine) -> None:
    """Tells of requests that the roles rule out although the second model takes them."""
    if engine.known is not None:  # by whoever rewrote the model, and put its guard there
        return
    whole = [
        i.name
        for i in engine.binding.declared
        if i.role.level != "candidate" and i.role.candidate_axis is not None
        if (i.name, False) in engine.binding.sources.values()
    ]
    if whole:
        engine.report.find(
            "structure",
            "contract",
            "Calls whose rows differ where roles say that they are the same were not looked at: the optimized "
            f"model takes all rows of {listed(whole)}.",
            "note",
        )
