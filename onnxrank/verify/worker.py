"""The process that runs a model on behalf of another, which tells it what to do over its pipes.

Whatever a model makes the runtime do (crash, hang, fill the memory) ends here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper

from onnxrank import runtime
from onnxrank.errors import EnvironmentProblem, ModelError, OnnxrankError
from onnxrank.model import flattened
from onnxrank.verify import wire
from onnxrank.verify.truth import Truth, rounded

CPU = "CPUExecutionProvider"
_TOO_MUCH = {"error": "it needs more memory than its process may use", "code": ModelError.exit_code}
NAMES = {"cpu": CPU, "cuda": "CUDAExecutionProvider"}
"""Execution providers by the names that the command line has for them."""


class Host:
    """Models and sessions by key."""

    def __init__(self) -> None:
        self._models: dict[str, tuple[ModelProto, str | None]] = {}
        self._flat: dict[str, ModelProto] = {}
        self._sessions: dict[str, Any] = {}

    def reset(self) -> None:
        """Forgets everything."""
        self.__init__()  # type: ignore[misc]

    def limit(self, memory: int | None) -> None:
        """Limits the address space.

        Args:
            memory: Bytes; None for no limit.
        """
        try:
            import resource
        except ImportError:  # Windows has no such limit
            return
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        soft = hard if memory is None else memory if hard == resource.RLIM_INFINITY else min(memory, hard)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))

    def model(self, key: str, data: bytes, folder: str | None) -> None:
        """Takes a model."""
        self._models[key] = (ModelProto.FromString(data), folder)
        self._flat.pop(key, None)

    def check(self, key: str) -> dict[str, str]:
        """What ONNX's own checker objects to: `error`, and `inference`, what only its strict shape inference does."""
        from onnxrank.model import without_external

        model = without_external(self._models[key][0])
        found = {}
        for name, full in (("error", False), ("inference", True)):
            try:
                onnx.checker.check_model(model, full_check=full)
            except Exception as e:
                found[name] = runtime.first_line(e)
                break
        return found

    def study(self, key: str, roles: Mapping[str, Any], sha256: str, size: int) -> dict[str, Any]:
        """Shapes and ranges of the inputs of a ranker: what `feeds.Maker` needs to make more."""
        from pathlib import Path

        from onnxrank.model import LoadedModel
        from onnxrank.roles import Roles
        from onnxrank.study import Study

        flat, folder = self._flattened(key)
        where = None if folder is None else Path(folder)
        study = Study(flat, Roles.from_dict(roles), LoadedModel(flat, None, where, sha256, size, ()))
        return {
            "ranges": {k: list(v) for k, v in (study.maker.ranges or {}).items()},
            "symbols": study.symbols,
            "note": study.facts.note,
        }

    def open(
        self,
        session: str,
        key: str,
        provider: str = "cpu",
        level: str = "all",
        precision: str = "own",
        tf32: bool = False,
        to: int = TensorProto.FLOAT16,
    ) -> dict[str, Any]:
        """Makes a session.

        Args:
            session: Its key.
            key: The model.
            provider: `cpu` or `cuda`.
            level: ORT's graph optimisations, `disabled` or `all`.
            precision: `own`, `float` (16-bit types raised), `double` (all floats raised) or `rounded` (the same, but
                weights rounded to `to` before).
            to: ONNX element type.
            tf32: Whether a GPU may round the operands of float32 products to 10 bits.

        Raises:
            ModelError: The runtime does not take it.
            EnvironmentProblem: The provider is not there, or the session fell back to another.
        """
        flat, folder = self._flattened(key)
        if precision in ("double", "rounded"):
            truth = Truth(flat if precision == "double" else rounded(flat, to, folder), folder)
            self._sessions[session] = truth
            return {"how": truth.how}
        model = flat if precision == "own" else runtime.retype(flat, TensorProto.FLOAT, folder)
        wanted = NAMES[provider]
        if provider != "cpu" and wanted not in runtime.onnxruntime().get_available_providers():
            raise EnvironmentProblem(
                f"onnxruntime has no {wanted} here, so nothing can be said of it: install 'onnxrank[cuda]' on a "
                "machine with a GPU, or leave --ep at cpu."
            )
        options = [(wanted, {"use_tf32": str(int(tf32))})] if provider == "cuda" else [wanted]
        made = runtime.session(model, folder, providers=options, optimise=level == "all")
        if made.get_providers()[0] != wanted:
            raise EnvironmentProblem(
                f"The session silently fell back from {wanted} to {made.get_providers()[0]}: the provider is installed "
                "but does not work here (see its driver and libraries), so nothing can be said of it."
            )
        made.disable_fallback()  # from a provider that fails while it runs
        self._sessions[session] = made
        return {"how": "onnxruntime"}

    def close(self, session: str) -> None:
        """Forgets a session."""
        self._sessions.pop(session, None)

    def run(self, session: str, feeds: Sequence[Mapping[str, Any]], outputs: Sequence[str]) -> list[dict[str, Any]]:
        """Runs a session on several feeds.

        Returns:
            Per feed `{"outputs": {name: array}}` or `{"error": message}`.
        """
        made = self._sessions[session]
        answers: list[dict[str, Any]] = []
        for feed in feeds:
            try:
                out = made.run(feed, outputs) if isinstance(made, Truth) else runtime.run(made, feed, outputs)
            except ModelError as e:
                answers.append({"error": str(e)})
                continue
            arrays = {k: _as_array(v) for k, v in out.items()}
            other = next((k for k, v in arrays.items() if v is None), None)
            answers.append({"outputs": arrays} if other is None else {"error": f"output {other!r} is no tensor"})
        return answers

    def expose(self, key: str, of: str, names: Sequence[str]) -> None:
        """Makes a model of which further tensors are outputs: `key`, from the model `of`."""
        flat, folder = self._flattened(of)
        out = ModelProto()
        out.CopyFrom(flat)
        have = {o.name for o in out.graph.output}
        out.graph.output.extend(helper.make_empty_tensor_value_info(n) for n in names if n not in have)
        self._models[key] = (out, folder)
        self._flat[key] = out

    def inlined(self, key: str) -> bytes:
        """The model without functions of its own, serialised."""
        data: bytes = self._flattened(key)[0].SerializeToString(deterministic=True)
        return data

    def raised(self, key: str) -> bytes:
        """The model in float64, serialised."""
        flat, folder = self._flattened(key)
        data: bytes = runtime.retype(flat, TensorProto.DOUBLE, folder).SerializeToString(deterministic=True)
        return data

    def available(self) -> dict[str, Any]:
        """Version and providers of the runtime."""
        ort = runtime.onnxruntime()
        return {"version": ort.__version__, "providers": list(ort.get_available_providers())}

    def _flattened(self, key: str) -> tuple[ModelProto, str | None]:
        """The model with its functions inlined."""
        model, folder = self._models[key]
        if key not in self._flat:
            self._flat[key] = flattened(model)
        return self._flat[key], folder


def _as_array(value: Any) -> NDArray[Any] | None:
    """An output as an array: maps as rows, sequences of tensors row by row side by side; None for other kinds."""
    if isinstance(value, (np.ndarray, np.generic)):
        return np.asarray(value)
    if not isinstance(value, list):
        return None
    if value and all(isinstance(v, dict) for v in value):
        return np.array([[v[k] for k in sorted(v)] for v in value])
    if not value or not all(isinstance(v, np.ndarray) for v in value):
        return None
    if all(v.ndim and len(v) == len(value[0]) for v in value):
        return np.concatenate([v.reshape(len(v), -1) for v in value], 1)
    return np.concatenate([v.reshape(-1) for v in value])


_DO: dict[str, Callable[..., Any]] = {
    do.__name__: do
    for do in (
        Host.reset, Host.limit, Host.model, Host.check, Host.study, Host.open, Host.close, Host.run, Host.expose,
        Host.inlined, Host.raised, Host.available,
    )
}  # fmt: skip
"""What may be asked for."""


def answer(host: Host, message: Mapping[str, Any]) -> dict[str, Any]:
    """What a message is answered with: `result`, or `error` and the exit code that stands for its kind."""
    try:
        return {"result": _DO[message["do"]](host, **message["with"])}
    except OnnxrankError as e:
        if isinstance(e.__cause__, MemoryError):
            return _TOO_MUCH
        return {"error": str(e), "code": e.exit_code}
    except MemoryError:
        return _TOO_MUCH
    except Exception as e:
        return {"error": f"{type(e).__name__}: {runtime.first_line(e)}", "code": ModelError.exit_code}


def main() -> None:
    """Answers messages until there are no more."""
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    # What native code prints must not get between the messages.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    sys.setrecursionlimit(10_000)
    host = Host()
    while True:
        try:
            message = wire.receive(source)
        except EOFError:
            return
        reply = answer(host, message)
        try:
            wire.send(sink, reply)
        except BrokenPipeError:
            return
        except MemoryError:
            wire.send(sink, _TOO_MUCH)
