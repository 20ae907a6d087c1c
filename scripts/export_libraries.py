"""Exports models of torch-rechub, RecBole, FuxiCTR (LongCTR) and transformers to ONNX, with their roles files.

    pip install transformers
    pip install --no-deps torch-rechub recbole fuxictr
    pip install pandas scikit-learn h5py polars tqdm pyyaml
    python scripts/export_libraries.py out
    python scripts/coverage.py out/rechub out/recbole out/fuxictr out/transformers --no-time --length 70

Users have 12 to 20 features, candidates 2 to 12, histories 64 entries; ids are vectors of 16. Models with a history are
exported with one of symbolic length, too (`*_dynl`). What the libraries import for training and models do not use, such
as ray, is replaced by a stand-in where it is not installed.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import logging
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import yaml
from torch import Tensor, nn

SEED, ROWS = 7, 3
VOCABULARY, WIDTH, HISTORY = 1000, 16, 64
NOT_NEEDED = (
    "ray ray.data ray.data.datasource ray.data.datasource.filename_provider thop colorlog colorama texttable psutil "
    "tabulate tensorboard plotly hyperopt scipy scipy.sparse torch.utils.tensorboard lightgbm xgboost"
).split()
MLP = {"dims": [256, 128], "dropout": 0.1, "activation": "relu"}


@dataclass(frozen=True)
class Field:
    """An input.

    Attributes:
        name: Its name.
        level: `request` or `candidate`.
        kind: `id`, `value`, or `mask` of a history.
        history: Whether it has an entry per position of the history.
    """

    name: str
    level: str
    kind: str = "id"
    history: bool = False

    def example(self) -> Tensor:
        """Entries for a few rows."""
        shape = (ROWS, HISTORY) if self.history else (ROWS,)
        if self.kind == "id":
            return torch.randint(1, VOCABULARY, shape)
        return torch.ones(shape) if self.kind == "mask" else torch.rand(shape)

    def role(self) -> dict[str, Any]:
        """Its entry in the roles file."""
        ranges = {"id": [1, VOCABULARY - 1], "mask": [0, 1], "value": None}[self.kind]
        return {"level": self.level} | ({"range": ranges} if ranges else {})


@dataclass(frozen=True)
class Export:
    """A model to export.

    Attributes:
        name: Library and name.
        make: Makes the model, which takes a tensor per field.
        fields: Its inputs.
        symbolic: Whether its history may have any length.
    """

    name: str
    make: Callable[[], nn.Module]
    fields: Sequence[Field]
    symbolic: bool = False


class Called(nn.Module):
    """A model that takes its inputs one by one.

    Args:
        model: The model.
        names: Names of the inputs.
        call: Calls the model with the inputs by name.
    """

    def __init__(
        self, model: nn.Module, names: Sequence[str], call: Callable[[Any, dict[str, Tensor]], Tensor]
    ) -> None:
        super().__init__()
        self.model, self.names, self.call = model, tuple(names), call

    def forward(self, *inputs: Tensor) -> Any:
        return self.call(self.model, dict(zip(self.names, inputs, strict=True)))


# --- torch-rechub ----------------------------------------------------------------------------------------------------


def rechub() -> Iterator[Export]:
    """Ranking and multi-task models of torch-rechub."""
    from torch_rechub.basic.features import DenseFeature, SequenceFeature, SparseFeature
    from torch_rechub.models import multi_task as tasks
    from torch_rechub.models import ranking as models

    values = [DenseFeature(f"u_d{k}") for k in range(6)] + [DenseFeature(f"i_d{k}") for k in range(4)]
    users = [SparseFeature(f"u_s{k}", VOCABULARY, embed_dim=WIDTH) for k in range(14)]
    items = [SparseFeature(f"i_s{k}", VOCABULARY, embed_dim=WIDTH) for k in range(8)]
    target = [SparseFeature(f"i_{k}", VOCABULARY, embed_dim=WIDTH) for k in ("item", "cate")]
    history = [
        SequenceFeature(f"h_{k}", VOCABULARY, embed_dim=WIDTH, pooling="concat", shared_with=f"i_{k}")
        for k in ("item", "cate")
    ]
    ids = users + items
    every = values + ids
    towers = [{"dims": [64]}] * 2
    two = ["classification"] * 2

    def field(feature: Any) -> Field:
        kind = "value" if isinstance(feature, DenseFeature) else "id"
        level = "candidate" if feature.name.startswith("i_") else "request"
        return Field(feature.name, level, kind, isinstance(feature, SequenceFeature))

    def attention(activation: str) -> Callable[[], nn.Module]:
        how = {"dims": [64, 32], "activation": activation}
        return lambda: models.DIN(ids, history, target, {"dims": [256, 128]}, how)

    found: dict[str, tuple[Callable[[], nn.Module], list[Any]]] = {
        "widedeep": (lambda: models.WideDeep(values, ids, MLP), every),
        "deepfm": (lambda: models.DeepFM(every, ids, MLP), every),
        "dcn": (lambda: models.DCN(every, 3, MLP), every),
        "dcnv2": (lambda: models.DCNv2(every, 3, MLP), every),
        "dcnv2_stacked": (lambda: models.DCNv2(every, 3, MLP, "stacked", use_low_rank_mixture=False), every),
        "edcn": (lambda: models.EDCN(ids, 3, dict(MLP)), ids),
        "fibinet": (lambda: models.FiBiNet(ids, MLP), ids),
        "fibinet_all": (lambda: models.FiBiNet(ids, MLP, bilinear_type="field_all"), ids),
        "autoint": (lambda: models.AutoInt(ids, values, mlp_params=MLP), every),
        "afm": (lambda: models.AFM(ids, WIDTH), ids),
        "din": (attention("dice"), ids + history + target),
        "din_prelu": (attention("prelu"), ids + history + target),
        "bst": (lambda: models.BST(ids, history, target, MLP, 4, max_seq_len=HISTORY + 1), ids + history + target),
        "mmoe": (lambda: tasks.MMOE(every, two, 4, {"dims": [128]}, towers), every),
        "ple": (lambda: tasks.PLE(every, two, 2, 2, 2, {"dims": [128]}, towers), every),
        "shared_bottom": (lambda: tasks.SharedBottom(every, two, MLP, towers), every),
        "esmm": (lambda: tasks.ESMM(users, items, MLP, MLP), ids),
        "aitm": (lambda: tasks.AITM(every, 2, {"dims": [128]}, towers), every),
    }
    for name, (make, features) in found.items():
        names = [f.name for f in features]

        def called(make: Callable[[], nn.Module] = make, names: Sequence[str] = names) -> nn.Module:
            return Called(make(), names, lambda model, inputs: model(inputs))

        yield Export(f"rechub/{name}", called, [field(f) for f in features], name.startswith("din"))


# --- RecBole ---------------------------------------------------------------------------------------------------------


def recbole() -> Iterator[Export]:
    """Context-aware models of RecBole: one table for all fields, of users and items by turns."""
    from recbole.utils import FeatureSource, FeatureType

    users, items = [f"u{k}" for k in range(12)], [f"i{k}" for k in range(8)]
    order = [name for pair in zip(users, items, strict=False) for name in pair] + users[8:]
    of_users = {FeatureSource.USER, FeatureSource.USER_ID}

    class Dataset:
        field2type = dict.fromkeys(order, FeatureType.TOKEN)

        def fields(self, ftype: Any = None, source: Any = None) -> list[str]:
            if source is None or len(source) > 2:
                return order
            return [name for name in order if (name in users) == bool(of_users & set(source))]

        def num(self, field: str) -> int:
            return VOCABULARY

    class Settings(dict[str, Any]):
        """RecBole's configuration; what is not set is None."""

        final_config_dict = property(lambda self: self)

        def __missing__(self, key: str) -> None:
            return None

        def __getattr__(self, key: str) -> Any:
            return self[key]

    class Interaction(dict[str, Tensor]):
        interaction = property(lambda self: self)

    package = "recbole.model.context_aware_recommender"
    spec = importlib.util.find_spec("recbole")
    assert spec is not None and spec.origin is not None
    properties = Path(spec.origin).parent / "properties" / "model"

    def make(module: str, cls: str) -> nn.Module:
        settings = Settings(yaml.safe_load((properties / f"{cls}.yaml").read_text()) or {})
        settings.update(embedding_size=WIDTH, device="cpu", LABEL_FIELD="label", numerical_features=[])
        model = getattr(importlib.import_module(f"{package}.{module}"), cls)(settings, Dataset())
        return Called(model, order, lambda model, inputs: model.predict(Interaction(inputs)))

    fields = [Field(name, "request" if name in users else "candidate") for name in order]
    classes = (
        "AFM AutoInt DCN DCNV2 DeepFM DSSM EulerNet FFM FiGNN FM FNN FwFM KD_DAGFM LR NFM PNN WideDeep xDeepFM".split()
    )
    for cls in classes:
        module = cls.lower()
        yield Export(f"recbole/{module}", lambda module=module, cls=cls: make(module, cls), fields)  # type: ignore[misc]


# --- FuxiCTR ---------------------------------------------------------------------------------------------------------


def fuxictr() -> Iterator[Export]:
    """Models of long histories of FuxiCTR: ids of history and candidate go to their table as one vector."""

    class FilenameProvider:
        pass

    provider = sys.modules["ray.data.datasource.filename_provider"]
    if isinstance(provider, mock.MagicMock):
        provider.FilenameProvider = FilenameProvider  # a class of FuxiCTR's is derived of it
    from fuxictr.features import FeatureMap

    base = [f"u{k}" for k in range(10)] + [f"c{k}" for k in range(4)]
    features = FeatureMap("planted", ".")
    features.features = OrderedDict(
        (name, {"source": source, "type": "categorical", "vocab_size": VOCABULARY, "padding_idx": 0})
        for name, source in [*((n, "user") for n in base), ("item_id", "item"), ("cate_id", "item")]
    )
    features.labels, features.num_fields = ["label"], len(features.features)
    features.total_features = VOCABULARY * features.num_fields
    features.input_length, features.default_emb_dim = features.num_fields, WIDTH
    settings = {
        **{"model_id": "m", "gpu": -1, "task": "binary_classification", "embedding_dim": WIDTH, "learning_rate": 1e-3},
        **{"optimizer": "adam", "loss": "binary_crossentropy", "verbose": 0, "model_root": ".", "metrics": ["AUC"]},
    }
    fields = [Field(name, "request") for name in base]
    fields += [Field(name, "request", history=True) for name in ("hist_item", "hist_cate")]
    fields += [Field("mask", "request", "mask", True), Field("item", "candidate"), Field("cate", "candidate")]

    def call(model: Any, inputs: dict[str, Tensor]) -> Tensor:
        joined = {
            f"{k}_id": torch.cat([inputs[f"hist_{k}"], inputs[k].unsqueeze(1)], 1).flatten() for k in ("item", "cate")
        }
        return model(({name: inputs[name] for name in base}, joined, inputs["mask"]))["y_pred"]

    def make(name: str) -> nn.Module:
        model = getattr(importlib.import_module(f"model_zoo.LongCTR.{name}.{name}"), name)(features, **settings)
        return Called(model, [f.name for f in fields], call)

    for name in "DIN ETA SDIM SIM TWIN TransAct FinalMLP".split():
        yield Export(f"fuxictr/{name.lower()}", lambda name=name: make(name), fields, True)  # type: ignore[misc]


# --- transformers ----------------------------------------------------------------------------------------------------


def transformers() -> Iterator[Export]:
    """Small models of transformers over tokens of request and candidate, side by side or as source and target."""
    import transformers as library

    encoder: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    encoder |= {
        "intermediate_size": 128,
        "max_position_embeddings": 2 * HISTORY + 8,
        "num_labels": 1,
        "pad_token_id": 0,
    }
    t5 = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
    fields = [
        Field(f"{of}_{what}", level, kind, history=True)
        for of, level in (("query", "request"), ("item", "candidate"))
        for what, kind in (("ids", "id"), ("mask", "mask"))
    ]

    def joined(model: Any, inputs: dict[str, Tensor]) -> Tensor:
        ids, mask = (torch.cat([inputs[f"query_{k}"], inputs[f"item_{k}"]], 1) for k in ("ids", "mask"))
        return model(input_ids=ids, attention_mask=(mask > 0.5).long()).logits

    def decoded(model: Any, inputs: dict[str, Tensor]) -> Tensor:
        ids, mask = inputs["query_ids"], (inputs["query_mask"] > 0.5).long()
        found = model(input_ids=ids, attention_mask=mask, decoder_input_ids=inputs["item_ids"], use_cache=False)
        return found.logits[:, -1, :2]

    def make(name: str, kind: str, **how: Any) -> nn.Module:
        settings = getattr(library, f"{name}Config")(vocab_size=VOCABULARY, **how)
        whole: nn.Module = getattr(library, f"{name}For{kind}")(settings)
        return whole

    for name in "Bert Electra Roberta MPNet DebertaV2 Llama Qwen3".split():
        few = {"num_key_value_heads": 2, "head_dim": 16} if name in ("Llama", "Qwen3") else {}
        yield Export(
            f"transformers/{name.lower()}",
            lambda name=name, few=few: Called(  # type: ignore[misc]
                make(name, "SequenceClassification", **encoder, **few), [f.name for f in fields], joined
            ),
            fields,
        )
    source = [f.name for f in fields[:3]]
    yield Export(
        "transformers/t5", lambda: Called(make("T5", "ConditionalGeneration", **t5), source, decoded), fields[:3], True
    )


# --- exporting -------------------------------------------------------------------------------------------------------

LIBRARIES = {"rechub": rechub, "recbole": recbole, "fuxictr": fuxictr, "transformers": transformers}


def stand_in() -> None:
    """Puts stand-ins in the place of packages that are not installed, and of a name that numpy no longer has."""
    if not hasattr(np, "long"):
        np.long = np.int64  # type: ignore[attr-defined]
    for name in NOT_NEEDED:
        try:
            importlib.import_module(name)
        except ImportError:
            sys.modules[name] = mock.MagicMock(__spec__=ModuleSpec(name, None))


def export(wanted: Export, exporter: str, symbolic: bool, folder: Path) -> None:
    """Writes a model and its roles file."""
    torch.manual_seed(SEED)
    module = wanted.make().eval().requires_grad_(False)
    for weight in module.parameters():
        if weight.dim() > 1:
            nn.init.normal_(weight, std=0.1)
    stem = folder / f"{wanted.name}{'_dynl' if symbolic else ''}"
    stem.parent.mkdir(parents=True, exist_ok=True)
    names, inputs = [f.name for f in wanted.fields], tuple(f.example() for f in wanted.fields)
    how: dict[str, Any]
    if exporter == "dynamo":
        rows = torch.export.Dim("N")
        how = {"dynamic_shapes": (tuple({0: rows} for _ in names),), "external_data": False, "verbose": False}
    else:
        axes = {f.name: {0: "N", **({1: "L"} if symbolic and f.history else {})} for f in wanted.fields}
        how = {"dynamic_axes": axes | {"score": {0: "N"}}, "output_names": ["score"], "opset_version": 17}
    path = f"{stem}.{exporter}.onnx"
    torch.onnx.export(module, inputs, path, input_names=names, dynamo=exporter == "dynamo", **how)
    roles = {"inputs": {f.name: f.role() for f in wanted.fields}}
    Path(f"{stem}.roles.yaml").write_text(yaml.safe_dump(roles, sort_keys=False))


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("outdir", type=Path)
    parser.add_argument("--libraries", nargs="+", choices=tuple(LIBRARIES), default=tuple(LIBRARIES))
    parser.add_argument("--names", nargs="+", metavar="NAME", help="such as rechub/din; all if not given")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for logger in ("torch.onnx", "torch.export", "torch"):
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    stand_in()
    written = failed = 0
    for library in options.libraries:
        for model in LIBRARIES[library]():
            if options.names and model.name not in options.names:
                continue
            for exporter, symbolic in [("torchscript", False), ("dynamo", False), ("torchscript", True)]:
                if symbolic and not model.symbolic:
                    continue
                try:
                    export(model, exporter, symbolic, options.outdir)
                    written += 1
                except Exception as e:
                    failed += 1
                    first = (str(e).strip().splitlines() or [""])[0]
                    print(f"{model.name} ({exporter}) is not exported: {type(e).__name__}: {first[:150]}", flush=True)
    print(f"{written} files written, {failed} models not exported")
    return 0 if written else 1


if __name__ == "__main__":
    sys.exit(main())
