"""Positions as half-open ranges: "0:3,20"."""

from __future__ import annotations

import re
from collections.abc import Sequence

from onnxrank.errors import UsageError

_MAX_POSITION = 1 << 24


def format_ranges(positions: Sequence[int]) -> str:
    """Write positions as half-open ranges: (0, 1, 2, 20) is "0:3,20"."""
    runs: list[list[int]] = []
    for position in sorted(set(positions)):
        if runs and runs[-1][1] == position:
            runs[-1][1] += 1
        else:
            runs.append([position, position + 1])
    return ",".join(str(lo) if hi == lo + 1 else f"{lo}:{hi}" for lo, hi in runs)


def parse_ranges(text: str) -> tuple[int, ...]:
    """Read half-open ranges: "0:3,20" is (0, 1, 2, 20), sorted and without repeats.

    Raises:
        UsageError: If `text` is anything else, or a range is empty.
    """
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,18})\s*(?::\s*([0-9]{1,18})\s*)?", part)
        if match is None:
            raise UsageError(
                f"{text!r} is not a list of positions. Write half-open ranges and single positions, such as 0:13,20."
            )
        low = int(match[1])
        high = low + 1 if match[2] is None else int(match[2])
        if high <= low:
            raise UsageError(f"The range {part.strip()} in {text!r} is empty: ranges are half-open, low:high.")
        if high > _MAX_POSITION:
            raise UsageError(f"The range {part.strip()} in {text!r} goes past position {_MAX_POSITION}, the limit.")
        found.update(range(low, high))
    return tuple(sorted(found))
