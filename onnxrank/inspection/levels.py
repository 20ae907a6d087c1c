"""The levels of a tensor's entries as a report tells them: as a whole, and by blocks."""

from __future__ import annotations

import numpy as np

from onnxrank.inspection.report import Block
from onnxrank.roles import format_ranges
from onnxrank.transfers import Levels, is_uniform
from onnxrank.values import Level, split_axis

NAMES = {Level.UNREAD: "unread", Level.CONSTANT: "constant", Level.REQUEST: "request", Level.CANDIDATE: "candidate"}


def summed_up(levels: Levels) -> tuple[str, float, tuple[Block, ...]]:
    """A tensor's level, the share of its entries that need be made but once, and its blocks."""
    read = levels[levels != Level.UNREAD] if levels.size and levels.min() < 0 else levels
    if not read.size:
        return "constant", 1.0, ()
    low, high = int(read.min()), int(read.max())
    once = float((levels < Level.CANDIDATE).mean())
    level = NAMES[Level(high)] if high < Level.CANDIDATE or low == high else "mixed"
    if is_uniform(levels) or (levels == levels.flat[0]).all():
        return level, once, ()
    found = split_axis(levels.astype(np.int64))
    if found is None:
        return level, once, ()
    axis, parts = found
    blocks = (
        Block(axis, format_ranges(at.tolist()), NAMES[Level(int(levels.take(at[0], axis).flat[0]))]) for at in parts
    )
    return level, once, tuple(blocks)
