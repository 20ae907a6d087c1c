"""`gru`: recurrent layers over a request-level sequence run for one row."""

from __future__ import annotations

from onnx import NodeProto

from onnxrank.graphs import attribute
from onnxrank.rewrite import Rewrite
from onnxrank.rule import Rule
from onnxrank.values import Abstract, Dims, Level, canonical, extents, is_candidate_symbol, symbols


def recurrent(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """GRU, LSTM and RNN: rows are the batch axis of every input."""
    x = rw.value(node, 0)
    batch = 0 if attribute(node, "layout", 0) else 1
    hidden = extents(rw.value(node, 2).dims)[-1]
    directions = 2 if attribute(node, "direction", b"forward") == b"bidirectional" else 1
    if x.rank != 3 or any(is_candidate_symbol(s) for k, d in enumerate(x.dims) if k != batch for s in symbols([d])):
        return None
    inputs = {k: rw.value(node, k) for k, i in enumerate(node.input) if i}
    inputs[0] = x = rw.held(x, symbols([x.dims[1 - batch]]))
    if any(rw.level(inputs[k]) is Level.CANDIDATE for k in (1, 2, 3) if k in inputs):
        return None
    rows, steps, width, both = x.dims[batch], x.dims[1 - batch], canonical([hidden]), canonical([directions])
    states: Dims = (rows, both, width) if batch == 0 else (both, rows, width)
    outputs: Dims = (rows, steps, both, width) if batch == 0 else (steps, both, rows, width)
    per_row = [v for k, v in inputs.items() if k not in (1, 2, 3)]
    held = {s for v in per_row for s in rw.present(v) if is_candidate_symbol(s)}
    if held:
        if any(rw.level(v) is Level.REQUEST for v in per_row):
            rw.refuse("gru", "part of the sequence or of its initial state depends on the candidate")
        return None
    # Lengths and initial states have a row for every row of the sequence, whether or not they differ between them.
    along = [s for s in symbols([rows]) if any(s in rw.present(v) for v in per_row)]
    inputs = {k: v if k in (1, 2, 3) else rw.held(v, along) for k, v in inputs.items()}
    x = inputs[0]
    names = [rw.tensor(inputs[k]) if k in inputs else "" for k in range(len(node.input))]
    return rw.keep(node, names, [outputs, states, states][: len(node.output)], rw.present(x), rule="gru")


RULE = Rule(
    name="gru",
    title="Runs GRU, LSTM and RNN over request-level sequences for one row.",
    identity="gru(tile(h)) = tile(gru(h))",
    source="amortised user history (arXiv 2412.06924)",
    legal="Sequence, lengths and initial state are all request-level.",
    refuses="A sequence or state that depends on the candidate.",
    exactness="exact",
    operators={"GRU": recurrent, "LSTM": recurrent, "RNN": recurrent},
)
