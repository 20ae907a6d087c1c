"""Sessions as a server would hold them: on an execution provider, with or without bound memory and CUDA graphs."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from onnxrank import runtime

Requests = Sequence[runtime.Feeds]
"""Several requests with the same number of candidates."""


@dataclass(frozen=True)
class Target:
    """Where and how models run.

    Attributes:
        provider: `cpu` or `cuda`.
        threads: Threads inside an operator.
        io_binding: Whether inputs and outputs are bound to memory of the provider.
        cuda_graph: Whether runs are captured in a CUDA graph and replayed.
    """

    provider: str = "cpu"
    threads: int = 1
    io_binding: bool = False
    cuda_graph: bool = False


def open_session(
    source: Path | ModelProto, target: Target, folder: str | os.PathLike[str] | None = None, trace: str | None = None
) -> Any:
    """Makes a session with onnxruntime's default graph optimisations.

    Args:
        source: The model's file, or the model.
        target: Where it runs.
        folder: Where external data of a model in memory lies.
        trace: Prefix of the file for onnxruntime's profiler, which does without CUDA graphs; None leaves it off.

    Raises:
        ModelError: onnxruntime does not take the model.
        OutOfMemory: There is not enough memory to load it.
        EnvironmentProblem: The provider is not there, or cannot run the model as asked.
    """
    return runtime.session(
        source,
        folder,
        provider=target.provider,
        settings={"enable_cuda_graph": "1"} if target.cuda_graph and trace is None else {},
        optimise=True,
        threads=target.threads,
        trace=trace,
    )


class Runner:
    """Runs requests with one number of candidates on a session, and times them.

    Without binding, a run is `session.run`. With it, on CPU every request's inputs are bound once; on CUDA inputs and
    outputs have fixed places on the device, and a run copies the request there, computes, and copies the scores back,
    as a server does.

    Args:
        session: The session.
        requests: Inputs; those that the session does not know are left out.
        target: Where it runs.
    """

    def __init__(self, session: Any, requests: Requests, target: Target) -> None:
        self._session = session
        wanted = [i.name for i in session.get_inputs()]
        self._feeds: list[dict[str, Any]] = [{k: np.ascontiguousarray(r[k]) for k in wanted} for r in requests]
        self._names = [o.name for o in session.get_outputs()]
        self._device = target.provider
        self._options = runtime.onnxruntime().RunOptions()
        self._copies: list[float] = []
        self._bindings: list[Any] = []
        self._places: dict[str, Any] = {}
        if target.cuda_graph:
            # Graphs are captured per shape, under a number.
            rows = max((v.shape[0] for v in self._feeds[0].values() if v.ndim), default=0)
            self._options.add_run_config_entry("gpu_graph_id", str(1 + rows))
        if target.io_binding:
            self._bind()

    @property
    def copies(self) -> float | None:
        """Median seconds per run for copies between host and device; None where none are told apart."""
        return float(np.median(self._copies)) if self._copies else None

    def __call__(self, request: int) -> float:
        """Runs one of the requests, and returns its seconds.

        Raises:
            ModelError: onnxruntime cannot run the model on it.
            OutOfMemory: There is not enough memory to.
        """
        try:
            return self._run(request % len(self._feeds))
        except Exception as e:
            raise runtime.failed_run(e) from e

    def scores(self, request: int) -> list[Any]:
        """Outputs for one of the requests, through the same door as the timed runs."""
        k = request % len(self._feeds)
        if not self._bindings:
            return list(self._session.run(self._names, self._feeds[k], self._options))
        self(request)
        return list(self._bindings[k if self._device == "cpu" else 0].copy_outputs_to_cpu())

    def _run(self, k: int) -> float:
        if not self._bindings:
            begin = time.perf_counter()
            self._session.run(self._names, self._feeds[k], self._options)
            return time.perf_counter() - begin
        if self._device == "cpu":
            begin = time.perf_counter()
            self._session.run_with_iobinding(self._bindings[k], self._options)
            return time.perf_counter() - begin
        (binding,), feed = self._bindings, self._feeds[k]
        begin = time.perf_counter()
        for name, place in self._places.items():
            place.update_inplace(feed[name])
        there = time.perf_counter()
        self._session.run_with_iobinding(binding, self._options)
        binding.synchronize_outputs()
        done = time.perf_counter()
        binding.copy_outputs_to_cpu()
        end = time.perf_counter()
        self._copies.append(there - begin + end - done)
        return end - begin

    def _bind(self) -> None:
        value = runtime.onnxruntime().OrtValue
        for feed in self._feeds if self._device == "cpu" else self._feeds[:1]:
            binding = self._session.io_binding()
            for name, data in feed.items():
                held = value.ortvalue_from_numpy(data, self._device, 0)
                binding.bind_ortvalue_input(name, held)
                self._places[name] = held
            for name, shape, dtype in self._output_shapes():
                if shape is None:
                    binding.bind_output(name, self._device, 0)
                else:
                    binding.bind_ortvalue_output(
                        name, value.ortvalue_from_shape_and_type(shape, dtype, self._device, 0)
                    )
            self._bindings.append(binding)

    def _output_shapes(self) -> list[tuple[str, list[int] | None, Any]]:
        """Shapes of the outputs; None where they change with the request, or hold no numbers."""
        seen = [self._session.run(self._names, f) for f in self._feeds[:2]] if self._device == "cpu" else []
        if not seen:
            plain = runtime.onnxruntime().RunOptions()
            plain.add_run_config_entry("gpu_graph_id", "-1")  # not captured
            seen = [self._session.run(self._names, f, plain) for f in self._feeds[:2]]
        out: list[tuple[str, list[int] | None, Any]] = []
        for k, name in enumerate(self._names):
            first = seen[0][k]
            fixed = isinstance(first, np.ndarray) and first.dtype != object and 0 not in first.shape
            fixed = fixed and all(s[k].shape == first.shape for s in seen)
            out.append((name, list(first.shape) if fixed else None, first.dtype if fixed else None))
        return out


class Loop:
    """Several requests, one after the other, as one run.

    Args:
        runner: Runs one of its requests.
        turns: How many make a run.
    """

    def __init__(self, runner: Runner, turns: int) -> None:
        self._runner, self._turns = runner, turns

    @property
    def copies(self) -> float | None:
        """Median seconds per run for copies between host and device; None where none are told apart."""
        found = self._runner.copies
        return None if found is None else found * self._turns

    def __call__(self, request: int) -> float:
        """Runs some requests, and returns their seconds."""
        return sum(self._runner(request * self._turns + k) for k in range(self._turns))

    def scores(self, request: int) -> list[Any]:
        """Outputs for the first of them."""
        return self._runner.scores(request * self._turns)


class Peak:
    """How many multiply-adds per second the machine does in one large product, which has nothing to wait for.

    Args:
        target: Where it runs.
    """

    _SIZE = 512
    _RUNS = 5

    def __init__(self, target: Target) -> None:
        plain = replace(target, cuda_graph=False)
        model, x = self.product()
        self._run = Runner(open_session(model, plain), [{"x": x}], plain)

    @classmethod
    def product(cls) -> tuple[ModelProto, NDArray[np.float32]]:
        """The product of square matrices, as a model, and its input `x`."""
        weight = np.linspace(-1, 1, cls._SIZE**2, dtype=np.float32).reshape(cls._SIZE, -1)
        ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, weight.shape) for name in "xy"]
        node = helper.make_node("MatMul", ["x", "w"], ["y"])
        graph = helper.make_graph([node], "peak", ends[:1], ends[1:], [numpy_helper.from_array(weight, "w")])
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7), weight

    def __call__(self) -> float:
        """Multiply-adds per second now."""
        self._run(0)
        took = float(np.median([self._run(0) for _ in range(self._RUNS)])) - (self._run.copies or 0.0)
        return self._SIZE**3 / took


def processor(provider: str) -> str:
    """The processor in words, as far as the system tells."""
    import platform
    import subprocess

    if provider == "cuda":
        try:
            asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
            told = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True)
            return told.stdout.splitlines()[0].strip()
        except (OSError, subprocess.SubprocessError, IndexError):
            return "CUDA device"
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            found = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "")
    except OSError:
        found = ""
    return found or platform.processor() or platform.machine()


def environment(target: Target) -> Mapping[str, Any]:
    """What a report says of where it was made."""
    return {
        "onnxruntime": runtime.onnxruntime().__version__,
        "provider": target.provider,
        "device": processor(target.provider),
        "threads": target.threads,
        "io_binding": target.io_binding,
        "cuda_graph": target.cuda_graph,
    }
