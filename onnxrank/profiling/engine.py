"""`profile`: from one or two models to times, costs and kernels, with requests that mean the same to both."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from onnxrank import batches, cost, feeds, matrices, ranker, runtime, workers
from onnxrank import model as files
from onnxrank.analysis import Analysis
from onnxrank.contract import find_roles, stored_contract
from onnxrank.errors import EnvironmentProblem, ModelError, OnnxrankError, UsageError
from onnxrank.facts import Setting
from onnxrank.joining import SINGLE, crossovers, exchanged
from onnxrank.plans import Few, Plan
from onnxrank.profiling import kernels as kernel_times
from onnxrank.profiling import timing, work
from onnxrank.profiling.bench import Entrant, RemoteBench
from onnxrank.profiling.report import Kernels, Memory, ModelProfile, Point, Profile, Several
from onnxrank.profiling.sessions import Requests, Target, environment
from onnxrank.ranker import Matrices
from onnxrank.roles import InputInfo, InputRole, Roles
from onnxrank.study import Study
from onnxrank.values import CANDIDATES
from onnxrank.verify.compare import gap as gap_between

DEFAULT_CANDIDATES = (1, 32, 128, 512, 2048)
_COPIES = 12
"""Times that the inputs of a request are in memory: several requests, here, on their way, and in the process."""
_REQUESTS = 4  # different ones per number of candidates, in turn
_CALLS = 2  # different ones of several requests, in turn
_SAME = 1e-3  # scores of two models that differ by more, relative to the largest, are not the same scores

Source = str | os.PathLike[str] | ModelProto


def profile(
    model: Source,
    other: Source | None = None,
    *,
    request: Sequence[str] = (),
    spec: Mapping[str, Any] | None = None,
    infer_from: Mapping[str, NDArray[Any]] | None = None,
    candidates: Sequence[int] = DEFAULT_CANDIDATES,
    requests: Sequence[int] = (),
    provider: str = "cpu",
    threads: int = 1,
    seconds: float = 5.0,
    io_binding: bool | None = None,
    cuda_graph: bool = False,
    memory: bool = True,
    lengths: Mapping[str, int] | None = None,
    timeout: float = 120.0,
    trace: dict[str, Any] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Profile:
    """Times one or two models over the number of candidates, and tells where the time goes.

    Both models score the same candidates: requests are made for the model that is not optimised, under its roles, and
    brought into the other one's signature (one row of what is request-level, divided matrices).

    Args:
        model: A path, or a model in memory.
        other: A second one, to be held against the first; usually what `optimize` made of it.
        request: Patterns on names of inputs that are request-level, as for `optimize`.
        spec: A roles file's content.
        infer_from: Recorded requests to infer the roles from.
        candidates: Numbers of candidates.
        requests: Numbers of requests to score besides, each number at every number of candidates: in one call by models
            of the interfaces `batch` and `padded`, one after the other by others.
        provider: `cpu` or `cuda`.
        threads: Threads inside an operator.
        seconds: Most seconds of timing per number of candidates.
        io_binding: Whether inputs and outputs are bound to the provider's memory; None: on CUDA.
        cuda_graph: Whether runs are captured in a CUDA graph and replayed; binds inputs and outputs.
        memory: Whether to run each model in a process of its own for its peak memory.
        lengths: Symbolic extents of inputs other than the number of candidates, by name; `cost.LENGTH` for others.
        timeout: Seconds that one step of a model, such as loading it or a run, may take.
        trace: Where to put a Chrome trace, if one is wanted.
        progress: Called with the name of each stage.

    Raises:
        UsageError: Roles or options are wrong, or the models' inputs cannot be brought together.
        ModelError: A model is invalid or not supported.
        EnvironmentProblem: onnxruntime or the provider is missing, or memory ran out.
    """
    say = progress or (lambda stage: None)
    target = _target(provider, threads, io_binding, cuda_graph, candidates, seconds)
    if any(r < 1 for r in requests):
        raise UsageError(f"requests {list(requests)!r} must be numbers of at least 1")
    runtime.check_provider(provider)
    workers.warm(1)
    say("reading")
    subjects = [_Subject.load(m, k) for k, m in enumerate([model] if other is None else [model, other])]
    base = next((s for s in subjects if s.contract is None), subjects[0])
    roles, notes = _roles(base, subjects, request, spec, infer_from)
    say("deriving shapes")
    study = Study(base.alone, roles, base.one)
    drawn = _Drawn(study, subjects, base, lengths or {})
    notes += drawn.notes
    for s in subjects:
        s.check_inputs(drawn.single(s, 2), base)
    entrants = [s.entrant(str(k), other is not None and s is not base) for k, s in enumerate(subjects)]
    race = _Race(entrants, subjects, drawn, seconds, say)
    difference, several = None, []
    with RemoteBench(target, timeout) as bench:
        providers = race.open(bench)
        points = [race.point(bench, n) for n in sorted(set(candidates))]
        if other is not None:
            say("comparing scores")
            difference = race.difference(bench, max(candidates))
        for n, r in itertools.product(sorted(set(candidates)), sorted(set(requests))):
            several.append(race.several(bench, n, r))
    if difference is not None and not difference <= _SAME:
        notes.append(f"the two models do not give the same scores: they differ by {difference:.2g} of the largest")
    inside = _Inside(race, points, target, timeout)
    models = [inside.profile(k, _analyses(s, study, roles), providers[k], memory) for k, s in enumerate(subjects)]
    notes += dict.fromkeys(inside.notes)
    traced = inside.traced
    if trace is not None:
        trace.update(kernel_times.trace(traced))
    return Profile(
        version=metadata.version("onnxrank"),
        **environment(target),
        seconds=seconds,
        roles=roles.to_dict(),
        models=tuple(models),
        points=tuple(points),
        break_even=timing.break_even(points, [m.line for m in models]) if other is not None else None,
        difference=difference,
        notes=tuple(notes),
        several=tuple(several),
    )


@dataclass
class _Inside:
    """What each model does inside, at the points at which it was timed.

    Attributes:
        race: The models.
        points: What was timed.
        target: Where they run.
        timeout: Seconds that one step may take.
        notes: What could not be told, and why.
        traced: Names of the models, and events of their kernels.
    """

    race: _Race
    points: Sequence[Point]
    target: Target
    timeout: float
    notes: list[str] = field(default_factory=list)
    traced: list[tuple[str, list[kernel_times.Event]]] = field(default_factory=list)

    def profile(
        self, k: int, known: tuple[_Analyses | None, str | None], providers: tuple[str, ...], memory: bool
    ) -> ModelProfile:
        """Profiles a model.

        Args:
            k: Which one.
            known: Its analyses by number of candidates, or why there are none.
            providers: What it runs on.
            memory: Whether to measure its peak memory, too.
        """
        race, points, (analyses, note) = self.race, self.points, known
        e, s, counts = race.entrants[k], race.subjects[k], [p.candidates for p in points]
        race.say(f"profiling kernels of {e.name}")
        self.notes += [f"{e.name}: {note}"] if note else []
        found, events = _kernels(e, s, analyses, race.drawn, counts, self.target, self.timeout)
        self.traced.append((e.name, events))
        peak = None
        if memory:
            race.say(f"measuring memory of {e.name}")
            peak, note = _memory(e, race.drawn.of(s)(max(counts)), max(counts), self.target, self.timeout)
            self.notes += [note] if note else []
        line = timing.fit(counts, [p.times[k].median for p in points])
        reached = [
            work.works(work.macs(of_plan, race.drawn.extents(p.candidates)), p, k, own)
            for p, own in zip(points, found, strict=True)
            if analyses is not None and (of_plan := analyses.at(p.candidates)) is not None
        ]
        file = e.name, s.loaded.sha256, s.loaded.size, s.contract is not None
        return ModelProfile(*file, providers, line, tuple(found), peak, tuple(reached))


@dataclass(frozen=True)
class _Race:
    """The models, timed in turns.

    Attributes:
        entrants: The models as they are measured.
        subjects: The same as they were given.
        drawn: Requests.
        seconds: Most seconds of timing per number of candidates.
        say: Called with the name of each stage.
    """

    entrants: Sequence[Entrant]
    subjects: Sequence[_Subject]
    drawn: _Drawn
    seconds: float
    say: Callable[[str], None]

    def open(self, bench: RemoteBench) -> list[tuple[str, ...]]:
        """Loads all models; gives the providers that each runs on."""
        providers = []
        for e in self.entrants:
            self.say(f"loading {e.name}")
            providers.append(bench.open(e))
        return providers

    def point(self, bench: RemoteBench, n: int) -> Point:
        """Times of single requests with a number of candidates."""
        self.say(f"timing N = {n}")
        self.drawn.check_memory(n)
        for e, s in zip(self.entrants, self.subjects, strict=True):
            bench.hold(e, n, self.drawn.of(s)(n))
        return timing.point(n, *bench.interleave(self.entrants, n, self.seconds))

    def difference(self, bench: RemoteBench, n: int) -> float:
        """By how much the scores of two models differ, over the largest."""
        both = zip(self.entrants, self.subjects, strict=True)
        first, second = (s.parted(bench.scores(e, n), n) for e, s in both)
        return _difference(first, second)

    def several(self, bench: RemoteBench, n: int, requests: int) -> Several:
        """Times of so many requests with a number of candidates each."""
        self.say(f"timing R = {requests}, N = {n}")
        self.drawn.check_memory(n, requests)
        for e, s in zip(self.entrants, self.subjects, strict=True):
            bench.hold(e, n, self.drawn.several(s, n, requests), 1 if s.told else requests)
        rounds = bench.interleave(self.entrants, n, self.seconds)[0]
        return timing.several(requests, n, rounds, [s.told is not None for s in self.subjects])


def _target(
    provider: str, threads: int, io_binding: bool | None, cuda_graph: bool, candidates: Sequence[int], seconds: float
) -> Target:
    if provider not in ("cpu", "cuda"):
        raise UsageError(f"provider {provider!r} is not known; use 'cpu' or 'cuda'")
    if cuda_graph and provider != "cuda":
        raise UsageError("CUDA graphs need the provider 'cuda'")
    if cuda_graph and io_binding is False:
        raise UsageError("a CUDA graph replays on fixed memory, so it needs I/O binding")
    if not candidates or min(candidates) < 1:
        raise UsageError(f"candidates {list(candidates)!r} must be numbers of at least 1")
    if threads < 1 or not seconds > 0:
        raise UsageError("threads must be at least 1, and seconds more than 0")
    return Target(provider, threads, provider == "cuda" if io_binding is None else io_binding, cuda_graph)


@dataclass
class _Subject:
    """One of the models.

    Attributes:
        name: Its file's path, or a name for a model in memory.
        loaded: The model as given.
        working: The same with functions inlined.
        one: The same for one request, with inputs one by one; the model as given, where it is so anyway.
        alone: That with functions inlined.
        described: Inputs of that.
        contract: What that says of itself, if it was optimised.
        told: How the model takes several requests; None where it takes one.
        packed: Inputs that hold others side by side.
    """

    name: str
    loaded: files.LoadedModel
    working: ModelProto
    one: files.LoadedModel
    alone: ModelProto
    described: list[InputInfo]
    contract: dict[str, Any] | None
    told: dict[str, Any] | None
    packed: Matrices

    @classmethod
    def load(cls, source: Source, k: int) -> _Subject:
        loaded = files.load(source)
        told, one = batches.convention(loaded.proto), matrices.unpacked(batches.single(loaded))
        working = files.flattened(loaded.proto)
        alone = working if one is loaded else files.flattened(one.proto)
        name = os.fspath(loaded.path) if loaded.path is not None else ("model in memory", "other model in memory")[k]
        of_itself = feeds.describe(alone), stored_contract(one.proto), told, matrices.told(loaded.proto)
        return cls(name, loaded, working, one, alone, *of_itself)

    def entrant(self, key: str, second: bool) -> Entrant:
        """The model as it is measured.

        Args:
            key: What it is known by there.
            second: Whether it is held against another.
        """
        return Entrant(key, self.name, self.loaded, self.working, second and self.contract is not None)

    def few(self) -> Few | None:
        """The plan for few candidates; None where one plan holds for any number."""
        if not any(crossovers(self.alone.graph)):
            return None
        return Plan.from_contract(self.contract or {}).few

    def joined(self, requests: Sequence[feeds.Feed]) -> Requests:
        """Requests as the model takes them: inputs side by side, in one call, where it takes them so."""
        if self.told is not None:
            return [batches.joined(self.told, requests)]
        return [ranker.matrices(self.packed, feed) for feed in requests]

    def parted(self, scores: Sequence[NDArray[Any]], candidates: int) -> Sequence[NDArray[Any]]:
        """Outputs for one request, from those of a call with one."""
        if self.told is None:
            return scores
        names = [o.name for o in self.loaded.proto.graph.output]
        (found,) = batches.parted(self.told, dict(zip(names, scores, strict=True)), [candidates])
        return [found[name] for name in names]

    def check_inputs(self, requests: Requests, base: _Subject) -> None:
        """Finds out whether requests hold what the model takes.

        Args:
            requests: Requests that were made for it.
            base: The model whose inputs they follow.

        Raises:
            UsageError: They do not.
        """
        missing = [i for i in self.described if i.name not in requests[0]]
        known = {i.name for i in base.described}
        for i in missing:
            if i.name in known:
                raise UsageError(
                    f"{self.name} takes {i.name} as {shape_text(i)}, which does not fit what {base.name} takes. "
                    f"If it is the same for all candidates of a request, say so: --request {i.name}."
                )
        if missing:
            raise UsageError(
                f"{self.name} has inputs that {base.name} has not, and that are not parts of its inputs: "
                f"{', '.join(i.name for i in missing)}. Only models that score the same requests can be compared."
            )


def shape_text(info: InputInfo) -> str:
    """The declared shape of an input, in a message."""
    return f"[{', '.join('?' if d is None else str(d) for d in info.dims or ())}]"


def _roles(
    base: _Subject,
    subjects: Sequence[_Subject],
    request: Sequence[str],
    spec: Mapping[str, Any] | None,
    infer_from: Mapping[str, NDArray[Any]] | None,
) -> tuple[Roles, list[str]]:
    """Roles of the base's inputs: as given, or those that the other model was optimised under."""
    given = bool(request) or spec is not None or infer_from is not None
    if not given and base.contract is None:
        for s in subjects:
            if s.contract is not None:
                notes = []
                if s.contract.get("source_sha256") != base.loaded.sha256:
                    notes.append(f"{s.name} was made from another file than {base.name}, by its contract")
                stored = Roles.from_dict(s.contract.get("roles", {})).inputs
                if stored.keys() == {i.name for i in base.described}:
                    return Roles(stored), notes
    return find_roles(base.described, base.contract, request=request, spec=spec, infer_from=infer_from, lenient=True)


class _Drawn:
    """Requests of every number of candidates, in every model's signature."""

    def __init__(self, study: Study, subjects: Sequence[_Subject], base: _Subject, lengths: Mapping[str, int]) -> None:
        self._study, self._base = study, base
        names = {s.removeprefix("S:"): s for s in study.symbols if s != CANDIDATES}
        for name, value in lengths.items():
            if name not in names:
                known = f"Those of its inputs are {', '.join(names)}." if names else "Its inputs have none."
                raise UsageError(f"{base.name} has no symbolic extent {name!r} besides the candidates. {known}")
            if value < 1:
                raise UsageError(f"The length {name}={value} must be at least 1.")
        self._point = {s: lengths.get(name, max(cost.LENGTH, study.shortest)) for name, s in names.items()}
        used = ", ".join(f"{name} = {self._point[s]}" for name, s in names.items())
        self.notes = [f"symbolic extents of the inputs: {used}; see --length"] if names else []
        self._held: tuple[int, int, list[feeds.Feed]] = (0, 0, [])

    def check_memory(self, n: int, requests: int = 1) -> None:
        """Finds out whether requests with a number of candidates, so many of which are scored at once, fit into memory.

        Raises:
            EnvironmentProblem: They do not.
        """
        left = workers.available_memory()
        needed = _COPIES * self._bytes(n) * requests
        if left is not None and needed > left:
            raise EnvironmentProblem(
                f"There is not enough memory for requests with {n} candidates: their inputs alone take about "
                f"{needed / 2**30:.1f} GiB, and {left / 2**30:.1f} GiB are left. Give fewer --candidates."
            )

    def _bytes(self, n: int) -> int:
        """Bytes of the inputs of a request, as they are drawn: as 64-bit floats."""
        point = self.extents(n)
        counts = [prod(f if isinstance(f, int) else point[f] for d in i.dims for f in d) for i in self._study.declared]
        return 8 * sum(counts)

    def extents(self, n: int) -> dict[str, int]:
        """Values of the symbols at a number of candidates."""
        return {**self._point, CANDIDATES: n}

    def of(self, subject: _Subject) -> Callable[[int], Requests]:
        """Makes requests with a number of candidates for a model."""
        return lambda n: [call for feed in self.single(subject, n) for call in subject.joined([feed])]

    def single(self, subject: _Subject, n: int, count: int = _REQUESTS) -> list[feeds.Feed]:
        """Requests with a number of candidates, as a model takes one."""
        return [self._suited(subject, feed) for feed in self._requests(n, count)]

    def several(self, subject: _Subject, n: int, requests: int) -> Requests:
        """Requests with a number of candidates, so many of which are scored at once, as a model takes them."""
        every = self.single(subject, n, _CALLS * requests)
        groups = [every[k * requests : (k + 1) * requests] for k in range(_CALLS)]
        return [call for group in groups for call in subject.joined(group)]

    def _requests(self, n: int, count: int) -> list[feeds.Feed]:
        if self._held[:2] != (n, count):
            self._held = (0, 0, [])  # those before would take up memory
            point = self.extents(n)
            self._held = (n, count, [self._study.maker(Setting(point, 7 * n + k)) for k in range(count)])
        return self._held[2]

    def _suited(self, subject: _Subject, full: feeds.Feed) -> feeds.Feed:
        """Of every input the form that fits what the model declares: all rows, or one row of what is request-level."""
        if subject is self._base:
            return full
        divided = feeds.divided(self._study.declared, full)
        prefers = divided if subject.contract and subject.contract.get("interface") == "request" else full
        out: feeds.Feed = {}
        for i in subject.described:
            for form in (prefers, full, divided):
                if i.name in form and _fits(form[i.name], i):
                    out[i.name] = form[i.name]
                    break
        return out


def _fits(data: NDArray[Any], declared: InputInfo) -> bool:
    """Whether an array has the fixed extents of an input."""
    if declared.dims is None:
        return True
    return data.ndim == len(declared.dims) and all(
        not isinstance(d, int) or d == n for d, n in zip(declared.dims, data.shape, strict=True)
    )


def _difference(first: Sequence[NDArray[Any]], second: Sequence[NDArray[Any]]) -> float:
    """Largest difference of two models' scores, over the largest score."""
    if len(first) != len(second):
        return float("inf")
    worst = 0.0
    for a, b in zip(first, second, strict=True):
        gap = gap_between(a, b).largest
        if gap and runtime.is_float(a):
            finite = np.abs(a.astype(np.float64)[np.isfinite(a.astype(np.float64))])
            gap /= max(float(finite.max()) if finite.size else 0.0, 1e-30)
        worst = max(worst, gap)
    return worst


def _memory(
    model: Entrant, requests: Requests, candidates: int, target: Target, timeout: float
) -> tuple[Memory | None, str | None]:
    """Peak memory of a model in a process that runs nothing else, or why it is not known."""
    if not os.path.exists("/proc/self/status"):
        return None, "peak memory is read from /proc, which this system does not have"
    with RemoteBench(target, timeout, fresh=True) as bench:
        return bench.memory(model, requests, candidates), None


@dataclass(frozen=True)
class _Analyses:
    """What is known of one of the models.

    Attributes:
        many: Of the model; of its plan for many candidates, where it has two.
        few: Of its plan for few, if it is for more than a single candidate.
        below: The number of candidates from which on the plan for many holds.
        least: The number from which on that for few is what is analysed: nothing is repeated for a single candidate.
    """

    many: Analysis
    few: Analysis | None = None
    below: int = 0
    least: int = 0

    def at(self, candidates: int) -> Analysis | None:
        """Of what runs at a number of candidates; None if that is not analysed."""
        if candidates >= self.below:
            return self.many
        return self.few if candidates >= self.least else None


def _analyses(subject: _Subject, study: Study, roles: Roles) -> tuple[_Analyses | None, str | None]:
    """What the analysis proves of a model, or why nothing is known."""

    def analysed(model: ModelProto) -> Analysis:
        known = study
        if subject.one is not study.loaded or model is not subject.alone:
            known = Study(model, _roles_of(subject, study, roles), subject.one)
        stray = known.contradicted()
        if stray is not None:
            raise ModelError(stray.reason)
        return Analysis(known)

    try:
        many = analysed(subject.alone)
        few = subject.few()
        if few is None:
            return _Analyses(many), None
        least = SINGLE if few.alone or few.below == SINGLE else 0
        return _Analyses(
            many, analysed(exchanged(subject.alone)) if few.below > least else None, few.below, least
        ), None
    except OnnxrankError as e:
        return None, f"what its kernels repeat for every candidate is not known ({runtime.first_line(e)})"


def _kernels(
    entrant: Entrant,
    subject: _Subject,
    analyses: _Analyses | None,
    drawn: _Drawn,
    candidates: Sequence[int],
    target: Target,
    timeout: float,
) -> tuple[list[Kernels], list[kernel_times.Event]]:
    """Kernels of a model, with the levels that the analysis proves."""
    once = {} if analyses is None else {name: analyses.many.is_once(name) for name in analyses.many.tensors}
    moved = subject.contract is not None and "broadcast" in subject.contract.get("rules", {})
    nodes = kernel_times.nodes_of(subject.working, once, moved)
    with RemoteBench(target, timeout) as bench:
        return bench.kernels(entrant, nodes, drawn.of(subject), candidates)


def _roles_of(subject: _Subject, study: Study, roles: Roles) -> Roles:
    """Roles of the inputs of the model that requests were not made for."""
    if subject.contract is not None:
        return find_roles(subject.described, subject.contract)[0]
    full = study.maker(Setting({**dict.fromkeys(study.symbols, max(cost.LENGTH, study.shortest)), CANDIDATES: 3}, 0))
    out: dict[str, InputRole] = {}
    for i in subject.described:
        if i.name in roles.inputs and _fits(full[i.name], i):
            out[i.name] = roles.inputs[i.name]
        else:
            once = i.name.endswith(".request") or i.name in roles.inputs
            out[i.name] = InputRole(i.name, "request" if once else "candidate", None if once else 0)
    return Roles(out)
