"""Reference ranking models in PyTorch: the families that onnxrank is built for and tested on.

torch is needed only to build a model; names, input specs and sampling work without it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from models.spec import InputSpec, column_text, columns, roles, sample

if TYPE_CHECKING:
    import torch

__all__ = ["NAMES", "TRIANGULAR", "InputSpec", "build", "column_text", "columns", "roles", "sample"]

# name -> (module, class); a class carries its sizes in `scales` and describes its inputs in `specs`.
_FAMILIES: dict[str, tuple[str, str]] = {
    "wide_deep": ("wide_deep", "WideDeep"),
    "deepfm": ("deepfm", "DeepFM"),
    "fwfm": ("fwfm", "FwFM"),
    "pnn": ("pnn", "PNN"),
    "dcn": ("dcn", "DCN"),
    "dcnv2_parallel": ("dcn", "DCNv2Parallel"),
    "dcnv2_stacked": ("dcn", "DCNv2Stacked"),
    "dcnv2_lowrank": ("dcn", "DCNv2LowRank"),
    "dcnv2_mix": ("dcn", "DCNv2Mix"),
    "dlrm": ("dlrm", "DLRM"),
    "xdeepfm": ("xdeepfm", "XDeepFM"),
    "autoint": ("autoint", "AutoInt"),
    "fibinet": ("fibinet", "FiBiNET"),
    "din": ("din", "DIN"),
    "dien": ("dien", "DIEN"),
    "bst": ("bst", "BST"),
    "history_transformer": ("history_transformer", "HistoryTransformer"),
    "mmoe": ("experts", "MMoE"),
    "ple": ("experts", "PLE"),
    "two_tower": ("two_tower", "TwoTower"),
    "hadamard_pairs": ("hadamard_pairs", "HadamardPairs"),
    "field_attention": ("field_attention", "FieldAttention"),
    "deepfm_packed": ("deepfm", "DeepFMPacked"),
    "mlp_batchnorm_layernorm": ("normalised_mlp", "NormalisedMLP"),
    "gru_history": ("gru_history", "GRUHistory"),
    "masked_pooling": ("masked_pooling", "MaskedPooling"),
    "sasrec_target": ("sasrec_target", "SASRecTarget"),
    "hstu": ("hstu", "HSTU"),
    "hstu_time": ("hstu", "HSTUTime"),
    "onetrans": ("onetrans", "OneTrans"),
    "rankmixer": ("rankmixer", "RankMixer"),
    "pepnet": ("pepnet", "PEPNet"),
    "masknet_parallel": ("masknet", "MaskNetParallel"),
    "masknet_serial": ("masknet", "MaskNetSerial"),
    "gdcn": ("gdcn", "GDCN"),
    "finalmlp": ("finalmlp", "FinalMLP"),
    "wukong": ("wukong", "Wukong"),
    "dlrm_bags": ("dlrm", "DLRMBags"),
    "transact": ("transact", "TransAct"),
    "hyformer": ("hyformer", "HyFormer"),
    "interformer": ("interformer", "InterFormer"),
    "edcn": ("edcn", "EDCN"),
    "destine": ("destine", "DESTINE"),
    "fignn": ("fignn", "FiGNN"),
    "dmr": ("dmr", "DMR"),
    "sim": ("sim", "SIM"),
}

# What to train instead of those above so that more is once per request; their exports are not kept.
_TRIANGULAR: dict[str, tuple[str, str]] = {
    "rdcn_parallel": ("rdcn", "RDCNParallel"),
    "rdcn_stacked": ("rdcn", "RDCNStacked"),
    "rdcn_lowrank": ("rdcn", "RDCNLowRank"),
    "triangular_autoint": ("triangular", "TriangularAutoInt"),
    "triangular_rankmixer": ("triangular", "TriangularRankMixer"),
}

NAMES: tuple[str, ...] = tuple(_FAMILIES)
TRIANGULAR: tuple[str, ...] = tuple(_TRIANGULAR)


def build(name: str, scale: str = "small", **overrides: Any) -> tuple[torch.nn.Module, list[InputSpec]]:
    """Builds a model with fixed random weights, in eval mode.

    Args:
        name: One of `NAMES` or `TRIANGULAR`.
        scale: `small` (a few KB, for tests) or `industrial` (sizes worth timing).
        **overrides: Constructor arguments that replace those of the scale.

    Returns:
        The module and the description of its inputs, in the order of the arguments of `forward`. The module's
        attribute `output_names` names its outputs.

    Raises:
        KeyError: If the name or the scale is unknown.
    """
    from models.layers import initialise

    families = _FAMILIES | _TRIANGULAR
    module_name, class_name = families[name]
    cls = getattr(import_module(f"models.{module_name}"), class_name)
    module = cls(**{**cls.scales[scale], **overrides})
    initialise(module, seed=list(families).index(name))
    return module, list(module.specs)
