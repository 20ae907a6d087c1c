"""The walk over a graph that takes its sequences apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onnx import ModelProto, NodeProto

from onnxrank import extents as ex
from onnxrank.emitter import replaced
from onnxrank.errors import ModelError
from onnxrank.extents import Expr
from onnxrank.facts import Facts
from onnxrank.graphs import attribute, captured_by, subgraphs
from onnxrank.operators import Trait, operator, traits
from onnxrank.segments import elementwise, movements, steps
from onnxrank.segments.division import Data, Division, Left, Tensor
from onnxrank.uses import changed_by
from onnxrank.values import Dims, Unrepresentable, is_candidate_symbol

_MOST_SEGMENTS = 8


def sequences(model: ModelProto, facts: Facts, candidate: frozenset[str], fixed: bool = False) -> list[int]:
    """The nodes that join what candidates change and what they do not along an axis of symbolic length.

    Args:
        model: The model.
        facts: Its shapes.
        candidate: Inputs that may differ between candidates.
        fixed: Whether to look for lengths that are numbers instead, of what is multiplied with itself later.

    Returns:
        Their places.
    """
    nodes = model.graph.node
    changed = changed_by(nodes, candidate)
    found = [k for k, node in enumerate(nodes) if _joins(node, facts, changed, fixed)]
    return [k for k in found if _meets_itself(model, nodes[k].output[0])] if fixed else found


def _joins(node: NodeProto, facts: Facts, changed: set[str], fixed: bool) -> bool:
    """Whether a node joins levels along an axis of symbolic length, or a fixed one."""
    if operator(node) != "Concat" or len(node.input) > _MOST_SEGMENTS or len({i in changed for i in node.input}) < 2:
        return False
    sizes = facts.sizes.get(node.output[0], ())
    if not sizes or not facts.opaque.keys().isdisjoint(s for n in sizes for s in ex.symbols_of(n)):
        return False
    size = sizes[attribute(node, "axis", 0) % len(sizes)]
    if not isinstance(size, Expr):
        return fixed
    return not fixed and not any(map(is_candidate_symbol, size.symbols))


def _meets_itself(model: ModelProto, name: str) -> bool:
    """Whether both operands of a product come from a tensor, as those of attention do."""
    behind = changed_by(model.graph.node, [name])
    return any(operator(n) in ("MatMul", "Einsum") and len(behind.intersection(n.input)) == 2 for n in model.graph.node)


def divided(
    model: ModelProto,
    facts: Facts,
    dtypes: Mapping[str, int],
    inputs: Mapping[str, Dims],
    candidate: frozenset[str],
    data: Data,
    places: Sequence[int],
) -> ModelProto:
    """A model with its sequences in segments; what cannot be followed reads them joined again.

    Args:
        model: The model, functions inlined.
        facts: Its shapes and constants.
        dtypes: Element type per tensor, where known.
        inputs: Shapes of its inputs.
        candidate: Inputs that may differ between candidates.
        data: Entries of constants; None for what is none.
        places: The nodes that join a sequence (`sequences`).

    Raises:
        ModelError: An extent that segments are joined again to cannot be computed.
    """
    try:
        d = Division(model, facts, dtypes, inputs, candidate, data, places)
    except Left:
        return model

    def write(node: NodeProto) -> bool:
        made = _step(d, node)
        if made is None:
            for name in (*node.input, *sorted(captured_by(node))):
                d.join(name)
            elementwise.note(d, node)
            return False
        d.tensors.update(zip(node.output, made, strict=False))
        return True

    def finish() -> None:
        for o in model.graph.output:
            d.join(o.name)

    try:
        out = replaced(model, d.emit, write, finish)
    except Unrepresentable as e:
        raise ModelError(str(e)) from e
    del out.graph.value_info[:]
    return out


def _step(d: Division, node: NodeProto) -> Sequence[Tensor] | None:
    """What a node makes, segment by segment; None if it is left as it is."""
    op = operator(node)
    if (op != "Split" and any(node.output[1:])) or not all(node.output[:1]) or subgraphs(node):
        return None
    mine = any(d.touched(i) or (Trait.ELEMENTWISE in traits(node) and elementwise.is_mask(d, i)) for i in node.input)
    step = steps.STEPS.get(op) if mine else steps.SOURCES.get(op)
    try:
        if step is None or not (mine or any(n in d.totals for n in d.sizes(node.output[0]))):
            return None
        node = _apart(d, node)
        made = step(d, node)
        return made if isinstance(made, list) else [made]
    except (Left, ex.Unproved, Unrepresentable):
        return None
    finally:
        d.lead = ()


def _apart(d: Division, node: NodeProto) -> NodeProto:
    """A node, with the rows of merged operands kept apart."""
    given = d.operands(node)
    d.lead = movements.lead(given)
    return movements.by_row(node, given, len(d.facts.sizes[node.output[0]])) if d.lead else node
