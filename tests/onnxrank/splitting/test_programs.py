"""Random programs, divided: both models together, the state through bytes, give the same bits as the whole one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import pytest
from helpers import Feed, exposed, feeds, patterns, run
from hypothesis import HealthCheck, given, note, reject, settings
from hypothesis import strategies as st
from programs import program

from onnxrank import halves, pipeline
from onnxrank.errors import NothingApplied, UsageError
from onnxrank.splitting import Options, split
from onnxrank.splitting.cut import _LEAST as FREE
from onnxrank.splitting.engine import Job

SEEDS, STEPS = st.integers(0, 1 << 32), st.integers(1, 20)
EXAMPLES = settings(
    max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


def _held(seed: int, steps: int, **options: Any) -> None:
    made_up = program(seed, steps)
    note(onnx.printer.to_text(made_up.model))
    with TemporaryDirectory() as folder:
        out = Path(folder, "out")
        try:
            split(made_up.model, out, request=patterns(made_up.inputs), check=False, options=Options(**options))
        except NothingApplied:
            reject()
        except UsageError as e:
            assert "cannot be packed" in str(e)
            reject()
        onnx.checker.check_model(onnx.load(out / "request.onnx"), full_check=True)
        onnx.checker.check_model(onnx.load(out / "candidate.onnx"), full_check=True)
        onnx.checker.check_model(halves.load(out).proto, full_check=True)
        pair = halves.Pair(out)
        once = {i["name"] for i in halves.read_contract(out)["models"]["request"]["inputs"]}
        names = [o.name for o in made_up.model.graph.output]
        for n in (1, 2, 5):
            whole, parts = feeds(made_up.inputs, n)
            # Where nothing was rewritten, inputs have a row per candidate still.
            feed: Feed = {k: v for k, v in {**parts, **whole}.items() if k not in once} | {k: parts[k] for k in once}
            want = run(made_up.model, whole)
            for name, got in zip(names, pair.run(names, feed), strict=True):
                assert got.dtype == want[name].dtype and got.shape == want[name].shape
                np.testing.assert_array_equal(got, want[name])


@pytest.mark.slow
@EXAMPLES
@given(seed=SEEDS, steps=STEPS)
def test_same_bits(seed: int, steps: int) -> None:
    _held(seed, steps)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"state": "packed"}, {"guard": False, "most": 1 << 40}])
@settings(EXAMPLES, max_examples=150)
@given(seed=SEEDS, steps=STEPS)
def test_same_bits_of_many(options: dict[str, Any], seed: int, steps: int) -> None:
    _held(seed, steps, **options)


# --- the smallest state -----------------------------------------------------------------------------------------------

MOST_STEPS = 10


def _every_state(job: Job, feed: Feed) -> Iterator[tuple[frozenset[int], int, float]]:
    """Of every division of the graph the nodes in front of it, bytes of the state, and seconds of what is done again.

    By the graph and a run alone: what depends on the request and on no candidate, and how many bytes that has.
    """
    nodes = [(set(n.input) - {""}, set(n.output) - {""}) for n in job.model.graph.node]
    session = exposed(job.model)
    outputs = [o.name for o in session.get_outputs()]
    found = session.run(outputs, {i.name: feed[i.name] for i in session.get_inputs()})
    values = feed | dict(zip(outputs, found, strict=True))
    request, candidate = set(), set()
    levels = []
    for name, role in job.roles.inputs.items():
        (request if role.level == "request" else candidate).add(name)
    for reads, gives in nodes:
        levels.append("candidate" if reads & candidate else "request" if reads & request else "constant")
        {"candidate": candidate, "request": request, "constant": set()}[levels[-1]].update(gives)
    steps = [k for k, level in enumerate(levels) if level == "request"]
    if len(steps) > MOST_STEPS:
        reject()
    wanted = {o.name for o in job.model.graph.output}
    wanted |= {name for k, level in enumerate(levels) if level == "candidate" for name in nodes[k][0]}
    for inside in itertools.chain.from_iterable(itertools.combinations(steps, n) for n in range(len(steps) + 1)):
        late = set(steps) - set(inside)
        made = set().union(*(nodes[k][1] for k in late))
        if any(nodes[k][0] & made for k in inside):
            continue
        state = (wanted.union(*(nodes[k][0] for k in late)) & request) - made
        seconds = sum(max(job.estimates.seconds(k, job.estimates.usual), FREE) for k in late)
        yield frozenset(inside), sum(values[name].nbytes for name in state), seconds


def _smallest(seed: int, steps: int) -> None:
    made_up = program(seed, steps)
    note(onnx.printer.to_text(made_up.model))
    if any(isinstance(d, str) for g in made_up.inputs for d in g.shape):
        reject()
    result = pipeline.optimize(made_up.model, request=patterns(made_up.inputs), check=False)
    try:
        job = Job(result, Options())
    except NothingApplied:
        reject()
    whole, parts = feeds(made_up.inputs, 3)
    alone = {n for n, role in job.roles.inputs.items() if role.level == "request"}
    feed = {n: parts[n] if n in alone or n not in whole else whole[n] for n in job.roles.inputs}
    every = list(_every_state(job, feed))
    mine = {job.levels.request[k] for k in job.state.cut.request}
    ((own, spent),) = ((size, seconds) for inside, size, seconds in every if inside == mine)
    assert own == job.state.cut.bytes
    assert own <= 1.05 * min(size for _, size, seconds in every if seconds <= spent)
    least = min(size for _, size, _ in every)
    # Where bytes decide alone, no division has fewer.
    try:
        small = Job(result, Options(most=1)).state.cut.bytes
    except UsageError as e:
        assert f"it has {least} at least" in str(e)
    else:
        assert small == least <= 1


@settings(EXAMPLES, max_examples=6)
@given(seed=SEEDS, steps=STEPS)
def test_no_division_has_a_smaller_state(seed: int, steps: int) -> None:
    """Of all divisions of a program, by what they hand over when they run."""
    _smallest(seed, steps)


@pytest.mark.slow
@settings(EXAMPLES, max_examples=150)
@given(seed=SEEDS, steps=STEPS)
def test_no_division_of_many_has_a_smaller_state(seed: int, steps: int) -> None:
    _smallest(seed, steps)
