"""Where the time of a request goes: onnxruntime's profiler, read by level, operator, rule and provider.

The nodes of a copy of the model are numbered in their names. onnxruntime's fusions keep the name of one of the nodes
they take in, so that nearly every kernel can be told to a node of the user's, and with it to a rule. Levels need no
names: a kernel is candidate-level if a shape that it writes changes with the number of candidates.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from onnx import GraphProto, ModelProto, NodeProto

from onnxrank import batches
from onnxrank.contract import RULE
from onnxrank.errors import EnvironmentProblem
from onnxrank.graphs import subgraphs
from onnxrank.joining import chooses
from onnxrank.plans import label
from onnxrank.profiling.report import Kernel, Kernels, Share
from onnxrank.profiling.sessions import Requests, Runner, Target, open_session
from onnxrank.runtime import PROVIDERS
from onnxrank.verify import sizes

_NUMBER = re.compile(r"@(\d+)@")
_COPIES = {"MemcpyFromHost", "MemcpyToHost"}
_CONTAINERS = {"If", "Loop", "Scan"}
_SUFFIX = "_kernel_time"
_LONGEST = 20
TELLING = (2, 3)
"""Numbers of candidates that tell levels apart, in a model of one plan."""
_WARM_RUNS = 2
_FEWEST_RUNS = 6
_MOST_RUNS = 200
_SECONDS = 0.5  # of profiled runs per number of candidates
_TRACED_RUNS = 3
_GAP = 100.0  # microseconds between numbers of candidates in a trace

Event = dict[str, Any]


@dataclass(frozen=True)
class Node:
    """What is known of a node of the model that is profiled.

    Attributes:
        name: As the user's model has it.
        rule: Rule of onnxrank it comes from; `none` for the user's own.
        once: Whether all that it makes is the same for all candidates.
    """

    name: str
    rule: str
    once: bool


def nodes_of(model: ModelProto, once: Mapping[str, bool], moved: bool) -> list[Node]:
    """The nodes of a model, for `Tracer.finish`.

    Args:
        model: The model, functions inlined.
        once: Per tensor whether it is the same for all candidates, as far as it was analysed.
        moved: Whether `broadcast` applied: it leaves nodes as they are but for the number of rows they see.
    """
    out = []
    for node in _run_nodes(model.graph):
        same = all(once.get(o, False) for o in node.output if o)
        rule = next((p.value for p in node.metadata_props if p.key == RULE), "broadcast" if moved and same else "none")
        out.append(Node(label(node), rule, same))
    return out


def telling(model: ModelProto) -> list[int]:
    """Numbers of candidates that tell levels apart: at two at least each node of the model runs."""
    return list(dict.fromkeys([*TELLING, *sizes.turns([model])]))


def _run_nodes(graph: GraphProto) -> list[NodeProto]:
    """The nodes of a graph, and behind them those of plans in it, or of one request and of several."""
    ways = [node for node in graph.node if chooses(node) or node.name == batches.NODE]
    inner = [n for node in ways for g in subgraphs(node) for n in _run_nodes(g)]
    return [*graph.node, *inner]


class Tracer:
    """Runs a model under onnxruntime's profiler at several numbers of candidates.

    Args:
        model: The model, functions inlined.
        folder: Where its external data lies.
        target: Where it runs; binding and graphs are left out.

    Raises:
        ModelError: onnxruntime does not take the model.
    """

    def __init__(self, model: ModelProto, folder: str | os.PathLike[str] | None, target: Target) -> None:
        numbered = ModelProto()
        numbered.CopyFrom(model)
        for k, node in enumerate(_run_nodes(numbered.graph)):
            node.name = f"@{k}@"
        self._target = Target(target.provider, target.threads)
        self._place = tempfile.TemporaryDirectory(prefix="onnxrank-")
        self._session = open_session(numbered, self._target, folder, trace=os.path.join(self._place.name, "profile"))
        self._order: list[int] = []
        self._telling = 0

    def once(self, candidates: int, requests: Requests) -> None:
        """Runs the model once, to tell levels apart: before the other runs, at the numbers of `telling`."""
        Runner(self._session, requests, self._target)(0)
        self._telling += 1
        self._order.append(candidates)

    def runs(self, candidates: int, requests: Requests) -> None:
        """Runs the model for a while at a number of candidates."""
        run = Runner(self._session, requests, self._target)
        took = min(run(k) for k in range(_WARM_RUNS))
        again = min(max(_FEWEST_RUNS, round(_SECONDS / max(took, 1e-6))), _MOST_RUNS)
        for k in range(again):
            run(k)
        self._order += [candidates] * (_WARM_RUNS + again)

    def finish(self, nodes: Sequence[Node], candidates: Sequence[int]) -> tuple[list[Kernels], list[Event]]:
        """Sums up the runs.

        Args:
            nodes: The nodes, from `nodes_of`.
            candidates: The numbers of candidates that `runs` was called with.

        Returns:
            The kernels per number of candidates, and events for a Chrome trace, a few runs each.

        Raises:
            EnvironmentProblem: The provider is another, and no kernel runs there.
        """
        events: list[Event] = json.loads(Path(self._session.end_profiling()).read_bytes())
        self._place.cleanup()
        runs = _by_run(events, self._order)
        levels = _Levels(runs)
        out: list[Kernels] = []
        traced: list[Event] = []
        for n in candidates:
            own = [r for at, r in runs[self._telling :] if at == n][_WARM_RUNS:]
            faster = sorted(own, key=lambda r: r.kernels_us)[: max(1, len(own) // 2)]
            out.append(_summed(n, faster, levels, nodes))
            end = max((e["ts"] + e["dur"] for e in traced), default=-_GAP)
            traced += _traced(n, own[:_TRACED_RUNS], levels, nodes, end + _GAP)
        wanted = PROVIDERS[self._target.provider]
        if out and not any(s.name == wanted for k in out for s in k.providers):
            raise EnvironmentProblem(
                f"No kernel of the model runs on {wanted}; all of them fell back to another provider."
            )
        return out, traced


@dataclass
class _Run:
    """Events of one run of the session."""

    session: Event
    kernels: list[Event]
    device: list[Event]

    @property
    def kernels_us(self) -> float:
        return float(sum(e["dur"] for e in self.kernels))


def _by_run(events: Sequence[Event], order: Sequence[int]) -> list[tuple[int, _Run]]:
    """Divides the profiler's events into runs."""
    whole = sorted((e for e in events if e.get("name") == "model_run"), key=lambda e: e["ts"])
    runs = [(n, _Run(e, [], [])) for n, e in zip(order, whole, strict=True)]
    timed = [e for e in events if e.get("cat") in ("Node", "Kernel") and e.get("dur") is not None]
    at = 0
    for e in sorted(timed, key=lambda e: e["ts"]):
        while at + 1 < len(runs) and e["ts"] >= runs[at + 1][1].session["ts"]:
            at += 1
        run = runs[at][1]
        if e["cat"] == "Kernel":
            run.device.append(e)
        elif e["name"].endswith(_SUFFIX):
            run.kernels.append(e)
    for _, run in runs:
        _count_once(run.kernels)
    return runs


def _count_once(kernels: Sequence[Event]) -> None:
    """Takes the time of the kernels in a graph inside a node off that of the node, the inmost first."""
    outer = [e for e in kernels if e["args"].get("op_name") in _CONTAINERS]
    for e in sorted(outer, key=lambda e: float(e["dur"])):
        end = e["ts"] + e["dur"]
        e["dur"] -= sum(k["dur"] for k in kernels if k is not e and e["ts"] <= k["ts"] and k["ts"] + k["dur"] <= end)
        e["dur"] = max(e["dur"], 0)


def _name(event: Event) -> str:
    return str(event["name"]).removesuffix(_SUFFIX)


def _shapes(event: Event) -> str:
    return json.dumps(event["args"].get("output_type_shape"))


class _Levels:
    """Tells kernels that write other shapes at other numbers of candidates."""

    def __init__(self, runs: Sequence[tuple[int, _Run]]) -> None:
        seen: dict[tuple[str, int], set[str]] = {}
        first: dict[int, _Run] = {}
        for n, run in runs:
            first.setdefault(n, run)
        for run in first.values():
            count: dict[str, int] = {}
            for e in run.kernels:
                name = _name(e)
                count[name] = count.get(name, 0) + 1
                seen.setdefault((name, count[name]), set()).add(_shapes(e))
        self._candidate = {name for (name, _), shapes in seen.items() if len(shapes) > 1}

    def __call__(self, event: Event, nodes: Sequence[Node]) -> str:
        """Level of a kernel."""
        if _name(event) not in self._candidate:
            return "request"
        node = _node(event, nodes)
        return "repeated" if node is not None and node.once else "candidate"


def _node(event: Event, nodes: Sequence[Node]) -> Node | None:
    found = _NUMBER.search(event["name"])
    return nodes[int(found[1])] if found else None


def _kernel(event: Event, levels: _Levels, nodes: Sequence[Node], seconds: float) -> Kernel:
    node = _node(event, nodes)
    args = event["args"]
    name = node.name if node else _name(event)
    rule = node.rule if node else "other"
    return Kernel(name, args.get("op_name", ""), args.get("provider", ""), levels(event, nodes), rule, seconds)


def _summed(candidates: int, runs: Sequence[_Run], levels: _Levels, nodes: Sequence[Node]) -> Kernels:
    """Means over runs."""
    spent: dict[tuple[str, int], tuple[Kernel, float]] = {}
    for run in runs:
        count: dict[str, int] = {}
        for e in run.kernels:
            name = _name(e)
            count[name] = count.get(name, 0) + 1
            key = (name, count[name])
            kernel, before = spent.get(key) or (_kernel(e, levels, nodes, 0.0), 0.0)
            spent[key] = (kernel, before + e["dur"] * 1e-6)
    every = [Kernel(k.name, k.op, k.provider, k.level, k.rule, total / len(runs)) for k, total in spent.values()]
    every.sort(key=lambda k: -k.seconds)
    copies = [k for k in every if k.op in _COPIES]
    device = [sum(e["dur"] for e in r.device) * 1e-6 for r in runs if r.device]
    return Kernels(
        candidates,
        len(runs),
        sum(k.seconds for k in every),
        sum(r.session["dur"] for r in runs) * 1e-6 / len(runs),
        _shares(every, "level"),
        _shares(every, "op"),
        _shares(every, "rule"),
        _shares(every, "provider"),
        Share("copies", len(copies), sum(k.seconds for k in copies)),
        sum(device) / len(runs) if device else None,
        tuple(every[:_LONGEST]),
    )


def _shares(kernels: Sequence[Kernel], what: str) -> tuple[Share, ...]:
    """Kernel time by one of the kernels' properties, longest first."""
    found: dict[str, list[float]] = {}
    for k in kernels:
        found.setdefault(getattr(k, what), []).append(k.seconds)
    shares = [Share(name, len(times), sum(times)) for name, times in found.items()]
    return tuple(sorted(shares, key=lambda s: (-s.seconds, s.name)))


def _traced(candidates: int, runs: Sequence[_Run], levels: _Levels, nodes: Sequence[Node], begin: float) -> list[Event]:
    """Events of a Chrome trace, from `begin` on, one row for the host and one for the device."""
    out: list[Event] = []
    at = begin
    for run in runs:
        shift = at - run.session["ts"]
        head = {"ph": "X", "tid": 0, "ts": at, "dur": run.session["dur"]}
        out.append({"name": f"run, N = {candidates}", "cat": "run", **head, "args": {"candidates": candidates}})
        for e in run.kernels:
            k = _kernel(e, levels, nodes, e["dur"] * 1e-6)
            shapes = [next(iter(s.values())) for s in e["args"].get("output_type_shape") or [] if s]
            args = {"node": k.name, "rule": k.rule, "provider": k.provider, "shapes": shapes}
            args["entries"] = sum(prod(s) for s in shapes)
            when = {"ph": "X", "tid": 0, "ts": e["ts"] + shift, "dur": e["dur"]}
            out.append({"name": k.op, "cat": k.level, **when, "args": args})
        for e in run.device:
            when = {"ph": "X", "tid": 1, "ts": e["ts"] + shift, "dur": e["dur"]}
            out.append({"name": e["name"], "cat": "device", **when, "args": {}})
        at += run.session["dur"] + 10
    return out


def trace(models: Sequence[tuple[str, Sequence[Event]]]) -> dict[str, Any]:
    """A trace in the format that chrome://tracing and ui.perfetto.dev open.

    Args:
        models: Per model its name and the events of `Tracer.finish`.
    """
    out: list[Event] = []
    for pid, (name, events) in enumerate(models, 1):
        out.append({"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}})
        for tid, row in enumerate(("host", "device")):
            out.append({"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": row}})
        out += [{**e, "pid": pid} for e in events]
    return {"traceEvents": out, "displayTimeUnit": "ms"}
