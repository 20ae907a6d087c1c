"""The command line, a module per command."""

from __future__ import annotations

from onnxrank.cli.app import cli, main

__all__ = ["cli", "main"]
