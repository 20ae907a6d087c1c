"""`verify`: whether two models give the same scores, the same order, and the same function."""

from __future__ import annotations

from onnxrank.verify.engine import Engine, verify
from onnxrank.verify.options import Options
from onnxrank.verify.report import Case, Finding, Place, Report
from onnxrank.verify.words import failure

__all__ = ["Case", "Engine", "Finding", "Options", "Place", "Report", "failure", "verify"]
