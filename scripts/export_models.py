"""Exports the reference models to ONNX, with their roles files, and checks each export against torch.

The first line below writes the files that the tests use.

    python scripts/export_models.py models/onnx
    python scripts/export_models.py out --scale industrial --names dlrm din --exporter torchscript
"""

from __future__ import annotations

import argparse
import inspect
import io
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models import NAMES, TRIANGULAR, InputSpec, build, roles, sample

TOLERANCE = 2e-5
# Not 1, which exporters specialise, and no other extent of a model, so that a frozen one is noticed.
EXPORT_ROWS = 7
CHECK_ROWS = (1, 3, 17)
# Traces that exporters leave in metadata: source lines, and absolute paths of the exporting machine.
_LOCAL_TEXT = re.compile(r'File "|(?:^|[\s"\'(=])(?:/[\w.+-]+){2,}|[A-Za-z]:\\')


def arguments(specs: Sequence[InputSpec], n: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Sampled inputs in the order of the arguments of `forward`."""
    feeds = sample(specs, n, seed)
    return tuple(torch.from_numpy(feeds[spec.name]) for spec in specs)


def export_torchscript(
    module: torch.nn.Module,
    specs: Sequence[InputSpec],
    args: tuple[torch.Tensor, ...] | None = None,
    dynamic: Iterable[str] | None = None,
) -> onnx.ModelProto:
    """Exports by tracing.

    Args:
        module: The model; its attribute `output_names` names the outputs.
        specs: Its inputs.
        args: Example inputs; sampled if not given.
        dynamic: Inputs whose first axis varies; all if not given.
    """
    names = [spec.name for spec in specs]
    outputs = list(module.output_names)
    buffer = io.BytesIO()
    torch.onnx.export(
        module,
        arguments(specs, EXPORT_ROWS) if args is None else args,
        buffer,
        input_names=names,
        output_names=outputs,
        dynamic_axes={name: {0: "N"} for name in [*(names if dynamic is None else dynamic), *outputs]},
        opset_version=17,
        dynamo=False,
    )
    return onnx.load_from_string(buffer.getvalue())


def export_dynamo(module: torch.nn.Module, specs: Sequence[InputSpec]) -> onnx.ModelProto:
    """Exports through torch.export."""
    rows = torch.export.Dim("N")
    shapes = by_parameter(module, tuple({0: rows} for _ in specs))
    buffer = io.BytesIO()
    torch.onnx.export(
        module,
        arguments(specs, EXPORT_ROWS),
        buffer,
        input_names=[spec.name for spec in specs],
        output_names=list(module.output_names),
        dynamic_shapes=shapes,
        opset_version=20,
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    return onnx.load_from_string(buffer.getvalue())


def by_parameter(module: torch.nn.Module, shapes: tuple) -> tuple:
    """Dynamic shapes as torch.export wants them: one entry per parameter of forward, with a tuple for `*inputs`."""
    kinds = [p.kind for p in inspect.signature(module.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        return shapes
    fixed = len(kinds) - 1
    return (*shapes[:fixed], shapes[fixed:])


def strip_local_text(model: onnx.ModelProto) -> None:
    """Clears doc strings and metadata that quote source lines or paths of this machine; all else stays."""

    def strip(proto: object) -> None:
        if getattr(proto, "doc_string", "") and _LOCAL_TEXT.search(proto.doc_string):
            proto.ClearField("doc_string")
        metadata = getattr(proto, "metadata_props", None)
        if metadata is not None:
            kept = [(p.key, p.value) for p in metadata if not _LOCAL_TEXT.search(p.value)]
            if len(kept) < len(metadata):
                del metadata[:]
                for key, value in kept:
                    metadata.add(key=key, value=value)

    def strip_graph(graph: onnx.GraphProto) -> None:
        strip(graph)
        for proto in [*graph.input, *graph.output, *graph.value_info, *graph.initializer]:
            strip(proto)
        strip_nodes(graph.node)

    def strip_nodes(nodes: Iterable[onnx.NodeProto]) -> None:
        for node in nodes:
            strip(node)
            for attribute in node.attribute:
                strip(attribute)
                for graph in [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]:
                    strip_graph(graph)

    strip(model)
    strip_graph(model.graph)
    for function in model.functions:
        strip(function)
        strip_nodes(function.node)


def session(model: onnx.ModelProto | Path) -> onnxruntime.InferenceSession:
    """A quiet single-threaded CPU session."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def run(opened: onnxruntime.InferenceSession, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Runs with those feeds the graph still asks for: exporters may drop unused inputs."""
    wanted = {value.name for value in opened.get_inputs()}
    return opened.run(None, {name: value for name, value in feeds.items() if name in wanted})


def check(model: onnx.ModelProto, module: torch.nn.Module, specs: Sequence[InputSpec]) -> str:
    """Compares with torch at several numbers of candidates.

    Returns:
        One line with the largest differences; it tells of a failure at N = 1, which exporters specialise.

    Raises:
        ValueError: If a result at N > 1 is wrong.
    """
    opened = session(model)
    found = []
    for n in CHECK_ROWS:
        feeds = sample(specs, n, seed=n)
        with torch.no_grad():
            expected = module(*(torch.from_numpy(feeds[spec.name]) for spec in specs))
        expected = expected if isinstance(expected, tuple) else (expected,)
        try:
            got = run(opened, feeds)
            if [tuple(a.shape) for a in got] != [tuple(b.shape) for b in expected]:
                raise ValueError(f"shapes {[a.shape for a in got]} at N = {n}")
            worst = max(float(np.abs(a - b.numpy()).max()) for a, b in zip(got, expected, strict=True))
            if not worst < TOLERANCE:
                raise ValueError(f"differs by {worst:.1e} at N = {n}")
        except Exception as error:
            if n > 1:
                raise
            found.append(f"N=1 fails ({_first_line(error)})")
        else:
            found.append(f"N={n} {worst:.0e}")
    return ", ".join(found)


class _Dumper(yaml.SafeDumper):
    """Quotes column numbers: YAML 1.1 reads a bare 9:13 as a number in base 60."""


def _quoted(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if text[:1].isdigit() else None)


_Dumper.add_representer(str, _quoted)


def roles_text(specs: Sequence[InputSpec]) -> str:
    """The roles file, one input per line."""
    lines = ["inputs:"]
    for name, role in roles(specs)["inputs"].items():
        text = yaml.dump(role, Dumper=_Dumper, sort_keys=False, default_flow_style=True, width=10_000)
        lines.append(f"  {name}: {text.strip()}")
    return "\n".join(lines) + "\n"


def write(model: onnx.ModelProto, path: Path) -> None:
    """Strips, validates and saves one model."""
    strip_local_text(model)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString(deterministic=True))


def export(name: str, scale: str, exporters: Sequence[str], outdir: Path) -> list[str]:
    """Exports one model.

    Returns:
        The exporters that failed.
    """
    module, specs = build(name, scale)
    (outdir / f"{name}.roles.yaml").write_text(roles_text(specs))
    table: dict[str, Callable[..., onnx.ModelProto]] = {
        "torchscript": export_torchscript,
        "dynamo": export_dynamo,
    }
    failed = []
    for exporter in exporters:
        path = outdir / f"{name}.{exporter}.onnx"
        path.unlink(missing_ok=True)
        try:
            model = table[exporter](module, specs)
            strip_local_text(model)
            summary = check(model, module, specs)
            write(model, path)
        except Exception as error:  # an exporter may fail in any way; the others go on
            failed.append(exporter)
            print(f"FAILED {path.name}: {type(error).__name__}: {_first_line(error)}")
        else:
            print(f"{path.name}: {len(model.graph.node)} nodes, {path.stat().st_size / 1024:.0f} KB, {summary}")
    return failed


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")[:300]


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("outdir", type=Path)
    parser.add_argument("--scale", choices=("small", "industrial"), default="small")
    parser.add_argument("--names", nargs="+", choices=(*NAMES, *TRIANGULAR), default=NAMES, metavar="NAME")
    parser.add_argument("--exporter", choices=("torchscript", "dynamo", "both"), default="both")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    options.outdir.mkdir(parents=True, exist_ok=True)
    exporters = ("torchscript", "dynamo") if options.exporter == "both" else (options.exporter,)
    failures = [
        f"{name} ({exporter})"
        for name in options.names
        for exporter in export(name, options.scale, exporters, options.outdir)
    ]
    print(f"{len(options.names) * len(exporters) - len(failures)} files written", end="")
    print(f", failed: {', '.join(failures)}" if failures else "")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
