"""What is said of measured times."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

from onnxrank.profiling.render import conclusion
from onnxrank.profiling.report import BreakEven, Speedup


def profile(kind: str, *significant: bool) -> Any:
    speedup = Speedup(1.2, 0.9, 1.3, False)
    points = [
        SimpleNamespace(candidates=n, speedup=dataclasses.replace(speedup, significant=s))
        for n, s in zip((8, 64, 512), significant, strict=True)
    ]
    return SimpleNamespace(points=points, break_even=BreakEven(kind, 40 if kind != "never" else None))


@pytest.mark.parametrize(
    ("kind", "significant", "said"),
    [
        ("always", (True, True, True), "2 is faster at every number measured."),
        ("always", (False, True, True), "2 is faster at N = 64, 512; elsewhere no difference can be told."),
        ("always", (False, False, False), "No difference can be told at any number measured."),
        ("never", (False, False, False), "No difference can be told at any number measured."),
        ("never", (True, False, False), "2 is not faster at any number of candidates."),
        ("measured", (True, True, True), "2 is faster from 40 candidates on."),
    ],
)
def test_nothing_is_said_that_the_intervals_do_not_show(kind: str, significant: tuple[bool, ...], said: str) -> None:
    assert conclusion(profile(kind, *significant), "2") == said
