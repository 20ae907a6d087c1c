"""A rule that gives up leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers import Graph
from hypothesis import given
from hypothesis import strategies as st
from onnx import ModelProto, NodeProto
from onnxrank.rules import RULES, fc

from onnxrank import feeds
from onnxrank import model as files
from onnxrank.journal import Journal
from onnxrank.rewrite import Rewrite
from onnxrank.roles import resolve
from onnxrank.rule import Rule
from onnxrank.study import Study
from onnxrank.transform import Transformation
from onnxrank.values import Sources, Unrepresentable, canonical, codes_of


@given(st.lists(st.sampled_from(["list", "dict", "put", "mark", "back"]), max_size=40))
def test_back_to_any_mark(steps: list[str]) -> None:
    """As if a copy had been kept at every mark."""

    class Owner:
        value = 0

    journal, owner = Journal(), Owner()
    grown: list[int] = []
    known: dict[int, int] = {}
    journal.watch(grown, known)
    kept: list[tuple[Any, tuple[Any, ...]]] = []
    for k, step in enumerate(steps):
        if step == "list":
            grown.append(k)
        elif step == "dict":
            known[k] = k
        elif step == "put":
            journal.put(owner, "value", k + 1)
        elif step == "mark":
            kept.append((journal.mark(), (list(grown), dict(known), owner.value)))
        elif kept:
            mark, state = kept.pop()
            journal.back(mark)
            assert (grown, known, owner.value) == state


def test_numbers_of_sources_are_not_used_again() -> None:
    """Codes of a source that was taken back are noticed."""
    sources = Sources()
    sources.add((), 1, "kept")
    count = sources.count
    stale = codes_of(sources.add(((4,),), 1, "gone"))
    sources.forget(count)
    fresh = codes_of(sources.add(((4,),), 1, "new"))
    assert not np.isin(fresh, stale).any() and sources.of(fresh)[0].name == "new"
    for ask in (lambda: sources.of(stale), lambda: sources[count]):
        with pytest.raises(LookupError, match="taken back"):
            ask()


def model() -> ModelProto:
    g, rng = Graph(), np.random.default_rng(0)
    user, item = g.input("user", ["N", 96]), g.input("item", ["N", 16])
    x = g.op("Concat", user, item, axis=1)
    for width in (112, 64):
        x = g.op("Relu", g.op("Gemm", x, g.const(rng.integers(-2, 3, (width, 64))), g.const(rng.integers(0, 3, 64))))
    g.output(x, ["N", 64])
    return g.model()


def transformed(rules: tuple[Rule, ...]) -> Transformation:
    made = model()
    loaded = files.load(made)
    study = Study(made, resolve(feeds.describe(made), request=["user"]), loaded)
    out = Transformation(study, rules, "request", True, 512)
    out.result = out.run()  # type: ignore[attr-defined]
    return out


def nosy(give_up: Callable[[], Any]) -> Rule:
    """A rule that does all that `fc` does, and more, and then gives up."""

    def gemm(rw: Rewrite, node: NodeProto) -> Any:
        found = fc.gemm(rw, node)
        assert found is not None
        name = rw.tensor(rw.settle(found[0]))
        rw.emit.add("Neg", [name])
        rw.emit.constant(np.arange(7.0))
        rw.emit.split(name, 1, 2)
        rw.claim(node.output[0])
        rw.zero(1), rw.one(1)
        rw.new((canonical([3]),), 1, ())
        rw.emit.rule = "left behind"
        return give_up()

    return Rule(
        name="nosy", title="", identity="", source="", legal="", refuses="", exactness="", operators={"Gemm": gemm}
    )


def refuse() -> None:
    raise Unrepresentable("not this one")


def fail() -> None:
    raise KeyError("oh")


@pytest.mark.parametrize("give_up", [lambda: None, refuse, fail, lambda: [None], lambda: 3, lambda: []])
def test_nothing_is_left_behind(give_up: Callable[[], Any]) -> None:
    """The graph is, to the byte, that of the rules without it."""
    plain, other = transformed(RULES), transformed((nosy(give_up), *RULES))
    assert other.result.SerializeToString(deterministic=True) == plain.result.SerializeToString(deterministic=True)  # type: ignore[attr-defined]
    assert "nosy" not in other.rw.applied and other.rw.emit.initializers.keys() == plain.rw.emit.initializers.keys()
    assert [e.proto for e in other.rw.emit.nodes] == [e.proto for e in plain.rw.emit.nodes]


def test_work_that_was_undone_is_done_again() -> None:
    """A function of `once` that was first called by a rule that gave up makes its tensors anew."""
    calls: list[str] = []

    def peeking(rw: Rewrite, node: NodeProto) -> None:
        if not hasattr(rw, "ask"):
            rw.ask = rw.once(lambda: calls.append(rw.emit.add("Identity", ["user"])) or calls[-1])  # type: ignore[attr-defined, func-returns-value]
        rw.ask()  # type: ignore[attr-defined]

    rule = Rule(
        name="peeking",
        title="",
        identity="",
        source="",
        legal="",
        refuses="",
        exactness="",
        operators={"Gemm": peeking},
    )
    made = transformed((rule, *RULES))
    assert len(calls) == 2 and not any(n.op_type == "Identity" for n in made.result.graph.node)  # type: ignore[attr-defined]
