"""What is known of the user's model before anything is rewritten."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cached_property
from itertools import count
from math import inf, prod
from typing import Any

import onnx
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from onnxrank import cost, cuts, facts, feeds, joining, operators, segments, selections
from onnxrank import model as files
from onnxrank.contract import RULE
from onnxrank.culprit import culprit
from onnxrank.errors import DoesNotRun, ModelError, UsageError
from onnxrank.facts import Facts
from onnxrank.flow import Walk
from onnxrank.fused import written_out
from onnxrank.graphs import (
    attribute,
    dangling,
    incomplete,
    live,
    names_given,
    names_in,
    rename_captured,
    renamed,
    subgraphs,
    versions,
)
from onnxrank.lookups import Lookups, join
from onnxrank.loops import without_loops
from onnxrank.network import Network
from onnxrank.packing import LOOKUPS, Packed, pack_at
from onnxrank.plans import PACKING, SEGMENTS, WRITTEN_OUT, Site, label
from onnxrank.roles import Roles
from onnxrank.rule import Refusal
from onnxrank.values import (
    CANDIDATES,
    Dims,
    extents,
    symbols,
)
from onnxrank.workers import Crashed

_NUMBERS = (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL)
_FEW_ENTRIES = 1 << 10
"""Entries per candidate up to which a tensor may as well be given as its shape."""
_LONG = 61
"""Extent of symbols in the run that confirms long ones; a prime, as the shorter ones are."""
_LONGER = (32, 128, 512)
"""What is added to lengths that a model does not run at, until it does."""


class Study:
    """What is known of the original: its nodes with extents resolved, inputs, shapes, constants and types.

    Attributes:
        flow: How often the entries of every tensor need be made.
        contradiction: What a run said against a derived shape, which is an error of onnxrank; None if nothing did.
        packed: What was packed away of the model that was given.
        shortest: The least length of histories at which the model was seen to run, where it does not at short ones.

    Args:
        model: The model, functions inlined.
        roles: Roles of its inputs.
        loaded: Where it comes from.
        wait: Whether to wait for the runs that confirm the shapes; if not, `contradicted` does.
        shortest: The least length of histories at which it is run, where that is known.
        longest: What lengths are at most wherever it runs, by their symbols, where that is known.

    Raises:
        UsageError: No input has a candidate axis.
        ModelError: The model is invalid, or does not run.
    """

    def __init__(
        self,
        model: ModelProto,
        roles: Roles,
        loaded: files.LoadedModel,
        wait: bool = True,
        shortest: int = 1,
        longest: Mapping[str, int] | None = None,
    ) -> None:
        self.loaded, self.roles = loaded, roles
        self.packed: tuple[Packed, ...] = ()
        self.declared = feeds.inputs(model, roles)
        self.symbols = sorted({s for i in self.declared for s in symbols(i.dims)})
        if CANDIDATES not in self.symbols:
            raise UsageError("no input has a candidate axis: name the inputs that differ between candidates")
        lost = dangling(model)
        if lost is not None:
            raise ModelError(f"node {label(lost[0])!r} reads {lost[1]!r}, which no input, initializer or node gives")
        made = names_given(model.graph)
        unmade = next((o.name for o in model.graph.output if o.name not in made), None)
        if unmade is not None:
            raise ModelError(f"output {unmade!r} is no input, initializer or result of a node")
        short = incomplete(model)
        if short is not None:
            raise ModelError(f"node {label(short)!r} ({short.op_type}) has fewer inputs than its operator takes")
        self.model = live(self._out_of_the_way(model))
        self.facts = facts.derive(self.model, self.input_extents(), loaded.folder, longest=longest)
        resolved = self._resolved()
        while resolved is not None:
            self.model = resolved
            self.facts = facts.derive(resolved, self.input_extents(), loaded.folder, longest=self.facts.longest)
            resolved = self._resolved()
        self.facts.note = facts.unavailable(self.model)
        self.dtypes = element_types(self.model)
        self.flow = Walk(self.model, feeds.levels(self.declared), self.facts, loaded.folder, self.dtypes)
        self.maker = feeds.Maker(self.declared, self._ranges())
        self._shapes: dict[int, cost.Shapes] = {}
        self._lookups: dict[tuple[int, ...], Lookups] = {}
        self.contradiction: facts.Contradiction | None = None
        self.shortest = shortest
        self._points = self._settings(shortest - 1)
        self._probe: facts.Probe | None = facts.Probe(self.model, loaded.folder, self._small())
        for point in self._points:
            self._probe.ask(self.maker(point))
        if wait:
            self._confirm()

    def _small(self) -> set[str]:
        """Tensors of numbers that have few entries for few candidates, however long histories are."""
        return {
            name
            for name, found in self.facts.extents.items()
            if self.dtypes.get(name) in _NUMBERS
            and {s for _, syms in found for s in syms} <= {CANDIDATES}
            and prod(c for c, _ in found) <= _FEW_ENTRIES
        }

    def _out_of_the_way(self, model: ModelProto) -> ModelProto:
        """The model with other names for inner tensors that are called like the parts of an input that is divided."""
        parts = {
            f"{i.name}.{part}" for i in self.declared if i.role.level == "mixed" for part in ("request", "candidate")
        }
        ends = {i.name for i in (*model.graph.input, *model.graph.output)}
        inner = {o for n in model.graph.node for o in n.output}.union(
            (t.name for t in model.graph.initializer), (t.values.name for t in model.graph.sparse_initializer)
        )
        clash = sorted((parts & inner) - ends)
        if not clash:
            return model
        taken, names = names_in(model.graph), {}
        for name in clash:
            names[name] = next(n for k in count(1) if (n := f"{name}/{k}") not in taken)
        return renamed(model, names)

    def _resolved(self) -> ModelProto | None:
        """The model without what constants decide: branches, selections by masks, loops, cuts of constants.

        Returns:
            None where there is none.
        """
        return (
            resolve_ifs(self.model, self.facts)
            or selections.resolved(self.model, self.facts, self.input_extents())
            or without_loops(self.model, self.facts)
            or cuts.resolved(self.model, self.facts, self._constants(cuts.MOST_ENTRIES), self.loaded.folder)
        )

    def _settings(self, beyond: int) -> list[facts.Setting]:
        """Where the model is run to confirm its shapes, with lengths beyond a number."""
        points = facts.settings(self.symbols, (2, 3), beyond)
        if len(self.symbols) > 1:
            long = {s: beyond + _LONG + 6 * k for k, s in enumerate(self.symbols)} | {CANDIDATES: 1}
            points.append(facts.Setting(long, seed=2))
        return points

    def _confirm(self) -> None:
        """Holds every derived shape against those of the runs that were begun, once.

        Raises:
            ModelError: The model does not run.
        """
        if self._probe is None:
            return
        with self._probe as probe:
            self._probe = None
            # Ranges may be found wrong where ids are looked up in a way that cannot be followed: most models take ones.
            makers = (None, feeds.Maker(self.declared, None), feeds.Maker(self.declared, None, fill=0))
            problem = self._fails(probe, self._points, makers)
            if problem is None or (not isinstance(problem, Crashed) and self._runs_at_longer(probe)):
                return
        if isinstance(problem, Crashed):
            raise ModelError(self._crash(problem)) from problem
        shown = ", ".join(f"{i.name} {_shown(i.dims)}" for i in self.declared)
        raise DoesNotRun(
            f"the model does not run at several numbers of candidates with inputs of these roles: {shown}. {problem}. "
            "If it is a static batch export, export it again with a dynamic one (torch: dynamic_axes or "
            "dynamic_shapes; tf2onnx: a batch of None); if an input takes values of its own, give their range in a "
            "roles file."
        )

    def _fails(
        self, probe: facts.Probe, points: Sequence[facts.Setting], makers: Iterable[feeds.Maker | None]
    ) -> ModelError | None:
        """Holds the derived shapes against those of runs; why the model does not run there, if it does not.

        Args:
            probe: The model.
            points: Where it is run.
            makers: What makes inputs, one after the other until the model takes them; None for those that were asked
                for.
        """
        problem: ModelError | None = None
        for maker in makers:
            try:
                self.contradiction = self._contradiction(probe, maker, points)
                return None
            except ModelError as e:
                problem = problem or e
        return problem

    def _runs_at_longer(self, probe: facts.Probe) -> bool:
        """Whether the model runs with longer histories than those that are tried first; from where on is found then."""
        if self.shortest > 1 or len(self.symbols) == 1:
            return False
        for more in _LONGER:
            points = self._settings(more)
            problem = self._fails(probe, points, [self.maker])
            if problem is None:
                self.shortest = self._least(probe, points[0])
                return True
            if isinstance(problem, Crashed):
                break
        return False

    def _least(self, probe: facts.Probe, runs: facts.Setting) -> int:
        """The least length at which the model runs, if it runs at all that are longer.

        Args:
            probe: The model.
            runs: A point at which it runs, where it does not at the lengths that are tried first.
        """
        low, high = 1, max(n for s, n in runs.symbols.items() if s != CANDIDATES)
        while high - low > 1:
            middle = (low + high) // 2
            lengths = dict.fromkeys(self.symbols, middle)
            try:
                probe.measure(self.maker(facts.Setting({**lengths, CANDIDATES: 2}, seed=0)))
                high = middle
            except ModelError:
                low = middle
        return high

    def _contradiction(
        self, probe: facts.Probe, maker: feeds.Maker | None, points: Sequence[facts.Setting]
    ) -> facts.Contradiction | None:
        """What inputs of a maker say, or those that were asked for, against what was derived."""
        for k, point in enumerate(points):
            try:
                measured = probe.answer() if maker is None else probe.measure(maker(point))
            except ModelError:
                if k < 2:
                    raise
                continue  # not every model takes long histories
            found = next(facts.contradictions(self.facts, measured, point), None)
            if found is not None:
                return found
        return None

    def _crash(self, e: Crashed) -> str:
        """What to say where the process that runs the model dies."""
        name = "The model" if self.loaded.path is None else os.fspath(self.loaded.path)
        if e.kind == "timeout":
            return f"{name} does not end: its process gave {e}."
        feed = self.maker(facts.settings(self.symbols)[0])
        node = culprit(self.model, self.loaded.folder, feed)
        return f"{name} makes onnxruntime fail{f' at node {node}' if node else ''}: its process {e}."

    def _ranges(self) -> feeds.Ranges:
        return feeds.find_ranges(self.declared, self.flow, self.model.graph.node)

    @property
    def known(self) -> feeds.Known:
        """What was found of the inputs."""
        assert self.maker.ranges is not None
        return feeds.Known(self.maker.ranges, tuple(self.symbols), self.shortest)

    def contradicted(self) -> Refusal | None:
        """Why nothing may be rewritten, where a run contradicted what was derived.

        Raises:
            ModelError: The model does not run.
        """
        self._confirm()
        if self.contradiction is None:
            return None
        node = next((n for n in self.model.graph.node if self.contradiction.name in n.output), NodeProto())
        reason = f"an error of onnxrank: {self.contradiction}; please report it"
        return Refusal("movement", label(node), node.op_type, reason)

    def written_out(self, fused: Collection[str]) -> Study:
        """The same of a model in which some fused operators, known by their first outputs, are their steps.

        Raises:
            Unsupported: One of them cannot be written out.
            ModelError: The model does not run that way, or a run contradicts what was derived of it.
        """
        stored = {t.name: tuple((n, ()) for n in t.dims) for t in self.model.graph.initializer}
        types = {t.name: t.data_type for t in self.model.graph.initializer}
        types |= {i.name: i.dtype for i in self.declared}
        shapes = {**stored, **self.input_extents(), **self.facts.extents}
        # Masks are among the inputs behind queries, keys and values.
        read = {i for n in self.model.graph.node if n.output and n.output[0] in fused for i in n.input[3:]}
        initializers = (t for t in self.model.graph.initializer if t.name in read - files.overridable(self.model))
        constants = {t.name: facts.constant_data(t, self.loaded.folder) for t in initializers}
        constants |= {name: data for name, (dims, data) in self.facts.folded.items() if not symbols(dims)}
        return self._made(written_out(self.model, shapes, types | self.dtypes, constants, fused))

    def _made(self, model: ModelProto) -> Study:
        """What is known of another form of the model.

        Raises:
            ModelError: It does not run, or a run contradicts what was derived of it.
        """
        made = Study(model, self.roles, self.loaded, shortest=self.shortest, longest=self.facts.longest)
        made.packed = self.packed
        stray = made.contradicted()
        if stray is not None:
            raise ModelError(stray.reason)
        return made

    def shapes(self, candidates: int) -> cost.Shapes:
        """Shapes at a number of candidates."""
        if candidates not in self._shapes:
            known = next(iter(self._shapes.values()), None)
            made = known or cost.shapes_of(self.model, self.facts, self.input_extents(), candidates, self.loaded.folder)
            self._shapes[candidates] = made.at(candidates)
        return self._shapes[candidates]

    @cached_property
    def sequences(self) -> list[int]:
        """The nodes that join a history and candidates along an axis of symbolic length, by their places."""
        return segments.sequences(self.model, self.facts, self._candidate())

    @cached_property
    def fixed_sequences(self) -> list[int]:
        """The nodes that do so along an axis of a fixed length, where positions attend to each other."""
        return segments.sequences(self.model, self.facts, self._candidate(), fixed=True)

    def _constants(self, most: float = inf) -> Callable[[str], NDArray[Any] | None]:
        """Entries of the constants that have at most a number of entries, by name; None for other tensors."""
        replaced = files.overridable(self.model)
        stored = {t.name: t for t in self.model.graph.initializer if t.name not in replaced}

        def data(name: str) -> NDArray[Any] | None:
            if name in stored:
                large = prod(stored[name].dims) > most
                return None if large else facts.constant_data(stored[name], self.loaded.folder)
            dims, found = self.facts.folded.get(name, ((), None))
            return None if symbols(dims) else found

        return data

    def _candidate(self) -> frozenset[str]:
        """The inputs that may differ between candidates."""
        return frozenset(i.name for i in self.declared if i.role.level != "request")

    def divided(self, places: Sequence[int]) -> Study:
        """The same of a model in which sequences, known by the places of the nodes that join them, are taken apart.

        Raises:
            ModelError: The model does not run that way, or a run contradicts what was derived of it.
        """
        graph = self.model.graph
        types = {t.name: t.data_type for t in graph.initializer} | {i.name: i.dtype for i in self.declared}
        inputs = {i.name: i.dims for i in self.declared}
        model = segments.divided(
            self.model, self.facts, types | self.dtypes, inputs, self._candidate(), self._constants(), places
        )
        return self._made(model)

    @cached_property
    def packable(self) -> list[Packed]:
        """What does nothing and can be packed away."""
        return pack_at(self._network())

    def lookups(self, candidates: int, others: Sequence[int] = ()) -> Lookups:
        """The lookups that can be joined, where that pays at a number of candidates, and costs little at others."""
        asked = candidates, *others
        if asked not in self._lookups:
            whole = {n: cost.seconds(self.model.graph, self.shapes(n)) for n in others}
            self._lookups[asked] = Lookups(self._network(), self.flow, candidates, whole=whole)
        return self._lookups[asked]

    def pack(self, places: Collection[tuple[int, int]]) -> Study:
        """The same of a model in which what does nothing is packed away, and lookups are joined, at some places.

        Args:
            places: Nodes, by their places, each with what is packed there (`Packed.kind`).

        Raises:
            ModelError: The model does not run that way, or a run contradicts what was derived of it.
        """
        net = self._network()
        at = {id(n): k for k, n in enumerate(net.nodes)}
        found = [*pack_at(net, places), *join(net, self.flow, at, {k for k, kind in places if kind == LOOKUPS})]
        made = self._made(files.flattened(net.finished())) if found else self
        made.packed = (*self.packed, *found)
        return made

    def _network(self) -> Network:
        return Network(self.model, self.loaded.folder, inside=False, key=RULE)

    def prepared(self, sites: Sequence[Site]) -> Study:
        """The same after the steps of a plan that come before all rules (`Plan.preparation`).

        Raises:
            UsageError: The sites are not those of the model.
            Unsupported: A fused operator cannot be written out.
            ModelError: The model does not run that way, or a run contradicts what was derived of it.
        """
        study = self
        for kinds in (PACKING, (SEGMENTS,), (WRITTEN_OUT,)):
            own = [s for s in sites if s.place.rule in kinds]
            fit(own, study)
            places = [s.place.index for s in own if s.taken]
            if places and kinds == PACKING:
                study = study.pack({(s.place.index, s.place.step) for s in own if s.taken})
            elif places and kinds == (SEGMENTS,):
                study = study.divided(places)
            elif places:
                study = study.written_out([study.model.graph.node[k].output[0] for k in places])
        return study

    def input_extents(self) -> dict[str, tuple[facts.Extent, ...]]:
        """Extents of the inputs."""
        return {i.name: extents_of(i.dims) for i in self.declared}


def fit(sites: Iterable[Site], study: Study) -> None:
    """Holds the sites of a plan against a model's nodes.

    Raises:
        UsageError: They are not there.
    """
    nodes = study.model.graph.node
    for s in sites:
        k = s.place.index
        if not 0 <= k < len(nodes) or (label(nodes[k]), nodes[k].op_type) != (s.node, s.op):
            raise UsageError(f"the plan does not fit the model: it has no {s.op} {s.node!r} at place {k}")


def _shown(dims: Dims) -> str:
    """A factored shape in a message."""
    return "[" + ", ".join("*".join(str(f).removeprefix("S:") for f in d) or "1" for d in dims) + "]"


def extents_of(dims: Dims) -> tuple[facts.Extent, ...]:
    """A factored shape as constants times symbols."""
    return tuple((extents((d,))[0], symbols([d])) for d in dims)


def element_types(model: ModelProto) -> dict[str, int]:
    """Element types of tensors that nodes make: by onnx's inference, and by the registry where that stops.

    Types that a file declares of its own tensors are not relied on where they contradict its operators: converters
    leave those of the model that they were given.
    """
    out = _inferred_types(model)
    imported = versions(model)
    known = {t.name: t.data_type for t in model.graph.initializer}
    known |= {s.values.name: s.values.data_type for s in model.graph.sparse_initializer}
    known |= {i.name: i.type.tensor_type.elem_type for i in model.graph.input} | out
    for node in model.graph.node:
        for k, name in enumerate(node.output):
            if name and name not in known:
                made = operators.element_type(node, k, imported.get(operators.domain_of(node), 1), known)
                if made is not None:
                    out[name] = known[name] = made
    return out


def _inferred_types(model: ModelProto) -> dict[str, int]:
    """Element types as far as onnx's inference knows them."""
    bare = ModelProto()
    bare.CopyFrom(model)
    for tried in (model, bare):
        try:
            inferred = onnx.shape_inference.infer_shapes(tried)
        except Exception:
            del bare.graph.value_info[:]
            continue
        made = [v for v in inferred.graph.value_info if v.type.HasField("tensor_type")]
        out = {v.name: v.type.tensor_type.elem_type for v in (*made, *model.graph.output)}
        return {name: t for name, t in out.items() if t}
    return {}


def resolve_ifs(model: ModelProto, found: Facts) -> ModelProto | None:
    """Replaces every `If` whose condition is an extent's, and the same for all numbers of candidates, by its branch.

    Of two plans of an earlier run, which give the same scores, that for many candidates is taken, and candidates are in
    one piece.
    """
    chosen: dict[int, GraphProto] = {}
    for k, node in enumerate(model.graph.node):
        if node.op_type == "If" and node.input[0] in found.folded:
            name = "then_branch" if bool(found.folded[node.input[0]][1].reshape(-1)[0]) else "else_branch"
            chosen[k] = attribute(node, name)
        elif joining.chooses(node):
            chosen[k] = attribute(node, joining.for_many(node))
    if not chosen:
        return None
    out = ModelProto()
    out.CopyFrom(model)
    del out.graph.node[:]
    outer = GraphProto()
    outer.CopyFrom(model.graph)
    for k in sorted(chosen, reverse=True):
        outer.node[k].ClearField("attribute")
    taken = names_in(outer).union(*(names_in(g) for b in chosen.values() for n in b.node for g in subgraphs(n)))
    for k, node in enumerate(model.graph.node):
        if k in chosen:
            _inline_branch(out.graph, node, chosen[k], taken)
        else:
            out.graph.node.append(node)
    return out


def _inline_branch(graph: GraphProto, node: NodeProto, branch: GraphProto, taken: set[str]) -> None:
    """Adds the nodes and initializers of one branch of an `If` to a graph, under names that are not taken yet."""
    made = {o for n in branch.node for o in n.output if o}
    # Outputs that a node makes get their names at once; one may also be an initializer, given twice, or made outside.
    names: dict[str, str] = {}
    for inner, own in zip((o.name for o in branch.output), node.output, strict=True):
        if own and inner in made and inner not in names:
            names[inner] = own
    stored = {t.name for t in branch.initializer} | {t.values.name for t in branch.sparse_initializer}
    local = made | stored
    for name in sorted(local - names.keys()):
        fresh, count = name, 1
        while fresh in taken:
            fresh = f"{node.output[0]}/{name}" if count == 1 else f"{node.output[0]}/{name}.{count}"
            count += 1
        names[name] = fresh
        taken.add(fresh)
    for t in branch.initializer:
        copy = graph.initializer.add()
        copy.CopyFrom(t)
        copy.name = names[t.name]
    for s in branch.sparse_initializer:
        sparse = graph.sparse_initializer.add()
        sparse.CopyFrom(s)
        sparse.values.name = names[s.values.name]
    for inner_node in branch.node:
        copied = graph.node.add()
        copied.CopyFrom(inner_node)
        copied.input[:] = [names.get(i, i) for i in inner_node.input]
        copied.output[:] = [names.get(o, o) for o in inner_node.output]
        rename_captured(copied, names)
    for inner, own in zip((o.name for o in branch.output), node.output, strict=True):
        if own and names.get(inner) != own:
            graph.node.append(helper.make_node("Identity", [names.get(inner, inner)], [own], name=own))
