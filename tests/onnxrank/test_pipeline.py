"""What surrounds the passes of `optimize`: processes that were begun, and how often garbage is looked for."""

from __future__ import annotations

import gc
import threading

import pytest
from helpers import Graph, whole_numbers
from onnx import ModelProto

from onnxrank import optimize
from onnxrank.errors import ModelError, UsageError
from onnxrank.passes import studying
from onnxrank.verify import gate
from onnxrank.verify.side import Side


def deep(steps: int) -> ModelProto:
    g = Graph()
    x = g.op("Concat", g.input("user", ["N", 64]), g.input("item", ["N", 8]), axis=1)
    x = g.op("MatMul", x, g.const(whole_numbers(72, 16)))
    for _ in range(steps):
        x = g.op("Tanh", x)
    g.output(x, ["N", 16])
    return g.model()


@pytest.mark.slow
def test_a_large_original_is_loaded_while_it_is_studied(monkeypatch: pytest.MonkeyPatch) -> None:
    """And its process does not outlive a model that turns out to be none."""
    seen: list[str] = []
    begun, close, study = gate.begun, Side.close, studying.Study

    def begins(*given: object) -> Side | None:
        seen.append("begun")
        return begun(*given)  # type: ignore[arg-type]

    def closes(side: Side, good: bool = True) -> None:
        seen.append(f"closed {side.name}")
        close(side, good)

    def studies(*given: object, **how: object) -> object:
        seen.append("studied")
        return study(*given, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(gate, "begun", begins)
    monkeypatch.setattr(Side, "close", closes)
    monkeypatch.setattr(studying, "Study", studies)
    wrong = deep(1000)
    wrong.graph.node[-1].input[0] = "nowhere"
    with pytest.raises(ModelError, match="nowhere"):
        optimize(wrong, request=["user"])
    assert seen == ["begun", "studied", "closed original"]
    seen.clear()
    optimize(deep(1000), request=["user"])
    assert seen == ["begun", "studied", "closed original"]


def test_garbage_is_looked_for_as_often_as_before_when_a_run_is_over() -> None:
    before = gc.get_threshold()
    during: list[int] = []
    reached, go_on = threading.Event(), threading.Event()

    def waits(stage: str) -> None:
        during.append(gc.get_threshold()[0])
        reached.set()
        assert go_on.wait(60)

    how = {"request": ["user"], "check": False}
    first = threading.Thread(target=lambda: optimize(deep(1), progress=waits, **how))  # type: ignore[arg-type]
    first.start()
    assert reached.wait(60)
    optimize(deep(1), progress=lambda _: during.append(gc.get_threshold()[0]), **how)  # type: ignore[arg-type]
    with pytest.raises(UsageError):
        optimize(deep(1), request=["nobody"], check=False)
    assert gc.get_threshold()[0] > before[0]  # for the one that still runs
    go_on.set()
    first.join()
    assert gc.get_threshold() == before and min(during) > before[0]


def test_garbage_is_left_alone_where_it_is_not_looked_for() -> None:
    before = gc.get_threshold()
    gc.set_threshold(0, 5, 5)
    try:
        optimize(deep(1), request=["user"], check=False, progress=lambda _: gc.get_threshold() == (0, 5, 5) or 1 / 0)
        assert gc.get_threshold() == (0, 5, 5)
    finally:
        gc.set_threshold(*before)
