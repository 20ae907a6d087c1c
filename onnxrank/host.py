"""The process that runs a model on behalf of another, which tells it what to do over its pipes.

Whatever a model makes the runtime do (crash, hang, fill the memory) ends here.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import queue
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper

from onnxrank import halves, runtime, wire, workers
from onnxrank.errors import EnvironmentProblem, ModelError, OnnxrankError, OutOfMemory, UsageError
from onnxrank.graphs import live
from onnxrank.model import flattened
from onnxrank.turns import interleave, of_thread

if TYPE_CHECKING:
    from onnxrank.compress.inside import Inside
    from onnxrank.profiling.bench import Bench

_AT_ONCE = 2
"""Sessions that are made at once where nobody waits for them yet."""
_TOO_MUCH = {"error": "it needs more memory than its process may use", "kind": OutOfMemory.__name__}


class Host:
    """Models and sessions by key."""

    def __init__(self) -> None:
        self._models: dict[str, tuple[ModelProto, str | None]] = {}
        self._flat: dict[str, ModelProto] = {}
        self._splits: dict[str, str] = {}
        self._sessions: dict[str, Any] = {}
        self._begun: dict[str, Future[Any]] = {}
        self._turns = threading.Semaphore(_AT_ONCE)
        self._bench: Bench | None = None
        self._inside: Inside | None = None

    def reset(self) -> None:
        """Forgets everything.

        Raises:
            ModelError: Sessions are being made still.
        """
        if not all(made.done() for made in self._begun.values()):
            raise ModelError("sessions are being made")
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

    def model(self, key: str, data: bytes | str, folder: str | None) -> None:
        """Takes a model.

        Args:
            key: What it is known by from now on.
            data: The model, or the path of a file that holds it.
            folder: Where its external data lies.
        """
        if isinstance(data, str):
            data = Path(data).read_bytes()
        self._models[key] = (ModelProto.FromString(data), folder)
        self._flat.pop(key, None)

    def split(self, key: str, folder: str) -> None:
        """Has sessions of a model run the two models that it stands for, where they compute in their own precision.

        Args:
            key: The model.
            folder: Where the contract of the two lies.
        """
        self._splits[key] = folder

    def check(self, key: str) -> dict[str, str]:
        """What ONNX's own checker objects to: `error`, and `inference`, what only its strict shape inference does."""
        from onnxrank.model import without_external

        model = without_external(self._models[key][0])
        try:
            onnx.checker.check_model(model, full_check=True)
        except Exception as e:
            try:
                onnx.checker.check_model(model)
            except Exception as plain:
                return {"error": runtime.first_line(plain)}
            return {"inference": runtime.first_line(e)}
        return {}

    def study(self, key: str, roles: Mapping[str, Any], sha256: str, size: int) -> dict[str, Any]:
        """Shapes and ranges of the inputs of a ranker, what `feeds.Maker` needs to make more, and its least length."""
        from onnxrank.model import LoadedModel
        from onnxrank.roles import Roles
        from onnxrank.study import Study

        flat, folder = self._flattened(key)
        where = None if folder is None else Path(folder)
        study = Study(flat, Roles.from_dict(roles), LoadedModel(flat, None, where, sha256, size, ()))
        known = study.known
        return {
            "ranges": {k: list(v) for k, v in known.ranges.items()},
            "symbols": list(known.symbols),
            "note": study.facts.note,
            "shortest": known.shortest,
        }

    def begin(self, session: str, key: str, **how: Any) -> None:
        """Begins to make a session, beside whatever is asked for next; `open` waits for it, and says what came of it.

        Args:
            session: Its key.
            key: The model.
            **how: As for `open`.
        """
        with contextlib.suppress(Exception):  # whoever waits is told
            self._flattened(key)  # once for all sessions
        made: Future[Any] = Future()
        self._begun[session] = made
        turns = self._turns

        def make() -> None:
            with turns:
                try:
                    made.set_result(self._make(key, **how))
                except BaseException as e:
                    made.set_exception(e)

        threading.Thread(target=make, daemon=True).start()

    def open(self, session: str, key: str, **how: Any) -> dict[str, Any]:
        """Makes a session, or waits for the one that was begun under its key.

        Args:
            session: Its key.
            key: The model.
            **how: As for `_make`.

        Raises:
            ModelError: The runtime does not take it.
            EnvironmentProblem: The provider is not there, or the session fell back to another.
        """
        begun = self._begun.pop(session, None)
        made, on = self._make(key, **how) if begun is None else begun.result()
        self._sessions[session] = made
        return {"how": on}

    def _make(
        self,
        key: str,
        provider: str = "cpu",
        level: str = "all",
        precision: str = "own",
        tf32: bool = False,
        to: int = TensorProto.FLOAT16,
        threads: int = 1,
    ) -> tuple[Any, str]:
        """Makes a session, and tells what it runs on.

        Args:
            key: The model.
            provider: `cpu` or `cuda`.
            level: ORT's graph optimisations, `disabled` or `all`.
            precision: `own`, `float` (16-bit types raised), `double` (all floats raised), `exact` (the same, without
                the runtime's inexact kernels) or `rounded` (weights rounded to `to` before).
            to: ONNX element type.
            tf32: Whether a GPU may round the operands of float32 products to 10 bits.
            threads: Threads inside an operator.
        """
        flat, folder = self._flattened(key)
        flat = live(flat)
        if precision in ("double", "exact", "rounded"):
            from onnxrank.verify import truth

            wide = truth.rounded(flat, to, folder) if precision == "rounded" else flat
            exact = truth.Truth(wide, folder, truth.INEXACT if precision == "exact" else ())
            return exact, exact.how
        settings = {"use_tf32": str(int(tf32))} if provider == "cuda" else {}
        how: dict[str, Any] = {
            "provider": provider,
            "settings": settings,
            "optimise": level == "all",
            "threads": threads,
        }
        if precision == "own" and key in self._splits:
            made: Any = halves.Pair(self._splits[key], **how)
        else:
            model = flat if precision == "own" else runtime.retype(flat, TensorProto.FLOAT, folder)
            made = runtime.session(model, folder, **how)
        made.disable_fallback()  # from a provider that fails while it runs
        return made, "onnxruntime"

    def nudge(self, key: str, of: str, seed: int, exact: bool) -> None:
        """Makes a model of which every float weight is moved by one unit in the last place.

        Args:
            key: Its key.
            of: The model.
            seed: For up or down.
            exact: Whether in the last place of a float64.
        """
        from onnxrank.verify import truth

        flat, folder = self._flattened(of)
        self._models[key] = (truth.nudged(flat, seed, exact, folder), folder)
        self._flat[key] = self._models[key][0]

    def close(self, session: str) -> None:
        """Forgets a session."""
        self._begun.pop(session, None)
        self._sessions.pop(session, None)

    def run(
        self,
        session: str,
        feeds: Sequence[Mapping[str, Any]],
        outputs: Sequence[str] | None,
        shapes: Sequence[str] = (),
    ) -> list[dict[str, Any]]:
        """Runs a session on several feeds.

        Args:
            session: Its key.
            feeds: Inputs by name.
            outputs: Names of outputs; None for all.
            shapes: Those that are answered with their shapes.

        Returns:
            Per feed `{"outputs": {name: array}}` or `{"error": message, "kind": name of the error's class}`.
        """
        from onnxrank.verify.truth import Truth

        made = self._sessions[session]
        run = made.run if isinstance(made, Truth) else functools.partial(runtime.run, made)
        answers: list[dict[str, Any]] = []
        for feed in feeds:
            try:
                out = run(feed, outputs)
            except ModelError as e:
                answers.append(_refusal(e))
                continue
            arrays = {k: _as_array(v) for k, v in out.items()}
            other = next((k for k, v in arrays.items() if v is None), None)
            if other is not None:
                answers.append(_refusal(ModelError(f"output {other!r} is no tensor")))
                continue
            answers.append({"outputs": arrays | {k: np.array(out[k].shape, np.int64) for k in shapes}})
        return answers

    def race(self, sessions: Sequence[str], feeds: Sequence[Mapping[str, Any]], seconds: float) -> NDArray[np.float64]:
        """Times sessions of one thread in turns, each on a feed of its own.

        Args:
            sessions: Their keys.
            feeds: The feeds.
            seconds: Most seconds to spend, of the thread's time.

        Returns:
            Seconds per run, `[sessions, rounds, runs of a turn]`.
        """

        def timed(session: Any, feed: Mapping[str, Any]) -> Callable[[int], float]:
            given = runtime.typed(session, feed)

            def run(turn: int) -> float:
                start = of_thread()
                session.run(None, given)
                return of_thread() - start

            return run

        try:
            runs = [timed(self._sessions[s], f) for s, f in zip(sessions, feeds, strict=True)]
            return interleave(runs, seconds, of_thread).seconds
        except Exception as e:
            raise ModelError(f"onnxruntime cannot run the model: {runtime.first_line(e)}") from e

    def bench(self, what: str, **arguments: Any) -> Any:
        """Has the bench of this process do something.

        Args:
            what: Name of a method of `profiling.bench.Bench`.
            **arguments: Its arguments.
        """
        from onnxrank.profiling.bench import DO, Bench

        if self._bench is None:
            self._bench = Bench(self._models)
        return DO[what](self._bench, **arguments)

    def compress(self, what: str, **arguments: Any) -> Any:
        """Has this process do something for `compress`.

        Args:
            what: Name of a method of `compress.inside.Inside`.
            **arguments: Its arguments.
        """
        from onnxrank.compress.inside import DO, Inside

        if self._inside is None:
            self._inside = Inside(self._models)
        return DO[what](self._inside, **arguments)

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
        from onnxrank.verify import truth

        flat, folder = self._flattened(key)
        data: bytes = truth.raised(flat, folder).SerializeToString(deterministic=True)
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
        Host.reset, Host.limit, Host.model, Host.split, Host.check, Host.study, Host.begin, Host.open, Host.close,
        Host.run, Host.race, Host.expose, Host.bench, Host.nudge, Host.inlined, Host.raised, Host.available,
        Host.compress,
    )
}  # fmt: skip
"""What may be asked for."""


def answer(host: Host, message: Mapping[str, Any]) -> dict[str, Any]:
    """What a message is answered with: `result`, or `error` and the name of its `kind`."""
    try:
        return {"result": _DO[message["do"]](host, **message["with"])}
    except OnnxrankError as e:
        return _TOO_MUCH if isinstance(e.__cause__, MemoryError) else _refusal(e)
    except MemoryError:
        return _TOO_MUCH
    except Exception as e:
        return _refusal(ModelError(f"{type(e).__name__}: {runtime.first_line(e)}"))


def _refusal(e: OnnxrankError) -> dict[str, Any]:
    kinds = (OutOfMemory, UsageError, EnvironmentProblem, ModelError)
    return {"error": str(e), "kind": next((k.__name__ for k in kinds if isinstance(e, k)), ModelError.__name__)}


def main() -> None:
    """Answers messages until there are no more."""
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    # What native code prints must not get between the messages.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    sys.setrecursionlimit(10_000)
    workers.stay_here(lambda: functools.partial(answer, Host()))
    messages: queue.Queue[Any] = queue.Queue()
    threading.Thread(target=_listen, args=(source, messages), daemon=True).start()
    with contextlib.suppress(ImportError):  # ahead of their use; whoever misses one says so
        import onnxruntime  # noqa: F401

        from onnxrank.verify import truth  # noqa: F401
    gc.freeze()  # what was imported stays, and need not be looked at for garbage again
    host = Host()
    while True:
        reply = answer(host, messages.get())
        try:
            wire.send(sink, reply)
        except BrokenPipeError:
            return
        except MemoryError:
            wire.send(sink, _TOO_MUCH)


def _listen(source: BinaryIO, messages: queue.Queue[Any]) -> None:
    """Passes messages on, and ends the process when there is nobody left to answer, whatever it hangs in."""
    try:
        while True:
            messages.put(wire.receive(source))
    except (EOFError, OSError):
        os._exit(0)
