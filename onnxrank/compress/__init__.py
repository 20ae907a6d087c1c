"""Smaller and faster models that lose no more accuracy than was allowed, and show it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxrank.compress.engine import Options, Result, compress

__all__ = ["Options", "Result", "compress"]


def __getattr__(name: str) -> Any:
    """Imports the engine when it is asked for."""
    if name in __all__:
        from onnxrank.compress import engine

        return getattr(engine, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
