"""Lets the tests import what `support` and `scripts` hold."""

from __future__ import annotations

import sys
from pathlib import Path

# Not this folder itself: its `onnxrank` would hide the package of an editable install.
sys.path.insert(0, str(Path(__file__).resolve().parent / "support"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
