"""Models are imported from the repository; what builds them needs torch, and exporters that onnxscript."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))

collect_ignore = []
if find_spec("torch") is None or find_spec("onnxscript") is None:
    collect_ignore += ["test_sparse_training.py", "test_train_document.py", "test_triangular.py"]
