"""Exports the models of the public library deepctr-torch to ONNX, with their roles files, checked against torch.

Needs `pip install deepctr-torch`. Every model takes one packed matrix `X`: 18 request-level and 12 candidate-level
ids, partly interleaved, dense values of both levels, and two histories of 50 where the model wants them.

    python scripts/export_deepctr.py out
    python scripts/export_deepctr.py out --scale industrial --names din mmoe --exporter torchscript
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.spec import InputSpec, column_text, sample
from scripts.export_models import export_dynamo, export_torchscript, roles_text, run, session, strip_local_text, write

# deepctr_torch asks the package index for newer versions of itself when it is imported; not here.
_quiet = ModuleType("deepctr_torch.utils")
_quiet.check_version = lambda version: None  # type: ignore[attr-defined]
sys.modules.setdefault("deepctr_torch.utils", _quiet)

from deepctr_torch import models as library  # noqa: E402
from deepctr_torch.inputs import DenseFeat, SparseFeat, VarLenSparseFeat, build_input_features  # noqa: E402
from deepctr_torch.layers import PredictionLayer  # noqa: E402

SEED = 7
HISTORY = 50
CHECK_ROWS = (3, 1, 17)
CALIBRATION_ROWS = 256
TOLERANCE = 5e-5


@dataclass(frozen=True)
class Scale:
    """Sizes of a model."""

    dim: int
    hidden: tuple[int, int]
    tower: int
    cin: tuple[int, int]
    vocabulary: int


SCALES = {
    "small": Scale(dim=4, hidden=(32, 16), tower=8, cin=(8, 4), vocabulary=50),
    "industrial": Scale(dim=16, hidden=(256, 128), tower=64, cin=(64, 32), vocabulary=1000),
}


class Columns:
    """The feature columns of one model, and what its packed input holds."""

    def __init__(self, scale: Scale) -> None:
        user = [SparseFeat(f"user_{k}", scale.vocabulary, scale.dim) for k in range(18)]
        item = [SparseFeat(name, scale.vocabulary, scale.dim) for name in ("item", "cate")]
        item += [SparseFeat(f"item_{k}", scale.vocabulary, scale.dim) for k in range(10)]
        # 12 request-level ids, then 6 and 6 interleaved, then 6 candidate-level ones.
        pairs = [column for pair in zip(user[12:], item[:6], strict=True) for column in pair]
        self.sparse = [*user[:12], *pairs, *item[6:]]
        widths = {"user_dense_0": 1, "item_dense_0": 1, "user_dense_1": 3, "item_dense_1": 2, "user_dense_2": 1}
        self.dense = [DenseFeat(name, width) for name, width in widths.items()]
        self.history = [
            VarLenSparseFeat(
                SparseFeat(f"hist_{name}", scale.vocabulary, scale.dim, embedding_name=name),
                maxlen=HISTORY,
                length_name="hist_length",
            )
            for name in ("item", "cate")
        ]
        self.pooled = [
            VarLenSparseFeat(
                SparseFeat(f"hist_{combiner}", scale.vocabulary, scale.dim),
                maxlen=HISTORY,
                combiner=combiner,
                # A maximum without a length: its mask comes from the ids.
                length_name=None if combiner == "max" else "hist_length",
            )
            for combiner in ("mean", "sum", "max")
        ]
        self.all = [*self.sparse, *self.dense]
        self.vocabulary = scale.vocabulary

    def spec(self, used: Sequence[Any]) -> InputSpec:
        """Describes the packed input of a model with these columns."""
        index: Mapping[str, tuple[int, int]] = build_input_features(list(used))
        request = [k for name, (a, b) in index.items() if name.startswith(("user", "hist")) for k in range(a, b)]
        groups: dict[tuple[float, float], list[int]] = {}
        for name, (a, b) in index.items():
            if name == "hist_length":
                bounds: tuple[float, float] = (1, HISTORY + 1)
            else:
                bounds = (-1.0, 1.0) if "dense" in name else (0, self.vocabulary)
            groups.setdefault(bounds, []).extend(range(a, b))
        return InputSpec(
            name="X",
            dtype="float32",
            shape=("N", max(b for _, b in index.values())),
            level="mixed",
            low=-1.0,
            high=float(self.vocabulary),
            request_columns=column_text(request),
            column_ranges=tuple((column_text(columns), *bounds) for bounds, columns in groups.items()),
        )


Maker = Callable[[Columns, Scale], tuple[nn.Module, Sequence[Any]]]


def _standard(cls: Callable[..., nn.Module], mlp: str = "dnn_hidden_units", **options: Any) -> Maker:
    """A model of a linear part and a deep part over the same columns."""

    def make(c: Columns, s: Scale) -> tuple[nn.Module, Sequence[Any]]:
        return cls(c.all, c.all, **{mlp: s.hidden}, **options), c.all

    return make


def _single(cls: Callable[..., nn.Module], **options: Any) -> Maker:
    """A model without a linear part."""
    return lambda c, s: (cls(c.all, dnn_hidden_units=s.hidden, **options), c.all)


def _sparse_only(cls: Callable[..., nn.Module], hidden: bool, **options: Any) -> Maker:
    """A model whose interactions take no dense values."""
    return lambda c, s: (
        cls(c.all, c.sparse, **({"dnn_hidden_units": s.hidden} if hidden else {}), **options),
        c.all,
    )


def _histories(cls: Callable[..., nn.Module], units: str, **options: Any) -> Maker:
    """A model that attends to two histories by the candidate's item and category."""

    def make(c: Columns, s: Scale) -> tuple[nn.Module, Sequence[Any]]:
        used = [*c.sparse, *c.history, *c.dense]
        sizes = {"dnn_hidden_units": s.hidden, units: (s.tower, s.tower // 4)}
        return cls(used, ["item", "cate"], **sizes, **options), used

    return make


def _varlen(c: Columns, s: Scale) -> tuple[nn.Module, Sequence[Any]]:
    used = [*c.sparse, *c.pooled, *c.dense]
    return library.DeepFM(used, used, dnn_hidden_units=s.hidden), used


def _experts(cls: Callable[..., nn.Module], **options: Any) -> Maker:
    return lambda c, s: (
        cls(
            c.all,
            expert_dnn_hidden_units=s.hidden,
            gate_dnn_hidden_units=(s.tower,),
            tower_dnn_hidden_units=(s.tower,),
            **options,
        ),
        c.all,
    )


MODELS: dict[str, Maker] = {
    "wdl": _standard(library.WDL),
    "wdl_batchnorm": _standard(library.WDL, dnn_use_bn=True),
    "wdl_prelu": _standard(library.WDL, dnn_activation="prelu"),
    "deepfm": _standard(library.DeepFM),
    "deepfm_varlen": _varlen,
    "xdeepfm": lambda c, s: (library.xDeepFM(c.all, c.all, s.hidden, cin_layer_size=s.cin), c.all),
    "xdeepfm_full": lambda c, s: (
        library.xDeepFM(c.all, c.all, s.hidden, cin_layer_size=s.cin, cin_split_half=False),
        c.all,
    ),
    "afm": _sparse_only(library.AFM, hidden=False),
    "ifm": _standard(library.IFM),
    "difm": _standard(library.DIFM),
    "autoint": _standard(library.AutoInt),
    "autoint_single": _standard(library.AutoInt, att_layer_num=1),
    "dcn_vector": _standard(library.DCN, cross_parameterization="vector"),
    "dcn_matrix": _standard(library.DCN, cross_parameterization="matrix"),
    "dcnmix": lambda c, s: (
        library.DCNMix(c.all, c.all, dnn_hidden_units=s.hidden, low_rank=2 * s.dim, num_experts=3),
        c.all,
    ),
    "fibinet_all": _standard(library.FiBiNET, bilinear_type="all"),
    "fibinet_each": _standard(library.FiBiNET, bilinear_type="each"),
    "fibinet_interaction": _standard(library.FiBiNET, bilinear_type="interaction"),
    "nfm": _standard(library.NFM),
    "pnn_inner": _single(library.PNN),
    "pnn_outer": _single(library.PNN, use_inner=False, use_outter=True),
    "pnn_outer_vec": _single(library.PNN, use_inner=False, use_outter=True, kernel_type="vec"),
    "pnn_outer_num": _single(library.PNN, use_inner=False, use_outter=True, kernel_type="num"),
    "pnn_both": _single(library.PNN, use_outter=True),
    "ccpm": _sparse_only(library.CCPM, hidden=True),
    "onn": _standard(library.ONN),
    "mlr": lambda c, s: (library.MLR(c.all), c.all),
    "afn": _standard(library.AFN, mlp="afn_dnn_hidden_units", ltl_hidden_size=32),
    "din": _histories(library.DIN, "att_hidden_size"),
    "din_softmax": _histories(library.DIN, "att_hidden_size", att_activation="relu", att_weight_normalization=True),
    "dien_gru": _histories(library.DIEN, "att_hidden_units", gru_type="GRU"),
    "dien_aigru": _histories(library.DIEN, "att_hidden_units", gru_type="AIGRU"),
    "dien_agru": _histories(library.DIEN, "att_hidden_units", gru_type="AGRU"),
    "dien_augru": _histories(library.DIEN, "att_hidden_units", gru_type="AUGRU"),
    "sharedbottom": lambda c, s: (
        library.SharedBottom(c.all, bottom_dnn_hidden_units=s.hidden, tower_dnn_hidden_units=(s.tower,)),
        c.all,
    ),
    "esmm": lambda c, s: (library.ESMM(c.all, tower_dnn_hidden_units=s.hidden), c.all),
    "mmoe": _experts(library.MMOE, num_experts=4),
    "ple": _experts(library.PLE, shared_expert_num=2, specific_expert_num=2),
}


def initialise(module: nn.Module, scale: Scale, x: torch.Tensor) -> None:
    """Draws weights that make activations O(1) and scores differ; the library's own are all but zero.

    Each linear layer is scaled, when `x` first passes it, so that its results vary by about 1 over the rows.
    """
    rng = torch.Generator().manual_seed(SEED)

    def normal(tensor: torch.Tensor, std: float, mean: float = 0.0) -> None:
        tensor.normal_(mean, std, generator=rng)

    with torch.no_grad():
        for name, parameter in module.named_parameters():
            linear = name.startswith(("linear_model", "region_linear", "base_linear"))
            if linear:
                normal(parameter, 0.2)
            elif "embedding_dict" in name:
                # Sums over all pairs of fields, as in FM, become O(1).
                normal(parameter, 0.3 / math.sqrt(scale.dim))
            elif name.endswith(("bias", "alpha")) or parameter.ndim == 1 or "ltl_weights" in name:
                normal(parameter, 0.1)
            elif isinstance(module.get_submodule(name.rpartition(".")[0]), nn.Conv1d | nn.Conv2d):
                normal(parameter, 1.0 / math.sqrt(parameter[0].numel()))
            else:
                # Along the last axis, but for columns: cross kernels are [layers, in, out], those of the outer
                # product [in, pairs, out].
                fan_in = parameter.shape[-1] if parameter.shape[-1] > 1 else parameter.shape[-2]
                normal(parameter, 1.0 / math.sqrt(max(fan_in, 4)))
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm1d):
                normal(layer.running_mean, 0.2)
                layer.running_var.uniform_(0.6, 1.4, generator=rng)
                normal(layer.weight, 0.2, mean=1.0)
    hooks: list[Any] = []
    done: set[nn.Module] = set()

    def first_time(layer: nn.Module) -> bool:
        done_before = layer in done
        done.add(layer)
        return not done_before

    def unit(layer: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> torch.Tensor | None:
        """Scales by a power of two, so that the calibration's own rounding does not matter."""
        std = float(out.std(dim=0).mean())
        if not first_time(layer) or not std > 0:
            return None
        layer.weight.mul_(2.0 ** -round(math.log2(std)))
        return layer.forward(*args)

    def centre(layer: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """Moves logits to where the sigmoid is steep."""
        if first_time(layer):
            layer.bias.fill_(-round(float(args[0].mean()), 1))

    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d):
            hooks.append(layer.register_forward_hook(unit))
        elif isinstance(layer, PredictionLayer) and layer.use_bias:
            hooks.append(layer.register_forward_pre_hook(centre))
    with torch.no_grad():
        module(x)
    for hook in hooks:
        hook.remove()


def build(name: str, scale_name: str = "small") -> tuple[nn.Module, list[InputSpec]]:
    """Builds a model in eval mode, with fixed random weights, and the description of its input."""
    scale = SCALES[scale_name]
    columns = Columns(scale)
    torch.manual_seed(SEED)
    module, used = MODELS[name](columns, scale)
    module.eval()
    spec = columns.spec(used)
    found = getattr(module, "feature_index", None)
    if found is not None and dict(found) != dict(build_input_features(list(used))):
        raise ValueError("the model lays out its input differently")
    rows = np.concatenate([sample([spec], 8, seed=k)["X"] for k in range(CALIBRATION_ROWS // 8)])
    initialise(module, scale, torch.from_numpy(rows))
    module.output_names = ["y"]
    return module, [spec]


def check(model: onnx.ModelProto, module: nn.Module, specs: Sequence[InputSpec]) -> str:
    """Compares with torch; a failure at N = 1, which exporters specialise, is only told.

    Raises:
        ValueError: If a result at N > 1 is wrong, or all scores are alike.
    """
    opened = session(model)
    found = []
    for n in CHECK_ROWS:
        feeds = sample(specs, n, seed=n)
        try:
            with torch.no_grad():
                expected = module(torch.from_numpy(feeds["X"].copy())).numpy()
            (got,) = run(opened, feeds)
            if got.shape != expected.shape:
                raise ValueError(f"shape {got.shape} at N = {n}, torch has {expected.shape}")
            worst = float(np.abs(got - expected).max())
            if not worst < TOLERANCE:
                raise ValueError(f"differs by {worst:.1e} at N = {n}")
            found.append(f"N={n} {worst:.0e}")
            if n > 3:
                spread = float(expected.std(axis=0).min())
                found.append(f"spread {spread:.2g}")
                if not spread > 1e-3:
                    raise ValueError(f"scores hardly vary: {spread:.1e}")
        except Exception as error:
            if n > 1:
                raise
            found.append(f"N=1 fails ({_first_line(error)})")
    return ", ".join(found)


def export(name: str, scale: str, exporters: Sequence[str], outdir: Path) -> Iterator[str]:
    """Exports one model and yields the exporters that failed."""
    for exporter in exporters:
        (outdir / f"{name}.{exporter}.onnx").unlink(missing_ok=True)
    try:
        module, specs = build(name, scale)
    except Exception as error:  # a model that cannot be built must not stop the others
        print(f"FAILED {name}: not built: {type(error).__name__}: {_first_line(error)}", flush=True)
        yield from exporters
        return
    for exporter in exporters:
        path = outdir / f"{name}.{exporter}.onnx"
        try:
            with silence():
                model = export_torchscript(module, specs) if exporter == "torchscript" else export_dynamo(module, specs)
            strip_local_text(model)
            summary = check(model, module, specs)
            write(model, path)
            # Only next to a model, so that a folder holds no roles of models that are not there.
            (outdir / f"{name}.roles.yaml").write_text(roles_text(specs))
        except Exception as error:  # an exporter may fail in any way; the others go on
            print(f"FAILED {path.name}: {type(error).__name__}: {_first_line(error)}", flush=True)
            yield exporter
        else:
            size = path.stat().st_size / 1024
            print(f"{path.name}: {len(model.graph.node)} nodes, {size:.0f} KB, {summary}", flush=True)


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Keeps quiet what exporters print past Python's streams: on a failure, the whole graph."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    kept = [os.dup(1), os.dup(2)]
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for descriptor, copy in enumerate(kept, start=1):
            os.dup2(copy, descriptor)
            os.close(copy)


def _first_line(error: BaseException) -> str:
    """The first line of an error, of the one behind it where an exporter only wraps that."""
    while isinstance(error, torch.onnx.errors.OnnxExporterError) and error.__cause__ is not None:
        error = error.__cause__
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("outdir", type=Path)
    parser.add_argument("--scale", choices=tuple(SCALES), default="small")
    parser.add_argument("--names", nargs="+", choices=tuple(MODELS), default=tuple(MODELS), metavar="NAME")
    parser.add_argument("--exporter", choices=("torchscript", "dynamo", "both"), default="both")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for logger in ("torch.onnx", "torch.export", "torch._export", "torch"):
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    options.outdir.mkdir(parents=True, exist_ok=True)
    exporters = ("torchscript", "dynamo") if options.exporter == "both" else (options.exporter,)
    failures = [
        f"{name} ({exporter})"
        for name in options.names
        for exporter in export(name, options.scale, exporters, options.outdir)
    ]
    print(f"{len(options.names) * len(exporters) - len(failures)} files written", end="")
    print(f", failed: {', '.join(failures)}" if failures else "")
    return 0 if len(failures) < len(options.names) * len(exporters) else 1


if __name__ == "__main__":
    sys.exit(main())
