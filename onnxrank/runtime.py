"""onnxruntime behind one door: sessions, precision changes, and running a model with its insides exposed."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from onnxrank import graph_passes
from onnxrank.errors import EnvironmentProblem, ModelError, OutOfMemory
from onnxrank.model import tensor_data

Feeds = Mapping[str, NDArray[Any]]

_HALF = {TensorProto.FLOAT16, TensorProto.BFLOAT16}
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
"""Execution providers by the names that the command line has for them."""
FLOATS = {TensorProto.FLOAT, TensorProto.DOUBLE, *_HALF}


def onnxruntime() -> Any:
    """Imports onnxruntime.

    Raises:
        EnvironmentProblem: It is not installed, or cannot be loaded.
    """
    try:
        import onnxruntime as ort
    except ImportError as e:
        raise EnvironmentProblem(
            "onnxruntime cannot be imported: install 'onnxrank[cpu]' or, for NVIDIA GPUs, 'onnxrank[cuda]' "
            f"(one of the two: they cannot share an environment). {e}"
        ) from e
    if not hasattr(ort, "InferenceSession"):
        raise EnvironmentProblem(
            "onnxruntime is installed but broken, as it is where both onnxruntime and onnxruntime-gpu were installed: "
            "uninstall both, then install one of 'onnxrank[cpu]' and 'onnxrank[cuda]'."
        )
    return ort


def check_provider(provider: str) -> None:
    """Finds out whether onnxruntime has an execution provider here.

    Args:
        provider: One of `PROVIDERS`.

    Raises:
        EnvironmentProblem: It has not.
    """
    have = onnxruntime().get_available_providers()
    if PROVIDERS[provider] not in have:
        raise EnvironmentProblem(
            f"onnxruntime has no {PROVIDERS[provider]} here (it has {', '.join(have)}). Install 'onnxrank[{provider}]' "
            "in an environment without another onnxruntime, on a machine that has the device."
        )


def session(
    source: ModelProto | str | os.PathLike[str],
    folder: str | os.PathLike[str] | None = None,
    *,
    provider: str = "cpu",
    settings: Mapping[str, str] | None = None,
    optimise: bool = False,
    threads: int = 1,
    trace: str | None = None,
    reuse: bool = True,
) -> Any:
    """Makes an onnxruntime session.

    Args:
        source: The model, or its file.
        folder: Where the external data of a model in memory lies.
        provider: One of `PROVIDERS`; CPU runs what it does not.
        settings: The provider's own options.
        optimise: Whether ORT's own graph optimisations run.
        threads: Threads inside an operator.
        trace: Prefix of the file for onnxruntime's profiler; None leaves it off.
        reuse: Whether results may get the memory of others that are not read any more. Planning that takes as long as
            all else where thousands of shapes are fixed; without it memory is given back and taken again.

    Raises:
        ModelError: onnxruntime does not take the model; the message is its own.
        OutOfMemory: There is not enough memory to load it.
        EnvironmentProblem: The provider is not there, or cannot be used.
    """
    ort = onnxruntime()
    check_provider(provider)
    if provider == "cuda":
        _find_libraries(ort)
    options = ort.SessionOptions()
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimise else level.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    # Threads of a session that waits for its turn must not take time from another one.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if trace is not None:
        options.enable_profiling, options.profile_file_prefix = True, trace
    options.enable_mem_reuse = reuse
    left_out: list[str] = []
    if isinstance(source, ModelProto):
        given: bytes | str = (stored := source.SerializeToString())
        if not graph_passes.is_quantised(stored):
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        left_out = graph_passes.idle(stored) if optimise else []
        if folder is not None:
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.fspath(folder))
    else:
        given = os.fspath(source)
    name = PROVIDERS[provider]
    providers = [(name, dict(settings or {})), *([PROVIDERS["cpu"]] if provider != "cpu" else [])]
    try:
        made = ort.InferenceSession(given, options, providers=providers, disabled_optimizers=left_out)
    except MemoryError as e:
        raise OutOfMemory("there is not enough memory to load the model") from e
    except Exception as e:
        if _no_memory(e):
            raise OutOfMemory(f"there is not enough memory to load the model: {first_line(e)}") from e
        if provider == "cuda" and ("CUDA" in str(e) or "graph capture" in str(e)):
            raise EnvironmentProblem(f"the model cannot run on CUDA as asked: {first_line(e)}") from e
        raise ModelError(f"onnxruntime does not load the model: {first_line(e)}") from e
    if made.get_providers()[0] != name:
        raise EnvironmentProblem(
            f"The session silently fell back: onnxruntime gave up {name} for {made.get_providers()[0]}. It is "
            "installed but does not work here (see its driver and libraries), so nothing can be said of it."
        )
    return made


def _find_libraries(ort: Any) -> None:
    """Loads CUDA's libraries from where pip has put them, which is not where the system looks for libraries."""
    if hasattr(ort, "preload_dlls"):  # since 1.21
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find; the session says so, too
            ort.preload_dlls()


def _no_memory(e: BaseException) -> bool:
    return any(text in str(e) for text in ("bad_alloc", "Failed to allocate memory", "bad allocation"))


def is_float(data: NDArray[Any]) -> bool:
    """Whether an array holds floats, 16-bit ones included."""
    return data.dtype.kind == "f" or data.dtype.name == "bfloat16"


def typed(made: Any, feeds: Feeds) -> dict[str, NDArray[Any]]:
    """The feeds that a session knows, floats in the type it takes."""
    types = {"tensor(double)": np.float64, "tensor(float)": np.float32, "tensor(float16)": np.float16}
    wanted = {i.name: types.get(i.type) for i in made.get_inputs()}
    return {
        k: v.astype(wanted[k]) if wanted[k] is not None and is_float(v) else v for k, v in feeds.items() if k in wanted
    }


def run(made: Any, feeds: Feeds, outputs: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
    """Runs a session on the feeds it knows; floats are given in the type it takes.

    Raises:
        ModelError: The run failed; the message is onnxruntime's own.
    """
    names = list(outputs) if outputs is not None else [o.name for o in made.get_outputs()]
    try:
        return dict(zip(names, made.run(names, typed(made, feeds)), strict=True))
    except Exception as e:
        raise failed_run(e) from e


def failed_run(e: Exception) -> ModelError:
    """What to raise for an error while a session runs."""
    kind = OutOfMemory if isinstance(e, MemoryError) or _no_memory(e) else ModelError
    return kind(f"onnxruntime cannot run the model: {first_line(e)}")


def first_line(e: BaseException) -> str:
    """The first line of an error's text, cut to a readable length."""
    text = str(e).strip().splitlines()
    return (text[0] if text else type(e).__name__)[:400]


def has_half(model: ModelProto) -> bool:
    """Whether 16-bit floats occur, which onnxruntime's CPU provider mostly lacks kernels for."""
    return any(t.data_type in _HALF for t in model.graph.initializer) or any(
        i.type.tensor_type.elem_type in _HALF for i in model.graph.input
    )


def retype(model: ModelProto, to: int, folder: str | os.PathLike[str] | None = None) -> ModelProto:
    """A copy of a model that computes in another float type.

    Initializers, constants, casts, inputs and outputs of any float type become `to`; integers stay.

    Args:
        model: The model, functions inlined.
        to: ONNX element type, FLOAT or DOUBLE.
        folder: Where its external data lies; external float tensors are loaded.
    """
    out = ModelProto()
    out.CopyFrom(model)

    def tensor(t: TensorProto) -> None:
        if t.data_type in FLOATS and t.data_type != to:
            data = tensor_data(t, folder)
            made = numpy_helper.from_array(data.astype(helper.tensor_dtype_to_np_dtype(to)), t.name)
            t.CopyFrom(made)

    def value(info: Any) -> None:
        held = info.type
        while held.HasField("sequence_type"):
            held = held.sequence_type.elem_type
        if held.HasField("tensor_type") and held.tensor_type.elem_type in FLOATS:
            held.tensor_type.elem_type = to

    def graph(g: Any) -> None:
        del g.value_info[:]
        for t in g.initializer:
            tensor(t)
        for i in (*g.input, *g.output):
            value(i)
        for node in g.node:
            for a in node.attribute:
                if (a.name == "to" and node.op_type == "Cast" and a.i in FLOATS) or (
                    a.name == "dtype" and a.i in FLOATS
                ):
                    a.i = to
                elif a.HasField("t"):
                    tensor(a.t)
                elif node.op_type == "Constant" and a.name in ("value_float", "value_floats"):
                    data = np.array(a.f if a.name == "value_float" else list(a.floats), np.float32)
                    a.CopyFrom(
                        helper.make_attribute(
                            "value", numpy_helper.from_array(data.astype(helper.tensor_dtype_to_np_dtype(to)))
                        )
                    )
                if a.HasField("g"):
                    graph(a.g)
                for inner in a.graphs:
                    graph(inner)
            if node.op_type == "ConstantOfShape" and not node.attribute:
                node.attribute.append(
                    helper.make_attribute(
                        "value", numpy_helper.from_array(np.zeros(1, helper.tensor_dtype_to_np_dtype(to)))
                    )
                )

    graph(out.graph)
    return out
