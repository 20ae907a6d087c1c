"""Models from and to files, by name of what is wrong with them; external data is looked at but never loaded.

`reading.py` loads a model, `external.py` finds its tensors and holds external data against the files there are,
`protos.py` has the normal form that everything else works on, and `saving.py` writes files that appear whole or not
at all.
"""

from onnxrank.model.external import tensor_data, tensors, without_external
from onnxrank.model.protos import flattened, overridable, sparse_data
from onnxrank.model.reading import MIN_OPSET, LoadedModel, load
from onnxrank.model.saving import check_output, replace_files, save, save_unchanged

__all__ = [
    "MIN_OPSET",
    "LoadedModel",
    "check_output",
    "flattened",
    "load",
    "overridable",
    "replace_files",
    "save",
    "save_unchanged",
    "sparse_data",
    "tensor_data",
    "tensors",
    "without_external",
]
