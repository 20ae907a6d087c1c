"""`split`: one ranking model becomes two, one that runs once per request and one that runs on what it gives."""

from __future__ import annotations

from onnxrank.splitting.engine import Split, split
from onnxrank.splitting.options import Options
from onnxrank.splitting.report import Report

__all__ = ["Options", "Report", "Split", "split"]
